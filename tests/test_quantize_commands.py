"""quantize_opt.py and quantize_bert.py, end to end on tiny models: files, reports, loading again, bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import shrinkformer
from shrinkformer.commands import prune_opt, quantize_bert, quantize_opt, running
from shrinkformer.quantize.checkpoint import save
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_
from shrinkformer.quantize.resume import Finished, QuantizedBlocks
from tests.conftest import build_model, make_batches
from tests.test_prune_opt import call, checkpoint, read_records, write_corpora
from tests.test_streamed import (
    encoder_command,
    encoder_data,  # noqa: F401  (a fixture)
)

COMMON = ("--sample_batch_size", "16", "--evaluation_windows", "4", "--group_size", "32")
SMALL = ("--max_memory", "0.0001")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("data"))


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one model in it."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "mine", hidden_size=64, intermediate_size=128, word_embed_proj_dim=64)
    return tmp_path


class _StoppedError(BaseException):
    """Stands for a kill."""


def _write_then_stop(store: QuantizedBlocks, block: int, layers: list[Finished]) -> None:
    _WRITE(store, block, layers)
    raise _StoppedError


_WRITE = QuantizedBlocks.write


def quantize(data: Path, *arguments: str) -> int:
    return call(quantize_opt.main, data, "--model_name", "mine", *COMMON, *arguments)


class TestDecoder:
    def test_report_and_checkpoint(self, inside: Path, data: Path) -> None:
        assert quantize(data, "--bits", "4", "--group_size", "16") == 0
        (record,) = read_records(Path("output"))
        assert "pruned" not in record
        section = record["quantized"]
        assert (section["bits"], section["group_size"], section["quantizer"]) == (4, 16, "shrink")
        assert record["ratio"]["bytes"] < 0.9
        assert record["ratio"]["macs"] == 1
        assert all(0 < row["error"] <= row["nearest_error"] for row in record["quantized_layers"])
        folder = Path(record["save_dir"])
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"
        assert "auto_map" not in config  # stock shape: no code of ours is needed
        model = shrinkformer.load(folder, dtype=torch.float32)
        assert type(model).__module__.startswith("transformers.")

    def test_after_pruning_every_format_gives_one_model(self, inside: Path, data: Path) -> None:
        formats = ("compressed-tensors", "gptq", "float")
        arguments = ("--mu", "0.7", "--bits", "8", "--format", *formats, "--group_size", "8")
        found = quantize(data, *arguments, "--round_to", "32")
        if found:  # GPTQ wants widths of 32, which a tiny model does not keep
            formats = ("compressed-tensors", "float")
            assert quantize(data, *("--mu", "0.7", "--bits", "8", "--format", *formats, "--group_size", "8")) == 0
        record = read_records(Path("output"))[-1]
        assert record["ratio"]["macs"] <= 0.7
        assert set(record) >= {"dense", "pruned", "quantized", "layers"}
        base = Path(record["save_dir"])
        ids = torch.randint(5, 40, (2, 12), generator=torch.Generator().manual_seed(0))
        packed = shrinkformer.load(base, dtype=torch.float32)(input_ids=ids).logits
        plain = shrinkformer.load(base.with_name(f"{base.name}-float"), dtype=torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(packed, plain, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("memory", [(), SMALL])
    @pytest.mark.parametrize("mu", ["1", "0.7"])
    def test_an_interrupted_run_is_taken_up(
        self,
        inside: Path,
        data: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        mu: str,
        memory: tuple[str, ...],
    ) -> None:
        arguments = ("--bits", "4", "--group_size", "8", "--mu", mu, "--method", "stat", *memory)
        assert quantize(data, *arguments, "--output_dir", "whole") == 0
        monkeypatch.setattr(QuantizedBlocks, "write", _write_then_stop)
        with pytest.raises(_StoppedError):
            quantize(data, *arguments)
        monkeypatch.undo()
        monkeypatch.chdir(inside)
        (left,) = Path("output").rglob("quantized")
        assert [file.name for file in left.iterdir()] == ["block0000.safetensors"]
        kept = Path("kept")
        shutil.copytree(Path("output"), kept)
        assert quantize(data, *arguments, "--resume", "--quantizer", "gptq") == 0  # its blocks are not these
        assert "--quantizer shrink (now gptq), so these are found anew: quantized blocks" in capsys.readouterr().out
        shutil.rmtree("output")
        kept.rename("output")
        assert quantize(data, *arguments, "--resume") == 0
        assert not left.exists()
        (ours,), (theirs,) = (list(Path(place).rglob("model*.safetensors")) for place in ("output", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()

    @pytest.mark.parametrize(("quantizer", "tolerance"), [("gptq", 2e-3), ("shrink", 5e-2)])  # shrink: no backward pass
    def test_block_by_block_is_the_same(self, inside: Path, data: Path, quantizer: str, tolerance: float) -> None:
        for index, memory in enumerate(((), SMALL)):
            arguments = ("--bits", "4", "--group_size", "8", "--mu", "1", "0.7", "--method", "stat", *memory)
            assert quantize(data, *arguments, "--quantizer", quantizer, "--output_dir", f"out{index}") == 0
        for whole, streamed in zip(read_records(Path("out0")), read_records(Path("out1")), strict=True):
            for name, value in whole["quantized"]["metrics"].items():
                if not name.endswith("_stderr"):
                    assert streamed["quantized"]["metrics"][name] == pytest.approx(value, rel=tolerance)
            ours, theirs = (
                shrinkformer.load(Path(record["save_dir"]), dtype=torch.float32).state_dict()
                for record in (whole, streamed)
            )
            assert ours.keys() == theirs.keys()
        assert not list(Path("out1").rglob("decoded.*"))

    def test_gpt2_passes_block_by_block_too(self, inside: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        checkpoint(inside / "mine", "gpt2")
        arguments = ("--bits", "4", "--group_size", "8", "--quantizer", "gptq", "--format", "float")
        for index, memory in enumerate(((), SMALL)):
            assert quantize(data, *arguments, *memory, "--output_dir", f"out{index}") == 0
        whole, streamed = (
            shrinkformer.load(Path(read_records(Path(f"out{index}"))[0]["save_dir"])).state_dict() for index in range(2)
        )
        for name, tensor in whole.items():
            torch.testing.assert_close(tensor, streamed[name])
        capsys.readouterr()
        assert quantize(data, *arguments[:4], *SMALL) == 2
        assert "know no Conv1D" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "sizes",
        [{"do_layer_norm_before": False}, {"layer_norm_elementwise_affine": False}],
        ids=["350m", "plain norms"],
    )
    def test_opt_in_its_other_shapes_in_memory_and_block_by_block(
        self, inside: Path, data: Path, sizes: dict[str, bool]
    ) -> None:
        checkpoint(inside / "mine", hidden_size=64, intermediate_size=128, word_embed_proj_dim=32, **sizes)
        arguments = ("--mu", "0.7", "--method", "stat", "--quantizer", "gptq", "--group_size", "16")
        for index, memory in enumerate(((), SMALL)):
            assert quantize(data, *arguments, *memory, "--output_dir", f"out{index}") == 0
        whole, streamed = (read_records(Path(f"out{index}"))[0] for index in range(2))
        found = streamed["quantized"]["metrics"]["perplexity"]
        assert found == pytest.approx(whole["quantized"]["metrics"]["perplexity"], rel=5e-3)

    def test_several_formats_are_written_from_memory(
        self, inside: Path, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        formats = ("--format", "float", "compressed-tensors")
        assert quantize(data, "--group_size", "8", *formats, *SMALL) == 2
        assert "--max_memory: several values of --format are written from memory" in capsys.readouterr().err

    def test_what_was_quantized_is_evaluated_but_not_quantized_again(
        self, inside: Path, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert quantize(data, "--bits", "8", "--group_size", "16") == 0
        (record,) = read_records(Path("output"))
        assert call(prune_opt.main, data, "--model_name", record["save_dir"], *COMMON[:4], "--mu", "1") == 0
        (again,) = read_records(Path("output"), Path(record["save_dir"]).name)
        assert again["dense"]["metrics"] == pytest.approx(record["quantized"]["metrics"], rel=1e-6)
        capsys.readouterr()
        assert call(quantize_opt.main, data, "--model_name", record["save_dir"], *COMMON) == 2
        assert "quantized already" in capsys.readouterr().err


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--bits", "5"), "--bits 5"),
            (("--group_size", "0"), "--group_size 0"),
            (("--group_size", "4096"), "--group_size 4096: larger than self_attn.q_proj of layer 0"),
            (("--layers", "embeddings"), "--layers 'embeddings'"),
            (("--quantizer", "awq"), "--quantizer 'awq'"),
            (("--format", "gguf"), "--format 'gguf'"),
            (("--bits", "1"), "--bits 1: no packed format holds one bit"),
            (("--bits", "1", "--asymmetric", "--format", "float"), "--bits 1 has two values"),
        ],
    )
    def test_one_line_before_the_model_is_loaded(
        self,
        inside: Path,
        data: Path,
        arguments: tuple[str, ...],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.delattr(running, "load_model")
        assert quantize(data, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"quantize_opt.py: error: {message}")


def test_encoder(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    examples = request.getfixturevalue("encoder_data")
    arguments = [*encoder_command(tmp_path, examples), "--bits", "4", "--group_size", "8"]
    assert quantize_bert.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    file = next((tmp_path / "out").rglob("*.jsonl"))
    record = json.loads(file.read_text().splitlines()[-1])
    assert {"accuracy", "accuracy_stderr"} <= set(record["quantized"]["metrics"])


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_float_folders_open_without_us(family: str, bits: int, tmp_path: Path) -> None:
    model, batches = build_model(family), make_batches([8, 9, 10], batch_size=3)
    found = quantize_(model, batches, QuantizeConfig(bits, 8, scale_dtype=torch.float32))
    save(model, found.weights, tmp_path / "plain", format="float", dtype=torch.float32)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "plain"), "quantization_config")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    with torch.inference_mode():
        assert torch.equal(again(**batches[0]).logits, model(**batches[0]).logits)
