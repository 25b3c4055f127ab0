"""The Hugging Face hub: folders by their names there, and its errors as one line.

``huggingface_hub`` is imported where it is used; reading a local folder needs none of it.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shrinkformer.errors import CheckpointError, HubError, InputError

NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

CHECKPOINT_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""What loading needs: weights, configuration, tokenizer. No code and no pickles are fetched."""

_SIGN_IN = "pass token=..., set HF_TOKEN, or run `hf auth login`"


def folder_of(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    patterns: Sequence[str] = CHECKPOINT_PATTERNS,
) -> Path:
    """A checkpoint as a local folder: as it is, or downloaded into the cache of ``huggingface_hub``.

    Args:
        name: A folder, or ``user/name`` on the hub; a folder of that name comes first.
        revision: Branch, tag or commit on the hub; folders have none.
        token: For private repositories; by default the one that the user is signed in with.
        patterns: Files to download.

    Raises:
        CheckpointError: It is neither a folder nor the name of a repository that can be read.
        HubError: The hub cannot be reached.
    """
    path = Path(name)
    if path.exists() or not NAME.fullmatch(str(name)):
        return path
    from huggingface_hub import snapshot_download

    with one_line(f"{name}"):
        return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=list(patterns)))


def some_files(location: str, patterns: Sequence[str]) -> Path | None:
    """A folder with those files of a checkpoint that are there, or None; a hub that does not answer is no error.

    Args:
        location: A folder, or a name on the hub.
        patterns: Of the files.
    """
    try:
        path = folder_of(location, patterns=patterns)
    except (CheckpointError, HubError):
        return None
    return path if path.is_dir() else None


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids to ask the hub; ``huggingface_hub`` reads it once, when it is imported."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def require_hub(flag: str, repo_id: str, token: str | None = None) -> None:
    """Check, without asking it, that something can be sent to the hub.

    Args:
        flag: What the user gave the name with, for messages.
        repo_id: Name of a repository.
        token: Of the user; by default the one that the user is signed in with.

    Raises:
        InputError: The name is none, the hub may not be asked, or nobody is signed in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise InputError(
            f"{flag} {repo_id!r}: it is no name of a repository; write USER/NAME, of letters, digits, '-', '_' and '.'."
        ) from None
    if is_offline():
        raise InputError(f"{flag} {repo_id}: HF_HUB_OFFLINE=1 forbids to ask the hub; unset it.")
    if not (token or get_token()):
        raise InputError(f"{flag} {repo_id}: no token of the hub is here; {_SIGN_IN} (a token that may write).")


@contextmanager
def one_line(repo_id: str) -> Iterator[None]:
    """Errors of ``huggingface_hub`` as ours, in one line each.

    Raises:
        CheckpointError: There is no such repository or revision, or this user may not see it.
        HubError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import errors

    http_error = errors.HfHubHTTPError.__mro__[1]  # of the HTTP library, which differs between versions
    try:
        yield
    except errors.HFValidationError:
        raise CheckpointError(f"{repo_id!r} is neither a folder nor a name on the hub.") from None
    except errors.GatedRepoError:
        raise CheckpointError(f"{repo_id}: access must be asked for on its page on the hub; then {_SIGN_IN}.") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo_id} is not a folder here, and the hub has no such repository, or it is private: {_SIGN_IN}."
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo_id}: the hub has no such revision; leave revision= out for the newest.") from None
    except errors.LocalEntryNotFoundError as error:
        if is_offline():
            raise CheckpointError(
                f"{repo_id} is not a folder here, nor in the cache, and HF_HUB_OFFLINE=1 forbids to ask the hub; "
                "unset it, or pass a folder."
            ) from None
        raise HubError(f"{repo_id}: {_cause(error)}.") from None
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{repo_id}: HF_HUB_OFFLINE=1 forbids to ask the hub; unset it.") from None
    except (http_error, errors.FileMetadataError, ConnectionError, TimeoutError) as error:
        raise HubError(f"{repo_id}: {_cause(error)}.") from None


def _cause(error: BaseException) -> str:
    """What went wrong, from the status or from the first error of a chain."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in {401, 403}:
        return f"the hub refuses this token (HTTP {status}); it must be valid and may have to allow writing: {_SIGN_IN}"
    if status is not None:
        said = getattr(error, "server_message", None)
        return f"the hub answered with HTTP {status}" + (f", {said}" if said else "")
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"the hub cannot be reached ({text}); try again when it can"
