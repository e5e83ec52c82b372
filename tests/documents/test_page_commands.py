"""The commands and programs of the pages that are marked ``<!-- run -->`` run, each page in its order, at tiny scale.

``tests/pages_case.py`` says what the marks are. Each page has a folder of its own, a copy of one in which the texts,
shards and runs are that the pages speak of.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from page_folder_case import change_for, write_inputs, write_rest
from page_server_case import programs
from pages_case import PAGES, REPOSITORY, Block, to_mark

SECONDS = 240
"""Until a command is killed."""


@dataclass(frozen=True)
class Workshop:
    """``folder``: what each page gets a copy of. ``environment``: of its commands."""

    folder: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    root = tmp_path_factory.mktemp("pages")
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HOME": str(root / "home"),
        "XDG_CACHE_HOME": str(root / "home"),
        "HF_HOME": str(root / "home"),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    (root / "home").mkdir()
    with programs(environment, scale="page_scale_case:scaled") as path:
        environment["PATH"] = os.pathsep.join([str(path), os.environ["PATH"]])
        folder = root / "folder"
        folder.mkdir()
        write_inputs(folder)
        write_rest(folder, environment)
        yield Workshop(folder, environment)


def to_run(page: str, text: str | None = None) -> list[tuple[Block, str, int]]:
    """Block, command of the shell and exit status of all that is marked ``<!-- run -->``, in order."""
    found = []
    for block in to_mark(page, text):
        if block.language == "python":
            commands = [(block.code, f"python <<'END OF BLOCK'\n{block.code}END OF BLOCK\n", 0)]
        else:
            commands = [(command.text, command.text, command.status) for command in block.commands()]
        for told, typed, status in commands:
            marker = block.marker(told)
            if marker is not None and marker.kind == "run":
                found.append((block, typed, status))
    return found


def run_page(page: str, folder: Path, environment: dict[str, str], text: str | None = None) -> list[str]:
    """What the commands say that ended otherwise than the page shows."""
    failures = []
    for block, command, status in to_run(page, text):
        began = time.monotonic()
        with (
            open(folder / "prompts.txt") as typed,
            subprocess.Popen(  # what is typed where a command asks
                ["bash", "-c", command],
                cwd=folder,
                env=environment,
                stdin=typed,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            ) as process,
        ):
            try:
                output = process.communicate(timeout=SECONDS)[0]
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output = f"killed after {SECONDS} s"
        print(f"{time.monotonic() - began:6.1f} s  {block.place}: {command[:100]}", flush=True)
        if process.returncode != status:
            told = f"status {process.returncode} and not {status}"
            failures.append(f"{block.place}: {command}\n{told}:\n{output[-3000:]}")
    return failures


RUN = [page for page in PAGES if to_run(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_the_page_run(page: str, workshop: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    shutil.copytree(workshop.folder, folder, symlinks=True)
    change_for(page, folder)
    failures = run_page(page, folder, workshop.environment)
    assert not failures, "\n\n".join(failures)


@pytest.mark.slow
def test_a_command_that_fails_is_told(workshop: Workshop, tmp_path: Path) -> None:
    text = "<!-- run -->\n\n    nystrom data verify shards    # not there\n    nystrom --version | grep -c nystrom\n\n"
    text += "<!-- run -->\n\n    $ nystrom data verify shards\n    nystrom data: error: shards has no manifest.json\n"
    (tmp_path / "prompts.txt").touch()
    failures = run_page("made-up.md", tmp_path, workshop.environment, text)
    assert [failure.splitlines()[:2] for failure in failures] == [
        ["made-up.md:3: nystrom data verify shards", "status 2 and not 0:"]
    ]


@pytest.mark.slow
def test_a_program_of_the_server_is_a_process_like_others(workshop: Workshop, tmp_path: Path) -> None:
    def bash(script: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=workshop.environment, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout

    shown = "import os, sys; print(os.getcwd(), os.environ['A'], sys.argv, sys.stdin.read()); sys.exit(3)"
    assert bash(f'echo in | A=b python -c "{shown}" x') == (3, f"{tmp_path} b ['-c', 'x'] in\n\n")
    asleep = "import time; print(1, flush=True); time.sleep(50)"
    # A signal reaches it, and its end is that of the program.
    assert bash(f'coproc python -c "{asleep}"; read <&${{COPROC[0]}}; kill $COPROC_PID; wait $COPROC_PID')[0] == 143
    started = "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'print(5)']).returncode)"
    assert bash(f'python -u -c "{started}"') == (0, "5\n0\n")
