"""Memory that runs out: half as many examples at a time, the same results, and one clear line where nothing helps."""

import errno
import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shrinkformer.architectures import layer_views
from shrinkformer.commands import console, prune_opt
from shrinkformer.dataset.encoding import encode
from shrinkformer.dataset.tasks import get_task
from shrinkformer.efficiency.latency import measure_latency
from shrinkformer.errors import OutOfMemoryError, ShrinkformerWarning
from shrinkformer.evaluate.evaluation import evaluate_model
from shrinkformer.evaluate.perplexity import evaluate_perplexity
from shrinkformer.evaluate.streaming import stream_perplexity
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.hidden import Offload, Spilled
from shrinkformer.prune.names import METHOD_NAMES
from shrinkformer.prune.pruner import calibrate
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.shrink_config import ShrinkConfig
from shrinkformer.prune.streamed import shard_bytes
from shrinkformer.quantize.config import QuantizeConfig
from shrinkformer.quantize.quantizer import quantize_
from shrinkformer.utils.memory import is_out_of_memory, largest, limited, with_smaller_batches
from tests import dataset_fixtures
from tests.conftest import ROOT, build_model, build_tokenizer, make_batches
from tests.test_prune_opt import checkpoint, kept, read_plan, write_corpora

BATCHES = make_batches([12] * 32, batch_size=8)  # of one length, so that padding is the same in smaller batches

ERRORS: dict[str, Callable[[], Exception]] = {
    "python": MemoryError,
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 400 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 400 bytes."),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "mapping": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
}


def limit(model: Any, examples: int, error: Callable[[], Exception] = ERRORS["cpu"], *, block: int = 0) -> Any:
    """Let a block of a model take so many examples at a time."""

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if len(hidden) > examples:
            raise error()

    layer_views(model)[block].block.register_forward_pre_hook(hook, with_kwargs=True)
    return model


@pytest.fixture(autouse=True)
def every_time() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("always", ShrinkformerWarning)
        yield


def sizes(found: Any) -> list[str]:
    """What warnings about memory say, without the number that was too much."""
    return [str(one.message) for one in found if "out of memory" in str(one.message)]


class TestErrors:
    @pytest.mark.parametrize("kind", ERRORS)
    def test_they_are_recognised(self, kind: str) -> None:
        assert is_out_of_memory(ERRORS[kind]())

    def test_others_are_not(self) -> None:
        for error in (RuntimeError("shapes do not fit"), OSError(errno.ENOSPC, "No space left"), ValueError("memory")):
            assert not is_out_of_memory(error)

            def step(_: int, error: Exception = error) -> None:
                raise error

            with pytest.raises(type(error)):
                with_smaller_batches(step, 8, what="this")

    def test_the_real_allocator(self) -> None:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**60, dtype=torch.uint8)
        assert is_out_of_memory(caught.value)

    def test_halves_down_to_one(self) -> None:
        tried: list[int] = []

        def step(most: int) -> None:
            tried.append(most)
            raise MemoryError

        with (
            pytest.warns(ShrinkformerWarning, match="this: out of memory with 3 examples at a time; going on with 2"),
            pytest.raises(OutOfMemoryError, match=r"this: out of memory even with one example.*--sequence_length"),
        ):
            with_smaller_batches(step, 5, what="this")
        assert tried == [5, 3, 2, 1]

    def test_tensors_of_the_failure_are_gone_before_the_next_attempt(self) -> None:
        alive: list[Any] = []

        def step(most: int) -> int:
            assert not any(reference() is not None for reference in alive)
            large = torch.zeros(most)
            import weakref

            alive.append(weakref.ref(large))
            if most > 1:
                raise MemoryError
            return most

        with pytest.warns(ShrinkformerWarning):
            assert with_smaller_batches(step, 4, what="this") == 1

    def test_limited(self) -> None:
        assert limited(BATCHES, 8) is BATCHES
        parts = limited(BATCHES, 3)
        assert largest(parts) == 3
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(torch.cat([part[name] for part in parts]), torch.cat([part[name] for part in BATCHES]))


class TestEvaluation:
    @pytest.mark.parametrize("kind", ["python", "cuda", "cpu"])
    def test_perplexity(self, kind: str) -> None:
        windows = torch.randint(5, 40, (11, 16), generator=torch.Generator().manual_seed(0))
        expected = evaluate_perplexity(build_model("opt"), windows, batch_size=2)
        for evaluate in (
            lambda model: evaluate_perplexity(model, windows, batch_size=8),
            lambda model: stream_perplexity(model, windows, Resources(), batch_size=8),
        ):
            with pytest.warns(ShrinkformerWarning, match="perplexity: out of memory") as found:
                measured = evaluate(limit(build_model("opt"), 2, ERRORS[kind]))
            assert measured.value == pytest.approx(expected.value, rel=1e-6)
            assert measured.windows == 11
            assert [line.split("going on")[1] for line in sizes(found)] == [" with 4", " with 2"]

    @pytest.mark.parametrize("name", ["sst2", "squad", "similarity"])
    def test_tasks(self, name: str) -> None:
        task, tokenizer = get_task(name), build_tokenizer()
        data = {"sst2": dataset_fixtures.sentiment, "squad": dataset_fixtures.questions}.get(
            name, dataset_fixtures.pairs
        )
        rows = data(60)
        if name == "squad":
            rows = rows.filter(lambda row: row["answers"]["text"])
        encoded = {"validation": encode(rows.select(range(24)), task, tokenizer, max_length=64)}
        head = {"sst2": "ForSequenceClassification", "squad": "ForQuestionAnswering"}.get(name, "Model")
        model = build_model("bert", head)
        expected = evaluate_model(model, tokenizer, task, encoded, batch_size=8, keep_logits=True)
        with pytest.warns(ShrinkformerWarning, match=f"evaluation on {name}: out of memory with 8 examples"):
            found = evaluate_model(limit(model, 3), tokenizer, task, encoded, batch_size=8, keep_logits=True)
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
        assert found.logits is not None
        assert expected.logits is not None
        for split, logits in expected.logits.items():
            torch.testing.assert_close(torch.tensor(found.logits[split]), torch.tensor(logits), equal_nan=True)

    def test_latency_leaves_the_shape_out(self) -> None:
        models = {"dense": limit(build_model("bert"), 4), "pruned": build_model("bert")}
        with pytest.warns(ShrinkformerWarning, match="latency 8x16: out of memory; this shape is left out"):
            found = measure_latency(models, [(1, 16), (8, 16)], vocabulary_size=40, repeats=1, warmup=0)
        assert {name: list(times) for name, times in found.items()} == {"dense": ["1x16"], "pruned": ["1x16"]}


class TestPruning:
    @pytest.mark.parametrize("method", METHOD_NAMES)
    def test_the_same_plan_as_with_smaller_batches(self, method: str) -> None:
        config, budget = ShrinkConfig(search_seconds=0), Budget(0.5, 12)
        expected = calibrate(build_model(), limited(BATCHES, 2), method=method, config=config).prune(budget)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            pruned = calibrate(limit(build_model(), 2), BATCHES, method=method, config=config).prune(budget)
        assert pruned.plan == expected.plan
        for name, weight in expected.model.state_dict().items():
            assert torch.equal(pruned.model.state_dict()[name], weight), name
        assert sizes(found)[:1]

    @pytest.mark.parametrize("method", ["shrink", "stat", "kwon", "kprune"])
    def test_memory_that_runs_out_after_calibration(self, method: str) -> None:
        config, budget, model = ShrinkConfig(search_seconds=0), Budget(0.5, 12), build_model()
        learnt = calibrate(model, BATCHES, method=method, config=config)
        expected = learnt.prune(budget)
        limit(model, 4, ERRORS["cuda"], block=1)
        with pytest.warns(
            ShrinkformerWarning, match=r"pruning: out of memory with [78] examples at a time; going on with 4"
        ):
            found = learnt.prune(budget)
        assert [len(layer.neurons) for layer in found.plan.layers] == expected.plan.neurons
        if method == "shrink":  # how strong a ridge is, is judged by halves of each batch
            errors = [[layer.ffn_error for layer in plan.layers] for plan in (found.plan, expected.plan)]
            assert errors[0] == pytest.approx(errors[1], rel=0.3)
            return
        # Sums of smaller batches are rounded otherwise, by some 1e-7 of the rows. Outputs follow that (3e-6 with noise
        # of this size); weights do in directions that the examples show, and in others as far as the ridge of 1e-6
        # lets them: by 1e-7 / sqrt(1e-6) = 1e-4 of their norm. Both get a tenfold margin.
        with torch.no_grad():
            ours, wanted = (
                torch.cat([one.model(**batch).logits for batch in limited(BATCHES, 4)]) for one in (found, expected)
            )
        assert float((ours - wanted).norm() / wanted.norm()) < 3e-5
        for name, weight in expected.model.state_dict().items():
            assert float((found.model.state_dict()[name] - weight).norm() / weight.norm()) < 1e-3, name

    def test_one_example_is_too_much(self) -> None:
        with pytest.raises(
            OutOfMemoryError, match=r"calibration: out of memory even with one example at a time \(\[enf"
        ):
            calibrate(limit(build_model(), 0), BATCHES, method="stat")


class TestQuantizing:
    @pytest.mark.parametrize("quantizer", ["gptq", "shrink"])
    @pytest.mark.parametrize("also", [(), ("embeddings", "head")])
    def test_the_same_integers_as_with_smaller_batches(self, quantizer: str, also: tuple[str, ...]) -> None:
        config = QuantizeConfig(group_size=16, quantizer=quantizer, also=also)
        models = build_model("opt"), limit(build_model("opt"), 4)
        expected = quantize_(models[0], limited(BATCHES, 4), config)
        with pytest.warns(ShrinkformerWarning, match="out of memory with 8 examples at a time; going on with 4"):
            found = quantize_(models[1], BATCHES, config)
        for name, weight in expected.weights.items():
            assert torch.equal(found.weights[name].codes, weight.codes), name
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(ours, theirs)

    def test_too_late_to_start_anew(self) -> None:
        model, calls = build_model("opt"), [0]

        def hook(*_: Any) -> None:
            calls[0] += 1
            if calls[0] > 2 * len(BATCHES):
                raise MemoryError

        layer_views(model)[2].block.register_forward_pre_hook(hook)
        config = QuantizeConfig(group_size=16, quantizer="gptq")
        with pytest.raises(OutOfMemoryError, match="some blocks were finished, so the model is partly quantized"):
            quantize_(model, BATCHES, config)


def test_a_command_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Any) -> None:
        raise ERRORS["cpu"]()

    assert console.run_command(fail, [], "prune_opt.py") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("prune_opt.py: error: out of memory ([enforce fail")
    assert "--batch_size" in shown
    assert shown.count("\n") == 1


def test_commands_show_each_warning_once(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: Any) -> None:
        for budget in (0.7, 0.5):
            warnings.warn("17 tokens\nare few", ShrinkformerWarning, stacklevel=1)
            warnings.warn(f"mu {budget}", ShrinkformerWarning, stacklevel=1)

    assert console.run_command(main, [], "prune_opt.py") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"prune_opt.py: warning: {text}" for text in ("17 tokens are few", "mu 0.7", "mu 0.5")]


LIMITED = """
import os, resource, sys
import psutil
from shrinkformer.commands import prune_opt, running

learn = running._calibrate

def limited(session):
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + int(os.environ["SPARE"]), resource.RLIM_INFINITY))
    learn(session)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

running._calibrate = limited
sys.exit(prune_opt.main(sys.argv[1:]))
"""
"""Prunes with so many bytes of address space to spare for calibration."""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_a_real_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Torch's own allocator fails, and the command finishes with the same plan as without a limit, in this process."""
    data = write_corpora(tmp_path / "data")
    model = checkpoint(tmp_path / "mine", "opt", intermediate_size=1024, num_hidden_layers=2)
    capsys.readouterr()
    flags = {"model_name": model, "mu": 0.5, "data_dir": data, "method": "stat", "device": "cpu", "batch_size": 256}
    flags |= {"sample_batch_size": 256, "sequence_length": 64, "evaluation_windows": 4}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert prune_opt.main([*words, "--output_dir", str(tmp_path / "free")]) == 0
    assert capsys.readouterr().err == ""

    command = [sys.executable, "-c", LIMITED, *words, "--output_dir", str(tmp_path / "tight")]
    environment = os.environ | {"SPARE": str(100 * 2**20)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = "prune_opt.py: warning: calibration: out of memory with 256 examples at a time; going on with 128"
    assert said in done.stderr
    free, tight = (read_plan(tmp_path / name / "opt" / "mine-wikitext2-mu0.5") for name in ("free", "tight"))
    assert kept(tight) == kept(free)


PEAK = """
import sys, threading, time
import psutil
from shrinkformer.commands import prune_opt, running

process, start, peak = psutil.Process(), running._start, [0]
warm, cold = sys.argv[1:3]
assert prune_opt.main([*sys.argv[3:], "--model_name", warm, "--max_memory", "0.00001"]) == 0  # libraries are loaded

def started(*args, **kwargs):
    before = process.memory_info().rss

    def watch():
        while True:
            peak[0] = max(peak[0], process.memory_info().rss - before)
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    return start(*args, **kwargs)

running._start = started
code = prune_opt.main([*sys.argv[3:], "--model_name", cold])
print("peak", peak[0])
sys.exit(code)
"""
"""Prunes, and prints by how much resident memory grew from right before the model was loaded."""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux counts it")
def test_max_memory_is_a_limit(tmp_path: Path) -> None:
    """Weights of 60 MiB pass block by block within 45 MiB.

    Memory that is freed is given back at once; by default an allocator keeps pieces as small as these blocks.
    """
    sizes = {"hidden_size": 256, "word_embed_proj_dim": 256, "intermediate_size": 768, "num_hidden_layers": 24}
    model = checkpoint(tmp_path / "mine", "opt", **sizes)
    assert (tmp_path / "mine" / "model.safetensors").stat().st_size > 60 * 2**20
    limit = 45 * 2**20
    tiny = checkpoint(tmp_path / "tiny", "opt")
    flags = {"mu": 0.5, "data_dir": write_corpora(tmp_path / "data"), "method": "stat"}
    flags |= {"device": "cpu", "batch_size": 4, "sample_batch_size": 32, "sequence_length": 64, "evaluation_windows": 1}
    flags |= {"max_memory": limit / 2**30, "output_dir": tmp_path / "output"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-c", PEAK, tiny, model, *words]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "its blocks stay on disk until they are needed" in done.stdout
    assert int(done.stdout.split("peak ")[-1]) <= limit


def test_streams_share_one_limit(tmp_path: Path) -> None:
    offload = Offload(tmp_path, limit=1000)
    first, second = (Spilled(offload, torch.device("cpu")) for _ in range(2))
    for index in range(3):
        for place in (first, second):
            place[index] = torch.full((1, 10, 10), float(index))  # 400 bytes
    assert offload.shared.bytes == 800
    assert all(float(place[index].mean()) == index for index in range(3) for place in (first, second))
    first[0] = torch.zeros(1, 20, 10)
    assert offload.shared.bytes == 400
    assert first[0].shape == (1, 20, 10)
    del first, place
    gc.collect()
    assert offload.shared.bytes == 400
    del second
    gc.collect()
    assert offload.shared.bytes == 0


def test_files_of_a_streamed_checkpoint_keep_to_the_limit(tmp_path: Path) -> None:
    assert shard_bytes(Resources()) == 1e9
    assert shard_bytes(Resources(offload=Offload(tmp_path, int(2e8)))) == 2e8
    assert shard_bytes(Resources(offload=Offload(tmp_path, 10))) == 1e6  # no file for each tensor
