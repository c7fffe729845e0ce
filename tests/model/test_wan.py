"""Our transformer against Diffusers' on the same weights, and the number of its operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from stored import load_transformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ascendit.checkpoint.layout import recognise
from ascendit.family import WanConfig
from ascendit.model.state import rope_table
from ascendit.model.wan import WanTransformer
from ascendit.ops.operators import bind

GRID = (3, 6, 4)  # latent frames, height, width
TOKENS = 3 * 3 * 2


def pair(folder: Path, name: str = "transformer", **kw: Any) -> tuple[WanTransformer, Any]:
    ours = load_transformer(recognise(folder).parts[name], bind("cpu", kw.pop("ops", None)), **kw)
    theirs = WanTransformer3DModel.from_pretrained(folder / name, torch_dtype=kw.get("dtype", torch.float32))
    return ours, theirs.eval()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def inputs(ours: WanTransformer, length: int = 512) -> tuple[Tensor, Tensor]:
    return torch.randn(1, ours.config.in_channels, *GRID), torch.randn(1, length, ours.config.text_dim)


@pytest.mark.parametrize("ops", [None, "reference"])
@pytest.mark.parametrize("name", ["t2v_cascade", "t2v_single", "i2v_cascade", "ti2v"])
@torch.inference_mode()
def test_equals_diffusers_in_float32(tiny_folder: Any, name: str, ops: str | None) -> None:
    ours, theirs = pair(tiny_folder(name), ops=ops)
    x, text = inputs(ours)
    for t in (999.0, 431.0, 1.0):
        state = ours.prepare(ours.grid_of(x), text)
        expected = theirs(x, torch.tensor([t]), text, return_dict=False)[0]
        assert relative(ours(x, t, state), expected) < 1e-5


@torch.inference_mode()
def test_second_expert_and_states_do_not_mix(tiny_t2v_cascade: Path) -> None:
    first, _ = pair(tiny_t2v_cascade)
    second, theirs = pair(tiny_t2v_cascade, "transformer_2")
    x, text = inputs(first)
    expected = theirs(x, torch.tensor([500]), text, return_dict=False)[0]
    assert relative(second(x, 500.0, second.prepare(second.grid_of(x), text)), expected) < 1e-5
    assert relative(first(x, 500.0, first.prepare(first.grid_of(x), text)), expected) > 0.1


@torch.inference_mode()
def test_per_token_timesteps_equal_diffusers(tiny_ti2v: Path) -> None:
    ours, theirs = pair(tiny_ti2v)
    x, text = inputs(ours)
    state = ours.prepare(ours.grid_of(x), text)
    per_frame = TOKENS // GRID[0]
    t = torch.cat([torch.zeros(per_frame), torch.full((TOKENS - per_frame,), 700.0)])[None]
    expected = theirs(x, t, text, return_dict=False)[0]
    actual = ours(x, (0.0, 700.0), state, (per_frame, TOKENS - per_frame))
    assert relative(actual, expected) < 1e-5
    modulation = state.shared.modulation_for((0.0, 700.0), (per_frame, TOKENS - per_frame), pytest.fail)
    assert modulation.norms.shape[3] == modulation.gates.shape[2] == 2


@torch.inference_mode()
def test_image_cross_attention_equals_diffusers(tiny_i2v_21: Path) -> None:
    ours, theirs = pair(tiny_i2v_21)
    x, text = inputs(ours)
    image = torch.randn(1, 17, ours.config.image_dim or 0)
    state = ours.prepare(ours.grid_of(x), text, image)
    expected = theirs(x, torch.tensor([800]), text, image, return_dict=False)[0]
    assert relative(ours(x, 800.0, state), expected) < 1e-5
    without = ours(x, 800.0, ours.prepare(ours.grid_of(x), text))
    assert relative(without, expected) > 1e-3


@torch.inference_mode()
def test_first_and_last_frame_tokens_equal_diffusers() -> None:
    shape: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 36,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 80,
        "num_layers": 1,
        "image_dim": 32,
        "added_kv_proj_dim": 64,
        "pos_embed_seq_len": 34,
    }
    theirs = WanTransformer3DModel(**shape).eval()
    ours = WanTransformer(WanConfig.from_dict(shape), bind("cpu"))
    ours.load_state_dict(theirs.state_dict())
    x, text = inputs(ours)
    image = torch.randn(2, 17, 32)  # first and last frame
    expected = theirs(x, torch.tensor([800]), text, image, return_dict=False)[0]
    assert relative(ours(x, 800.0, ours.prepare(ours.grid_of(x), text, image)), expected) < 1e-5


@torch.inference_mode()
def test_bfloat16_is_as_close_to_float32_as_diffusers_is(tiny_t2v_single: Path) -> None:
    exact, _ = pair(tiny_t2v_single)
    ours, theirs = pair(tiny_t2v_single, dtype=torch.bfloat16)
    x, text = inputs(ours)
    truth = exact(x, 500.0, exact.prepare(exact.grid_of(x), text))
    low, text_low = x.bfloat16(), text.bfloat16()
    actual = ours(low, 500.0, ours.prepare(ours.grid_of(x), text_low))
    peer = theirs(low, torch.tensor([500]), text_low, return_dict=False)[0]
    assert actual.dtype == torch.bfloat16
    assert relative(actual, truth) < 1.1 * relative(peer, truth) < 0.03


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_rope_table_equals_diffusers(head_dim: int) -> None:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    cos, sin = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(torch.zeros(1, 16, *GRID))
    table = rope_table((3, 3, 2), head_dim)
    torch.testing.assert_close(table.cos, cos[0, :, 0, 0::2], rtol=0, atol=1e-6)
    torch.testing.assert_close(table.sin, sin[0, :, 0, 1::2], rtol=0, atol=1e-6)


class Launches(TorchDispatchMode):
    """Counts operators; views cost nothing and are not counted."""

    VIEWS = {
        "view",
        "_unsafe_view",
        "transpose",
        "permute",
        "unsqueeze",
        "squeeze",
        "expand",
        "slice",
        "select",
    }
    VIEWS |= {"split", "split_with_sizes", "unbind", "t", "detach", "alias", "as_strided", "view_as_complex"}
    VIEWS |= {"view_as_real", "reshape", "_reshape_alias"}

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "spans"), [("t2v_single", (TOKENS,)), ("ti2v", (6, TOKENS - 6))])
@torch.no_grad()
def test_operators_in_a_block(
    tiny_folder: Any, name: str, spans: tuple[int, ...], dtype: torch.dtype
) -> None:
    ours, theirs = pair(tiny_folder(name), dtype=dtype)
    x, text = (t.to(dtype) for t in inputs(ours))
    state = ours.prepare(ours.grid_of(x), text)
    timesteps = (0.0, 500.0)[-len(spans) :]
    mod = ours.modulation(timesteps, spans)
    hidden = torch.randn(1, TOKENS, ours.config.dim).to(dtype)
    with Launches() as our_launches:
        ours.blocks[0](0, hidden, mod, state)
    assert our_launches.count.total() <= 60, our_launches.count
    rows = torch.zeros(1, 6, ours.config.dim)
    with Launches() as their_launches:
        theirs.blocks[0](hidden, text_to_dim(theirs, text), rows, theirs.rope(x))
    assert our_launches.count.total() < their_launches.count.total()


def text_to_dim(theirs: Any, text: Tensor) -> Tensor:
    embedded: Tensor = theirs.condition_embedder.text_embedder(text)
    return embedded


@torch.no_grad()
def test_nothing_is_computed_twice(tiny_t2v_single: Path) -> None:
    """A second step with the same state projects no text and makes no RoPE table; a branch shares both."""
    ours, _ = pair(tiny_t2v_single)
    x, text = inputs(ours)
    first = ours.prepare(ours.grid_of(x), text)
    second = ours.prepare(first.shared, torch.zeros_like(text))
    assert second.shared is first.shared
    ours(x, 500.0, first)
    modulation = first.shared.modulation_for((500.0,), (TOKENS,), pytest.fail)
    with Launches() as launches:
        ours(x, 500.0, second)
    assert second.shared.modulation_for((500.0,), (TOKENS,), pytest.fail) is modulation
    # 8 linears a block, patch embedding and proj_out; no text, no timestep embedder
    assert launches.count["addmm"] + launches.count["linear"] == 8 * ours.config.num_layers + 2
    assert not {"cos", "sin", "outer"} & set(launches.count)


@torch.inference_mode()
def test_timesteps_that_are_passed_to_prepare_change_nothing(tiny_ti2v: Path) -> None:
    ours, _ = pair(tiny_ti2v)
    x, text = inputs(ours)
    for timesteps, spans in (((500.0,), None), ((0.0, 500.0), (6, TOKENS - 6))):
        fresh = ours(x, timesteps, ours.prepare(ours.grid_of(x), text), spans)
        precomputed = ours.prepare(ours.grid_of(x), text, timesteps=(0.0, 250.0, 500.0))
        assert set(precomputed.shared.sinusoids) == {0.0, 250.0, 500.0}
        assert torch.equal(ours(x, timesteps, precomputed, spans), fresh)


def test_modules_store_no_state(tiny_t2v_single: Path) -> None:
    ours, _ = pair(tiny_t2v_single)
    before = {k: dict(vars(m)) for k, m in ours.named_modules()}
    x, text = inputs(ours)
    with torch.inference_mode():
        ours(x, 500.0, ours.prepare(ours.grid_of(x), text))
    assert {k: dict(vars(m)) for k, m in ours.named_modules()} == before


def test_parameter_names_are_diffusers(tiny_folder: Any) -> None:
    for name in ("t2v_single", "i2v_21", "ti2v"):
        ours, theirs = pair(tiny_folder(name))
        expected = {k: v.shape for k, v in theirs.state_dict().items()}
        assert {k: v.shape for k, v in ours.state_dict().items()} == expected
