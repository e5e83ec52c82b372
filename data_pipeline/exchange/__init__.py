"""Tokens to and from the formats of other programs: Megatron-LM's indexed datasets, datatrove's .ds files, Parquet."""
