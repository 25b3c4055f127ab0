"""Charts on known data, and pages of reports: what is drawn is what was measured, and nothing else gets in."""

import copy
import html.parser
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from shrinkformer.errors import InputError
from shrinkformer.pictures import png
from shrinkformer.pictures.charts import BarChart, Chart, Point, PointChart, PointSeries, Series, ticks
from shrinkformer.pictures.page import figures
from shrinkformer.pictures.png import draw_png
from shrinkformer.pictures.run_page import report_page
from shrinkformer.pictures.svg import WIDTH, draw

NAN = math.nan
VOID = {"meta", "br"}


def record(mu: float = 0.5, *, layers: int = 6, method: str = "stat", quantized: bool = False) -> dict[str, Any]:
    """A run as a command reports it."""

    def model(share: float) -> dict[str, Any]:
        return {
            "metrics": {"accuracy": 0.8 + share / 10, "accuracy_stderr": 0.01},
            "macs": round(1e8 * share),
            "parameters": round(2e7 * share),
            "bytes": round(8e7 * share),
            "latency_ms": {"1x128": 20 * share, "8x128": 100 * share},
        }

    rows = [
        {"layer": i, "heads": 6, "neurons": 700 + i, "attention_error": 0.1, "ffn_error": 0.2} for i in range(layers)
    ]
    size = {"heads": 12, "neurons": 1536, "query_width": 32, "value_width": 32}
    found = {
        "schema": 1,
        "time": "2026-01-02T03:04:05+00:00",
        "command": f"prune_bert.py --mu {mu}",
        "model_name": "tiny",
        "task_name": "qqp",
        "method": method,
        "mu": mu,
        "seed": 0,
        "sample_batch_size": 512,
        "calibration_tokens": 7000,
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
        "dense": model(1),
        "pruned": model(mu),
        "sequence_length": 16.5,
        "layers": rows,
        "dense_layers": [size] * layers,
        "held_out_divergence": {"shrink": 0.01, "stat": 0.02},
        "seconds": {"loading": 1.0, "calibration": 2.0, "total": 3.0},
        "peak_memory_bytes": 2**30,
        "save_dir": "output/x",
    }
    if quantized:
        found["quantized"] = model(mu / 2) | {"bits": 4, "group_size": 64, "quantizer": "shrink"}
        found["quantized_layers"] = [
            {"layer": i, "name": name, "bits": 4, "error": 0.05, "nearest_error": 0.07}
            for i in range(layers)
            for name in ("query", "key", "value", "attention.output", "intermediate", "output")
        ]
    return found


def render(*records: Any) -> str:
    made = report_page([json.dumps(each) for each in records])
    assert made is not None
    return made


class Checker(html.parser.HTMLParser):
    """Checks that tags close in order, and keeps text and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs), attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(made: str) -> Checker:
    """A page is well-formed, its drawings are XML, and nothing in it is loaded from elsewhere or no number."""
    checker = Checker()
    checker.feed(made)
    checker.close()
    assert checker.open == []
    assert "script" not in checker.seen
    assert "://" not in made
    for drawing in re.findall(r"<svg.*?</svg>", made, re.S):
        root = ET.fromstring(drawing)
        assert root.find("title") is not None
        assert root.find("desc") is not None
        for node in root.iter():
            for name in ("x", "y", "width", "height", "cx", "cy", "r"):
                assert math.isfinite(float(node.get(name, 0)))
            assert not re.search("nan|inf", node.get("d", ""), re.I)
    assert not re.search(r"\b(nan|inf|infinity)\b", checker.text, re.I)
    return checker


def bars(chart: Chart, role: str) -> list[float]:
    root = ET.fromstring(draw(chart))
    return [float(node.get("width", 0)) for node in root.iter("rect") if node.get("class") == role]


def test_bars_are_proportional_and_labelled() -> None:
    values = (10.0, 20.0, 5.0)
    full = Series("dense", "dense", (40.0, 40.0, 40.0))
    chart = BarChart("Sizes", "neurons", ("0", "1", "2"), (Series("kept", "pruned", values),), full=full)
    drawn = bars(chart, "pruned")
    assert drawn == pytest.approx([drawn[0] * value / 10 for value in values], abs=0.11)
    assert bars(chart, "dense") == pytest.approx([drawn[0] * 4] * 3, abs=0.25)
    assert all(f">{value} of 40<" in draw(chart) for value in (10, 20, 5))
    right = max(
        float(node.get("x", 0)) + float(node.get("width", 0)) for node in ET.fromstring(draw(chart)).iter("rect")
    )
    assert right < WIDTH


def test_two_series_share_one_scale() -> None:
    chart = BarChart(
        "Latency", "ms", ("1x128",), (Series("dense", "dense", (80.0,)), Series("pruned", "pruned", (20.0,)))
    )
    assert bars(chart, "dense")[0] == pytest.approx(4 * bars(chart, "pruned")[0], abs=0.3)


def test_values_that_are_none_have_no_bar() -> None:
    chart = BarChart("x", "y", ("a", "b", "c"), (Series("s", "pruned", (NAN, math.inf, 0.0)),))
    assert bars(chart, "pruned") == []
    assert draw(chart).count("n/a") == 2
    check(figures([chart]))


def points(chart: PointChart, role: str) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """Centres of circles and, of the error bars, x and both ends."""
    root = ET.fromstring(draw(chart))
    centres = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.iter("circle") if c.get("class") == role]
    pattern = r"M([\d.]+) ([\d.]+)V([\d.]+)M"
    ends = [re.match(pattern, node.get("d", "")) for node in root.iter("path") if node.get("class") == f"l {role}"]
    return centres[1:], [(float(m[1]), float(m[2]), float(m[3])) for m in ends if m]  # the first one is in the legend


def test_points_and_error_bars() -> None:
    made = (Point(25, 0.6, 0.05), Point(50, 0.8, 0.1), Point(100, 0.9))
    chart = PointChart("t", "MACs (M)", "accuracy", (PointSeries("stat", "pruned", made),))
    centres, errors = points(chart, "pruned")
    (x0, y0), (x1, y1), (x2, y2) = centres
    assert (x2 - x1) == pytest.approx(2 * (x1 - x0), abs=0.2)
    assert (y0 - y1) == pytest.approx(2 * (y1 - y2), abs=0.2)
    per_unit = (y0 - y1) / 0.2
    assert len(errors) == 2
    for (x, up, down), (cx, cy), error in zip(errors, centres, (0.05, 0.1), strict=False):
        assert x == cx
        assert cy - up == pytest.approx(error * per_unit, abs=0.2)
        assert down - cy == pytest.approx(error * per_unit, abs=0.2)


@pytest.mark.parametrize(
    "made", [(), (Point(NAN, 1.0),), (Point(1.0, math.inf),), (Point(0.0, 0.0),), (Point(5, 2, 0),)]
)
def test_few_points(made: tuple[Point, ...]) -> None:
    chart = PointChart("t", "x", "y", (PointSeries("s", "pruned", made),), baseline="s")
    ET.fromstring(draw(chart))
    check(figures([chart]))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 1536), (0.8, 0.88), (-3, 7), (0, 1e-9), (1e9, 3e12), (99.9, 100.1)]
)
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)


def test_a_page_of_many_runs() -> None:
    runs = [record(mu, method=method) for method in ("stat", "shrink", "kwon") for mu in (0.7, 0.5, 0.3)]
    made = render(*runs, record(0.4, quantized=True))
    checker = check(made)
    assert len(made) < 100_000
    for word in (
        "stat",
        "kwon",
        "prune_bert.py --mu 0.4",
        "torch 2.13.0",
        "6 of 12",
        "700 of 1,536",
        "10 runs in all",
        "1,024 MiB",
    ):
        assert word in checker.text, word
    assert "prefers-color-scheme:dark" in made
    assert (
        checker.text.count("accuracy against MACs") == 2
    )  # above the chart, and its title for those who do not see it


def test_twelve_layers_are_small_and_forty_eight_are_drawn() -> None:
    assert len(render(record(layers=12, quantized=True))) < 100_000
    made = render(record(layers=48))
    check(made)
    drawing = next(d for d in re.findall(r"<svg.*?</svg>", made, re.S) if "neurons by layer" in d)
    assert sum(node.get("class") == "pruned" for node in ET.fromstring(drawing).iter("rect")) == 48


def test_narrow_heads_are_shown() -> None:
    run = record()
    assert "Width of values" not in render(run)
    for row in run["layers"]:
        row |= {"query_width": 16, "value_width": 20}
    run["layers"][2] |= {"query_width": 0, "value_width": 0}  # left as they were
    made = render(run)
    assert "Width of values by layer" in check(made).text
    assert {"16 of 32", "20 of 32", "32 of 32"} == set(re.findall(r">(\d+ of 32)<", made))


def test_the_newest_of_equal_settings_counts() -> None:
    old, new = record(), record()
    old["pruned"]["metrics"]["accuracy"] = 0.1234
    text = check(render(old, new)).text
    assert "0.1234" not in text
    assert "in detail; 2 runs in all" in text


def test_a_dense_model_alone_and_old_records() -> None:
    dense = {
        key: value for key, value in record().items() if key not in ("pruned", "layers", "dense_layers", "save_dir")
    }
    assert "What each layer kept" not in check(render(dense | {"mu": 1.0})).text
    old = {key: value for key, value in record().items() if key != "dense_layers"}
    assert "6 of 12" not in check(render(old)).text
    assert report_page([]) is None
    assert report_page(["", "{}", "[1]", "not json", '{"dense": 3}']) is None


def test_text_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&\x00\x1b"
    run = record(quantized=True)
    for key in ("model_name", "task_name", "method", "command", "device", "time", "save_dir"):
        run[key] = evil
    run["versions"] = {evil: evil}
    run["seconds"][evil] = 1.0
    run["dense"]["metrics"][evil] = run["pruned"]["metrics"][evil] = run["quantized"]["metrics"][evil] = 0.5
    run["dense"]["latency_ms"] = {evil: 1.0}
    run["layers"][0]["layer"] = run["quantized_layers"][0]["name"] = evil
    run["quantized"]["quantizer"] = evil
    made = render(run)
    check(made)
    assert "<script" not in made
    assert "&lt;script&gt;alert(1)" in made


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, None, "text", [], {}, True, 10**400, -5, 1e308])
@pytest.mark.parametrize(
    "key", ["macs", "bytes", "metrics", "latency_ms", "layers", "seconds", "mu", "versions", "peak_memory_bytes"]
)
def test_wrong_values_do_no_harm(key: str, value: Any) -> None:
    run = copy.deepcopy(record(quantized=True))
    for place in (run, run["dense"], run["pruned"]):
        if key in place:
            place[key] = value
    if key == "metrics":
        run["dense"][key] = {"accuracy": value, "accuracy_stderr": value}
    check(render(run, record()))
    check(render(record(), run))
    check(render(run))


def test_lines_that_are_none_are_counted() -> None:
    made = report_page([json.dumps(record()), "{broken", '{"other": "program"}'])
    assert made is not None
    assert "2 lines of the report could not be read" in made


def test_png() -> None:
    pytest.importorskip("matplotlib")
    chart = BarChart("$x", "y", ("a", "b"), (Series("s", "pruned", (1.0, NAN)),), full=Series("d", "dense", (2.0, 2.0)))
    other = PointChart(
        "t", "x", "y", (PointSeries("s", "second", (Point(1, 2, 0.1), Point(2, 3)), "down"),), baseline="s"
    )
    made = draw_png("Both $", [chart, other])
    assert made.startswith(b"\x89PNG")
    assert len(made) > 5000
    with pytest.raises(InputError, match="nothing to draw"):
        draw_png("x", [PointChart("t", "x", "y", ())])


def test_png_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install .*\[figures\]"):
        png.require_matplotlib()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="takes Debian's chromium")
@pytest.mark.parametrize("width", [500, 1240])
def test_a_browser_draws_the_page_without_complaint(tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(render(record(0.7), record(quantized=True)), encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    command = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1200"]
    shot = tmp_path / "page.png"
    result = subprocess.run(
        [*command, f"--screenshot={shot}", (tmp_path / "page.html").as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shot.stat().st_size > 20_000
    assert "CONSOLE" not in result.stderr
