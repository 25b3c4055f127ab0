"""``shrinkformer push``: send a finished checkpoint to the Hugging Face hub."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from shrinkformer.commands.console import run_command, say
from shrinkformer.commands.flags import OneLineParser
from shrinkformer.errors import CheckpointError, InputError, UnsupportedModelError
from shrinkformer.prune.opening import open_config
from shrinkformer.utils.hub import require_hub
from shrinkformer.utils.upload import files_to_push, push_to_hub

PROG = "shrinkformer push"


def push_command(arguments: Sequence[str] | None) -> None:
    """Everything that ``shrinkformer push`` does.

    Raises:
        InputError: The folder is no checkpoint, or nothing can be sent to the hub from here.
        HubError: The hub cannot be reached or refuses.
    """
    flags = _parser().parse_args(arguments)
    try:
        names = files_to_push(flags.folder)
        if any(flags.folder.glob("*.safetensors")):
            open_config(flags.folder)
    except UnsupportedModelError:
        pass  # a model of another kind may be sent, too
    except CheckpointError as error:
        raise InputError(str(error)) from None
    require_hub(PROG, flags.repo_id)
    say(f"sending {len(names)} files of {flags.folder} to {flags.repo_id}")
    where = push_to_hub(
        flags.folder, flags.repo_id, private=flags.private, revision=flags.revision, commit_message=flags.message
    )
    say(f"pushed to {where}")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=PROG, description="Send a finished checkpoint folder to the Hugging Face hub.", allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that a run wrote")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name on the hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to; made if it is not there (default: main)")
    parser.add_argument("--message", help="message of the commit (default: it names the folder)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``shrinkformer push``."""
    return run_command(push_command, arguments, PROG)
