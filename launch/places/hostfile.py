"""``nystrom launch hostfile``: the hosts of a DeepSpeed hostfile, over ssh or pdsh.

DeepSpeed's own launcher for hostfiles answers 0 where a node's launcher was killed, leaves processes behind after
SIGTERM, and has a broken pipe kill the ranks in their save. So an agent of ours is started on each host, which starts
the ranks by DeepSpeed's launcher for one node, and whose connection is a life line in both directions.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace

from data_pipeline.errors import UserError
from launch.fleet import Ended, Fleet, SshFleet, look_after
from launch.host_checks import Checked, check_hosts, config_of, refuse, say_left_out
from launch.hosts import Host, choose_hosts, read_hostfile, remote_line, ssh_command
from launch.life_line import SILENCE_GRACE_SECONDS, SILENCE_SECONDS
from launch.pdsh import PdshFleet, pdsh_command, pdsh_environment
from launch.places import PLACES, Place
from launch.plan import SECRETS, LaunchPlan, Rendered, make_plan
from launch.rank_logs import LOGS
from launch.restarts import Restarts, resumed, say, starts_anew
from launch.watch import REPOSITORY, StopRequest, exit_status, read_status
from pretrain.distributed.signals import EXIT_DONE, EXIT_PREEMPTED, EXIT_STALLED

FENCE_MARGIN_SECONDS = 5.0
HOST_WAIT_SECONDS = 300.0
LOOK_AGAIN_SECONDS = 5.0
_NUMBER = "@NUMBER@"


@PLACES.register
class Hostfile(Place):
    """Several machines that are reached by ssh."""

    name = "hostfile"
    summary = "the machines of a DeepSpeed hostfile, over ssh or pdsh"
    description = (
        "Start `nystrom train` on the machines of a DeepSpeed hostfile, look after it, and answer with what became of "
        "the run. All machines are checked first; nothing is started if one is not ready."
    )
    examples = ("nystrom launch hostfile --hostfile hosts --config configs/causal-16k.yaml",)
    epilog = (
        "A line of a hostfile: worker-0 slots=8\n\n"
        "Code, environment, shards and run folder must be at the same paths on all machines. SIGTERM, Ctrl-C or "
        "SIGHUP lets all processes save a checkpoint and end (exit status 75: the same command resumes). If this "
        "command or a network is gone, the processes everywhere save if they can, and end."
    )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Which hosts, how they are reached, and what to do without one of them."""
        parser.add_argument("--hostfile", required=True, metavar="FILE", help="lines of NAME slots=N")
        parser.add_argument("--include", default="", metavar="NAME@NAME", help="only these hosts of the file")
        parser.add_argument("--exclude", default="", metavar="NAME@NAME", help="all hosts of the file but these")
        parser.add_argument("--nproc", type=int, default=None, help="processes of each host (default: its slots)")
        parser.add_argument("--transport", choices=["ssh", "pdsh"], default="ssh", help="default: ssh")
        parser.add_argument(
            "--ssh-args", default="", metavar="WORDS", help="options of ssh, as in --ssh-args='-p 2222 -i key'"
        )
        parser.add_argument(
            "--interface",
            metavar="IF",
            help="network interface of the processes' connections (default: the one to the address by which ssh "
            "reaches the first host)",
        )
        parser.add_argument(
            "--elastic",
            metavar="MIN:MAX",
            help="start on MIN to MAX hosts: those that answer, at the beginning and after one was lost",
        )
        parser.add_argument(
            "--host-wait",
            type=float,
            default=HOST_WAIT_SECONDS,
            metavar="SECONDS",
            help=f"before a restart, how long to wait for enough hosts to answer (default: {HOST_WAIT_SECONDS:g})",
        )

    @staticmethod
    def plan(args: argparse.Namespace) -> LaunchPlan:
        """See :func:`make_plan`; raises :class:`UserError` for mistakes in the hostfile too."""
        hosts = _hosts(args)
        least, most = elastic_range(args.elastic, len(hosts))
        if args.host_wait < 0:
            raise UserError(f"--host-wait {args.host_wait:g}: must be 0 or more seconds")
        return make_plan(args, nodes=least, max_nodes=most, processes=processes_of(hosts, args.nproc))

    @staticmethod
    def render(plan: LaunchPlan, args: argparse.Namespace) -> Rendered:
        """The commands with ADDRESS, PORT and ID in place of what the checks find out."""
        hosts = _hosts(args)[: plan.max_nodes]
        launch = _Launch(plan, args)
        shown = {name: value for name, value in plan.environment.items() if not SECRETS.search(name)}
        commands: list[tuple[Sequence[str], str]] = []
        if args.transport == "pdsh":
            append = pdsh_environment(launch.ssh_args)
            words = ["env", *(f"{name}={value}" for name, value in append.items())]
            line = launch.line(len(hosts), 0, "ADDRESS", "PORT", "ID")
            commands.append(([*words, *pdsh_command(hosts, line)], "on all hosts; %n is the number of each"))
        else:
            for rank, host in enumerate(hosts):
                line = launch.line(len(hosts), rank, "ADDRESS", "PORT", "ID")
                commands.append((ssh_command(host.name, line, launch.ssh_args), f"host {rank}"))
        variables = "".join(f"\n#   {name}={shlex.quote(value)}" for name, value in shown.items())
        chosen = ["--include", args.include] if args.include else ["--exclude", args.exclude] if args.exclude else []
        plain = ["deepspeed", "--hostfile", args.hostfile, *chosen, "--module", "pretrain", *plan.words]
        commands.append(
            (
                plain,
                "or by plain deepspeed, without checks, life line and restarts; .deepspeed_env in this folder has what "
                f"must cross:{variables}\n#   GLOO_SOCKET_IFNAME=INTERFACE",
            )
        )
        return Rendered(commands=commands, exports=plan.environment)

    @staticmethod
    def start(plan: LaunchPlan, args: argparse.Namespace, rendered: Rendered) -> int:
        """Check the hosts, start on them, wait, start again if asked to; returns the run's own status."""
        request = StopRequest()
        try:
            return _Launch(plan, args).run(_hosts(args), request)
        finally:
            request.restore()


def _hosts(args: argparse.Namespace) -> list[Host]:
    return choose_hosts(read_hostfile(args.hostfile), args.include, args.exclude)


def processes_of(hosts: Sequence[Host], asked: int | None) -> int:
    """Processes of each host; raises :class:`UserError` where the hosts differ or have fewer slots."""
    slots = {host.slots for host in hosts}
    if asked is not None:
        small = [f"{host.name} ({host.slots})" for host in hosts if host.slots < asked]
        if small:
            raise UserError(f"--nproc {asked}: too few slots have {', '.join(small)}")
        return asked
    if len(slots) > 1:
        listed = ", ".join(f"{host.name} {host.slots}" for host in hosts)
        raise UserError(
            f"the hosts have different numbers of slots ({listed}), for which DeepSpeed counts local ranks wrongly: "
            f"take the same on all with --nproc {min(slots)}, or leave hosts out with --exclude"
        )
    return slots.pop()


def elastic_range(text: str | None, hosts: int) -> tuple[int, int]:
    """The least and the largest number of hosts of ``MIN:MAX``; all of them without it. Raises :class:`UserError`."""
    if text is None:
        return hosts, hosts
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or not 1 <= int(parts[0]) <= int(parts[1]):
        raise UserError(f"--elastic {text}: MIN:MAX, two numbers of hosts, such as 2:{max(2, hosts)}")
    if int(parts[0]) > hosts:
        raise UserError(f"--elastic {text}: the hostfile has {hosts} hosts, so MIN is at most {hosts}")
    return int(parts[0]), min(int(parts[1]), hosts)


def fence_seconds(stop_timeout: float) -> float:
    """After so long no process lives on a host that was cut off: its agent ends them when it hears nothing any more."""
    return SILENCE_SECONDS + min(SILENCE_GRACE_SECONDS, stop_timeout) + FENCE_MARGIN_SECONDS


def numbers_of_hosts(plan: LaunchPlan) -> list[int]:
    """The numbers of hosts whose processes can share every batch evenly; raises :class:`UserError` if none can."""
    config = config_of(plan)
    from pretrain.checks import check_inputs
    from pretrain.curriculum.plan import build_plan, check_world_size

    check_inputs(config, 1)
    stages = build_plan(config)
    found, problem = [], None
    for number in range(plan.nodes, plan.max_nodes + 1):
        try:
            check_world_size(stages, number * plan.processes)
            found.append(number)
        except UserError as error:
            problem = error
    if problem is not None and not found:
        raise problem
    return found


class _Launch:
    """One call of the command."""

    def __init__(self, plan: LaunchPlan, args: argparse.Namespace) -> None:
        path = filter(None, [plan.environment.get("PYTHONPATH"), str(REPOSITORY)])
        everywhere = {**plan.environment, "PYTHONPATH": ":".join(dict.fromkeys(path))}
        self.plan, self.args = replace(plan, environment=everywhere), args
        self.words, self.launches = list(plan.words), list[str]()
        self.numbers: list[int] = []
        """Of hosts, ascending, that a start may have."""
        self.secrets = {name: value for name, value in everywhere.items() if SECRETS.search(name)}
        """They are said to an agent, since everybody on a machine can read the words of its commands."""
        for name, value in self.secrets.items():
            if "\n" in value:
                raise UserError(f"the environment variable {name} has several lines, which cannot cross: unset it")
        try:
            self.ssh_args = shlex.split(args.ssh_args)
        except ValueError as error:
            raise UserError(f"--ssh-args {args.ssh_args!r}: {error}") from None
        if args.transport == "pdsh":
            pdsh_environment(self.ssh_args)  # which refuses what pdsh cannot pass on
            if shutil.which("pdsh") is None and not args.dry_run:
                raise UserError("--transport pdsh: there is no program pdsh here; install it, or use --transport ssh")

    def line(self, nodes: int, rank: int, address: str, port: str, launch_id: str) -> str:
        """What the shell of a host gets; with pdsh the same on all."""
        pdsh = self.args.transport == "pdsh"
        more = ["--life-line", "parent" if pdsh else "stdin", "--interface", self.args.interface or "auto"]
        plan = replace(self.plan, words=tuple(self.words))
        variables = {name: value for name, value in plan.environment.items() if name not in self.secrets}
        number = _NUMBER if pdsh else str(rank)
        words = plan.node_command(str(nodes), number, address, port, launch_id, more=more)
        line = remote_line(words, plan.directory, variables)
        return line.replace("%", "%%").replace(_NUMBER, "%n") if pdsh else line

    def run(self, hosts: Sequence[Host], request: StopRequest) -> int:
        """All attempts."""
        if self.secrets and self.args.transport == "pdsh":
            say(f"{', '.join(self.secrets)} cannot cross over pdsh without being seen: use --transport ssh if needed")
        self.numbers = numbers_of_hosts(self.plan)
        restarts = Restarts(self.plan.run_dir, self.plan.max_restarts, anew=starts_anew(self.words))
        checked = self._check(hosts)
        dropped = checked.unreachable if self.args.elastic else set()
        if set(checked.problems) - dropped:
            refuse(checked, len(hosts))
        refuse(checked, self.numbers[0])
        while True:
            if request.number is not None:
                say("asked to stop; nothing was started")
                return EXIT_PREEMPTED
            say_left_out(checked)
            ended, code = self._attempt(checked, request)
            if request.number is not None or not restarts.wanted(code):
                return code
            if restarts.pause(lambda: request.number is not None):
                return EXIT_PREEMPTED
            if read_status(self.plan.run_dir).get("launch_id") == self.launches[-1]:
                self.words = resumed(self.words)
            found = self._gather(hosts, ended, request)
            if found is None:
                return EXIT_PREEMPTED if request.number is not None else code
            checked = found

    def _check(self, hosts: Sequence[Host]) -> Checked:
        return check_hosts(
            hosts, self.plan, ssh_args=self.ssh_args, interface=self.args.interface, launches=self.launches
        )

    def _attempt(self, checked: Checked, request: StopRequest) -> tuple[Ended, int]:
        number = max(each for each in self.numbers if each <= len(checked.ready))
        hosts = checked.ready[:number]
        idle = [host.name for host in checked.ready[number : self.plan.max_nodes]]
        if idle:
            say(f"{', '.join(idle)} stays idle: the rows of a batch cannot be shared evenly with more processes")
        launch_id = uuid.uuid4().hex
        self.launches.append(launch_id)
        where = f"{checked.master_address}, port {checked.master_port}"
        say(
            f"{len(hosts) * self.plan.processes} processes on {', '.join(host.name for host in hosts)}, which meet at "
            f"{where}; logs in {self.plan.run_dir / LOGS / launch_id}"
        )
        fleet = self._start(hosts, checked.master_address, str(checked.master_port), launch_id)
        ended = look_after(fleet, request, self.plan.stop_timeout)
        return ended, self._code(ended, request, launch_id)

    def _start(self, hosts: Sequence[Host], address: str, port: str, launch_id: str) -> Fleet:
        lines = {host.name: self.line(len(hosts), rank, address, port, launch_id) for rank, host in enumerate(hosts)}
        if self.args.transport == "pdsh":
            return PdshFleet(hosts, lines[hosts[0].name], self.plan.run_dir / LOGS / launch_id, self.ssh_args)
        return SshFleet(hosts, lines, self.ssh_args, self.secrets)

    def _code(self, ended: Ended, request: StopRequest, launch_id: str) -> int:
        asked = request.number is not None
        if ended.lost and not asked:
            # Whatever the processes at the other hosts say, the run has not ended as it should.
            code = exit_status(EXIT_STALLED, self.plan.run_dir, launch_id)
            return code if code == EXIT_DONE else EXIT_STALLED
        return exit_status(ended.code(), self.plan.run_dir, launch_id, asked)

    def _gather(self, hosts: Sequence[Host], ended: Ended, request: StopRequest) -> Checked | None:
        """Hosts enough to start again; None if they do not come, or if asked to stop while waiting."""
        deadline = time.monotonic() + self.args.host_wait
        fence = ended.lost_at + fence_seconds(self.plan.stop_timeout) if ended.lost else 0.0
        said = ""
        while True:
            checked = self._check(hosts)
            left = max(deadline, fence) - time.monotonic()
            enough = bool(checked.master_address) and len(checked.ready) >= self.numbers[0]
            # A host that does not answer may still run what it ran: until its agent has surely ended that.
            fenced = time.monotonic() < fence and bool(checked.unreachable & set(ended.lost))
            if enough and not fenced:
                return checked
            if left <= 0:
                say(f"gives up: {self.numbers[0]} hosts are needed, but after {self.args.host_wait:g} s:")
                say(checked.message())
                return None
            if checked.message() != said:
                said = checked.message()
                what = "what was lost has ended" if enough else f"{self.numbers[0]} hosts are ready"
                say(f"waits until {what}:\n{said}")
            pause = time.monotonic() + LOOK_AGAIN_SECONDS
            while time.monotonic() < pause:
                if request.number is not None:
                    return None
                time.sleep(0.1)
