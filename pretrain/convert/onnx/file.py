"""One ONNX file of an encoder, by PyTorch's exporter, without what that prints."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import UserError
from pretrain.convert.onnx.graph import TracedEncoder
from pretrain.model.transformer import NystromformerLM

OPSET = 20
"""The first with Gelu. With opset 23 the exporter writes its Attention, whose mask onnxruntime 1.32 does not broadcast
over the queries: such a file fails when it is run."""
EXTERNAL_BEYOND = 2**31 - 2**24
"""Bytes of weights that stay in the file itself: protobuf allows 2 GiB with the graph, the rest goes beside it."""
INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "logits")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Written:
    """What is in the file."""

    opset: int
    ir_version: int
    outputs: tuple[str, ...]
    size: int
    """Bytes, with those of the data beside it."""


def write_model(model: NystromformerLM, path: Path, *, dtype: str = "fp32", head: bool = True) -> Written:
    """Trace ``model`` and write it to ``path``, with ``path`` + ``.data`` beside it where it has more than 2 GB.

    dtype: of :data:`DTYPES`, what weights are stored and computed in. Raises :class:`UserError` if the model has no
    graph, or if the exporter fails.
    """
    import onnx

    kind = DTYPES[dtype]
    if kind != torch.float32:
        model = copy.deepcopy(model).to(kind)
    encoder = TracedEncoder(model, head=head).eval()
    outputs = OUTPUTS if head else OUTPUTS[:1]
    # The sizes are examples, and no constant of the model should be taken for one of them.
    ids = torch.zeros(3, 131, dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                encoder,
                (ids, torch.ones_like(ids)),
                input_names=INPUTS,
                output_names=outputs,
                dynamic_shapes=(sizes, sizes),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise UserError(
                f"the exporter of torch {torch.__version__} cannot trace attention: {model.config.attention_label}: "
                f"{reason}"
            ) from None
        assert program is not None
        _forget_sources(program.model)
        weights = sum(x.numel() * x.element_size() for x in {id(p): p for p in encoder.parameters()}.values())
        program.save(path, external_data=weights > EXTERNAL_BEYOND)
        onnx.checker.check_model(str(path))
    stored = onnx.load(str(path), load_external_data=False)
    opset = next(entry.version for entry in stored.opset_import if entry.domain in ("", "ai.onnx"))
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return Written(opset, stored.ir_version, outputs, size)


def _forget_sources(model: Any) -> None:
    """The exporter notes at every node which lines of which files it comes from, by absolute paths: none of the
    reader's business, and a fifth of a small file."""
    import onnx_ir as ir

    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed, logged or warned of within the block: the exporter does all three about its own matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)
