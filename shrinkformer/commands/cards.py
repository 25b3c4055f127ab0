"""Model cards: README.md of what was saved, first without figures, then with them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shrinkformer.commands.card_metadata import metadata, pipeline_tag, results_of
from shrinkformer.commands.onnx_card import without_onnx_section
from shrinkformer.commands.report import Run
from shrinkformer.commands.report_text import FEW_TOKENS, calibration_of, errors_in_words, mu_in_words, with_error
from shrinkformer.efficiency.size import folder_bytes
from shrinkformer.evaluate.paired import names_of
from shrinkformer.pictures.columns import figure
from shrinkformer.pictures.runs import DECODED, heading
from shrinkformer.prune.plan import Plan
from shrinkformer.prune.pruned_modeling import auto_class
from shrinkformer.prune.sites import EMBEDDINGS, POSITIONS
from shrinkformer.quantize.config import Quantized
from shrinkformer.quantize.names import ONNX
from shrinkformer.quantize.scheme import WHOLE_ROW
from shrinkformer.utils.files import write_atomically

_BETWEEN = " ± "  # a metric and its standard error

PRUNED = "pruned"

_PACKAGES = {"compressed-tensors": ("compressed-tensors",), "gptq": ("gptqmodel", "optimum")}
"""Packages that transformers needs to read a format."""


@dataclass(frozen=True)
class Card:
    """All that a model card says.

    Attributes:
        title: Its first line.
        source: What the user calls the dense model.
        folder: Of the checkpoint, as the user may write it.
        architecture: Name of the model's class in transformers.
        kind: ``pruned``, or the format of the quantized weights.
        custom: Whether the sizes of the blocks need the classes in the folder.
        sentence_encoder: Whether sentence-transformers opens it.
        plan: What was kept, if the model was pruned.
        errors: Of the sublayers of each block of the plan, None where they say nothing.
        tokens: Of the calibration examples.
        quantized: What was done to the weights, if they were quantized.
        inherited: Of the YAML section of the dense model's card.
        public: Whether metrics are those of whole public evaluation splits.
    """

    title: str
    source: str
    folder: Path
    architecture: str
    kind: str = PRUNED
    custom: bool = True
    sentence_encoder: bool = False
    plan: Plan | None = None
    errors: Sequence[tuple[float | None, float | None]] = ()
    tokens: int = 0
    quantized: Quantized | None = None
    inherited: Mapping[str, Any] = field(default_factory=dict)
    public: bool = False

    def text(self, run: Run | None = None) -> str:
        """The card; with the figures of a run once there are some."""
        head = f"---\n{self._metadata(run)}\n---\n# {self.title}"
        parts = [head, self._opens_with(), self._summary(), *self._loading()]
        if run is not None:
            parts += ["## Measured", _measured(run, self.folder), "## How it was made", _provenance(run)]
        if self.plan is not None:
            parts += ["## What every layer keeps", _kept(self.plan, self.errors)]
        if self.quantized is not None:
            parts += ["## What every quantized layer became", _quantized_layers(self.quantized, self.tokens)]
        return "\n\n".join(parts) + "\n"

    def _metadata(self, run: Run | None) -> str:
        opens = self.sentence_encoder and self.kind != ONNX
        tags = ["shrinkformer"]
        tags += [PRUNED] if self.plan is not None else []
        tags += ["quantized", self.kind] if self.quantized is not None and self.kind != "float" else []
        tags += ["quantized"] if self.kind == "float" else []
        tags += ["sentence-transformers", "feature-extraction"] if opens else []
        pipeline = pipeline_tag(self.architecture, sentence_encoder=self.sentence_encoder)
        figures = None if run is None else run.quantized or run.pruned
        results = results_of(run.task_name, figures.metrics, pipeline) if run and figures and self.public else []
        relation = {"base_model_relation": "quantized"} if self.plan is None and "base_model" in self.inherited else {}
        return metadata(
            self.folder.name,
            tags=tags,
            library=ONNX if self.kind == ONNX else "sentence-transformers" if opens else "transformers",
            pipeline=pipeline,
            inherited={**self.inherited, **relation},
            results=results,
        )

    def _opens_with(self) -> str:
        """The first line: what it takes to open the folder."""
        if self.kind == ONNX:
            return "Opens in ONNX Runtime."
        packages = "".join(f" and `{name}`" for name in _PACKAGES.get(self.kind, ()))
        if not self.custom:
            return f"Opens in transformers{packages} as it stands: its shape is that of a stock model."
        return (
            f"Opens in transformers{packages} with `trust_remote_code=True`, which runs the classes in this folder; "
            "or, without that, with `shrinkformer.load`. Pruned with `--uniform` it would need neither."
        )

    def _summary(self) -> str:
        plan = self.plan
        pruned = "" if plan is None else f"to {plan.ratio:.4f} of its MACs (method `{plan.method}`, mu {plan.mu:g})"
        if self.quantized is None:
            assert plan is not None
            return (
                f"`{self.source}`, pruned by shrinkformer {pruned}, without retraining. MACs are counted at "
                f"{plan.sequence_length:.2f} tokens; seed {plan.seed}."
            )
        config = self.quantized.config
        layers = " ".join((config.layers, *config.also))
        return (
            f"`{self.source}`, quantized by shrinkformer to {config.amount} without retraining"
            f"{pruned and f' after pruning {pruned}'}: {self.quantized.storage}, layers `{layers}`, quantizer "
            f"`{config.quantizer}`, format `{self.kind}`."
        )

    def _loading(self) -> list[str]:
        """Examples; each of them runs as it stands, from the folder where the command ran."""
        where = json.dumps(self.folder.as_posix())
        if self.kind == ONNX:
            file = json.dumps((self.folder / "model.onnx").as_posix())
            return [_code("import onnxruntime", f"session = onnxruntime.InferenceSession({file})")]
        blocks = [
            _code("import shrinkformer  # installed from a clone or a wheel", f"model = shrinkformer.load({where})")
        ]
        config = None if self.quantized is None else self.quantized.config
        if config is not None and config.bits_of is not None and {EMBEDDINGS, POSITIONS} & set(config.also):
            return [*blocks, "No other reader takes embeddings as integers together with several numbers of bits."]
        trust = ", trust_remote_code=True" if self.custom else ""
        packages, auto = " ".join(_PACKAGES.get(self.kind, ())), auto_class(self.architecture)
        needs = f"  # pip install {packages}" if packages else ""
        brings = ", with the classes that the folder brings:" if self.custom else ":"
        blocks += [f"Without this package{brings}"]
        blocks += [_code(f"from transformers import {auto}{needs}", f"model = {auto}.from_pretrained({where}{trust})")]
        if self.sentence_encoder:
            opened = f"model = SentenceTransformer({where}{trust})"
            blocks += [_code(f"from sentence_transformers import SentenceTransformer{needs}", opened)]
        return blocks


def finish_card(card: Card, run: Run) -> None:
    """Write a card with figures in the place of the one without, whose section on ONNX stays; atomically."""
    path = card.folder / "README.md"
    _, onnx = without_onnx_section(path.read_text(encoding="utf-8") if path.is_file() else "")
    write_atomically(path, card.text(run) + (f"\n{onnx}" if onnx else ""))


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)


def _measured(run: Run, folder: Path) -> str:
    """Figures of all models, side by side."""
    last = "pruned" if run.quantized is None else "quantized"
    models = run.models
    models[last] = replace(models[last], bytes=folder_bytes(folder))
    values = list(models.values())
    changes = models[last].change_from(run.dense)
    heads = [heading(role, run.given, several=True) for role in models]
    rows = [
        [
            f"{name} on {run.task_name}",
            *(with_error(figures.metrics, name, between=_BETWEEN) for figures in values),
        ]
        for name in names_of(models[last].metrics)
    ]
    for label, attribute in (("MACs (M)", "macs"), ("parameters (M)", "parameters"), ("weight file (MB)", "bytes")):
        rows.append([label, *(f"{getattr(figures, attribute) / 1e6:,.2f}" for figures in values)])
    rows += [
        [f"latency, {shape} tokens (ms, {run.device})", *(f"{some.latency_ms[shape]:,.2f}" for some in values)]
        for shape in run.dense.latency_ms
    ]
    changed = ", ".join(f"{name} {with_error(changes, name, '+', _BETWEEN)}" for name in names_of(changes))
    notes = f"Metrics stand with their standard errors. Change on the same examples, with its own: {changed}."
    if run.quantized is not None and run.dense.latency_ms:
        notes += f" {DECODED}"
    return _table(["", *heads], rows) + f"\n\n{notes}"


def _provenance(run: Run) -> str:
    record = run.to_dict()
    asked = {"target ratio": run.target_ratio} if run.target_ratio is not None else {}
    rows = {
        "command": f"`{record['command']}`",
        "date": record["time"],
        "method": f"`{run.method}`" if run.plan is not None else "not pruned",
        **asked,
        "mu": mu_in_words(run) + ("" if run.plan is None else f"; {run.plan.ratio:.4f} of the MACs kept"),
        "seed": run.seed,
        "calibration": calibration_of(run) + ("; no labels" if run.calibration_tokens else ""),
        **run.facts,
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    return _table(["", ""], list(rows.items()))


def _kept(plan: Plan, errors: Sequence[tuple[float | None, float | None]]) -> str:
    narrow = any(layer.value_width for layer in plan.layers)
    widths = ["width of queries and keys", "of values"] if narrow else []
    rows = [
        [
            index,
            len(layer.heads),
            *([layer.query_width or "as before", layer.value_width or "as before"] if narrow else []),
            len(layer.neurons),
            *(figure(error) for error in errors[index]),
        ]
        for index, layer in enumerate(plan.layers)
    ]
    note = f"\n\n{FEW_TOKENS}." if any(None in pair for pair in errors) else ""
    return _table(["layer", "heads", *widths, "neurons", "attention error", "ffn error"], rows) + note


def _quantized_layers(found: Quantized, tokens: int) -> str:
    rows = [
        [
            "" if row.layer is None else row.layer,
            f"`{row.name}`",
            row.bits,
            "row" if row.group_size == WHOLE_ROW else row.group_size,
            figure(row.known_errors(tokens)[0]),
        ]
        for row in found.layers
    ]
    note = errors_in_words(found.layers)
    return (
        _table(["layer", "name", "bits", "group", "error"], rows)
        + f"\n\n{note[0].upper()}{note[1:]}. Layers that are not listed are not quantized."
    )
