"""Formats of quantized weights: packing, round trips, refusals, and files that are not what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shrinkformer.errors import CheckpointError, InputError
from shrinkformer.prune.shards import ShardWriter
from shrinkformer.quantize.formats import FORMATS
from shrinkformer.quantize.grid import Grid, QuantizedWeight
from shrinkformer.quantize.packing import pack, unpack, words
from shrinkformer.quantize.reading import read_quantized_state_dict
from shrinkformer.quantize.scheme import Scheme

PACKED = ("compressed-tensors", "gptq")
NAME = "model.layers.0.mlp.down_proj"


def make_weight(
    scheme: Scheme, outputs: int = 64, inputs: int = 96, seed: int = 0, dtype: torch.dtype = torch.float16
) -> QuantizedWeight:
    """Random codes that use every value, with scales of both signs and zeros at both ends."""
    generator = torch.Generator().manual_seed(seed)
    shape = (outputs, scheme.groups(inputs))
    codes = torch.randint(0, scheme.highest + 1, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scale = torch.randn(shape, generator=generator).to(dtype).float()
    zero = torch.full(shape, scheme.middle)
    if not scheme.symmetric:
        zero = torch.randint(0, scheme.highest + 1, shape, generator=generator).float()
        zero[0], zero[1] = 0, scheme.highest
    return QuantizedWeight(codes, Grid(scheme, scale, zero, inputs))


def written(
    format_name: str, weight: QuantizedWeight, name: str = NAME, dtype: torch.dtype = torch.float16
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of a model with one quantized layer."""
    format_ = FORMATS[format_name]
    config = format_.config({name: weight.grid.scheme}, ["lm_head"])
    assert config is not None
    return format_.tensors(name, weight, dtype), json.loads(json.dumps(config))


def expected_float(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Scale rounded first, then one product in that type, by a loop over groups."""
    scheme, inputs = weight.grid.scheme, weight.grid.inputs
    columns = []
    for column in range(inputs):
        group = column // scheme.width(inputs)
        steps = weight.codes[:, column].double() - weight.grid.zero[:, group].double()
        columns.append(weight.grid.scale[:, group].to(dtype) * steps.to(dtype))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 5, 10, 31, 32, 33, 100])
def test_packing_is_one_stream_of_bits(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    packed = pack(codes, bits)
    assert packed.shape == (3, words(count, bits))
    assert packed.dtype == torch.int32
    for row in range(3):
        stream = sum(int(code) << (bits * place) for place, code in enumerate(codes[row]))
        assert [int(word) & 0xFFFFFFFF for word in packed[row]] == [
            (stream >> (32 * place)) & 0xFFFFFFFF for place in range(words(count, bits))
        ]
    assert torch.equal(unpack(packed, bits, count), codes)
    assert torch.equal(pack(codes.T, bits, dim=0), packed.T)
    assert torch.equal(unpack(packed.T, bits, count, dim=0), codes.T)


@pytest.mark.parametrize("format_name", PACKED)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 16, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_written_is_read(format_name: str, bits: int, group_size: int, symmetric: bool) -> None:
    weight = make_weight(Scheme(bits, group_size, symmetric))
    tensors, config = written(format_name, weight)
    FORMATS[format_name].require(NAME, weight)
    read = FORMATS[format_name].read(NAME, tensors, config)
    assert read.grid.scheme == weight.grid.scheme
    assert torch.equal(read.codes, weight.codes)
    assert torch.equal(read.grid.scale, weight.grid.scale)
    assert torch.equal(read.grid.zero, weight.grid.zero)


def test_compressed_tensors_holds_sizes_that_fill_no_word() -> None:
    weight = make_weight(Scheme(3, 11, symmetric=False), outputs=13, inputs=33)
    tensors, config = written("compressed-tensors", weight)
    assert tensors[f"{NAME}.weight_packed"].shape == (13, 4)
    assert tensors[f"{NAME}.weight_zero_point"].shape == (2, 3)
    assert tensors[f"{NAME}.weight_shape"].tolist() == [13, 33]
    read = FORMATS["compressed-tensors"].read(NAME, tensors, config)
    assert torch.equal(read.decode(), weight.decode())


def test_gptq_stores_zeros_less_one_only_where_they_cannot_wrap() -> None:
    symmetric, config = written("gptq", make_weight(Scheme(4, 32)))
    assert config["checkpoint_format"] == "gptq"
    assert set(symmetric[f"{NAME}.qzeros"].flatten().tolist()) == {0x77777777}
    asymmetric, config = written("gptq", make_weight(Scheme(4, 32, symmetric=False)))
    assert config["checkpoint_format"] == "gptq_v2"
    first = int(asymmetric[f"{NAME}.qzeros"][0, 0]) & 0xFF
    assert first == 0xF0  # zeros 0 and 15 of the first two outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", [Scheme(8, -1, symmetric=False), Scheme(3, 32), Scheme(1, 40)])
def test_float_rounds_scales_before_it_multiplies(dtype: torch.dtype, scheme: Scheme) -> None:
    weight = make_weight(scheme, dtype=torch.float32)
    (found,) = FORMATS["float"].tensors(NAME, weight, dtype).values()
    assert torch.equal(found, expected_float(weight, dtype))
    assert FORMATS["float"].config({NAME: scheme}, []) is None


@pytest.mark.parametrize("format_name", PACKED)
def test_refusals_name_the_layer_and_the_remedy(format_name: str) -> None:
    require = FORMATS[format_name].require
    with pytest.raises(InputError, match=rf"{NAME}.*--bits 1.*--format float"):
        require(NAME, make_weight(Scheme(1, 32)))
    with pytest.raises(InputError, match=r"divides the 96 inputs, got 64.*--round_to 64"):
        require(NAME, make_weight(Scheme(4, 64)))
    with pytest.raises(InputError, match=r"divides the 96 inputs, got 128"):
        FORMATS[format_name].tensors(NAME, make_weight(Scheme(4, 128)), torch.float16)
    FORMATS["float"].require(NAME, make_weight(Scheme(1, 64)))


def test_gptq_refuses_what_its_kernels_do() -> None:
    require = FORMATS["gptq"].require
    with pytest.raises(InputError, match=r"multiples of 32, got 65 outputs"):
        require(NAME, make_weight(Scheme(4, 32), outputs=65))
    with pytest.raises(InputError, match=r"multiples of 32, got 40 inputs"):
        require(NAME, make_weight(Scheme(4, -1), inputs=40))
    with pytest.raises(InputError, match=r"--group_size 48; choose one of -1, 16"):
        require(NAME, make_weight(Scheme(4, 48)))


def test_compressed_tensors_names_layers_of_each_scheme() -> None:
    first, second = Scheme(4, 32), Scheme(3, -1, symmetric=False)
    format_ = FORMATS["compressed-tensors"]
    names = [f"bert.layer.{index}.fc" for index in range(3)]

    def targets(weights: dict[str, Scheme], ignored: list[str]) -> list[list[str]]:
        config = format_.config(weights, ignored)
        assert config is not None
        assert config["ignore"] == ignored
        return [group["targets"] for group in config["config_groups"].values()]

    pattern = r"re:(.*\.)?layer\.\d+\.fc$"
    assert targets(dict.fromkeys(names, first), ["pooler"]) == [[pattern]]
    assert targets(dict.fromkeys(names[:2], first), [names[2]]) == [names[:2]]  # the pattern would take the third
    assert targets({**dict.fromkeys(names, first), "head": second}, []) == [[pattern], ["head"]]
    mixed = dict(zip(names, (first, second, first), strict=True))
    assert targets(mixed, ["head"]) == [[names[0], names[2]], [names[1]]]
    weight = make_weight(second, outputs=40)
    config = format_.config(mixed, [])
    assert config is not None
    read = format_.read(names[1], format_.tensors(names[1], weight, torch.float16), config)
    assert read.grid.scheme == second


def test_gptq_describes_the_places_of_layers() -> None:
    scheme, config = Scheme(4, 32), FORMATS["gptq"].config
    blocks = [f"bert.encoder.layer.{index}" for index in (0, 1)]
    paths = ("intermediate.dense", "output.dense")
    names = [f"{block}.{path}" for block in blocks for path in paths]
    found = config(dict.fromkeys(names, scheme), ["classifier"])
    assert found is not None
    assert found["block_name_to_quantize"] == "bert.encoder.layer"
    assert found["modules_in_block_to_quantize"] == [list(paths)]
    # "attention.output.dense" ends like "output.dense": the endings must tell them apart
    ignored = [f"{block}.attention.output.dense" for block in blocks]
    found = config(dict.fromkeys(names, scheme), ignored)
    assert found is not None
    (endings,) = found["modules_in_block_to_quantize"]
    assert endings == ["intermediate.dense", "0.output.dense", "1.output.dense"]
    assert list(found["dynamic"]) == [
        rf"-:^bert\.encoder\.layer\.{index}\.attention\.output\.dense$" for index in (0, 1)
    ]
    with pytest.raises(InputError, match=r"one number of bits.*got 2"):
        config({names[0]: scheme, names[1]: Scheme(8, 32)}, [])
    with pytest.raises(InputError, match=r"pooler\.dense: --format gptq holds layers of one list"):
        config({names[0]: scheme, "bert.pooler.dense": scheme}, [])
    with pytest.raises(InputError, match=r"cannot leave it out"):
        config({"h.0.a.fc": scheme, "h.0.b.0.a.fc": scheme}, ["h.0.c.0.a.fc"])


@pytest.mark.parametrize("format_name", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_folders_are_read_as_ordinary_weights(
    tmp_path: Path, format_name: str, dtype: torch.dtype, shards: int
) -> None:
    weight = make_weight(Scheme(4, 32, symmetric=False))
    tensors, config = written(format_name, weight)
    other = {f"{NAME}.bias": torch.randn(64).half(), "positions": torch.arange(4)}
    writer = ShardWriter(tmp_path, max_shard_bytes=1e9 if shards == 1 else 1000)
    for name, tensor in (tensors | other).items():
        writer.add(name, tensor)
    assert (len(writer.finish()) > 1) == (shards > 1)  # the tensors of a layer may lie in different files
    state = read_quantized_state_dict(tmp_path, config, dtype)
    assert set(state) == {f"{NAME}.weight", *other}
    assert torch.equal(state[f"{NAME}.weight"], expected_float(weight, dtype))
    assert torch.equal(state[f"{NAME}.bias"], other[f"{NAME}.bias"].to(dtype))
    assert torch.equal(state["positions"], other["positions"])


def test_act_order_of_others_is_followed(tmp_path: Path) -> None:
    weight = make_weight(Scheme(4, 32))
    tensors, config = written("gptq", weight)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    tensors[f"{NAME}.g_idx"] = (order // 32).to(torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    state = read_quantized_state_dict(tmp_path, config, torch.float32)
    group = order // 32
    expected = weight.grid.scale[:, group] * (weight.codes.float() - 8)
    assert torch.equal(state[f"{NAME}.weight"], expected)
    with pytest.raises(CheckpointError, match="act-order"):
        FORMATS["gptq"].read(NAME, tensors, config)


def test_configurations_of_others_are_understood() -> None:
    weight = make_weight(Scheme(4, 32))
    tensors, config = written("compressed-tensors", weight)
    group = config["config_groups"].pop("group_0")
    other = {**group, "targets": ["Linear"], "weights": {**group["weights"], "num_bits": 8}}
    del group["format"]
    config["config_groups"] = {"others": other, "mine": {**group, "targets": [r"re:.*down_proj$"]}}
    assert torch.equal(FORMATS["compressed-tensors"].read(NAME, tensors, config).codes, weight.codes)
    tensors, config = written("gptq", weight)
    del tensors[f"{NAME}.g_idx"], config["checkpoint_format"]  # GPTQ-for-LLaMa and early AutoGPTQ
    assert torch.equal(FORMATS["gptq"].read(NAME, tensors, config).codes, weight.codes)


SPOILED: list[tuple[str, str, Any, str]] = [
    ("compressed-tensors", "weight_scale", None, "weight_scale is missing"),
    ("compressed-tensors", "weight_shape", None, "weight_shape is missing"),
    ("compressed-tensors", "weight_zero_point", None, "weight_zero_point is missing"),
    ("compressed-tensors", "weight_shape", torch.tensor([2**40, 96]), "weight_packed has shape"),
    ("compressed-tensors", "weight_shape", torch.tensor([64, 2**40]), "weight_packed has shape"),
    ("compressed-tensors", "weight_shape", torch.tensor([64, -32]), "says -32 inputs"),
    ("compressed-tensors", "weight_shape", torch.tensor([64]), "should have shape"),
    ("compressed-tensors", "weight_shape", torch.tensor([64.0, 96.0]), "should hold integers"),
    ("compressed-tensors", "weight_packed", torch.zeros(64, 12, dtype=torch.int64), "type torch.int64"),
    ("compressed-tensors", "weight_scale", torch.ones(64, 2), "should have shape"),
    ("compressed-tensors", "weight_scale", torch.ones(64, 3, dtype=torch.int32), "floating-point"),
    ("compressed-tensors", "weight_zero_point", torch.zeros(64, 3, dtype=torch.int8), "should have shape"),
    ("compressed-tensors", "weight_g_idx", torch.full((96,), 3, dtype=torch.int32), "outside the 3 groups"),
    ("gptq", "scales", None, "scales is missing"),
    ("gptq", "qzeros", None, "qzeros is missing"),
    ("gptq", "qzeros", torch.zeros(3, 9, dtype=torch.int32), "should have shape"),
    ("gptq", "scales", torch.ones(3, 63), "63"),
    ("gptq", "scales", torch.ones(64), "scales has shape"),
    ("gptq", "g_idx", torch.full((96,), -1, dtype=torch.int32), "outside the 3 groups"),
    ("gptq", "g_idx", torch.zeros(48, dtype=torch.int32), "not 4 bits"),
    ("gptq", "g_idx", torch.zeros(0, dtype=torch.int32), "has no inputs"),
    ("gptq", "qweight", torch.zeros(12, dtype=torch.int32), "should be a matrix"),
]


@pytest.mark.parametrize(("format_name", "suffix", "value", "message"), SPOILED)
def test_spoiled_tensors_are_refused(
    tmp_path: Path, format_name: str, suffix: str, value: Tensor | None, message: str
) -> None:
    tensors, config = written(format_name, make_weight(Scheme(4, 32, symmetric=False)))
    tensors.pop(f"{NAME}.{suffix}", None)
    if value is not None:
        tensors[f"{NAME}.{suffix}"] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_quantized_state_dict(tmp_path, config, torch.float32)
    assert "\n" not in str(caught.value)


def _deep(config: dict[str, Any], **weights: Any) -> dict[str, Any]:
    (group,) = config["config_groups"].values()
    return {**config, "config_groups": {"g": {**group, "weights": {**group["weights"], **weights}}}}


@pytest.mark.parametrize(
    ("format_name", "change", "message"),
    [
        ("compressed-tensors", lambda c: {**c, "quant_method": "awq"}, "quant_method 'awq'"),
        ("compressed-tensors", lambda c: {}, "quant_method None"),
        ("compressed-tensors", lambda c: {**c, "config_groups": None}, "no config_groups"),
        ("compressed-tensors", lambda c: {**c, "config_groups": {}}, "no target"),
        ("compressed-tensors", lambda c: _deep(c, num_bits=5), "5 bits"),
        ("compressed-tensors", lambda c: _deep(c, num_bits="4"), "'4' bits"),
        ("compressed-tensors", lambda c: _deep(c, type="float"), "type 'float'"),
        ("compressed-tensors", lambda c: _deep(c, group_size=0), "group size 0"),
        ("compressed-tensors", lambda c: _deep(c, group_size=64), "do not divide"),
        ("compressed-tensors", lambda c: {**c, "transform_config": {"x": 1}}, "transform_config"),
        ("compressed-tensors", lambda c: {**c, "sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ("gptq", lambda c: {**c, "checkpoint_format": "marlin"}, "'marlin'"),
        ("gptq", lambda c: {**c, "bits": 8}, "not 8 bits"),
        ("gptq", lambda c: {**c, "group_size": "x"}, "group size 'x'"),
    ],
)
def test_unknown_configurations_are_refused(tmp_path: Path, format_name: str, change: Any, message: str) -> None:
    tensors, config = written(format_name, make_weight(Scheme(4, 32, symmetric=False)))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_quantized_state_dict(tmp_path, change(config), torch.float32)


def test_parts_of_a_group_that_are_not_weights_are_refused() -> None:
    tensors, config = written("compressed-tensors", make_weight(Scheme(4, 32)))
    (group,) = config["config_groups"].values()
    for change, message in (
        ({"input_activations": {"num_bits": 8}}, "input_activations"),
        ({"format": "int-quantized"}, "'int-quantized'"),
        ({"targets": ["re:("]}, "no regular expression"),
    ):
        with pytest.raises(CheckpointError, match=message):
            FORMATS["compressed-tensors"].read(NAME, tensors, {**config, "config_groups": {"g": {**group, **change}}})


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    tensors, config = written("gptq", make_weight(Scheme(4, 32)))

    def read() -> None:
        read_quantized_state_dict(tmp_path, config, torch.float32)

    with pytest.raises(CheckpointError, match="no index of shards"):
        read()
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read()
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no qweight tensor"):
        read()
    save_file({**tensors, f"{NAME}.weight": torch.zeros(64, 96)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="both packed and as it is"):
        read()
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (
        ("{}", "no index"),
        ("[]", "not an object"),
        ("[", "cannot be read as JSON"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "outside of its folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "which is not there"),
        ('{"weight_map": {"a": "model.safetensors"}}', "in none of its files"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read()


def test_float_keeps_no_codes() -> None:
    with pytest.raises(CheckpointError, match="keeps no codes"):
        FORMATS["float"].read(NAME, {}, {})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_itself_reads_the_same(bits: int, group_size: int, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors", minversion="0.18")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = make_weight(Scheme(bits, group_size, symmetric), dtype=torch.float32)
        tensors, config = written("compressed-tensors", weight, dtype=dtype)
        scheme = quantization.QuantizationScheme(**config["config_groups"]["group_0"])
        local = {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items()}
        theirs = compressor.decompress(local, scheme)["weight"]
        assert torch.equal(theirs, expected_float(weight, dtype))
