"""``nystrom push``: what arrives is the folder to the byte, what should not be is refused, errors are one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_case import READER, WRITER, Hub, Repo, serve, use
from huggingface_hub.utils import close_session
from safetensors.numpy import save_file

from launch import program
from pretrain.convert.hub_folder import open_folder

REPO = "someone/tiny"
CARD = "---\nlicense: {licence}\ntags:\n- validity-gate-{gate}\n---\n\n# tiny\n"


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"a.weight": rng.random((8, 4), dtype=np.float32), "b.weight": rng.random((3,), dtype=np.float32)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What ``nystrom convert to-hf`` writes, in small."""
    place = tmp_path / "tiny"
    place.mkdir()
    auto_map = {"AutoModelForMaskedLM": "modeling_tiny.Tiny", "AutoTokenizer": ["elsewhere--x.Y", None]}
    (place / "config.json").write_text(json.dumps({"model_type": "tiny", "auto_map": auto_map}))
    (place / "modeling_tiny.py").write_text("from .layers_tiny import Layer\n\nTiny = Layer\n")
    (place / "layers_tiny.py").write_text("class Layer: ...\n")
    (place / "tokenizer.json").write_text('{"version": "1.0", "ü": 1}', encoding="utf-8")
    (place / "README.md").write_text(CARD.format(licence="mit", gate="passed"))
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text("{}")
    save_file(tensors(), place / "model.safetensors")
    return place


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    use(monkeypatch, tmp_path)
    with serve() as found:
        yield found
        close_session()  # its threads end with its connections


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def push(hub: Hub, folder: Path, *words: str, repo: str = REPO) -> int:
    return program.main(["push", str(folder), repo, "--endpoint", hub.url, *words])


def refused(capsys: pytest.CaptureFixture[str], hub: Hub, folder: Path, *words: str, repo: str = REPO) -> str:
    """The one line that the command ends with."""
    assert push(hub, folder, *words, repo=repo) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said
    assert said.startswith("nystrom push: error: ")
    return said


def shard(folder: Path) -> None:
    """The same weights in two files with an index."""
    (folder / "model.safetensors").unlink()
    names = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    for name, place in names.items():
        save_file({name: tensors()[name]}, folder / place)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_what_arrives_is_the_folder_to_the_byte(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(hub, folder) == 0
    said = capsys.readouterr().out
    assert hub.repos[REPO].private
    assert hub.files(REPO) == {".gitattributes": b"*.safetensors filter=lfs\n", **contents(folder)}
    assert hub.commits(REPO) == ["initial commit", "Upload tiny with nystrom"]
    assert hub.received == (folder / "model.safetensors").stat().st_size
    assert f"pushed 7 files, {sum(map(len, contents(folder).values()))} bytes, to {REPO} (private): {hub.url}" in said


def test_a_second_push_changes_nothing(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(hub, folder, "--message", "first")
    received = hub.received
    capsys.readouterr()
    assert push(hub, folder) == 0
    said = capsys.readouterr()
    assert "nothing to do: someone/tiny (private) already holds these files, at commit " in said.out
    assert said.err == ""
    assert hub.commits(REPO) == ["initial commit", "first"]
    assert hub.received == received


def test_a_change_is_one_commit_without_what_the_folder_has_lost(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(hub, folder)
    stored = hub.files(REPO)
    stored |= {"pytorch_model.bin": b"old", "notes.txt": b"mine", "sub/x.json": b"{}"}
    shard(folder)
    (folder / "layers_tiny.py").unlink()
    (folder / "modeling_tiny.py").write_text("class Tiny: ...\n")
    assert push(hub, folder) == 0
    kept = {".gitattributes": b"*.safetensors filter=lfs\n", "notes.txt": b"mine", "sub/x.json": b"{}"}
    assert hub.files(REPO) == {**kept, **contents(folder)}
    assert len(hub.commits(REPO)) == 3
    assert "removed from there: layers_tiny.py, model.safetensors, pytorch_model.bin" in capsys.readouterr().out


def test_a_download_gives_the_folder_back(hub: Hub, folder: Path, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    push(hub, folder)
    got = Path(snapshot_download(REPO, endpoint=hub.url, token=READER, local_dir=tmp_path / "got"))
    shutil.rmtree(got / ".cache")
    (got / ".gitattributes").unlink()
    assert contents(got) == contents(folder)
    assert open_folder(got).files == open_folder(folder).files


def test_a_branch_is_made_if_it_is_not_there(hub: Hub, folder: Path) -> None:
    for message in ("first", "second"):
        (folder / "tokenizer.json").write_text(json.dumps(message))
        assert push(hub, folder, "--revision", "step-200", "--message", message) == 0
    assert hub.commits(REPO) == ["initial commit"]
    assert hub.commits(REPO, "step-200") == ["initial commit", "first", "second"]
    assert hub.files(REPO, "step-200")["tokenizer.json"] == b'"second"'


def test_who_sees_it_is_as_asked(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(hub, folder, "--public") == 0
    assert not hub.repos[REPO].private
    assert "someone/tiny exists and is public: leave --private out" in refused(capsys, hub, folder, "--private")
    assert push(hub, folder) == 0
    assert push(hub, folder, repo="someone/hidden") == 0
    assert hub.repos["someone/hidden"].private
    said = refused(capsys, hub, folder, "--public", repo="someone/hidden")
    assert "is private: leave --public out" in said
    with pytest.raises(SystemExit):
        push(hub, folder, "--public", "--private")


def test_a_dry_run_asks_nobody(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "README.md").write_text(CARD.format(licence="unknown", gate="not-run"))
    assert push(hub, folder, "--dry-run") == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert said.err.splitlines() == [
        "note: the card does not say that the validity gate has looked at this model",
        "note: the card names no licence (nystrom convert to-hf --license)",
        f"next: nystrom push {folder} {REPO} --endpoint {hub.url}",
    ]
    sizes = {name: f"{len(data)} bytes" for name, data in contents(folder).items()}
    assert {line.split()[0]: " ".join(line.split()[1:]) for line in lines[:-1]} == sizes
    assert lines[-1] == f"7 files, {sum(map(len, contents(folder).values()))} bytes, would be pushed to {REPO}"
    assert push(hub, folder, "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == [{"name": name, "bytes": len(data)} for name, data in sorted(contents(folder).items())]
    assert (found["repo"], found["dry_run"], found["validity_passed"]) == (REPO, True, None)
    assert hub.asked == []


def test_a_model_that_failed_the_gate_needs_a_word(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = CARD.format(licence="mit", gate="passed\n- validity-gate-failed")
    for card in (CARD.format(licence="mit", gate="failed"), both):
        (folder / "README.md").write_text(card)
        for words in ([], ["--dry-run"]):
            assert "failed the validity gate" in refused(capsys, hub, folder, *words)
    assert hub.asked == []
    assert push(hub, folder, "--although-invalid") == 0


Break = Any


def write(name: str, text: str | bytes) -> Break:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def remove(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-5])


def sharded(change: Break) -> Break:
    return lambda folder: (shard(folder), change(folder))


INDEX, ONE, TWO = "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BROKEN: dict[str, tuple[Break, str]] = {
    "no config": (remove("config.json"), "there is no config.json"),
    "no card": (remove("README.md"), "there is no README.md (the model card)"),
    "no tokenizer": (remove("tokenizer.json"), "there is no tokenizer.json"),
    "no weights": (remove("model.safetensors"), "there is no model.safetensors (the weights)"),
    "cut weights": (cut, "model.safetensors is damaged: "),
    "weights of text": (write("model.safetensors", "x" * 90), "model.safetensors is damaged: "),
    "loose shard": (lambda f: save_file(tensors(), f / "other.safetensors"), "other.safetensors is in no index"),
    "lost shard": (sharded(remove(TWO)), f"there is no {TWO}, which {INDEX} names"),
    "other shard": (sharded(lambda f: save_file(tensors(), f / ONE)), f"{INDEX} and {ONE} do not agree on b.weight"),
    "added shard": (sharded(lambda f: save_file(tensors(), f / "m.safetensors")), "m.safetensors is in no index"),
    "both": (sharded(lambda f: save_file(tensors(), f / "model.safetensors")), "leaves the shards out"),
    "empty index": (sharded(write(INDEX, "{}")), f"{INDEX} has no weight_map"),
    "no tensor": (lambda f: save_file({}, f / "model.safetensors"), "model.safetensors holds no tensor"),
    "config of text": (write("config.json", "{"), "config.json is damaged: its contents are not JSON"),
    "config of nothing": (write("config.json", "[]"), "config.json names no model"),
    "config of odd code": (write("config.json", '{"model_type": "x", "auto_map": ["y"]}'), "an auto_map that names no"),
    "odd index": (sharded(write(INDEX, '{"weight_map": {"a": ["b"]}}')), f"{INDEX} has no weight_map"),
    "odd tags": (
        lambda f: [write("README.md", "---\ntags: {a: [1]}\n---\n")(f), remove("config.json")(f)],
        "no config",
    ),
    "no code": (remove("modeling_tiny.py"), "config.json names code in modeling_tiny.py, which is not there"),
    "no imported code": (remove("layers_tiny.py"), "modeling_tiny.py imports layers_tiny.py, which is not there"),
    "broken code": (write("modeling_tiny.py", "def"), "modeling_tiny.py is damaged: its contents are not Python"),
    "no metadata": (write("README.md", "# tiny\n"), "README.md has no metadata"),
    "bad metadata": (write("README.md", "---\na: [\n---\n"), "README.md has no metadata"),
    "pickle": (write("pytorch_model.bin", b"x"), "pytorch_model.bin can hold a pickle"),
    "hidden pickle": (write("notes.txt", b"\x80\x04\x95"), "notes.txt holds a pickle or an archive"),
    "hidden archive": (write("1_Pooling/x.md", b"PK\x03\x04"), "1_Pooling/x.md holds a pickle or an archive"),
    "leftover": (write("model.safetensors.1a2b3c4d.tmp", b""), "model.safetensors.1a2b3c4d.tmp is a leftover"),
    "bytecode": (write("__pycache__/x.pyc", b""), "__pycache__/x.pyc is a leftover"),
    "secret": (write(".env", "TOKEN=x"), ".env does not belong"),
    "git": (write(".git/config.json", "{}"), ".git/config.json does not belong"),
    "log": (write("training.log", ""), "training.log does not belong"),
    "link": (lambda f: (f / "vocab.txt").symlink_to(f / "README.md"), "vocab.txt is a link"),
    "export": (write("export.json", "{}"), "is an export of nystrom"),
    "run": (write("checkpoints/x", "{}"), "is a run of nystrom"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_folder_that_is_not_whole_is_refused(
    broken: str, hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = BROKEN[broken]
    change(folder)
    said = refused(capsys, hub, folder)
    assert message in said
    assert str(folder) in said
    assert hub.asked == []


def test_all_that_is_wrong_is_named_at_once(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(8):
        write(f"{number}.log", "")(folder)
    remove("tokenizer.json")(folder)
    said = refused(capsys, hub, folder)
    assert "0.log does not belong to a model's folder: remove it; 1.log" in said
    assert said.endswith("(and 3 more)\n")
    assert "does not exist" in refused(capsys, hub, folder / "none")


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "someone/--", "someone/tïny", "someone/x.git"])
def test_a_name_that_cannot_be_is_refused(
    repo: str, hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"repository '{repo}'" in refused(capsys, hub, folder, repo=repo)
    assert hub.asked == []


def test_a_token_that_will_not_do_is_named(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tmp_path, None)
    assert "wants a token: set HF_TOKEN" in refused(capsys, hub, folder)
    monkeypatch.setenv("HF_TOKEN", "hf_forged")
    said = refused(capsys, hub, folder)
    assert "does not accept the token (Invalid credentials" in said
    assert "hf_forged" not in said
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "the token may not write to someone/tiny (You don't have the rights" in refused(capsys, hub, folder)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert "may not write to other/tiny" in refused(capsys, hub, folder, repo="other/tiny")
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("place", "status", "message"),
    [
        ("commit", 500, "has a fault of its own, status 500 (Internal): try again later"),
        ("create", 503, "has a fault of its own, status 503 (Internal): try again later"),
        ("/commit", 404, "has no someone/tiny, or the token may not see it (Internal)"),
        ("/commit", 413, "refuses the push to someone/tiny, status 413 (Internal)"),
        ("create", 429, "takes no more requests for now"),
        ("PUT /lfs", 403, "the token may not write to someone/tiny"),
        ("batch", 401, "does not accept the token (Internal)"),
        ("validate", 500, "has a fault of its own, status 500 (Internal)"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(
    place: str, status: int, message: str, hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults[place] = (status, "Internal")
    assert message in refused(capsys, hub, folder)
    hub.faults.clear()
    assert push(hub, folder) == 0
    assert contents(folder).items() <= hub.files(REPO).items()


def test_a_card_that_the_hub_does_not_take_is_named(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "README.md").write_text(CARD.format(licence="other", gate="passed"))
    said = refused(capsys, hub, folder)
    assert 'does not take the folder: Invalid metadata in README.md. - "license_name" is required' in said
    assert hub.received == 0


def test_a_change_of_somebody_else_is_not_overwritten_unseen(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(hub, folder)
    before = contents(folder)
    (folder / "tokenizer.json").write_text("{}")

    def change() -> None:
        hub.repos[REPO].commit("main", {**hub.files(REPO), "config.json": b"theirs"}, "theirs")

    hub.between = change
    assert "was changed by somebody else during the push" in refused(capsys, hub, folder)
    assert hub.commits(REPO)[-1] == "theirs"
    assert hub.files(REPO)["tokenizer.json"] == before["tokenizer.json"]


def test_no_hub_is_one_line(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for endpoint in ("http://127.0.0.1:1", "nonsense"):
        said = refused(capsys, hub, folder, "--endpoint", endpoint)
        assert f"{endpoint} cannot be reached" in said
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, hub, folder)


@pytest.mark.slow
def test_a_server_without_xet_is_named(hub: Hub, folder: Path) -> None:
    """In a process of its own, since hf_xet starts threads that never end."""
    pytest.importorskip("hf_xet")
    env = {**os.environ, "HF_TOKEN": WRITER, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-m", "launch.program", "push", str(folder), REPO]

    def run(disabled: str) -> subprocess.CompletedProcess[str]:
        own = {**env, "HF_HUB_DISABLE_XET": disabled}
        return subprocess.run(words, env=own, capture_output=True, text=True, timeout=120, check=False)

    refused = run("0")
    assert refused.returncode == 2
    assert "if it is a server without Xet, set HF_HUB_DISABLE_XET=1" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert len(hub.commits(REPO)) == 1
    assert run("1").returncode == 0
    assert contents(folder).items() <= hub.files(REPO).items()


def test_the_page_can_be_followed(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    page = (Path(__file__).resolve().parents[3] / "docs" / "publishing.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    nystrom (push .*)$", page, re.MULTILINE)
    assert len(commands) >= 4
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    hub.repos["someone/books-clm"] = Repo(True)
    hub.repos["someone/books-clm"].commit("main", {}, "initial commit")
    Path("hf").mkdir()
    shutil.copytree(folder, "hf/books-clm")
    for command in commands:
        assert program.main(shlex.split(command)) == 0, command
        assert "Traceback" not in capsys.readouterr().err
    assert set(hub.repos["someone/books-clm"].branches) == {"main", "step-100000"}
