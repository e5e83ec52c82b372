"""Folders that ``nystrom convert to-hf`` wrote with the model's own code, fine-tuned since or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_pipeline.configuration import faults
from data_pipeline.errors import UserError
from pretrain.convert.facts import FACTS, read_facts
from pretrain.convert.own import MODEL_TYPE, to_ours
from pretrain.convert.source import SOURCES, Converted, Source
from pretrain.convert.tensor_files import read_tensors
from pretrain.convert.tensor_names import DECODER
from pretrain.convert.their_config import CONFIG, model_type, read_json
from pretrain.model.config import ModelConfig

TASK_HEAD = "classifier."


@SOURCES.register
class Own(Source):
    """The way back, to the bit in float32."""

    name = "own"
    description = "a folder of `nystrom convert to-hf`"

    def matches(self, path: Path) -> bool:
        """By ``model_type``."""
        return path.is_dir() and model_type(path) == MODEL_TYPE

    def read(self, path: Path) -> Converted:
        """See :meth:`Source.read`."""
        from pretrain.checkpoint.load import weights_hash
        from pretrain.config import parse_config
        from pretrain.convert.taking import Taking

        config = _network(path / CONFIG)
        found = read_facts(path)
        taking = Taking(to_ours(read_tensors(path)), config, str(path))
        has_head = any(name.startswith("head.") for name in taking.there)
        for name in taking.wanted:
            if has_head or not name.startswith("head."):
                taking.take(name, name)
        if config.tie_embeddings and DECODER in taking.there:
            taking.leave(DECODER, "the word table, which the head shares")
        taking.finish(lambda name: "the head of another task" if name.startswith(TASK_HEAD) else "")
        notes: list[str] = []
        if found is None:
            notes.append(f"there is no {FACTS}: the run and its tokens are not known")
            return taking.converted(config, path, config.max_positions, notes)
        if weights_hash(taking.weights) != found["weights_hash"]:
            notes.append("the weights are not those of the run in float32: rounded to 16 bits, or trained since")
        run = parse_config(found["run"], where=str(path / FACTS))
        return taking.converted(config, path, config.max_positions, notes, tokens=int(found["tokens"]), run=run)


def _network(file: Path) -> ModelConfig:
    body = read_json(file)
    values: Any = body.get("network")
    if not isinstance(values, dict):
        raise UserError(f"{file} has no block `network`: it is not as `nystrom convert to-hf` wrote it")
    try:
        return ModelConfig.model_validate({**values, "vocab_size": body.get("vocab_size", values.get("vocab_size"))})
    except ValidationError as error:
        raise UserError(f"{file}: {'; '.join(faults(error, ModelConfig))}") from None
