"""Suites from YAML: names, groups, the user's own, overrides; options made from settings; every fault named."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UserError, run_cli
from eval import cli
from eval.results.schema import read_result
from eval.suites.load import BUILT_IN, available, load_suites, parse
from eval.suites.options import PREFIX, _without_none, add_options, overrides_of
from eval.task import tasks


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of suites: one of its own, one under the name of a task, a group of both and a task."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "short.yaml").write_text("task: lm\ndescription: short windows\nsettings: {length: 16, max_tokens: 64}\n")
    (folder / "generate.yaml").write_text("task: generate\nsettings: {temperature: 0}\n")
    (folder / "all.yaml").write_text("suites: [short, generate, validity, short]\n")
    return folder


def test_every_suite_of_the_project_is_whole() -> None:
    files = available()
    for path in files:
        members = load_suites([path.stem])
        assert members, path
        assert all(suite.task.name in tasks() for suite in members)
        described = "description:" in path.read_text()
        assert described, f"{path} says in no description what it measures"
    assert {path.parent for path in files} <= {BUILT_IN}


@pytest.mark.parametrize("task", tasks().values(), ids=list(tasks()))
def test_tasks_hold_to_their_contract(task: Any) -> None:
    module = task.load()
    assert module.VERSION >= 1
    assert all(callable(getattr(module, name)) for name in ("resolve", "data", "run"))
    for name, field in task.settings.model_fields.items():
        assert field.description, f"{task.name}.{name} has no description"
        assert not field.is_required(), f"{task.name}.{name} has no default, so the task cannot be named alone"


@pytest.mark.parametrize(
    "task",
    [task for task in tasks().values() if "seed" in task.settings.model_fields],
    ids=lambda task: task.name,
)
def test_negative_seeds_are_refused(task: Any) -> None:
    """The libraries take none, and say so in their own words after the model is loaded."""
    assert parse(task, {"seed": 0}, "here")
    with pytest.raises(UserError, match="here: seed: Input should be greater than or equal to 0, got -1"):
        parse(task, {"seed": -1}, "here")


def test_settings_of_one_name_are_of_one_kind_in_all_tasks() -> None:
    """An option of the command line is for all tasks that have it."""
    kinds: dict[str, Any] = {}
    for task in tasks().values():
        for name, field in task.settings.model_fields.items():
            kind = _without_none(field.annotation)
            assert kinds.setdefault(name, kind) == kind, f"{task.name}.{name}"


def test_names_groups_and_own_suites(own: Path) -> None:
    suites = load_suites(["all"], [own])
    assert [suite.name for suite in suites] == ["short", "generate", "validity"]
    short, generate, validity = suites
    assert (short.task.name, short.settings.length, short.settings.max_tokens) == ("lm", 16, 64)  # type: ignore[attr-defined]
    assert generate.settings.temperature == 0  # type: ignore[attr-defined]  # the user's own goes before the task
    assert validity.origin == ""
    assert load_suites([str(own / "short.yaml")])[0].settings == short.settings
    again = load_suites(["all", "short", str(own / "short.yaml"), str(own / "." / "all.yaml"), "validity"], [own])
    assert [suite.name for suite in again] == ["short", "generate", "validity"]  # the same by any path: once
    assert load_suites(["lm"])[0].settings == tasks()["lm"].settings()


def test_overrides_reach_the_suites_that_have_the_setting(own: Path) -> None:
    suites = load_suites(["all"], [own], [(None, "seed", 5), ("short", "length", 32)])
    assert [getattr(suite.settings, "seed", None) for suite in suites] == [5, 5, 5]
    assert suites[0].settings.length == 32  # type: ignore[attr-defined]


def test_a_setting_of_several_files_takes_one() -> None:
    (suite,) = load_suites(["lm"], overrides=[(None, "text", "books/*.txt")])
    assert suite.settings.model_dump()["text"] == ("books/*.txt",)


def test_options_come_from_the_settings() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", nargs="+", action="extend")
    add_options(parser)
    line = "--max-tokens 100 --temperature 0.5 --prompt a b --prompt c --precision fp32 --set lm.seed=3"
    found = overrides_of(parser.parse_args(line.split()))
    assert (None, "max_tokens", 100) in found
    assert (None, "temperature", 0.5) in found
    assert (None, "prompt", ["a", "b", "c"]) in found
    assert (None, "precision", "fp32") in found
    assert ("lm", "seed", 3) in found
    assert len(found) == 5  # what was not given is nobody's override
    names = {action.dest.removeprefix(PREFIX) for action in parser._actions if action.dest.startswith(PREFIX)}
    # --device is the command's own.
    assert names == {name for task in tasks().values() for name in task.settings.model_fields} - {"device"}


@pytest.mark.parametrize(
    ("files", "names", "message"),
    [
        ({}, ["generat"], "did you mean 'generate'"),
        ({}, ["nothing.yaml"], "nothing.yaml does not exist"),
        (
            {"a": "task: lm\nsettings: {lenght: 4}"},
            ["a"],
            "unknown setting 'lenght' of task lm: did you mean 'length'?",
        ),
        ({"a": "task: lm\nsettings: {length: one}"}, ["a"], "length: Input should be a valid integer"),
        ({"a": "task: perplexity"}, ["a"], "no task 'perplexity'; there are validity, lm, context,"),
        ({"a": "task: clasify"}, ["a"], "no task 'clasify'; did you mean 'classify'?"),
        ({"a": "description: nothing"}, ["a"], "either a task (with settings) or a list of suites"),
        ({"a": "task: lm\nsuites: [lm]"}, ["a"], "either a task (with settings) or a list of suites"),
        ({"a": "task: [lm"}, ["a"], "cannot be read"),
        ({"a": "task: lm\nsetting: {}"}, ["a"], "unknown key 'setting': did you mean 'settings'?"),
        ({"a": "suites: [b]", "b": "suites: [a]"}, ["a"], "contains itself: a -> b -> a"),
        ({"a": "suites: [a.yaml]"}, ["a.yaml"], "contains itself: a.yaml -> a.yaml"),
        ({"a": "suites: [./b.yaml]", "b": "suites: [a]"}, ["a"], "contains itself: a -> ./b.yaml -> a"),
        ({"a": "suites: [lm]\nsettings: {length: 32}"}, ["a"], "a list of suites takes no settings (length)"),
        (
            {"x/reviews": "task: lm", "y/reviews": "task: lm"},
            ["x/reviews.yaml", "y/reviews.yaml"],
            "two suites are called reviews: x/reviews.yaml and y/reviews.yaml",
        ),
        (
            {"x/lm": "task: lm\nsettings: {length: 32}"},
            ["lm", "x/lm.yaml"],
            "two suites are called lm: the task lm with its defaults and x/lm.yaml",
        ),
        ({"a": "suites: [x/lm.yaml, lm]", "x/lm": "task: lm"}, ["a"], "two suites are called lm"),
    ],
)
def test_faults_are_named(
    tmp_path: Path, files: dict[str, str], names: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        load_suites(names, [tmp_path])


def test_overrides_without_effect_are_faults(own: Path) -> None:
    for override, message in [
        ((None, "colour", 1), "none of the suites has such a setting"),
        (("classify", "length", 1), "no suite 'classify' is run"),
        (("short", "colour", 1), "unknown setting 'colour'"),
    ]:
        with pytest.raises(UserError, match=message):
            load_suites(["short"], [own], [override])
    with pytest.raises(UserError, match="is not a folder"):
        load_suites(["lm"], [own / "missing"])


def test_own_suite_by_the_command_line(causal: Path, own: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    command = ["short", "--suite-path", str(own), "--checkpoint", str(causal), "--out", str(out), "--name", "twice"]
    assert cli.main([*command, "--set", "short.max_tokens=48"]) == 0
    result = read_result(out / "short-twice.json")
    assert (result.task, result.settings["length"], result.settings["max_tokens"]) == ("lm", 16, 48)
    capsys.readouterr()
    assert cli.main(["list", "--suite-path", str(own)]) == 0
    listed = capsys.readouterr().out
    assert "short windows" in listed
    assert "3 suites" in listed
    assert cli.main(["list", "short", "--suite-path", str(own)]) == 0
    assert re.search(r"length +16 +window in tokens", capsys.readouterr().out)
    for words, message in [
        (["lm"], "say which with --checkpoint"),
        (["lm", "--set", "length"], "key=value"),
        (["lm", "--checkpoint", str(causal), "--name", "a/b"], "--name a/b"),
    ]:
        assert run_cli(cli.main, "nystrom eval", words) == 2
        assert message in capsys.readouterr().err


def test_help_and_list_load_no_model_code() -> None:
    """They answer at once."""
    code = (
        "import sys; from eval import cli\n"
        "try: cli.main(['lm', 'imdb', '--help'])\nexcept SystemExit: pass\n"
        "cli.main(['list'])\n"
        "heavy = {'torch', 'sklearn', 'scipy', 'datasets', 'matplotlib', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--max-length" in done.stdout  # of the suites that were named,
    assert "--temperature" not in done.stdout  # and of no others
