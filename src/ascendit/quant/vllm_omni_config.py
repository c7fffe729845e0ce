"""vLLM-Omni's `quantization_config`: read as a recipe for floats, written for quantized weights. No torch.

    {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 5, "ignored_layers": ["blocks.7.ffn.net_2"]}

Reading: `num_bf16_fallback_layers` are leading blocks, 5 by default and for mxfp4_dualscale alone;
`ignored_layers` names modules, the fused `to_qkv` too. There a name that fits nothing is passed over; here it
is an error. Writing: `marker_for`, for config.json of a transformer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from ascendit.errors import UsageError
from ascendit.mx.formats import lookup, resolve_rule
from ascendit.names import is_block_linear, sort_names
from ascendit.quant.fusion import patterns_of_module, vllm_omni_modules
from ascendit.quant.layer_rules import LayerRule
from ascendit.quant.schemes import METHOD, QUANTIZED, SCHEMES
from ascendit.schedule import Step, StepSchedule

METHODS = tuple(name for name, scheme in SCHEMES.items() if scheme.vllm_omni_key)
_KEYS = {
    "method",
    "quant_method",
    "ignored_layers",
    "modules_to_not_convert",
    "num_bf16_fallback_layers",
    "w4a8_fallback_steps",
    "mxfp4_scale_alg",
}
_SCALE_ALG = {0: "floor", 2: "max:7"}
LEADING = 5


def is_omni_config(text: str) -> bool:
    """Whether what was given as a recipe is this JSON."""
    return text.lstrip().startswith("{")


def read_omni_config(text: str) -> tuple[tuple[LayerRule, ...], StepSchedule]:
    """The rules and the step policy of the JSON. UsageError E-USE-01 for what it cannot mean."""
    try:
        config: Any = json.loads(text)
    except ValueError as e:
        raise _bad(f"it is not JSON ({e})") from e
    if not isinstance(config, dict) or (unknown := sorted(set(config) - _KEYS)):
        raise _bad(f"it has {', '.join(unknown)}" if isinstance(config, dict) else "it is no object")
    method = config.get("method", config.get("quant_method"))
    if method not in METHODS:
        raise _bad(f"method {method!r} is not one of {', '.join(METHODS)}")
    rules = [LayerRule(("*",), method, _scale_rule(config, method))]
    if leading := _leading(config, method):
        rules.append(LayerRule(tuple(f"blocks.{n}.*" for n in range(leading)), "bf16", None))
    if ignored := _ignored(config):
        rules.append(LayerRule(ignored, "bf16", None))
    return tuple(rules), _policy(config, method)


def _scale_rule(config: Mapping[str, Any], method: str) -> str:
    form = lookup(SCHEMES[method].weight)
    if "mxfp4_scale_alg" not in config:
        return resolve_rule(form, None)
    alg = config["mxfp4_scale_alg"]
    if method != "mxfp4" or type(alg) is not int or alg not in _SCALE_ALG:
        raise _bad(f"mxfp4_scale_alg {alg!r} for {method}; mxfp4 has {', '.join(map(str, _SCALE_ALG))}")
    return resolve_rule(form, _SCALE_ALG[alg])


def _leading(config: Mapping[str, Any], method: str) -> int:
    count = config.get("num_bf16_fallback_layers", LEADING if method == "mxfp4_dualscale" else 0)
    if type(count) is not int or count < 0:
        raise _bad(f"num_bf16_fallback_layers {count!r} is no number of blocks")
    if count and method != "mxfp4_dualscale":
        raise _bad(f"num_bf16_fallback_layers belongs to mxfp4_dualscale, not to {method}")
    return count


def _ignored(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("ignored_layers", config.get("modules_to_not_convert")) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise _bad(f"ignored_layers {names!r} is no list of names")
    return tuple(layer for name in names for layer in patterns_of_module(name))


def _policy(config: Mapping[str, Any], method: str) -> StepSchedule:
    steps = config.get("w4a8_fallback_steps") or []
    if not isinstance(steps, list) or not all(type(step) is int and step >= 0 for step in steps):
        raise _bad(f"w4a8_fallback_steps {steps!r} is no list of steps")
    if steps and method != "mxfp4":
        raise _bad(f"w4a8_fallback_steps belongs to mxfp4, not to {method}")
    return StepSchedule(tuple((step, Step("w4a8")) for step in sorted(set(steps))))


def _bad(problem: str) -> UsageError:
    return UsageError(
        f"quantization_config: {problem}",
        needs=f"vLLM-Omni's JSON with {', '.join(sorted(_KEYS))}",
        fix='{"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 5, "ignored_layers": []}',
        code="E-USE-01",
    )


# ---- writing ------------------------------------------------------------------------------------


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
