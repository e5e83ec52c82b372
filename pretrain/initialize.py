"""A new run that starts with trained weights (``init_from``): where they are from, and what becomes of each tensor.

The first process reads the source, before anything is written, and hands each tensor to the others when their engines
are built. So one process alone finds out that a source is missing, damaged or another model, and the source need not be
in reach of the others. A checkpoint keeps its path and the hash of its weights; a resume never reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from data_pipeline.tokenization.tokenizer import Tokenizer
from pretrain.checkpoint import commit
from pretrain.checkpoint.account import POSITIONS, Entry, account, in_words, other_settings
from pretrain.checkpoint.load import INFO, LoadedModel, load_model, read_info, unique_weights
from pretrain.checkpoint.resume import ROTARY_KEYS
from pretrain.config import RunConfig
from pretrain.curriculum.stages import stage_model, trained_length
from pretrain.model.attention.pattern import written
from pretrain.model.positions import POSITION_OFFSET
from pretrain.sources import Inputs

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pretrain.distributed.world import World

FILE = "init_from.json"
"""In the run folder: the whole account of the tensors."""


@dataclass(frozen=True)
class Source:
    """Where a run's first weights are from; equal on all processes but for the values."""

    path: str
    weights_hash: str
    tokens: int  # that they were trained on
    length: int  # longest sequence that they were trained on
    config: RunConfig  # of the new run, with what follows from the source
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    values: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Float32 on the CPU, by the names of the new model; on the first process only."""

    def identity(self) -> dict[str, Any]:
        """What checkpoints keep of it."""
        return {"path": self.path, "weights_hash": self.weights_hash, "tokens": self.tokens, "length": self.length}

    def in_words(self) -> str:
        """Lines for the start of the run."""
        head = f"Starts with the weights of {self.path} ({self.tokens:,} tokens, hash {self.weights_hash[:12]})."
        return "\n".join([head, *(f"  {line}" for line in [*in_words(self.entries), *self.notes])])

    def write(self, run_dir: Path) -> None:
        """Write ``init_from.json``; raises ``OSError``."""
        tensors = [
            {"name": e.name, "fate": e.fate, "shape": list(e.shape), **({"why": e.why} if e.why else {})}
            for e in self.entries
        ]
        body = {**self.identity(), "tensors": tensors, "notes": list(self.notes)}
        write_atomic(run_dir / FILE, (json.dumps(body, indent=1) + "\n").encode())

    def value_of(self, world: World) -> Callable[[str], torch.Tensor | None]:
        """For :meth:`TrainingEngine.set_weights`: the first process hands out each tensor, and lets go of it."""
        taken = {entry.name for entry in self.entries if entry.fate == "taken"}
        return lambda name: world.broadcast(self.values.pop(name, None)) if name in taken else None


def check_place(config: RunConfig, moved_aside: bool) -> None:
    """Refuse a source that is not there or lies in the run's own folder; quick, and before torch is imported.

    ``moved_aside``: ``--resume never`` would move that folder.
    """
    path = Path(config.init_from or "")
    if not path.is_dir():
        raise UserError(
            f"init_from: {path} does not exist: give the folder of a run, of a checkpoint in it, or an export"
        )
    own = config.run_dir.resolve()
    if own in (path.resolve(), *path.resolve().parents):
        raise UserError(
            f"init_from: {path} lies in this run's own folder {config.run_dir}"
            + (", which --resume never moves aside" if moved_aside else "")
            + ": give the new run another `name`, or copy the weights to another place"
        )


def read_source(inputs: Inputs, world: World) -> Source:
    """Read and check the source on the first process; all must call it and get the same, or its :class:`UserError`."""
    from pretrain.distributed.world import run_on_first

    values: dict[str, Any] = {}

    def read() -> Source:
        source, found = _read(inputs.config, inputs.train.shards.tokenizer())
        values.update(found)
        return source

    source: Source = run_on_first(world, read)
    source.values.update(values)
    return source


def load_initial(model: nn.Module, config: RunConfig, tokenizer: Tokenizer, run_dir: Path) -> None:
    """Give a model, as its seed drew it, the weights that the run in ``run_dir`` began with.

    Raises :class:`UserError` if the source is gone or has other weights by now.
    """
    source, values = _read(config, tokenizer)
    try:
        began = json.loads((run_dir / FILE).read_text())["weights_hash"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run_dir / FILE} cannot be read: {error}") from None
    if source.weights_hash != began:
        raise UserError(
            f"init_from: {source.path} has other weights by now than those that the run in {run_dir} began with"
        )
    model.load_state_dict(values, strict=False)


def _read(config: RunConfig, tokenizer: Tokenizer) -> tuple[Source, dict[str, torch.Tensor]]:
    """The source, and what the run takes of it: float32 on the CPU, by name and in the shape of the new model."""
    assert config.init_from is not None
    path = Path(config.init_from)
    try:
        loaded = load_model(_folder_to_load(path))
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    notes = [check_tokenizer(loaded.tokenizer, tokenizer, str(path))]
    config, settled = settle(config, loaded)
    here = stage_model(config, 0)
    shapes = {name: tuple(value.shape) for name, value in unique_weights(loaded.model).items()}
    entries = account(shapes, target_shapes(config), loaded.model_config, here, f"init_from {path}")
    differ = other_settings(loaded.model_config, here)
    notes += [f"other settings: {'; '.join(differ)}" if differ else None, *settled]
    # With a tied head under both its names: a head that has a matrix of its own here starts as the word table there.
    everything = loaded.model.state_dict()
    values = {entry.name: everything[entry.name].clone() for entry in entries if entry.fate == "taken"}
    if POSITIONS in values:
        rows = next(entry.shape[0] for entry in entries if entry.name == POSITIONS)
        values[POSITIONS] = resized_positions(values[POSITIONS], loaded.model_config.trained_positions, rows)
    source = Source(
        path=str(path),
        weights_hash=loaded.weights_hash,
        tokens=loaded.tokens,
        length=source_length(loaded),
        config=config,
        entries=entries,
        notes=tuple(note for note in notes if note),
    )
    return source, values


def _folder_to_load(path: Path) -> Path:
    """A run of which only the export is left means that."""
    is_other = (path / INFO).is_file() or (path / commit.MANIFEST).is_file()
    if is_other or commit.newest(path / "checkpoints") is not None or read_info(path / "export") is None:
        return path
    return path / "export"


def target_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the run's parameters by name, a tied weight once; no weights are allocated."""
    import torch

    from pretrain.model.transformer import build_model

    with torch.device("meta"):
        model = build_model(stage_model(config, 0))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def source_length(loaded: LoadedModel) -> int:
    """The longest sequence that the weights were trained on, in tokens, before their run too."""
    return max(trained_length(loaded.run_config, loaded.tokens), loaded.run_config.init_length or 0)


def settle(config: RunConfig, loaded: LoadedModel) -> tuple[RunConfig, list[str]]:
    """The configuration with what positions take from the source, and lines about it.

    Where both have the same kind of positions, the rules for longer stages begin at the source's length. Base and scale
    of rotary angles are those it ended with, unless the configuration names others.
    """
    there, here = loaded.model_config, config.model
    if there.positions != here.positions and not (there.rotary and here.rotary):
        old, new = written(there.positions), written(here.positions)
        return config, [f"positions are {old} there and {new} here: they are learned anew"]
    length = config.init_length or source_length(loaded)
    config = config.model_copy(update={"init_length": length})
    if not here.rotary:
        return config, []
    left_out = [key for key in ROTARY_KEYS if key not in here.model_fields_set]
    if not there.rope_scaling == here.rope_scaling == "yarn":
        left_out = [key for key in left_out if key != "rope_original_length"]
        scaled = there.rope_position_scale != 1 and "rope_position_scale" in left_out
        if scaled and "yarn" in (there.rope_scaling, here.rope_scaling):
            raise UserError(
                f"init_from: rope_scaling is {there.rope_scaling} there and {here.rope_scaling} here, and positions "
                f"are scaled by {there.rope_position_scale:.4g} there: yarn does that to slow angles only. Set "
                f"model.rope_scaling: {there.rope_scaling}, or model.rope_position_scale to a value of your own"
            )
    model = here.model_copy(update={key: getattr(there, key) for key in left_out})
    words = f"base {model.rope_theta:,.6g}, scale {model.rope_position_scale:.4g}"
    line = f"rotary angles continue from {length:,} tokens: {words}"
    if (model.rope_theta, model.rope_position_scale) != (there.rope_theta, there.rope_position_scale):
        line = (
            f"rotary angles: {words}; the source ended with base {there.rope_theta:,.6g}, scale "
            f"{there.rope_position_scale:.4g} (leave model.rope_theta and model.rope_position_scale out to take those)"
        )
    return config.model_copy(update={"model": model}), [line]


def check_tokenizer(there: Tokenizer, here: Tokenizer, where: str) -> str | None:
    """Refuse a vocabulary in which an id is another token than in the source's; returns a note if the rest differs."""
    if there.hash == here.hash:
        return None
    old, new = ({number: text for text, number in t.vocabulary().items()} for t in (there, here))
    other = [number for number in sorted(old.keys() & new.keys()) if old[number] != new[number]]
    if other:
        first = other[0]
        raise UserError(
            f"init_from: the weights of {where} were trained with another tokenizer than the text of this run: "
            f"{len(other):,} ids mean other tokens (id {first} is {old[first]!r} there and {new[first]!r} here). "
            "Prepare the text with the tokenizer of the source (`nystrom data prepare --tokenizer`)"
        )
    if len(old) != len(new):
        return f"the tokenizer has {len(new):,} tokens, and {len(old):,} there; common ids mean the same"
    return "the tokenizer has the vocabulary that it has there, and another way of cutting text"


def resized_positions(table: torch.Tensor, trained: int | None, rows: int) -> torch.Tensor:
    """A table (2 + P, width) with ``rows`` rows, the two before position 0 included.

    Position p has the row of position p % ``trained`` (None: of all P), as a longer stage extends it.
    """
    import torch

    positions = torch.arange(rows - POSITION_OFFSET) % (trained or table.shape[0] - POSITION_OFFSET)
    return torch.cat([table[:POSITION_OFFSET], table[positions + POSITION_OFFSET]])
