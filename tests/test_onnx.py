"""ONNX files give the outputs of the quantized model, from integers."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from shrinkformer.architectures import Projection, layer_views
from shrinkformer.errors import InputError, ShrinkformerError
from shrinkformer.export import onnx_export as general
from shrinkformer.export import runtime
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.sites import block_sites
from shrinkformer.quantize import onnx_export
from shrinkformer.quantize.grid import Grid, QuantizedWeight, fit_grid
from shrinkformer.quantize.matmul_nbits import as_nodes, pack
from shrinkformer.quantize.onnx_export import export_onnx
from shrinkformer.quantize.scheme import WHOLE_ROW, Scheme
from tests.conftest import build_model, make_batches

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

EXAMPLE = make_batches([9, 5, 7], batch_size=3)[0]


def quantize(model: Any, scheme: Scheme) -> dict[str, QuantizedWeight]:
    """Round every layer of the blocks, in place."""
    names = {id(module): name for name, module in model.named_modules()}
    weights = {}
    for view in layer_views(model):
        for path in (path for site in block_sites(view.architecture) for path in site.paths):
            projection = view.linear(path)
            grid = fit_grid(projection.weight.detach(), scheme, dtype=torch.float16)
            weight = weights[names[id(projection.module)]] = QuantizedWeight(grid.encode(projection.weight), grid)
            projection.weight.data.copy_(weight.decode())
    return weights


def run(path: Path, inputs: dict[str, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


@pytest.mark.parametrize(
    ("family", "head", "scheme"),
    [
        ("bert", "ForSequenceClassification", Scheme(4, 32)),
        ("distilbert", "ForQuestionAnswering", Scheme(8, 16, symmetric=False)),
        ("opt", "ForCausalLM", Scheme(4, WHOLE_ROW)),
        ("gpt2", "LMHeadModel", Scheme(4, 48, symmetric=False)),
        ("llama", "ForCausalLM", Scheme(8, 64)),
    ],
)
def test_a_file_gives_the_models_outputs(family: str, head: str, scheme: Scheme, tmp_path: Path) -> None:
    model = build_model(family, head, num_hidden_layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = quantize(model, scheme)
    assert not scheme.symmetric or any((weight.grid.scale < 0).any() for weight in weights.values())
    path = tmp_path / "new" / "model.onnx"
    export_onnx(model, weights, path, EXAMPLE)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert model.state_dict().keys() == before.keys()
    assert not any("forward" in vars(module) for module in model.modules())

    graph = onnx.load(path).graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == len(weights)
    assert {f"{name}.weight" for name in weights}.isdisjoint(tensor.name for tensor in graph.initializer)
    assert str(Path(onnx_export.__file__).parent) not in str(graph)  # nothing about this machine

    inputs = make_batches([11, 11, 11, 11], batch_size=4, seed=1)[0]  # a shape that nothing was traced or checked with
    with torch.no_grad():
        wanted = [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]
    for found, expected in zip(run(path, inputs), wanted, strict=True):
        assert (torch.from_numpy(found) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_pruned_and_half_precision_models_and_large_files(
    tmp_path: Path, batches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prune_model(build_model("opt", num_hidden_layers=2), batches, mu=0.6, method="stat-bias").model
    weights = quantize(model, Scheme(4, 32))
    assert any(weight.codes.shape[1] % 16 for weight in weights.values()), "no ragged group among the weights"
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(general, "_INLINE_LIMIT", 1000)
    export_onnx(model.half(), weights, path, EXAMPLE)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert path.stat().st_size < 150_000
    with torch.no_grad():
        expected = model.float()(**EXAMPLE).logits[EXAMPLE["attention_mask"].bool()]
    found = torch.from_numpy(run(path, EXAMPLE)[0])[EXAMPLE["attention_mask"].bool()]
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize(
    ("group_size", "inputs", "block"),
    [(32, 64, 32), (64, 100, 64), (48, 100, 16), (512, 1024, 256), (512, 1100, 128), (WHOLE_ROW, 33, None)],
)
def test_every_layout_decodes_to_the_weight(
    bits: int, symmetric: bool, group_size: int, *, inputs: int, block: int | None, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    scheme, outputs = Scheme(bits, group_size, symmetric), 24
    shape = (outputs, scheme.groups(inputs))
    scale = torch.randn(shape, generator=generator)  # of both signs
    zero = torch.randint(0, 2**bits, shape, generator=generator).float()
    zero = torch.full(shape, scheme.middle) if symmetric else zero
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=generator).to(torch.uint8)
    weight = QuantizedWeight(codes, Grid(scheme, scale, zero, inputs))
    projection = Projection.of(torch.nn.Linear(inputs, outputs))
    assert projection is not None
    packed = pack("layer", projection, weight)
    assert block in (packed.attributes["block_size"], None)

    helper, numbers = onnx.helper, onnx.numpy_helper
    tensors = {"B": packed.codes, "S": packed.scales} | ({} if packed.zeros is None else {"Z": packed.zeros})
    node = helper.make_node("MatMulNBits", ["A", *tensors], ["Y"], domain="com.microsoft", **packed.attributes)
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size])
        for name, size in (("A", inputs), ("Y", outputs))
    ]
    graph = helper.make_graph(
        [node], "g", ends[:1], ends[1:], [numbers.from_array(value.numpy(), name) for name, value in tensors.items()]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "one.onnx")
    for rows in (1, 3, 40):  # one row and many rows have kernels of their own
        values = torch.randn(rows, inputs, generator=generator)
        expected = values.double() @ weight.decode().double().T
        found = torch.from_numpy(run(tmp_path / "one.onnx", {"A": values})[0])
        assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("scheme", "told"),
    [
        (Scheme(3, 32), "layer.0.attention.self.query: --bits 3"),
        (Scheme(4, 24), "layer.0.attention.self.query: --group_size 24"),
    ],
)
def test_what_the_operator_cannot_hold_is_told_before_the_export(scheme: Scheme, told: str, tmp_path: Path) -> None:
    model = build_model(num_hidden_layers=1)
    with pytest.raises(InputError, match=re.escape(told)):
        export_onnx(model, quantize(model, scheme), tmp_path / "model.onnx", EXAMPLE)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(num_hidden_layers=1)
    weights, path = quantize(model, Scheme(4, 32)), tmp_path / "model.onnx"
    one = next(iter(weights.values()))
    with pytest.raises(InputError, match=r"^encoder\.none: "):
        export_onnx(model, {"encoder.none": one}, path, EXAMPLE)
    with pytest.raises(InputError, match=r"codes of shape \(32, 32\)"):
        export_onnx(model, {"bert.encoder.layer.0.output.dense": one}, path, EXAMPLE)
    with pytest.raises(InputError, match=r"the example .* has nothing"):
        export_onnx(model, weights, path, {})
    with pytest.raises(InputError, match="is a folder"):
        export_onnx(model, weights, tmp_path, EXAMPLE)
    monkeypatch.setattr(runtime, "onnx_is_installed", lambda: False)
    with pytest.raises(InputError, match=r"pip install .*\[export\]"):
        export_onnx(model, weights, path, EXAMPLE)


def test_a_file_with_other_outputs_replaces_nothing(tmp_path: Path) -> None:
    model = build_model(num_hidden_layers=1)
    weights, path = quantize(model, Scheme(4, 32)), tmp_path / "model.onnx"
    path.write_text("earlier")
    model.bert.encoder.layer[0].output.dense.weight.data.mul_(1.01)  # no longer what the codes say
    with pytest.raises(ShrinkformerError, match="logits of the ONNX file differs"):
        export_onnx(model, weights, path, EXAMPLE)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "earlier"


def test_a_layer_that_the_model_does_not_use_is_told(tmp_path: Path) -> None:
    model = build_model(num_hidden_layers=1)
    weights = quantize(model, Scheme(4, 32))
    model.bert.unused = torch.nn.Linear(32, 32)
    weights["bert.unused"] = next(iter(weights.values()))
    with pytest.raises(ShrinkformerError, match=r"^bert\.unused "):
        export_onnx(model, weights, tmp_path / "model.onnx", EXAMPLE)


def test_layers_come_back_after_an_error() -> None:
    model = build_model(num_hidden_layers=1)
    weights = quantize(model, Scheme(4, 32))
    name = "bert.encoder.layer.0.output.dense"
    packed = {name: pack(name, Projection(model, model.get_submodule(name).weight, None), weights[name])}
    keys = list(dict(model.named_buffers()))
    with pytest.raises(KeyError), as_nodes(model, packed):
        raise KeyError
    assert list(dict(model.named_buffers())) == keys
    assert not any("forward" in vars(module) for module in model.modules())
