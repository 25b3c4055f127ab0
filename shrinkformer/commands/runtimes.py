"""Models as callables of one kind, whatever runs them: eager torch, torch.compile, onnxruntime."""

import importlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shrinkformer.commands.latency_options import COMPILE, ONNX
from shrinkformer.efficiency.latency import Timed, call_model
from shrinkformer.errors import InputError, ShrinkformerError
from shrinkformer.utils.inputs import call

_MANY = 4096
"""Shapes and models that torch may compile one function for; beyond its own limit of 8 it silently stops to compile."""


class CompiledModel:
    """A model under ``torch.compile``, compiled anew for every shape, so that each gets the code that is best for it.

    It compiles when it is called with a shape for the first time; that call is not to be timed.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "inductor") -> None:
        """Nothing is compiled yet.

        Args:
            model: In evaluation mode.
            backend: Of torch.compile.
        """
        self._name = type(model).__name__
        self._call: Any = torch.compile(model, dynamic=False, backend=backend)
        self._seen: set[torch.Size] = set()

    def __call__(self, batch: Mapping[str, Tensor]) -> object:
        """A forward pass.

        Raises:
            ShrinkformerError: The model cannot be compiled.
        """
        shape = batch["input_ids"].shape
        if shape in self._seen:
            return self._call(**batch)
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        limits = {"recompile_limit": _MANY, "accumulated_recompile_limit": _MANY, "fail_on_recompile_limit_hit": True}
        try:
            with dynamo.patch(**limits):
                output: object = self._call(**batch)
        except Exception as error:  # compilers fail with anything
            raise ShrinkformerError(
                f"--runtime {COMPILE}: torch.compile fails on {self._name}: {_reason(error)}; leave {COMPILE} out."
            ) from error
        self._seen.add(shape)
        return output


def require_compiler(device: str, backend: str = "inductor") -> None:
    """See by a small function that torch.compile works.

    Raises:
        InputError: It does not.
    """
    try:
        torch.compile(_double, dynamic=False, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # compilers fail with anything
        raise InputError(
            f"--runtime {COMPILE}: torch.compile does not work here ({_reason(error)}); install a C++ compiler "
            f"(on a GPU also triton), or leave {COMPILE} out."
        ) from None


def _double(values: Tensor) -> Tensor:
    return values + values


def _reason(error: BaseException) -> str:
    """The first line of what a compiler says; torch wraps it."""
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error
    return next((line.strip() for line in str(inner).splitlines() if line.strip()), type(inner).__name__)


class CachedStep:
    """One decoding step: the next token of every sequence, keys and values of the earlier ones cached.

    The first call with a batch reads the batch as a prompt, which is not to be timed; every further call adds a token.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        self._prompt: Tensor | None = None
        self._cache: Any = None
        self._mask = torch.empty(0)

    def __call__(self, batch: Mapping[str, Tensor]) -> object:
        """The next step."""
        ids = batch["input_ids"]
        if self._prompt is not ids:
            self._prompt, self._mask = ids, batch["attention_mask"]
            self._cache = call(self._model, {**batch, "use_cache": True}).past_key_values
        self._mask = torch.cat([self._mask, self._mask[:, :1]], dim=1)
        step = {"input_ids": ids[:, -1:], "attention_mask": self._mask, "past_key_values": self._cache}
        output = call(self._model, {**step, "use_cache": True})
        self._cache = output.past_key_values
        return output


def eager(model: PreTrainedModel) -> Timed:
    """A model as torch runs it."""
    return partial(call_model, model)


def find_onnx(folder: Path) -> Path | None:
    """The ONNX file of a checkpoint folder, if it has one."""
    return next((path for path in (folder / "model.onnx", folder / "onnx" / "model.onnx") if path.is_file()), None)


def open_onnx(path: Path, threads: int) -> Timed:
    """A model as onnxruntime runs it."""
    from shrinkformer.export.runtime import OnnxModel  # onnxruntime is an extra

    return OnnxModel(path, threads=threads)


def export_for(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model as ONNX, without a cache.

    Args:
        model: In float32, on the CPU.
        folder: Where to.
    """
    from shrinkformer.export.onnx_export import export_onnx  # an extra

    ids = torch.arange(32).reshape(2, 16) % model.config.vocab_size
    path = folder / "model.onnx"
    export_onnx(model, path, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache=False)
    return path


def require_onnx_packages() -> None:
    """Check that what exports and runs ONNX is installed.

    Raises:
        InputError: It is not.
    """
    from shrinkformer.export.runtime import require_onnx

    require_onnx(f"--runtime {ONNX}")
