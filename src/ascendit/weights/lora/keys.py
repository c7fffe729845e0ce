"""Keys of LoRA files: their prefixes and suffixes, and the tensor of a Wan transformer that they change.

Tables and look-ups. A key is `<prefix><path><suffix>`. The path is the original Wan or Diffusers name of a
layer, in kohya's files with `_` for each dot. It is looked up among the tensors of the model, so that
`cross_attn_k_img` and `time_embedding_0` are unambiguous.

Sources: `comfy/lora.py`, `comfy/lora_convert.py` and `comfy/weight_adapter` of ComfyUI, `convert_lora.py`
and `networks/` of musubi-tuner, `loaders/lora_conversion_utils.py` of Diffusers, PEFT's saved adapters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ascendit.names import EMA, PREFIXES, Shapes, to_wan
from ascendit.names import WRAPPERS as MODULE_WRAPPERS

WRAPPERS: dict[str, str | None] = {
    **{f"{name}.": expert for name, expert in (PREFIXES | dict.fromkeys(EMA)).items()},
    **dict.fromkeys(("lora.", "lora_unet.", "lora_dit.", "lycoris.")),
    "lora_transformer.": "transformer",
    "lora_transformer_1.": "transformer",
    "lora_transformer_2.": "transformer_2",
}
"""Name of a module around the transformer -> its expert. A key may have several, in any order."""
NAMES_ONE_EXPERT = (
    *("transformer_1.", "lora_transformer_1.", "high_noise_model."),
    *(wrapper for wrapper, expert in WRAPPERS.items() if expert == "transformer_2"),
)
"""Wrappers that always mean one expert; `transformer.` and `dit.` do in files that also have one of these."""
INNER_WRAPPERS = tuple(f"{name}." for name in sorted(MODULE_WRAPPERS, key=lambda name: -len(name)))
"""Names that training and PEFT insert anywhere in a key; longest first, as some are the end of another."""
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_dit_", "lycoris_")
"""Prefixes of a path with underscores, before other wrappers. VideoX-Fun writes a second underscore."""
SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    "_lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down",
    ".lora_A": "down",
    ".lora_down": "down",
    ".lora_B.weight": "up",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    "_lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up",
    ".lora_B": "up",
    ".lora_up": "up",
    ".lora_B.bias": "up_bias",
    ".lora_up.bias": "up_bias",
    ".alpha": "alpha",
    ".lora_alpha": "alpha",
    ".use_rslora_flag": "rslora",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "diff_b",
    ".b_norm": "diff_b",
    ".diff_m": "diff_m",
    **{f".hada_w{i}_{ab}": f"hada_w{i}_{ab}" for i in "12" for ab in "ab"},
    **{f".lokr_w{i}{ab}": f"lokr_w{i}{ab}" for i in "12" for ab in ("", "_a", "_b")},
}
"""Suffix of the path -> role of the tensor. `w_norm` and `b_norm` are LyCORIS suffixes for norms."""
REFUSED = (
    (r"\.(dora_scale|lora_magnitude_vector)\b", "DoRA is not supported: it rescales complete weight rows"),
    (r"\.set_weight$", "it replaces the weight instead of adding to it"),
    (r"\.reshape_weight$", "it changes the shape of the weight"),
    (r"\.(lora_mid\.weight|hada_t[12]|lokr_t2)$", "Tucker-decomposed factors are not supported"),
    (r"\.[ab][12]\.weight$", "GLoRA is not supported"),
    (r"\.(oft_|boft_)\w*(\.\w+)*$|\.rescale$", "OFT is not supported: it rotates the weight"),
    (r"\.ia3_l\b|\.on_input$", "IA3 is not supported: it scales rows or columns of the weight"),
    (r"\.vera_lambda_[bd]\b|\bvera_[AB]\b", "VeRA is not supported: its factors may be outside the file"),
    (r"\.fourierft_spectrum\b", "FourierFT is not supported"),
    (r"\.hra_u\b", "HRA is not supported: it reflects the weight"),
    (r"\.(bone|miss)_", "Bone (MiSS) is not supported"),
    (
        r"\brandlora_|\bvblora_|\.(shira|c3a|road|waveft|delora|gralora)_",
        "this kind of PEFT is not supported",
    ),
    (r"\.(weight|bias)$", "this is a complete tensor, not a change of one"),
)
"""(pattern of a key, reason why it cannot be used), tried in order for keys without a known suffix. All but
the last change the weight in another way, so that the rest of the file without these keys is another change.
"""


@dataclass(frozen=True)
class KeyGroup:
    """Keys of a part that a model may lack."""

    pattern: str
    """Of their paths."""
    keys: str
    """Their meaning and examples."""
    reason: str
    """Why a model without this part cannot use them."""


SKIPPED = {
    "image": KeyGroup(
        r"(^|[._])(k_img|v_img|add_k_proj|add_v_proj|norm_added_k|image_embedder)(?=[._]|$)|^img_emb[._]",
        "CLIP image input of Wan2.1 image-to-video: `k_img`, `v_img`, `img_emb`",
        "the model has no CLIP image input; this LoRA is for a Wan2.1 image-to-video model",
    ),
    "text": KeyGroup(
        r"^(lora_te\d*|text_encoders?(_\d)?|te\d?|t5|umt5(xxl)?|cond_stage_model)[._]",
        "text encoders",
        "LoRAs of text encoders are not supported",
    ),
    "control": KeyGroup(
        r"^(vace_blocks|vace_patch_embedding|vace|control_adapter|control_blocks|controlnet|ref_conv)(?=[._]|$)",
        "VACE and Fun-Control: `vace_blocks`, `control_adapter`, `ref_conv`",
        "the model has no control input; this LoRA is for VACE or Fun-Control",
    ),
    "audio": KeyGroup(
        r"^(audio_injector|casual_audio_encoder|audio_proj|multitalk_audio_proj|cond_encoder|frame_packer"
        r"|trainable_cond_mask)(?=[._]|$)|[._]audio_cross_attn(?=[._]|$)",
        "audio of S2V and InfiniteTalk: `audio_injector`, `audio_proj`",
        "the model has no audio input; this LoRA is for S2V, MultiTalk or InfiniteTalk",
    ),
    "face": KeyGroup(
        r"^(face_adapter|face_encoder|motion_encoder|pose_patch_embedding)(?=[._]|$)",
        "faces and poses of Animate: `face_adapter`, `motion_encoder`, `pose_patch_embedding`",
        "the model has no face input; this LoRA is for Animate",
    ),
    "patch": KeyGroup(
        r"^patch_embedding(?=[._]|$)",
        "the first layer, whose input channels differ between text-to-video and image-to-video",
        "the patch embedding has no such layer",
    ),
}
"""Group of keys that `--lora-skip` leaves out."""
IGNORED = {"lokr_factor": "how musubi-tuner split the sizes, which also follows from the shapes"}
"""Keys without an effect on the weights -> meaning."""
_ADAPTER = re.compile(r"(\.lora_(?:A|B|down|up))\.(?!(?:weight|bias)$)[^.]+(?=\.(?:weight|bias)$)")
_ADAPTER_OF_PARAMETER = re.compile(r"(\.(?:hada_w[12]_[ab]|lokr_w[12](?:_[ab])?))\.[^.]+$")
_BY_LENGTH = sorted(SUFFIXES, key=len, reverse=True)
_FLAT_WRAPPERS = {
    wrapper.strip("_."): wrapper
    for wrapper in sorted((*WRAPPERS, *INNER_WRAPPERS), key=lambda name: -len(name))
}
"""Wrapper in a path with underscores -> wrapper; longest first."""
_FLAT_WRAPPER = re.compile(f"({'|'.join(_FLAT_WRAPPERS)})_+")
_BLOCK = re.compile(r"blocks[._](\d+)(?:[._]|$)")


@dataclass(frozen=True)
class LoraKey:
    """A key of a LoRA file, split into its parts."""

    name: str
    """The complete key."""
    expert: str | None
    """The transformer in the prefix, if any."""
    path: str
    """With `_` for each dot if `flat`."""
    flat: bool
    role: str | None
    """A value of `SUFFIXES`; None if unknown."""
    one_expert: bool = False
    """The prefix always means `expert`, like `transformer_2.`."""

    @property
    def group(self) -> str:
        """The group of `SKIPPED` that this key is part of; empty if none."""
        return next((name for name, group in SKIPPED.items() if re.search(group.pattern, self.path)), "")


def split_key(name: str) -> LoraKey:
    """Split a key into prefix, path and suffix, without PEFT's adapter name (`.lora_A.default.weight`)."""
    text = ".".join(part for part in name.split(".") if f"{part}." not in INNER_WRAPPERS)
    text = _ADAPTER_OF_PARAMETER.sub(r"\1", _ADAPTER.sub(r"\1", text))
    suffix = next((s for s in _BY_LENGTH if text.endswith(s)), "")
    path, wrappers = without_wrappers(text.removesuffix(suffix))
    flat = path.startswith(FLAT_PREFIXES) or re.match(r"blocks_\d", path) is not None
    if flat:
        path, start = path.replace(".", "_"), 0
        while match := _FLAT_WRAPPER.match(path, start):
            wrappers.append(_FLAT_WRAPPERS[match[1]])
            start = match.end()
        path = path[start:]
        for inner in INNER_WRAPPERS:
            path = path.replace(f"_{inner.removesuffix('.')}_", "_")
    one_expert = any(w in NAMES_ONE_EXPERT for w in wrappers)
    return LoraKey(name, expert_of(wrappers), path, flat, SUFFIXES.get(suffix), one_expert)


def without_wrappers(path: str) -> tuple[str, list[str]]:
    """Remove all `WRAPPERS` before a dotted path; return the rest and the wrappers."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts[:-1]) if f"{part}." not in WRAPPERS), len(parts) - 1)
    return ".".join(parts[number:]), [f"{part}." for part in parts[:number]]


def expert_of(wrappers: Iterable[str]) -> str | None:
    """The expert that these wrappers name; the last one if there are several."""
    experts = [WRAPPERS[wrapper] for wrapper in wrappers if WRAPPERS.get(wrapper)]
    return experts[-1] if experts else None


def refusal(name: str) -> str | None:
    """The reason why such a key cannot be used in any model, or None."""
    return next((reason for pattern, reason in REFUSED if re.search(pattern, name)), None)


def changes_others(name: str) -> bool:
    """Whether the other keys of a file mean another change without this refused key."""
    return refusal(name) not in (None, REFUSED[-1][1])


class Targets:
    """The tensors of one model that LoRA keys can change, by all their names in LoRA files."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.num_blocks = 1 + max((int(m[1]) for name in shapes if (m := _BLOCK.match(name))), default=-1)
        # Path with `_` for each dot -> Diffusers name. No two tensors share one.
        self._weights: dict[str, str] = {}
        self._biases: dict[str, str] = {}
        # Flat or dotted -> all paths, for suggestions.
        self._paths: dict[bool, list[str]] = {False: [], True: []}
        for name in shapes:
            for alias in {name, to_wan(name) or name}:
                path = alias.removesuffix(".bias").removesuffix(".weight")
                flat = path.replace(".", "_")
                (self._biases if alias.endswith(".bias") else self._weights)[flat] = name
                self._paths[False].append(path)
                self._paths[True].append(flat)

    def find(self, key: LoraKey) -> str | None:
        """The Diffusers name of the tensor that `key` changes; None if the model has no such tensor.

        For `up_bias` and `alpha`, the weight of their layer.
        """
        path = key.path.replace(".", "_")
        if key.role == "diff_b":
            return self._biases.get(path)
        if key.role == "diff_m":
            tables = (f"{path}_{name}" for name in ("modulation", "scale_shift_table"))
            return next((self._weights[table] for table in tables if table in self._weights), None)
        return self._weights.get(path)

    def reason_missing(self, key: LoraKey) -> str:
        """Why `find` returns None, with the most similar name of the model."""
        if key.group:
            return SKIPPED[key.group].reason
        if (block := _BLOCK.match(key.path)) and int(block[1]) >= self.num_blocks:
            return f"the model has {self.num_blocks} blocks"
        if key.role == "diff_b" and self.find(LoraKey(key.name, None, key.path, key.flat, "diff")):
            return "this layer has no bias"
        if near := self._near(key):
            return f"no such layer; similar: {near}"
        return "no such layer"

    def _near(self, key: LoraKey) -> str | None:
        names: Iterable[str] = self._paths[key.flat]
        if block := _BLOCK.match(key.path):
            names = [name for name in names if name.startswith(block[0])]
        return next(iter(difflib.get_close_matches(key.path, names, n=1)), None)
