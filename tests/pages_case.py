"""The blocks of commands and of Python in the pages, and the comment before each that says what runs it.

======================================== =========================================================================
``<!-- run -->``                         ``documents/test_page_commands.py`` runs it, in the page's order
``<!-- run: tests/a.py::test_b -->``     that test runs the same, or these tests, with commas between them
``<!-- not run: needs a cluster -->``    nothing runs it, and why
``<!-- not run `--gpus 8`: reason -->``  the same for those commands of the block that hold this text; also with ``run``
``<!-- all: not run: reason -->``        the same for all blocks of the page without a comment of their own
======================================== =========================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("**/*.md"))
)
PROGRAMS = (
    "nystrom python python3 pip uv make pytest deepspeed torchrun mpirun accelerate lm_eval wandb tensorboard mkdocs "
    "sbatch srun salloc squeue scancel module docker podman apptainer singularity enroot kubectl helm conda mamba pipx "
    "bash sh ssh scp rsync source export echo cat head tail ls cd cp mv rm mkdir diff grep wc gzip zstd tar curl wget "
    "git sudo printf test ulimit nohup kill tmux sacct sinfo scontrol apt apt-get"
)
_COMMAND = re.compile(
    rf"(?:\w+=\S* )*(?:(?:{'|'.join(PROGRAMS.split())})(?=\s|$)(?! [a-z ]*:)|for \w+ in |\.ci/run\b|\.venv/bin/\w+)"
)
"""What begins a command; not ``nystrom data: error: ...``, which is what one says."""
_MARKER = re.compile(r"(all: )?(run|not run)(?: `([^`]+)`)?(?:: (.+))?", re.DOTALL)
_PYTHON = re.compile(r"(from [\w.]+ import|import \w)")
_FENCE = re.compile(r"( *)(```+)([\w-]*)")


@dataclass(frozen=True)
class Marker:
    """One comment. ``only``: the commands that hold this text, or all. ``told``: tests, a reason, or nothing."""

    run: bool
    only: str | None
    told: str

    @property
    def tests(self) -> list[str]:
        """The tests that run it instead of the runner of the pages."""
        return [name.strip() for name in self.told.split(",")] if self.run and self.told else []

    @property
    def kind(self) -> str:
        """``run``, ``test`` or ``not run``."""
        return ("test" if self.told else "run") if self.run else "not run"


@dataclass(frozen=True)
class Command:
    """A command as it is typed, continued lines joined. ``shown``: the lines that the page has below it."""

    text: str
    shown: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        """The exit status that the page says: 2 where it shows an error."""
        return 2 if any(re.match(r"nystrom[a-z ]*: error:", line) for line in self.shown[:1]) else 0


@dataclass
class Block:
    """A block of code. ``language``: ``shell``, ``python`` or another one, which needs no marker."""

    page: str
    line: int
    lines: list[str]
    language: str = ""
    markers: list[Marker] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{self.page}:{self.line}"

    @property
    def code(self) -> str:
        """The text of the block."""
        return "\n".join(self.lines) + "\n"

    def commands(self) -> list[Command]:
        """The commands of a block of the shell. Where some lines begin with ``$``, only those are commands."""
        lines = re.sub(r"\\\n\s*", "", self.code).splitlines()
        console = any(line.startswith("$ ") for line in lines)
        found: list[tuple[str, list[str]]] = []
        loop = False
        for line in lines:
            begins = line.startswith("$ ") if console else _COMMAND.match(line) is not None
            text = re.sub(r"\s+# .*$", "", line.removeprefix("$ ") if console else line).rstrip()
            if loop:
                found[-1] = (f"{found[-1][0]}\n{text}", [])
            elif begins:
                found.append((text, []))
            elif found and text:
                found[-1][1].append(text.strip())
            loop = (begins and text.startswith("for ")) or (loop and not text.startswith("done"))
        return [Command(text, tuple(shown)) for text, shown in found]

    def marker(self, command: str) -> Marker | None:
        """The marker of a command (of a block of Python: of its code): the one that names it before the one of all."""
        named = [marker for marker in self.markers if marker.only is not None and marker.only in command]
        return next(iter(named or [marker for marker in self.markers if marker.only is None]), None)


@dataclass
class Page:
    """What a page holds. ``faults``: comments that are meant as markers and are none, or that stand before no block."""

    blocks: list[Block]
    faults: list[str]


def read_page(page: str, text: str | None = None) -> Page:
    """All blocks of code of a page, each with its markers. ``text``: in place of the file."""
    lines = (text if text is not None else (REPOSITORY / page).read_text(encoding="utf-8")).splitlines()
    found: list[Block] = []
    faults: list[str] = []
    waiting: list[Marker] = []
    everywhere: list[Marker] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        fence = _FENCE.match(line)
        if line.strip().startswith("<!--"):
            end = next(n for n in range(at, len(lines)) if "-->" in lines[n]) + 1
            inner = " ".join(" ".join(lines[at:end]).split()).removeprefix("<!--").removesuffix("-->").strip()
            told = _MARKER.fullmatch(inner)
            if told:
                marker = Marker(told[2] == "run", told[3], told[4] or "")
                (everywhere if told[1] else waiting).append(marker)
            elif re.match(r"(all|run|not run)\b", inner):
                faults.append(f"{page}:{at + 1}: no marker: {inner}")
            at = end
            continue
        if fence:
            end = next((n for n in range(at + 1, len(lines)) if lines[n].strip() == fence[2]), len(lines))
            body, indent, next_at = lines[at + 1 : end], len(fence[1]), end + 1
        elif line.startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            body = lines[at:end]
            while not body[-1].strip():
                body.pop()
            indent, next_at = min(len(text) - len(text.lstrip()) for text in body if text.strip()), end
        else:
            if line.strip() and waiting:
                faults.append(f"{page}:{at + 1}: the marker above stands before no block (or a blank line is missing)")
                waiting = []
            at += 1
            continue
        block = Block(page, at + 1, [text[indent:] for text in body], fence[3] if fence else "")
        block.language = _language(block)
        block.markers, waiting = waiting, []
        found.append(block)
        at = next_at
    for block in found:
        block.markers = block.markers or everywhere
    return Page(found, faults)


def _language(block: Block) -> str:
    if block.language in ("", "bash", "sh", "shell", "console", "text"):
        if _PYTHON.match(block.code):
            return "python"
        return "shell" if block.commands() else ""
    return block.language


def to_mark(page: str, text: str | None = None) -> list[Block]:
    """The blocks that need a marker: commands, and Python."""
    return [block for block in read_page(page, text).blocks if block.language in ("shell", "python")]
