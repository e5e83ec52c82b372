"""Completion of ``nystrom`` in a shell, by argcomplete: the code to source, and what a press of Tab offers."""
