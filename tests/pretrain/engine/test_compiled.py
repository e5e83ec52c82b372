"""Compiled layers: the same losses through lengths, packed rows and ZeRO; nothing compiled where it would not pay."""

from __future__ import annotations

from typing import Any

import pytest
from engine_case import build, draw, engine_settings, master_weights, one_world
from ranks import run_ranks, values

from data_pipeline.errors import UserError
from pretrain.config import parse_config
from pretrain.engine.deepspeed_config import build_deepspeed_config


def steps_of_all_kinds(config: dict[str, Any], backend: str, shapes: list[Any]) -> list[Any]:
    """Runs in the ranks: a curriculum of lengths and packings, without and with compiled layers."""
    import torch._dynamo

    from pretrain.engine import layers
    from pretrain.model.generation import generate

    layers.COMPILE_BACKEND = backend
    out = []
    with one_world() as world:
        for compiled in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            engine = build({**config, "compile": compiled}, world)
            losses = []
            for rows, length, kind in shapes:
                ids, labels, documents = draw(
                    10 * world.rank + length, rows, length, config["model"]["objective"], kind
                )
                losses.append(float(engine.backward(ids, labels, 0.01, documents)))
                engine.step(0.01)
                losses.append(float(engine.evaluate(ids, labels).loss_sum))
            text = []
            if config["model"]["objective"] == "clm":
                text = generate(engine.model, [[1, 2, 3]], max_new_tokens=4, seed=1)
            names = list(engine.model.state_dict())
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            limits = len(torch._dynamo.utils.counters.get("recompile_limit", {}))
            out.append({"losses": losses, "text": text, "names": names, "graphs": graphs, "limits": limits})
            out[-1]["weights"] = master_weights(engine)
    return out


ALL = [(2, 32, "full"), (2, 64, "full"), (1, 64, "full"), (2, 64, "packed"), (2, 64, "packed")]


@pytest.mark.parametrize(
    ("zero_stage", "precision", "objective", "backend", "checkpointing", "shapes"),
    [
        pytest.param(2, "bf16", "clm", "eager", False, [ALL[0], ALL[3]], marks=pytest.mark.slow),
        pytest.param(0, "fp32", "mlm", "aot_eager", False, ALL, marks=pytest.mark.slow),
        pytest.param(1, "bf16", "clm", "aot_eager", False, ALL, marks=pytest.mark.slow),
        pytest.param(2, "bf16", "mlm", "aot_eager", True, ALL, marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_train_evaluate_and_write_the_same(
    zero_stage: int, precision: str, objective: str, backend: str, checkpointing: bool, shapes: list[Any]
) -> None:
    import numpy as np

    changes: dict[str, Any] = {"activation_checkpointing": checkpointing, "model": {"objective": objective}}
    config = engine_settings(zero_stage=zero_stage, precision=precision, **changes)
    world_size = 2 if len(shapes) > 2 else 1
    ended = run_ranks(steps_of_all_kinds, world_size, timeout=600, config=config, backend=backend, shapes=shapes)
    # Fused operations round elsewhere; AdamW turns that into steps of its own size where a gradient is about 0.
    exact = precision == "fp32"
    for plain, compiled in values(ended):
        np.testing.assert_allclose(compiled["losses"], plain["losses"], rtol=1e-5 if exact else 2e-3)
        assert compiled["names"] == plain["names"]
        assert not any("_orig_mod" in name for name in compiled["names"])
        assert [len(tokens) for tokens in compiled["text"]] == [4] * (objective == "clm")
        for name, value in plain["weights"].items() if exact else ():
            np.testing.assert_allclose(compiled["weights"][name], value, atol=1e-4, err_msg=name)
        assert plain["graphs"] == 0
        assert compiled["graphs"] > 1
        assert compiled["limits"] == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_compiled_in_training_only_and_one_graph_serves_all(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    import torch

    from pretrain.engine.layers import COMPILED_SHAPES, layer_runner
    from pretrain.model import build_model

    asked: list[dict[str, Any]] = []
    calls: list[Any] = []

    def record(function: Any, **options: Any) -> Any:
        asked.append(options)
        return lambda layer, *args: calls.append(layer) or function(layer, *args)

    monkeypatch.setattr(torch, "compile", record)
    model = build_model(parse_config(engine_settings()).model)
    ids, labels, _ = draw(1, 2, 32)
    expected = float(model(ids, labels=labels).loss_sum.detach())
    model.run_layer = layer_runner(checkpointing, compiled=True)
    assert float(model(ids, labels=labels).loss_sum.detach()) == expected
    assert calls == list(model.layers)
    assert float(model.eval()(ids, labels=labels).loss_sum.detach()) == expected
    assert len(calls) == 2
    (options,) = asked
    limits = {"dynamic": False, "recompile_limit": COMPILED_SHAPES, "isolate_recompiles": True}
    assert options == {"backend": "inductor", **limits}


def test_compiling_is_refused_where_it_does_not_pay() -> None:
    with pytest.raises(UserError, match="compile is refused at zero_stage 3"):
        build_deepspeed_config(parse_config(engine_settings(zero_stage=3, compile=True)))
