"""``nystrom replay``: the batch of a step that went wrong, row by row, with the weights of a checkpoint before it."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.batches import IGNORE
from data_pipeline.command_line import Parser
from data_pipeline.tokenization.tokenizer import Tokenizer
from pretrain.checkpoint import commit
from pretrain.telemetry.bad_batches import checkpoint_at, read_batch

if TYPE_CHECKING:
    import torch

    from pretrain.checkpoint.load import LoadedModel
    from pretrain.model.transformer import NystromformerLM

EXCERPT = 160
"""Characters of a row's text that are shown."""
ROWS_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the batch: where it was, and what came of it."""

    process: int
    number: int  # within the process
    sample: int
    input_ids: torch.Tensor  # (seq_len,) int64
    labels: torch.Tensor
    document_ids: torch.Tensor | None
    loss: float = math.nan  # mean over the row's targets, nats; 0 without targets
    grad_norm: float = math.nan  # of the row's loss sum divided by the targets of the whole step

    @property
    def is_finite(self) -> bool:
        """Whether neither loss nor gradient went wrong."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = Parser(
        prog="nystrom replay",
        description="Compute the rows of a saved batch again, one by one, in one process and in float32, and name "
        "those whose loss or gradient is not finite or out of line with the others'.",
        examples=["nystrom replay runs/demo-clm/bad_steps/step000000012 --bf16"],
        epilog="The weights are those of the newest whole checkpoint before the step (of the oldest after it, if those "
        "were removed), without dropout: further off, a fault that lies in the weights may not show. Set "
        "checkpoint.every_tokens lower to come closer.",
    )
    parser.add_argument("batch", type=Path, help="a folder below bad_steps/ or spikes/ of a run")
    parser.add_argument(
        "--checkpoint", type=Path, default=None, help="weights to use: a run, a checkpoint, an export folder"
    )
    parser.add_argument("--bf16", action="store_true", help="compute it in bfloat16 too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 whatever the rows are like, for they were looked at."""
    args = build_parser().parse_args(argv)
    facts, rows = read_rows(args.batch)
    print(_heading(args.batch, facts, len(rows)))
    from pretrain.distributed.world import quiet_libraries

    quiet_libraries()
    model, tokenizer, whose = load_weights(args.batch.resolve().parent.parent, facts, args.checkpoint)
    print(whose)
    masked = model.config.objective == "mlm"
    import torch

    for name, dtype in (("float32", torch.float32), *((("bfloat16", torch.bfloat16),) if args.bf16 else ())):
        model.to(dtype)
        done = list(compute(model, rows, facts["targets"]))
        text = partial(excerpt, tokenizer=tokenizer, masked=masked)
        print("\n".join(findings(name, done, text, suspects(facts))))
    return 0


def read_rows(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """The facts of the step and its rows, process by process; raises :class:`UserError` if the folder is not whole."""
    facts, parts = read_batch(folder)
    rows = []
    for process, tensors in parts:
        documents = tensors.get("document_ids")
        for number, sample in enumerate(tensors["sample_ids"].tolist()):
            own = None if documents is None else documents[number]
            rows.append(Row(process, number, sample, tensors["input_ids"][number], tensors["labels"][number], own))
    return facts, rows


def load_weights(run_dir: Path, facts: dict[str, Any], path: Path | None) -> tuple[NystromformerLM, Tokenizer, str]:
    """The model in evaluation mode (on the GPU if there is one), the tokenizer, and a line about the weights.

    From ``path``; else from the newest whole checkpoint that holds the weights the step began with or older ones; else,
    if those were removed to free space, from the oldest of the newer ones. A run without checkpoints has the weights
    that its seed initialised.
    """
    import torch

    from pretrain.checkpoint.load import load_model
    from pretrain.config import load_config
    from pretrain.curriculum.stages import stage_model
    from pretrain.model.config import ROTARY_FIELDS
    from pretrain.model.transformer import NystromformerLM

    loaded = load_model(path) if path is not None else _load_nearest(run_dir / "checkpoints", facts)
    if loaded is None:
        model, tokenizer = _initial(run_dir)
        tokens = 0
        whose = f"Weights: as initialised, for the run has no whole checkpoint from before step {facts['step']}."
    else:
        assert isinstance(loaded.model, NystromformerLM)
        model, tokenizer, tokens = loaded.model, loaded.tokenizer, loaded.tokens
        whose = f"Weights: {loaded.path}, after {loaded.tokens:,} tokens; the step began at {facts['tokens_before']:,}."
    # The weights may be from before the edge at which the stage of the batch began. The angles are the stage's. Learned
    # positions repeat as the copies at that edge would.
    stage = stage_model(load_config(run_dir / "config.yaml"), facts["stage"])
    angles = {key: getattr(stage, key) for key in ROTARY_FIELDS}
    model.set_positions(model.config.model_copy(update=angles))
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    # A step that was skipped left the weights as they were.
    same = (facts["tokens_before"],) if facts["what"] == "spike" else (facts["tokens_before"], facts["tokens"])
    if tokens not in same:
        whose += " The step had other weights, to which these rows may do something else."
    return model, tokenizer, whose


def suspects(facts: dict[str, Any]) -> list[str]:
    """What may be at fault where no row is."""
    return [
        f"the learning rate ({facts['lr']:.3g} at that step), if steps of that size spoilt the weights before",
        "the weights of the step, where these are others",
        f"the precision of the run ({facts['precision']}), and its dropout",
        "the machine",
    ]


def _load_nearest(checkpoints: Path, facts: dict[str, Any]) -> LoadedModel | None:
    from pretrain.checkpoint.load import CheckpointRemoved, load_checkpoint

    while (path := _nearest(checkpoints, facts)) is not None:
        try:
            return load_checkpoint(path)
        except CheckpointRemoved:  # by the run, which trains on
            continue
    return None


def _nearest(checkpoints: Path, facts: dict[str, Any]) -> Path | None:
    # A step that was skipped left the weights as they were; one whose loss was high did not.
    found = checkpoint_at(checkpoints, facts["step"] - 1 if facts["what"] == "spike" else facts["step"])
    if found is not None:
        return found[0]
    if facts["checkpoint"] is None:
        return None
    # There was one, which was removed for newer ones since: of those that are left the oldest is the nearest.
    whole = [folder for folder, manifest in commit.candidates(checkpoints) if isinstance(manifest, commit.Manifest)]
    return whole[-1] if whole else None


def _initial(run_dir: Path) -> tuple[NystromformerLM, Tokenizer]:
    from pretrain.config import load_config
    from pretrain.curriculum.stages import stage_model
    from pretrain.distributed import randomness
    from pretrain.initialize import load_initial
    from pretrain.model.transformer import build_model

    config = load_config(run_dir / "config.yaml")
    randomness.seed_everything(config.seed)
    model, tokenizer = build_model(stage_model(config, 0)), Tokenizer.load(run_dir / "tokenizer")
    if config.init_from is not None:
        load_initial(model, config, tokenizer, run_dir)
    return model, tokenizer


def compute(model: NystromformerLM, rows: Sequence[Row], targets: int) -> Iterator[Row]:
    """Each row with its loss, and with the norm of the gradient that it gave to a step of so many targets."""
    import torch

    from pretrain.model.attention.layout import Layout

    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    for row in rows:
        layout = None if row.document_ids is None else Layout.from_documents(row.document_ids[None])
        ids, labels = row.input_ids[None].to(device), row.labels[None].to(device)
        out = model(ids, labels=labels, layout=layout)
        gradients = torch.autograd.grad(out.loss_sum / max(targets, 1), parameters, allow_unused=True)
        norms = [g.double().norm() for g in gradients if g is not None]
        yield dataclasses.replace(
            row,
            loss=float(out.loss_sum.detach()) / max(int(out.num_targets), 1),
            grad_norm=float(torch.stack(norms).norm()),
        )


def findings(
    precision: str, rows: Sequence[Row], text: Callable[[Row], str], suspects: Sequence[str] = ()
) -> list[str]:
    """Lines about the rows: which are not finite, which of the others stand out (by :func:`bounds`), or that none is
    or does, and what is left to suspect then."""
    whole = [row for row in rows if row.is_finite]
    lines = [f"In {precision}:"]
    bad = [row for row in rows if not row.is_finite]
    if bad:
        lines.append(f"  {len(bad)} of {len(rows)} rows are not finite:")
        lines += _shown(bad, text)
    if whole:
        from pretrain.telemetry.spikes import bounds

        limits = bounds([row.loss for row in whole]), bounds([row.grad_norm for row in whole])
        lines.append(
            f"  of the {'others' if bad else 'rows'} the median loss is {limits[0].median:.4f}, the median gradient "
            f"norm {limits[1].median:.3g}"
        )
        high = [row for row in whole if row.loss > limits[0].limit or row.grad_norm > limits[1].limit]
        if high:
            lines.append(
                f"  {len(high)} of {len(rows)} rows stand out (a loss above {limits[0].limit:.4f}, or a norm above "
                f"{limits[1].limit:.3g}):"
            )
            lines += _shown(sorted(high, key=lambda row: -row.grad_norm), text)
        elif not bad:
            lines.append(f"  nothing is wrong with any of the {len(rows)} rows. What is left to suspect:")
            lines += [f"    {suspect}" for suspect in suspects]
    return lines


def _shown(rows: Sequence[Row], text: Callable[[Row], str]) -> list[str]:
    lines = []
    for row in rows[:ROWS_SHOWN]:
        lines.append(
            f"    sample {row.sample} (row {row.number} of process {row.process}): loss {row.loss:.4f}, gradient norm "
            f"{row.grad_norm:.3g}"
        )
        lines.append(f"      {text(row)}")
    if len(rows) > ROWS_SHOWN:
        lines.append(f"    and {len(rows) - ROWS_SHOWN} more")
    return lines


def excerpt(row: Row, tokenizer: Tokenizer, masked: bool) -> str:
    """The beginning of the row's text, masked tokens filled in, on one line."""
    ids = row.input_ids.where(row.labels == IGNORE, row.labels) if masked else row.input_ids
    text = tokenizer.decode(ids.tolist())
    return repr(text[:EXCERPT]) + (" ..." if len(text) > EXCERPT else "")


def _heading(folder: Path, facts: dict[str, Any], rows: int) -> str:
    what = {"spike": "its loss jumped", "loss": "its loss was not finite", "gradient": "its gradient was not finite"}
    return (
        f"{folder}: step {facts['step']}, {what[facts['what']]} ({facts['loss']}); {rows} rows of {facts['seq_len']} "
        f"tokens from process(es) {', '.join(map(str, facts['processes']))} of {facts['world_size']}; "
        f"{facts['precision']}, learning rate {facts['lr']:.3g}, loss scale {facts['loss_scale']:g}."
    )
