"""The cross entropy of tokens without all their logits: gradients are taken in the forward pass, chunk by chunk.

A vocabulary's logits are most of the memory of a small model, and most of its time. Kept for the backward pass they are
several numbers for each token and word. Computed again there they cost a product and a softmax more. But the gradient
of a cross entropy with respect to logits is known as soon as they are: softmax minus one-hot. So each chunk is
multiplied on at once, and what stays are the gradients of states, weight and bias (the fused linear cross entropy of
Liger Kernel, Hsu et al. 2024, arXiv 2410.10989, section 3.2). ``python -m benchmarks.token_loss`` compares the three.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batches import IGNORE
from pretrain.model.compute import at_least_float32, device_type

CHUNK_ELEMENTS = 2**25
"""Logits held at a time: 128 MiB in float32."""


class Decoder(nn.Linear):
    """Hidden states to logits over the vocabulary, or to the loss of targets."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """(..., h) to logits (..., vocabulary). With ``targets``, (n,) int64 with -100 where there is none, (n, h) to
        the sum of the cross entropy in nats: a scalar, at least float32.

        It can be differentiated once: a second backward pass through the same forward pass raises RuntimeError.
        """
        if targets is None:
            return super().forward(x)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if torch.compiler.is_compiling():  # it cannot count chunks of targets whose number varies, and fuses for itself
            return cross_entropy_sum(super().forward(x), targets)
        rows = max(1, CHUNK_ELEMENTS // self.out_features)
        with torch.autocast(device, enabled=False):
            return _TokenLoss.apply(x, self.weight, self.bias, targets, rows, torch.is_grad_enabled())


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """The same of logits (n, vocabulary) that are there already, with the memory that PyTorch needs."""
    logits = logits.to(at_least_float32(logits.dtype))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


class _TokenLoss(torch.autograd.Function):
    """Arguments: states (n, h), weight (V, h), bias (V,) or None, targets (n,), rows of a chunk, whether gradients are
    wanted. Products run in the states' dtype; softmax, sums over tokens and the weight's gradient are at least float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: int,
        differentiate: bool,
    ) -> Tensor:
        wide = at_least_float32(states.dtype)
        total = states.new_zeros((), dtype=wide)
        matrix, offset = weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
        by_state: list[Tensor] = []
        by_weight = torch.zeros_like(weight, dtype=wide) if differentiate else None
        by_bias = torch.zeros_like(bias, dtype=wide) if differentiate and bias is not None else None
        for some, wanted in zip(states.split(rows), targets.split(rows), strict=True):
            known, index = wanted != IGNORE, wanted.clamp(min=0)[:, None]
            logits = F.linear(some, matrix, offset).to(wide)
            # In place throughout: logsumexp and softmax would each have memory of their own for all logits.
            logits -= logits.amax(-1, keepdim=True)
            own = logits.gather(-1, index)[:, 0]
            partition = logits.exp_().sum(-1)
            total += (partition.log() - own).masked_fill(~known, 0).sum()
            if by_weight is None:
                continue
            # Softmax minus one-hot, the gradient of the loss; zero in rows without a target.
            logits /= partition.masked_fill(~known, torch.inf)[:, None]
            logits.scatter_add_(-1, index, -known[:, None].to(wide))
            if by_bias is not None:
                by_bias += logits.sum(0)
            slope = logits.to(states.dtype)
            del logits  # before the products, one of which is as large as the weight
            by_state.append(slope @ matrix)
            of_weight = slope.T @ some
            # A CPU adds two dtypes by way of a copy: one that the plan of a run's memory sees. GPUs have no need of it.
            by_weight += of_weight.to(wide) if device_type(of_weight) == "cpu" else of_weight
        ctx.dtype = weight.dtype
        ctx.save_for_backward(torch.cat(by_state) if by_state else None, by_weight, by_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = outer
        # In place and once, without a second copy as large as the weight.
        by_state, by_weight, by_bias = ctx.saved_tensors
        of_bias = None if by_bias is None else by_bias.mul_(scale).to(ctx.dtype)
        return by_state.mul_(scale), by_weight.mul_(scale).to(ctx.dtype), of_bias, None, None, None
