"""Folders of checkpoints: files that are read lie in them, and not elsewhere by way of a link."""

from pathlib import Path

from shrinkformer.errors import CheckpointError

SUFFIXES = frozenset((".json", ".safetensors", ".bin", ".txt", ".model", ".md", ".jinja", ".onnx", ".data"))
"""Of the files that this package or transformers may read."""

ADAPTER = "adapter_config.json"

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def require_own_files(folder: Path) -> None:
    """Check that the files of a checkpoint lie in its folder, directly or in a folder there.

    Files in the cache of the hub are links into its own store, which is as good.

    Raises:
        CheckpointError: A file is a link to elsewhere, or no ordinary file; or the folder is that of an adapter, for
            which transformers would load another model.
    """
    root = folder.resolve()
    store = root.parents[1] / _BLOBS if len(root.parents) > 1 and root.parent.name == _SNAPSHOTS else root
    for file in [*folder.iterdir(), *folder.glob("[!.]*/*")]:
        if file.suffix not in SUFFIXES:
            continue
        try:
            real = file.resolve(strict=True)
        except (OSError, RuntimeError):  # a link to nothing, or to itself
            raise CheckpointError(f"{file} is a link to nothing; put the file itself there.") from None
        if not (real.is_relative_to(root) or real.is_relative_to(store)):
            raise CheckpointError(f"{file} is a link to outside of its folder; put the file itself there.")
        if not (real.is_file() or real.is_dir()):
            raise CheckpointError(f"{file} is no ordinary file; put the file itself there.")
    if (folder / ADAPTER).exists():
        raise CheckpointError(adapter_in(folder))


def adapter_in(place: Path | str) -> str:
    """What is said of a folder or repository with an adapter, beside a model or alone."""
    return (
        f"{place} holds an adapter ({ADAPTER}); merge it into its model (merge_and_unload() of peft), save that and "
        "pass its folder."
    )
