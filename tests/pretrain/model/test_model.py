"""The whole model: independence of padding, batch mates and packing; causality; the loss; precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.model import Layout, LMOutput, ModelConfig, build_model
from pretrain.model.attention.self_attention import SelfAttention
from pretrain.model.transformer import NystromformerLM

VOCAB = 31


def config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_landmarks": 6,
        "segment_length": 4,
        "window_segments": 2,
        "conv_kernel": 5,
        "max_positions": 200,
        "init_std": 0.3,
    }
    return ModelConfig.model_validate(values | changes)


def model_of(**changes: object) -> NystromformerLM:
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


VARIANTS: list[dict[str, object]] = [
    {"objective": objective, "attention": attention, "positions": positions, "norm": norm}
    for objective in ("mlm", "clm")
    for attention, positions, norm in [
        ("nystrom", "rotary", "pre"),
        ("nystrom", "learned", "post"),
        ("window", "rotary", "pre"),
        ("softmax", "none", "pre"),
    ]
] + [
    {"objective": "mlm", "attention": "nystrom", "positions": "none", "norm": "pre", "landmark_inverse": False},
    {"objective": "clm", "attention": "nystrom", "positions": "rotary", "norm": "pre", "landmark_inverse": True},
    {"objective": "clm", "attention": "nystrom", "positions": "none", "norm": "pre", "landmark_keys": "mean"},
    {"objective": "clm", "attention": "nystrom", "positions": "rotary", "norm": "post", "learn_landmark_query": True},
    {"objective": "clm", "attention": "nystrom", "positions": "none", "norm": "pre", "learn_landmark_query": True},
]


def name_of(variant: dict[str, object]) -> str:
    return "-".join(map(str, variant.values()))


variants = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)


@variants
@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 37, 100])
def test_any_length_runs_and_reaches_every_parameter(variant: dict[str, object], length: int) -> None:
    model = model_of(**variant)
    ids = tokens(2, length)
    out: LMOutput = model(ids, labels=ids)
    assert out.loss_sum is not None
    assert out.num_targets is not None
    assert out.loss_sum.isfinite()
    assert int(out.num_targets) == ids.numel()
    out.loss_sum.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@variants
def test_batch_mates_do_not_matter(variant: dict[str, object]) -> None:
    model, ids = model_of(**variant), tokens(3, 41)
    together = logits(model, ids)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], logits(model, ids[row : row + 1]), rtol=0, atol=1e-9)


@variants
def test_amount_and_content_of_padding_do_not_matter(variant: dict[str, object]) -> None:
    model, ids = model_of(**variant), tokens(4, 41)
    lengths = [41, 0, 5, 23]
    for width, seed in ((41, 1), (44, 2), (90, 3)):
        padded = tokens(4, width, seed=seed)
        for row, n in enumerate(lengths):
            padded[row, :n] = ids[row, :n]
        out = logits(model, padded, Layout.from_lengths(lengths, width))
        assert out.isfinite().all()
        for row, n in enumerate(lengths):
            if n:
                torch.testing.assert_close(out[row, :n], logits(model, ids[row : row + 1, :n])[0], rtol=0, atol=1e-9)


@variants
def test_packed_equals_separate(variant: dict[str, object]) -> None:
    model = model_of(**variant)
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


@variants
def test_gradients_packed_equal_those_of_the_documents_separate(variant: dict[str, object]) -> None:
    model, ids = model_of(**variant), tokens(1, 60)
    documents = torch.tensor([[0] * 33 + [1] * 20 + [-1] * 7])
    labels = torch.where(documents >= 0, ids, -100)
    parameters = list(model.parameters())
    packed = torch.autograd.grad(
        model(ids, labels=labels, layout=Layout.from_documents(documents)).loss_sum, parameters
    )
    loss = model(ids[:, :33], labels=ids[:, :33]).loss_sum + model(ids[:, 33:53], labels=ids[:, 33:53]).loss_sum
    for a, b in zip(packed, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


CAUSAL = [v for v in VARIANTS if v["objective"] == "clm"]


@pytest.mark.parametrize("variant", CAUSAL, ids=name_of)
@pytest.mark.parametrize("kind", ["full", "padded", "documents"])
def test_causal_model_has_no_gradient_from_the_future(variant: dict[str, object], kind: str) -> None:
    model, ids = model_of(**variant), tokens(1, 22)
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
        if variant["attention"] == "window":  # in two layers: the window before each token of the window
            visible &= torch.arange(22) > t - 8
        assert (grad[0, visible].abs().sum(-1) > 0).all(), f"logits at {t} do not see all of their past"


@pytest.mark.parametrize("variant", CAUSAL, ids=name_of)
def test_changing_the_future_changes_nothing_and_prefixes_agree(variant: dict[str, object]) -> None:
    model, ids = model_of(**variant), tokens(1, 50)
    whole = logits(model, ids)
    for t in (1, 4, 8, 9, 12, 31, 49):
        changed = ids.clone()
        changed[:, t:] = tokens(1, 50 - t, seed=5)
        # Not bitwise: the kernels may sum in another order for other values around, never by more than rounding.
        torch.testing.assert_close(logits(model, changed)[:, :t], whole[:, :t], rtol=0, atol=1e-11)
        torch.testing.assert_close(logits(model, ids[:, :t]), whole[:, :t], rtol=0, atol=1e-11)


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
    model = build_model(config(num_landmarks=13))
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


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_full_rows_compile_to_one_graph(objective: str) -> None:
    model, ids = model_of(objective=objective), tokens(2, 61)
    expected = model(ids, labels=ids).loss_sum
    parameters = list(model.parameters())
    # dynamic: after another test has compiled the same code for another shape, it would try one graph for all shapes.
    got = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")(ids, labels=ids).loss_sum
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


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
