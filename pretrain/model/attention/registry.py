"""The forms of attention by name.

A form's module imports torch, and a command that only reads a configuration (``--help``, a typing error in a file) must
not wait for that. The registry is lazy therefore: ``forms/NAME.py`` registers the form NAME.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_pipeline.registry import Registry
from pretrain.model.attention.form import PARTS, Form

if TYPE_CHECKING:
    from pretrain.model.config import ModelConfig

FORMS: Registry[Form] = Registry("form of attention", "pretrain.model.attention.forms", Form, PARTS, lazy=True)


def form_of(config: ModelConfig) -> Form:
    """The form of a model. Raises as :meth:`Registry.get`."""
    return FORMS.get(config.attention)(config)
