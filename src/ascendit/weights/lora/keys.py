"""Keys of LoRA files: what they begin and end with, and which tensor of a Wan transformer they mean.

Tables and look-ups, no torch. A key is `<prefix><path><suffix>`. The path is the name of a layer,
original Wan or Diffusers, and in kohya's way with `_` for each dot. It is looked up among the tensors
that the model really has, so `cross_attn_k_img` and `time_embedding_0` need no guess.

Sources: `comfy/lora.py`, `comfy/lora_convert.py` and `comfy/weight_adapter` of ComfyUI, `convert_lora.py`
and `networks/` of musubi-tuner, `loaders/lora_conversion_utils.py` of Diffusers, PEFT's saved adapters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ascendit.names import Shapes, to_wan

WRAPPERS: dict[str, str | None] = {
    "diffusion_model.": None,
    "model.": None,
    "base_model.model.": None,
    "pipe.dit.": None,
    "transformer.": "transformer",
    "transformer_2.": "transformer_2",
}
"""What stands before a dotted path, and the expert it names. Several can stand there; all are taken off."""
FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
"""What stands before a path with underscores; `lora_unet__` is VideoX-Fun's."""
SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    "_lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down",
    ".lora_A": "down",
    ".lora_B.weight": "up",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    "_lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up",
    ".lora_B": "up",
    ".lora_B.bias": "up_bias",
    ".lora_up.bias": "up_bias",
    ".alpha": "alpha",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "diff_b",
    ".b_norm": "diff_b",
    ".diff_m": "diff_m",
    **{f".hada_w{i}_{ab}": f"hada_w{i}_{ab}" for i in "12" for ab in "ab"},
    **{f".lokr_w{i}{ab}": f"lokr_w{i}{ab}" for i in "12" for ab in ("", "_a", "_b")},
}
"""What stands after the path -> the role of the tensor. `w_norm` and `b_norm` are LyCORIS' for norms."""
REFUSED = (
    (r"\.(dora_scale|lora_magnitude_vector)\b", "DoRA is not folded: it rescales whole rows of the weight"),
    (r"\.set_weight$", "it replaces the weight, and a LoRA adds to it"),
    (r"\.reshape_weight$", "it changes the shape of the weight"),
    (r"\.(lora_mid\.weight|hada_t[12]|lokr_t2)$", "Tucker-decomposed factors are not folded"),
    (r"\.[ab][12]\.weight$", "GLoRA is not folded"),
    (r"\.(oft_|boft_)\w*(\.\w+)*$|\.rescale$", "OFT is not folded: it turns the weight, and adds nothing"),
    (r"\.(weight|bias)$", "this is a whole tensor, not a change of one"),
)
"""(what the key looks like, why it cannot be used), tried in order for keys with no suffix of `SUFFIXES`."""
_TEXT_ENCODER = re.compile(r"^lora_te\d*_|^text_encoders?(_\d)?\.|^lora_te\d*\.")
IGNORED = {"lokr_factor": "how musubi-tuner split the sizes; the shapes say it too"}
"""Whole keys that mean nothing for the weights."""
_ADAPTER = re.compile(r"\.(lora_[AB])\.[^.]+\.(weight|bias)$")
_BY_LENGTH = sorted(SUFFIXES, key=len, reverse=True)
_BLOCK = re.compile(r"blocks[._](\d+)(?:[._]|$)")


@dataclass(frozen=True)
class Key:
    """A key of a LoRA file, taken apart."""

    name: str
    """As the file has it."""
    expert: str | None
    """The transformer that the prefix names, if it names one."""
    path: str
    flat: bool
    """The path has `_` for each dot."""
    role: str | None
    """A value of `SUFFIXES`; None: unknown."""


def split_key(name: str) -> Key:
    """Take the prefix, the suffix and PEFT's adapter name (`.lora_A.default.weight`) off a key."""
    text = _ADAPTER.sub(r".\1.\2", name)
    suffix = next((s for s in _BY_LENGTH if text.endswith(s)), "")
    path = text.removesuffix(suffix)
    role = SUFFIXES.get(suffix)
    for prefix in FLAT_PREFIXES:
        if path.startswith(prefix):
            return Key(name, None, path.removeprefix(prefix), True, role)
    expert = None
    while found := next((w for w in WRAPPERS if path.startswith(w)), None):
        path = path.removeprefix(found)
        expert = WRAPPERS[found] or expert
    return Key(name, expert, path, False, role)


def refusal(name: str) -> str | None:
    """Why a key of this look can never be used, or None."""
    return next((why for pattern, why in REFUSED if re.search(pattern, name)), None)


class Targets:
    """The tensors that a LoRA key can mean in one model, under every name that files use for them."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.num_blocks = 1 + max((int(m[1]) for name in shapes if (m := _BLOCK.match(name))), default=-1)
        # By path, with dots and flat.
        self._weights: dict[bool, dict[str, str]] = {False: {}, True: {}}
        self._biases: dict[bool, dict[str, str]] = {False: {}, True: {}}
        for name in shapes:
            for alias in {name, to_wan(name) or name}:
                table = self._biases if alias.endswith(".bias") else self._weights
                path = alias.removesuffix(".bias").removesuffix(".weight")
                table[False][path] = name
                table[True][path.replace(".", "_")] = name

    def find(self, key: Key) -> str | None:
        """The Diffusers name of the tensor that `key` changes; None: this model has no such tensor.

        Of `up_bias` and `alpha`, the weight that they go with.
        """
        weights, dot = self._weights[key.flat], "_" if key.flat else "."
        if key.role == "diff_b":
            return self._biases[key.flat].get(key.path)
        if key.role == "diff_m":
            tables = (f"{key.path}{dot}{name}" for name in ("modulation", "scale_shift_table"))
            return next((weights[table] for table in tables if table in weights), None)
        return weights.get(key.path)

    def why_not(self, key: Key) -> str:
        """Why `find` gives None, in a few words, with the nearest name that there is."""
        if _TEXT_ENCODER.match(key.name):
            return "a text encoder's LoRA is not folded"
        if (block := _BLOCK.match(key.path)) and int(block[1]) >= self.num_blocks:
            return f"the model has {self.num_blocks} blocks"
        if re.search(r"(k_img|v_img|add_k_proj|add_v_proj|norm_added_k)$|^img_emb|image_embedder", key.path):
            return "the model takes no CLIP image tokens; this LoRA is for a Wan2.1 image-to-video model"
        if key.role == "diff_b" and self.find(Key(key.name, None, key.path, key.flat, "diff")):
            return "this layer has no bias"
        if near := self._near(key):
            return f"no such layer; near: {near}"
        return "no such layer"

    def _near(self, key: Key) -> str | None:
        names: Iterable[str] = self._weights[key.flat]
        if block := _BLOCK.match(key.path):
            names = [name for name in names if name.startswith(block[0])]
        return next(iter(difflib.get_close_matches(key.path, names, n=1)), None)
