"""Libraries and symbols that a shared library needs, read from its file (64-bit little-endian ELF)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STRTAB, DYNSYM, DYNAMIC, NOBITS = 3, 11, 6, 8
NEEDED = 1


@dataclass(frozen=True)
class Section:
    kind: int
    data: memoryview
    link: int


@dataclass(frozen=True)
class Library:
    """`needed`: names of libraries. `undefined`: symbols from other libraries. `data`: the complete file."""

    name: str
    needed: tuple[str, ...]
    undefined: frozenset[str]
    data: bytes

    def strings(self, pattern: bytes) -> frozenset[str]:
        """The zero-terminated strings of the file that match `pattern`, such as names for dlsym."""
        return frozenset(m.decode() for m in re.findall(rb"(?<=\0)" + pattern + rb"(?=\0)", self.data))


def read(path: Path) -> Library:
    """Read a library. Raises ValueError for another kind of file."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is not a 64-bit little-endian ELF file")
    sections = list(_sections(memoryview(data)))
    needed: list[str] = []
    undefined: set[str] = set()
    for section in sections:
        if section.kind == DYNAMIC:
            names = sections[section.link].data
            needed += [_text(names, v) for tag, v in struct.iter_unpack("<QQ", section.data) if tag == NEEDED]
        elif section.kind == DYNSYM:
            names = sections[section.link].data
            for name, info, _, index, _, _ in struct.iter_unpack("<IBBHQQ", section.data):
                if index == 0 and info >> 4 == 1:  # undefined and global; weak symbols may be missing
                    undefined.add(_text(names, name))
    return Library(path.name, tuple(needed), frozenset(undefined), data)


def _sections(data: memoryview) -> Iterator[Section]:
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    for i in range(count):
        _, kind, _, _, offset, length, link = struct.unpack_from("<IIQQQQI", data, start + i * size)
        yield Section(kind, data[offset : offset + (0 if kind == NOBITS else length)], link)


def _text(names: memoryview, offset: int) -> str:
    end = offset
    while names[end]:
        end += 1
    return bytes(names[offset:end]).decode()
