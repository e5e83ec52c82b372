"""The loss over a vocabulary, three ways."""
