"""The encoder as tensors only equals the model, whatever the lengths, the padding and the form of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from form_case import VOCAB, config, logits, model_of, tokens
from torch import Tensor
from toy_forms import Near, Sink

from data_pipeline.errors import UserError
from pretrain.convert.onnx import graph
from pretrain.convert.onnx.graph import TracedEncoder, TracedForm
from pretrain.model.attention.form import Form
from pretrain.model.attention.registry import FORMS
from pretrain.model.transformer import NystromformerLM

BATCHES = [[41, 0, 5, 23], [1], [3], [11], [12], [13, 12, 11], [11, 2], [100, 7, 60, 99, 1]]
"""Lengths of rows. With six landmarks attention is exact up to 11 tokens, and up to 6 without the inverse."""

MEASURED = 1e-11
"""Absolute, float64: 6e-13 with nine steps of the inverse, 2e-14 otherwise."""

SETTINGS: list[dict[str, Any]] = [
    {"attention": "nystrom"},
    {"attention": "nystrom", "landmark_inverse": False},
    {"attention": "nystrom", "num_landmarks": 1},
    {"attention": "nystrom", "inverse_iterations": 9, "norm": "post"},
    {"attention": "window"},
    {"attention": "softmax"},
    {"attention": ["window", "nystrom", "softmax"], "num_layers": 3},
    {"conv_kernel": 0, "positions": "none"},
    {"positions": "learned", "norm": "post"},
    {"positions": "learned", "trained_positions": 30, "landmark_inverse": False},
    {"positions": "learned", "max_positions": 100, "tie_embeddings": False},
    {"ffn": "geglu", "norm_kind": "rmsnorm", "qk_norm": True, "bias": False, "positions": ["rotary", "none"]},
    {"rope_scaling": "yarn", "rope_position_scale": 0.5, "rope_original_length": 16, "ffn": "relu2"},
    {"rope_theta": 50_000.0, "rope_position_scale": 0.5, "conv_kernel": 33},
]


def place(lengths: list[int], side: str, extra: int = 2) -> tuple[Tensor, Tensor]:
    """Random tokens and the mask of rows of these lengths; at padding the ids are no tokens at all."""
    width = max(lengths) + extra
    columns, counts = torch.arange(width), torch.tensor(lengths)[:, None]
    real = columns < counts if side == "right" else columns >= width - counts
    return torch.where(real, tokens(len(lengths), width, seed=width), -100), real.long()


def check(model: NystromformerLM, encoder: TracedEncoder, ids: Tensor, mask: Tensor, tolerance: float) -> None:
    """Each row's own tokens get what the model gives them alone."""
    with torch.no_grad():
        hidden, got = encoder(ids, mask)
    assert hidden.isfinite().all()
    assert got.isfinite().all()
    for row, real in enumerate(mask > 0):
        if real.any():
            alone = ids[row : row + 1, real]
            expected = model(alone, hidden=True).hidden
            assert expected is not None
            torch.testing.assert_close(hidden[row, real], expected[0], rtol=0, atol=tolerance)
            torch.testing.assert_close(got[row, real], logits(model, alone)[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: " ".join(map(str, changes.values())))
def test_equals_the_model(changes: dict[str, Any]) -> None:
    model = model_of(objective="mlm", **changes)
    encoder = TracedEncoder(model).eval()
    for number, lengths in enumerate(BATCHES):
        side = "left" if number % 3 == 0 else "right"
        check(model, encoder, *place(lengths, side, extra=0 if len(lengths) == 1 else 2), tolerance=MEASURED)


@pytest.mark.parametrize("form", [Near, Sink])
def test_equals_the_model_with_a_form_of_ones_own(form: type[Form]) -> None:
    with FORMS.registered(form):
        model = model_of(objective="mlm", attention=form.name)
        check(model, TracedEncoder(model).eval(), *place(BATCHES[0], "right"), tolerance=MEASURED)


def test_equals_the_model_in_float32() -> None:
    model = model_of(objective="mlm").float()
    check(model, TracedEncoder(model).eval(), *place(BATCHES[0], "right"), tolerance=6e-5)  # measured: 6e-6


def test_tokens_with_mask_0_are_not_there_wherever_they_stand() -> None:
    model = model_of(objective="mlm")
    ids = tokens(2, 40)
    mask = (torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.6).long()
    check(model, TracedEncoder(model).eval(), ids, mask, tolerance=MEASURED)


def test_without_the_head_there_are_hidden_states_only() -> None:
    model = model_of(objective="mlm")
    ids, mask = place([13, 5], "right")
    (hidden,) = TracedEncoder(model, head=False).eval()(ids, mask)
    torch.testing.assert_close(hidden, TracedEncoder(model).eval()(ids, mask)[0])


def test_weights_are_shared_and_the_model_stays_as_it_is() -> None:
    model = model_of(objective="mlm")
    ids = tokens(1, 20)
    before = logits(model, ids)
    encoder = TracedEncoder(model)
    assert {id(p) for p in encoder.parameters()} == {id(p) for p in model.parameters()}
    assert not any(isinstance(layer.attention.form, TracedForm) for layer in model.layers)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize(
    ("lengths", "runs"), [([11, 3], {"exact"}), ([12, 40], {"landmarks"}), ([3, 40], {"exact", "landmarks"})]
)
def test_only_what_a_row_needs_is_computed_and_exact_attention_reads_a_bounded_part(
    lengths: list[int], runs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(objective="mlm", num_layers=1)
    seen: set[str] = set()
    encoder = TracedEncoder(model).eval()
    form = encoder.model.layers[0].attention.form
    real_attend, real_softmax = form.original.attend, graph.softmax_attention

    def attend(*arguments: Any) -> Tensor:
        seen.add("landmarks")
        return real_attend(*arguments)

    def softmax(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **named: Any) -> Tensor:
        seen.add("exact")
        assert {x.shape[2] for x in (q, k, v)} == {min(11, max(lengths))}
        return real_softmax(q, k, v, *arguments, **named)

    monkeypatch.setattr(form.original, "attend", attend)
    monkeypatch.setattr(graph, "softmax_attention", softmax)
    check(model, encoder, *place(lengths, "right", extra=0), tolerance=MEASURED)
    assert seen == runs


def test_a_row_beyond_the_learned_positions_is_no_silent_mistake() -> None:
    encoder = TracedEncoder(model_of(objective="mlm", positions="learned", max_positions=30)).eval()
    encoder(*place([30], "right"))  # padding may stand beyond them
    with pytest.raises(IndexError, match="out of range"):
        encoder(*place([31], "right"))


def test_what_has_no_graph_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="a causal model has no ONNX export"):
        TracedEncoder(model_of(objective="clm"))
    original = model_of(objective="mlm", inverse_init="original")
    with pytest.raises(UserError, match="inverse_init: original has no ONNX export"):
        TracedEncoder(original)
    # Where nothing is inverted the setting has no effect.
    for changes in ({"landmark_inverse": False}, {"attention": "softmax"}):
        graph.check_traceable(config(objective="mlm", inverse_init="original", vocab_size=VOCAB, **changes))


def test_landmarks_that_begin_at_different_lengths_are_refused() -> None:
    class Later(FORMS.get("nystrom")):  # type: ignore[misc]
        name = "later"
        exact_up_to = 40

    with FORMS.registered(Later):
        with pytest.raises(
            UserError, match=r"attention \[nystrom, later\] has no ONNX export: the landmarks of its forms"
        ):
            graph.check_traceable(config(objective="mlm", attention=["nystrom", "later"]))
        graph.check_traceable(config(objective="mlm", attention=["window", "later"]))
