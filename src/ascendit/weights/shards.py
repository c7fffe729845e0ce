"""Map one rank's shard of a linear layer to shards of its tensors: weight, scales and bias.

Does not import torch.

A shard is a range of output features (axis 0, N) or input features (axis 1, K) of the layer. Ranges of K must
begin and end at boundaries of the blocks that share a scale. A bias is sharded only along N: for ranges of K
each rank reads all of it, and the caller adds it on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ascendit.checkpoint.reader import WHOLE, ShardSpec
from ascendit.checkpoint.transformer import Expert
from ascendit.errors import UsageError
from ascendit.quant.schemes import STORED_SCHEMES, scheme_after_reading
from ascendit.weights.tensor_steps import TensorStep

LayerShards = Callable[[str], ShardSpec] | Mapping[str, ShardSpec]
"""Layer -> its shard; layers that are not in the mapping are complete."""


def shard_of(shards: LayerShards, layer: str) -> ShardSpec:
    """The shard of one layer."""
    return shards.get(layer, WHOLE) if isinstance(shards, Mapping) else shards(layer)


def cut_steps(
    steps: Iterable[TensorStep], expert: Expert, schemes: Mapping[str, str], shards: LayerShards
) -> list[TensorStep]:
    """Restrict steps to shards, so that they read no other bytes where possible.

    `schemes`: layer -> output scheme; default bf16. Raises UsageError (E-USE-05) for an invalid shard.
    """
    cut = []
    for step in steps:
        name = step.name.rpartition(".")[0]
        layer, weight = expert.layers.get(name), expert.tensors.get(f"{name}.weight")
        shape = layer.shape if layer else weight.shape if weight else ()
        scheme = schemes.get(name, "bf16")
        shard = check_shard(name, scheme, shape, shard_of(shards, name)) if shape else WHOLE
        cut.append(step if shard == WHOLE else _cut(step, shard, shape, scheme))
    return cut


def _cut(step: TensorStep, shard: ShardSpec, shape: tuple[int, ...], scheme: str) -> TensorStep:
    def tensor_shard(name: str, stored: tuple[int, ...]) -> ShardSpec:
        return role_shard(shard, name.rpartition(".")[2], stored, shape, scheme)

    specs = (replace(s, shape=tensor_shard(s.name, s.shape).shape_of(s.shape)) for s in step.specs)
    source = step.sources[0].shape if step.sources else ()
    return replace(step, specs=tuple(specs), shard=tensor_shard(step.name, source))


def check_shard(layer: str, scheme: str, shape: tuple[int, ...], shard: ShardSpec) -> ShardSpec:
    """Return the shard of a layer with a weight of `shape`, with its count filled in.

    `scheme`: a key of `quant.schemes.STORED_SCHEMES`. Ranges of K are multiples of 32 in MX schemes and of
    512 in `mxfp4_dualscale`; in schemes with tiles, ranges of both axes are multiples of the tile. The last
    range may end at any row or column. Raises UsageError (E-USE-05) for an invalid shard.
    """
    if shard == WHOLE:
        return shard
    size = shape[shard.axis] if 0 <= shard.axis < min(len(shape), 2) else 0
    stop = size if shard.count is None else shard.start + shard.count
    row = STORED_SCHEMES[scheme_after_reading(scheme)]
    unit = (row.group or row.block or row.tile or 1) if shard.axis == 1 else row.tile or 1
    fits = 0 <= shard.start < stop <= size
    if not fits or shard.start % unit or (stop % unit and stop != size):
        axis = "rows" if shard.axis == 0 else "columns"
        raise UsageError(
            f"{axis} {shard.start} to {stop} of {layer} ({scheme}, {list(shape)})",
            needs=f"a range within {axis} 0 to {size}"
            + (f", in complete blocks of {unit}" if unit > 1 else ""),
            fix=f"begin and end at multiples of {unit}"
            if unit > 1
            else "use a start and a count in this range",
            code="E-USE-05",
        )
    return replace(shard, count=stop - shard.start)


def role_shard(
    shard: ShardSpec, role: str, stored: tuple[int, ...], shape: tuple[int, ...], scheme: str
) -> ShardSpec:
    """The shard of one tensor of a layer. `stored`: its shape on disk. `shape`: shape of the decoded weight.

    Complete for columns: scales per row and the bias. Complete for rows: `mul_scale`. A single scale for all
    rows is always complete.
    """
    if shard == WHOLE:
        return WHOLE
    if role == "mul_scale":
        return WHOLE if shard.axis == 0 else replace(shard, axis=0)
    row = STORED_SCHEMES[scheme_after_reading(scheme)]
    if shard.axis == 0 and not (row.tile and role == "weight_scale"):
        return shard if stored[:1] == shape[:1] else WHOLE
    packed = 2 if stored[1:2] != shape[1:2] else 1
    unit = {"weight": packed, "weight_scale": row.block or row.tile, "weight_dual_scale": row.group}.get(role)
    if not unit or shard.count is None:
        return WHOLE
    first, stop = shard.start // unit, -(-(shard.start + shard.count) // unit)
    return ShardSpec(shard.axis, first, stop - first)


def columns_of(shard: ShardSpec) -> slice:
    """The input features of a shard; all of them for a shard of rows."""
    if shard.axis == 0 or shard == WHOLE:
        return slice(None)
    return slice(shard.start, None if shard.count is None else shard.start + shard.count)
