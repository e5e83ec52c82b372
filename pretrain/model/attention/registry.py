"""The forms of attention by name.

A form's module imports torch, and a command that only reads a configuration (``--help``, a typing error in a file) must
not wait for that. The registry is lazy therefore: ``forms/NAME.py`` registers the form NAME.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_pipeline.registry import Registry
from pretrain.model.attention.form import PARTS, Form
from pretrain.model.attention.pattern import Attention, shortest

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig

FORMS: Registry[Form] = Registry("form of attention", "pretrain.model.attention.forms", Form, PARTS, lazy=True)


def pattern_of(word: str) -> Attention:
    """A form's name, or the names of a pattern as one word: ``window/window/nystrom``. Raises ``ValueError`` for an
    unknown name, with the known ones."""
    return shortest([FORMS.check(name) for name in word.split("/")])


def form_of(config: ModelConfig) -> Form:
    """The form of a model, or of a layer, with one form; of one with several ask :func:`forms_of`, or
    ``config.of_layer``. Raises as :meth:`Registry.get`."""
    if not isinstance(config.attention, str):
        raise ValueError(f"attention {config.attention} is a pattern: ask a layer for its form")
    return FORMS.get(config.attention)(config)


def forms_of(config: ModelConfig) -> dict[str, Form]:
    """The forms that a model's layers have, by name, in the order of their first layers; usually one."""
    return {name: FORMS.get(name)(config) for name in dict.fromkeys(config.attention_by_layer)}
