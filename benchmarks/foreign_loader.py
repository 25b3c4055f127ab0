"""Load folders with whatever this Python has installed; started by load_anywhere.py, imports nothing of this package.

python foreign_loader.py JOBS.json

Every job names a quantized folder and the folder with the same weights as ordinary numbers. Both are loaded by plain
``from_pretrained``; one JSON line per job holds the largest difference of logits, or the first line of the error.
"""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers


def logits_of(folder: str, job: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """Output of a folder's model for fixed tokens, float64."""
    auto = getattr(transformers, job["auto_class"])
    model = auto.from_pretrained(folder, dtype=getattr(torch, job["dtype"]), trust_remote_code=job["pruned"], **kwargs)
    tokens = torch.arange(2 * 24).view(2, 24) % 90 + 5
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(input_ids=tokens)[0].double()
    return logits


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Largest difference of logits, and the size of the largest one."""
    kwargs = {}
    if job["dequantize"]:
        kwargs["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    try:
        expected = logits_of(job["reference"], job)
        found = logits_of(job["folder"], job, **kwargs)
    except Exception as error:  # any failure of foreign code is a result
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:160]}
    return {"difference": float((found - expected).abs().max()), "largest": float(expected.abs().max())}


def main() -> None:
    """Print the versions, then one line per job."""
    versions: dict[str, str | None] = {}
    for name in ("torch", "transformers", "compressed-tensors", "optimum", "gptqmodel"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    print("RESULT", json.dumps({"versions": versions}), flush=True)
    transformers.utils.logging.set_verbosity_error()
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print("RESULT", json.dumps({"id": job["id"], **measure(job)}), flush=True)


if __name__ == "__main__":
    main()
