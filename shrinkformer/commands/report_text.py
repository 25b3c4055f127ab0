"""A run in words: the block of text that is printed and appended to the report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from shrinkformer.evaluate.paired import STDERR, names_of
from shrinkformer.pictures.columns import aligned, exact, figure, ratio
from shrinkformer.pictures.runs import DECODED, heading
from shrinkformer.prune.plan import Plan
from shrinkformer.quantize.config import LayerReport, Quantized

if TYPE_CHECKING:
    from shrinkformer.commands.report import Measured, Run

FEW_TOKENS = "n/a: fitted to fewer tokens than columns, so the error on them says nothing"

_SIZES = (("macs", "MACs (M)", 1e6), ("parameters", "parameters (M)", 1e6), ("bytes", "file size (MB)", 1e6))


def text_of(run: "Run") -> str:
    """Title, figures of all models side by side, what each layer kept or became, and what it took."""
    lines = [_title(run), "", *_indented(aligned(_figure_rows(run)))]
    if run.quantized is not None and run.dense.latency_ms:
        lines.append(f"  {DECODED}")
    if run.plan is not None:
        lines += ["", *_plan_lines(run.plan, run.errors)]
    if run.quantization is not None:
        lines += ["", *_quantized_lines(run.quantization, run.calibration_tokens)]
    if run.rounding is not None:
        lines += ["", f"  neurons are multiples of {run.rounding}"]
    lines.append("")
    if run.save_dir:
        lines.append(f"  saved to {run.save_dir}")
    if run.facts:
        lines.append("  " + "; ".join(f"{name}: {words}" for name, words in run.facts.items()))
    spent = ", ".join(f"{name} {value:.1f}" for name, value in run.seconds.items())
    lines.append(f"  seconds: {spent}; peak memory {run.peak_memory_bytes / 2**20:,.0f} MiB")
    return "\n".join(lines)


def _title(run: "Run") -> str:
    """What was done to which model: nothing that was only asked for."""
    target = "" if run.target_ratio is None else f"target ratio {run.target_ratio:g}, "
    if run.plan is None:
        pruned = f"not pruned (mu {mu_in_words(run)})"
    else:
        pruned = f"method {run.method}, mu {mu_in_words(run)} ({run.plan.ratio:.4f} of the MACs kept)"
    return f"{run.model_name} on {run.task_name}: {target}{pruned}, seed {run.seed}, {calibration_of(run)}"


def mu_in_words(run: "Run") -> str:
    """What was asked for; the long fraction that a target ratio led to in short."""
    return exact(run.mu) if run.target_ratio is None else f"{run.mu:.4g}"


def calibration_of(run: "Run") -> str:
    """What was used, which may be less than was asked for."""
    if not run.calibration_tokens:
        return "no calibration"
    return f"{run.calibration_inputs:,} examples ({run.calibration_tokens:,} tokens)"


def _figure_rows(run: "Run") -> list[list[str]]:
    """Metrics, sizes and times, one column for each model, and how the last differs from the first."""
    models = run.models
    several = len(models) > 1
    heads = [heading(role, run.given, several=several) for role in models]
    rows = [["", *heads, *(["change"] if several else [])]]
    measured = list(models.values())
    changes = measured[-1].change_from(run.dense)
    for name in names_of({name: None for some in measured for name in some.metrics}):
        row = [name, *(with_error(some.metrics, name) for some in measured)]
        rows.append([*row, *([with_error(changes, name, "+")] if several else [])])
    for label, values, scale in _sizes(measured):
        row = [label, *(figure(value / scale, 2, ",") for value in values)]
        rows.append([*row, *([ratio(values[-1], values[0])] if several else [])])
    return rows


def _sizes(models: "Sequence[Measured]") -> Iterator[tuple[str, list[float], float]]:
    """Label, values of all models and unit of what is compared as a ratio."""
    for name, label, scale in _SIZES:
        yield label, [getattr(some, name) for some in models], scale
    for shape in models[0].latency_ms:
        yield f"latency {shape} (ms)", [some.latency_ms.get(shape, float("nan")) for some in models], 1.0
    for runtime, times in models[0].runtimes.items():
        for shape in times:
            found = [some.runtimes.get(runtime, {}).get(shape, float("nan")) for some in models]
            yield f"{runtime} {shape} (ms)", found, 1.0


def with_error(metrics: Mapping[str, float], name: str, sign: str = "", between: str = " ±") -> str:
    """A metric, or its change, and its standard error where there is one."""
    error = metrics.get(f"{name}{STDERR}")
    return figure(metrics.get(name), sign=sign) + ("" if error is None else f"{between}{figure(error)}")


def _plan_lines(plan: Plan, known: Sequence[tuple[float | None, float | None]]) -> list[str]:
    """What each block keeps; the widths of queries and keys, and of values, where some became narrower."""
    narrow = any(layer.value_width for layer in plan.layers)
    titles = ["q, k", "v"] if narrow else []
    rows: list[list[object]] = [["layer", "heads", *titles, "neurons", "attention error", "ffn error"]]
    for index, layer in enumerate(plan.layers):
        widths = [layer.query_width or "", layer.value_width or ""] if narrow else []
        errors = [figure(error) for error in known[index]]
        rows.append([index, len(layer.heads), *widths, len(layer.neurons), *errors])
    lines = _indented(aligned(rows, left=()))
    if any(None in errors for errors in known):
        lines.append(f"  {FEW_TOKENS}")
    if plan.prediction:
        predicted, measured = plan.prediction["predicted"], plan.prediction["measured"]
        lines.append(f"  divergence on examples set aside {measured:.5f}; predicted {predicted:.5f}")
    if plan.uniform:
        own, free = plan.uniform["divergence"], plan.uniform["free_divergence"]
        lines.append(f"  blocks are all alike: expected divergence {own:.5f}; {free:.5f} if each had a size of its own")
    return lines


def _quantized_lines(found: Quantized, tokens: int) -> list[str]:
    """What each layer became; damping and trust belong to fits."""
    rows: list[list[object]] = [["layer", "name", "bits", "error", "nearest", "damping", "trust", "seconds"]]
    for row in found.layers:
        trust = " ".join(f"{share:.2f}" for share in row.trust) if row.fitted else "n/a"
        errors = [figure(error) for error in row.known_errors(tokens)]
        damping = f"{row.damping:.0e}" if row.fitted else "n/a"
        number = "" if row.layer is None else row.layer
        rows.append([number, row.name, row.bits, *errors, damping, trust, f"{row.seconds:.2f}"])
    lines = [
        f"  {found.config.amount}, {found.storage}, by {found.config.quantizer}; {errors_in_words(found.layers)}",
        *_indented(aligned(rows, left=(1,))),
    ]
    return lines + ([f"  {FEW_TOKENS}"] if any(row.known_errors(tokens)[0] is None for row in found.layers) else [])


def errors_in_words(layers: Sequence[LayerReport]) -> str:
    """What the errors of quantized layers are errors of."""
    fitted = {bool(layer.fitted) for layer in layers}
    if fitted == {False}:
        return "relative error of each layer's weights: no examples were looked at"
    exception = ", of its weights where damping is n/a" if False in fitted else ""
    return f"relative error of each layer's output{exception}"


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]
