"""The folder that ``nystrom convert to-onnx`` writes: the file, the tokenizer, and how they are used."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from pretrain.checkpoint.load import LoadedModel
    from pretrain.convert.onnx.check import Difference
    from pretrain.convert.onnx.file import Written

MODEL, CONFIG, README = "model.onnx", "config.json", "README.md"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Result:
    """What was written, and how it compares."""

    written: Written
    differences: Mapping[str, Difference]
    seconds: float
    """Of tracing and writing."""


def check_packages() -> None:
    """Raise :class:`UserError` if one of :data:`PACKAGES` is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"to-onnx needs {', '.join(missing)}: pip install 'nystrom-pretrain[onnx]'")


def check_free(out: Path) -> None:
    """Raise :class:`UserError` if ``out`` is there already and holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: name a new one, or remove it")


def write_folder(
    loaded: LoadedModel, out: Path, *, dtype: str = "fp32", head: bool = True, tolerance: float | None = None
) -> Result:
    """Write ``out``, and compare the file with the model before it gets that name.

    tolerance: the largest difference allowed, as a share of the largest value (default: that of ``dtype``). Raises
    :class:`UserError` if a package is missing, ``out`` is taken, the model has no graph, or the outputs differ; nothing
    is left behind then.
    """
    check_packages()
    check_free(out)
    from pretrain.convert.onnx.check import TOLERANCES, compare, open_session
    from pretrain.convert.onnx.file import write_model
    from pretrain.model.transformer import NystromformerLM

    model = loaded.model
    assert isinstance(model, NystromformerLM)
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    folder = out.with_name(f"{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir(parents=True)
        began = time.monotonic()
        written = write_model(model, folder / MODEL, dtype=dtype, head=head)
        seconds = time.monotonic() - began
        differences = compare(open_session(folder / MODEL), model, written.outputs)
        _check(differences, tolerance)
        loaded.tokenizer.save(folder)
        config = _config(loaded, dtype, written, differences, tolerance)
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (folder / README).write_text(_readme(loaded, dtype, written, differences), encoding="utf-8")
        os.replace(folder, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(written, differences, seconds)


def _check(differences: Mapping[str, Difference], tolerance: float) -> None:
    wrong = [
        f"{name} by {found.share:.1e} of the largest value ({found.where})"
        for name, found in differences.items()
        if not found.share <= tolerance
    ]
    if wrong:
        raise UserError(
            f"onnxruntime and the model differ in {' and '.join(wrong)}, and {tolerance:.0e} is allowed "
            "(--tolerance): nothing was written"
        )


def _config(
    loaded: LoadedModel, dtype: str, written: Written, differences: Mapping[str, Difference], tolerance: float
) -> dict[str, object]:
    tokenizer = loaded.tokenizer
    return {
        "format": "nystrom-onnx",
        "file": MODEL,
        "opset": written.opset,
        "ir_version": written.ir_version,
        "dtype": dtype,
        "inputs": {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]},
        "outputs": list(written.outputs),
        "vocab_size": loaded.model_config.vocab_size,
        "hidden_size": loaded.model_config.hidden_size,
        "longest": _longest(loaded),
        "pad_token_id": tokenizer.pad_id,
        "mask_token_id": tokenizer.mask_id,
        "weights_hash": loaded.weights_hash,
        "tokens_trained": loaded.tokens,
        "tolerance": tolerance,
        "differences": {name: asdict(found) for name, found in differences.items()},
        "model": loaded.model_config.model_dump(),
    }


def _longest(loaded: LoadedModel) -> int | None:
    config = loaded.model_config
    return config.max_positions if config.positions == "learned" else None


def _readme(loaded: LoadedModel, dtype: str, written: Written, differences: Mapping[str, Difference]) -> str:
    config = loaded.model_config
    longest = _longest(loaded)
    limit = f"at most {longest} tokens" if longest else "any number of tokens"
    compared = "\n".join(
        f"- `{name}`: {found.share:.1e} of the largest value ({found.absolute:.1e} absolute)."
        for name, found in differences.items()
    )
    return f"""# {loaded.run_config.name}: masked encoder in ONNX

`{MODEL}`: opset {written.opset}, IR version {written.ir_version}, weights in {dtype}, {written.size:,} bytes.

- Inputs, int64, of any batch size and length: `input_ids` and `attention_mask` (batch, sequence). The mask is 1 at
  tokens and 0 at padding, on the right or on the left. A text may have {limit}.
- Outputs, float32: {_outputs(config.hidden_size, config.vocab_size, written.outputs)}.
  What they hold at padding means nothing.

Largest difference between onnxruntime and the model it was made from, over batches of several sizes, lengths and
paddings:

{compared}

## Use

`pip install onnxruntime tokenizers`, then in this folder:

```python
{usage(loaded, written.outputs)}```
"""


def _outputs(hidden_size: int, vocab_size: int | None, outputs: tuple[str, ...]) -> str:
    shapes = {"last_hidden_state": hidden_size, "logits": vocab_size}
    return " and ".join(f"`{name}` (batch, sequence, {shapes[name]})" for name in outputs)


def usage(loaded: LoadedModel, outputs: tuple[str, ...]) -> str:
    """Lines of Python that use the folder from within it; they need numpy, onnxruntime and tokenizers."""
    pad = loaded.tokenizer.pad_id
    return f"""import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_padding(pad_id={pad}, pad_token=tokenizer.id_to_token({pad}))
session = onnxruntime.InferenceSession("{MODEL}", providers=["CPUExecutionProvider"])

texts = ["A short text.", "Another text, which has a few more words than the first."]
encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
inputs = {{
    "input_ids": np.array([e.ids for e in encoded], dtype=np.int64),
    "attention_mask": np.array([e.attention_mask for e in encoded], dtype=np.int64),
}}
(hidden,) = session.run(["last_hidden_state"], inputs)

mask = inputs["attention_mask"][:, :, None]
embeddings = (hidden * mask).sum(axis=1) / mask.sum(axis=1)  # mean over each text's own tokens
print(embeddings.shape)
{_fill(loaded) if "logits" in outputs else ""}"""


def _fill(loaded: LoadedModel) -> str:
    mask = loaded.tokenizer.mask_id
    if mask is None:
        return ""
    return f"""
before, after = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("A short", " text."))
ids = np.array([[*before, {mask}, *after]], dtype=np.int64)
(logits,) = session.run(["logits"], {{"input_ids": ids, "attention_mask": np.ones_like(ids)}})
best = np.argsort(-logits[0, ids[0].tolist().index({mask})])[:5]
print([tokenizer.decode([i]) for i in best])  # the likeliest words between the two
"""
