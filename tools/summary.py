"""What `optimize` did, as plain data and as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .shell import as_bytes, as_error, count_of, print_table, verbosity

if TYPE_CHECKING:
    import onnx_ir as ir
    from graphwright.passes.base import Pass, PassReport
    from graphwright.runtime.artifact import Artifact
    from graphwright.runtime.driver import Result

REASONS_SHOWN = 5
SITES_SHOWN = 3


@dataclass
class Census:
    """Observer: operators, weights and weight files of the model before the first pass, and nodes after every pass."""

    operators: dict[str, int] | None = None
    weights: int = 0
    files: list[Path] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)

    def before(self, step: Pass, model: ir.Model) -> None:
        if self.operators is None:
            self.take(model)

    def take(self, model: ir.Model) -> None:
        """Count the model that no pass has seen."""
        from graphwright.passes.io import weights_nbytes

        self.operators = histogram(model)
        self.weights = weights_nbytes(model)
        self.files = weight_files(model)

    def after(self, step: Pass, model: ir.Model, report: PassReport) -> None:
        from graphwright.passes.graph import count_nodes

        self.nodes.append(count_nodes(model) if report.changes or not self.nodes else self.nodes[-1])


def histogram(model: ir.Model) -> dict[str, int]:
    """Operator -> number of nodes, subgraphs and functions included, most frequent first."""
    from graphwright.passes.graph import all_nodes

    return dict(Counter(operator(node) for node in all_nodes(model)).most_common())


def operator(node: ir.Node) -> str:
    """`Softmax`, or `com.example::Thing` outside the standard's domain."""
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def summarize(source: str, result: Result, census: Census, target: str | None, seconds: float) -> dict[str, Any]:
    """Everything the tables and reports show, as JSON types."""
    from graphwright.passes.io import weights_nbytes

    if census.operators is None:  # an empty pipeline: the result is the original
        census.take(result.model)
    before = census.operators or {}
    after = histogram(result.model)
    total = sum(before.values())
    counts = [total, *census.nodes]
    passes = [
        {**report.to_json(), "nodes_before": counts[i], "nodes_after": counts[i + 1]}
        for i, report in enumerate(result.reports)
    ]
    return {
        "model": source,
        "output": str(result.path) if result.path else None,
        "target": target,
        "pipeline": str(result.pipeline),
        "contract": result.pipeline.contract.value,
        "seconds": round(seconds, 3),
        "nodes": {"before": total, "after": sum(after.values())},
        "operators": {"before": before, "after": after},
        "weights_bytes": {"before": census.weights, "after": weights_nbytes(result.model)},
        "file_bytes": {"before": _size([Path(source), *census.files]), "after": _written(result)},
        "passes": passes,
        "native": _native(result.artifact),
        "tuning": result.tuned.to_json() if result.tuned else None,
        "verdict": result.verdict.to_json() if result.verdict else None,
        "unverified": result.unverified or ("dry run" if result.verdict is None else ""),
        "quality": result.quality.to_json() if result.quality else None,
    }


def weight_files(model: ir.Model) -> list[Path]:
    """The files that a model's large weights are in: its own file, or those beside it."""
    from graphwright.passes.io import external_source

    sources = {external_source(value.const_value) for value in model.graph.initializers.values()}
    paths = {source[0] for source in sources if source is not None}
    return sorted({path.resolve() for path in paths})


def disk_bytes(path: Path, model: ir.Model) -> int:
    """Bytes of the ONNX file that `model` was loaded from, with its external data."""
    return _size([path, *weight_files(model)])


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in {file.resolve() for file in files})


def _written(result: Result) -> int | None:
    """Bytes of the ONNX file with its data, or of all files of the artifact."""
    from graphwright.passes.io import weights_nbytes

    if result.path is None:
        return None
    if result.path.is_dir():
        return _size([file for file in result.path.rglob("*") if file.is_file()])
    data = result.path.with_name(result.path.name + ".data")
    # A file of that name from before would be another model's; weights beyond the limit are never inside.
    separate = data.is_file() and result.path.stat().st_size < weights_nbytes(result.model)
    return _size([result.path, *([data] if separate else [])])


def _native(artifact: Artifact | None) -> dict[str, Any] | None:
    """How much of an artifact TVM runs, and what it leaves to onnxruntime, grouped by operator and reason."""
    if artifact is None:
        return None
    tvm, everything = artifact.native_nodes
    reasons = {site: why for region in artifact.manifest.regions for site, why in region.reasons.items()}
    return {
        "tvm": tvm,
        "all": everything,
        "activation_bytes": artifact.activation_bytes,
        "fallback": group_reasons(reasons, _producers(artifact) if reasons else {}),
    }


def _producers(artifact: Artifact) -> dict[str, str]:
    """Value name -> operator that makes it."""
    from graphwright.passes import io
    from graphwright.runtime.artifact import MODEL

    model = io.load(artifact.root / MODEL)
    return {value.name or "": operator(node) for node in model.graph for value in node.outputs}


def group_reasons(reasons: Mapping[str, str], operators: Mapping[str, str]) -> list[dict[str, Any]]:
    """Sites with the same operator and reason as one entry, the largest first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for site, why in reasons.items():
        groups.setdefault((operators.get(site, "?"), why), []).append(site)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [{"operator": op, "reason": why, "count": len(at), "sites": at} for (op, why), at in ordered]


# --- tables ------------------------------------------------------------------------------------------------------


def print_summary(data: Mapping[str, Any]) -> None:
    """The tables that end `optimize`."""
    print_passes(data["passes"])
    click.echo()
    for one in data["passes"]:
        print_measured(one)
    rows = [("nodes", data["nodes"]["before"], data["nodes"]["after"]),
            ("weights", *(as_bytes(data["weights_bytes"][k]) for k in ("before", "after")))]  # fmt: skip
    if data["file_bytes"]["after"] is not None:
        rows.append(("size on disk", *(as_bytes(data["file_bytes"][k]) for k in ("before", "after"))))
    print_table(("", "before", "after"), rows, right=("before", "after"))
    click.echo()
    if data["native"]:
        print_native(data["native"])
    if data["tuning"]:
        click.echo(tuning_line(data["tuning"]))
    click.echo(verdict_line(data["verdict"], data["unverified"]))
    if data.get("quality"):
        click.echo(quality_line(data["quality"]))
    if data["output"]:
        click.echo(f"written: {data['output']}")


def print_passes(passes: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for one in passes:
        nodes = f"{one['nodes_before']} -> {one['nodes_after']}"
        rows.append((one["spec"], len(one["changes"]), len(one["skips"]), nodes, f"{one['seconds']:.3f}"))
    print_table(("pass", "changes", "skips", "nodes", "seconds"), rows, right=("changes", "skips", "nodes", "seconds"))
    if not passes:
        click.echo("(no passes)")


def print_sites(report: Mapping[str, Any]) -> None:
    """Every site of one pass: fired, or the first condition that failed."""
    rows = [(value, "fired", rule, detail) for rule, value, detail in report["changes"]]
    rows += [(value, "no", rule, reason) for rule, value, reason in report["skips"]]
    if rows:
        print_table(("site", "fires", "rule", "why"), rows)
    else:
        click.echo("no site: the model holds nothing that this pass looks for")


def print_measured(report: Mapping[str, Any]) -> None:
    """The table of what one pass has measured, where it has."""
    if rows := report.get("rows"):
        columns = tuple(rows[0])
        texts = [tuple("-" if row[column] is None else str(row[column]) for column in columns) for row in rows]
        print_table(columns, texts, right=[c for c in columns if not isinstance(rows[0][c], str)])
        click.echo()


def print_native(native: Mapping[str, Any]) -> None:
    fallback = native["fallback"]
    memory = f"; activations take {as_bytes(native['activation_bytes'])}" if native["activation_bytes"] else ""
    click.echo(f"TVM runs {native['tvm']} of {count_of(native['all'], 'node')} of the main graph{memory}")
    if not fallback:
        return
    shown = fallback if verbosity() > 0 else fallback[:REASONS_SHOWN]
    rows = [(f["operator"], f["count"], f["reason"], _sites(f["sites"])) for f in shown]
    print_table(("operator", "nodes", "why onnxruntime runs it", "at"), rows, right=("nodes",))
    if len(shown) < len(fallback):
        click.echo(f"and {count_of(len(fallback) - len(shown), 'further reason')}; -v shows all")
    click.echo()


def _sites(sites: Sequence[str]) -> str:
    more = f" and {len(sites) - SITES_SHOWN} more" if len(sites) > SITES_SHOWN else ""
    return ", ".join(sites[:SITES_SHOWN]) + more


def quality_line(quality: Mapping[str, Any]) -> str:
    """What a learned model lost, on what, and what it was allowed to."""
    drops = ", ".join(f"{name} {drop:.4f}" for name, drop in quality["drops"].items())
    seen = "held-out samples" if quality["held_out"] else "samples that it has learned from"
    budget = "no budget: measured only" if quality["budget"] is None else f"budget {quality['budget']:g}"
    return f"quality: 1 - cosine of {drops} on {quality['samples']} {seen} ({budget})"
def tuning_line(tuning: Mapping[str, Any]) -> str:
    """What the kernels gained by other tiles than their rule's, and what is left to measure."""
    if not tuning["kernels"]:
        return "tuned: no kernel of this model has tiles to choose from; fix sizes with --pin"
    left = tuning["kernels"] - tuning["known"]
    if not tuning["known"]:
        return f"tuned: none was measured of {count_of(left, 'kernel')}; give --tune more minutes"
    line = (
        f"tuned: {tuning['faster']} of {count_of(tuning['kernels'], 'kernel')} get another tile; those measured take "
        f"{tuning['tuned_ms']:.3g} instead of {tuning['rule_ms']:.3g} ms alone "
        f"({tuning['rule_ms'] / tuning['tuned_ms']:.2f} times as fast)"
    )
    return f"{line}; {count_of(left, 'kernel')} not measured yet" if left else line


def verdict_line(verdict: Mapping[str, Any] | None, unverified: str) -> str:
    """What was measured against what limit, and what was not measured and why."""
    if verdict is None:
        return f"NOT VERIFIED: {unverified}"
    limits = [output["limit"] for output in verdict["outputs"] if output["limit"] is not None]
    word = ("equal" if limits else "compared") if verdict["ok"] else "DIFFERENT"
    limit = f"limit {max(limits):.0e}" if limits else "no limit: measured only"
    line = (
        f"{word}: relative error {as_error(verdict['max_relative_error'])} ({limit}), absolute "
        f"{as_error(verdict['max_abs_error'])}, on {count_of(verdict['sets'], 'set')} of inputs ({verdict['inputs']})"
    )
    if floor := verdict.get("not_judged_below"):
        line += f"\nabsolute errors below {as_error(floor)}, what onnxruntime itself is off by, count as none"
    # The verdict is then that of the rewritten model.
    return f"model {line}\nARTIFACT NOT VERIFIED: {unverified}" if unverified else line
