"""onnxruntime's own optimizer finds the attention of encoders in our files, and computes the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shrinkformer.errors import InputError
from shrinkformer.export.onnx_export import export_onnx
from shrinkformer.prune.pruner import prune_model
from shrinkformer.prune.shrink_config import ShrinkConfig
from tests.conftest import build_model, make_batches

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BATCHES = make_batches([3 + index % 16 for index in range(24)], batch_size=8)


def optimized(model: Any, folder: Path) -> tuple[int, float]:
    """Attention nodes that the optimizer makes, and the largest difference of their outputs from torch's."""
    from onnxruntime.transformers import optimizer

    batch = BATCHES[-1]
    export_onnx(model, folder / "model.onnx", {name: value[:3] for name, value in batch.items()})
    made = optimizer.optimize_model(str(folder / "model.onnx"), model_type="bert", num_heads=0, hidden_size=0)
    made.save_model_to_file(str(folder / "fused.onnx"))
    session = onnxruntime.InferenceSession(folder / "fused.onnx", providers=["CPUExecutionProvider"])
    types = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
    given = {value.name: batch[value.name].numpy().astype(types[value.type]) for value in session.get_inputs()}
    with torch.no_grad():
        wanted = model(**batch).logits.numpy()
    found = session.run(["logits"], given)[0]
    return made.get_fused_operator_statistics()["Attention"], float(np.abs(found - wanted).max())


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_attention_of_dense_encoders_is_found(family: str, tmp_path: Path) -> None:
    nodes, error = optimized(build_model(family, num_hidden_layers=2), tmp_path)
    assert nodes == 2
    assert error < 1e-5


@pytest.mark.parametrize("whole", [True, False])
def test_of_pruned_ones_where_its_scale_is_theirs(whole: bool, tmp_path: Path) -> None:
    config = ShrinkConfig(search_seconds=0, whole_heads=whole)
    model = prune_model(build_model(num_hidden_layers=2), BATCHES, mu=0.4, config=config).model
    nodes, error = optimized(model, tmp_path)
    assert error < 1e-5
    assert nodes == 2 * whole


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_are_refused(kind: str, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 40}
    own = {"factor": 2.0, "rope_theta": 1e4} | (factors if kind == "longrope" else {})
    model = build_model("llama", rope_parameters={"rope_type": kind, **own})
    with pytest.raises(InputError, match=f"rope_type '{kind}', whose frequencies follow the length"):
        export_onnx(model, tmp_path / "model.onnx", BATCHES[0])
