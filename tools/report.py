"""The report of an `optimize` run as a file: JSON for machines, one self-contained HTML page for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .shell import as_bytes, as_error, write_json, write_text
from .summary import tuning_line, verdict_line

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}: graphwright</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
  table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
  th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; border-bottom: 1px solid #8884; }
  td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
  code { font-size: .92em; overflow-wrap: anywhere; }
  .ok { color: #2a7d2a; } .bad { color: #c22; font-weight: 600; }
  .bar { display: inline-block; height: .7em; background: #4a7fb5; } .bar.before { background: #aaa; }
  summary { cursor: pointer; }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p><code>{{ data.pipeline or "no passes" }}</code>{% if data.target %} for <b>{{ data.target }}</b>{% endif %},
{{ "%.1f"|format(data.seconds) }} s{% if data.output %}, written to <code>{{ data.output }}</code>{% endif %}</p>
<p class="{{ 'ok' if data.verdict and data.verdict.ok and not data.unverified else 'bad' }}">{{ verdict }}</p>

<h2>Before and after</h2>
<table>
<tr><th></th><th class="number">before</th><th class="number">after</th></tr>
<tr><td>nodes</td><td class="number">{{ data.nodes.before }}</td><td class="number">{{ data.nodes.after }}</td></tr>
<tr><td>weights</td><td class="number">{{ data.weights_bytes.before|bytes }}</td>
<td class="number">{{ data.weights_bytes.after|bytes }}</td></tr>
<tr><td>size on disk</td><td class="number">{{ data.file_bytes.before|bytes }}</td>
<td class="number">{{ data.file_bytes.after|bytes }}</td></tr>
</table>

<h2>Passes</h2>
<table>
<tr><th>pass</th><th>contract</th><th class="number">changes</th><th class="number">skips</th>
<th class="number">nodes</th><th class="number">seconds</th></tr>
{% for p in data.passes %}
<tr><td>{% if p.changes or p.skips %}<details><summary><code>{{ p.spec }}</code></summary>
<table><tr><th>site</th><th>fires</th><th>rule</th><th>why</th></tr>
{% for rule, value, detail in p.changes %}
<tr><td><code>{{ value }}</code></td><td class="ok">fired</td><td>{{ rule }}</td><td>{{ detail }}</td></tr>
{% endfor %}{% for rule, value, reason in p.skips %}
<tr><td><code>{{ value }}</code></td><td>no</td><td>{{ rule }}</td><td>{{ reason }}</td></tr>{% endfor %}
</table></details>{% else %}<code>{{ p.spec }}</code>{% endif %}</td>
<td>{{ p.contract }}</td><td class="number">{{ p.changes|length }}</td><td class="number">{{ p.skips|length }}</td>
<td class="number">{{ p.nodes_before }} → {{ p.nodes_after }}</td>
<td class="number">{{ "%.3f"|format(p.seconds) }}</td></tr>
{% endfor %}
</table>

{% for p in data.passes if p.rows is defined %}
<h2>What <code>{{ p.spec.partition(":")[0] }}</code> has measured</h2>
<table><tr>{% for name in p.rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in p.rows %}
<tr>{% for cell in row.values() %}<td>{{ "-" if cell is none else cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
{% if data.native %}
<h2>Where it runs</h2>
{% if data.native.activation_bytes %}<p>Activations take {{ data.native.activation_bytes|bytes }}.</p>{% endif %}
<p>TVM runs {{ data.native.tvm }} of {{ data.native.all }} nodes{% if not data.native.fallback %}.</p>{% else %},
onnxruntime these:</p>
<table><tr><th>operator</th><th class="number">nodes</th><th>why</th><th>at</th></tr>
{% for f in data.native.fallback %}
<tr><td>{{ f.operator }}</td><td class="number">{{ f.count }}</td><td>{{ f.reason }}</td>
<td><code>{{ f.sites|join(", ") }}</code></td></tr>
{% endfor %}</table>{% endif %}{% endif %}

{% if tuning %}<p>{{ tuning }}</p>{% endif %}

{% if data.verdict %}
<h2>Outputs against the original</h2>
<table><tr><th>output</th><th>shape</th><th class="number">relative error</th><th class="number">absolute</th>
<th class="number">limit</th><th></th></tr>
{% for o in data.verdict.outputs %}
<tr><td><code>{{ o.name }}</code></td><td>{{ o.shape|join(" × ") }}</td>
<td class="number">{{ o.relative_error|error }}</td><td class="number">{{ o.max_abs_error|error }}</td>
<td class="number">{{ o.limit|error }}</td><td>{{ o.note }}</td></tr>
{% endfor %}</table>{% endif %}

<h2>Operators</h2>
<table><tr><th>operator</th><th class="number">before</th><th class="number">after</th><th></th></tr>
{% for name, before, after in operators %}
<tr><td>{{ name }}</td><td class="number">{{ before }}</td><td class="number">{{ after }}</td>
<td><span class="bar before" style="width: {{ "%.1f"|format(12 * before / largest) }}rem"></span><br>
<span class="bar" style="width: {{ "%.1f"|format(12 * after / largest) }}rem"></span></td></tr>
{% endfor %}</table>
</body>
</html>
"""


def write_report(data: Mapping[str, Any], path: Path, *, overwrite: bool) -> None:
    """Write the data of `summary.summarize` to `path`, as its ending says: .html or .json. Raises OutputError."""
    if path.suffix == ".json":
        write_json(data, str(path), overwrite)
    else:
        write_text(html(data), path, overwrite)


def html(data: Mapping[str, Any]) -> str:
    """The report as one HTML page that loads nothing from elsewhere."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(bytes=as_bytes, error=as_error)
    before, after = data["operators"]["before"], data["operators"]["after"]
    operators = [(name, before.get(name, 0), after.get(name, 0)) for name in {**before, **after}]
    return environment.from_string(PAGE).render(
        name=Path(data["model"]).name,
        data=data,
        verdict=verdict_line(data["verdict"], data["unverified"]),
        tuning=tuning_line(data["tuning"]) if data["tuning"] else "",
        operators=operators,
        largest=max((count for row in operators for count in row[1:]), default=1),
    )
