"""Check that other people's code loads what this package writes: docs/formats.md, "Who loads what".

python -m benchmarks.load_anywhere --work_dir /tmp/load --python /path/to/venv/bin/python

writes tiny random models in every format, lets the Python that is named (with transformers and compressed-tensors, or
optimum and gptqmodel) load each of them beside the same weights as ordinary numbers, and prints a Markdown table of the
largest difference of logits.
"""

import argparse
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from shrinkformer.architectures import find_architecture, layer_views
from shrinkformer.errors import InputError
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.checkpoint import complete, describe
from shrinkformer.prune.pruned_modeling import resize_model
from shrinkformer.prune.shards import ShardWriter
from shrinkformer.prune.sites import block_sites
from shrinkformer.quantize.formats import FORMATS
from shrinkformer.quantize.grid import QuantizedWeight, fit_grid
from shrinkformer.quantize.layout import Format
from shrinkformer.quantize.reading import read_quantized_state_dict
from shrinkformer.quantize.scheme import Scheme

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "opt": ("OPT", "ForCausalLM", {"ffn_dim": 256, "word_embed_proj_dim": 128, "init_std": 0.15}),
    "bert": ("Bert", "ForSequenceClassification", {"intermediate_size": 256, "initializer_range": 0.15}),
    "llama": (
        "Llama",
        "ForCausalLM",
        {"intermediate_size": 256, "num_key_value_heads": 2, "initializer_range": 0.15, "tie_word_embeddings": False},
    ),
}

PRUNED = ((1, 96), (3, 160))
"""Heads and neurons of the two blocks: 32 and 96 inputs of the attention's output, 96 and 160 of the feed-forward's."""

PRUNED_GROUPED = ((1, 96), (2, 160))
"""The same for Llama, which has two key and value heads."""


@dataclass(frozen=True)
class Case:
    """One folder to write and load."""

    model: str
    format: str
    bits: int
    group_size: int
    symmetric: bool = True
    pruned: bool = False
    dtype: str = "bfloat16"
    dequantize: bool = False
    mixed: bool = False

    @property
    def id(self) -> str:
        """A name for files."""
        return "-".join(str(value) for value in asdict(self).values()).replace("--", "-")

    def scheme(self, path: str) -> Scheme:
        """Of a layer at a path within its block; mixed models store the end of the feed-forward part otherwise."""
        other = self.mixed and path.endswith(("fc2", "output.dense", "down_proj"))
        return Scheme(8 if other else self.bits, self.group_size, self.symmetric)


def cases(formats: list[str]) -> Iterator[Case]:
    """What is checked; with compressed-tensors both ways to load."""
    for case in _written(formats):
        yield case
        if case.format == "compressed-tensors":
            yield replace(case, dequantize=True)


def _written(formats: list[str]) -> Iterator[Case]:
    for model, name, bits, group in product(MODELS, formats, (2, 3, 4, 8), (32, -1)):
        yield Case(model, name, bits, group)
        if group == 32:
            yield Case(model, name, bits, group, symmetric=False)
    for model, name in product(MODELS, formats):
        yield Case(model, name, 4, 32, dtype="float16")
        yield Case(model, name, 4, 32, dtype="float32")
        for bits in (3, 4):
            yield Case(model, name, bits, 32, pruned=True)
        if name == "compressed-tensors":
            yield Case(model, name, 4, 32, mixed=True)


def build(case: Case) -> PreTrainedModel:
    """The random model of a case, unquantized."""
    stem, head, sizes = MODELS[case.model]
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**SIZES, **sizes)
    model: PreTrainedModel = getattr(transformers, f"{stem}{head}")(config)
    if case.pruned:
        pruned = PRUNED_GROUPED if case.model == "llama" else PRUNED
        dense = zip(layer_sizes(layer_views(model)), pruned, strict=True)
        describe(config, [replace(size, heads=heads, neurons=neurons) for size, (heads, neurons) in dense], None)
        resize_model(model, config)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.15)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(getattr(torch, case.dtype)).eval()


def quantize(model: PreTrainedModel, case: Case) -> dict[str, QuantizedWeight]:
    """Every linear layer of the blocks, by full name; every other row has negative scales where that is possible."""
    architecture = find_architecture(model.config.model_type)
    ends = tuple(f".{path}" for site in block_sites(architecture) for path in site.paths)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f".{architecture.layers}." in f".{name}" and name.endswith(ends):
            weight = module.weight.detach().float()
            grid = fit_grid(weight, case.scheme(name), dtype=module.weight.dtype, search=False)
            if case.symmetric:
                signs = 1 - 2.0 * (torch.arange(len(weight)) % 2)
                grid = replace(grid, scale=grid.scale * signs[:, None])
            weights[name] = QuantizedWeight(grid.encode(weight), grid)
    return weights


def write(model: PreTrainedModel, weights: dict[str, QuantizedWeight], folder: Path, format_: Format) -> None:
    """A folder that anybody can load; without the format's library it takes ``read_quantized_state_dict``."""
    writer = ShardWriter(folder)
    tied = {} if not model.config.tie_word_embeddings else model.all_tied_weights_keys
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if name in tied:
            continue
        if module in weights and name.endswith(".weight"):
            format_.require(module, weights[module])
            for part, value in format_.tensors(module, weights[module], tensor.dtype).items():
                writer.add(part, value)
        else:
            writer.add(name, tensor)
    writer.finish()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    section = format_.config(
        {name: weight.grid.scheme for name, weight in weights.items()}, [name for name in linear if name not in weights]
    )
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if getattr(model.config, "shrinkformer", None):
        complete(folder, model.config, type(model), plan=None, card=None)
    if section is not None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": section}, indent=2))
        if format_.config_file:
            (folder / format_.config_file).write_text(json.dumps(section, indent=2))


def prepare(case: Case, work: Path) -> dict[str, Any] | None:
    """Write a case and check that this package reads it back to the last bit; a job for the foreign loader.

    Raises:
        AssertionError: It does not.
    """
    folder, reference = work / case.id, work / f"{case.id}-float"
    model = build(case)
    weights = quantize(model, case)
    try:
        write(model, weights, folder, FORMATS[case.format])
    except InputError as error:
        print(f"not written: {case.id}: {error}", flush=True)
        return None
    write(model, weights, reference, FORMATS["float"])
    dtype = getattr(torch, case.dtype)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    ours = read_quantized_state_dict(folder, config, dtype)
    for name, weight in weights.items():
        assert torch.equal(ours[f"{name}.weight"], FORMATS["float"].tensors(name, weight, dtype)[f"{name}.weight"])
    head = "AutoModelForSequenceClassification" if case.model == "bert" else "AutoModelForCausalLM"
    return {**asdict(case), "id": case.id, "folder": str(folder), "reference": str(reference), "auto_class": head}


def run_there(python: str, jobs: list[dict[str, Any]], work: Path) -> Iterator[dict[str, Any]]:
    """Results of the foreign loader, line by line."""
    (work / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("foreign_loader.py")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": "2"}
    with (
        (work / "foreign.log").open("w") as log,
        subprocess.Popen(
            [python, str(script), str(work / "jobs.json")],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("RESULT "):
                yield json.loads(line.removeprefix("RESULT "))
            else:
                log.write(line)


def main() -> None:
    """Write, load, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="where the folders go; about 1 MB each")
    parser.add_argument("--python", required=True, help="a Python with transformers and the libraries to check")
    parser.add_argument("--formats", nargs="+", default=["compressed-tensors", "gptq"], choices=sorted(FORMATS))
    parser.add_argument("--only", default="", help="check only cases whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in dict.fromkeys(cases(arguments.formats)) if arguments.only in case.id]
    by_id = {case.id: case for case in chosen}
    jobs = [job for case in chosen if (job := prepare(case, arguments.work_dir))]
    print("| model | format | bits | group | symmetric | pruned | dtype | dequantize | mixed | largest difference |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for result in run_there(arguments.python, jobs, arguments.work_dir):
        if "versions" in result:
            print(f"<!-- {result['versions']} -->", flush=True)
            continue
        found = result.get("error") or f"{result['difference']:.2g} of {result['largest']:.2g}"
        row = [str(value) for value in asdict(by_id[result["id"]]).values()]
        print(f"| {' | '.join(row)} | {found} |", flush=True)


if __name__ == "__main__":
    main()
