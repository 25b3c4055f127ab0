"""Run other quantizers, each in its own virtual environment (``install.sh`` makes them)."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SCRIPTS = Path(__file__).parent
LIMIT = 4 * 3600


class PeerError(RuntimeError):
    """A peer is not installed, or did not come to an end; the message says why in one line."""


@dataclass(frozen=True)
class Peer:
    """Another quantizer with its settings.

    Attributes:
        name: What tables call it.
        script: In this folder.
        options: What the script passes on.
        environment: Folder of its virtual environment below ``--peers_dir``.
        symmetric: Whether it stores no zero points.
        gradient: Whether it trains, by backpropagation; compared apart.
    """

    name: str
    script: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: str = "llmc"
    symmetric: bool = True
    gradient: bool = False

    def python(self, peers_dir: Path) -> Path:
        """Its interpreter."""
        return peers_dir.resolve() / self.environment / "bin" / "python"  # no further: links would leave it


def _llm_compressor(name: str, *, symmetric: bool, **options: Any) -> Peer:
    return Peer(name, "llm_compressor.py", {"symmetric": symmetric, **options}, symmetric=symmetric)


def _gptqmodel(name: str, *, sym: bool = True, **options: Any) -> Peer:
    return Peer(name, "gptqmodel_peer.py", {"sym": sym, **options}, "gptqmodel", symmetric=sym)


_PEERS = (
    _llm_compressor("llm-compressor", symmetric=True),  # min-max, natural order
    _llm_compressor("llm-compressor-sym", symmetric=True, observer="mse", actorder="static"),
    _llm_compressor("llm-compressor-asym", symmetric=False, observer="mse", actorder="static"),
    _gptqmodel("gptqmodel"),  # its defaults: symmetric, groups in the order of activity, damping 0.05
    _gptqmodel("gptqmodel-sym", mse=2.4),
    _gptqmodel("gptqmodel-asym", sym=False, mse=2.4),
    _gptqmodel("gptqmodel-gptaq", sym=False, mse=2.4, gptaq=0.25),
    Peer("auto-round", "auto_round_peer.py", {"iters": 200}, gradient=True),
    Peer("auto-round-asym", "auto_round_peer.py", {"iters": 200, "sym": False}, symmetric=False, gradient=True),
)

PEERS: Mapping[str, Peer] = {peer.name: peer for peer in _PEERS}
"""All peers by their names."""


def run_peer(
    peer: Peer, python: Path, model_dir: Path, ids: Tensor, *, bits: int, group_size: int, threads: int = 2
) -> tuple[dict[str, Tensor], float, int]:
    """Let a peer quantize a model.

    Args:
        peer: Which one.
        python: Interpreter of its environment.
        model_dir: Folder of the dense model.
        ids: Calibration windows, ``(windows, length)`` int64.
        bits: Of a code.
        group_size: Inputs that share a scale; -1 for one scale per output.
        threads: That it may use.

    Returns:
        Weights in floating point by their names in transformers' state dict, seconds without loading, and the
        process's peak memory in bytes.

    Raises:
        PeerError: It is not installed, or failed.
    """
    if not python.exists():
        raise PeerError(f"{peer.name} left out: no {python}; benchmarks/peers/install.sh installs it")
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        folder = Path(name)
        save_file({"input_ids": ids.contiguous()}, folder / "calibration.safetensors")
        settings = {
            "model": str(with_tokenizer(model_dir, folder / "model")),
            "calibration": str(folder / "calibration.safetensors"),
            "output": str(folder / "output"),
            "bits": bits,
            "group_size": group_size,
            "options": dict(peer.options),
        }
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        _call(peer, python, folder, threads)
        result = json.loads((folder / "output" / "result.json").read_text(encoding="utf-8"))
        weights = {key: value.float() for key, value in load_file(folder / "output" / "weights.safetensors").items()}
    return weights, result["seconds"], result["peak_memory_bytes"]


def _call(peer: Peer, python: Path, folder: Path, threads: int) -> None:
    """Run the script and wait for it."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    command = [str(python), str(SCRIPTS / peer.script), str(folder / "settings.json")]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **offline},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"{peer.name} left out: not done after {LIMIT} s") from None
    if done.returncode:
        raise PeerError(f"{peer.name} left out: {_reason(done.stdout + done.stderr)}")


def _reason(output: str) -> str:
    """The last line that names an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (named or lines or ["no output"])[-1][:300]


def with_tokenizer(model_dir: Path, folder: Path) -> Path:
    """The model's folder, or links to its files beside an unused tokenizer where it has none: peers ask for one.

    Args:
        model_dir: Folder of the model.
        folder: Where the links go.
    """
    model_dir = model_dir.resolve()
    if (model_dir / "tokenizer_config.json").exists():
        return model_dir
    folder.mkdir()
    for file in model_dir.iterdir():
        (folder / file.name).symlink_to(file)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return folder
