"""Build a self-contained HTML page: sections with tables, images and collapsible text."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from multitrain.text import printable

_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#24292f;background:#f6f8fa;margin:0}
main{max-width:1180px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:26px;margin:0 0 2px}h2{font-size:19px;margin:0 0 4px}h3{font-size:15px;margin:14px 0 4px}
nav{position:sticky;top:0;background:#f6f8faee;padding:8px 0;border-bottom:1px solid #d8dee4;z-index:1}
nav a{color:#0969da;text-decoration:none;margin-right:18px;white-space:nowrap}
section{background:#fff;border:1px solid #d8dee4;border-radius:10px;padding:18px 22px;margin:18px 0;scroll-margin-top:48px}
p.note{color:#57606a;margin:0 0 12px}img{max-width:100%;height:auto;display:block}
.scroll{overflow-x:auto}.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:0 36px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:5px 18px 5px 0;border-bottom:1px solid #eaeef2;text-align:left;vertical-align:top}
th{font-weight:600;color:#57606a;white-space:nowrap}td.n,th.n{text-align:right;white-space:nowrap}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0}dt{color:#57606a}dd{margin:0}
.bar{display:inline-block;width:160px;height:10px;background:#eaeef2;border-radius:5px;position:relative;overflow:hidden}
.bar i{position:absolute;left:0;top:0;bottom:0;background:#1a7f37}.bar b{position:absolute;top:0;bottom:0;width:2px;background:#cf222e}
.state{display:inline-block;border-radius:10px;padding:0 10px;background:#eaeef2;font-weight:600}
.state.running{background:#dafbe1}.state.finished{background:#ddf4ff}.state.failed,.state.cancelled{background:#ffebe9}
pre{overflow:auto;max-height:520px;font-size:12.5px;line-height:1.4;background:#f6f8fa;padding:10px;border-radius:6px}
summary{cursor:pointer;color:#57606a}
@media print{nav{display:none}section{break-inside:avoid}}
"""


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    title: str
    """Empty for a section without a heading and without a navigation link."""
    body: str
    """HTML, made by the functions of this module, which escape their arguments."""
    note: str = ""
    """Explanation of the section, plain text."""


def page(name: str, sections: Sequence[Section]) -> str:
    """The complete HTML document."""
    shown = [s for s in sections if s.body]
    links = "".join(f'<a href="#{_anchor(s.title)}">{_escaped(s.title)}</a>' for s in shown if s.title)
    boxes = "".join(_box(s) for s in shown)
    made = f"{datetime.now():%Y-%m-%d %H:%M}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_escaped(name)} – MultiTrain</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f'<main><h1>{_escaped(name)}</h1><p class="note">MultiTrain report, {made}</p><nav>{links}</nav>{boxes}</main></html>\n'
    )


def facts(values: Mapping[str, str], state: str = "") -> str:
    """Names and values in two columns; `state` as a badge."""
    rows = {name: _escaped(value) for name, value in values.items() if value}
    if state:
        rows = {"state": f'<span class="state {_escaped(state)}">{_escaped(state)}</span>', **rows}
    return "<dl>" + "".join(f"<dt>{_escaped(name)}</dt><dd>{value}</dd>" for name, value in rows.items()) + "</dl>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, last_is_html: bool = False) -> str:
    """A table of texts; columns that hold only numbers are aligned to the right. Empty without rows."""
    if not rows:
        return ""
    numbers = [all(_is_number(row[c]) for row in rows) for c in range(len(header))]
    kinds = [' class="n"' if n else "" for n in numbers]
    head = "".join(f"<th{k}>{_escaped(h)}</th>" for k, h in zip(kinds, header, strict=True))
    out = []
    for row in rows:
        cells = [_escaped(cell) for cell in row]
        if last_is_html:
            cells[-1] = row[-1]
        out.append("<tr>" + "".join(f"<td{k}>{c}</td>" for k, c in zip(kinds, cells, strict=True)) + "</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(out)}</table></div>'


def bar(percent: float, mark: float) -> str:
    """A bar of `percent`, with a line at `mark` percent."""
    return f'<span class="bar"><i style="width:{percent:.1f}%"></i><b style="left:{mark:.1f}%"></b></span>'


def picture(png: bytes, title: str) -> str:
    """An embedded PNG image."""
    return f'<img alt="{_escaped(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{_escaped(text)}</h3>"


def beside(parts: Sequence[str]) -> str:
    """Parts side by side where the window is wide enough."""
    return '<div class="beside">' + "".join(f"<div>{p}</div>" for p in parts if p) + "</div>" if any(parts) else ""


def folded(title: str, text: str) -> str:
    """Text that a click expands; empty without text."""
    if not text.strip():
        return ""
    lines = "\n".join(_escaped(line) for line in text.splitlines())
    return f"<details><summary>{_escaped(title)}</summary><pre>{lines}</pre></details>"


def _escaped(text: str) -> str:
    """Escape `text` for HTML."""
    return html.escape(printable(text))


def _box(section: Section) -> str:
    title = f"<h2>{_escaped(section.title)}</h2>" if section.title else ""
    note = f'<p class="note">{_escaped(section.note)}</p>' if section.note else ""
    anchor = f' id="{_anchor(section.title)}"' if section.title else ""
    return f"<section{anchor}>{title}{note}{section.body}</section>"


def _anchor(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def _is_number(text: str) -> bool:
    return not text.strip("0123456789.,-–% of") and any(c.isdigit() or c == "–" for c in text)
