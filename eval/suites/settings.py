"""Moved to ``eval.task``; importable from here for one version."""

from pretrain.moved import moved

__getattr__ = moved(__name__, "eval.task", "Settings", "quotes_field")
