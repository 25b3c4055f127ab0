"""Quantize with AutoRound; run by llm-compressor's Python: ``PEERS/llmc/bin/python auto_round_peer.py SETTINGS``.

``SETTINGS`` is a JSON file with ``model``, ``calibration`` (safetensors with ``input_ids``), ``output``, ``bits``,
``group_size`` and ``options`` (arguments of ``AutoRound``: ``iters``, ``sym``, ...). The weights as quantized, in
floating point, go to ``output``; seconds and peak memory to ``result.json`` there.
"""

import json
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

settings = json.loads(Path(sys.argv[1]).read_text())
model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
ids = load_file(settings["calibration"])["input_ids"]
batch_size = settings.get("batch_size", 8)
batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(ids, batch_size)]
rounder = AutoRound(
    model,
    AutoTokenizer.from_pretrained(settings["model"]),
    bits=settings["bits"],
    group_size=settings["group_size"],
    dataset=batches,
    nsamples=len(ids),
    seqlen=ids.shape[1],
    batch_size=batch_size,
    device_map="cpu",
    **settings["options"],
)
start = time.perf_counter()
quantized, _ = rounder.quantize()
seconds = time.perf_counter() - start
tied = {"lm_head.weight"}  # never quantized, and the embedding's own tensor in these models
tensors = {name: value.float().contiguous() for name, value in quantized.state_dict().items() if name not in tied}
output = Path(settings["output"])
output.mkdir(parents=True, exist_ok=True)
save_file(tensors, output / "weights.safetensors")
status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's peak where that is larger
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
(output / "result.json").write_text(json.dumps({"seconds": seconds, "peak_memory_bytes": peak}))
