"""``shrinkformer inspect`` on every kind of tiny checkpoint, and on what is none."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import shrinkformer
from shrinkformer.commands.main import main
from shrinkformer.efficiency.macs import count_matmul_macs
from shrinkformer.efficiency.size import count_parameters, folder_bytes
from shrinkformer.pictures import png
from shrinkformer.prune import checkpoint
from shrinkformer.quantize import checkpoint as quantized_checkpoint
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.utils.installation import how_to_install
from tests.conftest import FAMILIES, build_model, build_tokenizer, make_batches
from tests.test_pictures import check, record

Capture = pytest.CaptureFixture[str]


def facts(capsys: Capture, *arguments: object) -> dict[str, Any]:
    """What ``--json`` prints."""
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def pruned(family: str = "bert", mu: float = 0.5, **options: Any) -> Any:
    return shrinkformer.prune_model(
        build_model(family), make_batches([9] * 16, batch_size=8), mu=mu, method=options.pop("method", "stat")
    )


def quantized(folder: Path, *, bits_of: dict[str, int] | None = None, plan: bool = False, format: str) -> Any:
    """A folder with integers, after pruning if asked to."""
    batches = make_batches([9] * 16, batch_size=8)
    kept = pruned() if plan else None
    model = build_model() if kept is None else kept.model
    config = QuantizeConfig(bits=4, group_size=-1, quantizer="rtn", bits_of=bits_of)
    found = shrinkformer.quantize_(model, batches, config)
    if kept is not None:
        checkpoint.describe_sizes(model, kept.plan)
    quantized_checkpoint.save(
        model,
        found.weights,
        folder,
        format=format,
        plan=None if kept is None else kept.plan,
        tokenizer=build_tokenizer(),
    )
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_of_every_family(family: str, tmp_path: Path, capsys: Capture) -> None:
    model = build_model(family)
    model.save_pretrained(tmp_path / "dense")
    found = facts(capsys, tmp_path / "dense", "--sequence_length", 16)
    assert found["parameters"] == count_parameters(model)
    assert found["macs"] == count_matmul_macs(model, {"input_ids": torch.ones(1, 16, dtype=torch.long)})
    assert found["bytes"] == folder_bytes(tmp_path / "dense")
    assert found["architecture"] == type(model).__name__
    assert (found["dense"], found["plan"], found["quantization"]) == (None, None, None)
    assert [row["neurons"] for row in found["layers"]] == [64] * 3
    assert sum(row["bytes"] for row in found["layers"]) < sum(found["bytes_by_dtype"].values()) < found["bytes"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_pruned_model(family: str, tmp_path: Path, capsys: Capture) -> None:
    result = pruned(family)
    shrinkformer.save(result.model, tmp_path / "small", plan=result.plan)
    found = facts(capsys, tmp_path / "small")
    assert found["parameters"] == count_parameters(result.model)
    assert found["dense"]["parameters"] == count_parameters(build_model(family))
    assert found["sequence_length"] == result.plan.sequence_length
    assert found["macs"] == pytest.approx(result.plan.macs, abs=len(found["layers"]))
    assert found["dense"]["macs"] == pytest.approx(result.plan.dense_macs, abs=len(found["layers"]))
    assert [row["heads"] for row in found["layers"]] == result.plan.heads
    assert [row["neurons"] for row in found["layers"]] == result.plan.neurons
    assert {row["neurons"] for row in found["dense"]["layers"]} == {64}
    assert found["plan"]["method"] == "stat"
    assert found["written_by"]["shrinkformer"]


@pytest.mark.parametrize(
    ("format", "plan"), [("compressed-tensors", False), ("compressed-tensors", True), ("gptq", False)]
)
def test_a_quantized_model(format: str, plan: bool, tmp_path: Path, capsys: Capture) -> None:
    model = quantized(tmp_path / "w4", format=format, plan=plan)
    found = facts(capsys, tmp_path / "w4")
    assert found["parameters"] == count_parameters(model)
    assert (found["quantization"]["method"], found["quantization"]["bits"]) == (format, [4])
    assert [row["bits"] for row in found["layers"]] == [[4]] * 3
    assert len(found["quantization"]["layers"]) == 18
    assert (found["dense"] is not None) == plan


def test_mixed_bits_are_told_apart(tmp_path: Path, capsys: Capture) -> None:
    names = [f"bert.encoder.layer.{index}.intermediate.dense" for index in range(3)]
    quantized(tmp_path / "mixed", bits_of=dict(zip(names, (8, 4, 2), strict=True)), format="compressed-tensors")
    found = facts(capsys, tmp_path / "mixed")
    assert [row["bits"] for row in found["layers"]] == [[8], [4], [2]]
    assert [(row["name"], row["layer"]) for row in found["quantization"]["layers"]] == [
        (n, i) for i, n in enumerate(names)
    ]
    assert main(["inspect", str(tmp_path / "mixed"), "--html", str(tmp_path / "page.html")]) == 0
    assert "weights of 2, 4, 8 bits, format compressed-tensors" in capsys.readouterr().out
    check((tmp_path / "page.html").read_text())


@pytest.mark.parametrize("kind", ["dense", "pruned", "quantized", "decoder"])
def test_the_two_lines_load_the_model(kind: str, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "it's a model"
    if kind == "quantized":
        quantized(folder, format="compressed-tensors")
    elif kind == "pruned":
        shrinkformer.save(pruned().model, folder)
    else:
        build_model("llama" if kind == "decoder" else "bert").save_pretrained(folder)
    found = facts(capsys, folder)
    assert len(found["loading"]) == 2
    scope: dict[str, Any] = {}
    exec("\n".join(found["loading"]), scope)
    assert type(scope["model"]).__name__ == found["architecture"]
    assert count_parameters(scope["model"]) == found["parameters"]


def test_a_sentence_encoder_is_opened_with_its_pooling(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("sentence_transformers")
    result = shrinkformer.prune_model(
        build_model(head="Model"), make_batches([5, 9], batch_size=2), mu=0.5, method="stat"
    )
    shrinkformer.save(result.model, tmp_path / "small", tokenizer=build_tokenizer(), sentence_encoder=True)
    lines = facts(capsys, tmp_path / "small")["loading"]
    assert lines[1].startswith("model = shrinkformer.load(")
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)
    assert len(scope["encoder"]) == 3
    assert count_parameters(scope["model"]) == count_parameters(scope["encoder"])


def test_words_page_and_png(tmp_path: Path, capsys: Capture) -> None:
    result = pruned()
    shrinkformer.save(result.model, tmp_path / "<b>small", plan=result.plan)
    files = ["--html", str(tmp_path / "page.html")]
    if importlib.util.find_spec("matplotlib"):
        files += ["--png", str(tmp_path / "page.png")]
    assert main(["inspect", str(tmp_path / "<b>small"), *files]) == 0
    said = capsys.readouterr().out
    for words in ("BertForSequenceClassification (bert), pruned", "of 64", "method stat, mu 0.5", "shrinkformer.load("):
        assert words in said
    made = (tmp_path / "page.html").read_text(encoding="utf-8")
    checker = check(made)
    assert "&lt;b&gt;small" in made
    assert "MACs by layer" in checker.text
    assert len(made) < 100_000
    if "--png" in files:
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_several_files_and_bin_files(tmp_path: Path, capsys: Capture) -> None:
    model = build_model()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    found = facts(capsys, tmp_path / "shards")
    assert len(found["files"]) > 1
    assert all(row["bytes"] for row in found["layers"])
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    found = facts(capsys, tmp_path / "bin")  # sizes come from the configuration; pickles stay closed
    assert found["bytes"] == (tmp_path / "bin" / "pytorch_model.bin").stat().st_size
    assert [row["bytes"] for row in found["layers"]] == [None] * 3
    assert main(["inspect", str(tmp_path / "bin"), "--html", str(tmp_path / "page.html")]) == 0
    assert "Bytes by layer" not in check((tmp_path / "page.html").read_text()).text


def test_an_onnx_folder(tmp_path: Path, capsys: Capture) -> None:
    build_model().config.save_pretrained(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"0" * 1000)
    found = facts(capsys, tmp_path)
    assert found["bytes"] == 1000
    assert found["loading"] == [
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession('{tmp_path}/model.onnx')",
    ]


def test_no_weight_is_read_and_no_code_runs(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    build_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    monkeypatch.setattr(torch, "load", None)
    facts(capsys, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_class_that_transformers_does_not_have(model_folder: Path, capsys: Capture) -> None:
    edit_config(architectures=["BertForEverything"])(model_folder)
    assert facts(capsys, model_folder)["architecture"] == "BertForSequenceClassification"  # by its tensors


def test_integers_of_others(model_folder: Path, capsys: Capture) -> None:
    edit_config(quantization_config={"quant_method": "awq", "bits": 4})(model_folder)
    found = facts(capsys, model_folder)
    assert found["quantization"] == {"method": "awq", "bits": [4], "layers": []}
    assert found["loading"][0] == "from transformers import AutoModelForSequenceClassification"


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def long_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")


def lose_block(folder: Path) -> None:
    state = {n: t for n, t in build_model().state_dict().items() if "layer.2." not in n}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def leave_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"a": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("config.json", "{"), "config.json cannot be read"),
        (write("config.json", "[1, 2]"), "config.json holds a list, not an object"),
        (write("config.json", "[" * 100_000), "config.json is nested too deeply to be read"),
        (write("config.json", '{"model_type": "t5"}'), "'t5' has no architecture record"),
        (edit_config(model_type="own", auto_map={"AutoConfig": "evil.Config"}), "'own' has no architecture record"),
        (edit_config(attn_implementation="kernels-community/evil"), "attn_implementation is"),
        (edit_config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        (edit_config(num_hidden_layers=0), "num_hidden_layers is 0"),
        (edit_config(num_hidden_layers=2), "config.json says 2 blocks, the weight files hold 3"),
        (edit_config(num_attention_heads=0), "config.json"),
        (edit_config(intermediate_size=63), "dense.bias is (64,) in the file, (63,) by config.json"),
        (edit_config(hidden_size=-5), "config.json"),
        (edit_config(quantization_config={"quant_method": "compressed-tensors"}), "no weight_packed tensor"),
        (
            edit_config(quantization_config={"quant_method": "compressed-tensors", "kv_cache_scheme": {"a": 1}}),
            "kv_cache",
        ),
        (edit_config(shrinkformer={"layers": []}, per_layer_config={"0": {"num_attention_heads": 1}}), "config.json"),
        (edit_config(quantization_config=[1]), "config"),
        (truncate, "model.safetensors cannot be read"),
        (long_header, "model.safetensors cannot be read (a header of"),
        (write("model.safetensors", ""), "model.safetensors cannot be read"),
        (lose_block, "the weight files hold 2"),
        (leave_folder, "outside of its folder"),
        (write("model.safetensors.index.json", "{}"), "is no index of weights"),
        (write("shrinkformer_plan.json", '{"method": 3}'), "shrinkformer_plan.json is no plan"),
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
    ],
)
def test_damaged_folders_end_in_one_line(
    damage: Callable[[Path], None], message: str, model_folder: Path, capsys: Capture
) -> None:
    damage(model_folder)
    code = main(["inspect", str(model_folder)])
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert message in said.err
    assert len(said.err) < 600


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere/at-all"], "nowhere/at-all: no such folder"),
        (["{model}", "--html", "no/such/folder/x.html"], "--html no/such/folder/x.html: there is no folder"),
        (["{model}", "--png", "."], "--png .: it is a folder"),
        (["{model}", "--sequence_length", "0"], "--sequence_length 0.0"),
        (["{model}", "--sequence_length", "nan"], "--sequence_length nan"),
        (["{model}", "--bits"], "--bits: there is no such flag"),
        ([], "DIR"),
        (["nothing.jsonl"], "nothing.jsonl: it cannot be read"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, model_folder: Path, capsys: Capture) -> None:
    assert main(["inspect", *(flag.format(model=model_folder) for flag in flags)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


def test_png_is_refused_before_anything_is_read(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png.importlib.util, "find_spec", lambda _name: None)
    assert main(["inspect", "nowhere", "--png", "x.png"]) == 2
    assert how_to_install("figures") in capsys.readouterr().err


def test_a_report(tmp_path: Path, capsys: Capture) -> None:
    report = tmp_path / "qqp.jsonl"
    report.write_text("\n".join(map(json.dumps, (record(0.7), record(0.5)))) + "\nbroken\n")
    assert main(["inspect", str(report), "--html", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "tiny on qqp: 2 runs, 1 lines that are none" in said
    assert "stat, mu 0.5: accuracy 0.8500 ± 0.0100; 50.0 % of the MACs" in said
    check((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(facts(capsys, report)) == 2
    report.write_text("nothing\n")
    assert main(["inspect", str(report)]) == 2
    assert "it holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("weights", [False, True])
def test_a_model_of_the_hub(weights: bool, tmp_path: Path) -> None:
    """Its configuration is in the cache; its weights may be, and are not fetched for this."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--tester--tiny"
    folder = cache / "snapshots" / commit
    model = build_model()
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder) if weights else model.config.save_pretrained(folder)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    command = [sys.executable, "-m", "shrinkformer", "inspect", "tester/tiny", "--json"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=280)
    found = json.loads(result.stdout)
    assert (found["name"], found["location"]) == ("tester/tiny", "tester/tiny")
    assert found["parameters"] == count_parameters(model)
    assert found["bytes"] == (folder_bytes(folder) if weights else 0)
    assert [row["bytes"] is not None for row in found["layers"]] == [weights] * 3
