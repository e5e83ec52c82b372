"""Checks of all hosts before a run is started on them, at the same time; nothing is started if one of them fails.

Each host reports about itself (:mod:`launch.host_report`). What must be alike is compared with this machine, from which
the run is launched. Then the first host listens, and the others try to reach it there.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from launch import host_report
from launch.hosts import SSH_FAILED, TIMED_OUT, Host, Outcome, run_on, ssh_problem
from launch.plan import SECRETS, LaunchPlan
from pretrain.distributed.agreement import differences

if TYPE_CHECKING:
    from pretrain.config import RunConfig

REPORT_SECONDS = 90.0
"""Importing Python packages from a network file system may take a while."""
MEET_SECONDS = 15.0
CLOCK_SECONDS = 5.0
"""Clocks that differ by more make files seem to be from the future, and logs hard to read."""
LEAST_FREE_BYTES = 256 * 2**20
BUSY_MIB = 1024
"""Drivers and idle contexts take a few hundred MiB of a GPU."""


@dataclass
class Checked:
    """What the checks found."""

    hosts: list[Host]
    """In the order of the ranks."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """By host, what is wrong and what to do."""
    unreachable: set[str] = field(default_factory=set)
    """Those among them that do not answer."""
    master_address: str = ""
    master_port: int = 0

    @property
    def ready(self) -> list[Host]:
        """The hosts without a problem."""
        return [host for host in self.hosts if host.name not in self.problems]

    def message(self) -> str:
        """All that is wrong, a line for each."""
        lines = [f"  {host.name}: {each}" for host in self.hosts for each in self.problems.get(host.name, ())]
        return "\n".join(lines)

    def blame(self, host: str, problem: str) -> None:
        """Add a problem of a host."""
        self.problems.setdefault(host, []).append(problem)


def check_hosts(
    hosts: Sequence[Host],
    plan: LaunchPlan,
    *,
    ssh_args: Sequence[str] = (),
    interface: str | None = None,
    launches: Sequence[str] = (),
) -> Checked:
    """Ask all hosts at the same time, and judge what they say.

    ``launches`` are ids of earlier starts, of which no process may be left. Raises :class:`UserError` where this
    machine itself cannot take part.
    """
    checked = Checked(list(hosts))
    with _token(plan.run_dir) as token:
        asked = {
            "paths": paths_of(plan),
            "run_dir": str(plan.directory / plan.run_dir),
            "token": token.name,
            "launches": list(launches),
        }
        began = time.time()
        outcomes = ask(hosts, asked, plan, ssh_args, REPORT_SECONDS)
        here = host_report.report(asked)
        ended = time.time()
        expected = token.read_text()
    reports = {}
    for host in hosts:
        answer = host_report.parse(outcomes[host.name].output) if outcomes[host.name].code == 0 else None
        if answer is None:
            checked.blame(host.name, _no_answer(outcomes[host.name], plan))
            if outcomes[host.name].code in (SSH_FAILED, TIMED_OUT):
                checked.unreachable.add(host.name)
            continue
        reports[host.name] = answer
        for problem in judge(answer, here, expected, plan, began, ended):
            checked.blame(host.name, problem)
    _refuse_twins(checked, reports)
    if checked.ready:
        _meet(checked, reports, here, plan, ssh_args, interface)
    return checked


def ask(
    hosts: Sequence[Host], asked: Mapping[str, Any], plan: LaunchPlan, ssh_args: Sequence[str], timeout: float
) -> dict[str, Outcome]:
    """Run the report on all hosts, as a run's processes will be run there."""
    words = [plan.program[0], "-m", "launch.host_report", json.dumps(asked)]
    env = {name: value for name, value in plan.environment.items() if not SECRETS.search(name)}
    return run_on(hosts, words, ssh_args=ssh_args, timeout=timeout, directory=plan.directory, env=env)


def paths_of(plan: LaunchPlan) -> list[str]:
    """What every process of the run reads, as paths that mean the same from another folder."""
    from pretrain.config.load import find_config

    config = config_of(plan)
    named = [
        find_config(plan.words[plan.words.index("--config") + 1]),
        *(source.path for source in config.data.sources),
        config.data.valid,
        config.data.tokenizer,
    ]
    return [str(plan.directory / each) for each in named if each is not None]


def config_of(plan: LaunchPlan) -> RunConfig:
    """The configuration of the run."""
    from pretrain.cli import build_parser
    from pretrain.config import load_config

    args = build_parser().parse_args(list(plan.words))
    return load_config(args.config, args.overrides)


def judge(
    answer: Mapping[str, Any], here: Mapping[str, Any], token: str, plan: LaunchPlan, began: float, ended: float
) -> list[str]:
    """What is wrong with a host; it was asked between ``began`` and ``ended`` of this machine's clock."""
    found = []
    different = differences(here["software"], answer["software"])
    if different:
        found.append(f"{'; '.join(different)}: install the same code and packages on all hosts")
    for path, what in answer["paths"].items():
        if here["paths"][path] != what:
            found.append(_path_problem(path, what, here["paths"][path]))
    if answer["token"] != token:
        found.append(
            f"its {plan.run_dir} is not the folder that is here: a run folder is on a file system that all see"
        )
    elif not answer["writable"]:
        found.append(f"{plan.run_dir} cannot be written there: give the user the right to")
    off = max(began - answer["clock"], answer["clock"] - ended)
    if off > CLOCK_SECONDS:
        way = "slow" if answer["clock"] < began else "fast"
        found.append(f"its clock is {off:.0f} s {way}: have chrony or ntpd set it")
    if answer["free_bytes"] is not None and answer["free_bytes"] < LEAST_FREE_BYTES:
        found.append(f"{answer['free_bytes'] / 2**20:.0f} MiB are free in {plan.run_dir}: the disk is full")
    found += _gpu_problems(answer["gpus"], here, plan)
    if answer["launches"]:
        found.append("processes of an earlier start of this run are still there: wait for them, or end them")
    return found


def _path_problem(path: str, there: str, here: str) -> str:
    if there == "nothing":
        return f"it does not see {path}: mount the file system there too"
    if there.startswith("unreadable"):
        return f"{path} is {there}"
    if here == "nothing":
        return f"{path} is there but not here"
    return f"{path} is not the one that is here: use the same on all hosts"


def _gpu_problems(used: Sequence[int], here: Mapping[str, Any], plan: LaunchPlan) -> list[str]:
    if not used:
        return []
    if len(used) < plan.processes:
        return [
            f"{plan.processes} processes, but {len(used)} GPU{'s' * (len(used) > 1)}: correct its slots, or --nproc"
        ]
    if "CUDA_VISIBLE_DEVICES" in plan.environment:
        named = [each.strip() for each in plan.environment["CUDA_VISIBLE_DEVICES"].split(",")]
        numbers = [int(each) for each in named if each.isdigit() and int(each) < len(used)]
    else:
        numbers = list(range(plan.processes))
    busy = [f"GPU {number} ({used[number]} MiB)" for number in numbers if used[number] > BUSY_MIB]
    remedy = "end what uses them, or leave this host out with --exclude"
    return [f"in use already: {', '.join(busy)}: {remedy}"] if busy else []


def _no_answer(outcome: Outcome, plan: LaunchPlan) -> str:
    problem = ssh_problem(outcome)
    if problem is not None:
        return problem
    last = (outcome.output.strip().splitlines() or [f"status {outcome.code}"])[-1]
    text = outcome.output
    if str(plan.directory) in last and ("cd" in last or "No such file" in last):
        return f"the folder {plan.directory} is not there: the code must be at the same place on all hosts"
    if outcome.code in (126, 127):
        return f"{plan.program[0]} cannot be run there ({last}): install the same environment on all hosts"
    if "No module named" in text:
        return f"its Python cannot find the project ({last}): install the same code and packages on all hosts"
    return f"it cannot say how it is: {last}"


def _refuse_twins(checked: Checked, reports: Mapping[str, Mapping[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for name, answer in reports.items():
        first = seen.setdefault(answer["machine"], name)
        if first != name:
            checked.blame(name, f"it is the same machine as {first}: name each machine once, with all its slots")
    gpus = {name: len(answer["gpus"]) for name, answer in reports.items()}
    if any(gpus.values()):
        for name, number in gpus.items():
            if number == 0:
                checked.blame(name, "it has no GPU (nvidia-smi shows none), and others have: mend its driver")


def _meet(
    checked: Checked,
    reports: Mapping[str, Mapping[str, Any]],
    here: Mapping[str, Any],
    plan: LaunchPlan,
    ssh_args: Sequence[str],
    interface: str | None,
) -> None:
    """Choose address and port of the first host, and have the others try them."""
    if interface is not None:
        for host in checked.ready:
            if interface not in reports[host.name]["interfaces"]:
                names = ", ".join(reports[host.name]["interfaces"])
                checked.blame(
                    host.name, f"it has no interface {interface} that is up, but {names}: correct --interface"
                )
    hosts = checked.ready
    if not hosts:
        return
    first = hosts[0]
    address = master_address(first.name, {host.name: reports[host.name] for host in hosts}, here, interface)
    if address is None:
        checked.blame(
            first.name,
            "the others cannot reach it: this machine reaches it only at a loopback address. Name the network with "
            "--interface",
        )
        return
    checked.master_address, checked.master_port = address, reports[first.name]["ports"][0]
    if len(hosts) == 1:
        return
    asked = {
        "address": address,
        "port": checked.master_port,
        "first": reports[first.name]["machine"],
        "others": len(hosts) - 1,
        "seconds": MEET_SECONDS,
    }
    outcomes = ask(hosts, asked, plan, ssh_args, REPORT_SECONDS)
    for host in hosts:
        answer = host_report.parse(outcomes[host.name].output)
        if host == first and (answer is None or answer["problem"] is not None):
            checked.master_address = ""
        if answer is None:
            checked.blame(host.name, _no_answer(outcomes[host.name], plan))
        elif answer["problem"] is not None:
            what = "listen at" if host == first else f"reach {first.name} at"
            remedy = "let the hosts of a run reach all ports of each other, or name another network with --interface"
            checked.blame(host.name, f"it cannot {what} {answer['problem']}: {remedy}")


def master_address(
    first: str, reports: Mapping[str, Mapping[str, Any]], here: Mapping[str, Any], interface: str | None
) -> str | None:
    """The address of the first host by which the others reach it; None if there is none but a loopback address.

    That is the one of ``interface``; else the one to which this machine's ssh connected. Where the first host is this
    machine, that may be 127.0.1.1, which Debian gives to a machine's own name; then the address from which the others
    were called.
    """
    own = reports[first]
    if interface is not None:
        return min(own["interfaces"][interface], key=lambda each: ":" in each).partition("%")[0]
    candidates = [_part(own["connection"], 2)]
    if own["machine"] == here["machine"]:
        candidates += [_part(answer["connection"], 0) for name, answer in reports.items() if name != first]
    usable = [each for each in candidates if each and not _is_loopback(each)]
    if usable:
        return usable[0]
    return candidates[0] if len(reports) == 1 and candidates[0] else None


def _part(connection: str, index: int) -> str:
    """A part of SSH_CONNECTION: client address, client port, server address, server port."""
    parts = connection.split()
    return parts[index].partition("%")[0].removeprefix("::ffff:") if len(parts) == 4 else ""


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def _token(run_dir: Path) -> Any:
    """A file in the run folder that only this start has written; a folder that was made for it goes with it."""
    made = [each for each in (run_dir, *run_dir.parents) if not each.exists()]
    path = run_dir / f".launch-{secrets.token_hex(8)}"
    try:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            path.write_text(secrets.token_hex(16))
        except OSError as error:
            raise UserError(f"run folder {run_dir} cannot be written: {error.strerror or error}") from None
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            for folder in made:
                folder.rmdir()


def refuse(checked: Checked, wanted: int) -> None:
    """Raise :class:`UserError` with all that is wrong, unless ``wanted`` hosts are ready."""
    if len(checked.ready) < wanted or not checked.master_address:
        many = f"{len(checked.problems)} of {len(checked.hosts)} hosts"
        raise UserError(f"nothing was started, since {many} are not ready:\n{checked.message()}")


def say_left_out(checked: Checked) -> None:
    """Print why hosts are left out."""
    if checked.problems:
        print(f"nystrom launch: without these hosts:\n{checked.message()}", file=sys.stderr, flush=True)
