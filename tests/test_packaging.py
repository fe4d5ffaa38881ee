"""What is installed: every sub-package, in a wheel and in an editable install, and the entry points."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
ROOMS = ("passes", "runtime", "models", "tools")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_folders() -> set[str]:
    """The names under which the folders with Python files are imported."""
    found = {"graphwright"}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            found.add(".".join(["graphwright", *path.parent.relative_to(ROOT).parts]))
    return {name for name in found if "__pycache__" not in name}


def test_every_package_is_listed() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == package_folders()


def test_packages_can_be_told_from_folders_that_happen_to_be_there() -> None:
    for name in PROJECT["tool"]["setuptools"]["packages"]:
        folder = ROOT.joinpath(*name.split(".")[1:]) if name != "graphwright" else ROOT / "graphwright"
        assert any(folder.glob("*.py")), folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of the build stays in the repository, and without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    tracked = [ROOT / name for name in done.stdout.splitlines()]
    paths = [p for p in tracked if p.is_file()] or [
        p for room in (*ROOMS, "graphwright") for p in (ROOT / room).rglob("*") if p.is_file()
    ]
    for path in (*paths, ROOT / "pyproject.toml", ROOT / "README.md"):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in (*ROOMS, "graphwright") or len(relative.parts) == 1:
            (source / relative).parent.mkdir(parents=True, exist_ok=True)
            (source / relative).write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--wheel-dir", str(folder), str(source)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("graphwright-*.whl")
    return path


def test_the_wheel_has_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    sources = [Path(line) for line in tracked.splitlines() if line.endswith((".py", ".cc", ".typed"))]
    if not sources:
        pytest.skip("not a git checkout")
    expected = {
        str(path if path.parts[0] == "graphwright" else Path("graphwright") / path)
        for path in sources
        if path.parts[0] in (*ROOMS, "graphwright") and (ROOT / path).is_file()
    }
    assert len(expected) > 60 and "graphwright/py.typed" in expected
    assert any(name.endswith(".cc") for name in expected)
    assert expected <= names, sorted(expected - names)
    own = {name for name in names if ".dist-info/" not in name}
    assert all(name.startswith("graphwright/") for name in own), own


def test_the_wheel_works_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    """Unpacked on the path, it is imported instead of the checkout; its commands start."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import importlib, graphwright
for name in {sorted(package_folders())!r}:
    module = importlib.import_module(name)
    where = getattr(module, "__file__", None) or list(module.__path__)[0]
    assert where.startswith({str(tmp_path)!r}), where
from graphwright.tools.cli import main
assert not {{"passes", "runtime", "models", "tools"}} & set(sys.modules)
main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_the_editable_install_reaches_every_package() -> None:
    code = f"""
import importlib
for name in {sorted(package_folders())!r}:
    importlib.import_module(name)
print("all")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout == "all\n", done.stderr


def test_commands_are_installed() -> None:
    wanted = PROJECT["project"]["scripts"]
    scripts = {e.name: e.value for e in metadata.entry_points(group="console_scripts") if e.name in wanted}
    assert scripts == PROJECT["project"]["scripts"]
    for name in scripts:
        assert callable(next(iter(metadata.entry_points(group="console_scripts", name=name))).load())
        program = Path(sys.executable).with_name(name)
        done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "Usage" in done.stdout


def test_what_is_locked_is_what_is_asked_for() -> None:
    """Every dependency and every package of the extras has one exact version in the lock file, inside its range."""
    from importlib.metadata import version as installed

    packaging = pytest.importorskip("packaging.requirements")
    lock = dict(
        line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line
    )
    locked = {name.lower().replace("_", "-"): version.split(";")[0].strip() for name, version in lock.items()}
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for text in wanted:
        requirement = packaging.Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert name in locked, f"{text} is not in requirements.lock"
        assert requirement.specifier.contains(locked[name], prereleases=True), f"{text} is locked to {locked[name]}"
        assert installed(requirement.name)


# --- passes of other packages -----------------------------------------------------------------------------------

PLUGIN = '''
from dataclasses import dataclass
from graphwright.passes.base import Contract, Pass

@dataclass(frozen=True)
class Shout(Pass):
    """Makes names loud."""
    times: int = 1
    name = "shout"
    contract = Contract.EXACT

    def run(self, model, ctx):
        report = self.report()
        for node in model.graph:
            if node.name and not node.name.isupper():
                node.name = node.name.upper() + "!" * self.times
                report.changed("shout", node.outputs[0].name)
        return report

class NotAPass:
    pass

@dataclass(frozen=True)
class OtherName(Shout):
    name = "other"
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """An installed package with four entry points, two of them wrong, and one that takes a name of ours."""
    (tmp_path / "shouting.py").write_text(PLUGIN)
    info = tmp_path / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[graphwright.passes]\nshout = shouting:Shout\nnot-a-pass = shouting:NotAPass\nsimplify = shouting:Shout\n"
        "misnamed = shouting:OtherName\nabsent = no_such_module:Thing\n"
    )
    return tmp_path


def in_plugin(plugin: Path, code: str) -> str:
    code = f"import sys\nsys.path.insert(0, {str(plugin)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pass_of_another_package(plugin: Path) -> None:
    out = in_plugin(plugin, """
from onnx import parser
import onnx_ir as ir
from graphwright.passes import registry
from graphwright.passes.pipeline import Pipeline
text = '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { [quiet] y = Relu(x) }'
pipeline = Pipeline.parse("shout:times=2,simplify")
model, reports = pipeline.run(ir.from_proto(parser.parse_model(text)))
print(str(pipeline), model.graph[0].name, reports[0].changes[0].value, "shout" in registry.pass_names())
print(registry.pass_class("simplify").__module__)
""")  # fmt: skip
    assert out == "shout:times=2,simplify QUIET!! y True\ngraphwright.passes.prepare.simplify\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not-a-pass", "is not a subclass of graphwright.passes.base.Pass"),
        ("misnamed", "registered under a name that is not its own ('other')"),
        ("absent", "cannot be loaded: No module named 'no_such_module'"),
        ("shot", "unknown pass 'shot'; did you mean shout?"),
    ],
)
def test_wrong_passes_of_another_package(plugin: Path, name: str, message: str) -> None:
    out = in_plugin(plugin, f"""
from graphwright.passes import registry
from graphwright.passes.errors import GraphwrightError
try:
    registry.pass_class({name!r})
except GraphwrightError as error:
    print(error)
""")  # fmt: skip
    assert message in out and out.count("\n") == 1


def test_the_command_lists_it(plugin: Path) -> None:
    out = in_plugin(plugin, 'from graphwright.tools.cli import main\nmain(["passes"], standalone_mode=False)')
    assert "shout" in out
