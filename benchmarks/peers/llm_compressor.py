"""Quantize with llm-compressor; run by its own Python: ``PEERS/llm-compressor/bin/python llm_compressor.py SETTINGS``.

``SETTINGS`` is a JSON file with ``model``, ``calibration`` (safetensors with ``input_ids``), ``output``, ``bits``,
``group_size`` and ``options`` (``symmetric``, ``observer``, ``actorder``). The weights as quantized, in floating point,
go to ``output``; seconds and peak memory to ``result.json`` there.
"""

import json
import sys
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

settings = json.loads(Path(sys.argv[1]).read_text())
options = settings["options"]
model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
ids = load_file(settings["calibration"])["input_ids"]
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
weights = QuantizationArgs(
    num_bits=settings["bits"],
    type="int",
    symmetric=options["symmetric"],
    strategy="channel" if settings["group_size"] == -1 else "group",
    group_size=None if settings["group_size"] == -1 else settings["group_size"],
    observer=options.get("observer", "minmax"),
    actorder=options.get("actorder"),
)
recipe = GPTQModifier(
    config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
)
start = time.perf_counter()
oneshot(
    model=model,
    dataset=data,
    recipe=recipe,
    max_seq_length=ids.shape[1],
    num_calibration_samples=len(ids),
    batch_size=settings.get("batch_size", 8),
)
seconds = time.perf_counter() - start
output = Path(settings["output"])
output.mkdir(parents=True, exist_ok=True)
tensors = {
    name: value.contiguous()
    for name, value in model.state_dict().items()
    if not name.endswith(("_scale", "_zero_point", "_g_idx", "_shape"))
}
kept = {name: value.clone() for name, value in tensors.items() if name != "lm_head.weight"}
save_file(kept, output / "weights.safetensors")
status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's peak where that is larger
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
(output / "result.json").write_text(json.dumps({"seconds": seconds, "peak_memory_bytes": peak}))
