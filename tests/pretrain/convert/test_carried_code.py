"""The code that a folder carries: copies that need no project, for every form and objective."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from form_case import EVERY, config

from pretrain.convert.code import carried_code, file_name
from pretrain.model.config import ModelConfig

ALLOWED = {"torch", "transformers", "numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize(("attention", "objective"), EVERY)
def test_every_file_imports_what_is_there_and_nothing_of_the_project(attention: str, objective: str) -> None:
    files = carried_code(config(attention=attention, objective=objective))
    assert {"modeling_nystrom.py", "configuration_nystrom.py", "config.py"} <= set(files)
    for name, text in files.items():
        for node in ast.walk(ast.parse(text, name)):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= ALLOWED, name
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").partition(".")[0] in ALLOWED, name
            if isinstance(node, ast.ImportFrom) and node.level:
                # transformers follows `from .module import`, and only files beside each other.
                assert f"{node.module}.py" in files, f"{name} imports {node.module}"
        assert "TYPE_CHECKING:" not in text


def test_a_copy_is_the_module_but_for_its_imports() -> None:
    copy = carried_code(config())["attention_layout.py"]
    source = Path("pretrain/model/attention/layout.py")
    if not source.is_file():
        source = Path(importlib.util.find_spec("pretrain.model.attention.layout").origin)  # type: ignore
    assert copy.splitlines()[1:] == source.read_text(encoding="utf-8").splitlines()
    assert "pretrain.model.attention.layout" in copy.splitlines()[0]


def test_no_two_modules_get_one_name() -> None:
    assert file_name("pretrain.model.attention.forms.nystrom") == "attention_forms_nystrom.py"
    assert file_name("pretrain.model.attention.nystrom") == "attention_nystrom.py"
    assert file_name("pretrain.convert.carried.modeling_nystrom") == "modeling_nystrom.py"


def load(text: str) -> ModuleType:
    module = ModuleType("carried_config")
    exec(compile(text, "config.py", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_the_plain_configuration_has_the_defaults_checks_and_properties(objective: str) -> None:
    carried = load(carried_code(config())["config.py"]).ModelConfig
    ours = ModelConfig.model_validate({"objective": objective, "vocab_size": 9})
    theirs = carried(objective=objective, vocab_size=9)
    assert theirs.model_dump() == ours.model_dump()
    assert (theirs.head_dim, theirs.ffn_size) == (ours.head_dim, ours.ffn_size)
    gated = {
        "objective": objective,
        "vocab_size": 9,
        "ffn": "swiglu",
        "hidden_size": 104,
        "positions": ["rotary", "none"],
    }
    theirs, ours = carried(**gated), ModelConfig.model_validate(gated)
    assert theirs.ffn_size == ours.ffn_size == 288
    assert theirs.of_layer(1).positions == ours.of_layer(1).positions == "none"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "hidden_size 30 is not divisible by num_heads 4"),
        ({"hidden_sise": 30}, "hidden_sise"),
        ({"objective": "xlm"}, "xlm"),
    ],
)
def test_the_plain_configuration_refuses(values: dict[str, Any], said: str) -> None:
    carried = load(carried_code(config())["config.py"]).ModelConfig
    with pytest.raises(ValueError, match=said):
        carried(**values)
