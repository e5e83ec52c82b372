"""What a micro-batch keeps in memory, seen by running the model itself on tensors that have shapes and no values.

No formula here can drift from the model's code: PyTorch's ``FakeTensorMode`` runs forward and backward passes without
computing anything, and every storage is counted from its making to its end. What depends on values is replaced by what
is to be expected of them: a masked model's targets are as many as its masking rate gives.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pretrain.engine.layers import layer_runner
from pretrain.model.attention.layout import Layout
from pretrain.model.attention.pattern import shortest
from pretrain.model.attention.self_attention import SelfAttention
from pretrain.model.compute import assume_device
from pretrain.model.config import ModelConfig
from pretrain.model.layers import Block, Embeddings, FeedForward, Head
from pretrain.model.transformer import NystromformerLM, build_model

TRACED_LAYERS = 3
"""The first, the last and one between: a deeper model of one form repeats the one between."""

Kind = tuple[str, str]
"""Of a layer: its form of attention and its positions."""
LAYER_PARTS = ("attention", "feed-forward", "norms and residual")
PARTS = ("embeddings", *LAYER_PARTS, "head and loss")


@dataclass(frozen=True)
class Gradient:
    """The moment of a backward pass at which the gradient of one parameter is complete."""

    parameter: str
    numel: int
    live: int
    """The most bytes that lived since the moment before: activations, their gradients, this gradient; without weights
    and the gradients that were complete before."""


@dataclass(frozen=True)
class Trace:
    """Forward and backward of one micro-batch; bytes of what is neither weight, nor finished gradient, nor input."""

    kept: dict[str, int]
    """At the end of the forward pass, for the backward pass, by the part of the model that made it; see :data:`PARTS`.
    With ``activation_checkpointing`` what is computed again is not here."""
    kept_by_layer: tuple[dict[str, int], ...]
    """The share of each traced layer in it."""
    gradients: tuple[Gradient, ...]
    """In the order of the backward pass. The forward pass's own peak is in the first."""

    @property
    def peak(self) -> int:
        """The most bytes that live at once."""
        return max(gradient.live for gradient in self.gradients)


def trace_micro_batch(
    config: ModelConfig,
    layout: Layout,
    *,
    targets: int,
    dtype: torch.dtype,
    on_gpu: bool,
    checkpointing: bool = False,
    all_layers: bool = False,
    z_loss: bool = False,
    document_loss: bool = False,
) -> Trace:
    """Trace one training micro-batch of ``layout`` with ``targets`` labels.

    dtype: of weights and activations. on_gpu: the code that the model runs on a GPU; nothing needs one here.
    checkpointing: layers are computed again in the backward pass. z_loss, document_loss: the run has one. Deep models
    are traced at :data:`TRACED_LAYERS` layers, one more for each further form of attention or kind of positions, and
    extended, unless ``all_layers``; ``tests/pretrain/planning/test_planning.py`` holds the two to be equal.
    """
    kinds: Sequence[Kind] = tuple(zip(config.attention_by_layer, config.positions_by_layer, strict=True))
    few = (kinds[0], *dict.fromkeys(kinds[1:-1]), kinds[-1])
    if len(few) < len(kinds) and not all_layers:
        forms, positions = (shortest(names) for names in zip(*few, strict=True))
        traced = config.model_copy(update={"num_layers": len(few), "attention": forms, "positions": positions})
        return _deepen(_trace(traced, layout, targets, dtype, on_gpu, checkpointing, z_loss, document_loss), few, kinds)
    return _trace(config, layout, targets, dtype, on_gpu, checkpointing, z_loss, document_loss)


def _trace(
    config: ModelConfig,
    layout: Layout,
    targets: int,
    dtype: torch.dtype,
    on_gpu: bool,
    checkpointing: bool,
    z_loss: bool,
    document_loss: bool,
) -> Trace:
    gradients: list[Gradient] = []
    layout = replace(layout, _cache={})  # a layout keeps what is derived from it, which here is fake
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, _default_dtype(dtype):
        model = build_model(config)
        model.run_layer = layer_runner(checkpointing, compiled=False)
        model.z_loss, model.document_loss = z_loss, document_loss
        input_ids = torch.zeros(layout.batch, layout.length, dtype=torch.int64)
        labels = torch.zeros_like(input_ids)
    with fake, assume_device("cuda" if on_gpu else "cpu"), _Expected(targets, on_gpu), LiveBytes() as live:
        live.ignore([input_ids, labels, *model.parameters()])
        after_layers = _watch(model, live, gradients)
        out = model(input_ids, labels=labels, layout=layout)
        assert out.loss_sum is not None
        loss_sum = out.loss_sum
        for added in (out.z_sum, out.document_sum):
            loss_sum = loss_sum if added is None else loss_sum + added
        kept = dict(live.by_part)
        live.part = "backward"
        # The engine itself: Tensor.backward is a function that _Expected sees, and nothing within such a function is.
        one = torch.ones_like(loss_sum)
        torch.autograd.graph._engine_run_backward(
            (loss_sum,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    shares = [after - before for before, after in zip([Counter(), *after_layers], after_layers, strict=False)]
    return Trace(
        {part: kept.get(part, 0) for part in PARTS},
        tuple({part: share[part] for part in LAYER_PARTS} for share in shares),
        tuple(gradients),
    )


def _watch(model: NystromformerLM, live: LiveBytes, gradients: list[Gradient]) -> list[Counter[str]]:
    """Tell ``live`` which part of the model is running, and note each finished gradient and let go of it.

    Returns a list that gets, for each layer in the forward pass, what is kept by part after it.
    """
    after_layers: list[Counter[str]] = []
    for module in model.modules():
        part = _part(module)
        if part is not None:
            module.register_forward_pre_hook(partial(_enter, live, part))
            module.register_forward_hook(partial(_leave, live))
    # What runs between modules: the residual path within layers, the loss after the last one.
    live.part = PARTS[3]
    if model.norm is not None:
        model.norm.register_forward_hook(lambda *_: live.leave_for(PARTS[4]))
    else:
        model.layers[-1].register_forward_hook(lambda *_: live.leave_for(PARTS[4]))

    def done(name: str, parameter: Tensor) -> None:
        parameter.grad = None
        gradients.append(Gradient(name, parameter.numel(), live.take_peak()))

    def layer_done(*_: Any) -> None:
        if len(after_layers) < len(model.layers):  # in the backward pass checkpointed layers run again
            after_layers.append(Counter(live.by_part))

    for layer in model.layers:
        layer.register_forward_hook(layer_done)
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(done, name))
    return after_layers


def _part(module: nn.Module) -> str | None:
    kinds = {Embeddings: PARTS[0], SelfAttention: PARTS[1], FeedForward: PARTS[2], Block: PARTS[3], Head: PARTS[4]}
    return kinds.get(type(module))


def _enter(live: LiveBytes, part: str, *_: Any) -> None:
    live.outer.append(live.part)
    live.part = part


def _leave(live: LiveBytes, *_: Any) -> None:
    live.part = live.outer.pop()


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that live, and the most that did since they were last asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.outer: list[str] = []
        self.by_part: Counter[str] = Counter()
        self._known = WeakIdKeyDictionary()
        self._bytes = self._peak = 0

    def ignore(self, tensors: list[Tensor]) -> None:
        """Do not count these."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = None

    def take_peak(self) -> int:
        """The most bytes since the last call."""
        peak, self._peak = self._peak, self._bytes
        return peak

    def leave_for(self, part: str) -> None:
        """From now on ``part`` runs wherever no module says otherwise."""
        self.part = part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size, part = storage.nbytes(), self.part
        self._known[storage] = weakref.finalize(storage, self._forget, size, part)
        self._known[storage].atexit = False
        self._bytes += size
        self.by_part[part] += size
        self._peak = max(self._peak, self._bytes)

    def _forget(self, size: int, part: str) -> None:
        self._bytes -= size
        self.by_part[part] -= size


class _Expected(TorchFunctionMode):
    """Answers what shapes alone cannot: how many targets there are. Fake tensors of a GPU would need a PyTorch that was
    built for one, so they are on the CPU; what its own functions do otherwise on a GPU is put right here."""

    def __init__(self, targets: int, on_gpu: bool) -> None:
        super().__init__()
        self._targets, self._on_gpu = targets, on_gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            # x[labels != IGNORE]
            chosen = torch.zeros(self._targets, dtype=torch.int64)
            return args[0].flatten(0, args[1].ndim - 1)[chosen]
        if self._on_gpu and func is nn.functional.dropout:
            # On a GPU the mask is one byte an element, on a CPU a tensor like the input.
            x, p, training = args[0], kwargs.get("p", 0.5), kwargs.get("training", True)
            return torch.native_dropout(x, p, training)[0] if training and p else x
        return func(*args, **kwargs)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _layer(name: str) -> int | None:
    words = name.split(".")
    return int(words[1]) if words[0] == "layers" else None


def _deepen(trace: Trace, few: Sequence[Kind], kinds: Sequence[Kind]) -> Trace:
    """The trace of a model whose layers are of ``kinds`` from one whose layers are of ``few``: the first and the last
    of these, and between them each kind that is to be repeated.

    A layer's backward pass runs while the layers below it still keep what they kept: as much more for each of them.
    """
    by_layer: dict[int | None, list[Gradient]] = {}
    for gradient in trace.gradients:
        by_layer.setdefault(_layer(gradient.parameter), []).append(gradient)
    stands_for = [0, *(1 + few[1:-1].index(name) for name in kinds[1:-1]), len(few) - 1]
    # What a layer keeps is that of the last one of its kind: the first one may keep what later ones share.
    shares = dict(zip(few, trace.kept_by_layer, strict=True))
    sizes = {name: sum(share.values()) for name, share in shares.items()}

    def moved(gradients: list[Gradient], size: int) -> list[Gradient]:
        return [Gradient(g.parameter, g.numel, g.live + size) for g in gradients]

    def more_below(number: int) -> int:
        """Bytes that the layers below layer ``number`` keep beyond those below the one that stands for it."""
        return sum(sizes[name] for name in kinds[:number]) - sum(sizes[name] for name in few[: stands_for[number]])

    last = len(kinds) - 1
    position = trace.gradients.index(by_layer[len(few) - 1][0])
    out = moved(list(trace.gradients[:position]), more_below(last))
    for number in range(last, -1, -1):
        out += moved(by_layer[stands_for[number]], more_below(number))
    out += trace.gradients[trace.gradients.index(by_layer[0][-1]) + 1 :]
    added = Counter(kinds)
    added.subtract(few)
    kept = {
        part: size + sum(count * shares[name].get(part, 0) for name, count in added.items())
        for part, size in trace.kept.items()
    }
    return Trace(kept, tuple(shares[name] for name in kinds), tuple(out))
