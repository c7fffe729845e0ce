"""Functions that each of two processes runs on a model sharded by FSDP2; `gloo.py` calls them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import ascendit
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.errors import UsageError
from ascendit.model.linear import QuantLinear
from ascendit.model.loader import load_expert
from ascendit.model.quantize_on_load import Online
from ascendit.model.wan import WanTransformer
from ascendit.ops.operators import bind

Run = Callable[[], Tensor]


def ours(folder: str, scheme: str) -> tuple[WanTransformer, Run]:
    """Our transformer, quantized while it loads, and a forward of it."""
    expert, online = (
        read_expert(recognise(Path(folder)).parts["transformer"]),
        Online.from_options(scheme, None),
    )
    applied = online.apply(expert) if online else None
    model = load_expert(expert, applied, bind("cpu"), dtype=torch.bfloat16)
    x, text = torch.randn(1, 16, 3, 6, 4), torch.randn(1, 32, model.config.text_dim)

    @torch.inference_mode()
    def run() -> Tensor:
        with gathered(model, *model.blocks):
            state = model.prepare(model.grid_of(x), text)
        return model(x, 500.0, state)

    return model, run


@contextmanager
def gathered(*modules: Any) -> Iterator[None]:
    """Unshard `modules`: text keys and values use layers of the blocks before their forward hooks run."""
    wrapped = [m for m in modules if hasattr(m, "unshard")]
    for m in wrapped:
        m.unshard()
    yield
    for m in wrapped:
        m.reshard()


def diffusers(folder: str, scheme: str) -> tuple[nn.Module, Run]:
    """Diffusers' transformer, quantized in place, and a forward of it."""
    from diffusers import WanTransformer3DModel

    model: Any = WanTransformer3DModel.from_pretrained(Path(folder) / "transformer")
    for parameter in model.parameters():  # float sums depend slightly on the alignment in a mapped file
        parameter.data = parameter.data.clone()
    ascendit.quantize_(model, scheme)
    x, text = torch.randn(1, 16, 3, 6, 4), torch.randn(1, 32, model.config.text_dim)

    @torch.inference_mode()
    def run() -> Tensor:
        out: Tensor = model(x, torch.tensor([500.0]), text, return_dict=False)[0]
        return out

    return model, run


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the quantized weights and scales in this process."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    return sum(local(p).nbytes for m in layers for p in m.parameters())


def local(t: Tensor) -> Tensor:
    """The part of a tensor in this process."""
    return t.to_local() if isinstance(t, DTensor) else t


def as_bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(-1).view(torch.uint8)


def shard(model: Any, **options: Any) -> None:
    """Shard each block, and the model with the modulation tables, which it reads before the blocks."""
    for block in model.blocks:
        fully_shard(block, ignored_params={block.scale_shift_table}, **options)
    fully_shard(model, **options)


def forward(rank: int, build: str, folder: str, scheme: str) -> dict[str, Any]:
    """Bytes before and after sharding, and whether forwards and rows of the state dict are unchanged."""
    model, run = globals()[build](folder, scheme)
    expected, before = run(), stored_bytes(model)
    whole = {name: t.clone() for name, t in model.state_dict().items()}
    shard(model)
    held = stored_bytes(model)
    same = [torch.equal(run(), expected) for _ in range(2)]
    state = model.state_dict()
    rows_match = state.keys() == whole.keys()
    for name, t in state.items():
        rows = whole[name].split(-(-len(whole[name]) // 2)) if isinstance(t, DTensor) else (whole[name],) * 2
        rows_match &= rank >= len(rows) or torch.equal(as_bytes(local(t)), as_bytes(rows[rank]))
    model.load_state_dict(state)
    same.append(torch.equal(run(), expected))
    return {"before": before, "held": held, "same": same, "after": stored_bytes(model), "rows": rows_match}


def mixed_precision(rank: int, folder: str) -> tuple[str, bool]:
    """The error of a casting policy, and whether the shards are unchanged."""
    model, run = diffusers(folder, "fp8")
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    before = {n: local(t).clone() for n, t in model.state_dict().items()}
    try:
        run()
    except UsageError as e:
        after = {n: local(t) for n, t in model.state_dict().items()}
        same = [torch.equal(as_bytes(t), as_bytes(after[n])) for n, t in before.items()]
        return f"{e.code} {e.got}", all(same)
    return "", False
