"""Inputs made up so that a model accepts them, and inputs from files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphwright.passes.errors import GraphwrightError, InputError
from graphwright.runtime.feeds import (
    Feeds,
    check_names,
    load_feeds,
    made_up,
    required_inputs,
    samples,
)
from graphwright.runtime.indices import index_range
from graphwright.runtime.reference import Reference
from onnx import numpy_helper, parser

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'


def model(text: str, **weights: np.ndarray) -> ir.Model:
    proto = parser.parse_model(f"{HEADER}\ng {text}")
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return ir.from_proto(proto)


def feeds(model: ir.Model, run: Callable[[Feeds], Any] | None = None, **options: Any) -> list[Feeds]:
    return [one for one, _ in made_up(model, run or Reference(model).run, **options)]


def test_every_symbol_gets_two_sizes() -> None:
    made = feeds(model("(float[N,S,8] x, int64[N,S] ids) => (float[N,S,8] y) { y = Neg(x) }"))
    assert len(made) == 2
    for axis in (0, 1):
        assert made[0]["x"].shape[axis] == made[0]["ids"].shape[axis] != made[1]["x"].shape[axis]
    assert [one["x"].dtype for one in made] == [np.float32] * 2 and made[0]["ids"].dtype == np.int64


@pytest.mark.parametrize("mode, limit", [("linear", 20), ("circular", 24)])
def test_an_update_of_a_cache_ends_within_it(mode: str, limit: int) -> None:
    """5 rows of 24: the last place that they may begin at is 19."""
    cached = model(
        "(float[1,2,24,8] past, float[1,2,5,8] rows, int64[1] position) => (float[1,2,24,8] present) "
        f'{{ present = TensorScatter<axis = -2, mode = "{mode}">(past, rows, position) }}'
    )
    position = next(value for value in cached.graph.inputs if value.name == "position")
    assert index_range(position) == (0, limit)


def test_positions_of_a_generator_are_ones_that_it_takes(tiny_generator: Any) -> None:
    for part in ("prefill", "decode"):
        loaded = ir.load(tiny_generator.root / f"{part}.onnx")
        made = feeds(loaded, sets=2)
        assert made
        for one in made:
            assert 0 <= one["position"][0] <= 96 - one["input_ids"].shape[1]


def renamed(model: ir.Model, names: dict[str, str]) -> ir.Model:
    """The model with other names of sizes, which the parser has no syntax for."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([d if isinstance(d, int) else names.get(d.value or "", d.value) for d in value.shape])
    return model


@pytest.mark.parametrize(
    ("name", "size"),
    [("past + new", lambda p, t: p + t), ("past+1", lambda p, t: p + 1), ("2*(past - 1) + new//2", None)],
)
def test_a_size_named_as_a_sum_is_that_sum(name: str, size: Callable[[int, int], int] | None) -> None:
    """Though 1, which is broadcast, would be accepted as well."""
    text = "(float[B,past] p, float[B,new] t, float[B,all] m) => (float[B,all] y) { y = Neg(m) }"
    made = feeds(renamed(model(text), {"all": name}), lambda feeds: None)
    assert len(made) == 2
    for one in made:
        past, new = one["p"].shape[1], one["t"].shape[1]
        assert one["m"].shape[1] == (size(past, new) if size else 2 * (past - 1) + new // 2)


@pytest.mark.parametrize("name", ["past + other", "past.shape + 1", "f(past)", "past + ", "past / 2", "-past", "a b"])
def test_names_that_are_no_arithmetic_of_sizes_are_names(name: str) -> None:
    text = "(float[B,past] p, float[B,all] m) => (float[B,all] y) { y = Neg(m) }"
    made = feeds(renamed(model(text), {"all": name}), lambda feeds: None)
    assert len(made) == 2 and made[0]["m"].shape[1] != made[1]["m"].shape[1]


def test_a_size_whose_name_is_wrong_is_found_all_the_same() -> None:
    text = "(float[4,past] p, float[all,4] m) => (float[4,4] y) { y = MatMul(p, m) }"
    made = feeds(renamed(model(text), {"all": "past + 1"}))
    assert len(made) == 2 and all(one["m"].shape[0] == one["p"].shape[1] for one in made)


def test_fixed_shapes_need_one_set() -> None:
    (made,) = feeds(model("(float[2,3] x, float s) => (float[2,3] y) { y = Mul(x, s) }"))
    assert made["x"].shape == (2, 3) and isinstance(made["s"], np.ndarray) and made["s"].shape == ()


@pytest.mark.parametrize("word", ["bool", "int64", "float", "uint8", "float16", "double"])
def test_scalars_are_arrays(word: str) -> None:
    """NumPy's generators return plain scalars for shape (), which onnxruntime does not take."""
    (made,) = feeds(model(f"({word} x) => ({word} y) {{ y = Identity(x) }}"))
    assert isinstance(made["x"], np.ndarray) and made["x"].shape == ()


def test_the_same_seed_gives_the_same_numbers() -> None:
    one = model("(float[N,8] x) => (float[N,8] y) { y = Neg(x) }")
    first, again, other = (feeds(one, seed=seed)[0]["x"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_indices_stay_inside_their_table() -> None:
    table = np.zeros((5, 4), np.float32)
    whole = model("(int64[N,S] ids) => (float[N,S,4] y) { i = Cast<to=6>(ids)  y = Gather(w, i) }", w=table)
    assert index_range(whole.graph.inputs[0]) == (0, 5)
    for made in feeds(whole):
        assert made["ids"].min() >= 0 and made["ids"].max() < 5


@pytest.mark.parametrize(
    ("text", "top"),
    [
        ("(float[N,4] x, int64[N,2] i) => (float[N,2] y) { y = GatherElements(x, i) }", None),
        ("(float[N,4] x, int64[K,2] i) => (float[K] y) { y = GatherND(x, i) }", None),
        ("(float[N,4] x, int64[N,1] i) => (float[N] y) { y = GatherND<batch_dims=1>(x, i) }", 4),
        ("(float[N,M] x, int64[2] i) => (float[2,M] y) { r = Relu(x)  y = Gather(x, i)  z = Gather(r, i) }", None),
        ("(float[4,N] x, int64[3] i) => (float[4,3] y) { k = Cast<to=6>(i)  y = Gather<axis=-1>(x, k) }", None),
    ],
)
def test_places_stay_inside_tensors_whose_sizes_are_made_up(text: str, top: int | None) -> None:
    whole = model(text)
    assert len(feeds(whole)) >= 1
    if top is not None:
        assert index_range(whole.graph.inputs[1]) == (0, top)


@pytest.mark.parametrize(
    "text",
    [
        "(float[6,4] x, int64[3,4] i, float[3,4] u) => (float[6,4] y) { y = ScatterElements(x, i, u) }",
        "(float[4,6] x, int64[4,3] i, float[4,3] u) => (float[4,6] y) { y = ScatterElements<axis=-1>(x, i, u) }",
        "(float[3,4] x, int64[2,5,2] i, float[2,5] u) => (float[3,4] y) { y = ScatterND(x, i, u) }",
    ],
)
def test_writes_go_to_places_that_differ(text: str) -> None:
    whole = model(text)
    for seed in range(5):
        (made,) = feeds(whole, seed=seed)
        made["u"] = np.arange(1, made["u"].size + 1, dtype=np.float32).reshape(made["u"].shape)
        (y,) = Reference(whole).run(made).values()
        assert np.isin(made["u"], y).all()


def test_lengths_of_sequences() -> None:
    text = "(float[L,B,3] x, int32[B] n) => (float[L,1,B,2] y) { y = RNN<hidden_size=2>(x, w, r, , n) }"
    whole = model(text, w=np.ones((1, 2, 3), np.float32), r=np.ones((1, 2, 2), np.float32))
    for made in [*feeds(whole), *feeds(whole, pins={"x": (2, 5, 3)})]:
        assert made["n"].min() >= 1 and made["n"].max() <= made["x"].shape[0]
    assert index_range(whole.graph.inputs[1]) is None


def test_numbers_that_must_be_small() -> None:
    whole = model("(float[5,4] x, int64[1] k) => (float[L,4] v, int64[L,4] i) { v, i = TopK<axis=0>(x, k) }")
    assert 0 <= feeds(whole)[0]["k"] < 2


def test_names_that_tell_what_they_are() -> None:
    (made,) = feeds(model("(int64[1,8] attention_mask, int64[1,8] token_type_ids) => (int64[1,8] y)"
                          " { y = Add(attention_mask, token_type_ids) }"))  # fmt: skip
    assert made["attention_mask"].all() and not made["token_type_ids"].any()


def test_sizes_that_the_model_refuses_are_passed_over() -> None:
    """Only multiples of 32 that are not tied to the batch."""
    whole = model("(float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Neg(x) }")

    def run(made: Feeds) -> int:
        if made["x"].shape[2] % 32 or made["x"].shape[3] % 32:
            raise InputError("not a multiple of 32")
        return 7

    found = made_up(whole, run)
    assert len(found) == 2 and [result for _, result in found] == [7, 7]
    assert all(made["x"].shape[2] % 32 == 0 for made, _ in found)


def test_dimensions_that_may_differ_do() -> None:
    """Height and width, and two batches: the second set tells them apart."""
    for text in ("(float[1,3,H,W] x) => (float[1,3,H,W] y) { y = Neg(x) }",
                 "(float[N,3] x, float[M,3] z) => (float[N,3] y) { s = ReduceSum(z)  y = Add(x, s) }"):  # fmt: skip
        first, second = feeds(model(text))
        assert len(set(_dynamic(first))) == 1 and len(set(_dynamic(second))) == 2


def test_a_number_for_each_image_does_not_make_many_images() -> None:
    first, second = feeds(model("(float[N,4,64,64] x, int64[N] step) => (float[N,4,64,64] y) { y = Neg(x) }"))
    assert [len(made["step"]) for made in (first, second)] == [1, 2]
    assert all(len(made["x"]) == len(made["step"]) for made in (first, second))


def _dynamic(made: Feeds) -> list[int]:
    return [*made["x"].shape[2:]] or [array.shape[0] for array in made.values()]


def test_pinned_shapes_are_used() -> None:
    made = feeds(model("(float[N,S] x, float[N,2] z) => (float[N,S] y) { y = Neg(x) }"), pins={"x": (3, 5)})
    assert made[0]["x"].shape == (3, 5) and made[0]["z"].shape == (3, 2)


def test_a_model_that_takes_nothing_says_why() -> None:
    def run(made: Feeds) -> None:
        raise InputError("never enough")

    with pytest.raises(GraphwrightError, match="never enough"):
        made_up(model("(float[N,8] x) => (float[N,8] y) { y = Neg(x) }"), run)


def test_sequences_cannot_be_made_up() -> None:
    whole = model("(seq(float[4]) x) => (int64[] y) { y = SequenceLength(x) }")
    with pytest.raises(InputError, match="'x' is no tensor"):
        feeds(whole)


def test_defaults_are_not_asked_for() -> None:
    whole = model("(float[4] x, float[4] w) => (float[4] y) { y = Add(x, w) }", w=np.ones(4, np.float32))
    assert [value.name for value in required_inputs(whole)] == ["x"]
    assert list(feeds(whole)[0]) == ["x"]


def test_arrays_from_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.ones(3), **{"a/b:0": np.zeros(2)})
    found = load_feeds(tmp_path / "in.npz")
    assert set(found) == {"x", "a/b:0"} and found["x"].shape == (3,)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "cannot be read as .npz"), (b"PK\x03\x04 broken", "cannot be read as .npz"),
     (b"text\n", r"cannot be read as .npz \(it holds something else than arrays\)")],
)  # fmt: skip
def test_files_that_are_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "in.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_feeds(path)
    assert "\n" not in str(caught.value)


def packed_zeros(path: Path, shape: str, nbytes: int) -> None:
    """An .npz of one float32 array `x` that says it is of `shape` and holds `nbytes` zeros, in a few kilobytes."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    text = header.ljust(117) + "\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w", force_zip64=True) as f:
        f.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())
        for _ in range(nbytes >> 20):
            f.write(bytes(1 << 20))


def test_arrays_larger_than_memory_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_zeros(tmp_path / "in.npz", "(1048576, 16)", 64 << 20)
    monkeypatch.setattr("graphwright.runtime.feeds.free_memory", lambda: 30e6)
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: pytest.fail("was read"))
    with pytest.raises(InputError, match=r"arrays take 0\.1 GB when unpacked, and 0\.0 GB of memory are free"):
        load_feeds(tmp_path / "in.npz")


def test_arrays_of_another_shape_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model("(float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    packed_zeros(tmp_path / "in.npz", "(1048576, 16)", 64 << 20)
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: pytest.fail("was read"))
    with pytest.raises(InputError, match=r"input 'x' has shape \[1048576, 16\]; expected \['N', 4\]"):
        load_feeds(tmp_path / "in.npz", whole)


@pytest.mark.parametrize("shape", ["(4000000000, 16)", "(3, 5)"])
def test_an_array_that_lies_about_its_size(tmp_path: Path, shape: str) -> None:
    packed_zeros(tmp_path / "in.npz", shape, 1 << 20)
    with pytest.raises(InputError, match=r"x.npy says it has \d+ bytes and has 1048576"):
        load_feeds(tmp_path / "in.npz")


def test_objects_in_a_file_are_not_run(tmp_path: Path) -> None:
    """A pickle inside an .npz could run any code."""
    np.savez(tmp_path / "in.npz", x=np.array([{"a": 1}], object))
    with pytest.raises(InputError, match=r"cannot be read as \.npz"):
        load_feeds(tmp_path / "in.npz")


@pytest.mark.parametrize(
    ("names", "message"), [(("x", "q"), "where: the model has no input 'q'"), ((), "where: input 'x' is missing")]
)
def test_names(names: tuple[str, ...], message: str) -> None:
    whole = model("(float[4] x) => (float[4] y) { y = Neg(x) }")
    check_names({"x": np.ones(4)}, whole, "where")
    with pytest.raises(InputError, match=message):
        check_names(dict.fromkeys(names, np.ones(4)), whole, "where")


def test_samples() -> None:
    assert samples([{"x": np.ones(1)}, {"x": np.zeros(1)}])["x"][1] == 0 and samples([]) == {}
