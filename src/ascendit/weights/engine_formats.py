"""The folder that each reader wants: ours (`--to diffusers`, `--to wan`), and what each engine looks for.

Read in the wheels of vLLM-Omni 0.30.0, SGLang 0.5.23 and MindIE-SD 3.1.0; none was run on a card:

vllm-omni   Diffusers names, Q, K and V apart. FP4 as numbers, each an e4m3 element: its parameter is [N, K].
            int8 without `weight_offset`. Dual-scale layers must have a `mul_scale`: it creates one without a
            value and stops when the file has none, so that ones are written. What it does is said by
            `quantization_config` in each expert's config.json, nothing else.
sglang      Diffusers names, `quant_model_description.json` by the same names. FP4 packed. int8 with
            `weight_offset`. It loads `mul_scale` only if the manifest names `<layer>.div.mul_scale` too. That
            file rules over config.json, which is left without `quantization_config`.
mindie      Original Wan names, smoothed layers as `<layer>.linear.*` and `<layer>.div.mul_scale`. One file,
            named after `model_quant_type` like the manifest beside it; both refused if others than owner and
            group may read them (0o640), or if they are links. Kept layers come from the float checkpoint.

`quant.engines.ENGINES` has what none of this can help with. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ascendit.checkpoint.component import STEM
from ascendit.checkpoint.quant_metadata import CONFIG_KEY, FLOAT, MANIFEST_FILE, manifest_for
from ascendit.checkpoint.writer import TensorSpec
from ascendit.errors import UsageError
from ascendit.family import Task, WanConfig
from ascendit.names import ROLES, Naming, is_block_linear, sort_names, to_wan
from ascendit.quant.engines import ENGINES, engines_for
from ascendit.quant.fusion import fused_with
from ascendit.quant.schemes import QUANTIZED, SCHEMES, STORED_SCHEMES

WAN_FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One way to lay out experts. All methods take and give Diffusers names unless they say otherwise."""

    naming: Naming = "diffusers"
    engine: str | None = None
    unpacked: bool = False
    """FP4 as one e4m3 number to an element."""
    offset: bool = True
    """int8 layers have a `weight_offset`."""
    ones: tuple[str, ...] = ()
    """Schemes whose layers get a `mul_scale` of ones if they have none."""
    aliases: bool = False
    """The manifest rules: it names `<layer>.div.mul_scale` too, config.json has no `quantization_config`."""
    export: bool = False
    """As msModelSlim exports: smoothed layers as `.linear.` and `.div.`; one file of weights, named after
    `model_quant_type` as the manifest is, for owner and group alone; a configuration.json."""

    def folder(self, expert: str, experts: int) -> str:
        """Where expert `transformer` or `transformer_2` goes, `.` for the folder itself."""
        if self.naming == "diffusers":
            return expert
        return WAN_FOLDERS[expert] if experts > 1 else "."

    def file_names(self, quant_type: str) -> tuple[str, str]:
        """How files of weights begin, and the name of the manifest."""
        suffix = quant_type.lower()
        if self.export:
            return f"quant_model_weight_{suffix}", f"quant_model_description_{suffix}.json"
        return STEM, MANIFEST_FILE

    def container(self, scheme: str) -> str:
        """`packed` or `e4m3` for FP4, `plain` for all others."""
        if not STORED_SCHEMES[scheme].packed:
            return "plain"
        return "e4m3" if self.unpacked else "packed"

    def on_disk(self, name: str, smoothed: Collection[str]) -> str:
        """The name in the file; names unknown to Wan are kept. `smoothed`: layers with a `mul_scale`."""
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
        found: Mapping[str, str],
    ) -> dict[str, str]:
        """The manifest with the names on disk; arguments as for `checkpoint.quant_metadata.manifest_for`."""
        smoothed = {name.removesuffix(".mul_scale") for name in names if name.endswith(".mul_scale")}
        plain = manifest_for(layers, names, attention, found)
        quant_type = plain.pop("model_quant_type")
        manifest = {self.on_disk(name, smoothed): value for name, value in plain.items()}
        if self.aliases:
            manifest |= {f"{name}.div.mul_scale": FLOAT for name in sort_names(smoothed)}
        return manifest | {"model_quant_type": quant_type}

    def config(self, config: Mapping[str, Any], marker: Mapping[str, Any] | None) -> dict[str, Any]:
        """config.json: that of a WanTransformer3DModel, or of the original WanModel."""
        written = {key: value for key, value in config.items() if key != CONFIG_KEY}
        if self.naming == "wan":
            return wan_config(written)
        return written | ({CONFIG_KEY: dict(marker)} if marker and not self.aliases else {})


CANONICAL = Dialect()
"""Ours: what loading takes, and `quantize` and `repack` write without --for and --to."""


def layer_specs(
    name: str,
    scheme: str,
    shape: tuple[int, ...],
    *,
    bias: bool,
    mul_scale: bool = False,
    float_dtype: str = "BF16",
    dialect: Dialect = CANONICAL,
) -> list[TensorSpec]:
    """The tensors of the linear layer `name`, in the order they are written.

    `shape`: (N, K) of the decoded weight. `scheme`: a key of `quant.schemes.SCHEMES`. `float_dtype`: how
    weight and bias are stored in a layer that is not quantized; the bias of one that is, is always float32.
    """
    n, k = shape
    row = SCHEMES[scheme]
    every: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": (float_dtype, (n, k)),
        "mul_scale": ("F32", (k,)),
        "bias": ("F32" if row.weight else float_dtype, (n,)),
    }
    every |= row.tensors(n, k)
    if dialect.container(scheme) == "e4m3":
        every["weight"] = ("F8_E4M3", (n, k))
    roles = [role for role in row.roles if dialect.offset or role != "weight_offset"]
    roles += ["mul_scale"] * (mul_scale or scheme in dialect.ones) + ["bias"] * bias
    return [TensorSpec(f"{name}.{role}", *every[role]) for role in roles]


DIALECTS: dict[str, Dialect] = {
    "vllm-omni": Dialect(engine="vllm-omni", unpacked=True, offset=False, ones=("mxfp4_dualscale",)),
    "sglang": Dialect(engine="sglang", aliases=True),
    "mindie": Dialect(engine="mindie", naming="wan", export=True),
}


def dialect_for(engine: str | None, to: str | None = None) -> Dialect:
    """The dialect of `--for` and `--to`. UsageError E-USE-01 if there is none, or they do not go together."""
    wanted = {None: ("diffusers", "wan"), "mindie": ("wan",)}.get(engine, ("diffusers",))
    if engine is not None and engine not in DIALECTS:
        raise UsageError(
            f"--for {engine}",
            needs=f"one of {', '.join(DIALECTS)}",
            fix="leave it out for the folder that ascendit itself runs",
        )
    if to is not None and to not in wanted:
        reader = f"{engine} {ENGINES[engine].version} reads" if engine else "ascendit writes"
        raise UsageError(
            f"--to {to}" + (f" with --for {engine}" if engine else ""),
            needs=f"{' or '.join(wanted)}: {reader} these names",
            fix=f"--to {wanted[0]}, or leave --to out",
        )
    if engine is not None:
        return DIALECTS[engine]
    return Dialect(naming="wan") if to == "wan" else CANONICAL


# ---- what an engine cannot load -----------------------------------------------------------------


def traits_of(
    layers: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], smoothing: Mapping[str, object]
) -> frozenset[str]:
    """What matters to an engine: schemes, and other keys of `Engine.refuses`.

    `layers`: every linear of the blocks, and others that are quantized or smoothed -> scheme. `shapes`:
    (N, K) of the quantized ones. `smoothing`: layer -> its `mul_scale`, as anything that can be compared.
    """
    coded = {name: scheme for name, scheme in layers.items() if scheme != "bf16"}
    inside = {name for name in layers if is_block_linear(name)}
    traits = {*layers.values(), *(f"smoothed:{layers.get(name, 'bf16')}" for name in smoothing)}
    if inside - coded.keys():
        traits.add("float_block_linears")
    if coded.keys() - inside:
        traits.add("outside_blocks")
    if any(name.endswith((".add_k_proj", ".add_v_proj")) for name in layers):
        traits.add("added_kv")
    if any(len({layers.get(other) for other in fused_with(name)}) > 1 for name in inside):
        traits.add("split_qkv")
    if any(len({smoothing.get(other) for other in fused_with(name)}) > 1 for name in smoothing):
        traits.add("unlike_qkv")
    for name, scheme in coded.items():
        if (block := SCHEMES[scheme].block) and -(-shapes[name][1] // block) % 2:
            traits.add(f"odd_blocks:{scheme}")
    return frozenset(traits)


def check_engine(engine: str | None, traits: frozenset[str], where: str) -> None:
    """UsageError E-ENG-01 if `engine` cannot run a checkpoint with these traits. `where`: the expert."""
    verdicts = engines_for(traits)
    if engine is None or not (why := verdicts[engine]):
        return
    others = ", ".join(name for name, reason in verdicts.items() if not reason)
    schemes = ", ".join(sorted(traits.intersection(QUANTIZED))) or "no quantized layer"
    program = f"{engine} {ENGINES[engine].version}"
    raise UsageError(
        f"{program} cannot run {where} ({schemes}): {why}",
        needs=f"layers that {program} loads",
        fix="leave --for out, for the folder that ascendit runs"
        + (f"; {others} can run it" if others else ""),
        code="E-ENG-01",
    )


# ---- config.json of the original ----------------------------------------------------------------


def wan_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a WanModel. Patch size and text width are not in it: the shapes tell them."""
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
    """configuration.json, as the original models have it."""
    task = "image-to-video" if model_kind(config) == "i2v" else "text-to-video-synthesis"
    return {"framework": "Pytorch", "task": task}


def model_kind(config: Mapping[str, Any]) -> Task:
    """Of the original's `model_type`: by image layers, and by channels that hold more than the noise."""
    if config.get("image_dim") or config.get("added_kv_proj_dim"):
        return "i2v"
    channels, out = config.get("in_channels"), config.get("out_channels")
    if channels and out and channels > out:
        return "i2v"
    return "ti2v" if channels == 48 else "t2v"
