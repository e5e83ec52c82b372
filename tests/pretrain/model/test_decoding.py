"""Decoding with a cache gives the logits of the full forward pass, at every length, for every form and batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.model import Layout, ModelConfig, build_model
from pretrain.model.attention.registry import FORMS
from pretrain.model.decoding import DecodingCache, cache_bytes, cache_elements, decode, prefill
from pretrain.model.transformer import NystromformerLM

C, N, VOCABULARY = 4, 45, 23
FORMS: dict[str, dict[str, Any]] = {
    **{name: {"attention": name} for name in FORMS.names() if "clm" in FORMS.get(name).objectives},
    "pattern": {"attention": ("window", "nystrom", "softmax"), "num_layers": 3},
    "inverse": {"landmark_inverse": True, "learn_landmark_query": True},
    "inverse-fixed-gamma": {"landmark_inverse": True, "learn_gamma": False, "landmark_keys": "mean"},
    "mean-keys": {"landmark_keys": "mean"},
    "learned-query": {"learn_landmark_query": True},
    "recall": {"recall_segments": 2},
    "recall-inverse": {"recall_segments": 1, "landmark_inverse": True, "segment_length": 3},
    "pyramid": {"landmark_levels": 16, "landmark_band": 1},
    "pyramid-of-threes": {
        "landmark_levels": 2, "landmark_band": 2, "landmark_branching": 3, "segment_length": 2, "landmark_keys": "mean",
        "learn_landmark_query": True,
    },
}  # fmt: skip
KEEPING = [name for name, changes in FORMS.items() if "attention" in changes] + ["inverse", "recall", "pyramid"]
"""One for each kind of state."""


def settings(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "objective": "clm", "vocab_size": VOCABULARY, "hidden_size": 12, "num_layers": 2, "num_heads": 2,
        "segment_length": C, "conv_kernel": 5, "init_std": 0.5, "max_positions": 64,
    }  # fmt: skip
    return ModelConfig.model_validate(values | changes)


def decoder(dtype: torch.dtype = torch.float64, **changes: Any) -> NystromformerLM:
    """With random landmark queries and gammas: the first start at zero, the second all alike."""
    torch.manual_seed(0)
    model = build_model(settings(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("landmark_query", "landmark_query_out", "gamma_logit")):
                parameter.normal_()
    return model.to(dtype)


def tokens(rows: int = 2, length: int = N) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def forward(model: NystromformerLM, ids: Tensor) -> Tensor:
    logits = model(ids).logits
    assert logits is not None
    return logits


def step_by_step(model: NystromformerLM, ids: Tensor, start: int) -> Tensor:
    """Logits (B, N - start + 1, V): after a prompt of ``start`` tokens and after each one more."""
    logits, cache = prefill(model, ids[:, :start], max_length=ids.shape[1])
    return torch.stack([logits] + [decode(model, ids[:, t], cache) for t in range(start, ids.shape[1])], dim=1)


def assert_decodes(model: NystromformerLM, starts: list[int], atol: float = 1e-9) -> None:
    ids = tokens()
    full = forward(model, ids)
    for start in starts:
        torch.testing.assert_close(step_by_step(model, ids, start), full[:, start - 1 :], rtol=0, atol=atol)


@pytest.mark.parametrize("w", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_window_from_one_token(form: str, w: int) -> None:
    assert_decodes(decoder(window_segments=w, **FORMS[form]), [1])


def test_the_forms_differ() -> None:
    """Else the other tests could not tell landmarks from none."""
    last = [forward(decoder(**FORMS[form]), tokens())[0, -1] for form in FORMS]
    for i, a in enumerate(last):
        for b in last[:i]:
            assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("form", KEEPING)
@pytest.mark.parametrize("kernel", [0, 1, 4, 8, 9, 19])
def test_every_width_of_the_convolution(form: str, kernel: int) -> None:
    """Up to the window of 8 tokens, and wider."""
    assert_decodes(decoder(conv_kernel=kernel, **FORMS[form]), [1, 11])


@pytest.mark.parametrize("form", KEEPING)
@pytest.mark.parametrize("change", [{"positions": "learned"}, {"positions": "none"}, {"norm": "post"}])
def test_every_kind_of_positions_and_norm(form: str, change: dict[str, Any]) -> None:
    assert_decodes(decoder(**change, **FORMS[form]), [1, 11])


@pytest.mark.parametrize("form", KEEPING)
def test_prompts_of_every_length(form: str) -> None:
    model, ids = decoder(**{"num_layers": 1, "conv_kernel": 4} | FORMS[form]), tokens(length=30)
    full = forward(model, ids)
    for start in range(1, 31):
        torch.testing.assert_close(step_by_step(model, ids, start), full[:, start - 1 :], rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", KEEPING)
def test_float32(form: str) -> None:
    model = decoder(torch.float32, **FORMS[form])
    assert_decodes(model, [1, 11], atol=1e-4 * float(forward(model, tokens()).abs().max()))


@pytest.mark.parametrize("form", KEEPING)
def test_bfloat16_is_no_worse_than_its_forward_pass(form: str) -> None:
    model, ids = decoder(**FORMS[form]), tokens()
    exact = forward(model, ids)
    model = model.to(torch.bfloat16)
    got = step_by_step(model, ids, 11)
    assert got.dtype == torch.bfloat16
    bound = 2 * (forward(model, ids) - exact).abs().max()
    assert (got - exact[:, 10:]).abs().max() < bound
    assert bound < 0.5 * exact.abs().max()


def test_float16_decodes_where_a_logit_exceeds_its_range() -> None:
    """Logits of 1e5 and more in every layer: attention is one-hot, and equal to that of the forward pass."""
    model = decoder(conv_kernel=0)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.query.weight.mul_(300)
            layer.attention.key.weight.mul_(300)
    ids = tokens(1, 20)
    with torch.no_grad():
        x = model.layers[0].attention_norm(model.embeddings(ids, Layout.full(1, 20)))
        largest = (model.layers[0].attention.query(x) @ model.layers[0].attention.key(x).transpose(1, 2)).abs().max()
    assert largest > 4 * torch.finfo(torch.float16).max
    low = model.half()
    assert forward(low, ids).isfinite().all()
    assert step_by_step(low, ids, 9).isfinite().all()


def test_autocast() -> None:
    model = decoder(torch.float32, landmark_inverse=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = step_by_step(model, tokens(), 11).float()
        full = forward(model, tokens())[:, 10:].float()
    assert (got - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_unequal_prompts_equal_each_alone(form: str, side: str) -> None:
    """With and without landmarks at the start, on and off segment edges; other rows' segments end in other steps."""
    model, lengths, more = decoder(**FORMS[form]), [1, 12, 21, 7, 28], 15
    texts = [row[: n + more] for row, n in zip(tokens(5), lengths, strict=True)]
    width = max(lengths) + 2
    ids, documents = torch.zeros(5, width, dtype=torch.int64), torch.full((5, width), -1)
    for row, n in enumerate(lengths):
        at = slice(0, n) if side == "right" else slice(width - n, width)
        ids[row, at], documents[row, at] = texts[row][:n], 0
    layout = Layout.from_lengths(lengths, width) if side == "right" else Layout.from_documents(documents)

    logits, cache = prefill(model, ids, layout, max_length=max(lengths) + more)
    steps = [logits]
    for t in range(more):
        new = torch.stack([text[n + t] for text, n in zip(texts, lengths, strict=True)])
        steps.append(decode(model, new, cache))
    assert cache.lengths.tolist() == [n + more for n in lengths]
    for row, n in enumerate(lengths):
        full = forward(model, texts[row][None])[0, n - 1 :]
        torch.testing.assert_close(torch.stack(steps, dim=1)[row], full, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [7, 12, 29])
def test_prompts_leave_the_state_that_single_tokens_leave(form: str, length: int) -> None:
    model, ids = decoder(**FORMS[form]), tokens(length=length)
    _, at_once = prefill(model, ids, max_length=40)
    _, one_by_one = prefill(model, ids[:, :1], max_length=40)
    for t in range(1, length):
        decode(model, ids[:, t], one_by_one)
    for a, b in zip(at_once.layers, one_by_one.layers, strict=True):
        assert a.tensors().keys() == b.tensors().keys()
        for name, tensor in a.tensors().items():
            torch.testing.assert_close(tensor, b.tensors()[name], rtol=0, atol=1e-9, msg=name)


def test_rows_can_leave() -> None:
    model, ids = decoder(landmark_inverse=True), tokens(3)
    full = forward(model, ids)
    _, cache = prefill(model, ids[:, :9], max_length=N)
    for t in range(9, 20):
        decode(model, ids[:, t], cache)
    cache.keep([2, 0])
    for t in range(20, N):
        torch.testing.assert_close(decode(model, ids[[2, 0], t], cache), full[[2, 0], t], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", [5, 19])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [3, 8, 9, 18, 40])
def test_memory_is_what_the_formula_says(form: str, length: int, kernel: int) -> None:
    config = settings(conv_kernel=kernel, **FORMS[form])
    for dtype in (torch.float32, torch.bfloat16):
        cache = DecodingCache(config, 3, length, dtype=dtype, device=torch.device("cpu"))
        tensors = [x for layer in cache.layers for x in layer.tensors().values()]
        assert cache_elements(config, 3, length) == sum(x.numel() for x in tensors)
        assert cache_bytes(config, 3, length, dtype) == sum(x.nbytes for x in tensors)


def test_memory_grows_by_landmarks_only() -> None:
    def growth(**changes: Any) -> int:
        config = settings(**changes)
        return cache_elements(config, 1, 1000 + C) - cache_elements(config, 1, 1000)

    layers, hidden, heads = 2, 12, 2
    assert growth() == layers * (2 * hidden + heads)
    assert growth(attention="window") == 0
    assert growth(attention="softmax") == layers * 2 * hidden * C
    assert growth(landmark_inverse=True) == layers * (2 * hidden + heads + 2 * hidden * C)
    assert growth(recall_segments=3) == growth(landmark_inverse=True)


@pytest.mark.parametrize("w", [1, 3])
@pytest.mark.parametrize(("band", "branching"), [(1, 2), (3, 2), (2, 4)])
def test_memory_of_a_pyramid_grows_with_the_logarithm(band: int, branching: int, w: int) -> None:
    pyramid = {"landmark_levels": 30, "landmark_band": band, "landmark_branching": branching, "window_segments": w}
    layers, hidden, heads = 2, 12, 2
    a_level = (band + branching) * branching // (branching - 1) + w
    for power in range(3, 9):
        length = C * (branching**power * band + w)
        near = layers * 2 * hidden * C * max(w, 2)  # of the window, and as far back as the convolution reaches
        got = cache_elements(settings(**pyramid), 1, length)
        assert got <= near + (power + 1) * layers * (a_level * (2 * hidden + heads) + hidden)
    flat = cache_elements(settings(window_segments=w), 1, length)
    assert got < flat / 2


def test_a_pyramid_decodes_far_beyond_its_first_levels() -> None:
    """Every slot of every level is written again many times."""
    model = decoder(landmark_levels=16, landmark_band=1, segment_length=2, window_segments=1, positions="none")
    ids = tokens(length=301)
    torch.testing.assert_close(step_by_step(model, ids, 37), forward(model, ids)[:, 36:], rtol=0, atol=1e-9)


def test_no_room_no_positions_no_prompt() -> None:
    model, ids = decoder(), tokens()
    with pytest.raises(UserError, match="a text of 9 tokens does not fit a decoding cache made for 8"):
        prefill(model, ids[:, :9], max_length=8)
    _, cache = prefill(model, ids[:, :8], max_length=8)
    with pytest.raises(UserError, match="a text of 9 tokens does not fit"):
        decode(model, ids[:, 8], cache)
    with pytest.raises(RuntimeError, match="empty cache only"):
        cache.begin(Layout.full(2, 3))

    learned = decoder(positions="learned", max_positions=8)
    _, cache = prefill(learned, ids[:, :8], max_length=20)
    with pytest.raises(UserError, match="9 tokens is longer than the model's 8 learned positions"):
        decode(learned, ids[:, 8], cache)
    assert cache.lengths.tolist() == [8, 8]

    for layout in (Layout.from_lengths([3, 0], N), Layout.from_documents(torch.arange(2 * N).view(2, N) // 30)):
        with pytest.raises(UserError, match="one sequence of at least one token"):
            prefill(model, ids, layout, max_length=N)
    with pytest.raises(UserError, match="this one is masked"):
        prefill(build_model(settings(objective="mlm")), ids, max_length=N)
    with pytest.raises(RuntimeError, match="gets prompts first"):
        DecodingCache(model.config, 1, 8, dtype=torch.float64, device=torch.device("cpu")).next_step()


@pytest.mark.parametrize("form", KEEPING)
def test_weights_are_used_in_their_own_module_only(form: str) -> None:
    """As under ZeRO-3: outside of the forward pass of the module that owns it, a weight is not there."""
    model, ids = decoder(**FORMS[form]), tokens(length=20)
    full = forward(model, ids)
    stored = {id(p): p.data for p in model.parameters()}

    def gather(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = stored[id(parameter)]

    def release(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.new_empty(0)

    for module in model.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    torch.testing.assert_close(step_by_step(model, ids, 5), full[:, 4:], rtol=0, atol=1e-9)
