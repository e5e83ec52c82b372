"""What competes: ours and exact attention. The published implementations are in ``published.py``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention.setting import Setting, document_ids, document_lengths, exact, forward_flops
from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.causal_nystrom import causal_nystrom_attention
from pretrain.model.attention.forms.nystrom import pyramid_of
from pretrain.model.attention.layout import Layout, Partition, Rectangle
from pretrain.model.attention.nystrom import nystrom_attention
from pretrain.model.config import ModelConfig
from pretrain.model.conv import skip_convolution


class UnavailableError(Exception):
    """This form cannot run here, or not at this length; the message says why."""


@dataclass(frozen=True)
class Built:
    """A form made ready for one setting."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    """q, k, v (B, n, H, d) -> (B, n, H, d)."""
    weights: tuple[Tensor, ...] = ()
    """Parameters, which get a gradient too."""
    constants: tuple[Tensor, ...] = ()
    """Tensors that all layers of a model share for one batch, not counted as kept for the backward pass."""
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered before and left after each run, outside of what is timed."""


@dataclass(frozen=True)
class Form:
    """One competitor."""

    name: str
    title: str
    references: tuple[str, ...]
    """Names of the exact forms it is a ratio to; a reference's own is itself."""
    build: Callable[[Setting], Built]
    """Raises UnavailableError."""
    flops: Callable[[Setting], float]
    """Arithmetic of the forward pass, at least."""
    gibibytes: Callable[[Setting], float]
    """Memory that a run may take, inputs included: an estimate from above, made before anything is allocated."""


# --------------------------------------------------------------------------------------------------------------- memory


def _tokens_gib(setting: Setting, copies: int) -> float:
    return copies * setting.tokens * setting.heads * setting.head_dim * setting.dtype.itemsize / 2**30


def exact_gib(setting: Setting) -> float:
    """q, k, v, output, their gradients, padded and contiguous copies."""
    return _tokens_gib(setting, 20)


def masked_gib(setting: Setting) -> float:
    """A boolean and an additive mask, and room for a kernel that makes another."""
    return exact_gib(setting) + setting.batch * setting.length**2 * (1 + 3 * setting.dtype.itemsize) / 2**30


def nystrom_gib(setting: Setting) -> float:
    """Weights of n by m in both directions, kept a few times over in float32, as without a fused kernel."""
    m = min(setting.masked.num_landmarks, setting.length)
    rows = setting.batch * setting.heads
    return _tokens_gib(setting, 40) + rows * (16 * setting.length * m + 40 * m * m) * 4 / 2**30


def packed_gib(setting: Setting) -> float:
    """Rectangles waste at most half of their slots; documents of one octave share one, and each has its own inverse."""
    documents = sum(len(document_lengths(setting.length, row)) for row in range(setting.batch))
    m = min(setting.masked.num_landmarks, setting.length)
    return 2 * nystrom_gib(setting) + documents * setting.heads * 40 * m * m * 4 / 2**30


def causal_gib(setting: Setting) -> float:
    """Pairs of landmarks, and the (n, m + w c) weights as far as they are not done in chunks."""
    config, rows = setting.causal, setting.batch * setting.heads
    m = -(-setting.length // config.segment_length)
    weights = min(rows * setting.length * (m + config.window_segments * config.segment_length), 2**26)
    return _tokens_gib(setting, 40) + (8 * rows * m * m + 8 * weights + 128 * setting.length) * 4 / 2**30


# ---------------------------------------------------------------------------------------------------------------- exact


def _exact(causal: bool) -> Callable[[Setting], Built]:
    def build(setting: Setting) -> Built:
        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

        # In 16 bits on a GPU the reference is FlashAttention, whatever the version would choose.
        flash = setting.device.type == "cuda" and setting.dtype in (torch.bfloat16, torch.float16)
        return Built(forward, context=(lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)) if flash else nullcontext)

    return build


def _exact_documents(setting: Setting) -> Built:
    ids = document_ids(setting.batch, setting.length).to(setting.device)
    mask = (ids.unsqueeze(1) == ids.unsqueeze(2)).unsqueeze(1)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return Built(forward, constants=(mask,))


# -------------------------------------------------------------------------------------------------------- bidirectional


def bidirectional(
    q: Tensor, k: Tensor, v: Tensor, rectangle: Rectangle, config: ModelConfig, conv_weight: Tensor | None = None
) -> Tensor:
    """Our bidirectional form, q, k, v: (R, H, L, d); with a ``conv_weight`` also the convolution."""
    return nystrom_attention(
        q,
        k,
        v,
        rectangle,
        num_landmarks=config.num_landmarks,
        iterations=config.inverse_iterations,
        init=config.inverse_init,
        conv_weight=conv_weight,
    )


def _nystrom(conv: bool, packed: bool) -> Callable[[Setting], Built]:
    def build(setting: Setting) -> Built:
        config = setting.masked
        layout = Layout.full(setting.batch, setting.length)
        if packed:
            layout = Layout.from_documents(document_ids(setting.batch, setting.length))
        partition = layout.partition(setting.device, causal=False, num_landmarks=config.num_landmarks)
        weight = setting.conv_weight(config) if conv else None

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Taken apart and merged as SelfAttention does it.
            outputs = []
            for rectangle in partition.rectangles:
                of_q, of_k, of_v = (rectangle.take(x) for x in (q, k, v))
                outputs.append(bidirectional(of_q, of_k, of_v, rectangle, config, weight))
            return partition.merge(outputs, v)

        return Built(forward, () if weight is None else (weight,), _tensors(partition))

    return build


def _tensors(partition: Partition) -> tuple[Tensor, ...]:
    of_rectangles = [(r.index, r.mask, *(r.segments or ())) for r in partition.rectangles]
    return tuple(x for part in [*of_rectangles, (partition.slots,)] for x in part if x is not None)


# --------------------------------------------------------------------------------------------------------------- causal


def causal(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, config: ModelConfig) -> Tensor:
    """Our causal form, q, k, v: (R, H, n, d); gamma: (H,), None for pooled values. The only place of the benchmark that
    knows how it is called."""
    return causal_nystrom_attention(
        q,
        k,
        v,
        window=Window(config.segment_length, config.window_segments),
        gamma=gamma,
        weighted=config.landmark_keys == "weighted",
        pyramid=pyramid_of(config),
        recall=config.recall_segments,
    )


def _causal_nystrom(conv: bool, inverse: bool, of: Callable[[Setting], ModelConfig]) -> Callable[[Setting], Built]:
    def build(setting: Setting) -> Built:
        config = of(setting)
        gamma = setting.gamma() if inverse else None
        weight = setting.conv_weight(config) if conv else None

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            out = causal(q, k, v, gamma, config)
            if weight is not None:
                out = out + skip_convolution(v, weight, causal=True)
            return out.transpose(1, 2)

        return Built(forward, tuple(x for x in (gamma, weight) if x is not None))

    return build


# ----------------------------------------------------------------------------------------------------------------- list


def _rows(setting: Setting) -> list[int]:
    return [setting.length] * setting.batch


def _documents(setting: Setting) -> list[int]:
    return [size for row in range(setting.batch) for size in document_lengths(setting.length, row)]


def _masked(setting: Setting) -> ModelConfig:
    return setting.masked


def _masked_exact(setting: Setting) -> ModelConfig:
    return exact(setting.masked)


def _causal(setting: Setting) -> ModelConfig:
    return setting.causal


def _causal_exact(setting: Setting) -> ModelConfig:
    return exact(setting.causal)


def _causal_inverse(setting: Setting) -> ModelConfig:
    return setting.causal.model_copy(update={"landmark_inverse": True})


def causal_pyramid(setting: Setting) -> ModelConfig:
    """With as many levels as the length needs."""
    return setting.causal.model_copy(update={"landmark_levels": 64})


def causal_recall(setting: Setting) -> ModelConfig:
    """Tokens read two far segments exactly."""
    return setting.causal.model_copy(update={"recall_segments": 2})


def _flops(
    config: Callable[[Setting], ModelConfig], lengths: Callable[[Setting], list[int]] = _rows, *, conv: bool = False
) -> Callable[[Setting], float]:
    return lambda setting: forward_flops(config(setting), lengths(setting), conv=conv)


FULL = [Form("sdpa", "exact", ("sdpa",), _exact(causal=False), _flops(_masked_exact), exact_gib)]
PACKED = [
    Form(
        "packed-sdpa",
        "exact, document mask",
        ("sdpa",),
        _exact_documents,
        _flops(_masked_exact, _documents),
        masked_gib,
    )
]
CAUSAL = [Form("causal-sdpa", "exact, causal", ("causal-sdpa",), _exact(causal=True), _flops(_causal_exact), exact_gib)]
for _conv, _suffix, _words in ((False, "", ""), (True, "+conv", ", convolution")):
    FULL.append(
        Form(
            f"nystrom{_suffix}",
            f"ours{_words}",
            ("sdpa",),
            _nystrom(_conv, packed=False),
            _flops(_masked, conv=_conv),
            nystrom_gib,
        )
    )
    PACKED.append(
        Form(
            f"packed-nystrom{_suffix}",
            f"ours, packed documents{_words}",
            ("sdpa", "packed-sdpa"),
            _nystrom(_conv, packed=True),
            _flops(_masked, _documents, conv=_conv),
            packed_gib,
        )
    )
    for _name, _what, _config in (
        ("nystrom", "pooled values", _causal),
        ("inverse", "triangular inverse", _causal_inverse),
        ("pyramid", "pyramid of landmarks", causal_pyramid),
        ("recall", "two segments read exactly", causal_recall),
    ):
        CAUSAL.append(
            Form(
                f"causal-{_name}{_suffix}",
                f"ours, causal, {_what}{_words}",
                ("causal-sdpa",),
                _causal_nystrom(_conv, _name == "inverse", _config),
                _flops(_config, conv=_conv),
                causal_gib,
            )
        )
