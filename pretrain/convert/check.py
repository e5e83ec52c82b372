"""A folder for transformers, loaded there before it is handed over: its logits beside those of the model."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError
from pretrain.convert.folder import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pretrain.checkpoint.load import LoadedModel

SCRIPT = Path(__file__).with_name("check_in_transformers.py")
LONGEST = 1024
"""Tokens of the longest row, at most: a check takes seconds."""
TOLERANCE = 1e-4
"""Of a logit. In every format the same operations run on the same weights, so that the difference is usually 0."""


def largest_difference(folder: Path, loaded: LoadedModel, dtype: str, lengths: Sequence[int]) -> float | None:
    """The largest difference of a logit over rows of these ``lengths``, padded; None where transformers is missing.

    It runs in a process of its own, which has a cache of its own for the folder's code. Raises :class:`UserError` if
    the folder does not load or differs by more than :data:`TOLERANCE`.
    """
    import torch
    from safetensors.torch import save_file

    from pretrain.model.attention.layout import Layout

    if importlib.util.find_spec("transformers") is None:
        return None
    config = loaded.model_config
    width = max(lengths)
    sizes = torch.tensor(lengths)[:, None]
    columns = torch.arange(width)
    real = columns >= width - sizes if config.objective == "clm" else columns < sizes
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size or 1, (len(lengths), width), generator=draw)
    to = getattr(torch, DTYPES[dtype])
    model = loaded.model.to(to)
    with torch.no_grad():
        logits = model(ids, layout=Layout.from_documents(torch.where(real, 0, -1))).logits[real]
    loaded.model.float()
    kind = "AutoModelForCausalLM" if config.objective == "clm" else "AutoModelForMaskedLM"
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / "expected.safetensors"
        save_file({"input_ids": ids, "attention_mask": real.long(), "logits": logits.contiguous()}, expected)
        env = {**os.environ, "HF_HOME": scratch, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        env.pop("PYTHONPATH", None)
        command = [sys.executable, "-P", str(SCRIPT), str(folder.resolve()), str(expected), kind]
        done = subprocess.run(command, env=env, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the folder does not load in transformers: {last}")
    difference = float(done.stdout.split()[-1])
    if not difference <= TOLERANCE:
        raise UserError(f"logits in transformers differ by {difference:.2g} from the model's, more than {TOLERANCE:g}")
    return difference


def some_lengths(loaded: LoadedModel, longest: int) -> list[int]:
    """Lengths to compare at: the longest in training, a middle one, a short one; none beyond learned positions."""
    config = loaded.model_config
    most = min(longest, LONGEST, config.max_positions if config.positions == "learned" else LONGEST)
    return sorted({most, max(most // 3, 1), min(most, 5)}, reverse=True)
