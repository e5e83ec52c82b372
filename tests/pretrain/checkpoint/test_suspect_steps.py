"""A streak of bad steps does not cost the checkpoints from before it, and the next start begins with one of those."""

from __future__ import annotations

from pathlib import Path

from ranks import run_ranks, values
from striking_case import steps
from test_run import train_until
from training_case import events, metrics, settings, write_config


def start(config: str, step: int) -> int:
    """Runs in the rank: stops after ``step`` steps of this start."""
    return train_until(config, step, "step")


def test_a_rate_that_was_mended_trains_on_from_before_the_streak(corpus: Path, tmp_path: Path) -> None:
    def config(**optimizer: float) -> str:
        keep = {"every_tokens": 256, "keep_last": 1}
        changes = {"checkpoint": keep, "optimizer": optimizer, "max_bad_steps": 3}
        return write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, **changes))

    run = tmp_path / "run"
    assert values(run_ranks(start, 1, config=config(), step=2)) == [75]
    assert steps(run)[-1] == 2
    (ended,) = run_ranks(start, 1, config=config(lr=1e30), step=99)
    assert ended.value == 76
    # Step 3 was applied: its checkpoint holds weights of 1e29 and looked well, since no step after it had told.
    assert events(run).count("bad_step") == 3
    sound = 2
    assert steps(run) == [sound]
    assert f"resumes from {run / 'checkpoints' / 'step000000002'}, from before these steps" in ended.output
    assert sorted(path.name for path in (run / "checkpoints").glob("suspect-*"))[0] == "suspect-step000000003"
    (ended,) = run_ranks(start, 1, config=config(), step=99)
    assert ended.value == 0
    assert "step000000002: step 2, 512 tokens" in ended.output
    assert [row["step"] for row in metrics(run)] == list(range(1, 9))
    assert steps(run) == [8]


def test_inside_a_streak_the_same_command_resumes_and_another_rate_goes_back(corpus: Path, tmp_path: Path) -> None:
    def config(**optimizer: float) -> str:
        changes = {"checkpoint": {"every_tokens": 256}, "optimizer": optimizer, "max_bad_steps": 5}
        return write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, **changes))

    run = tmp_path / "run"
    assert values(run_ranks(start, 1, config=config(), step=2)) == [75]
    assert values(run_ranks(start, 1, config=config(lr=1e30), step=3)) == [75]  # two of its three steps are bad
    (ended,) = run_ranks(start, 1, config=config(lr=1e30), step=1)
    assert "step000000005: step 5" in ended.output
    assert metrics(run, "event")[-1]["step"] == 6
    (ended,) = run_ranks(start, 1, config=config(), step=99)
    assert ended.value == 0
    assert "step000000006 is not used: it is from a streak of suspect steps" in ended.output
    assert "step000000002: step 2, 512 tokens" in ended.output
