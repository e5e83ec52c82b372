"""Text from a checkpoint in the shell: ``nystrom generate`` and ``nystrom fill``."""
