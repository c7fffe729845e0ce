"""Compare the numbers of two checkpoints: hashes of all decoded values, read a few rows at a time.

It shares no code with `tensor_steps`: it decodes packed values and scales from the stored bytes. Functions
import torch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ascendit.checkpoint.layer_format import Layer
from ascendit.checkpoint.reader import RowReader, as_bytes
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.writer import Data, TensorSpec
from ascendit.errors import CheckpointError
from ascendit.names import listed
from ascendit.progress import Advance
from ascendit.weights.decoded_rows import NonFinite, layer_rows, tensor_rows
from ascendit.weights.tensor_steps import Piece, Sink, TensorStep, no_progress, run_steps

if TYPE_CHECKING:
    from torch import Tensor

Rows = Callable[[RowReader], Iterator["Tensor"]]


class Stored(Protocol):
    """Tensors on disk: an expert, or another part without quantized layers."""

    @property
    def path(self) -> Path:
        """Folder or file, for messages."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Canonical name -> where it is stored."""

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The quantized layers."""


def compare_numbers(source: Stored, written: Stored, advance: Advance = no_progress) -> dict[str, str]:
    """Return the digests, equal for both.

    Raises CheckpointError, which names the tensors: E-CKP-10 if they differ, E-QNT-01 for NaN and infinity.
    """
    invalid: dict[str, NonFinite] = {}
    before, after = digests(source, advance, invalid), digests(written, advance)
    wrong = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(before)} tensors of {source.path} differ in the output: {listed(wrong)}",
            needs="the same values in source and output",
            fix="run it again; if it fails again, check disk and memory, and report it with this message",
            code="E-CKP-10",
        )
    if invalid:
        texts = [f"{name} has {x.count}, the first at {list(x.first)}" for name, x in invalid.items()]
        raise CheckpointError(
            f"{len(invalid)} of {len(before)} tensors of {source.path} have NaN or infinite values: "
            + listed(texts),
            needs="finite weights, scales and biases: a model with these makes no valid video",
            fix="download the model again, or quantize it again from its float weights; without --check, "
            "repack copies the values unchanged",
            code="E-QNT-01",
        )
    return before


class Checker(Sink):
    """A sink that computes the sha256 of each tensor."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}

    def append(self, name: str, data: Data) -> None:
        """Hash the next bytes of a tensor."""
        self.sums.setdefault(name, hashlib.sha256()).update(data)


def digests(
    expert: Stored, advance: Advance = no_progress, invalid: dict[str, NonFinite] | None = None
) -> dict[str, str]:
    """Return name -> sha256 of the decoded values, as little-endian float32 in row order.

    A quantized layer has one entry for its decoded weight, which includes its scales. Offsets, which are
    zero, and a `mul_scale` of ones have no entry. Calls `advance(name, bytes read)` as rows are read. Tensors
    with NaN or infinite values are added to `invalid`.
    """
    checker = Checker()
    with RowReader() as reader:
        run_steps(decoded_steps(expert, reader, invalid), reader, checker, advance=advance)
    return {name: digest.hexdigest() for name, digest in checker.sums.items()}


def decoded_steps(
    expert: Stored, reader: RowReader, invalid: dict[str, NonFinite] | None = None
) -> list[TensorStep]:
    """Plan the steps that decode all tensors to float32. `invalid`: see `digests`."""

    def step(name: str, shape: tuple[int, ...], sources: Sequence[TensorInfo], rows: Rows) -> TensorStep:
        def make(step: TensorStep, reader: RowReader) -> Iterator[Piece]:
            counts = NonFinite()
            for block in rows(reader):
                if invalid is not None:
                    counts.add(block)
                yield name, as_bytes(block)
            if invalid is not None and counts.count:
                invalid[name] = counts

        specs = (TensorSpec(name, "F32", shape),)
        return TensorStep(name=name, how="rows", specs=specs, sources=tuple(sources), make=make)

    steps, used = [], set()
    for name, layer in expert.layers.items():
        sources = [info for role, info in layer.tensors.items() if role not in ("bias", "mul_scale")]
        used |= set(sources)
        steps.append(step(f"{name}.weight", layer.shape, sources, functools.partial(layer_rows, layer)))
    for name, info in expert.tensors.items():
        if info not in used and not (name.endswith(".mul_scale") and _is_ones(info, reader)):
            steps.append(step(name, info.shape, (info,), functools.partial(tensor_rows, info)))
    return steps


def combined(digests_by_name: dict[str, str]) -> str:
    """One sha256 of all names and digests, in the order of the names."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests_by_name.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _is_ones(info: TensorInfo, reader: RowReader) -> bool:
    return all(bool((rows == 1).all()) for rows in tensor_rows(info, reader))
