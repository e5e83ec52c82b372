"""Is a folder fit to be published: whole, of files that belong there, none of which runs code when it is read?

What a folder of ``nystrom convert to-hf`` consists of: ``config.json``, the card, safetensors (one file, or shards with
their index), the tokenizer, and the model's code where it has its own. Folders of sentence-transformers and ONNX files
beside it belong too.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from data_pipeline.errors import UserError
from data_pipeline.files import TMP_SUFFIX
from pretrain.convert.names import CARD, GATE_TAGS, UNKNOWN

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
BELONGING = ("*.json", "*.safetensors", "*.py", "*.md", "*.txt", "*.jinja", "*.onnx", "*.onnx_data", "*.onnx.data",
             "LICENSE*", "LICENCE*", "NOTICE*", ".gitattributes")  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".model", ".cp")
MOST_NAMED = 6
"""Problems that one message names."""


@dataclass(frozen=True)
class HubFolder:
    """A folder that was checked."""

    path: Path
    files: tuple[tuple[str, int], ...]  # name with slashes, bytes; sorted
    passed: bool | None  # the validity gate, as the card says; None if it has not looked, or the card does not say
    licence: str

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(size for _, size in self.files)


def open_folder(path: Path) -> HubFolder:
    """Check ``path``; raises :class:`UserError` with all that is wrong with it, on one line."""
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a folder that `nystrom convert to-hf` wrote")
    from pretrain.checkpoint.load import INFO

    kind = "an export" if (path / INFO).is_file() else "a run" if (path / "checkpoints").is_dir() else ""
    if kind:
        raise UserError(
            f"{path} is {kind} of nystrom, which other libraries cannot load: make a folder of it with "
            "`nystrom convert to-hf`, and push that"
        )
    problems: list[str] = []
    files = dict(_files(path, problems))
    problems += [f"there is no {name} ({what})" for name, what in _missing(path, files)]
    metadata = _metadata(path, files, problems)
    problems += _config_problems(path, files)
    problems += _weight_problems(path, files)
    if problems:
        more = f" (and {len(problems) - MOST_NAMED} more)" if len(problems) > MOST_NAMED else ""
        raise UserError(f"{path} cannot be pushed: {'; '.join(problems[:MOST_NAMED])}{more}")
    tags = metadata.get("tags")
    tags = tags if isinstance(tags, list) else [tags]
    # A failure counts, whatever else a card that was edited says.
    passed = next((verdict for verdict in (False, True) if GATE_TAGS[verdict] in tags), None)
    return HubFolder(path, tuple(sorted(files.items())), passed, str(metadata.get("license", UNKNOWN)))


def _files(folder: Path, problems: list[str]) -> Iterator[tuple[str, int]]:
    """The files by name with their sizes; what does not belong goes into ``problems``."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            problems.append(f"{name} is a link")
        elif path.is_file():
            why = _why_not(path, name)
            if why:
                problems.append(f"{name} {why}")
            else:
                yield name, path.stat().st_size


def _why_not(path: Path, name: str) -> str:
    """Why a file does not belong in a published folder, as the rest of a sentence; "" if it does."""
    parts, suffix = PurePosixPath(name).parts, path.suffix.lower()
    if suffix in PICKLES:
        return "can hold a pickle, which runs code when it is read: only safetensors are pushed"
    if path.name.endswith((TMP_SUFFIX, ".tmp", ".lock", ".incomplete", "~")) or "__pycache__" in parts:
        return "is a leftover: remove it"
    hidden = any(part.startswith(".") for part in parts) and name != ".gitattributes"
    if hidden or not any(fnmatchcase(path.name, pattern) for pattern in BELONGING):
        return "does not belong to a model's folder: remove it"
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        # Protocols 2 to 5 of pickle, and the archive that torch.save writes.
        if suffix != ".safetensors" and (
            start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5")
        ):
            return "holds a pickle or an archive, whatever its name says"
        if suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif suffix == ".py":
            ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except (ValueError, SyntaxError):
        return "is damaged: its contents are not " + ("JSON" if suffix == ".json" else "Python")
    return ""


def _missing(folder: Path, files: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Files that a folder must have and that are not even there in a bad state, each with what it is."""
    for name, what in ((CONFIG, "the configuration"), (CARD, "the model card"), (TOKENIZER, "the tokenizer")):
        if name not in files and not (folder / name).exists():
            yield name, what
    if WEIGHTS not in files and not (folder / INDEX).exists():
        yield WEIGHTS, "the weights"


def _metadata(folder: Path, files: dict[str, int], problems: list[str]) -> dict[str, Any]:
    """The front matter of the card."""
    if CARD not in files:
        return {}
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        found = yaml.safe_load(text[4 : text.index("\n---", 3)]) if text.startswith("---\n") else None
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        problems.append(f"{CARD} has no metadata between two lines of ---")
        return {}
    return found


def _config_problems(folder: Path, files: dict[str, int]) -> Iterator[str]:
    """That ``config.json`` is one of a model, and that the code that it names is there."""
    if CONFIG not in files:
        return
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not ({"model_type", "architectures"} & set(config)):
        yield f"{CONFIG} names no model"
        return
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict):
        yield f"{CONFIG} has an auto_map that names no code"
        return
    for target in auto_map.values():
        for name in target if isinstance(target, list) else [target]:
            # REPO--MODULE.CLASS is code of another repository.
            module = str(name).split(".")[0] + ".py"
            if name and "--" not in str(name) and module not in files:
                yield f"{CONFIG} names code in {module}, which is not there"
    for name in files:
        if name.endswith(".py"):
            yield from _import_problems(folder, name, files)


def _import_problems(folder: Path, name: str, files: dict[str, int]) -> Iterator[str]:
    """Modules beside a file that it imports (``from .x import y``) and that are not there."""
    parent = PurePosixPath(name).parent
    for node in ast.walk(ast.parse((folder / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            module = (parent / node.module.replace(".", "/")).as_posix()
            if f"{module}.py" not in files and f"{module}/__init__.py" not in files:
                yield f"{name} imports {module}.py, which is not there"


def _weight_problems(folder: Path, files: dict[str, int]) -> Iterator[str]:
    """That every safetensors file is whole, and that an index and the shards agree."""
    tensors: dict[str, set[str]] = {}
    for name in files:
        if name.endswith(".safetensors"):
            try:
                tensors[name] = _tensors(folder / name)
            except ValueError as error:
                yield f"{name} is damaged: {error}"
                tensors[name] = set()
    if WEIGHTS in files and not tensors[WEIGHTS]:
        yield f"{WEIGHTS} holds no tensor"
    if INDEX not in files:
        loose = [name for name in tensors if "/" not in name and name != WEIGHTS]
        if loose:
            yield f"{loose[0]} is in no index"
        return
    if WEIGHTS in files:
        yield f"there are both {WEIGHTS} and {INDEX}: a reader takes the first and leaves the shards out"
        return
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        yield f"{INDEX} has no weight_map"
        return
    for shard in sorted(set(placed.values()) | {name for name in tensors if "/" not in name}):
        if shard not in tensors:
            yield f"there is no {shard}, which {INDEX} names"
            continue
        wanted = {tensor for tensor, place in placed.items() if place == shard}
        if not wanted:
            yield f"{shard} is in no index"
        elif tensors[shard] and wanted != tensors[shard]:
            odd = sorted(wanted ^ tensors[shard])[0]
            yield f"{INDEX} and {shard} do not agree on {odd}"


def _tensors(path: Path) -> set[str]:
    """The names in a safetensors file whose header and size agree; raises ``ValueError``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(" ".join(str(error).split())) from None
