"""What must hold of every form of attention, on whole models in float64: for the tests of all registered forms, and for
those of a form that exists in one test only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.model import Layout, ModelConfig, build_model
from pretrain.model.attention.pattern import Attention
from pretrain.model.attention.registry import FORMS, forms_of
from pretrain.model.decoding import DecodingCache, cache_bytes, cache_elements, decode, prefill
from pretrain.model.flops import all_attention_flops_per_token
from pretrain.model.transformer import NystromformerLM

VOCAB = 31
REGISTERED = [(name, objective) for name in FORMS.names() for objective in FORMS.get(name).objectives]
"""Every form with every objective that it is for."""
PATTERNS: list[tuple[Attention, str]] = [(("window", "nystrom"), "mlm"), (("nystrom", "softmax"), "clm")]
"""Models whose layers have unlike forms."""
EVERY: list[tuple[Attention, str]] = [*REGISTERED, *PATTERNS]


def config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_landmarks": 6,
        "segment_length": 4, "window_segments": 2, "conv_kernel": 5, "max_positions": 200, "init_std": 0.3,
    }  # fmt: skip
    return ModelConfig.model_validate(values | changes)


def model_of(**changes: Any) -> NystromformerLM:
    """In float64 and with every weight random, gates and biases too, so that nothing is hidden by a zero."""
    torch.manual_seed(0)
    model = build_model(config(**changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: NystromformerLM, ids: Tensor, layout: Layout | None = None) -> Tensor:
    out = model(ids, layout=layout).logits
    assert out is not None
    return out.detach()


def every_length_reaches_every_parameter(model: NystromformerLM, length: int) -> None:
    ids = tokens(2, length)
    model.zero_grad()
    out = model(ids, labels=ids)
    assert out.loss_sum is not None
    assert out.num_targets is not None
    assert out.loss_sum.isfinite()
    assert int(out.num_targets) == ids.numel()
    out.loss_sum.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def batch_mates_do_not_matter(model: NystromformerLM) -> None:
    ids = tokens(3, 41)
    together = logits(model, ids)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], logits(model, ids[row : row + 1]), rtol=0, atol=1e-9)


def padding_does_not_matter(model: NystromformerLM) -> None:
    ids, lengths = tokens(4, 41), [41, 0, 5, 23]
    for width, seed in ((41, 1), (44, 2), (90, 3)):
        padded = tokens(4, width, seed=seed)
        for row, n in enumerate(lengths):
            padded[row, :n] = ids[row, :n]
        out = logits(model, padded, Layout.from_lengths(lengths, width))
        assert out.isfinite().all()
        for row, n in enumerate(lengths):
            if n:
                torch.testing.assert_close(out[row, :n], logits(model, ids[row : row + 1, :n])[0], rtol=0, atol=1e-9)


def packed_equals_separate(model: NystromformerLM) -> None:
    rows = [[40, 23, 64, 9, -13], [-7, 1, 6, 7, 128]]  # negative: padding
    ids = tokens(2, 149)
    documents = torch.full((2, 149), -1)
    pieces = []
    for row, sizes in enumerate(rows):
        at = 0
        for number, size in enumerate(sizes):
            if size > 0:
                documents[row, at : at + size] = number
                pieces.append((row, at, size))
            at += abs(size)
    packed = logits(model, ids, Layout.from_documents(documents))
    assert packed.isfinite().all()
    for row, at, size in pieces:
        alone = logits(model, ids[row : row + 1, at : at + size])[0]
        torch.testing.assert_close(packed[row, at : at + size], alone, rtol=0, atol=1e-9)


def gradients_packed_equal_separate(model: NystromformerLM) -> None:
    ids, documents = tokens(1, 60), torch.tensor([[0] * 33 + [1] * 20 + [-1] * 7])
    labels = torch.where(documents >= 0, ids, -100)
    parameters = list(model.parameters())
    packed = torch.autograd.grad(
        model(ids, labels=labels, layout=Layout.from_documents(documents)).loss_sum, parameters
    )
    loss = model(ids[:, :33], labels=ids[:, :33]).loss_sum + model(ids[:, 33:53], labels=ids[:, 33:53]).loss_sum
    for a, b in zip(packed, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def no_gradient_from_the_future(model: NystromformerLM, kind: str) -> None:
    """kind: full, padded or documents."""
    ids, forms = tokens(1, 22), list(forms_of(model.config).values())
    documents = torch.tensor([{"full": [0] * 22, "padded": [0] * 19 + [-1] * 3, "documents": [0] * 14 + [1] * 8}[kind]])
    embedded: list[Tensor] = []

    def keep(_module: object, _args: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.embeddings.register_forward_hook(keep)
    out = model(ids, layout=Layout.from_documents(documents)).logits
    handle.remove()
    for t in range(22):
        if documents[0, t] < 0:
            continue
        (grad,) = torch.autograd.grad(out[0, t].sum(), embedded[0], retain_graph=True)
        visible = (documents[0] == documents[0, t]) & (torch.arange(22) <= t)
        assert (grad[0, ~visible] == 0).all(), f"logits at {t} depend on what they must not see"
        if all(form.far == "unseen" for form in forms):
            # Each layer sees at least w - 1 segments back, or itself where there is no window.
            windows = [form.window for form in forms]
            back = min(0 if w is None else w.segment_length * (w.segments - 1) for w in windows)
            visible &= torch.arange(22) > t - max(len(model.layers) * back, 1)
        assert (grad[0, visible].abs().sum(-1) > 0).all(), f"logits at {t} do not see all of their past"


def the_future_changes_nothing_and_prefixes_agree(model: NystromformerLM) -> None:
    ids = tokens(1, 50)
    whole = logits(model, ids)
    for t in (1, 4, 8, 9, 12, 31, 49):
        changed = ids.clone()
        changed[:, t:] = tokens(1, 50 - t, seed=5)
        # Not bitwise: the kernels may sum in another order for other values around, never by more than rounding.
        torch.testing.assert_close(logits(model, changed)[:, :t], whole[:, :t], rtol=0, atol=1e-11)
        torch.testing.assert_close(logits(model, ids[:, :t]), whole[:, :t], rtol=0, atol=1e-11)


def exact_up_to_what_it_says(model: NystromformerLM) -> None:
    """The same weights under exact attention: equal up to ``exact_up_to`` tokens, and not far beyond it."""
    forms = list(forms_of(model.config).values())
    twin = build_model(model.config.model_copy(update={"attention": "softmax"})).double().eval()
    twin.load_state_dict(model.state_dict(), strict=False)  # without the form's own parameters
    limit = min((form.exact_up_to for form in forms if form.exact_up_to is not None), default=None)
    assert all(form.far == "exact" for form in forms) == (limit is None)
    for length in [1, 7, 50] if limit is None else [n for n in (1, limit) if n <= limit]:
        ids = tokens(2, length)
        torch.testing.assert_close(logits(model, ids), logits(twin, ids), rtol=0, atol=1e-9)
    if limit is not None:
        ids = tokens(2, 5 * limit + 20)
        assert (logits(model, ids) - logits(twin, ids)).abs().max() > 1e-4


def flops_are_sane(settings: ModelConfig) -> None:
    """Positive, those of exact attention where the form is exact, and more in all for a longer text."""
    forms, total = list(forms_of(settings).values()), 0.0
    limit = min((form.exact_up_to for form in forms if form.exact_up_to is not None), default=None)
    for n in (1, 2, 5, 8, 9, 30, 31, 64, 200, 1000):
        flops = all_attention_flops_per_token(settings, n)
        assert flops > 0
        assert n * flops > total
        total = n * flops
        exact = settings.num_layers * forms[0].exact_flops(n)
        if limit is None:
            assert flops == exact
        elif n <= limit:  # a window counts each token it looks at, exact attention its mean
            assert flops == pytest.approx(exact)


def compiles_to_one_graph(model: NystromformerLM) -> None:
    ids, parameters = tokens(2, 61), list(model.parameters())
    expected = model(ids, labels=ids).loss_sum
    torch.compiler.reset()
    # dynamic: after another test has compiled the same code for another shape, it would try one graph for all shapes.
    got = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")(ids, labels=ids).loss_sum
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def decoding_equals_the_forward_pass(model: NystromformerLM) -> None:
    """From unequal prompts, padded left and right, and with rows that leave."""
    lengths, more, width = [1, 12, 21, 7], 15, 23
    texts = tokens(4, width + more, seed=3)
    full = [logits(model, texts[row : row + 1, : n + more])[0] for row, n in enumerate(lengths)]
    for side in ("left", "right"):
        ids, documents = torch.zeros(4, width, dtype=torch.int64), torch.full((4, width), -1)
        for row, n in enumerate(lengths):
            at = slice(0, n) if side == "right" else slice(width - n, width)
            ids[row, at], documents[row, at] = texts[row, :n], 0
        out, cache = prefill(model, ids, Layout.from_documents(documents), max_length=max(lengths) + more)
        rows = [0, 1, 2, 3]
        for t in range(more):
            for row, found in zip(rows, out, strict=True):
                torch.testing.assert_close(found, full[row][lengths[row] - 1 + t], rtol=0, atol=1e-9)
            if t == 9:
                rows = [3, 1]
                cache.keep([3, 1])
            new = torch.stack([texts[row, lengths[row] + t] for row in rows])
            out = decode(model, new, cache)


def the_cache_has_the_size_it_says(settings: ModelConfig) -> None:
    for length in (3, 8, 9, 40):
        for dtype in (torch.float32, torch.bfloat16):
            cache = DecodingCache(settings, 3, length, dtype=dtype, device=torch.device("cpu"))
            state = [x for layer in cache.layers for x in layer.tensors().values()]
            assert cache_elements(settings, 3, length) == sum(x.numel() for x in state)
            assert cache_bytes(settings, 3, length, dtype) == sum(x.nbytes for x in state)
