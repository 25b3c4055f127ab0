"""Run ONNX files with onnxruntime, from tensors to arrays."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shrinkformer.errors import CheckpointError, InputError
from shrinkformer.utils.installation import how_to_install

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

_SLOWER = ["SkipLayerNormFusion"]
"""Of onnxruntime's optimizers: sums with their norm in one node take longer than in two (1.31, CPU)."""

Array = np.ndarray[Any, Any]

_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32}


def onnx_is_installed() -> bool:
    """Whether everything that an export needs can be imported; it is an extra."""
    return all(importlib.util.find_spec(name) is not None for name in _PACKAGES)


def require_onnx(asked: str) -> None:
    """Check that everything that an export needs is there.

    Args:
        asked: What needs it, such as a flag with its value.

    Raises:
        InputError: A package is missing.
    """
    if not onnx_is_installed():
        raise InputError(f"{asked} needs onnx, onnxscript and onnxruntime: {how_to_install('export')}.")


class OnnxModel:
    """An ONNX file as a function from tensors to arrays, on the CPU.

    Inputs that a batch lacks are those that transformers would make up: a mask of ones, token types of zeros, a cache
    with nothing in it. What the file has no use for is ignored.

    >>> OnnxModel("model.onnx")({"input_ids": ids})["logits"]   # doctest: +SKIP

    Attributes:
        inputs: Names of the file's inputs.
        outputs: Names of its outputs.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        """Open a file.

        Args:
            path: Of the file.
            threads: That one operator may use; as many as torch uses by default.

        Raises:
            InputError: onnxruntime is missing, there is no such file, or there are no threads.
            CheckpointError: onnxruntime cannot open the file.
        """
        if importlib.util.find_spec("onnxruntime") is None:
            raise InputError(f"running ONNX files needs onnxruntime: {how_to_install('export')}.")
        if not Path(path).is_file():
            raise InputError(f"{path}: no such ONNX file.")
        threads = torch.get_num_threads() if threads is None else threads
        if threads < 1:
            raise InputError(f"{threads} threads for {path}: must be at least 1.")
        import onnxruntime  # an extra

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors only; it warns of constants that it folds
        # Idle threads of one session would take the time of the next one that is measured.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], disabled_optimizers=_SLOWER
            )
        except Exception as error:  # its errors have no common class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{path}: onnxruntime cannot open it: {reason}") from None
        self._declared = {value.name: value for value in self._session.get_inputs()}
        self.inputs = tuple(self._declared)
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Array]:
        """All outputs by name.

        Args:
            batch: Inputs by name: ``input_ids`` and ``attention_mask`` of ``(batch, sequence)``, ...

        Raises:
            InputError: An input is missing.
        """
        feed = {name: value.detach().cpu().numpy() for name, value in batch.items() if name in self._declared}
        for name in self._declared:
            if name not in feed:
                feed[name] = self._made_up(name, batch)
        return dict(zip(self.outputs, self._session.run(None, feed), strict=True))

    def _made_up(self, name: str, batch: Mapping[str, Tensor]) -> Array:
        """What transformers takes for an input that nobody gives."""
        ids = batch.get("input_ids")
        if ids is not None and name == "attention_mask":
            past = batch.get("past_key_values.0.key")
            return np.ones((len(ids), ids.shape[1] + (0 if past is None else past.shape[2])), np.int64)
        if ids is not None and name == "token_type_ids":
            return np.zeros(tuple(ids.shape), np.int64)
        if ids is not None and name.startswith("past_key_values."):
            _, heads, _, width = self._declared[name].shape
            return np.zeros((len(ids), heads, 0, width), _TYPES[self._declared[name].type])
        raise InputError(f"the ONNX model needs {name!r}; the batch has {', '.join(batch) or 'nothing'}.")
