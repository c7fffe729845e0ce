"""Write a text encoder or VAE from a file of another tool as a component of a Diffusers folder.

Does not import torch, except to decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascendit.checkpoint.component import EXPERTS, Part
from ascendit.checkpoint.layer_format import Layer
from ascendit.checkpoint.layout import Layout
from ascendit.checkpoint.output_folder import Staging
from ascendit.checkpoint.part_check import check_part
from ascendit.checkpoint.part_files import with_part_files
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.writer import MAX_SHARD_BYTES, ShardWriter
from ascendit.convert import provenance
from ascendit.convert.expert_folder import WriteBehind
from ascendit.progress import Advance
from ascendit.weights.tensor_steps import TensorStep, moved, run_steps


@dataclass(frozen=True, kw_only=True)
class PartOutput:
    """A component of a pipeline whose weights come from another file."""

    part: Part
    """With the config of the pipeline and the file of the weights."""
    tensors: Mapping[str, TensorInfo]
    """Name in the library -> where it is stored."""
    layers: Mapping[str, Layer] = field(default_factory=dict)
    """Quantized layers: none."""
    notes: tuple[str, ...] = ()
    """Tensors of the file that are not used, as sentences."""

    @property
    def path(self) -> Path:
        """The file of the weights."""
        return self.part.path

    @property
    def steps(self) -> list[TensorStep]:
        """Every tensor in the order of the file, unchanged or decoded."""
        return [moved(name, info) for name, info in self.tensors.items()]

    @property
    def nbytes(self) -> int:
        """Bytes of all written tensors."""
        return sum(step.output_bytes() for step in self.steps)

    @property
    def source_nbytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(info.nbytes for info in self.tensors.values())

    def write(self, staging: Staging, advance: Advance, *, hash: bool) -> dict[str, str]:
        """Write weights and config. Returns path in the output -> sha256 of the weight files with `hash`.

        Raises the errors of `run_steps` and `ShardWriter`.
        """
        folder = staging.path / self.part.name
        folder.mkdir(exist_ok=True)  # by an earlier run that was stopped
        steps = self.steps
        writer = ShardWriter(
            folder,
            [spec for step in steps for spec in step.specs],
            stem=self.part.stem,
            max_shard_bytes=MAX_SHARD_BYTES,
            hash=hash,
            journal=staging.journal,
        )
        with writer, RowReader() as reader, WriteBehind(writer) as sink:
            run_steps(steps, reader, sink, advance=advance)
            sink.flush()
            digests = writer.close()
        provenance.write_json(folder / "config.json", self.part.config)
        return {f"{self.part.name}/{name}": digest for name, digest in digests.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "name": self.part.name,
            "file": self.path.name,
            "tensors": len(self.tensors),
            "bytes_before": self.source_nbytes,
            "bytes_after": self.nbytes,
        }


def part_outputs(files: Layout, base: Layout) -> list[PartOutput]:
    """The components of `files` that are not transformers, checked against the configs of `base`.

    Raises the errors of `with_part_files` and `check_part`.
    """
    outputs = []
    for name, part in with_part_files(base, files).parts.items():
        if name in files.parts and name not in EXPERTS:
            shards = check_part(part)
            assert shards is not None
            outputs.append(PartOutput(part=part, tensors=shards.tensors, notes=shards.notes))
    return outputs
