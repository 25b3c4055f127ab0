"""The text of a report: columns that stay apart whatever is in them, and headings that say what was done."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shrinkformer.commands.latency_report import Cell, Row, text_table
from shrinkformer.commands.report import Measured, Run
from shrinkformer.efficiency.latency import Timing
from shrinkformer.efficiency.macs import LayerSize
from shrinkformer.pictures.columns import aligned, figure, ratio
from shrinkformer.pictures.overview import overview, smallest_as_good
from shrinkformer.pictures.runs import Figures, RunRecord
from shrinkformer.prune.plan import LayerPlan, Plan
from shrinkformer.quantize.config import LayerReport, QuantizeConfig, Quantized


def measured(value: float, error: float = 0.01, **sizes: Any) -> Measured:
    return Measured(
        {"perplexity": value, "perplexity_stderr": error}, **{"macs": 2e6, "parameters": 3, "bytes": 4, **sizes}
    )


def a_plan(layers: int = 2, neurons: int = 40, error: float = 0.1) -> Plan:
    layer = LayerPlan(heads=(0, 1), neurons=tuple(range(neurons)), attention_error=error, ffn_error=error)
    return Plan("stat", 0.5, 0, 16.0, 200.0, 99.0, (layer,) * layers)


def a_run(**changes: Any) -> Run:
    run = Run(
        task_name="wikitext2",
        model_name="mine",
        method="stat",
        mu=0.5,
        seed=0,
        sample_batch_size=16,
        calibration_tokens=4_096,
        device="cpu",
        dense=measured(10.0),
        pruned=measured(11.0),
        plan=a_plan(),
        save_dir=Path("output/mine-mu0.5"),
        seconds={"total": 1.0},
        peak_memory_bytes=2**20,
    )
    return replace(run, **changes)


def cells(text: str, first: str) -> list[str]:
    """What stands in the columns of the row that begins with something; columns are two blanks apart or more."""
    row = next(line for line in text.splitlines() if line.strip().startswith(first))
    return re.split(r" {2,}", row.strip())


class TestColumns:
    @pytest.mark.parametrize(
        ("value", "error", "shown"),
        [
            (8204.5, 734.25, "8204.5000 ±734.2500"),
            (123456789.0, 98765432.1, "123456789.0000 ±98765432.1000"),
            (3.2e14, 1.0, "3.2e+14 ±1.0000"),
            (1e-7, 2e-9, "1e-07 ±2e-09"),
            (math.inf, math.nan, "infinite ±n/a"),
        ],
    )
    def test_figures_of_any_size_stand_apart(self, value: float, error: float, shown: str) -> None:
        text = a_run(dense=measured(value, error), pruned=measured(value, error)).table()
        assert cells(text, "perplexity")[:3] == ["perplexity", shown, shown]

    def test_long_names_of_metrics_and_many_columns(self) -> None:
        name = "perplexity_a_very_long_name_of_an_evaluation_file.jsonl"
        model = Measured(
            {name: 12345.6, f"{name}_stderr": 7.0}, 1.0, 1, 1, {"8x128": 1.0}, {"onnxruntime": {"8x128": 123456.7}}
        )
        run = a_run(dense=model, pruned=model, quantized=model)
        rows = [line for line in run.table().splitlines() if "±" in line or "onnxruntime" in line]
        assert cells(run.table(), name) == [name, *["12345.6000 ±7.0000"] * 3, "+0.0000"]
        assert len({len(row) for row in rows}) <= 2  # the last column ends with a digit or an x
        assert cells(run.table(), "onnxruntime")[1:] == ["123,456.70"] * 3 + ["1.000x"]

    def test_sizes_that_two_decimals_would_hide(self) -> None:
        text = a_run(dense=measured(1.0, macs=1_000.0), pruned=measured(1.0, macs=0.0)).table()
        assert cells(text, "MACs (M)") == ["MACs (M)", "0.001", "0.00", "0.000x"]
        assert cells(a_run(dense=measured(1.0, macs=0.0)).table(), "MACs (M)")[-1] == "n/a"

    def test_forty_layers_of_any_width(self) -> None:
        text = a_run(plan=a_plan(40, neurons=123_456)).table()
        start = text.splitlines().index(next(line for line in text.splitlines() if "attention error" in line))
        rows = text.splitlines()[start : start + 41]
        assert len({len(row) for row in rows}) == 1
        assert rows[-1].split() == ["39", "2", "123456", "0.1000", "0.1000"]

    def test_quantized_layers_with_long_names(self) -> None:
        name = "a_block.with.a_very.long_path_of_modules.that_ends_in.down_proj"
        layer = LayerReport(3, name, 1e-9, 12345.678, 0.01, (1.0, 0.5), 12345.6, 4, fitted=64)
        found = Quantized(
            {}, [layer, replace(layer, layer=None, name="embeddings")], QuantizeConfig(scale_dtype=torch.float16)
        )
        text = a_run(quantized=measured(1.0), quantization=found).table()
        assert cells(text, "3  ") == ["3", name, "4", "1e-09", "12345.6780", "1e-02", "1.00 0.50", "12345.60"]

    def test_latency_of_models_with_long_names(self) -> None:
        long = "a/very/long/path/to/a/checkpoint-500"
        timing = Timing(12345.678, 1.0, 99999.9, 7)
        row = Row((8, 128), "eager", "forward", (Cell("dense", timing, 1.0), Cell(long, timing, 1.0)))
        head, line = text_table([row]).splitlines()
        assert re.split(r" {2,}", head.strip())[3] == f"{long} (ms)"
        assert re.split(r" {2,}", line.strip())[2:] == ["12345.68 [1.00, 99999.90]"] * 2 + ["1.000x", "1.000x", "-"]

    def test_rows_may_end_early(self) -> None:
        assert aligned([["a", "bb"], ["ccc"]]) == ["a    bb", "ccc"]
        assert aligned([]) == []

    def test_words_in_place_of_figures(self) -> None:
        assert [figure(value) for value in (None, math.nan, -math.inf, 0.0)] == ["n/a", "n/a", "-infinite", "0.0000"]
        assert ratio(1.0, 0.0) == ratio(math.nan, 1.0) == "n/a"


class TestHeadings:
    @pytest.mark.parametrize("given", ["dense", "pruned", "quantized", "pruned and quantized"])
    def test_a_model_alone_is_called_what_it_is(self, given: str) -> None:
        run = a_run(pruned=None, plan=None, given=given, calibration_tokens=0, mu=1.0)
        assert cells(run.table(), given) == [given]
        assert "mine on wikitext2: not pruned (mu 1), seed 0, no calibration" in run.table()
        assert run.to_dict()["given"] == given

    def test_what_was_made_stands_beside_what_was_given(self) -> None:
        text = a_run(given="pruned").table()
        assert cells(text, "as given") == ["as given (pruned)", "pruned", "change"]

    def test_asked_and_done(self) -> None:
        run = a_run(calibration_inputs=15, facts={"pooling": "cls", "weights": "float32"})
        assert "mu 0.5 (0.4950 of the MACs kept), seed 0, 15 examples (4,096 tokens)" in run.table()
        assert "  pooling: cls; weights: float32" in run.table().splitlines()
        record = run.to_dict()
        assert (record["facts"], record["calibration_inputs"]) == ({"pooling": "cls", "weights": "float32"}, 15)

    def test_latency_of_decoded_weights_is_called_that(self) -> None:
        timed = measured(1.0, latency_ms={"1x8": 2.0})
        quantized = Quantized({}, [], QuantizeConfig())
        assert "decoded weights" in a_run(dense=timed, quantized=timed, quantization=quantized).table()
        assert "decoded weights" not in a_run(dense=timed, pruned=timed).table()


class TestChange:
    def test_in_text_and_record(self) -> None:
        few = {"deviations": {"perplexity": np.array([0.3, -0.3])}}
        run = a_run(
            dense=measured(10.0, 0.5, **few), pruned=measured(11.0, 0.5, deviations={"perplexity": np.zeros(2)})
        )
        assert cells(run.table(), "perplexity")[-1] == "+1.0000 ±0.4243"
        change = run.to_dict()["change"]
        assert change == {"pruned": {"perplexity": 1.0, "perplexity_stderr": pytest.approx(0.4243, abs=1e-4)}}

    def test_a_metric_that_only_the_pruned_model_has(self) -> None:
        run = a_run(pruned=Measured({"perplexity": 11.0, "divergence": 0.25}, 1.0, 1, 1))
        assert cells(run.table(), "divergence") == ["divergence", "n/a", "0.2500", "n/a"]


def a_record(mu: float, change: float, error: float, **more: Any) -> RunRecord:
    dense = {"metrics": {"accuracy": 0.8, "accuracy_stderr": 0.05}, "macs": 1e8, "parameters": 2e7, "bytes": 8e7}
    pruned = {key: value * mu for key, value in dense.items() if key != "metrics"}
    pruned["metrics"] = {"accuracy": 0.8 + change, "accuracy_stderr": 0.05}
    changes = {"change": {"pruned": {"accuracy": change, "accuracy_stderr": error}}} if error else {}
    found = RunRecord.of(
        {"dense": dense, "pruned": pruned, "method": "stat", "mu": mu, "task_name": "t", **changes, **more}
    )
    assert found is not None
    return found


class TestOverview:
    def test_the_smallest_within_one_standard_error_is_marked(self) -> None:
        runs = [a_record(0.7, -0.001, 0.002), a_record(0.5, -0.0015, 0.002), a_record(0.3, -0.02, 0.003)]
        text = overview(runs, ["accuracy"]).text
        assert next(line.split("  ")[1] for line in text.splitlines() if line.startswith("  * ")) == "* stat, mu 0.5"
        assert cells(text, "* stat")[1:] == ["0.7985 ± 0.0500", "-0.0015 ± 0.0020", "50.00", "10.00", "40.00"]
        assert "the smallest model whose accuracy is within one standard error" in text

    def test_perplexity_is_better_where_it_is_less(self) -> None:
        worse = replace(
            a_record(0.5, 0.0, 0.0),
            models={
                name: Figures({"perplexity": value}, {"perplexity": 1.0}, 1, 1, 1, {})
                for name, value in (("dense", 20.0), ("pruned", 25.0))
            },
        )
        better = replace(worse, models={**worse.models, "pruned": Figures({"perplexity": 19.0}, {}, 1, 1, 1, {})})
        assert (worse.is_as_good("perplexity"), better.is_as_good("perplexity")) == (False, True)
        assert "no perplexity is within one standard error" in overview([worse], ["perplexity"]).text

    def test_old_records_fall_back_to_the_error_of_the_dense_figure(self) -> None:
        assert smallest_as_good([a_record(0.7, -0.04, 0.0), a_record(0.5, -0.06, 0.0)]).fields["mu"] == 0.7  # type: ignore[union-attr]

    def test_runs_of_several_tasks_are_not_compared(self) -> None:
        runs = [a_record(0.7, 0.0, 0.1), a_record(0.5, 0.0, 0.1, task_name="other")]
        assert smallest_as_good(runs) is None


class TestErrorsThatSayNothing:
    DENSE = (LayerSize(4, 16, 100),) * 2

    @pytest.mark.parametrize(
        ("tokens", "shown"), [(100, ["0.1000", "0.1000"]), (99, ["0.1000", "n/a"]), (63, ["n/a", "n/a"])]
    )
    def test_of_fits_to_fewer_tokens_than_columns(self, tokens: int, shown: list[str]) -> None:
        run = a_run(dense_layers=self.DENSE, calibration_tokens=tokens)
        assert cells(run.table(), "0  ")[3:] == shown
        assert ("fewer tokens than columns" in run.table()) == ("n/a" in shown)
        row = run.to_dict()["layers"][0]
        assert [row[key] for key in ("attention_error", "ffn_error")] == [
            None if each == "n/a" else 0.1 for each in shown
        ]

    def test_methods_that_fit_nothing_measure_what_they_report(self) -> None:
        run = a_run(dense_layers=self.DENSE, calibration_tokens=3, plan=replace(a_plan(), method="magnitude"))
        assert "n/a" not in run.table()

    @pytest.mark.parametrize(
        ("fitted", "error", "of"), [(0, 0.1, "weights"), (64, 0.1, "outputs"), (5_000, None, "outputs")]
    )
    def test_of_quantized_layers(self, fitted: int, error: float | None, of: str) -> None:
        layer = LayerReport(0, "fc1", 0.1, 0.2, 0.01, (1.0,), 1.0, 4, fitted=fitted)
        run = a_run(quantized=measured(1.0), quantization=Quantized({}, [layer], QuantizeConfig(quantizer="gptq")))
        row = run.to_dict()["quantized_layers"][0]
        assert (row["error"], row["error_of"]) == (error, of)
        shown = cells(run.table(), "0  fc1")
        assert shown[3] == ("n/a" if error is None else "0.1000")
        assert (shown[5:7] == ["n/a", "n/a"]) == (fitted == 0)
        assert ("each layer's weights: no examples were looked at" in run.table()) == (fitted == 0)
