"""Arguments of ``python -m benchmarks.onnx_speed`` and its table: seconds of a forward pass, side by side."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import common
from benchmarks.common import check_file, check_positive, chosen, in_turns, listed, markdown, run, settings_of
from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from pretrain.model.transformer import NystromformerLM

FORMS = ("nystrom", "softmax")
DESCRIPTION = """A forward pass to the last hidden states of one full row, on a CPU: PyTorch and onnxruntime in turns,
with landmarks and with exact attention. Weights are random, and those of all are equal."""
EXAMPLES = ("python -m benchmarks.onnx_speed --threads 1 --out onnx-speed.json",)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.build_parser("onnx_speed", DESCRIPTION, EXAMPLES, check=None)
    parser.add_argument("--forms", default=",".join(FORMS), metavar="F,F", help=f"of {', '.join(FORMS)}")
    parser.add_argument("--lengths", default="128,512,1024,4096", metavar="N,N", help="tokens of the row")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="timed ones; a first one is not counted")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch and of onnxruntime")
    parser.add_argument("--hidden-size", type=int, default=256, metavar="N")
    parser.add_argument("--layers", type=int, default=4, metavar="N")
    parser.add_argument("--heads", type=int, default=4, metavar="N")
    parser.add_argument("--landmarks", type=int, default=64, metavar="N")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    forms = chosen("--forms", args.forms, FORMS)
    check_positive(args, "rounds", "threads", "hidden_size", "layers", "heads", "landmarks")
    check_file("--out", args.out)
    words = listed("--lengths", args.lengths)
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--lengths {args.lengths}: must be positive whole numbers")
    from pretrain.convert.onnx.folder import check_packages

    check_packages()
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        exports, calls = _prepare(args, forms, Path(folder))
        lengths = {n: _measure(calls, n, args.rounds) for n in map(int, words)}
    head = ["tokens", *(f"{name}, ms" for name in calls), *(f"{form}: onnxruntime / torch" for form in forms)]
    lines = [
        [
            str(n),
            *(f"{1000 * median(times[name]):.1f}" for name in calls),
            *(_ratios(times[f"onnxruntime {form}"], times[f"torch {form}"]) for form in forms),
        ]
        for n, times in lengths.items()
    ]
    print(markdown(head, lines))
    for form, export in exports.items():
        print(f"\n{form}: written in {export['seconds']:.0f} s, {export['bytes']:,} bytes")
    content = {
        "schema": 1,
        "provenance": common.provenance("onnx_speed", arguments, torch.device("cpu")),
        "settings": settings_of(args),
        "exports": exports,
        "seconds": {str(n): times for n, times in lengths.items()},
    }
    common.write_json(args.out, content)
    return 0


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of the medians, and of the fastest rounds, which a busy machine disturbs least."""
    return f"{median(ours) / median(theirs):.2f} (fastest {min(ours) / min(theirs):.2f})"


def _prepare(
    args: argparse.Namespace, forms: Sequence[str], folder: Path
) -> tuple[dict[str, Any], dict[str, Callable[[Any], object]]]:
    """What was written for each form, and what computes the states of token ids (1, N), by name."""
    import torch

    from pretrain.convert.onnx.check import open_session
    from pretrain.convert.onnx.file import OUTPUTS, write_model
    from pretrain.model.config import ModelConfig
    from pretrain.model.transformer import build_model

    exports: dict[str, Any] = {}
    calls: dict[str, Callable[[Any], object]] = {}
    for form in forms:
        torch.manual_seed(0)
        config = ModelConfig.model_validate(
            {
                "objective": "mlm", "attention": form, "vocab_size": 1024, "hidden_size": args.hidden_size,
                "num_layers": args.layers, "num_heads": args.heads, "num_landmarks": args.landmarks,
            }
        )  # fmt: skip
        model = build_model(config)
        model.eval()
        began = time.perf_counter()
        written = write_model(model, folder / f"{form}.onnx", head=False)
        exports[form] = {"seconds": time.perf_counter() - began, "bytes": written.size}
        session = open_session(folder / f"{form}.onnx", threads=args.threads)

        def of_torch(ids: torch.Tensor, model: NystromformerLM = model) -> object:
            return model(ids, hidden=True).hidden

        def of_session(ids: torch.Tensor, session: Any = session) -> object:
            inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
            return session.run(list(OUTPUTS[:1]), inputs)

        calls[f"torch {form}"], calls[f"onnxruntime {form}"] = of_torch, of_session
    return exports, calls


def _measure(calls: dict[str, Callable[[Any], object]], length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round."""
    import torch

    ids = torch.randint(0, 1024, (1, length), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number, name in in_turns(list(calls), rounds, warm_up=True):
        began = time.perf_counter()
        calls[name](ids)
        if number:
            times[name].append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    run(main, "onnx_speed")
