"""LoRA adapters of PEFT on the linear layers of folders that ``nystrom convert to-hf`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folder_case import _own_cache_of_modules, export, loaded_model  # noqa: F401
from torch import Tensor
from tuning_case import CLASSIFIER, HEADS, load, sentences, tokenizer_of

pytestmark = pytest.mark.slow  # importing peft takes seconds
LAYERS = ["query", "key", "value", "output", "intermediate"]
PER_LAYER = 6
"""Linear layers of a block: four of attention, two of the feed-forward part, which are called output as well."""


def batch_of(folder: Path, count: int = 8) -> dict[str, Tensor]:
    """Padded sentences on the right."""
    return dict(tokenizer_of(folder)([text for text, _ in sentences(count)], padding=True, return_tensors="pt"))


def adapted(model: Any, task: str, **changes: Any) -> Any:
    """The model with adapters, whose weights are drawn so that they do something from the start."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(task_type=task, r=4, lora_alpha=8, target_modules=LAYERS, lora_dropout=0.0, **changes)
    return get_peft_model(model, config)


def train(model: Any, batch: dict[str, Tensor], labels: Tensor, steps: int = 12) -> list[float]:
    """Losses of a few steps of Adam on the weights that may change."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    found = []
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    model.eval()
    return found


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize(("tied", "checkpointing"), [(True, False), (False, False), (True, True)])
def test_only_adapters_learn_and_merge_into_the_weights(
    objective: str, tied: bool, checkpointing: bool, tmp_path: Path
) -> None:
    from peft import PeftModel

    folder = export(loaded_model(objective=objective, tie_embeddings=tied), tmp_path / "tiny")
    model = load(folder, HEADS[objective])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = batch_of(folder)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    lora = adapted(model, "CAUSAL_LM" if objective == "clm" else "FEATURE_EXTRACTION")
    learning = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert len(learning) == 2 * PER_LAYER * model.config.num_hidden_layers
    assert all("lora_" in name for name in learning)
    found = train(lora, batch, labels)
    assert found[-1] < found[0] - 0.3
    for name, value in lora.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name

    with torch.no_grad():
        expected = lora(**batch).logits
        lora.save_pretrained(tmp_path / "adapter")
        size = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
        assert size < (folder / "model.safetensors").stat().st_size
        again = PeftModel.from_pretrained(load(folder, HEADS[objective]), tmp_path / "adapter").eval()
        assert torch.equal(again(**batch).logits, expected)
        merged = again.merge_and_unload()
        # Another order of additions. Largest seen: 3e-6 of logits up to 3.5.
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=3e-5)
        assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(load(tmp_path / "merged", HEADS[objective]).eval()(**batch).logits, merged(**batch).logits)
        if objective == "clm":
            ids = {"input_ids": batch["input_ids"][:1, :4], "max_new_tokens": 5, "do_sample": False}
            assert torch.equal(lora.generate(**ids), merged.generate(**ids))


def test_a_classifier_trains_its_head_beside_the_adapters(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    folder = tiny_folders["mlm"]
    batch, labels = batch_of(folder, 16), torch.tensor([topic for _, topic in sentences(16)])
    lora = adapted(load(folder, CLASSIFIER), "SEQ_CLS")
    learning = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert {name for name in learning if "lora_" not in name} == {
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    }
    found = train(lora, batch, labels, steps=20)
    assert found[-1] < 0.5 * found[0]
    lora.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, lora(**batch).logits)


def test_all_linear_layers_by_their_common_name(tiny_folders: dict[str, Path]) -> None:
    """``target_modules="all-linear"`` leaves the output layer out, which shares its weight with the embeddings."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load(tiny_folders["clm"], HEADS["clm"]), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    layers = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(layers) == PER_LAYER * 2
    assert {name.rpartition(".")[2] for name in layers} == set(LAYERS)
