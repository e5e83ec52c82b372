"""Folders of ``nystrom convert to-hf`` in sentence-transformers: equal vectors in any batch, training on pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_folder_case import _own_cache_of_modules  # noqa: F401
from tuning_case import load as load_model
from tuning_case import sentences, tokenizer_of

pytestmark = pytest.mark.slow  # importing it takes seconds
TEXTS = [text for text, _ in sentences(12)]


def load(folder: Path, **changes: Any) -> Any:
    """The one line that its users write."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **changes)


def last_states(folder: Path, text: str) -> torch.Tensor:
    """(N, h): the last hidden states of a text alone, without padding."""
    model = load_model(folder, "AutoModel").eval()
    ids = tokenizer_of(folder)(text)["input_ids"]
    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0]


def pairs(count: int) -> dict[str, list[str]]:
    """Sentences, and for each a text that names its first and third word."""
    texts = sorted({text for text, _ in sentences(count, seed=3, words=(5, 9))})
    return {"anchor": texts, "positive": [f"about {text.split()[0]} {text.split()[2]}" for text in texts]}


def found_first(model: Any, data: dict[str, list[str]]) -> float:
    """The share of anchors whose own positive is the nearest of all."""
    anchors, positives = (model.encode(data[name], normalize_embeddings=True) for name in ("anchor", "positive"))
    nearest = (anchors @ positives.T).argmax(1)
    return float(np.mean([data["positive"][i] == right for i, right in zip(nearest, data["positive"], strict=True)]))


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_vectors_are_those_of_texts_alone(objective: str, tiny_folders: dict[str, Path], caplog: Any) -> None:
    """The mean over real tokens for masked models, the last token's state for causal ones."""
    folder = tiny_folders[objective]
    with caplog.at_level("WARNING"):
        model = load(folder)
    assert [record.getMessage() for record in caplog.records] == []
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling"]
    assert model.max_seq_length == 64
    states = [last_states(folder, text) for text in TEXTS]
    expected = torch.stack([x.mean(0) if objective == "mlm" else x[-1] for x in states]).numpy()
    for size in (1, 5, 12):
        # Largest seen: 6e-7 of values up to 3.
        np.testing.assert_allclose(model.encode(TEXTS, batch_size=size), expected, rtol=0, atol=1e-5)


def test_pooling_of_ones_own_choice(tiny_folders: dict[str, Path]) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    trusted = {"trust_remote_code": True}
    words = Transformer(
        str(tiny_folders["mlm"]),
        model_kwargs=trusted,
        config_kwargs=trusted,
        processor_kwargs=trusted,
        max_seq_length=16,
    )
    model = SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension(), "max")], device="cpu")
    states = last_states(tiny_folders["mlm"], TEXTS[0])
    assert len(states) > 16  # cut off
    short = load(tiny_folders["mlm"])
    short.max_seq_length = 16
    assert model.encode(TEXTS[:1]).shape == short.encode(TEXTS[:1]).shape == (1, 16)
    text = "the ship"
    np.testing.assert_allclose(
        model.encode([text, TEXTS[1]])[0], last_states(tiny_folders["mlm"], text).amax(0), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_few_steps_on_pairs(objective: str, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model, data = load(tiny_folders[objective]), pairs(64)
    before = found_first(model, data)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=40,
        per_device_train_batch_size=32,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        seed=7,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4]), losses
    assert found_first(model, data) > before + 0.2, (before, found_first(model, data), losses)

    model.save_pretrained(str(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    np.testing.assert_allclose(again.encode(TEXTS), model.encode(TEXTS), rtol=0, atol=1e-6)
    assert not np.allclose(again.encode(TEXTS), load(tiny_folders[objective]).encode(TEXTS), atol=0.01)
