"""``nystrom push``: a converted folder to the Hugging Face hub, or to a server that speaks its protocol.

One commit holds the whole folder, so that nobody downloads half a model. Files that the repository already has as they
are do not travel again, and a push that would change nothing makes no commit. Files at the top of the repository that
would be loaded with the folder's (weights, configuration, code) and that it does not have are removed in the same
commit: ``model.safetensors`` of an earlier push would win over the shards of this one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.command_line import Parser
from data_pipeline.console import add_json, print_json, say_next
from data_pipeline.errors import UserError
from data_pipeline.units import count, format_bytes
from pretrain.convert.hub_folder import HubFolder, open_folder
from pretrain.convert.names import UNKNOWN

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOADED = re.compile(r"[^/]+\.(safetensors|json|py)|pytorch_model[^/]*\.bin")
"""Files of a repository that a reader may take along with the folder's: they must be the folder's."""
ASKING_SECONDS = 60.0


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = Parser(
        prog="nystrom push",
        description="Publish a folder of `nystrom convert to-hf` in a repository of the Hugging Face hub. The token is "
        "taken from HF_TOKEN, or from `hf auth login`.",
        examples=["nystrom push hf/books-clm someone/books-clm --dry-run"],
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="with config.json, README.md and safetensors")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME; made if it does not exist")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--private", action="store_true", help="a new repository is seen by its owner (default)")
    seen.add_argument("--public", action="store_true", help="a new repository is seen by everybody")
    parser.add_argument("--revision", metavar="BRANCH", help="made from the main branch if it does not exist")
    parser.add_argument("--message", metavar="TEXT", help="of the commit (default: Upload FOLDER with nystrom)")
    parser.add_argument("--endpoint", metavar="URL", help="of the hub (default: HF_ENDPOINT, or huggingface.co)")
    parser.add_argument("--dry-run", action="store_true", help="check the folder, list what would be pushed, and end")
    parser.add_argument(
        "--although-invalid", action="store_true", help="push a model that failed the validity gate; its card says so"
    )
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. Raises :class:`UserError` for whatever stops it."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    folder = open_folder(args.folder)
    _check_repo(args.repo)
    if folder.passed is False and not args.although_invalid:
        raise UserError(
            f"{folder.path} holds a model that failed the validity gate, as its card says at the top: it is pushed "
            "only with --although-invalid"
        )
    if folder.passed is None:
        print("note: the card does not say that the validity gate has looked at this model", file=sys.stderr)
    if folder.licence == UNKNOWN:
        print("note: the card names no licence (nystrom convert to-hf --license)", file=sys.stderr)
    if args.dry_run:
        if args.json:
            print_json(_facts(folder, args.repo) | {"dry_run": True, "done": None})
            return 0
        _list(folder, args.repo)
        say_next(["push", *(word for word in words if word != "--dry-run")])
        return 0
    wanted = True if args.private else False if args.public else None
    message = args.message or f"Upload {folder.path.resolve().name} with nystrom"
    done = push(folder, args.repo, private=wanted, revision=args.revision, message=message, endpoint=args.endpoint)
    if args.json:
        print_json(_facts(folder, args.repo) | {"dry_run": False, "done": done})
    else:
        print(done)
    return 0


def _facts(folder: HubFolder, repo: str) -> dict[str, Any]:
    return {
        "folder": folder.path,
        "repo": repo,
        "bytes": folder.bytes,
        "validity_passed": folder.passed,
        "license": folder.licence,
        "files": [{"name": name, "bytes": size} for name, size in folder.files],
    }


def _list(folder: HubFolder, repo: str) -> None:
    width = max(len(name) for name, _ in folder.files)
    for name, size in folder.files:
        print(f"{name:<{width}}  {format_bytes(size):>12}")
    print(f"{count(len(folder.files), 'file')}, {format_bytes(folder.bytes)}, would be pushed to {repo}")


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        named = repo.count("/") == 1
    except HFValidationError as error:
        raise UserError(f"repository '{repo}': {' '.join(str(error).split())}") from None
    if not named:
        raise UserError(f"repository '{repo}' has no owner: give OWNER/NAME, with your name or an organization's")


def push(
    folder: HubFolder,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str,
    endpoint: str | None = None,
) -> str:
    """Make ``repo`` hold the files of ``folder``; returns what was done, as a line.

    ``private``: of a new repository, None for private; for one that exists, what it must be. Raises :class:`UserError`
    for every refusal of the hub and every failure on the way, and for a repository that is seen by others than asked.
    """
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    api = huggingface_hub.HfApi(endpoint=endpoint)
    try:
        return _push(api, folder, repo, private, revision, message)
    except UserError:
        raise
    except Exception as error:  # the library and those that it is built on share no base class
        raise UserError(_explained(error, repo, api.endpoint)) from error


def _push(api: HfApi, folder: HubFolder, repo: str, private: bool | None, revision: str | None, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(repo, timeout=ASKING_SECONDS)
    except RepositoryNotFoundError:
        # A server says this too where it knows no such token: making the repository then finds that out.
        api.create_repo(repo, private=private is not False)
        info = api.model_info(repo, timeout=ASKING_SECONDS)
    if private is not None and bool(info.private) != private:
        now, other = ("private", "--public") if info.private else ("public", "--private")
        raise UserError(f"{repo} exists and is {now}: leave {other} out, or change that in the settings of {repo}")
    if revision is not None:
        try:
            info = api.model_info(repo, revision=revision, timeout=ASKING_SECONDS)
        except RevisionNotFoundError:
            api.create_branch(repo, branch=revision)
            info = api.model_info(repo, revision=revision, timeout=ASKING_SECONDS)
    own = {name for name, _ in folder.files}
    there = {file.rfilename for file in info.siblings or ()}
    gone = sorted(name for name in there - own if LOADED.fullmatch(name))
    done = api.create_commit(
        repo,
        operations=[
            *(CommitOperationAdd(name, str(folder.path / name)) for name in sorted(own)),
            *(CommitOperationDelete(name) for name in gone),
        ],
        commit_message=message,
        revision=revision,
        parent_commit=info.sha,  # whoever changed the repository meanwhile is not overwritten unseen
    )
    seen = "private" if info.private else "public"
    if done.oid == info.sha:
        return f"nothing to do: {repo} ({seen}) already holds these files, at commit {done.oid[:12]}"
    removed = f"; removed from there: {', '.join(gone)}" if gone else ""
    what = f"{count(len(own), 'file')}, {format_bytes(folder.bytes)}"
    return f"pushed {what}, to {repo} ({seen}): {done.commit_url}{removed}"


def _explained(error: BaseException, repo: str, endpoint: str) -> str:
    """What stopped a push and what to do, on one line."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
        return f"{endpoint} does not take the folder: {_line(error)}"  # the card's metadata, before anything is sent
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    for found in chain:
        if isinstance(found, HfHubHTTPError):
            return _refusal(found, repo, endpoint)
        if isinstance(found, OfflineModeIsEnabled):
            return f"{endpoint} is not asked, since HF_HUB_OFFLINE is set: unset it to push"
        if "/xet-" in str(found):  # the address that a transfer by Xet begins with
            return (
                f"{endpoint} does not take files by Xet ({_line(found)}): if it is a server without Xet, set "
                "HF_HUB_DISABLE_XET=1"
            )
        if isinstance(found, HTTPError | ConnectionError | TimeoutError):
            return f"{endpoint} cannot be reached ({_line(found)}): is the network there, and --endpoint right?"
    return f"pushing to {repo} failed: {_line(error)}"


def _refusal(error: Any, repo: str, endpoint: str) -> str:
    from huggingface_hub import get_token
    from huggingface_hub.errors import RevisionNotFoundError

    status = int(error.response.status_code)
    said = f" ({_line(error.server_message)})" if error.server_message else ""
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision{said}: --revision takes the name of a branch"
    if status == 401 and get_token() is None:
        return f"{endpoint} wants a token: set HF_TOKEN to one that may write, or log in with `hf auth login`"
    if status == 401:
        return f"{endpoint} does not accept the token{said}: set HF_TOKEN to a valid one that may write"
    if status == 403:
        return f"the token may not write to {repo}{said}: it needs the permission to write there"
    if status == 404:
        return f"{endpoint} has no {repo}, or the token may not see it{said}"
    if status in (409, 412):
        return f"{repo} was changed by somebody else during the push{said}: look at it, and push again"
    if status == 429:
        return f"{endpoint} takes no more requests for now{said}: try again later"
    if status >= 500:
        return f"{endpoint} has a fault of its own, status {status}{said}: try again later; what arrived is kept"
    return f"{endpoint} refuses the push to {repo}, status {status}{said}"


def _line(what: object) -> str:
    """The words of an error on one line."""
    words = " ".join(str(what).split())
    return words or type(what).__name__
