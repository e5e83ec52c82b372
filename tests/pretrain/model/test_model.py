"""The whole model: independence of padding, batch mates and packing; causality; the loss; precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from form_case import (
    EVERY,
    PATTERNS,
    VOCAB,
    batch_mates_do_not_matter,
    compiles_to_one_graph,
    config,
    every_length_reaches_every_parameter,
    gradients_packed_equal_separate,
    logits,
    model_of,
    no_gradient_from_the_future,
    packed_equals_separate,
    padding_does_not_matter,
    the_future_changes_nothing_and_prefixes_agree,
    tokens,
)
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.model import Layout, ModelConfig, build_model
from pretrain.model.attention.registry import FORMS
from pretrain.model.attention.self_attention import SelfAttention

VARIANTS: list[dict[str, object]] = [
    {"objective": objective, "attention": attention, "positions": positions, "norm": norm}
    for objective in ("mlm", "clm")
    for attention, positions, norm in [
        *((name, "rotary", "pre") for name in FORMS.names() if objective in FORMS.get(name).objectives),
        ("nystrom", "learned", "post"),
        ("softmax", "none", "pre"),
    ]
] + [
    *(
        {"objective": objective, "attention": pattern, "positions": "rotary", "norm": "pre"}
        for pattern, objective in PATTERNS
    ),
    {"objective": "mlm", "attention": "nystrom", "positions": "none", "norm": "pre", "landmark_inverse": False},
    {"objective": "clm", "attention": "nystrom", "positions": "rotary", "norm": "pre", "landmark_inverse": True},
    {"objective": "clm", "attention": "nystrom", "positions": "none", "norm": "pre", "landmark_keys": "mean"},
    {"objective": "clm", "attention": "nystrom", "positions": "rotary", "norm": "post", "learn_landmark_query": True},
    {"objective": "clm", "attention": "nystrom", "positions": "none", "norm": "pre", "learn_landmark_query": True},
    {"objective": "clm", "attention": "nystrom", "landmark_levels": 16, "landmark_band": 2},
    {"objective": "clm", "attention": "nystrom", "recall_segments": 2},
]


def name_of(variant: dict[str, object]) -> str:
    return "-".join("/".join(value) if isinstance(value, tuple) else str(value) for value in variant.values())


variants = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)


@variants
@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 37, 100])
def test_any_length_runs_and_reaches_every_parameter(variant: dict[str, object], length: int) -> None:
    every_length_reaches_every_parameter(model_of(**variant), length)


@variants
def test_batch_mates_do_not_matter(variant: dict[str, object]) -> None:
    batch_mates_do_not_matter(model_of(**variant))


@variants
def test_amount_and_content_of_padding_do_not_matter(variant: dict[str, object]) -> None:
    padding_does_not_matter(model_of(**variant))


@variants
def test_packed_equals_separate(variant: dict[str, object]) -> None:
    packed_equals_separate(model_of(**variant))


@variants
def test_gradients_packed_equal_those_of_the_documents_separate(variant: dict[str, object]) -> None:
    gradients_packed_equal_separate(model_of(**variant))


CAUSAL = [v for v in VARIANTS if v["objective"] == "clm"]


@pytest.mark.parametrize("variant", CAUSAL, ids=name_of)
@pytest.mark.parametrize("kind", ["full", "padded", "documents"])
def test_causal_model_has_no_gradient_from_the_future(variant: dict[str, object], kind: str) -> None:
    no_gradient_from_the_future(model_of(**variant), kind)


@pytest.mark.parametrize("variant", CAUSAL, ids=name_of)
def test_changing_the_future_changes_nothing_and_prefixes_agree(variant: dict[str, object]) -> None:
    the_future_changes_nothing_and_prefixes_agree(model_of(**variant))


def test_masked_model_sees_both_sides() -> None:
    model, ids = model_of(objective="mlm"), tokens(1, 30)
    changed = ids.clone()
    changed[0, 29] = (ids[0, 29] + 1) % VOCAB
    assert (logits(model, changed) - logits(model, ids))[0, 0].abs().max() > 1e-6


@variants
@pytest.mark.parametrize("kind", ["full", "padded"])
def test_loss_is_the_sum_over_targets(variant: dict[str, object], kind: str) -> None:
    model, ids = model_of(**variant), tokens(3, 40)
    labels = tokens(3, 40, seed=9)
    labels[torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.7] = -100
    layout = None
    if kind == "padded":
        layout = Layout.from_lengths([40, 11, 0], 40)
        labels[1, 11:] = labels[2] = -100
    out = model(ids, labels=labels, layout=layout, hidden=True)
    everywhere = logits(model, ids, layout)
    naive = sum(
        -everywhere[b, t].log_softmax(-1)[labels[b, t]] for b in range(3) for t in range(40) if int(labels[b, t]) >= 0
    )
    torch.testing.assert_close(out.loss_sum, naive, rtol=1e-12, atol=1e-9)
    assert int(out.num_targets) == int((labels >= 0).sum())
    assert out.num_targets.dtype == torch.int64
    assert out.logits is None
    assert out.hidden is not None
    assert out.hidden.shape == (3, 40, 16)


@variants
def test_a_batch_without_targets_gives_zero_and_zero_gradients(variant: dict[str, object]) -> None:
    model, ids = model_of(**variant), tokens(2, 40)
    for layout in (None, Layout.from_lengths([3, 40], 40), Layout.from_lengths([0, 0], 40)):
        model.zero_grad()
        out = model(ids, labels=torch.full_like(ids, -100), layout=layout)
        assert float(out.loss_sum.detach()) == 0
        assert int(out.num_targets) == 0
        out.loss_sum.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad == 0).all(), name


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_loss_in_chunks_equals_loss_at_once(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(objective=objective), tokens(2, 40)
    labels = torch.where(torch.arange(40) % 5 == 0, ids, -100)
    parameters = list(model.parameters())
    at_once = model(ids, labels=labels).loss_sum
    expected = torch.autograd.grad(at_once, parameters)
    for limit in (VOCAB * 30, VOCAB):  # also more chunks than targets
        monkeypatch.setattr("pretrain.model.transformer.LOSS_CHUNK_ELEMENTS", limit)
        chunked = model(ids, labels=labels).loss_sum
        torch.testing.assert_close(chunked, at_once)
        for a, b in zip(torch.autograd.grad(chunked, parameters), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@variants
def test_a_new_model_is_at_chance(variant: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = build_model(config(**variant, init_std=0.02, vocab_size=1000, hidden_size=32))
    ids = torch.randint(0, 1000, (8, 64))
    out = model(ids, labels=ids.roll(17, dims=1))
    assert out.loss_sum.dtype == torch.float32
    assert abs(float(out.loss_sum.detach() / out.num_targets) - math.log(1000)) < 0.05


@variants
@pytest.mark.parametrize("kind", ["full", "documents"])
def test_the_whole_model_works_in_bfloat16(variant: dict[str, object], kind: str) -> None:
    torch.manual_seed(0)
    model = build_model(config(**variant, init_std=0.05, hidden_size=32)).eval()
    ids = tokens(2, 100)
    documents = torch.tensor([[0] * 70 + [1] * 27 + [-1] * 3, [0] * 100])
    layout = Layout.from_documents(documents) if kind == "documents" else None
    expected = logits(model, ids, layout)
    model.bfloat16()
    got = logits(model, ids, layout)
    assert got.dtype == torch.bfloat16
    real = documents >= 0 if kind == "documents" else torch.ones_like(documents, dtype=torch.bool)
    assert (got.float() - expected)[real].norm() / expected[real].norm() < 0.05
    out = model(ids, labels=torch.where(real, ids, -100), layout=layout)
    assert out.loss_sum.dtype == torch.float32
    out.loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def gamma_of(attention: SelfAttention) -> Tensor | None:
    return attention.form.given(attention.own(), None, torch.device("cpu")).get("gamma")


def test_gamma_stays_above_a_half_starts_where_asked_and_learns() -> None:
    model = build_model(config(objective="clm", landmark_inverse=True, gamma_init=0.6))
    attention = model.layers[0].attention
    torch.testing.assert_close(gamma_of(attention), torch.full((2,), 0.6))
    model.double()
    with torch.no_grad():
        attention.gamma_logit.fill_(-30.0)
    assert (gamma_of(attention) > 0.5).all()
    ids = tokens(2, 40)
    model(ids, labels=ids).loss_sum.backward()
    assert (model.layers[1].attention.gamma_logit.grad != 0).all()
    fixed = build_model(config(objective="clm", landmark_inverse=True, gamma_init=0.6, learn_gamma=False))
    torch.testing.assert_close(gamma_of(fixed.layers[0].attention), torch.full((2,), 0.6))
    assert gamma_of(build_model(config(objective="clm")).layers[0].attention) is None
    assert not any("gamma" in name for name, _ in fixed.named_parameters())


def test_tied_weight_is_one_parameter_and_survives_saving(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = model_of(objective="clm")
    assert model.head.decoder.weight is model.embeddings.word_embeddings.weight
    untied = model_of(objective="clm", tie_embeddings=False)
    assert untied.num_parameters() - model.num_parameters() == VOCAB * 16
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = build_model(config(objective="clm")).double().eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert other.head.decoder.weight is other.embeddings.word_embeddings.weight
    ids = tokens(1, 30)
    assert torch.equal(logits(other, ids), logits(model, ids))
    model.bfloat16()
    assert model.head.decoder.weight is model.embeddings.word_embeddings.weight


def test_falling_back_to_exact_attention_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model(config(num_landmarks=7))  # exact below 14 tokens
    with caplog.at_level("INFO", logger="pretrain.model.attention.self_attention"):
        model(tokens(1, 14))
        assert caplog.messages == []
        model(tokens(1, 13))
        model(tokens(2, 13))
    assert caplog.messages == ["sequences of 13 tokens get exact softmax attention: Nystrom begins beyond 13"]


def test_user_errors() -> None:
    with pytest.raises(UserError, match="vocab_size"):
        build_model(ModelConfig())
    with pytest.raises(ValueError, match="gamma_init\n  Input should be less than 1"):
        config(gamma_init=1.0)
    model = build_model(config(positions="learned", max_positions=8))
    with pytest.raises(UserError, match="9 tokens is longer than the model's 8"):
        model(tokens(1, 9))
    model(tokens(1, 9), layout=Layout.from_lengths([8], 9))  # padding needs no position
    with pytest.raises(ValueError, match="layout is for"):
        model(tokens(1, 9), layout=Layout.full(2, 9))


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_it_learns_a_repetitive_sequence(objective: str) -> None:
    """A few steps bring the loss far below chance: a cycle of 11 tokens entered anywhere (clm), one token repeated
    (mlm)."""
    torch.manual_seed(0)
    model = build_model(config(objective=objective, init_std=0.02, hidden_size=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    cycle = torch.randperm(VOCAB - 1)[:11] + 1
    losses = []
    for step in range(160):
        random = torch.Generator().manual_seed(step)
        start = torch.randint(0, 11, (8, 1), generator=random)
        ids = cycle[(start + (torch.arange(41) if objective == "clm" else torch.zeros(41, dtype=torch.int64))) % 11]
        if objective == "clm":
            inputs, labels = ids[:, :-1], ids[:, 1:]
        else:
            hide = torch.rand(ids.shape, generator=random) < 0.2
            inputs, labels = torch.where(hide, 0, ids), torch.where(hide, ids, -100)
        out = model(inputs, labels=labels)
        loss = out.loss_sum / out.num_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.15)
    assert losses[-1] < 0.2, losses[::5]


@pytest.mark.slow  # 5 s each
@pytest.mark.parametrize(("attention", "objective"), EVERY)
def test_full_rows_compile_to_one_graph(attention: str, objective: str) -> None:
    compiles_to_one_graph(model_of(attention=attention, objective=objective))


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_autocast_gives_float32_loss_and_finite_gradients(objective: str) -> None:
    torch.manual_seed(0)
    model = build_model(config(objective=objective, init_std=0.05))
    ids = tokens(2, 60)
    expected = model(ids, labels=ids).loss_sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids)
    assert out.loss_sum.dtype == torch.float32
    assert float(out.loss_sum.detach()) == pytest.approx(float(expected.detach()), rel=0.02)
    out.loss_sum.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    model, ids = build_model(config(dropout=0.5)), tokens(1, 20)
    model.eval()
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))


def test_softmax_model_equals_a_plain_transformer_layer() -> None:
    """One pre-norm layer written with PyTorch's own pieces."""
    model = model_of(objective="clm", attention="softmax", positions="none", conv_kernel=0, num_layers=1)
    ids, layer = tokens(2, 30), model.layers[0]
    x = model.embeddings.norm(model.embeddings.word_embeddings(ids))
    y = layer.attention_norm(x)
    weight = torch.cat([getattr(layer.attention, name).weight for name in ("query", "key", "value")])
    bias = torch.cat([getattr(layer.attention, name).bias for name in ("query", "key", "value")])
    y, _ = F.multi_head_attention_forward(
        *[y.transpose(0, 1)] * 3,
        16,
        2,
        weight,
        bias,
        None,
        None,
        False,
        0.0,
        layer.attention.output.weight,
        layer.attention.output.bias,
        attn_mask=torch.ones(30, 30, dtype=torch.bool).triu(1),
        need_weights=False,
    )
    x = x + y.transpose(0, 1)
    x = x + layer.feed_forward(layer.feed_forward_norm(x))
    expected = model.norm(x) @ model.embeddings.word_embeddings.weight.T
    torch.testing.assert_close(logits(model, ids), expected.detach(), rtol=0, atol=1e-11)
