"""What ``nystrom convert from-hf`` reads: ``sources/NAME.py`` registers the kinds of checkpoints that there are.

The modules are all imported for the help text, so none of them may import torch when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data_pipeline.errors import UserError
from data_pipeline.registry import Registry
from pretrain.convert.their_config import CONFIG, model_type

if TYPE_CHECKING:
    import torch

    from pretrain.checkpoint.account import Entry
    from pretrain.config import RunConfig
    from pretrain.model.config import ModelConfig

PARTS = {
    "description": "what it reads, for the help text and for messages",
    "matches": "whether a path is one of these",
    "read": "its model, as ours",
}


@dataclass(frozen=True)
class Converted:
    """Another library's checkpoint as a model of ours, before it is written."""

    model: ModelConfig
    """As the weights compute now; positions of a learned table are all trained."""
    weights: Mapping[str, torch.Tensor] = field(repr=False)
    """Float32 on the CPU, by our names, a tied weight once. What is not here is newly initialised."""
    entries: tuple[Entry, ...]
    """Each of our tensors, taken or new, by our name, and each of theirs that is left over, by their name."""
    origin: Mapping[str, list[str]]
    """Our names -> the tensors of theirs that went into each, and "" -> those left over."""
    length: int
    """The longest text that it was trained on, in tokens."""
    tokenizer: Path | None
    """A folder that :meth:`Tokenizer.load` reads, or None if the checkpoint has none."""
    notes: tuple[str, ...] = ()
    """What the user must know, a line each."""
    tokens: int = 0
    """That it was trained on; 0 where the checkpoint does not say."""
    run: RunConfig | None = None
    """Of the run that trained it here, if it was one."""


class Source:
    """One kind of checkpoint. Subclasses define ``name`` and all of :data:`PARTS`."""

    name: ClassVar[str]
    description: ClassVar[str]

    def matches(self, path: Path) -> bool:
        """Whether ``path``, which exists, is a checkpoint of this kind; at most one kind may say so."""
        raise NotImplementedError

    def read(self, path: Path) -> Converted:
        """Read it. Raises :class:`UserError` for what is damaged, missing, or cannot be ours."""
        raise NotImplementedError


SOURCES: Registry[Source] = Registry("source of convert from-hf", "pretrain.convert.sources", Source, PARTS)


def find_source(path: Path) -> Source:
    """The kind of checkpoint at ``path``; raises :class:`UserError` with the known kinds if it is none of them."""
    if not path.exists():
        raise UserError(
            f"{path} does not exist: give a folder or file on this machine (`hf download NAME --local-dir FOLDER` "
            "fetches one from the hub)"
        )
    for kind in SOURCES.all().values():
        source = kind()
        if source.matches(path):
            return source
    found = model_type(path) if path.is_dir() else ""
    what = f"is a {found!r} of transformers" if found else f"has no {CONFIG}" if path.is_dir() else "is another file"
    if path.is_dir() and not found and (path / CONFIG).is_file():
        what = f"has a {CONFIG} without a model_type"
    known = "".join(f"\n  {kind.description}" for kind in SOURCES.all().values())
    raise UserError(f"{path} {what}, which cannot be converted. What can:{known}")
