"""An environment with torch and transformers, what these require, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def bare_site(folder: Path, *names: str) -> Path:
    """A folder of links to these distributions and all that they require; to no other package."""
    waiting, done = list(names), set[str]()
    folder.mkdir()
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in done:
            continue
        done.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra, or of another platform
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder


def run_bare(site: Path, code: str, *arguments: str) -> str:
    """Run Python code there, offline; returns what it prints."""
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(site),
        "HF_HOME": str(site.parent / "hf-home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments],
        cwd=site.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
