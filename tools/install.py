"""What `make` does first: this checkout and its packages, installed into a virtual environment.

Only the standard library, since it runs before anything is installed. It says beforehand what it will do and about
how long that takes, shows that pip is alive, shows all of pip's output when pip fails, and does nothing when nothing
has changed. Two at once wait for each other, and a run that was killed in the middle is repaired by the next.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

CHECKOUT = Path(__file__).resolve().parent.parent
PYPROJECT, CONSTRAINTS = "pyproject.toml", "constraints.txt"
STAMP, LOG, LOCK = ".installed.json", "install.log", ".lock"
OURS = {LOCK, LOG}
"""What this program itself writes into an environment before the environment is there."""

ABOUT = {
    "": "about 85 packages: 0.4 GB to download, 1.7 GB on disk, one to five minutes",
    "dev": "about 150 packages: 0.6 GB to download, 2.5 GB on disk, two to ten minutes",
}
CUDA = "\nWhere torch comes as its CUDA build, add some 3 GB to download; README.md says how to get the CPU build."
HEARTBEAT = 30.0
"""Seconds between two signs of life where the output is no terminal."""
NOISE = "is ignored: it is neither a file nor a directory"
"""Of pip's lines, those that a list of indexes gives for each package that one of them has not."""
NETWORK = re.compile(
    r"ProxyError|ConnectionError|ConnectTimeout|Read ?timed out|NewConnectionError|Connection refused|SSLError|"
    r"CERTIFICATE_VERIFY_FAILED|Name or service not known|name resolution|from versions: none|Network is unreachable",
    re.IGNORECASE,
)
FULL = re.compile(r"No space left on device|Disk quota exceeded", re.IGNORECASE)
NETWORK_HINT = """pip could not reach its package index. Behind a proxy, one or more of these, then the same command:
    export HTTPS_PROXY=http://HOST:PORT         the proxy
    export PIP_INDEX_URL=https://HOST/simple    an index of your own in place of the public one
    export PIP_CERT=/path/to/certificates.pem   the proxy's certificate (pip's --cert)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Install what is missing; 0 if all is there, 2 for a mistake to correct, 130 if interrupted, 1 if pip failed."""
    parser = argparse.ArgumentParser(prog="tools.install", description="Install this checkout for make.")
    parser.add_argument("--venv", type=Path, required=True, help="the environment, made if it is missing")
    parser.add_argument("--python", help="the Python that was asked for: an environment of another one is refused")
    parser.add_argument("--extra", default="", choices=sorted(ABOUT), help="an extra of pyproject.toml")
    args = parser.parse_args(argv)
    # A SIGTERM takes the road of Ctrl-C: pip is ended, and what happened is said.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _check_place(args.venv)
        with _alone(args.venv) as lock:
            return _install(args.venv, args.python, args.extra, lock)
    except KeyboardInterrupt:
        print("\nInterrupted: the same command resumes here.", file=sys.stderr)
        return 130
    except OSError as error:
        return _mistake(f"{error.strerror or error}: {error.filename or args.venv}")


def _install(venv: Path, asked: str | None, extra: str, lock: IO[str]) -> int:
    python = venv / "bin" / "python"
    version = _version(python)
    if asked and version and _version(Path(asked)) not in (None, version):
        return _mistake(
            f"{venv} was made by Python {version}, and PYTHON={asked} is Python {_version(Path(asked))}.\n"
            f"Beside it: make PYTHON={asked} VENV=.venv-{_version(Path(asked))}   In its place: make clean first."
        )
    stamp = _read_stamp(venv)
    extras = sorted({*stamp.get("extras", []), extra} - {""})
    wanted = {"project": _project(), "python": version, "extras": extras}
    if version and stamp == wanted:
        return 0

    began = time.monotonic()
    (venv / STAMP).unlink(missing_ok=True)  # whatever happens from here on, the environment is not the one it tells of
    anew = not version or not _has_pip(python)
    shown = version or _version(Path(sys.executable))
    if anew or not stamp:
        note = CUDA if sys.platform == "linux" else ""
        print(f"Installing into {venv} (Python {shown}): {ABOUT['dev' if extras else '']}.{note}", flush=True)
    else:
        print(f"Bringing {venv} (Python {shown}) up to {PYPROJECT} and {CONSTRAINTS}.", flush=True)
    if anew:
        _clear(venv)
        made = subprocess.run([_base_python(), "-m", "venv", str(venv)], check=False)
        if made.returncode:
            return _mistake(f"`{_base_python()} -m venv {venv}` failed, see above. On Debian, install python3-venv.")
        wanted["python"] = _version(python)
    for name in _forget_unfinished(python):
        print(f"{name} was left half-installed and is installed again.", flush=True)

    requirement = "." + (f"[{','.join(extras)}]" if extras else "")
    words = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-c", CONSTRAINTS, "-e", requirement]
    status = _watch([str(python), *words], venv / LOG, lock)
    took = _duration(time.monotonic() - began)
    if status:
        _explain(venv, took)
        return 1
    (venv / f"{STAMP}.new").write_text(json.dumps(wanted), encoding="utf-8")
    (venv / f"{STAMP}.new").replace(venv / STAMP)
    print(f"Installed in {took}.", flush=True)
    return 0


def _check_place(venv: Path) -> None:
    """Refuse a folder that is somebody's, before anything is written there."""
    if venv.exists() and not venv.is_dir():
        raise NotADirectoryError(0, "VENV names a file", str(venv))
    ours = not venv.exists() or (venv / "pyvenv.cfg").exists() or (venv / LOCK).exists()
    if not ours and any(venv.iterdir()):
        raise FileExistsError(0, "VENV names a folder that is no virtual environment and not empty", str(venv))
    if os.pathsep in str(venv.absolute()):
        raise OSError(0, f"a virtual environment's path can't contain '{os.pathsep}'; say another with VENV", str(venv))


@contextmanager
def _alone(venv: Path) -> Iterator[IO[str]]:
    """Wait until nobody else installs into this environment. The lock is the system's: a killed holder has none."""
    venv.mkdir(parents=True, exist_ok=True)
    with (venv / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another make is installing into {venv}: waiting until it is done.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield lock


def _watch(command: list[str], log: Path, lock: IO[str]) -> int:
    """Run pip with its output in ``log``, showing what it is at; its status."""
    # pip writes to a file, not to us: were we killed, it would go on rather than break off in the middle of a package.
    # It holds the lock too, so that no other make starts before it has ended.
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    with log.open("w", encoding="utf-8") as out, log.open(encoding="utf-8", errors="replace") as written:
        process = subprocess.Popen(
            command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, pass_fds=[lock.fileno()]
        )
        progress = Progress(sys.stdout.isatty(), shutil.get_terminal_size().columns)
        try:
            while process.poll() is None:
                progress.read(written.read())
                progress.show()
                time.sleep(0.2)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            progress.close()
        return process.returncode


class Progress:
    """What pip is at: one line that is rewritten on a terminal, elsewhere a line now and then."""

    def __init__(self, terminal: bool, columns: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.terminal, self.columns, self.clock = terminal, columns, clock
        self.began = self.shown = clock()
        self.packages = 0
        self.megabytes = 0.0
        self.doing = "starting"
        self.rest = ""

    def read(self, text: str) -> None:
        """Take more of pip's output."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in map(str.strip, lines):
            if line.startswith(("Collecting ", "Processing ")):
                self.packages += 1
                self.doing = f"looking at {line.split()[1].rsplit('/', 1)[-1]}"
            elif found := re.match(r"Downloading (\S+) \((?P<size>[\d.]+) (?P<unit>[kMG])B\)", line):
                self.megabytes += float(found["size"]) * {"k": 1e-3, "M": 1.0, "G": 1e3}[found["unit"]]
                self.doing = (
                    f"downloading {found[1].rsplit('/', 1)[-1].split('-')[0]}, {found['size']} {found['unit']}B"
                )
            elif line.startswith("Building wheel"):
                self.doing = line.split("(")[0].strip().lower()
            elif line.startswith("Installing collected packages"):
                self.doing = f"unpacking {line.count(',') + 1} packages"

    def show(self) -> None:
        """Say it, where it is time to."""
        now = self.clock()
        if not self.terminal and now - self.shown < HEARTBEAT:
            return
        self.shown = now
        line = (
            f"  {_duration(now - self.began)}: {self.doing} ({self.packages} packages, {self.megabytes:.0f} MB so far)"
        )
        if self.terminal:
            print(f"\r\033[K{line[: self.columns - 1]}", end="", flush=True)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", flush=True)


def _explain(venv: Path, took: str) -> None:
    """Show all that pip said but `NOISE`, and what may help."""
    text = (venv / LOG).read_text(encoding="utf-8", errors="replace")
    print("\n".join(line for line in text.splitlines() if NOISE not in line), file=sys.stderr)
    print(f"\npip failed after {took}; its output is above, and in {venv / LOG} to the last line.", file=sys.stderr)
    if FULL.search(text):
        room = ", ".join(f"{shutil.disk_usage(path).free / 1e9:.1f} GB in {path}" for path in (venv, _temporary()))
        print(f"A disk is full. Free: {room}. TMPDIR=/elsewhere moves pip's temporary files.", file=sys.stderr)
    elif NETWORK.search(text):
        print(NETWORK_HINT, file=sys.stderr)
    print("The same command resumes here.", file=sys.stderr)


def _temporary() -> Path:
    return Path(os.environ.get("TMPDIR", "/tmp"))


def _forget_unfinished(python: Path) -> list[str]:
    """Have pip install again what it was killed over; the names of it.

    pip takes a package for installed once its metadata is there, which may come before its other files; what it writes
    after all of them is INSTALLER.
    """
    code = "import sysconfig; print(sysconfig.get_path('purelib')); print(sysconfig.get_path('platlib'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    names = []
    for folder in map(Path, sorted(set(done.stdout.splitlines()))):
        for info in sorted(folder.glob("*.dist-info")):
            if not (info / "INSTALLER").exists():
                shutil.rmtree(info)
                names.append(info.name.split("-")[0])
        for leftover in folder.glob("~*"):  # the old version, set aside while the new one was unpacked
            shutil.rmtree(leftover, ignore_errors=True)
    return names


def _clear(venv: Path) -> None:
    """Remove a broken environment's contents, but not the lock that we hold."""
    for path in venv.iterdir():
        if path.name not in OURS:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _project() -> str:
    """A checksum of what decides which packages belong into the environment."""
    project = tomllib.loads((CHECKOUT / PYPROJECT).read_text(encoding="utf-8"))
    parts = [project["build-system"], project["project"], project["tool"]["setuptools"]]
    text = json.dumps(parts, sort_keys=True) + (CHECKOUT / CONSTRAINTS).read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def _read_stamp(venv: Path) -> dict[str, Any]:
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and isinstance(stamp.get("extras"), list) else {}


def _version(python: Path) -> str | None:
    """The version of this Python, as 3.12; None if it does not run."""
    try:
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _has_pip(python: Path) -> bool:
    return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def _base_python() -> str:
    """This Python outside any environment: it may be that of the environment that is to be made again."""
    return getattr(sys, "_base_executable", "") or sys.executable


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _mistake(message: str) -> int:
    print(f"make: {message}", file=sys.stderr)
    return 2


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
