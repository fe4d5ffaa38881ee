"""The file that measured tiles are kept in, and the value that goes with a target."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
from pathlib import Path

import pytest
from graphwright.passes.errors import OutputError
from graphwright.runtime.target import TARGETS, Target
from graphwright.runtime.tuning import Database, Measured, Tuning, kernel_name

FOUND = Measured({"rows": 6, "vectors": 4, "depth": None}, 20.0, 16.0, 1.25, 1.1, 7, True)
NOTHING = Measured(None, 20.0, 20.0, candidates=7)


def test_a_tuning_finds_the_tile_of_a_kernel_and_of_no_other() -> None:
    spec = {"rows": 8, "sizes": (3, 3)}
    tuning = Tuning.from_json({kernel_name("gemm", spec): {"rows": 4, "vectors": 2}})
    assert tuning.find("gemm", {"sizes": [3, 3], "rows": 8}) == {"rows": 4, "vectors": 2}
    assert tuning.find("conv", spec) is None and tuning.find("gemm", {**spec, "rows": 9}) is None
    assert Tuning().find("gemm", spec) is None


def test_a_target_keeps_its_tuning_through_json() -> None:
    plain = TARGETS["cpu-avx2"]
    assert "tuning" not in plain.to_json() and Target.from_json(plain.to_json()) == plain
    tuned = dataclasses.replace(plain, tuning=Tuning.from_json({kernel_name("gemm", {"rows": 8}): {"rows": 4}}))
    again = Target.from_json(json.loads(json.dumps(tuned.to_json())))
    assert again == tuned and hash(again) == hash(tuned) and again != plain


def test_what_was_added_is_read_and_the_last_line_counts(tmp_path: Path) -> None:
    store = Database(tmp_path / "deep" / "file.jsonl")
    assert store.read() == {}
    store.add("a", NOTHING)
    store.add("b", FOUND)
    store.add("a", FOUND)
    assert Database(store.path).read() == {"a": FOUND, "b": FOUND}


def test_damaged_lines_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Database(tmp_path / "file.jsonl")
    for key in "abc":
        store.add(key, FOUND)
    first, second, third = store.path.read_bytes().splitlines()
    altered = second.replace(b'"rows": 6', b'"rows": 9')
    assert altered != second
    lines = [first, altered, b"\xff\x00 no JSON", b"[]", b"null", b'{"key": "d"}', third[: len(third) // 2]]
    store.path.write_bytes(b"\n".join(lines))
    with caplog.at_level(logging.WARNING, logger="graphwright"):
        assert store.read() == {"a": FOUND}
    assert "6 damaged lines are left out" in caplog.text
    store.add("e", NOTHING)  # behind a line that was torn off
    assert store.read() == {"a": FOUND, "e": NOTHING}


def _add(path: Path, name: str, count: int) -> None:
    for number in range(count):
        Database(path).add(f"{name}{number}", dataclasses.replace(FOUND, candidates=number))


def test_two_processes_may_write(tmp_path: Path) -> None:
    path, context = tmp_path / "file.jsonl", multiprocessing.get_context("spawn")
    writers = [context.Process(target=_add, args=(path, name, 100)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = Database(path).read()
    assert {f"{name}{n}": n for name in "ab" for n in range(100)} == {k: m.candidates for k, m in found.items()}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="set GRAPHWRIGHT_CACHE to a folder that can"):
        Database(tmp_path / "file" / "x.jsonl").add("a", FOUND)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot be read"):
        Database(tmp_path / "folder").read()
