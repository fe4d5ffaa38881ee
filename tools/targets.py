"""`graphwright targets`: where artifacts can run."""

from __future__ import annotations

from typing import Any

import click

from .shell import Command, as_bytes, format_options, print_json, print_table, verbosity_options


def list_targets() -> list[dict[str, Any]]:
    """Name, kind, description and whether this machine runs it, without asking TVM about the host."""
    from graphwright.runtime.target import TARGETS

    rows: list[dict[str, Any]] = [
        {
            "name": "cpu",
            "kind": "llvm",
            "description": "this host, with exactly its features",
            "runs_here": True,
        }
    ]
    for target in TARGETS.values():
        rows.append(
            {
                "name": target.name,
                "kind": target.kind,
                "description": target.description,
                "runs_here": target.runs_here,
            }
        )
    return rows


@click.command(cls=Command, name="targets")
@click.argument("name", required=False)
@format_options
@verbosity_options
def command(name: str | None, as_json: bool) -> None:
    """List the targets; with NAME show its processor, instruction set and caches."""
    if name is None:
        rows = list_targets()
        if as_json:
            print_json(rows)
        else:
            print_table(
                ("target", "kind", "runs here", "what it is"),
                [(r["name"], r["kind"], "yes" if r["runs_here"] else "", r["description"]) for r in rows],
            )
        return
    from graphwright.runtime.target import Target

    target = Target.named(name)
    if as_json:
        print_json({**target.to_json(), "runs_here": target.runs_here})
        return
    isa, caches = target.isa, target.caches
    flags = [flag for flag in ("fma", "scalef", "lookup", "streaming", "dot_bf16") if getattr(isa, flag)]
    flags += [f"dot_int8 ({isa.dot_int8})"] if isa.dot_int8 else []
    rows_of = [
        ("description", target.description), ("kind", target.kind), ("triple", target.triple), ("mcpu", target.mcpu),
        ("mattr", " ".join(target.mattr)), ("vectors", f"{isa.name}: {isa.registers} of {isa.vector_bits} bits"),
        ("has", " ".join(flags)), ("cores", target.cores),
        ("caches", ", ".join(f"{n} {as_bytes(getattr(caches, n))}" for n in ("l1", "l2", "l3"))),
        ("runs here", "yes" if target.runs_here else "no"),
    ]  # fmt: skip
    print_table((target.name, ""), rows_of)
