"""``python -m benchmarks.token_loss``: seconds of the loss over a vocabulary and its gradients, three ways in turns."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from benchmarks import common
from benchmarks.common import check_file, check_positive, in_turns, markdown, run, settings_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pretrain.model.token_loss import Decoder

WAYS = ("all logits", "computed again", "fused")
DESCRIPTION = """Cross entropy of targets over a vocabulary, forward and backward: with all logits at once; in chunks
that are computed again in the backward pass; in chunks whose gradients are taken in the forward pass, as training does
(pretrain/model/token_loss.py). On a GPU where there is one, with the most memory that each allocates there."""
EXAMPLES = (
    "python -m benchmarks.token_loss --bf16 --threads 1 --out token-loss.json",
    "python -m benchmarks.token_loss --targets 2048 --hidden-size 768 --vocabulary 30522 --threads 1",
)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = common.build_parser("token_loss", DESCRIPTION, EXAMPLES, check=None)
    parser.add_argument("--targets", type=int, default=8192, metavar="N", help="tokens with a loss (default: 8192)")
    parser.add_argument("--hidden-size", type=int, default=192, metavar="N")
    parser.add_argument("--vocabulary", type=int, default=16384, metavar="N")
    parser.add_argument("--chunk", type=int, default=2**25, metavar="N", help="logits of one (default: 2^25)")
    parser.add_argument("--bf16", action="store_true", help="under autocast, as training in bf16 on a CPU")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed ones; a first one is not counted")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    check_positive(args, "targets", "hidden_size", "vocabulary", "chunk", "rounds", "threads")
    check_file("--out", args.out)
    import torch

    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    times, peaks = _measure(args, device)
    head = ["way", "ms", "of all logits", *(["peak, MiB"] if device.type == "cuda" else [])]
    lines = [
        [
            way,
            f"{1000 * median(times[way]):.0f}",
            f"{median(times[way]) / median(times[WAYS[0]]):.2f}",
            *([f"{peaks[way] / 2**20:.0f}"] if device.type == "cuda" else []),
        ]
        for way in WAYS
    ]
    print(markdown(head, lines))
    content = {
        "schema": 1,
        "provenance": common.provenance("token_loss", arguments, device),
        "settings": settings_of(args),
        "seconds": times,
        "peak_bytes": peaks,
    }
    common.write_json(args.out, content)
    return 0


def _measure(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every round by way, and on a GPU the most bytes over those of the inputs."""
    import torch

    from pretrain.model import token_loss

    token_loss.CHUNK_ELEMENTS = args.chunk
    torch.manual_seed(0)
    decoder = token_loss.Decoder(args.hidden_size, args.vocabulary, bias=False).to(device)
    states = torch.randn(args.targets, args.hidden_size, device=device, requires_grad=True)
    targets = torch.randint(0, args.vocabulary, (args.targets,), device=device)
    losses = ways(decoder, args.chunk)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, int] = {}
    for number, way in in_turns(WAYS, args.rounds, warm_up=True):
        states.grad = decoder.weight.grad = None
        before = 0
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.bf16):
            loss = losses[way](states, targets)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
            peaks[way] = torch.cuda.max_memory_allocated() - before
        if number:
            times[way].append(time.perf_counter() - began)
    return times, peaks


def ways(decoder: Decoder, chunk: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The loss of states (n, h) and targets (n,) by each of :data:`WAYS`."""
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    def at_once(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(decoder(states).float(), targets, reduction="sum")

    def again(states: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, chunk // decoder.out_features)
        pieces = zip(states.split(rows), targets.split(rows), strict=True)
        losses: list[Tensor] = [checkpoint(at_once, *piece, use_reentrant=False) for piece in pieces]
        return sum(losses[1:], losses[0])

    return dict(zip(WAYS, (at_once, again, decoder), strict=True))


if __name__ == "__main__":
    run(main, "token_loss")
