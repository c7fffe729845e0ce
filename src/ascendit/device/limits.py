"""Limits of the operators of a device: checked before a model is loaded, and by the kernels at each call.

Does not import torch, so that a dry run refuses everything that the run would refuse at its first step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from ascendit.device.device import Device
from ascendit.errors import UsageError
from ascendit.mx.formats import lookup, resolve_rule
from ascendit.quant.schemes import scheme_of

NPU_DTYPES = ("bfloat16", "float16")
"""Dtypes that the quantizers of an NPU take."""
W4A8_K = 8
"""K of w4a8 must be a multiple of this."""
_BFLOAT16_ONLY = ("int8_block",)


class QuantizedLayer(NamedTuple):
    """A quantized linear layer of a model, with the shape (N, K) of its weight."""

    name: str
    scheme: str
    shape: tuple[int, int]


DEFAULT_RULES = "omit --set activation_rule for the defaults"


def parse_rules(text: str | None) -> dict[str, str]:
    """Parse `mxfp8=floor,mxfp4=max:7` to scheme -> scale rule.

    Raises UsageError (E-USE-01) for an unknown scheme or rule.
    """
    rules = {}
    if text is not None and not isinstance(text, str):
        raise UsageError(
            f"activation_rule {text!r}",
            needs="text such as mxfp8=floor,mxfp4=max:7",
            fix=DEFAULT_RULES,
        )
    for item in text.split(",") if text else ():
        name, _, rule = item.partition("=")
        try:
            scheme = scheme_of(name.strip())
            rules[scheme.name] = resolve_rule(lookup(scheme.activation), rule.strip() or "?")
        except UsageError as e:
            e.fix = DEFAULT_RULES
            raise
    return rules


def check_rules(rules: Mapping[str, str], schemes: Collection[str]) -> None:
    """Raise UsageError (E-USE-01) for a scale rule of a scheme that no layer uses."""
    if unused := sorted(rules.keys() - schemes):
        raise UsageError(
            f"activation_rule for {', '.join(unused)}, which no layer uses",
            needs=f"rules for {', '.join(sorted(set(schemes) - {'bf16'})) or 'a quantized model'}",
            fix="omit --set activation_rule, or name a scheme of the model",
        )


def check_layers(
    device: Device,
    layers: Iterable[QuantizedLayer],
    *,
    dtype: str | None,
    rules: Mapping[str, str],
    w4a8: bool,
) -> None:
    """Check the layers that multiply natively on an NPU; other devices take every layer.

    `dtype`: dtype of the hidden states. `w4a8`: whether a step runs MXFP4 layers in W4A8. Raises UsageError:
    E-USE-01 for a dtype or scale rule, E-QNT-01 for a shape that the kernels do not take.
    """
    for layer in layers if device.operators == "npu" else ():
        if layer.scheme not in device.native_schemes:
            continue
        schemes = [layer.scheme, *(["w4a8"] if w4a8 and layer.scheme == "mxfp4" else [])]
        for scheme in schemes:
            check_dtype(scheme, dtype or "bfloat16")
            check_rule(scheme, rules.get(scheme) or scheme_of(scheme).rule)
        try:
            check_weight(layer.scheme, *layer.shape)
            if "w4a8" in schemes:
                check_w4a8(layer.shape[1])
        except UsageError as e:
            e.got = f"{layer.name}: {e.got}"
            raise


# ---- single limits of an NPU --------------------------------------------------------------------


def check_dtype(scheme: str, dtype: str) -> None:
    """Raise UsageError (E-USE-01) for a dtype that the quantizer of `scheme` does not take."""
    if scheme in _BFLOAT16_ONLY and dtype != NPU_DTYPES[0]:
        raise UsageError(
            f"an activation in {dtype} for {scheme}",
            needs="bfloat16, the output dtype of this matmul of an NPU",
            fix="--set dtype=bfloat16",
        )
    if dtype not in NPU_DTYPES:
        raise UsageError(
            f"an activation in {dtype} for {scheme}",
            needs="bfloat16 or float16, which the quantizers of an NPU take",
            fix="--set dtype=bfloat16",
        )


def check_rule(scheme: str, rule: str) -> None:
    """Raise UsageError (E-USE-01) for a scale rule that the quantizer of `scheme` does not have."""
    supported = lookup(scheme_of(scheme).activation).npu_rules
    if rule.split(":")[0] not in [name.rstrip(":") for name in supported]:
        raise UsageError(
            f"scale rule {rule!r} for an activation in {scheme} on an NPU",
            needs=", ".join(f"{name}<6 to 12>" if name.endswith(":") else name for name in supported),
            fix="omit the rule",
        )


def check_weight(scheme: str, n: int, k: int) -> None:
    """Raise UsageError (E-QNT-01) for a shape [N, K] that the matmul of `scheme` does not take.

    FP4 matmuls read two elements per byte along K. A partial last block of 32 is supported.
    """
    if lookup(scheme).packed and (k % 2 or k <= 2 or n < 2):
        raise UsageError(
            f"a weight of N = {n} and K = {k} in {scheme}",
            needs="an even K above 2 and N above 1 for the FP4 matmuls of an NPU",
            fix="exclude this layer with --keep PATTERN, or use a recipe with mxfp8 for it",
            code="E-QNT-01",
        )


def check_w4a8(k: int) -> None:
    """Raise UsageError (E-QNT-01) for a K that the W4A8 matmul does not take."""
    if k % W4A8_K:
        raise UsageError(
            f"K = {k} in w4a8",
            needs=f"a multiple of {W4A8_K} for the W4A8 matmul of an NPU",
            fix="use --step-policy default:w4a4, or exclude this layer with --keep PATTERN",
            code="E-QNT-01",
        )
