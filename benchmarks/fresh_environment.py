"""Load what this package writes where it is not installed: docs/checkpoint.md, "Loaded elsewhere".

python -m benchmarks.fresh_environment --work_dir /tmp/fresh

prunes the bundled sentence encoder, opt-mini and a small Llama of random weights (the last with --uniform), exports the
first two as ONNX, makes one virtual environment with torch and transformers and one with onnxruntime and numpy alone,
loads every folder there and prints a Markdown table of the largest differences of the outputs from those in memory.
"""

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import shrinkformer
from shrinkformer.commands.console import quiet_libraries
from shrinkformer.commands.locate import bundled_decoder, bundled_model
from shrinkformer.export.onnx_export import export_onnx

TOKENS, EXAMPLES = 24, 16

ENVIRONMENTS = {
    "transformers": (f"torch=={torch.__version__.partition('+')[0]}", f"transformers=={transformers.__version__}"),
    "onnxruntime": ("onnxruntime", "numpy"),
}
"""What is installed in each; nothing of this package."""

_TRANSFORMERS = """
import json, sys, numpy, torch, transformers
folder, auto, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "code"
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=trust).eval()
ids = torch.from_numpy(numpy.load(folder + "/../ids.npy"))
with torch.inference_mode():
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].numpy()
assert "shrinkformer" not in sys.modules
print(float(abs(found - numpy.load(folder + "/../outputs.npy")).max()))
"""

_ONNXRUNTIME = """
import sys, numpy, onnxruntime
folder = sys.argv[1]
session = onnxruntime.InferenceSession(folder + "/onnx/model.onnx")
ids = numpy.load(folder + "/../ids.npy")
given = {"input_ids": ids, "attention_mask": numpy.ones_like(ids), "token_type_ids": numpy.zeros_like(ids)}
for value in session.get_inputs():
    if value.name not in given:  # a cache with nothing in it
        given[value.name] = numpy.zeros((len(ids), value.shape[1], 0, value.shape[3]), numpy.float32)
found = session.run(None, {value.name: given[value.name] for value in session.get_inputs()})[0]
assert not {"torch", "transformers", "shrinkformer"} & set(sys.modules)
wanted = numpy.load(folder + "/../outputs.npy")
print(float(abs(found - wanted).max() / abs(wanted).max()))
"""


def models() -> dict[str, tuple[PreTrainedModel, str, bool]]:
    """Dense models by name, with the Auto class that opens them, and whether blocks are to be alike."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=500,
            initializer_range=0.1,
        )
        llama = LlamaForCausalLM(config)
    return {
        "all-MiniLM-L6-v2": (AutoModel.from_pretrained(bundled_model(), dtype="float32"), "AutoModel", False),
        "opt-mini": (
            AutoModelForCausalLM.from_pretrained(bundled_decoder(), dtype="float32"),
            "AutoModelForCausalLM",
            False,
        ),
        "a small Llama, uniform": (llama, "AutoModelForCausalLM", True),
    }


def write(work: Path, name: str, model: PreTrainedModel, uniform: bool) -> Path:
    """Prune, save and export a model; its tokens and outputs lie beside the folder."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(model.config.vocab_size, 20_000), (EXAMPLES, TOKENS), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pruned = shrinkformer.prune_model(model, [batch], mu=0.6, method="stat", uniform=uniform)
    place = work / name.replace(" ", "-").replace(",", "")
    folder = shrinkformer.save(pruned.model, place / "model", plan=pruned.plan)
    few: Mapping[str, Tensor] = {key: value[:2] for key, value in batch.items()}
    with torch.inference_mode():
        outputs = pruned.model.eval()(**few)[0]
    np.save(place / "ids.npy", few["input_ids"].numpy())
    np.save(place / "outputs.npy", outputs.numpy())
    if not uniform:
        export_onnx(pruned.model, folder / "onnx" / "model.onnx", few)
    return folder


def environment(work: Path, name: str) -> Path:
    """The Python of a new virtual environment with what it should have."""
    folder = work / f"env-{name}"
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]], check=True)
    missing = subprocess.run(
        [python, "-c", "import shrinkformer"], check=False, capture_output=True, cwd="/"
    ).returncode
    assert missing, "shrinkformer must not be there"
    return python


def ask(python: Path, code: str, *arguments: str) -> str:
    """What a program prints last, or how it failed."""
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd="/")
    text = done.stdout if done.returncode == 0 else done.stderr
    return text.strip().splitlines()[-1]


def main(arguments: list[str] | None = None) -> None:
    """Write, load, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="where folders and environments go; about 2 GB")
    options = parser.parse_args(arguments)
    quiet_libraries()
    work = options.work_dir.resolve()
    pythons = {name: environment(work, name) for name in ENVIRONMENTS}
    rows: list[list[Any]] = []
    for name, (model, auto, uniform) in models().items():
        folder = write(work, name, model, uniform)
        code = "auto_map" in json.loads((folder / "config.json").read_text())
        how = "trust_remote_code=True" if code else "stock classes"
        found = ask(pythons["transformers"], _TRANSFORMERS, str(folder), auto, "code" if code else "stock")
        rows.append([name, f"{auto}, {how}", found])
        if not uniform:
            rows.append([name, "onnxruntime alone", ask(pythons["onnxruntime"], _ONNXRUNTIME, str(folder))])
    print(f"<!-- python {sys.version.split()[0]}, {', '.join(' '.join(names) for names in ENVIRONMENTS.values())} -->")
    print("| model | opened by | largest difference |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
