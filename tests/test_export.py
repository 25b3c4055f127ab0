"""ONNX files of float models: equal outputs, generation by onnxruntime alone, 8 bits, and the commands."""

import contextlib
import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn

import shrinkformer
from shrinkformer.architectures import layer_views
from shrinkformer.commands import export as command
from shrinkformer.commands import prune_bert
from shrinkformer.commands.exporting import describe_onnx
from shrinkformer.commands.quantize_bert import main as quantize
from shrinkformer.commands.verbs import run_verb
from shrinkformer.errors import CheckpointError, InputError, ShrinkformerError
from shrinkformer.export import onnx_export, runtime
from shrinkformer.export.int8 import compare
from shrinkformer.export.onnx_export import check_outputs, export_onnx
from shrinkformer.export.runtime import OnnxModel
from shrinkformer.prune.checkpoint import save
from shrinkformer.prune.pruned_modeling import set_block_sizes
from shrinkformer.prune.pruner import prune_model
from shrinkformer.quantize import checkpoint as quantized_checkpoint
from shrinkformer.utils.installation import how_to_install
from tests.conftest import ROOT, build_model, build_tokenizer, make_batches

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

main = partial(run_verb, "export")

BATCHES = make_batches([3 + index % 18 for index in range(24)], batch_size=8)


def code(document: str, holding: str, folder: Path) -> dict[str, Any]:
    """What the one Python block of a document that holds a string leaves behind when it is run for a folder."""
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", document, re.DOTALL) if holding in block]
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(block.replace("path/to/this/folder", str(folder)), names)
    return names | {"printed": printed.getvalue()}


def narrowed(model: Any) -> Any:
    """Blocks of different sizes, the first one with narrow queries and values; new weights are random."""
    generator = torch.Generator().manual_seed(0)
    sizes = [{"heads": 3, "neurons": 40, "query_width": 4, "value_width": 6}, {"heads": 2, "neurons": 24}]
    for view, size in zip(layer_views(model), sizes, strict=True):
        set_block_sizes(view.block, view.architecture.to_dict(), **size)
        for layer in (module for module in view.block.modules() if isinstance(module, nn.Linear)):
            layer.weight.data.normal_(std=0.2, generator=generator)
            layer.bias.data.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pruned language models, exported by the command into their own folders; each is made once."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("models") / family
            model = build_model(family, num_hidden_layers=2)
            if family == "opt":
                model = narrowed(model)
            else:
                model = prune_model(model, BATCHES, mu=0.6, method="stat-bias").model
            save(model, folder, tokenizer=build_tokenizer(), card="# A card")
            assert main([str(folder)]) == 0
            made[family] = folder
        return made[family]

    return folder_of


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_generation_by_onnxruntime_alone(family: str, folders: Any) -> None:
    folder = folders(family)
    model = shrinkformer.load(folder, dtype=torch.float32).eval()
    sizes = [(view.heads, view.neurons) for view in layer_views(model)]
    assert family == "llama" or len(set(sizes)) == 2

    ids = torch.tensor([build_tokenizer().encode("The cat")])
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 2, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    assert len(set(expected)) > 4, "a model that repeats itself tells nothing"
    for document in ((ROOT / "docs" / "export.md").read_text(), (folder / "README.md").read_text()):
        block = document if "# Export" in document else document.replace(" in [3]", " in [2]")
        found = code(block, "past_key_values", folder)
        assert found["tokens"] == expected
        assert found["printed"].strip() == build_tokenizer().decode(expected, skip_special_tokens=True)
    card = (folder / "README.md").read_text()
    assert card.startswith("# A card\n")
    assert card.count("## ONNX") == 1


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_prompts_padded_on_the_left_as_a_batch(family: str, folders: Any) -> None:
    folder = folders(family)
    model = shrinkformer.load(folder, dtype=torch.float32).eval()
    run = OnnxModel(folder / "onnx" / "model.onnx")
    assert run.inputs[:3] == ("input_ids", "attention_mask", "past_key_values.0.key")
    assert run.outputs[:3] == ("logits", "present.0.key", "present.0.value")
    ids = torch.randint(5, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **options)

    tokens, new, past = ids, ids, {}
    for _ in range(12):
        found = {
            name: torch.from_numpy(value)
            for name, value in run({"input_ids": new, "attention_mask": mask, **past}).items()
        }
        past = {name.replace("present", "past_key_values"): value for name, value in found.items() if "." in name}
        new = found["logits"][:, -1:].argmax(-1)
        tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    assert torch.equal(tokens, expected)


def test_an_encoder_gives_the_models_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("roberta", "ForQuestionAnswering", num_hidden_layers=1)
    model = prune_model(model, BATCHES, mu=0.6, method="stat").model
    programs: list[Any] = []

    def trace(*arguments: Any) -> Any:
        programs.append(onnx_export_trace(*arguments))
        return programs[0]

    onnx_export_trace, path = onnx_export.trace, tmp_path / "model.onnx"
    monkeypatch.setattr(onnx_export, "trace", trace)
    example = {**BATCHES[0], "labels": BATCHES[0]["input_ids"]}
    export_onnx(model.double(), path, example)
    run = OnnxModel(path, threads=1)
    assert run.inputs == tuple(BATCHES[0])
    model.float()
    for inputs in (make_batches([11, 4, 7, 2, 20], batch_size=5, seed=1)[0], make_batches([1], batch_size=1)[0]):
        with torch.no_grad():
            wanted = model(**inputs)
        found = run(inputs)
        assert set(found) == set(wanted) == {"start_logits", "end_logits"}
        for name, value in wanted.items():
            assert (torch.from_numpy(found[name]) - value).abs().max() < 1e-4 * value.abs().max()

    # The same graph is no file of another model, and what was there stays.
    written = path.read_bytes()
    monkeypatch.setattr(onnx_export, "trace", lambda *_: programs[0])
    model.qa_outputs.weight.data.mul_(1.001)
    with pytest.raises(ShrinkformerError, match="start_logits of the ONNX file differs"):
        export_onnx(model, path, BATCHES[0])
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="the example for the export has nothing"):
        export_onnx(model, path, {})
    with pytest.raises(InputError, match="is a folder"):
        export_onnx(model, tmp_path, BATCHES[0])


def test_the_command_with_8_bits_in_a_new_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "dense", tmp_path / "out"
    model = build_model(num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    model.save_pretrained(source)
    build_tokenizer().save_pretrained(source)
    (source / "modules.json").write_text("[]")
    before = sorted(source.rglob("*"))
    assert main([str(source), "--to", "onnx", "--output", str(target), "--dynamic_int8"]) == 0
    assert sorted(source.rglob("*")) == before
    names = {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()}
    wanted = {"onnx/model.onnx", "onnx/model_int8.onnx", "config.json", "tokenizer.json", "modules.json", "README.md"}
    assert wanted <= names
    assert not any(name.endswith(".safetensors") for name in names)

    told = capsys.readouterr().out
    cosine, relative = re.search(r"logits: cosine (\S+), relative difference (\S+)", told).groups()  # type: ignore[union-attr]
    assert float(cosine) > 0.9
    assert 1e-4 < float(relative) < 0.4, "8 bits change something"
    quantized = onnx.load(target / "onnx" / "model_int8.onnx")
    kinds = [node.op_type for node in quantized.graph.node]
    assert kinds.count("MatMulInteger") >= 6
    scales = [tensor.dims for tensor in quantized.graph.initializer if tensor.name.endswith("_scale")]
    assert [128] in [list(dims) for dims in scales], "no scale for each output channel"
    sizes = [(target / "onnx" / name).stat().st_size for name in ("model.onnx", "model_int8.onnx")]
    assert sizes[1] < 0.6 * sizes[0]
    float_file, int_file = (OnnxModel(target / "onnx" / name) for name in ("model.onnx", "model_int8.onnx"))
    assert all(one.cosine == pytest.approx(1) for one in compare(float_file, float_file, BATCHES[0]).values())
    assert compare(float_file, int_file, BATCHES[0])["logits"].relative < 0.5

    found = code((ROOT / "docs" / "export.md").read_text(), "encode_batch", target)
    assert found["outputs"].keys() == {"logits"}
    inputs = {name: torch.from_numpy(value) for name, value in found["inputs"].items()}
    with torch.no_grad():
        expected = model(**inputs).logits
    assert not bool(inputs["attention_mask"].all())
    assert (torch.from_numpy(found["outputs"]["logits"]) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert f"| `logits` | {cosine} | {relative} |" in (target / "README.md").read_text()
    again = code((target / "README.md").read_text(), "encode_batch", target)
    assert (again["outputs"]["logits"] == found["outputs"]["logits"]).all()


def test_integers_of_quantized_checkpoints_stay_integers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model("opt", num_hidden_layers=1, tie_word_embeddings=False)
    config = shrinkformer.QuantizeConfig(bits=4, group_size=32, quantizer="rtn", also=("embeddings", "head"))
    found = shrinkformer.quantize_(model, BATCHES, config)
    folder = quantized_checkpoint.save(model, found.weights, tmp_path / "small", dtype=torch.float32)
    assert main([str(folder)]) == 0
    assert "7 of 8 quantized layers keep" in capsys.readouterr().out
    graph = onnx.load(folder / "onnx" / "model.onnx").graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 7
    ids = make_batches([9, 9], batch_size=2, seed=3)[0]["input_ids"]
    with torch.no_grad():
        expected = shrinkformer.load(folder, dtype=torch.float32)(ids).logits
    logits = torch.from_numpy(OnnxModel(folder / "onnx" / "model.onnx")({"input_ids": ids})["logits"])
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert main([str(folder), "--dynamic_int8"]) == 2
    assert "is quantized already" in capsys.readouterr().err


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "glue" / "sst2").mkdir(parents=True)
    for split, size in (("train", 24), ("validation", 16)):
        rows = [" ".join(["the", "cat", "sees", "a", "bird"][: 2 + index % 4]) for index in range(size)]
        table = datasets.Dataset.from_dict({"sentence": rows, "label": [index % 2 for index in range(size)]})
        table.to_parquet(folder / "glue" / "sst2" / f"{split}.parquet")
    return folder


def test_pruning_exports_and_times(task_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_model("distilbert", num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    build_tokenizer().save_pretrained(tmp_path / "dense")
    base = [
        "--model_name",
        str(tmp_path / "dense"),
        "--task_name",
        "sst2",
        "--data_dir",
        str(task_data),
        "--method",
        "stat",
    ]
    base += ["--sample_batch_size", "16", "--output_dir", str(tmp_path / "output"), "--export", "onnx"]
    assert prune_bert.main([*base, "--mu", "0.5", "--save_dir", str(tmp_path / "small")]) == 0
    told = capsys.readouterr().out
    assert "onnxruntime 8x64 (ms)" in told
    (file,) = (tmp_path / "output").glob("*/sst2.jsonl")
    record = json.loads(file.read_text())
    for name in ("dense", "pruned"):
        (times,) = record[name]["runtimes"].values()
        assert record[name]["runtimes"].keys() == {"onnxruntime"}
        assert times.keys() == record[name]["latency_ms"].keys()
        assert all(value > 0 for value in times.values())
    assert record["seconds"]["export"] > 0
    model = shrinkformer.load(tmp_path / "small", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(**BATCHES[0]).logits
    found = OnnxModel(tmp_path / "small" / "onnx" / "model.onnx")(BATCHES[0])["logits"]
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert "onnx/model.onnx" in (tmp_path / "small" / "README.md").read_text()


def test_a_card_says_once_how_a_file_is_run(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# Mine\n\n## ONNX\nearlier\n\n## More\n\ntext\n")
    for _ in range(2):
        describe_onnx(tmp_path, build_model("opt", num_hidden_layers=1))
        text = card.read_text()
        assert text.startswith("# Mine\n\n## More\n\ntext\n\n## ONNX\n")
        assert text.count("## ONNX") == text.count("past_key_values.") == 1
    assert "earlier" not in text
    assert "has to be put into this folder first" in text, "no tokenizer"


def test_wrong_flags_of_export_are_told_before_anything_is_loaded(
    model_folder: Path, task_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["--model_name", str(model_folder), "--task_name", "sst2", "--data_dir", str(task_data)]

    def told(code: int) -> str:
        assert code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "--export 'tflite': choose one of onnx" in told(prune_bert.main([*base, "--export", "tflite"]))
    assert "at --mu 1 no model is written" in told(prune_bert.main([*base, "--mu", "1", "--export", "onnx"]))
    assert "--format onnx" in told(quantize([*base, "--export", "onnx"]))
    monkeypatch.setattr(runtime, "onnx_is_installed", lambda: False)
    assert how_to_install("export") in told(prune_bert.main([*base, "--export", "onnx"]))


def test_wrong_input_of_the_command_is_told(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_model", None)  # nothing is loaded
    other = tmp_path / "other"
    build_model("opt", num_hidden_layers=1).save_pretrained(other)
    for arguments, expected in (
        ([str(model_folder), "--to", "tflite"], "--to 'tflite': choose one of onnx"),
        ([str(tmp_path / "nowhere")], "MODEL"),
        ([str(model_folder), "--output", str(other)], f"--output {other}: it holds something else"),
        ([str(model_folder), "--output", str(other / "config.json")], "is a file"),
        ([str(other), "--dynamic_int8"], "--dynamic_int8: other is a language model"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    monkeypatch.setattr(runtime, "onnx_is_installed", lambda: False)
    assert main([str(model_folder)]) == 2
    assert f"--to onnx needs onnx, onnxscript and onnxruntime: {how_to_install('export')}." in capsys.readouterr().err


def test_other_outputs_are_refused(folders: Any, tmp_path: Path) -> None:
    path = folders("opt") / "onnx" / "model.onnx"
    run = OnnxModel(path)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    expected = {name: torch.from_numpy(value) for name, value in run(inputs).items()}
    check_outputs(path, [(inputs, expected)])
    padding = {**expected, "present.1.value": expected["present.1.value"].clone()}
    padding["present.1.value"][1, :, 0] += 1
    check_outputs(path, [(inputs, padding)])
    for place in ((1, slice(None), 1), (0, slice(None), 0)):
        wrong = {**expected, "present.1.value": expected["present.1.value"].clone()}
        wrong["present.1.value"][place] += 1
        with pytest.raises(ShrinkformerError, match=r"^present\.1\.value of the ONNX file differs"):
            check_outputs(path, [(inputs, wrong)])
    with pytest.raises(ShrinkformerError, match="logits of the ONNX file differs from the model's by inf"):
        check_outputs(path, [(inputs, {"logits": expected["logits"][:1]})])


def test_what_a_session_is_told(folders: Any, tmp_path: Path) -> None:
    path = folders("opt") / "onnx" / "model.onnx"
    run = OnnxModel(path, threads=1)
    ids = torch.tensor([[5, 6, 7]])
    first = run({"input_ids": ids, "unknown": ids})
    past = {name.replace("present", "past_key_values"): torch.from_numpy(first[name]) for name in run.outputs[1:]}
    both = run({"input_ids": torch.tensor([[8]]), **past})  # a mask of ones over four tokens
    assert both["logits"].shape[:2] == (1, 1)
    assert both["present.0.key"].shape[2] == 4
    whole = run({"input_ids": torch.tensor([[5, 6, 7, 8]])})["logits"][:, -1:]
    assert abs(both["logits"] - whole).max() < 1e-4 * abs(whole).max()
    with pytest.raises(InputError, match="needs 'input_ids'; the batch has attention_mask"):
        run({"attention_mask": ids})
    with pytest.raises(InputError, match="no such ONNX file"):
        OnnxModel(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="0 threads"):
        OnnxModel(path, threads=0)
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"broken\.onnx: onnxruntime cannot open it"):
        OnnxModel(tmp_path / "broken.onnx")
