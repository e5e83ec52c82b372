"""Where the time goes: the stages of our forms, each run by itself on what the stages before it give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention.forms import Built, causal_pyramid, causal_recall
from benchmarks.attention.measure import Case
from benchmarks.attention.setting import Setting
from pretrain.model.attention import causal_nystrom
from pretrain.model.attention.blockwise import Window, blockwise_attention
from pretrain.model.attention.forms.nystrom import pyramid_of
from pretrain.model.attention.inverse import iterative_inverse
from pretrain.model.attention.landmarks import landmark_means
from pretrain.model.attention.layout import Rectangle
from pretrain.model.attention.pyramid import Level
from pretrain.model.attention.softmax import attend
from pretrain.model.conv import skip_convolution

OF_CAUSAL = [f"causal-{kind}{conv}" for kind in ("nystrom", "inverse", "pyramid", "recall") for conv in ("", "+conv")]


def stages(form: str, setting: Setting, inputs: Sequence[Tensor], built: Built) -> list[Case]:
    """The stages of ``form`` on q, k, v (B, n, H, d), in order. The outputs of one are inputs of later ones. The form's
    output is that of "read", plus that of the convolution. None for a form that is not ours or is packed, and at
    lengths where ours is exact attention. No gradient passes from one to the other."""
    q, k, v = (x.transpose(1, 2) for x in inputs)
    found: list[Case] = []
    if form in ("nystrom", "nystrom+conv"):
        found = _bidirectional(setting, q, k, v)
    elif form in OF_CAUSAL:
        found = _causal(setting, q, k, v, form)
    if found and form.endswith("+conv"):
        weight, causal = built.weights[-1], form.startswith("causal")
        convolve = partial(skip_convolution, causal=causal)
        found.append(Case("convolution", convolve, _leaves(v, weight)))
    return found


def _leaves(*xs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in xs)


def _case(
    name: str, forward: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor
) -> tuple[Case, tuple[Tensor, ...]]:
    """The stage, and its outputs."""
    case = Case(name, forward, _leaves(*inputs))
    with torch.no_grad():
        return case, case.outputs()


def _bidirectional(setting: Setting, q: Tensor, k: Tensor, v: Tensor) -> list[Case]:
    """:func:`two_attentions` over full rows, taken apart.

    On a CPU in float32 the form is one function that shares passes between these stages: it takes less than their sum.
    """
    config, rectangle = setting.masked, Rectangle(setting.length, setting.length)
    if setting.length < 2 * config.num_landmarks:
        return []

    def means(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        m = config.num_landmarks
        return landmark_means(q, rectangle, m), landmark_means(k, rectangle, m)

    def inverse(q_landmarks: Tensor, k_landmarks: Tensor) -> Tensor:
        core = (setting.head_dim**-0.5 * q_landmarks @ k_landmarks.transpose(-1, -2)).softmax(dim=-1)
        return iterative_inverse(core, config.inverse_iterations, config.inverse_init)

    def gather(q_landmarks: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q_landmarks.to(k.dtype), k, v)

    def read(q: Tensor, k_landmarks: Tensor, inverted: Tensor, gathered: Tensor) -> Tensor:
        return attend(q, k_landmarks.to(q.dtype), (inverted @ gathered.to(inverted.dtype)).to(q.dtype))

    first, (q_landmarks, k_landmarks) = _case("landmark means", means, q, k)
    second, (inverted,) = _case("inverse", inverse, q_landmarks, k_landmarks)
    third, (gathered,) = _case("gather B V", gather, q_landmarks, k, v)
    last, _ = _case("read", read, q, k_landmarks, inverted, gathered)
    return [first, second, third, last]


def _causal(setting: Setting, q: Tensor, k: Tensor, v: Tensor, form: str) -> list[Case]:
    """:func:`causal_nystrom_attention`, taken apart; this function knows its parts and must change with them."""
    changed = {"pyramid": causal_pyramid, "recall": causal_recall}
    config = next((of(setting) for name, of in changed.items() if name in form), setting.causal)
    pyramid, weighted = pyramid_of(config), config.landmark_keys == "weighted"
    size, window = config.segment_length, Window(config.segment_length, config.window_segments)
    count = -(-setting.length // size) - window.segments
    if setting.length <= size * (window.segments + config.recall_segments):
        return []
    short = -setting.length % size
    q, k, v = (F.pad(x, (0, 0, 0, short)).flatten(0, 1) for x in (q, k, v))

    def means(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        queries = causal_nystrom.landmark_queries(q.unsqueeze(0), size, None)[0]
        far = causal_nystrom.causal_landmarks(queries, k, v, None, count=count, weighted=weighted)
        return queries[:, :count], *far

    def parents(*landmarks: Tensor) -> tuple[Tensor, ...]:
        return causal_nystrom.stacked(Level(*landmarks), pyramid, weighted=weighted)

    def gather(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_nystrom._gather(query.to(k.dtype), k, v, size)

    gamma = setting.gamma().detach().repeat(setting.batch)[:, None, None]
    future = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
    eye = torch.eye(count, device=q.device)

    def solve(query: Tensor, keys: Tensor, mass: Tensor, pooled: Tensor, gathered: Tensor) -> Tensor:
        core = setting.head_dim**-0.5 * query @ keys.transpose(1, 2) + mass.unsqueeze(1)
        core = core.masked_fill(future, float("-inf")).softmax(dim=2)
        right = gamma * pooled + (1 - gamma) * gathered.to(pooled.dtype)
        return torch.linalg.solve_triangular(gamma * eye + (1 - gamma) * core, right, upper=False)

    def read(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mass: Tensor) -> Tensor:
        return blockwise_attention(q, k, v, keys, values.to(v.dtype), mass, window, pyramid, config.recall_segments)

    first, (query, keys, mass, values) = _case("landmarks", means, q, k, v)
    found = [first]
    if "pyramid" in form:
        second, (keys, mass, values) = _case("parents", parents, query, keys, mass, values)
        found.append(second)
    if "inverse" in form:
        second, (gathered,) = _case("gather B V", gather, query, k, v)
        third, (values,) = _case("triangular solve", solve, query, keys, mass, values, gathered)
        found += [second, third]
    return [*found, _case("read of window and landmarks", read, q, k, v, keys, values, mass)[0]]
