"""Nobody outlives the process that started it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes_case import REPOSITORY, family, start_python, survivors, wait_until

# Says that it is there, and whether it heard SIGTERM.
CHILD = """
import os, signal, sys, time
if "hears" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: (open("heard", "w").close(), os._exit(0)))
open(f"ready{os.getpid()}", "w").close()
time.sleep(600)
"""
POPEN = "from data_pipeline.processes import child_command\nimport signal, subprocess, time\n"
STARTERS = {
    "command": POPEN + "subprocess.Popen(child_command('child')).wait()",
    "pool": "import time, child_of_pool\n"
    "from concurrent.futures import ProcessPoolExecutor\nfrom multiprocessing import get_context\n"
    "from data_pipeline.processes import die_with_parent\n"
    "pool = ProcessPoolExecutor(2, get_context('spawn'), initializer=die_with_parent)\n"
    "[pool.submit(child_of_pool.ready) for _ in range(2)]\ntime.sleep(600)",
    # A fork, and its fork.
    "forks": "import os, time\nfrom data_pipeline.processes import kill_forks_with_parent\nkill_forks_with_parent()\n"
    "os.fork() or os.fork()\nopen(f'ready{os.getpid()}', 'w').close()\ntime.sleep(600)",
    "another system": "import sys, time\nfrom data_pipeline.processes import die_with_parent\nimport os\n"
    "top = os.getpid()\nif os.fork() == 0:\n    sys.platform = 'darwin'\n    die_with_parent(top)\n"
    "    open(f'ready{os.getpid()}', 'w').close()\ntime.sleep(600)",
}
CHILDREN = {"command": 1, "pool": 2, "forks": 3, "another system": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "child_of_pool.py").write_text(
        "import os, time\ndef ready():\n    open(f'ready{os.getpid()}', 'w').close()\n    time.sleep(600)\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("how", "number"),
    [
        *(("command", number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
        *((how, signal.SIGKILL) for how in STARTERS),
    ],
)
def test_a_child_ends_with_its_parent(folder: Path, how: str, number: signal.Signals) -> None:
    top = start_python(STARTERS[how], folder)
    wait_until(lambda: len(list(folder.glob("ready*"))) == CHILDREN[how], top)
    children = family(top)
    assert len(children) >= CHILDREN[how] - (how == "forks")
    top.send_signal(number)
    top.wait(60)
    assert survivors(children) == []


def test_a_child_may_ask_for_another_signal(folder: Path) -> None:
    code = POPEN + "subprocess.Popen(child_command('child', 'hears', number=signal.SIGTERM)).wait()"
    top = start_python(code, folder)
    wait_until(lambda: list(folder.glob("ready*")), top)
    children = family(top)
    top.kill()
    top.wait(60)
    assert survivors(children) == []
    assert (folder / "heard").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread sees it half a second later")
def test_a_parent_that_is_gone_already_is_noticed(folder: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    words = [sys.executable, "-m", "data_pipeline.processes", str(gone.pid), str(int(signal.SIGKILL)), "child"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(words, cwd=folder, env=env, timeout=60, check=False).returncode == -signal.SIGKILL
    assert not list(folder.glob("ready*"))


def test_the_module_runs_as_if_started_by_itself(folder: Path) -> None:
    (folder / "says.py").write_text(
        "import sys, multiprocessing\n"
        "def double(x):\n    return 2 * x\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:  # finds what the main module defines\n"
        "        print(sys.argv[1:], pool.map(double, [4]))\n"
        "    sys.exit(75)\n"
    )
    code = POPEN + "import sys\nsys.exit(subprocess.call(child_command('says', '--a', 'b c')))"
    top = start_python(code, folder)
    assert top.communicate(timeout=60)[0] == "['--a', 'b c'] [8]\n"
    assert top.returncode == 75


def test_a_child_of_nobody_must_say_whose_it_is() -> None:
    from data_pipeline.processes import die_with_parent

    with pytest.raises(AssertionError, match="say whose"):
        die_with_parent()


def test_leaving_runs_exit_handlers_and_keeps_output_and_status() -> None:
    code = (
        "import atexit, threading, time, data_pipeline.processes as p\n"
        "atexit.register(print, 'handled')\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"  # which Python's own end would wait for
        "print('said', end=' ')\n"
        "p.immediate_exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (7, "said handled\n")


@pytest.mark.parametrize("name", ["ending_with_us", "end_with_parent", "forks_end_with_us", "leave"])
def test_old_names_are_found_with_a_warning(name: str) -> None:
    import data_pipeline.processes as module

    with pytest.warns(DeprecationWarning, match=f"{name} is now data_pipeline.processes"):
        assert callable(getattr(module, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing
