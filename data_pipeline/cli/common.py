"""What the commands of ``nystrom data`` share: help, the options for inputs, the progress bar."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipeline.prepare.run import UnitResult
    from data_pipeline.sources.documents import Document


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or action.required:
            return action.help
        return super()._get_help_string(action)


def add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        action="extend",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders (searched to any depth) or quoted patterns such as 'data/**/*.parquet'; may be repeated",
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="field of JSONL or column of Parquet with the text"
    )


class Progress:
    """A progress bar over the text that passes, and the numbers for the closing line."""

    def __init__(self, description: str, total: int | None) -> None:
        from tqdm import tqdm

        self.started = time.monotonic()
        self.documents = 0
        self.text_bytes = 0
        self._bar = tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=None)

    def document(self, document: Document) -> None:
        """Count a document."""
        self.documents += 1
        self.text_bytes += document.size
        self._bar.update(document.size)
        if self.documents % 64 == 0:
            self._bar.set_postfix_str(f"{self.documents:,} documents", refresh=False)

    def reused(self, result: UnitResult) -> None:
        """Move past a unit that an earlier run finished."""
        self._bar.initial += result.text_bytes
        self._bar.n += result.text_bytes

    def close(self, whole: bool = True) -> None:
        """Take the bar down; after a whole pass it stands at its end (JSON's own characters are no text)."""
        if whole and self._bar.total is not None:
            self._bar.total = self._bar.n
        self._bar.close()

    def speed(self) -> str:
        """Seconds and MB/s so far."""
        seconds = time.monotonic() - self.started
        return f"{seconds:.1f} s, {self.text_bytes / 1e6 / max(seconds, 1e-9):.2f} MB/s"


def counted(documents: int, empty: int) -> str:
    return f"{documents:,} documents" + (f" ({empty:,} without text skipped)" if empty else "")
