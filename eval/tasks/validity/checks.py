"""The gate that runs before any score: is the model what its numbers will be taken for?

A "causal" model that sees the future reports a wonderful perplexity and cannot generate. A model whose output moves
with its batch mates or with the amount of padding has scores that depend on how they were computed. Each check measures
one number and holds it against a bound; all of it runs in float32 on the weights as loaded.

Differences of logits are given as a share of the largest absolute logit. Rounding in float32 leaves about 1e-6 of it;
what published Nyströmformers do wrong is 4e-4 (batch mates) to 1e-1 (padding).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from eval.results.parts import Parts
from eval.results.schema import Metric, ModelInfo, Outcome, Table, read_result_or_none
from eval.results.store import result_key
from eval.subject import Subject
from eval.tasks.validity import CHECKS_TABLE, ValiditySettings
from pretrain.model.attention.layout import Layout
from pretrain.model.attention.registry import form_of
from pretrain.model.decoding import decode, prefill
from pretrain.model.transformer import build_model

TASK = "validity"
VERSION = 2

# Bounds, as shares of the largest absolute logit unless said otherwise.
LOGIT_BOUND = 1e-4
LIKELIHOOD_BOUND = 1e-3  # nats per token
TINY = 1e-30  # for a model whose logits are all zero


@dataclass(frozen=True)
class Check:
    """One measured number against its bound; ``sense`` is "<=" or ">=". NaN never passes."""

    name: str
    measured: float
    bound: float
    sense: str = "<="
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the bound holds."""
        return self.measured <= self.bound if self.sense == "<=" else self.measured >= self.bound


def resolve(subject: Subject, settings: ValiditySettings) -> ValiditySettings:
    """The settings as they are."""
    return settings


def data(subject: Subject, settings: ValiditySettings) -> dict[str, Any]:
    """The held-out text that is looked at, where there is some."""
    shards = subject.shards
    return {"path": str(shards.path), "hash": shards.fingerprint} if shards else {"path": None, "hash": "random tokens"}


def run(subject: Subject, settings: ValiditySettings, parts: Parts | None = None) -> Outcome:
    """All checks that apply to the model's objective, as a table and a metric ``passed`` of 1 or 0."""
    tokens = _tokens(subject, settings)
    positions = check_positions(subject, len(tokens), settings)
    checks: list[Check] = []
    if subject.causal:
        checks += perturbation(subject, tokens, positions, settings.seed)
        checks += prefix_likelihood(subject, tokens, positions)
        checks += decoding(subject, tokens)
    checks += batch_and_padding(subject, tokens, settings.seed)
    checks += save_and_load(subject, tokens)
    rows: list[list[Any]] = [[c.name, c.measured, f"{c.sense} {c.bound:g}", c.passed, c.detail] for c in checks]
    passed = sum(c.passed for c in checks)
    return Outcome(
        metrics={"passed": Metric(float(passed == len(checks)), True, n=len(checks))},
        tables=[Table(CHECKS_TABLE, ["check", "measured", "bound", "passed", "detail"], rows)],
    )


def stands(path: Path, model: ModelInfo) -> bool | None:
    """Whether the result at ``path`` passed for this model; None where it is of another one, of an earlier version
    of the checks, of fewer positions than are looked at by default, or not there."""
    result = read_result_or_none(path)
    if result is None or result.task != TASK or result.settings.get("positions", 0) < ValiditySettings().positions:
        return None
    if result.key != result_key(TASK, VERSION, model, result.settings, result.data["hash"]):
        return None
    return result.metrics["passed"].value == 1.0


def failures(table: Table) -> list[str]:
    """The failed checks of a result's table, as text."""
    return [
        f"{name}: {'not a number' if measured is None else f'{measured:.3g}'}, must be {bound}"
        for name, measured, bound, passed, _ in table.rows
        if not passed
    ]


def check_length(subject: Subject) -> int:
    """Tokens enough for the approximate part of the attention to take part, with a last segment that is not whole."""
    config = subject.loaded.model_config
    form = form_of(config)
    if form.exact_up_to is None:
        length = 128
    elif form.window is not None:
        length = form.window.segment_length * (form.window.segments + 4) + form.window.segment_length // 2
    else:
        length = 3 * form.exact_up_to + 5
    length = max(length, 64)
    return min(length, config.max_positions) if config.positions == "learned" else length


def check_positions(subject: Subject, length: int, settings: ValiditySettings) -> list[int]:
    """Positions t < length - 1 to look at: both sides of every segment edge first, then seeded random ones."""
    window = form_of(subject.loaded.model_config).window
    rng = np.random.default_rng(settings.seed)
    step = max(length // 8, 1) if window is None else window.segment_length
    edges = [e + side for e in range(0, length, step) for side in (-2, -1, 0, 1)]
    edges = [t for t in dict.fromkeys([0, *edges, length - 2]) if 0 <= t < length - 1]
    if len(edges) > settings.positions:  # evenly thinned, so that late segments are among them
        edges = [edges[i] for i in np.linspace(0, len(edges) - 1, settings.positions).astype(int)]
    others = [int(t) for t in rng.permutation(length - 1) if t not in set(edges)]
    return sorted(edges + others[: settings.positions - len(edges)])


def perturbation(subject: Subject, tokens: Tensor, positions: list[int], seed: int) -> list[Check]:
    """Replace every token after t: the logits up to t must stay; those after t must move, or the check saw nothing."""
    base = subject.logits(tokens[None])[0]
    scale = base.abs().max().clamp_min(TINY)
    leaks, effects = [], []
    for t in positions:
        changed = tokens.clone()
        changed[t + 1 :] = _different(tokens[t + 1 :], subject, seed + t)
        delta = ((subject.logits(changed[None])[0] - base).abs() / scale).amax(-1)
        leaks.append(delta[: t + 1].max())
        effects.append(delta[t + 1 :].max())
    leak = torch.stack(leaks)  # max and min of tensors keep a NaN, which then fails the check
    return [
        Check(
            "causality: later tokens changed",
            float(leak.max()),
            LOGIT_BOUND,
            detail=f"largest change of a logit at or before t, {len(positions)} positions t of {len(tokens)} tokens"
            + (f"; worst t = {positions[int(leak.argmax())]}" if leak.any() else ""),
        ),
        Check(
            "control: the change is seen after t",
            float(torch.stack(effects).min()),
            LOGIT_BOUND,
            ">=",
            "smallest change of the logits after t; a model that ignores its input would pass the check above",
        ),
    ]


def prefix_likelihood(subject: Subject, tokens: Tensor, positions: list[int]) -> list[Check]:
    """log p(token t+1) from one full forward against the forward of tokens 0..t alone."""
    targets = tokens[1:].to(subject.device)
    full = subject.logits(tokens[None])[0, :-1].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    chosen = torch.tensor(positions, device=full.device)
    alone = torch.stack(
        [subject.logits(tokens[None, : t + 1])[0, -1].log_softmax(-1)[tokens[t + 1]] for t in positions]
    )
    gap = (full[chosen] - alone).abs().max()
    detail = (
        f"nats; mean loss {-float(full[chosen].mean()):.4f} in the full forward, "
        f"{-float(alone.mean()):.4f} from the prefix alone, over {len(positions)} tokens"
    )
    return [Check("causality: full against prefix-only likelihood", float(gap), LIKELIHOOD_BOUND, detail=detail)]


def decoding(subject: Subject, tokens: Tensor) -> list[Check]:
    """What generation computes, token by token with a cache, against one full forward."""
    start = len(tokens) // 3
    ids = tokens[None].to(subject.device)
    logits, cache = prefill(subject.model, ids[:, :start], max_length=len(tokens))
    steps = [logits] + [decode(subject.model, ids[:, t], cache) for t in range(start, len(tokens))]
    full = subject.logits(tokens[None])[0]
    gap = (torch.cat(steps).float() - full[start - 1 :]).abs().max() / full.abs().max().clamp_min(TINY)
    detail = f"tokens {start} to {len(tokens)} one at a time with a cache, against one forward"
    return [Check("decoding: token by token", float(gap), LOGIT_BOUND, detail=detail)]


def batch_and_padding(subject: Subject, tokens: Tensor, seed: int) -> list[Check]:
    """Rows of unequal length alone, together, with more padding and with other content in the padding."""
    total = len(tokens)
    lengths = sorted({total, total - 1, total // 2 + 1, max(total // 7, 1), min(3, total)}, reverse=True)
    rows = [tokens[-n:] for n in lengths]  # from the end, so that the rows differ everywhere
    alone = [subject.logits(row[None])[0] for row in rows]
    scale = max(TINY, *(float(a.abs().max()) for a in alone))
    pad_id = subject.loaded.tokenizer.pad_id

    def worst(width: int, fill: Callable[[Tensor], Tensor], members: list[int]) -> float:
        ids = torch.full((len(members), width), pad_id)
        for i, member in enumerate(members):
            ids[i, : lengths[member]] = rows[member]
            ids[i, lengths[member] :] = fill(ids[i, lengths[member] :])
        layout = Layout.from_lengths(torch.tensor([lengths[m] for m in members]).to(subject.device), width)
        logits = subject.logits(ids, layout)
        gaps = [(logits[i, : lengths[m]] - alone[m]).abs().max() for i, m in enumerate(members)]
        return float(torch.stack(gaps).max()) / scale

    everyone = list(range(len(rows)))
    limit = subject.loaded.model_config.max_positions if subject.loaded.model_config.positions == "learned" else None
    wider = total + 37 if limit is None else min(total + 37, limit)
    noise = _random_ids(subject, 4 * total, seed + 1)
    same = torch.stack([tokens, *(_different(tokens, subject, seed + i) for i in (2, 3))])
    mates = (subject.logits(same)[0] - alone[0]).abs().max()
    detail = f"rows of {', '.join(map(str, lengths))} tokens against each alone"
    return [
        Check(
            "batch mates",
            float(mates) / scale,
            LOGIT_BOUND,
            detail=f"a row of {total} tokens in a batch of 3 against alone",
        ),
        Check("padding: unequal rows together", worst(total, lambda pad: pad, everyone), LOGIT_BOUND, detail=detail),
        Check(
            "padding: amount",
            worst(wider, lambda pad: pad, everyone),
            LOGIT_BOUND,
            detail=f"{detail}, padded to {wider}",
        ),
        Check(
            "padding: content",
            worst(wider, lambda pad: noise[: len(pad)], everyone),
            LOGIT_BOUND,
            detail="as above, with random tokens in the padding",
        ),
    ]


def save_and_load(subject: Subject, tokens: Tensor) -> list[Check]:
    """Write the weights as safetensors, read them into a new model: the same bytes and the same logits."""
    from safetensors.torch import load_file, save_file

    state = subject.model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}, file)
        fresh = build_model(subject.loaded.model_config)
        fresh.load_state_dict(load_file(file))
    fresh = fresh.to(subject.device).eval()
    again = fresh.state_dict()
    unequal = sum(not torch.equal(tensor.cpu(), again[name].cpu()) for name, tensor in state.items())
    with torch.inference_mode():
        ids = tokens[None].to(subject.device)
        gap = (fresh(ids).logits.float() - subject.logits(ids)).abs().max()
    return [
        Check(
            "save and load: tensors that differ",
            float(unequal),
            0.0,
            detail=f"{len(state)} tensors through safetensors",
        ),
        Check("save and load: logits", float(gap), 0.0, detail="largest difference in a model built anew"),
    ]


def _tokens(subject: Subject, settings: ValiditySettings) -> Tensor:
    """Held-out text where there is some (trained models are sharpest there), else seeded random tokens. (N,) int64."""
    length = check_length(subject)
    if subject.shards is not None and subject.shards.num_tokens >= length:
        return torch.from_numpy(np.asarray(subject.shards.read(np.array([0], dtype=np.int64), length))[0])
    return _random_ids(subject, length, settings.seed)


def _ordinary(subject: Subject) -> Tensor:
    """Ids of the model's vocabulary that are no special tokens, ascending. (N,) int64."""
    vocab = subject.loaded.model_config.vocab_size or 0
    special = [i for i in subject.loaded.tokenizer.special_ids if i < vocab]
    kept = torch.ones(vocab, dtype=torch.bool)
    kept[special] = False
    ordinary = kept.nonzero()[:, 0]
    if len(ordinary) < 2:
        raise UserError(f"a vocabulary of {vocab} has no two ordinary tokens to check the model with")
    return ordinary


def _random_ids(subject: Subject, length: int, seed: int) -> Tensor:
    ordinary = _ordinary(subject)
    return ordinary[torch.randint(len(ordinary), (length,), generator=torch.Generator().manual_seed(seed))]


def _different(tokens: Tensor, subject: Subject, seed: int) -> Tensor:
    """As many ordinary tokens, each another than the one in its place."""
    ordinary = _ordinary(subject)
    count = len(ordinary)
    shift = torch.randint(1, count, tokens.shape, generator=torch.Generator().manual_seed(seed))
    return ordinary[(torch.searchsorted(ordinary, tokens) + shift) % count]
