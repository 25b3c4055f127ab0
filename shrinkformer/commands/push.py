"""``shrinkformer push``: send a finished checkpoint to the Hugging Face hub."""

from shrinkformer.commands.checkpoint_options import PushOptions
from shrinkformer.commands.console import say
from shrinkformer.errors import CheckpointError, InputError, UnsupportedModelError
from shrinkformer.prune.opening import open_config
from shrinkformer.utils.hub import require_hub
from shrinkformer.utils.upload import files_to_push, push_to_hub

PROG = "shrinkformer push"


def push(options: PushOptions) -> None:
    """Everything that ``shrinkformer push`` does.

    Raises:
        InputError: The folder is no checkpoint, or nothing can be sent to the hub from here.
        HubError: The hub cannot be reached or refuses.
    """
    try:
        names = files_to_push(options.folder)
        if any(options.folder.glob("*.safetensors")):
            open_config(options.folder)
    except UnsupportedModelError:
        pass  # a model of another kind may be sent, too
    except CheckpointError as error:
        raise InputError(str(error)) from None
    require_hub(PROG, options.repo_id)
    say(f"sending {len(names)} files of {options.folder} to {options.repo_id}")
    where = push_to_hub(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        commit_message=options.message,
    )
    say(f"pushed to {where}")
