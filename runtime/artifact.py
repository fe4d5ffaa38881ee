"""The compiled result: a folder with a manifest, the rewritten model, one library a region and one weights file.

    manifest.json     what this is, what was done, how large the measured error is, the hash of every file
    model.onnx        the rewritten model; its large weights are references into weights.bin
    weights.bin       every large tensor once, 64-byte aligned, memory-mapped by all that read it
    region0.so        code of a region that TVM compiled
    pool.so           the threads that such code runs on
    region1.onnx      a region that TVM cannot take and onnxruntime runs
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..passes.errors import ArtifactError, OutputError, first_line
from .target import Target

SCHEMA = 2
MANIFEST, MODEL, WEIGHTS = "manifest.json", "model.onnx", "weights.bin"
TVM: Final = "tvm"
ONNXRUNTIME: Final = "onnxruntime"
ALIGNMENT = 64
WINDOW = 64 << 20  # bytes of a file that are mapped while it is hashed
CHUNK = 4 << 20
OLD = ".old"  # suffix of an artifact that is being replaced, where that takes two steps
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)

log = logging.getLogger("graphwright")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Strict):
    """A graph input or output. shape: numbers, names of symbolic dimensions, or None where nothing is known."""

    name: str
    dtype: str
    shape: list[int | str | None] | None


class Parameter(_Strict):
    """A constant tensor in weights.bin: `nbytes` raw little-endian bytes at `offset`."""

    name: str
    dtype: str
    shape: list[int]
    offset: int
    nbytes: int


class Times(_Strict):
    """So many operations times the sizes of these axes, each as [argument, axis]: of sizes known only at run time."""

    each: float
    times: list[list[int]]


class KernelWork(_Strict):
    """What one kernel does in a call: operations, and bytes of its inputs and outputs. None: depends on the sizes."""

    flops: float | Times | None
    bytes: int | None
    op: str

    def flops_of(self, shapes: Sequence[Sequence[int]]) -> float | None:
        """Operations of a call. shapes: of its arguments, inputs and outputs."""
        if not isinstance(self.flops, Times):
            return self.flops
        return self.flops.each * math.prod(shapes[argument][axis] for argument, axis in self.flops.times)


class RegionSpec(_Strict):
    """One step of a run. For TVM: `file` is the library, whose function `main` takes the inputs in order and then
    one tuple of the parameters. For onnxruntime: `file` is a model, and `reasons` says, site by site, why.
    kernels: by name, of a TVM region. activation_bytes: what its plan allocates for values between the kernels.
    in_place: output -> the input in whose memory `main` makes it.
    """

    runtime: Literal["tvm", "onnxruntime"]
    file: str
    inputs: list[str]
    outputs: list[str]
    nodes: int
    parameters: list[Parameter] = Field(default_factory=list)
    reasons: dict[str, str] = Field(default_factory=dict)
    sources: list[str] = Field(default_factory=list)
    kernels: dict[str, KernelWork] = Field(default_factory=dict)
    activation_bytes: int | None = None
    in_place: dict[str, str] = Field(default_factory=dict)


class FileSpec(_Strict):
    blake3: str
    nbytes: int


class Manifest(_Strict):
    """state: input -> output that is its new value, of a model that keeps something from one run to the next.
    pool: the file with the threads that TVM's regions run on; "" where none needs it.
    """

    schema_version: int = SCHEMA
    versions: dict[str, str]
    target: dict[str, Any]
    source: str
    pipeline: str
    reports: list[dict[str, Any]]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    regions: list[RegionSpec]
    files: dict[str, FileSpec]
    verdict: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    state: dict[str, str] = Field(default_factory=dict)
    pool: str = ""
    digest: str = ""  # of everything above; filled in when the manifest is written

    def own_digest(self) -> str:
        """The digest that the manifest should carry."""
        text = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
        return blake3(text.encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk."""

    manifest: Manifest
    root: Path

    @property
    def target(self) -> Target:
        return Target.from_json(self.manifest.target)

    @property
    def nbytes(self) -> int:
        """Bytes of all files, the manifest excluded."""
        return sum(entry.nbytes for entry in self.manifest.files.values())

    @property
    def activation_bytes(self) -> int | None:
        """Memory for the values between kernels: regions run one after the other. None when it depends on the sizes,
        or is onnxruntime's.
        """
        sizes = [region.activation_bytes for region in self.manifest.regions]
        return max((size for size in sizes if size is not None), default=None) if None not in sizes else None

    @property
    def native_nodes(self) -> tuple[int, int]:
        """(nodes that TVM runs, all nodes)."""
        regions = self.manifest.regions
        return sum(r.nodes for r in regions if r.runtime == "tvm"), sum(r.nodes for r in regions)

    @classmethod
    def load(cls, root: str | os.PathLike[str], *, verify: bool = True) -> Artifact:
        """Raises ArtifactError when the folder is no artifact, of another version, or was altered."""
        root = Path(root)
        path = root / MANIFEST
        if not path.is_file():
            if not root.exists() and (old := set_aside(root)):
                raise ArtifactError(f"{root}: was set aside by an interrupted replacement; rename {old[-1]} to {root}")
            raise ArtifactError(f"{root}: no {MANIFEST} in it; expected an artifact folder made by optimize --target")
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{path}: cannot be read ({first_line(error)}); compile the model again") from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA:
            raise ArtifactError(f"{path}: schema version {version}; expected {SCHEMA}, compile the model again")
        try:
            artifact = cls(Manifest.model_validate(data), root)
            _ = artifact.target
        except (ValidationError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: damaged ({first_line(error)}); compile the model again") from error
        if verify:
            artifact.verify()
        return artifact

    def verify(self) -> None:
        """Check the manifest and every file against its hash. Raises ArtifactError naming the first that differs."""
        if self.manifest.digest != self.manifest.own_digest():
            raise ArtifactError(
                f"{self.root / MANIFEST}: was altered since it was written (digest differs); compile the model again"
            )
        for name, entry in self.manifest.files.items():
            path = self.root / name
            if Path(name).name != name:
                raise ArtifactError(f"{self.root}: the manifest names {name!r}, outside the artifact's folder")
            if not path.is_file():
                raise ArtifactError(f"{path}: is missing; copy the artifact again or compile the model again")
            if path.stat().st_size != entry.nbytes or file_hash(path) != entry.blake3:
                raise ArtifactError(f"{path}: was altered since it was built (hash differs); compile the model again")
        named = {region.file for region in self.manifest.regions} | {MODEL} | ({self.manifest.pool} - {""})
        unknown = named - set(self.manifest.files)
        if unknown:
            raise ArtifactError(f"{self.root}: the manifest has no hash for {sorted(unknown)[0]!r}")


def write_manifest(manifest: Manifest, root: Path) -> Manifest:
    """Write the manifest with its digest, and return it so."""
    temporary = root / f".{MANIFEST}.part"
    complete = manifest.model_copy(update={"digest": manifest.own_digest()})
    temporary.write_text(complete.model_dump_json(indent=1) + "\n")
    os.replace(temporary, root / MANIFEST)
    return complete


def file_hash(path: Path) -> str:
    """BLAKE3 of the file's content, in hex: a fourth of the time of SHA-256. A process hashes a large file, which
    several artifacts may share, once."""
    status = path.stat()
    if status.st_size <= WINDOW:
        return _hashed(path, status.st_size)
    key = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
    if key not in _hashes:
        _hashes[key] = _hashed(path, status.st_size)
    return _hashes[key]


_hashes: dict[tuple[int, ...], str] = {}
_hashing_threads = blake3.AUTO


def _after_fork() -> None:
    """A forked process has none of blake3's threads, and would wait for them."""
    global _hashing_threads
    _hashing_threads = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _hashed(path: Path, size: int) -> str:
    """The hash, a window of the file at a time: what is mapped counts as this process's memory."""
    digest = blake3(max_threads=_hashing_threads)
    with open(path, "rb") as file:
        for start in range(0, size, WINDOW):
            with mmap.mmap(file.fileno(), min(WINDOW, size - start), access=mmap.ACCESS_READ, offset=start) as window:
                digest.update(window)
    return digest.hexdigest()


def read_range(path: Path, offset: int, left: int) -> Iterator[bytes]:
    """A part of a file, chunk by chunk."""
    with open(path, "rb") as file:
        file.seek(offset)
        while left:
            chunk = file.read(min(CHUNK, left))
            left -= len(chunk)
            yield chunk


def file_specs(root: Path) -> dict[str, FileSpec]:
    """Hash and size of every file of a finished folder."""
    names = sorted(p.name for p in root.iterdir() if p.is_file() and p.name != MANIFEST)
    return {n: FileSpec(blake3=file_hash(root / n), nbytes=(root / n).stat().st_size) for n in names}


@dataclass
class WeightStore:
    """weights.bin while it is written: equal bytes are stored once."""

    path: Path
    _offsets: dict[bytes, int] = field(default_factory=dict)
    _end: int = 0

    def add(self, chunks: Iterable[bytes], nbytes: int) -> int:
        """Append the bytes unless they are there already; returns their offset."""
        with open(self.path, "ab") as file:
            start = -(-self._end // ALIGNMENT) * ALIGNMENT
            file.truncate(start)
            file.seek(start)
            digest = self._append(chunks, file)
            key = digest + nbytes.to_bytes(8, "little")
            if key in self._offsets:
                file.truncate(self._end)
                return self._offsets[key]
        self._offsets[key] = start
        self._end = start + nbytes
        return start

    @staticmethod
    def _append(chunks: Iterable[bytes], file: BinaryIO) -> bytes:
        digest = blake3()
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
        return digest.digest()


def exchange(a: Path, b: Path) -> bool:
    """Let two folders swap names in one step. False where the system or the file system has no such step."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not Linux, or a C library without it
        return False
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(b))


def set_aside(out: Path) -> list[Path]:
    """Artifacts that an interrupted replacement of `out` has left under a hidden name, the newest last."""
    try:
        found = [p for p in out.absolute().parent.iterdir() if p.name.startswith(f".{out.name}.") and p.suffix == OLD]
        return sorted(found, key=lambda p: p.stat().st_mtime)
    except OSError:
        return []


def recover(out: Path) -> None:
    """Put back what a replacement of `out` that was interrupted between its two renames has set aside."""
    found = set_aside(out)
    if not found or out.exists():
        return
    try:
        os.rename(found[-1], out)
    except OSError as error:
        raise OutputError(f"{found[-1]}: is the former {out} and cannot be renamed ({error.strerror})") from error
    log.warning("%s: put back after an interrupted replacement", out)


class Workplace:
    """A folder beside the final one that takes its place when all is done and vanishes when it is not.

    mark: the file by which a folder is known as one that may be replaced, `what` it is then.
    """

    def __init__(self, out: Path, overwrite: bool, mark: str = MANIFEST, what: str = "an artifact") -> None:
        self.out, self.overwrite, self.mark, self.what = out, overwrite, mark, what

    def __enter__(self) -> Path:
        from ..passes.io import check_output

        recover(self.out)
        check_output(self.out, self.overwrite)
        if (self.out.exists() or self.out.is_symlink()) and not self._replaceable():
            raise OutputError(f"{self.out}: is not {self.what} folder and will not be replaced; choose another output")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".part", dir=self.out.parent))
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be written ({error.strerror}); choose another output") from error
        umask = os.umask(0)
        os.umask(umask)
        self.folder.chmod(0o777 & ~umask)
        return self.folder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._place()
        except OSError as failure:
            raise OutputError(f"{self.out}: cannot be written ({failure.strerror}); choose another output") from failure
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self) -> None:
        if not self.overwrite or not self.out.exists():
            os.rename(self.folder, self.out)  # fails where something has come into being that is not empty
            return
        if exchange(self.folder, self.out):
            return  # the old one now has the temporary name and goes with it
        old = self.folder.with_suffix(OLD)
        os.rename(self.out, old)
        try:
            os.rename(self.folder, self.out)
        except BaseException:  # Ctrl-C too
            if not self.out.exists():
                self._put_back(old)
            raise
        shutil.rmtree(old)

    def _put_back(self, old: Path) -> None:
        try:
            os.rename(old, self.out)
        except OSError as error:
            raise OutputError(
                f"{self.out}: could not be replaced, and what was there is now {old} ({error.strerror}); rename it"
            ) from error

    def _replaceable(self) -> bool:
        if self.out.is_symlink() or not self.out.is_dir():
            return False
        return (self.out / self.mark).is_file() or not any(self.out.iterdir())
