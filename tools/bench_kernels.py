"""How fast matrix products and convolutions are against onnxruntime's, and against the machine's multiply-adds.

    python -m graphwright.tools.bench_kernels                    all shapes, one thread
    python -m graphwright.tools.bench_kernels --threads 2 --json kernels.json
    python -m graphwright.tools.bench_kernels --only winograd    those whose name has the word

All run in one process, in turn, with a loop of nothing but multiply-adds between them. onnxruntime's time is that of
its operator alone, by its own profile: what brings tensors into its layout of channels and out of it is left out, as
it is for the kernels here. GFLOP/s count the operator's multiply-adds, padding included, twice, however few a kernel
makes of them: Winograd's may exceed the peak. The share of the peak is that of neighbouring turns, with the 10th and
90th percentile; `best` is the kernel's best turn over the loop's best, which other work on the machine, such as that of
the processor's other thread, disturbs least. The ratio is onnxruntime's time over the kernel's, turn by turn. The error
is that of the output's scale, against onnxruntime's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from graphwright.runtime.turns import take_turns, untimed

from .turns import SETTLE, OnnxRuntime, Runner, compiled_kernels, one_node, peak, print_head, print_row

if TYPE_CHECKING:
    import numpy as np

    from ..runtime.target import Target

# Runs the kernel; gives its result as onnxruntime has it.
Kernel: TypeAlias = "tuple[Runner, Callable[[], np.ndarray]]"


@dataclass(frozen=True)
class Case:
    """One operator. kind: of the kernel. sizes: (M, N, K) of a product, (C, O, H, W) of a convolution."""

    kind: str
    sizes: tuple[int, ...]
    kernel: int = 1
    stride: int = 1

    @property
    def groups(self) -> int:
        return self.sizes[0] if self.kind == "depthwise" else 1

    @property
    def pad(self) -> int:
        return 0 if self.kind == "transposed" else self.kernel // 2

    @property
    def out(self) -> tuple[int, int]:
        """Rows and columns of a convolution's result."""
        if self.kind == "transposed":
            return self.sizes[2] * self.stride, self.sizes[3] * self.stride
        height, width = ((size + 2 * self.pad - self.kernel) // self.stride + 1 for size in self.sizes[2:])
        return height, width

    @property
    def flops(self) -> float:
        if self.kind == "product":
            return 2.0 * math.prod(self.sizes)
        places = math.prod(self.sizes[2:] if self.kind == "transposed" else self.out)
        return 2.0 * self.sizes[0] * self.sizes[1] // self.groups * self.kernel**2 * places

    def __str__(self) -> str:
        if self.kind == "product":
            return "product {} x {} x {}".format(*self.sizes)
        c, o, h, w = self.sizes
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kind} {self.kernel}x{self.kernel}{stride}, {c}->{o}, {h}x{w}"


CASES = [
    *(Case("product", (n, n, n)) for n in (128, 256, 512, 1024, 2048)),
    *(Case("product", sizes) for sizes in ((128, 1536, 384), (128, 384, 1536), (197, 576, 192), (197, 384, 1536))),
    *(Case("product", sizes) for sizes in ((1, 1000, 1280), (1, 4096, 4096), (8, 4096, 4096))),
    *(Case("direct", (c, c, n, n), 3) for c, n in ((64, 56), (128, 28), (256, 14), (512, 7))),
    Case("direct", (96, 24, 160, 160), 3),
    Case("direct", (128, 128, 56, 56), 3, 2),
    *(Case("direct", (c, o, n, n)) for c, o, n in ((64, 256, 56), (512, 128, 28), (256, 1024, 14), (96, 24, 56))),
    *(Case("winograd", (c, c, n, n), 3) for c, n in ((64, 56), (128, 28), (256, 14))),
    *(Case("depthwise", (c, c, n, n), k, s) for c, n in ((96, 112), (192, 28)) for k in (3, 5) for s in (1, 2)),
    Case("transposed", (256, 128, 14, 14), 2, 2),
    Case("transposed", (24, 24, 160, 160), 2, 2),
    Case("transposed", (24, 1, 320, 320), 2, 2),
]


def arrays(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Input and weights."""
    import numpy as np

    draw = np.random.default_rng(0)
    if case.kind == "product":
        m, n, k = case.sizes
        return draw.standard_normal((m, k), np.float32), draw.standard_normal((k, n), np.float32)
    c, o, h, w = case.sizes
    first, second = (c, o) if case.kind == "transposed" else (o, c // case.groups)
    weight = draw.standard_normal((first, second, case.kernel, case.kernel), np.float32)
    return draw.standard_normal((1, c, h, w), np.float32), weight


def node(case: Case) -> Any:
    from onnx import helper

    if case.kind == "product":
        return helper.make_node("MatMul", ["x", "w"], ["y"])
    return helper.make_node(
        "ConvTranspose" if case.kind == "transposed" else "Conv", ["x", "w"], ["y"], strides=[case.stride] * 2,
        pads=[case.pad] * 4, group=case.groups,
    )  # fmt: skip


def kernel(case: Case, x: np.ndarray, weight: np.ndarray, target: Target, threads: int) -> Kernel:
    """The kernel on tensors as a compiled model has them, and what gives its result as onnxruntime has it."""
    if case.kind in ("product", "transposed"):
        return _through_relax(case, x, weight, target)
    return _convolution(case, x, weight, target, threads)


def _convolution(case: Case, x: np.ndarray, weight: np.ndarray, target: Target, threads: int) -> Kernel:
    import numpy as np
    import tvm

    from ..runtime.blocked import blocked_array
    from ..runtime.kernels.conv import ConvSpec, ConvTile, conv, pack_weights
    from ..runtime.kernels.vectors import Vectors

    lanes, both = Vectors(target.isa).lanes, (case.pad, case.pad)
    spec = ConvSpec(
        1, case.sizes[0], case.sizes[1], x.shape[2:], case.out, weight.shape[2:], (case.stride,) * 2, (1, 1), both,
        case.groups,
    )  # fmt: skip
    tile = ConvTile(case.kind)
    function = conv(spec, target.isa, threads, tile, "conv", target.caches)
    compiled = compiled_kernels({"conv": function}, target)["conv"]
    bias = np.zeros(spec.out_blocks(lanes) * lanes, np.float32)
    y = np.zeros((1, spec.out_blocks(lanes) * lanes * math.prod(case.out)), np.float32)
    packed = pack_weights(weight, spec, target.isa, tile)
    tensors = [tvm.runtime.tensor(a) for a in (blocked_array(x, lanes).reshape(1, -1), packed, bias, y)]

    def result() -> np.ndarray:
        return _plain(tensors[3].numpy().reshape(1, -1, *case.out, lanes), case.sizes[1])

    return partial(compiled, *tensors), result


def _plain(blocks: np.ndarray, channels: int) -> np.ndarray:
    import numpy as np

    return np.moveaxis(blocks, -1, 2).reshape(1, -1, *blocks.shape[2:4])[:, :channels]


def _through_relax(case: Case, x: np.ndarray, weight: np.ndarray, target: Target) -> Kernel:
    """A kernel that has no function of its own: as the only one of a module."""
    import tvm
    from tvm import relax

    from ..runtime.blocked import blocked_array
    from ..runtime.kernels import convolutions, products
    from ..runtime.kernels.vectors import Vectors
    from ..runtime.phases import compile_module
    from ..runtime.pool import on_pool

    lanes = Vectors(target.isa).lanes
    inputs = [x] if case.kind == "product" else [x, blocked_array(x, lanes)]
    bb = relax.BlockBuilder()
    names = [relax.Var(f"x{i}", relax.TensorType(a.shape, "float32")) for i, a in enumerate(inputs)]
    with bb.function("main", names):
        with bb.dataflow():
            if case.kind == "product":
                value = products.matmul(bb, names[0], relax.const(weight), target, {})
            else:
                call = relax.op.nn.conv2d_transpose(names[0], relax.const(weight), strides=(case.stride,) * 2)
                found = convolutions.transposed_convolution(
                    bb, bb.normalize(call), names[1], lambda plain: names[1], target
                )
                assert found is not None
                value, _ = found
            output = bb.emit_output(value)
        bb.emit_func_output(output)
    executable, constants = compile_module(bb.get(), target)
    machine = relax.VirtualMachine(on_pool(executable, target), tvm.cpu())
    given = [*(tvm.runtime.tensor(a) for a in inputs), tuple(constants)]
    run = partial(machine["main"], *given)

    def result() -> np.ndarray:
        y = run().numpy()
        return _plain(y, case.sizes[1]) if y.ndim == 5 else y

    return run, result


def measure(case: Case, target: Target, threads: int, budget: float) -> dict[str, Any]:
    """One row of the table."""
    import numpy as np

    from ..runtime.measure import Spread

    x, weight = arrays(case)
    run, result = kernel(case, x, weight, target, threads)
    operator = node(case)
    with tempfile.TemporaryDirectory() as folder:
        other = OnnxRuntime(one_node(operator, {"x": x}, {"w": weight}), {"x": x}, threads, Path(folder) / "profile")
        run()
        other()
        expected = other.result.numpy()
        error = float(np.abs(result() - expected).max() / np.abs(expected).max())
        runners: dict[str, Runner] = {"kernel": run, "onnxruntime": other}
        runners["peak"], loop = peak(target, threads)
        times = take_turns(runners, SETTLE if threads > 1 else 0.0, budget)
        counts = [(untimed(len(turn)), len(turn)) for turn in times["onnxruntime"]]
        nodes = iter(other.node_seconds(operator.op_type)[-sum(map(sum, counts)) :])
    times["onnxruntime"] = [[next(nodes) for _ in range(skipped + n)][skipped:] for skipped, n in counts]
    medians = {name: [float(np.median(turn)) for turn in turns] for name, turns in times.items()}
    work = {"kernel": case.flops, "onnxruntime": case.flops, "peak": loop}
    rates = {name: [work[name] / t / 1e9 for t in ts] for name, ts in medians.items()}

    def spread(over: str, under: str, values: dict[str, list[float]]) -> dict[str, float]:
        return Spread.of([a / b for a, b in zip(values[over], values[under], strict=True)]).to_json()

    return {
        "case": str(case),
        "microseconds": Spread.of([t * 1e6 for t in medians["kernel"]]).to_json(),
        "gflops": {name: Spread.of(rate).to_json() for name, rate in rates.items()},
        "of_peak": spread("kernel", "peak", rates),
        "best_of_peak": max(rates["kernel"]) / max(rates["peak"]),
        "ratio": spread("onnxruntime", "kernel", medians),
        "error": error,
    }


HEADER = ["kernel", "us", "GFLOP/s", "of peak", "best", "onnxruntime", "ratio", "error"]


def line(row: dict[str, Any]) -> list[str]:
    rates = row["gflops"]
    return [
        row["case"], f"{row['microseconds']['median']:.1f}", f"{rates['kernel']['median']:.1f}",
        "{median:.0%} [{low:.0%}, {high:.0%}]".format(**row["of_peak"]), f"{row['best_of_peak']:.0%}",
        f"{rates['onnxruntime']['median']:.1f}",
        "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["ratio"]), f"{row['error']:.0e}",
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--only", metavar="WORD", help="kernels whose name has the word")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="for each kernel")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    import dataclasses

    from ..runtime.pool import Pool
    from ..runtime.target import Target

    target = dataclasses.replace(Target.named("cpu"), cores=options.threads)
    Pool.here(target).use(options.threads)
    print_head(target, options.threads, HEADER)
    results = []
    for case in CASES:
        if options.only and options.only not in str(case):
            continue
        results.append(measure(case, target, options.threads, options.seconds))
        print_row(line(results[-1]))
    if options.json:
        document = {"target": target.to_json(), "threads": options.threads, "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
