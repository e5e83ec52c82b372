"""The code that a folder for transformers carries: this project's own modules, copied so that they need no project.

A folder with weights of an attention that transformers does not have needs code beside it. It is not written a second
time: beginning with the classes in :mod:`pretrain.convert.carried`, every module that they import is copied, and its
imports of the project become relative. Some modules are replaced, because what they import is no part of the network:

* the configuration, which is pydantic's here and a plain class there, made of the same keys, checks and properties;
* the registry of forms, which looks for modules here and knows the forms of the model there;
* errors and constants of ``data_pipeline``.

The copy needs torch and transformers (which brings numpy). Blocks under ``TYPE_CHECKING`` are left out.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from pprint import pformat
from typing import TYPE_CHECKING, Any

from pretrain.model.attention.registry import forms_of
from pretrain.model.config import ModelConfig
from pretrain.model.feed_forward import GATED, default_width

if TYPE_CHECKING:
    from pretrain.model.attention.form import Form

CARRIED = "pretrain.convert.carried."
ROOT = CARRIED + "modeling_nystrom"
CONFIGURATION = CARRIED + "configuration_nystrom"
CONFIG, REGISTRY = "pretrain.model.config", "pretrain.model.attention.registry"
PATTERN = "pretrain.model.attention.pattern"
"""Its functions are copied into the configuration, which so stays one file that needs no other."""
_FOLDERS = ("data_pipeline", "pretrain")
_PREFIXES = (CARRIED, "pretrain.model.", "data_pipeline.")
"""Left out of the names of copies: pretrain.model.attention.ring is attention_ring.py there."""
_FINGERPRINT = '''
CODE = "{}"
"""Of all files here. transformers finds the model's class by that of the configuration: two folders of unlike code that
are loaded in one process must not share it.
"""
'''
_ERRORS = '''"""The one exception of the model: something that the caller can mend."""


class UserError(ValueError):
    """The message says what was wrong and what to do."""
'''


def carried_code(config: ModelConfig) -> dict[str, str]:
    """The files of the code for a model of this configuration: text by name."""
    replaced = {
        CONFIG: _config_source(),
        REGISTRY: _registry_source(forms_of(config)),
        "data_pipeline.errors": _ERRORS,
    }
    files: dict[str, str] = {}
    waiting = [ROOT]
    while waiting:
        module = waiting.pop()
        name = file_name(module)
        if name in files:
            continue
        files[name], needed = _relative(replaced.get(module) or _source(module), module)
        waiting += needed
    digest = hashlib.sha256("".join(name + text for name, text in sorted(files.items())).encode()).hexdigest()
    files[file_name(CONFIGURATION)] += _FINGERPRINT.format(digest)
    return dict(sorted(files.items()))


def file_name(module: str) -> str:
    """The name of a module's copy."""
    short = next((module.removeprefix(prefix) for prefix in _PREFIXES if module.startswith(prefix)), module)
    return short.replace(".", "_") + ".py"


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module} is imported by code that a folder carries, and is not there")
    return Path(spec.origin).read_text(encoding="utf-8")


def _relative(source: str, module: str) -> tuple[str, list[str]]:
    """The text of a copy, and the modules of the project that it imports."""
    lines = source.splitlines()
    needed = []
    for node in _statements(ast.parse(source)):
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
        if isinstance(node, ast.If):
            lines[first:last] = [""] * (last - first)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _FOLDERS:
            assert node.module is not None
            needed.append(node.module)
            names = ", ".join(ast.unparse(alias) for alias in node.names)
            text = f"{indent}from .{file_name(node.module).removesuffix('.py')} import {names}"
            lines[first:last] = [text] + [""] * (last - first - 1)
        elif isinstance(node, ast.Import) and any(a.name.partition(".")[0] in _FOLDERS for a in node.names):
            raise ValueError(f"{module} line {node.lineno}: code that a folder carries imports by `from`")
    head = f"# Copied from {module} of nystrom-pretrain (Apache-2.0) by `nystrom convert to-hf`; change it there."
    return head + "\n" + "\n".join(lines).rstrip() + "\n", needed


def _statements(tree: ast.AST) -> Iterator[Any]:
    """Imports wherever they are, and blocks for type checkers without what is in them."""
    for child in ast.iter_child_nodes(tree):
        if (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING") or isinstance(
            child, (ast.Import, ast.ImportFrom)
        ):
            yield child
        else:
            yield from _statements(child)


def _registry_source(forms: Mapping[str, Form]) -> str:
    kinds = {name: type(form) for name, form in forms.items()}
    imports = "\n    ".join(f"from {kind.__module__} import {kind.__name__}" for kind in kinds.values())
    known = ", ".join(f'"{name}": {kind.__name__}' for name, kind in kinds.items())
    names = ", ".join(f"'{name}'" for name in kinds)
    return f'''"""The forms of attention that this model has."""

from __future__ import annotations

from typing import Any


class _Forms:
    def register(self, member: Any) -> Any:
        return member


FORMS = _Forms()


def form_of(config: Any) -> Any:
    """The form of a layer with this configuration."""
    return _kind(config.attention)(config)


def forms_of(config: Any) -> dict[str, Any]:
    """The forms that a model's layers have, by name, in the order of their first layers."""
    return {{name: _kind(name)(config) for name in dict.fromkeys(config.attention_by_layer)}}


def _kind(name: Any) -> Any:
    # Not at the top: these modules import this one.
    {imports}

    kinds = {{{known}}}
    if name not in kinds:
        raise ValueError(f"attention {{name!r}}: the code beside these weights has {names} alone")
    return kinds[name]
'''


def _config_source() -> str:
    """``ModelConfig`` as a plain class: its keys and defaults, and the source of its checks and properties."""
    source = _source(CONFIG)
    tree = ast.parse(source)
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == ModelConfig.__name__).body
    methods = [n for n in body if isinstance(n, ast.FunctionDef)]
    properties = [n for n in methods if any(ast.unparse(d) == "property" for d in n.decorator_list)]
    checks = [n for n in methods if any(ast.unparse(d) == "model_validator(mode='after')" for d in n.decorator_list)]
    plain = [n for n in methods if not n.decorator_list]
    defaults = {o: ModelConfig.model_validate({"objective": o}).model_dump() for o in ("mlm", "clm")}
    lines = source.splitlines()
    code = "\n\n".join(
        "\n".join(["    @property"] * (n in properties) + lines[n.lineno - 1 : n.end_lineno])
        for n in [*checks, *properties, *plain]
    )
    calls = "\n".join(f"        self.{n.name}()" for n in checks)
    pattern = _source(PATTERN)
    functions = [n for n in ast.parse(pattern).body if isinstance(n, ast.FunctionDef) and n.name != "shortest"]
    copies = ["\n".join(pattern.splitlines()[n.lineno - 1 : n.end_lineno]) for n in functions]
    helpers = "\n\n\n".join([*copies, inspect.getsource(default_width).rstrip()])
    return f'''"""The typed description of the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

GATED = {GATED}

DEFAULTS: dict[str, dict[str, Any]] = {pformat(defaults, width=110, sort_dicts=False)}


class ModelConfig:
    """A Nyströmformer: a masked encoder (``objective: mlm``) or a causal decoder (``objective: clm``)."""

    model_fields = DEFAULTS["mlm"]

    def __init__(self, **values: Any) -> None:
        """Raises ValueError for unknown keys and for values that do not fit together."""
        unknown = sorted(set(values) - set(self.model_fields))
        if unknown or values.get("objective", "mlm") not in DEFAULTS:
            raise ValueError(f"unknown keys {{unknown}} or objective {{values.get('objective')!r}}")
        self.__dict__.update({{**DEFAULTS[values.get("objective", "mlm")], **values}})
{calls}

    def model_dump(self) -> dict[str, Any]:
        """All keys and values."""
        return {{name: getattr(self, name) for name in self.model_fields}}

    def model_copy(self, update: dict[str, Any]) -> ModelConfig:
        """The same with other values."""
        return ModelConfig(**{{**self.model_dump(), **update}})

{code}


{helpers}
'''
