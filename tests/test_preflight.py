"""What can be refused is refused before a weight is read, and a dry run passes exactly when the run would begin."""

from pathlib import Path
from typing import Any

import pytest

from shrinkformer.commands import prune_opt, quantize_opt, running
from shrinkformer.commands.quantize_options import DecoderQuantizeOptions
from shrinkformer.errors import InputError
from shrinkformer.prune import latency_table
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.planned import planned_bytes, planned_layers, require_formats
from shrinkformer.quantize.quantizer import quantize_
from tests.conftest import build_model, make_batches
from tests.test_prune_opt import call, checkpoint, read_records, write_corpora

COMMON = ("--model_name", "mine", "--sample_batch_size", "8", "--evaluation_windows", "2")

_48 = {"hidden_size": 48, "intermediate_size": 64}
_64 = {"hidden_size": 64, "intermediate_size": 96}
_DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("data"))


@pytest.fixture
def refuse(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command twice, once dry; both must say the same one line, and load nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(running, "load_model")

    def run(main: Any, *arguments: str) -> str:
        said = []
        for more in ((), ("--dry_run",)):
            assert call(main, data, *COMMON, *arguments, *more) == 2
            said.append(capsys.readouterr().err.splitlines()[-1])
        assert said[0] == said[1]
        return said[0]

    return run


@pytest.mark.parametrize(
    ("family", "sizes", "arguments", "message"),
    [
        ("gpt2", {}, "", "attn.c_attn: readers of --format compressed-tensors know no Conv1D; use --format float"),
        ("llama", _48, "--format gptq", "q_proj: --format gptq needs multiples of 32, got 48 outputs"),
        ("opt", _64, "--format gptq --group_size 64", "32, 64; pass --group_size 32"),
        ("opt", _64, "--asymmetric --group_size 64", "zero points (--asymmetric)"),
        ("opt", {}, "--format float onnx --bits 3", "--bits 3 cannot be exported as ONNX; choose 4 or 8"),
        ("opt", _48, "--format onnx --group_size 24", "--group_size 24 cannot be exported as ONNX"),
        ("opt", {}, "--format gptq --also positions", "--format gptq holds layers of one list of blocks only"),
        ("opt", _48, "--mu 0.6", "out_proj with 3 of 4 heads: --format compressed-tensors needs a group size"),
        ("opt", {}, "--mu 0.6 --format gptq", "with 1 of 4 heads: --format gptq needs multiples of 32, got 16 outputs"),
        ("opt", {}, "--mu 0.6 --asymmetric --group_size 64", "zero points (--asymmetric) only where"),
        ("llama", _DYNAMIC, "--format onnx", "rope_type 'dynamic'"),
    ],
)  # fmt: skip
def test_formats_are_asked_first(
    tmp_path: Path, refuse: Any, family: str, sizes: dict[str, Any], arguments: str, message: str
) -> None:
    usual = {"hidden_size": 64, "intermediate_size": 128} | ({"word_embed_proj_dim": 64} if family == "opt" else {})
    checkpoint(tmp_path / "mine", family, **(usual | sizes))
    assert message in refuse(quantize_opt.main, *("--group_size 32 " + arguments).split())


def test_times_are_asked_for_on_inputs_that_the_model_takes(tmp_path: Path, refuse: Any) -> None:
    checkpoint(tmp_path / "mine")
    flags = ("--method", "shrink", "--mu", "0.6", "--budget", "latency")
    message = "--latency_shape 8 128: the model takes 80 tokens; pass --latency_shape 8 80."
    assert message in refuse(prune_opt.main, *flags)
    rotary, table = build_model("llama"), build_model("bert")
    latency_table.require_shape(rotary, (8, 128))
    latency_table.require_shape(table, (8, 80))
    with pytest.raises(InputError, match="--latency_shape 8 81: the model takes 80 tokens"):
        latency_table.require_shape(table, (8, 81))


def test_one_size_for_all_may_be_smaller_than_what_was_asked_for() -> None:
    model = build_model("opt", hidden_size=96, intermediate_size=160)
    require_formats(model, QuantizeConfig(4, 64), ["gptq"])  # 32 everywhere
    with pytest.raises(InputError, match="widths of the layers give groups of 32, 64; pass --group_size 32"):
        require_formats(build_model("opt", hidden_size=96, intermediate_size=128), QuantizeConfig(4, 64), ["gptq"])


def test_folders_weights_and_budgets_are_looked_at_first(tmp_path: Path, refuse: Any) -> None:
    checkpoint(tmp_path / "mine", hidden_size=64, intermediate_size=128, word_embed_proj_dim=64)
    for name in ("w4g32", "mu0.6", "mu0.6-w4g16-32-float"):
        folder = tmp_path / "output" / "opt" / f"mine-wikitext2-{name}"
        folder.mkdir(parents=True)
        (folder / "diary.txt").write_text("mine")
    for main, arguments, place in (
        (quantize_opt.main, "--group_size 32", "w4g32"),
        (quantize_opt.main, "--group_size 32 --mu 0.6 --format compressed-tensors float", "w4g16-32-float"),
        (prune_opt.main, "--mu 0.6", "mu0.6"),
    ):
        line = refuse(main, *arguments.split())
        assert f"{place} exists and holds something else" in line
        assert "--output_dir output" in line
    (tmp_path / "mine" / "model.safetensors").unlink()
    assert "holds no weights" in refuse(prune_opt.main, "--mu", "0.5")


def test_library_asks_before_it_computes() -> None:
    model = build_model("gpt2")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batches = make_batches([8] * 8, batch_size=4)
    with pytest.raises(InputError, match="know no Conv1D"):
        quantize_(model, batches, QuantizeConfig(4, 16), formats=["float", "compressed-tensors"])
    with pytest.raises(InputError, match="--format 'gguf'"):
        quantize_(model, batches, QuantizeConfig(4, 16), formats=["gguf"])
    assert all((weight == before[name]).all() for name, weight in model.state_dict().items())


def test_groups_are_reported_and_named_as_they_are(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "mine", "llama", hidden_size=96, intermediate_size=160)
    arguments = (*COMMON, "--group_size", "64", "--quantizer", "rtn")
    assert call(quantize_opt.main, data, *arguments, "--dry_run") == 0
    shown = capsys.readouterr().out
    assert "none are read for calibration" in shown
    assert call(quantize_opt.main, data, *arguments) == 0
    (record,) = read_records(Path("output"))
    section, folder = record["quantized"], Path(record["save_dir"])
    assert (section["group_size"], section["group_size_asked"]) == (32, 64)
    assert {row["group_size"] for row in record["quantized_layers"]} == {32}
    assert (record["sample_batch_size"], record["calibration_tokens"]) == (0, 0)
    assert folder.name == "mine-wikitext2-w4g32"
    for text in ((folder / "README.md").read_text(), Path("output/opt/mine.txt").read_text()):
        assert "groups of 32 (64 were asked for" in text
    promised = float(shown.split(" MB compressed-tensors")[0].split()[-1])
    assert promised == pytest.approx(
        section["bytes"] / 1e6, abs=0.015
    )  # names and shapes in the header are not counted
    model = build_model("llama", hidden_size=64)
    layers = planned_layers(model, QuantizeConfig(4, 32))
    assert planned_bytes(model, "float", layers, 1000, model.dtype) == 4000


def test_rounding_to_nearest_reads_no_examples() -> None:
    def reads(**flags: Any) -> bool:
        return DecoderQuantizeOptions(**flags).reads_examples

    assert not reads(quantizer="rtn")
    assert reads(quantizer="rtn", mu=(0.5,))
    assert reads(quantizer="gptq")
