"""A kind of optimizer is one class that registers itself: the rest of the project takes it from there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks, values
from test_run import train_until
from training_case import metrics, settings, weights_hash, write_config

from data_pipeline.errors import UserError, run_cli
from data_pipeline.registry import RegistrationError
from pretrain.config import OptimizerConfig, parse_config
from pretrain.optim.kind import KINDS, OptimizerKind
from pretrain.optim.optimizer import most_values_kept, parameter_groups, values_kept

TOY = {"kind": "toy", "lr": 0.05, "settings": {"friction": 0.3}}


def register_toy() -> None:
    """What the one new module of somebody's optimizer would hold: gradient descent with momentum, by PyTorch."""

    @KINDS.register
    class Toy(OptimizerKind):
        name = "toy"
        settings = {"friction": 0.1, "nesterov": 0.0}  # noqa: RUF012
        matrices = "toy_matrices"

        @staticmethod
        def states(group: str) -> int:
            return 1 if group == "toy_matrices" else 0

        @staticmethod
        def hyperparameters(group: str, config: OptimizerConfig) -> dict[str, Any]:
            return {"momentum": 1 - config.setting("friction") if group == "toy_matrices" else 0.0}

        @staticmethod
        def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> Any:
            import torch

            return torch.optim.SGD(groups, lr=config.lr)


@pytest.fixture
def toy() -> Iterator[None]:
    with KINDS.registered():
        register_toy()
        yield


def train_toy(config: str) -> int:
    """Runs in the ranks: the command itself."""
    from pretrain.cli import main

    register_toy()
    return run_cli(main, "nystrom train", ["--config", config])


def stop_toy(config: str, step: int) -> int:
    """Runs in the ranks: as :func:`train_toy`, asked to stop before the step after ``step``."""
    register_toy()
    return train_until(config, step, "step")


@pytest.mark.parametrize("zero_stage", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_toy_trains_and_is_resumed_to_the_bit(corpus: Path, tmp_path: Path, zero_stage: int) -> None:
    def config(name: str, tokens: int = 1024) -> str:
        stage = {"until_tokens": tokens, "seq_len": 32, "micro_batch": 4}
        case = settings(corpus, tmp_path, name=name, optimizer=TOY, curriculum=[stage], zero_stage=zero_stage)
        return write_config(tmp_path / f"{name}.yaml", case)

    assert values(run_ranks(train_toy, 1, config=config("whole"))) == [0]
    assert values(run_ranks(stop_toy, 1, config=config("parts"), step=2)) == [75]
    assert len(metrics(tmp_path / "parts")) == 2
    assert values(run_ranks(train_toy, 1, config=config("parts"))) == [0]
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert weights_hash(tmp_path / "whole") == weights_hash(tmp_path / "parts")


@pytest.mark.usefixtures("toy")
def test_a_toy_is_planned_for(tmp_path: Path) -> None:
    from pretrain.model import build_model
    from pretrain.planning.state import parameter_sizes, state_bytes

    config = parse_config(settings(tmp_path, tmp_path, optimizer=TOY, zero_stage=2))
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 50})})
    names = [group["name"] for group in parameter_groups(build_model(config.model), config.optimizer)]
    assert names == ["toy_matrices", "decay", "no_decay"]
    assert [values_kept(config.optimizer, name) for name in names] == [1, 0, 0]
    assert most_values_kept(config.optimizer) == 1
    groups = parameter_sizes(config.model, config.optimizer)
    expected = sum(4 * (group.numel + group.numel % 2) * (2 if group.name == "toy_matrices" else 1) for group in groups)
    assert state_bytes(groups, config, 1).optimizer == expected


@pytest.mark.usefixtures("toy")
def test_settings_of_a_kind_are_checked_by_name(tmp_path: Path) -> None:
    def parsed(**optimizer: Any) -> OptimizerConfig:
        return parse_config(settings(tmp_path, tmp_path, optimizer=optimizer)).optimizer

    assert parsed(**TOY).setting("friction") == 0.3
    assert parsed(**TOY).setting("nesterov") == 0.0
    with pytest.raises(UserError, match=r"toy has no hyper-parameter 'fricton': did you mean 'friction'\?"):
        parsed(kind="toy", settings={"fricton": 0.1})
    with pytest.raises(UserError, match=r"lion has no hyper-parameter 'friction': it has none"):
        parsed(kind="lion", settings={"friction": 0.1})
    with pytest.raises(UserError, match=r"optimizer\.kind: there is no optimizer 'tou': did you mean 'toy'\?"):
        parsed(kind="tou")


def test_a_kind_without_a_part_is_refused_by_name() -> None:
    with pytest.raises(RegistrationError, match=r"optimizer 'half' .* lacks states \(.*\); build \("):

        @KINDS.register
        class Half(OptimizerKind):
            name = "half"

            @staticmethod
            def hyperparameters(group: str, config: OptimizerConfig) -> dict[str, Any]:
                return {}

    with pytest.raises(
        RegistrationError, match=r"'adamw' is registered twice: in pretrain\.optim\.kinds\.adamw and in"
    ):
        KINDS.register(type("Other", (KINDS.get("lion"),), {"name": "adamw"}))
    assert KINDS.names() == ("adamw", "lion", "muon")


def test_the_configuration_knows_the_kinds_without_torch() -> None:
    code = (
        "import sys; from pretrain.config import OptimizerConfig\n"
        "for kind in ('adamw', 'lion', 'muon'): OptimizerConfig(kind=kind)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0
