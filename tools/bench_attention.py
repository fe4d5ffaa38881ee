"""How fast fused attention is against onnxruntime's: MatMul, Softmax, MatMul, and its own fused operator.

    python -m graphwright.tools.bench_attention                  all shapes, one thread
    python -m graphwright.tools.bench_attention --threads 2 --json attention.json
    python -m graphwright.tools.bench_attention --shape 8x1024x64
    python -m graphwright.tools.bench_attention --linear --shape 12x128x32 --shape 12x1024x32 --shape 12x4096x32

All run in one process on the same arrays, bound once, in turn, with a loop of nothing but fused multiply-adds between
them. GFLOP/s count 4 · heads · queries · keys · size for the two products, causal or not; a causal kernel does half of
that, so its figure may exceed the peak. The ratios are onnxruntime's time over the kernel's, pair by pair, with the
10th and 90th percentile. `MultiHeadAttention` (com.microsoft) has no causal, grouped form. With --linear, linear
attention takes its turn too, compiled and in onnxruntime; its ratios are the kernel's time over its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.runtime.turns import medians, take_turns

from .turns import SETTLE, OnnxRuntime, Runner, compiled_kernels, one_node, peak, print_head, print_row

if TYPE_CHECKING:
    import numpy as np

    from ..runtime.target import Target


@dataclass(frozen=True)
class Shape:
    """heads x queries x size; keys and key heads as many unless given."""

    heads: int
    queries: int
    size: int
    keys: int = 0
    kv_heads: int = 0
    causal: bool = False

    @classmethod
    def parse(cls, text: str) -> Shape:
        heads, queries, size, keys, kv_heads = [*map(int, text.split("x")), 0, 0][:5]
        return cls(heads, queries, size, keys, kv_heads)
    note: str = ""

    @property
    def flops(self) -> float:
        return 4.0 * self.heads * self.queries * (self.keys or self.queries) * self.size

    def __str__(self) -> str:
        keys = f" over {self.keys} keys" if self.keys else ""
        shared = f"/{self.kv_heads}" if self.kv_heads else ""
        return f"{self.heads}{shared} x {self.queries} x {self.size}{keys}{' causal' if self.causal else ''}"


SHAPES = [
    Shape(8, 1024, 64),
    Shape(12, 128, 32, note="MiniLM"),
    Shape(3, 197, 64, note="ViT tiny"),
    Shape(6, 197, 64, note="ViT small"),
    Shape(9, 128, 64, kv_heads=3, causal=True, note="SmolLM2"),
    Shape(9, 1, 64, keys=2048, kv_heads=3, note="one token"),
    Shape(32, 1, 128, keys=4096, kv_heads=8, note="one token"),
]


def kernel(shape: Shape, target: Target, threads: int) -> Callable[..., None]:
    from ..runtime.kernels.attention import attention
    from ..runtime.kernels.attention_spec import AttentionSpec, Causal

    spec = AttentionSpec(
        shape.heads, shape.size, shape.size**-0.5, 1, shape.queries, shape.keys or shape.queries,
        kv_heads=shape.kv_heads, causal=Causal.END if shape.causal else Causal.NO,
    )  # fmt: skip
    function = attention(spec, target.isa, target.caches, threads, "attention")
    return compiled_kernels({"attention": function}, target)["attention"]


def decomposed(shape: Shape, arrays: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """MatMul, Add of a causal mask, Softmax, MatMul with what depends on weights or constants done beforehand."""
    import numpy as np
    from onnx import helper

    feeds = dict(arrays)
    group = shape.heads // (shape.kv_heads or shape.heads)
    feeds["k"] = np.ascontiguousarray(np.repeat(arrays["k"], group, axis=1).transpose(0, 1, 3, 2))
    feeds["v"] = np.repeat(arrays["v"], group, axis=1)
    feeds["q"] = arrays["q"] * np.float32(shape.size**-0.5)
    keys = shape.keys or shape.queries
    late = np.triu(np.ones((shape.queries, keys), bool), 1 + keys - shape.queries)
    mask = np.where(late, -np.inf, 0).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["q", "k"], ["s"])]
    if shape.causal:
        nodes.append(helper.make_node("Add", ["s", "mask"], ["m"]))
    nodes.append(helper.make_node("Softmax", [nodes[-1].output[0]], ["p"], axis=-1))
    nodes.append(helper.make_node("MatMul", ["p", "v"], ["y"]))
    return one_node(nodes, feeds, {"mask": mask} if shape.causal else {}), feeds


def fused(shape: Shape, arrays: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """onnxruntime's MultiHeadAttention on (batch, sequence, heads · size)."""
    import numpy as np
    from onnx import helper

    def merged(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(a.transpose(0, 2, 1, 3).reshape(1, a.shape[2], -1))

    feeds = {name: merged(a) for name, a in arrays.items()}
    node = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=shape.heads,
        scale=float(shape.size**-0.5),
    )  # fmt: skip
    return one_node(node, feeds), feeds


def linear(shape: Shape) -> Any:
    """A model of linear attention, which is another function of the same arrays."""
    import onnx_ir as ir

    from ..passes.ops import LINEAR_ATTENTION

    keys, float32 = shape.keys or shape.queries, ir.DataType.FLOAT
    rows = {"q": shape.queries, "k": keys, "v": keys}
    inputs = [ir.val(name, float32, (1, shape.heads, n, shape.size)) for name, n in rows.items()]
    mask = ir.val("mask", float32, (1, 1, 1, 1), const_value=ir.tensor([[[[0.0]]]], float32, "mask"))
    node = ir.node(LINEAR_ATTENTION.name, [*inputs, mask], domain=LINEAR_ATTENTION.domain)
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", float32, ir.Shape((1, shape.heads, shape.queries, shape.size))
    graph = ir.Graph(inputs, [y], nodes=[node], initializers=[mask], name="g", opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    LINEAR_ATTENTION.add_to(model)
    return ir.to_proto(model)


def compiled(model: Any, feeds: dict[str, np.ndarray], threads: int, folder: Path) -> Runner:
    """A run of the artifact that the model becomes."""
    import onnx

    import graphwright

    onnx.save(model, folder / "m.onnx")
    graphwright.optimize(folder / "m.onnx", target="cpu", out=folder / "out")
    session = graphwright.load(folder / "out", threads=threads)
    return partial(session.run, None, feeds)


def measure(shape: Shape, target: Target, threads: int, budget: float, with_linear: bool = False) -> dict[str, Any]:
    """One row of the table."""
    from tempfile import TemporaryDirectory

    import numpy as np
    import tvm

    from ..runtime.measure import Spread

    random = np.random.default_rng(0)
    keys, shared = shape.keys or shape.queries, shape.kv_heads or shape.heads
    sizes = {"q": (shape.heads, shape.queries), "k": (shared, keys), "v": (shared, keys)}
    arrays = {n: random.standard_normal((1, *s, shape.size)).astype(np.float32) for n, s in sizes.items()}
    tensors = [tvm.runtime.tensor(a) for a in (*arrays.values(), np.zeros_like(arrays["q"]))]
    runners: dict[str, Runner] = {"kernel": partial(kernel(shape, target, threads), *tensors)}
    expected: Any = None
    for name, build in (("decomposed", decomposed), ("fused", fused)):
        if name == "fused" and (shape.causal or shape.kv_heads):
            continue
        runners[name] = other = OnnxRuntime(*build(shape, arrays), threads)
        if expected is None:
            other()
            expected = other.result.numpy()
    if with_linear:
        model = linear(shape)
        runners["linear, onnxruntime"] = OnnxRuntime(model, arrays, threads)
        with TemporaryDirectory() as folder:  # the session holds what it needs of it
            runners["linear, compiled"] = compiled(model, arrays, threads, Path(folder))
    runners["kernel"]()
    error = float(np.abs(tensors[3].numpy() - expected).max())
    runners["peak"], flops = peak(target, 1)
    times = medians(take_turns(runners, SETTLE if threads > 1 else 0.0, budget))
    rate = {name: Spread.of([shape.flops / t / 1e9 for t in ts]).to_json() for name, ts in times.items()}
    rate["peak"] = Spread.of([flops / t / 1e9 for t in times["peak"]]).to_json()
    ratios = {
        name: Spread.of([a / b for a, b in zip(times[name], times["kernel"], strict=True)]).to_json()
        for name in times
        if name not in ("kernel", "peak")
    }
    for name in LINEAR if with_linear else ():
        ratios[name] = Spread.of([a / b for a, b in zip(times["kernel"], times[name], strict=True)]).to_json()
    moved = sum(a.nbytes for a in arrays.values()) + arrays["q"].nbytes
    microseconds = Spread.of([t * 1e6 for t in times["kernel"]]).to_json()
    return {
        "shape": str(shape), "note": shape.note, "gflops": rate, "microseconds": microseconds, "ratio": ratios,
        "gigabytes_per_second": moved / microseconds["median"] / 1e3, "difference": error,
    }  # fmt: skip


HEADER = ["heads x queries x size", "", "us", "GFLOP/s", "peak of a core", "GB/s", "over MatMul, Softmax", "over fused"]
LINEAR = ("linear, compiled", "linear, onnxruntime")


def line(row: dict[str, Any]) -> list[str]:
    def spread(name: str) -> str:
        return "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["ratio"][name]) if name in row["ratio"] else "-"

    rates = [f"{row['gflops'][name]['median']:.0f}" for name in ("kernel", "peak")]
    time_ = f"{row['microseconds']['median']:.1f}"
    return [row["shape"], row["note"], time_, *rates, f"{row['gigabytes_per_second']:.1f}", spread("decomposed"),
            spread("fused"), *(spread(name) for name in LINEAR if name in row["ratio"])]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--shape", action="append", metavar="HEADSxQUERIESxSIZE", help="only this; may be given again")
    parser.add_argument("--linear", action="store_true", help="linear attention too; with --shape, heads of one kind")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for each shape")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    from ..runtime.pool import Pool
    from ..runtime.target import Target

    target = Target.named("cpu")
    Pool.here(target).use(options.threads)
    shapes = [Shape.parse(text) for text in options.shape] if options.shape else SHAPES
    print_head(target, options.threads, [*HEADER, *(LINEAR if options.linear else ())])
    results = []
    for shape in shapes:
        results.append(measure(shape, target, options.threads, options.seconds, options.linear))
        print_row(line(results[-1]))
    if options.json:
        document = {"target": target.to_json(), "threads": options.threads, "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
