"""Where an artifact runs: the table of named targets and what each one's instruction set offers.

A `Target` is a plain value that can be pickled, printed and stored in a manifest; nothing here imports TVM
until `Target.tvm()` or the detection of the host asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..passes.base import Caches
from ..passes.errors import TargetError, UsageError, did_you_mean
from .tuning import Tuning
from .tvm_import import import_tvm

if TYPE_CHECKING:
    import tvm

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class InstructionSet:
    """What kernel templates take their tile sizes from.

    vector_bits: width of one vector register. registers: how many there are. fma: fused multiply-add on
    vectors. scalef: multiply by a power of two in one instruction (AVX-512). lookup: choose among eight
    numbers of a register by the low bits of eight others (AVX2's vpermd). streaming: non-temporal stores. half:
    float16 from and to float32 in one instruction. dot_int8: how 8-bit numbers are multiplied and added into int32:
    "pairs" of int16 (pmaddwd), "quads" of uint8 with int8 (VNNI), "signed-quads" of int8 (NEON's sdot), "": one by one.
    dot_bf16: pairs of bfloat16 are multiplied and added into float32 (vdpbf16ps). ahead: bytes that what comes from
    memory is asked for before it is read; 0 where several streams in turn bring more.
    """

    name: str
    vector_bits: int
    registers: int
    fma: bool = False
    scalef: bool = False
    lookup: bool = False
    streaming: bool = False
    half: bool = False
    dot_int8: str = ""
    dot_bf16: bool = False
    ahead: int = 0

    def lanes(self, bits: int = 32) -> int:
        """Elements of `bits` bits in one vector."""
        return self.vector_bits // bits


AVX512 = InstructionSet("avx512", 512, 32, fma=True, scalef=True, streaming=True, half=True, dot_int8="pairs")
AVX512_VNNI = dataclasses.replace(AVX512, name="avx512-vnni", dot_int8="quads")
AVX512_BF16 = dataclasses.replace(AVX512_VNNI, name="avx512-bf16", dot_bf16=True)
AVX2 = InstructionSet("avx2", 256, 16, fma=True, lookup=True, streaming=True, half=True, dot_int8="pairs")
AVX2_VNNI = dataclasses.replace(AVX2, name="avx2-vnni", dot_int8="quads")
SSE2 = InstructionSet("sse2", 128, 16, streaming=True, dot_int8="pairs")
NEON = InstructionSet("neon", 128, 32, fma=True, half=True)
NEON32 = InstructionSet("neon32", 128, 16, fma=True)
RVV = InstructionSet("rvv", 128, 32, fma=True)
SCALAR = InstructionSet("scalar", 32, 32, fma=True)
GPU = InstructionSet("gpu", 32, 255, fma=True)

AHEAD = {"znver5": 8 << 10}  # of InstructionSet, by processor: as measured there

_AVX2_FLAGS = frozenset(["avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"])
_AVX512_FLAGS = frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "bmi2", "f16c"])
# /proc/cpuinfo's words that a processor must show to run code of an instruction set.
NEEDED_FLAGS = {
    "avx512-bf16": _AVX512_FLAGS | {"avx512_vnni", "avx512_bf16"},
    "avx512-vnni": _AVX512_FLAGS | {"avx512_vnni"},
    "avx512": _AVX512_FLAGS,
    "avx2-vnni": _AVX2_FLAGS | {"avx_vnni"},
    "avx2": _AVX2_FLAGS,
    "neon": frozenset({"asimd"}),
}

# LLVM's name of each x86 feature that code generation uses, and /proc/cpuinfo's where it is another.
X86_FEATURES = {
    **{
        name: name
        for name in (
            "avx", "avx2", "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512ifma", "avx512vbmi",
            "avx512vl", "bmi2", "f16c", "fma", "gfni", "movbe", "popcnt", "ssse3", "vaes", "vpclmulqdq",
        )
    },
    "avx512bf16": "avx512_bf16", "avx512bitalg": "avx512_bitalg", "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2", "avx512vnni": "avx512_vnni", "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxvnni": "avx_vnni", "bmi": "bmi1", "lzcnt": "abm", "pclmul": "pclmulqdq", "sse3": "pni",
    "sse4.1": "sse4_1", "sse4.2": "sse4_2",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A named place to run.

    kind: llvm, cuda, opencl or webgpu. triple, mcpu, mattr: LLVM's words for the CPU (of the host, for GPU
    kinds). zig: the `-target` of the linker. caches in bytes, of one core except the last level. cores: how
    many threads an artifact uses when none are asked for. extra: further TVM target attributes. tuning: tiles of
    kernels that are not left to the templates' rules.
    """

    name: str
    kind: str
    description: str
    triple: str = ""
    mcpu: str = ""
    mattr: tuple[str, ...] = ()
    zig: str = ""
    isa: InstructionSet = SCALAR
    caches: Caches = field(default_factory=Caches)
    cores: int = 1
    extra: tuple[tuple[str, Any], ...] = field(default=())
    tuning: Tuning = field(default=Tuning(), repr=False)

    @property
    def is_cpu(self) -> bool:
        return self.kind == "llvm"

    @property
    def beside_onnxruntime(self) -> bool:
        """Whether its artifacts run where onnxruntime does too: targets for devices get by without it if they can."""
        return self.is_cpu and self.name.partition("-")[0] == "cpu"

    @property
    def machine(self) -> str:
        """The processor architecture in uname's words: x86_64, aarch64, armv7l, riscv64."""
        first = self.triple.split("-")[0]
        return {"armv7a": "armv7l", "arm": "armv7l"}.get(first, first)

    @property
    def runs_here(self) -> bool:
        """Whether this machine's own processor executes the artifact."""
        if not self.is_cpu or self.machine != platform.machine():
            return False
        return NEEDED_FLAGS.get(self.isa.name, frozenset()) <= host_flags()

    def tvm(self) -> tvm.target.Target:
        """The same thing as a TVM target."""
        tvm = import_tvm()

        # LLVM 22's loop vectoriser reads x[i % 2^k] as x[i] in some loops for AVX-512: wrong numbers without a word.
        # Loops are vectorised by their schedules instead.
        cpu: dict[str, Any] = {"kind": "llvm", "num-cores": self.cores, "cl-opt": ["-vectorize-loops:bool=0"]}
        if self.triple:
            cpu["mtriple"] = self.triple
        if self.mcpu:
            cpu["mcpu"] = self.mcpu
        if self.mattr:
            cpu["mattr"] = list(self.mattr)
        try:
            if self.is_cpu:
                return tvm.target.Target({**cpu, **dict(self.extra)})
            return tvm.target.Target({"kind": self.kind, **dict(self.extra)}, host=cpu)
        except ValueError as error:  # TVM's answer to an unknown kind or attribute
            line = str(error).splitlines()[0]
            raise TargetError(f"target {self.name}: TVM refuses its attributes: {line}") from error

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        del fields["tuning"]
        return {**fields, "tuning": self.tuning.to_json()} if self.tuning.tiles else fields

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Target:
        """Inverse of `to_json`; ignores fields of later versions."""
        known = {f.name for f in dataclasses.fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        values["isa"] = InstructionSet(**values["isa"])
        values["caches"] = Caches(**values["caches"])
        values["tuning"] = Tuning.from_json(values.get("tuning", {}))
        values["mattr"] = tuple(values["mattr"])
        values["extra"] = tuple((key, value) for key, value in values["extra"])
        return cls(**values)

    @classmethod
    def named(cls, name: str) -> Target:
        """The target of that name. Raises UsageError with the closest names."""
        key = name.replace("_", "-")
        if key == "cpu":
            return host()
        if key not in TARGETS:
            raise UsageError(f"unknown target {name!r}; {did_you_mean(key, target_names())}")
        return TARGETS[key]


@functools.cache
def host_flags() -> frozenset[str]:
    """Feature words of /proc/cpuinfo (`flags` or `Features`); empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def host_cores() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host_caches() -> Caches:
    """Data cache sizes from sysfs; common sizes where it does not say."""
    sizes = {1: Caches().l1, 2: Caches().l2, 3: 0}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, kind = int((index / "level").read_text()), (index / "type").read_text().strip()
            text = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if kind != "Instruction" and level in sizes and text[:-1].isdigit():
            sizes[level] = int(text[:-1]) * {"K": KIB, "M": MIB}.get(text[-1], 1)
    return Caches(sizes[1], sizes[2], sizes[3])


def host_traits() -> dict[str, Any]:
    """What `host` follows from, besides the version of the compiler, without importing the compiler: for the names of
    things that were compiled for this machine."""
    words = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "uarch")
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        first = ""
    lines = [line.partition(":") for line in first.splitlines()]
    told = {word.strip(): value.strip() for word, _, value in lines}
    return {
        "machine": platform.machine(),
        "processor": {word: told[word] for word in words if word in told},
        "flags": sorted(host_flags()),
        "caches": dataclasses.asdict(host_caches()),
        "cores": host_cores(),
    }


def x86_attributes(named: Collection[str], flags: Collection[str]) -> tuple[str, ...]:
    """What to add to or take from a processor's name so that it says exactly what the host has.

    named: the features LLVM gives the processor of that name. flags: /proc/cpuinfo's words. A hypervisor may
    hide features that the name promises, and a processor unknown to LLVM gets a name that promises too few.
    """
    if not flags:
        return ()
    signs = {name: word in flags for name, word in X86_FEATURES.items() if (word in flags) != (name in named)}
    return tuple(f"{'+' if present else '-'}{name}" for name, present in sorted(signs.items()))


@functools.cache
def host() -> Target:
    """This machine's processor with exactly the features it has."""
    tvm = import_tvm()
    from tvm.target import codegen

    machine = platform.machine()
    flags = host_flags()
    triples = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu", "riscv64": "riscv64-linux-gnu"}
    if machine not in triples:
        raise TargetError(f"this machine is {machine}; target cpu is known for {', '.join(triples)}")
    if machine == "x86_64":
        known = (AVX512_BF16, AVX512_VNNI, AVX512, AVX2_VNNI, AVX2)
        isa = next((isa for isa in known if NEEDED_FLAGS[isa.name] <= flags), SSE2)
    else:
        dot = "signed-quads" if "asimddp" in flags else ""
        isa = dataclasses.replace(NEON, dot_int8=dot) if machine == "aarch64" else RVV
    mcpu = str(codegen.llvm_get_system_cpu())
    mattr: tuple[str, ...] = ()
    if machine == "x86_64":
        promised = tvm.target.Target({"kind": "llvm", "mtriple": triples[machine], "mcpu": mcpu})
        named = codegen.llvm_get_cpu_features(promised)
        mattr = x86_attributes({str(feature) for feature in named}, flags)
    isa = dataclasses.replace(isa, ahead=AHEAD.get(mcpu, 0))
    caches, cores, zig = host_caches(), host_cores(), triples[machine]
    description = f"this host ({mcpu})"
    return Target("cpu", "llvm", description, triples[machine], mcpu, mattr, zig, isa, caches, cores)


_X86, _ARM64, _ARM32, _RISCV = (
    "x86_64-linux-gnu", "aarch64-linux-gnu", "arm-linux-gnueabihf", "riscv64-linux-gnu"
)  # fmt: skip

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "cpu-avx2", "llvm", "x86-64 with AVX2 and FMA (2013 on)", _X86, "x86-64-v3", zig=_X86,
            isa=AVX2, caches=Caches(32 * KIB, 512 * KIB, 8 * MIB), cores=4,
        ),
        Target(
            "cpu-avx512", "llvm", "x86-64 with AVX-512", _X86, "x86-64-v4", zig=_X86,
            isa=AVX512, caches=Caches(32 * KIB, 1 * MIB, 16 * MIB), cores=4,
        ),
        Target(
            "cpu-avx512-vnni", "llvm", "x86-64 with AVX-512 and VNNI (Cascade Lake and Zen 4 on)", _X86, "x86-64-v4",
            ("+avx512vnni",), _X86, AVX512_VNNI, Caches(32 * KIB, 1 * MIB, 16 * MIB), 4,
        ),
        Target(
            "cpu-avx512-bf16", "llvm", "x86-64 with AVX-512, VNNI and bfloat16 products (Zen 4, Sapphire Rapids on)",
            _X86, "x86-64-v4", ("+avx512bf16", "+avx512vnni"), _X86, AVX512_BF16,
            Caches(32 * KIB, 1 * MIB, 16 * MIB), 4,
        ),
        Target(
            "cpu-baseline", "llvm", "any x86-64", _X86, "x86-64", zig=_X86,
            isa=SSE2, caches=Caches(32 * KIB, 256 * KIB, 4 * MIB), cores=2,
        ),
        Target(
            "arm64", "llvm", "64-bit ARM boards (cortex-a76)", _ARM64, "cortex-a76", zig=_ARM64,
            isa=dataclasses.replace(NEON, dot_int8="signed-quads"), caches=Caches(64 * KIB, 512 * KIB, 2 * MIB),
            cores=4,
        ),
        Target(
            "armv7", "llvm", "32-bit ARM boards with NEON (cortex-a7)", "armv7a-linux-gnueabihf", "cortex-a7",
            ("+neon", "+vfp4"), _ARM32, NEON32, Caches(32 * KIB, 512 * KIB, 0), 4,
            # Without it floats travel in integer registers, and every call into libm is garbage.
            extra=(("mfloat-abi", "hard"),),
        ),
        Target(
            "riscv64", "llvm", "64-bit RISC-V (rv64gc)", _RISCV, "generic-rv64",
            ("+m", "+a", "+f", "+d", "+c"), _RISCV, SCALAR, Caches(32 * KIB, 512 * KIB, 0), 4,
            extra=(("mabi", "lp64d"),),
        ),
        Target(
            "cuda", "cuda", "NVIDIA GPUs from sm_90", _X86, "x86-64", zig=_X86, isa=GPU,
            extra=(
                ("arch", "sm_90"), ("max_threads_per_block", 1024), ("thread_warp_size", 32),
                ("max_shared_memory_per_block", 48 * KIB),
            ),
        ),
        Target("opencl", "opencl", "OpenCL 1.2 source module", _X86, "x86-64", zig=_X86, isa=GPU),
        Target(
            "webgpu", "webgpu", "WGSL source module", _X86, "x86-64", zig=_X86, isa=GPU,
            extra=(("max_num_threads", 256),),
        ),
    )
}  # fmt: skip


def target_names() -> list[str]:
    return ["cpu", *TARGETS]
