"""``shrinkformer latency``: what is timed, what the figures mean, and what bad input says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shrinkformer.architectures import layer_views
from shrinkformer.commands import latency as command
from shrinkformer.commands.latency_report import Cell, Row, append_records, markdown_table, text_table
from shrinkformer.commands.main import main
from shrinkformer.commands.runtimes import CachedStep, CompiledModel, find_onnx, require_compiler
from shrinkformer.efficiency import latency
from shrinkformer.efficiency.latency import Timing, compare_latency
from shrinkformer.efficiency.macs import count_matmul_macs, step_macs
from shrinkformer.errors import InputError, ShrinkformerError
from shrinkformer.prune.budget import layer_sizes
from shrinkformer.prune.checkpoint import save
from shrinkformer.prune.pruner import prune_model
from tests.conftest import build_model, build_tokenizer, make_batches

CPU = torch.device("cpu")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A dense model and the same model pruned to half its MACs at 13 tokens."""
    dense = build_model(num_hidden_layers=2)
    dense.save_pretrained(tmp_path / "dense")
    build_tokenizer().save_pretrained(tmp_path / "dense")
    calibration = make_batches([3 + index % 18 for index in range(48)], batch_size=8)
    pruned = prune_model(dense, calibration, mu=0.5, sequence_length=13, method="stat")
    save(pruned.model, tmp_path / "pruned", plan=pruned.plan)
    return tmp_path / "dense", tmp_path / "pruned"


def tokens(examples: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(examples * length).reshape(examples, length) % 40
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cell(model: str, milliseconds: float, macs: float) -> Cell:
    return Cell(model, Timing(milliseconds, milliseconds - 1, milliseconds + 1, 3), macs)


class TestTiming:
    def test_runtimes_take_turns_and_the_spread_is_that_of_the_quartiles(self, monkeypatch: Any) -> None:
        calls: list[tuple[str, int]] = []
        clock = iter(
            value for seconds in (50, 60, 1, 10, 2, 20, 3, 30, 4, 40, 5, 50) for value in (100.0, 100.0 + seconds)
        )
        monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
        models = {name: lambda batch, name=name: calls.append((name, id(batch))) for name in "ab"}
        found = compare_latency(models, [(2, 3)], vocabulary_size=7, repeats=5, warmup=1)
        assert [name for name, _ in calls] == ["a", "b"] * 6
        assert len({batch for _, batch in calls}) == 1
        assert found["a"][2, 3] == Timing(3000.0, 2000.0, 4000.0, 5)
        assert found["b"][2, 3] == Timing(30000.0, 20000.0, 40000.0, 5)

    def test_accelerators_are_waited_for_on_both_sides(self, monkeypatch: Any) -> None:
        events: list[object] = []
        monkeypatch.setattr(latency.torch.cuda, "synchronize", events.append)
        device = torch.device("cuda", 1)
        latency.time_in_turns({"a": lambda: events.append("a")}, device, repeats=2, warmup=0)
        assert events == [device, "a", device] * 2


class TestStep:
    @pytest.mark.parametrize("family", ["opt", "llama"])
    def test_macs_are_those_of_the_real_products(self, family: str) -> None:
        dense = build_model(family)
        calibration = make_batches([3 + index % 18 for index in range(48)], batch_size=8)
        pruned = prune_model(dense, calibration, mu=0.5, sequence_length=13, method="stat").model
        for model in (dense, pruned):
            with torch.inference_mode():
                cache = model(**tokens(2, 9)).past_key_values
            batch = {"input_ids": torch.ones(2, 1, dtype=torch.long), "attention_mask": torch.ones(2, 10)}
            counted = count_matmul_macs(model, {**batch, "past_key_values": cache})
            assert counted == 2 * step_macs(layer_sizes(layer_views(model)), 32, context=10)

    def test_steps_continue_the_prompt(self) -> None:
        model = build_model("opt")
        batch = tokens(2, 6)
        step: Any = CachedStep(model)
        with torch.inference_mode():
            found = [step(batch).logits for _ in range(3)]
            again = torch.cat([batch["input_ids"], batch["input_ids"][:, -1:].repeat(1, 3)], dim=1)
            whole = model(input_ids=again).logits
            for number, logits in enumerate(found):
                torch.testing.assert_close(logits, whole[:, 6 + number : 7 + number])
            other = tokens(1, 4)
            assert step(other).logits.shape[0] == 1
            expected = model(input_ids=torch.cat([other["input_ids"], other["input_ids"][:, -1:]], dim=1)).logits
            torch.testing.assert_close(step(tokens(1, 4)).logits, expected[:, -1:])


class TestCompile:
    def test_every_shape_of_every_model_is_compiled_and_none_falls_back(self) -> None:
        """Dynamo keeps compiled code by function, which models of one class share, and gives up after eight."""
        graphs: list[object] = []

        def counting(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        models = [build_model(num_hidden_layers=1), build_model(num_hidden_layers=1, intermediate_size=40)]
        compiled = [CompiledModel(model, backend=counting) for model in models]  # type: ignore[arg-type]
        with torch.inference_mode():
            for length in range(2, 7):
                for own, model in zip(compiled, models, strict=True):
                    found: Any = own(tokens(1, length))
                    torch.testing.assert_close(found.logits, model(**tokens(1, length)).logits)
            assert len(graphs) == 10
            compiled[0](tokens(1, 2))
            assert len(graphs) == 10

    def test_without_a_compiler(self, folders: tuple[Path, Path], capsys: Any, monkeypatch: Any) -> None:
        import torch._inductor.config as inductor

        torch._dynamo.reset()
        monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("a model was loaded"))
        with inductor.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
            assert main(["latency", str(folders[0]), "--runtime", "compile", "--length", "8"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "--runtime compile: torch.compile does not work here (No working C++ compiler found" in error

    def test_what_a_compiler_says_is_one_line(self) -> None:
        def failing(graph: Any, inputs: Any) -> Any:
            raise RuntimeError("\nno such instruction\nand a long story")

        torch._dynamo.reset()
        with pytest.raises(InputError, match=r"does not work here \(no such instruction\); install") as caught:
            require_compiler("cpu", backend=failing)  # type: ignore[arg-type]
        assert "story" not in str(caught.value)
        model = build_model(num_hidden_layers=1)
        with pytest.raises(ShrinkformerError, match="fails on BertForSequenceClassification: no such instruction"):
            CompiledModel(model, backend=failing)(tokens(1, 4))  # type: ignore[arg-type]


class TestTable:
    ROWS = (
        Row((8, 32), "eager", "forward", (cell("dense", 10, 100), cell("half", 6, 50), cell("same", 12, 100))),
        Row((8, 32), "eager", "decode", (cell("dense", 4, 10), cell("half", 2, 5), cell("same", 4, 10))),
    )

    def test_share_of_the_saving_that_arrives(self) -> None:
        first, half, same = self.ROWS[0].cells
        assert half.reached(first) == pytest.approx(0.4 / 0.5)
        assert same.reached(first) is None
        assert cell("slower", 11, 50).reached(first) == pytest.approx(-0.2)

    def test_columns(self) -> None:
        lines = text_table(self.ROWS).splitlines()
        assert len({len(line) for line in lines}) == 1
        assert lines[0].split("  ")[-1] == "reached"
        one, two, three = (
            "10.00 [9.00, 11.00]",
            "6.00 [5.00, 7.00] 0.600x 0.500x 80%",
            "12.00 [11.00, 13.00] 1.200x 1.000x -",
        )
        assert " ".join(lines[1].split()) == f"8x32 eager {one} {two} {three}"
        assert lines[2].split()[:2] == ["8x32", "+1"]
        table = [line.strip("|").split("|") for line in markdown_table(self.ROWS).splitlines()]
        assert [len(row) for row in table] == [11] * 4
        assert table[2][5].strip() == "0.500x"

    def test_records_are_appended(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "latency.jsonl"
        for row in self.ROWS:
            append_records(path, row.records({"threads": 1}, {"dense": "d", "half": "h", "same": "s"}))
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [record["step"] for record in records] == ["forward"] * 3 + ["decode"] * 3
        assert records[1]["ratio"] == {"to": "dense", "latency": 0.6, "macs": 0.5, "reached": pytest.approx(0.8)}
        assert records[1]["latency_ms"] == {"median": 6, "lower": 5, "upper": 7, "repeats": 3}
        assert (records[1]["location"], records[1]["threads"]) == ("h", 1)


class TestCommand:
    def test_dense_and_pruned_in_two_runtimes(self, folders: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
        before, output = torch.get_num_threads(), tmp_path / "latency.jsonl"
        flags = [
            "--batch",
            "1",
            "2",
            "--length",
            "13",
            "--repeats",
            "2",
            "--threads",
            "1",
            "--runtime",
            "eager",
            "onnx",
        ]
        assert main(["latency", *map(str, folders), *flags, "--output", str(output), "--markdown"]) == 0
        assert torch.get_num_threads() == before
        records = [json.loads(line) for line in output.read_text().splitlines()]
        keys = [(record["batch"], record["runtime"], record["model"]) for record in records]
        assert keys == [(b, r, m) for b in (1, 2) for r in ("eager", "onnx") for m in ("dense", "pruned")]
        dense = build_model(num_hidden_layers=2)
        for record in records:
            assert record["latency_ms"]["lower"] <= record["latency_ms"]["median"] <= record["latency_ms"]["upper"]
            if record["model"] == "dense":
                assert record["macs"] == count_matmul_macs(dense, tokens(record["batch"], 13))
                assert record["ratio"]["reached"] is None
            else:
                assert 0.45 < record["ratio"]["macs"] <= 0.5
                expected = (1 - record["ratio"]["latency"]) / (1 - record["ratio"]["macs"])
                assert record["ratio"]["reached"] == pytest.approx(expected)
        shown = capsys.readouterr().out
        assert "| 2x13 | onnx |" in shown
        assert "cpu, 1 thread, medians" in shown
        assert "exporting pruned as ONNX" in shown

    def test_a_folder_with_nothing_but_onnx(self, tmp_path: Path, capsys: Any) -> None:
        from shrinkformer.export.onnx_export import export_onnx

        model, folder = build_model(num_hidden_layers=1), tmp_path / "packed"
        model.config.save_pretrained(folder)
        export_onnx(model, folder / "onnx" / "model.onnx", tokens(2, 8))
        assert find_onnx(folder) == folder / "onnx" / "model.onnx"
        flags = ["--batch", "2", "--length", "5", "--repeats", "1"]
        assert main(["latency", str(folder), *flags, "--runtime", "onnx"]) == 0
        shown = capsys.readouterr()
        assert "2x5" in shown.out
        assert "exporting" not in shown.out
        assert main(["latency", str(folder), *flags]) == 2
        assert "it holds no weights that torch loads; use --runtime onnx alone." in capsys.readouterr().err

    def test_decoding(self, tmp_path: Path, capsys: Any) -> None:
        build_model("opt").save_pretrained(tmp_path / "a" / "opt")
        build_model("opt", intermediate_size=32).save_pretrained(tmp_path / "b" / "opt")
        flags = ["--batch", "1", "--length", "8", "--repeats", "3", "--decode", "--output", str(tmp_path / "out.jsonl")]
        assert main(["latency", str(tmp_path / "a" / "opt"), str(tmp_path / "b" / "opt"), *flags]) == 0
        records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [(one["step"], one["model"]) for one in records] == [
            (step, model) for step in ("forward", "decode") for model in ("a/opt", "b/opt")
        ]
        sizes = layer_sizes(layer_views(build_model("opt")))
        assert records[2]["macs"] == step_macs(sizes, 32, context=8 + 2 + 2)  # two to warm up, the second of three
        assert "1x8 +1" in capsys.readouterr().out

    def test_a_pruned_model_alone(self, folders: tuple[Path, Path], capsys: Any) -> None:
        assert main(["latency", str(folders[1]), "--batch", "1", "--length", "4", "--repeats", "1"]) == 0
        assert "Pass the dense model too, before pruned, for ratios" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (["--batch", "0"], "--batch 0: must be at least 1"),
            (["--length", "8", "-3"], "--length -3: must be at least 1"),
            (["--length", "81"], "--length 81: {dense} takes at most 80 tokens"),
            (["--length", "8", "--repeats", "0"], "--repeats 0: must be at least 1"),
            (["--threads", "0"], "--threads 0: must be at least 1"),
            (["--seed", "-1"], "--seed -1: must not be negative"),
            (["--runtime", "eager", "tensorrt"], "--runtime 'tensorrt': choose among eager, compile, onnx"),
            (["--dtype", "int8"], "--dtype 'int8': choose one of"),
            (["--runtime", "onnx", "--dtype", "bfloat16"], "--dtype bfloat16: --runtime onnx computes in float32"),
            (["--runtime", "onnx", "--decode"], "--decode: only the runtime eager decodes"),
            (["--length", "8", "--decode"], "--decode: {dense} is no language model"),
            (["--length", "70", "--decode"], "--length 70 and 17 decoding steps: {dense} takes at most 80 tokens"),
            (["--device", "abacus"], "--device 'abacus': not a device"),
            (["--output", "{dense}"], "--output {dense}: it is a folder"),
            (["--length", "many"], "--length 'many': give a whole number"),
            (["--length", "8", "no/such/model"], "--length 'no/such/model': give a whole number; a model"),
        ],
    )
    def test_wrong_input_is_one_line(
        self, model_folder: Path, flags: list[str], expected: str, capsys: Any, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("a model was loaded"))
        given = [flag.format(dense=model_folder) for flag in flags]
        assert main(["latency", str(model_folder), *given]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert expected.format(dense=model_folder) in error

    def test_no_model(self, capsys: Any) -> None:
        assert main(["latency", "no/such/model"]) == 2
        assert "DIR no/such/model: not in models/no/such/model" in capsys.readouterr().err
        assert main(["latency"]) == 2
        assert "required: MODEL" in capsys.readouterr().err
