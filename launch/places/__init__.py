"""Places where a run can be started, a module each: it registers a :class:`Place`, and no list names it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from data_pipeline.command_line import Example
from data_pipeline.registry import Registry
from launch.plan import LaunchPlan, Rendered
from pretrain.arguments import EXIT_STATUSES


class Place:
    """A way in: it turns a :class:`LaunchPlan` into files and commands, and starts them."""

    name: str
    summary: str
    """What it is, for ``nystrom launch --help``: words without a full stop."""
    description: str = ""
    examples: Sequence[Example] = ()
    epilog: str = ""
    exit_status: Mapping[int, str] = EXIT_STATUSES
    """Of a place that waits for the run: the run's own."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the place's own arguments to those of :func:`launch.plan.add_plan_arguments`."""

    @staticmethod
    def plan(args: argparse.Namespace) -> LaunchPlan:
        """The plan of these arguments; raises :class:`UserError` for mistakes."""
        raise NotImplementedError

    @staticmethod
    def render(plan: LaunchPlan, args: argparse.Namespace) -> Rendered:
        """All files, variables and commands. Nothing is written or started, and no other machine is asked."""
        raise NotImplementedError

    @staticmethod
    def start(plan: LaunchPlan, args: argparse.Namespace, rendered: Rendered) -> int:
        """Check what can be checked, write the files and run the commands; returns the exit status."""
        raise NotImplementedError


PLACES: Registry[Place] = Registry(
    "place",
    "launch.places",
    Place,
    {
        "summary": "what it is, in a few words",
        "plan": "the plan of the parsed arguments",
        "render": "the files and commands of a plan",
        "start": "what writes and runs them",
    },
)
