"""Commands that load PyTorch say so before they do: one process imports the program, and is forked for each command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_case import settings, write_config, write_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
SERVER = """
import importlib, json, os, sys
from launch import program
for name, _ in program.COMMANDS.values():
    importlib.import_module(name)
import pretrain.checks

class NoTorch:
    '''Ends the process where it would import PyTorch; what was printed by then is what a user sees meanwhile.'''
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "deepspeed", "transformers"):
            sys.stdout.flush()
            os._exit(42)

assert "torch" not in sys.modules
sys.meta_path.insert(0, NoTorch())
found = []
for words in json.load(sys.stdin):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1)
        os.dup2(write, 2)
        os._exit(program.main(words))
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    found.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text])
json.dump(found, sys.stdout)
"""
LOADING_TORCH = 42


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    write_corpus(folder)
    write_config(folder / "run.yaml", settings(folder, folder / "runs"))
    return folder


def first_lines(commands: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Of each command: how it ended, and what it had printed before it would have loaded PyTorch."""
    done = subprocess.run(
        [sys.executable, "-c", SERVER],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        check=True,
        timeout=300,
    )
    return [(code, said) for code, said in json.loads(done.stdout)]


def test_loading_is_said_before_it_begins(corpus: Path) -> None:
    checkpoint = str(corpus)
    (corpus / "export.json").write_text('{"weights_hash": "", "tokens": 0, "step": 0}')  # the rest is not looked at
    both, one = "loading PyTorch and DeepSpeed ...", "loading PyTorch ..."
    commands = {
        both: [["train", "--config", "run.yaml"]],
        one: [
            ["plan", "--config", "run.yaml"],
            ["init", "--data", "train", "--out", "new.yaml"],
            ["eval", "validity", "--checkpoint", checkpoint],
            ["eval", "validity", "--checkpoint", checkpoint, "--json"],
            ["generate", "--checkpoint", checkpoint, "--prompt", "x"],
            ["fill", "--checkpoint", checkpoint, "--text", "[MASK]"],
            ["convert", "to-hf", checkpoint, "hf"],
            ["convert", "to-onnx", checkpoint, "onnx"],
        ],
    }
    asked = [(line, words) for line, listed in commands.items() for words in listed]
    found = first_lines([words for _, words in asked], corpus)
    expected = [(words[:2], LOADING_TORCH, f"{line}\n") for line, words in asked]
    assert [(words[:2], *result) for (_, words), result in zip(asked, found, strict=True)] == expected
