"""What counts as equal."""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from graphwright.passes.errors import VerificationError
from graphwright.runtime.compare import (
    FLOAT16_LIMIT,
    FLOOR,
    LIMIT,
    approximate_outputs,
    compare,
    difference,
    moved_by_rounding,
    ranked_outputs,
)
from onnx import parser

ONE = np.ones(4, np.float32)


def ok(expected: Any, found: Any, limit: float | None = None) -> bool:
    return difference("y", expected, found, limit).ok


def test_errors_are_relative_to_the_largest_value() -> None:
    """Not to each value: beside a thousand, rounding leaves 1e-2 off by a lot."""
    big = np.array([1000, 0.01], np.float32)
    assert ok(big, big + np.array([0, 0.05], np.float32))
    assert not ok(big, big + np.array([0, 0.2], np.float32))
    found = difference("y", big, big + np.array([0, 0.5], np.float32))
    assert found.scale == 1000 and found.relative == pytest.approx(5e-4, rel=1e-4)


@pytest.mark.parametrize(("limit", "equal"), [(1e-5, False), (1e-4, True), (None, True), (math.inf, True)])
def test_limits(limit: float | None, equal: bool) -> None:
    assert ok(ONE, ONE + np.float32(5e-5), limit) is equal


def test_nothing_is_too_small_to_be_judged() -> None:
    zero, small = np.zeros(4, np.float32), np.full(4, 1e-30, np.float32)
    assert not ok(zero, zero + np.float32(FLOOR / 2)) and not ok(small, -small) and ok(small, small)


def test_what_is_lost_below_the_normal_numbers_is_no_error() -> None:
    """A model whose numbers vanish: 1e-40 has five digits, and a sum of such products fewer."""
    vanished = np.full(4, 1e-39, np.float32)
    assert ok(vanished, vanished + np.float32(7e-42)) and ok(vanished, np.zeros(4, np.float32))
    assert not ok(vanished, np.full(4, 1e-37, np.float32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_types_have_a_wider_limit(dtype: Any) -> None:
    a = np.ones(4, np.float32)
    assert ok(a.astype(dtype), (a * 1.0078125).astype(dtype)) and FLOAT16_LIMIT > LIMIT
    assert not ok(a.astype(dtype), (a * 1.03).astype(dtype))


def test_special_values_stand_in_the_same_places() -> None:
    special = np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    assert ok(special, special.copy())
    for index, value in ((0, 1), (1, np.nan), (1, -np.inf), (3, np.nan), (3, np.inf)):
        other = special.copy()
        other[index] = value
        found = difference("y", special, other, math.inf)
        assert not found.ok and f"at element {index}" in found.note
    assert ok(np.full(3, np.nan), np.full(3, np.nan))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "uint64"])
def test_whole_numbers_are_equal_or_not(dtype: str) -> None:
    """A wrong token of a vocabulary of 100,000 is not a small error."""
    top = min(100_000, np.iinfo(dtype).max - 1)
    a = np.array([top, 3], dtype)
    assert ok(a, a.copy(), 1e-4)
    assert not ok(a, a + np.array([1, 0], dtype), 1e-4) and not ok(a, a + np.array([1, 0], dtype))


def test_large_whole_numbers_are_not_rounded_before_they_are_compared() -> None:
    assert not ok(np.array([2**62]), np.array([2**62 + 1]))
    assert not ok(np.array([2**64 - 1], np.uint64), np.array([2**64 - 2], np.uint64))


def test_a_budget_holds_for_whole_numbers_too() -> None:
    """Quantized outputs of a lossy pass."""
    assert ok(np.array([200], np.uint8), np.array([199], np.uint8), 0.02)
    assert not ok(np.array([200], np.uint8), np.array([100], np.uint8), 0.02)


def test_truth_values_strings_and_complex_numbers() -> None:
    assert ok(np.array([True, False]), np.array([True, False])) and not ok(np.array([True]), np.array([False]))
    words = np.array(["a", "b"], object)
    assert ok(words, words.astype("U")) and not ok(words, np.array(["a", "c"], object))
    assert ok(np.array([1 + 1j]), np.array([1 + 1.00001j])) and not ok(np.array([1 + 1j]), np.array([1 - 1j]))


@pytest.mark.parametrize(
    ("found", "note"),
    [(np.ones((2, 2), np.float32), "shape [2, 2] instead of [4]"), (np.ones(4), "type float64 instead of float32"),
     ([ONE], "shape [1, 4] instead of [4]")],
)  # fmt: skip
def test_shape_and_type(found: Any, note: str) -> None:
    assert difference("y", ONE, found).note == note


def test_sequences_and_nothing() -> None:
    assert ok([ONE, ONE], [ONE, ONE]) and ok([], []) and ok(None, None)
    assert not ok([ONE], [ONE, ONE]) and not ok([ONE], [ONE * 2]) and not ok([ONE], ONE) and not ok(None, ONE)
    assert not ok([], ONE)


def test_no_elements() -> None:
    assert ok(np.zeros((0, 3)), np.zeros((0, 3))) and not ok(np.zeros((0, 3)), np.zeros((0, 4)))


def test_the_worst_of_all_outputs_is_named() -> None:
    expected = {"a": ONE, "b": ONE, "c": ONE}
    found = {"a": ONE, "b": ONE * 2, "c": ONE * 1.5}
    verdict = compare(lambda feeds: expected, lambda feeds: found, [{"x": ONE}, {"x": ONE}], inputs="mine")
    assert not verdict.ok and verdict.worst.name == "b" and verdict.relative == 1.0 and verdict.sets == 2
    with pytest.raises(VerificationError, match=r"^it: output 'b' differs: relative error 1\.00e\+00"):
        verdict.check("it")
    missing = compare(lambda feeds: expected, lambda feeds: {"a": ONE}, [{"x": ONE}])
    with pytest.raises(VerificationError, match="output 'b' differs: is missing"):
        missing.check("it")


def test_nothing_compared_is_not_equal() -> None:
    verdict = compare(lambda feeds: {}, lambda feeds: {}, [{"x": ONE}])
    assert not verdict.ok
    with pytest.raises(VerificationError, match="nothing was compared"):
        verdict.check("it")


def test_a_verdict_is_json() -> None:
    values = [np.array([np.nan, 1], np.float32), np.array([1, np.inf], np.float32)]
    verdict = compare(lambda feeds: {"y": values[0]}, lambda feeds: {"y": values[1]}, [{"x": ONE}])
    data = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert data["ok"] is False and data["outputs"][0]["max_abs_error"] is None and data["shapes"] == ["x[4]"]


GATES = """g (float[4] x) => (float[4] near, float[4] far, float[2, 2] moved) {
  near = Sigmoid(x)  far = Mul(near, x)  two = Constant <value_ints = [2, 2]> ()  moved = Reshape(near, two) }"""


def test_only_results_of_approximate_functions_have_an_absolute_floor() -> None:
    model = ir.from_proto(parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{GATES}'))
    names = approximate_outputs(model)
    assert names == {"near", "moved"}
    small = {name: np.full(4, 1e-8, np.float32) for name in ("near", "far")}
    other = {name: -array for name, array in small.items()}
    verdict = compare(lambda feeds: small, lambda feeds: other, [{}], approximate=names)
    assert [output.ok for output in verdict.outputs] == [True, False] and verdict.outputs[0].by_floor
    assert not compare(lambda feeds: small, lambda feeds: other, [{}], 1e-4).ok


TOP_K = """<ir_version: 10, opset_import: ["" : 20]> g (float[2,5] x) => (float[2,3] values, int64[2,3] places)
{ k = Constant<value = int64[1] {3}>()  values, places = TopK(x, k) }"""


def ranks_ok(numbers: list[float], expected: list[int], found: list[int]) -> bool:
    ranked = ranked_outputs(ir.from_proto(parser.parse_model(TOP_K)))
    values = np.array([numbers], np.float32)
    a, b = ({"values": values, "places": np.array([places])} for places in (expected, found))
    return compare(lambda feeds: a, lambda feeds: b, [{}], ranked=ranked).ok


def test_places_of_equal_numbers_may_change_their_order() -> None:
    """1 and 1.00001 are exchanged by rounding; 1 and 1.01 are not."""
    assert ranks_ok([2, 1.00001, 1], [4, 0, 3], [4, 3, 0])
    assert not ranks_ok([2, 1.01, 1], [4, 0, 3], [4, 3, 0])
    assert not ranks_ok([2, 1.00001, 1], [4, 0, 3], [0, 4, 3])


def test_only_the_last_place_may_be_one_that_was_not_in_the_list() -> None:
    assert ranks_ok([3, 2, 1], [4, 0, 3], [4, 0, 2])
    assert not ranks_ok([3, 2, 1], [4, 0, 3], [4, 2, 3])
    assert not ranks_ok([3, 2, 1], [4, 0, 3], [4, 0, 0])
    assert not ranks_ok([3, 2, 1], [4, 0, 3], [4, 0, 4])
    assert not ranks_ok([np.inf, 2, 1], [4, 0, 3], [4, 0, 2])


def test_places_without_their_numbers_are_whole_numbers() -> None:
    """Other axes and unsorted results too."""
    for text in (
        TOP_K.replace("float[2,3] values, ", ""),
        TOP_K.replace("TopK(", "TopK<axis = 0>(").replace("[2,3]", "[3,5]").replace("[2,5]", "[4,5]"),
        TOP_K.replace("TopK(", "TopK<sorted = 0>("),
    ):
        assert ranked_outputs(ir.from_proto(parser.parse_model(text))) == {}
    assert not ok(np.array([4, 0, 3]), np.array([4, 3, 0]))


def test_what_rounding_the_inputs_moves_as_far_is_not_judged() -> None:
    """A distance of a point from itself is a rounding error, which another order of sums makes another one."""

    def distances(order: list[int]) -> Any:
        def run(feeds: Any) -> dict[str, Any]:
            x = np.ascontiguousarray(feeds["x"][:, order])
            squares = (x * x).sum(axis=1)
            products = np.cumsum(x[:, None] * x[None], axis=2)[..., -1]  # in another order than that sum
            away = squares[:, None] + squares[None] - np.float32(2) * products
            return {"y": np.sqrt(np.maximum(away, 0)), "z": squares}

        return run

    rising = list(range(40))
    feeds = [{"x": np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32)}]

    def wrong(feeds: Any) -> dict[str, Any]:
        found = distances(rising)(feeds)
        return {"y": found["y"] * np.float32(1.01), "z": found["z"]}

    def noisy(feeds: Any) -> dict[str, Any]:
        """Its diagonal is another rounding error."""
        found = distances(rising[::-1])(feeds)
        return {"y": np.maximum(found["y"], 1e-3 * np.eye(9, dtype=np.float32)), "z": found["z"]}

    (moved,) = moved_by_rounding(distances(rising), feeds)
    assert 1e-3 < moved["y"].largest < 1e-2 and 0 < moved["y"].count <= 9
    assert moved["z"].largest < 1e-4 and moved["z"].count == 0
    assert not compare(distances(rising), noisy, feeds, 1e-5, rounding=False).ok
    forgiven = compare(distances(rising), noisy, feeds, 1e-5)
    assert forgiven.ok and forgiven.to_json()["not_judged_below"] == forgiven.max_abs > 5e-4
    assert not compare(distances(rising), wrong, feeds, 1e-5).ok
    assert moved_by_rounding(distances(rising), [{"x": np.ones((2, 40), np.int64)}]) == [{}]
