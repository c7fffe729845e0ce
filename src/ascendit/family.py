"""The Wan family as data, one row per model, and the configs of transformer and VAE.

Sources: `wan/configs/*.py` and `generate.py` of Wan-Video/Wan2.2 and Wan-Video/Wan2.1; Diffusers'
WanTransformer3DModel; for presets, the configs of ModelTC/Wan2.2-Lightning, ModelTC/LightX2V, FastVideo and
CausVid. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from ascendit.errors import CheckpointError

Task = Literal["t2v", "i2v", "ti2v"]
LastFrame = Literal["refused", "optional", "required"]
"""Whether an image-to-video model takes a last image: Wan2.2 may, FLF2V (first and last frame) has to."""
Size = tuple[int, int]
"""(width, height) in pixels, as in `832x480`."""
Solver = Literal["unipc", "dpm++", "euler", "renoise"]
ScheduleName = Literal["diffusers", "official"]
"""Whose timesteps: those of Diffusers' scheduler, or of the authors' own code."""

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""`sample_neg_prompt` of `wan/configs/shared_config.py`, equal in Wan2.1 and Wan2.2."""
_NO_SHAKE = "镜头晃动，" + NEGATIVE_PROMPT
"""Wan2.1 I2V: "shaking camera" and the others."""
_NO_CUT = "镜头切换，" + _NO_SHAKE
"""Wan2.1 FLF2V: "cut between shots" and those of I2V."""


@dataclass(frozen=True, kw_only=True)
class WanSpec:
    """Dimensions of one Wan model, and its authors' settings. Defaults are those of Wan2.1-T2V-14B."""

    name: str
    task: Task
    """t2v: text only; i2v: text and image; ti2v: text, image optional."""
    num_experts: int = 1
    dim: int = 5120
    """Width of the transformer: heads x head size."""
    num_layers: int = 40
    in_channels: int = 16
    out_channels: int = 16
    sizes: tuple[Size, ...]
    """Published sizes; the first is the default."""
    size_multiple: int = 16
    num_frames: int = 81
    fps: int = 16
    num_inference_steps: int = 50
    flow_shift: float = 5.0
    guidance_scale: float = 5.0
    """Guidance scale of the only expert, or of the high-noise expert."""
    guidance_scale_2: float | None = None
    """Guidance scale of the low-noise expert."""
    boundary_ratio: float | None = None
    """Timestep / 1000 below which the low-noise expert runs."""
    negative_prompt: str = NEGATIVE_PROMPT
    """Used by the authors' `generate.py` if the caller has none."""
    image_cross_attention: bool = False
    """Wan2.1 I2V: CLIP image tokens in the cross-attention."""
    last_frame: LastFrame = "refused"
    few_words: bool = False
    """The model was trained on the words of its tokenizer only; others are spelled in letters."""
    flow_shift_by_size: Mapping[Size, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.num_experts == 2) == (self.boundary_ratio is not None), self.name
        assert (self.num_experts == 2) == (self.guidance_scale_2 is not None), self.name
        assert self.num_frames % 4 == 1, self.name
        assert all(w % self.size_multiple == h % self.size_multiple == 0 for w, h in self.sizes), self.name

    @property
    def hub(self) -> str:
        """The MODEL argument for the weights that its authors publish."""
        if self.name == "ascendit-demo":
            return "demo"
        return f"hf:Wan-AI/{self.name}-{'diffusers' if self.last_frame == 'required' else 'Diffusers'}"

    def shift_for(self, width: int, height: int) -> float:
        """`flow_shift` for this size."""
        return self.flow_shift_by_size.get((width, height), self.flow_shift)


_P480: tuple[Size, ...] = ((832, 480), (480, 832))
_P720: tuple[Size, ...] = ((1280, 720), (720, 1280))
_I2V_480_SHIFT = {size: 3.0 for size in _P480}

SPECS: dict[str, WanSpec] = {
    spec.name: spec
    for spec in (
        WanSpec(
            name="Wan2.2-T2V-A14B",
            task="t2v",
            num_experts=2,
            sizes=_P720 + _P480,
            num_inference_steps=40,
            flow_shift=12.0,
            boundary_ratio=0.875,
            guidance_scale=4.0,
            guidance_scale_2=3.0,
        ),
        WanSpec(
            name="Wan2.2-I2V-A14B",
            task="i2v",
            last_frame="optional",
            num_experts=2,
            in_channels=36,
            sizes=_P720 + _P480,
            num_inference_steps=40,
            boundary_ratio=0.9,
            guidance_scale=3.5,
            guidance_scale_2=3.5,
        ),
        WanSpec(
            name="Wan2.2-TI2V-5B",
            task="ti2v",
            dim=3072,
            num_layers=30,
            in_channels=48,
            out_channels=48,
            sizes=((1280, 704), (704, 1280)),
            size_multiple=32,
            num_frames=121,
            fps=24,
        ),
        WanSpec(
            name="Wan2.1-T2V-1.3B",
            task="t2v",
            dim=1536,
            num_layers=30,
            sizes=_P480,
        ),
        WanSpec(
            name="Wan2.1-T2V-14B",
            task="t2v",
            sizes=_P720 + _P480,
        ),
        # 480P and 720P have the same dimensions; the name of the folder distinguishes them, else the size.
        WanSpec(
            name="Wan2.1-I2V-14B-480P",
            task="i2v",
            in_channels=36,
            sizes=_P480,
            num_inference_steps=40,
            flow_shift=3.0,
            negative_prompt=_NO_SHAKE,
            image_cross_attention=True,
        ),
        WanSpec(
            name="Wan2.1-I2V-14B-720P",
            task="i2v",
            in_channels=36,
            sizes=_P720 + _P480,
            num_inference_steps=40,
            flow_shift_by_size=_I2V_480_SHIFT,
            negative_prompt=_NO_SHAKE,
            image_cross_attention=True,
        ),
        WanSpec(
            name="Wan2.1-FLF2V-14B-720P",
            task="i2v",
            last_frame="required",
            in_channels=36,
            sizes=_P720 + _P480,
            flow_shift=16.0,
            negative_prompt=_NO_CUT,
            image_cross_attention=True,
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
            num_frames=17,
            fps=8,
            num_inference_steps=16,
            flow_shift=4.0,
            boundary_ratio=0.875,
            guidance_scale=2.0,
            guidance_scale_2=1.5,
            negative_prompt="",
            few_words=True,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of distilled weights that need few steps: they replace the defaults of a row."""

    name: str
    weights: str
    """The weights that it is for, and their authors."""
    models: tuple[str, ...]
    """Names of the rows that have such weights."""
    timesteps: tuple[float, ...]
    """Positions in the unshifted schedule, as in a request."""
    flow_shift: float
    solver: Solver = "euler"
    guidance_scale: float = 1.0

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a request that it sets."""
        return {
            "timesteps": self.timesteps,
            "num_inference_steps": len(self.timesteps),
            "flow_shift": self.flow_shift,
            "solver": self.solver,
            "schedule": "official",
            "guidance_scale": self.guidance_scale,
        }


_FOUR = (1000.0, 750.0, 500.0, 250.0)
_THREE = (1000.0, 280.0, 120.0)
"""Timesteps 1000, 757 and 522 with shift 8: CausVid's `denoising_step_list`, which is not shifted again."""
_A14B = ("Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B")

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="lightning",
            weights="Wan2.2-Lightning, LoRA files by ModelTC",
            models=_A14B,
            timesteps=_FOUR,
            flow_shift=5.0,
        ),
        Preset(
            name="lightx2v",
            weights="Wan2.1- and Wan2.2-Distill-Models (or -Loras) by LightX2V",
            models=("Wan2.1-T2V-14B", "Wan2.1-I2V-14B-480P", "Wan2.1-I2V-14B-720P", *_A14B),
            timesteps=_FOUR,
            flow_shift=5.0,
        ),
        Preset(
            name="fastwan",
            weights="FastWan2.1 and FastWan2.2 by FastVideo, with full attention",
            models=("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.2-TI2V-5B"),
            timesteps=_THREE,
            flow_shift=8.0,
            solver="renoise",
        ),
        Preset(
            name="causvid",
            weights="CausVid, the bidirectional model by T. Yin",
            models=("Wan2.1-T2V-1.3B",),
            timesteps=_THREE,
            flow_shift=8.0,
            solver="renoise",
        ),
    )
}


def presets_of(spec: WanSpec | None) -> tuple[str, ...]:
    """Names of the presets for a row; none without a row."""
    return tuple(name for name, p in PRESETS.items() if spec is not None and spec.name in p.models)


def match_spec(
    *,
    dim: int,
    num_layers: int,
    in_channels: int,
    out_channels: int,
    num_experts: int,
    image_cross_attention: bool,
    first_last_frame: bool = False,
    folder_name: str = "",
) -> WanSpec | None:
    """Find the model with these dimensions, else None; if several match, the one named in `folder_name`.

    `first_last_frame`: its image tokens have position embeddings, as in Wan2.1 FLF2V.
    Dimensions, channels and number of experts must match; the name alone never decides.
    """
    matches = [
        s
        for s in SPECS.values()
        if (s.dim, s.num_layers, s.in_channels, s.out_channels, s.num_experts, s.image_cross_attention)
        == (dim, num_layers, in_channels, out_channels, num_experts, image_cross_attention)
        and (s.last_frame == "required") == first_last_frame
    ]
    if len(matches) > 1:
        text = folder_name.lower()
        named = [s for s in matches if s.name.rsplit("-", 1)[-1].lower() in text]
        matches = named or matches[-1:]
    return matches[0] if matches else None


# ---- config.json of transformer and VAE ---------------------------------------------------------


def out_channels(config: Mapping[str, Any]) -> int:
    """Output channels in the config of a transformer: 16 if the key is absent, those of the input if null."""
    value = config.get("out_channels", WanConfig.out_channels)
    return int(config.get("in_channels", WanConfig.in_channels) if value is None else value)


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """`config.json` of a Diffusers WanTransformer3DModel; names and defaults are Diffusers'."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    @property
    def dim(self) -> int:
        """Hidden size D: heads x head size."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WanConfig:
        """Make a config from parsed JSON, without the keys that Diffusers adds (with a leading underscore).

        Raises CheckpointError (E-CKP-06) for an unknown key or an unsupported `qk_norm`.
        """
        allowed = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if not k.startswith("_") and k != "quantization_config"}
        if unknown := sorted(set(values) - allowed):
            raise CheckpointError(
                f"config.json of the transformer has unknown keys: {', '.join(unknown)}",
                needs=f"keys of WanTransformer3DModel: {', '.join(sorted(allowed))}",
                fix="use a Wan2.1 or Wan2.2 text- or image-to-video checkpoint",
                code="E-CKP-06",
            )
        if values.get("qk_norm", cls.qk_norm) != cls.qk_norm:
            raise CheckpointError(
                f"qk_norm {values['qk_norm']!r}",
                needs=f"{cls.qk_norm}, as in all Wan models",
                fix="correct config.json",
                code="E-CKP-06",
            )
        values["patch_size"] = tuple(values.get("patch_size", cls.patch_size))
        values["out_channels"] = out_channels(values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`, with lists instead of tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def spec_of(config: Mapping[str, Any], num_experts: int, folder_name: str) -> WanSpec | None:
    """The row of `SPECS` with the dimensions and channels of this config, for any task."""
    heads = config.get("num_attention_heads", WanConfig.num_attention_heads)
    size = config.get("attention_head_dim", WanConfig.attention_head_dim)
    if heads is None or size is None:  # unknown, as `repack` without a base model writes them
        return None
    return match_spec(
        dim=heads * size,
        num_layers=config.get("num_layers", WanConfig.num_layers),
        in_channels=config.get("in_channels", WanConfig.in_channels),
        out_channels=out_channels(config),
        num_experts=num_experts,
        image_cross_attention=config.get("image_dim") is not None,
        first_last_frame=has_position_embeddings(config),
        folder_name=folder_name,
    )


def has_position_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether this config is of an FLF2V model: position embeddings for the tokens of two images."""
    return config.get("image_dim") is not None and config.get("pos_embed_seq_len") is not None


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """The strides in `config.json` of an AutoencoderKLWan; names and defaults are Diffusers'."""

    scale_factor_spatial: int = 8
    """Pixels per latent, in height and width."""
    scale_factor_temporal: int = 4
    """Frames per latent frame, except the first."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VaeConfig:
        """Make a config from parsed JSON; all other keys are ignored."""
        return cls(**{f.name: int(data.get(f.name, f.default)) for f in fields(cls)})
