"""The text that all competitors tokenize: the Python sources of this environment, the same files in the same order."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import UserError

FILES = 16  # JSONL files, so that everybody can share the work


def sources() -> Iterator[str]:
    """Texts of the .py files of the standard library and of the installed packages, sorted by path."""
    for name in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(name))
        for path in sorted(root.rglob("*.py")):
            if name == "stdlib" and "site-packages" in path.parts:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                yield text


def write_corpus(folder: Path, megabytes: float, repeat: int = 1) -> tuple[int, int]:
    """Write about ``megabytes`` MB of text, ``repeat`` times over, to JSONL files; (documents, bytes of text)."""
    folder.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    size = 0
    for text in sources():
        texts.append(text)
        size += len(text.encode())
        if size >= megabytes * 1e6:
            break
    if size < megabytes * 0.9e6:
        raise UserError(f"this environment has {size / 1e6:.0f} MB of Python sources: lower --megabytes")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    for number in range(FILES):
        with open(folder / f"{number:02d}.jsonl", "w", encoding="utf-8") as f:
            for _ in range(repeat):
                f.writelines(lines[number::FILES])
    return len(texts) * repeat, size * repeat
