"""What a run of a configuration needs of the hosts: its shards, room for checkpoints, its precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from launch.doctor.findings import Finding, problem, warning

if TYPE_CHECKING:
    from pretrain.config import RunConfig

GIB = 1 << 30
SAVE_SECONDS = 300.0
"""A save longer than that is said: training waits for it."""
SLOW_WRITE = 50e6
"""Bytes/s: a disk of ten years ago, or a network folder that many write to."""


def read_needs(config: RunConfig, processes: int) -> dict[str, Any]:
    """What this host says of the run: ``errors``, ``fingerprint`` of its text, and the bytes of a checkpoint."""
    from pretrain.curriculum.plan import build_plan, check_world_size
    from pretrain.curriculum.stages import stage_model
    from pretrain.planning.estimate import checkpoint_bytes, parameters_by_part
    from pretrain.sources import check_sample, fingerprint, open_sources

    out: dict[str, Any] = {"errors": [], "fingerprint": None, "checkpoint": None}
    vocabulary = config.model.vocab_size
    try:
        plan = build_plan(config)
        check_world_size(plan, processes)
    except UserError as error:
        out["errors"].append(str(error))
        return out
    try:
        data = open_sources(config, plan)
        for blocks in data.blocks:
            check_sample(blocks.shards)
        out["fingerprint"] = str(fingerprint(config, plan, data))
        vocabulary = vocabulary or data.shards.vocab_size
    except (UserError, OSError) as error:
        out["errors"].append(str(error))
    if vocabulary is not None:
        from pretrain.precision import resolve_for_plan

        model = config.model.model_copy(update={"vocab_size": vocabulary})
        planned = resolve_for_plan(config.model_copy(update={"model": model}), on_gpu=_on_gpu()).config
        parameters = sum(parameters_by_part(stage_model(planned, 0)).values())
        out["checkpoint"] = checkpoint_bytes(planned, parameters, processes)
    return out


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def check_needs(
    config: RunConfig, needs: Mapping[str, Mapping[str, Any]], ratios: Mapping[str, float]
) -> Iterator[Finding]:
    """Findings of :func:`read_needs` by host, and of the precision. ``ratios``: bf16's speed to float32's."""
    for host, each in needs.items():
        for error in each["errors"]:
            yield problem("run", host, error, "see `nystrom plan` and `nystrom data verify`")
    prints = {each["fingerprint"] for each in needs.values() if each["fingerprint"]}
    if len(prints) > 1:
        first = next(iter(needs.values()))["fingerprint"]
        for host, each in needs.items():
            if each["fingerprint"] not in (None, first):
                yield problem(
                    "run", host, "its shards are others than those of the first host", "copy them anew, or share them"
                )
    for host, ratio in ratios.items():
        if config.precision == "bf16" and ratio < 1:
            yield warning(
                "precision",
                host,
                f"precision is bf16, which its processor multiplies at {ratio:.2g} of float32's speed",
                "--set precision=fp32, or auto",
            )
    if config.precision == "fp16" and not _on_gpu():
        yield warning("precision", next(iter(needs)), "precision is fp16, and there is no GPU", "--set precision=auto")


def check_folders(folders: Sequence[Mapping[str, Any]], checkpoint: int | None, kept: int) -> Iterator[Finding]:
    """Each with ``host``, ``role`` (run, shards), ``asked``, ``path``, ``free``, ``speed`` or ``error``.

    ``checkpoint``: bytes of one, None where there is no configuration; ``kept``: how many are kept besides.
    """
    from pretrain.checkpoint.store import with_margin

    for each in folders:
        host, path = each["host"], each["path"]
        if "error" in each:
            verb = "read" if each["role"] == "shards" else "written"
            remedy = "mount it there, or correct its permissions" if verb == "read" else "mend its permissions"
            yield problem("folder", host, f"{each['asked']} cannot be {verb}: {each['error']} ({path})", remedy)
            continue
        if each["role"] != "run":
            continue
        free, speed = each["free"], each["speed"]
        if checkpoint is not None and free is not None:
            if free < with_margin(checkpoint):
                yield problem(
                    "disk",
                    host,
                    f"{path} has {free / GIB:.2f} GiB free; a checkpoint needs {with_margin(checkpoint) / GIB:.2f}",
                    "make room, or name another output_dir",
                )
            elif free < with_margin(checkpoint * (kept + 1)):
                yield warning(
                    "disk",
                    host,
                    f"{path} has {free / GIB:.2f} GiB free: {kept} checkpoints are kept and one is written, "
                    f"{checkpoint / GIB:.2f} GiB each",
                    "make room, or lower checkpoint.keep_last",
                )
        elif free is not None and free < GIB:
            yield warning("disk", host, f"{path} has {free / GIB:.2f} GiB free", "make room")
        if checkpoint is not None and checkpoint / speed > SAVE_SECONDS:
            yield warning(
                "disk",
                host,
                f"a checkpoint of {checkpoint / GIB:.1f} GiB takes {checkpoint / speed:.0f} s there",
                "name a faster output_dir, or save less often",
            )
        elif speed < SLOW_WRITE:
            yield warning(
                "disk",
                host,
                f"{path} takes {speed / 1e6:.1f} MB/s (with fsync)",
                "name a faster output_dir, or accept it",
            )


def folders_of(config: RunConfig | None, run_dir: Path | None) -> list[tuple[str, Path]]:
    """Role and path of the folders to look at: the run folder (the working directory by default), then the shards."""
    run = run_dir or (config.run_dir if config is not None else Path.cwd())
    shards = [] if config is None else [Path(source.path) for source in config.data.sources]
    if config is not None and config.data.valid is not None:
        shards.append(Path(config.data.valid))
    return [("run", run), *(("shards", path) for path in dict.fromkeys(shards))]
