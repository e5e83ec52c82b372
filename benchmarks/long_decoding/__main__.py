"""Arguments of ``python -m benchmarks.long_decoding`` and its tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import common
from benchmarks.common import check_file, check_positive, goal_lines, listed, markdown, run, settings_of
from data_pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from benchmarks.long_decoding.measure import Mark
    from eval.subject import Subject

MARKS = "1024,4096,16384,65536,131072,262144"
CACHE_GOAL, LOSS_GOAL = 0.005, 0.01
MIB = 2**20
DESCRIPTION = """One long text is decoded token by token through the cache. At each mark: bytes of the cache beside
exact attention's, memory of the process, milliseconds of a token, and the loss of the tokens since the mark before.
Beside it stands the loss of the same tokens when only the last of them are seen."""
EXAMPLES = (
    "python -m benchmarks.long_decoding --checkpoint runs/books-16k --text 'books/valid/*.txt' --threads 1",
    "python -m benchmarks.long_decoding --checkpoint runs/books-16k --marks 1024,8192 --set rope_theta=1000000",
)
EPILOG = f"""The goals of --check: a cache of at most {CACHE_GOAL:.1%} of exact attention's at the last mark, and a
loss since the mark before it at most {LOSS_GOAL:.0%} above that of the longest short context."""


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.build_parser("long_decoding", DESCRIPTION, EXAMPLES, epilog=EPILOG)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="run, checkpoint or export; clm")
    parser.add_argument(
        "--text", action="append", default=[], metavar="FILES", help="files, folders or globs, laid end to end"
    )
    parser.add_argument("--data", metavar="SHARDS", help="in place of --text (default: data.valid of the run)")
    parser.add_argument("--marks", default=MARKS, metavar="N,N", help=f"tokens; the last is the end (default {MARKS})")
    parser.add_argument(
        "--contexts", default="1024,4096", metavar="N,N", help="short contexts beside it, in tokens (default 1024,4096)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="before each mark; what lies farther back goes in at once (default all)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="rope_theta or rope_position_scale; repeatable"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: PyTorch's)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 with ``--check`` if a goal is missed; raises :class:`UserError`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    check_positive(args, "steps", "threads")
    check_file("--out", args.out)
    marks, contexts = _numbers("--marks", args.marks), _numbers("--contexts", args.contexts)

    import torch

    from benchmarks.long_decoding.measure import groups_of, short_context, since_last, stream
    from eval.subject import load_subject
    from eval.tasks.language_modeling import TextSettings
    from eval.tasks.language_modeling.text import describe_source, open_stream
    from pretrain.model.attention.registry import forms_of

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.text and args.data:
        raise UserError("--text and --data both name the text: leave one out")
    subject = load_subject(args.checkpoint, args.data, args.device)
    if not subject.causal:
        raise UserError(f"{args.checkpoint}: only a causal model (objective: clm) decodes token by token")
    subject.check_length(marks[-1], "--marks")
    _set_positions(subject, args.set)
    config = subject.model.config
    settings = TextSettings(text=tuple(args.text))
    source = open_stream(subject, settings)
    if source.num_tokens <= marks[-1]:
        raise UserError(
            f"{source.name} has {source.num_tokens:,} tokens, and --marks {marks[-1]} needs one more than that: lower "
            "--marks or give more text"
        )
    tokens = source.range(0, marks[-1] + 1)
    print(
        f"{args.checkpoint}: {config.attention_label}, {subject.model.num_parameters():,} parameters, trained on "
        f"{subject.loaded.tokens:,} tokens in lengths up to {subject.trained_length:,}",
        flush=True,
    )
    import numpy as np

    nats, found = stream(subject, tokens, marks, args.steps)
    losses = {"cache": nats} | {str(width): short_context(subject, tokens, width) for width in contexts}
    places = groups_of([0, *marks], np.arange(1, len(tokens)))
    windows = [form.window for form in forms_of(config).values() if form.window]
    near = max((w.segments * w.segment_length for w in windows), default=1)
    since = since_last(tokens)
    far = groups_of([0, *sorted({near, *(mark for mark in marks if mark > near)})], since)
    content: dict[str, Any] = {
        "schema": 1,
        "provenance": common.provenance("long_decoding", arguments, subject.device),
        "settings": settings_of(args) | {"checkpoint": str(args.checkpoint)},
        "model": config.model_dump(),
        "parameters": subject.model.num_parameters(),
        "weights_hash": subject.loaded.weights_hash,
        "trained_tokens": subject.loaded.tokens,
        "trained_length": subject.trained_length,
        "text": describe_source(subject, settings),
        "marks": [asdict(mark) | {"share": mark.share} for mark in found],
        "loss by position": _by_group(losses, places),
        "loss by tokens since the last occurrence": _by_group(losses, [*far, (0, 0, since == 0)]),
    }
    content["goals"] = _goals(found, content["loss by position"], [str(width) for width in contexts])
    print(_report(found, content, list(losses)))
    common.write_json(args.out, content)
    return int(args.check and not all(goal["met"] for goal in content["goals"]))


def _numbers(option: str, text: str) -> list[int]:
    words = listed(option, text)
    if not all(word.isdecimal() and int(word) > 1 for word in words):
        raise UserError(f"{option} {text}: must be whole numbers of at least 2")
    return sorted(map(int, words))


def _set_positions(subject: Subject, overrides: Sequence[str]) -> None:
    """Positions other than those of the checkpoint; raises :class:`UserError` for other keys and wrong values."""
    from benchmarks.attention_ablation.forms import configure

    changes = {}
    for override in overrides:
        name, sep, value = override.partition("=")
        if name not in ("rope_theta", "rope_position_scale") or not sep:
            raise UserError(f"--set {override}: only rope_theta=X and rope_position_scale=X change no weight")
        changes[name] = value
    if changes:
        subject.model.set_positions(configure(subject.model.config.model_dump() | changes, "--set"))


def _by_group(
    losses: Mapping[str, NDArray[np.float64]], groups: Sequence[tuple[int, int, NDArray[np.bool_]]]
) -> list[dict[str, Any]]:
    """Means of ``losses`` over each group that is not empty; ``above`` and ``up_to`` of 0 are 'never'."""
    return [
        {
            "above": low,
            "up_to": high,
            "tokens": int(which.sum()),
            "loss": {name: float(nats[which].mean()) for name, nats in losses.items()},
        }
        for low, high, which in groups
        if which.any()
    ]


def _goals(marks: Sequence[Mark], positions: Sequence[dict[str, Any]], contexts: Sequence[str]) -> list[dict[str, Any]]:
    last, loss = marks[-1], positions[-1]["loss"]
    excess = loss["cache"] / loss[contexts[-1]] - 1
    return [
        {
            "goal": f"cache / exact attention's at {last.tokens:,} tokens, at most {CACHE_GOAL}",
            "value": last.share,
            "met": last.share <= CACHE_GOAL,
        },
        {
            "goal": f"loss above that of a context of {contexts[-1]} tokens, relative, at most {LOSS_GOAL}",
            "value": excess,
            "met": excess <= LOSS_GOAL,
        },
    ]


def _report(marks: Sequence[Mark], content: Mapping[str, Any], names: Sequence[str]) -> str:
    head = ["tokens", "cache, MiB", "made for this length, MiB", "exact, MiB", "cache / exact", "process, MiB"]
    lines = [
        [
            f"{mark.tokens:,}",
            *(f"{size / MIB:.3f}" for size in (mark.allocated_bytes, mark.formula_bytes, mark.exact_bytes)),
            f"{mark.share:.3%}",
            f"{mark.resident_bytes / MIB:.0f}",
            f"{mark.step_ms:.2f}",
        ]
        for mark in marks
    ]
    parts = [markdown([*head, "ms per token"], lines)]
    for title in ("loss by position", "loss by tokens since the last occurrence"):
        rows = [
            [
                f"{row['above']:,} to {row['up_to']:,}" if row["up_to"] else "never",
                f"{row['tokens']:,}",
                *(f"{row['loss'][name]:.4f}" for name in names),
            ]
            for row in content[title]
        ]
        columns = [title, "tokens", "through the cache", *(f"last {name} at most" for name in names[1:])]
        parts.append(markdown(columns, rows))
    return "\n\n".join([*parts, "\n".join(goal_lines(content["goals"]))])


if __name__ == "__main__":
    run(main, "long_decoding")
