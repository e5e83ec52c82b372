"""precision: auto. What is measured, what it decides for all processes, and what a resume makes of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from ranks import REPOSITORY, run_ranks, values
from training_case import metrics, settings, write_config

from data_pipeline.errors import UserError, run_cli
from pretrain import precision
from pretrain.checkpoint import commit
from pretrain.checks import check_inputs
from pretrain.config import load_config, parse_config
from pretrain.distributed.world import World

CPU = torch.device("cpu")
FAST, SLOW = 2.0, 0.03


def speed(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    monkeypatch.setattr(precision, "bf16_speed", lambda: ratio)


def world(*others: float) -> World:
    """The first of several processes, whose CPUs multiply bf16 at these ratios beside this one's."""

    def gather(verdict: precision.Bf16Support) -> list[precision.Bf16Support]:
        return [verdict, *(precision.Bf16Support(ratio, "{whose} CPU is another one") for ratio in others)]

    return cast(World, SimpleNamespace(device=CPU, gather=gather))


def config(**changes: Any) -> Any:
    return parse_config(settings(Path("x"), Path("x"), **{"precision": "auto", "zero_stage": 2, **changes}))


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.01, "fp32"), (0.4, "fp32"), (1.0, "fp32"), (1.2, "bf16"), (8.0, "bf16")]
)
def test_the_faster_one_is_taken(monkeypatch: pytest.MonkeyPatch, ratio: float, expected: str) -> None:
    speed(monkeypatch, ratio)
    assert precision.fast_precision(CPU) == expected
    settled = precision.resolve_precision(config(), world())
    assert (settled.config.precision, settled.note) == (expected, None)
    assert settled.text.startswith(f"{expected} (auto: this CPU multiplies bf16 matrices at {ratio:.2g} ")
    assert precision.resolve_for_plan(config(), on_gpu=False).config.precision == expected
    assert precision.resolve_for_plan(config(), on_gpu=True).text == "bf16 (auto: a GPU is taken to have it)"


def test_a_gpu_that_only_emulates_bf16_gets_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    for real, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation, real=real: asked.append(including_emulation) or real,
        )
        assert precision.fast_precision(torch.device("cuda")) == expected
    assert asked == [False, False]
    assert precision.fast_precision(torch.device("meta")) == "fp32"


def test_bf16_must_be_faster_for_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    speed(monkeypatch, FAST)
    assert precision.resolve_precision(config(), world(FAST, FAST)).config.precision == "bf16"
    settled = precision.resolve_precision(config(), world(FAST, SLOW))
    assert (settled.config.precision, settled.text) == ("fp32", "fp32 (auto: process 2's CPU is another one)")
    speed(monkeypatch, 0.5)
    assert "this CPU multiplies bf16 matrices at 0.5 of its" in precision.resolve_precision(config(), world(SLOW)).text


def test_what_is_named_is_not_measured_but_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(precision, "bf16_speed", fail)
    for named in ("fp32", "fp16"):
        assert precision.resolve_precision(config(precision=named), world()).text == named
    settled = precision.resolve_precision(config(zero_stage=0), world())
    assert (settled.config.precision, settled.text) == ("fp32", "fp32 (auto: zero_stage 0 has no other)")
    for on_gpu in (True, False):
        assert precision.resolve_for_plan(config(zero_stage=0), on_gpu).config.precision == "fp32"
        assert precision.resolve_for_plan(config(precision="bf16"), on_gpu).text == "bf16"
    speed(monkeypatch, FAST)
    named = precision.resolve_precision(config(precision="bf16"), world())
    assert (named.config.precision, named.text, named.note) == ("bf16", "bf16", None)
    speed(monkeypatch, SLOW)
    named = precision.resolve_precision(config(precision="bf16"), world())
    assert (named.config.precision, named.text) == ("bf16", "bf16")
    assert named.note == (
        "precision bf16 was asked for, and this CPU multiplies bf16 matrices at 0.03 of its float32 speed: "
        "--set precision=fp32 is faster here"
    )


def test_a_run_keeps_what_it_began_in_and_says_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    for ratio, began, other in ((SLOW, "bf16", "fp32"), (FAST, "fp32", "bf16")):
        speed(monkeypatch, ratio)
        kept = precision.resolve_precision(config(), world(), began)
        assert (kept.config.precision, kept.text) == (began, f"{began} (auto: the run began in it)")
        assert kept.note is not None
        assert f"auto keeps {began}, in which the run began; here {other} would be faster (this CPU mult" in kept.note
        assert kept.note.endswith(f"--set precision={other} changes it")
        assert precision.resolve_precision(config(), world(), other).note is None
    assert precision.resolve_precision(config(), world(), "fp16").config.precision == "fp16"


def test_the_measurement_costs_little_and_leaves_no_trace() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    ratio = precision._measured.__wrapped__()
    assert ratio > 0
    assert (torch.get_num_threads(), torch.equal(torch.get_rng_state(), state)) == (threads, True)
    assert precision.bf16_speed() == precision.bf16_speed()  # once in a process


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the environment caps x86 instructions")
def test_a_cpu_whose_instructions_are_capped_by_the_environment_gets_fp32() -> None:
    program = "import torch; from pretrain.precision import *; print(fast_precision(torch.device('cpu')), bf16_speed())"
    capped = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **capped, "PYTHONPATH": str(REPOSITORY)}
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    found, ratio = out.split()
    assert (found, float(ratio) < precision.TOO_SLOW) == ("fp32", True)


def test_the_deepspeed_block_must_fit_whatever_it_comes_to(corpus: Path) -> None:
    sums = {"data_types": {"grad_accum_dtype": "bf16"}}
    raw = settings(corpus, corpus, zero_stage=2, precision="auto", deepspeed=sums)
    with pytest.raises(
        UserError, match=r"'bf16'; with precision fp32 .* \(precision is auto, which may come to fp32; "
    ):
        check_inputs(parse_config(raw), 1)
    assert check_inputs(parse_config({**raw, "precision": "bf16"}), 1).config.precision == "bf16"
    assert check_inputs(parse_config({**raw, "deepspeed": {}}), 1).config.precision == "auto"


def test_the_plan_says_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.planning import cli

    speed(monkeypatch, SLOW)
    raw = settings(tmp_path, tmp_path, precision="auto", zero_stage=2, model={"vocab_size": 100})
    words = ["--config", write_config(tmp_path / "run.yaml", raw)]
    assert cli.main(words) == 0
    assert "1 of them, bf16 (auto: a GPU is taken to have it), ZeRO stage 2" in capsys.readouterr().out
    assert cli.main([*words, "--cpu"]) == 0
    assert "fp32 (auto: this CPU multiplies bf16 matrices at 0.03 of its float32 speed), " in capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "bf16"


def train(config: str, speeds: list[float], words: list[str], stop_after: int | None) -> tuple[int, Any]:
    """Runs in the ranks, whose CPUs multiply bf16 at these ratios: the command itself, asked to stop after some steps.

    Returns its status and the master weights as they were loaded, None at a start from nothing.
    """
    import signal

    from pretrain import precision
    from pretrain.cli import main
    from pretrain.engine.state import fragments
    from pretrain.engine.training import TrainingEngine

    rank = int(os.environ["RANK"])
    precision.bf16_speed = lambda: speeds[rank]
    take_step, load = TrainingEngine.step, TrainingEngine.load
    seen: dict[str, Any] = {"steps": 0, "loaded": None}

    def counting_step(self: Any, lr: float) -> Any:
        seen["steps"] += 1
        if seen["steps"] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, lr)

    def looking_load(self: Any, folder: Path, tag: str) -> bool:
        anew = load(self, folder, tag)
        seen["loaded"] = {
            name: fragments.get_full(self._engine, p, fragments.MASTER).numpy().tobytes()
            for name, p in self.model.named_parameters()
        }
        return anew

    TrainingEngine.step, TrainingEngine.load = counting_step, looking_load  # type: ignore[method-assign]
    return run_cli(main, "nystrom train", ["--config", config, *words]), seen["loaded"]


def masters(folder: str) -> dict[str, bytes]:
    """Runs in a rank: the master weights of a checkpoint."""
    from pretrain.checkpoint.load import consolidate

    return {name: value.numpy().tobytes() for name, value in consolidate(Path(folder)).items()}


def test_processes_agree_a_resume_keeps_and_a_change_is_asked_for(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, precision="auto", zero_stage=2))

    def start(speeds: list[float], *words: str, stop_after: int | None = 2) -> tuple[str, Any]:
        ended = run_ranks(train, 2, config=path, speeds=speeds, words=list(words), stop_after=stop_after)
        status = 75 if stop_after else 0
        found = values(ended)
        assert [code for code, _ in found] == [status, status], ended[0].output + ended[1].output
        assert "this CPU" not in ended[1].output
        return ended[0].output, found[0][1]

    def stands_in() -> str:
        """The precision, which must be the same wherever it is written."""
        newest = commit.newest(run / "checkpoints")
        assert newest is not None
        (found,) = {
            load_config(run / "config.yaml").precision,
            newest[1].identity["config"]["precision"],
            "bf16" if "bf16" in json.loads((run / "deepspeed.json").read_text()) else "fp32",
        }
        return found

    out, _ = start([FAST, SLOW])
    assert "On 2 CPU process(es), fp32 (auto: process 1's CPU multiplies bf16 matrices at 0.03 of its float32 " in out
    assert stands_in() == "fp32"
    out, _ = start([FAST, FAST])
    assert "fp32 (auto: the run began in it), ZeRO stage 2" in out
    assert out.count("precision auto keeps fp32, in which the run began; here bf16 would be faster (this CPU ") == 1
    assert "changed since" not in out
    assert stands_in() == "fp32"

    before = values(run_ranks(masters, 1, folder=str(run / "checkpoints" / "step000000004")))[0]
    out, loaded = start([SLOW, SLOW], "--set", "precision=bf16")
    assert loaded == before
    assert "changed since: precision from fp32 to bf16" in out
    assert "cut anew for these processes, ZeRO stage and precision" in out
    assert out.count("at 0.03 of its float32 speed") == 1  # once, and by the first process
    assert "precision bf16 was asked for, and this CPU" in out
    assert stands_in() == "bf16"

    before = values(run_ranks(masters, 1, folder=str(run / "checkpoints" / "step000000006")))[0]
    out, loaded = start([SLOW, SLOW], "--set", "precision=fp32", "zero_stage=3", stop_after=None)
    assert loaded == before
    assert "changed since: precision from bf16 to fp32" in out
    assert stands_in() == "fp32"
    assert [row["step"] for row in metrics(run)] == list(range(1, 9))
    changes = [row.get("changed", {}).get("precision") for row in metrics(run, "event") if row["event"] == "resume"]
    assert changes == [None, ["fp32", "bf16"], ["bf16", "fp32"]]


def test_a_configuration_without_the_key_resumes_a_run_in_bf16(corpus: Path, tmp_path: Path) -> None:
    """As runs from before there was ``auto`` are: bf16 in the checkpoints, nothing in the YAML."""
    raw = settings(corpus, tmp_path, zero_stage=1, precision="bf16")
    path = write_config(tmp_path / "run.yaml", raw)
    case: dict[str, Any] = {"config": path, "speeds": [SLOW], "words": []}
    assert values(run_ranks(train, 1, stop_after=2, **case))[0][0] == 75
    del raw["precision"]
    write_config(tmp_path / "run.yaml", raw)
    (ended,) = run_ranks(train, 1, stop_after=None, **case)
    assert values([ended])[0][0] == 0, ended.output
    assert "bf16 (auto: the run began in it)" in ended.output
    assert "precision auto keeps bf16, in which the run began; here fp32 would be faster" in ended.output
    assert "cut anew" not in ended.output  # DeepSpeed's own load, to the bit
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"] == "bf16"
