"""The values of every config file of a model: type, range, and the relations between them.

A library gets only values that one of these models has accepted, so it raises no error of its own and builds
nothing of an absurd size. Defaults are those of Diffusers and transformers. Keys that a model does not name
are ignored, as the libraries do, so a config of a later version still loads.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ascendit.errors import CheckpointError
from ascendit.family import VaeConfig, WanConfig
from ascendit.names import MAX_LAYERS
from ascendit.validation import problem

Count = Annotated[int, Field(gt=0, lt=2**31)]
Layers = Annotated[int, Field(gt=0, le=MAX_LAYERS)]
Patch = Annotated[int, Field(gt=0, le=64)]
Multiple = Annotated[int, Field(gt=0, le=1024)]
Pixels = Annotated[int, Field(gt=0, le=16384)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Shift = Annotated[float, Field(ge=1e-3, le=1e4)]
"""As in a request."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A dropout."""
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Ratio = Annotated[float, Field(gt=0, lt=1)]

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong = 2, 60, 60


class PartConfig(BaseModel):
    """Base class: values of the exact JSON type (1 is no boolean, "1" no number), finite numbers."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def read(cls, file: Path, data: Mapping[str, Any]) -> Self:
        """Check the content of `file`. Raises CheckpointError (E-CKP-06) with the key, value and rule."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise _bad_value(file, error) from error

    def _require(self, correct: bool, key: str, rule: str) -> None:
        """Raise a problem of `key` unless `correct`; for relations between values."""
        if not correct:
            raise problem(rule, key=key, value=getattr(self, key))


def _bad_value(file: Path, error: ValidationError) -> CheckpointError:
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {}) if first["type"] == "problem" else {}
    key = context.get("key") or ".".join(str(item) for item in first["loc"][:4])
    value = context["value"] if "value" in context else first["input"]
    return bad_config_value(file, key, value, first["msg"].removeprefix("Input should be "))


def bad_config_value(file: Path, key: str, value: object, rule: str) -> CheckpointError:
    """The error E-CKP-06 for `key` of the JSON file `file`."""
    return CheckpointError(
        f"{file}: {key[:60]} is {_SHORT.repr(value)[:60]}",
        needs=f"{key[:60]}: {rule}",
        fix=f"restore the {file.name} of the model's authors",
        code="E-CKP-06",
    )


# ---- model_index.json and the scheduler ---------------------------------------------------------


class IndexConfig(PartConfig):
    """The plain values of `model_index.json`."""

    boundary_ratio: Ratio | None = None
    expand_timesteps: bool | None = None


class SchedulerConfig(PartConfig):
    """`scheduler_config.json`: types and ranges; `scheduler_of` requires the values of Wan models.

    None: absent. The defaults are those of the class, see `scheduler.MULTISTEP_DEFAULTS`.
    """

    flow_shift: Shift | None = None
    shift: Shift | None = None
    num_train_timesteps: Count | None = None
    solver_order: Count | None = None
    solver_type: str | None = None
    prediction_type: str | None = None
    final_sigmas_type: str | None = None
    time_shift_type: str | None = None
    timestep_spacing: str | None = None
    shift_terminal: Number | None = None
    disable_corrector: list[int] | None = None
    use_flow_sigmas: bool | None = None
    use_dynamic_shifting: bool | None = None
    use_karras_sigmas: bool | None = None
    use_exponential_sigmas: bool | None = None
    use_beta_sigmas: bool | None = None
    predict_x0: bool | None = None
    lower_order_final: bool | None = None
    thresholding: bool | None = None
    invert_sigmas: bool | None = None
    stochastic_sampling: bool | None = None
    algorithm_type: str | None = None
    use_lu_lambdas: bool | None = None
    variance_type: str | None = None


# ---- transformer and VAE ------------------------------------------------------------------------


class TransformerConfig(PartConfig):
    """`config.json` of a WanTransformer3DModel: the values of `family.WanConfig`."""

    patch_size: Annotated[list[Patch], Field(min_length=3, max_length=3)] = list(WanConfig.patch_size)
    num_attention_heads: Count | None = WanConfig.num_attention_heads
    """None: unknown, as `repack` without a base model writes it; such a transformer does not run."""
    attention_head_dim: Annotated[int, Field(ge=6, lt=2**31, multiple_of=2)] | None = (
        WanConfig.attention_head_dim
    )
    in_channels: Count = WanConfig.in_channels
    out_channels: Count | None = WanConfig.out_channels
    text_dim: Count = WanConfig.text_dim
    freq_dim: Annotated[int, Field(gt=0, lt=2**31, multiple_of=2)] = WanConfig.freq_dim
    ffn_dim: Count = WanConfig.ffn_dim
    num_layers: Layers = WanConfig.num_layers
    cross_attn_norm: bool = WanConfig.cross_attn_norm
    qk_norm: Literal["rms_norm_across_heads"] = "rms_norm_across_heads"
    eps: Epsilon = WanConfig.eps
    image_dim: Count | None = None
    added_kv_proj_dim: Count | None = None
    rope_max_seq_len: Annotated[int, Field(gt=0, le=2**20)] = WanConfig.rope_max_seq_len
    pos_embed_seq_len: Count | None = None

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        if self.num_attention_heads is None or self.attention_head_dim is None:
            return self
        width = self.num_attention_heads * self.attention_head_dim
        image = None if self.image_dim is None else width
        rule = (
            f"{width}, heads x head size, because there is an image_dim"
            if image
            else "null without image_dim"
        )
        self._require(self.added_kv_proj_dim == image, "added_kv_proj_dim", rule)
        return self


_LATENTS_MEAN = [
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
]
_LATENTS_STD = [
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
]


class AutoencoderConfig(PartConfig):
    """`config.json` of an AutoencoderKLWan, of Wan2.1 or residual (Wan2.2)."""

    base_dim: Count = 96
    decoder_base_dim: Count | None = None
    z_dim: Count = 16
    dim_mult: Annotated[list[Multiple], Field(min_length=1, max_length=8)] = [1, 2, 4, 4]
    num_res_blocks: Annotated[int, Field(gt=0, le=64)] = 2
    attn_scales: Annotated[list[float], Field(max_length=0)] = []
    """Diffusers builds other values, and its encoder then fails."""
    temperal_downsample: Annotated[list[bool], Field(max_length=8)] = [False, True, True]
    dropout: Fraction = 0.0
    latents_mean: list[Number] = _LATENTS_MEAN
    latents_std: list[Positive] = _LATENTS_STD
    is_residual: bool = False
    in_channels: Count = 3
    out_channels: Count = 3
    patch_size: Patch | None = None
    scale_factor_temporal: Count = VaeConfig.scale_factor_temporal
    scale_factor_spatial: Count = VaeConfig.scale_factor_spatial

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        halvings, patch = len(self.dim_mult) - 1, self.patch_size or 1
        self._require(
            len(self.temperal_downsample) == halvings,
            "temperal_downsample",
            f"{halvings} values, one fewer than dim_mult",
        )
        strides = {
            "scale_factor_temporal": 2 ** sum(self.temperal_downsample),
            "scale_factor_spatial": 2**halvings * patch,
        }
        for key, stride in strides.items():
            self._require(getattr(self, key) == stride, key, f"{stride}, as dim_mult and patch_size imply")
        for key in ("in_channels", "out_channels"):
            self._require(getattr(self, key) == 3 * patch**2, key, f"{3 * patch**2}, 3 x patch_size^2")
        for key in ("latents_mean", "latents_std"):
            length = len(getattr(self, key))
            self._require(length == self.z_dim, key, f"{self.z_dim} numbers, as z_dim says, not {length}")
        self._check_channels(halvings)
        return self

    def _check_channels(self, halvings: int) -> None:
        """Shortcuts of the residual VAE group channels; the other VAE halves them."""
        down = [self.base_dim * m for m in (1, *self.dim_mult)]
        up = [(self.decoder_base_dim or self.base_dim) * m for m in (self.dim_mult[-1], *self.dim_mult[::-1])]
        name = "base_dim" if self.decoder_base_dim is None else "decoder_base_dim"
        if not self.is_residual:
            self._require(all(size > 1 for size in up[1:-1]), name, "at least 2 channels in every block")
            return
        rule = "a size that the channels of every block divide evenly (see dim_mult)"
        for i in range(halvings + 1):
            factor = (8 if self.temperal_downsample[i] else 4) if i < halvings else 1
            self._require(down[i] * factor % down[i + 1] == 0, "base_dim", rule)
        for i in range(halvings):
            factor = 8 if self.temperal_downsample[-1 - i] else 4
            self._require(up[i + 1] * factor % up[i] == 0, name, rule)


# ---- text encoder and image encoder -------------------------------------------------------------

_ACTIVATIONS = r"(?:gelu|gelu_new|gelu_fast|gelu_pytorch_tanh|quick_gelu|relu|silu|swish|tanh)"


class TextEncoderConfig(PartConfig):
    """`config.json` of a UMT5EncoderModel."""

    vocab_size: Count = 250112
    d_model: Count = 512
    d_kv: Count = 64
    d_ff: Count = 1024
    num_layers: Layers = 8
    num_heads: Count = 6
    relative_attention_num_buckets: Annotated[int, Field(ge=4, lt=2**31)] = 32
    relative_attention_max_distance: Count = 128
    dropout_rate: Fraction = 0.1
    layer_norm_epsilon: Epsilon = 1e-6
    feed_forward_proj: Annotated[str, Field(pattern=f"^(?:gated-)?{_ACTIVATIONS}$")] = "gated-gelu"
    is_decoder: Literal[False] = False

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layers have a gate, `wi_0` and `wi_1`."""
        return self.feed_forward_proj.startswith("gated-")

    @model_validator(mode="before")
    @classmethod
    def _check_derived(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Keys that follow from `feed_forward_proj` must agree with it."""
        projection = data.get("feed_forward_proj", "gated-gelu")
        if isinstance(projection, str):
            activation = "gelu_new" if projection == "gated-gelu" else projection.rpartition("-")[2]
            derived = {"is_gated_act": projection.startswith("gated-"), "dense_act_fn": activation}
            for key, value in derived.items():
                if type(data.get(key, value)) is not type(value) or data.get(key, value) != value:
                    rule = f"{value!r}, as feed_forward_proj = {projection!r:.40} says"
                    raise problem(rule, key=key, value=data[key])
        return data

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        exact = self.relative_attention_num_buckets // 4
        rule = f"more than {exact}, a quarter of relative_attention_num_buckets"
        self._require(self.relative_attention_max_distance > exact, "relative_attention_max_distance", rule)
        return self


class ImageEncoderConfig(PartConfig):
    """`config.json` of a CLIPVisionModel."""

    hidden_size: Count = 768
    intermediate_size: Count = 3072
    projection_dim: Count = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Count = 12
    num_channels: Literal[3] = 3
    image_size: Pixels = 224
    patch_size: Pixels = 32
    hidden_act: Annotated[str, Field(pattern=f"^{_ACTIVATIONS}$")] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    attention_dropout: Fraction = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of one image: its patches and one for the class."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        heads = self.hidden_size % self.num_attention_heads == 0
        self._require(heads, "num_attention_heads", f"a divisor of hidden_size {self.hidden_size}")
        self._require(
            self.patch_size <= self.image_size, "patch_size", f"at most image_size {self.image_size}"
        )
        return self


# ---- image processor and tokenizer --------------------------------------------------------------


def _edges(value: Any) -> Any:
    """A whole number as the edges of a square."""
    return {"height": value, "width": value} if type(value) is int else value


def _shortest(value: Any) -> Any:
    return {"shortest_edge": value} if type(value) is int else value


class Size(PartConfig):
    """Either the shortest edge, or height and width, in pixels."""

    model_config = ConfigDict(extra="forbid")
    shortest_edge: Pixels | None = None
    height: Pixels | None = None
    width: Pixels | None = None

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        edges = (self.height, self.width)
        if (None in edges) == (self.shortest_edge is None) or edges.count(None) == 1:
            raise problem("either shortest_edge, or height and width, in pixels")
        return self


Channels = Annotated[list[Number], Field(min_length=3, max_length=3)]
Deviations = Annotated[list[Positive], Field(min_length=3, max_length=3)]


class ImageProcessorConfig(PartConfig):
    """`preprocessor_config.json` of a CLIPImageProcessor."""

    do_resize: bool = True
    size: Annotated[Size, BeforeValidator(_shortest)] = Size(shortest_edge=224)
    resample: Annotated[int, Field(ge=0, le=5)] = 3
    do_center_crop: bool = True
    crop_size: Annotated[Size, BeforeValidator(_edges)] = Size(height=224, width=224)
    do_rescale: bool = True
    rescale_factor: Positive = 1 / 255
    do_normalize: bool = True
    image_mean: Channels = [0.48145466, 0.4578275, 0.40821073]
    image_std: Deviations = [0.26862954, 0.26130258, 0.27577711]
    do_convert_rgb: Literal[True] = True

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        self._require(self.crop_size.height is not None, "crop_size", "height and width, in pixels")
        return self

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every processed image; None if it depends on the image."""
        size = (
            self.crop_size if self.do_center_crop else self.size if self.do_resize else Size.model_construct()
        )
        return None if size.height is None or size.width is None else (size.height, size.width)


def _token(value: Any) -> Any:
    """A token: its text, or the JSON of an AddedToken."""
    if isinstance(value, str):
        return value
    flags = ("lstrip", "rstrip", "normalized", "special", "single_word")
    keys = {"content", "__type", *flags}
    if (
        isinstance(value, dict)
        and isinstance(value.get("content"), str)
        and not set(value) - keys
        and all(isinstance(value.get(flag, False), bool) for flag in flags)
        and value.get("__type", "AddedToken") == "AddedToken"
    ):
        return value
    raise problem("a token: its text, or an object with content and flags")


def _tokens(value: Any) -> Any:
    """Tokens by name; a list is checked by the type."""
    return list(value.values()) if isinstance(value, dict) else value


Token = Annotated[Any, BeforeValidator(_token)]
Tokens = Annotated[list[Token], Field(max_length=10_000)]


class TokenMapConfig(PartConfig):
    """`special_tokens_map.json`, and the same keys of `tokenizer_config.json`."""

    bos_token: Token | None = None
    eos_token: Token | None = None
    unk_token: Token | None = None
    sep_token: Token | None = None
    pad_token: Token | None = None
    cls_token: Token | None = None
    mask_token: Token | None = None
    additional_special_tokens: Tokens | None = None
    extra_special_tokens: Annotated[Tokens | None, BeforeValidator(_tokens)] = None


class TokenizerConfig(TokenMapConfig):
    """`tokenizer_config.json`: the keys that reach the library; others name files or another vocabulary."""

    model_max_length: Annotated[float, Field(gt=0)] | None = None
    extra_ids: Annotated[int, Field(ge=0, le=10_000)] = 0
    padding_side: Literal["right"] = "right"
    truncation_side: Literal["right"] = "right"
    clean_up_tokenization_spaces: bool | None = None
    split_special_tokens: Literal[False] = False
    legacy: bool | None = None
    add_prefix_space: bool | None = None
    model_input_names: list[Literal["input_ids", "token_type_ids", "attention_mask"]] = ["input_ids"]
    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Token] = {}


# ---- published models ---------------------------------------------------------------------------

PUBLISHED: dict[str, tuple[PartConfig, ...]] = {
    "text_encoder": (
        TextEncoderConfig(vocab_size=256384, d_model=4096, d_ff=10240, num_layers=24, num_heads=64),
    ),
    "vae": (
        AutoencoderConfig(),
        AutoencoderConfig(
            is_residual=True,
            base_dim=160,
            decoder_base_dim=256,
            z_dim=48,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=[0.0] * 48,
            latents_std=[1.0] * 48,
        ),
    ),
    "image_encoder": (
        ImageEncoderConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=16,
            patch_size=14,
        ),
    ),
}
"""Component -> configs that give the shapes of its published files; means and deviations are placeholders."""
