"""What is checked before a file is trusted, piece by piece; and that no code of ours trusts one all the same."""

import ast
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import shrinkformer
from shrinkformer.commands import console
from shrinkformer.commands.card_metadata import inherited
from shrinkformer.commands.locate import Source
from shrinkformer.errors import CheckpointError, InputError
from shrinkformer.trust.configs import read_config
from shrinkformer.trust.folders import require_own_files
from shrinkformer.trust.foreign import foreign_errors, printable
from shrinkformer.trust.json_files import parse_json
from shrinkformer.trust.weights import read_header, require_plain_archive
from tests.conftest import build_model

PACKAGE = Path(shrinkformer.__file__).resolve().parent

TRUSTING: set[str] = set()
"""Calls below that are right all the same, as ``file:name``, each with its reason beside it. There is none."""


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> Any:
    found = [entry.value for entry in call.keywords if entry.arg == name]
    return ast.literal_eval(found[0]) if found and isinstance(found[0], ast.Constant) else None


def trusts(name: str, call: ast.Call) -> bool:
    """Whether a call may run code that comes with a file."""
    if name in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}:
        return True
    if name == "torch.load":
        return keyword(call, "weights_only") is not True
    module, _, function = name.rpartition(".")
    if module == "yaml":
        return function not in {"safe_load", "safe_dump", "dump"}
    if module in {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}:
        return function in {"load", "loads", "open", "Unpickler"}
    if module.endswith(("np", "numpy")) and function == "load":
        return keyword(call, "allow_pickle") is not False
    risky = [entry.arg for entry in call.keywords if entry.arg in {"shell", "trust_remote_code"}]
    return any(keyword(call, name) is not False for name in risky)  # a value that is not written out could be True


def test_no_code_of_ours_trusts_files() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{name}"
        for path in PACKAGE.rglob("*.py")
        for name, call in calls(path)
        if trusts(name, call)
    }
    assert found == TRUSTING


@pytest.mark.parametrize(
    "text",
    [
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "pickle.load(f)",
        "eval('1')",
        "yaml.load(f)",
        "np.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=flag)",
        "subprocess.run('x', shell=True)",
    ],
)
def test_the_test_finds_what_it_looks_for(text: str) -> None:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert trusts(ast.unparse(call.func), call)


@pytest.mark.parametrize("how", ["elsewhere", "folder"])
def test_links_that_lead_elsewhere_are_refused_and_others_are_not(tmp_path: Path, how: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    (model / "inside.json").write_text("{}")
    (model / "config.json").symlink_to("inside.json")
    require_own_files(model)
    link = tmp_path / "link"
    link.symlink_to(model)
    require_own_files(link)  # the folder itself may be a link
    if how == "elsewhere":
        (model / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    else:
        (tmp_path / "pooling").mkdir()
        (tmp_path / "pooling" / "config.json").write_text("{}")
        (model / "1_Pooling").symlink_to(tmp_path / "pooling")
    with pytest.raises(CheckpointError, match="is a link to outside of its folder; put the file itself there"):
        require_own_files(model)


def test_the_cache_of_the_hub_is_made_of_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to(Path("..") / ".." / "blobs" / "abc")
    require_own_files(snapshot)
    (tmp_path / "other").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link to outside"):
        require_own_files(snapshot)


def test_the_header_that_the_library_writes_is_right(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8, torch.uint8, torch.bool)
    kinds += (torch.float64, torch.int64, torch.float8_e4m3fn, torch.complex64)
    tensors = {str(kind): torch.zeros(3, 5).to(kind) for kind in kinds} | {"empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {name: tensor.bytes for name, tensor in found.items()} == {n: t.nbytes for n, t in tensors.items()}


def test_archives_that_torch_writes_pass_and_packed_ones_do_not(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.zeros(1000)}, file)
    assert require_plain_archive(file)
    torch.save({"x": torch.zeros(1000)}, file, _use_new_zipfile_serialization=False)
    assert not require_plain_archive(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**6))
    with pytest.raises(CheckpointError, match="is packed"):
        require_plain_archive(file)


def test_depth_is_counted_right() -> None:
    assert parse_json(b"[" * 5 + b"]" * 5, "x", deepest=5) is not None
    with pytest.raises(CheckpointError, match="x is nested more than 4 levels deep"):
        parse_json(b'{"a":' * 5 + b"1" + b"}" * 5, "x", deepest=4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be a whole number from 1 to 10,000"),
        ({"hidden_dropout_prob": 7}, "hidden_dropout_prob is 7; it must be a number from 0 to 1"),
        ({"dtype": 3}, "dtype is 3; it must be a type such as 'float32'"),
        ({"model_type": "\x1b[2J"}, "which is no name"),
        ({"attn_implementation": "who/kernels"}, "remove this entry"),
        ({"transformers_weights": "x.safetensors"}, "remove this entry"),
        ({"architectures": "Bert"}, "not a list of class names"),
    ],
)
def test_configurations(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    build_model().config.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read_config(tmp_path)


def test_a_weight_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    from shrinkformer.prune.opening import load_pretrained

    model = build_model()
    model.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del state["bert.encoder.layer.1.output.dense.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack bert\.encoder\.layer\.1\.output\.dense\.weight, which"):
        load_pretrained(type(model), tmp_path)


def test_cards_are_read_with_care(tmp_path: Path) -> None:
    source = Source("x", str(tmp_path), build_model().config)
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
    )
    for text, expected in (
        ("---\nlicense: mit\nlanguage: [en, de]\n---\n", {"license": "mit", "language": ["en", "de"]}),
        (f"---\n{bomb}language: *l\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: !!python/object/apply:os.system [touch canary]\n---\n", {}),
        ("---\n" + "[" * 5000 + "\n---\n", {}),
        ("---\n- a\n---\n", {}),
    ):
        (tmp_path / "README.md").write_text(text)
        assert inherited(source, tmp_path) == expected
    assert not Path("canary").exists()


class TestTheLastResort:
    @pytest.fixture
    def fails(self) -> Any:
        def main(_arguments: object) -> None:
            raise ZeroDivisionError("first \x1b[2J\nsecond")

        return main

    def test_it_is_one_line(
        self, fails: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(console.DEBUG, raising=False)
        assert console.run_command(fails, [], "x") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("x: error: unforeseen ZeroDivisionError (first \\x1b[2J) at test_trust.py:")
        assert "SHRINKFORMER_DEBUG=1" in line

    def test_the_traceback_is_there_for_those_who_ask(
        self, fails: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(console.DEBUG, "1")
        assert console.run_command(fails, [], "x") == 1
        assert "Traceback" in capsys.readouterr().err


def test_foreign_errors() -> None:
    with (
        pytest.raises(InputError, match=r"^x cannot be read \(KeyError: 'y'\); remedy$"),
        foreign_errors(InputError, "x cannot be read", "remedy"),
    ):
        _ = {}["y"]
    with pytest.raises(CheckpointError, match=r"^ours$"), foreign_errors(InputError, "x", "y"):
        raise CheckpointError("ours")
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(InputError, match="a panic"), foreign_errors(InputError, "x", "y"):
        raise panic("a panic")
    with pytest.raises(KeyboardInterrupt), foreign_errors(InputError, "x", "y"):
        raise KeyboardInterrupt
    assert printable("\x1b[0m\ud800\n\tä") == "\\x1b[0m\\ud800 ä"


def test_a_queue_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no ordinary file"):
        require_own_files(tmp_path)
