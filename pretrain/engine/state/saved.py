"""What DeepSpeed wrote, by the names of the parameters: every state, whole or a stretch of it, whatever the ZeRO stage.

The files (0.19.8) hold flat tensors without names. Stages 1 and 2: for each group of parameters each process has an
equal stretch of them laid end to end, in the order of ``param_shapes``. Stage 3: each process has an equal stretch of
each parameter, the last one padded, and those laid end to end. Stage 0: one file with everything. They are mapped into
memory, so that only what is asked for is read.

DeepSpeed's own readers are not used. ``ds_to_universal`` knows no stage 0 and no other state than AdamW's two, and
writes everything a second time. ``zero_to_fp32`` knows the weights only, and not those of stage 1 with float32
accumulation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline.errors import UserError
from pretrain.engine.state.fragments import MASTER, is_per_element

GROUPS = "parameter_groups"
"""Key of the names of the parameters, group by group, that a checkpoint of ours has besides DeepSpeed's."""


@dataclass(frozen=True)
class ZeroLayout:
    """What must be equal for DeepSpeed's own load to read a checkpoint, which it does by position alone."""

    world_size: int
    zero_stage: int
    # For each flat tensor (at stage 0 each group) the names of what lies in it and the padding after each.
    names: tuple[tuple[str, ...], ...]
    paddings: tuple[tuple[int, ...], ...]
    # Whether it is of DeepSpeed's BF16_Optimizer (stage 1 with float32 accumulation), whose files differ.
    bf16_optimizer: bool = False
    # Of the weights that the model computes with: the master weights are float32 in any case, but a load by DeepSpeed
    # puts all that it finds as it finds it.
    precision: str = "fp32"


class _Owner(NamedTuple):
    """A tensor that the optimizer knew, of one process: its own values and per-element states, flat; its scalars."""

    values: dict[str, torch.Tensor]
    scalars: dict[str, Any]
    numel: int  # padding included


class _Stretch(NamedTuple):
    """Elements [start, start + numel) of a parameter lie in ``owner`` at ``offset``."""

    owner: _Owner
    offset: int
    start: int
    numel: int


class SavedStates:
    """The states of all parameters in the checkpoint ``folder``.

    ``shapes``: of every parameter that was optimized, by name. ``groups``: the optimizer's groups with their
    hyper-parameters. ``buffers``: the model's persistent ones. ``counters``: DeepSpeed's own. ``loss_scaler``: its
    object, None at stage 0.
    """

    def __init__(self, folder: Path) -> None:
        """Map the files. Raises :class:`UserError` if they are not all there; DeepSpeed must be imported."""
        self.folder = folder
        model_files = _by_rank(folder.glob("*mp_rank_00_model_states.pt"))
        optimizer_files = _by_rank(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))
        if not model_files:
            raise UserError(f"checkpoint {folder} has no model states that this program can read")
        model = _load(model_files[0])
        self.world_size = int(model["dp_world_size"])
        if optimizer_files and len(optimizer_files) != self.world_size:
            raise UserError(
                f"checkpoint {folder} was written by {self.world_size} processes and has the optimizer states of "
                f"{len(optimizer_files)}"
            )
        self.counters = {key: model[key] for key in ("global_steps", "global_samples", "skipped_steps")}
        buffer_names = set(model["buffer_names"])
        self.buffers = {name: value for name, value in model["module"].items() if name in buffer_names}
        self.loss_scaler: Any = None
        self.shapes: dict[str, torch.Size] = {}
        self._stretches: dict[str, list[_Stretch]] = {}
        if optimizer_files:
            self._read_zero([_load(path)["optimizer_state_dict"] for path in optimizer_files], model)
        else:
            self._read_stage_0(model)

    def state_names(self, name: str) -> list[str]:
        """Names of the parameter's per-element states: ``fp32`` first, then the optimizer's."""
        return list(self._stretches[name][0].owner.values)

    def scalars(self, name: str) -> dict[str, Any]:
        """The parameter's other states: ``step``."""
        return self._stretches[name][0].owner.scalars

    def read(self, name: str, state: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of a state of the flattened parameter, on the CPU; a copy."""
        stop = self.shapes[name].numel() if stop is None else stop
        out = torch.empty(stop - start, dtype=self._stretches[name][0].owner.values[state].dtype)
        for owner, offset, first, numel in self._stretches[name]:
            low, high = max(start, first), min(stop, first + numel)
            if low < high:
                at = offset + low - first
                out[low - start : high - start] = owner.values[state][at : at + high - low]
        return out

    def full(self, name: str, state: str = MASTER) -> torch.Tensor:
        """The whole state: float32, in the parameter's shape."""
        return self.read(name, state).float().view(self.shapes[name])

    def _read_zero(self, files: list[dict[str, Any]], model: dict[str, Any]) -> None:
        first = files[0]
        # BF16_Optimizer, the one that does not note its stage, is only used at stage 1.
        bf16_optimizer = "zero_stage" not in first
        stage = 1 if bf16_optimizer else int(first["zero_stage"])
        shapes = [dict(group) for group in model["param_shapes"]]
        paddings = first.get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
        names = tuple(tuple(group) for group in shapes)
        self.layout = ZeroLayout(
            self.world_size,
            stage,
            names,
            tuple(tuple(group) for group in paddings),
            bf16_optimizer=bf16_optimizer,
            precision=_precision(model["ds_config"]),
        )
        self.loss_scaler = first.get("loss_scaler")
        base = [file["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] for file in files]
        self.groups = base[0]["param_groups"]
        masters = [file["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for file in files]
        # Position of each flat tensor's entry in the optimizer's state: at stage 3 a group may have several.
        keys = [key for group in self.groups for key in group["params"]]
        for i, group in enumerate(shapes):
            owners = []
            for rank, file in enumerate(files):
                # Stages 1 and 2 cut the padding off the weights only.
                cut = 0 if stage == 3 or bf16_optimizer else file["group_paddings"][i]
                shape = torch.Size([masters[rank][i].numel() + cut])
                owners.append(_owner(masters[rank][i], shape, base[rank]["state"].get(keys[i], {})))
            self._lay_out(group, owners, paddings[i], stage)

    def _lay_out(self, group: dict[str, torch.Size], owners: list[_Owner], paddings: list[int], stage: int) -> None:
        """Where each process's tensor of a group has which parameters."""
        offset = 0
        for (name, shape), padding in zip(group.items(), paddings, strict=True):
            numel = shape.numel()
            self.shapes[name] = torch.Size(shape)
            self._stretches[name] = out = []
            if stage == 3:
                width = -(-numel // len(owners))
                for rank, owner in enumerate(owners):
                    start = min(rank * width, numel)
                    out.append(_Stretch(owner, offset, start, min(width, numel - start)))
                offset += width
                continue
            begin = 0
            for owner in owners:
                low, high = max(offset, begin), min(offset + numel, begin + owner.numel)
                if low < high:
                    out.append(_Stretch(owner, low - begin, low - offset, high - low))
                begin += owner.numel
            offset += numel + padding

    def _read_stage_0(self, model: dict[str, Any]) -> None:
        optimizer = model["optimizer"]
        self.groups = optimizer["param_groups"]
        names = model.get(GROUPS) or _groups_by_axes(model["module"], self.buffers)
        if [len(group) for group in names] != [len(group["params"]) for group in self.groups]:
            raise UserError(f"checkpoint {self.folder}: the optimizer's groups are not those of its weights")
        none = tuple((0,) * len(group) for group in names)
        self.layout = ZeroLayout(self.world_size, 0, tuple(map(tuple, names)), none)
        for group, entry in zip(names, self.groups, strict=True):
            for name, key in zip(group, entry["params"], strict=True):
                weights, state = model["module"][name], optimizer["state"].get(key, {})
                if any(isinstance(v, torch.Tensor) and v.ndim and v.shape != weights.shape for v in state.values()):
                    raise UserError(f"checkpoint {self.folder}: the optimizer's state of {name} has another shape")
                self.shapes[name] = weights.shape
                owner = _owner(weights, weights.shape, state)
                self._stretches[name] = [_Stretch(owner, 0, 0, weights.numel())]


def _owner(master: torch.Tensor, shape: torch.Size, state: dict[str, Any]) -> _Owner:
    per_element = {key: value for key, value in state.items() if is_per_element(key, value, shape)}
    scalars = {key: value for key, value in state.items() if key not in per_element}
    values = {MASTER: master, **per_element}
    return _Owner({key: value.detach().reshape(-1) for key, value in values.items()}, scalars, shape.numel())


def _precision(json: dict[str, Any]) -> str:
    """By the JSON that DeepSpeed was given, which it keeps in its files."""
    return next((name for name in ("bf16", "fp16") if json.get(name, {}).get("enabled")), "fp32")


def _groups_by_axes(module: dict[str, torch.Tensor], buffers: Iterable[str]) -> list[list[str]]:
    """Names in the order of the optimizer, for a stage 0 checkpoint from before they were saved: matrices, then the
    rest; a tied weight under its first name."""
    names: dict[int, str] = {}
    for name, value in module.items():
        if name not in buffers:
            names.setdefault(value.data_ptr(), name)
    groups = [[name for name in names.values() if (module[name].ndim >= 2) == matrices] for matrices in (True, False)]
    return [group for group in groups if group]


def _by_rank(paths: Iterable[Path]) -> list[Path]:
    def rank(path: Path) -> int:
        found = re.search(r"zero_pp_rank_(\d+)_", path.name)
        return int(found[1]) if found else 0

    return sorted(paths, key=rank)


def _load(path: Path) -> dict[str, Any]:
    # Our own files, named by a manifest that was checked; DeepSpeed's objects in them are beyond weights_only.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
