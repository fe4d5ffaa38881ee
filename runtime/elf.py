"""What the link step reads of an ELF file: its machine, and the symbols it leaves to other libraries."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from ..passes.errors import ArtifactError

MACHINES = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
ARM_HARD_FLOAT = 0x400  # EF_ARM_ABI_FLOAT_HARD in e_flags
_DYNSYM, _VERSYM = 11, 0x6FFFFFFF
_WEAK = 2


@dataclass(frozen=True)
class Elf:
    """machine: in uname's words. bits: 32 or 64. flags: e_flags. undefined: strong undefined symbols of no
    version, that is, those that none of the libraries it was linked with has."""

    machine: str
    bits: int
    flags: int
    undefined: frozenset[str]


def read(path: str | os.PathLike[str]) -> Elf:
    """Raises ArtifactError when the file is not a little-endian ELF file."""
    data = Path(path).read_bytes()
    if data[:4] != b"\x7fELF" or len(data) < 52 or data[5] != 1:
        raise ArtifactError(f"{path}: not a little-endian ELF file; compile the model again")
    wide = data[4] == 2
    machine = struct.unpack_from("<H", data, 18)[0]
    flags = struct.unpack_from("<I", data, 48 if wide else 36)[0]
    try:
        undefined = _undefined(data, wide)
    except struct.error as error:
        raise ArtifactError(f"{path}: a damaged ELF file; compile the model again") from error
    return Elf(MACHINES.get(machine, f"machine {machine}"), 64 if wide else 32, flags, undefined)


def _sections(data: bytes, wide: bool) -> list[tuple[int, int, int, int]]:
    """(type, offset, size, link) of every section."""
    start = struct.unpack_from("<Q" if wide else "<I", data, 40 if wide else 32)[0]
    size, count = struct.unpack_from("<HH", data, 58 if wide else 46)
    found = []
    for at in range(start, start + size * count, size):
        fields = struct.unpack_from("<IIQQQQI" if wide else "<IIIIIII", data, at)
        found.append((fields[1], fields[4], fields[5], fields[6]))
    return found


def _undefined(data: bytes, wide: bool) -> frozenset[str]:
    sections = _sections(data, wide)
    symbols = next((s for s in sections if s[0] == _DYNSYM), None)
    if symbols is None:
        return frozenset()
    versions = next((s for s in sections if s[0] == _VERSYM), None)
    names = sections[symbols[3]][1]
    step = 24 if wide else 16
    found = set()
    for index in range(1, symbols[2] // step):
        at = symbols[1] + index * step
        if wide:
            name, info, _, section = struct.unpack_from("<IBBH", data, at)
        else:
            name, _, _, info, _, section = struct.unpack_from("<IIIBBH", data, at)
        version = struct.unpack_from("<H", data, versions[1] + 2 * index)[0] & 0x7FFF if versions else 0
        if section == 0 and info >> 4 != _WEAK and version < 2:
            found.add(data[names + name : data.index(b"\0", names + name)].decode())
    return frozenset(found)
