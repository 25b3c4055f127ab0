"""Quantize with GPTQModel; run by its own Python: ``PEERS/gptqmodel/bin/python gptqmodel_peer.py SETTINGS``.

``SETTINGS`` is a JSON file with ``model``, ``calibration`` (safetensors with ``input_ids``), ``output``, ``bits``,
``group_size`` and ``options``: arguments of ``GPTQConfig`` (``sym``, ``mse``, ``act_group_aware``, ``desc_act``,
``true_sequential``, ``damp_percent``, ...) and ``gptaq``, the alpha of GPTAQ. The weights as unpacked from what would
be stored, in floating point, go to ``output``; seconds and peak memory to ``result.json`` there.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # else it asks for two workers and grants itself one

import torch
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import GPTAQConfig, GPTQConfig
from safetensors.torch import load_file, save_file

settings = json.loads(Path(sys.argv[1]).read_text())
options = dict(settings["options"])
alpha = options.pop("gptaq", None)
if settings["group_size"] == -1 and options.pop("act_group_aware", True):
    options |= {"act_group_aware": False, "desc_act": True}  # the same order; it refuses the former for a single group
config = GPTQConfig(
    bits=settings["bits"],
    group_size=settings["group_size"],
    gptaq=None if alpha is None else GPTAQConfig(alpha=alpha),
    offload_to_disk=False,
    format="gptq_v2",  # v1 packs zero points less one, which unpacking in memory does not undo: all weights a step off
    **options,
)
model = GPTQModel.load(settings["model"], config, dtype=torch.float32, device="cpu")
ids = load_file(settings["calibration"])["input_ids"]
data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
start = time.perf_counter()
model.quantize(data, batch_size=settings.get("batch_size", 8))
seconds = time.perf_counter() - start
tensors = {}
for name, module in model.model.named_modules():
    if hasattr(module, "dequantize_weight"):
        tensors[f"{name}.weight"] = module.dequantize_weight().T.float().contiguous()
        if module.bias is not None:
            tensors[f"{name}.bias"] = module.bias.float()
output = Path(settings["output"])
output.mkdir(parents=True, exist_ok=True)
save_file(tensors, output / "weights.safetensors")
status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's peak where that is larger
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
(output / "result.json").write_text(json.dumps({"seconds": seconds, "peak_memory_bytes": peak}))
