"""The kinds of checkpoints that ``nystrom convert from-hf`` reads: each module here registers one or more."""
