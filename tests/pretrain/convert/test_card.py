"""The model card: what it says is what the run's files say, and what they do not say is called unknown."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from data_pipeline.shards.manifest import read_manifest
from data_pipeline.shards.shardset import ShardSet
from eval.results.schema import Metric, ModelInfo, Result, Table, write_result
from pretrain.checkpoint.load import LoadedModel, load_model, unique_weights, weights_hash
from pretrain.config import RunConfig
from pretrain.convert.card import LICENCES, attention_in_words, write_card
from pretrain.convert.markdown import code, listed, number, table
from pretrain.convert.run_record import read_record
from pretrain.model import ModelConfig, build_model

V1 = Path(__file__).resolve().parents[2] / "fixtures" / "v1"
Make = Callable[..., LoadedModel]


@pytest.fixture
def make(corpus: Path, tmp_path: Path) -> Make:
    """Writes the folder of a small run as training leaves it, and loads it."""

    def write(*, tokens: int = 2048, run: bool = True, objective: str = "mlm", **changes: Any) -> LoadedModel:
        torch.manual_seed(0)
        masked = objective == "mlm"
        shards = ShardSet.open(corpus / "train")
        config = ModelConfig(
            objective=objective, vocab_size=shards.vocab_size, hidden_size=32, num_layers=2, num_heads=2,
            num_landmarks=8, segment_length=8, conv_kernel=5, **changes.pop("model", {}),
        )  # fmt: skip
        # Relative paths, as in a run that was started in the folder of the corpus.
        data = {"train": "train", "valid": "valid", **changes.pop("data", {})}
        settings = {
            "name": "small",
            "model": config.model_dump(),
            "data": data,
            "curriculum": [
                {"until_tokens": 1024, "seq_len": 32, "micro_batch": 2},
                {"until_tokens": 2048, "seq_len": 64, "micro_batch": 2, "masking_rate": 0.3 if masked else None},
            ],
            "batch_tokens": 256,
            "seed": 77,
            "optimizer": {"lr": 3e-3},
            **changes,
        }  # fmt: skip
        folder = tmp_path / "small"
        place = folder / "export" if run else folder
        place.mkdir(parents=True)
        weights = unique_weights(build_model(config))
        save_file(weights, place / "model.safetensors")
        (place / "config.yaml").write_text(RunConfig.model_validate(settings).to_yaml())
        shards.tokenizer().save(place)
        info = {"weights_hash": weights_hash(weights), "tokens": tokens, "step": 8}
        (place / "export.json").write_text(json.dumps(info))
        if run:
            (folder / "checkpoints" / "step000000008").mkdir(parents=True)
            prints = {
                "data_fingerprint": shards.fingerprint,
                "valid_fingerprint": read_manifest(corpus / "valid").fingerprint,
            }
            (folder / "checkpoints" / "step000000008" / "manifest.json").write_text(json.dumps({"identity": prints}))
            environment = {
                "working_directory": str(corpus), "python": "3.11.0", "host": "secret-host", "world_size": 2,
                "packages": {"torch": "2.13.0", "wandb": None}, "cpu": "Some CPU", "device": "cpu",
                "command": ["/home/secret/x"], "code": {"commit": "abcdef0123456789", "changed_since": True},
            }  # fmt: skip
            (folder / "environment.json").write_text(json.dumps(environment))
            (folder / "starts.jsonl").write_text("{}\n{}\n")
            lines = [
                {"kind": "valid", "tokens": 1024, "loss": 5.5, "targets": 10, "seq_len": 32},
                {"kind": "train", "tokens": 2048, "loss": 4.5},
                {"kind": "valid", "tokens": 2048, "loss": 4.25, "accuracy": 0.125, "targets": 1234, "seq_len": 64},
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text + '{"kind": "va')  # cut off while the run wrote it
        return load_model(place)

    return write


def info(loaded: LoadedModel) -> ModelInfo:
    config_hash = hashlib.sha256(loaded.model_config.model_dump_json().encode()).hexdigest()
    return ModelInfo(loaded.weights_hash, "small", config_hash=config_hash, tokenizer_hash=loaded.tokenizer.hash)


def add_result(
    loaded: LoadedModel,
    suite: str,
    metrics: dict[str, Metric],
    *,
    model: ModelInfo | None = None,
    checks: list[list[Any]] | None = None,
    created: str = "2026-01-02",
    place: str = "",
    **changes: Any,
) -> None:
    tables = [Table("checks", ["check", "measured", "bound", "passed", "detail"], checks)] if checks else []
    result = Result(
        suite, suite, "key", model or info(loaded), {"length": 64, "contamination": None},
        {"path": "/home/secret/held-out", "tokens": 999, "hash": "c0ffee" * 4}, metrics, tables, [], [], [], {},
        {"count": 0}, "passed", 1.0, created, {},
    )  # fmt: skip
    assert loaded.run_dir is not None
    write_result(loaded.run_dir / "eval" / (place or f"{suite}.json"), replace(result, **changes))


def card(loaded: LoadedModel, tmp_path: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """The metadata of a card and its text."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    write_card(loaded, out, **{"folder_kind": "custom", "dtype": "float32", **options})
    text = (out / "README.md").read_text(encoding="utf-8")
    head, body = text.removeprefix("---\n").split("---\n", 1)
    return yaml.safe_load(head), body


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cell."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def test_a_masked_run_in_full(make: Make, corpus: Path, tmp_path: Path) -> None:
    loaded = make()
    add_result(
        loaded,
        "lm",
        {
            "masked_loss": Metric(4.0625, False, n=1500, low=3.875, high=4.25, unit="tokens"),
            "accuracy": Metric(0.5, True, std=0.0123456, n=3),
        },
    )
    add_result(loaded, "validity", {"passed": Metric(1.0, True, n=17)}, checks=[["padding", 0.0, "<= 1", True, ""]])
    metadata, text = card(loaded, tmp_path, licence="MIT", language="en, de")
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "license": "mit",
        "language": ["en", "de"],
        "tags": ["nystromformer", "masked-lm", "custom_code", "validity-gate-passed"],
    }
    assert text.startswith("\n# small\n\nA masked language model of ")
    assert "prejudices of that text, and nothing else." in text
    found = rows(text)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    assert found["parameters"][0].startswith(f"{parameters:,} (")
    assert found["vocabulary"] == [f"{loaded.tokenizer.vocab_size:,} tokens"]
    assert found["SHA-256 of the weights"] == [f"`{loaded.weights_hash}` (float32, as trained)"]
    for name, share in (("train", "100.0%"), ("valid", "held out")):
        manifest = read_manifest(corpus / name)
        assert found[f"`{name}`"][:3] == [share, f"{manifest.num_documents:,}", f"{manifest.num_tokens:,}"]
        assert f"`{name}`: `{name}.jsonl`. No quality filter, duplicates not looked for." in text
    tokens = read_manifest(corpus / "train").num_tokens
    assert f"Training read {2048 / tokens:.2f} times the tokens of the source." in text
    assert "**Tokens seen: 2,048**, the whole of the run." in text
    assert found["1"] == ["32", "256", "1,024", "15.0%"]
    assert found["2"] == ["64", "256", "2,048", "30.0%"]
    assert found["optimizer"][0].startswith("adamw, peak learning rate 0.003, betas 0.9 and 0.95, weight decay 0.1,")
    assert found["seed"] == ["77"]
    assert found["software"] == ["Python 3.11.0, torch 2.13.0 (last of 2 starts)"]
    assert found["hardware"] == ["cpu (Some CPU); processes: 2"]
    assert found["code"] == ["nystrom-pretrain, commit `abcdef012345`, with changes"]
    assert "held-out text was 4.25 nats (accuracy 0.125), over 1,234 predicted tokens in rows of 64" in text
    results = rows(section(text, "Results"))
    assert results["`masked_loss`"] == ["4.062", "3.875 to 4.250", "1,500 tokens", "nats per masked token"]
    assert results["`accuracy`"][:3] == ["0.5000 ± 0.01235", "none", "3 seeds"]
    assert "data `held-out`, 999 tokens, hash `c0ffeec0ffee`, length `64`" in text
    assert "Whether the test text occurs in the training text was not examined." in text
    assert "**Passed**: all 17 checks (2026-01-02)." in section(text, "Validity")
    assert "The weights: MIT, as named by whoever made this folder." in text
    assert "> **" not in text
    assert "also training text" not in text
    for secret in ("secret", str(tmp_path), str(corpus)):
        assert secret not in text


def test_what_is_not_known_is_said_to_be_unknown(make: Make, tmp_path: Path) -> None:
    metadata, text = card(make(run=False, data={"train": "/home/secret/books", "valid": None}), tmp_path)
    assert metadata["license"] == "unknown"
    assert "language" not in metadata
    assert metadata["tags"][-1] == "validity-gate-not-run"
    assert rows(text)["`books`"] == ["100.0%", "unknown", "unknown", "unknown"]
    assert "Source `books`: the shards were not found" in text
    assert rows(text)["software"][0].startswith("unknown")
    assert "No evaluation of these weights is recorded: how good they are is unknown." in text
    assert text.index("> **Not examined.**") < text.index("## The model")
    assert "The licence of the weights is unknown" in text
    assert "Which languages the text is in is not recorded." in text
    assert "secret" not in text


def test_a_model_that_failed_the_gate_says_so_at_the_top(make: Make, tmp_path: Path) -> None:
    loaded = make(objective="clm")
    checks = [["causality: x", 0.25, "<= 0.0001", False, ""], ["padding", 0.0, "<= 1", True, ""]]
    add_result(loaded, "validity", {"passed": Metric(1.0, True, n=2)}, created="2026-01-01", place="finished/a/r.json")
    add_result(loaded, "validity", {"passed": Metric(0.0, True, n=2)}, checks=checks)
    add_result(loaded, "lm", {"loss": Metric(1.0, False)}, gate="forced")
    metadata, text = card(loaded, tmp_path)
    assert metadata["tags"][-1] == "validity-gate-failed"
    assert metadata["pipeline_tag"] == "text-generation"
    top = text[: text.index("## The model")]
    assert text.startswith("\n# small\n\n> **This model FAILED the validity gate.**")
    assert "> - causality: x: 0.25, must be <= 0.0001" in top
    assert "padding" not in top
    assert "Padding masks are obeyed" not in text
    assert "**FAILED**: 1 of 2 checks (2026-01-02), named at the top." in section(text, "Validity")
    assert "**Scored by force: the validity gate had failed.**" in section(text, "Results")


def test_results_of_other_weights_are_not_shown(make: Make, tmp_path: Path) -> None:
    loaded = make()
    own, older = info(loaded), replace(info(loaded), weights_hash="0" * 64)
    add_result(loaded, "lm", {"loss": Metric(1.5, False)}, model=older, place="lm.json")
    add_result(loaded, "rte", {"accuracy": Metric(0.25, True)}, model=replace(own, config_hash="0" * 64))
    add_result(loaded, "cola", {"mcc": Metric(0.125, True)}, model=replace(own, tokenizer_hash="0" * 64))
    add_result(loaded, "lra", {"accuracy": Metric(0.75, True)}, model=ModelInfo())
    add_result(loaded, "validity", {"passed": Metric(1.0, True, n=17)}, model=older)
    add_result(loaded, "sst2", {"accuracy": Metric(0.5, True)}, created="2026-01-01", place="step8/sst2.json")
    add_result(loaded, "sst2", {"accuracy": Metric(0.625, True)}, created="2026-01-03")
    add_result(loaded, "sst2", {"accuracy": Metric(0.75, True)}, created="2026-01-04", place="finished/a/result.json")
    add_result(loaded, "mnli", {"accuracy": Metric(0.875, True)}, place="finished/b/result.json")
    assert loaded.run_dir is not None
    (loaded.run_dir / "eval" / "broken.json").write_text('{"schema": 2, "suite"')
    (loaded.run_dir / "eval" / "old.json").write_text('{"schema": 1, "suite": "old"}')
    record = read_record(loaded)
    assert [result["suite"] for result in record.results] == ["mnli", "sst2"]
    assert record.results[1]["metrics"]["accuracy"]["value"] == 0.625
    assert record.other_results == ("cola", "lm", "rte")
    assert record.verdict is None
    _, text = card(loaded, tmp_path)
    assert "Results of other weights or settings of the model are not shown: `cola`, `lm`, `rte`." in text


def test_shards_that_were_prepared_anew_are_not_passed_off(make: Make, corpus: Path, tmp_path: Path) -> None:
    loaded = make()
    assert loaded.run_dir is not None
    path = loaded.run_dir / "checkpoints" / "step000000008" / "manifest.json"
    path.write_text(json.dumps({"identity": {"data_fingerprint": "0" * 32, "valid_fingerprint": "0" * 32}}))
    found = rows(card(loaded, tmp_path)[1])
    assert found["`train`"] == ["100.0%", "unknown", "unknown", "unknown"]
    assert found["`valid`"] == ["held out", "unknown", "unknown", "unknown"]


def test_several_sources_and_a_run_that_goes_on(make: Make, tmp_path: Path, corpus: Path) -> None:
    sources = [{"path": "train", "weight": 3, "name": "a|b"}, {"path": str(tmp_path / "gone"), "weight": 1}]
    loaded = make(tokens=512, data={"train": sources}, init_from="/home/secret/runs/first")
    assert loaded.run_dir is not None
    body = {"path": "/home/secret/runs/first", "weights_hash": "f" * 64, "tokens": 5000, "length": 16}
    (loaded.run_dir / "init_from.json").write_text(json.dumps(body))
    _, text = card(loaded, tmp_path)
    assert rows(text.replace(r"\|", "!"))["`a!b`"][:2] == [
        "75.0%",
        f"{read_manifest(corpus / 'train').num_documents:,}",
    ]
    assert rows(text)["`gone`"] == ["25.0%", "unknown", "unknown", "unknown"]
    assert "**Tokens seen: 512** of the 2,048 that were planned." in text
    assert r"| 1 | 32 | 256 | 512 | 15.0% | `a\|b` 75.0%, `gone` 25.0% |" in text
    assert "\n| 2 |" not in text
    assert "started with the weights of `first` (hash `ffffffffffff`), which had seen 5,000 tokens" in text
    assert "at lengths of up to 16" in text
    assert "prejudices of that text, and what the weights knew that it started with." in text
    assert "loss on held-out text" not in text  # the last validation was later
    assert "secret" not in text
    (loaded.run_dir / "init_from.json").unlink()
    assert "started with trained weights, of which nothing else is recorded here" in card(loaded, tmp_path)[1]


def test_weights_from_elsewhere_promise_no_training(make: Make, tmp_path: Path) -> None:
    _, text = card(make(tokens=0), tmp_path)
    assert "Nystrom-pretrain has not trained these weights" in text[: text.index("## The model")]
    assert section(text, "Training data").strip() == "Unknown: these weights were not trained by nystrom-pretrain."
    assert "**Tokens seen with nystrom-pretrain: 0.**" in section(text, "Training")
    assert "learning rate" not in text
    assert "Trained lengths are unknown." in section(text, "Limits")


@pytest.mark.parametrize("kind", ["stock", "custom"])
def test_how_to_load_it_fits_the_folder(kind: str, make: Make, tmp_path: Path) -> None:
    metadata, text = card(make(), tmp_path, folder_kind=kind, stock_length=64)
    own, faults = kind != "stock", kind != "custom"
    part = section(text, "Loading")
    [program] = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    compile(program, "card", "exec")
    assert ("trust_remote_code=True" in program) is own
    assert "<mask>" in program
    assert ("Padding masks are obeyed, texts can have any length" in part) is own
    assert ("custom_code" in metadata["tags"]) is own
    assert ("under Apache-2.0" in text) is own
    for fault in ("**Padding**", "**bf16 and fp16**", "**Lengths**", "(64 here)"):
        assert (fault in part) is faults


def test_stock_faults_of_exact_attention_are_others(make: Make, tmp_path: Path) -> None:
    _, text = card(make(model={"attention": "softmax"}), tmp_path, folder_kind="stock")
    part = section(text, "Loading")
    assert "the convolution reads the padding" in part
    assert "**Lengths**" not in part


@pytest.mark.parametrize(
    ("licence", "metadata"),
    [
        ("unknown", {"license": "unknown"}),
        (" ", {"license": "unknown"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("Books of ours, 2026", {"license": "other", "license_name": "books-of-ours-2026"}),
    ],
)
def test_a_licence_is_one_that_the_hub_takes(
    licence: str, metadata: dict[str, str], make: Make, tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard

    found, text = card(make(), tmp_path, licence=licence)
    assert {k: v for k, v in found.items() if k.startswith("license")} == metadata
    read = ModelCard.load(tmp_path / "out" / "README.md").data  # as the hub's own library reads it
    assert read.license == metadata["license"]
    assert read.pipeline_tag == "fill-mask"
    assert f"The weights: {licence}, as named" in text or metadata["license"] == "unknown"
    assert "mit" in LICENCES


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "mlm"}, "Nyström attention (Xiong et al. 2021) with 64 landmarks"),
        ({"objective": "mlm", "landmark_inverse": False}, "mean keys and values of 64 segments, without the inverse"),
        ({"objective": "clm"}, "one landmark, values pooled; exact up to 128 tokens"),
        ({"objective": "clm", "landmark_levels": 9}, "a pyramid of landmarks (band 16, branching 2, at most 9 levels)"),
        (
            {"objective": "clm", "recall_segments": 2},
            "of which each token reads the 2 that it asks for most exactly, values pooled; exact up to 256 tokens",
        ),
        ({"objective": "clm", "landmark_inverse": True}, "values through a triangular inverse"),
        ({"attention": "softmax"}, "exact softmax attention; plus a depthwise convolution of 65 taps"),
        (
            {"attention": ["window", "window", "softmax"], "num_layers": 6},
            "in 4 of 6 layers exact attention to 2 segments of 64 tokens, and 1 on the other side; no others, and "
            "in 2 of 6 layers exact softmax attention; plus",
        ),
        ({"attention": "window", "conv_kernel": 0}, "exact attention to 2 segments of 64 tokens, and 1 on the other"),
    ],
)
def test_attention_is_named_as_it_is(changes: dict[str, Any], words: str) -> None:
    assert words in attention_in_words(ModelConfig(vocab_size=10, **changes))


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_a_run_of_an_earlier_version_has_a_card(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(V1)
    loaded = load_model(f"runs/{name}/export")
    _, text = card(loaded, tmp_path)
    expected = read_manifest(V1 / "shards")
    assert rows(text)["`shards`"][1:3] == [f"{expected.num_documents:,}", f"{expected.num_tokens:,}"]
    assert f"**Tokens seen: {loaded.tokens:,}**" in text
    assert "**The held-out text is also training text**" in text  # these small runs had one folder for both


def test_text_of_a_run_stays_text() -> None:
    assert code("a `b`\n| c") == "`a 'b' | c`"
    assert table(["x"], [["a|b"]]) == "| x |\n| --- |\n| a\\|b |"
    assert listed(["a", "b", "c"], 2) == "`a`, `b` and 1 more"
    shown = [number(v) for v in (1234567, 1234.5, 0.00012345, 12.0, True, None, float("nan"), "7", 0)]
    assert shown == ["1,234,567", "1,234", "0.0001234", "12", "unknown", "unknown", "unknown", "unknown", "0"]
    assert [number(v, padded=True) for v in (5.1, 0.5, 0.0, 138.88, 1000.4, 99999.5)] == [
        "5.100", "0.5000", "0", "138.9", "1,000", "100,000",
    ]  # fmt: skip
