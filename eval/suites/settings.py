"""Moved to ``eval.task``; importable from here for one version."""

from data_pipeline.moved import moved

__getattr__ = moved(__name__, "eval.task", "Settings", "quotes_field")
