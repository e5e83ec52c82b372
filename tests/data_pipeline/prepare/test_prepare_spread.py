"""Processes, parts of a job array, standard input, a Ray cluster: the bytes of one process on one machine."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from prepare_case import TEXTS, contents, crash_after, plan

from data_pipeline.errors import UserError
from data_pipeline.prepare.folder import JobPart
from data_pipeline.prepare.plan import Settings, plan_stdin
from data_pipeline.prepare.run import PrepareOptions, prepare
from data_pipeline.quality.duplicates import Dedup
from data_pipeline.tokenization.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("small_units")


def test_any_number_of_processes_gives_the_same_bytes(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(plan(inputs, small_tokenizer), tmp_path / "one")
    seen: list[int] = []
    outcome = prepare(plan(inputs, small_tokenizer), tmp_path / "three", PrepareOptions(workers=3), on_text=seen.append)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert outcome.documents == len(TEXTS)
    assert sum(seen) == sum(len(text.encode()) for text in TEXTS)


def test_what_one_process_began_several_can_end(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    crash_after(2, plan(inputs, small_tokenizer), tmp_path / "out")
    assert prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(workers=2)).units_reused == 2
    prepare(plan(inputs, small_tokenizer), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_error_in_a_process_is_the_same_error(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (inputs / "4.jsonl").write_text((inputs / "4.jsonl").read_text() + "{broken\n")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"4\.jsonl, line 41: not a JSON record"):
            prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(workers=workers))


def test_a_killed_worker_is_said_and_the_next_run_goes_on(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def kill() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            children = [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]
            if children:
                children[0].send_signal(signal.SIGKILL)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match="a worker process was killed from outside"):
        prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(workers=2))
    killer.join()
    prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(workers=2))
    prepare(plan(inputs, small_tokenizer), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("dedup", [None, "exact"])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_parts_of_an_array_give_the_same_bytes(
    count: int, dedup: str | None, inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    settings = {"dedup": Dedup.parse(dedup)} if dedup else {}
    prepare(plan(inputs, small_tokenizer, **settings), tmp_path / "whole")
    out = tmp_path / "parts"
    for _ in range(2 if dedup else 1):
        for index in reversed(range(count)):
            outcome = prepare(
                plan(inputs, small_tokenizer, **settings), out, PrepareOptions(part=JobPart(index, count))
            )
            assert outcome.shards is None
    last = prepare(plan(inputs, small_tokenizer, **settings), out)
    assert last.units_reused == last.units  # nothing was left to do but the manifest
    assert contents(out) == contents(tmp_path / "whole")
    assert prepare(
        plan(inputs, small_tokenizer, **settings), out, PrepareOptions(part=JobPart(0, count))
    ).already_complete


def test_the_last_command_does_what_a_lost_part_left(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(part=JobPart(1, 2)))
    last = prepare(plan(inputs, small_tokenizer), tmp_path / "out")
    assert 0 < last.units_reused < last.units
    prepare(plan(inputs, small_tokenizer), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_part_alone_only_signs_when_duplicates_are_sought(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    preparation = plan(inputs, small_tokenizer, dedup=Dedup.parse("exact"))
    outcome = prepare(preparation, tmp_path / "out", PrepareOptions(part=JobPart(0, 2)))
    assert outcome.signed_only
    assert not list((tmp_path / "out").glob("*.bin"))


def test_parts_share_the_folder_but_not_a_part(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tried = []

    def others(size: int) -> None:
        if not tried:
            tried.append(1)
            prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(part=JobPart(1, 2)))
            with pytest.raises(UserError, match="another process is preparing part 0"):
                prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(part=JobPart(0, 2)))
            with pytest.raises(UserError, match="another process is preparing"):
                prepare(plan(inputs, small_tokenizer), tmp_path / "out")

    prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(part=JobPart(0, 2)), on_text=others)
    assert tried


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_impossible_parts_are_refused(index: int, count: int) -> None:
    with pytest.raises(UserError, match="the index runs from 0 to one less"):
        JobPart(index, count)


def test_a_part_of_another_plan_or_with_overwrite_is_refused(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(part=JobPart(0, 2)))
    with pytest.raises(UserError, match="an unfinished run with other inputs"):
        prepare(plan(inputs, small_tokenizer, shard_tokens=501), tmp_path / "out", PrepareOptions(part=JobPart(1, 2)))
    with pytest.raises(UserError, match="--overwrite and --shard-index"):
        prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(part=JobPart(1, 2), overwrite=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_standard_input_is_read_in_units_and_resumed(
    workers: int, small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.prepare.plan.STDIN_UNIT_BYTES", 3000)
    monkeypatch.setattr("data_pipeline.prepare.complete.STDIN_UNIT_BYTES", 3000)
    text = "".join(text + "\n" for text in TEXTS).encode()

    def again(folder: Path, stream: bytes = text) -> object:
        how = PrepareOptions(workers=workers)
        return prepare(plan_stdin("lines", small_tokenizer), folder, how, stream=io.BytesIO(stream))

    outcome = prepare(plan_stdin("lines", small_tokenizer), tmp_path / "whole", stream=io.BytesIO(text))
    assert outcome.shards is not None
    assert [outcome.shards.tokenizer().decode(ids) for ids in outcome.shards.documents()] == TEXTS
    assert len(outcome.shards.manifest.shards) > 3
    assert [entry.bytes for entry in outcome.shards.manifest.inputs] == [len(text)]

    class Torn(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > len(text) // 2:
                raise KeyboardInterrupt
            return super().read(min(size or -1, 1000) if size and size > 0 else 1000)

        read1 = read

    with pytest.raises(KeyboardInterrupt):
        prepare(
            plan_stdin("lines", small_tokenizer), tmp_path / "out", PrepareOptions(workers=workers), stream=Torn(text)
        )
    again(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert again(tmp_path / "out").already_complete  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"shards of another <stdin>"):
        again(tmp_path / "out", text.replace(b"document 130", b"document 13x"))


def test_lines_of_standard_input_are_counted_from_its_beginning(
    small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.prepare.plan.STDIN_UNIT_BYTES", 3000)
    lines = [b'{"text": "fine enough"}\n'] * 500
    lines[430] = b"{broken\n"
    how = PrepareOptions(max_bad_fraction=0.5)
    outcome = prepare(plan_stdin("jsonl", small_tokenizer), tmp_path / "out", how, stream=io.BytesIO(b"".join(lines)))
    assert outcome.shards is not None
    assert outcome.shards.manifest.bad_records == {"not JSON": 1}
    assert '"record": 431' in (tmp_path / "out" / "bad_records.jsonl").read_text()


def test_standard_input_cannot_be_read_twice_or_shared(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    settings, part = Settings(dedup=Dedup.parse("exact")), PrepareOptions(part=JobPart(0, 2))
    with pytest.raises(UserError, match="standard input is read once"):
        prepare(plan_stdin("lines", small_tokenizer, settings), tmp_path / "out", stream=io.BytesIO(b"x\n"))
    with pytest.raises(UserError, match="standard input is read once"):
        prepare(plan_stdin("lines", small_tokenizer), tmp_path / "out", part, stream=io.BytesIO(b"x\n"))


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node_gives_the_same_bytes(
    inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    )
    for _ in range(3):  # 18 copies: enough units for the node to die among them
        for path in list(inputs.iterdir()):
            path.with_name("x" + path.name).write_bytes(path.read_bytes())
    prepare(plan(inputs, small_tokenizer), tmp_path / "whole")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    lost = []
    try:
        node = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()

        def lose_a_node(size: int) -> None:
            if not lost:
                cluster.remove_node(node, allow_graceful=False)
                lost.append(1)

        outcome = prepare(
            plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(ray=cluster.address), on_text=lose_a_node
        )
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()
    assert lost
    assert outcome.units_reused < outcome.units
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_no_ray_cluster_is_said(inputs: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        prepare(plan(inputs, small_tokenizer), tmp_path / "out", PrepareOptions(ray="127.0.0.1:1"))
