"""One plan for every place, and what --dry-run shows of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_case import settings, write_config, write_corpus

from data_pipeline.errors import UserError, run_cli
from launch.cli import build_parser, main
from launch.places import PLACES
from launch.plan import LaunchPlan, Rendered, crossing_environment


def test_local_shows_what_it_would_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path)
    config = write_config(tmp_path / "run.yaml", settings(tmp_path, tmp_path))
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    words = ["local", "--nproc", "2", "--config", config, "--set", "seed=7", "--env", "WANDB_API_KEY=abc", "--dry-run"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert f"--module pretrain --config {config} --resume auto --set seed=7" in shown
    assert "export NCCL_DEBUG=WARN" in shown
    assert "abc" not in shown
    assert "export WANDB_API_KEY='(not shown)'" in shown
    assert not (tmp_path / "run").exists()


def test_every_place_takes_the_plan_s_arguments() -> None:
    for name in PLACES.names():
        with pytest.raises(SystemExit) as stopped:
            build_parser().parse_args([name, "--help"])
        assert stopped.value.code == 0


def test_variables_cross_by_name_and_by_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    monkeypatch.setenv("NYSTROM_LAUNCH_ID", "an outer one")
    monkeypatch.setenv("SOMETHING", "else")
    found = crossing_environment(["SOMETHING", "OTHER=a=b"])
    assert (found["GLOO_SOCKET_IFNAME"], found["SOMETHING"], found["OTHER"]) == ("eth1", "else", "a=b")
    assert "NYSTROM_LAUNCH_ID" not in found
    for wrong, words in [
        ("NOT_THERE", "is not set here"),
        ("a b=1", "cannot be the name"),
        ("A=1\n2", "several lines"),
    ]:
        with pytest.raises(UserError, match=words):
            crossing_environment([wrong])


def test_files_and_commands_are_shown_in_order() -> None:
    rendered = Rendered({Path("job.sh"): "echo 1\n"}, [(["run", "a b"], "starts it")], {"A": "x y", "MY_TOKEN": "t"})
    assert rendered.text() == (
        "# file job.sh\necho 1\n\n# environment\nexport A='x y'\nexport MY_TOKEN='(not shown)'\n\n"
        "# starts it\nrun 'a b'\n"
    )


def test_the_command_of_a_node(tmp_path: Path) -> None:
    plan = LaunchPlan(
        name="n", words=("--config", "c.yaml"), run_dir=tmp_path, directory=tmp_path, nodes=2, max_nodes=2, processes=8
    )
    command = plan.node_command("2", "SLURM_NODEID", "n0", "29500", "id")
    assert command[-2:] == ["--config", "c.yaml"]
    args = build_parser().parse_args(command[3:])
    assert (args.nodes, args.node_rank, args.nproc, args.master_addr) == (2, "SLURM_NODEID", 8, "n0")
    assert args.command == ["--config", "c.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--node-rank", "2"], "is not a number from 0 to 1"),
        (["--node-rank", "SLURM_NODEID"], "SLURM_NODEID is not set"),
        (["--node-rank", "0", "--launch-id", "a/b"], "letters, digits"),
        (["--node-rank", "0", "--nproc", "0"], "at least one of each"),
    ],
)
def test_a_node_refuses_what_it_cannot_be(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    base = ["node", "--nodes", "2", "--nproc", "1", "--master-addr", "x", "--master-port", "1", "--launch-id", "i"]
    assert run_cli(main, "nystrom launch", [*base, *words, "--", "--config", "none.yaml"]) == 2
    assert message in capsys.readouterr().err
