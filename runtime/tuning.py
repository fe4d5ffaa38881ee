"""Tiles that were measured to be faster than those by rule: as a value that goes with a target, and in a file."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..passes.errors import OutputError

log = logging.getLogger("graphwright")


@dataclass(frozen=True)
class Tuning:
    """tiles: (name of a kernel, its tile), both as JSON. Kernels that are not in it take their tiles by rule."""

    tiles: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def _found(self) -> dict[str, str]:
        return dict(self.tiles)

    def find(self, template: str, spec: Mapping[str, Any]) -> dict[str, Any] | None:
        """The fields of the tile for a kernel; None where there is none. spec: the fields of what it computes."""
        text = self._found.get(kernel_name(template, spec)) if self.tiles else None
        return None if text is None else json.loads(text)

    def to_json(self) -> dict[str, Any]:
        return {name: json.loads(tile) for name, tile in self.tiles}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tuning:
        return cls(tuple((name, json.dumps(tile, sort_keys=True)) for name, tile in data.items()))


def kernel_name(template: str, spec: Mapping[str, Any]) -> str:
    """What a kernel computes, in one line."""
    return json.dumps({"template": template, "spec": dict(spec)}, sort_keys=True)


@dataclass(frozen=True)
class Tunable:
    """A kernel of a model whose tile can be chosen. calls: in a run. cycles: of one, a rough estimate."""

    template: str
    spec: dict[str, Any]
    calls: int
    cycles: float

    @property
    def name(self) -> str:
        return kernel_name(self.template, self.spec)


@dataclass(frozen=True)
class Measured:
    """What the candidates for one kernel came to.

    tile: the fields of the one that is clearly faster than the rule's; None where none is. rule_us, tuned_us: of a call
    alone. ratio, low: of the two, median and 10th percentile. candidates: how many were tried. complete: whether these
    are all, or as many as a kernel ever gets the time for.
    """

    tile: dict[str, Any] | None
    rule_us: float
    tuned_us: float
    ratio: float = 1.0
    low: float = 1.0
    candidates: int = 0
    complete: bool = True


class Database:
    """A file with a line for each kernel that was measured; of several lines for one the last counts.

    Lines are only appended, one at a time under a lock, so that two processes may write, and a process that is
    interrupted leaves at worst one torn line. Lines that are damaged are left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Measured]:
        found, damaged = {}, 0
        for line in filter(None, self._bytes().splitlines()):
            try:
                entry = json.loads(line)
                key, measured = entry["key"], entry["measured"]
                if entry["check"] != _check(key, measured):
                    raise ValueError("altered")
                found[str(key)] = Measured(**measured)
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += 1
        if damaged:
            log.warning("%s: %d damaged lines are left out; their kernels count as not measured", self.path, damaged)
        return found

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read ({error.strerror}); remove it") from error

    def add(self, key: str, measured: Measured) -> None:
        fields = asdict(measured)
        line = json.dumps({"key": key, "measured": fields, "check": _check(key, fields)}).encode() + b"\n"
        with self._locked() as file:
            size = os.lseek(file, 0, os.SEEK_END)
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            os.write(file, b"\n" * torn + line)

    def check(self, writable: bool) -> None:
        """Raises the OutputError that `read`, or with `writable` `add`, would raise."""
        self._bytes()
        if writable:
            with self._locked():
                pass

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        import fcntl

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}); set GRAPHWRIGHT_CACHE to a folder that can"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def _check(key: str, fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([key, fields], sort_keys=True).encode()).hexdigest()[:16]
