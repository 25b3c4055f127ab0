"""Sentence embeddings from the states of tokens: what stands behind the model in a sentence encoder.

Source: the modules of sentence-transformers; in its layout ``modules.json`` names them, each with a folder of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from shrinkformer.errors import CheckpointError
from shrinkformer.prune.sentence_encoder import MODULES, module_folders, module_weights
from shrinkformer.trust.foreign import foreign_errors, shortened
from shrinkformer.trust.json_files import read_json, read_object

Array = NDArray[np.float32]

_SETTINGS = "config_sentence_transformers.json"

_READING = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json")

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Switches of older files, in the order in which several poolings are put side by side."""

_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")

_IDLE = ("Dropout",)
"""Modules that do nothing outside training."""


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), mask.int().argmax(1)]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), mask.shape[1] - 1 - mask.flip(1).int().argmax(1)]


def _largest(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(~mask[..., None], float("-inf")).amax(1)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _mean_by_root(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).sqrt()


def _weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Each token counts by its position, the first token of an example by one."""
    weights = (mask.cumsum(1) * mask)[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""From states ``(examples, length, width)`` and where the tokens are, ``(examples, length)`` bool; on either side."""


class Dense(nn.Module):
    """A linear layer with an activation, of embeddings."""

    def __init__(self, linear: nn.Linear, activation: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.linear, self.activation, self.shortcut = linear, activation, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """``(examples, inputs)`` to ``(examples, outputs)``."""
        found: Tensor = self.activation(self.linear(x))
        return found if self.shortcut is None else found + self.shortcut(x)


class Normalize(nn.Module):
    """Length one."""

    def forward(self, x: Tensor) -> Tensor:
        """``(examples, width)``."""
        return normalize(x, dim=-1)


class Truncate(nn.Module):
    """The first entries, of embeddings that were trained to be cut (``truncate_dim``)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """``(examples, width)``."""
        return x[:, : self.width]


@dataclass(frozen=True, eq=False)
class SentenceHead:
    """What makes one embedding of the states of an example's tokens.

    Attributes:
        poolings: Names of :data:`POOLINGS`; several are put side by side.
        behind: What the pooled states pass, in turn.
        similarity: How two embeddings are compared: ``cosine``, ``dot``, ``euclidean`` or ``manhattan``.
        prompt: What stands before every text.
        lower: Whether texts are read in small letters.
        longest: Tokens of a text that are read at most; None for as many as the model takes.
    """

    poolings: tuple[str, ...] = ("mean",)
    behind: tuple[nn.Module, ...] = (Normalize(),)
    similarity: str = "cosine"
    prompt: str = ""
    lower: bool = False
    longest: int | None = None

    def __str__(self) -> str:
        """How embeddings are made and compared, in words.

        >>> str(MEAN)
        'mean pooling, normalize, compared by cosine'
        """
        words = [f"{' and '.join(self.poolings)} pooling"]
        words += [type(module).__name__.lower() for module in self.behind]
        words += [f"compared by {self.similarity}"]
        words += [f"behind the prompt {shortened(repr(self.prompt))}"] if self.prompt else []
        words += ["texts in small letters"] if self.lower else []
        words += [f"at most {self.longest} tokens"] if self.longest else []
        return ", ".join(words)

    def is_like(self, other: "SentenceHead") -> bool:
        """Whether another makes the same embeddings; a length that is not known is any length."""
        known = self.longest is not None and other.longest is not None
        heads = (self, other) if known else (replace(self, longest=None), replace(other, longest=None))
        first, second = (nn.ModuleList(head.behind) for head in heads)
        if str(heads[0]) != str(heads[1]) or str(first) != str(second):
            return False
        pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
        return all(torch.equal(one.cpu().float(), two.cpu().float()) for one, two in pairs)

    def prepare(self, text: str) -> str:
        """A text as the tokenizer gets it."""
        text = self.prompt + text
        return text.lower() if self.lower else text

    @property
    def of_unit_length(self) -> bool:
        """Whether lengths of embeddings say nothing: they are one, or never looked at."""
        return self.similarity == "cosine" or self._ends_in_normalize

    @property
    def _ends_in_normalize(self) -> bool:
        return bool(self.behind) and isinstance(self.behind[-1], Normalize)

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """Embeddings, ``(examples, width)`` float32.

        Args:
            states: Of the last block, ``(examples, length, width)``.
            mask: Where the tokens are, ``(examples, length)`` bool, on the same device.
        """
        found = torch.cat([POOLINGS[name](states.float(), mask) for name in self.poolings], -1)
        for module in self.behind:
            found = module.to(found.device)(found)
        return found.float()

    def embed(self, states: Tensor, mask: Tensor) -> Tensor:
        """The same, of length one where only their directions count."""
        found = self(states, mask)
        return found if self._ends_in_normalize or not self.of_unit_length else Normalize().forward(found)

    def compare(self, first: Array, second: Array) -> Array:
        """Similarity of pairs of embeddings from :meth:`embed`, ``(pairs,)``: the larger, the more alike."""
        order = {"euclidean": 2, "manhattan": 1}.get(self.similarity)
        alike = (
            np.einsum("ij,ij->i", first, second) if order is None else -np.linalg.norm(first - second, order, axis=1)
        )
        return np.asarray(alike, dtype=np.float32)


MEAN = SentenceHead()
"""What most sentence encoders do, for a model whose files say nothing."""


def read_head(folder: Path) -> SentenceHead | None:
    """What the files of a sentence encoder say; None where there is no ``modules.json``.

    Raises:
        CheckpointError: A file is damaged, or names a module that this package does not know.
    """
    if not (folder / MODULES).is_file():
        return None
    module_folders(folder)  # checks them
    found = []
    for module in sorted(read_json(folder / MODULES), key=lambda one: one.get("idx", 0))[1:]:
        path = folder / (module.get("path") or "")
        config = read_object(path / "config.json") if (path / "config.json").is_file() else {}
        found.append((module["type"].rpartition(".")[2], config, module_weights(path)))
    settings = read_object(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
    reading = next((folder / name for name in _READING if (folder / name).is_file()), None)
    texts = read_object(reading) if reading is not None else {}
    head = _head(found, settings.get("similarity_fn_name"), str(folder / MODULES))
    longest = texts.get("max_seq_length")
    return replace(
        head,
        prompt=_default_prompt(settings.get("default_prompt_name"), settings.get("prompts"), found),
        lower=bool(texts.get("do_lower_case")),
        longest=longest if isinstance(longest, int) and longest > 0 else None,
    )


def head_in_memory(encoder: Any) -> SentenceHead:
    """What stands behind the model in a ``SentenceTransformer``.

    Raises:
        CheckpointError: It has a module that this package does not know.
    """
    found = [(type(module).__name__, module.get_config_dict(), module.state_dict()) for module in list(encoder)[1:]]
    head = _head(found, encoder.similarity_fn_name, type(encoder).__name__)
    first, cut = encoder[0], getattr(encoder, "truncate_dim", None)
    return replace(
        head,
        behind=head.behind if cut is None else (*head.behind, Truncate(cut)),
        prompt=_default_prompt(encoder.default_prompt_name, encoder.prompts, found),
        lower=bool(getattr(first, "do_lower_case", False)),
        longest=getattr(first, "max_seq_length", None),
    )


def _default_prompt(name: Any, prompts: Any, modules: Sequence[tuple[str, Any, Any]]) -> str:
    """What stands before texts by default.

    Raises:
        CheckpointError: Its tokens are left out of the pooling, which takes to know how many they are.
    """
    found = prompts.get(name) if isinstance(prompts, Mapping) and name is not None else None
    if not isinstance(found, str) or not found:
        return ""
    if any(kind == "Pooling" and config.get("include_prompt") is False for kind, config, _ in modules):
        raise CheckpointError(
            f"{_SETTINGS} names {shortened(repr(found))} as default prompt, whose tokens Pooling leaves out "
            "(include_prompt); this is not supported: set default_prompt_name to null."
        )
    return found


def _head(modules: Sequence[tuple[str, Any, Any]], similarity: str | None, where: str) -> SentenceHead:
    """A head from names, configurations and weights of modules."""
    poolings, behind = list[str](), list[nn.Module]()
    for name, config, weights in modules:
        if name in _IDLE:
            continue
        if (name == "Pooling") == bool(poolings):  # one pooling, before everything else
            raise CheckpointError(_unknown(name, where))
        if name == "Pooling":
            poolings = _poolings(config, where)
            continue
        with foreign_errors(CheckpointError, f"{where}: {shortened(name)} cannot be read", "download the files again."):
            behind.append(_module(name, config, weights, where).eval().requires_grad_(False))
    if not poolings:
        raise CheckpointError(f"{where} names no Pooling, which makes one embedding of the tokens' states.")
    if (similarity or _SIMILARITIES[0]) not in _SIMILARITIES:
        raise CheckpointError(f"{_SETTINGS}: similarity_fn_name is {similarity!r}, none of {', '.join(_SIMILARITIES)}.")
    return SentenceHead(tuple(poolings), tuple(behind), similarity or _SIMILARITIES[0])


def _unknown(what: str, where: str) -> str:
    return (
        f"{where}: {shortened(what)} is nothing that this package knows in this place, so the model cannot be judged "
        "as sentence-transformers runs it; known are Pooling, then Dense, LayerNorm and Normalize."
    )


def _poolings(config: Mapping[str, Any], where: str) -> list[str]:
    given = config.get("pooling_mode")
    if given is None:
        found = [mode for switch, mode in _MODES.items() if config.get(switch)] or ["mean"]
    else:
        found = [given] if isinstance(given, str) else list(given)
    for name in found:
        if not isinstance(name, str) or name not in POOLINGS:
            raise CheckpointError(_unknown(f"pooling_mode {name!r}", where))
    return found


def _module(name: str, config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> nn.Module:
    inputs = config.get("module_input_name", "sentence_embedding")
    elsewhere = config.get("module_output_name") not in (None, inputs)
    if name not in ("Dense", "LayerNorm", "Normalize") or inputs != "sentence_embedding" or elsewhere:
        raise CheckpointError(_unknown(name, where))
    if name == "Normalize":
        return Normalize()
    if name == "LayerNorm":
        with torch.device("meta"):
            norm = nn.LayerNorm(int(config["dimension"]))
        return _filled(norm, {name.removeprefix("norm."): value for name, value in weights.items()})
    return _dense(config, weights, where)


def _filled(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A module with its weights; what a configuration says of sizes has allocated nothing before."""
    module.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    return module


def _dense(config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> nn.Module:
    inputs, outputs = int(config["in_features"]), int(config["out_features"])
    shortcut: nn.Module | None = None
    with torch.device("meta"):
        linear = nn.Linear(inputs, outputs, bias=bool(config.get("bias", True)))
        if config.get("use_residual"):
            shortcut = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs, bias=False)
    named = str(config.get("activation_function", "torch.nn.Tanh"))  # so does sentence-transformers
    activation = getattr(nn, named.rpartition(".")[2], None) if named.startswith("torch.nn.") else None
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        raise CheckpointError(_unknown(f"activation_function {named!r}", where))
    named_so = {name.replace("residual.", "shortcut."): value for name, value in weights.items()}
    return _filled(Dense(linear, activation(), shortcut), named_so)
