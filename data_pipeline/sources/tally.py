"""What a pass over documents has seen, and when too much of it was broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from data_pipeline.errors import UserError

MAX_BAD_FRACTION = 0.001
BAD_SAMPLES = 100  # kept of each piece
_EARLY = 100  # broken records before a run may be stopped in the middle of a unit
_EARLY_FACTOR = 10  # and how many times the allowed fraction they must be
_SHOWN = 3  # samples in a message


@dataclass(frozen=True)
class BadRecord:
    """A record that gave no text.

    ``record`` is the line of a file (for CSV the one where the record begins) or the row of Parquet and hub data, from
    1. It is None where it is known only by counting (see :meth:`Tally.located`). ``offset`` is the byte at which its
    line begins in a file that is not compressed, None for other kinds.
    """

    source: str  # name of the input
    record: int | None
    unit: str  # "line" or "row"
    offset: int | None
    reason: str  # short, to count by
    detail: str
    excerpt: str  # at most 200 characters


@dataclass
class Tally:
    """Counts over the pieces read with it; ``records`` = documents + empty + broken ones.

    A pass that skips broken records raises :class:`UserError` early, once 100 or more were broken and they are more
    than ten times ``max_bad_fraction`` of the records; :meth:`check` draws the line exactly. With a fraction of 0 the
    first broken record raises.
    """

    max_bad_fraction: float = MAX_BAD_FRACTION
    documents: int = 0
    empty: int = 0  # null or nothing but white space: skipped
    records: int = 0
    text_bytes: int = 0  # UTF-8 bytes of the documents
    bad: Counter[str] = field(default_factory=Counter)
    bad_samples: list[BadRecord] = field(default_factory=list)
    digest: str | None = None  # of the last piece, once it was read to its end
    locations: dict[str, str] = field(default_factory=dict)  # of the inputs with samples
    _room: int = field(default=BAD_SAMPLES, init=False, repr=False, compare=False)

    def begin(self) -> None:
        """Start a piece."""
        self.digest = None
        self._room = BAD_SAMPLES

    def add_bad(self, sample: BadRecord, location: str) -> None:
        """Count a broken record (``records`` has counted it already); ``location`` is the path for messages.

        Raises :class:`UserError` when it is one too many.
        """
        self.bad[sample.reason] += 1
        if self._room:
            self._room -= 1
            self.bad_samples.append(sample)
            self.locations[sample.source] = location
        total = self.bad.total()
        early = total >= _EARLY and total > _EARLY_FACTOR * self.max_bad_fraction * self.records
        if early or self.max_bad_fraction == 0:
            raise self._too_many()

    def check(self, slack: int = 0) -> None:
        """Raise :class:`UserError` if more than ``max_bad_fraction`` of the records, and more than ``slack``, were
        broken."""
        if self.bad.total() > max(slack, self.max_bad_fraction * self.records):
            raise self._too_many()

    def located(self, samples: Iterable[BadRecord] | None = None) -> list[BadRecord]:
        """The samples with line numbers where only an offset was known: reads each such file once, up to the last."""
        samples = list(self.bad_samples if samples is None else samples)
        unknown: dict[str, set[int]] = {}
        for sample in samples:
            if sample.record is None and sample.offset is not None:
                unknown.setdefault(sample.source, set()).add(sample.offset)
        lines = {source: _line_numbers(self.locations[source], offsets) for source, offsets in unknown.items()}
        return [
            replace(s, record=lines[s.source].get(s.offset)) if s.record is None and s.offset is not None else s
            for s in samples
        ]

    def _too_many(self) -> UserError:
        shown = self.located(self.bad_samples[:_SHOWN])
        lines = [f"{self.place(sample)}: {sample.detail}" for sample in shown]
        if self.max_bad_fraction == 0:
            return UserError(f"{lines[0]}; mend the record or leave it out")
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.bad.items()))
        return UserError(
            f"{self.bad.total():,} of {self.records:,} records are broken ({reasons}), more than the fraction "
            f"{self.max_bad_fraction:g} that is allowed; the first:\n"
            + "".join(f"  {line}\n" for line in lines)
            + self._remedy()
        )

    def _remedy(self) -> str:
        """What to do about too many: where most lack the text's field, another one was meant."""
        usual = "mend or leave out these inputs, or allow more with --max-bad-fraction"
        if 2 * (self.bad["no field"] + self.bad["not text"]) > self.records:
            choose = "choose the text's field with --text-field (meta.text: a field of a field) or --template"
            return f"{choose}; or {usual}"
        if 2 * self.bad["not UTF-8"] > self.bad.total():
            return f"{usual}; `iconv -f latin1 -t utf-8 FILE > NEW` rewrites text of an encoding that you know"
        if self.bad["not an object"] and any("not list" in sample.detail for sample in self.bad_samples):
            return f"{usual}; `jq -c '.[]' FILE > NEW.jsonl` writes a list's records on lines of their own"
        return usual

    def place(self, sample: BadRecord) -> str:
        """Where a sample is, for messages."""
        where = self.locations.get(sample.source, sample.source)
        if sample.record is not None:
            return f"{where}, {sample.unit} {sample.record}"
        return where if sample.offset is None else f"{where}, byte {sample.offset}"


def _line_numbers(path: str, offsets: set[int]) -> dict[int | None, int]:
    """Numbers, from 1, of the lines that begin at these byte offsets; fewer if the file cannot be read any more."""
    numbers: dict[int | None, int] = {}
    position, line = 0, 1
    try:
        with open(path, "rb") as stream:
            for offset in sorted(offsets):
                while position < offset and (data := stream.read(min(1 << 20, offset - position))):
                    position += len(data)
                    line += data.count(b"\n")
                numbers[offset] = line
    except OSError:
        pass  # the message names the byte instead
    return numbers
