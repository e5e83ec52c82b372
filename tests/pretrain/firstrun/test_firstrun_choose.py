"""What is chosen fits by the planner, and the file says what was chosen with a reason for each key."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import UserError
from pretrain.config import RunConfig, parse_config
from pretrain.config.schema import run_schema
from pretrain.firstrun import choose as choosing
from pretrain.firstrun.choose import Choice, choose, drafts
from pretrain.firstrun.inputs import Corpus, Machine, gpus, read_corpus
from pretrain.firstrun.page import as_yaml, duration
from pretrain.planning.estimate import Question, estimate, plan_time
from pretrain.planning.fit import MemoryBudget, peak
from pretrain.planning.memory import plan_memory
from pretrain.precision import resolve_for_plan

TEXT = Corpus("shards/train", 3_000_000, 10_000, 4096, 200, 500, "shards/valid", 200_000)
LARGE = Corpus("shards/train", 10**10, 10**7, 32_768, 400, 900, "shards/valid", 10**7)


def with_vocabulary(choice: Choice) -> RunConfig:
    """As a run would have it once it has read the shards."""
    model = choice.config.model.model_copy(update={"vocab_size": choice.corpus.vocab_size})
    return choice.config.model_copy(update={"model": model})


def needing(monkeypatch: pytest.MonkeyPatch, gib: dict[tuple[int, bool], float]) -> None:
    """Have the planner say so many GiB for ZeRO stage and checkpointing; others do not fit, nor more than one row."""

    class Planned:
        def __init__(self, peak: float) -> None:
            self.peak, self.state = int(peak * 2**30), None

    def peaks(_: Any, config: Any) -> list[Planned]:
        rows = max(stage.micro_batch for stage in config.curriculum)
        return [Planned(gib.get((config.zero_stage, config.activation_checkpointing), 1e6) * rows)]

    monkeypatch.setattr("pretrain.planning.fit.MemoryBudget.peaks", peaks)


@pytest.fixture(scope="module")
def causal() -> Choice:
    """Small, with the real planner."""
    return choose("first", "clm", TEXT, gpus(2, 24, 0.02, 0.001))


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> Choice:
    needing(monkeypatch, {(1, False): 0.1})
    return choose("first", "mlm", replace(TEXT, valid=None, held_out=None), gpus(1, 24, 0.5, 0.001))


def test_the_planner_agrees(causal: Choice) -> None:
    config = resolve_for_plan(with_vocabulary(causal), on_gpu=True).config
    assert MemoryBudget(2, int(24 * 2**30 * 0.9)).holds(config)
    assert peak(plan_memory(config, 2)) == causal.peak
    stages = plan_time(config, 2, mfu=1.0, peak_flops=causal.machine.flops)
    assert sum(stage.tokens for stage in stages) == causal.draft.tokens
    steps = sum(stage.steps for stage in stages)
    arithmetic = causal.seconds - choosing.STEP_SECONDS * steps
    assert sum(stage.seconds or 0 for stage in stages) == pytest.approx(arithmetic, rel=0.02)
    assert causal.config.zero_stage == 1
    assert not causal.passed_over


def test_the_file_is_the_configuration_with_a_reason_for_each_choice(causal: Choice, masked: Choice) -> None:
    for choice in (causal, masked):
        text = as_yaml(choice, "nystrom init ...")
        assert parse_config(yaml.safe_load(text)) == choice.config
        lines = text.splitlines()
        assert lines[0] == "# yaml-language-server: $schema=nystrom.schema.json"
        assert lines[1] == "# Made by: nystrom init ..."
        assert max(map(len, lines)) <= 120
        for i, line in enumerate(lines):  # each key at the top says why, in its line or above, or opens a block
            if re.match(r"\w", line) and not re.match(r"name:|model:|data:|curriculum:", line):
                assert "#" in line or lines[i - 1].startswith("#"), line
    assert "3,000,000 tokens in 10,000 documents" in as_yaml(causal, "")
    assert "half of the documents have up to 200 tokens, nine in ten up to 500" in as_yaml(causal, "")
    assert "no held-out text" in as_yaml(masked, "")
    assert "half of it for a masked model" in as_yaml(masked, "")


def test_the_schema_takes_the_file(causal: Choice) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")
    raw = yaml.safe_load(as_yaml(causal, ""))
    assert list(jsonschema.Draft7Validator(run_schema()).iter_errors(raw)) == []


@pytest.mark.parametrize(
    ("gib", "processes", "taken"),
    [
        ({(1, False): 70.0, (2, False): 60.0}, 8, (1, False)),
        ({(1, False): 73.0, (2, False): 60.0}, 8, (2, False)),  # 72 are free
        ({(2, True): 60.0, (3, True): 10.0}, 8, (2, True)),
        ({(3, True): 60.0}, 8, (3, True)),
        ({(2, True): 60.0}, 1, (2, True)),
    ],
)
def test_the_cheapest_memory_setting_that_fits_is_taken(
    gib: dict[tuple[int, bool], float], processes: int, taken: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    needing(monkeypatch, gib)
    choice = choose("first", "clm", LARGE, gpus(processes, 80, 24, 0.3))
    assert (choice.config.zero_stage, choice.config.activation_checkpointing) == taken
    assert all(stage.micro_batch == 1 for stage in choice.config.curriculum)
    plain = drafts("clm", LARGE, choice.machine)[0]
    if taken[1]:  # layers are computed twice, which takes time from the run
        assert choice.draft.tokens == pytest.approx(plain.tokens * 0.75, rel=0.05)
        assert "activation_checkpointing: true # layers are computed twice" in as_yaml(choice, "")
    else:
        assert choice.draft == plain


def test_a_smaller_size_is_taken_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = gpus(8, 80, 24, 0.3)
    wide = drafts("clm", LARGE, machine)[0].shape.hidden_size
    fitted = choosing._fitted

    def no_wide(name: str, objective: str, each: Any, *others: Any) -> Any:
        return None if each.shape.hidden_size == wide else fitted(name, objective, each, *others)

    needing(monkeypatch, {(1, False): 1.0})
    monkeypatch.setattr(choosing, "_fitted", no_wide)
    choice = choose("first", "clm", LARGE, machine)
    assert choice.draft.shape.hidden_size < wide
    assert [shape.hidden_size for shape in choice.passed_over] == [wide]
    assert f"larger ones do not fit the memory: {wide} x" in as_yaml(choice, "")


@pytest.mark.parametrize(
    ("text", "machine", "message"),
    [
        (replace(TEXT, tokens=5000), gpus(1, 24, 1, 0.3), r"holds 5,000 tokens: too few .* 12,800 are the least"),
        (replace(TEXT, tokens=30_000), gpus(64, 24, 1, 0.3), r"on 64 process\(es\). 102,400 are the least"),
        (TEXT, gpus(1, 24, 0.005, 0.3), "0.005 hours are too short .* --hours"),
        (TEXT, Machine(1, 8, 1e7, 1, False, ""), "1 hours are too short"),
        (TEXT, gpus(1, 0.01, 1, 0.3), "0.01 GiB for one process are too little: the smallest model, 64"),
    ],
)
def test_what_is_too_little_is_refused_with_numbers(
    text: Corpus, machine: Machine, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needing(monkeypatch, {(3, True): 0.02})
    with pytest.raises(UserError, match=message):
        choose("first", "clm", text, machine)


def test_a_corpus_is_read_from_its_shards(corpus: Path) -> None:
    found = read_corpus(corpus / "train", corpus / "valid", "mlm")
    assert found.documents == 120
    assert found.held_out
    assert 20 < found.median <= found.p90 < 300
    with pytest.raises(UserError, match="is the training text"):
        read_corpus(corpus / "train", corpus / "train", "clm")
    with pytest.raises(UserError, match="does not exist"):
        read_corpus(corpus / "none", None, "clm")


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "less than two minutes"), (300, "5 minutes"), (7200, "2 hours"), (200_000, "2.3 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "text", "machine"),
    [("clm", LARGE, gpus(8, 80, 24, 0.3)), ("mlm", TEXT, Machine(2, 1.0, 1e10, 0.5, False, "given"))],
)
def test_the_planner_says_that_it_fits(objective: str, text: Corpus, machine: Machine) -> None:
    choice = choose("first", objective, text, machine)
    question = Question(gpus=machine.processes, gpu_memory=machine.memory, on_gpu=machine.on_gpu, search=False)
    found = estimate(with_vocabulary(choice), question)
    assert found.fits is True
    assert found.tokens == choice.draft.tokens
    assert found.training_flops == pytest.approx(choice.draft.flops, rel=0.02)
