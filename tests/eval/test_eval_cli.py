"""The command line of the suites: results, the gate, rejections."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands_case import next_commands
from suites_case import WORDS, no_mask

from data_pipeline.errors import UserError, run_cli
from data_pipeline.prepare.plan import plan_preparation
from data_pipeline.prepare.run import prepare
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.tokenization.training import train_tokenizer
from eval import cli, runner
from eval.compare import results_at
from eval.results.records import results_folder
from eval.results.schema import read_result
from eval.tasks.validity import ValiditySettings, checks
from pretrain.model.attention.forms import nystrom


def test_suites_write_results_and_are_not_run_again(causal: Path, shards: ShardSet, root: Path, capsys: Any) -> None:
    out = root / "out"
    command = ["lm", "generate", "--checkpoint", str(causal), "--out", str(out), "--max-new-tokens", "8"]
    assert cli.main(command) == 0
    first = {p.name: p.read_bytes() for p in out.glob("*.json")}
    assert set(first) == {"validity.json", "lm.json", "generate.json"}
    said, following = capsys.readouterr()
    assert next_commands(following) == [["report", str(out)]]
    assert "bits per byte" in said
    assert cli.main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["folder"] == str(out)
    assert [(each["suite"], each["computed"]) for each in answer["results"]] == [("lm", False), ("generate", False)]
    for each in answer["results"]:
        stored = json.loads(Path(each["file"]).read_text())
        assert {name: metric["value"] for name, metric in each["metrics"].items()} == {
            name: metric["value"] for name, metric in stored["metrics"].items()
        }
    assert re.search(r"^lm +loss +\d\.\d{4} \[.*\] +[\d,]+ tokens$", said, re.MULTILINE)
    for row in ("greedy", "real continuation (control)", "shuffled tokens (control)"):
        assert re.search(rf"^{re.escape(row)} +0\.\d{{4}} ", said, re.MULTILINE)
    assert said.count("  prompt: ") == said.count("  text:   ") == 3
    assert re.search(rf"^all \d+ texts and their numbers: {out / 'generate.samples.jsonl'}$", said, re.MULTILINE)
    assert cli.main(command) == 0
    assert "already there" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in out.glob("*.json")} == first
    assert cli.main([*command, "--length", "32"]) == 0  # other settings, another key
    assert read_result(out / "lm.json").settings["length"] == 32
    assert read_result(out / "generate.json").key == json.loads(first["generate.json"])["key"]


def test_failed_gate_blocks_unless_forced(
    causal: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nystrom, "causal_nystrom_attention", no_mask)
    out = root / "blocked"
    command = ["lm", "--checkpoint", str(causal), "--out", str(out)]
    with pytest.raises(UserError, match="validity gate failed") as caught:
        cli.main(command)
    assert "prefix-only" in str(caught.value)
    assert not (out / "lm.json").exists()
    with pytest.raises(UserError, match="validity gate failed"):  # a failed result does not open the gate either
        cli.main(command)
    assert cli.main(["validity", "--checkpoint", str(causal), "--out", str(out)]) == 1
    assert cli.main([*command, "--force"]) == 0
    assert read_result(out / "lm.json").gate == "forced"
    assert "lm: the validity gate FAILED" in capsys.readouterr().out
    with pytest.raises(UserError, match="validity gate failed"):  # the forced result is there, and not handed out
        cli.main(command)
    assert cli.main([*command, "--force"]) == 0
    said = capsys.readouterr().out
    assert "lm: already there" in said
    assert "lm: the validity gate FAILED" in said
    (out / "validity.json").unlink()
    with pytest.raises(UserError, match="validity gate failed"):  # nor is the verdict forgotten
        cli.main(command)


def test_a_gate_of_few_positions_lets_no_suite_through(
    causal: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = root / "few"
    command = ["validity", "lm", "--checkpoint", str(causal), "--out", str(out), "--max-tokens", "256"]
    asked: list[int] = []
    real = checks.run

    def run(subject: Any, settings: ValiditySettings, parts: Any) -> Any:
        asked.append(settings.positions)
        return real(subject, settings, parts)

    monkeypatch.setattr(checks, "run", run)
    assert cli.main([*command, "--positions", "1"]) == 0
    assert asked == [1, 32]
    assert read_result(out / "validity.json").settings["positions"] == 32
    assert cli.main([*command, "--positions", "40", "--rerun"]) == 0
    assert asked == [1, 32, 40]
    monkeypatch.setattr(nystrom, "causal_nystrom_attention", no_mask)
    with pytest.raises(UserError, match="validity gate failed"):
        cli.main([*command, "--positions", "1", "--rerun"])
    assert asked == [1, 32, 40, 1]  # one position is enough to fail


def test_a_suite_that_cannot_be_run_does_not_stop_the_others(
    causal: Path, root: Path, labelled: tuple[Path, Path], capsys: Any
) -> None:
    out = root / "partly"
    unseen = root / "no-such-label.jsonl"
    unseen.write_text('{"text": "a", "label": "purple"}\n')
    data = ["--train", str(labelled[0]), "--test", str(unseen)]
    command = ["classify", "lm", "--checkpoint", str(causal), "--out", str(out), *data]
    assert run_cli(cli.main, "nystrom eval", command) == 2
    captured = capsys.readouterr()
    assert "nystrom eval: error: 1 of 2 suites could not be run\nclassify: " in captured.err
    assert "'purple'" in captured.err
    assert "perplexity" in captured.out  # the table of those that were
    assert (out / "lm.json").exists()
    assert not (out / "classify.json").exists()
    assert run_cli(cli.main, "nystrom eval", [*command, "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert [each["suite"] for each in answer["results"]] == ["lm"]
    ((failed, error),) = ((each["suite"], each["error"]) for each in answer["failed"])
    assert failed == "classify"
    assert "'purple'" in error


def test_the_report_is_of_the_run_or_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("runs/a/checkpoints/step000000016", "runs/a/export", "runs/a/export-ema", "alone"):
        Path(place).mkdir(parents=True)
    for checkpoint, shown in {
        "runs/a": "runs/a",
        "runs/a/export": "runs/a",
        "runs/a/export-ema": "runs/a/eval/export-ema",
        "runs/a/checkpoints/step000000016": "runs/a/eval/step000000016",
        "alone": "alone/eval",
    }.items():
        args = cli.build_parser().parse_args(["lm", "--checkpoint", checkpoint])
        assert cli.next_command(args) == ["report", shown]


def test_the_list_as_json(capsys: Any) -> None:
    assert cli.main(["list", "--json"]) == 0
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)["suites"]}
    assert listed["lm"]["is"] == "task"
    assert cli.main(["list", "lm", "--json"]) == 0
    (lm,) = json.loads(capsys.readouterr().out)["suites"]
    assert (lm["name"], lm["task"], lm["summary"]) == ("lm", "lm", listed["lm"]["summary"])
    length = next(each for each in lm["settings"] if each["key"] == "max_tokens")
    assert length["meaning"]


def test_one_reason_for_several_suites_is_given_once(
    causal: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(nystrom, "causal_nystrom_attention", no_mask)
    out = root / "all-blocked"
    command = ["lm", "generate", "validity", "--checkpoint", str(causal), "--out", str(out)]
    assert run_cli(cli.main, "nystrom eval", command) == 2
    error = capsys.readouterr().err
    assert "2 of 3 suites could not be run\nlm, generate: the validity gate failed" in error
    assert sorted(path.name for path in out.glob("*.json")) == ["validity.json"]


def test_rejections(causal: Path, masked: Path, root: Path, labelled: tuple[Path, Path], capsys: Any) -> None:
    train, test = map(str, labelled)
    unseen = root / "unseen.jsonl"
    unseen.write_text('{"text": "a", "label": "purple"}\n')
    learned = root / "nowhere"
    at = ["--checkpoint", str(causal), "--out", str(root / "rejected")]
    for command, words in [
        (["lm", "--checkpoint", str(learned)], "does not exist"),
        (["lm", "--checkpoint", str(root)], "neither a run folder"),
        (["perplexity", *at], "no suite 'perplexity'"),
        (["classify", *at], "--train FILE --test FILE"),
        (["classify", *at, "--train", train, "--test", str(unseen)], "'purple'"),
        (["classify", *at, "--train", train, "--test", test, "--text-field", "body"], "no field 'body'"),
        (["classify", *at, "--train", train, "--test", str(root / "missing.csv")], "does not exist"),
        (["lm", *at, "--data", str(root / "missing")], "missing"),
        (["lm", *at, "--length", "0"], "length: Input should be greater than or equal to 2, got 0"),
        (["lm", *at, "--set", "lm.lenght=9"], "did you mean 'length'"),
        (["lm", *at, "--seeds", "2"], "none of the suites has such a setting"),
        (["lm", *at, "--device", "warp"], "--device warp"),
    ]:
        assert run_cli(cli.main, "nystrom eval", command) == 2, command
        error = capsys.readouterr().err
        assert words in error, (command, error)
        assert "Traceback" not in error


def test_a_file_that_is_not_there_is_told_before_the_gate(
    causal: Path, root: Path, labelled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gate(*_: Any, **__: Any) -> None:
        raise AssertionError("the gate takes a minute")

    monkeypatch.setattr(runner, "check", gate)
    at = ["--checkpoint", str(causal), "--out", str(root / "before-the-gate")]
    with pytest.raises(UserError, match="missing"):
        cli.main(["classify", *at, "--train", str(labelled[0]), "--test", str(root / "missing.csv")])


def test_shards_that_no_suite_would_read_are_refused(causal: Path, shards: ShardSet, root: Path) -> None:
    text = root / "text.txt"
    text.write_text(" ".join(WORDS) + "\n")
    out = root / "two-sources"
    at = ["--checkpoint", str(causal), "--out", str(out), "--data", str(shards.path)]
    for suites in (["lm"], ["lm", "context"], ["lm", "classify"]):
        with pytest.raises(UserError, match=r"no suite reads --data .*: lm scores the text of --text in its place"):
            cli.main([*suites, *at, "--text", str(text)])
    with pytest.raises(UserError, match="scores the text of --dataset in its place"):
        cli.main(["lm", *at, "--dataset", "owner/name"])
    assert not out.exists()
    assert cli.main(["validity", "lm", *at, "--text", str(text), "--length", "8"]) == 0  # the gate reads them
    assert read_result(out / "lm.json").data["text"] == [str(text)]


def test_shards_of_another_tokenizer_are_refused(causal: Path, root: Path, texts: list[str]) -> None:
    source = root / "other.jsonl"
    source.write_text(json.dumps({"text": texts[0]}) + "\n", encoding="utf-8")
    other: Tokenizer = train_tokenizer(texts[:3], 280)
    prepare(plan_preparation([str(source)], other), root / "other-shards")
    with pytest.raises(UserError, match="another tokenizer"):
        cli.main(["lm", "--checkpoint", str(causal), "--data", str(root / "other-shards"), "--out", str(root / "x")])


def test_results_of_an_older_checkpoint_do_not_replace_the_runs() -> None:
    run = Path("runs/a")
    assert results_folder(run, run) == run / "eval"
    assert results_folder(run / "export", run) == run / "eval"
    assert results_folder(run / "checkpoints" / "step8", run) == run / "eval" / "step8"
    assert results_folder(run / "checkpoints" / "latest", run) == run / "eval"
    assert results_folder(run / "export-ema", run) == run / "eval" / "export-ema"
    assert results_folder(Path("elsewhere"), None) == Path("elsewhere/eval")


@pytest.mark.parametrize(("inside", "folder"), [("checkpoints", "step8"), (".", "export-ema"), (".", "export")])
def test_a_checkpoint_named_from_within_the_run_has_its_results_in_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, folder: str
) -> None:
    run = tmp_path / "run"
    (run / inside / folder).mkdir(parents=True)
    expected = run / "eval" / ("" if folder == "export" else folder)
    expected.mkdir(parents=True)
    (expected / "lm.json").touch()
    monkeypatch.chdir(run / inside)
    assert results_folder(Path(folder), run) == expected
    assert results_at(Path(folder)) == [expected / "lm.json"]


def test_the_same_weights_under_another_configuration_are_judged_and_scored_anew(
    export: Callable[..., Path], shards: ShardSet, capsys: Any
) -> None:
    """The starting scale of the inverse is no weight, and the published one lets batch mates through the gate."""
    folder = export("configured", objective="mlm")
    command = ["lm", "--checkpoint", str(folder), "--data", str(shards.path), "--max-tokens", "256", "--length", "32"]
    assert run_cli(cli.main, "nystrom eval", command) == 0
    assert run_cli(cli.main, "nystrom eval", command) == 0
    assert "already there" in capsys.readouterr().out
    config = (folder / "config.yaml").read_text()
    assert "inverse_init: " in config
    (folder / "config.yaml").write_text(re.sub("inverse_init: .*", "inverse_init: original", config))
    assert run_cli(cli.main, "nystrom eval", command) == 2
    assert "batch mates" in capsys.readouterr().err
    (folder / "config.yaml").write_text(re.sub("num_landmarks: .*", "num_landmarks: 4", config))
    before = read_result(folder / "eval" / "lm.json")
    assert run_cli(cli.main, "nystrom eval", command) == 0
    assert "already there" not in capsys.readouterr().out
    after = read_result(folder / "eval" / "lm.json")
    assert after.model.weights_hash == before.model.weights_hash
    assert after.metrics["masked_loss"].value != before.metrics["masked_loss"].value
