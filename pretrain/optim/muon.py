"""Muon for matrices that ZeRO has cut into flat partitions, with AdamW for all else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from pretrain.optim.kind import Piece

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al. 2024)."""


def compute_dtype(device: torch.device) -> torch.dtype:
    """What matrices are sent and orthogonalised in: bf16 as in PyTorch's Muon, since the iteration needs no more.

    On CPUs float32: bf16 products may be 50 times slower there (30 ms a step for a matrix of 128 x 128), and the run's
    other products need not be in bf16 either.
    """
    return torch.float32 if device.type == "cpu" else torch.bfloat16


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    Groups that have a ``momentum`` hold matrices and are stepped by Muon, the others by PyTorch's fused AdamW. The step
    of an (n, m) matrix is scaled by 0.2 * sqrt(max(n, m)), which gives it the root mean square of AdamW's (Liu et al.
    2025, arXiv 2502.16982, section 2.2). One learning rate and one weight decay then serve both. On whole matrices this
    is ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` to the bit, in the same type.

    PyTorch's own refuses flat partitions. The one in DeepSpeed 0.19.8 orthogonalises gradients before their norm is
    taken. Clipping then acts on the orthogonal steps (5.6 long where the gradient was 0.44), and the norm reported is
    theirs. It also keeps the momentum in bf16 under bf16, and is compiled at the first step, 5 to 70 s on a CPU.

    Here momentum and weights are the partition's own float32 values. Only the matrices that lie across processes are
    put together, one at a time, in the iteration's type: at ZeRO 1 and 2 at most one for each edge between partitions.
    At stage 3 every matrix is cut over all processes, so each is sent once, and every process repeats the iteration.
    With (n, m) the sides of a matrix and n the smaller, that takes about 20 n + 10 n^2 / m operations a step for each
    weight, where training takes 6 a token.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self._pieces: dict[torch.Tensor, list[Piece]] = {}
        self._process_group: dist.ProcessGroup | None = None
        self._device: torch.device | None = None

    def cut(
        self, pieces: Iterable[tuple[torch.Tensor, Piece]], process_group: dist.ProcessGroup, device: torch.device
    ) -> None:
        """Tell what this process holds of each weight, by the flat tensor that ZeRO has put in the parameters' place.

        Every process of the group must call it with the same weights in the same order; ``device`` is where it
        computes, which with offload is not where the partitions are.
        """
        held = list(pieces)
        cut = [0 < piece.numel < math.prod(piece.shape) for _, piece in held]
        shared = torch.tensor(cut, dtype=torch.int32, device=device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=process_group)
        self._pieces, self._process_group, self._device = {}, process_group, device
        for (owner, piece), lies_across in zip(held, shared.tolist(), strict=True):
            self._pieces.setdefault(owner, []).append(piece._replace(shared=bool(lies_across)))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change every parameter that has a gradient; collective over the processes that share matrices."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if "momentum" in group:
                for p in params:
                    self._step_matrices(p, group)
            elif params:
                self._step_others(params, group)
        return loss

    def _step_matrices(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state, lr = self.state[p], group["lr"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"]
        assert p.grad is not None
        buffer.lerp_(p.grad, 1 - group["momentum"])
        nesterov = p.grad.lerp(buffer, group["momentum"]).view(-1)
        p.mul_(1 - lr * group["weight_decay"])
        for piece in self._pieces.get(p) or [Piece(tuple(p.shape), 0, p.numel(), 0)]:
            matrix = self._whole(nesterov, piece)
            if piece.numel:
                step = orthogonalize(matrix).reshape(-1)[piece.start : piece.start + piece.numel]
                scale = 0.2 * math.sqrt(max(piece.shape))
                p.view(-1)[piece.at : piece.at + piece.numel].add_(step.to(p.device), alpha=-lr * scale)

    def _whole(self, flat: torch.Tensor, piece: Piece) -> torch.Tensor:
        """The whole matrix, put together from the processes' pieces; what comes of it matters where one has some."""
        own = flat[piece.at : piece.at + piece.numel]
        device = self._device or flat.device
        whole = torch.zeros(math.prod(piece.shape), dtype=compute_dtype(device), device=device)
        whole[piece.start : piece.start + piece.numel] = own.to(whole)
        if piece.shared:
            dist.all_reduce(whole, group=self._process_group)  # each element is zero on all but one: the sum is exact
        return whole.view(piece.shape)

    def _step_others(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """U V^T of a matrix's singular value decomposition, roughly: the singular values become 0.7 to 1.2.

    The Newton-Schulz iteration of Jordan et al. 2024, in the type that ``matrix`` (n, m) has; it is overwritten.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
