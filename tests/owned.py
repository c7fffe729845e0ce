"""Weight files as other tools write them, with their values from a float64 oracle.

`INPUTS` are files that are read, `REFUSED` files that are not. The oracle multiplies stored numbers and
scales in float64 and rounds to BF16; it does not use ascendit.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ascendit.names import expected_tensors, to_wan

CONFIG: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 144,
    "num_layers": 1,
}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0, torch.float8_e4m3fnuz: 240.0, torch.float8_e5m2fnuz: 57344.0}
Tensors = dict[str, Tensor]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Owned:
    """One file: its tensors, and the values that reading gives, by Diffusers name."""

    tensors: Tensors
    values: Tensors
    """BF16 or as stored; of layers in a scheme, the decoded weight in float32."""
    kinds: tuple[str, ...]
    schemes: dict[str, str] = field(default_factory=dict)
    """Layer -> scheme after reading, for layers that stay quantized."""
    metadata: dict[str, str] | None = None
    config: dict[str, Any] | None = None

    def write(self, path: Path) -> Path:
        """Write the file, and config.json beside it if there is one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in self.tensors.items()}, path, metadata=self.metadata)
        if self.config is not None:
            (path.parent / "config.json").write_text(json.dumps(self.config))
        return path


def base() -> Tensors:
    """Random BF16 weights by Diffusers names, in a new dict."""
    return dict(_base())


@functools.cache
def _base() -> Tensors:
    generator = torch.Generator().manual_seed(11)
    shapes = expected_tensors(CONFIG)
    return {n: (0.3 * torch.randn(s, generator=generator)).to(torch.bfloat16) for n, s in shapes.items()}


def is_layer(name: str) -> bool:
    """Whether `name` is the weight of a linear layer in a block."""
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def bf16(values: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """The oracle: the product in float64, rounded to BF16."""
    factor = scale if isinstance(scale, float) else scale.double().reshape(-1, *[1] * (values.ndim - 1))
    return (values.to(torch.float64) * factor).to(torch.bfloat16)


def renamed(owned: Owned, rename: Callable[[str], str]) -> Owned:
    """The same file with other names of its tensors."""
    owned.tensors = {rename(name): tensor for name, tensor in owned.tensors.items()}
    return owned


def wan(name: str) -> str:
    """The original Wan name, also of tensors beside a weight."""
    stem, _, role = name.rpartition(".")
    if not stem:
        return to_wan(name) or name
    return to_wan(name) or f"{(to_wan(stem + '.weight') or name).removesuffix('.weight')}.{role}"


# ---- fp8 ------------------------------------------------------------------------------------------


def plain(dtype: Any = E4M3, choose: Callable[[str], bool] = is_layer) -> Owned:
    """Cast without scales. `dtype`: one dtype, or name -> dtype."""
    dtypes = dtype if callable(dtype) else lambda name: dtype
    tensors = {n: t.to(dtypes(n)) if choose(n) else t for n, t in base().items()}
    fp8 = [n for n, t in tensors.items() if t.dtype in LARGEST]
    return Owned(tensors, {n: bf16(t) if n in fp8 else t for n, t in tensors.items()}, ("fp8",))


def scaled(
    dtype: Any = E4M3,
    *,
    role: str = "scale_weight",
    shape: str = "[]",
    scale_dtype: torch.dtype = torch.float32,
    marker: Tensor | None = None,
    inputs: str = "",
    choose: Callable[[str], bool] = is_layer,
    kind: str = "comfy-scaled-fp8",
) -> Owned:
    """Scaled fp8: `shape` of the scale is [], [1], [N] or [N, 1]."""
    tensors: Tensors = {}
    values: Tensors = {}
    for name, tensor in base().items():
        if not choose(name):
            tensors[name] = values[name] = tensor
            continue
        layer, rows = name.removesuffix(".weight"), tensor.shape[0]
        dims = {"[]": (), "[1]": (1,), "[N]": (rows,), "[N, 1]": (rows, 1)}[shape]
        amax = tensor.float().abs().amax(1) if "N" in shape else tensor.float().abs().amax()
        scale = (amax / LARGEST[dtype]).reshape(dims).to(scale_dtype)
        factor = scale.float().reshape(-1, 1)
        tensors[name] = (tensor.float() / factor).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
        tensors[f"{layer}.{role}"] = scale
        values[name] = bf16(tensors[name], scale)
        if inputs:
            tensors[f"{layer}.{inputs}"] = torch.tensor(0.125)
    if marker is not None:
        tensors["scaled_fp8"] = marker
    return Owned(tensors, values, (kind,))


def comfy(
    dtype: Any = E4M3,
    *,
    header: str = "",
    bytes_only: bool = False,
    entry: dict[str, Any] | None = None,
    **options: Any,
) -> Owned:
    """comfy_quant: a JSON entry for each layer in a tensor, or in the `header` with this prefix."""
    owned = scaled(dtype, role="weight_scale", kind="comfy-quant-fp8", **options)
    layers = [n.removesuffix(".weight_scale") for n in owned.tensors if n.endswith(".weight_scale")]
    name = "float8_e4m3fn" if dtype == E4M3 else "float8_e5m2"
    text = json.dumps({"format": name} | (entry or {}))
    for layer in layers:
        if bytes_only:
            owned.tensors[f"{layer}.weight"] = owned.tensors[f"{layer}.weight"].view(torch.uint8)
        if not header:
            owned.tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    if header:
        entries = {f"{header.strip('-')}{layer}": json.loads(text) for layer in layers}
        owned.metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": entries})}
    return owned


def some(*parts: str) -> Callable[[str], bool]:
    """Layers with one of these parts in their name."""
    return lambda name: is_layer(name) and any(part in name for part in parts)


def scheme_fp8(**options: Any) -> Owned:
    """Per-layer `weight_scale` without marks of ComfyUI: scheme fp8."""
    inputs = options.get("inputs", "")
    owned = scaled(role="weight_scale", kind="static-fp8", **options)
    owned.kinds = ("static-fp8",) if inputs else ()
    for name in [n for n in owned.values if is_layer(n)]:
        layer = name.removesuffix(".weight")
        scale = owned.tensors[f"{layer}.weight_scale"].double().reshape(-1, 1)
        owned.values[name] = (owned.tensors[name].double() * scale).float()
        owned.schemes[layer] = "fp8"
    return owned


def static_int8() -> Owned:
    """int8 with one scale per row, and a static scale of activations."""
    owned, generator = Owned(base(), base(), ("static-int8",)), torch.Generator().manual_seed(5)
    for name in filter(is_layer, base()):
        n, k = owned.values[name].shape
        layer = name.removesuffix(".weight")
        q = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        scale = torch.rand(n, 1, generator=generator) + 0.1
        owned.tensors |= {name: q, f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(0.5)}
        owned.values[name] = (q.double() * scale).float()
        owned.schemes[layer] = "int8"
    return owned


def with_(owned: Owned, **tensors: Tensor) -> Owned:
    """With other tensors; `__` in a name is a dot."""
    owned.tensors |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return owned


def fp8_beside_scaled() -> Owned:
    """A scaled file whose bias and norm are plain fp8."""
    owned = scaled(marker=torch.zeros(2, dtype=E4M3))
    for name in ("blocks.0.attn1.to_q.bias", "blocks.0.attn1.norm_q.weight"):
        owned.tensors[name] = owned.tensors[name].to(E4M3)
        owned.values[name] = bf16(owned.tensors[name])
    return owned


def scaled_float() -> Owned:
    """A scaled file with a BF16 weight that has a scale."""
    owned = scaled()
    name = "blocks.0.attn1.to_v"
    weight, scale = base()[f"{name}.weight"], torch.tensor(1.7)
    owned.tensors |= {f"{name}.weight": weight, f"{name}.scale_weight": scale}
    owned.values[f"{name}.weight"] = bf16(weight, scale)
    return owned


def every_byte() -> Owned:
    """All finite e4m3 numbers, in a weight [128, 128]."""
    owned = plain()
    numbers = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F] * 65, dtype=torch.uint8)
    weight = numbers[: 128 * 128].view(E4M3).view(128, 128)
    name = "blocks.0.attn2.to_q.weight"
    owned.tensors[name], owned.values[name] = weight, bf16(weight)
    return owned


def mixed(name: str) -> torch.dtype:
    """Another dtype for each name."""
    dtypes = (E4M3, torch.bfloat16, torch.float16, torch.float32, E5M2)
    return dtypes[sum(name.encode()) % len(dtypes)]


# ---- FP4, TurboDiffusion, several parts -----------------------------------------------------------

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def mxfp4(e8m0: bool) -> Owned:
    """F4 weights [N, K], the even index in the low nibble, with one E8M0 scale per 32."""
    owned, generator = Owned(base(), base(), ("mxfp4-f4",)), torch.Generator().manual_seed(3)
    for name in filter(is_layer, base()):
        n, k = owned.values[name].shape
        packed = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
        scale = torch.randint(110, 130, (n, -(-k // 32)), generator=generator, dtype=torch.uint8)
        numbers = torch.stack([packed & 15, packed >> 4], -1).view(n, k)
        factor = torch.exp2(scale.double() - 127).repeat_interleave(32, 1)[:, :k]
        layer = name.removesuffix(".weight")
        owned.tensors[name] = packed.view(torch.float4_e2m1fn_x2)
        owned.tensors[f"{layer}.weight_scale"] = scale.view(torch.float8_e8m0fnu) if e8m0 else scale
        owned.values[name] = (E2M1[numbers.long()] * factor).float()
        owned.schemes[layer] = "mxfp4"
    return owned


def turbodiffusion(*, quantize: bool = True, attention: bool = True) -> Owned:
    """Wan names, int8 blocks of 128 x 128, a patch embedding as a linear layer, sparse-linear attention."""
    owned = Owned({}, base(), ("turbodiffusion",))
    for name, tensor in base().items():
        if quantize and is_layer(name):
            layer = name.removesuffix(".weight")
            n, k = tensor.shape
            generator = torch.Generator().manual_seed(k)
            q = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
            scale = torch.rand(-(-n // 128), -(-k // 128), generator=generator) + 0.1
            blocks = scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
            owned.tensors |= {f"{layer}.int8_weight": q, f"{layer}.scale": scale}
            owned.values[name] = (q.double() * blocks).float()
            owned.schemes[layer] = "int8_block"
        else:
            owned.tensors[name] = tensor
    owned = renamed(owned, wan)
    patch = owned.tensors["patch_embedding.weight"]
    owned.tensors["patch_embedding.weight"] = patch.reshape(patch.shape[0], -1)
    if attention:
        local = "blocks.0.self_attn.attn_op.local_attn.proj_l"
        owned.tensors |= {f"{local}.weight": torch.ones(128, 128), f"{local}.bias": torch.ones(128)}
    return owned


def all_in_one(owned: Owned) -> Owned:
    """With a VAE and a text encoder in the same file."""
    owned = renamed(owned, lambda name: f"model.diffusion_model.{name}")
    owned.tensors |= {
        "vae.conv1.weight": torch.ones(2, 2),
        "text_encoders.umt5xxl.transformer.x": torch.ones(2),
    }
    owned.kinds = ("all-in-one", *owned.kinds)
    return owned


def floats(rename: Callable[[str], str]) -> Owned:
    """A float file with other names."""
    return renamed(Owned(base(), base(), ()), rename)


INPUTS: dict[str, Callable[[], Owned]] = {
    "plain e4m3": plain,
    "plain e5m2": lambda: plain(E5M2),
    "plain e4m3fnuz": lambda: plain(torch.float8_e4m3fnuz),
    "plain, all tensors": lambda: plain(choose=lambda name: True),
    "plain e5m2, all tensors": lambda: plain(E5M2, lambda name: True),
    "plain, one layer": lambda: plain(choose=some("attn1.to_q")),
    "plain, five dtypes": lambda: plain(mixed, lambda name: True),
    "plain, Wan names": lambda: renamed(plain(), wan),
    "plain, ComfyUI prefix": lambda: renamed(plain(), lambda n: f"model.diffusion_model.{wan(n)}"),
    "plain, config": lambda: replace(plain(), config=CONFIG),
    "plain, every finite number": every_byte,
    "scaled, marker": lambda: scaled(marker=torch.zeros(2, dtype=E4M3)),
    "scaled, empty marker": lambda: scaled(marker=torch.zeros(0, dtype=E4M3)),
    "scaled, float32 marker": lambda: scaled(marker=torch.zeros((), dtype=torch.float32)),
    "scaled [1]": lambda: scaled(shape="[1]", marker=torch.zeros(2, dtype=E4M3)),
    "scaled [N]": lambda: scaled(shape="[N]"),
    "scaled [N, 1]": lambda: scaled(shape="[N, 1]"),
    "scaled, BF16 scale": lambda: scaled(scale_dtype=torch.bfloat16),
    "scaled, F16 scale": lambda: scaled(shape="[N]", scale_dtype=torch.float16),
    "scaled, F64 scale": lambda: scaled(scale_dtype=torch.float64),
    "scaled, scale_input": lambda: scaled(inputs="scale_input", marker=torch.zeros(2, dtype=E4M3)),
    "scaled e5m2": lambda: scaled(E5M2, marker=torch.zeros(2, dtype=E5M2)),
    "scaled, ComfyUI prefix": lambda: renamed(
        scaled(marker=torch.zeros(2, dtype=E4M3)), lambda n: f"model.diffusion_model.{n}"
    ),
    "scaled, Wan names": lambda: renamed(scaled(), wan),
    "scaled, some layers": lambda: scaled(choose=some("ffn")),
    "scaled, fp8 bias and norm": fp8_beside_scaled,
    "scaled, BF16 weight": scaled_float,
    "comfy_quant": comfy,
    "comfy_quant e5m2": lambda: comfy(E5M2),
    "comfy_quant, input_scale": lambda: comfy(inputs="input_scale"),
    "comfy_quant, uint8 weights": lambda: comfy(bytes_only=True),
    "comfy_quant, per row": lambda: comfy(shape="[N, 1]"),
    "comfy_quant, some layers": lambda: comfy(choose=some("attn2")),
    "comfy_quant, more keys": lambda: comfy(entry={"full_precision_matrix_mult": True}),
    "comfy_quant, header": lambda: comfy(header="-"),
    "comfy_quant, header with prefix": lambda: comfy(header="model.diffusion_model."),
    "comfy_quant, header and uint8": lambda: comfy(header="-", bytes_only=True),
    "weight_scale e5m2": lambda: scaled(E5M2, role="weight_scale", shape="[N, 1]", kind="scaled-e5m2"),
    "weight_scale []": scheme_fp8,
    "weight_scale [N, 1]": lambda: scheme_fp8(shape="[N, 1]"),
    "input_scale": lambda: scheme_fp8(inputs="input_scale"),
    "input_scale, config": lambda: replace(
        scheme_fp8(inputs="input_scale"),
        config=CONFIG | {"quantization_config": {"quant_method": "modelopt"}},
    ),
    "input_scale, attention": lambda: with_(
        scheme_fp8(inputs="input_scale"),
        blocks__0__attn1__q_bmm_quantizer__scale=torch.ones(()),
        blocks__0__attn1__k_scale=torch.ones(()),
    ),
    "states and rotary tables": lambda: with_(
        floats(str),
        blocks__0__attn1__norm_q___extra_state=torch.zeros(0, dtype=torch.uint8),
        freqs=torch.zeros(4, 2, dtype=torch.complex64),
        rope__freqs_cos=torch.zeros(4, 2, dtype=torch.float64),
    ),
    "int8, input_scale": static_int8,
    "MXFP4 in F4, U8": lambda: mxfp4(False),
    "MXFP4 in F4, E8M0": lambda: mxfp4(True),
    "TurboDiffusion": turbodiffusion,
    "TurboDiffusion, dense": lambda: turbodiffusion(attention=False),
    "TurboDiffusion, BF16": lambda: turbodiffusion(quantize=False),
    "rCM": lambda: turbodiffusion(quantize=False, attention=False),
    "TurboDiffusion, net.": lambda: renamed(turbodiffusion(), lambda n: f"net.{n}"),
    "all in one, BF16": lambda: all_in_one(floats(wan)),
    "all in one, fp8": lambda: all_in_one(renamed(plain(), wan)),
    "all in one, scaled": lambda: all_in_one(renamed(scaled(marker=torch.zeros(2, dtype=E4M3)), wan)),
    "ema only": lambda: floats(lambda n: f"ema.{n}"),
    "module.": lambda: floats(lambda n: f"module.{n}"),
    "model.": lambda: floats(lambda n: f"model.{wan(n)}"),
    "_orig_mod.module.": lambda: floats(lambda n: f"_orig_mod.module.{n}"),
    "module._orig_mod.transformer.": lambda: floats(lambda n: f"module._orig_mod.transformer.{n}"),
    "dit.": lambda: floats(lambda n: f"dit.{n}"),
    "base_layer": lambda: floats(lambda n: n.replace("to_q.", "to_q.base_layer.")),
    "wrapped blocks": lambda: floats(
        lambda n: f"_fsdp_wrapped_module.{n}".replace("s.0.", "s.0._checkpoint_wrapped_module._orig_mod.")
    ),
}
"""Name -> a file that is read."""


def quantizer(change: Callable[[Tensors, str], None], config: dict[str, Any] | None = None) -> Owned:
    """A file in which `change` has replaced each layer."""
    owned = Owned(base(), {}, ())
    for name in filter(is_layer, base()):
        change(owned.tensors, name)
    owned.config = CONFIG | {"quantization_config": config} if config else None
    return owned


def roles(**tensors: Any) -> Callable[[Tensors, str], None]:
    """Replace a weight by tensors with these roles; `weight__x` is `weight.x`; values are dtypes."""

    def change(stored: Tensors, name: str) -> None:
        shape = stored.pop(name).shape
        layer = name.removesuffix(".weight")
        stored |= {f"{layer}.{r.replace('__', '.')}": torch.ones(shape).to(d) for r, d in tensors.items()}

    return change


U8, I8, F32 = torch.uint8, torch.int8, torch.float32
QUERY = "blocks__0__attn1__to_q"
REFUSED: dict[str, tuple[Callable[[], Owned], str, str]] = {
    "bitsandbytes nf4": (
        lambda: quantizer(
            roles(
                weight=U8,
                weight__absmax=F32,
                weight__quant_state__bitsandbytes__nf4=U8,
            )
        ),
        "E-CKP-04",
        "bitsandbytes",
    ),
    "bitsandbytes int8": (lambda: quantizer(roles(weight=I8, SCB=F32)), "E-CKP-04", "bitsandbytes"),
    "bitsandbytes by config": (
        lambda: quantizer(roles(weight=U8), {"quant_method": "bitsandbytes"}),
        "E-CKP-04",
        "bitsandbytes",
    ),
    "eetq by config": (
        lambda: quantizer(roles(weight=I8), {"quant_method": "eetq"}),
        "E-CKP-04",
        "quantized by eetq (config.json)",
    ),
    "scaled by config": (
        lambda: quantizer(roles(weight=I8, weight_scale=F32), {"quant_method": "Quark"}),
        "E-CKP-04",
        "quantized by Quark (config.json)",
    ),
    "marlin": (lambda: quantizer(roles(B=torch.int32, s=F32)), "E-CKP-04", "Marlin"),
    "aqlm": (lambda: quantizer(roles(codes=I8, codebooks=F32, scales=F32)), "E-CKP-04", "AQLM"),
    "eetq": (lambda: quantizer(roles(weight=I8, weight_scales=F32)), "E-CKP-04", "to_q.weight_scales"),
    "fp8, scale": (lambda: quantizer(roles(weight=E4M3, scale=F32)), "E-CKP-04", "to_q.scale"),
    "fp8, weight.scale": (
        lambda: quantizer(roles(weight=E4M3, weight__scale=F32)),
        "E-CKP-04",
        "another tool, with scales of other names: blocks.0.attn1.to_k.weight.scale",
    ),
    "modelopt": (
        lambda: quantizer(roles(weight=F32, weight_quantizer___amax=F32, weight_quantizer___scale=F32)),
        "E-CKP-04",
        "modelopt",
    ),
    "quanto": (lambda: quantizer(roles(weight___data=I8, weight___scale=F32)), "E-CKP-04", "quanto"),
    "torchao": (lambda: quantizer(roles(_weight_qdata=I8, _weight_scale=F32)), "E-CKP-04", "torchao"),
    "torchao, flattened": (
        lambda: quantizer(roles(**{"weight:qdata": E4M3, "weight:scale": F32})),
        "E-CKP-04",
        "torchao",
    ),
    "nunchaku": (
        lambda: quantizer(roles(qweight=I8, wscales=F32, proj_down=F32, smooth_factor=F32)),
        "E-CKP-04",
        "nunchaku",
    ),
    "gptq": (lambda: quantizer(roles(qweight=I8, qzeros=I8, scales=F32)), "E-CKP-04", "GPTQ or AWQ"),
    "compressed-tensors": (
        lambda: quantizer(roles(weight_packed=I8, weight_scale=F32, weight_shape=torch.int64)),
        "E-CKP-04",
        "compressed-tensors",
    ),
    "nvfp4": (
        lambda: quantizer(roles(weight=U8, weight_scale=E4M3, weight_scale_2=F32)),
        "E-CKP-04",
        "NVFP4",
    ),
    "nvfp4 without global scale": (
        lambda: quantizer(roles(weight=U8, weight_scale=E4M3)),
        "E-CKP-04",
        "NVFP4",
    ),
    "hqq": (lambda: quantizer(roles(W_q=U8, meta=F32)), "E-CKP-04", "HQQ"),
    "sdnq": (lambda: quantizer(roles(weight=I8, scale=F32)), "E-CKP-04", "SDNQ"),
    "comfy_quant nvfp4": (lambda: comfy(entry={"format": "nvfp4"}), "E-CKP-04", "comfy_quant nvfp4"),
    "comfy_quant mxfp8": (lambda: comfy(header="-", entry={"format": "mxfp8"}), "E-CKP-04", "mxfp8"),
    "comfy_quant convrot": (
        lambda: comfy(entry={"format": "int8_tensorwise", "convrot": True}),
        "E-CKP-04",
        "int8_tensorwise convrot",
    ),
    "comfy_quant, not JSON": (
        lambda: with_(comfy(), **{f"{QUERY}__comfy_quant": torch.zeros(4, dtype=U8)}),
        "E-CKP-06",
        "attn1.to_q.comfy_quant does not describe a layer",
    ),
    "comfy_quant, other dtype": (
        lambda: with_(comfy(E5M2, entry={"format": "float8_e4m3fn"})),
        "E-CKP-08",
        "its format is F8_E4M3",
    ),
    "marker without scales": (
        lambda: with_(plain(), scaled_fp8=torch.zeros(2, dtype=E4M3)),
        "E-CKP-08",
        "ComfyUI scaled fp8",
    ),
    "scale without weight": (
        lambda: with_(scaled(), blocks__7__x__scale_weight=torch.ones(())),
        "E-CKP-08",
        "blocks.7.x.scale_weight has no weight",
    ),
    "weight without scale": (
        lambda: (o := scaled(), o.tensors.pop("blocks.0.attn1.to_q.scale_weight"))[0],
        "E-CKP-08",
        "blocks.0.attn1.to_q.weight (F8_E4M3) has no scale",
    ),
    "input scale alone": (
        lambda: (
            o := scaled(inputs="scale_input"),
            o.tensors.pop("blocks.0.attn1.to_q.scale_weight"),
        )[0],
        "E-CKP-08",
        "blocks.0.attn1.to_q.weight (F8_E4M3) has no scale",
    ),
    "scale per block": (
        lambda: with_(scaled(), **{f"{QUERY}__scale_weight": torch.ones(2, 2)}),
        "E-CKP-08",
        "is F32 [2, 2], not one float, or one for each of 128 rows",
    ),
    "two scales": (
        lambda: with_(scaled(), **{f"{QUERY}__weight_scale": torch.ones(())}),
        "E-CKP-08",
        "has both scale_weight and weight_scale",
    ),
    "optimizer": (
        lambda: with_(floats(str), optimizer__state__0=torch.ones(3)),
        "E-CKP-04",
        "1 tensor under optimizer.",
    ),
    "weights and ema": (
        lambda: (o := floats(str), o.tensors.update({f"ema.{n}": t + 0 for n, t in base().items()}))[0],
        "E-CKP-04",
        "tensors under ema.",
    ),
    "two prefixes": (
        lambda: with_(floats(str), **{f"model__{QUERY}__weight": torch.ones(128, 128)}),
        "E-CKP-09",
        "both map to blocks.0.attn1.to_q.weight",
    ),
    "TurboDiffusion, two weights": (
        lambda: with_(turbodiffusion(), blocks__0__self_attn__q__weight=torch.ones(128, 128)),
        "E-CKP-09",
        "has both",
    ),
    "a LoRA": (
        lambda: Owned(
            {f"{QUERY}.lora_{x}.weight".replace("__", "."): torch.ones(2, 2) for x in "AB"}, {}, ()
        ),
        "E-CKP-01",
        "is a LoRA: blocks.0.attn1.to_q.lora_A.weight",
    ),
    "a LoRA of kohya": (
        lambda: Owned(
            {f"lora_unet_blocks_0_ffn_0.{x}": torch.ones(2, 2) for x in ("hada_w1_a", "alpha")}, {}, ()
        ),
        "E-CKP-01",
        "is a LoRA: lora_unet_blocks_0_ffn_0.hada_w1_a",
    ),
    "a model with a LoRA": (
        lambda: with_(floats(str), blocks__0__attn1__to_q__lora_A__default__weight=torch.ones(2, 2)),
        "E-CKP-01",
        "has a LoRA beside its weights: blocks.0.attn1.to_q.lora_A.default.weight",
    ),
    "a VACE module": (
        lambda: Owned({"vace_blocks.0.ffn.0.weight": torch.ones(2, 2)}, {}, ()),
        "E-CKP-01",
        "is a VACE module without its transformer",
    ),
    "TAEHV": (
        lambda: Owned({"decoder.1.weight": torch.ones(2, 2), "encoder.0.bias": torch.ones(2)}, {}, ()),
        "E-CKP-01",
        "is a tiny autoencoder (TAEHV)",
    ),
    "no Wan names": (
        lambda: renamed(plain(), lambda n: f"unknown.{n}"),
        "E-CKP-01",
        "is not a Wan transformer",
    ),
}
"""Name -> (file, code of its error, text in it)."""
