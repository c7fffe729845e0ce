"""The table of the kinds of weight files that people own: their names, and how they are recognised.

`stored_kinds` recognises them; docs/files.md lists them. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of file."""

    label: str
    """Name of the kind in messages."""
    marks: str
    """How it is recognised, for the documentation."""
    read_as: str = ""
    """Scheme or dtype of its weights after reading; "": refused."""
    requantized: bool = False
    """Whether its values have lost precision already, although they are read as floats."""
    roles: str = ""
    """Pattern of the last component of a name that only files of this refused kind have."""
    methods: tuple[str, ...] = ()
    """Values of `quant_method` in config.json; refused if tensors are not floats."""


KINDS: dict[str, Kind] = {
    "fp8": Kind(
        label="plain fp8",
        marks="`F8_E4M3` or `F8_E5M2` tensors, no scales, no manifest",
        read_as="BF16",
        requantized=True,
    ),
    "comfy-scaled-fp8": Kind(
        label="ComfyUI scaled fp8",
        marks="`scaled_fp8`, `<layer>.scale_weight`, optional `scale_input`",
        read_as="BF16",
        requantized=True,
    ),
    "comfy-quant-fp8": Kind(
        label="ComfyUI comfy_quant fp8",
        marks="`<layer>.comfy_quant`, or `_quantization_metadata` in the header, with `weight_scale`",
        read_as="BF16",
        requantized=True,
    ),
    "scaled-e5m2": Kind(
        label="scaled fp8 (e5m2)",
        marks="`F8_E5M2` weights with a float `<layer>.weight_scale`",
        read_as="BF16",
        requantized=True,
    ),
    "scaled-part": Kind(
        label="fp8 or int8 with scales",
        marks="text encoder or image encoder with `F8_E4M3`, `F8_E5M2` or `I8` weights and a float "
        "`<layer>.weight_scale` (LightX2V)",
        read_as="BF16",
        requantized=True,
    ),
    "static-fp8": Kind(
        label="fp8 with static scales of activations",
        marks="`F8_E4M3` weights with `weight_scale` and `input_scale` (modelopt, compressed-tensors)",
        read_as="scheme fp8, without the `input_scale`",
    ),
    "static-int8": Kind(
        label="int8 with static scales of activations",
        marks="`I8` weights with `weight_scale` and `input_scale` (compressed-tensors, SmoothQuant)",
        read_as="scheme int8, without the `input_scale`",
    ),
    "mxfp4-f4": Kind(
        label="MXFP4 in F4 tensors",
        marks="`F4` weights with `weight_scale` in `F8_E8M0` or `U8`",
        read_as="scheme mxfp4",
    ),
    "turbodiffusion": Kind(
        label="TurboDiffusion or rCM",
        marks="`<layer>.int8_weight` with `<layer>.scale`; `attn_op.local_attn.proj_l`; "
        "`patch_embedding` [N, K]",
        read_as="scheme int8_block or floats, with dense attention",
    ),
    "gguf": Kind(
        label="GGUF", marks="the first bytes of the file", read_as="BF16 or float32", requantized=True
    ),
    "gguf-floats": Kind(
        label="GGUF", marks="the same, without block types", read_as="the dtypes of its tensors"
    ),
    "pickle": Kind(
        label="PyTorch pickle",
        marks="the first bytes of the file, usually `.pth`, `.pt`, `.bin`, `.ckpt`",
        read_as="the dtypes of its tensors",
    ),
    "all-in-one": Kind(
        label="all-in-one checkpoint",
        marks="`model.diffusion_model.` beside `vae.`, `text_encoders.`",
        read_as="one part; the others are named",
    ),
    "comfy-quant": Kind(
        label="ComfyUI comfy_quant",
        marks="`<layer>.comfy_quant` with a format other than float8, such as int8 convrot, nvfp4, mxfp8",
    ),
    "nvfp4": Kind(
        label="NVFP4 (modelopt or compressed-tensors)",
        marks="`weight_scale_2`, `weight_global_scale`, or `F8_E4M3` scales of packed weights",
        roles="weight_scale_2|weight_global_scale|input_global_scale",
    ),
    "bitsandbytes": Kind(
        label="bitsandbytes (nf4, fp4 or int8)",
        marks="`absmax`, `quant_map`, `quant_state.bitsandbytes__nf4`, `SCB`",
        roles=r"absmax|quant_map|nested_absmax|nested_quant_map|bitsandbytes__\w+|SCB",
        methods=("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
    ),
    "modelopt": Kind(
        label="modelopt (simulated quantization)",
        marks="`weight_quantizer._amax`, `input_quantizer._amax`",
        roles="_amax|_pre_quant_scale",
    ),
    "quanto": Kind(
        label="quanto",
        marks="`<layer>.weight._data`, `<layer>.weight._scale`",
        roles="_data|_scale|_shift",
        methods=("quanto",),
    ),
    "torchao": Kind(
        label="torchao",
        marks="`<layer>._weight_qdata`, `<layer>.weight:qdata`",
        roles=r"_\w+_qdata|(\w+:)?qdata|tensor_impl",
        methods=("torchao",),
    ),
    "nunchaku": Kind(
        label="nunchaku (SVDQuant)",
        marks="`qweight` with `wscales`, `smooth_factor`, `proj_down`",
        roles="wscales|wzeros|wtscale|wcscales|smooth_factor|smooth_factor_orig|proj_down|proj_up",
        methods=("svdquant", "nunchaku", "nunchaku_lite"),
    ),
    "compressed-tensors": Kind(
        label="compressed-tensors (packed)",
        marks="`weight_packed`, `weight_shape`, `weight_zero_point`",
        roles="weight_packed|weight_shape|weight_zero_point|weight_g_idx",
    ),
    "gptq-awq": Kind(
        label="GPTQ or AWQ",
        marks="`qweight` with `qzeros`, `scales`",
        roles="qweight|qzeros",
        methods=("gptq", "awq", "auto-round", "auto_round"),
    ),
    "marlin": Kind(label="Marlin", marks="`B` with `s`", roles="B|s", methods=("marlin",)),
    "aqlm": Kind(label="AQLM", marks="`codebooks`", roles="codebooks", methods=("aqlm",)),
    "hqq": Kind(label="HQQ", marks="`W_q`", roles="W_q", methods=("hqq",)),
    "sdnq": Kind(
        label="SDNQ",
        marks="`svd_up`, `zero_point`, or int8 weights with `<layer>.scale`",
        roles="svd_up|svd_down|zero_point",
        methods=("sdnq",),
    ),
    "other-scales": Kind(
        label="another tool, with scales of other names",
        marks="int8 or fp8 weights with a scale of another name, such as `weight_scales` (EETQ) or "
        "`weight.scale`",
    ),
    "training": Kind(
        label="training checkpoint",
        marks="`optimizer.`, `lr_scheduler.`, or `ema.` beside other weights",
    ),
}
"""Kind -> its row. Rows with `roles` are tried in this order."""
