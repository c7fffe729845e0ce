"""The weight files of one component as one set of tensors: one file, shards with an index, or named files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ascendit.checkpoint.component import STEM, Part, read_json, stays_inside
from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.sources import check_state
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.weight_sets import has_weight_suffix, weight_set
from ascendit.errors import CheckpointError
from ascendit.names import listed, problem_counts


@dataclass(frozen=True)
class Shards:
    """The headers of all weight files of one component, as one set of tensors."""

    tensors: dict[str, TensorInfo]
    """All tensors, in the order of the files and of the bytes in each file."""
    files: tuple[Path, ...]
    kinds: tuple[str, ...] = ()
    """The kinds of the files of a part that a library runs, keys of `kind_table.KINDS`."""
    notes: tuple[str, ...] = ()
    """Tensors of such a part that are not used, as sentences."""

    @classmethod
    def open(cls, folder: Path, stem: str = STEM) -> Self:
        """Read and check the headers of the weights in `folder`, which `weight_set` chooses.

        Raises CheckpointError: E-CKP-02 for a missing or damaged file, E-CKP-03 for an index that lists a
        missing file or one outside the folder, and for files that do not belong together, E-CKP-04 for an
        index that does not match the shards, E-CKP-06 for an index that is not JSON.
        """
        folder = Path(folder)
        single = folder / f"{stem}.safetensors"
        index, files = weight_set(folder, stem)
        if index is None:
            if not files or (single.is_symlink() and not single.exists()):
                raise _no_weights(single)
            return cls.from_files(files)
        shards = cls.from_index(index)
        if single.exists() and single not in shards.files:
            raise CheckpointError(
                f"{folder} has both {single.name} and {index.name}",
                needs="only one of them: they may contain different weights",
                fix="remove the outdated one",
                code="E-CKP-03",
            )
        return shards

    @classmethod
    def from_index(cls, index: Path) -> Self:
        """Read the shards listed in an index file. Raises CheckpointError as in `open`."""
        weight_map = _weight_map(index)
        names = sorted(set(weight_map.values()))
        files = tuple(dict.fromkeys(index.parent / name for name in names))  # `a` and `./a` are one file
        if missing := [
            path.name for path in files if not os.path.isfile(path)
        ]:  # False if a name is too long
            raise CheckpointError(
                f"{index} lists {len(files)} files, {len(missing)} of them missing: {listed(missing)}",
                needs="every shard that the index lists, in the same folder",
                fix="download the missing files",
                code="E-CKP-03",
            )
        return cls(_join(index, weight_map, files), files)

    @classmethod
    def from_files(cls, files: Sequence[Path]) -> Self:
        """Read files without an index.

        Raises CheckpointError: E-CKP-02 if damaged, E-CKP-09 for duplicates.
        """
        tensors: dict[str, TensorInfo] = {}
        for path in files:
            for name, info in read_header(path).items():
                if name in tensors:
                    first = tensors[name].file.name
                    raise CheckpointError(
                        f"{name} is in both {first} and {path.name}, in {path.parent}",
                        needs="each tensor in one file",
                        fix="remove the files of another model or an older run",
                        code="E-CKP-09",
                    )
                tensors[name] = info
        return cls(tensors, tuple(files))

    @classmethod
    def from_part(cls, part: Part) -> Self:
        """Read the weight files of `part`. Raises the errors of `open` and `from_files`."""
        if part.index is not None:
            return cls.from_index(part.index)
        return cls.from_files(part.files) if part.files else cls.open(part.path, part.stem)

    def check_unchanged(self) -> None:
        """Raise CheckpointError (E-CKP-02) if a file has changed since its header was read."""
        for file, state in {info.file: info.state for info in self.tensors.values()}.items():
            check_state(file, state)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            f"{index} has no weight_map",
            needs="an object that maps each tensor to its file",
            fix="download the file again",
            code="E-CKP-06",
        )
    # Links inside the folder may point elsewhere (hub caches); names may not.
    if outside := [name for name in sorted(set(weight_map.values())) if not stays_inside(name)]:
        raise CheckpointError(
            f"{index} lists {outside[0]!r}, which is not inside the folder",
            needs="names of files in the folder of the index",
            fix="download the model from a trusted source",
            code="E-CKP-03",
        )
    return weight_map


def _join(index: Path, weight_map: dict[str, str], files: tuple[Path, ...]) -> dict[str, TensorInfo]:
    """The tensors of all shards. Each must be in the file that `weight_map` lists, and in no other."""
    tensors: dict[str, TensorInfo] = {}
    unmapped: list[str] = []
    path_of = {name: index.parent / name for name in set(weight_map.values())}
    for path in files:
        for name, info in read_header(path).items():
            if name in weight_map and path_of[weight_map[name]] == path:
                tensors[name] = info
            else:
                unmapped.append(f"{name} in {path.name}")
    absent = [f"{name} in {weight_map[name]}" for name in weight_map if name not in tensors]
    kinds = {"not in the listed shard": absent, "in a shard but not in the index": unmapped}
    if not (problems := problem_counts(kinds)):
        return tensors
    raise CheckpointError(
        f"{index} does not match its shards: {problems}",
        needs="an index that lists exactly the tensors of the shards",
        fix="download the index and the shards again; they are from different versions",
        code="E-CKP-04",
    )


def _no_weights(file: Path) -> CheckpointError:
    """`file`: the expected path of weights in a single file."""
    folder, fix = file.parent, "download the weights of this component, in safetensors format"
    if file.is_symlink():
        return CheckpointError(
            f"{file} is a dangling symlink to {os.readlink(file)}",
            needs="the weight file, or a link to it",
            fix="copy the weight file, or correct the link",
            code="E-CKP-03",
        )
    got = f"no {file.name} in {folder}" if folder.is_dir() else f"no folder {folder}"
    others = sorted(path.name for path in folder.glob("*") if has_weight_suffix(path.name))
    needs = f"{file.name}, or {file.name}.index.json and its shards"
    return CheckpointError(
        got + (f" (it has {listed(others)})" if others else ""), needs=needs, fix=fix, code="E-CKP-02"
    )
