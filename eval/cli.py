"""``nystrom eval``: suites on a checkpoint, behind the validity gate."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from eval.results import Metric, Outcome, Result
    from eval.subject import Subject

SUITES = ("validity", "lm", "classify", "generate")

EXAMPLE = """example:
  nystrom eval validity lm generate --checkpoint runs/books-clm
  nystrom eval classify --checkpoint runs/books-clm --train reviews-train.csv --test reviews-test.csv --max-length 512

Results are written to RUN/eval/SUITE.json; `nystrom report RUN` makes a page of them. A result that is there already
for the same weights, settings and data is not computed again."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or not action.help or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The options of ``nystrom eval``."""
    parser = argparse.ArgumentParser(
        prog="nystrom eval",
        description="Evaluate a checkpoint. Suites: validity (does it see the future, its batch mates, padding?), "
        "lm (held-out perplexity, or masked accuracy), classify (fine-tuning on labelled text), generate (samples). "
        "validity runs before any other and blocks them when it fails.",
        epilog=EXAMPLE,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("suites", nargs="+", metavar="SUITE", help=f"one or more of: {', '.join(SUITES)}")
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="run folder, checkpoint folder or export folder"
    )
    parser.add_argument(
        "--data", metavar="SHARDS", help="held-out shards (default: data.valid of the run's configuration)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: RUN/eval)")
    parser.add_argument("--force", action="store_true", help="score the model even though the validity gate fails")
    parser.add_argument("--rerun", action="store_true", help="compute again what is already there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")

    lm = parser.add_argument_group("lm")
    lm.add_argument("--length", type=int, metavar="N", help="window in tokens (default: the longest length of the run)")
    lm.add_argument(
        "--max-tokens", type=int, metavar="N", help="evaluate so many held-out tokens (default: all of them)"
    )

    classify = parser.add_argument_group("classify")
    classify.add_argument(
        "--train", metavar="FILE", help="labelled text to train on: JSONL, JSONL.gz, CSV, TSV or Parquet"
    )
    classify.add_argument("--test", metavar="FILE", help="labelled text to score once, in the end")
    classify.add_argument("--text-field", default="text", metavar="NAME", help="field or column with the text")
    classify.add_argument("--label-field", default="label", metavar="NAME", help="field or column with the label")
    classify.add_argument("--max-length", type=int, metavar="N", help="tokens read of each text (default: as --length)")
    classify.add_argument("--seeds", type=int, default=3, metavar="N", help="fine-tunings from different random seeds")
    classify.add_argument(
        "--scratch-seeds", type=int, metavar="N", help="of the seeds, how many also from random weights (default: all)"
    )
    classify.add_argument("--epochs", type=int, default=10, metavar="N", help="passes over the training file, at most")
    classify.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts of one step")
    classify.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help="peak learning rate of the pretrained weights (default: 0.1 / hidden_size)",
    )
    classify.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of fine-tuning; auto: bf16 where it is fast",
    )
    classify.add_argument(
        "--name", metavar="NAME", help="write the result as classify-NAME.json, to keep several data sets"
    )

    generate = parser.add_argument_group("generate")
    generate.add_argument(
        "--prompt", action="append", metavar="TEXT", help="own prompt, repeatable (default: held-out text)"
    )
    generate.add_argument("--num-samples", type=int, default=8, metavar="N", help="samples from held-out text")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest continuation")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest token")
    generate.add_argument("--top-k", type=int, default=50, metavar="N", help="draw among the N likeliest tokens")
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="draw among the likeliest tokens that reach probability X"
    )
    generate.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: what was written gets less likely"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites; returns 0, or 1 if the validity suite was asked for and failed."""
    args = build_parser().parse_args(argv)
    unknown = [suite for suite in args.suites if suite not in SUITES]
    if unknown:
        raise UserError(f"no suite '{unknown[0]}'; there are {', '.join(SUITES)}")
    for name in (
        "length",
        "max_tokens",
        "max_length",
        "epochs",
        "batch_size",
        "seeds",
        "num_samples",
        "max_new_tokens",
        "top_k",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if "classify" in args.suites and not (args.train and args.test):
        raise UserError("classify needs labelled text: --train FILE --test FILE (JSONL, CSV, TSV or Parquet)")
    if args.lr is not None and args.lr <= 0:
        raise UserError(f"--lr {args.lr}: must be positive")
    if args.name and not all(c.isalnum() or c in "-_." for c in args.name):
        raise UserError(f"--name {args.name}: letters, digits, '-', '_' and '.' only, it becomes part of a file name")
    if not Path(args.checkpoint).exists():
        raise UserError(f"checkpoint {args.checkpoint} does not exist")
    return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    from eval import gate
    from eval.results import ModelInfo

    subject = _load(args)
    info: ModelInfo = subject.info()
    folder = args.out or results_folder(Path(args.checkpoint), subject.loaded.run_dir)
    print(
        f"{info.run}: {info.objective}, {info.attention} attention, {info.parameters:,} parameters, "
        f"{info.tokens:,} tokens seen, weights {info.weights_hash[:12]}",
        flush=True,
    )
    verdict = gate.check(
        subject,
        folder / "validity.json",
        asked="validity" in args.suites,
        rerun=args.rerun and "validity" in args.suites,
    )
    results: list[tuple[str, Result, bool]] = [("validity", verdict.result, verdict.fresh)]
    others = [suite for suite in dict.fromkeys(args.suites) if suite != "validity"]
    if others and not verdict.passed and not args.force:
        print_table(results)
        raise UserError(
            "the validity gate failed, so no score is computed:\n  "
            + "\n  ".join(verdict.failures)
            + "\n--force scores the model all the same"
        )
    runners: dict[str, Callable[..., tuple[Result, bool]]] = {"lm": _lm, "classify": _classify, "generate": _generate}
    for suite in others:
        name = f"{suite}-{args.name}" if suite == "classify" and args.name else suite
        result, fresh = runners[suite](subject, args, folder / f"{name}.json", info)
        if not fresh:
            print(f"{name}: already there for these weights, settings and data (--rerun computes it again)", flush=True)
        results.append((name, result, fresh))
    print_table(results)
    print(f"\nresults in {folder}")
    return 0 if verdict.passed or others else 1


def _load(args: argparse.Namespace) -> Subject:
    import torch

    from data_pipeline.shards.shardset import ShardSet
    from eval.subject import Subject
    from pretrain.checkpoint.store import load_model

    if args.device == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            device = torch.device(args.device)
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    loaded = load_model(args.checkpoint)
    loaded.model.to(device).eval()
    path = args.data or loaded.run_config.data.valid
    shards = None
    if path and (args.data or Path(path).exists()):
        shards = ShardSet.open(path, expect_tokenizer=loaded.tokenizer.hash)
    elif path and "lm" in args.suites:
        raise UserError(f"held-out shards {path} (data.valid of the run) are not there: say where with --data SHARDS")
    return Subject(loaded, shards, device)


def results_folder(checkpoint: Path, run_dir: Path | None) -> Path:
    """RUN/eval for a run and its export; RUN/eval/TAG for one of its checkpoints, so that the run's results stay."""
    if checkpoint.parent.name == "checkpoints" and checkpoint.name != "latest" and run_dir is not None:
        return run_dir / "eval" / checkpoint.name
    return (run_dir or checkpoint) / "eval"


def _run(
    path: Path,
    task: str,
    version: int,
    info: Any,
    settings: dict[str, Any],
    data: dict[str, Any],
    rerun: bool,
    compute: Callable[[], Outcome],
) -> tuple[Result, bool]:
    from eval.results import run_task

    return run_task(
        path, task=task, version=version, model=info, settings=settings, data=data, compute=compute, rerun=rerun
    )


def _lm(subject: Subject, args: argparse.Namespace, path: Path, info: Any) -> tuple[Result, bool]:
    from eval import language_modeling as lm

    settings = lm.LMSettings(seq_len=args.length or subject.trained_length, max_tokens=args.max_tokens)
    shards = subject.held_out()
    data = {
        "path": str(shards.path),
        "tokens": shards.num_tokens,
        "documents": shards.num_documents,
        "hash": shards.fingerprint,
    }
    return _run(
        path, lm.TASK, lm.VERSION, info, settings.as_dict(), data, args.rerun, lambda: lm.run(subject, settings)
    )


def _classify(subject: Subject, args: argparse.Namespace, path: Path, info: Any) -> tuple[Result, bool]:
    from eval import classification
    from eval.finetune import Recipe, default_lr, fast_precision

    data = classification.ClassifyData.read(args.train, args.test, args.text_field, args.label_field)
    settings = classification.ClassifySettings(
        max_length=args.max_length or args.length or subject.trained_length,
        seeds=args.seeds,
        scratch_seeds=args.seeds if args.scratch_seeds is None else max(args.scratch_seeds, 0),
        precision=fast_precision(subject.device) if args.precision == "auto" else args.precision,
        text_field=args.text_field,
        label_field=args.label_field,
        recipe=replace(
            Recipe(),
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr or default_lr(subject.loaded.model_config.hidden_size),
        ),
    )
    return _run(
        path, classification.TASK, classification.VERSION, info, settings.as_dict(), data.describe(), args.rerun,
        lambda: classification.run(subject, settings, data),
    )  # fmt: skip


def _generate(subject: Subject, args: argparse.Namespace, path: Path, info: Any) -> tuple[Result, bool]:
    from eval import generation

    settings = generation.GenerateSettings(
        prompts=tuple(args.prompt or ()),
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
    )
    data = generation.describe_data(subject, settings)
    return _run(
        path, generation.TASK, generation.VERSION, info, settings.as_dict(), data, args.rerun,
        lambda: generation.run(subject, settings),
    )  # fmt: skip


def print_table(results: Sequence[tuple[str, Result, bool]]) -> None:
    """Suite, metric and value, one a line."""
    rows = [
        (name if first else "", metric.replace("_", " "), describe(value))
        for name, result, _ in results
        for first, (metric, value) in zip([True] + [False] * len(result.metrics), result.metrics.items(), strict=False)
    ]
    widths = [max(len(row[i]) for row in [*rows, ("suite", "metric", "value")]) for i in range(3)]
    print(
        "\n"
        + "  ".join(
            text.ljust(width) for text, width in zip(("suite", "metric", "value"), widths, strict=True)
        ).rstrip()
    )
    print("  ".join("-" * width for width in widths))
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def describe(metric: Metric) -> str:
    """A metric as text: value, ± standard deviation, number."""
    if math.isnan(metric.value):
        return "not finite"
    text = f"{metric.value:.4f}" if abs(metric.value) < 1000 else f"{metric.value:.5g}"
    if metric.std is not None:
        return f"{text} ± {metric.std:.4f} (n={metric.n})"
    return text
