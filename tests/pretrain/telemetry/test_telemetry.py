"""metrics.jsonl through interruptions, and the numbers derived for it."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import RunConfig, TelemetryConfig
from pretrain.machine import peak_flops
from pretrain.telemetry.reports import model_flops_utilization
from pretrain.telemetry.telemetry import Telemetry, truncate_metrics


def config(wandb: str = "disabled") -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "x",
            "model": {"vocab_size": 100},
            "data": {"train": "x"},
            "curriculum": [{"until_tokens": 1000, "seq_len": 16, "micro_batch": 4}],
            "batch_tokens": 64,
            "telemetry": {"wandb": wandb},
        }
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_json_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, config(), 1000, 0, active=True)
    telemetry.write("train", step=1, loss=1.5, grad_norm=math.inf, perplexity=math.nan)
    telemetry.close()
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["time"] > 0
    assert {key: line[key] for key in line if key != "time"} == {
        "kind": "train", "step": 1, "loss": 1.5, "grad_norm": None, "perplexity": None,
    }  # fmt: skip


def test_the_others_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = Telemetry(tmp_path, config(), 1000, 0, active=False)
    telemetry.write("train", step=1)
    telemetry.say("hello")
    telemetry.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_truncation_cuts_what_will_come_again_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "train", "step": step} for step in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    assert truncate_metrics(path, 3) == 3
    assert [row["step"] for row in lines(path)] == [0, 1, 2, 3]
    assert truncate_metrics(path, 3) == 0
    assert truncate_metrics(tmp_path / "none.jsonl", 3) == 0


def test_a_tracker_that_is_missing_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def fail(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "wandb":
            raise ImportError("no wandb here")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    telemetry = Telemetry(tmp_path, config("offline"), 1000, 0, active=True)
    telemetry.write("train", step=1, loss=2.0)
    telemetry.close()
    assert "wandb is left out: ImportError: no wandb here" in capsys.readouterr().out
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.slow
def test_wandb_offline_writes_below_the_run(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, config("offline"), 1000, 0, active=True)
    telemetry.write("train", step=1, loss=2.0)
    telemetry.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_mfu() -> None:
    assert model_flops_utilization(1000.0, 2e6, devices=2, peak=1e12) == pytest.approx(1000 * 3 * 2e6 / 2e12)
    assert model_flops_utilization(1000.0, 2e6, devices=2, peak=None) is None


def test_peak_flops_by_device_name() -> None:
    default = TelemetryConfig()
    assert peak_flops(default, "NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops(default, "NVIDIA H100 PCIe") == 756e12
    assert peak_flops(default, "NVIDIA L40S") == 362e12
    assert peak_flops(default, "Unheard-of 9000") is None
    assert peak_flops(default, None) is None
    assert peak_flops(TelemetryConfig(peak_flops=1.0), "NVIDIA H100") == 1.0
