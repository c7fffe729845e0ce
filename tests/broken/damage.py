"""Ways to break one thing in a model folder. Each returns a function that damages a folder."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broken.models import MANIFEST, WEIGHTS, Tensor, Tensors, header, load, raw, save, write_json
from broken.registry import Damage


def weights(edit: Callable[[Tensors], object], file: str = WEIGHTS) -> Damage:
    """Change the tensors and rewrite the file as a valid one."""

    def damage(folder: Path) -> None:
        tensors = load(folder / file)
        edit(tensors)
        save(folder / file, tensors)

    return damage


def json_file(file: str, edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        edit(data)
        write_json(folder / file, data)

    return damage


def content(file: str, new: bytes | str) -> Damage:
    data = new if isinstance(new, bytes) else new.encode()
    return lambda folder: (folder / file).write_bytes(data)


def head(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header and leave the bytes of the tensors unchanged."""

    def damage(folder: Path) -> None:
        tensors = load(folder / WEIGHTS)
        entries = header(tensors)
        edit(entries)
        (folder / WEIGHTS).write_bytes(raw(entries, b"".join(data for _, _, data in tensors.values())))

    return damage


def combine(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def set_float(name: str, number: float, index: int = 3) -> Damage:
    """Change one float32 element of a tensor."""

    def edit(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        assert dtype == "F32"
        tensors[name] = (dtype, shape, data[: 4 * index] + struct.pack("<f", number) + data[4 * index + 4 :])

    return weights(edit)


def set_byte(name: str, value: int, file: str = WEIGHTS) -> Damage:
    """Change the second byte of a tensor."""

    def edit(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, data[:1] + bytes([value]) + data[2:])

    return weights(edit, file)


def drop(*names: str) -> Damage:
    return weights(lambda tensors: [tensors.pop(name) for name in names])


def forget(*names: str) -> Damage:
    """Remove tensors from the weights and the manifest, so that only the others contradict each other."""
    return combine(drop(*names), json_file(MANIFEST, lambda entries: [entries.pop(name) for name in names]))


def retype(name: str, dtype: str, shape: tuple[int, ...] | None = None) -> Damage:
    """Declare the same bytes as another dtype."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = (dtype, shape or tensors[name][1], tensors[name][2])

    return weights(edit)


def shrink(name: str) -> Damage:
    """Remove the last row."""

    def edit(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, (shape[0] - 1, *shape[1:]), data[: -(len(data) // shape[0])])

    return weights(edit)


def add(name: str, tensor: Tensor = ("BF16", (64,), bytes(128))) -> Damage:
    return weights(lambda tensors: tensors.update({name: tensor}))


def link(name: str, target: str) -> Damage:
    """Replace a file or folder by a symlink."""

    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(target)

    return damage


def pipe(name: str) -> Damage:
    """Replace a file by a named pipe; opening it would block for ever."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def cut(count: int) -> Damage:
    """Remove the last `count` bytes; if negative, keep only the first `-count`."""
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-count])
