"""Damaged inputs from seeded generators: one field, one piece of a file or one flag of a valid base each."""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.malformed_bases import FITTING, arguments_of
from benchmarks.malformed_by_hand import hand_cases
from benchmarks.malformed_files import file_cases
from benchmarks.malformed_runner import Case

_SIZES = {
    "bert": "hidden_size num_attention_heads num_hidden_layers intermediate_size vocab_size max_position_embeddings "
    "type_vocab_size",
    "distilbert": "dim n_heads n_layers hidden_dim vocab_size max_position_embeddings",
    "opt": "hidden_size num_attention_heads num_hidden_layers ffn_dim vocab_size max_position_embeddings "
    "word_embed_proj_dim",
    "llama": "hidden_size num_attention_heads num_hidden_layers intermediate_size vocab_size max_position_embeddings "
    "num_key_value_heads head_dim",
}

_OTHERS = (
    *("model_type", "architectures", "dtype", "pad_token_id", "id2label", "layer_types", "rope_parameters"),
    *("hidden_act", "activation_function", "activation", "layer_norm_eps", "rms_norm_eps", "attention_dropout"),
    *("tie_word_embeddings", "hidden_dropout_prob", "dropout", "is_decoder", "initializer_range"),
)

_WRONG: tuple[Any, ...] = (0, -1, 10**9, 10**12, -(2**63), "many", 3.5, None, [], {"a": 1}, True, math.nan, 7, 17)

_UNUSED = "the field is not used here, or the value is valid: another model or figure, none that is malformed"

_PLACES = {
    "config": "config.json",
    "tokenizer_config": "tokenizer_config.json",
    "tokenizer": "tokenizer.json",
    "plan": "shrinkformer_plan.json",
    "generation": "generation_config.json",
    "modules": "modules.json",
}


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file of a model holds."""
    file = folder / "model" / name
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def put(name: str, path: Sequence[Any], value: Any, folder: Path) -> None:
    """Another value at one place of a JSON file of a model."""
    edit(folder, name, lambda old: set_at(old, path, value))


def set_at(content: Any, path: Sequence[Any], value: Any) -> Any:
    """The same content with another value at a path."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = set_at(copy[path[0]] if path[0] in copy or isinstance(copy, list) else None, path[1:], value)
    return copy


def paths_in(content: Any, depth: int = 4) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value, to a depth."""
    yield ()
    if depth and isinstance(content, dict | list):
        pairs = content.items() if isinstance(content, dict) else enumerate(content[:3])
        for key, value in pairs:
            yield from ((key, *rest) for rest in paths_in(value, depth - 1))


def fields(  # noqa: PLR0917
    kind: str,
    base: str,
    name: str,
    paths: Sequence[tuple[Any, ...]],
    values: Sequence[Any],
    rng: random.Random,
    count: int,
) -> Iterator[Case]:
    """Cases of one JSON file: another value in one place, drawn without repetition."""
    pairs = [(path, value) for path in paths for value in values]
    for path, value in rng.sample(pairs, min(count, len(pairs))):
        where = ".".join(map(str, path)) or "all of it"
        yield Case(
            f"{name}: {where} = {repr(value)[:40]}",
            kind,
            base,
            rng.choice(FITTING[base]),
            partial(put, name, path, value),
            _UNUSED,
        )


def config_cases(rng: random.Random) -> Iterator[Case]:
    """Sizes and other fields of config.json of four families, of a pruned and of a quantized model."""
    for base, names in _SIZES.items():
        paths: list[tuple[Any, ...]] = [(name,) for name in names.split()]
        yield from fields("config.json: sizes", base, "config.json", paths, _WRONG, rng, 30)
        yield from fields("config.json: others", base, "config.json", [(name,) for name in _OTHERS], _WRONG, rng, 14)
    inside = [("shrinkformer", "layers"), ("shrinkformer", "layers", 0), ("shrinkformer", "layers", 1, "heads")]
    inside += [("shrinkformer", "layers", 0, "neurons"), ("shrinkformer", "architecture"), ("per_layer_config",)]
    inside += [("shrinkformer", "architecture", "layers"), ("shrinkformer", "architecture", "attention", "query")]
    inside += [("shrinkformer", "architecture", "attention", "heads_attributes"), ("shrinkformer",)]
    yield from fields("config.json: pruned", "pruned", "config.json", inside, _WRONG, rng, 30)
    section = ("quantization_config", "config_groups", "group_0", "weights")
    inside = [("quantization_config",), (*section[:2],), (*section[:3],), section, (*section, "num_bits")]
    inside += [(*section, "group_size"), (*section, "strategy"), (*section, "type"), ("quantization_config", "format")]
    inside += [("quantization_config", "quant_method"), ("quantization_config", "ignore")]
    yield from fields("config.json: quantized", "quantized", "config.json", inside, _WRONG, rng, 30)


def side_cases(rng: random.Random, bases: Path) -> Iterator[Case]:
    """Tokenizers, plans, generation settings and lists of modules."""
    files = (
        ("tokenizer_config", "bert", 20),
        ("tokenizer", "bert", 24),
        ("tokenizer", "opt", 12),
        ("plan", "pruned", 16),
    )
    for kind, base, count in (*files, ("generation", "opt", 12), ("modules", "encoder", 12)):
        name = _PLACES[kind]
        paths = list(paths_in(json.loads((bases / base / "model" / name).read_text()), depth=3))
        for case in fields(f"{kind} file", base, name, paths, _WRONG, rng, count):
            fitting = {"plan": "inspect", "modules": "export"}.get(kind, case.command)
            fitting = rng.choice(["prune_bert", "export"]) if kind.startswith("token") and base == "bert" else fitting
            fitting = rng.choice(["prune_opt", "opt_eval"]) if kind == "tokenizer" and base == "opt" else fitting
            fitting = rng.choice(["prune_opt", "latency"]) if kind == "generation" else fitting
            yield Case(case.name, case.kind, base, fitting, case.change, case.reason)


_FLAGS: dict[str, tuple[str, ...]] = {
    "--mu": ("0", "-1", "1.5", "nan", "inf", "half", "1e400", ""),
    "--sample_batch_size": ("0", "-3", "99999999", "1.5", "x"),
    "--batch_size": ("0", "-1", "x"),
    "--seed": ("-1", "x", "1.5"),
    "--method": ("none", "", "stat\n"),
    "--round_to": ("0", "-8", "10000", "x"),
    "--min_heads": ("-1", "0", "100"),
    "--min_neurons": ("-1", "10000", "x"),
    "--max_memory": ("0", "-1", "nan", "x"),
    "--device": ("tpu", "cuda:99", "meta", "cpu:x"),
    "--model_name": (
        "",
        "nowhere",
        "../../../etc",
        "/dev/null",
        "model/config.json",
        "\x1b[2J",
        "a" * 5000,
        "user/none",
    ),
    "--data_dir": ("nowhere", "/dev/null", "model/config.json"),
    "--save_dir": ("/proc/x", "model/config.json", "model"),
    "--output_dir": ("/proc/x", "model/config.json"),
    "--calibration_file": ("nowhere.txt", "model", "/dev/null", "data"),
    "--sequence_length": ("0", "-4", "nan", "1000000", "x"),
    "--latency_shape": ("0", "x"),
    "--push_to_hub": ("a b", "../x", "user/name/more"),
    "--nonsense": ("1",),
    "--search_seconds": ("-1", "nan", "x"),
}


def flag_cases(rng: random.Random) -> Iterator[Case]:
    """Values of flags of two commands."""
    for command, base in (("prune_bert", "bert"), ("prune_opt", "opt")):
        pairs = [(flag, value) for flag, values in _FLAGS.items() for value in values]
        for flag, value in rng.sample(pairs, 32):
            usual = arguments_of(base, command)
            if flag in usual:
                at = usual.index(flag)
                usual = usual[:at] + usual[at + 2 :]
            yield Case(
                f"{flag} {value[:20]!r}",
                "values of flags",
                base,
                command,
                lambda _folder: None,
                "the command takes this value",
                (*usual, flag, value),
            )


def valid_cases() -> Iterator[Case]:
    """Every base as it is: nothing is refused that is right."""
    for base, commands in FITTING.items():
        for command in commands:
            yield Case("as it is", "valid", base, command, lambda _folder: None, "it is valid")


def all_cases(bases: Path, seed: int = 0) -> list[Case]:
    """Every case, in the same order for the same seed; no two have the same change and the same base.

    Args:
        bases: From :func:`benchmarks.malformed_runner.prepare`.
        seed: Of what is drawn.
    """
    rng = random.Random(seed)
    cases = [*valid_cases(), *config_cases(rng), *side_cases(rng, bases), *flag_cases(rng), *file_cases(rng)]
    found: dict[tuple[str, ...], Case] = {}
    for case in [*cases, *hand_cases()]:
        found.setdefault((case.name, case.base, *([case.command] if case.kind == "valid" else [])), case)
    return list(found.values())
