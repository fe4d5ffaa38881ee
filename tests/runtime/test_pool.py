"""The thread pool does every task once, whoever is free for it, and compiled kernels run on it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from graphwright.passes.errors import ArtifactError
from graphwright.runtime import driver, link, runner
from graphwright.runtime.artifact import Artifact, write_manifest
from graphwright.runtime.native_code import NATIVE
from graphwright.runtime.session import Session
from graphwright.runtime.target import TARGETS
from onnx import parser

pytest.importorskip("tvm")

STRESS = Path(__file__).with_name("pool_stress.cc")
LAYER = parser.parse_model(
    """<ir_version: 8, opset_import: ["": 17]>
    g (float[256, 512] x, float[512, 512] w) => (float[256, 512] y) { m = MatMul (x, w) y = Relu (m) }"""
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose one product is divided among threads."""
    folder = tmp_path_factory.mktemp("pool")
    (folder / "m.onnx").write_bytes(LAYER.SerializeToString())
    driver.optimize(folder / "m.onnx", out=folder / "a", target="cpu")
    return folder / "a"


def test_every_task_is_done_once(tmp_path: Path) -> None:
    """pool_stress.cc: 20 callers at the same time, launches within launches, errors, memory of tasks, threads that are
    all held, a forked process, idle threads."""
    runtime = runner.runtime_libraries(platform.machine())
    sources = [str(STRESS), str(NATIVE / "pool.cc"), f"-I{NATIVE}", f"-I{runtime.include}"]
    libraries = [*(f"-L{folder}" for folder in runtime.folders), "-ltvm_ffi", "-lpthread", "-ldl"]
    program = tmp_path / "stress"
    triple = f"{platform.machine()}-linux-gnu.{link.GLIBC}"
    command = ["c++", "-target", triple, "-O2", "-nostdlib++", *sources, *libraries, "-o", str(program)]
    link.zig(command, what="the stress test")
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(map(str, runtime.folders))}
    done = subprocess.run([program, "2"], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["cpu-baseline", "arm64", "armv7", "riscv64"])
def test_every_cpu_target_has_a_pool(name: str, tmp_path: Path) -> None:
    from graphwright.runtime import elf
    from graphwright.runtime.pool import place_pool

    target = TARGETS[name]
    made = elf.read(tmp_path / place_pool(target, tmp_path))
    assert made.machine == target.machine
    assert all(symbol.startswith("TVMFFI") for symbol in made.undefined)


RUN = """
import json, os, sys, time
import numpy as np
from graphwright import Session
feeds = {n: np.ones(s, "float32") for n, s in {"x": (256, 512), "w": (512, 512)}.items()}
session = Session(sys.argv[1], threads=3)
y = session.run(None, feeds)[0]
tasks, wanted, end = "/proc/self/task", int(sys.argv[2]), time.time() + 20
while True:  # a thread names itself when it first runs
    names = [open(f"{tasks}/{task}/comm").read().strip() for task in os.listdir(tasks)]
    if names.count("graphwright") >= wanted or time.time() > end:
        break
child = os.fork()
if not child:
    os._exit(0 if (session.run(None, feeds)[0] == y).all() else 1)
print(json.dumps([names.count("graphwright"), float(y[0, 0]), os.waitpid(child, 0)[1]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads where Linux keeps them")
@pytest.mark.parametrize("own", [True, False])
def test_kernels_run_on_the_artifacts_pool(built: Path, own: bool, tmp_path: Path) -> None:
    """Two threads besides the caller; a forked process makes its own. An artifact without a pool runs on TVM's, which
    does not survive a fork: one thread there."""
    path = built
    if not own:
        path = tmp_path / "old"
        path.mkdir()
        for file in built.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        manifest = Artifact.load(path).manifest
        write_manifest(manifest.model_copy(update={"pool": ""}), path)
    script, wanted = (RUN, 2) if own else (RUN.replace("threads=3", "threads=1"), 0)
    command = [sys.executable, "-c", script, str(path), str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == [wanted, 512.0, 0]


def test_a_pool_that_is_missing_or_altered_is_refused(built: Path, tmp_path: Path) -> None:
    for file in built.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pool = tmp_path / Artifact.load(tmp_path).manifest.pool
    pool.write_bytes(b"\x7fELF")
    with pytest.raises(ArtifactError, match="was altered"):
        Session(tmp_path)
    pool.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        Session(tmp_path)


def test_a_pool_that_no_processor_loads_is_one_clear_error(tmp_path: Path) -> None:
    from graphwright.runtime.pool import Pool

    (tmp_path / "pool.so").write_bytes(b"not a library")
    with pytest.raises(ArtifactError, match=r"cannot be loaded .*; compile the model again"):
        Pool.of(tmp_path / "pool.so", "of this test")


def test_sessions_of_several_threads_share_the_pool(built: Path) -> None:
    """Sessions with one, two and four threads in four Python threads: the same numbers."""
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((256, 512), np.float32), "w": rng.standard_normal((512, 512), np.float32)}
    sessions = [Session(built, threads=count) for count in (1, 2, 4)]
    want = sessions[0].run(None, feeds)[0]

    def runs(number: int) -> bool:
        return all(np.array_equal(sessions[(number + i) % 3].run(None, feeds)[0], want) for i in range(30))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(runs, range(4)))


FORK = """
import os, sys, threading, time
from graphwright.runtime.pool import loading
held = threading.Event()
def load():
    with loading:
        held.set()
        time.sleep(0.5)
threading.Thread(target=load).start()
held.wait()
child = os.fork()
if not child:
    os._exit(0 if loading.acquire(timeout=5) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_process_forked_while_a_library_is_loaded_can_load() -> None:
    subprocess.run([sys.executable, "-c", FORK], timeout=60, check=True)


def test_a_library_is_loaded_once(built: Path) -> None:
    """Loading it again would have TVM put its own pool back into what other sessions run."""
    first, second = (Session(built, threads=1) for _ in range(2))
    assert first._steps[0]._library is second._steps[0]._library
