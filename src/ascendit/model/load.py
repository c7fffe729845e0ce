"""Fill a model from disk: built on the meta device, shard by shard, strict.

Names, shapes and dtypes are compared from the headers before a byte of a tensor is read. One tensor is
in memory at a time beside the model itself.
"""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ascendit.checkpoint.layout import Part
from ascendit.checkpoint.names import TOLERATED
from ascendit.checkpoint.store import TORCH_DTYPES, Shards, TensorInfo, listed
from ascendit.errors import CheckpointError
from ascendit.model.wan import WanConfig, WanTransformer
from ascendit.ops.bind import Ops

log = logging.getLogger("ascendit")

FLOATS = ("F32", "BF16", "F16")


def load_transformer(
    part: Part, ops: Ops, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> WanTransformer:
    """The transformer in `part`, on `device`.

    `dtype`: of the tokens and linears; None = as stored, on a CPU, else bfloat16. What Diffusers keeps in
    float32 is kept here too. Raises CheckpointError E-CKP-04 that lists missing, left over, misshapen
    and wrong-dtype tensors.
    """
    with torch.device("meta"):
        model = WanTransformer(WanConfig.from_dict(part.config), ops)
    with Shards.open(part.path, part.stem) as shards:
        wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
        compare(part, wanted, shards.tensors)
        dtype = dtype or default_dtype(shards, device)
        for _, infos in shards.by_file():
            for info in infos:
                if info.name in wanted:
                    keep = any(k in info.name.split(".") for k in model.KEEP_FP32)
                    place(model, info.name, shards.read(info.name), device, torch.float32 if keep else dtype)
    log.info("%s: %s on %s, %.2f GiB", part.name, str(dtype)[6:], device, nbytes(model) / 2**30)
    return model.eval()


def refuse_quantized(part: Part) -> None:
    """Raise E-QNT-01 for codes and scales, from the headers alone."""
    with Shards.open(part.path, part.stem) as shards:
        coded = [n for n in shards.tensors if n.rpartition(".")[2] in ("weight_scale", "weight_scale_inv")]
    if coded:
        raise CheckpointError(
            f"{part.path} is quantized: {len(coded)} layers have scales",
            needs=f"weights in {', '.join(FLOATS)}: quantized folders are written so far, not run",
            fix="generate with the BF16 model; ascendit inspect tells which engines run this folder",
            code="E-QNT-01",
        )


def compare(part: Part, wanted: dict[str, tuple[int, ...]], found: dict[str, TensorInfo]) -> None:
    """Raise E-CKP-04 unless `found` holds exactly `wanted`, in floating point."""
    extra = [n for n in found if n not in wanted and not any(k in n for k in TOLERATED)]
    shared = [n for n in wanted if n in found]
    problems = {
        "missing": [n for n in wanted if n not in found],
        "left over": extra,
        "misshapen": [
            f"{n} {list(found[n].shape)} instead of {list(wanted[n])}"
            for n in shared
            if found[n].shape != wanted[n]
        ],
        "of a wrong dtype": [f"{n} {found[n].dtype}" for n in shared if found[n].dtype not in FLOATS],
    }
    bad = {kind: names for kind, names in problems.items() if names}
    if bad:
        raise CheckpointError(
            f"{part.path}: " + "; ".join(f"{len(v)} tensors {k}: {listed(v)}" for k, v in bad.items()),
            needs=f"the {len(wanted)} tensors of this {part.class_name}, in {', '.join(FLOATS)}",
            fix="download the part again, or check that config.json and the weights belong together",
            code="E-CKP-04",
        )


def default_dtype(shards: Shards, device: str) -> torch.dtype:
    """The dtype most bytes are stored in, on a CPU; bfloat16 elsewhere."""
    if device != "cpu":
        return torch.bfloat16
    count: Counter[str] = Counter()
    for info in shards.tensors.values():
        count[info.dtype] += info.nbytes
    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[count.most_common(1)[0][0]])
    return dtype


def place(model: nn.Module, name: str, value: Tensor, device: str, dtype: torch.dtype) -> None:
    """Put `value` where the meta parameter `name` is."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    module.register_parameter(leaf, nn.Parameter(value.to(device, dtype), requires_grad=False))


def nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and reports of transformers; what is wrong is said by our own error."""
    from transformers.utils import logging as chatter

    level, bar = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bar:
            chatter.enable_progress_bar()


def load_library_part(part: Part, *, dtype: torch.dtype | None = None) -> Any:
    """A text encoder, image encoder or VAE through transformers or Diffusers, on the CPU, strict.

    `dtype` None = as stored. The libraries fill gaps with random weights and only log it; here a gap is
    CheckpointError E-CKP-04.
    """
    with Shards.open(part.path, part.stem) as shards:
        dtype = dtype or default_dtype(shards, "cpu")
    cls = getattr(importlib.import_module(part.library), part.class_name)
    options: dict[str, Any] = {"torch_dtype": dtype}
    if part.library == "transformers":  # it names misshapen tensors only when told not to stop at them
        options = {"dtype": dtype, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            model, info = cls.from_pretrained(
                part.path, output_loading_info=True, local_files_only=True, use_safetensors=True, **options
            )
    except (OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(
            f"{part.path}: {str(e).splitlines()[0]}",
            needs=f"a folder that {part.library} loads as {part.class_name}",
            fix="download the part again",
            code="E-CKP-04",
        ) from e
    problems = {
        k: [str(n) for n in info.get(k) or ()] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(problems.values()):
        raise CheckpointError(
            f"{part.path}: "
            + "; ".join(f"{k.replace('_', ' ')}: {listed(v)}" for k, v in problems.items() if v),
            needs=f"exactly the tensors of this {part.class_name}",
            fix="download the part again, or check that config.json and the weights belong together",
            code="E-CKP-04",
        )
    return model.eval().requires_grad_(False)
