"""Tables of runs: what charts show, in figures."""

import math
from collections.abc import Sequence
from typing import Any

from shrinkformer.pictures.charts import DENSE, NOTHING, PRUNED, QUANTIZED, shown, tokens
from shrinkformer.pictures.layers import has_narrow_heads
from shrinkformer.pictures.overview import overview
from shrinkformer.pictures.page import folded, lead, table
from shrinkformer.pictures.runs import DECODED, RunRecord, change_in_words, number, section_of, share, with_error


def figure_table(run: RunRecord) -> str:
    """Figures of all models of a run."""
    models = run.models
    dense = models[DENSE]
    rows: list[list[str]] = []
    for name in run.metrics:
        cells = [with_error(model, name) for model in models.values()]
        rows.append([name, *cells, change_in_words(run, name)])
    sizes = {
        "MACs (M)": [model.macs / 1e6 for model in models.values()],
        "parameters (M)": [model.parameters / 1e6 for model in models.values()],
        "file size (MB)": [model.bytes / 1e6 for model in models.values()],
    }
    for shape in dense.latency_ms:
        sizes[f"latency {shape} (ms)"] = [model.latency_ms.get(shape, NOTHING) for model in models.values()]
    for name, values in sizes.items():
        rows.append([name, *(shown(value, ",.2f") for value in values), share(values[-1], values[0])])
    if len(models) == 1:
        rows = [row[:-1] for row in rows]
    heads = [run.heading(role) for role in models]
    figures = table(["", *heads, *(["change"] if len(models) > 1 else [])], rows, "figures of the newest run")
    decoded = QUANTIZED in models and any(model.latency_ms for model in models.values())
    return figures + (lead(DECODED) if decoded else "")


def layer_table(run: RunRecord) -> str:
    """What each block kept."""
    if not run.layers:
        return ""
    narrow = has_narrow_heads(run.layers, run.dense_layers)
    keys = ["heads", *(["query_width", "value_width"] if narrow else []), "neurons"]
    dense = run.dense_layers if len(run.dense_layers) == len(run.layers) else [{} for _ in run.layers]
    rows = []
    for index, (row, full) in enumerate(zip(run.layers, dense, strict=True)):
        sizes = [_of(number(row.get(key)) or number(full.get(key)), number(full.get(key))) for key in keys]
        errors = [shown(number(row.get(key)), ".4f") for key in ("attention_error", "ffn_error")]
        rows.append([row.get("layer", index), *sizes, *errors])
    titles = {"query_width": "queries, keys", "value_width": "values"}
    names = ["layer", *(titles.get(key, key) for key in keys), "attention error", "feed-forward error"]
    return folded("The same as a table", table(names, rows, "what each layer kept"))


def _of(value: float, full: float) -> str:
    return shown(value, ",.0f") + (f" of {full:,.0f}" if math.isfinite(full) else "")


def code_table(run: RunRecord) -> str:
    """Every quantized linear layer."""
    rows: list[list[Any]] = [
        [
            "" if row.get("layer") is None else row["layer"],
            row.get("name", ""),
            shown(number(row.get("bits")), ".0f"),
            *(shown(number(row.get(key)), ".4f") for key in ("error", "nearest_error")),
        ]
        for row in run.quantized_layers
    ]
    names = ["layer", "name", "bits", "error", "rounding to nearest"]
    return folded("Every linear layer", table(names, rows, "quantized layers"))


def run_table(runs: Sequence[RunRecord]) -> str:
    """All runs, newest first, and which of them is the smallest that is as good as the dense model."""
    found = overview(runs, runs[-1].metrics, with_time=True)
    dense, *others = found.rows
    return table(found.titles, [dense, *reversed(others)], "all runs, newest first") + lead(found.note)


def provenance(run: RunRecord) -> list[tuple[str, object]]:
    """How a run can be repeated."""
    versions = run.fields.get("versions")
    divergence = run.fields.get("held_out_divergence")
    memory = number(run.fields.get("peak_memory_bytes"))
    rows: list[tuple[str, object]] = [
        ("command", run.word("command")),
        ("time", run.moment),
        ("calibration", _calibration(run)),
        ("seed", run.word("seed")),
        ("device", run.word("device")),
        ("saved to", run.word("save_dir")),
        (
            "MACs counted at",
            tokens(number(run.fields.get("sequence_length"))) if PRUNED in run.models else "",
        ),
        ("peak memory", f"{memory / 2**20:,.0f} MiB" if math.isfinite(memory) else ""),
        *((str(name), str(words)) for name, words in section_of(run.fields, "facts").items()),
        ("divergence from dense on held-out examples", _pairs(divergence, " ")),
        ("versions", _pairs(versions, " ")),
    ]
    return [(name, value) for name, value in rows if value]


def _calibration(run: RunRecord) -> str:
    """What was used; records of earlier versions tell only how many examples were asked for."""
    inputs, tokens = (shown(number(run.fields.get(f"calibration_{name}")), ",.0f") for name in ("inputs", "tokens"))
    if number(run.fields.get("calibration_tokens")) == 0:
        return "none was used"
    used = inputs if "calibration_inputs" in run.fields else run.word("sample_batch_size")
    return f"{used} examples, {tokens} tokens"


def _pairs(section: Any, between: str) -> str:
    if not isinstance(section, dict):
        return ""
    return ", ".join(
        f"{name}{between}{value if not isinstance(value, float) else shown(number(value), '.4f')}"
        for name, value in section.items()
    )
