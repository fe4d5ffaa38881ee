from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys

import pytest
from graphwright.passes.errors import TargetError, UsageError
from graphwright.runtime import target as targets
from graphwright.runtime.target import AVX2, TARGETS, Target, target_names, x86_attributes


@pytest.mark.parametrize("name", target_names())
def test_a_target_survives_its_json(name: str) -> None:
    target = Target.named(name)
    data = json.loads(json.dumps(target.to_json()))
    assert Target.from_json({**data, "field_of_a_later_version": 1}) == target


@pytest.mark.parametrize("name", target_names())
def test_tvm_takes_every_target(name: str) -> None:
    target = Target.named(name)
    made = target.tvm()
    assert made.kind.name == target.kind
    host = made if target.is_cpu else made.host
    assert host.attrs["mtriple"] == target.triple and host.attrs["mcpu"] == target.mcpu


@pytest.mark.parametrize(
    ("name", "machine"),
    [("cpu-avx2", "x86_64"), ("arm64", "aarch64"), ("armv7", "armv7l"), ("riscv64", "riscv64")],
)
def test_machines_have_unames_words(name: str, machine: str) -> None:
    assert TARGETS[name].machine == machine


def test_underscores_are_taken_for_dashes() -> None:
    assert Target.named("cpu_avx2") is TARGETS["cpu-avx2"]


def test_an_unknown_name_gets_the_closest() -> None:
    with pytest.raises(UsageError, match=r"unknown target 'cpu-avx521'; did you mean cpu-avx512"):
        Target.named("cpu-avx521")
    with pytest.raises(UsageError, match=r"unknown target 'toaster'; known: .*riscv64.*"):
        Target.named("toaster")


def test_an_attribute_that_tvm_does_not_know_is_one_line() -> None:
    wrong = dataclasses.replace(TARGETS["webgpu"], extra=(("max_threads_per_block", 256),))
    with pytest.raises(TargetError, match=r"target webgpu: TVM refuses .*'max_threads_per_block'") as error:
        wrong.tvm()
    assert "\n" not in str(error.value)


def test_an_artifact_runs_only_where_its_instructions_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    flags = frozenset(["avx", "avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"])
    monkeypatch.setattr(targets, "host_flags", lambda: flags)
    assert TARGETS["cpu-baseline"].runs_here
    assert TARGETS["cpu-avx2"].runs_here
    assert not TARGETS["cpu-avx512"].runs_here
    assert not TARGETS["arm64"].runs_here
    assert not TARGETS["cuda"].runs_here
    monkeypatch.setattr(targets, "host_flags", lambda: flags - {"fma"})
    assert not TARGETS["cpu-avx2"].runs_here


def test_features_that_a_hypervisor_hides_are_taken_away() -> None:
    named = {"avx", "avx2", "avx512f", "fma", "sse4.1"}
    assert x86_attributes(named, {"avx", "avx2", "fma", "sse4_1"}) == ("-avx512f",)


def test_features_that_the_name_does_not_promise_are_added() -> None:
    assert x86_attributes({"sse3"}, {"pni", "avx", "abm"}) == ("+avx", "+lzcnt")
    assert x86_attributes({"avx"}, frozenset()) == ()  # nothing is known of the host


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with an x86 /proc/cpuinfo")
def test_the_host_is_described_exactly() -> None:
    from tvm.target import codegen

    given = {str(feature) for feature in codegen.llvm_get_cpu_features(targets.host().tvm())}
    for feature, word in targets.X86_FEATURES.items():
        assert (feature in given) == (word in targets.host_flags()), feature


def test_the_host_runs_its_own_target() -> None:
    host = Target.named("cpu")
    assert host.runs_here and host.name == "cpu" and host.machine == platform.machine()
    assert host.caches.l1 >= 8 << 10 and host.caches.last_level >= host.caches.l1
    assert 1 <= host.cores <= 4096


def test_lanes_follow_the_register_width() -> None:
    assert AVX2.lanes() == 8 and AVX2.lanes(8) == 32


def test_naming_a_target_does_not_import_tvm() -> None:
    code = (
        "import sys; from graphwright.runtime.target import Target; "
        "Target.named('arm64'); print('tvm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
