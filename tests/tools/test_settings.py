"""The hooks and the hosted tests run what `make` runs, on the versions that the project declares."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]


def read_yaml(name: str) -> Any:
    return yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8"))


def makefile() -> str:
    return (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def test_the_hooks_are_the_commands_of_make_lint() -> None:
    rule = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile(), re.MULTILINE)
    assert rule is not None
    commands = [line.strip().replace('"$(BIN)/python"', ".venv/bin/python") for line in rule[1].splitlines()]
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == commands
    assert local["repo"] == "local"  # no second version of a tool beside the one in constraints.txt


def test_the_hosted_tests_run_targets_of_make_on_the_declared_pythons() -> None:
    workflow = read_yaml(".github/workflows/ci.yml")
    targets = set(re.findall(r"^([a-z-]+):", makefile(), re.MULTILINE))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    made = {step["run"].split()[1] for step in steps if step.get("run", "").startswith("make ")}
    assert made == {"lint", "docs", "test", "test-slow"} <= targets
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    assert workflow["env"] == {"UV_TORCH_BACKEND": "cpu"}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={workflow['jobs']['test']['strategy']['matrix']['python'][0]}"
    assert workflow[True] == {  # "on", which YAML 1.1 reads as true
        "push": {"branches": ["main"]},
        "pull_request": None,
        "schedule": [{"cron": "17 3 * * 1"}],
        "workflow_dispatch": None,
    }
