"""Damaged weight files, indexes and data files from seeded generators."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.malformed_bases import FITTING
from benchmarks.malformed_runner import Case

_PADDED = "a byte that nothing depends on: padding of an archive, a flag of a pickle, a space or comment in JSON"


def read_safetensors(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and numbers of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_safetensors(file: Path, header: Any, numbers: bytes, *, length: int | None = None) -> None:
    """A file with any header, and with any length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + numbers)


def edit_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a header says, and leave the numbers as they are."""
    header, numbers = read_safetensors(file)
    write_safetensors(file, change(header), numbers)


_WRONG_SHAPES: tuple[Any, ...] = ([], [-1, 4], [10**12, 10**12], "32", [1.5], [True], None, [[2]], [2**63], [16, 15])
_WRONG_OFFSETS: tuple[Any, ...] = ([0, 0], [-8, 8], [10**15, 10**16], [5], "0-8", None, [8, 0], [0.0, 64.0], [0, 2**64])
_WRONG_TYPES: tuple[Any, ...] = ("F99", "", None, 7, "F16", "I64", "float32", "F32 ", "BOOL", [])
_WRONG_LENGTHS = (0, 1, 7, 2**16, 2**31, 2**40, 2**63, 2**64 - 1)


def header_cases(rng: random.Random) -> Iterator[Case]:
    """Headers of safetensors files that lie."""
    bases = ("bert", "opt", "llama", "quantized", "pruned")
    wrong = [("shape", value) for value in _WRONG_SHAPES] + [("data_offsets", value) for value in _WRONG_OFFSETS]
    wrong += [("dtype", value) for value in _WRONG_TYPES]
    for key, value in wrong:
        base, place = rng.choice(bases), rng.random()

        def change(folder: Path, key: str = key, value: Any = value, place: float = place) -> None:
            def lie(header: dict[str, Any]) -> dict[str, Any]:
                names = sorted(name for name in header if name != "__metadata__")
                name = names[int(place * len(names))]
                return header | {name: header[name] | {key: value}}

            edit_header(folder / "model" / "model.safetensors", lie)

        yield _case(f"header of a tensor: {key} = {value!r}", "safetensors headers", base, change, rng)
    for length in _WRONG_LENGTHS:

        def change_length(folder: Path, length: int = length) -> None:
            file = folder / "model" / "model.safetensors"
            header, numbers = read_safetensors(file)
            write_safetensors(file, header, numbers, length=length)

        yield _case(f"header of {length} bytes", "safetensors headers", rng.choice(bases), change_length, rng)
    for number in range(20):
        base, place = rng.choice(bases), rng.random()

        def forget(folder: Path, place: float = place) -> None:
            def without(header: dict[str, Any]) -> dict[str, Any]:
                names = sorted(name for name in header if name != "__metadata__")
                name = names[int(place * len(names))]
                return {key: part for key, part in header.items() if key != name}

            edit_header(folder / "model" / "model.safetensors", without)

        yield _case(f"a tensor that the header forgets, {number}", "safetensors headers", base, forget, rng)


def _case(name: str, kind: str, base: str, change: Callable[[Path], object], rng: random.Random) -> Case:
    commands = [command for command in FITTING[base] if command != "push"]  # it sends files as they are
    return Case(name, kind, base, rng.choice(commands), change, _PADDED)


def cut_cases(rng: random.Random) -> Iterator[Case]:
    """Files that end too early."""
    safe, index = "model.safetensors", "model.safetensors.index.json"
    files = [("bert", safe, 12), ("llama", safe, 8), ("quantized", safe, 6), ("bin", "pytorch_model.bin", 16)]
    files += [("opt", "config.json", 8), ("bert", "tokenizer.json", 8), ("sharded", index, 6)]
    files += [("pruned", "config.json", 6)]
    for base, name, count in files:
        for share in sorted({0.0, *(round(rng.random(), 4) for _ in range(count - 1))}):

            def cut(folder: Path, name: str = name, share: float = share) -> None:
                file = folder / "model" / name
                content = file.read_bytes()
                file.write_bytes(content[: int(share * len(content))])

            case = _case(f"{name} cut at {share}", "files cut short", base, cut, rng)
            command = rng.choice(["prune_bert", "export"]) if name == "tokenizer.json" else case.command
            yield Case(case.name, case.kind, base, command, cut, case.reason)


def flip_cases(rng: random.Random) -> Iterator[Case]:
    """Single bytes changed, in headers and in files that are text, never among numbers of weights."""
    files: tuple[tuple[str, str, int], ...] = (
        ("bert", "model.safetensors", 16),
        ("opt", "model.safetensors", 16),
        ("bin", "pytorch_model.bin", 16),
    )
    files += (("sharded", "model.safetensors.index.json", 12), ("llama", "config.json", 16))
    for base, name, count in files:
        for number in range(count):
            place, byte = rng.random(), rng.choice([0, 0x22, 0x7B, 0x5D, 0x80, 0xFF, 0x2C, 0x39])

            def flip(folder: Path, name: str = name, place: float = place, byte: int = byte) -> None:
                file = folder / "model" / name
                content = bytearray(file.read_bytes())
                end = len(content)
                if name.endswith(".safetensors"):
                    end = 8 + struct.unpack("<Q", content[:8])[0]
                elif name.endswith(".bin"):
                    end = content.index(b"PK\x07\x08") if b"PK\x07\x08" in content else 512  # of the pickle
                at = int(place * end)
                content[at] = byte if content[at] != byte else byte ^ 0x55
                file.write_bytes(bytes(content))

            yield _case(f"{name}: byte {number} flipped", "bytes flipped", base, flip, rng)


_WRONG_SHARDS: tuple[Any, ...] = (
    "../model/model-00001-of-00002.safetensors",
    "/etc/passwd",
    "gone.safetensors",
    "",
    ".",
    "..",
    7,
    None,
    ["a"],
    "data\\x.safetensors",
    "config.json",
    "a" * 3000,
    "sub/x.safetensors",
    "\x00",
)


def index_cases(rng: random.Random) -> Iterator[Case]:
    """Indexes of shards."""
    for value in _WRONG_SHARDS:

        def lead(folder: Path, value: Any = value) -> None:
            file = folder / "model" / "model.safetensors.index.json"
            index = json.loads(file.read_text())
            index["weight_map"][sorted(index["weight_map"])[0]] = value
            file.write_text(json.dumps(index))

        name = f"a tensor in {str(value)[:30]!r} of type {type(value).__name__}"
        yield _case(name, "indexes of shards", "sharded", lead, rng)
    wrong: tuple[Any, ...] = (
        [],
        {},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": "b"}},
        3,
        None,
        "x",
        [[[]]],
    )
    for content in wrong:

        def replace(folder: Path, content: Any = content) -> None:
            (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(content))

        yield _case(f"index = {json.dumps(content)}", "indexes of shards", "sharded", replace, rng)


def data_cases(rng: random.Random) -> Iterator[Case]:
    """Examples of tasks: rows, columns and bytes."""
    columns = {
        ("bert", "glue/sst2"): ("sentence", "label"),
        ("squad", "squad"): ("context", "question", "answers"),
        ("encoder", "glue/stsb"): ("sentence1", "sentence2", "label"),
    }
    values: tuple[Any, ...] = (None, 7, -1, [], {}, "x", "\ud800", [["a"]], 10**30, {"text": "a"}, "NaN", False)
    for (base, folder_name), names in columns.items():
        pairs = [(name, value) for name in names for value in values]
        for column, value in rng.sample(pairs, 16):
            split = rng.choice(["train", "validation"])

            def spoil(
                folder: Path, name: str = folder_name, split: str = split, column: str = column, value: Any = value
            ) -> None:
                file = folder / "data" / name / f"{split}.jsonl"
                rows = [json.loads(line) for line in file.read_text().splitlines()]
                rows[2] = rows[2] | {column: value}
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))

            name = f"{split} row 2: {column} = {value!r}"
            yield Case(name, "data: values", base, "prune_bert", spoil, "a text, or a label that the task has")
        for column in names:

            def drop(folder: Path, name: str = folder_name, column: str = column) -> None:
                file = folder / "data" / name / "validation.jsonl"
                rows = [json.loads(line) for line in file.read_text().splitlines()]
                file.write_text("".join(json.dumps({k: v for k, v in r.items() if k != column}) + "\n" for r in rows))

            yield Case(f"validation without {column}", "data: columns", base, "evaluate", drop, "not needed")
    for number in range(30):
        place, byte, suffix = rng.random(), rng.choice([0x80, 0xFF, 0x00, 0x22]), rng.choice([".jsonl", ".txt"])
        base, name = ("bert", "glue/sst2/train") if suffix == ".jsonl" else ("opt", "wikitext2/test")

        def spoil_byte(
            folder: Path, name: str = name, place: float = place, byte: int = byte, suffix: str = suffix
        ) -> None:
            file = folder / "data" / f"{name}{suffix}"
            content = bytearray(file.read_bytes())
            content[int(place * len(content))] = byte
            file.write_bytes(bytes(content))

        command = "prune_bert" if base == "bert" else rng.choice(["opt_eval", "prune_opt"])
        yield Case(f"{name}{suffix}: byte {number}", "data: bytes", base, command, spoil_byte, "a sign of a text")


def file_cases(rng: random.Random) -> list[Case]:
    """All of them."""
    generators = (header_cases, cut_cases, flip_cases, index_cases, data_cases)
    return [case for generator in generators for case in generator(rng)]
