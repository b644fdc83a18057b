"""The report's HTML page: one jinja2 template, self-contained, in which every text is escaped and printable."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

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
.bar{display:inline-block;width:160px;height:10px;background:#eaeef2;border-radius:5px;position:relative}
.bar i{position:absolute;left:0;top:0;bottom:0;background:#1a7f37;border-radius:5px}
.bar b{position:absolute;top:-3px;bottom:-3px;width:3px;background:#cf222e}
.state{display:inline-block;border-radius:10px;padding:0 10px;background:#eaeef2;font-weight:600}
.state.running{background:#dafbe1}.state.finished{background:#ddf4ff}.state.failed,.state.cancelled{background:#ffebe9}
pre{overflow:auto;max-height:520px;font-size:12.5px;line-height:1.4;background:#f6f8fa;padding:10px;border-radius:6px}
summary{cursor:pointer;color:#57606a}
@media print{nav{display:none}section{break-inside:avoid}}
"""

_TEMPLATE = """
{%- macro table(header, rows, bars=()) %}
{% if rows %}
{% set kinds = alignment(rows) %}
<div class="scroll"><table>
<tr>{% for text in header %}<th{{ kinds[loop.index0] }}>{{ text }}</th>{% endfor %}</tr>
{% for row in rows %}
{% set bar = bars[loop.index0] if bars else none %}
<tr>
{% for text in row %}<td{{ kinds[loop.index0] }}>{{ text }}</td>{% endfor %}
{% if bar %}
<td><span class="bar"><i style="width:{{ "%.1f" % bar[0] }}%"></i><b style="left:{{ "%.1f" % bar[1] }}%"></b></span></td>
{% endif %}
</tr>
{% endfor %}
</table></div>
{% endif %}
{% endmacro %}

{%- macro facts(values, state="") %}
<dl>
{% if state %}<dt>state</dt><dd><span class="state {{ state }}">{{ state }}</span></dd>{% endif %}
{% for name, value in values.items() if value %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}
</dl>
{% endmacro %}

{%- macro picture(name) %}
{% if name in pictures %}<img alt="{{ name }}" src="data:image/png;base64,{{ pictures[name] | base64 }}">{% endif %}
{% endmacro %}

{%- macro beside(tables, header, title) %}
{% if tables %}
<div class="beside">
{% for name, rows in tables.items() %}<div><h3>{{ name }}{{ title }}</h3>{{ table(header, rows) }}</div>{% endfor %}
</div>
{% endif %}
{% endmacro %}

{%- set accuracy_section = table(accuracy[0] + ("top-1, and chance in red",), accuracy[1:], bars) if accuracy else "" %}
{%- set confusion_section = picture("confusion") ~ beside(confused, ("class", "predicted as", "videos"), ": most frequent") %}
{%- set unread_section %}
{{ facts(unread_counts if unread else {"unreadable": "none; every requested video was read"}) }}
{{ table(("in", "dataset", "video", "reason"), unread) }}
{% endset %}
{%- set settings_section %}
{% for title, text in settings.items() if text.strip() %}
<details><summary>{{ title }}</summary><pre>
{% for line in text.splitlines() %}
{{ line }}
{% endfor %}
</pre></details>
{% endfor %}
{% endset %}
{%- set sections = (
  ("Findings", "What is unusual in the updates, the last validation and the test.",
    table(("what was seen", "what helps"), findings)),
  ("Accuracy", "Chance is the accuracy of always predicting the most frequent class. The intervals describe the choice of the test videos, "
    "not that of a seed.", accuracy_section),
  ("Training", "Thin lines are single updates, thick ones moving means. Numbered dashed lines mark interruptions; the table "
    "below gives the reasons.", picture("curves")),
  ("Interruptions", "Times are UTC. Away: from the last event before the interruption to the next start, including the wait "
    "in the queue. Redone: updates that were lost and repeated, with the same videos. Ranks: after the restart.",
    table(("#", "restarted", "at update", "reason", "away", "redone", "ranks"), interruptions)),
  ("Clips", "Each row is a video of the test split. The columns are the heads: every head predicts for every video, in its "
    "own label space. Green: correct; red: wrong (the most confident mistake of a dataset is always shown); grey: the heads "
    "of the other datasets, for which this video has no label.", picture("clips")),
  ("Confusion", "Percent of the test videos of each true class (row).", confusion_section),
  ("Hardest classes", "The classes of each dataset with the lowest accuracy.",
    beside(hardest, ("class", "correct", "", "predicted as"), "")),
  ("Not read", "Videos that could not be read. In training a fallback video of the same dataset replaced them; in testing "
    "nothing did.", unread_section),
  ("Settings", "Folders, machines, accounts and users are left out, so that the page can be shared; the run's folder has them.",
    settings_section),
) -%}
<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ name }} – MultiTrain</title>
<meta name="viewport" content="width=device-width"><style>{{ style }}</style>
<main><h1>{{ name }}</h1><p class="note">MultiTrain report, {{ made }}</p>
<nav>
{% for title, note, body in sections if body.strip() %}
<a href="#{{ title | lower | replace(" ", "-") }}">{{ title }}</a>
{% endfor %}
</nav>
<section>{{ facts(summary, state) }}</section>
{% for title, note, body in sections if body.strip() %}
<section id="{{ title | lower | replace(" ", "-") }}"><h2>{{ title }}</h2><p class="note">{{ note }}</p>
{{ body }}
</section>
{% endfor %}
</main></html>
"""


def render(**values: Any) -> str:
    """The complete HTML document.

    Args:
        values: ``name`` and ``made`` (the run, the time); ``summary`` (texts by name) and ``state``; ``pictures`` (PNG by name);
            ``accuracy`` (a header and rows of texts) and ``bars`` (per row the percents of the bar and of the mark in it);
            ``findings``, ``interruptions``, ``unread`` (rows) and ``unread_counts``; ``confused`` and ``hardest`` (rows by dataset);
            ``settings`` (texts by title). Sections without content are left out.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    environment.globals.update(alignment=_alignment, style=Markup(_STYLE))
    return environment.from_string(_TEMPLATE).render(values)


def _printable(value: Any) -> Any:
    return value if isinstance(value, Markup) else printable(str(value))


def _alignment(rows: Sequence[Sequence[str]]) -> list[Markup]:
    """The class of each column's cells, and of one column more: those that hold only numbers are aligned to the right."""
    numbers = [all(_is_number(text) for text in column) for column in zip(*rows, strict=True)]
    return [Markup(' class="n"' if n else "") for n in (*numbers, False)]


def _is_number(text: str) -> bool:
    return not text.strip("0123456789.,-–% of()") and any(c.isdigit() or c == "–" for c in text)
