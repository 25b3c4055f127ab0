"""Options of the commands about finished checkpoints: ``shrinkformer inspect``, ``export`` and ``push``."""

import math
from dataclasses import dataclass
from pathlib import Path

from shrinkformer.commands.flags import check_values, option
from shrinkformer.commands.options import EXPORTS, require_writable, threads_option
from shrinkformer.errors import InputError

ONNX_FILE = Path("onnx") / "model.onnx"
"""In a checkpoint folder: where Optimum and sentence-transformers look."""

INT8_FILE = ONNX_FILE.with_name("model_int8.onnx")


@dataclass(frozen=True)
class InspectOptions:
    """What is looked at, and what is drawn.

    Raises:
        InputError: A picture cannot be written, or a value is out of its range.
    """

    place: str = option(
        "", "checkpoint folder, bundled model, name on the hub, or report .jsonl", positional=True, metavar="DIR"
    )
    sequence_length: float | None = option(
        None, "tokens at which MACs count", group="budget", more="the plan's, or 128, by default"
    )
    html: Path | None = option(None, "file for a page that needs nothing else", group="output")
    png: Path | None = option(None, "file for a picture", group="output", more="takes matplotlib")
    json: bool = option(False, "print JSON for programs", group="output")

    def __post_init__(self) -> None:
        _require_new_file("--html", self.html)
        _require_new_file("--png", self.png)
        length = self.sequence_length
        if length is not None and not (math.isfinite(length) and length > 0):
            raise InputError(f"--sequence_length {length}: must be above 0.")


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and where to.

    Raises:
        InputError: A value is out of its range, a package is missing, or a folder cannot be written.
    """

    model: str = option(
        "", "folder or name of a model", more="dense, pruned or quantized", positional=True, metavar="MODEL"
    )
    to: str = option("onnx", "what for", group="output", choices=EXPORTS)
    output: Path | None = option(
        None,
        f"folder that gets {ONNX_FILE}",
        group="output",
        more="the model's own by default; output/onnx/<name> for bundled models and the hub",
    )
    dynamic_int8: bool = option(
        False, f"encoders: also write {INT8_FILE}", group="output", more="with 8-bit weights and activations"
    )
    threads: int | None = threads_option(advanced=True)

    def __post_init__(self) -> None:
        check_values(self)
        if self.output is not None:
            require_writable("--output", self.output)
        from shrinkformer.export.runtime import require_onnx

        require_onnx(f"--to {self.to}")


@dataclass(frozen=True)
class PushOptions:
    """What is sent to the hub, and how."""

    folder: Path = option(Path(), "a folder that a run wrote", positional=True, metavar="DIR")
    repo_id: str = option("", "USER/NAME on the hub; made if it is not there", positional=True, metavar="REPO_ID")
    private: bool = option(False, "make a new repository private", group="output")
    revision: str | None = option(None, "branch to commit to; made if it is not there", group="output")
    message: str | None = option(None, "message of the commit", group="output", more="names the folder by default")


def _require_new_file(flag: str, file: Path | None) -> None:
    if file is not None and file.is_dir():
        raise InputError(f"{flag} {file}: it is a folder; name a file in it.")
    if file is not None and not file.resolve().parent.is_dir():
        raise InputError(f"{flag} {file}: there is no folder {file.parent}; make it, or name another.")
