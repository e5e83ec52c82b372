"""The pseudo-inverse of the landmark matrix by iteration, and its gradient by formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Init = Literal["block", "original"]


def iterative_inverse(matrix: Tensor, iterations: int, init: Init = "block") -> Tensor:
    """Approximate Moore-Penrose inverse of row-stochastic matrices (paper, equation 14; Razavi et al. 2014).

    ``matrix``: (R, H, m, m). ``init``: ``block`` starts from A^T / (largest column sum of that matrix). ``original``,
    the published code's choice, takes the largest column sum of the whole batch; a sequence's result then depends on
    its batch mates. (The largest row sum, the other factor of the starting scale, is 1 for a softmax.)

    Six steps are a regulariser, not an approximation to be improved: at 6, 12 and 20 the gradient's norm is 1e3, 5e5
    and 8e7. A trained network is adapted to its own count.

    After six, a matrix whose A Z is a projection up to rounding keeps its Z. What rounding leaves of Z in the null
    space of A grows by 13/4 with every step: 50 steps on equal rows gave NaN in float32.
    """
    a = matrix.flatten(0, 1)
    z = a.transpose(-1, -2) / _largest(a.sum(dim=-2), init)
    for step in range(iterations):
        z = _step(a, z, step).after
    return z.view_as(matrix)


class KeptStep(NamedTuple):
    """One step, with what its gradient needs; all (B, m, m)."""

    before: Tensor
    """Z."""
    az: Tensor
    middle: Tensor
    """15 I - A Z (7 I - A Z)."""
    outer: Tensor
    """13 I - A Z (15 I - A Z (7 I - A Z))."""
    after: Tensor
    done: Tensor | None
    """(B, 1, 1) bool: those that kept their Z."""


@dataclass(frozen=True)
class KeptInverse:
    """The steps of :func:`iterative_inverse`, kept for :meth:`gradient`.

    Automatic differentiation of the same steps takes more passes over small matrices: docs/attention.md has the times.
    """

    matrix: Tensor
    steps: list[KeptStep]
    init: Init

    @classmethod
    def of(cls, matrix: Tensor, iterations: int, init: Init) -> KeptInverse:
        """matrix: (R, H, m, m)."""
        a = matrix.flatten(0, 1)
        z = a.transpose(-1, -2) / _largest(a.sum(dim=-2), init)
        steps = []
        for step in range(iterations):
            steps.append(_step(a, z, step))
            z = steps[-1].after
        return cls(matrix, steps, init)

    @property
    def result(self) -> Tensor:
        """(R, H, m, m): what :func:`iterative_inverse` returns."""
        return self.steps[-1].after.view_as(self.matrix)

    def gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the matrix (R, H, m, m) from that of the result."""
        a, d_z = self.matrix.flatten(0, 1), grad.flatten(0, 1)
        a_t, d_a = a.transpose(1, 2), torch.zeros_like(a)
        for step in reversed(self.steps):
            stay = None if step.done is None else d_z.masked_fill(~step.done, 0)
            if step.done is not None:
                d_z = d_z.masked_fill(step.done, 0)
            az_t, d_outer = step.az.transpose(1, 2), 0.25 * torch.bmm(step.before.transpose(1, 2), d_z)
            d_z = torch.bmm(d_z, step.outer.transpose(1, 2)).mul_(0.25)
            # outer = 13 I - A Z middle, middle = 15 I - A Z (7 I - A Z)
            d_middle = torch.bmm(az_t, d_outer).neg_()
            d_az = torch.bmm(d_outer, step.middle.transpose(1, 2)).neg_()
            d_az = d_az.add_(d_middle, alpha=-7).baddbmm_(d_middle, az_t).baddbmm_(az_t, d_middle)
            d_a.baddbmm_(d_az, step.before.transpose(1, 2))
            d_z.baddbmm_(a_t, d_az)
            if stay is not None:
                d_z += stay
        sums = a.sum(dim=-2)
        largest = _largest(sums, self.init)
        d_a += d_z.transpose(1, 2) / largest
        of_scale = -(d_z * a_t).sum(dim=(1, 2), keepdim=True) / largest**2
        if self.init == "original":
            of_scale = of_scale.sum()
        return d_a.add_(of_scale * _share_of_largest(sums, largest)).view_as(self.matrix)


def _largest(column_sums: Tensor, init: Init) -> Tensor:
    """Of (B, m): (), or (B, 1, 1)."""
    return column_sums.amax() if init == "original" else column_sums.amax(dim=-1)[:, None, None]


def _share_of_largest(column_sums: Tensor, largest: Tensor) -> Tensor:
    """(B, 1, m): the gradient of the maximum, which equal sums share as in ``amax``."""
    at = (column_sums.unsqueeze(1) == largest).to(column_sums.dtype)
    return at / (at.sum() if largest.ndim == 0 else at.sum(dim=2, keepdim=True))


_ALWAYS = 6
"""Steps that are made without a look at the residual: the default and the paper's count."""


def _step(a: Tensor, z: Tensor, step: int) -> KeptStep:
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    az = a @ z
    done = None if step < _ALWAYS else _is_projection(az.detach(), z.detach())
    middle = torch.baddbmm(eye, az, 7 * eye - az, beta=15, alpha=-1)
    outer = torch.baddbmm(eye, az, middle, beta=13, alpha=-1)
    after = 0.25 * z @ outer
    return KeptStep(z, az, middle, outer, after if done is None else torch.where(done, z, after), done)


def _is_projection(az: Tensor, z: Tensor) -> Tensor:
    """(B, 1, 1) bool: A Z A Z = A Z but for rounding, at most eps * max |Z| in a row-stochastic A times Z."""
    residual = (az @ az - az).abs().amax(dim=(1, 2), keepdim=True)
    return residual <= 4 * torch.finfo(z.dtype).eps * z.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1)
