"""What a kind of optimizer says of itself, so that nothing else has to know it by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from data_pipeline.registry import Registry

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from pretrain.config import OptimizerConfig

DECAY, NO_DECAY = "decay", "no_decay"


class OptimizerKind:
    """Base of the kinds. A kind registers itself with ``@KINDS.register`` in a module of ``kinds/``.

    The configuration and ``nystrom plan`` read it before torch is imported: a module of ``kinds/`` imports torch in
    :meth:`build` only. The name is what ``optimizer.kind`` says and what a resume compares.
    """

    name: ClassVar[str]
    """What ``optimizer.kind`` says."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Keys of the block ``optimizer`` that are something else for this kind if they are left out."""
    settings: ClassVar[Mapping[str, float]] = {}
    """Hyper-parameters that no other kind has, with their defaults; a run sets them in ``optimizer.settings``."""
    matrices: ClassVar[str | None] = None
    """Name of a group for the weights of the linear maps in the layers, for a kind that steps them in another way."""

    if TYPE_CHECKING:  # the parts that each kind must have: here they would be found, and never missing

        @staticmethod
        def states(group: str) -> int:
            """Float32 values that it keeps for each weight of a group (``decay``, ``no_decay``, ``matrices``)."""

        @staticmethod
        def hyperparameters(group: str, config: OptimizerConfig) -> dict[str, Any]:
            """Those of a group, as the optimizer takes them, without learning rate and ``weight_decay``."""

        @staticmethod
        def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
            """The optimizer over these groups, which have all hyper-parameters but the learning rate.

            It gets ZeRO's flat partitions of many weights in place of the weights: a rule that works element by
            element needs to know nothing of that, another one see :class:`CutByZero`. Parameters without a gradient
            must stay as they are.
            """


PARTS = {
    "states": "the float32 values that it keeps for each weight",
    "hyperparameters": "the hyper-parameters of a group",
    "build": "the optimizer itself",
}
KINDS: Registry[OptimizerKind] = Registry("optimizer", "pretrain.optim.kinds", OptimizerKind, PARTS)


class Piece(NamedTuple):
    """What one process holds of a weight: elements [start, start + numel) of it lie at ``at`` of a flat tensor."""

    shape: tuple[int, ...]
    start: int
    numel: int
    at: int
    shared: bool = False  # between processes


@runtime_checkable
class CutByZero(Protocol):
    """An optimizer that has to know where ZeRO has cut the weights."""

    def cut(
        self, pieces: Iterable[tuple[torch.Tensor, Piece]], process_group: dist.ProcessGroup, device: torch.device
    ) -> None:
        """Called once, with the flat tensor and the place in it of every weight, on all processes alike."""
