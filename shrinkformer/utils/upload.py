"""Send a checkpoint folder to the Hugging Face hub."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shrinkformer.errors import CheckpointError, HubError, InputError
from shrinkformer.trust.configs import read_config
from shrinkformer.trust.weights import weight_map
from shrinkformer.utils.hub import one_line, require_hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SUFFIXES = frozenset(
    (".safetensors", ".json", ".txt", ".model", ".bpe", ".jinja", ".py", ".md", ".onnx", ".data")
)  # what checkpoints, tokenizers and cards are made of; no pickles

_NAMES = frozenset(("LICENSE", "NOTICE"))

_UNFINISHED = (".resume", ".blocks", ".cache", "__pycache__")
"""Endings of folders that an interrupted run leaves, and of caches."""

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".onnx", ".onnx.data")


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Send a finished checkpoint folder to the hub, as one commit.

    Weights that the repository has and the folder has not are removed there: readers would find them first. In the
    model card that arrives, the repository's name stands where the folder's stood, so that its examples work.

    Args:
        folder: A folder that this package wrote, or another checkpoint of transformers with safetensors.
        repo_id: ``user/name``; made if it is not there.
        private: Make a new repository private, and send nothing to one that everybody can read.
        token: By default the one that the user is signed in with.
        revision: Branch to commit to; made if it is not there. ``main`` by default.
        commit_message: By default it names the folder.

    Returns:
        Address of the repository.

    Raises:
        CheckpointError: The folder is no checkpoint, not complete, or has links to elsewhere.
        InputError: The folder is a model, the name is none, ``HF_HUB_OFFLINE`` is set, or there is no token.
        HubError: The hub cannot be reached or refuses; nothing has changed there but that an empty repository may be
            new.
    """
    if not isinstance(folder, str | os.PathLike):
        raise InputError(
            f"folder is a {type(folder).__name__}; save it first, shrinkformer.save(model, folder, plan=plan), and "
            "pass the folder."
        )
    root = Path(folder)
    names = files_to_push(root)
    require_hub("push_to_hub", repo_id, token)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, library_name="shrinkformer")
    try:
        with one_line(repo_id):
            repo = api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.model_info(repo.repo_id).private:
                raise HubError(f"{repo.repo_id} is there already and public; make it private on the hub first.")
            if revision is not None:
                api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
            operations: list[Any] = [CommitOperationAdd(name, _content(root, name, repo.repo_id)) for name in names]
            operations += [CommitOperationDelete(name) for name in _stale(api, repo.repo_id, revision, names)]
            api.create_commit(
                repo.repo_id,
                operations,
                commit_message=commit_message or f"Upload {root.resolve().name}",
                revision=revision,
            )
    except (ValueError, RuntimeError) as error:  # a model card that the hub does not take, a file that did not arrive
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HubError(f"{repo_id}: {said}") from error
    return str(repo)


def files_to_push(folder: Path) -> list[str]:
    """Names of the files of a checkpoint, relative to its folder; hidden and unfinished ones are left out.

    Raises:
        CheckpointError: The folder is no checkpoint, not complete, or has links to elsewhere.
    """
    _require_checkpoint(folder)
    root = folder.resolve()
    names = []
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith(_UNFINISHED))
        for name in folders:
            if (Path(parent) / name).is_symlink():
                raise CheckpointError(f"{Path(parent) / name} is a link to a folder; copy what it means, then push.")
        for name in sorted(files):
            file = Path(parent) / name
            if name.startswith(".") or (file.suffix not in _SUFFIXES and name not in _NAMES):
                continue
            if not file.resolve().is_relative_to(root):
                raise CheckpointError(f"{file} is a link to outside of the folder; copy the file itself, then push.")
            if file.is_file():
                names.append(file.relative_to(root).as_posix())
    return names


def _require_checkpoint(folder: Path) -> None:
    """Check that a folder has a configuration and all of its weights."""
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json; push a folder that a run wrote.")
    read_config(folder)
    if not [*folder.glob("*.safetensors"), *folder.glob("*.onnx")]:
        raise CheckpointError(f"{folder} has no weights (*.safetensors or *.onnx); push a folder that a run wrote.")
    for index in folder.glob("*.safetensors.index.json"):
        weight_map(index)


def _content(root: Path, name: str, repo_id: str) -> str | bytes:
    """The path of a file, or what the model card says on the hub."""
    if name != "README.md":
        return str(root / name)
    return card_on_hub((root / name).read_text(encoding="utf-8"), repo_id).encode()


def card_on_hub(text: str, repo_id: str) -> str:
    """A model card of ours with the repository in place of the folder in its examples; other cards as they are."""
    ours = re.search(r'shrinkformer\.load\(("[^"\n]+")\)', text)
    if ours is not None:
        return text.replace(ours[1], f'"{repo_id}"')
    onnx = re.search(r'^import onnxruntime\n(.*InferenceSession\()("[^"\n]+/model\.onnx")\)', text, re.MULTILINE)
    if onnx is None:
        return text
    there = f'snapshot_download("{repo_id}") + "/model.onnx"'
    return text.replace(
        onnx[0], f"import onnxruntime\nfrom huggingface_hub import snapshot_download\n{onnx[1]}{there})"
    )


def _stale(api: "HfApi", repo_id: str, revision: str | None, names: list[str]) -> list[str]:
    """Weights of an earlier commit that the new one does not have."""
    there = api.list_repo_files(repo_id, revision=revision)
    return [name for name in there if "/" not in name and name.endswith(_WEIGHTS) and name not in names]
