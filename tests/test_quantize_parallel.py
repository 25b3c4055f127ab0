"""Two processes share the examples of a quantization, through gloo, and end with the same codes."""

from pathlib import Path

import pytest
import torch

from shrinkformer.prune.resources import Resources
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_
from shrinkformer.utils.parallel import workers_of
from tests.conftest import build_model, make_batches
from tests.test_parallel import as_torchrun_does, free_port

BATCHES = make_batches([3 + index % 18 for index in range(48)], batch_size=8)


def work(rank: int, size: int, port: int, quantizer: str, folder: Path) -> None:
    """What each of the processes does."""
    as_torchrun_does(rank, size, port)
    with workers_of("cpu") as workers:
        model = build_model("opt").double()
        config = QuantizeConfig(3, 16, quantizer=quantizer)
        found = quantize_(model, BATCHES, config, resources=Resources(workers=workers))
        torch.save({name: weight.codes for name, weight in found.weights.items()}, folder / f"{rank}.pt")
        torch.save(model.state_dict(), folder / f"state{rank}.pt")


@pytest.mark.parametrize("quantizer", ["shrink", "gptq"])
def test_two_processes_end_with_the_same(quantizer: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (2, free_port(), quantizer, tmp_path), nprocs=2)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, codes in ours.items():
        assert torch.equal(codes, theirs[name]), name
    states = [torch.load(tmp_path / f"state{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    if quantizer == "gptq":  # the other one draws answers, and each process its own
        alone = quantize_(build_model("opt").double(), BATCHES, QuantizeConfig(3, 16, quantizer=quantizer))
        same = [float((codes == alone.weights[name].codes).double().mean()) for name, codes in ours.items()]
        assert min(same) > 0.99
