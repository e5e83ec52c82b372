"""What is read for Slurm: ``cluster.yaml``, times, and what Slurm says when it refuses a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch.batch_file import seconds_of
from launch.cluster import load_cluster
from launch.places._slurm_submit import _hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "unknown key 'partitoin': did you mean 'partition'"),
        ("container: {immage: x}", "unknown key 'container.immage'"),
        ("time: 24:00:00", "write it in quotes"),
        ("cpus_per_task: 0", "cpus_per_task: "),
        ("setup: module load", "setup: "),
        ("[a]", "must hold keys and values"),
    ],
)
def test_mistakes_in_the_cluster_s_file_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        load_cluster(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("1-00:00:05", 86405),
        ("UNLIMITED", None),
        ("0", None),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("allocation failure: Invalid generic resource (gres) specification", "GPUs that no node has"),
        ("Requested node configuration is not available", "not so many nodes with these cores, GPUs and memory"),
        ("Access/permission denied", ""),
    ],
)
def test_a_refusal_says_where_to_look(said: str, hint: str) -> None:
    assert hint in _hint(said)
    assert bool(_hint(said)) == bool(hint)
