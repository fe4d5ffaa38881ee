"""`graphwright doctor`: what stands between a model and a target, and which pass cures it.

The compile preset runs on a copy and the result is looked at again: a finding that is gone was cured, by the pass
after which it is gone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from graphwright.passes.errors import TargetError

from .shell import (
    Command,
    as_bytes,
    count_of,
    format_options,
    parse_pins,
    pin_option,
    print_json,
    print_table,
    progress,
    verbosity_options,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from graphwright.passes.base import Pass, PassReport
    from graphwright.runtime.target import Target

CONTROL = ("If", "Loop", "Scan")
SITES_SHOWN = 3
DETAIL_SHOWN = 200  # characters


@dataclass
class Finding:
    """Something a target may stumble over.

    kind and subject identify it. blocks: the target does not take it. cure: the pass after which it was gone, or
    what the user can do. since: the pass that brought it in.
    """

    kind: str
    subject: str
    detail: str
    blocks: bool = False
    cure: str = ""
    since: str = ""
    cured: bool = False

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.subject

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("kind", "subject", "detail", "blocks", "cured", "cure", "since")}


@dataclass
class Diagnosis:
    """All findings, and whether the target takes the model: whole, or with onnxruntime's help on CPUs."""

    target: str
    findings: list[Finding]
    fallback: bool

    @property
    def blocked(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.blocks and not finding.cured]

    @property
    def ok(self) -> bool:
        return self.fallback or not self.blocked

    def to_json(self) -> dict[str, Any]:
        return {"target": self.target, "ok": self.ok, "findings": [f.to_json() for f in self.findings]}


def diagnose(model: Path, target: str, pins: Mapping[str, Sequence[int]] | None = None) -> Diagnosis:
    """Look at the model as it is and as the compile preset makes it. Raises a GraphwrightError."""
    from graphwright.passes import io
    from graphwright.passes.base import PassContext
    from graphwright.runtime.driver import plan
    from graphwright.runtime.target import Target

    goal = Target.named(target)
    with progress() as say, tempfile.TemporaryDirectory(prefix="graphwright-") as work:
        say("load")
        original = io.load(model)
        history = _History(goal, Path(work), [("", original)])
        ctx = PassContext(pins=pins or {}, target=goal.name, caches=goal.caches, progress=say)
        plan("", "compile", goal, pins or {}).run(original, ctx, [history])
        say("look at the model")
        findings = [*history.findings(), *_weight_findings(original, model)]
    return Diagnosis(goal.name, findings, goal.is_cpu)


@dataclass
class _History:
    """Observer: the model after each pass that changed it, with the name of the pass."""

    target: Target
    work: Path
    stages: list[tuple[str, ir.Model]]
    looks: dict[int, dict[tuple[str, str], Finding]] = field(default_factory=dict)

    def before(self, step: Pass, model: ir.Model) -> None:
        pass

    def after(self, step: Pass, model: ir.Model, report: PassReport) -> None:
        if report.changes:
            self.stages.append((step.name, model.clone()))

    def findings(self) -> list[Finding]:
        """Those of the original, with their cures, and those that a pass brought in."""
        first, last = self._look(0), self._look(len(self.stages) - 1)
        for key, finding in first.items():
            if key not in last:
                finding.cured, finding.cure = True, self._turn(key, present=False)
        brought = {key: finding for key, finding in last.items() if key not in first}
        for key, finding in brought.items():
            finding.since = self._turn(key, present=True)
        return [last.get(key, finding) for key, finding in first.items()] + list(brought.values())

    def _turn(self, key: tuple[str, str], present: bool) -> str:
        """The pass after which the finding is there (or gone), found by halves."""
        low, high = 0, len(self.stages) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if (key in self._look(middle)) == present:
                high = middle
            else:
                low = middle
        return self.stages[high][0]

    def _look(self, stage: int) -> dict[tuple[str, str], Finding]:
        if stage not in self.looks:
            model = self.stages[stage][1]
            found = [*_graph_findings(model), *_refused(model, self.target, self.work)]
            self.looks[stage] = {finding.key: finding for finding in found}
        return self.looks[stage]


def _graph_findings(model: ir.Model) -> Iterator[Finding]:
    """What can be seen in the graph alone."""
    from graphwright.passes.graph import all_nodes
    from graphwright.runtime.feeds import required_inputs
    from graphwright.runtime.verify import random_node, why_random

    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    newest = _wanted_opset()
    if version is not None and version < newest:
        yield Finding("opset", f"below {newest}", f"the model is written in opset {version}")
    for domain, name, _ in model.functions:
        yield Finding("function", f"{domain}::{name}", "a function of the model, not an operator of the standard")
    for value in required_inputs(model):
        dims = [dim if isinstance(dim, int) else dim.value or "?" for dim in value.shape or ()]
        if value.shape is None or not all(isinstance(dim, int) for dim in dims):
            written = "x".join(str(dim) if isinstance(dim, int) else "N" for dim in dims) or "SHAPE"
            numbers = ", a number for each N," if dims else ""
            yield Finding(
                "dynamic axes", f"input {value.name}", f"shape {dims if value.shape is not None else 'unknown'}",
                cure=f"stays dynamic; --pin {value.name}={written}{numbers} fixes it",
            )  # fmt: skip
        if value.dtype is None or not value.dtype.is_floating_point():
            kind = value.dtype.name.lower() if value.dtype is not None else "of unknown type"
            yield Finding("input type", f"input {value.name}", f"is {kind}, not a float", cure="taken as it is")
    counts: dict[str, int] = {}
    for node in all_nodes(model):
        if node.domain in ("", "ai.onnx") and node.op_type in CONTROL:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    for op, count in counts.items():
        yield Finding(
            "control flow", op, count_of(count, "node"), cure="taken as it is where TVM can, else onnxruntime's"
        )
    random = random_node(model)
    if random is not None:
        yield Finding("random", random.op_type, why_random(random), cure="the result cannot be verified")


def _wanted_opset() -> int:
    from graphwright.passes.registry import parse_pass

    return int(getattr(parse_pass("convert-opset"), "version", 0))


def _refused(model: ir.Model, target: Target, work: Path) -> Iterator[Finding]:
    """Values whose type the model does not tell, and the operators that TVM cannot take once types are inferred."""
    from graphwright.passes.base import PassContext
    from graphwright.passes.graph import site
    from graphwright.passes.registry import parse_pass
    from graphwright.runtime.build import find_refused

    from .summary import operator

    way_out = "onnxruntime runs it inside the artifact" if target.is_cpu else "none; choose a CPU target"
    untyped = [v.name or "" for node in model.graph for v in node.outputs if v.name and v.type is None]
    if untyped:
        yield Finding("types", "values without a known type", _listed(untyped, "value"), blocks=True, cure=way_out)
    inferred = model.clone()
    parse_pass("infer-shapes").run(inferred, PassContext())
    groups: dict[str, list[tuple[str, str]]] = {}
    for node, reason in find_refused(inferred, target, work).items():
        groups.setdefault(operator(node), []).append((site(node), reason))
    for name, sites in groups.items():
        reasons = "; ".join(dict.fromkeys(reason for _, reason in sites))
        if len(reasons) > DETAIL_SHOWN:
            reasons = reasons[:DETAIL_SHOWN] + " ..."
        detail = f"{_listed([at for at, _ in sites], 'node')}: {reasons}"
        yield Finding("operator", name, detail, blocks=True, cure=way_out)


def _listed(names: Sequence[str], noun: str) -> str:
    """`5 nodes (a, b, c and 2 more)`."""
    more = f" and {len(names) - SITES_SHOWN} more" if len(names) > SITES_SHOWN else ""
    return f"{count_of(len(names), noun)} ({', '.join(names[:SITES_SHOWN])}{more})"


def _weight_findings(model: ir.Model, path: Path) -> list[Finding]:
    """NaN and infinite weights, and weights in other files."""
    from graphwright.passes.io import special_numbers

    from .summary import weight_files

    findings = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        nans, infinities = special_numbers(tensor)
        if nans or infinities:
            parts = [f"{nans} NaN" if nans else "", f"{infinities} infinite" if infinities else ""]
            detail = f"{' and '.join(filter(None, parts))} of {tensor.size} numbers"
            findings.append(
                Finding("weights", name, detail, cure="kept as it is; check the export if it was not meant")
            )
    for file in weight_files(model):
        if file == path.resolve():
            continue
        findings.append(
            Finding("external data", file.name, as_bytes(file.stat().st_size), cure="read from there; keep it beside")
        )
    return findings


def fix(model: Path, out: Path, pins: Mapping[str, tuple[int, ...]], *, overwrite: bool) -> dict[str, Any]:
    """Write the model with the cures applied as ONNX, compared with the original. Raises a GraphwrightError."""
    from .config import Settings
    from .optimize import optimize_file

    return optimize_file(
        Settings(model=str(model), output=str(out), preset="compile", pin=dict(pins), overwrite=overwrite)
    )


@click.command(cls=Command, name="doctor")
@click.argument("model", metavar="MODEL.onnx")
@click.option("--target", default="cpu", show_default=True, metavar="NAME", help="Where it shall run.")
@pin_option
@click.option("--fix", "apply", is_flag=True, help="Write the model with the cures applied to --output.")
@click.option("-o", "--output", metavar="OUT.onnx", help="Where --fix writes.")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@format_options
@verbosity_options
def command(
    model: str, target: str, pins: tuple[str, ...], apply: bool, output: str | None, overwrite: bool, as_json: bool
) -> None:
    """What stands between MODEL.onnx and a target, and which pass cures it.

    Exit code 1 when something remains that the target cannot take.
    """
    from graphwright.passes.io import check_output

    from .summary import verdict_line

    if apply and output is None:
        raise click.UsageError("--fix writes a model; say where with -o OUT.onnx")
    if output is not None and not apply:
        raise click.UsageError("-o is where --fix writes; give --fix too")
    shapes = parse_pins(pins)
    if output is not None:
        check_output(Path(output), overwrite)
    diagnosis = diagnose(Path(model), target, shapes)
    fixed = fix(Path(model), Path(output), shapes, overwrite=overwrite) if output is not None else None
    if as_json:
        print_json({"model": model, **diagnosis.to_json(), "fixed": output})
    else:
        _print(diagnosis)
        if fixed is not None:
            click.echo(f"{verdict_line(fixed['verdict'], fixed['unverified'])}\nwritten: {output}")
    if not diagnosis.ok:
        first = diagnosis.blocked[0]
        raise TargetError(f"{model}: target {target} cannot take {first.subject}: {first.detail}; choose a CPU target")


def _print(diagnosis: Diagnosis) -> None:
    rows = []
    for finding in diagnosis.findings:
        state = "cured" if finding.cured else "in the way" if finding.blocks else "note"
        since = f" (since {finding.since})" if finding.since else ""
        cure = f"pass {finding.cure}" if finding.cured else finding.cure
        rows.append((state, finding.kind, finding.subject, finding.detail + since, cure))
    if not rows:
        click.echo(f"nothing stands between this model and {diagnosis.target}")
        return
    print_table(("state", "kind", "what", "detail", "cure"), rows)
    cured = sum(finding.cured for finding in diagnosis.findings)
    left = len(diagnosis.blocked)
    click.echo(f"{cured} cured by passes, {left} in the way of TVM on {diagnosis.target}")
    if left and diagnosis.fallback:
        click.echo("the artifact runs these parts on onnxruntime")
