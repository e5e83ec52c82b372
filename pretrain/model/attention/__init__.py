"""Attention: exact, bidirectional Nystrom and causal Nystrom, on any layout of sequences in a batch."""
