"""The hooks of `DenoiseState`: overriding each one counts calls or changes the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stored import load_transformer
from torch import Tensor

from ascendit.attention.plan import AttentionPlan
from ascendit.checkpoint.layout import recognise
from ascendit.device.attention_kernels import Kind
from ascendit.model.quantize_on_load import Online
from ascendit.model.state import DenoiseState, Shared
from ascendit.model.wan import WanTransformer
from ascendit.ops.operators import bind
from ascendit.schedule import Step, StepSchedule

GRID = (3, 6, 4)  # latent frames, height, width: 18 tokens, 6 in a frame
GRID_OF_TOKENS = (3, 3, 2)
TOKENS, BLOCKS = 18, 2


def load(folder: Path, scheme: str | None = None, **kw: Any) -> WanTransformer:
    online = Online.from_options(scheme, None) if scheme else None
    return load_transformer(recognise(folder).parts["transformer"], bind("cpu"), online=online, **kw)


def inputs(model: WanTransformer) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, model.config.in_channels, *GRID, generator=generator)
    return x, torch.randn(1, 7, model.config.text_dim, generator=generator)


@torch.inference_mode()
def velocity(model: WanTransformer, image: Tensor | None = None, **run: Any) -> Tensor:
    x, text = inputs(model)
    out: Tensor = model(x, 500.0, model.prepare(model.grid_of(x), text, image, **run))
    return out


class Counted(DenoiseState):
    """Record each call and compute the default."""

    recorded: list[tuple[Any, ...]]

    def note(self, *call: Any) -> None:
        self.recorded = [*getattr(self, "recorded", []), call]

    def calls(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.recorded if call[0] == name]

    def run_model(self, x: Any, t: Any, forward: Any) -> Tensor:
        self.note("model", t)
        return super().run_model(x, t, forward)

    def run_blocks(self, blocks: Any, hidden: Any, modulation: Any, run_block: Any) -> Tensor:
        self.note("blocks", len(blocks), tuple(hidden.shape))
        return super().run_blocks(blocks, hidden, modulation, run_block)

    def run_attention(self, kind: Any, block: int, hidden: Any, forward: Any) -> Tensor:
        self.note("attention", kind, block)
        return super().run_attention(kind, block, hidden, forward)

    def attend(self, kind: Any, block: int, q: Any, k: Any, v: Any) -> Tensor:
        self.note("attend", kind, block, k.shape[1])
        return super().attend(kind, block, q, k, v)

    def linear(self, layer: Any, x: Any) -> Tensor:
        self.note("linear", id(layer))
        return super().linear(layer, x)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self.note("norm", tuple(x.shape))
        return super().norm(x, weight, eps)

    def gather(self, x: Tensor) -> Tensor:
        self.note("gather", tuple(x.shape))
        return super().gather(x)


@torch.inference_mode()
def test_the_model_calls_every_hook_and_the_defaults_change_nothing(tiny_i2v_21: Path) -> None:
    model = load(tiny_i2v_21)
    x, text = inputs(model)
    image = torch.randn(1, 5, model.config.image_dim or 0)
    state: Any = model.prepare(model.grid_of(x), text, image, make=Counted)
    assert len(state.calls("linear")) == 4 * BLOCKS and len(state.calls("norm")) == 2 * BLOCKS
    state.recorded.clear()
    out = model(x, 500.0, state)
    assert torch.equal(out, model(x, 500.0, model.prepare(model.grid_of(x), text, image)))
    assert state.calls("model") == [((500.0,),)]
    assert state.calls("blocks") == [(BLOCKS, (1, TOKENS, model.config.dim))]
    assert state.calls("attention") == [(kind, i) for i in range(BLOCKS) for kind in ("self", "text")]
    lengths = (("self", TOKENS), ("text", 7), ("image", 5))
    assert state.calls("attend") == [(kind, i, n) for i in range(BLOCKS) for kind, n in lengths]
    assert len(set(state.calls("linear"))) == len(state.calls("linear")) == 8 * BLOCKS
    assert len(state.calls("norm")) == 3 * BLOCKS
    assert state.calls("gather") == [((1, TOKENS, model.proj_out.out_features),)]


def test_attend_can_replace_one_attention(tiny_t2v_single: Path) -> None:
    class NoText(DenoiseState):
        def attend(self, kind: Any, block: int, q: Any, k: Any, v: Any) -> Tensor:
            out = super().attend(kind, block, q, k, v)
            return torch.zeros_like(out) if (kind, block) == ("text", 1) else out

    model = load(tiny_t2v_single)
    changed = velocity(model, make=NoText)
    assert not torch.equal(changed, velocity(model))
    model.blocks[1].attn2.to_out[0].weight.data.zero_()  # the same change in the weights
    assert torch.equal(velocity(model), changed)


def test_run_attention_skips_the_layers_around_it_too(tiny_t2v_single: Path) -> None:
    class Skipped(Counted):
        def run_attention(self, kind: Any, block: int, hidden: Any, forward: Any) -> Tensor:
            return torch.zeros_like(hidden) if kind == "self" else forward(hidden)

    model = load(tiny_t2v_single)
    x, text = inputs(model)
    with torch.inference_mode():
        state: Any = model.prepare(model.grid_of(x), text, make=Skipped)
        model(x, 500.0, state)
    assert [kind for kind, _, _ in state.calls("attend")] == ["text"] * BLOCKS
    assert len(state.calls("linear")) == (2 + 4) * BLOCKS  # text K and V; Q and output, the feed-forward


def test_run_blocks_can_skip_blocks(tiny_t2v_single: Path) -> None:
    class First(DenoiseState):
        def run_blocks(self, blocks: Any, hidden: Any, modulation: Any, run_block: Any) -> Tensor:
            out: Tensor = run_block(0, blocks[0], hidden, modulation)
            return out

    model = load(tiny_t2v_single)
    short = velocity(model, make=First)
    assert not torch.equal(short, velocity(model))
    model.blocks = model.blocks[:1]
    assert torch.equal(short, velocity(model))


@torch.inference_mode()
def test_run_model_can_return_a_cached_output(tiny_t2v_single: Path) -> None:
    class Cached(Counted):
        last: Tensor | None = None

        def run_model(self, x: Any, t: Any, forward: Any) -> Tensor:
            if self.last is None:
                self.last = forward(x, t)
            return self.last

    model = load(tiny_t2v_single)
    x, text = inputs(model)
    state: Any = model.prepare(model.grid_of(x), text, make=Cached)
    first = model(x, 500.0, state)
    assert model(2 * x, 400.0, state) is first and len(state.calls("blocks")) == 1


def test_the_plan_has_the_attention_of_each_step_kind_and_block(tiny_t2v_single: Path) -> None:
    model = load(tiny_t2v_single)
    calls = []

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(tuple(q.shape))
        return model.ops.attention(q, k, v[:, :1].expand_as(v))

    dense = [model.ops.attention] * BLOCKS
    second: dict[Kind, Any] = {"self": [model.ops.attention, sparse], "text": dense}
    plan = AttentionPlan({0: {"self": dense, "text": dense}, 1: second})
    run: dict[str, Any] = {"steps": (Step(), Step()), "plan": plan}
    default = velocity(model)
    assert torch.equal(velocity(model, **run), default) and not calls
    assert not torch.equal(velocity(model, **run, step=1), default)
    assert calls == [(1, TOKENS, model.config.num_attention_heads, model.config.attention_head_dim)]


def test_without_a_plan_a_step_and_the_checkpoint_choose_the_attention(tiny_t2v_single: Path) -> None:
    model = load(tiny_t2v_single)
    default = velocity(model)
    steps = StepSchedule.parse("0:attention=int8,1:attention=bf16").resolve(3)
    quantized = [velocity(model, steps=steps, step=i) for i in range(3)]
    assert torch.equal(quantized[1], default) and torch.equal(quantized[2], default)
    assert not torch.equal(quantized[0], default)
    torch.testing.assert_close(quantized[0], default, rtol=0.1, atol=0.1)
    for block in model.blocks:
        block.attn1.scheme = "int8"
    assert torch.equal(velocity(model), quantized[0])
    assert torch.equal(velocity(model, steps=steps, step=1), default)


def test_a_rank_with_some_of_the_channels_reduces_between_the_phases_of_a_norm(tiny_t2v_single: Path) -> None:
    model, means = load(tiny_t2v_single), []

    def reduce_mean(mean: Tensor) -> Tensor:
        means.append(mean)
        return mean

    default = velocity(model)
    torch.testing.assert_close(velocity(model, reduce_mean=reduce_mean), default, rtol=1e-5, atol=1e-5)
    assert (
        len(means) == 4 * BLOCKS and {t.shape[-1] for t in means} == {1} and means[0].dtype == torch.float32
    )
    assert not torch.allclose(velocity(model, reduce_mean=lambda mean: 4 * mean), default, rtol=1e-2)


# ---- a part of the sequence ---------------------------------------------------------------------


class ByToken(DenoiseState):
    """Self-attention that returns Q + V: each token is computed independently. Other parts are zeros."""

    patches: Tensor

    def attend(self, kind: Any, block: int, q: Any, k: Any, v: Any) -> Tensor:
        return q + v if kind == "self" else super().attend(kind, block, q, k, v)

    def gather(self, x: Tensor) -> Tensor:
        self.patches, part = x, self.shared.part
        return torch.nn.functional.pad(x, (0, 0, part.start, TOKENS - part.stop))


@pytest.mark.parametrize("part", [range(6), range(4, 11), range(7, TOKENS)])
@torch.inference_mode()
def test_a_part_of_the_sequence_equals_that_part_of_the_output(tiny_ti2v: Path, part: range) -> None:
    model = load(tiny_ti2v)
    x, text = inputs(model)
    grid, timesteps, spans = model.grid_of(x), (0.0, 700.0), (6, TOKENS - 6)
    whole, cut = (model.share(grid, part=p) for p in (None, part))
    assert torch.equal(cut.rope.cos, whole.rope.cos[part.start : part.stop])
    assert torch.equal(cut.rope.sin, whole.rope.sin[part.start : part.stop])
    states: list[Any] = [model.prepare(s, text, make=ByToken) for s in (whole, cut)]
    velocities = [model(x, timesteps, state, spans) for state in states]
    out, of_part = (state.patches for state in states)
    assert of_part.shape[1] == len(part) and velocities[0].shape == velocities[1].shape
    torch.testing.assert_close(of_part, out[:, part.start : part.stop], rtol=1e-4, atol=1e-5)


def test_spans_of_a_part(tiny_ti2v: Path) -> None:
    def rows(part: range) -> Any:
        shared: Shared = model.share(GRID_OF_TOKENS, part=part)
        return shared.rows((0.0, 700.0), (6, TOKENS - 6))

    model = load(tiny_ti2v)
    assert rows(range(TOKENS)) == ((0.0, 700.0), (6, 12))
    assert rows(range(4, 11)) == ((0.0, 700.0), (2, 5))
    assert rows(range(6)) == ((0.0,), (6,)) and rows(range(6, 9)) == ((700.0,), (3,))
    assert model.share(GRID_OF_TOKENS).rows((5.0,), None) == ((5.0,), (TOKENS,))


def test_one_rope_table_serves_both_experts(tiny_t2v_cascade: Path) -> None:
    high, low = load(tiny_t2v_cascade), load(tiny_t2v_cascade)
    first = high.share(GRID_OF_TOKENS, (500.0,))
    second = low.share(GRID_OF_TOKENS, (300.0,), other=first)
    assert second.rope is first.rope and set(second.sinusoids) == {300.0}
    assert high.share((2, 3, 2), other=first).rope is not first.rope
    assert low.to(torch.bfloat16).share(GRID_OF_TOKENS, other=first).rope is not first.rope


# ---- keys and values of the text ----------------------------------------------------------------


@torch.inference_mode()
def test_text_keys_follow_the_precision_of_the_step(
    tiny_t2v_single: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(tiny_t2v_single, "mxfp4", dtype=torch.bfloat16)
    x, text = inputs(model)
    steps = StepSchedule.parse("0-1:w4a8,default:w4a4").resolve(4)
    state = model.prepare(model.grid_of(x), text, steps=steps)
    with caplog.at_level("INFO", logger="ascendit"):
        for state.step in range(4):
            fresh = model.prepare(model.grid_of(x), text, steps=steps, step=state.step)
            assert torch.equal(model(x, 500.0, state), model(x, 500.0, fresh)), state.step
    assert [r.getMessage() for r in caplog.records if "recomputing" in r.getMessage()] == [
        "transformer, step 2: recomputing text keys and values, w4a4"
    ]


@pytest.mark.parametrize(
    ("scheme", "policy", "count"),
    [
        ("mxfp4", "0:w4a8,default:w4a4", 2),
        ("mxfp4", "0:w4a4", 1),  # as stored
        ("int8", "0:w4a8", 1),  # not in MXFP4
        (None, "0:bf16", 1),  # floats
    ],
)
@torch.inference_mode()
def test_text_keys_are_recomputed_only_if_the_precision_changes_them(
    tiny_t2v_single: Path, scheme: str | None, policy: str, count: int
) -> None:
    model = load(tiny_t2v_single, scheme, dtype=torch.bfloat16)
    x, text = inputs(model)
    steps = StepSchedule.parse(policy).resolve(3)
    state: Any = model.prepare(model.grid_of(x), text, make=Counted, steps=steps)
    for state.step in range(3):
        model(x, 500.0, state)
    of_text = {id(m) for b in model.blocks for m in (b.attn2.to_k, b.attn2.to_v)}
    assert sum(layer in of_text for (layer,) in state.calls("linear")) == count * 2 * BLOCKS
