"""Checkpoints for other libraries, and theirs for this one."""
