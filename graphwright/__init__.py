"""graphwright: rewrite ONNX models with passes from research, compile them with TVM, prove the result.

    result = graphwright.optimize("model.onnx", passes="two-pass-softmax", target="cpu", out="out")
    session = graphwright.load("out")            # run, get_inputs, get_outputs as in onnxruntime
    outputs = session.run(None, {"x": x})

    generator = graphwright.Generator("smollm2")          # a folder of `graphwright export` or `compile`
    for piece in generator.generate("The capital of France is", max_tokens=16):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.passes.pipeline import Pipeline
    from graphwright.runtime.artifact import Artifact
    from graphwright.runtime.driver import Result
    from graphwright.runtime.generator import Generator
    from graphwright.runtime.generator_folder import GeneratorFolder
    from graphwright.runtime.session import Session
    from graphwright.runtime.target import Target

__version__ = "0.1.0"
__all__ = ["Artifact", "Generator", "Pipeline", "Result", "Session", "Target", "compile", "load", "optimize"]

# Everything is imported on first use: `import graphwright` costs nothing.
_HOMES = {
    "Artifact": "graphwright.runtime.artifact",
    "Generator": "graphwright.runtime.generator",
    "Pipeline": "graphwright.passes.pipeline",
    "Result": "graphwright.runtime.driver",
    "Session": "graphwright.runtime.session",
    "Target": "graphwright.runtime.target",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'graphwright' has no attribute {name!r}")


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Session:
    """An artifact folder as a session. Raises ArtifactError when it is damaged, altered, or not an artifact."""
    from graphwright.runtime.session import Session

    return Session(path, threads=threads)


def optimize(model: Any, passes: str | Pipeline = "", **options: Any) -> Result:
    """Rewrite a model, compile it when a target is named, and check the result: `graphwright.runtime.driver.optimize`
    with its options. Learned passes are trained by `graphwright.models.fit`, which needs the extra `models`."""
    from graphwright.models.trainer import train
    from graphwright.runtime import driver

    return driver.optimize(model, passes, **{"trainer": train, **options})


def compile(
    model: Any, target: str | Target = "cpu", out: str | os.PathLike[str] | None = None, **options: Any
) -> Result | GeneratorFolder:
    """`optimize` with the exact default passes only: see there for the options. A generator folder becomes another, in
    which both graphs are artifacts, for `Generator`: `graphwright.runtime.generator_build.compile_generator`."""
    if isinstance(model, str | os.PathLike):
        from graphwright.runtime.generator_folder import is_generator

        if is_generator(model):
            from graphwright.runtime.generator_build import compile_generator

            return compile_generator(model, out, target=target, **options)
    return optimize(model, target=target, out=out, **options)
