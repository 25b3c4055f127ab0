"""Passing block by block, or shared by several processes: the plan, weights and figures of one process in memory."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import shrinkformer
from shrinkformer.architectures import layer_views
from shrinkformer.commands import opt_eval, prune_bert, prune_opt, running
from shrinkformer.evaluate.perplexity import evaluate_perplexity
from shrinkformer.evaluate.streaming import stream_perplexity
from shrinkformer.prune import streamed
from shrinkformer.prune.budget import Budget
from shrinkformer.prune.hidden import Offload, Spilled
from shrinkformer.prune.lazy import load_lazily
from shrinkformer.prune.moments import Moments
from shrinkformer.prune.pruner import calibrate, prune_model
from shrinkformer.prune.resources import Resources
from shrinkformer.prune.resume import BlockStore, examples_digest, fingerprint
from shrinkformer.prune.shards import ShardWriter
from shrinkformer.prune.stream import BlockStream
from shrinkformer.prune.streamed import prune_to_folder
from shrinkformer.utils.inputs import outputs_of
from shrinkformer.utils.parallel import ALONE, workers_of
from tests.conftest import ENCODERS, FAMILIES, ROOT, build_model, make_batches
from tests.test_parallel import as_torchrun_does, free_port
from tests.test_prune_opt import Main, call, checkpoint, kept, read_plan, read_records, text, write_corpora

Commands = list[tuple[Main, list[str]]]

SMALL = ("--max_memory", "0.00001")  # GiB: nothing fits
RANKED = ("--method", "stat")  # works block by block
DECODERS = [family for family in FAMILIES if family not in ENCODERS]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def encoder_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2 in miniature."""
    folder = tmp_path_factory.mktemp("encoder-data")
    (folder / "glue/sst2").mkdir(parents=True)
    for seed, split in enumerate(("train", "validation")):
        lines = text(400, seed).splitlines()
        table = {"sentence": lines, "label": [len(line) % 2 for line in lines]}
        datasets.Dataset.from_dict(table).to_parquet(folder / f"glue/sst2/{split}.parquet")
    return folder


def encoder_command(folder: Path, data: Path) -> list[str]:
    common = ["--model_name", checkpoint(folder / "encoder", "bert"), "--task_name", "sst2", "--mu", "0.5"]
    return [*common, "--data_dir", str(data), "--sample_batch_size", "30", "--batch_size", "8"]


def decoder_command(folder: Path, data: Path) -> list[str]:
    common = ["--model_name", checkpoint(folder / "mine"), "--mu", "0.5", "--data_dir", str(data)]
    return [*common, "--sample_batch_size", "16", "--batch_size", "4", "--sequence_length", "24"]


@pytest.fixture
def run(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Prune ``mine`` to one budget, block by block."""
    checkpoint(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    common = ("--model_name", "mine", "--mu", "0.5", "--save_dir", "small", "--offload_dir", "spill", *SMALL)
    return lambda *arguments: call(prune_opt.main, data_dir, *common, *arguments)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def weights_in(folder: str | Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_checkpoint(folder: str | Path, expected: str | Path, *, atol: float = 1e-6) -> None:
    """The same plan exactly, the same weights but for rounding, the same files but for the number of shards."""
    assert kept(read_plan(folder)) == kept(read_plan(expected))
    found, wanted = weights_in(folder), weights_in(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=name)
    names = [
        {file.name for file in Path(path).iterdir() if "safetensors" not in file.name} for path in (folder, expected)
    ]
    assert names[0] == names[1]


def assert_same_report(found: dict[str, Any], expected: dict[str, Any], rel: float = 1e-5) -> None:
    for name in ("dense", "pruned"):
        assert found[name]["metrics"] == pytest.approx(expected[name]["metrics"], rel=rel)
        assert [found[name][key] for key in ("macs", "parameters")] == [
            expected[name][key] for key in ("macs", "parameters")
        ]
    assert found["ratio"]["macs"] == expected["ratio"]["macs"]
    assert len(found["layers"]) == len(expected["layers"])
    for layer, wanted in zip(found["layers"], expected["layers"], strict=True):
        assert layer == pytest.approx(wanted, rel=rel)


@dataclass(frozen=True)
class Both:
    """Folders where the same model was pruned in memory, and block by block."""

    whole: Path
    streamed: Path
    spilled: int  # files of hidden states that were there at the same time


@pytest.fixture(scope="module", params=["opt", "llama"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp(request.param)
    common = ("--model_name", checkpoint(folder / "mine", request.param), "--mu", "0.7", "0.5")
    assert call(prune_opt.main, data_dir, *common, "--output_dir", str(folder / "whole")) == 0
    counts, real = [0], Spilled.__getitem__

    def counted(self: Spilled, index: int) -> torch.Tensor:
        counts.append(len(list((folder / "spill").rglob("*.bin"))))
        return real(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "SHARD_BYTES", 20e3)
        patch.setattr(Spilled, "__getitem__", counted)
        places = ("--output_dir", str(folder / "streamed"), "--offload_dir", str(folder / "spill"))
        assert call(prune_opt.main, data_dir, *common, *SMALL, *places) == 0
    return Both(folder / "whole", folder / "streamed", max(counts))


class TestCommand:
    def test_plan_weights_and_perplexities_are_the_same(self, both: Both) -> None:
        for found, expected in zip(read_records(both.streamed), read_records(both.whole), strict=True):
            assert_same_report(found, expected)
            assert_same_checkpoint(found["save_dir"], expected["save_dir"])

    def test_hidden_states_spill_and_nothing_is_left(self, both: Both) -> None:
        assert both.spilled >= 4
        assert list((both.streamed.parent / "spill").iterdir()) == []
        assert {path.name for path in (both.streamed / "opt").iterdir()} == {
            path.name for path in (both.whole / "opt").iterdir()
        }

    def test_shards_load_everywhere(self, both: Both) -> None:
        folder = read_records(both.streamed)[1]["save_dir"]
        assert len(list(Path(folder).glob("model-*-of-*.safetensors"))) > 1
        assert (Path(folder) / "model.safetensors.index.json").exists()
        ids = torch.arange(5, 29).reshape(2, 12)
        expected = shrinkformer.load(read_records(both.whole)[1]["save_dir"]).eval()
        with torch.no_grad():
            for model in (
                shrinkformer.load(folder),
                AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
            ):
                torch.testing.assert_close(model.eval()(ids).logits, expected(ids).logits)

    def test_half_precision_stays_what_it_is(self, run: Callable[..., int], data_dir: Path) -> None:
        """Weights are rounded before they are measured, and nothing else is: rotary frequencies stay in float32."""
        half = build_model("llama").bfloat16()
        checkpoint(Path("half"), "llama")
        half.save_pretrained("half")
        for memory, place in (((), "whole"), (SMALL, "streamed")):
            arguments = ("--model_name", "half", "--mu", "0.5", "--save_dir", place, *memory)
            assert call(prune_opt.main, data_dir, *arguments) == 0
            assert {tensor.dtype for tensor in weights_in(place).values()} == {torch.bfloat16}
        whole, streamed = read_records(Path("output"), "half")
        assert_same_report(streamed, whole)
        assert_same_checkpoint("streamed", "whole", atol=0)

    def test_a_pruned_checkpoint_can_be_pruned_again(self, run: Callable[..., int]) -> None:
        assert run() == 0
        assert run("--model_name", "small", "--save_dir", "smaller") == 0
        assert read_plan("smaller").dense_macs == read_plan("small").macs
        assert read_plan("smaller").ratio <= 0.5

    @pytest.mark.parametrize("spill", [[], ["--offload_dir", "spill"]], ids=["below the reports", "own folder"])
    def test_opt_eval_needs_no_store(self, run: Callable[..., int], data_dir: Path, spill: list[str]) -> None:
        for memory in ([], SMALL):
            assert call(opt_eval.main, data_dir, "--model_name", "mine", *memory, *spill) == 0
        whole, streamed = read_records(Path("output"))
        assert streamed["dense"]["metrics"] == pytest.approx(whole["dense"]["metrics"], rel=1e-5)
        assert {path.name for path in Path("output/opt").iterdir()} == {"mine.txt", "mine.jsonl", "mine.html"}

    def test_what_needs_the_whole_model_is_refused_before_it_is_loaded(
        self,
        run: Callable[..., int],
        encoder_data: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.delattr(running, "load_model")
        monkeypatch.setattr(prune_opt, "harness_is_installed", lambda: True)
        encoder = encoder_command(Path(), encoder_data)
        capsys.readouterr()
        assert run("--lm_eval", "lambada_openai") == 2
        assert prune_bert.main([*encoder, *SMALL]) == 2
        assert run("--method", "shrink") == 2
        assert run("--method", "kprune") == 2
        first, second, third, fourth = capsys.readouterr().err.splitlines()
        assert third.startswith("prune_opt.py: error: --max_memory: --method shrink measures a model as a whole, which")
        assert third.endswith("allow more, or pass --method stat.")
        assert fourth == third.replace("--method shrink", "--method kprune")
        assert first.startswith("prune_opt.py: error: --max_memory: --lm_eval runs on the whole model, which takes")
        assert second.startswith("prune_bert.py: error: --max_memory: an encoder is evaluated as a whole, which takes")


class TestInterruptions:
    @pytest.mark.parametrize("block", range(3))
    def test_an_earlier_checkpoint_stays_and_no_half_written_one(
        self, run: Callable[..., int], block: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run() == 0
        before = {path: path.read_bytes() for path in Path("small").iterdir()}
        top = set(Path().iterdir())
        real = ShardWriter.add

        def full(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
            if f"layers.{block}.fc2" in name:
                raise OSError(28, "No space left on device")
            real(self, name, tensor)

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "add", full)
            capsys.readouterr()
            assert run("--seed", "1") == 1
        assert "No space left on device" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in Path("small").iterdir()} == before
        assert set(Path().iterdir()) == top
        assert len(read_records(Path("output"))) == 1
        assert [path.name for path in Path("spill").iterdir()] == ["mine-wikitext2.resume"]  # the calibration stays

    def test_without_an_earlier_checkpoint_there_is_none(
        self, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        top = set(Path().iterdir())
        monkeypatch.setattr(ShardWriter, "finish", interrupt)
        assert run() == 130
        assert {path.name for path in set(Path().iterdir()) - top} == {"output", "spill"}
        assert not list(Path("output").rglob("config.json"))

    def test_resume_takes_up_the_calibration(
        self, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--save_dir", "expected") == 0
        real, written = BlockStore.write, []

        def interrupted(self: BlockStore, block: int, moments: Mapping[str, Moments]) -> None:
            if block == 2 and 2 not in written:
                written.append(2)
                raise KeyboardInterrupt
            written.append(block)
            real(self, block, moments)

        monkeypatch.setattr(BlockStore, "write", interrupted)
        assert run() == 130
        assert "interrupted" in capsys.readouterr().err
        assert not Path("small").exists()
        assert [path.name for path in Path("spill").iterdir()] == ["mine-wikitext2.resume"]
        assert run("--resume") == 0
        assert written == [0, 1, 2, 2]
        assert_same_checkpoint("small", "expected")
        assert list(Path("spill").iterdir()) == []

    def test_without_resume_everything_is_done_anew(
        self, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(streamed, "complete", interrupt)
            assert run() == 130
        assert run() == 0
        assert "starting anew; --resume would take up" in capsys.readouterr().out


class TestPython:
    @pytest.mark.parametrize("family", DECODERS)
    def test_a_model_that_was_never_whole(self, family: str, tmp_path: Path, batches: list[dict[str, Any]]) -> None:
        model = build_model(family)
        model.save_pretrained(tmp_path / "dense")
        expected = prune_model(model, batches, mu=0.5, method="stat-bias")
        shrinkformer.save(expected.model, tmp_path / "expected", plan=expected.plan)

        lazy, weights = load_lazily(AutoModelForCausalLM, str(tmp_path / "dense"), dtype=torch.float32)
        store = BlockStore(tmp_path / "store", fingerprint(lazy) + examples_digest(batches))
        resources = Resources(weights, Offload(tmp_path / "spill", limit=0), store, ALONE)
        calibrated = calibrate(lazy, batches, resources=resources, method="stat-bias")
        assert calibrated.statistics is not None
        assert not calibrated.statistics.layers
        budget = Budget(0.5, expected.plan.sequence_length)
        plan, seconds = prune_to_folder(calibrated, budget, tmp_path / "small", dtype=torch.float32)
        assert plan == expected.plan
        assert seconds.keys() == {"allocation", "refit"}
        assert_same_checkpoint(tmp_path / "small", tmp_path / "expected")
        assert all(parameter.is_meta for view in layer_views(lazy) for parameter in view.block.parameters())
        assert list((tmp_path / "spill").iterdir()) == []

    def test_weights_are_stored_in_the_type_that_was_asked_for(
        self, tmp_path: Path, batches: list[dict[str, Any]]
    ) -> None:
        calibrated = calibrate(build_model("opt"), batches, method="stat-bias")
        prune_to_folder(calibrated, Budget(0.5, 12), tmp_path / "small", dtype=torch.bfloat16)
        assert {tensor.dtype for tensor in weights_in(tmp_path / "small").values()} == {torch.bfloat16}
        assert shrinkformer.load(tmp_path / "small").dtype == torch.bfloat16


class TestStream:
    @pytest.mark.parametrize("limit", [None, 0, 20_000], ids=["on the device", "on disk", "some of both"])
    @pytest.mark.parametrize("family", DECODERS)
    def test_outputs_are_those_of_the_model(self, family: str, limit: int | None, tmp_path: Path) -> None:
        model = build_model(family)
        batches = make_batches([7, 12, 3, 9, 20, 20, 20, 20], batch_size=2)
        stream = BlockStream(model, batches, None if limit is None else Offload(tmp_path, limit))
        for view in layer_views(model):
            stream.run(view.block)
        outputs = list(stream.outputs())
        assert len(outputs) == len(batches)
        with torch.no_grad():
            for output, batch in zip(outputs, batches, strict=True):
                assert output.logits.equal(outputs_of(model, batch).logits)  # its blocks are back

    @pytest.mark.parametrize("family", DECODERS)
    def test_perplexity_is_that_of_the_whole_model(self, family: str, tmp_path: Path) -> None:
        model = build_model(family)
        model.save_pretrained(tmp_path / "dense")
        windows = torch.randint(5, 45, (9, 20), generator=torch.Generator().manual_seed(0))
        expected = evaluate_perplexity(model, windows, batch_size=4)
        lazy, weights = load_lazily(AutoModelForCausalLM, str(tmp_path / "dense"), dtype=torch.float32)
        store = BlockStore(tmp_path / "store", "")
        resources = Resources(weights, Offload(tmp_path / "spill", limit=10_000), store)
        found = stream_perplexity(lazy, windows, resources, batch_size=2)
        assert (found.windows, found.tokens) == (9, 9 * 19)
        assert found.value == pytest.approx(expected.value, rel=1e-6)
        assert found.stderr == pytest.approx(expected.stderr, rel=1e-4)


def run_all(commands: Commands, folder: Path) -> None:
    """Call commands one after the other, with ``folder`` for their results."""
    for index, (main, arguments) in enumerate(commands):
        assert main([*arguments, "--output_dir", str(folder / str(index))]) == 0, arguments


def assert_same_results(found: Path, expected: Path) -> None:
    """The same files, one report and one checkpoint, and the same in them.

    Weights differ by more than in memory and streamed: moments are made of float32 products, which are rounded
    differently when the rows come in other pieces, and a refit multiplies that by the condition of the moments.
    """
    names = [{str(file.relative_to(folder)) for file in folder.rglob("*")} for folder in (found, expected)]
    assert names[0] == names[1]
    records = [
        [json.loads(line) for line in next(f.rglob("*.jsonl")).read_text().splitlines()] for f in (found, expected)
    ]
    assert [len(some) for some in records] == [1, 1]
    assert_same_report(records[0][0], records[1][0], rel=1e-4)
    assert_same_checkpoint(records[0][0]["save_dir"], records[1][0]["save_dir"], atol=1e-3)


def share_calibration(rank: int, size: int, port: int, folder: Path) -> None:
    """What each of several processes does, in float64, where the pieces that rows come in do not matter."""
    as_torchrun_does(rank, size, port)
    torch.set_num_threads(1)
    batches, budget = make_batches([3 + index % 18 for index in range(48)], batch_size=8), Budget(0.5, 12)
    with workers_of("cpu") as workers:
        for family in ("opt", "llama"):
            model = build_model(family).double()
            resources = Resources(workers=workers)
            alone = calibrate(model, batches, method="stat-bias").prune(budget)
            together = calibrate(model, batches, resources=resources, method="stat-bias").prune(budget)
            assert kept(together.plan) == kept(alone.plan)
            for found, expected in zip(together.model.parameters(), alone.model.parameters(), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            calibrated = calibrate(model, batches, resources=resources, method="stat-bias")
            prune_to_folder(calibrated, budget, folder / family, dtype=torch.float64)  # the main process writes
            workers.barrier()
            reloaded = shrinkformer.load(folder / family)
            assert all(map(torch.equal, reloaded.parameters(), together.model.parameters()))


def work_together(rank: int, size: int, ports: list[int], folder: Path, commands: Commands) -> None:
    """Everything that each of several processes does: starting them takes longer than all of it."""
    share_calibration(rank, size, ports[0], folder)
    for index, (port, command) in enumerate(zip(ports[1:], commands, strict=True)):
        as_torchrun_does(rank, size, port)
        run_all([command], folder / str(index))


class TestProcesses:
    def test_two_give_the_results_of_one(self, tmp_path: Path, data_dir: Path, encoder_data: Path) -> None:
        decoder = [*decoder_command(tmp_path, data_dir), *RANKED]
        encoder = [*encoder_command(tmp_path, encoder_data), *RANKED]
        commands: Commands = [
            (prune_opt.main, [*decoder, *SMALL]),
            (prune_opt.main, [*decoder, "--batch_size", "100"]),  # one batch: the other process has no share
            (prune_bert.main, encoder),
        ]
        run_all(commands, tmp_path / "one")
        ports = [free_port() for _ in range(1 + len(commands))]
        torch.multiprocessing.spawn(work_together, (2, ports, tmp_path / "two", commands), nprocs=2, daemon=True)
        for index in map(str, range(len(commands))):
            assert_same_results(tmp_path / "two" / index / "0", tmp_path / "one" / index)

    @pytest.mark.parametrize("script", ["prune_opt.py", pytest.param("prune_bert.py", marks=pytest.mark.slow)])
    def test_torchrun(self, script: str, tmp_path: Path, data_dir: Path, encoder_data: Path) -> None:
        main, arguments = prune_opt.main, decoder_command(tmp_path, data_dir)
        if script == "prune_bert.py":
            main, arguments = prune_bert.main, encoder_command(tmp_path, encoder_data)
        arguments.extend(RANKED)
        run_all([(main, arguments)], tmp_path / "one")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [*torchrun, str(ROOT / script), *arguments, "--output_dir", str(tmp_path / "two")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report: ") == 1
        assert_same_results(tmp_path / "two", tmp_path / "one/0")
