"""What a run will need, against real engines, real backward passes and counts by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, values

from data_pipeline.errors import UserError
from pretrain.config import RunConfig, parse_config
from pretrain.engine.layers import layer_runner
from pretrain.model import ModelConfig, build_model
from pretrain.model.attention.layout import Layout
from pretrain.planning import cli
from pretrain.planning.estimate import Question, estimate, parameters_by_part, plan_time
from pretrain.planning.fit import MemoryBudget, changes_that_fit, largest_micro_batch, peak, with_micro_batch
from pretrain.planning.memory import HEAP, LIBRARIES, RETURNED, plan_memory, resident_bytes, typical_documents
from pretrain.planning.state import parameter_sizes, state_bytes
from pretrain.planning.trace import trace_micro_batch

SMALL = {"vocab_size": 200, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_landmarks": 8, "conv_kernel": 5}


def settings(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "run",
        "model": {"objective": "clm", "segment_length": 16, **SMALL},
        "data": {"train": "not/there"},
        "curriculum": [
            {"until_tokens": 4096, "seq_len": 64, "micro_batch": 2},
            {"until_tokens": 8192, "seq_len": 128, "micro_batch": 1},
        ],
        "batch_tokens": 1024,
        "precision": "bf16",
        "zero_stage": 2,
        "optimizer": {"lr": 0.01},
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return base


def run_config(**changes: Any) -> RunConfig:
    return parse_config(settings(**changes))


@pytest.mark.parametrize(
    "changes", [{"objective": "mlm"}, {"objective": "clm", "learn_landmark_query": True}, {"tie_embeddings": False}]
)
def test_parameters_are_those_of_the_built_model(changes: dict[str, Any]) -> None:
    config = ModelConfig.model_validate(SMALL | {"norm": "post", "positions": "learned"} | changes)
    model = build_model(config)
    assert sum(parameters_by_part(config).values()) == model.num_parameters()
    assert parameters_by_part(config)["embeddings"] == (200 + 514) * 32
    groups = parameter_sizes(config, run_config().optimizer)
    assert sum(group.numel for group in groups) == model.num_parameters()


KINDS: list[tuple[str, Any]] = [
    ("mlm", "nystrom"),
    ("clm", "nystrom"),
    ("clm", "softmax"),
    ("mlm", "window"),
    ("mlm", ["window", "nystrom"]),
]


@pytest.mark.parametrize(
    ("checkpointing", "objective", "attention"),
    [
        *((checkpointing, *kind) for checkpointing in (False, True) for kind in KINDS[:-1]),
        (True, *KINDS[-1]),
        (False, "clm", ["nystrom", "window", "nystrom", "softmax"]),
        (False, "mlm", "modern"),
        (True, "clm", "modern"),
    ],
)
def test_a_deep_model_is_extended_from_three_layers_exactly(
    objective: str, attention: Any, checkpointing: bool
) -> None:
    modern = {"positions": ["rotary", "none", "rotary", "rotary", "none"], "ffn": "geglu", "norm_kind": "rmsnorm"}
    block = {"attention": ["nystrom", "softmax"], "qk_norm": True, **modern} if attention == "modern" else {}
    deep = SMALL | {"objective": objective, "attention": attention, "num_layers": 6, "segment_length": 16} | block
    config = ModelConfig.model_validate(deep | ({"norm": "post", "dropout": 0.1} if attention == "softmax" else {}))
    options: dict[str, Any] = {"targets": 30, "dtype": torch.bfloat16, "on_gpu": True, "checkpointing": checkpointing}
    short = trace_micro_batch(config, Layout.full(2, 64), **options)
    full = trace_micro_batch(config, Layout.full(2, 64), **options, all_layers=True)
    assert short.kept == full.kept
    assert [(g.numel, g.live) for g in short.gradients] == [(g.numel, g.live) for g in full.gradients]


def measured_activations(
    config: ModelConfig, layout: Layout, checkpointing: bool, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes of the storages that autograd keeps of a real forward pass; and the peak of the allocator in both.

    Without oneDNN, whose bfloat16 products have memory of their own (0.27 MB here) that is none of the model's.
    """
    torch.manual_seed(0)
    model = build_model(config).to(dtype)
    model.run_layer = layer_runner(checkpointing, compiled=False)
    ids = torch.randint(0, 200, (layout.batch, layout.length))
    labels = ids.clone()
    if config.objective == "mlm":
        labels[:, torch.arange(layout.length) % 5 > 0] = -100
    given = {x.untyped_storage().data_ptr() for x in (ids, labels, *model.parameters())}
    kept: dict[int, Any] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in given:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(ids, labels=labels, layout=layout).loss_sum
    saved = sum(storage.nbytes() for storage in kept.values())
    kept.clear()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    del loss
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with torch.backends.mkldnn.flags(enabled=False), profiler as profile:
        model(ids, labels=labels, layout=layout).loss_sum.backward()
    return saved, allocated_peak(profile)


def allocated_peak(profile: Any) -> int:
    """The most bytes allocated at once since the profile began."""
    events, found = list(profile.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events.extend(event.children)
        if hasattr(event.extra_fields, "alloc_size"):
            found.append(event.extra_fields.total_allocated)
    return max(found)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of switching oneDNN off
@pytest.mark.parametrize(("objective", "attention"), KINDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_a_real_pass(
    objective: str, attention: str, packed: bool, precision: torch.dtype
) -> None:
    wide = SMALL | {"objective": objective, "attention": attention, "hidden_size": 64, "segment_length": 16}
    config = ModelConfig.model_validate(wide)
    layout = typical_documents(2, 320) if packed else Layout.full(2, 320)
    trace = trace_micro_batch(config, layout, targets=128 if objective == "mlm" else 640, dtype=precision, on_gpu=False)
    saved, allocated = measured_activations(config, layout, False, precision)
    # What is saved is nearly all that lives; the rest is the output of the last module and masks that layers share.
    assert saved == pytest.approx(sum(trace.kept.values()), rel=0.04)
    assert allocated == pytest.approx(trace.peak, rel=0.02)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of switching oneDNN off
def test_checkpointed_activations_are_those_of_a_real_pass() -> None:
    config = ModelConfig.model_validate(SMALL | {"objective": "clm", "segment_length": 16, "num_layers": 5})
    layout = Layout.full(2, 320)
    options: dict[str, Any] = {"targets": 640, "dtype": torch.float32, "on_gpu": False}
    trace = trace_micro_batch(config, layout, **options, checkpointing=True)
    _, allocated = measured_activations(config, layout, True, torch.float32)
    assert allocated == pytest.approx(trace.peak, rel=0.02)
    assert trace.peak < 0.6 * trace_micro_batch(config, layout, **options).peak


def engine_parts(config: dict[str, Any], scratch: str) -> dict[str, int]:
    """Bytes of a real engine's weights, gradients and optimizer after a step and another backward pass; and on disk."""
    from pretrain.distributed.world import World, read_rank
    from pretrain.engine.training import TrainingEngine

    parsed = parse_config(config)
    world = World(read_rank(None))
    engine = TrainingEngine(parsed, world)
    engine.train()
    ids = torch.zeros(2, 64, dtype=torch.int64)
    for _ in range(2):
        engine.backward(ids, ids, 1e-3)
    engine.step(1e-3)
    engine.save(Path(scratch), "t")
    engine.backward(ids, ids, 1e-3)
    inner, stage = engine._engine.optimizer, parsed.zero_stage
    base = inner.optimizer if stage else inner
    # The master weights are what the optimizer steps; at stage 0 they are the weights, at stage 3 in float32 as well.
    masters = [p for group in base.param_groups for p in group["params"]] if stage in (1, 2) else []
    if stage == 3 and parsed.precision != "fp32":
        masters = inner.fp32_partitioned_groups_flat
    optimizer = [*masters, *(x for s in base.state.values() for x in s.values() if torch.is_tensor(x) and x.ndim)]
    parameters = list(engine.model.parameters())
    if stage == 0:
        weights, gradients = parameters, [p.grad for p in parameters]
    elif stage == 3:
        whole = [p.data for p in parameters if p.ds_persist and world.world_size > 1]
        weights, gradients = [inner.lp_param_buffer, *whole], [inner.grad_partitions_flat_buffer]
    else:
        weights = inner.bit16_groups_flat
        if stage == 1:
            gradients = [p.grad_accum if parsed.precision != "fp32" else p.grad for p in parameters]
        else:
            gradients = [x for group in inner.averaged_gradients.values() for x in group]
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    sizes = {name: sum(x.numel() * x.element_size() for x in tensors) for name, tensors in parts.items()}
    world.barrier()
    disk = sum(file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file())
    return {**sizes, "disk": disk}


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    ("precision", "stage"),
    [
        *[("fp32", 0), ("bf16", 1), ("fp32", 3)],
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("fp32", 1), ("bf16", 2), ("bf16", 3)]),
    ],
)
def test_state_is_that_of_a_real_engine(precision: str, stage: int, world_size: int, tmp_path: Path) -> None:
    raw = settings(precision=precision, zero_stage=stage, model={"num_layers": 3})  # a number that has to be padded
    raw["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 10_000}}
    if stage == 3:  # some parameters stay whole
        raw["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 200
    config = parse_config(raw)
    groups = parameter_sizes(config.model, config.optimizer)
    predicted = state_bytes(groups, config, world_size)
    for parts in values(run_ranks(engine_parts, world_size, config=raw, scratch=str(tmp_path))):
        assert (parts["weights"], parts["optimizer"]) == (predicted.weights, predicted.optimizer)
        assert parts["gradients"] == predicted.gradients
    found = estimate(config, Question(gpus=world_size, on_gpu=False))
    assert parts["disk"] == pytest.approx(
        found.checkpoint_bytes, rel=0.25
    )  # names and shapes weigh in so small a model


def test_accumulation_and_sharing_between_processes() -> None:
    one, two = (plan_memory(run_config(), n, on_gpu=True)[0] for n in (1, 2))
    assert one.micro_batches == 2 * two.micro_batches == 8
    assert two.state.optimizer * 2 == one.state.optimizer
    with pytest.raises(UserError, match="3 processes cannot share evenly"):
        plan_memory(run_config(), 3)


def test_gradients_of_earlier_micro_batches_are_there_at_the_fullest_moment() -> None:
    config = run_config(precision="fp32", zero_stage=0, model={"vocab_size": 5000})  # the largest gradient comes last
    many, once = (plan_memory(config, processes)[0] for processes in (1, 8))
    assert (many.micro_batches, once.micro_batches) == (8, 1)
    more = (many.backward - many.inputs) - (once.backward - once.inputs)
    assert 0.5 * many.state.gradients < more <= many.state.gradients


def test_offload_moves_the_optimizer_to_the_host() -> None:
    here, away = (plan_memory(run_config(offload_optimizer=on), 2)[0].state for on in (False, True))
    assert away.optimizer == 0
    assert away.host_optimizer > here.optimizer
    assert away.total < here.total


def test_time_is_the_arithmetic_over_the_speed() -> None:
    config = run_config()
    first, second = plan_time(config, 4, mfu=0.5, peak_flops=1e9)
    model = build_model(config.model)
    assert first.forward_flops == model.flops_per_token(64)
    assert first.tokens + second.tokens == 8192
    assert first.tokens_per_second == pytest.approx(4 * 0.5 * 1e9 / (3 * model.flops_per_token(64)))
    assert 0 < first.attention_share < 1
    again, _ = plan_time(run_config(activation_checkpointing=True), 4, mfu=0.5, peak_flops=1e9)
    assert again.seconds == pytest.approx(4 / 3 * (first.seconds or math.nan))
    masked = run_config(model={"objective": "mlm"}, data={"train": "x", "masking": {"rate": 0.3}})
    assert plan_time(masked, 1, mfu=1, peak_flops=None)[0].forward_flops > build_model(masked.model).flops_per_token(64)


BIG = {
    "model": {"hidden_size": 256, "num_heads": 4, "num_layers": 4},
    "curriculum": [{"until_tokens": 65536, "seq_len": 512, "micro_batch": 16}],
    "batch_tokens": 32768,
    "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}},
}


@pytest.mark.slow
def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    config = run_config(**BIG)
    limit = (peak(plan_memory(config, 2)) + peak(plan_memory(with_micro_batch(config, 0, 8), 2))) // 2
    budget = MemoryBudget(2, limit)
    rows = largest_micro_batch(config, 0, budget)
    assert 8 < rows < 16
    assert budget.holds(with_micro_batch(config, 0, rows))
    assert not budget.holds(with_micro_batch(config, 0, rows + 1))
    assert largest_micro_batch(config, 0, MemoryBudget(2, 10**12)) == 32  # all rows of a process
    assert largest_micro_batch(config, 0, MemoryBudget(2, 10**6)) == 0


CPU_RUN: dict[str, Any] = {
    "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "segment_length": 32},
    "curriculum": [{"until_tokens": 65536, "seq_len": 128, "micro_batch": 64}],
    "batch_tokens": 8192,
}


def cpu_budget(config: RunConfig) -> MemoryBudget:
    """Just enough for this run on a CPU."""
    (stage,) = plan_memory(config, 1, on_gpu=False)
    return MemoryBudget(1, resident_bytes(config, stage) + 1024, on_gpu=False)  # 1,024 for what rounding takes


@pytest.mark.slow
def test_on_a_cpu_a_run_is_judged_by_what_it_keeps_of_freed_blocks() -> None:
    config = run_config(**CPU_RUN)
    less = config.model_copy(update={"activation_checkpointing": True})
    budget = cpu_budget(less)
    assert budget.holds(less)
    assert not budget.holds(config)
    assert not replace(budget, memory=budget.memory - 2**20).holds(less)


@pytest.mark.slow
def test_on_a_cpu_so_is_each_change() -> None:
    config = run_config(**CPU_RUN)
    budget = cpu_budget(config.model_copy(update={"activation_checkpointing": True}))
    assert ("activation_checkpointing=true",) in {change.overrides for change in changes_that_fit(config, budget)}


@pytest.mark.slow
def test_changes_that_make_it_fit_do() -> None:
    config = run_config(**BIG, zero_stage=1)
    budget = MemoryBudget(2, peak(plan_memory(config, 2)) - 1)
    changes = {change.overrides for change in changes_that_fit(config, budget)}
    assert ("activation_checkpointing=true",) in changes
    assert ("zero_stage=2",) in changes
    assert ("offload_optimizer=true",) in changes
    assert any(overrides[0].startswith("curriculum.0.micro_batch=") for overrides in changes)
    # Too little for any one of them, enough for all together.
    tight = MemoryBudget(2, peak(plan_memory(with_micro_batch(config, 0, 1), 2)) - 1)
    (together,) = changes_that_fit(config, tight)
    assert together.overrides[0] == "activation_checkpointing=true"
    assert len(together.overrides) > 1
    assert together.peak <= tight.memory
    assert changes_that_fit(config, MemoryBudget(2, 1000)) == []


def write(tmp_path: Path, **changes: Any) -> str:
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(**changes)))
    return str(path)


def test_page_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    words = ["--config", path, "--gpus", "2", "--gpu-memory", "1", "--gpu", "a100", "--price-per-gpu-hour", "2"]
    assert cli.main(words) == 0
    out, following = capsys.readouterr()
    assert following == f"next: nystrom launch local --nproc 2 --config {path}\n"
    for part in (
        "It fits in 921.6 MiB (1 GiB less",
        "Memory of one GPU in ",
        "a causal nystrom model",
        "kept: attention",
        "at its fullest",
        "GPU-hours",
    ):
        assert part in out
    assert "the shards of data.train are not there" in out
    sizes = out[out.index("  weights ") : out.index("  at its fullest")]
    assert "0.00" not in sizes.split()
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == build_model(run_config().model).num_parameters()
    assert found["cost"] == pytest.approx(2 * found["gpu_hours"])
    assert found["stages"][0]["peak"] == plan_memory(run_config(), 2)[0].peak
    assert found["question"]["peak_flops"] == 312e12


def test_a_run_that_does_not_fit_has_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", write(tmp_path), "--gpu-memory", "0.001"]
    assert cli.main(words) == 1
    said = capsys.readouterr()
    assert "does NOT fit" in said.out
    assert said.err == ""
    assert cli.main([*words, "--no-search", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpus", "3"], "3 processes cannot share evenly"),
        (["--mfu", "2"], "--mfu 2.0: must be above 0 and at most 1"),
        (["--margin", "1"], "--margin 1.0: must be at least 0 and below 1"),
        (["--gpu-memory", "-1"], "--gpu-memory -1.0: must be a positive number"),
        (["--gpu", "H1000"], "--gpu H1000: its peak is not known"),
        (["--vocab-size", "7"], "--vocab-size 7: the configuration says 200"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        cli.main(["--config", write(tmp_path), *words])


def test_the_vocabulary_has_to_come_from_somewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, model={"vocab_size": None})
    with pytest.raises(UserError, match=r"there are no shards in not/there yet.*--vocab-size 8192"):
        cli.main(["--config", path])
    assert cli.main(["--config", path, "--vocab-size", "200"]) == 0
    assert "vocabulary 200" in capsys.readouterr().out


@pytest.mark.parametrize(("checkpointing", "for_each"), [(False, HEAP), (True, RETURNED)])
def test_memory_on_a_cpu_has_the_libraries_and_what_the_heap_keeps(checkpointing: bool, for_each: float) -> None:
    """That this is what a process takes, ``tests/benchmarks/test_memory_benchmark.py`` measures."""
    config = parse_config(settings(precision="fp32", zero_stage=0, activation_checkpointing=checkpointing))
    found = estimate(config, Question(gpus=1, on_gpu=False))
    stage = max(plan_memory(config, 1, on_gpu=False), key=lambda stage: stage.peak)
    lasting = stage.state.weights + stage.state.optimizer  # these are allocated once
    assert lasting == 12 * sum(found.parameters.values())
    assert found.host_bytes == LIBRARIES + lasting + int(for_each * (stage.peak - lasting))
    gib = found.host_bytes / 2**30
    for memory, fits in ((gib * 1.01, True), (gib * 0.99, False)):
        question = Question(gpus=1, on_gpu=False, gpu_memory=memory, margin=0, search=False)
        assert estimate(config, question).fits is fits
