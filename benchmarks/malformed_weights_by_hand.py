"""Hostile weights, and code that comes with a model, written by hand, each with the reason not to accept it."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.malformed_files import edit_header, read_safetensors, write_safetensors
from benchmarks.malformed_runner import CANARY
from benchmarks.malformed_tools import DEEP, Row, all_of, change_json, write

_CODE = f"open({CANARY!r}, 'w').close()"
_RUN = f"from pathlib import Path\nPath({CANARY!r}).touch()\n"


class Bomb:
    """An object whose pickle runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What a reader of the pickle would call."""
        return exec, (_CODE,)


class Command:
    """The same by way of a shell."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What a reader of the pickle would call."""
        return os.system, (f"touch {CANARY}",)


class Allocation:
    """An object of a class that readers of weights allow, of a size that no memory has."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What a reader of the pickle would call."""
        return bytearray, (10**13,)


def _archive(change: Callable[[dict[str, bytes]], dict[str, bytes]], how: int = zipfile.ZIP_STORED) -> Any:
    """Write ``pytorch_model.bin`` anew with other parts."""

    def write(folder: Path) -> None:
        file = folder / "model" / "pytorch_model.bin"
        with zipfile.ZipFile(file) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", how) as archive:
            for name, content in change(parts).items():
                archive.writestr(name, content)

    return write


def _pickled(value: Any) -> Any:
    """Put another pickle into the archive."""

    def change(parts: dict[str, bytes]) -> dict[str, bytes]:
        return {name: pickle.dumps(value, 2) if name.endswith("data.pkl") else part for name, part in parts.items()}

    return _archive(change)


def _padded(parts: dict[str, bytes]) -> dict[str, bytes]:
    return {name: part + bytes(2**28 if name.endswith("data/0") else 0) for name, part in parts.items()}


def _overlap(header: dict[str, Any]) -> dict[str, Any]:
    first, second = [name for name in header if name != "__metadata__"][:2]
    start, _ = header[first]["data_offsets"]
    width = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    return header | {second: header[second] | {"data_offsets": [start, start + width]}}


def _twice(folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    header, numbers = read_safetensors(file)
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)
    write_safetensors(file, f'{{"{name}": {json.dumps(header[name])}, {text[1:]}'.encode(), numbers)


def _tail(folder: Path) -> None:
    with (folder / "model" / "model.safetensors").open("ab") as file:
        file.write(b"more")


def _drop_block(header: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("layer.1.", "layer.7."): part for name, part in header.items()}


def _fifo(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()
    os.mkfifo(folder / "model" / "model.safetensors")


def _npy(folder: Path) -> None:
    stream = io.BytesIO()
    pickle.dump({"weights": Bomb()}, stream, 2)
    (folder / "model" / "pytorch_model.bin").write_bytes(stream.getvalue())


_AUTO = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForSequenceClassification": "evil.Model"}


def _code() -> Iterator[Row]:
    """Code that comes with a model."""
    kind, evil = "by hand: code", write("model/evil.py", _RUN + "class Config: pass\nclass Model: pass\n")
    unknown = all_of(evil, change_json("config.json", auto_map=_AUTO, model_type="evil"))
    yield kind, "a model of code beside it", "bert", "prune_bert", unknown, "remote code, never without the flag"
    yield kind, "a model of code beside it", "opt", "opt_eval", unknown, "remote code, never without the flag"
    yield kind, "a model of code beside it", "pruned", "load", unknown, "remote code, never without the flag"
    yield (
        kind,
        "auto_map of a hub's code",
        "llama",
        "prune_opt",
        all_of(change_json("config.json", auto_map={"AutoConfig": "who/evil--evil.Config"}, model_type="custom")),
        "code of another repository",
    )
    token = {"auto_map": {"AutoTokenizer": ["evil.Model", None]}, "tokenizer_class": "EvilTokenizer"}
    only_code = all_of(
        evil,
        change_json("tokenizer_config.json", **token),
        lambda folder: (folder / "model" / "tokenizer.json").unlink(),
    )
    yield kind, "a tokenizer of code beside it", "bert", "prune_bert", only_code, "remote code in a tokenizer"
    yield kind, "a pickle that calls exec", "bin", "prune_bert", _pickled(Bomb()), "a pickle with code"
    yield kind, "a pickle that calls a shell", "bin", "latency", _pickled({"w": Command()}), "a pickle with code"
    yield kind, "a bare pickle with code", "bin", "evaluate", _npy, "a pickle with code, of the old format"
    yield (
        kind,
        "kernels for attention",
        "bert",
        "prune_bert",
        change_json("config.json", attn_implementation="kernels-community/flash-attn"),
        "compiled code from a hub",
    )
    yield (
        kind,
        "weights of any name",
        "bert",
        "latency",
        all_of(
            change_json("config.json", transformers_weights="../evil.bin"), write("evil.bin", pickle.dumps(Bomb(), 2))
        ),
        "leads to a file outside of the folder",
    )
    yield (
        kind,
        "an adapter in the folder",
        "bert",
        "prune_bert",
        write("model/adapter_config.json", json.dumps({"base_model_name_or_path": "who/else"})),
        "another model would be loaded in its place",
    )


def _pickles() -> Iterator[Row]:
    """Pickles and archives."""
    kind = "by hand: pickles"
    yield kind, "a list in place of weights", "bin", "prune_bert", _pickled([1, 2]), "no weights by name"
    yield kind, "numbers in place of tensors", "bin", "evaluate", _pickled({"bert.x": 3}), "no tensors"
    yield kind, "keys that are no names", "bin", "latency", _pickled({7: 1}), "no names"
    yield kind, "10 TB in a pickle", "bin", "prune_bert", _pickled({"w": Allocation()}), "would take all memory"
    yield kind, "a packed archive", "bin", "prune_bert", _archive(_padded, zipfile.ZIP_DEFLATED), "a zip bomb"
    yield kind, "no pickle in the archive", "bin", "evaluate", _archive(lambda parts: {"x/y": b"z"}), "no weights"
    yield kind, "an archive of nothing", "bin", "latency", _archive(lambda _parts: {}), "no weights"
    yield (
        kind,
        "text in place of an archive",
        "bin",
        "prune_bert",
        write("model/pytorch_model.bin", "<html>404</html>"),
        "an error page that was saved",
    )
    yield (
        kind,
        "a pointer of Git LFS",
        "bin",
        "prune_bert",
        write("model/pytorch_model.bin", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "the file itself was not fetched",
    )


def _weights() -> Iterator[Row]:
    """Files of weights."""
    kind = "by hand: weights"
    weights = "model/model.safetensors"
    yield (
        kind,
        "two tensors in one place",
        "bert",
        "prune_bert",
        lambda folder: edit_header(folder / weights, _overlap),
        "bytes are read twice, others never",
    )
    yield kind, "a name twice", "opt", "opt_eval", _twice, "which one counts is anybody's guess"
    yield kind, "bytes behind the last tensor", "llama", "prune_opt", _tail, "room for another file"
    yield (
        kind,
        "a pointer of Git LFS in safetensors",
        "bert",
        "prune_bert",
        write(weights, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "the file itself was not fetched",
    )
    yield kind, "an empty file", "opt", "prune_opt", write(weights, ""), "a download that did not begin"
    yield (
        kind,
        "a header without end",
        "llama",
        "opt_eval",
        write(weights, struct.pack("<Q", 50) + b"{" * 50),
        "no JSON",
    )
    yield (
        kind,
        "a deep header",
        "bert",
        "inspect",
        write(weights, struct.pack("<Q", len(DEEP)) + DEEP.encode()),
        "would exhaust the stack",
    )
    yield (
        kind,
        "blocks 0 and 7",
        "bert",
        "prune_bert",
        lambda folder: edit_header(folder / weights, _drop_block),
        "a block is missing and would be made up",
    )
    yield kind, "a queue in place of weights", "opt", "opt_eval", _fifo, "reading would wait for ever"
    yield kind, "no weights", "bert", "prune_bert", lambda folder: (folder / weights).unlink(), "nothing to prune"
    yield (
        kind,
        "weights of another size",
        "llama",
        "latency",
        lambda folder: shutil.copyfile(folder.parent.parent / "bases" / "opt" / weights, folder / weights),
        "the weights of another model",
    )


def weight_rows() -> Iterator[Row]:
    """All of them."""
    yield from _code()
    yield from _pickles()
    yield from _weights()
