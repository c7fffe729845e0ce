"""How many kernels a denoiser's forward launches on an NPU, counted on its twin: aten's and the NPU's own.

Views cost nothing. Diffusers' model of two layers launches 219 on the same stack.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.recorder import SYNCHRONIZES, Recorder

import ascendit.twin
from ascendit.checkpoint.layout import recognise
from ascendit.model.load import load_transformer
from ascendit.model.wan import WanTransformer
from ascendit.ops import npu
from ascendit.ops.bind import bind

pytestmark = pytest.mark.usefixtures("twin")
TOKENS, ROW = 18, 6
WITH_MINDIESD, WITHOUT, OUTSIDE = 26, 28, 20
"""Kernels of one block in BF16; and of patches, timestep embedding, modulation and the last norm."""
NPU_OPS = {"npu_rms_norm": 3, "npu_rotary_mul": 2, "npu_fusion_attention": 2, "npu_gelu": 1}
"""Of torch_npu in one block; and two AdaLN of MindIE-SD."""


def tiny(folder: Path, chip: str, dtype: torch.dtype = torch.bfloat16) -> WanTransformer:
    return load_transformer(recognise(folder).parts["transformer"], bind(f"twin:{chip}"), dtype=dtype)


def forward(
    model: WanTransformer, timesteps: tuple[float, ...] = (500.0,), spans: tuple[int, ...] | None = None
) -> Recorder:
    """One forward of a step whose modulation is new."""
    x, text = torch.randn(1, model.config.in_channels, 3, 6, 4), torch.randn(1, 32, model.config.text_dim)
    with torch.no_grad():
        state = model.prepare(model.grid_of(x), text, timesteps=timesteps)
        ascendit.twin.reset()
        with Recorder() as seen:
            model(x, timesteps, state, spans)
    return seen


def block(model: WanTransformer) -> Recorder:
    x, text = torch.randn(1, model.config.in_channels, 3, 6, 4), torch.randn(1, 32, model.config.text_dim)
    tokens = torch.randn(1, TOKENS, model.config.dim).to(torch.bfloat16)
    with torch.no_grad():
        state = model.prepare(model.grid_of(x), text)
        mod = model.modulation((500.0,), (TOKENS,))
        with Recorder() as seen:
            model.run_block(0, model.blocks[0], tokens, mod, state)
    return seen


@pytest.mark.parametrize("chip", ["a2", "a3", "a5"])
def test_a_forward_of_two_layers(chip: str, tiny_t2v_single: Path) -> None:
    seen = forward(tiny(tiny_t2v_single, chip))
    assert seen.launched.total() == 2 * WITH_MINDIESD + OUTSIDE <= 100, seen.launched
    adaln = "mindiesd::adaln_v2" if chip == "a5" else "mindiesd::adaln"
    wanted = {name: 2 * n for name, n in NPU_OPS.items()} | {adaln: 5}
    assert ascendit.twin.launches() == wanted
    assert {n: c for n, c in seen.launched.items() if "npu_" in n or "::" in n} == wanted


@pytest.mark.parametrize("chip", ["a2", "a5"])
def test_a_block(chip: str, tiny_t2v_single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = block(tiny(tiny_t2v_single, chip))
    assert seen.launched.total() == WITH_MINDIESD, seen.launched
    real = npu.missing
    monkeypatch.setattr(npu, "missing", lambda c, chip: "none" if "mindiesd" in c else real(c, chip))
    assert block(tiny(tiny_t2v_single, chip)).launched.total() == WITHOUT


def test_two_timesteps_cost_less_than_a_second_forward(tiny_ti2v: Path) -> None:
    model = tiny(tiny_ti2v, "a5")
    one, two = forward(model), forward(model, (0.0, 500.0), (ROW, TOKENS - ROW))
    assert one.launched.total() < two.launched.total() <= one.launched.total() + 9 * 2 + 4


@pytest.mark.parametrize("name", ["t2v_single", "ti2v", "i2v_cascade"])
def test_nothing_waits_for_the_host_and_nothing_comes_from_it(
    name: str, tiny_folder: Callable[[str], Path]
) -> None:
    """No value is read back, no table is drawn up, no wide or complex number is made."""
    given: dict[str, Any] = (
        {"timesteps": (0.0, 500.0), "spans": (ROW, TOKENS - ROW)} if name == "ti2v" else {}
    )
    seen = forward(tiny(tiny_folder(name), "a5"), **given)
    assert not SYNCHRONIZES & set(seen.launched)
    assert not {"arange", "cos", "sin", "lift_fresh", "full"} & {called for called, _ in seen.calls}
    assert seen.dtypes == {torch.bfloat16, torch.float32}
