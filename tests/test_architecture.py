"""Imports point one way, heavy ones wait until they are needed, and every package has one name."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("passes", "runtime", "models", "tools", "graphwright")
# What each room may import of the others; `TYPE_CHECKING` blocks count too, save in the public package.
MAY_IMPORT = {
    "passes": set[str](),
    "models": {"passes"},
    "runtime": {"passes"},
    "tools": {"passes", "runtime", "models"},
    "graphwright": {"passes", "runtime", "models"},
}
HEAVY = frozenset({"tvm", "tvm_ffi", "torch", "onnxruntime"})
# Rooms whose modules start in milliseconds: everything beyond the standard library and click waits.
LIGHT = frozenset({"tools", "graphwright"})
LIGHT_PACKAGES = frozenset({"click", "graphwright"})
# Modules that are nothing without the package, and imported late themselves.
COMPILING = (
    "runtime/blocked.py", "runtime/codegen.py", "runtime/elements.py", "runtime/importer.py", "runtime/importing/",
    "runtime/kernels/", "runtime/phases.py", "runtime/plan.py", "runtime/repeat.py", "runtime/rounding.py",
    "runtime/schedule.py", "runtime/claiming.py", "runtime/templates.py", "runtime/trials.py",
)  # fmt: skip
ONLY_WITH = {
    "tvm": COMPILING,
    "tvm_ffi": COMPILING,
    "torch": (
        "models/checkpoint.py", "models/decoding.py", "models/digits_cnn.py", "models/fake_quantize.py",
        "models/fit.py", "models/fit_widths.py", "models/gguf_file.py", "models/gpt.py", "models/gpt_moby.py",
        "models/huggingface.py", "models/hyperprior.py", "models/hyperprior_training.py", "models/llama.py",
        "models/minilm.py", "models/mobilenet.py",
        "models/mobilenet_v3.py", "models/resnet.py", "models/seeding.py", "models/torch_graph.py",
        "models/tiny_lm.py", "models/tiny_lm_training.py", "models/torch_layers.py", "models/torch_operators.py",
        "models/training_state.py", "models/unet.py",
        "models/vit.py",
    ),
}  # fmt: skip
LATE = ("tools/bench", "tools/backend", "tools/config.py")


def files(room: str) -> list[Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)


ALL = [(room, path) for room in ROOMS for path in files(room)]
IDS = [str(path.relative_to(ROOT)) for _, path in ALL]


def absolute(path: Path, node: ast.ImportFrom) -> str:
    """The full name of the module that `from ... import` names."""
    if not node.level:
        return node.module or ""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ["graphwright", *parts] if parts[0] != "graphwright" else list(parts)
    base = package[: len(package) - node.level]
    return ".".join([*base, *([node.module] if node.module else [])])


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path) -> Iterator[tuple[str, bool, bool]]:
    """(module, at import time, for the type checker only) of every import of a file, lazy ones included."""

    def walk(node: ast.AST, top: bool, typing: bool) -> Iterator[tuple[str, bool, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, top, typing
            elif isinstance(child, ast.ImportFrom):
                module = absolute(path, child)
                yield module, top, typing
                for alias in child.names:  # from . import pipeline
                    yield f"{module}.{alias.name}", top, typing
            else:
                lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, top and not lazy, typing or is_type_checking(child))

    yield from walk(ast.parse(path.read_text()), True, False)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "graphwright":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "graphwright"


def test_the_reader_of_imports_sees_them_all(tmp_path: Path) -> None:
    """A check that sees nothing would always pass."""
    source = ROOT / "runtime" / "driver.py"
    found = {(module, top) for module, top, typing in imports(source) if not typing}
    assert ("graphwright.passes.io", True) in found and ("graphwright.runtime.culprit", False) in found
    assert ("graphwright.runtime.artifact", True, True) in set(imports(source))


@pytest.mark.parametrize(("room", "path"), ALL, ids=IDS)
def test_imports_point_one_way(room: str, path: Path) -> None:
    for module, _, typing in imports(path):
        other = room_of(module)
        if other in (None, room, "graphwright") or (room == "graphwright" and typing):
            continue
        assert other in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize(("room", "path"), ALL, ids=IDS)
def test_no_room_is_imported_by_its_folders_name(room: str, path: Path) -> None:
    """`passes` instead of `graphwright.passes` works from the repository's root and nowhere else."""
    for module, _, _ in imports(path):
        assert module.split(".")[0] not in ("passes", "runtime", "models", "tools"), module


@pytest.mark.parametrize(("room", "path"), ALL, ids=IDS)
def test_heavy_packages_wait(room: str, path: Path) -> None:
    name = str(path.relative_to(ROOT))
    for module, top, typing in imports(path):
        package = module.split(".")[0]
        if typing or package == "__future__":
            continue
        if room == "passes":
            assert package not in HEAVY, f"{name} imports {module}: passes never do, not even late"
        if top and package in HEAVY:
            assert name.startswith(ONLY_WITH.get(package, "-")), f"{name} imports {module} at the top"
        if top and room in LIGHT and not name.startswith(LATE):
            known = package in sys.stdlib_module_names or package in LIGHT_PACKAGES
            assert known, f"{name} imports {module} at the top"


def test_nothing_imports_tools() -> None:
    for room in ("passes", "runtime", "models"):
        for path in files(room):
            assert not any(module.startswith("graphwright.tools") for module, _, _ in imports(path)), path


def loaded(code: str) -> set[str]:
    code += "\nimport sys; print('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(done.stdout.partition("LOADED ")[2].split())


def test_the_package_itself_costs_nothing() -> None:
    modules = loaded("import graphwright")
    assert not {m.split(".")[0] for m in modules} & {*HEAVY, "numpy", "onnx", "onnx_ir", "pydantic", "click"}


def test_every_pass_runs_without_a_compiler_or_a_runtime() -> None:
    """Also after a run, so late imports of what they use count."""
    modules = loaded("""
import onnx
from onnx import parser
import onnx_ir as ir
from graphwright.passes import registry
from graphwright.passes.base import PassContext
from graphwright.passes.pipeline import Pipeline
text = '<ir_version: 10, opset_import: ["" : 20]> g (float[2,4] x) => (float[2,4] y) { t = Add(x, x)  y = Softmax(t) }'
model = ir.from_proto(parser.parse_model(text))
for name in registry.PASSES:
    Pipeline.parse(name).run(model, PassContext(target="cpu", dry_run=True))
""")
    tops = {m.split(".")[0] for m in modules}
    assert "onnx_ir" in tops and not tops & HEAVY
    assert not tops & {"passes", "runtime", "models", "tools"}


def test_modules_that_need_a_heavy_package_are_imported_late() -> None:
    """Everything else of the rooms can be imported without it."""
    late = [prefix for prefixes in ONLY_WITH.values() for prefix in prefixes]
    names = []
    for path in (p for room in ("passes", "runtime", "models") for p in files(room)):
        relative = path.relative_to(ROOT)
        if path.name != "__init__.py" and not str(relative).startswith(tuple(late)):
            names.append(".".join(["graphwright", *relative.with_suffix("").parts]))
    modules = loaded(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert set(names) <= modules and not {m.split(".")[0] for m in modules} & HEAVY


def test_public_names_are_there() -> None:
    import graphwright

    for name in graphwright.__all__:
        assert getattr(graphwright, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = graphwright.nothing


def test_every_room_in_the_description_exists() -> None:
    """docs/architecture.md names files in backticks-free columns: those of the rooms must exist."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = text.partition("## Rooms")[2].partition("Imports point one way")[0]
    room = ""
    named = 0
    for line in rooms.splitlines():
        if line.startswith("    ") and not line.startswith("      "):
            room = line.split()[0].rstrip("/")
        for word in line.split():
            if word.endswith(".py") and room in ROOMS:
                assert (ROOT / room / word).exists(), f"{room}/{word}"
                named += 1
    assert named > 15
