"""How a network is fine-tuned: steps, learning rates by layer, and which layers stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

EPOCHS = 10
"""Passes over the training text where neither epochs nor steps are asked for."""
EVALUATIONS = 10
"""Places at which the weights may be chosen, at most, where the steps and not the epochs bound the run."""


@dataclass(frozen=True)
class Recipe:
    """AdamW, linear warm-up over the share ``warmup`` of the steps, then linear decay to zero.

    ``epochs``: passes over the training text, as many as asked for. Left out: 10, and more of them until there are
    ``min_steps`` optimizer steps, which few texts need (Mosbach et al. 2021, arXiv 2006.04884). ``steps`` bounds the
    steps of ``epochs``. ``share``: of the steps that this gives, how many are taken, for trials of a search.
    ``patience``: stop after so many evaluations without a better one. A batch is computed in parts of at most
    ``micro_tokens`` tokens, padding included, and its gradients are added up.

    ``layer_decay``: factor of the learning rate from each layer to the one below it (Howard and Ruder 2018).
    ``freeze``: so many of the lowest layers, with the embeddings, are not trained. ``recompute``: layers are computed
    again in the backward pass, which keeps less.
    """

    epochs: int | None = None
    steps: int | None = None
    min_steps: int = 100
    share: float = 1.0
    patience: int | None = None
    batch_size: int = 32
    micro_tokens: int = 4096
    lr: float = 5e-4
    head_lr: float = 5e-3
    layer_decay: float = 1.0
    freeze: int = 0
    weight_decay: float = 0.01
    warmup: float = 0.1
    dropout: float = 0.1
    grad_clip: float = 1.0
    recompute: bool = False

    def steps_each(self, texts: int) -> int:
        """Optimizer steps of a pass over so many training texts."""
        return -(-texts // self.batch_size)

    def total_steps(self, texts: int) -> int:
        """Optimizer steps with so many training texts."""
        each = self.steps_each(texts)
        whole = self.epochs * each if self.epochs else max(EPOCHS, -(-self.min_steps // each)) * each
        whole = min(whole, self.steps or whole)
        return whole if self.share == 1 else max(1, round(self.share * whole))

    def texts(self, texts: int) -> int:
        """Texts of all steps with so many training texts."""
        passes, rest = divmod(self.total_steps(texts), self.steps_each(texts))
        return passes * texts + rest * self.batch_size

    def steps_between_looks(self, texts: int, dev: int) -> int:
        """Steps from one look at the development split of ``dev`` texts to the next.

        A pass over the training text where epochs were asked for, and where there are no more of them than places to
        choose from.
        """
        each, total = self.steps_each(texts), self.total_steps(texts)
        if self.steps is None and (self.epochs or total <= EVALUATIONS * each):
            return each
        # No oftener than the dev split has batches: a forward pass over it costs a third of a training pass.
        return max(-(-total // EVALUATIONS), -(-dev // self.batch_size))


def default_lr(hidden_size: int) -> float:
    """0.1 / width, 5e-4 at 192 and 1.3e-4 at 768: narrow networks take, and in few steps need, larger ones."""
    return 0.1 / hidden_size


def depth_of(name: str, layers: int) -> int:
    """Layers between a backbone's parameter and the head: 0 for the last layer and what follows it, ``layers`` for the
    embeddings."""
    first, _, rest = name.partition(".")
    if first == "layers":
        return layers - 1 - int(rest.partition(".")[0])
    return layers if first == "embeddings" else 0


def freeze(backbone: nn.Module, layers: int, count: int) -> None:
    """Have the lowest ``count`` of the ``layers``, and for any of them the embeddings, not be trained."""
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(count == 0 or depth_of(name, layers) < layers - count)


def parameter_groups(backbone: nn.Module, head: nn.Module, layers: int, recipe: Recipe) -> list[dict[str, Any]]:
    """The optimizer's groups: matrices and vectors of each depth of the backbone, and the head, which has a rate of its
    own. Vectors (biases, norms) and the head have no weight decay."""
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in backbone.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depth_of(name, layers) if recipe.layer_decay != 1 else 0
        matrix = parameter.ndim > 1
        rates = {"lr": recipe.lr * recipe.layer_decay**depth, "weight_decay": recipe.weight_decay if matrix else 0.0}
        groups.setdefault((depth, not matrix), {"params": [], **rates})["params"].append(parameter)
    found = [groups[key] for key in sorted(groups)]
    return [*found, {"params": list(head.parameters()), "lr": recipe.head_lr, "weight_decay": 0.0}]
