"""The JSON schema of a run's YAML, for editors: types, bounds, choices and meanings of all keys, unknown keys refused.

Pydantic makes it from the typed configuration, and what an editor would stumble over is put right here:

- References are replaced by what they stand for, and the keywords are those of draft 7, which all editors know.
- Names that a registry has are listed. What holds where a key is left out stands in its description.
- Editors read YAML 1.2, where ``1_000_000`` is text, and we read YAML 1.1, where ``2e-3`` is. A run takes both as
  numbers, so the schema does too: a number may be text that is written as one.

Contradictions between keys (a length that does not divide the block) are found by ``nystrom config --config`` only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pretrain.config.run import RunConfig
from pretrain.model.attention.registry import FORMS
from pretrain.model.config import BY_LAYER, POSITIONS
from pretrain.model.feed_forward import FEED_FORWARDS
from pretrain.model.norms import NORMS
from pretrain.optim.kind import KINDS

TITLE = "Configuration of a nystrom run"
DRAFT = "http://json-schema.org/draft-07/schema#"
DIGITS = r"[0-9][0-9_]*"
WRITTEN = {
    "integer": rf"{DIGITS}$",
    "number": rf"({DIGITS}(\.[0-9_]*)?|\.{DIGITS})([eE][-+]?[0-9]+)?$",
}
"""How a number may be written as text, after a sign."""


def run_schema() -> dict[str, Any]:
    """The schema as plain values for ``json.dumps``."""
    raw = RunConfig.model_json_schema()
    blocks = raw.pop("$defs")
    schema = _plain(raw, blocks)
    properties = schema["properties"]
    model = properties["model"]["properties"]
    _pattern_choices(model["attention"], FORMS.names(), FORMS.names())
    _pattern_choices(model["positions"], POSITIONS, BY_LAYER)
    _name_choices(model["ffn"], tuple(FEED_FORWARDS))
    _name_choices(model["norm_kind"], tuple(NORMS))
    _name_choices(properties["optimizer"]["properties"]["kind"], KINDS.names())
    # What the configuration fills in or rewrites before it checks.
    inverse = model["landmark_inverse"]
    inverse["type"] = [inverse["type"], "null"]
    properties["model"]["required"] = [n for n in properties["model"].get("required", ()) if n != "landmark_inverse"]
    callbacks = properties["callbacks"]
    short = callbacks["items"]["properties"]["call"]
    callbacks["items"] = {"anyOf": [{"type": "string", "pattern": short["pattern"]}, callbacks["items"]]}
    return {"$schema": DRAFT, "title": TITLE, **schema}


def schema_text() -> str:
    """The schema as the text of a file."""
    return json.dumps(run_schema(), indent=1, ensure_ascii=False) + "\n"


def _name_choices(node: dict[str, Any], names: tuple[str, ...]) -> None:
    node.update({"type": "string", "enum": list(names)})


def _pattern_choices(node: dict[str, Any], alone: Sequence[str], by_layer: Sequence[str]) -> None:
    """One name, or a pattern of names by layer."""
    one, each = ({"type": "string", "enum": list(names)} for names in (alone, by_layer))
    node["anyOf"] = [one, {"type": "array", "items": each, "minItems": 1}]
    node.pop("type", None)


def _plain(node: Any, blocks: dict[str, Any]) -> Any:
    """A node without references, titles and keywords that only some editors know."""
    if isinstance(node, list):
        return [_plain(item, blocks) for item in node]
    if not isinstance(node, dict):
        return node
    node = dict(node)
    if "$ref" in node:  # what stands beside the reference is about this key and wins
        node = {**blocks[node.pop("$ref").rpartition("/")[2]], **node}
    if "properties" in node:
        node.pop("default", None)  # an editor would write the whole block into the file
        node["properties"] = {name: _plain(inner, blocks) for name, inner in node["properties"].items()}
        rest = {key: value for key, value in node.items() if key != "properties"}
        return {**_cleaned(rest, blocks), "properties": node["properties"]}
    return _cleaned(node, blocks)


def _cleaned(node: dict[str, Any], blocks: dict[str, Any]) -> dict[str, Any]:
    node.pop("title", None)
    words = node.pop("left_out", None)
    if words is not None:
        node.pop("default", None)
        node["description"] = f"{node.get('description', '')} If left out: {words}.".lstrip()
    elif "description" in node:
        node["description"] = " ".join(node["description"].split())
    if "prefixItems" in node:
        node["items"] = node.pop("prefixItems")[0]  # lists of a fixed length hold alike things
    node = {key: value if key in ("default", "enum") else _plain(value, blocks) for key, value in node.items()}
    return _number_as_text(node)


def _number_as_text(node: dict[str, Any]) -> dict[str, Any]:
    """A number that may be written as text too; bounds hold for numbers only, except for the sign."""
    kind = node.get("type")
    if kind not in WRITTEN or "enum" in node:
        return node
    least = node.get("minimum", node.get("exclusiveMinimum", -1))
    sign = r"^\+?" if least >= 0 else r"^[-+]?"
    return {**node, "type": [kind, "string"], "pattern": sign + WRITTEN[kind]}
