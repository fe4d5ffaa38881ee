"""The child that compiles: whatever ends it is an error here, and it never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from graphwright.passes.errors import CompileError
from graphwright.runtime.target import Target
from graphwright.runtime.worker import Compiled, Compiler, Crashed, explain
from onnx import numpy_helper, parser

pytestmark = pytest.mark.tvm
TEXT = '<ir_version: 10, opset_import: ["" : 20]> a (float[4] x) => (float[4] y) { y = %s(x) }'
CPU = Target.named("cpu").to_json()


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler()
    yield compiler
    compiler.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(parser.parse_model(TEXT % "Relu"), path)
    return path


def compile(compiler: Compiler, model: Path, timeout: float = 120.0) -> Compiled:
    folder = model.parent / f"out{time.monotonic_ns()}"
    folder.mkdir()
    return compiler.compile(model, CPU, folder, timeout)


def child(compiler: Compiler) -> psutil.Process:
    assert compiler._process is not None
    return psutil.Process(compiler._process.pid)


def gone(process: psutil.Process, seconds: float) -> bool:
    """Whether it ends within that time; one that nobody has waited for yet has ended too."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_one_child_compiles_many_regions(compiler: Compiler, model: Path) -> None:
    first = compile(compiler, model)
    process = child(compiler)
    second = compile(compiler, model)
    assert Path(first.library).is_file() and Path(second.library).is_file()
    assert child(compiler) == process


def test_a_refusal_is_an_answer(compiler: Compiler, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="FileNotFoundError") as caught:
        compile(compiler, tmp_path / "missing.onnx")
    assert not isinstance(caught.value, Crashed) and "\n" not in str(caught.value)
    path = tmp_path / "loop.onnx"
    onnx.save(parser.parse_model(TEXT % "SequenceConstruct"), path)
    before = child(compiler)
    with pytest.raises(CompileError, match="sequences are not compiled"):
        compile(compiler, path)
    assert compiler.refusals(path, CPU) == {0: "sequences are not compiled"}
    assert child(compiler) == before


def answers(compiler: Compiler) -> bool:
    """Whether the child answers a request for which it need not load TVM."""
    try:
        compiler.refusals(Path("missing.onnx"), CPU)
    except CompileError as error:
        return str(error).startswith("FileNotFoundError")
    return False


@pytest.fixture
def stopped(compiler: Compiler) -> psutil.Process:
    """A fresh child, stopped: it cannot answer before the test has had its way."""
    compiler._start()
    process = child(compiler)
    process.suspend()
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_is_an_error_and_the_next_request_works(
    compiler: Compiler, stopped: psutil.Process, model: Path, number: signal.Signals
) -> None:
    def crash() -> None:
        stopped.send_signal(number)
        stopped.resume()

    timer = threading.Timer(0.2, crash)
    timer.start()
    with pytest.raises(Crashed, match=rf"the compiler crashed \({number.name}\)"):
        compile(compiler, model)
    timer.join()
    assert answers(compiler) and child(compiler) != stopped


def test_a_child_that_died_between_requests_is_replaced(compiler: Compiler, stopped: psutil.Process) -> None:
    stopped.kill()
    assert gone(stopped, 5) and answers(compiler)


def test_a_child_that_hangs_is_given_up(compiler: Compiler, stopped: psutil.Process, model: Path) -> None:
    start = time.monotonic()
    with pytest.raises(Crashed, match="did not answer within 1 s"):
        compile(compiler, model, timeout=1.0)
    assert time.monotonic() - start < 10
    assert gone(stopped, 5) and answers(compiler)


def test_ctrl_c_leaves_no_answer_for_the_next_request(
    compiler: Compiler, stopped: psutil.Process, tmp_path: Path
) -> None:
    """Interrupted while the child works on one model: the next request must not get that model's answer."""
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        compiler.refusals(tmp_path / "first.onnx", CPU)
    timer.join()
    with pytest.raises(CompileError, match=r"second\.onnx"):
        compiler.refusals(tmp_path / "second.onnx", CPU)


def test_two_threads_get_their_own_answers(compiler: Compiler, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(parser.parse_model(TEXT % "Relu"), path)
    folders = [tmp_path / str(index) for index in range(6)]
    found: dict[int, str] = {}

    def work(index: int) -> None:
        folders[index].mkdir()
        found[index] = compiler.compile(path, CPU, folders[index]).library

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {index: Path(library).parent for index, library in found.items()} == dict(enumerate(folders))


def test_the_childs_output_reaches_nobody(model: Path) -> None:
    """What compilers print must not end up in the output of a command, nor Python's own words."""
    code = f"""
from pathlib import Path
from graphwright.runtime.target import Target
from graphwright.runtime.worker import Compiler
folder = Path({str(model.parent)!r}) / "out"
folder.mkdir()
Compiler.shared().compile(Path({str(model)!r}), Target.named("cpu").to_json(), folder)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "done\n" and done.stderr == ""


SLOW = """<ir_version: 10, opset_import: ["" : 20]> a (float[1,8,32,32] x) => (float[1,8,32,32] y) {{ {nodes} }}"""


def slow_model(path: Path, layers: int = 60) -> Path:
    """Convolutions of as many kinds as there are layers: seconds of compilation."""
    nodes, weights = [], []
    for index in range(layers):
        rows = 1 + 2 * (index % 10)
        columns = 1 + 2 * (index // 10)
        source, result = f"v{index}" if index else "x", f"v{index + 1}" if index < layers - 1 else "y"
        pads = [rows // 2, columns // 2] * 2
        nodes.append(f"{result} = Conv<pads = {pads}>({source}, w{index})")
        weights.append(numpy_helper.from_array(np.ones((8, 8, rows, columns), np.float32), f"w{index}"))
    proto = parser.parse_model(SLOW.format(nodes="  ".join(nodes)))
    proto.graph.initializer.extend(weights)
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize("number", [signal.SIGKILL])
def test_no_orphans(tmp_path: Path, number: signal.Signals) -> None:
    """The parent dies while the child compiles: the child, and a linker it may have started, end too."""
    path = slow_model(tmp_path / "slow.onnx")
    code = f"""
from pathlib import Path
from graphwright.runtime.target import Target
from graphwright.runtime.worker import Compiler
compiler = Compiler.shared()
compiler._start()
print(compiler._process.pid, flush=True)
compiler.compile(Path({str(path)!r}), Target.named("cpu").to_json(), Path({str(tmp_path)!r}))
print("finished", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        end = time.monotonic() + 60
        while process.cpu_times().user < 2 and time.monotonic() < end:
            time.sleep(0.1)  # TVM is loaded by then, and the compilation has begun
        parent.send_signal(number)
        assert parent.wait(10) == -number
        assert "finished" not in parent.stdout.read()
    assert gone(process, 5)


def test_a_forked_process_gets_its_own_child() -> None:
    """Two processes must not read each other's answers from one pipe, nor one end the other's child."""
    first = Compiler.shared()
    first._start()
    assert first._process is not None
    pid = os.fork()
    if pid == 0:
        other = Compiler.shared()
        first.close()
        os._exit(0 if other is not first else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert first._process.poll() is None
    assert Compiler.shared() is first
    first.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "ValueError"),
        ("plain", "ValueError: plain"),
        ("Traceback:\n  File x\nInternalError: Check failed: (a == b) is false: why\n", "ValueError: InternalError: "),
    ],
)
def test_the_line_that_says_what_went_wrong(text: str, expected: str) -> None:
    assert explain(ValueError(text)).startswith(expected) and "\n" not in explain(ValueError(text))
