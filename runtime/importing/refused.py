"""What TVM does not get to compile: operators that stay in onnxruntime, and why."""

from __future__ import annotations

from onnx import NodeProto

from ...passes.errors import CompileError

# Operators of the standard domain that stay in onnxruntime whatever their inputs are.
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(("Loop", "Scan", "SequenceMap"), "loops with a body are not compiled"),
    **dict.fromkeys(
        ("SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceAt",
         "ConcatFromSequence", "SplitToSequence"), "sequences are not compiled"),
    **dict.fromkeys(("Optional", "OptionalHasElement", "OptionalGetElement"), "optional values are not compiled"),
    **dict.fromkeys(
        ("StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer"),
        "strings are not compiled"),
    **dict.fromkeys(
        ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
        "random numbers are not compiled"),
    "ImageDecoder": "image files are not compiled",
}  # fmt: skip


class ImportRefused(CompileError):
    """One node that cannot be compiled: its operator, its first output's name and the reason."""

    def __init__(self, op: str, value: str, reason: str) -> None:
        super().__init__(f"{op} at {value!r} cannot be compiled: {reason}")
        self.op, self.value, self.reason = op, value, reason


def no_converter(node: NodeProto) -> str:
    """Why an operator of the standard is not compiled as it stands, and which pass replaces it where one does."""
    from ...passes.prepare.decompose import SPELLED, WITH_BODY

    if node.op_type in SPELLED or node.op_type in WITH_BODY:
        return "no converter; the pass decompose replaces it where the shapes are known (--pin NAME=SHAPE)"
    return "no converter, and the standard defines it by no other operators"
