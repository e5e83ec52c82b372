"""Tokenizers: training, loading, encoding."""
