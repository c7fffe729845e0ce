"""Ways to break one thing in a model folder: each gives a function that does it to a folder."""

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
    """Change the tensors and write the file anew, whole."""

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
    """Change the header and leave the bytes of the tensors."""

    def damage(folder: Path) -> None:
        tensors = load(folder / WEIGHTS)
        entries = header(tensors)
        edit(entries)
        (folder / WEIGHTS).write_bytes(raw(entries, b"".join(data for _, _, data in tensors.values())))

    return damage


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def put(name: str, number: float, place: int = 3) -> Damage:
    """One float32 of a tensor."""

    def edit(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        assert dtype == "F32"
        tensors[name] = (dtype, shape, data[: 4 * place] + struct.pack("<f", number) + data[4 * place + 4 :])

    return weights(edit)


def byte(name: str, value: int, file: str = WEIGHTS) -> Damage:
    """One byte of a tensor, the second."""

    def edit(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, data[:1] + bytes([value]) + data[2:])

    return weights(edit, file)


def drop(*names: str) -> Damage:
    return weights(lambda tensors: [tensors.pop(name) for name in names])


def forget(*names: str) -> Damage:
    """Out of the weights and the manifest, so that only what is left is at odds."""
    return both(drop(*names), json_file(MANIFEST, lambda entries: [entries.pop(name) for name in names]))


def retype(name: str, dtype: str, shape: tuple[int, ...] | None = None) -> Damage:
    """The same bytes as another dtype."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = (dtype, shape or tensors[name][1], tensors[name][2])

    return weights(edit)


def shrink(name: str) -> Damage:
    """Without its last row."""

    def edit(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, (shape[0] - 1, *shape[1:]), data[: -(len(data) // shape[0])])

    return weights(edit)


def add(name: str, tensor: Tensor = ("BF16", (64,), bytes(128))) -> Damage:
    return weights(lambda tensors: tensors.update({name: tensor}))


def link(name: str, target: str) -> Damage:
    """A link in place of the file or folder that is there."""

    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(target)

    return damage


def pipe(name: str) -> Damage:
    """A named pipe in place of a file: who opens it waits for ever."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def cut(count: int) -> Damage:
    """All but the last `count` bytes; of a negative one, only the first."""
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-count])
