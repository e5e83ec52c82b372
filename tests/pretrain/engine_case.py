"""The training engine without a trainer: a model that is small, batches that are drawn, and what became of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from training_case import EPS

VOCAB = 60


def engine_settings(**changes: Any) -> dict[str, Any]:
    """A run's configuration as JSON values; ``changes`` replace top-level keys, or are merged into blocks."""
    base: dict[str, Any] = {
        "name": "run",
        "seed": 3,
        "model": {
            "objective": "mlm",
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "num_landmarks": 8,
            "segment_length": 8,
            "conv_kernel": 5,
        },
        "data": {"train": "unused"},
        "curriculum": [{"until_tokens": 4096, "seq_len": 32, "micro_batch": 2}],
        "batch_tokens": 256,
        "precision": "fp32",
        "zero_stage": 2,
        "optimizer": {"lr": 0.01, "grad_clip": 0.5, "eps": EPS},
        "schedule": {"kind": "constant"},
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    if base["zero_stage"] == 3 and "deepspeed" not in base:  # see training_case.settings
        base["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return base


@contextlib.contextmanager
def one_world() -> Iterator[Any]:
    """Runs in the ranks: the process group, for any number of engines one after another."""
    from pretrain.distributed.world import World, quiet_libraries, read_rank

    quiet_libraries()
    world = World(read_rank())
    try:
        yield world
    finally:
        world.close()


def build(config: dict[str, Any], world: Any) -> Any:
    """Runs in the ranks: the engine of a configuration, in training mode."""
    from pretrain.config import parse_config
    from pretrain.engine.training import TrainingEngine

    engine = TrainingEngine(parse_config(config), world)
    engine.train()
    return engine


def draw(number: int, rows: int, length: int, objective: str = "mlm", kind: str = "full") -> tuple[Any, Any, Any]:
    """(input_ids, labels, document_ids) of a micro-batch, the same for the same number.

    ``kind``: ``full`` rows, ``packed`` documents, or ``padding`` and nothing else.
    """
    import torch

    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
    labels = ids.roll(-1, 1)
    if objective == "mlm":
        labels = torch.where(torch.rand(rows, length, generator=generator) < 0.3, ids, -100)
    if kind == "full":
        return ids, labels, None
    documents = (torch.rand(rows, length, generator=generator) < 0.15).cumsum(1)
    documents[:, -3:] = -1
    if kind == "padding":
        documents[:] = -1
    labels[documents < 0] = -100
    return ids, labels, documents


def share(engine: Any, micros: int) -> range:
    """Of ``micros`` micro-batches of a step, the numbers of this process's."""
    each = micros // engine.world.world_size
    return range(engine.world.rank * each, (engine.world.rank + 1) * each)


def train_steps(engine: Any, first: int, last: int, micros: int = 4, kind: str = "full") -> dict[str, list[float]]:
    """Steps ``first`` to ``last`` (excluded) of a run, on ``micros`` micro-batches each, over all processes."""
    stage = engine.config.curriculum[0]
    losses, norms, scales = [], [], []
    for step in range(first, last):
        batch = [
            draw(1000 * step + i, stage.micro_batch, stage.seq_len, engine.config.model.objective, kind)
            for i in range(micros)
        ]
        targets = sum(float((labels >= 0).sum()) for _, labels, _ in batch)
        loss = sum(
            float(engine.backward(batch[i][0], batch[i][1], 1.0 / targets, batch[i][2])) for i in share(engine, micros)
        )
        result = engine.step(engine.config.optimizer.lr)
        losses.append(engine.world.sum([loss])[0] / targets)
        norms.append(result.grad_norm)
        scales.append(result.loss_scale)
    return {"losses": losses, "norms": norms, "scales": scales}


def master_weights(engine: Any) -> dict[str, Any]:
    """The float32 weights by name, whole, as NumPy arrays; all processes must call it alike."""
    from deepspeed.utils import safe_get_full_fp32_param

    out = {}
    for name, parameter in engine.model.named_parameters():
        value = parameter.detach() if engine.zero_stage == 0 else safe_get_full_fp32_param(parameter)
        out[name] = value.float().cpu().numpy().copy()
    return out


def first_gradients(engine: Any) -> dict[str, Any]:
    """The gradients of the first step, whole, float64: AdamW's first moment is (1 - beta_1) times them then."""
    import numpy as np
    from deepspeed.utils import safe_get_full_optimizer_state

    share = 1 - engine.config.optimizer.betas[0]
    zero = engine._engine.optimizer
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    out = {}
    if engine.zero_stage in (1, 2):  # DeepSpeed's function finds the moments of the first parameter group only
        for group, partition in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            parts = engine.world.gather(zero.state[partition]["exp_avg"].double().cpu().numpy())
            flat, start = np.concatenate(parts), 0
            for parameter in group:
                out[names[id(parameter)]] = flat[start : start + parameter.numel()].reshape(parameter.shape) / share
                start += parameter.numel()
        return out
    for name, parameter in engine.model.named_parameters():
        moment = (
            zero.state[parameter]["exp_avg"]
            if engine.zero_stage == 0
            else safe_get_full_optimizer_state(parameter, "exp_avg")
        )
        out[name] = moment.double().cpu().numpy() / share
    return out


def outcome(engine: Any, steps: dict[str, list[float]]) -> dict[str, Any]:
    """Everything that must be equal between two runs, to the bit."""
    return {**steps, "weights": {name: value.tobytes() for name, value in master_weights(engine).items()}}


def whole_and_resumed(config: dict[str, Any], world: Any, folder: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Runs in the ranks: (steps 2 and 3 of an uninterrupted run, of a resumed one, what the export would hold)."""
    from pretrain.checkpoint.load import consolidate
    from pretrain.distributed import randomness

    whole = build(config, world)
    train_steps(whole, 0, 2, **options)
    whole.save(folder, "two")
    generators = randomness.get_state()
    world.barrier()
    weights = {name: value.tobytes() for name, value in master_weights(whole).items()}
    exported = {name: value.detach().numpy().tobytes() for name, value in consolidate(folder / "two").items()}
    same_export = {name: exported[name] == value for name, value in weights.items()}
    expected = outcome(whole, train_steps(whole, 2, 4, **options))
    resumed = build(config, world)
    resumed.load(folder, "two")
    randomness.set_state(generators)
    return expected, outcome(resumed, train_steps(resumed, 2, 4, **options)), same_export
