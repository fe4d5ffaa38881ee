"""Every error a user can cause, as one tree. Each carries one line: found, expected, what to do.

    GraphwrightError            exit 1   a user's mistake or unusable input
    |- UsageError               exit 2   a name, option or value that is not in the grammar
    |- ModelError               exit 1   the model file cannot be read or is not valid ONNX
    |- WeightsError             exit 1   external data is missing, short, or outside the model's folder
    |- PassError                exit 1   a pass cannot run: something it needs is missing
    |- TargetError              exit 1   the target cannot run or compile this
    |- CompileError             exit 1   the compiler refused or crashed
    |- ArtifactError            exit 1   an artifact is damaged, altered or of another version
    |- InputError               exit 1   feeds do not fit the model: names, types, shapes
    |- OutputError              exit 1   the output cannot be written
    |- AssetError               exit 1   a model or data set is not there or fails its checksum
    |- VerificationError        exit 3   a result differs beyond its limit
    `- BudgetError              exit 4   a quality budget or gate is not met

A defect of graphwright itself is never one of these: it keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# `/onnxruntime_src/core/graph/model.cc:256 Status onnxruntime::Model::Load(const Path&, int) `
CPP_PLACE = r"/\S+\.(?:cc|cpp|h):\d+ [^()]*(?:\((?:[^()]|\([^()]*\))*\)[^()\s]*)+ (?:const )?(?:\[with [^]]*\] )?"
ORT_PREFIX = r"\[ONNXRuntimeError\] : \d+ : (?:FAIL : )?"


class GraphwrightError(Exception):
    """Root of all errors that end in one line and an exit code."""

    exit_code = 1


class UsageError(GraphwrightError):
    exit_code = 2


class ModelError(GraphwrightError):
    pass


class WeightsError(GraphwrightError):
    pass


class PassError(GraphwrightError):
    pass


class TargetError(GraphwrightError):
    pass


class CompileError(GraphwrightError):
    pass


class ArtifactError(GraphwrightError):
    pass


class InputError(GraphwrightError):
    pass


class OutputError(GraphwrightError):
    pass


class AssetError(GraphwrightError):
    pass


class VerificationError(GraphwrightError):
    exit_code = 3


class BudgetError(GraphwrightError):
    exit_code = 4


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of an error message: the closest known names, or all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """The message of an error as one line, without the places in onnxruntime's sources that it names."""
    text = re.sub(ORT_PREFIX, "", re.sub(CPP_PLACE, "", " ".join(str(error).split())))
    return text[:300] or type(error).__name__
