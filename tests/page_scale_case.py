"""The pages' commands at a scale of seconds: the same words, and behind them settings that make the work small."""

from __future__ import annotations

import shlex

MODEL = shlex.split(
    "model.hidden_size=32 model.num_layers=2 model.num_heads=2 model.num_landmarks=8 model.segment_length=16 "
    "model.conv_kernel=5"
)
TRAINING = MODEL + shlex.split(
    "batch_tokens=1024 'curriculum=[{until_tokens: 8192, seq_len: 256, micro_batch: 2}]' 'schedule={kind: constant}' "
    "'checkpoint={every_tokens: 4096}' 'validation={tokens: 1024}' telemetry.wandb=disabled precision=fp32"
)
"""8 steps of 4 rows."""
PLANNING = MODEL + shlex.split(
    "batch_tokens=8192 'schedule={kind: constant}' 'curriculum=[{until_tokens: 65536, seq_len: 256, micro_batch: 2}]'"
)
"""A batch that 8 processes share. At 16,384 tokens a plan took 12 s of processor time, and as much again to search."""
FITS = "epochs=1 seeds=1 scratch_seeds=1 max_length=64"
SUITES = {
    "lm": "max_tokens=2048",
    "context": "probes=8",
    "pppl": "pppl_tokens=16",
    "generate": "num_samples=2 max_new_tokens=8",
    "repeats": "rows=2",
    "passkey": "rows=2",
    "approximation": "max_tokens=1024",
    "efficiency": "lengths=[64,128] rounds=1 decode_tokens=2",
    "classify": FITS,
    "regress": FITS,
    "stsb": FITS,
    "reviews-long": FITS,
    "retrieval": "random_networks=1",
    "sts": "random_networks=1",
    "listops-small": "train_size=64 dev_size=16 test_size=16 steps=4 warmup=2 validate_every=2",
}
"""Settings of each suite."""
MEMBERS = {"nightly": ["lm", "reviews-long", "passkey"], "attention": ["approximation", "efficiency"]}
"""Suites of suites that a page shows."""


def scaled(words: list[str]) -> list[str]:
    """The words of ``python`` with those that make the command small."""
    match words:
        case ["-m", "launch.program", "data", "tokenizer", *rest]:
            return [*words[:4], *rest, "--vocab-size", "512"]
        case ["-m", "launch.program", "train", *rest]:
            return [*words[:3], *_settings(rest, TRAINING)]
        case ["-m", "launch.program", "plan", *rest]:
            return [*words[:3], *_settings(rest, PLANNING), "--no-search"]
        case ["-m", "pretrain", *rest]:
            return ["-m", "pretrain", *_settings(rest, TRAINING)]
        case ["-m", "launch.program", "eval", *rest]:
            return [*words[:3], *_evaluation(rest)]
        case ["-m", "eval", *rest]:
            return ["-m", "eval", *_evaluation(rest)]
        case ["-m", "launch.program", "generate", *rest]:
            return [*words[:3], "--max-new-tokens", "8", *rest]
    return words


def _evaluation(words: list[str]) -> list[str]:
    if words[:1] in (["list"], ["compare"]):
        return words
    asked = [suite for word in words for suite in MEMBERS.get(word, [word])]
    added = [f"{suite}.{setting}" for suite in SUITES if suite in asked for setting in SUITES[suite].split()]
    return [*words, "--set", *added] if added else words


def _settings(words: list[str], added: list[str]) -> list[str]:
    """Before the command's own settings, which so have the last word."""
    if any("causal-16k" in word or "causal-128k" in word for word in words):
        added = [*added, "model.attention=[nystrom,softmax]"]  # theirs has six layers
    if "--set" in words:
        at = words.index("--set") + 1
        return [*words[:at], *added, *words[at:]]
    return [*words, "--set", *added]
