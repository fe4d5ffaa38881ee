"""TVM is imported without torch, and both can be used in one process all the same."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import onnx
import pytest
from graphwright.runtime.tvm_import import hidden
from onnx import parser

import graphwright


def child(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.tvm
def test_finding_the_target_and_loading_tvm_leave_torch_alone() -> None:
    code = """
import sys
from graphwright.runtime.target import Target
from graphwright.runtime.tvm_step import load_tvm
Target.named("cpu"); load_tvm()
print("tvm" in sys.modules, "torch" in sys.modules)"""
    assert child(code) == "True False"


@pytest.mark.tvm
@pytest.mark.torch
@pytest.mark.parametrize("first", ["tvm", "torch"])
def test_torch_computes_before_and_after_tvm(first: str) -> None:
    code = f"""
import numpy as np
from graphwright.runtime.tvm_import import import_tvm
if {first!r} == "torch":
    import torch
tvm = import_tvm()
import torch
x = np.arange(6, dtype=np.float32).reshape(2, 3)
product = torch.from_numpy(x) @ torch.from_numpy(x.T)
again = tvm.runtime.tensor(product.numpy()).numpy()
print((again == x @ x.T).all(), torch.from_dlpack(tvm.runtime.tensor(x)).sum().item())"""
    assert child(code) == "True 15.0"


def test_a_package_is_hidden_from_this_thread_only_and_for_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)

    def elsewhere() -> None:
        import colorsys

        found.append(colorsys)

    with hidden("colorsys"):
        with pytest.raises(ModuleNotFoundError, match="colorsys"):
            import colorsys
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    import colorsys

    assert found == [colorsys]


@pytest.mark.tvm
def test_an_artifact_runs_without_the_compiler(tmp_path: Path) -> None:
    """In a process of its own, in which TVM's compiler is not loaded and the environment is as it was."""
    model = parser.parse_model('<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) {y = Neg (x)}')
    onnx.save(model, tmp_path / "m.onnx")
    graphwright.compile(tmp_path / "m.onnx", target="cpu", out=tmp_path / "a")
    code = f"""
import os, sys
import numpy as np
from graphwright.runtime.tvm_import import runtime_alone
runtime_alone()
from graphwright.runtime.session import Session
(y,) = Session({str(tmp_path / "a")!r}).run(None, {{"x": np.array([1, -2], np.float32)}})
assert y.tolist() == [-1, 2]
import tvm
assert tvm.base._RUNTIME_ONLY and "TVM_USE_RUNTIME_LIB" not in os.environ
assert "onnx_ir" not in sys.modules and "onnx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
