"""vLLM-Omni's `quantization_config`: read as a recipe for floats, written for quantized weights. No torch.

    {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 5, "ignored_layers": ["blocks.7.ffn.net_2"]}

Reading: `num_bf16_fallback_layers` are leading blocks, 5 by default and for mxfp4_dualscale alone;
`ignored_layers` names modules, the fused `to_qkv` too. There a name that fits nothing is passed over; here it
is an error. Writing: `marker_for`, for config.json of a transformer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, StrictInt, model_validator

from ascendit.names import is_block_linear, sort_names
from ascendit.quant.fusion import patterns_of_module, vllm_omni_modules
from ascendit.quant.layer_rules import LayerRule, Name
from ascendit.quant.schemes import METHOD, QUANTIZED, SCHEMES
from ascendit.schedule import Step, StepSchedule
from ascendit.validation import Model, described, problem, usage_error

METHODS = tuple(name for name, scheme in SCHEMES.items() if scheme.vllm_omni_key)
_ALIASES = {"quant_method": "method", "modules_to_not_convert": "ignored_layers"}
_OWNERS = {
    "num_bf16_fallback_layers": "mxfp4_dualscale",
    "w4a8_fallback_steps": "mxfp4",
    "mxfp4_scale_alg": "mxfp4",
}
"""Key -> the one method that has it."""
_SCALE_RULES = {0: "floor", 2: "max:7"}
LEADING = 5

Natural = Annotated[StrictInt, Field(ge=0)]
LayerCount = Annotated[Natural, described("num_bf16_fallback_layers {got} is no number of blocks")]
Steps = Annotated[tuple[Natural, ...], described("w4a8_fallback_steps {got} is no list of steps")]
Names = Annotated[tuple[Name, ...], described("ignored_layers {got} is no list of names")]
ScaleAlgorithm = Annotated[
    str,
    BeforeValidator(lambda number: _SCALE_RULES.get(number) if type(number) is int else None),
    described("mxfp4_scale_alg {got} is not one of " + ", ".join(map(str, _SCALE_RULES))),
]


class OmniConfig(Model):
    """The JSON, once its aliases are replaced."""

    method: str
    ignored_layers: Names | None = None
    num_bf16_fallback_layers: LayerCount | None = None
    w4a8_fallback_steps: Steps | None = None
    mxfp4_scale_alg: ScaleAlgorithm | None = None
    """As a scale rule of ours."""

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        if self.method not in METHODS:
            raise problem(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        for key, method in _OWNERS.items():
            if getattr(self, key) and self.method != method:
                raise problem(f"{key} belongs to {method}, not to {self.method}")
        return self

    @property
    def rules(self) -> tuple[LayerRule, ...]:
        """Those of a recipe, the last that matches wins."""
        leading = self.num_bf16_fallback_layers
        if leading is None:
            leading = LEADING if self.method == "mxfp4_dualscale" else 0
        blocks = tuple(f"blocks.{n}.*" for n in range(leading))
        ignored = tuple(layer for name in self.ignored_layers or () for layer in patterns_of_module(name))
        kept = (LayerRule(layers=layers, scheme="bf16") for layers in (blocks, ignored) if layers)
        return LayerRule(layers=("*",), scheme=self.method, scale_rule=self.mxfp4_scale_alg), *kept

    @property
    def step_policy(self) -> StepSchedule:
        """The steps with 8-bit activations."""
        steps = sorted(set(self.w4a8_fallback_steps or ()))
        return StepSchedule(tuple((step, Step("w4a8")) for step in steps))


def is_omni_config(text: str) -> bool:
    """Whether what was given as a recipe is this JSON."""
    return text.lstrip().startswith("{")


def read_omni_config(text: str) -> OmniConfig:
    """The JSON as a model. UsageError E-USE-01 for what it cannot mean."""
    try:
        config = json.loads(text)
        named = {_ALIASES[key]: value for key, value in config.items() if key in _ALIASES}
        return OmniConfig.model_validate(named | {k: v for k, v in config.items() if k not in _ALIASES})
    except ValueError as e:
        raise usage_error(
            e,
            where="quantization_config",
            syntax="JSON",
            needs=f"vLLM-Omni's JSON with {', '.join(sorted({*OmniConfig.model_fields, *_ALIASES}))}",
            fix='{"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 5, "ignored_layers": []}',
        ) from e


def marker_for(layers: Mapping[str, str], smoothed: Collection[str] = ()) -> dict[str, Any] | None:
    """`quantization_config` for config.json, in keys that vLLM-Omni 0.30 knows; None for floats.

    `layers`: every linear of the blocks (and others that are quantized) -> scheme, `bf16` for those that are
    kept; `smoothed`: those with a `mul_scale`. `ignored_layers` holds the kept ones, by the names of its
    modules: `attn1.to_qkv`, `to_out`, `ffn.net_0.proj`, `ffn.net_2`.

    Its schema cannot say two schemes, FP8 by rows, a quantized layer outside the blocks, a Q without its K
    and V, smoothing in a scheme or in a kept layer where it knows none. Then the method is ascendit's own:
    Diffusers asks ascendit, and vLLM-Omni stops instead of taking codes for weights.
    """
    own = {"quant_method": METHOD}
    coded = {name: scheme for name, scheme in layers.items() if scheme in QUANTIZED}
    if not coded:
        return None
    method, *more = set(coded.values())
    scheme = SCHEMES[method]
    if more or not scheme.vllm_omni_key or not all(map(is_block_linear, coded)):
        return own
    if not set(smoothed) <= (set(coded) if scheme.vllm_omni_smooth else set()):
        return own
    kept = [name for name in sort_names(layers) if name not in coded and is_block_linear(name)]
    if (ignored := vllm_omni_modules(kept, coded)) is None:
        return own
    marker: dict[str, Any] = {"quant_method": method, scheme.vllm_omni_key: True}
    if method == "mxfp4" and set(smoothed) == set(coded):
        marker["require_smooth_scale"] = True
    return marker | {"ignored_layers": ignored}
