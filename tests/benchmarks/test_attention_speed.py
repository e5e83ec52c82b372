"""The speed benchmark measures what it says: every form against its formula, the bookkeeping, the refusals."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import __main__ as cli
from benchmarks.attention import measure as measuring
from benchmarks.attention import published, report, run
from benchmarks.attention.forms import UnavailableError
from benchmarks.attention.measure import Case, Times, interleave, memory
from benchmarks.attention.report import Against, Row
from benchmarks.attention.setting import Setting, document_ids, document_lengths, models
from benchmarks.attention.stages import stages
from data_pipeline.errors import UserError, run_cli
from eval.tasks.efficiency.measure import Spread

CPU = torch.device("cpu")
TINY = ["--heads", "2", "--head-dim", "8", "--landmarks", "8", "--segment-length", "4", "--conv-kernel", "5"]
OURS = ("nystrom", "nystrom+conv", "causal-inverse", "causal-inverse+conv", "causal-nystrom", "causal-nystrom+conv",
        "causal-pyramid", "causal-pyramid+conv", "causal-recall", "causal-recall+conv")  # fmt: skip
INSTALLED = {"transformers": "transformers", "lucidrains": "nystrom_attention"}


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_PEAK_SIZE", {"cpu": 64, "cuda": 64})


def setting(length: int, *, batch: int = 2, dtype: torch.dtype = torch.float32, **keys: Any) -> Setting:
    own = {"landmarks": 8, "segment_length": 4, "window_segments": 2, "conv_kernel": 5, "landmark_band": 1} | keys
    return Setting(batch, 2, 8, length, dtype, CPU, *models(2, 8, **own))


def output(name: str, where: Setting) -> Tensor:
    """(B, n, H, d)."""
    built = run.FORMS[name].build(where)
    with built.context():
        return built.forward(*where.inputs()).detach()


def needs(name: str) -> None:
    package = INSTALLED.get(name)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def softmax_attention(where: Setting, seen: Tensor | None = None) -> Tensor:
    """Written out, in float64; seen: (B or 1, n, n) bool."""
    q, k, v = (x.detach().double().transpose(1, 2) for x in where.inputs())
    logits = q @ k.transpose(2, 3) * where.head_dim**-0.5
    if seen is not None:
        logits = logits.masked_fill(~seen.unsqueeze(1), -torch.inf)
    return (logits.softmax(3) @ v).transpose(1, 2)


def lower(n: int) -> Tensor:
    return torch.ones(1, n, n, dtype=torch.bool).tril()


def same_document(where: Setting) -> Tensor:
    ids = document_ids(where.batch, where.length)
    return ids.unsqueeze(1) == ids.unsqueeze(2)


def convolution(where: Setting, *, causal: bool) -> Tensor:
    config = where.causal if causal else where.masked
    v, weight, taps = where.inputs()[2].detach().transpose(1, 2), where.conv_weight(config).detach(), config.conv_kernel
    before = taps - 1 if causal else taps // 2
    padded = F.pad(v, (0, 0, before, taps - 1 - before))
    return F.conv2d(padded, weight, groups=where.heads).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------- what is timed


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("sdpa", lambda where: None),
        ("causal-sdpa", lambda where: lower(where.length)),
        ("packed-sdpa", same_document),
    ],
)
def test_exact_forms_are_softmax_attention(name: str, seen: Callable[[Setting], Tensor | None]) -> None:
    where = setting(37)
    torch.testing.assert_close(output(name, where).double(), softmax_attention(where, seen(where)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["nystrom", "packed-nystrom", "causal-inverse", "causal-nystrom"])
def test_ours_with_landmarks_or_window_over_everything_is_exact(name: str) -> None:
    where = setting(37, landmarks=37, window_segments=10)
    seen = {"nystrom": None, "packed-nystrom": same_document(where)}.get(name, lower(37))
    torch.testing.assert_close(output(name, where).double(), softmax_attention(where, seen), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["nystrom", "causal-inverse", "causal-nystrom"])
def test_beyond_it_ours_is_not_exact_and_the_forms_differ(name: str) -> None:
    where = setting(64)
    seen = None if name == "nystrom" else lower(64)
    assert (output(name, where) - softmax_attention(where, seen)).abs().max() > 1e-3
    assert (output("causal-inverse", where) - output("causal-nystrom", where)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["nystrom", "causal-inverse", "causal-nystrom"])
def test_the_convolution_is_conv2d_on_top(name: str) -> None:
    where = setting(40)
    expected = output(name, where) + convolution(where, causal=name != "nystrom")
    torch.testing.assert_close(output(name + "+conv", where), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["packed-nystrom", "packed-nystrom+conv"])
def test_packed_documents_get_what_they_get_alone(name: str) -> None:
    where = setting(64, batch=1)
    whole, done = output(name, where), 0
    for size in document_lengths(64, 0):
        part = slice(done, done + size)
        alone = run.FORMS[name.removeprefix("packed-")].build(setting(size, batch=1))
        expected = alone.forward(*(x[:, part] for x in where.inputs())).detach()
        torch.testing.assert_close(whole[:, part], expected, rtol=0, atol=1e-4)
        done += size
    assert done == 64


@pytest.mark.parametrize("name", ["transformers", "lucidrains"])
def test_the_published_forms_compute_what_ours_does_with_their_start(name: str) -> None:
    """Both start the inverse from one maximum over the whole batch."""
    needs(name)
    where = setting(64)
    original = where.masked.model_copy(update={"inverse_init": "original"})
    expected = output("nystrom+conv", Setting(2, 2, 8, 64, torch.float32, CPU, original, where.causal))
    torch.testing.assert_close(output(name, where), expected, rtol=0, atol=1e-4)


def test_what_is_not_installed_or_does_not_divide_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: None)
    forms = run.with_references(["transformers", "lucidrains"])
    rows, _ = run.measure(forms, setting(16), run.Effort(1, 0, None), 1e9)
    assert [row.skipped and row.skipped.split(" (")[0] for row in rows] == [None, "not installed", "not installed"]
    monkeypatch.undo()
    needs("transformers")
    with pytest.raises(UnavailableError, match="divisible by its 8 landmarks"):
        published.transformers(setting(60))


@pytest.mark.parametrize("name", OURS)
def test_the_stages_make_up_the_form(name: str) -> None:
    where = setting(50)
    built, inputs = run.FORMS[name].build(where), where.inputs()
    parts = {case.name: case.outputs() for case in stages(name, where, inputs, built)}
    (out,) = next(value for key, value in parts.items() if key.startswith("read"))
    out = out.view(2, 2, -1, 8)[:, :, :50]
    if name.endswith("+conv"):
        out = out + parts["convolution"][0]
    torch.testing.assert_close(out.transpose(1, 2), built.forward(*inputs), rtol=0, atol=1e-5)
    assert stages(name, setting(8), setting(8).inputs(), built)[:-1] == [], "exact attention has no stages"


# -------------------------------------------------------------------------------------------------- how it is measured


def test_cases_take_turns_and_both_passes_are_timed() -> None:
    x, calls = torch.ones(3, requires_grad=True), []

    def case(name: str) -> Case:
        return Case(name, lambda x: (calls.append(name), x * 2)[1], (x,))

    times = interleave([case("a"), case("b")], CPU, rounds=4)
    assert [sorted(calls[i : i + 2]) for i in range(0, 8, 2)] == [["a", "b"]] * 4
    assert all(len(t.total) == 4 and 0 < f < s for t in times.values() for f, s in zip(t.forward, t.total, strict=True))
    assert len(interleave([case("a")], CPU, seconds=1e-9)["a"].total) == measuring.MIN_ROUNDS
    assert Spread.of([4, 1, 3, 2, 5]) == Spread(3, 2, 4)


def test_memory_counts_each_kept_storage_once_and_no_input() -> None:
    x, weight, shared = (torch.rand(256, requires_grad=i < 2) for i in range(3))

    def forward(x: Tensor) -> Tensor:
        kept = x.exp()  # 1024 bytes, kept by exp and by both products, one of which keeps a view
        return kept * weight + kept[:128].sum() * (x * shared) + kept.view(16, 16).square().flatten()

    total = memory(Case("case", forward, (x,), (weight,), (shared,)), CPU)
    assert total.peak is None
    assert total.kept == 1024 + 1024 + 4  # exp, x * shared, the sum
    assert memory(Case("case", forward, (x,), (weight,)), CPU).kept == total.kept + 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(run.FORMS))
def test_estimates_are_above_what_is_kept(name: str, dtype: torch.dtype) -> None:
    needs(name)
    where = setting(512, batch=1, dtype=dtype)
    form, inputs = run.FORMS[name], where.inputs()
    built = form.build(where)
    case = Case(name, built.forward, inputs, built.weights, built.constants, built.context)
    assert memory(case, CPU).kept + 8 * inputs[0].nbytes < form.gibibytes(where) * 2**30
    assert all(grad is None or grad.isfinite().all() for grad in case.backward(case.outputs()))


def test_flop_ratios_are_the_formulas() -> None:
    where = setting(256, batch=1, landmarks=8)
    ratio = {name: form.flops(where) / run.FORMS[form.references[0]].flops(where) for name, form in run.FORMS.items()}
    h, n, m, d, steps = 16, 256, 8, 8, 6
    by_hand = (8 * m * h + (4 * m * m * h + 8 * steps * m**3 * h / d) / n) / (4 * n * h)
    assert ratio["nystrom"] == pytest.approx(by_hand)
    assert ratio["nystrom+conv"] == ratio["transformers"] == pytest.approx(by_hand + 2 * 5 * h / (4 * n * h))
    documents = sum(size**2 for size in document_lengths(256, 0)) / 256**2
    assert ratio["packed-sdpa"] == pytest.approx(documents)
    causal = ("pyramid", "nystrom", "recall", "inverse", "inverse+conv")
    ordered = [ratio[f"causal-{name}"] for name in causal]
    assert [*ordered, 1] == sorted([*ordered, 1])
    assert ratio["sdpa"] == ratio["causal-sdpa"] == 1


def test_ratios_are_of_the_same_round_and_to_their_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"sdpa": [1.0, 2.0, 4.0], "packed-sdpa": [2.0, 2.0, 2.0], "packed-nystrom": [0.5, 1.0, 3.0]}
    times = {name: Times([x / 4 for x in total], total) for name, total in seconds.items()}
    monkeypatch.setattr(run, "interleave", lambda *_, **__: times)
    where = setting(32)
    rows, _ = run.measure(run.with_references(["packed-nystrom"]), where, run.Effort(3, 0, None), peak=1e9)
    ours = next(row for row in rows if row.form == "packed-nystrom")
    assert ours.against["sdpa"].ratio == Spread(0.5, 0.5, 0.625)
    assert ours.against["packed-sdpa"].ratio == ours.against["packed-sdpa"].forward_ratio == Spread(0.5, 0.375, 1.0)
    assert ours.peak_share == pytest.approx(3 * run.FORMS["packed-nystrom"].flops(where) / 1.0 / 1e9)


def test_goals_are_judged_by_the_median_and_missing_ones_stay_open() -> None:
    def row(form: str, dtype: str, length: int, ratio: float) -> Row:
        against = {"sdpa": Against(Spread(ratio, 0.0, 9.0), None, 0.1)}
        return Row(form, form, dtype, length, None, against=against)

    rows = [row("nystrom+conv", "float32", 1024, 0.30), row("nystrom+conv", "bfloat16", 1024, 0.31)]
    rows += [row("causal-nystrom+conv", "float32", 1024, 1.01), row("nystrom", "float32", 4096, 0.01)]
    rows += [Row("nystrom+conv", "", "float32", 8192, "memory")]
    met = {(v.form, v.dtype, v.length): v.met for v in report.judge(rows) if v.met is not None}
    assert met == {
        ("nystrom+conv", "float32", 1024): True,
        ("nystrom+conv", "bfloat16", 1024): False,
        ("causal-nystrom+conv", "float32", 1024): False,
    }
    assert len(report.judge([])) == 2 * len(report.GOALS)
    assert len(report.judge([], ["float32", "float16"])) == len(report.GOALS)
    assert str(report.judge(rows)[0]) == "nystrom+conv float32 n=1024: 0.300 of exact, the goal is 0.30: met"
    assert {goal.form for goal in report.GOALS} <= set(run.FORMS)


def test_growth_is_the_slope_of_the_logarithms() -> None:
    def row(form: str, length: int, seconds: float) -> Row:
        return Row(form, form, "float32", length, None, total_seconds=Spread(seconds, 0.0, 9.0))

    rows = [*(row("a", n, 3e-6 * n**1.1) for n in (1024, 4096, 8192)), row("b", 1024, 1.0), row("c", 8, 1.0)]
    rows += [row("c", 16, 4.0), Row("c", "c", "float32", 32, "memory")]
    a, c = report.growth(rows)
    assert (a.form, a.shortest, a.longest, a.slope) == ("a", 1024, 8192, pytest.approx(1.1))
    assert (c.form, c.longest, c.slope) == ("c", 16, pytest.approx(2))
    assert "n^1.10" in report.growth_table([a])


# --------------------------------------------------------------------------------------------------------- the command


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    arguments = [*TINY, "--lengths", "32,48", "--dtypes", "float32,bfloat16", "--repeats", "2", "--profile"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith(("| float32", "| bfloat16"))]
    assert len({line.count("|") for line in table}) == 3, "one width for each of the three tables"
    assert any(line.startswith("No goals: they are for --heads 12") for line in lines)

    content = json.loads(out.read_text())
    assert content["schema"] == 1
    assert content["complete"] is True
    assert content["provenance"]["command"].startswith("python -m benchmarks.attention --heads 2 --head-dim 8")
    assert {"torch", "cpu", "gpu", "threads", "date"} <= content["provenance"].keys()
    assert content["settings"]["causal_model"]["segment_length"] == 4
    assert set(content["peak_flops_per_second"]) == {"float32", "bfloat16"}
    assert len(content["rows"]) == 2 * 2 * len(run.FORMS)
    for row in content["rows"]:
        if row["skipped"] is not None:
            assert row["form"] in INSTALLED
            continue
        assert row["rounds"] == 2
        assert 0 < row["forward_seconds"]["median"] < row["total_seconds"]["median"]
        assert row["peak_share"] > 0
        assert row["kept_bytes"] > 0
        for against in row["against"].values():
            assert against["ratio"]["q1"] <= against["ratio"]["median"] <= against["ratio"]["q3"]
            assert against["flop_ratio"] > 0
    packed = next(row for row in content["rows"] if row["form"] == "packed-nystrom")
    assert list(packed["against"]) == ["sdpa", "packed-sdpa"]
    assert {stage["form"] for stage in content["stages"]} == set(OURS)
    assert {found["form"] for found in content["growth"]} >= set(OURS)
    assert all(stage["share"] > 0 for stage in content["stages"])


def test_without_exact_only_what_is_named_runs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--lengths", "32", "--dtypes", "float32", "--repeats", "1", "--forms", "causal-pyramid"]
    assert cli.main([*arguments, "--without-exact"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| float32")]
    assert len(lines) == 1
    assert "causal-pyramid | exact was skipped" in lines[0]


def test_a_form_over_the_memory_cap_is_skipped_saying_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = setting(64, batch=1)
    cap = (run.FORMS["nystrom"].gibibytes(where) + run.FORMS["sdpa"].gibibytes(where)) / 2
    out = tmp_path / "results.json"
    arguments = [*TINY, "--lengths", "64", "--dtypes", "float32", "--repeats", "1", "--forms", "nystrom"]
    assert cli.main([*arguments, "--max-gib", str(cap), "--out", str(out)]) == 0
    assert "skipped: may need" in capsys.readouterr().out
    sdpa, nystrom = json.loads(out.read_text())["rows"]
    assert sdpa["skipped"] is None
    assert "--max-gib" in nystrom["skipped"]


@pytest.mark.parametrize(("limit", "status"), [(1e9, 0), (1e-9, 1)])
def test_check_is_the_exit_status(limit: float, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "GOALS", (report.Goal("nystrom+conv", 128, limit), report.Goal("nystrom", 9, 0.1)))
    arguments = ["--lengths", "128", "--dtypes", "float32", "--repeats", "1", "--forms", "nystrom+conv"]
    assert cli.main([*arguments, "--check"]) == status
    assert cli.main(arguments) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "64,x"], "--lengths: 'x' is not a whole number above 0"),
        (["--lengths", "0"], "--lengths: '0' is not a whole number above 0"),
        (["--lengths", ","], "--lengths ',': names nothing"),
        (["--dtypes", "int8"], "--dtypes: no 'int8'; there are float32"),
        (["--forms", "sdpa,flash"], "--forms: no 'flash'; there are sdpa, nystrom"),
        (["--heads", "0"], "--heads 0: must be at least 1"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--seconds", "nan"], "--seconds nan: must be a positive number"),
        (["--max-gib", "-1"], "--max-gib -1.0: must be a positive number"),
        (["--conv-kernel", "64"], "conv_kernel 64 is even"),
        (["--segment-length", "1"], "segment_length: Input should be greater than 1"),
        (["--device", "tpu"], "--device tpu: "),
        (["--device", "meta"], "--device meta: can be timed on cpu and cuda only"),
        (["--out", "no/such/folder/results.json"], "--out no/such/folder/results.json: must be a file in a folder"),
        (["--check", "--heads", "2"], "--check: they are for --heads 12"),
        (["--check", "--lengths", "999"], "--check: no goal is for one of these forms, lengths and precisions"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(cli.main, "benchmarks.attention", arguments) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert message in said


def test_an_error_of_ours_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr("benchmarks.attention.forms.causal_nystrom_attention", broken)
    with pytest.raises(RuntimeError, match="broken"):
        run.measure([run.FORMS["causal-inverse"]], setting(16), run.Effort(1, 0, None), 1e9)
    with pytest.raises(UserError, match="no 'x'"):
        cli.main(["--forms", "x"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: flash reference and peak memory not tested")
def test_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    arguments = [*TINY, "--device", "cuda", "--lengths", "64", "--dtypes", "float32,bfloat16", "--repeats", "2"]
    assert cli.main([*arguments, "--head-dim", "16", "--profile", "--out", str(out)]) == 0
    rows = [row for row in json.loads(out.read_text())["rows"] if row["form"] not in INSTALLED]
    assert all(row["skipped"] is None and row["peak_bytes"] > 0 for row in rows)
