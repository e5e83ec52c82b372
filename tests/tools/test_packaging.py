"""What packages, images and citations say of the project agrees, and an image is made of the packages alone."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "launch" / "containers"
PACKAGES = {"nystrom_pretrain", "data_pipeline", "pretrain", "eval", "launch", "configs"}
IN_AN_IMAGE = {*PACKAGES, "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def pyproject() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


def test_the_citation_agrees_with_the_package() -> None:
    citation, project = yaml.safe_load(read("CITATION.cff")), pyproject()["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["message"]
    assert project["name"] in citation["title"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    names = [
        author.get("name") or f"{author['given-names']} {author['family-names']}" for author in citation["authors"]
    ]
    assert names == [author["name"] for author in project["authors"]]
    assert set(citation["keywords"]) <= set(project["keywords"])
    (paper,) = citation["references"]
    assert paper["url"] == project["urls"]["Paper"]
    assert paper["authors"][0] == {"given-names": "Yunyang", "family-names": "Xiong"}
    assert isinstance(citation.get("date-released", date.today()), date)


def test_the_package_says_what_it_needs_and_that_it_is_typed() -> None:
    project, setuptools = pyproject()["project"], pyproject()["tool"]["setuptools"]
    pythons = {line.rsplit(" ", 1)[1] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)}
    (oldest,) = re.findall(r">=(3\.\d+)", project["requires-python"])
    assert oldest in pythons
    matrix = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert pythons == set(matrix)  # what the hosted tests run on
    assert not any(line.startswith("License ::") for line in project["classifiers"])  # refused beside an SPDX name
    assert all(address.startswith("https://") for address in project["urls"].values())
    found = {name.rstrip("*") for name in setuptools["packages"]["find"]["include"]}
    assert found == PACKAGES
    typed = {path.parent.name for path in REPOSITORY.glob("*/py.typed")}
    assert typed == PACKAGES - {"configs"}  # which holds no code
    assert setuptools["package-data"]["*"] == ["py.typed"]


def test_every_extra_is_explained() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", read("docs/install.md"), re.MULTILINE)
    assert [name for name, _ in rows] == list(pyproject()["project"]["optional-dependencies"])


def recipe_arguments() -> dict[str, str]:
    block = re.search(r"^%arguments\n((?: {4}.*\n)+)", read("launch/containers/nystrom.def"), re.MULTILINE)
    assert block is not None
    return dict(line.strip().split("=", 1) for line in block[1].splitlines())


def test_both_recipes_are_one_script() -> None:
    dockerfile, recipe = read("Dockerfile"), read("launch/containers/nystrom.def")
    steps = [re.findall(r"sh /opt/install\.sh (\w+)", text) for text in (dockerfile, recipe)]
    script = (RECIPES / "install.sh").read_text(encoding="utf-8")
    assert steps[0] == steps[1] == re.findall(r"^#     install\.sh (\w+)", script, re.MULTILINE)
    given = dict(re.findall(r'^ARG (\w+)="?([^"\n]*)"?$', dockerfile, re.MULTILINE))
    assert given == recipe_arguments()
    # What only one of them does is what the other's program does by itself: apptainer sets HOME and USER.
    environment = dict(re.findall(r"\b([A-Z]{4,})=(\S+)", dockerfile[dockerfile.index("\nENV ") :]))
    exported = re.search(r"^%environment\n +export (.*)$", recipe, re.MULTILINE)
    assert exported is not None
    assert environment == {**dict(re.findall(r"(\S+)=(\S+)", exported[1])), "HOME": "/tmp", "USER": "nystrom"}
    assert "pip install" not in dockerfile + recipe
    assert "apt-get" not in dockerfile + recipe


def test_an_image_runs_as_a_user_that_kubernetes_knows_not_to_be_root() -> None:
    lines = read("Dockerfile").splitlines()
    (user,) = [line for line in lines if line.startswith("USER ")]
    assert re.fullmatch(r"USER [1-9]\d*:[1-9]\d*", user)  # runAsNonRoot wants a number
    assert 'ENTRYPOINT ["nystrom"]' in lines  # without a shell, which would keep SIGTERM to itself


def test_base_images_are_named_by_version() -> None:
    named = {recipe_arguments()["BASE"]}
    for name in ("Dockerfile", "launch/containers/nystrom.def", "docs/containers.md"):
        named |= set(re.findall(r"\bBASE=([\w./:-]+)", read(name)))
    assert len(named) == 2, "a base for CPUs and one for GPUs, the same everywhere"
    for image in named:
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*-(bookworm|ubuntu24\.04)", image), image


def reaches_the_builder(path: str, rules: list[str]) -> bool:
    """What .dockerignore does: the last rule that matches the path or a folder above it decides."""
    kept = True
    for rule in rules:
        pattern = rule.removeprefix("!")
        above = [str(folder) for folder in (PurePosixPath(path), *PurePosixPath(path).parents)][:-1]
        spellings = [pattern, pattern.removeprefix("**/")] if pattern.startswith("**/") else [pattern]
        # A * does not match a slash there.
        if any(
            name.count("/") == spelling.count("/") and fnmatch.fnmatchcase(name, spelling)
            for spelling in spellings
            for name in (above if "**" not in pattern else [*above, *(PurePosixPath(part).name for part in above)])
        ):
            kept = rule.startswith("!")
    return kept


def test_nothing_but_the_packages_reaches_the_builder() -> None:
    rules = [line for line in read(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == IN_AN_IMAGE
    for name in IN_AN_IMAGE:
        assert reaches_the_builder(name, rules)
    for name in ("launch/places/slurm.py", "configs/suites/lm.yaml", "nystrom_pretrain/py.typed"):
        assert reaches_the_builder(name, rules)
    left_out = [".git/config", ".env", ".venv/bin/python", "runs/a/checkpoints/x", "shards/train/0.bin", "wandb/key"]
    left_out += ["tests/conftest.py", "demo/report.html", "pip.conf", "cluster.yaml", "launch/__pycache__/a.pyc"]
    left_out += [".netrc", "eval/tasks/__pycache__/b.pyc", "nystrom_pretrain.egg-info/PKG-INFO", "nystrom.sif"]
    assert [name for name in left_out if reaches_the_builder(name, rules)] == []
    # Apptainer reads no .dockerignore: its recipe names the same.
    files = re.findall(r"^    (\S+) /opt/source/(\S+)$", read("launch/containers/nystrom.def"), re.MULTILINE)
    assert {source for source, _ in files} == IN_AN_IMAGE
    assert all(source == place for source, place in files)


@pytest.mark.parametrize(
    ("words", "extras", "message"),
    [
        ([], "", "system, dependencies FOLDER or project FOLDER"),
        (["upgrade", "."], "", "system, dependencies FOLDER or project FOLDER"),
        (["project"], "", "the folder with pyproject.toml"),
        (["dependencies", "."], "zstd,dedupe", "no extra dedupe: there are fast, zstd, dedup"),
    ],
)
def test_the_script_refuses_what_it_does_not_know(words: list[str], extras: str, message: str, tmp_path: Path) -> None:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "EXTRAS": extras,
        "VENV": str(tmp_path / "venv"),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        ["sh", RECIPES / "install.sh", *words],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()
