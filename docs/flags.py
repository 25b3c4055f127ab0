"""Write the tables of flags in commands.md from the option classes; a test holds both equal.

python docs/flags.py
"""

from dataclasses import fields
from pathlib import Path

from shrinkformer.commands.options import DecoderOptions, EncoderOptions, EvaluationOptions
from shrinkformer.commands.quantize_options import DecoderQuantizeOptions, EncoderQuantizeOptions, QuantizeFlags

PAGE = Path(__file__).with_name("commands.md")

_BEGIN, _END = "<!-- flags, written by docs/flags.py -->", "<!-- end of flags -->"


def tables() -> str:
    """All flags as Markdown, those that several commands share once."""
    encoder, decoder = _flags(EncoderOptions), _flags(DecoderOptions)
    shared = {name: text for name, text in encoder.items() if decoder.get(name) == text}
    quantize = _flags(QuantizeFlags)
    both = set(_flags(EncoderQuantizeOptions)) | set(_flags(DecoderQuantizeOptions))
    assert both == {*encoder, *decoder, *quantize}, "a flag of a quantizing command is in no table"
    sections = {
        "All commands": shared,
        "Encoders: `shrinkformer prune --task_name ...`, `prune_bert.py`": _without(encoder, shared),
        "Language models: `shrinkformer prune --task ...`, `prune_opt.py`": _without(decoder, shared),
        "`shrinkformer quantize`, `quantize_bert.py`, `quantize_opt.py`: those above, and": quantize,
    }
    evaluation = ", ".join(f"`--{name}`" for name in _flags(EvaluationOptions))
    parts = [f"### {title}\n\n{_table(flags)}" for title, flags in sections.items()]
    parts.append(
        f"### `shrinkformer evaluate`, `opt_eval.py`\n\nOf language models: {evaluation}; where data and output are; "
        "`--report_to`."
    )
    return "\n\n".join(parts)


def page(text: str) -> str:
    """The page with the tables of now."""
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n\n{tables()}\n\n{_END}{after}"


def _flags(kind: type) -> dict[str, tuple[str, str]]:
    """Default and meaning by name."""
    return {entry.name: (_shown(entry.default), entry.metadata["help"]) for entry in fields(kind)}


def _shown(default: object) -> str:
    if default is None or default is False or default in ("", ()):
        return ""
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _without(flags: dict[str, tuple[str, str]], others: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    return {name: text for name, text in flags.items() if name not in others}


def _table(flags: dict[str, tuple[str, str]]) -> str:
    rows = [f"| `--{name}` | {default} | {text.replace('%%', '%')} |" for name, (default, text) in flags.items()]
    return "\n".join(["| flag | default | |", "|---|---|---|", *rows])


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
