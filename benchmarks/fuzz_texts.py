"""Texts that are read as plans; drawn by hypothesis, see ``benchmarks.fuzz``."""

import json
from typing import Any

from hypothesis import strategies as st

from shrinkformer.errors import ShrinkformerError
from shrinkformer.prune.names import METHOD_NAMES
from shrinkformer.prune.plan import Plan


def check_plan_text(data: st.DataObject, family: str) -> str:
    """Any text: a plan, or an error of ours."""
    del family
    text = data.draw(plan_texts, "text")
    try:
        plan = Plan.from_json(text)
    except ShrinkformerError:
        return "refused"
    assert Plan.from_json(plan.to_json()) == plan
    return "read"


_PLAIN: st.SearchStrategy[Any] = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_ANY = st.recursive(
    _PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
_UNITS = st.lists(st.integers(0, 9), max_size=4)
_LAYER: dict[str, st.SearchStrategy[Any]] = {
    "heads": _UNITS,
    "neurons": _UNITS,
    "attention_error": st.floats(0, 1),
    "ffn_error": st.floats(0, 1),
    "query_width": st.integers(0, 9),
    "value_width": st.integers(0, 9),
}
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "method": st.sampled_from(METHOD_NAMES),
    "mu": st.floats(0.01, 1),
    "seed": st.integers(0, 9),
    "sequence_length": st.floats(1, 99),
    "dense_macs": st.floats(1, 1e9),
    "macs": st.floats(1, 1e9),
    "layers": st.lists(st.fixed_dictionaries(_LAYER), max_size=3),
    "divergences": st.dictionaries(st.text(max_size=5), st.floats(0, 9), max_size=2),
    "budget": st.sampled_from(["macs", "latency"]),
    "uniform": st.dictionaries(st.text(max_size=5), st.floats(0, 9), max_size=2),
}


@st.composite
def _plans(draw: st.DrawFn) -> str:
    """A plan with something wrong in one place, at most."""
    plan = draw(st.fixed_dictionaries(_FIELDS))
    target = draw(st.sampled_from([plan, *plan["layers"]]))
    name = draw(st.sampled_from(["nothing", "new", *target]))
    if name != "nothing":
        if draw(st.booleans()):
            target.pop(name, None)
        else:
            target[name] = draw(_ANY)
    return json.dumps(plan)


plan_texts = _plans() | _ANY.map(json.dumps) | st.text(max_size=30)
