"""What ZeRO's flat partitions hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pretrain.optim.muon import Piece


def flat_partitions(zero_optimizer: Any, stage: int) -> dict[torch.Tensor, list[Piece]]:
    """The pieces of weights in each float32 partition of this process, for DeepSpeed 0.19.8's stages 1 to 3.

    Stages 1 and 2 lay a group's weights end to end, aligned, and cut the whole into equal partitions. Stage 3 cuts
    every weight into equal parts, padded at the end, and lays this process's parts of a sub-group end to end.
    """
    return _of_stage_3(zero_optimizer) if stage == 3 else _of_stages_1_and_2(zero_optimizer)


def _of_stages_1_and_2(zero: Any) -> dict[torch.Tensor, list[Piece]]:
    out = {}
    for i, flat in enumerate(zero.single_partition_of_fp32_groups):
        size = int(zero.partition_size[i])
        begin = dist.get_rank(zero.real_dp_process_group[i]) * size
        out[flat] = []
        for parameter, offset in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
            end = offset + parameter.numel()
            first, last = max(offset, begin), min(end, begin + size)
            own = (first - offset, last - first, first - begin) if last > first else (0, 0, 0)
            out[flat].append(Piece(tuple(parameter.shape), *own, shared=offset // size != (end - 1) // size))
    return out


def _of_stage_3(zero: Any) -> dict[torch.Tensor, list[Piece]]:
    out = {}
    rank, world_size = dist.get_rank(zero.dp_process_group), dist.get_world_size(zero.dp_process_group)
    for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        out[flat], at = [], 0
        for parameter in group:
            width = parameter.partition_numel()
            count = max(0, min(width, parameter.ds_numel - rank * width))
            own = (rank * width, count, at) if count else (0, 0, 0)
            out[flat].append(Piece(tuple(parameter.ds_shape), *own, shared=world_size > 1))
            at += width
    return out
