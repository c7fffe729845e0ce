"""The kinds of weight files that people own: recognised by names, dtypes and the config, before pairing.

`interpret` returns the tensors of a file as the rest of ascendit reads them: floats of other encodings get an
`Encoding`, names of quantized layers become canonical roles, markers are dropped. Kinds that are not read are
refused by their names. `kind_table.KINDS` is the only table of kinds. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ascendit.checkpoint import fp8_files
from ascendit.checkpoint.fp8_files import (
    COMFY_FORMATS,
    FP8,
    INPUT_SCALES,
    LAYER_MARKER,
    MARKER,
    WEIGHT_SCALES,
    Tensors,
)
from ascendit.checkpoint.kind_table import KINDS
from ascendit.checkpoint.layer_format import BYTE_SCALES, FLOAT_DTYPES, SCALE_ROLES, DeclaredScheme
from ascendit.checkpoint.pickle_file import convert_command
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.errors import CheckpointError
from ascendit.mx.stored_floats import TYPES
from ascendit.names import EMA, listed, naming_of, without_prefix
from ascendit.quant.schemes import METHOD, QUANTIZED
from ascendit.report import counted, group_by, shell_line

VOCABULARY = "spiece_model"
"""The vocabulary of a tokenizer, which ComfyUI's files of a text encoder contain as bytes."""
_SCALES = frozenset({*SCALE_ROLES, "mul_scale", "scale_weight", "scale"})
_READ_SCALES = frozenset({*_SCALES, *INPUT_SCALES}) - {"scale"}
_METHODS = frozenset({*QUANTIZED, METHOD, "compressed-tensors", "modelopt"})
"""Values of `quant_method` whose files are read."""
_PARTS = {
    "vae": r"vae|first_stage_model",
    "text_encoder": r"text_encoders?|cond_stage_model|conditioner",
    "image_encoder": r"clip_vision|image_encoder",
}
"""Part -> first component of its tensors in an all-in-one checkpoint."""
_PART = re.compile("|".join(rf"(?P<{part}>(?:{names})\.)" for part, names in _PARTS.items()))
_TRAINING = re.compile(
    r"(?:optim\w*|lr_sched\w*|scheduler\w*|\w*scaler|callbacks|loops|rng_state\w*|random_state\w*|loss\w*"
    r"|fake_score\w*|real_score|teacher\w*|critic\w*|discriminator\w*)\."
)
_EMA = re.compile(rf"(?:{'|'.join(EMA)})\.")
_LORA = re.compile(
    r"[._]lora_(?:A|B|down|up|mid)(?:\.\w+)*$|\.(?:hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|dora_scale)$"
)
_TRANSFORMS = re.compile("rot|hadamard|smooth|svd|low_?rank|pre_quant")
"""In a key of a `comfy_quant` entry: the weight is not only scaled."""
_TURBO_ROLES = {"int8_weight": "weight", "scale": "weight_scale"}
_STATE = re.compile(
    r"(?:.*\.)?_extra_state|(?:rope\w*\.)?(?:freqs|inv_freq)(?:_\w+)?|rope\w*\.(?:cos|sin)\w*"
)
"""Tensors of a transformer that are no weights: states of TransformerEngine, tables of rotary positions."""
_ACTIVATION = re.compile(r".*\.(?:(?:input|output|[qkv]|softmax)_scale|\w+_bmm_quantizer\.\w+)")
"""Static scales of the inputs of layers and attentions, by modelopt and compressed-tensors."""
_PROJECTION = ".attn_op.local_attn."
"""Sparse-linear attention of TurboDiffusion: `self_attn.attn_op.local_attn.proj_l.weight`."""


@dataclass(frozen=True)
class Stored:
    """The tensors of a part as they are read, by stored name, and the kinds of its file."""

    part: str
    tensors: dict[str, TensorInfo]
    kinds: tuple[str, ...] = ()
    """Keys of `KINDS`."""
    notes: tuple[str, ...] = ()
    """Tensors that are not used, as sentences."""
    schemes: Mapping[str, str] = field(default_factory=dict)
    """Stored layer -> scheme, where the names tell more than dtypes and shapes."""

    def declared(self, canonical: Mapping[str, str]) -> dict[str, DeclaredScheme]:
        """Layer -> its scheme. `canonical`: stored name of a weight -> Diffusers name."""
        return {
            canonical[f"{layer}.weight"].removesuffix(".weight"): DeclaredScheme(
                scheme, kinds_text(self.kinds)
            )
            for layer, scheme in self.schemes.items()
        }


def kinds_text(kinds: Collection[str]) -> str:
    """The kinds of a file as text: `ComfyUI scaled fp8, read as BF16`; "" without kinds."""
    rows = [KINDS[kind] for kind in kinds]
    read = [row.read_as for row in rows if row.read_as][-1:]
    return ", ".join([*(row.label for row in rows), *(f"read as {text}" for text in read)])


def method_text(config: Mapping[str, Any]) -> str:
    """The quantizer that a config names, as text; "" without one."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return f"quant_method {method:.60} in config.json" if isinstance(method, str) else ""


@contextmanager
def naming_kind(text: str) -> Iterator[None]:
    """Add the kind of a file to the errors of a block, a CheckpointError that does not name it yet."""
    try:
        yield
    except CheckpointError as e:
        if text and text not in e.got:
            e.got = f"{e.got} ({text})"
        raise


def interpret(
    tensors: Tensors, config: Mapping[str, Any], *, part: str = "transformer", described: bool = False
) -> Stored:
    """Recognise the kinds of a file, and return its tensors as they are read.

    `tensors`: the stored tensors of one part. `config`: its config.json. `part`: its name. `described`: a
    manifest declares the schemes of its layers. Raises CheckpointError: E-CKP-04 for a kind that is not read,
    E-CKP-01 for a LoRA, E-CKP-08 for weights and scales of a kind that do not match, E-CKP-06 for a damaged
    description of layers.
    """
    stored = _one_part(Stored(part, {n: x for n, x in tensors.items() if n.rpartition(".")[2] != VOCABULARY}))
    if not stored.tensors:
        return stored
    _refuse_training(stored.tensors)
    _refuse_lora(stored.tensors)
    stored = stored if stored.part in _PARTS else _without_state(stored)
    roles = {name.rpartition(".")[2] for name in stored.tensors}
    quantization = config.get("quantization_config")
    manifest, described = described, described or isinstance(quantization, dict)
    stored = _container(stored)
    comfy = _comfy(stored, roles, described=described)
    if comfy is not None:
        return comfy
    _refuse_quantizer(
        stored, roles, quantization if isinstance(quantization, dict) else {}, manifest=manifest
    )
    if "int8_weight" in roles or any(_of_turbodiffusion(*item) for item in stored.tensors.items()):
        return _turbodiffusion(stored)
    dtypes = {info.dtype for info in stored.tensors.values()}
    if "F4" in dtypes:
        return _f4(stored)
    if stored.part in _PARTS and (names := [n for n in stored.tensors if n.endswith(".weight_scale_inv")]):
        raise _refused(stored, "fp8 in tiles", names)
    if stored.part in _PARTS and "weight_scale" in roles and dtypes & {*FP8, "I8"}:
        label = KINDS["scaled-part"].label
        return _add(stored, "scaled-part", fp8_files.scaled(stored.tensors, label, {}, required=False))
    static = "input_scale" in roles and not manifest
    if "I8" in dtypes and not dtypes & FP8:
        return _static(stored, "static-int8") if static else stored
    return _fp8(stored, roles, described=described, static=static) if dtypes & FP8 else stored


def _without_state(stored: Stored) -> Stored:
    """Leave out tensors that are no weights, with a note."""
    states = [name for name in stored.tensors if _STATE.fullmatch(without_prefix(name))]
    if not states:
        return stored
    kept = {name: info for name, info in stored.tensors.items() if name not in states}
    note = f"{counted(len(states), 'tensor')} not used, which are no weights: {listed(states, 3)}"
    return replace(stored, tensors=kept, notes=(*stored.notes, note))


def _add(stored: Stored, kind: str, tensors: dict[str, TensorInfo], *notes: str) -> Stored:
    return replace(
        stored, tensors=tensors, kinds=(*stored.kinds, kind), notes=(*stored.notes, *filter(None, notes))
    )


# ---- files with more than one part, and containers ------------------------------------------------


def _one_part(stored: Stored) -> Stored:
    """The tensors of its part; all of them unless the file has those of several parts."""
    by_part = parts_in(stored.tensors)
    own = stored.part if stored.part in _PARTS else "transformer"
    if own not in by_part:
        return stored
    others = [f"{name} ({counted(len(names), 'tensor')})" for name, names in by_part.items() if name != own]
    note = f"the file also has {' and '.join(others)}, which are not read from it"
    return _add(stored, "all-in-one", {name: stored.tensors[name] for name in by_part[own]}, note)


def parts_in(names: Collection[str]) -> dict[str, list[str]]:
    """Part -> its tensors in an all-in-one checkpoint; empty for other files."""
    by_part = group_by(names, _part_of)
    wan = len(by_part) > 1 and naming_of(by_part.get("transformer", [])) is not None
    return by_part if wan else {}


def _part_of(name: str) -> str:
    match = _PART.match(name)
    return match.lastgroup or "" if match else "transformer"


def _refuse_lora(tensors: Tensors) -> None:
    """Raise CheckpointError (E-CKP-01) for the file of a LoRA, and of a model with one that is not merged."""
    factors = [name for name in tensors if _LORA.search(name)]
    if not factors:
        return
    file = next(iter(tensors.values())).file
    alone = 2 * len(factors) >= len(tensors)
    raise CheckpointError(
        f"{file} " + ("is a LoRA" if alone else "has a LoRA beside its weights") + f": {listed(factors, 2)}",
        needs="the weights of a model",
        fix=f"apply it to its model: ascendit generate MODEL PROMPT {shell_line(['--lora', str(file)])}"
        if alone
        else "merge it in the program that saved the file, for example with merge_and_unload() of PEFT",
        code="E-CKP-01",
    )


def _refuse_training(tensors: Tensors) -> None:
    """Raise CheckpointError (E-CKP-04) for a file with more than the weights of one model."""
    extra = group_by([n for n in tensors if _TRAINING.match(n)], lambda name: name.partition(".")[0])
    averages = [name for name in tensors if _EMA.match(name)]
    if averages and len(averages) + sum(map(len, extra.values())) < len(tensors):
        extra |= group_by(averages, lambda name: name.partition(".")[0])
    if not extra:
        return
    info = next(iter(tensors.values()))
    texts = [f"{counted(len(names), 'tensor')} under {prefix}." for prefix, names in extra.items()]
    raise CheckpointError(
        f"{info.file} is a training checkpoint: beside the model it has {', '.join(texts)}",
        needs="a file with the weights of the model only",
        fix="pass the file of the model alone"
        if info.container == "gguf"
        else f"write one: {_without(info, list(extra))}",
        code="E-CKP-04",
    )


def _without(info: TensorInfo, prefixes: list[str]) -> str:
    """A command that writes a safetensors file without the tensors under `prefixes`. `info`: one tensor."""
    file, new = info.file, info.file.with_name(f"{info.file.stem}-model.safetensors")
    if info.container == "pickle":
        return convert_command(file, new, without=prefixes)
    code = (
        "import sys; from safetensors.torch import load_file, save_file; t = load_file(sys.argv[1]); "
        "save_file({k: v for k, v in t.items() if k.split('.')[0] not in sys.argv[3:]}, sys.argv[2])"
    )
    return shell_line(["python", "-c", code, str(file), str(new), *prefixes])


def _container(stored: Stored) -> Stored:
    containers = {info.container for info in stored.tensors.values()}
    if any(info.encoding is not None and info.encoding.name in TYPES for info in stored.tensors.values()):
        stored = _add(stored, "gguf", stored.tensors)
    elif "gguf" in containers:
        stored = _add(stored, "gguf-floats", stored.tensors)
    if "pickle" in containers:
        stored = _add(stored, "pickle", stored.tensors)
    return stored


# ---- kinds that are read --------------------------------------------------------------------------


def _comfy(stored: Stored, roles: Collection[str], *, described: bool) -> Stored | None:
    """Files with ComfyUI's description of each layer; None for others."""
    metadata = "weight_scale" in roles and not described
    if LAYER_MARKER not in roles and not metadata:
        return None
    layers = fp8_files.comfy_layers(stored.tensors, metadata=metadata)
    layers = {name: entry for name, entry in layers.items() if f"{name}.weight" in stored.tensors}
    if not layers and LAYER_MARKER not in roles:
        return None
    other = {
        layer: f"{entry['format']}{''.join(f' {key}' for key in entry if _TRANSFORMS.search(key))}"
        for layer, entry in layers.items()
        if entry["format"] not in COMFY_FORMATS or any(entry[key] for key in entry if _TRANSFORMS.search(key))
    }
    if other:
        texts = ", ".join(sorted(set(other.values())))
        raise _refused(stored, f"{KINDS['comfy-quant'].label} {texts}", list(other))
    formats = {layer: COMFY_FORMATS[entry["format"]] for layer, entry in layers.items()}
    extra = [n for n in stored.tensors if n.endswith((".weight_scale_2", ".pre_quant_scale"))]
    if extra:
        raise _refused(stored, f"{KINDS['comfy-quant'].label} with a second scale", extra)
    label = KINDS["comfy-quant-fp8"].label
    return _add(stored, "comfy-quant-fp8", fp8_files.scaled(stored.tensors, label, formats, required=False))


def _fp8(stored: Stored, roles: Collection[str], *, described: bool, static: bool) -> Stored:
    """Files with FP8 tensors: scaled, plain, or ascendit's own schemes, which stay unchanged.

    `static`: activations have scales too, and no manifest declares them.
    """
    tensors = stored.tensors
    marked = any(without_prefix(name) == MARKER for name in tensors if name.endswith(MARKER))
    if marked or "scale_weight" in roles:
        label = KINDS["comfy-scaled-fp8"].label
        return _add(stored, "comfy-scaled-fp8", fp8_files.scaled(tensors, label, {}, required=marked))
    if described:
        return _static(stored, "static-fp8") if static else stored
    if not _SCALES & {*roles}:
        return _add(stored, "fp8", fp8_files.plain(tensors))
    floats = {info.dtype for n, info in tensors.items() if n.endswith(".weight_scale")} <= FLOAT_DTYPES
    weights = {info.dtype for n, info in tensors.items() if n.endswith(".weight") and info.dtype in FP8}
    if floats and "F8_E5M2" in weights:
        label = KINDS["scaled-e5m2"].label
        return _add(stored, "scaled-e5m2", fp8_files.scaled(tensors, label, {}, required=False))
    return _static(stored, "static-fp8") if static else stored


def _static(stored: Stored, kind: str) -> Stored:
    """Drop the static scales of activations, which ascendit computes for each token."""
    dropped = [name for name in stored.tensors if _ACTIVATION.fullmatch(name)]
    kept = {name: info for name, info in stored.tensors.items() if name not in dropped}
    note = f"{counted(len(dropped), 'static scale')} not used: activations get a scale for each token"
    return _add(stored, kind, kept, note)


def _f4(stored: Stored) -> Stored:
    """F4 weights [N, K] as the bytes [N, K/2] of packed FP4. Raises CheckpointError (E-CKP-04) for NVFP4."""
    tensors, wrong = dict(stored.tensors), []
    for name, info in stored.tensors.items():
        if info.dtype != "F4" or not name.endswith(".weight"):
            continue
        scale = stored.tensors.get(f"{name}_scale")
        if scale is None or len(info.shape) != 2 or info.shape[1] % 2 or info.strides is not None:
            continue  # `read_expert` reports the dtype
        if scale.dtype not in BYTE_SCALES:
            wrong.append(name)
        tensors[name] = replace(info, dtype="U8", shape=(info.shape[0], info.shape[1] // 2))
    if wrong:
        raise _refused(stored, KINDS["nvfp4"].label, wrong)
    return _add(stored, "mxfp4-f4", tensors)


def _of_turbodiffusion(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is of its sparse attention, or the patch embedding as a linear layer, as in rCM."""
    return _PROJECTION in name or (len(info.shape) == 2 and name.endswith("patch_embedding.weight"))


def _turbodiffusion(stored: Stored) -> Stored:
    """`int8_weight` and `scale` as the weight and scale of int8_block; its sparse attention is not used.

    Raises CheckpointError (E-CKP-09) for a layer with two weights or two scales.
    """
    skipped = {name for name in stored.tensors if _PROJECTION in name}
    weights = [name for name in stored.tensors if name.endswith(".int8_weight") and name not in skipped]
    layers = [name.removesuffix(".int8_weight") for name in weights]
    names = {f"{layer}.{old}": f"{layer}.{new}" for layer in layers for old, new in _TURBO_ROLES.items()}
    tensors: dict[str, TensorInfo] = {}
    for name, info in stored.tensors.items():
        new = names.get(name, name)
        if new in tensors or (new != name and new in stored.tensors):
            raise CheckpointError(
                f"{info.file} ({KINDS['turbodiffusion'].label}) has both {name} and {new}",
                needs="each weight and each scale once",
                fix="download the file again and compare its sha256 with the source",
                code="E-CKP-09",
            )
        if new.endswith("patch_embedding.weight") and len(info.shape) == 2 and info.shape[1] % 4 == 0:
            # stored as a linear layer
            row, step = info.strides or (0, 0)
            strides = info.strides and (row, 4 * step, 4 * step, 2 * step, step)
            info = replace(info, shape=(info.shape[0], info.shape[1] // 4, 1, 2, 2), strides=strides)
        if name not in skipped:
            tensors[new] = info
    attention = f"{counted(len(skipped), 'tensor')} of its sparse-linear attention not used (proj_l): "
    note = f"{attention}attention is dense" if skipped else ""
    return replace(_add(stored, "turbodiffusion", tensors, note), schemes=dict.fromkeys(layers, "int8_block"))


# ---- kinds that are refused -----------------------------------------------------------------------


def _refuse_quantizer(
    stored: Stored, roles: Collection[str], quantization: Mapping[str, Any], *, manifest: bool
) -> None:
    """Raise CheckpointError (E-CKP-04) for the files of other quantizers. `manifest`: it declares schemes."""
    tensors = stored.tensors
    method = quantization.get("quant_method", quantization.get("method"))
    integers = any(info.dtype not in {*FLOAT_DTYPES, "I64"} for info in tensors.values())
    for kind in KINDS.values():
        marks = sorted(role for role in roles if kind.roles and re.fullmatch(kind.roles, role))
        names = [n for n in tensors if n.rpartition(".")[2] in marks]
        if names or (integers and isinstance(method, str) and method.lower() in kind.methods):
            raise _refused(stored, kind.label, names)
    if _scaled_bytes(tensors):
        raise _refused(stored, KINDS["nvfp4"].label, _scaled_bytes(tensors))
    if "scale" in roles and "int8_weight" not in roles:
        names = [n for n in tensors if n.endswith(".scale") and _weight_of(tensors, n).dtype in ("I8", "U8")]
        if names:
            raise _refused(stored, KINDS["sdnq"].label, names)
    if names := _other_scales(tensors):
        raise _refused(stored, KINDS["other-scales"].label, names)
    if integers and isinstance(method, str) and method.lower() not in _METHODS and not manifest:
        raise _refused(stored, f"{method:.60}", [])


def _weight_of(tensors: Tensors, scale: str) -> TensorInfo:
    return tensors.get(f"{scale.rpartition('.')[0]}.weight", tensors[scale])


def _other_scales(tensors: Tensors) -> list[str]:
    """The scales of other names beside quantized weights without one that is read."""
    names = []
    for name in tensors:
        owner, _, role = name.rpartition(".")
        layer = owner.removesuffix(".weight")
        weight = tensors.get(f"{layer}.weight")
        if "scale" not in role or (owner == layer and role in _READ_SCALES) or weight is None:
            continue
        scaled = any(f"{layer}.{read}" in tensors for read in (*WEIGHT_SCALES, "weight_scale_inv"))
        if weight.dtype in ("I8", "U8", *FP8) and not scaled:
            names.append(name)
    return names


def _scaled_bytes(tensors: Tensors) -> list[str]:
    """The packed weights with scales in FP8."""
    return [
        name
        for name, info in tensors.items()
        if info.dtype in ("U8", "F4")
        and name.endswith(".weight")
        and (scale := tensors.get(f"{name}_scale")) is not None
        and scale.dtype in FP8
    ]


def _refused(stored: Stored, label: str, names: list[str]) -> CheckpointError:
    file = next(iter(stored.tensors.values())).file
    command = "ascendit quantize MODEL -o DST --scheme mxfp8"
    return CheckpointError(
        f"{file} is quantized by {label}" + (f": {listed(names, 3)}" if names else " (config.json)"),
        needs="weights in BF16, float16 or float32, or in a kind of file that docs/files.md lists",
        fix=f"use the {stored.part} of the BF16 model"
        if stored.part in _PARTS
        else f"start from the BF16 weights of the model: {command}",
        code="E-CKP-04",
    )
