"""TVM is imported without torch, and both can be used in one process all the same."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from graphwright.runtime.tvm_import import hidden


def child(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.tvm
def test_finding_the_target_and_loading_tvm_leave_torch_alone() -> None:
    code = """
import sys
from graphwright.runtime.target import Target
from graphwright.runtime.session import load_tvm
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
