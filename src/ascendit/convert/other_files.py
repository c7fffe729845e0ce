"""The other components and small files of a model in an output of `quantize` or `repack`.

Does not import torch. Nothing outside of the checkpoint is copied, see `checkpoint.trust.Home`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ascendit.checkpoint.component import EXPERTS
from ascendit.checkpoint.journal import Journal
from ascendit.checkpoint.layout import INDEX_FILE, RECORD_FILE, Layout
from ascendit.checkpoint.output_folder import link_or_copy
from ascendit.checkpoint.quant_metadata import MANIFEST_FILE
from ascendit.checkpoint.sources import record_folder, record_source
from ascendit.checkpoint.trust import Home, outside_links
from ascendit.checkpoint.weight_sets import WEIGHT_SUFFIXES

CARD_FILE = "README.md"
MAX_COPIED_BYTES = 1 << 20
"""Larger files at the top of the source folder are not copied."""
_NOT_COPIED = {CARD_FILE, RECORD_FILE, MANIFEST_FILE}
_WEIGHTS = (*WEIGHT_SUFFIXES, ".index.json")
_LICENCE = re.compile(r"(?:LICEN[CS]E|NOTICE)\b", re.IGNORECASE)


@dataclass(frozen=True)
class OtherFiles:
    """The components and files of a layout to link or copy, and the links that are omitted."""

    layout: Layout
    copy: bool
    """Copy the components; files are always copied."""
    components: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """`model_index.json` and other files at the top."""
    omitted: tuple[str, ...] = ()
    """Links that lead out of the checkpoint, as `name -> path`."""

    @classmethod
    def of(
        cls,
        layout: Layout,
        *,
        copy: bool,
        licences_only: bool = False,
        written: Collection[str] = EXPERTS,
    ) -> Self:
        """Plan the other files of a pipeline folder. `licences_only`: omit other small files at the top.
        `written`: the components that the output gets otherwise.

        Raises CheckpointError (E-CKP-03) if a required file is a link that leads out of the checkpoint.
        """
        home = Home.of(layout.root)
        home.require(layout.root / INDEX_FILE)
        omitted: list[Path] = []
        names = [name for name in layout.parts if name not in written]
        for name in names:
            omitted += outside_links(layout.root, layout.parts[name], copied=copy)
        files = []
        for path in sorted(layout.root.iterdir()):
            if path.name.startswith(".") or path.name in _NOT_COPIED or path.name.lower().endswith(_WEIGHTS):
                continue
            if path.is_symlink() and not home.contains(path):
                if path.name not in layout.parts:
                    omitted.append(path)
            elif path.is_file() and (
                path.name == INDEX_FILE
                or (path.stat().st_size <= MAX_COPIED_BYTES and not licences_only)
                or _LICENCE.match(path.name)
            ):
                files.append(path.name)
        links = (f"{path.relative_to(layout.root)} -> {path.resolve()}" for path in omitted)
        return cls(layout, copy, tuple(names), tuple(files), tuple(links))

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the output."""
        return self.components + self.files

    @property
    def copied(self) -> tuple[Path, ...]:
        """The files and folders that are copied; others are linked."""
        return tuple(self.layout.root / name for name in (self.names if self.copy else self.files))

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        return sum(_size(path) for path in self.copied)

    def record(self) -> None:
        """Record all of them as sources of this run."""
        for name in self.components:
            record_folder(self.layout.root / name)
        for name in self.files:
            record_source(self.layout.root / name)

    def write(self, folder: Path, journal: Journal | None = None) -> None:
        """Link or copy everything into `folder`; `journal` is its `Staging`'s. Raises as `link_or_copy`."""
        for name in self.names:
            part = self.layout.parts.get(name)
            home = Home.of(self.layout.root, part)
            copy = self.copy or name in self.files
            link_or_copy(self.layout.root / name, folder / name, copy=copy, home=home, journal=journal)


def require_inside(layout: Layout) -> None:
    """Raise CheckpointError (E-CKP-03) if a JSON file of an expert is a link out of the checkpoint."""
    for expert in layout.experts:
        outside_links(layout.root, expert, copied=False)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder, with links followed."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
