"""Code that a folder for transformers carries: :mod:`pretrain.convert.code` copies it there, with what it imports.

It may import torch and transformers, and of this project what :mod:`pretrain.convert.code` can carry.
"""
