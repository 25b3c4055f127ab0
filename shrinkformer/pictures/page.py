"""HTML pages that need nothing from outside: one file, no script, light and dark as the reader likes it."""

from collections.abc import Iterable, Sequence

from shrinkformer.pictures.charts import Chart, has_data
from shrinkformer.pictures.svg import draw, text

# Colours of Okabe and Ito, which people with any colour vision tell apart; lighter in the dark.
_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--ink:#1c2127;--soft:#5b6570;--line:#d9dde2;--dense:#a3abb5;
--pruned:#0072b2;--quantized:#d55e00;--second:#009e73;--third:#b0518f;--fourth:#8a6d00;--fifth:#3f8fbf;--sixth:#555}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1d2127;--ink:#e6e9ed;--soft:#a0a9b4;--line:#363c45;
--dense:#6b7480;--pruned:#56b4e9;--quantized:#f08a3c;--second:#2fc79b;--third:#e08fc0;--fourth:#e6c84f;--fifth:#9ad0f0;
--sixth:#ccc}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:20px 16px 40px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:32px 0 10px}
p{margin:0 0 12px;color:var(--soft);max-width:75ch}
p.lead{overflow-wrap:anywhere}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));align-items:start}
.tiles{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,185px),1fr));margin:16px 0 0}
figure,.tile{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
figcaption{font-weight:600;margin-bottom:6px}
.tile b{display:block;font-size:1.5rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{display:block;color:var(--soft);font-size:.85rem}
svg{display:block;width:100%;max-width:460px;height:auto;margin:0 auto;
font:11px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
svg text{fill:var(--ink);font-variant-numeric:tabular-nums}
svg .t,svg .a{fill:var(--soft)}svg .e{text-anchor:end}svg .m{text-anchor:middle}
svg .g{stroke:var(--line);fill:none}svg .b{stroke:var(--dense);stroke-dasharray:4 3;fill:none}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:4px 12px 4px 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}th[scope=row]{font-weight:400}
table.words td{text-align:left;white-space:normal;overflow-wrap:anywhere}
table.words th{text-align:left;vertical-align:top;color:var(--soft)}
summary{cursor:pointer;font-weight:600;margin:14px 0 8px}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px;overflow-x:auto;margin:0}
"""

_ROLES = ("dense", "pruned", "quantized", "second", "third", "fourth", "fifth", "sixth")


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: Of the window and of the page.
        parts: What follows the title, as HTML.
    """
    colours = "".join(
        f"svg .{role}{{fill:var(--{role})}}svg .l.{role}{{stroke:var(--{role});stroke-width:1.5;fill:none}}"
        for role in _ROLES
    )
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        # Nothing may be loaded or run, whatever finds its way into the text.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}{colours}</style></head>\n"
    )
    return (
        f"{head}<body><main>\n<h1>{text(title)}</h1>\n" + "\n".join(filter(None, parts)) + "\n</main></body></html>\n"
    )


def lead(words: str) -> str:
    """A paragraph below a title."""
    return f'<p class="lead">{text(words)}</p>'


def section(title: str, *parts: str) -> str:
    """A part of the page under a title; nothing where nothing is in it."""
    filled = [part for part in parts if part]
    return f"<section><h2>{text(title)}</h2>\n" + "\n".join(filled) + "</section>" if filled else ""


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Large figures: ``(what, figure, remark)``."""
    cells = "".join(
        f'<div class="tile"><span>{text(what)}</span><b>{text(figure)}</b><span>{text(remark)}</span></div>'
        for what, figure, remark in entries
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def figures(charts: Iterable[Chart]) -> str:
    """Charts side by side; those without data are left out."""
    cells = "\n".join(
        f"<figure><figcaption>{text(chart.title)}</figcaption>{draw(chart)}</figure>"
        for chart in charts
        if has_data(chart)
    )
    return f'<div class="grid">{cells}</div>' if cells else ""


def table(titles: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table of figures; the first cell of a row is its title."""
    head = "".join(f'<th scope="col">{text(title)}</th>' for title in titles)
    body = "\n".join(
        f'<tr><th scope="row">{text(first)}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in cells) + "</tr>"
        for first, *cells in rows
    )
    if not body:
        return ""
    name = f' aria-label="{text(caption)}"' if caption else ""
    return f'<div class="scroll"><table{name}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and words."""
    body = "\n".join(f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows)
    return f'<div class="scroll"><table class="words"><tbody>{body}</tbody></table></div>' if body else ""


def folded(title: str, content: str) -> str:
    """Something that opens when it is clicked; nothing where it is empty."""
    return f"<details><summary>{text(title)}</summary>{content}</details>" if content else ""


def code(lines: str) -> str:
    """Lines of a program, unchanged."""
    return f"<pre><code>{chr(10).join(text(line) for line in lines.splitlines())}</code></pre>"
