"""A task in one file that nothing else names, met by all that lists, runs, compares and draws tasks."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_case import Page

import eval.tasks
from data_pipeline.errors import UserError
from data_pipeline.registry import RegistrationError
from eval import cli
from eval.report.page import render
from eval.report.runs import read_runs
from eval.results.schema import Outcome, read_result
from eval.suites.load import load_suites
from eval.task import TASKS, ModuleTask, Settings, Task, described, register, task_of, tasks

TOY = Path(__file__).parents[1] / "toy_task.py"
SMALL = ["--windows", "6", "--length", "32"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds the toy task's file and no other."""
    place = tmp_path / "tasks"
    place.mkdir()
    shutil.copy(TOY, place / "guesses.py")
    return place


@pytest.fixture
def known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy task's file as if it lay in eval/tasks/."""
    with TASKS.registered():
        monkeypatch.setattr(eval.tasks, "__path__", [*eval.tasks.__path__, str(folder)])
        importlib.import_module("eval.tasks.guesses")
        yield
    del sys.modules["eval.tasks.guesses"]


def test_it_is_found_in_the_folder_without_importing_torch(folder: Path) -> None:
    program = (
        "import sys, eval.tasks; eval.tasks.__path__.append(sys.argv[1])\n"
        "from eval.cli import main; main(['list']); assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, cwd=TOY.parents[2]
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("guesses ")]
    assert "how often the right next token" in line


def test_it_is_listed_and_its_settings_are_options(known: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tasks())[-1] == "guesses"
    assert cli.main(["list", "guesses"]) == 0
    assert "likeliest tokens among which the right one is looked for" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["guesses", "--help"])
    assert "--guesses N" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no suite 'gueses': did you mean 'guesses'\?"):
        load_suites(["gueses"])
    with pytest.raises(UserError, match="guesses: Input should be greater than or equal to 1"):
        load_suites(["guesses"], overrides=[(None, "guesses", 0)])


def test_it_is_run_kept_compared_and_drawn(
    known: None, causal: Path, masked: Path, export: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    other = export("guesses-other", objective="clm", attention="softmax")
    own = tmp_path / "own"
    own.mkdir()
    (own / "many.yaml").write_text("task: guesses\nsettings: {guesses: 100}\n")
    for name, checkpoint in (("a", causal), ("b", other)):
        at = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / name), "--suite-path", str(own), *SMALL]
        assert cli.main(["guesses", "many", *at]) == 0
        result = read_result(tmp_path / name / "guesses.json")
        assert (result.task, result.version, result.gate, result.records["count"]) == ("guesses", 1, "passed", 6)
        assert result.settings == {"guesses": 5, "windows": 6, "length": 32}
        few, many = (read_result(tmp_path / name / f"{suite}.json").metrics for suite in ("guesses", "many"))
        assert 0 < few["hit_rate"].value < many["hit_rate"].value < 1
        capsys.readouterr()
        assert cli.main(["guesses", *at]) == 0
        assert "guesses: already there" in capsys.readouterr().out
    with pytest.raises(UserError, match="guesses is for causal models"):
        cli.main(["guesses", "--checkpoint", str(masked), "--out", str(tmp_path / "c")])

    compared = tmp_path / "compared.json"
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(compared)]) == 0
    suites = {suite["suite"]: suite for suite in json.loads(compared.read_text())["suites"]}
    assert suites["guesses"]["metrics"][0]["n"] == 6
    assert cli.main(["compare", str(tmp_path / "a" / "guesses.json"), str(tmp_path / "b" / "many.json")]) == 1
    assert "other settings: guesses 5 and 100" in capsys.readouterr().out

    page = Page(render(read_runs([str(tmp_path / "a"), str(tmp_path / "b")])))
    assert "Guesses" in page.headings
    assert "How often the right next token is among the likeliest ones." in page.words
    assert "Next token among the likeliest" in page.words


def test_what_is_registered_in_a_trial_is_forgotten() -> None:
    before = list(tasks())
    with TASKS.registered():
        register(_task("empty"))
        assert list(tasks()) == [*before, "empty"]
    assert list(tasks()) == before
    assert described("empty").heading == ""  # results of it are still drawn
    assert not described("empty").any_objective


@pytest.mark.parametrize("part", ["summary", "settings", "version", "data", "run"])
def test_a_task_that_lacks_a_part_is_refused_by_name(part: str) -> None:
    with TASKS.registered(), pytest.raises(RegistrationError, match=rf"task 'half' .* lacks {part}"):
        register(_task("half", part))
    assert "half" not in tasks()


def test_a_task_without_its_module_or_a_part_of_that_is_refused_by_name() -> None:
    class Half(ModuleTask):
        name = "half"
        summary = "lacks what computes"
        settings = Settings

    with TASKS.registered():
        with pytest.raises(RegistrationError, match=r"task 'half' .* lacks module"):
            register(Half)
        Half.module = "eval.team"
        register(Half)
        with pytest.raises(
            RegistrationError, match=r"task 'half': module eval\.team lacks VERSION, resolve, data, run"
        ):
            task_of("half").run(None, None, None)  # type: ignore[arg-type]


def test_a_name_is_taken_once() -> None:
    with TASKS.registered(), pytest.raises(RegistrationError, match="'lm'"):
        register(_task("lm"))


def test_every_task_has_all_its_parts() -> None:
    for task in tasks().values():
        assert task.version >= 1
        assert task.heading or task.is_gate
    assert [task.name for task in tasks().values() if task.is_gate] == ["validity"]


def test_the_old_names_warn() -> None:
    from eval.suites import settings as old_settings
    from eval.suites import tasks as old_tasks

    with pytest.warns(DeprecationWarning, match=r"eval\.task"):
        assert tasks() == old_tasks.TASKS
    with pytest.warns(DeprecationWarning, match=r"eval\.task\.Task"):
        assert old_tasks.Task is Task
    with pytest.warns(DeprecationWarning, match=r"eval\.task\.Settings"):
        assert old_settings.Settings is Settings


def _task(name: str, without: str = "") -> Any:
    parts: dict[str, Any] = {
        "name": name,
        "summary": "nothing",
        "settings": Settings,
        "version": 1,
        "data": lambda self, subject, settings: {"hash": ""},
        "run": lambda self, subject, settings, parts: Outcome({}),
    }
    return type("Half", (Task,), {key: part for key, part in parts.items() if key != without})
