"""The format of output folders: ascendit's own (`--to diffusers`, `--to wan`) and of each engine.

Does not import torch.

From the source of the wheels of vLLM-Omni 0.30.0, SGLang 0.5.23 and MindIE-SD 3.1.0; not run on a card:

vllm-omni   Diffusers names, separate Q, K and V. FP4 as one e4m3 element per value: its parameter is [N, K].
            int8 without `weight_offset`. Dual-scale layers must have a `mul_scale`, because it creates an
            uninitialized one and fails if the file has none; so ones are written. It reads only
            `quantization_config` in each expert's config.json.
sglang      Diffusers names, also in `quant_model_description.json`. Packed FP4. int8 with `weight_offset`. It
            loads `mul_scale` only if the manifest lists `<layer>.div.mul_scale` too. The manifest overrides
            config.json, which is written without `quantization_config`.
mindie      Original Wan names, smoothed layers as `<layer>.linear.*` and `<layer>.div.mul_scale`. One weight
            file and a manifest, both named after `model_quant_type`; both are rejected if they are links or
            readable by users other than owner and group (0o640). Layers that are not quantized are read from
            the float checkpoint.

`quant.engines.ENGINES` lists the schemes and layers that an engine cannot load in any format.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ascendit.checkpoint.component import STEM, WAN_FOLDERS
from ascendit.checkpoint.quant_metadata import CONFIG_KEY, FLOAT, MANIFEST_FILE, manifest_for
from ascendit.checkpoint.writer import TensorSpec
from ascendit.errors import UsageError
from ascendit.family import Task, WanConfig
from ascendit.names import ROLES, Naming, is_block_linear, sort_names, to_wan
from ascendit.quant.engines import ENGINES, engines_for
from ascendit.quant.fusion import fused_with
from ascendit.quant.schemes import QUANTIZED, SCHEMES, STORED_SCHEMES


@dataclass(frozen=True, kw_only=True)
class TargetFormat:
    """The names, dtypes and files of an output folder. Methods take and return Diffusers names by default."""

    naming: Naming = "diffusers"
    engine: str | None = None
    unpacked: bool = False
    """FP4 as one e4m3 element per value."""
    offset: bool = True
    """int8 layers have a `weight_offset`."""
    unit_mul_scale: tuple[str, ...] = ()
    """Schemes whose layers get a `mul_scale` of ones if they have none."""
    manifest_only: bool = False
    """No `quantization_config` in config.json; the manifest also lists `<layer>.div.mul_scale`."""
    export: bool = False
    """The format of msModelSlim exports: smoothed layers as `.linear.` and `.div.`; one weight file and a
    manifest, named after `model_quant_type`, not readable by other users; a configuration.json."""

    def folder(self, expert: str, experts: int) -> str:
        """Folder of expert `transformer` or `transformer_2` in the output, `.` for the output itself."""
        if self.naming == "diffusers":
            return expert
        return WAN_FOLDERS[expert] if experts > 1 else "."

    def file_names(self, quant_type: str) -> tuple[str, str]:
        """(prefix of the weight files, name of the manifest)."""
        suffix = quant_type.lower()
        if self.export:
            return f"quant_model_weight_{suffix}", f"quant_model_description_{suffix}.json"
        return STEM, MANIFEST_FILE

    def packing(self, scheme: str) -> str:
        """`packed` or `e4m3` for FP4, `plain` for all other schemes."""
        if not STORED_SCHEMES[scheme].packed:
            return "plain"
        return "e4m3" if self.unpacked else "packed"

    def on_disk(self, name: str, smoothed: Collection[str]) -> str:
        """The stored name, unchanged if Wan has no such name. `smoothed`: layers with a `mul_scale`."""
        if self.naming == "diffusers":
            return name
        layer, _, role = name.rpartition(".")
        if self.export and layer in smoothed and role in ROLES:
            return f"{to_wan(layer) or layer}.{'div' if role == 'mul_scale' else 'linear'}.{role}"
        return to_wan(name) or name

    def manifest(
        self,
        layers: Mapping[str, str],
        names: Sequence[str],
        attention: Mapping[str, str],
        source_entries: Mapping[str, str],
    ) -> dict[str, str]:
        """The manifest with the stored names; arguments as in `checkpoint.quant_metadata.manifest_for`."""
        smoothed = {name.removesuffix(".mul_scale") for name in names if name.endswith(".mul_scale")}
        entries = manifest_for(layers, names, attention, source_entries)
        quant_type = entries.pop("model_quant_type")
        manifest = {self.on_disk(name, smoothed): value for name, value in entries.items()}
        if self.manifest_only:
            manifest |= {f"{name}.div.mul_scale": FLOAT for name in sort_names(smoothed)}
        return manifest | {"model_quant_type": quant_type}

    def config(self, config: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> dict[str, Any]:
        """The content of config.json, of a WanTransformer3DModel or an original WanModel."""
        written = {key: value for key, value in config.items() if key != CONFIG_KEY}
        if self.naming == "wan":
            return wan_config(written)
        return written | ({CONFIG_KEY: dict(quantization)} if quantization and not self.manifest_only else {})


CANONICAL = TargetFormat()
"""The format that ascendit loads, and that `quantize` and `repack` write without --for and --to."""


def layer_specs(
    name: str,
    scheme: str,
    shape: tuple[int, ...],
    *,
    bias: bool,
    mul_scale: bool = False,
    float_dtype: str = "BF16",
    target: TargetFormat = CANONICAL,
) -> list[TensorSpec]:
    """Return the tensors of the linear layer `name`, in write order.

    `shape`: (N, K) of the decoded weight. `scheme`: a key of `quant.schemes.SCHEMES`. `float_dtype`: dtype of
    weight and bias in a layer that is not quantized; the bias of a quantized layer is float32.
    """
    n, k = shape
    row = SCHEMES[scheme]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": (float_dtype, (n, k)),
        "mul_scale": ("F32", (k,)),
        "bias": ("F32" if row.weight else float_dtype, (n,)),
    }
    tensors |= row.tensors(n, k)
    if target.packing(scheme) == "e4m3":
        tensors["weight"] = ("F8_E4M3", (n, k))
    roles = [role for role in row.roles if target.offset or role != "weight_offset"]
    roles += ["mul_scale"] * (mul_scale or scheme in target.unit_mul_scale) + ["bias"] * bias
    return [TensorSpec(f"{name}.{role}", *tensors[role]) for role in roles]


ENGINE_FORMATS: dict[str, TargetFormat] = {
    "vllm-omni": TargetFormat(
        engine="vllm-omni", unpacked=True, offset=False, unit_mul_scale=("mxfp4_dualscale",)
    ),
    "sglang": TargetFormat(engine="sglang", manifest_only=True),
    "mindie": TargetFormat(engine="mindie", naming="wan", export=True),
}


def target_format(engine: str | None, to: str | None = None) -> TargetFormat:
    """The format of `--for` and `--to`.

    Raises UsageError (E-USE-01) if one is unknown or they are incompatible.
    """
    namings = {None: ("diffusers", "wan"), "mindie": ("wan",)}.get(engine, ("diffusers",))
    if engine is not None and engine not in ENGINE_FORMATS:
        raise UsageError(
            f"--for {engine}",
            needs=f"one of {', '.join(ENGINE_FORMATS)}",
            fix="omit --for to write ascendit's own format",
        )
    if to is not None and to not in namings:
        reader = f"{engine} {ENGINES[engine].version} reads" if engine else "ascendit writes"
        raise UsageError(
            f"--to {to}" + (f" with --for {engine}" if engine else ""),
            needs=f"{' or '.join(namings)}: {reader} these names",
            fix=f"--to {namings[0]}, or omit --to",
        )
    if engine is not None:
        return ENGINE_FORMATS[engine]
    return TargetFormat(naming="wan") if to == "wan" else CANONICAL


# ---- checks of an engine ------------------------------------------------------------------------


def traits_of(
    layers: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], smoothing: Mapping[str, object]
) -> frozenset[str]:
    """Return the properties of a checkpoint that engines check: schemes, and other keys of `Engine.refuses`.

    `layers`: all linear layers of the blocks, and others that are quantized or smoothed -> scheme. `shapes`:
    (N, K) of the quantized layers. `smoothing`: layer -> its `mul_scale`, in any type that compares equal.
    """
    quantized = {name: scheme for name, scheme in layers.items() if scheme != "bf16"}
    block_linears = {name for name in layers if is_block_linear(name)}
    traits = {*layers.values(), *(f"smoothed:{layers.get(name, 'bf16')}" for name in smoothing)}
    if block_linears - quantized.keys():
        traits.add("float_block_linears")
    if quantized.keys() - block_linears:
        traits.add("outside_blocks")
    if any(name.endswith((".add_k_proj", ".add_v_proj")) for name in layers):
        traits.add("added_kv")
    if any(len({layers.get(other) for other in fused_with(name)}) > 1 for name in block_linears):
        traits.add("split_qkv")
    if any(len({smoothing.get(other) for other in fused_with(name)}) > 1 for name in smoothing):
        traits.add("unlike_qkv")
    for name, scheme in quantized.items():
        if (block := SCHEMES[scheme].block) and -(-shapes[name][1] // block) % 2:
            traits.add(f"odd_blocks:{scheme}")
    return frozenset(traits)


def check_engine(engine: str | None, traits: frozenset[str], expert: str) -> None:
    """Raise UsageError (E-ENG-01) if `engine` cannot run an expert with these traits."""
    reasons = engines_for(traits)
    if engine is None or not (reason := reasons[engine]):
        return
    others = ", ".join(name for name, problem in reasons.items() if not problem)
    schemes = ", ".join(sorted(traits.intersection(QUANTIZED))) or "no quantized layer"
    program = f"{engine} {ENGINES[engine].version}"
    raise UsageError(
        f"{program} cannot run {expert} ({schemes}): {reason}",
        needs=f"layers that {program} can load",
        fix="omit --for to write ascendit's own format" + (f"; {others} can run it" if others else ""),
        code="E-ENG-01",
    )


# ---- config.json of the original models ---------------------------------------------------------


def wan_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of an original WanModel. Patch size and text width are omitted: the shapes define them."""
    heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
    written = {
        "_class_name": "WanModel",
        "_diffusers_version": config.get("_diffusers_version"),
        "dim": heads * size if heads and size else None,
        "eps": config.get("eps", WanConfig.eps),
        "ffn_dim": config.get("ffn_dim"),
        "freq_dim": config.get("freq_dim"),
        "in_dim": config.get("in_channels"),
        "model_type": model_kind(config),
        "num_heads": heads,
        "num_layers": config.get("num_layers"),
        "out_dim": config.get("out_channels"),
        "text_len": 512,
    }
    return {key: value for key, value in written.items() if value is not None}


def task_config(config: Mapping[str, Any]) -> dict[str, str]:
    """The content of configuration.json, as in the original models."""
    task = "image-to-video" if model_kind(config) == "i2v" else "text-to-video-synthesis"
    return {"framework": "Pytorch", "task": task}


def model_kind(config: Mapping[str, Any]) -> Task:
    """t2v, i2v or ti2v, from the image layers and the numbers of channels."""
    if config.get("image_dim") or config.get("added_kv_proj_dim"):
        return "i2v"
    channels, out = config.get("in_channels"), config.get("out_channels")
    if channels and out and channels > out:
        return "i2v"
    return "ti2v" if channels == 48 else "t2v"
