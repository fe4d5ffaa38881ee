from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphwright.passes.errors import ArtifactError, CompileError
from graphwright.runtime import elf, link
from graphwright.runtime.target import TARGETS, Target, target_names

from .conftest import Dense, compiled

# One rounding of a sum of 16 products of values around 1, in units of float32's spacing at 10.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def objects(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the object files of the dense module for cpu-baseline."""
    folder = tmp_path_factory.mktemp("objects")

    def keep(output: str, files: list[str], **_: Any) -> None:
        for file in files:
            (folder / Path(file).name).write_bytes(Path(file).read_bytes())

    compiled(dense.module, TARGETS["cpu-baseline"]).export_library(str(folder / "x.so"), fcompile=keep)
    return folder


def test_the_objects_are_code_and_packed_imports(objects: Path) -> None:
    assert sorted(p.name for p in objects.iterdir()) == ["devc.o", "lib0.o"]


@pytest.mark.parametrize("name", target_names())
def test_every_target_links(name: str, dense: Dense, tmp_path: Path) -> None:
    target = Target.named(name)
    files = link.export(compiled(dense.module, target), target, tmp_path)
    found = elf.read(files[0])
    assert found.machine == target.machine
    assert b".symtab" not in files[0].read_bytes(), "not stripped"
    assert (found.flags & elf.ARM_HARD_FLOAT != 0) == (name == "armv7")
    marks = {"cuda": "__global__", "opencl": "__kernel", "webgpu": "@compute"}
    sources = {"cuda": ["kernels.cu"], "opencl": ["kernels.cl"], "webgpu": ["kernels.wgsl"]}
    assert [path.name for path in files[1:]] == sources.get(name, [])
    for path in files[1:]:
        assert marks[name] in path.read_text()


@pytest.mark.parametrize("name", [n for n in target_names() if n.startswith("cpu")])
def test_libraries_for_this_processor_compute(name: str, dense: Dense, tmp_path: Path) -> None:
    target = Target.named(name)
    if not target.runs_here:
        pytest.skip(f"this processor has not the features of {name}")
    import tvm
    from tvm import relax

    library = link.export(compiled(dense.module, target), target, tmp_path)[0]
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    feeds = [tvm.runtime.tensor(array) for array in dense.feeds.values()]
    results = machine["main"](*feeds, tuple(tvm.runtime.tensor(array) for array in dense.weights.values()))
    for result, expected in zip(results, dense.expected, strict=True):
        np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=TOLERANCE)


def test_no_system_compiler_is_needed(objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CC", "CXX", "LD", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "cache"))
    library = link.link(sorted(objects.glob("*.o")), TARGETS["cpu-baseline"], tmp_path / "model.so")
    assert elf.read(library).machine == "x86_64"


def test_the_same_objects_give_the_same_bytes(dense: Dense, tmp_path: Path) -> None:
    target = TARGETS["arm64"]
    libraries = []
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
        libraries += link.export(compiled(dense.module, target), target, tmp_path / name)
    assert libraries[0].read_bytes() == libraries[1].read_bytes()


def test_links_at_once_share_an_empty_cache(
    objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "cache"))
    files = sorted(objects.glob("*.o"))
    paths = [tmp_path / str(index) / "model.so" for index in range(4)]
    for path in paths:
        path.parent.mkdir()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: link.link(files, TARGETS["cpu-baseline"], path), paths))
    assert len({path.read_bytes() for path in paths}) == 1


def test_a_link_is_quick(objects: Path, tmp_path: Path) -> None:
    files = sorted(objects.glob("*.o"))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        link.link(files, TARGETS["cpu-baseline"], tmp_path / "model.so")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3  # about 0.02 s on an idle machine; a suite links thousands


def test_without_ziglang_the_error_says_what_to_install(
    objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(CompileError, match=r"no linker: .* `pip install ziglang`"):
        link.link(sorted(objects.glob("*.o")), TARGETS["cpu-baseline"], tmp_path / "model.so")


def test_a_failed_link_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.o").write_bytes(b"no object file")
    with pytest.raises(CompileError, match=r"model\.so: zig failed: .*bad\.o") as error:
        link.link([tmp_path / "bad.o"], TARGETS["cpu-baseline"], tmp_path / "model.so")
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_written_is_named(
    objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CompileError, match="set GRAPHWRIGHT_CACHE to a folder that can"):
        link.link(sorted(objects.glob("*.o")), TARGETS["cpu-baseline"], tmp_path / "model.so")


def test_a_call_that_nothing_provides_is_found_at_build_time(tmp_path: Path) -> None:
    module = _extern("graphwright_no_such_function", "float32")
    with pytest.raises(
        CompileError, match="calls graphwright_no_such_function, which no library of cpu-baseline"
    ):
        link.export(compiled(module, TARGETS["cpu-baseline"]), TARGETS["cpu-baseline"], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_compilers_own_functions_are_linked_in(tmp_path: Path) -> None:
    """armv7 divides 64-bit integers by calling __aeabi_ldivmod, which no shared library has."""
    target = TARGETS["armv7"]
    library = link.export(compiled(_divide(), target), target, tmp_path)[0]
    assert {name for name in elf.read(library).undefined if not name.startswith("TVM")} == set()


def test_other_files_are_not_elf(tmp_path: Path) -> None:
    (tmp_path / "model.so").write_bytes(b"\x7fELF")
    with pytest.raises(ArtifactError, match="not a little-endian ELF file"):
        elf.read(tmp_path / "model.so")


def _extern(name: str, dtype: str) -> Any:
    import tvm
    from tvm import relax, te, tirx

    x = te.placeholder((4,), dtype, "x")
    y = te.compute((4,), lambda i: tirx.call_extern(dtype, name, x[i]), "y")
    return _module(tvm, relax, te.create_prim_func([x, y]), dtype)


def _divide() -> Any:
    import tvm
    from tvm import relax, te, tirx

    x = te.placeholder((4,), "int64", "x")
    y = te.compute((4,), lambda i: tirx.truncdiv(x[i], x[3 - i]), "y")
    return _module(tvm, relax, te.create_prim_func([x, y]), "int64")


def _module(tvm: Any, relax: Any, function: Any, dtype: str) -> Any:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), dtype))
    with builder.function("main", [x]):
        kernel = builder.add_func(function.with_attr("global_symbol", "kernel"), "kernel")
        builder.emit_func_output(builder.emit(relax.call_tir(kernel, [x], relax.TensorType((4,), dtype))))
    return builder.get()
