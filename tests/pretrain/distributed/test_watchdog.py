"""A process that hangs, or never comes, ends the run by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import Ended, run_ranks, values
from training_case import metrics, settings, write_config

from data_pipeline.errors import run_cli
from pretrain.distributed.stall_diagnosis import Diagnosis, ProcessStatus, diagnose, format_ranks

STALL_SECONDS = 3.0
HANG_STEP = 3


def train(config: str) -> int:
    """Runs in the ranks: the command itself."""
    from pretrain.cli import main

    return run_cli(main, "nystrom train", ["--config", config])


def train_and_hang(config: str, how: str, who: int = 1, without_watchdog: bool = False) -> int:
    """Runs in the ranks: as :func:`train`, but process ``who`` hangs in step :data:`HANG_STEP`."""
    import os
    import signal

    from pretrain import trainer
    from pretrain.distributed import watchdog
    from pretrain.engine.training import TrainingEngine

    here = os.environ["RANK"] == str(who)
    backward = TrainingEngine.backward
    steps = {"begun": 0}

    class Loader(trainer.TrainLoader):
        def __iter__(self) -> Any:
            for number, batch in enumerate(super().__iter__(), 1):
                if number == HANG_STEP and here and how == "reading":
                    time.sleep(3600)
                steps["begun"] = number
                yield batch

    def hanging_backward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if here and steps["begun"] == HANG_STEP:
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "sleeping":
                time.sleep(3600)
        return backward(self, *args, **kwargs)

    if here and how == "absent":
        time.sleep(3600)
    trainer.TrainLoader = Loader  # type: ignore[misc]
    TrainingEngine.backward = hanging_backward  # type: ignore[method-assign]
    if without_watchdog:
        from datetime import timedelta

        from pretrain.distributed import world

        watchdog.Watchdog.start = lambda self, store: None  # type: ignore[method-assign]
        world.group_timeout = lambda stall_seconds: timedelta(seconds=stall_seconds)
    return train(config)


def hang(corpus: Path, runs: Path, how: str, world_size: int, zero_stage: int = 2, **more: Any) -> list[Ended]:
    """Run it; nobody may take longer than the time-out allows."""
    changes = {"checkpoint": {"every_tokens": 512}, "stall_seconds": STALL_SECONDS}
    config = write_config(runs / "run.yaml", settings(corpus, runs, zero_stage=zero_stage, **changes))
    began = time.monotonic()
    ended = run_ranks(train_and_hang, world_size, config=config, how=how, timeout=60, grace=3.0, **more)
    assert time.monotonic() - began < 40
    return ended


def status(runs: Path) -> dict[str, Any]:
    return json.loads((runs / "run" / "status.json").read_text())


@pytest.mark.parametrize(
    ("how", "zero_stage", "words"),
    [
        pytest.param("reading", 2, "has been reading data at step 3 for", marks=pytest.mark.slow),
        pytest.param("reading", 3, "has been reading data at step 3 for", marks=pytest.mark.slow),
        pytest.param("sleeping", 2, "has been training at step 3 for", marks=pytest.mark.slow),
        ("sleeping", 3, "has been training at step 3 for"),
    ],
)
def test_a_process_that_hangs_is_named(corpus: Path, tmp_path: Path, how: str, zero_stage: int, words: str) -> None:
    ended = hang(corpus, tmp_path, how, 2, zero_stage)
    assert [end.code for end in ended] == [77, 77]
    said = "".join(end.output for end in ended)
    assert said.count("stalled: ") == 1
    assert "stalled: process 1 (host " in said
    assert words in said
    assert "; process 0 waits for it" in said
    assert "process 1 stands here:\nthread MainThread:" in ended[1].output
    assert "time.sleep(3600)" in ended[1].output
    assert "went away" not in said
    assert (status(tmp_path)["state"], status(tmp_path)["code"]) == ("stalled", 77)


@pytest.mark.parametrize(
    ("zero_stage", "who"),
    [(2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(3, 1), (2, 0), (3, 0)])],
)
def test_a_process_that_was_stopped_is_named(corpus: Path, tmp_path: Path, zero_stage: int, who: int) -> None:
    """Process 0 holds the store: once it is stopped, the others cannot ask anybody."""
    ended = hang(corpus, tmp_path, "stopped", 2, zero_stage, who=who)
    assert (ended[1 - who].code, ended[who].code) == (77, -9)
    said = ended[1 - who].output
    assert said.count("stalled: ") == 1
    assert f"stalled: process {who} (host " in said
    assert "has not been heard of for" in said
    assert f"; process {1 - who} waits for it" in said
    assert "stands here" in said
    assert status(tmp_path)["state"] == "stalled"


@pytest.mark.slow
def test_among_three_one_speaks_and_all_end(corpus: Path, tmp_path: Path) -> None:
    curriculum = [{"until_tokens": 1536, "seq_len": 32, "micro_batch": 1}]
    changes = {"stall_seconds": STALL_SECONDS, "curriculum": curriculum, "batch_tokens": 192}
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=2, **changes))
    ended = run_ranks(train_and_hang, 3, config=config, how="reading", who=1, timeout=60, grace=3.0)
    assert [end.code for end in ended] == [77, 77, 77]
    said = "".join(end.output for end in ended)
    assert said.count("stalled: ") == 1
    assert "; processes 0, 2 wait for it" in said
    assert "went away" not in said


@pytest.mark.slow
def test_a_single_process_is_watched_too(corpus: Path, tmp_path: Path) -> None:
    (end,) = hang(corpus, tmp_path, "reading", 1, who=0)
    assert end.code == 77
    assert "has been reading data at step 3 for" in end.output
    assert "time.sleep(3600)" in end.output
    assert status(tmp_path)["state"] == "stalled"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "words"),
    [
        (1, ["process 1 of 2 did not come within 3 s; process 0 is there"]),
        (0, ["process 0 did not come: process 1 (host ", "found nobody at"]),
    ],
)
def test_a_process_that_never_comes_is_named(corpus: Path, tmp_path: Path, who: int, words: list[str]) -> None:
    ended = hang(corpus, tmp_path, "absent", 2, who=who)
    assert ended[who].code == -9
    assert ended[1 - who].value == 77
    for word in words:
        assert word in ended[1 - who].output
    assert len(ended[1 - who].output.splitlines()) == 1


def wait_for_nobody(config: str) -> int | None:
    """Runs in the ranks: the second never comes, and the first gets SIGTERM while it waits."""
    import os
    import signal
    import threading

    if os.environ["RANK"] == "1":
        return None
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    return train(config)


def test_sigterm_is_heard_while_waiting_for_the_others(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path))
    first, second = run_ranks(wait_for_nobody, 2, config=config, timeout=30)
    assert 75 in (first.code, first.value)  # at once, or by way of the command's own end
    assert (second.code, second.value) == (0, None)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_the_groups_time_out_where_the_watchdog_cannot_run(corpus: Path, tmp_path: Path, zero_stage: int) -> None:
    """DeepSpeed's groups have none of their own; a process that sleeps in a step hangs the others in one of those."""
    first, _ = hang(corpus, tmp_path, "sleeping", 2, zero_stage, without_watchdog=True)
    assert first.value == 77
    assert "did not answer in a collective operation" in first.output


def train_slowly(config: str) -> int:
    """Runs in the ranks: validation takes longer than ``stall_seconds`` in sum, each batch less."""
    from pretrain import validation

    evaluate = validation._evaluate

    def slow(*args: Any) -> Any:
        time.sleep(STALL_SECONDS / 5)
        return evaluate(*args)

    validation._evaluate = slow
    return train(config)


def test_a_long_validation_that_moves_is_no_stall(corpus: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data": {"valid": str(corpus / "valid")},
        "validation": {"tokens": 384, "samples": 0},
        "curriculum": [{"until_tokens": 1024, "seq_len": 32, "micro_batch": 2}],
        "stall_seconds": STALL_SECONDS,
    }
    config = write_config(tmp_path / "run.yaml", settings(corpus, tmp_path, zero_stage=2, **changes))
    assert values(run_ranks(train_slowly, 1, config=config)) == [0]  # one process: no collective operation counts
    (valid,) = metrics(tmp_path / "run", "valid")
    assert valid["took"] > STALL_SECONDS


def pause() -> bool:
    """Runs in a rank: a watchdog through a stop of the whole process that is longer than its patience."""
    import os
    import subprocess

    from pretrain.distributed import watchdog

    watch = watchdog.Watchdog(0, 1, 1.0)
    watch.start(None)
    pid = os.getpid()
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -STOP {pid}; sleep 2; kill -CONT {pid}"]).wait()
    time.sleep(0.4)
    watch.stop()
    return True


def test_a_job_that_was_suspended_is_no_stall() -> None:
    assert values(run_ranks(pause, 1)) == [True]


def lose_a_peer_in_a_stall() -> None:
    """Runs in a rank: the main thread is about to report the loss of a peer while the watchdog ends the process."""
    import os
    import threading

    from pretrain.distributed import watchdog

    watch = watchdog.Watchdog(0, 1, 60.0)
    watch._ending = True
    threading.Timer(0.5, lambda: os._exit(77)).start()
    watch.stop()


def test_who_ends_for_a_stall_does_not_report_the_loss_of_those_that_went_before() -> None:
    (end,) = run_ranks(lose_a_peer_in_a_stall, 1)
    assert end.code == 77


def hang_as_an_orphan() -> None:
    """Runs in a rank: the main thread hears nothing any more, and the launcher is gone."""
    from pretrain.distributed import watchdog
    from pretrain.distributed.signals import StopFlag

    class Orphan(StopFlag):
        def is_orphan(self) -> bool:
            return True

    watchdog.ORPHAN_SECONDS = 0.5
    watchdog.Watchdog(0, 1, 4.0, Orphan()).start(None)
    for _ in range(100):
        watchdog.at("training")  # it moves, so it is no stall
        time.sleep(0.1)


def test_an_orphan_that_does_not_end_by_itself_is_ended() -> None:
    (end,) = run_ranks(hang_as_an_orphan, 1, timeout=30)
    assert end.code == 77
    assert "process 0: its launcher is gone, and it could not save and end by itself" in end.output


def seen(rank: int, age: float = 10.0, **values: Any) -> ProcessStatus:
    return ProcessStatus(
        rank=rank, age=age, **{"place": "training", "step": 5, "collectives": 7, "host": "h", **values}
    )


def test_diagnose() -> None:
    def verdict(*processes: ProcessStatus) -> Diagnosis | None:
        return diagnose(processes, 0, 10.0)

    assert verdict(seen(0), seen(1, age=3.0)) is None  # somebody moves on
    behind = verdict(seen(0), seen(1), seen(2, collectives=6, place="reading data"), seen(3))
    words = "process 2 (host h, pid 0) has been reading data at step 5 for 10 s; processes 0-1, 3 wait for it"
    assert behind == Diagnosis(0, (2,), f"stalled: {words}")
    two = verdict(seen(0), seen(1, collectives=5), seen(2, collectives=6))
    assert two is not None
    assert two.culprits == (1, 2)
    assert two.message.endswith("; process 0 waits for them")
    silent = verdict(seen(0), seen(1, silence=6.0, since_beat=11.0), seen(2, age=1.0))  # even while another moves
    assert silent is not None
    assert silent.culprits == (1,)
    assert "process 1 (host h, pid 0) has not been heard of for 11 s: " in silent.message
    assert "(last seen training at step 5)" in silent.message
    # A clock that stood still accuses nobody who was not listened to as well.
    assert verdict(seen(0), seen(1, silence=1.0, since_beat=99.0), seen(2, age=1.0)) is None
    together = verdict(seen(0), seen(1))
    assert together is not None
    assert together.culprits == ()
    assert "none is behind the others" in together.message
    assert "processes 0-1 training at step 5" in together.message
    assert Diagnosis.from_json(two.to_json()) == two


def test_silence_counts_from_the_last_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process listens only when it has stood still for a while itself: what it hears then is older than that."""
    from pretrain.distributed import watchdog

    class Store:
        records: dict[str, str] = {}  # noqa: RUF012 - filled below

        def multi_get(self, keys: list[str]) -> list[str]:
            return [self.records[key] for key in keys]

        def check(self, keys: list[str]) -> bool:
            return False

    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog, "collectives_entered", lambda: 0)
    own, other = (watchdog.Watchdog(rank, 2, 40.0) for rank in (0, 1))  # a beat every 2 s
    store: Any = Store()
    now[0] += 5
    other._beat = own._beat = 3
    store.records = {"process/0": own.record(), "process/1": other.record()}
    now[0] += 18  # the other is stopped now; this one begins to listen when it has stood still for a while
    for _ in range(9):
        own._listen(store, [0, 1])
        now[0] += 2
    message = diagnose([watchdog.status_of(0, own.record()), own._seen[1]], 0, 40.0)
    assert message is not None
    assert "process 1 " in message.message
    assert "has not been heard of for 34 s" in message.message


def test_ranks_in_words() -> None:
    assert format_ranks([5, 0, 1, 3, 2]) == "0-3, 5"
    assert format_ranks([4]) == "4"


def test_saying_where_one_is_costs_next_to_nothing() -> None:
    from pretrain.distributed import watchdog

    began = time.perf_counter()
    for step in range(10_000):
        watchdog.at("training", step)
    assert (time.perf_counter() - began) / 10_000 < 20e-6  # 0.2 microseconds on an idle core


def test_nothing_is_left_behind() -> None:
    """After the tests above: no stopped process, nothing in shared memory."""
    stopped = [p.pid for p in psutil.Process().children(recursive=True) if p.status() == psutil.STATUS_STOPPED]
    assert stopped == []
    assert not list(Path("/dev/shm").glob("deepspeed_*"))
