"""vLLM-Omni's `quantization_config`: read as a recipe, written for quantized weights. Does not import torch.

    {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 5, "ignored_layers": ["blocks.7.ffn.net_2"]}

Reading: `num_bf16_fallback_layers` is a number of leading blocks, only for mxfp4_dualscale, default 5;
`ignored_layers` names modules, including the fused `to_qkv`. A name that matches no layer is an error, while
vLLM-Omni ignores it. Writing: `quantization_config_for`, for config.json of a transformer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, StrictInt, model_validator

from ascendit.names import is_block_linear, sort_names
from ascendit.quant.fusion import patterns_of_module, vllm_omni_modules
from ascendit.quant.layer_rules import LayerRule, Name
from ascendit.quant.schemes import METHOD, QUANTIZED, SCHEMES
from ascendit.schedule import Step, StepSchedule
from ascendit.validation import Model, described, parse, problem, usage_error

METHODS = tuple(name for name, scheme in SCHEMES.items() if scheme.vllm_omni_key)
_ALIASES = {"quant_method": "method", "modules_to_not_convert": "ignored_layers"}
_OWNERS = {
    "num_bf16_fallback_layers": "mxfp4_dualscale",
    "w4a8_fallback_steps": "mxfp4",
    "mxfp4_scale_alg": "mxfp4",
}
"""Key -> the only method that supports it."""
_SCALE_RULES = {0: "floor", 2: "max:7"}
_DEFAULT_BF16_BLOCKS = 5

Natural = Annotated[StrictInt, Field(ge=0)]
LayerCount = Annotated[Natural, described("num_bf16_fallback_layers {got} is not a number of blocks")]
Steps = Annotated[tuple[Natural, ...], described("w4a8_fallback_steps {got} is not a list of steps")]
Names = Annotated[tuple[Name, ...], described("ignored_layers {got} is not a list of names")]
ScaleAlgorithm = Annotated[
    str,
    BeforeValidator(lambda number: _SCALE_RULES.get(number) if type(number) is int else None),
    described("mxfp4_scale_alg {got} is not one of " + ", ".join(map(str, _SCALE_RULES))),
]


class OmniConfig(Model):
    """The parsed JSON, with aliases replaced."""

    method: str
    ignored_layers: Names | None = None
    num_bf16_fallback_layers: LayerCount | None = None
    w4a8_fallback_steps: Steps | None = None
    mxfp4_scale_alg: ScaleAlgorithm | None = None
    """Converted to a scale rule of ascendit."""

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.method not in METHODS:
            raise problem(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        for key, method in _OWNERS.items():
            if getattr(self, key) and self.method != method:
                raise problem(f"{key} belongs to {method}, not to {self.method}")
        return self

    @property
    def rules(self) -> tuple[LayerRule, ...]:
        """Rules of a recipe; the last match wins."""
        leading = self.num_bf16_fallback_layers
        if leading is None:
            leading = _DEFAULT_BF16_BLOCKS if self.method == "mxfp4_dualscale" else 0
        blocks = tuple(f"blocks.{n}.*" for n in range(leading))
        ignored = tuple(layer for name in self.ignored_layers or () for layer in patterns_of_module(name))
        excluded = (LayerRule(layers=layers, scheme="bf16") for layers in (blocks, ignored) if layers)
        return LayerRule(layers=("*",), scheme=self.method, scale_rule=self.mxfp4_scale_alg), *excluded

    @property
    def step_policy(self) -> StepSchedule:
        """The schedule of the steps with 8-bit activations."""
        steps = sorted(set(self.w4a8_fallback_steps or ()))
        return StepSchedule(tuple((step, Step("w4a8")) for step in steps))


def is_omni_config(text: str) -> bool:
    """Whether the text of a recipe option is this JSON instead of a name or path."""
    return text.lstrip().startswith("{")


def read_omni_config(text: str) -> OmniConfig:
    """Parse the JSON. Raises UsageError (E-USE-01) if it is invalid."""
    try:
        config = parse(text, "json")
        renamed = {_ALIASES[key]: value for key, value in config.items() if key in _ALIASES}
        return OmniConfig.model_validate(renamed | {k: v for k, v in config.items() if k not in _ALIASES})
    except ValueError as e:
        raise usage_error(
            e,
            source="quantization_config",
            syntax="JSON",
            needs=f"vLLM-Omni's JSON with {', '.join(sorted({*OmniConfig.model_fields, *_ALIASES}))}",
            fix='{"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 5, "ignored_layers": []}',
        ) from e


def quantization_config_for(
    layers: Mapping[str, str], smoothed: Collection[str] = ()
) -> dict[str, Any] | None:
    """`quantization_config` for config.json, with keys of vLLM-Omni 0.30; None if no layer is quantized.

    `layers`: all linear layers of the blocks (and other quantized layers) -> scheme, `bf16` if excluded.
    `smoothed`: layers with a `mul_scale`. `ignored_layers` lists the excluded layers by vLLM-Omni's modules:
    `attn1.to_qkv`, `to_out`, `ffn.net_0.proj`, `ffn.net_2`.

    vLLM-Omni's schema cannot represent two schemes, rowwise FP8, quantized layers outside the blocks, partly
    quantized Q, K and V, or smoothing of excluded layers or in some schemes. The method is then `ascendit`:
    Diffusers then loads it with ascendit, and vLLM-Omni stops instead of reading quantized weights as floats.
    """
    own = {"quant_method": METHOD}
    quantized = {name: scheme for name, scheme in layers.items() if scheme in QUANTIZED}
    if not quantized:
        return None
    method, *more = set(quantized.values())
    scheme = SCHEMES[method]
    if more or not scheme.vllm_omni_key or not all(map(is_block_linear, quantized)):
        return own
    if not set(smoothed) <= (set(quantized) if scheme.vllm_omni_smooth else set()):
        return own
    excluded = [name for name in sort_names(layers) if name not in quantized and is_block_linear(name)]
    if (ignored := vllm_omni_modules(excluded, quantized)) is None:
        return own
    config: dict[str, Any] = {"quant_method": method, scheme.vllm_omni_key: True}
    if method == "mxfp4" and set(smoothed) == set(quantized):
        config["require_smooth_scale"] = True
    return config | {"ignored_layers": ignored}
