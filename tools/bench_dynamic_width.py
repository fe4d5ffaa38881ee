"""What a decoder's tokens cost and how well it foresees a text, with widths chosen once and for every token.

    python -m graphwright.tools.bench_dynamic_width MODEL [--folder DIR] [--mean BITS] [--threads N]

MODEL: what `graphwright export` takes. The weights of its prefill graph are nested by `nested-widths` with inputs from
a later part of Moby-Dick than is judged, and its decode graph is compiled four times from the one plan: all products
wide (8 bits), all narrow (4), widths chosen once, and widths chosen for every token. Then all four read the same text
token by token, in turns, so that each token is timed and judged in each. The selector is timed by itself too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .turns import print_row, use_threads

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ..passes.quantize.nested import NestedPlan
    from ..runtime.generator_folder import GeneratorFolder
    from ..runtime.session import Session

SKIPPED, LATER = 30_000, 600_000  # characters of Moby-Dick in front of what is judged, and of what is calibrated on
WINDOW, SAMPLE = 512, 128  # tokens of a judged window, and of a calibration sample
CHOICES = ("wide", "narrow", "static", "dynamic")
TAKEN = "widths_taken"  # the output of the compiled graph that holds a token's widths
HEADER = ["widths", "perplexity", "mean bits", "MB a token", "ms a token", "10 % to 90 %", "of wide"]


def make_plan(source: GeneratorFolder, out: Path, options: argparse.Namespace) -> Path:
    """The plan's file, made where it is not there."""
    import numpy as np

    from ..models import datasets
    from ..models.trainer import train
    from ..runtime import driver
    from ..runtime.generator_folder import PREFILL

    plan = out.with_name(f"{out.name}.nested-widths.npz")
    if plan.is_file():
        return plan
    count, about = options.samples, source.about
    text = datasets.moby_dick()[LATER : LATER + 8 * SAMPLE * count]
    ids = source.tokenizer().encode(text, add_special_tokens=False).ids[: SAMPLE * count]
    empty = np.zeros(about.cache_shape, np.float32)
    calibration: dict[str, list[np.ndarray]] = {
        "input_ids": list(np.array(ids, np.int64).reshape(-1, 1, SAMPLE)), "position": [np.zeros(1, np.int64)] * count,
        "wanted": [np.arange(SAMPLE)] * count, **{f"past_{name}": [empty] * count for name in about.cache_names},
    }  # fmt: skip
    spec = f"nested-widths:mean={options.mean:g}:lead={options.lead}:steps={options.steps}"
    if options.codes:
        spec += f":codes={options.codes}"
    driver.optimize(
        source.model(PREFILL), spec, out=out, calibration=calibration, verify=False, overwrite=True,
        threads=options.threads, trainer=train, progress=say,
    )  # fmt: skip
    return plan


_said = 0.0


def say(message: str) -> None:
    global _said
    if time.monotonic() - _said > 15:
        _said = time.monotonic()
        print(message, file=sys.stderr, flush=True)


def compile_decode(source: Path, plan: Path, record: str, choose: str, out: Path) -> None:
    """The decode graph with the plan's widths as an artifact, which gives the widths of a token where it chooses."""
    from ..passes import io, registry
    from ..passes.base import PassContext
    from ..passes.pipeline import Pipeline
    from ..runtime import driver
    from ..runtime.target import Target

    target = Target.named("cpu")
    spec = registry.parse_pass(record)
    nested = str(spec).replace(spec.name, f"{spec.name}:choose={choose}:plan={plan}", 1)
    pipeline = Pipeline.parse(f"{registry.preset('compile')},{nested},block-activations")
    ctx = PassContext(target=target.name, caches=target.caches)
    model, _ = pipeline.run(io.load(source), ctx)
    chosen = [node.outputs[0] for node in model.graph if node.op_type == "ArgMax"]
    if choose == "dynamic":
        chosen[0].name = TAKEN
        model.graph.outputs.append(chosen[0])
    driver.optimize(model, preset="none", target=target, out=out, overwrite=True, verify=False, progress=say)


def selector_model(plan: NestedPlan) -> ir.Model:
    """The selector by itself: features (1, n) -> widths."""
    import onnx_ir as ir

    from ..passes.quantize.write_nested import add_selector

    assert plan.selector is not None
    data = ir.val("features", ir.DataType.FLOAT, [1, len(plan.selector.first)])
    graph = ir.Graph([data], [], nodes=[], name="selector", opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    graph.outputs.append(add_selector(model, plan.selector, data, len(plan.groups)))
    return model


def read_bytes(plan: NestedPlan) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that a narrow product of each group reads of its weights, and those that a wide one reads besides."""
    import numpy as np

    first, second = np.zeros(len(plan.groups)), np.zeros(len(plan.groups))
    for number, group in enumerate(plan.groups):
        for site in group:
            codes = plan.layers[site].codes
            # Half a byte of a code, two of a scale, one of a zero point.
            first[number] += codes.codes.size / 2 + 3 * codes.scale.size
            second[number] += codes.codes.size / 2
    return first, second


@dataclass
class Reader:
    """One artifact that reads the text. losses in nats and seconds of each token, widths of each where it chooses."""

    session: Session
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    widths: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [output.name for output in self.session.get_outputs()]
        self.wanted = ["logits", *([TAKEN] if TAKEN in names else [])]
        self.state = self.session.new_state()

    def read(self, token: int, position: int, following: int | None) -> None:
        import numpy as np

        from ..runtime.perplexity import token_losses

        feeds = {"input_ids": np.array([[token]]), "position": np.array([position])}
        start = time.perf_counter()
        logits, *taken = self.session.run(self.wanted, feeds, state=self.state)
        self.seconds.append(time.perf_counter() - start)
        self.widths += taken
        if following is not None:
            self.losses.append(float(token_losses(logits[0], [following])[0]))


def read_text(readers: dict[str, Reader], ids: Sequence[int], window: int, seed: int = 0) -> None:
    """All readers read the tokens, each given those before it in its window, in another order for every token."""
    import random

    order, shuffle = list(readers), random.Random(seed).shuffle
    for at, token in enumerate(ids):
        position = at % window
        last = position == window - 1 or at == len(ids) - 1
        for name in order:
            readers[name].read(token, position, None if last else ids[at + 1])
        shuffle(order)
        say(f"token {at + 1} of {len(ids)}")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import numpy as np

    from ..models import datasets
    from ..passes.quantize.nested import NestedPlan
    from ..passes.weights import load_weights
    from ..runtime.generator_folder import DECODE, GeneratorFolder
    from ..runtime.measure import Spread
    from ..runtime.session import Session
    from .export import export_generator

    name = f"{Path(options.model).name}.{options.mean:g}"
    if not (folder / f"{name}.gen").is_dir():
        export_generator(options.model, folder / f"{name}.gen", capacity=max(SAMPLE, options.window))
    source = GeneratorFolder.load(folder / f"{name}.gen")
    file = make_plan(source, folder / f"{name}.onnx", options)
    record = load_weights(file).record
    plan = NestedPlan.load(file, record)
    readers = {}
    for choose in CHOICES:
        artifact = folder / f"{name}.{choose}"
        if not artifact.is_dir():
            compile_decode(source.model(DECODE), file, record, choose, artifact)
        readers[choose] = Reader(Session(artifact, threads=options.threads))
    text = datasets.moby_dick()[SKIPPED : SKIPPED + 8 * options.tokens]
    ids = source.tokenizer().encode(text, add_special_tokens=False).ids[: options.tokens]
    window = min(options.window, source.about.capacity)
    read_text(readers, ids, window)
    first, second = read_bytes(plan)
    sizes = second / second.sum()
    wide = np.zeros(len(sizes))
    wide[list(plan.wide or ())] = 1
    rows = []
    for choose, reader in readers.items():
        shares = {"wide": np.ones_like(wide), "narrow": np.zeros_like(wide), "static": wide}.get(choose)
        if shares is None:
            shares = np.mean(reader.widths, 0)
            shares[: plan.led] = 1
        ratios = [a / b for a, b in zip(reader.seconds, readers["wide"].seconds, strict=True)]
        rows.append({
            "widths": choose, "perplexity": float(np.exp(np.mean(reader.losses))), "predictions": len(reader.losses),
            "mean_bits": float(4 + 4 * shares @ sizes), "megabytes": float((first + shares * second).sum() / 1e6),
            "milliseconds": Spread.of([1e3 * s for s in reader.seconds]).to_json(),
            "mean_milliseconds": 1e3 * float(np.mean(reader.seconds)), "of_wide": Spread.of(ratios).to_json(),
        })  # fmt: skip
    return {"rows": rows, "stored_megabytes": float((first + second).sum() / 1e6), "stats": dict(plan.stats),
            "selector": time_selector(plan, folder / f"{name}.selector", options.threads)}


def time_selector(plan: NestedPlan, artifact: Path, threads: int) -> Any:
    """Milliseconds of a call that only chooses; what any call takes is part of it."""
    import numpy as np

    from ..runtime import driver
    from ..runtime.measure import Spread
    from ..runtime.session import Session
    from ..runtime.turns import medians, take_turns

    if not artifact.is_dir():
        driver.optimize(selector_model(plan), target="cpu", out=artifact, verify=False, progress=say)
    session = Session(artifact, threads=threads)
    name = session.get_inputs()[0].name
    assert plan.selector is not None
    features = np.random.default_rng(0).standard_normal((1, len(plan.selector.first))).astype(np.float32)
    times = medians(take_turns({"selector": lambda: session.run(None, {name: features})}, 0, 1.0))
    return Spread.of([1e3 * t for t in times["selector"]]).to_json()


def line(row: dict[str, Any]) -> list[str]:
    low_high = "{low:.2f} to {high:.2f}".format(**row["milliseconds"])
    return [row["widths"], f"{row['perplexity']:.3f}", f"{row['mean_bits']:.2f}", f"{row['megabytes']:.1f}",
            f"{row['milliseconds']['median']:.2f}", low_high, f"{row['of_wide']['median']:.2f}"]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", help="what `graphwright export` takes")
    parser.add_argument("--folder", type=Path, default=Path("dynamic_width"), help="where models are kept")
    parser.add_argument("--mean", type=float, default=6.0, metavar="BITS", help="of a weight, read on the average")
    parser.add_argument("--lead", type=int, default=7, metavar="N", help="products in front of the selector")
    parser.add_argument("--codes", type=Path, metavar="FILE", help="a 4-bit plan of dynaquant that holds leading bits")
    parser.add_argument("--samples", type=int, default=40, metavar="N", help=f"of {SAMPLE} tokens, to calibrate on")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of learning with the whole model")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="of the text that is read")
    parser.add_argument("--window", type=int, default=WINDOW, metavar="N", help="tokens of a window")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    found = measure(options, options.folder)
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    for row in found["rows"]:
        print_row(line(row))
    print("Stored {stored_megabytes:.1f} MB for all widths. The selector alone takes {ms:.3f} ms a call.".format(
        ms=found["selector"]["median"], **found))  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
