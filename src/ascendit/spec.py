"""Pure data: the Wan family, one row per model, and the schemes; wrong defaults are bugs.

Sources: `wan/configs/*.py` and `generate.py` of Wan-Video/Wan2.2 and Wan-Video/Wan2.1. No torch here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["t2v", "i2v", "ti2v"]
Size = tuple[int, int]
"""(width, height) in pixels, as in `832x480`."""


@dataclass(frozen=True, kw_only=True)
class WanSpec:
    """What one Wan model expects and how its authors run it."""

    name: str
    task: Task
    """t2v: text only; i2v: image and text; ti2v: text, image optional."""
    num_experts: int
    dim: int
    """Width of the transformer: heads x head size."""
    num_layers: int
    in_channels: int
    out_channels: int
    sizes: tuple[Size, ...]
    """Published sizes; the first is the default."""
    size_multiple: int
    num_frames: int
    fps: int
    num_inference_steps: int
    flow_shift: float
    guidance_scale: float
    """For the only expert, or the high-noise one."""
    guidance_scale_2: float | None = None
    """For the low-noise expert of a cascade."""
    boundary_ratio: float | None = None
    """Share of the 1000 training timesteps at which the low-noise expert takes over."""
    image_cross_attention: bool = False
    """Wan2.1 I2V: CLIP image tokens in the cross-attention."""
    flow_shift_by_size: Mapping[Size, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.num_experts == 2) == (self.boundary_ratio is not None), self.name
        assert (self.num_experts == 2) == (self.guidance_scale_2 is not None), self.name
        assert self.num_frames % 4 == 1, self.name
        assert all(w % self.size_multiple == h % self.size_multiple == 0 for w, h in self.sizes), self.name

    def shift_for(self, width: int, height: int) -> float:
        """`flow_shift` for this size."""
        return self.flow_shift_by_size.get((width, height), self.flow_shift)


_P480: tuple[Size, ...] = ((832, 480), (480, 832))
_P720: tuple[Size, ...] = ((1280, 720), (720, 1280))
_14B: dict[str, Any] = {"dim": 5120, "num_layers": 40, "size_multiple": 16, "num_frames": 81, "fps": 16}
_I2V_480_SHIFT = {size: 3.0 for size in _P480}

SPECS: dict[str, WanSpec] = {
    spec.name: spec
    for spec in (
        WanSpec(
            name="Wan2.2-T2V-A14B",
            task="t2v",
            num_experts=2,
            in_channels=16,
            out_channels=16,
            sizes=_P720 + _P480,
            num_inference_steps=40,
            flow_shift=12.0,
            boundary_ratio=0.875,
            guidance_scale=4.0,
            guidance_scale_2=3.0,
            **_14B,
        ),
        WanSpec(
            name="Wan2.2-I2V-A14B",
            task="i2v",
            num_experts=2,
            in_channels=36,
            out_channels=16,
            sizes=_P720 + _P480,
            num_inference_steps=40,
            flow_shift=5.0,
            boundary_ratio=0.9,
            guidance_scale=3.5,
            guidance_scale_2=3.5,
            **_14B,
        ),
        WanSpec(
            name="Wan2.2-TI2V-5B",
            task="ti2v",
            num_experts=1,
            dim=3072,
            num_layers=30,
            in_channels=48,
            out_channels=48,
            sizes=((1280, 704), (704, 1280)),
            size_multiple=32,
            num_frames=121,
            fps=24,
            num_inference_steps=50,
            flow_shift=5.0,
            guidance_scale=5.0,
        ),
        WanSpec(
            name="Wan2.1-T2V-1.3B",
            task="t2v",
            num_experts=1,
            dim=1536,
            num_layers=30,
            in_channels=16,
            out_channels=16,
            sizes=_P480,
            size_multiple=16,
            num_frames=81,
            fps=16,
            num_inference_steps=50,
            flow_shift=5.0,
            guidance_scale=5.0,
        ),
        WanSpec(
            name="Wan2.1-T2V-14B",
            task="t2v",
            num_experts=1,
            in_channels=16,
            out_channels=16,
            sizes=_P720 + _P480,
            num_inference_steps=50,
            flow_shift=5.0,
            guidance_scale=5.0,
            **_14B,
        ),
        # 480P and 720P have the same shape; the folder's name tells them apart, else the size does.
        WanSpec(
            name="Wan2.1-I2V-14B-480P",
            task="i2v",
            num_experts=1,
            in_channels=36,
            out_channels=16,
            sizes=_P480,
            num_inference_steps=40,
            flow_shift=3.0,
            guidance_scale=5.0,
            image_cross_attention=True,
            **_14B,
        ),
        WanSpec(
            name="Wan2.1-I2V-14B-720P",
            task="i2v",
            num_experts=1,
            in_channels=36,
            out_channels=16,
            sizes=_P720 + _P480,
            num_inference_steps=40,
            flow_shift=5.0,
            flow_shift_by_size=_I2V_480_SHIFT,
            guidance_scale=5.0,
            image_cross_attention=True,
            **_14B,
        ),
        WanSpec(
            name="ascendit-demo",
            task="t2v",
            num_experts=2,
            dim=192,
            num_layers=8,
            in_channels=8,
            out_channels=8,
            sizes=((64, 64),),
            size_multiple=16,
            num_frames=17,
            fps=8,
            num_inference_steps=16,
            flow_shift=4.0,
            boundary_ratio=0.875,
            guidance_scale=2.0,
            guidance_scale_2=1.5,
        ),
    )
}


def match(
    *,
    dim: int,
    num_layers: int,
    in_channels: int,
    out_channels: int,
    num_experts: int,
    image_cross_attention: bool,
    folder_name: str = "",
) -> WanSpec | None:
    """The row whose shape this is, or None. Of rows that share a shape, the one the folder's name holds.

    The name never makes a match by itself: only dimensions, channels and experts do.
    """
    found = [
        s
        for s in SPECS.values()
        if (s.dim, s.num_layers, s.in_channels, s.out_channels, s.num_experts, s.image_cross_attention)
        == (dim, num_layers, in_channels, out_channels, num_experts, image_cross_attention)
    ]
    if len(found) > 1:
        text = folder_name.lower()
        named = [s for s in found if s.name.rsplit("-", 1)[-1].lower() in text]
        found = named or found[-1:]
    return found[0] if found else None


def nearest_frames(num_frames: int, stride: int = 4) -> tuple[int, int]:
    """The two legal frame counts (stride x n + 1) around an illegal one, smallest 1."""
    low = max(1, (num_frames - 1) // stride * stride + 1)
    return low, low + stride


def nearest_sizes(pixels: int, multiple: int) -> tuple[int, int]:
    """The two legal widths or heights around an illegal one, smallest `multiple`."""
    low = max(multiple, pixels // multiple * multiple)
    return low, low + multiple


# ---- schemes ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a linear layer is stored and computes."""

    name: str
    manifest: str
    """msModelSlim's word for it, the value in `quant_model_description.json`."""
    format: str | None
    """A row of `mx.formats.FORMATS`; None: floating point, as the source has it."""
    roles: tuple[str, ...]
    """The tensors of a layer, `bias` and the optional `mul_scale` left out, in the order they are written."""
    weight_bits: int
    activation_bits: int


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme(
            name="bf16",
            manifest="FLOAT",
            format=None,
            roles=("weight",),
            weight_bits=16,
            activation_bits=16,
        ),
        Scheme(
            name="int8",
            manifest="W8A8_DYNAMIC",
            format="int8",
            roles=("weight", "weight_scale", "weight_offset"),
            weight_bits=8,
            activation_bits=8,
        ),
        Scheme(
            name="fp8",
            manifest="WFP8AFP8_DYNAMIC",
            format="fp8",
            roles=("weight", "weight_scale"),
            weight_bits=8,
            activation_bits=8,
        ),
        Scheme(
            name="mxfp8",
            manifest="W8A8_MXFP8",
            format="mxfp8",
            roles=("weight", "weight_scale"),
            weight_bits=8,
            activation_bits=8,
        ),
        Scheme(
            name="mxfp4",
            manifest="W4A4_MXFP4",
            format="mxfp4",
            roles=("weight", "weight_scale"),
            weight_bits=4,
            activation_bits=4,
        ),
        Scheme(
            name="mxfp4_dualscale",
            manifest="W4A4_MXFP4_DUALSCALE",
            format="mxfp4_dualscale",
            roles=("weight", "weight_scale", "weight_dual_scale"),
            weight_bits=4,
            activation_bits=4,
        ),
    )
}
"""What `quantize` and `repack` write. FP8 in 128 x 128 tiles is only read, see `checkpoint.expert`."""

MANIFEST_SCHEMES = {s.manifest: s.name for s in SCHEMES.values()}


# ---- engines and chips --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A program for which `--for` writes, as its published wheel is."""

    name: str
    version: str
    refuses: Mapping[str, str]
    """What it cannot load or run -> why. A key is a scheme, or a trait that `engines_for` names."""

    def problem(self, traits: Collection[str]) -> str:
        """The first reason against a checkpoint with these traits, "" when there is none."""
        return next((why for trait, why in self.refuses.items() if trait in traits), "")


_FP8 = dict.fromkeys(("fp8", "fp8_128x128"), "it does not read FP8 with float scales as it lies here")
_OMNI_DROPS = "it drops mul_scale in layers that are not MXFP4, without an error"
_SGLANG_DROPS = "it knows mul_scale in mxfp4 alone and drops it elsewhere, without an error"
_ODD = "it pairs block scales, and a layer has an odd number of them (K / 32)"
_PLAIN = "it builds {} as plain layers and would take the codes for weights"

ENGINES: dict[str, Engine] = {
    e.name: e
    for e in (
        Engine(
            name="vllm-omni",
            version="0.30.0",
            refuses={
                **_FP8,
                "mixed": "its config.json names one scheme for all quantized layers",
                "split_qkv": "it fuses Q, K and V of self-attention; one is kept and another quantized",
                "unlike_qkv": "it fuses Q, K and V of self-attention; their mul_scale differ",
                "outside_blocks": _PLAIN.format("embedders and proj_out"),
                "odd_blocks:mxfp4_dualscale": _ODD,
                **dict.fromkeys(("smoothed:int8", "smoothed:mxfp8", "smoothed:bf16"), _OMNI_DROPS),
            },
        ),
        Engine(
            name="sglang",
            version="0.5.23",
            refuses={
                **_FP8,
                "mxfp4_dualscale": "its loader of dual-scale layers fails, on an attribute it does not have",
                "float_block_linears": "it looks for kept layers of a block by other names and stops there",
                "outside_blocks": _PLAIN.format("embedders"),
                "added_kv": "it does not name the layers of cross-attention with image tokens",
                **{f"odd_blocks:{s}": _ODD for s in ("mxfp8", "mxfp4")},
                **dict.fromkeys(("smoothed:int8", "smoothed:mxfp8", "smoothed:bf16"), _SGLANG_DROPS),
            },
        ),
        Engine(
            name="mindie",
            version="3.1.0",
            refuses={**_FP8, "unquantized": "it reads exports of quantized models only"},
        ),
    )
}
"""Read in the wheels of vLLM-Omni, SGLang and MindIE-SD; none was run on a card."""


def engines_for(
    schemes: Collection[str],
    *,
    float_block_linears: bool = False,
    smoothed: bool | Collection[str] = False,
    traits: Collection[str] = (),
) -> dict[str, str]:
    """Engine -> "" when it can run a checkpoint with layers of these schemes, else the reason it cannot.

    `float_block_linears`: some linear of a block is kept, in a checkpoint that is quantized. `smoothed`: the
    schemes (`bf16`: kept layers) of layers with a `mul_scale`; True: all. `traits`: what else is true of it,
    the other keys of `Engine.refuses`, from `convert.dialects.traits_of`.
    """
    coded = {s for s in schemes if s != "bf16"}
    smooth = set(schemes) if smoothed is True else set(smoothed or ())
    found = {*coded, *traits, *(f"smoothed:{s}" for s in smooth)}
    found |= {"mixed"} if len(coded) > 1 else set()
    found |= {"unquantized"} if not coded else {"float_block_linears"} if float_block_linears else set()
    return {name: engine.problem(found) for name, engine in ENGINES.items()}


Support = Literal["native", "emulated"]
CHIPS: dict[str, dict[str, Support]] = {
    chip: {name: "native" if name in native else "emulated" for name in SCHEMES}
    for chip, native in (("a2", ("bf16", "int8")), ("a3", ("bf16", "int8")), ("a5", tuple(SCHEMES)))
}
"""Whether a chip has the matmul of a scheme. MX and FP8 operators exist on the 950 only."""


def chips_for(schemes: Collection[str]) -> dict[str, Support]:
    """Chip -> `native` when it has the matmul of each of these schemes; others are decoded and multiplied."""
    return {
        chip: "native" if all(known.get(s) == "native" for s in schemes) else "emulated"
        for chip, known in CHIPS.items()
    }
