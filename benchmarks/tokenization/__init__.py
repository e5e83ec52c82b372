"""Text to token ids on disk: ours beside the bare tokenizer, `datasets.map` and datatrove, in one run."""
