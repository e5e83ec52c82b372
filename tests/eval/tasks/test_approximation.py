"""Errors of attention, entropies and swapped losses equal naive float64 computations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suites_case import subject_of
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from eval.results.parts import Parts
from eval.results.schema import Outcome
from eval.results.statistics import estimate
from eval.shared.forms import with_attention
from eval.subject import Subject
from eval.suites.load import load_suites
from eval.tasks.approximation import ApproximationSettings, exact, task
from pretrain.model import Layout, ModelConfig, build_model
from pretrain.model.attention.self_attention import AttentionContext

SETTINGS: dict[str, dict[str, Any]] = {
    "clm": {"segment_lengths": (4, 16), "window_sizes": (1, 3)},
    "mlm": {"landmarks": (4, 16), "inverse_steps": (4,)},
}


def approximation(subject: Subject, settings: ApproximationSettings) -> Outcome:
    return task.run(subject, task.resolve(subject, settings), Parts())


def settings_for(objective: str, **more: Any) -> ApproximationSettings:
    return ApproximationSettings(**({"length": 44, "max_tokens": 200} | SETTINGS[objective] | more))


def layers(subject: Subject, tokens: Tensor) -> Iterator[tuple[Any, Tensor, Tensor, Tensor]]:
    """(attention module, q, k, v (H, n, d)) of one window, by hand from the weights, in float64."""
    model = copy.deepcopy(subject.model).double().requires_grad_(False)
    config = model.config
    x = model.embeddings.norm(model.embeddings.word_embeddings(tokens))
    n, d = len(tokens), config.head_dim
    angles = torch.arange(n, dtype=torch.float64)[:, None] * config.rope_theta ** (-torch.arange(0, d, 2) / d).double()
    for block in model.layers:
        y, module = block.attention_norm(x), block.attention
        q, k, v = (p(y).view(n, -1, d).transpose(0, 1) for p in (module.query, module.key, module.value))
        yield module, rotate(q, angles), rotate(k, angles), v
        context = AttentionContext.build(config, Layout.full(1, n), x.device, x.dtype)
        x = block(x[None], context)[0]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def softmax(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    logits = q @ k.T / math.sqrt(q.shape[-1])
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits).triu(1) > 0, -math.inf)
    return logits.softmax(-1)


def parts(x: Tensor, count: int) -> list[Tensor]:
    """As equal as can be."""
    return [x[j * len(x) // count : (j + 1) * len(x) // count] for j in range(count)]


def means(x: Tensor, count: int) -> Tensor:
    return torch.stack([part.mean(0) for part in parts(x, count)])


def masked_matrix(q: Tensor, k: Tensor, landmarks: int, iterations: int, inverse: bool) -> Tensor:
    """The n by n matrix of the paper's equation 13, or of pooled keys and values."""
    counts = torch.tensor([len(part) for part in parts(q, landmarks)]).double()
    member = torch.block_diag(*[torch.full((1, int(c)), 1 / float(c)) for c in counts]).double()
    scale = q.shape[-1] ** -0.5
    if not inverse:
        return (scale * q @ means(k, landmarks).T + counts.log()).softmax(-1) @ member
    low_q, low_k = means(q, landmarks), means(k, landmarks)
    core = (scale * low_q @ low_k.T).softmax(-1)
    z = core.T / core.sum(0).max()
    eye = torch.eye(len(core)).double()
    for _ in range(iterations):
        az = core @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return (scale * q @ low_k.T).softmax(-1) @ z @ (scale * low_q @ k.T).softmax(-1)


def causal_matrix(q: Tensor, k: Tensor, c: int, w: int, landmarks: bool) -> Tensor:
    """The n by n matrix of the window and, beyond it, of landmarks with pooled values."""
    n, scale = len(q), q.shape[-1] ** -0.5
    out = torch.zeros(n, n, dtype=torch.float64)
    for t in range(n):
        first = max(t // c - w + 1, 0)
        logits, spread = [], []
        for j in range(first * c, t + 1):
            logits.append(scale * q[t] @ k[j])
            spread.append(torch.eye(n, dtype=torch.float64)[j])
        for segment in range(first if landmarks else 0):
            own = slice(segment * c, (segment + 1) * c)
            p = (scale * k[own] @ q[own].mean(0)).softmax(0)
            logits.append(scale * q[t] @ (p @ k[own]) - (p * p.log()).sum())
            spread.append(torch.zeros(n, dtype=torch.float64).index_put((torch.arange(n)[own],), p))
        out[t] = torch.stack(logits).softmax(0) @ torch.stack(spread)
    return out


def distance(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_errors_and_entropies_equal_a_naive_float64_computation(
    objective: str, causal: Path, masked: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "BUDGET", 44 * 7)  # blocks of queries that do not divide the length
    subject = subject_of(causal if objective == "clm" else masked, shards)
    settings = task.resolve(subject, settings_for(objective))
    outcome = approximation(subject, settings)
    config = subject.model.config
    windows = task.HeldOutWindows.read(subject, settings)
    assert len(windows.inputs) == 4
    expected: dict[str, list[Any]] = {}

    def note(name: str, value: float) -> None:
        expected.setdefault(name, []).append(value)

    is_causal = objective == "clm"
    c, w = config.segment_length, config.window_segments
    for tokens in windows.inputs:
        n = len(tokens)
        for _, all_q, all_k, all_v in layers(subject, tokens):
            for q, k, v in zip(all_q, all_k, all_v, strict=True):
                weights = softmax(q, k, is_causal)
                seen = (weights > 0).sum(1)
                uniform = (weights > 0).double() / seen[:, None]
                nats = -(weights * weights.clamp(min=1e-300).log()).sum(1)
                note("attention_entropy", float(nats.mean()))
                several = seen > 1
                note("attention_entropy_share", float((nats[several] / seen[several].log()).mean()))
                note("relative_error_mean_of_v", distance(uniform @ v, weights @ v))
                note("matrix_error_uniform", distance(uniform, weights))
                if is_causal:
                    own = causal_matrix(q, k, c, w, True)
                    others = {"relative_error_window": causal_matrix(q, k, c, w, False)}
                    others |= {f"segment_length {x}": causal_matrix(q, k, x, w, True) for x in (4, 16)}
                    others |= {f"window_segments {x}": causal_matrix(q, k, c, x, True) for x in (1, 3)}
                    at = torch.arange(n)
                    far = at // c >= w
                    near = at >= ((at // c - w + 1) * c)[:, None]
                    note("mass_in_window", float((weights * near).sum(1)[far].mean()))
                else:
                    own = masked_matrix(q, k, config.num_landmarks, 6, True)
                    others = {"relative_error_pooled": masked_matrix(q, k, config.num_landmarks, 6, False)}
                    others |= {f"num_landmarks {x}": masked_matrix(q, k, x, 6, True) for x in (4, 16)}
                    others["inverse_iterations 4"] = masked_matrix(q, k, config.num_landmarks, 4, True)
                note("relative_error", distance(own @ v, weights @ v))
                note("matrix_error", distance(own, weights))
                for name, matrix in others.items():
                    note(name, distance(matrix @ v, weights @ v))

    swept = {
        f"{table.columns[0]} {row[0]}": row[2]
        for table in outcome.tables
        if table.name.startswith("other ")
        for row in table.rows
        if not row[1]
    }
    measured = {name: metric.value for name, metric in outcome.metrics.items() if name in expected} | swept
    assert measured.keys() == expected.keys()
    for name, values in expected.items():
        assert measured[name] == pytest.approx(np.mean(values), rel=2e-4), name
    # By layer and head: windows, layers, heads in the order of the loops above.
    shape = (4, config.num_layers, config.num_heads)
    by_head = np.reshape(expected["relative_error"], shape).mean(0)
    uniform_by_head = np.reshape(expected["relative_error_mean_of_v"], shape).mean(0)
    np.testing.assert_allclose(outcome.grids[0].values, by_head, rtol=2e-4)
    np.testing.assert_allclose(outcome.grids[1].values, uniform_by_head, rtol=2e-4)
    assert outcome.metrics["heads_worse_than_mean_of_v"].value == (by_head >= uniform_by_head).mean()
    assert 0.05 < outcome.metrics["relative_error"].value < 3  # an error there is, or the comparison saw none


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_swapped_losses_are_those_of_the_other_model_with_the_same_weights(
    objective: str, causal: Path, masked: Path, shards: ShardSet
) -> None:
    subject = subject_of(causal if objective == "clm" else masked, shards)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    config = subject.model.config
    settings = task.resolve(subject, settings_for(objective))
    outcome = approximation(subject, settings)
    loss = "loss" if objective == "clm" else "masked_loss"

    windows = task.HeldOutWindows.read(subject, settings)

    def expected(**changes: Any) -> float:
        other = build_model(ModelConfig(**(config.model_dump() | changes)))
        other.load_state_dict(before)
        return float(swap_loss(other))

    def swap_loss(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            out = model.eval()(windows.inputs, labels=windows.labels)
        return out.loss_sum / out.num_targets

    assert outcome.metrics[loss].value == pytest.approx(expected(), rel=1e-5)
    for key, changes in {"exact": {"attention": "softmax"}, "window": {"attention": "window"}}.items():
        assert outcome.metrics[f"{loss}_{key}"].value == pytest.approx(expected(**changes), rel=1e-5)
        assert abs(expected(**changes) - expected()) > 1e-3
        change = outcome.metrics[f"{loss}_change_{key}"]
        assert change.value == pytest.approx(expected(**changes) - expected(), abs=1e-4)
        assert change.low is not None
        assert change.low <= change.value <= (change.high or 0)
    first = build_model(config)
    first.load_state_dict(before)
    first.layers[0].attention.change_form(ModelConfig(**(config.model_dump() | {"attention": "softmax"})))
    row = next(table for table in outcome.tables if table.name == "by layer").rows[0]
    assert row[-3] == pytest.approx(float(swap_loss(first)) - expected(), abs=1e-4)
    for table in outcome.tables:
        if table.name.startswith("other "):
            for value, own, _, nats, *_ in table.rows:
                assert nats == pytest.approx(expected(**{table.columns[0]: value}), rel=1e-5)
                assert own == (value == getattr(config, table.columns[0]))

    # Records give the metrics again, and the subject's model is as it was.
    for name, estimator in outcome.estimators.items():
        assert estimate(outcome.records, estimator) == pytest.approx(outcome.metrics[name].value)
    assert len({record["id"] for record in outcome.records}) == 4
    assert subject.model.config == config
    assert all(layer.attention.config == config for layer in subject.model.layers)
    assert not any(module._forward_pre_hooks for module in subject.model.modules())
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("covered", {"objective": "clm", "segment_length": 22}),
        ("few", {"objective": "mlm", "num_landmarks": 44}),
    ],
)
def test_no_error_where_every_token_is_seen_exactly(
    name: str, model: dict[str, Any], export: Callable[..., Path], shards: ShardSet
) -> None:
    settings = ApproximationSettings(length=44, max_tokens=100, float64=True, landmarks=(), window_sizes=())
    outcome = approximation(subject_of(export(name, **model), shards), settings)
    assert outcome.metrics["relative_error"].value < 1e-12
    assert outcome.metrics["matrix_error"].value < 1e-12
    assert outcome.metrics["relative_error_mean_of_v"].value > 0.05
    loss = "loss" if model["objective"] == "clm" else "masked_loss"
    assert outcome.metrics[f"{loss}_change_exact"].value == pytest.approx(0, abs=1e-12)
    assert "mass_in_window" not in outcome.metrics  # no token sees anything beyond


def test_causal_inverse_and_learned_query_are_used_and_left_out(export: Callable[..., Path], shards: ShardSet) -> None:
    path = export("inverse", objective="clm", landmark_inverse=True, learn_landmark_query=True, conv_kernel=0)
    subject = subject_of(path, shards)
    with torch.no_grad():
        for layer in subject.model.layers:
            layer.attention.landmark_query.normal_()
            layer.attention.gamma_logit.normal_()
    windows = task.HeldOutWindows.read(subject, task.resolve(subject, settings_for("clm")))
    outcome = approximation(subject, settings_for("clm"))

    # Without a convolution, what a layer's last projection is given is its attention.
    errors = []
    for tokens in windows.inputs:
        given: list[Tensor] = []
        hooks = [
            layer.attention.output.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0][0]))
            for layer in subject.model.layers
        ]
        subject.logits(tokens[None])
        for hook in hooks:
            hook.remove()
        for (_, all_q, all_k, all_v), out in zip(layers(subject, tokens), given, strict=True):
            heads = out.unflatten(1, (len(all_q), -1)).transpose(0, 1).double()
            exact_heads = [softmax(q, k, True) @ v for q, k, v in zip(all_q, all_k, all_v, strict=True)]
            errors += [distance(one, reference) for one, reference in zip(heads, exact_heads, strict=True)]
    assert outcome.metrics["relative_error"].value == pytest.approx(np.mean(errors), rel=1e-4)

    twin = with_attention(subject.model, {"landmark_inverse": False})
    assert all(layer.attention.own().keys() == {"landmark_query"} for layer in twin.layers)
    assert outcome.metrics["loss_pooled"].value != outcome.metrics["loss"].value
    own = [id(parameter) for parameter in twin.parameters()]
    assert set(own) < {id(parameter) for parameter in subject.model.parameters()}


def test_a_pyramid_stands_beside_flat_landmarks(export: Callable[..., Path], shards: ShardSet) -> None:
    changes = {"objective": "clm", "segment_length": 2, "window_segments": 1, "conv_kernel": 0}
    flat = export("flat", **changes)
    pyramid = export("pyramid", **changes, landmark_levels=9, landmark_band=1)
    found = [approximation(subject_of(path, shards), settings_for("clm")).metrics for path in (flat, pyramid)]
    assert "relative_error_flat" not in found[0]
    assert found[1]["loss_flat"].value == pytest.approx(found[0]["loss"].value, rel=1e-5)  # the same weights
    assert found[1]["relative_error"].value > 1.02 * found[1]["relative_error_flat"].value


def test_recall_stands_beside_landmarks_alone(export: Callable[..., Path], shards: ShardSet) -> None:
    changes = {"objective": "clm", "segment_length": 2, "window_segments": 1, "conv_kernel": 0}
    alone, recall = export("alone", **changes), export("recall", **changes, recall_segments=4)
    found = [approximation(subject_of(path, shards), settings_for("clm")).metrics for path in (alone, recall)]
    assert "relative_error_landmarks" not in found[0]
    assert found[1]["loss_landmarks"].value == pytest.approx(found[0]["loss"].value, rel=1e-5)  # the same weights
    assert found[1]["relative_error"].value < found[1]["relative_error_landmarks"].value


def test_numbers_do_not_depend_on_the_parts(causal: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(causal, shards)
    whole = approximation(subject, settings_for("clm"))
    monkeypatch.setattr(task, "PART_TOKENS", 44)
    for one, other in zip(whole.records, approximation(subject, settings_for("clm")).records, strict=True):
        assert one["id"] == other["id"]
        assert one["nats_exact"] == pytest.approx(other["nats_exact"], rel=1e-6)
        assert one["error_trained"] == pytest.approx(other["error_trained"], rel=1e-5)


def test_what_cannot_be_compared_is_refused(
    export: Callable[..., Path], causal: Path, masked: Path, shards: ShardSet
) -> None:
    exact_model = subject_of(export("exact", objective="clm", attention="softmax"), shards)
    with pytest.raises(UserError, match="computes exact attention: there is nothing to approximate"):
        task.resolve(exact_model, ApproximationSettings())
    window = subject_of(export("near", objective="mlm", attention="window"), shards)
    with pytest.raises(UserError, match="nothing beyond it: there is nothing to approximate"):
        task.resolve(window, ApproximationSettings())
    with pytest.raises(UserError, match="--landmarks is for masked models"):
        task.resolve(subject_of(causal, shards), ApproximationSettings(landmarks=(8,)))
    with pytest.raises(UserError, match="--window-sizes is for causal models"):
        task.resolve(subject_of(masked, shards), ApproximationSettings(window_sizes=(8,)))
    pooled = subject_of(export("pooled", objective="mlm", landmark_inverse=False), shards)
    with pytest.raises(UserError, match="trained without the inverse"):
        task.resolve(pooled, ApproximationSettings(inverse_steps=(4,)))
    learned = subject_of(export("positions", objective="mlm", positions="learned", max_positions=64), shards)
    with pytest.raises(UserError, match="64 learned positions"):
        task.resolve(learned, ApproximationSettings(length=128))
    with pytest.raises(UserError, match="less than one row of 100000"):
        approximation(subject_of(causal, shards), ApproximationSettings(length=100_000))
    with pytest.raises(UserError, match="a segment has at least 2 tokens"):
        load_suites(["approximation"], overrides=[(None, "segment_lengths", [1])])
    with pytest.raises(UserError, match="at least 1, got 0 8"):
        load_suites(["approximation"], overrides=[(None, "landmarks", [0, 8])])
