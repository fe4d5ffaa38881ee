"""`graphwright compare`: are two models the same function?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from graphwright.passes.errors import ModelError

from .shell import (
    AtLeastZero,
    Command,
    as_error,
    as_shape,
    print_json,
    print_table,
    progress,
    threads_option,
    verbosity_options,
    write_json,
)

if TYPE_CHECKING:
    from graphwright.runtime.compare import Difference, Verdict


def compare_models(
    reference: str,
    candidate: str,
    file: str | None = None,
    *,
    limit: float | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Verdict:
    """Run both on the same inputs. `limit`: relative error allowed; None: by each output's type.

    Without a file, inputs are made up, with two sizes of every symbolic dimension. Raises ModelError when a model
    gives other numbers every run, and what loading and running raise.
    """
    from graphwright.runtime.compare import approximate_outputs, compare, ranked_outputs
    from graphwright.runtime.verify import random_node, why_random

    from .opened import choose_feeds, opened

    with progress() as say:
        say("load")
        with (
            opened(reference, threads=threads, optimized=False) as a,
            opened(candidate, threads=threads, optimized=False) as b,
        ):
            for model in (a, b):
                node = random_node(model.graph)
                if node is not None:
                    raise ModelError(
                        f"{model.name}: {why_random(node)}; only models without random operators can be compared"
                    )
            say("choose inputs")
            feeds, where = choose_feeds(a, b, file, seed)
            say("compare")
            approximate = approximate_outputs(a.graph) if limit is None else ()
            ranked = ranked_outputs(a.graph)
            return compare(a.run, b.run, feeds, limit, where, approximate, ranked, rounding=limit is None)


@click.command(cls=Command, name="compare")
@click.argument("reference", metavar="A")
@click.argument("candidate", metavar="B")
@click.option("-i", "--input", "file", metavar="IN.npz", help="One array an input; made up when not given.")
@click.option("--limit", type=AtLeastZero(), metavar="X",
              help="Largest error relative to the output's scale; by default 1e-4, 1e-2 for float16.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of inputs made up.")
@click.option("--json", "json_file", metavar="FILE", help="Also write the result here as JSON; - is stdout.")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True,
              help="How to print the result.")  # fmt: skip
@threads_option
@verbosity_options
def command(
    reference: str,
    candidate: str,
    file: str | None,
    limit: float | None,
    seed: int,
    json_file: str | None,
    form: str,
    threads: int | None,
) -> None:
    """Run A and B, each an artifact or an ONNX file, on the same inputs and compare what comes out.

    Exit code 3 when an output differs beyond the limit, or in shape, type or special values.
    """
    verdict = compare_models(reference, candidate, file, limit=limit, seed=seed, threads=threads)
    data = {"reference": reference, "candidate": candidate, **verdict.to_json()}
    if json_file is not None:
        write_json(data, json_file)
    if form == "json" and json_file != "-":
        print_json(data)
    elif json_file != "-":
        columns = ("output", "shape", "relative error", "absolute error", "limit", "")
        rows = [
            (o.name, as_shape(o.shape), as_error(o.relative), as_error(o.max_abs), as_error(o.limit),
             _word(o))
            for o in verdict.outputs
        ]  # fmt: skip
        print_table(columns, rows, right=columns[2:5], title=f"inputs: {'; '.join(verdict.shapes)} ({verdict.inputs})")
    verdict.check(f"{candidate} against {reference}")


def _word(output: Difference) -> str:
    if output.by_floor:
        return f"equal: absolute error below {as_error(output.floor)}"
    return "equal" if output.ok else output.note or "differs"
