"""The layout of help, and what errors suggest."""

from __future__ import annotations

import shlex

import pytest

from data_pipeline.command_line import (
    NARROWEST,
    WIDEST,
    Example,
    Parser,
    examples_text,
    fill,
    help_width,
    statuses_text,
)

LONG = "words that go on " * 12


def parser(**options: object) -> Parser:
    top = Parser(prog="nystrom case", description=LONG, **options)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inner = commands.add_parser("prepare", help="make", examples=["nystrom case prepare x"], exit_status={7: "seven"})
    inner.add_argument("--tokenizer", required=True, default="t", help="a required one")
    inner.add_argument("--rounds", type=int, default=3, help=LONG)
    inner.add_argument("--kind", choices=["first", "second"], default=None, help="which")
    inner.add_argument("--word", default="", help="none by default")
    commands.add_parser("verify", help="look")
    return top


@pytest.mark.parametrize(("columns", "width"), [("20", NARROWEST), ("60", 60), ("80", 80), ("300", WIDEST)])
def test_the_width_is_the_terminals_within_bounds(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert help_width() == width
    lines = parser(epilog=LONG).format_help().splitlines()
    assert width - 25 < max(map(len, lines)) <= width


def test_prose_is_wrapped_and_indented_lines_are_kept() -> None:
    text = "one two three\nfour --no-head five\n\n  a   table\n  b   that is kept whole\nafter it\n"
    assert fill(text, 14) == ("one two three\nfour --no-head\nfive\n\n  a   table\n  b   that is kept whole\nafter it")


def test_examples_say_what_they_are_for_beside_or_above() -> None:
    examples: list[Example] = [("nystrom a", "the first"), "nystrom longer"]
    assert examples_text(examples, 60) == "examples:\n  nystrom a       # the first\n  nystrom longer"
    assert examples_text(examples, 20) == "examples:\n  # the first\n  nystrom a\n  nystrom longer"
    assert examples_text((), 60) == ""


def test_a_long_example_continues_as_a_shell_takes_it() -> None:
    command = "nystrom eval lm --checkpoint runs/a --text 'a b c' --set x=1 y=2 -- data prepare --input \"d e\" -v"
    shown = examples_text([command], 34)
    lines = shown.splitlines()[1:]
    assert max(map(len, lines)) <= 34
    assert lines[0] == "  nystrom eval lm \\"
    assert "    --text 'a b c' --set x=1 y=2 \\" in lines
    assert shlex.split("\n".join(lines).replace("\\\n", " ")) == shlex.split(command)


def test_exit_statuses_are_listed_in_order() -> None:
    text = statuses_text({75: "stopped and saved", 0: "done"}, 18)
    assert text == "exit status:\n  0   done\n  75  stopped and\n      saved"
    assert statuses_text({}, 60) == ""


def test_help_has_examples_defaults_and_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["prepare", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "examples:\n  nystrom case prepare x\n\nexit status:\n  0  done\n  2  a mistake" in out
    assert out.endswith("  7  seven\n")
    assert "(default: 3)" in " ".join(out.split())
    assert "default: t" not in out  # it must be given
    assert "(default: )" not in out
    assert "None" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("prepar", "did you mean 'prepare'?"),
        ("prepare --tokeniser x", "required: --tokenizer; did you mean --tokenizer instead of --tokeniser?"),
        ("prepare --tokenizer x --round=4", None),
        ("prepare --tokenizer x --ruonds=4", "did you mean --rounds instead of --ruonds?"),
        ("prepare --tokenizer x --kind frist", "did you mean 'first'?"),
        ("prepare --tokenizer x --kind zzz", ""),
        ("prepare --tokenizer x --zzzzz", ""),
        ("prepare --rounds 2", ""),
        ("prepare --tokenizer x -- --ruonds", ""),
        ("prepare --tokenizer x --rounds two", ""),
    ],
)
def test_errors_suggest_what_is_near(words: str, said: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if said is None:  # an abbreviation, which argparse takes
        assert parser().parse_args(words.split()).rounds == 4
        return
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(words.split())
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert ("did you mean" in err) == bool(said)


def test_an_unknown_option_is_told_by_the_subcommand_it_was_given_to(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["verify", "--rounds", "2"])
    err = capsys.readouterr().err
    assert "nystrom case verify: error: unrecognized arguments: --rounds" in err
    assert "did you mean" not in err  # it is an option of another one
