"""The options that say which run, for every command that has some of them.

They are apart from what reads the configuration: building it costs 0.2 s, and ``--help`` needs none of it.
"""

from __future__ import annotations

import argparse

EXIT_STATUSES = {
    2: "a mistake in configuration or data",
    74: "the last checkpoint or the export could not be written: free space, run the same command",
    75: "stopped by SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C, with a checkpoint of what was trained: the same command "
    "resumes",
    76: "too many steps in a row with numbers that are not finite",
    77: "a process hung or never came: the message names it; see stall_seconds in the configuration",
}
"""What the exit statuses of training mean, also of one that `nystrom launch` starts."""


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True, what: str = "") -> None:
    """The arguments that :func:`pretrain.config.load.load_config` takes, for every command that reads a run's file.

    ``what``: what the command does with the file, for ``--help``.
    """
    parser.add_argument(
        "--config",
        required=required,
        help=f"YAML file of the run{': ' * bool(what)}{what}; or the name of a preset, such as books-clm",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the file, for example zero_stage=1 curriculum.0.micro_batch=8",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which run; ``nystrom launch`` takes the same."""
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        choices=["auto", "extend", "never"],
        default="auto",
        help="auto: resume from the newest whole checkpoint if there is one; extend: also train a finished run on, as "
        "far as the configuration now says; never: move an existing run folder aside to NAME.old-1 and start over "
        "(default: auto)",
    )
    parser.add_argument("--verbose", action="store_true", help="show DeepSpeed's log too")
