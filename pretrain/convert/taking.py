"""From another checkpoint's tensors to ours: each of theirs is taken or left over, each of ours taken or new.

A tensor of the encoder that is missing, has another shape, or is unknown here is an error with its name. A missing head
is no error: checkpoints of other tasks have none, and training makes a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError
from pretrain.checkpoint.account import Entry
from pretrain.convert.source import Converted
from pretrain.convert.tensor_names import BIAS, DECODER, POSITIONS, WORDS, Names
from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from pretrain.config import RunConfig

MOST_LINES = 6
"""Faults that a message lists."""


class Taking:
    """Collects what becomes of the tensors ``there`` (by their names) for a model ``config``."""

    def __init__(self, there: Mapping[str, torch.Tensor], config: ModelConfig, where: str) -> None:
        self.there, self.where = dict(there), where
        self.wanted = shapes_of(config)
        self.weights: dict[str, torch.Tensor] = {}
        self.entries: list[Entry] = []
        self.origin: dict[str, list[str]] = {}
        self.faults: list[str] = []
        self.notes: list[str] = []
        self._types: dict[str, int] = {}

    def take(self, ours: str, *theirs: str, value: torch.Tensor | None = None, why: str = "") -> None:
        """Take ``theirs`` as ``ours``; ``value`` is what several of them, or a part of one, amount to."""
        found = [name for name in theirs if name in self.there]
        if not found:
            self.faults.append(f"{theirs[0]} is missing")
            return
        taken = self.as_float32(found[0], self.there[found[0]]) if value is None else value
        self.origin[ours] = found
        if tuple(taken.shape) != self.wanted[ours]:
            self.faults.append(f"{found[0]} is {tuple(taken.shape)}, and {self.wanted[ours]} by the configuration")
            return
        self.weights[ours] = taken
        self.entries.append(Entry(ours, "taken", tuple(taken.shape), why))

    def leave(self, name: str, why: str) -> None:
        """A tensor of theirs that is not used."""
        self.origin.setdefault("", []).append(name)
        self.entries.append(Entry(name, "left over", tuple(self.there[name].shape), why))

    def as_float32(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The numbers of ``tensor`` as float32, contiguous: exactly what they are in 16 bits."""
        import torch

        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in ("float32", "bfloat16", "float16", "float64"):
            self.faults.append(f"{name} holds {kind}, and no floating-point numbers: quantised weights cannot be read")
            return torch.zeros(tensor.shape)
        self._types[kind] = self._types.get(kind, 0) + 1
        out = tensor.detach().to(torch.float32).contiguous()
        if not bool(torch.isfinite(out).all()):
            self.faults.append(f"{name} has values that are not finite")
        return out

    def finish(self, why_unused: Callable[[str], str] = lambda name: "") -> None:
        """Account for what is left on both sides. Raises :class:`UserError` that names tensors.

        ``why_unused``: why one of their tensors has no place here; "" for one that should have, which is a fault.
        """
        used = {name for theirs in self.origin.values() for name in theirs}
        for name in sorted(self.there.keys() - used):
            why = why_unused(name)
            if why:
                self.leave(name, why)
            else:
                self.faults.append(f"{name} {tuple(self.there[name].shape)} has no place in this model")
        for name, shape in self.wanted.items():
            if name not in self.weights:
                self.entries.append(Entry(name, "new", shape, "the source has none"))
        if self.faults:
            more = [f"and {len(self.faults) - MOST_LINES} more"] if len(self.faults) > MOST_LINES else []
            raise UserError(
                f"{self.where} cannot be converted:\n  "
                + "\n  ".join([*self.faults[:MOST_LINES], *more])
                + "\nIts weights and its config.json do not belong together, or it is another kind of model"
            )
        self.notes += [
            f"{count} tensors are {kind} there; "
            + ("float32 holds the same numbers" if kind != "float64" else "they are rounded to float32")
            for kind, count in sorted(self._types.items())
            if kind != "float32"
        ]

    def converted(
        self,
        config: ModelConfig,
        tokenizer: Path | None,
        length: int,
        notes: Sequence[str],
        *,
        tokens: int = 0,
        run: RunConfig | None = None,
    ) -> Converted:
        """All of it as :class:`Converted`; ``length``: the longest text that the source was trained on, in tokens."""
        return Converted(
            model=config,
            weights=self.weights,
            entries=tuple(self.entries),
            origin=self.origin,
            length=length,
            tokenizer=tokenizer,
            notes=(*notes, *self.notes),
            tokens=tokens,
            run=run,
        )


def take_all(there: Mapping[str, torch.Tensor], config: ModelConfig, names: Names, where: str) -> Taking:
    """All tensors of a masked model by its table of names. Raises :class:`UserError` that names what does not fit."""
    modern = {_modern(name): tensor for name, tensor in there.items()}
    if len(modern) < len(there):
        raise UserError(f"{where} has a layer norm twice, with weight and bias and with gamma and beta")
    renamed = sorted(there.keys() - modern.keys())
    there = modern
    if not any(name.startswith(names.base) for name in there):
        names = names.without_head()
    taking = Taking(there, config, where)
    _take_positions(taking, names)
    has_head = any(names.of(theirs) + ".weight" in there for ours, theirs in names.modules.items() if "head." in ours)
    for ours, theirs in names.pairs(config.num_layers):
        if ours in taking.wanted and (has_head or not ours.startswith("head.")):
            taking.take(ours, theirs)
    if has_head:
        _take_decoder(taking, config, names)
    taking.finish(names.why_unused)
    if renamed:
        taking.notes.append(f"gamma and beta of layer norms are named weight and bias here, as {renamed[0]}")
    return taking


def _modern(name: str) -> str:
    """Checkpoints converted from TensorFlow call weight and bias of a layer norm gamma and beta."""
    for old, new in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _take_positions(taking: Taking, names: Names) -> None:
    """The rows of our table: two that are never read, then their positions from 0 on, with token type 0 in each."""
    import torch

    from pretrain.model.positions import POSITION_OFFSET

    positions, types = names.of(names.positions), names.of(names.types)
    if positions not in taking.there:
        taking.faults.append(f"{positions} is missing")
        return
    table = taking.as_float32(positions, taking.there[positions])
    words = []
    if names.first_position != POSITION_OFFSET:
        table = torch.cat([table.new_zeros(POSITION_OFFSET, table.shape[1]), table[names.first_position :]])
        words.append(f"position 0 is row {names.first_position} there")
    if types in taking.there:
        row = taking.as_float32(types, taking.there[types])[0]
        if row.shape[0] != table.shape[1]:
            taking.faults.append(f"{types} is {tuple(taking.there[types].shape)}, and {positions} {tuple(table.shape)}")
            return
        if bool(row.any()):  # x + 0 is another number for x = -0
            table = table + row
            words.append("with token type 0 added")
        if bool((taking.there[types] != taking.there[types][:1]).any()):
            taking.notes.append("texts of a pair are not told apart here: token types other than 0 are not used")
    taking.take(POSITIONS, positions, types, value=table, why=", ".join(words))


def _take_decoder(taking: Taking, config: ModelConfig, names: Names) -> None:
    """The output head's table and bias, each saved once or twice."""
    found = [name for name in names.biases if name in taking.there]
    if not found:
        taking.faults.append(f"{names.biases[-1]} is missing")
    elif config.tie_embeddings and not all(taking.there[n].equal(taking.there[found[0]]) for n in found):
        taking.faults.append(f"{' and '.join(found)} differ, and are one tensor by the configuration")
    else:
        taking.take(BIAS, found[0])
        for name in found[1:]:
            taking.leave(name, f"{found[0]} is used")
    if not config.tie_embeddings:
        taking.take(DECODER, names.decoder)
    elif names.decoder in taking.there:
        words = taking.there.get(names.of(names.tensors[WORDS]))
        if words is not None and taking.there[names.decoder].equal(words):
            taking.leave(names.decoder, "the word table, which the head shares")
        else:
            taking.faults.append(
                f"{names.decoder} is not the word table, and is by the configuration (tie_word_embeddings: false would "
                "keep both)"
            )


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors by name, a tied weight once; no weights are allocated."""
    import torch

    from pretrain.model.transformer import build_model

    with torch.device("meta"):
        model = build_model(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
