"""How fast the softmax kernels are against onnxruntime and both three-pass forms, written in the same TIR.

    python -m graphwright.tools.bench_softmax                   all shapes, one thread
    python -m graphwright.tools.bench_softmax --threads 2 --json softmax.json
    python -m graphwright.tools.bench_softmax --dtype float16   half precision, two bytes an element in memory
    python -m graphwright.tools.bench_softmax --quick           a few shapes, seconds
    python -m graphwright.tools.bench_softmax --columns         along an axis that is not the last
    python -m graphwright.tools.bench_softmax --masked          of x · scale + mask, against Mul, Add and Softmax
    python -m graphwright.tools.bench_softmax --head            the 50 most likely of 151,936 words

All run in one process on the same arrays, bound once, in turn; after each change of runner some runs are not timed.
`chosen` is what a compiled model uses. The ratio is onnxruntime's time over its time, pair by pair: above 1 it is
faster. Brackets hold the 10th and 90th percentile. `2 threads` compares the kernel with itself on one thread, and
`copying` says how much faster than one thread they copy as many bytes: what the machine gives at most.
`memory` is what two readings and one writing take without any arithmetic, past the caches where the result is larger
than they are: no softmax of two passes can take less.

Source of the forms: Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.runtime.turns import medians, take_turns

from .turns import SETTLE, OnnxRuntime, Runner, aligned, compiled_kernels, one_node, print_head, print_row

if TYPE_CHECKING:
    from ..runtime.kernels.softmax_passes import SoftmaxEmitter
    from ..runtime.target import Target

ONE_ROW = [(1, 1 << n) for n in (6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26)]
MANY_ROWS = [
    (1000, 7), (1000, 49), (4096, 64), (1000, 197), (1000, 256), (1000, 300), (1024, 1 << 10), (256, 1 << 12),
    (64, 1 << 14), (16, 1 << 16), (4, 1 << 18), (16, 1 << 20), (4, 1 << 22), (1 << 15, 1 << 10),
]  # fmt: skip
# (outer, axis, inner): classes of an image, distances of a detector, attention over queries, two classes.
COLUMNS = [(1, 21, 512 * 512), (1, 16, 33600), (12, 197, 197), (96, 64, 32), (1, 1024, 768), (4, 2, 10000),
           (1, 20000, 64), (64, 10, 7), (2, 40000, 3)]  # fmt: skip
# (batch, heads, queries, keys), scaled and with a mask (batch, 1, 1, keys): sentences, patches of a picture, a text.
MASKED = [(8, 12, 128, 128), (1, 12, 197, 197), (1, 8, 1024, 1024), (1, 32, 1, 4096)]
HEAD, CHOSEN = 151_936, 50
QUICK = [(1, 1 << 6), (1, 1 << 14), (1, 1 << 20), (1, 1 << 24), (1000, 49), (1024, 1 << 10)]
BYTES = {"float32": 4, "float16": 2}
FORMS = ("chosen", "two-pass", "recompute", "reload")
MEMORY = "memory"
ALONE, COPYING, COPYING_ALONE = "one thread", "copying", "copying on one thread"


def recompute(e: SoftmaxEmitter, rows: Any, length: Any) -> None:
    """Three passes, the exponentials computed twice: 3 reads and 1 write per element."""
    from tvm.tirx.script import builder as T

    with T.serial(e.const(rows)) as row:
        e.recompute_row(row * length, length)


def reload(e: SoftmaxEmitter, rows: Any, length: Any) -> None:
    """Three passes, the exponentials written and read back: 3 reads and 2 writes per element. Of float16 they are
    written as float32, elsewhere than the result."""
    from tvm.tirx.script import builder as T

    with T.serial(e.const(rows)) as row:
        start = row * length
        room = T.alloc_buffer((e.const(length),), "float32", scope="global") if e.narrow else None
        e.reload_row(start, length, (room, start) if room is not None else None)


def memory(stream: bool, e: SoftmaxEmitter, rows: Any, length: Any) -> None:
    """X read twice, Y written once."""
    from tvm.tirx.script import builder as T

    from ..runtime.kernels.softmax_passes import AHEAD
    from ..runtime.kernels.vectors import LINE

    v = e.vectors

    def ahead(offsets: list[Any]) -> None:
        for offset in offsets[:: max(1, LINE // v.lanes)]:
            v.prefetch(e.x, offset + AHEAD)

    with T.serial(e.const(rows)) as row:
        start = row * length
        sums = v.registers(8, 0.0)

        def add(offsets: list[Any], part: Any) -> None:
            ahead(offsets)
            for j, offset in enumerate(offsets):
                here = v.at(j * v.lanes)
                T.buffer_store(sums, sums[here] + v.load(e.x, offset, part), [here])

        e.sweep(length, 8, add, start)
        total = sums[v.at(0)]
        for j in range(1, 8):
            total = total + sums[v.at(j * v.lanes)]
        factor = T.Bind(v.splat(v.total(total)))

        def write(offsets: list[Any], part: Any) -> None:
            ahead(offsets)
            for offset in offsets:
                v.store(e.y, offset, T.Bind(v.load(e.x, offset, part) * factor), part, stream)

        (e.aligned_sweep if stream else e.sweep)(length, 8, write, start)
        if stream:
            v.fence()


def kernel(form: str, shape: Sequence[int], target: Target, threads: int, dtype: str) -> Callable[..., None]:
    """The compiled kernel of one of FORMS, or of MEMORY."""
    from ..passes.ops.two_pass_softmax import Form
    from ..runtime.kernels.two_pass_softmax import rowwise, softmax

    types = (dtype, dtype)
    if form in ("recompute", "reload"):
        body = {"recompute": recompute, "reload": reload}[form]
        function = rowwise(shape, target.isa, body, "softmax", types=types)
    elif form == MEMORY:
        stream = target.isa.streaming and math.prod(shape) * BYTES[dtype] > target.caches.last_level
        function = rowwise(shape, target.isa, partial(memory, stream), "softmax", types=types)
    else:
        chosen = Form.TWO_PASS if form == "two-pass" else Form.AUTO
        function = softmax(shape, target.isa, target.caches, threads, chosen, "softmax", types=types)
    return compiled_kernels({"softmax": function}, target)["softmax"]


def measure(
    shape: tuple[int, int], target: Target, threads: int, budget: float, dtype: str = "float32"
) -> dict[str, Any]:
    """One row of the table: nanoseconds per element and ratios, by runner."""
    import numpy as np
    import tvm
    from onnx import helper

    from ..runtime.measure import Spread
    from ..runtime.peaks import moving

    x = aligned((np.random.default_rng(0).random(shape, np.float32) * 20 - 10).astype(dtype))
    y = aligned(np.empty_like(x))
    source, result = tvm.runtime.from_dlpack(x), tvm.runtime.from_dlpack(y)
    node = helper.make_node("Softmax", ["x"], ["y"], axis=-1)
    runners: dict[str, Runner] = {"onnxruntime": OnnxRuntime(one_node(node, {"x": x}), {"x": x}, threads)}
    # The forms to compare with are written for one thread.
    forms = [f for f in FORMS if threads == 1 or f == "chosen"]
    for form in forms:
        runners[form] = partial(kernel(form, shape, target, threads, dtype), source, result)
    if threads > 1:
        runners[ALONE] = partial(kernel("chosen", shape, target, 1, dtype), source, result)
        runners[COPYING], moved = moving("copy", target, threads, x.nbytes + y.nbytes)
        runners[COPYING_ALONE], moved_alone = moving("copy", target, 1, x.nbytes + y.nbytes)
    else:
        runners[MEMORY] = partial(kernel(MEMORY, shape, target, 1, dtype), source, result)
    errors = {}
    e = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    expected = e / e.sum(axis=-1, keepdims=True)
    for form in forms:
        runners[form]()
        errors[form] = float(np.abs(y / expected - 1).max())
    del e, expected
    times = medians(take_turns(runners, SETTLE if threads > 1 else 0.0, budget))
    count = math.prod(shape)
    ratios = {}
    for name in (*forms, ALONE if threads > 1 else MEMORY):
        other = "onnxruntime" if name in forms else name
        mine = name if name in forms else "chosen"
        ratios[name] = Spread.of([a / b for a, b in zip(times[other], times[mine], strict=True)]).to_json()
    if threads > 1:
        pairs = zip(times[COPYING_ALONE], times[COPYING], strict=True)
        ratios[COPYING] = Spread.of([a / moved_alone / (b / moved) for a, b in pairs]).to_json()
    return {
        "shape": list(shape),
        "dtype": dtype,
        "ns_per_element": {name: Spread.of([t / count * 1e9 for t in ts]).to_json() for name, ts in times.items()},
        "ratio": ratios,
        "max_relative_error": errors,
        "turns": len(times["onnxruntime"]),
    }


def measure_columns(shape: tuple[int, int, int], target: Target, threads: int, budget: float) -> list[str]:
    """A line of the table for softmax along the middle axis."""
    import numpy as np
    import tvm
    from onnx import helper

    from ..runtime.kernels.softmax_columns import softmax_columns

    outer, length, inner = shape
    x = aligned((np.random.default_rng(0).random(shape, np.float32) * 20 - 10).astype(np.float32))
    y = aligned(np.empty_like(x))
    function = softmax_columns((outer,), length, (inner,), target.isa, target.caches, threads, name="softmax")
    compiled = compiled_kernels({"softmax": function}, target)["softmax"]
    model = one_node(helper.make_node("Softmax", ["x"], ["y"], axis=1), {"x": x})
    runners: dict[str, Runner] = {
        "onnxruntime": OnnxRuntime(model, {"x": x}, threads),
        "ours": partial(compiled, tvm.runtime.from_dlpack(x), tvm.runtime.from_dlpack(y)),
    }
    return [str(d) for d in shape] + _compared(runners, threads, budget, math.prod(shape) * 1e-9)


def measure_masked(shape: tuple[int, int, int, int], target: Target, threads: int, budget: float) -> list[str]:
    """A line of the table for softmax(x / 8 + mask), a quarter of the keys hidden."""
    import numpy as np
    import tvm
    from onnx import helper

    from ..runtime.kernels.softmax_passes import Source
    from ..runtime.kernels.two_pass_softmax import softmax

    random, scale = np.random.default_rng(0), 0.125
    x = aligned((random.standard_normal(shape) * 20).astype(np.float32))
    hidden = random.random((shape[0], 1, 1, shape[3])) < 0.25
    mask = aligned(np.where(hidden, -1e9, 0).astype(np.float32))
    y = aligned(np.empty_like(x))
    source = Source(scale, "float32", (True, False, False, True))
    function = softmax(shape, target.isa, target.caches, threads, name="softmax", source=source)
    compiled = compiled_kernels({"softmax": function}, target)["softmax"]
    nodes = [
        helper.make_node("Mul", ["x", "c"], ["s"]), helper.make_node("Add", ["s", "mask"], ["a"]),
        helper.make_node("Softmax", ["a"], ["y"], axis=-1),
    ]  # fmt: skip
    feeds = {"x": x, "mask": mask}
    model = one_node(nodes, feeds, {"c": np.array(scale, np.float32)})
    arrays = [tvm.runtime.from_dlpack(array) for array in (x, mask, y)]
    runners: dict[str, Runner] = {
        "onnxruntime": OnnxRuntime(model, feeds, threads), "ours": partial(compiled, *arrays)
    }  # fmt: skip
    return [str(d) for d in shape] + _compared(runners, threads, budget, math.prod(shape) * 1e-9)


def measure_head(target: Target, threads: int, budget: float) -> list[str]:
    """The line for the head of a language model: logits -> the greatest probabilities and their places."""
    import numpy as np
    import tvm
    from onnx import helper

    from ..runtime.kernels.log_softmax import log_sum_exp
    from ..runtime.kernels.top_k import top_k

    x = aligned(np.random.default_rng(0).standard_normal((1, HEAD)).astype(np.float32) * 3)
    functions = {
        "k": top_k((1,), HEAD, CHOSEN, target.isa, threads, name="k"),
        "sum": log_sum_exp((1,), HEAD, target.isa, threads, "sum"),
    }
    compiled = compiled_kernels(functions, target)
    choose, add = compiled["k"], compiled["sum"]
    source, values = tvm.runtime.from_dlpack(x), tvm.runtime.tensor(np.empty((1, CHOSEN), np.float32))
    places, log_total = tvm.runtime.tensor(np.empty((1, CHOSEN), np.int64)), tvm.runtime.tensor(np.empty(1, np.float32))

    def ours() -> None:
        choose(source, values, places)
        add(source, log_total)

    nodes = [helper.make_node("Softmax", ["x"], ["s"]), helper.make_node("TopK", ["s", "k"], ["y", "i"])]
    model = one_node(nodes, {"x": x}, {"k": np.array([CHOSEN])})
    runners: dict[str, Runner] = {"onnxruntime": OnnxRuntime(model, {"x": x}, threads), "ours": ours}
    return _compared(runners, threads, budget, 1e-6)


def _compared(runners: dict[str, Runner], threads: int, budget: float, unit: float) -> list[str]:
    """Medians of both runners in `unit` seconds, and the ratio with its spread."""
    from ..runtime.measure import Spread

    times = medians(take_turns(runners, SETTLE if threads > 1 else 0.0, budget))
    ratio = Spread.of([a / b for a, b in zip(times["onnxruntime"], times["ours"], strict=True)]).to_json()
    cells = [f"{Spread.of(times[name]).to_json()['median'] / unit:.3f}" for name in ("onnxruntime", "ours")]
    return [*cells, "{median:.2f} [{low:.2f}, {high:.2f}]".format(**ratio)]


def header(threads: int) -> list[str]:
    extra = [f"{threads} threads over 1", COPYING] if threads > 1 else [*FORMS[1:], MEMORY, "over chosen"]
    return ["rows", "length", "onnxruntime", "chosen", "ratio", *extra]


def line(row: dict[str, Any], threads: int) -> list[str]:
    """The row as text: nanoseconds per element, ratios with their spread."""
    nanoseconds, ratio = row["ns_per_element"], row["ratio"]

    def spread(name: str) -> str:
        return "{median:.2f} [{low:.2f}, {high:.2f}]".format(**ratio[name])

    extra = [spread(ALONE), spread(COPYING)] if threads > 1 else [
        *(f"{nanoseconds[name]['median']:.3f}" for name in (*FORMS[1:], MEMORY)), spread(MEMORY)
    ]  # fmt: skip
    cells = [f"{nanoseconds[name]['median']:.3f}" for name in ("onnxruntime", "chosen")]
    rows, length = row["shape"]
    power = f"2^{length.bit_length() - 1}" if length & (length - 1) == 0 else str(length)
    return [str(rows), power, *cells, spread("chosen"), *extra]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few shapes, a fraction of a second each")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--shape", action="append", metavar="ROWSxLENGTH", help="only this; may be given again")
    parser.add_argument("--dtype", choices=BYTES, default="float32", help="of the rows and their results")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--columns", action="store_true", help="softmax along an axis that is not the last")
    kinds.add_argument("--masked", action="store_true", help="softmax of scaled and masked scores")
    kinds.add_argument("--head", action="store_true", help=f"the {CHOSEN} greatest probabilities of {HEAD} logits")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    from ..runtime.pool import Pool
    from ..runtime.target import Target

    target = Target.named("cpu")
    Pool.here(target).use(options.threads)
    compared, budget = ["onnxruntime", "ours", "ratio"], 0.3 if options.quick else 2.0
    if options.columns:
        print_head(target, options.threads, ["outer", "axis", "inner", *compared], "; ns per element")
        for columns in COLUMNS:
            print_row(measure_columns(columns, target, options.threads, budget))
        return 0
    if options.masked:
        print_head(target, options.threads, ["batch", "heads", "queries", "keys", *compared], "; ns per element")
        for scores in MASKED:
            print_row(measure_masked(scores, target, options.threads, budget))
        return 0
    if options.head:
        print_head(target, options.threads, compared, "; µs")
        print_row(measure_head(target, options.threads, budget))
        return 0
    shapes = QUICK if options.quick else ONE_ROW + MANY_ROWS
    if options.shape:
        shapes = [(int(rows), int(length)) for rows, _, length in (s.partition("x") for s in options.shape)]
    print_head(target, options.threads, header(options.threads), f"; {options.dtype}, ns per element")
    results = []
    for shape in shapes:
        results.append(measure(shape, target, options.threads, budget, options.dtype))
        print_row(line(results[-1], options.threads))
    if options.json:
        document = {"target": target.to_json(), "threads": options.threads, "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
