"""The examination on all hosts of a hostfile: one process on each over ssh, which meet as ranks do."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from data_pipeline.errors import UserError
from launch.doctor.findings import Finding, merged, problem, verdict
from launch.doctor.machine import is_loopback
from launch.doctor.ranks import HOST, HOSTS, RAW, REPORT_MARK
from launch.hosts import AT_ONCE, SSH_FAILED, Host, Outcome, choose_hosts, read_hostfile, run_on, ssh_problem
from launch.plan import crossing_environment

if TYPE_CHECKING:
    import argparse

PROBE_SECONDS = 30.0
ADDRESS_MARK = "nystrom-doctor-address "


def examine_hosts(args: argparse.Namespace) -> dict[str, Any]:
    """The report of all hosts that answer; those that do not are problems in it. Raises :class:`UserError` for none."""
    hosts = choose_hosts(read_hostfile(args.hostfile), args.include, args.exclude)
    ssh_args = shlex.split(args.ssh_args)
    env = crossing_environment(args.env)
    there, findings = probe(hosts, ssh_args, env)
    if not there:
        listed = "\n".join(f"  {each.where}: {each.message}" for each in findings)
        raise UserError(f"no host of {args.hostfile} can be examined:\n{listed}")
    answering = [host for host in hosts if host.name in there]
    address = args.master_addr or there[answering[0].name]
    if len(answering) > 1 and is_loopback(address):
        raise UserError(
            f"ssh reaches {answering[0].name} at {address}, where other hosts meet themselves: give --master-addr "
            "with an address that they can reach"
        )
    words = [sys.executable, "-m", "launch", "doctor", *_words(args)]
    seconds = args.patience + args.timeout + 30.0

    def start(rank: int) -> Outcome:
        host = answering[rank]
        own = {
            **env,
            HOST: host.name,
            HOSTS: ",".join(each.name for each in answering),
            RAW: "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(len(answering)),
            "LOCAL_RANK": "0",
            "LOCAL_SIZE": "1",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(args.master_port),
        }
        done = run_on([host], words, ssh_args=ssh_args, timeout=seconds, directory=Path.cwd(), env=own)
        return done[host.name]

    with ThreadPoolExecutor(min(AT_ONCE, len(answering))) as pool:
        try:
            outcomes = dict(zip((host.name for host in answering), pool.map(start, range(len(answering))), strict=True))
        except KeyboardInterrupt:
            for child in psutil.Process().children(recursive=True):  # the pool would wait for them
                child.kill()
            raise
    return combine(outcomes, findings)


def probe(
    hosts: Sequence[Host], ssh_args: Sequence[str], env: Mapping[str, str]
) -> tuple[dict[str, str], list[Finding]]:
    """The hosts that have the program, with the address at which ssh reached each; findings of the others."""
    code = f"import os, launch.doctor; print({ADDRESS_MARK!r} + os.environ.get('SSH_CONNECTION', ''))"
    words = [sys.executable, "-c", code]
    done = run_on(hosts, words, ssh_args=ssh_args, timeout=PROBE_SECONDS, directory=Path.cwd(), env=env)
    there: dict[str, str] = {}
    findings = []
    for name, outcome in done.items():
        said = ssh_problem(outcome)
        if said is not None:
            findings.append(problem("host", name, f"it cannot be reached over ssh: {said}", f"try: ssh {name} true"))
            continue
        marked = [line for line in outcome.output.splitlines() if line.startswith(ADDRESS_MARK)]
        if outcome.code or not marked:
            findings.append(
                problem(
                    "host",
                    name,
                    f"the program does not run there: {_last_line(outcome)}",
                    f"the same folder ({Path.cwd()}) and Python ({sys.executable}) are needed on all hosts",
                )
            )
            continue
        fields = marked[-1].removeprefix(ADDRESS_MARK).split()
        there[name] = fields[2] if len(fields) == 4 else name.rpartition("@")[2]
    return there, findings


def combine(outcomes: Mapping[str, Outcome], findings: Sequence[Finding]) -> dict[str, Any]:
    """The first host's report with ``findings`` in it; where it gave none, what each host said instead."""
    report: dict[str, Any] | None = None
    for outcome in outcomes.values():
        for line in outcome.output.splitlines():
            if line.startswith(REPORT_MARK):
                report = json.loads(line.removeprefix(REPORT_MARK))
    extra = list(findings)
    if report is None:
        extra += [
            problem("host", name, f"it ended with status {outcome.code}: {_last_line(outcome)}", "mend that first")
            for name, outcome in outcomes.items()
        ]
        report = {"findings": [], "seconds": max(outcome.seconds for outcome in outcomes.values())}
    told = [_with_output(Finding(**each), outcomes) for each in report["findings"]]
    found = merged([*extra, *told])
    return {**report, "findings": [each.as_dict() for each in found], "status": verdict(found)}


def _with_output(finding: Finding, outcomes: Mapping[str, Outcome]) -> Finding:
    """Of a host that did not come or stopped answering, also what its own process or ssh said last."""
    outcome = outcomes.get(finding.where)
    if finding.check != "missing" or outcome is None or not outcome.code:
        return finding
    lost = outcome.code == SSH_FAILED and not outcome.output.strip()
    said = "ssh lost the connection" if lost else _last_line(outcome)
    return replace(finding, message=f"{finding.message}; there: {said} (status {outcome.code})")


def _last_line(outcome: Outcome) -> str:
    lines = [line.strip() for line in outcome.output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it says nothing"


def _words(args: argparse.Namespace) -> list[str]:
    """The arguments that each host's process gets."""
    words = ["--sizes", args.sizes, "--patience", f"{args.patience:g}", "--timeout", f"{args.timeout:g}"]
    words += ["--quick"] if args.quick else []
    words += ["--config", str(args.config)] if args.config is not None else []
    words += ["--set", *args.overrides] if args.overrides else []
    words += ["--processes", str(args.processes)] if args.processes is not None else []
    words += ["--run-dir", os.fspath(args.run_dir)] if args.run_dir is not None else []
    return words
