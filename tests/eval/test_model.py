"""A checkpoint for Python programs: its numbers are those of a plain forward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import UserError
from eval.model import Model

TEXT = "river and the quiet stone"


def test_likelihood_of_a_causal_model(causal: Path) -> None:
    model = Model.open(causal, "cpu")
    ids = model.tokenizer.encode(TEXT)
    with torch.no_grad():
        logits = model.network(torch.tensor([[model.tokenizer.eos_id, *ids]])).logits[0]
        assert torch.equal(model.logits(TEXT), model.network(torch.tensor([ids])).logits[0].float())
    expected = sum(float(row.double().log_softmax(-1)[token]) for row, token in zip(logits, ids, strict=False))
    assert model.log_likelihood(TEXT) == pytest.approx(expected, rel=1e-5)
    both = model.generate([TEXT, "a"], max_new_tokens=4, seed=3)
    assert both == [model.generate(TEXT, max_new_tokens=4, seed=3), model.generate("a", max_new_tokens=4, seed=4)]
    with pytest.raises(UserError, match=r"causal model .*use generate"):
        model.fill("[MASK]")
    for wrong, message in (({"temperature": -1}, "temperature"), ({"batch_size": 0}, "batch_size must be")):
        with pytest.raises(UserError, match=message):
            model.generate("a", **wrong)
    with pytest.raises(UserError, match="prompt 1 is int, not str"):
        model.generate(["a", 3])  # type: ignore[list-item]
    with pytest.raises(UserError, match="has no token"):
        model.logits("")


def test_likelihood_and_masks_of_a_masked_model(masked: Path) -> None:
    model = Model.open(masked, "cpu")
    ids = model.tokenizer.encode(TEXT)
    expected = 0.0
    for place, token in enumerate(ids):
        hidden = [*ids[:place], model.tokenizer.mask_id, *ids[place + 1 :]]
        expected += float(model.subject.logits(torch.tensor([hidden]))[0, place].double().log_softmax(-1)[token])
    assert model.log_likelihood(TEXT) == pytest.approx(expected, rel=1e-5)
    [candidates] = model.fill("river [MASK]", top=3)
    assert [c.probability for c in candidates] == sorted((c.probability for c in candidates), reverse=True)
    with pytest.raises(UserError, match=r"masked model .*use fill"):
        model.generate("a")


def test_vectors_are_means_of_hidden_states(masked: Path) -> None:
    model = Model.open(masked, "cpu")
    with torch.no_grad():
        hidden = model.network(torch.tensor([model.tokenizer.encode(TEXT)]), hidden=True).hidden[0].float()
    assert torch.equal(model.hidden_states(TEXT), hidden)
    with pytest.raises(UserError, match="has no token"):
        model.hidden_states("")
    assert "masked (mlm)" in model._repr_html_()
    assert np.allclose(model.embed(TEXT), hidden.mean(0).numpy(), atol=1e-6)
    assert model.embed([TEXT, "a"]).shape == (2, hidden.shape[1])
    assert model.embed([]).shape == (0, hidden.shape[1])
    with pytest.raises(UserError, match="pooling 'sum'"):
        model.embed(TEXT, pooling="sum")  # type: ignore[arg-type]


def test_opening_leaves_torch_alone_and_refuses_what_is_no_checkpoint(masked: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    assert "mlm" in repr(Model.open(masked, "cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)
    for arguments, message in (
        ((tmp_path / "none",), "does not exist"),
        ((tmp_path,), "neither a run folder"),
        ((masked, "gpu9"), "gpu9"),
        ((masked, "cpu", "fp8"), "precision 'fp8'"),
    ):
        with pytest.raises(UserError, match=message):
            Model.open(*arguments)  # type: ignore[arg-type]
