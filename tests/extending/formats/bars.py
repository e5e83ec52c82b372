"""Files ``*.bars``: a label, a bar and a text on each line."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.sources.format import Format, Found, Source, register
from data_pipeline.sources.reading import Bad, Wanted, excerpt_of


@register
class Bars(Format):
    """Records have the fields ``label`` and ``text``."""

    name = "bars"
    suffixes = (".bars",)
    unit = "line"  # what messages count in
    cut = "lines"  # several processes may share a file, cut at ends of lines

    def read(self, source: Source, wanted: Wanted) -> Iterator[Found]:
        """The records of a piece; a broken one is yielded as ``Bad``, and reading continues behind it."""
        for number, offset, line in source.lines():
            label, bar, text = line.decode().partition("|")
            fault = Bad("no bar", "no | in the line", excerpt_of(line))
            yield Found({"label": label, "text": text} if bar else fault, number, offset, line)
