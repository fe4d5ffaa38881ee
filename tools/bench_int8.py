"""Models in 8-bit whole numbers against onnxruntime in float32 and in 8 bits.

    python -m graphwright.tools.bench_int8                          six rows, two threads
    python -m graphwright.tools.bench_int8 --models resnet-50 --passes dynaquant:together=false --threads 1

Both quantizations are static, with Q and DQ nodes, a scale for each output channel of a weight, and the same inputs for
calibration: ours is the pass `dynaquant` (--passes), the other one onnxruntime's `quantize_static` behind its
`quant_pre_process`, once of all operators that it quantizes and once of products and convolutions alone; the faster of
the two counts. The row efficientnet-lite0-97 has the passes and the photos with which `bench_dynaquant` asks for 97 %
of unchanged first classes. Four sessions, our artifacts in float32 and 8 bits and onnxruntime on the float file and on
its own 8-bit file, take turns in a process of their own for each model, as those of `bench_suite` do. Ratios are
another session's time over that of our 8 bits, turn by turn: above 1 our 8 bits are faster; brackets hold the 10th and
90th percentile.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.passes.errors import GraphwrightError

from . import bench_suite as suite
from .shell import fail
from .turns import SETTLE, print_row

if TYPE_CHECKING:
    import numpy as np

    from .turns import Runner

PASSES = "dynaquant"
JUDGED = "efficientnet-lite0-97"  # efficientnet-lite0, quantized as its quality is asked for
MODELS = ("mobilenet-v2", "efficientnet-lite0", JUDGED, "resnet-50", "minilm", "vit-small")
OURS = "graphwright int8"
OTHERS = ("onnxruntime", "onnxruntime int8", "graphwright")
ASKED = {"onnxruntime": 2.5, "onnxruntime int8": 1.25, "graphwright": 1.0}  # the last of every model, not of the mean
SAMPLES = 8  # that are calibrated on
PRODUCTS = ["Conv", "MatMul", "Gemm"]


@dataclass(frozen=True)
class Plan:
    threads: int
    passes: str
    folder: Path
    effort: suite.Effort
    say: Callable[[str], None]


def calibration(name: str) -> dict[str, list[np.ndarray]]:
    """Samples with the names of the model's inputs; the same at every call."""
    from graphwright.models import registry

    found = [registry.sample_inputs(name, seed, dims=suite.SUITE.get(name, {})) for seed in range(1, SAMPLES + 1)]
    return {key: [one[key] for one in found] for key in found[0]}


def quantized(model: suite.Prepared, row: str, plan: Plan) -> suite.Prepared:
    """The model as the row's passes quantize it, made only where the folder has none of the same passes."""
    from graphwright.runtime.driver import optimize

    from . import bench_dynaquant

    passes = bench_dynaquant.SAME_CLASSES if row == JUDGED else plan.passes
    key = suite._digest({"passes": passes, "float": model.path.name, "sources": suite.sources_digest("passes")})
    path = plan.folder / f"int8-{row}-{key}.onnx"
    if not path.exists():
        plan.say(passes)
        samples = bench_dynaquant.photo_calibration() if row == JUDGED else calibration(row)
        optimize(model.path, passes, out=path, calibration=samples, verify=False, overwrite=True)
    return replace(model, name=f"int8-{row}", path=path)


def quantized_by_onnxruntime(model: suite.Prepared, plan: Plan, operators: Sequence[str] | None) -> suite.Prepared:
    """The model as onnxruntime quantizes it: the named operators, or all that it does by default."""
    import onnxruntime.quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    word = "all" if operators is None else "products"
    path = plan.folder / f"onnxruntime-{word}-{model.path.stem}.onnx"
    if not path.exists():
        plan.say(f"onnxruntime's quantize_static, {word}")
        whole = plan.folder / f"onnxruntime-{model.path.stem}.onnx"
        quant_pre_process(str(model.path), str(whole), skip_symbolic_shape=True)
        samples = calibration(model.name)

        class Reader(ort.CalibrationDataReader):
            def __init__(self) -> None:
                self.feeds = iter([{k: v[i] for k, v in samples.items()} for i in range(SAMPLES)])

            def get_next(self) -> Mapping[str, np.ndarray] | None:
                return next(self.feeds, None)

        ort.quantize_static(
            str(whole), str(path), Reader(), quant_format=ort.QuantFormat.QDQ, op_types_to_quantize=operators,
            per_channel=True, activation_type=ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8,
        )  # fmt: skip
    return replace(model, path=path)


def measure(row: str, plan: Plan) -> dict[str, Any]:
    """The figures of a row. Raises a GraphwrightError."""
    from graphwright.runtime.measure import Spread
    from graphwright.runtime.session import Session
    from graphwright.runtime.target import Target
    from graphwright.runtime.tvm_step import load_tvm
    from graphwright.runtime.worker import Compiler

    plan.folder.mkdir(parents=True, exist_ok=True)
    target = Target.named("cpu")
    name = "efficientnet-lite0" if row == JUDGED else row
    model = suite.prepare(name, suite.SUITE.get(name, {}), plan.folder)
    ours = quantized(model, row, plan)
    theirs = [quantized_by_onnxruntime(model, plan, operators) for operators in (None, PRODUCTS)]
    plan.say("optimize for cpu")
    files = {OURS: ours, "graphwright": model}
    artifacts = {key: suite.compiled(each, target, plan.folder) for key, each in files.items()}
    Compiler.shared().close()  # its process would keep its memory
    load_tvm()
    sessions: dict[str, Any] = {key: Session(each.path, threads=plan.threads) for key, each in artifacts.items()}
    sessions["onnxruntime"] = suite.onnxruntime_session(model, plan.threads, False)
    feeds = dict(model.feeds)

    def runner(session: Any) -> Runner:
        return partial(session.run, None, feeds)

    both = [runner(suite.onnxruntime_session(each, plan.threads, False)) for each in theirs]
    quick = suite.take_turns({"0": both[0], "1": both[1]}, replace(plan.effort, turns=5, budget=2.0), SETTLE)
    faster = min((0, 1), key=lambda i: sorted(quick[str(i)])[len(quick[str(i)]) // 2])
    runners = {**{key: runner(session) for key, session in sessions.items()}, "onnxruntime int8": both[faster]}
    plan.say("turns")
    times = suite.take_turns(runners, plan.effort, SETTLE)
    ratios = {key: [a / b for a, b in zip(times[key], times[OURS], strict=True)] for key in OTHERS}
    return {
        "model": row, "threads": plan.threads, "quantized by onnxruntime": ("all", "products")[faster],
        "compile_seconds": artifacts[OURS].seconds, "turns": len(times[OURS]),
        "ms": {key: asdict(Spread.of(values)) for key, values in times.items()},
        "ratio": {key: asdict(Spread.of(values)) for key, values in ratios.items()},
    }  # fmt: skip


def line(row: Mapping[str, Any]) -> list[str]:
    ratios = ["{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["ratio"][key]) for key in OTHERS]
    times = [f"{row['ms'][key]['median']:.2f}" for key in (OURS, *OTHERS)]
    return [row["model"], *times, *ratios, row["quantized by onnxruntime"], f"{row['compile_seconds']:.0f}"]


def child(name: str, options: argparse.Namespace) -> int:
    """Measure one model and write its row as one line of JSON."""
    start = time.perf_counter()

    def say(message: str) -> None:
        print(f"{time.perf_counter() - start:7.1f} s  {name}: {message}", file=sys.stderr, flush=True)

    effort = suite.QUICK if options.quick else suite.Effort()
    plan = Plan(options.threads, options.passes, options.folder, effort, say)
    with suite._quiet_stdout() as answer:
        try:
            print(json.dumps([measure(name, plan)]), file=answer)
        except GraphwrightError as error:
            print(" ".join(str(error).split()), file=answer)
            return error.exit_code
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code: 4 when something failed or is slower than asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B", help="these only")
    parser.add_argument("--passes", default=PASSES, metavar="SPEC", help=f"what quantizes for us ({PASSES})")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--quick", action="store_true", help="three turns each")
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="of exports and artifacts (bench)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--child", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    if options.child:
        return child(options.child, options)
    passed = ["--passes", options.passes, "--threads", str(options.threads), "--folder", str(options.folder)]
    passed += ["--quick"] * options.quick
    print_row(["model", *(f"{key} ms" for key in (OURS, *OTHERS)), *(f"of {key}" for key in OTHERS), "by", "compile s"])
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for name in options.models.split(","):
        try:
            rows += suite.ask(name, passed, "bench_int8")
        except GraphwrightError as error:
            failed[name] = str(error)
            print_row([name, f"failed: {error}"])
            continue
        except KeyboardInterrupt:
            return fail("interrupted", 130)
        print_row(line(rows[-1]))
    means = {}
    for key in OTHERS if rows else ():
        medians = [row["ratio"][key]["median"] for row in rows]
        means[key] = math.exp(sum(map(math.log, medians)) / len(medians))
        print(f"of {key}: geometric mean {means[key]:.3f}, least {min(medians):.3f}; asked for {ASKED[key]:g}")
    if options.json:
        data = {"machine": suite.machine(), "passes": options.passes, "rows": rows, "failed": failed, "mean": means}
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    slow = any(mean < ASKED[key] for key, mean in means.items())
    slow = slow or any(row["ratio"]["graphwright"]["median"] < ASKED["graphwright"] for row in rows)
    return 4 if failed or slow else 0


if __name__ == "__main__":
    sys.exit(main())
