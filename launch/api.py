"""What a Python program or a notebook calls, besides training: text to shards, a checkpoint to results.

:mod:`nystrom_pretrain` hands these functions out under the project's own name.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.shards.shardset import ShardSet
from data_pipeline.tokenization.tokenizer import Tokenizer
from launch.results import Results

if TYPE_CHECKING:
    from data_pipeline.sources.corpus import FileCorpus
    from data_pipeline.sources.reading import Normalization, Reading, TextUnit
    from eval.model import Model, Precision
    from eval.results.schema import Result
    from launch.training import Run

Rows = Iterable[str | Mapping[str, Any]]
DEFAULT_VOCABULARY = 32768


def prepare(
    texts: str | Path | Iterable[Path] | Rows,
    out: str | Path,
    *,
    tokenizer: str | Path | Tokenizer | ShardSet | None = None,
    vocab_size: int = DEFAULT_VOCABULARY,
    text_field: str = "text",
    text_unit: TextUnit = "file",
    normalize: Normalization | None = None,
    filters: Sequence[str] = (),
    dedup: str | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> ShardSet:
    """Tokenize texts into the shard folder ``out``; done already, or in part, it does what is left.

    ``texts``: a string or a ``Path`` is a file, a folder or a glob, and a list of ``Path`` several of them. Other
    iterables give the texts themselves: strings, or rows such as those of ``datasets.Dataset``, of which
    ``text_field`` is taken. ``tokenizer``: a folder, a :class:`Tokenizer`, or other shards, to have theirs; None trains
    byte-level BPE of ``vocab_size`` tokens on the texts, for which they are read twice. The shards keep a copy.
    ``text_unit``, ``normalize``, ``filters``, ``dedup``, ``workers`` and ``overwrite`` are the options of ``nystrom
    data prepare``. More than one worker starts processes: a script then needs ``if __name__ == "__main__":``.

    Raises :class:`UserError` for what cannot be read, no text at all, and a folder that holds something else.
    """
    from data_pipeline.cli.common import Progress
    from data_pipeline.prepare.dataset import stream_of
    from data_pipeline.prepare.plan import Settings, plan_preparation, plan_stdin
    from data_pipeline.prepare.run import PrepareOptions
    from data_pipeline.prepare.run import prepare as tokenize
    from data_pipeline.quality.duplicates import Dedup
    from data_pipeline.quality.filters import Filters
    from data_pipeline.sources.corpus import open_corpus
    from data_pipeline.sources.reading import Reading

    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    reading = Reading(text_field, None, text_unit, normalize)
    settings = Settings(reading, Filters.parse(filters), Dedup.parse(dedup) if dedup else None)
    paths, rows = _paths_or_rows(texts)
    corpus = open_corpus(paths, Path(out)) if paths else None
    if rows is not None and dedup:
        raise UserError("dedup reads the texts twice, from files: write them to a .jsonl file and give its Path")
    if rows is not None and tokenizer is None and iter(rows) is rows:
        raise UserError("an iterator is read once, and no tokenizer is given: give a list, or a tokenizer")
    known = _tokenizer(tokenizer) if tokenizer is not None else _trained(corpus, rows, reading, vocab_size)
    stream: io.BufferedReader | None = None
    if corpus is not None:
        preparation = plan_preparation(corpus, known, settings)
    else:
        lines = _lines(rows or (), text_field)
        first = list(itertools.islice(lines, 1))  # what is no text is found before the folder is touched
        stream = stream_of(itertools.chain(first, lines))
        # The lines have one field, whatever it was called.
        settings = replace(settings, reading=replace(reading, text_field="text"))
        preparation = plan_stdin("jsonl", known, settings)
    progress = Progress("tokenizing", preparation.text_bytes)
    whole = False
    try:
        done = tokenize(
            preparation,
            out,
            PrepareOptions(workers=workers, overwrite=overwrite),
            stream=stream,
            on_text=progress.text,
            on_phase=progress.phase,
            on_loss=lambda found: progress.note(f"note: {found}"),
        )
        whole = not done.already_complete
    finally:
        progress.close(whole)
    assert done.shards is not None  # there are no parts
    return done.shards


def load(path: str | Path | Run, *, device: str = "auto", precision: Precision = "fp32") -> Model:
    """The :class:`Model` of a run, one of its checkpoints or an export; see :meth:`Model.open` for the errors."""
    from eval.model import Model

    return Model.open(_folder(path), device, precision)


def evaluate(
    checkpoint: str | Path | Run | Model | None,
    suites: str | Sequence[str],
    *,
    data: str | Path | ShardSet | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    suite_path: Sequence[str | Path] = (),
    force: bool = False,
    rerun: bool = False,
    strict: bool = False,
    **settings: Any,
) -> Results:
    """Run suites on a checkpoint, behind the validity gate; results are kept in ``out`` (default: RUN/eval).

    ``suites``: names of ``nystrom eval list``, or YAML files. ``data``: held-out shards, left out: those of the run.
    ``settings`` are of all suites that have them, as in ``length=512``, or of one, as in ``lm__length=512``. ``force``
    scores a model that the gate refuses; ``rerun`` computes again what is there for the same weights, settings and
    data. ``checkpoint`` may be None for suites that train their own models; ``out`` is needed then.

    A suite that cannot be run does not keep the others from running, as on the command line: a generation of a masked
    model, data that are missing, a gate that failed. ``Results.skipped`` has its reason, and a warning says so.
    ``strict`` raises at the first of them.

    Raises :class:`UserError` for an unknown suite or setting before anything is computed, and where no suite could be
    run, the gate apart. What was computed before an error stays in the folder. The suite "validity" alone raises
    nothing where it fails: its metric ``passed`` is 0.
    """
    import torch

    from eval.cli import check_data
    from eval.results.records import results_folder
    from eval.runner import Runner
    from eval.subject import load_subject
    from eval.suites.load import load_suites

    if not isinstance(suites, Iterable):
        raise UserError(f"suites must be a name or several, not {type(suites).__name__}")
    names = [suites] if isinstance(suites, str) else list(suites)
    if not names:
        raise UserError("no suite is named: `nystrom eval list` describes them")
    chosen = load_suites(names, suite_path, [_setting(key, value) for key, value in settings.items()])
    check_data(None if data is None else str(getattr(data, "path", data)), chosen)
    needing = [suite.name for suite in chosen if suite.task.needs_checkpoint]
    if checkpoint is None and (needing or out is None):
        what = f"suite {needing[0]} evaluates a model: give a checkpoint" if needing else "say where results go: out"
        raise UserError(what)
    # A network draws weights before it gets its own, and tasks that train seed torch: the caller's draws stay.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        subject = None
        if checkpoint is not None:
            shards = data.path if isinstance(data, ShardSet) else data
            subject = load_subject(_folder(checkpoint), shards, device)
        if out is None:
            assert subject is not None
            assert checkpoint is not None
            folder = results_folder(_folder(checkpoint), subject.loaded.run_dir)
        else:
            folder = Path(out)
        runner = Runner(subject, folder, force=force, rerun=rerun)
        found: dict[str, Result] = {}
        skipped: dict[str, str] = {}
        runner.expect(chosen)
        for suite in sorted(chosen, key=lambda suite: not suite.task.is_gate):
            if device != "auto" and "device" in type(suite.settings).model_fields:
                suite = replace(suite, settings=suite.settings.model_copy(update={"device": device}))
            try:
                found[suite.name], _ = runner.run(suite)
            except UserError as error:
                if strict:
                    raise
                skipped[suite.name] = str(error)
    return _with_warning(Results(found, folder, skipped), {suite.name for suite in chosen if suite.task.is_gate})


def _with_warning(results: Results, gates: set[str]) -> Results:
    """The results; warns of suites that were skipped, and raises where only the gate is left of several."""
    skipped = results.skipped
    if skipped and not set(results) - gates:
        reasons: dict[str, list[str]] = {}
        for name, reason in skipped.items():
            reasons.setdefault(reason, []).append(name)
        lines = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        raise UserError(next(iter(reasons)) if len(skipped) == 1 else "no suite could be run\n" + "\n".join(lines))
    if skipped:
        warnings.warn(f"not run: {', '.join(skipped)}; `skipped` of the results has the reasons", stacklevel=3)
    return results


def report(
    runs: str | Path | Run | Sequence[str | Path | Run], out: str | Path = "report.html", *, title: str | None = None
) -> Path:
    """Write one HTML page that compares runs; returns its path.

    Raises :class:`UserError` for a folder that is no run, and a page that cannot be written.
    """
    from data_pipeline.files import write_atomic
    from eval.report.page import render
    from eval.report.runs import read_runs

    several = list(runs) if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder: name the page, for example {out / 'report.html'}")
    text = render(read_runs([str(_folder(run)) for run in several]), title)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, text.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    return out


def _folder(place: Any) -> Path:
    """The folder of a path, a :class:`Run` or a :class:`Model`."""
    return Path(getattr(place, "folder", None) or getattr(place, "path", None) or place)


def _setting(key: str, value: Any) -> tuple[str | None, str, Any]:
    suite, dot, name = key.replace("__", ".").rpartition(".")
    return suite if dot else None, name, value


def _tokenizer(given: str | Path | Tokenizer | ShardSet) -> Tokenizer:
    if isinstance(given, ShardSet):
        return given.tokenizer()
    return given if isinstance(given, Tokenizer) else Tokenizer.load(given)


def _trained(corpus: FileCorpus | None, rows: Rows | None, reading: Reading, vocab_size: int) -> Tokenizer:
    from data_pipeline.sources.documents import iter_documents
    from data_pipeline.sources.tally import Tally
    from data_pipeline.tokenization.training import train_tokenizer

    if corpus is not None:
        return train_tokenizer((each.text for each in iter_documents(corpus, reading, Tally())), vocab_size)
    texts = (_text(row, number, reading.text_field) for number, row in enumerate(rows or ()))
    return train_tokenizer((text for text in texts if text is not None), vocab_size)


def _paths_or_rows(texts: Any) -> tuple[list[str | Path], Rows | None]:
    """The inputs that are named, or the texts that are given."""
    if isinstance(texts, str | Path):
        return [texts], None
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | Mapping):
        raise UserError(f"texts must be a path, or an iterable of texts or rows, not {type(texts).__name__}")
    if isinstance(texts, Sequence) and len(texts):
        if all(isinstance(one, Path) for one in texts):
            return list(texts), None
        first = texts[0]
        if isinstance(first, str) and os.path.isfile(first):  # where Path.is_file raises on a long text, this says no
            raise UserError(f"{first!r} is the name of a file, and strings in a list are texts: give Path objects")
    return [], texts


def _text(row: Any, number: int, field: str) -> str | None:
    """The text of a row, None where it has none; raises :class:`UserError` for what is no text."""
    text = row
    if isinstance(row, Mapping):
        if field not in row:
            raise UserError(f"row {number} has no field '{field}' but {', '.join(map(str, row))}: name one, text_field")
        text = row[field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"row {number} is {type(text).__name__}, not text")
    return text


def _lines(rows: Rows, field: str) -> Iterator[bytes]:
    for number, row in enumerate(rows):
        text = _text(row, number, field)
        # JSON's escapes: half a surrogate pair is then a broken record, counted as those of files are.
        yield json.dumps({"text": text}).encode() + b"\n"
