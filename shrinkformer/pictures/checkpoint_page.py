"""The page of a checkpoint: its sizes, costs and bytes, layer by layer."""

from collections.abc import Mapping
from typing import Any

from shrinkformer.pictures.charts import DENSE, PRUNED, QUANTIZED, BarChart, Chart, Series, shown, tokens
from shrinkformer.pictures.layers import code_charts, error_chart, has_narrow_heads, layer_names, size_charts
from shrinkformer.pictures.page import code, facts, figures, folded, lead, page, section, table, tiles
from shrinkformer.pictures.runs import number, share

Facts = Mapping[str, Any]
"""What ``shrinkformer inspect --json`` prints."""


def checkpoint_page(found: Facts) -> str:
    """The HTML page of a checkpoint."""
    charts = checkpoint_charts(found)
    quantization = found["quantization"] or {}
    bits = table(
        ["layer", "name", "bits"],
        (
            ["" if row["layer"] is None else row["layer"], row["name"], row["bits"]]
            for row in quantization.get("layers", ())
        ),
        "bits of every quantized layer",
    )
    return page(
        str(found["name"]),
        [
            lead(f"{found['architecture']} ({found['model_type']}), {role_in_words(found)}."),
            tiles(_headline(found)),
            section("Sizes by layer", figures(charts["sizes"])),
            section("Costs by layer", figures(charts["costs"])),
            section("Weights", figures(charts["weights"]), folded("Every quantized layer", bits)),
            section("Every layer", layer_table(found)),
            section("How to load it", code("\n".join(found["loading"]))),
            section("What is known", facts(provenance(found))),
        ],
    )


def role_of(found: Facts) -> str:
    """What kind of model it is, for its colour."""
    if found["quantization"]:
        return QUANTIZED
    return PRUNED if found["dense"] or found["plan"] else DENSE


def role_in_words(found: Facts) -> str:
    """What was done to a model."""
    method = (found["quantization"] or {}).get("method")
    pruned = "pruned" if found["dense"] or found["plan"] else ""
    done = (pruned, f"quantized ({method})" if method else "")
    return " and ".join(filter(None, done)) or "neither pruned nor quantized"


def checkpoint_charts(found: Facts) -> dict[str, list[Chart]]:
    """Charts of a checkpoint, by part of the page."""
    rows = found["layers"]
    names = layer_names(rows)
    role = role_of(found)
    dense = found["dense"]["layers"] if found["dense"] else []
    costs: list[Chart] = [
        BarChart(
            "MACs by layer",
            f"MACs (M) at {tokens(found['sequence_length'])}",
            names,
            (
                Series("attention", PRUNED, tuple(number(row["attention_macs"]) / 1e6 for row in rows)),
                Series("feed-forward", "third", tuple(number(row["ffn_macs"]) / 1e6 for row in rows)),
            ),
            form=",.2f",
            category_axis="layer",
        ),
        BarChart(
            "Bytes by layer",
            "MB in the weight files",
            names,
            (Series("MB", role, tuple(number(row["bytes"]) / 1e6 for row in rows)),),
            form=",.2f",
            category_axis="layer",
        ),
    ]
    kinds = found["bytes_by_dtype"]
    stored = BarChart(
        "Bytes by type",
        "MB",
        tuple(kinds),
        (Series("MB", role, tuple(size / 1e6 for size in kinds.values())),),
        form=",.2f",
    )
    weights: list[Chart] = [stored]
    quantized = (found["quantization"] or {}).get("layers")
    if quantized:
        weights.insert(0, code_charts(quantized)[0])
    errors = [error_chart(found["plan"]["layers"])] if found["plan"] and any_errors(found["plan"]["layers"]) else []
    return {
        "sizes": [*size_charts(rows, dense, PRUNED if dense else role), *errors],
        "costs": costs,
        "weights": weights,
    }


def any_errors(rows: list[dict[str, Any]]) -> bool:
    """Whether a plan knows the errors of its blocks."""
    return any(number(row["attention_error"]) or number(row["ffn_error"]) for row in rows)


def _headline(found: Facts) -> list[tuple[str, str, str]]:
    dense = found["dense"] or {}

    def of(value: float, before: float | None, unit: str) -> str:
        return f"{share(value, before)} of dense {before / 1e6:,.1f} {unit}" if before else unit

    plan = found["plan"] or {}
    macs = dense.get("macs") or (
        plan.get("dense_macs") if plan.get("sequence_length") == found["sequence_length"] else None
    )
    rows = [
        ("parameters", f"{found['parameters'] / 1e6:,.1f} M", of(found["parameters"], dense.get("parameters"), "M")),
        ("MACs", f"{found['macs'] / 1e6:,.1f} M", of(found["macs"], macs, "M")),
        (
            "on disk",
            f"{found['bytes'] / 1e6:,.1f} MB" if found["files"] else "n/a",
            "weight files" if len(found["files"]) > 1 else "one weight file",
        ),
    ]
    if found["quantization"]:
        bits = found["quantization"]["bits"]
        rows.append(
            (
                "bits",
                " to ".join(map(str, sorted({min(bits), max(bits)}))) if bits else "n/a",
                found["quantization"]["method"],
            )
        )
    return [(what, figure, "" if remark == "M" else remark) for what, figure, remark in rows]


def layer_table(found: Facts) -> str:
    """Sizes, costs and bytes of each layer."""
    titles, rows = layer_rows(found)
    return table(titles, rows, "every layer")


def layer_rows(found: Facts) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table of layers, for pages and for the terminal."""
    dense = found["dense"]["layers"] if found["dense"] else [{} for _ in found["layers"]]
    narrow = has_narrow_heads(found["layers"], found["dense"]["layers"] if found["dense"] else [])
    widths = ["query_width", "value_width"] if narrow else ["value_width"]
    titles = [
        "layer",
        "heads",
        *(["q, k width", "v width"] if narrow else ["width"]),
        "neurons",
        "attention MACs (M)",
        "FFN MACs (M)",
        "MB",
        "bits",
    ]
    rows = []
    for row, full in zip(found["layers"], dense, strict=True):
        sizes = [
            shown(number(row[key]), ",.0f") + (f" of {full[key]:,}" if full else "")
            for key in ("heads", *widths, "neurons")
        ]
        bits = ", ".join(map(str, row["bits"]))
        costs = [f"{row[key] / 1e6:,.2f}" for key in ("attention_macs", "ffn_macs")]
        rows.append([str(row["layer"]), *sizes, *costs, shown(number(row["bytes"]) / 1e6, ",.2f"), bits])
    if not any(row["bits"] for row in found["layers"]):
        titles, rows = titles[:-1], [row[:-1] for row in rows]
    return titles, rows


def provenance(found: Facts) -> list[tuple[str, object]]:
    """Names and words for everything that is no figure of a layer."""
    plan = found["plan"]
    files = [f"{file['name']} ({file['bytes'] / 1e6:,.1f} MB)" for file in found["files"][:6]]
    more = [f"and {len(found['files']) - 6} more"] if len(found["files"]) > 6 else []
    rows: list[tuple[str, object]] = [
        ("place", found["location"]),
        ("files", ", ".join(files + more) or "no weights on this machine"),
        (
            "types in the files",
            ", ".join(f"{kind} {size / 1e6:,.2f} MB" for kind, size in found["bytes_by_dtype"].items()),
        ),
        ("hidden size", found["hidden_size"]),
    ]
    if plan:
        rows += [
            ("plan", f"method {plan['method']}, mu {plan['mu']:.4g} of {plan['budget']}, seed {plan['seed']}"),
            ("MACs kept", f"{plan['ratio']:.4f} at {tokens(plan['sequence_length'])}"),
            (
                "divergence from dense on held-out examples",
                ", ".join(f"{name} {value:.4f}" for name, value in plan["held_out_divergence"].items()),
            ),
        ]
    rows.append(("written by", ", ".join(f"{name} {version}" for name, version in found["written_by"].items())))
    return [(name, value) for name, value in rows if value]
