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

from ascendit.names import Shapes, to_wan

WRAPPERS: dict[str, str | None] = {
    "diffusion_model.": None,
    "model.": None,
    "base_model.model.": None,
    "pipe.dit.": None,
    "transformer.": "transformer",
    "transformer_2.": "transformer_2",
}
"""Prefix of a dotted path -> its expert. A key may have several; all are removed."""
FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
"""Prefixes of a path with underscores; `lora_unet__` is VideoX-Fun's."""
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
"""Suffix of the path -> role of the tensor. `w_norm` and `b_norm` are LyCORIS suffixes for norms."""
REFUSED = (
    (r"\.(dora_scale|lora_magnitude_vector)\b", "DoRA is not supported: it rescales complete weight rows"),
    (r"\.set_weight$", "it replaces the weight instead of adding to it"),
    (r"\.reshape_weight$", "it changes the shape of the weight"),
    (r"\.(lora_mid\.weight|hada_t[12]|lokr_t2)$", "Tucker-decomposed factors are not supported"),
    (r"\.[ab][12]\.weight$", "GLoRA is not supported"),
    (r"\.(oft_|boft_)\w*(\.\w+)*$|\.rescale$", "OFT is not supported: it rotates the weight"),
    (r"\.(weight|bias)$", "this is a complete tensor, not a change of one"),
)
"""(pattern of a key, reason why it cannot be used), tried in order for keys without a known suffix."""
_TEXT_ENCODER = re.compile(r"^lora_te\d*_|^text_encoders?(_\d)?\.|^lora_te\d*\.")
IGNORED = {"lokr_factor": "how musubi-tuner split the sizes, which also follows from the shapes"}
"""Keys without an effect on the weights -> meaning."""
_ADAPTER = re.compile(r"\.(lora_[AB])\.[^.]+\.(weight|bias)$")
_BY_LENGTH = sorted(SUFFIXES, key=len, reverse=True)
_BLOCK = re.compile(r"blocks[._](\d+)(?:[._]|$)")


@dataclass(frozen=True)
class LoraKey:
    """A key of a LoRA file, split into its parts."""

    name: str
    """The complete key."""
    expert: str | None
    """The transformer in the prefix, if any."""
    path: str
    flat: bool
    """The path has `_` for each dot."""
    role: str | None
    """A value of `SUFFIXES`; None if unknown."""


def split_key(name: str) -> LoraKey:
    """Split a key into prefix, path and suffix, without PEFT's adapter name (`.lora_A.default.weight`)."""
    text = _ADAPTER.sub(r".\1.\2", name)
    suffix = next((s for s in _BY_LENGTH if text.endswith(s)), "")
    path = text.removesuffix(suffix)
    role = SUFFIXES.get(suffix)
    for prefix in FLAT_PREFIXES:
        if path.startswith(prefix):
            return LoraKey(name, None, path.removeprefix(prefix), True, role)
    expert = None
    while wrapper := next((w for w in WRAPPERS if path.startswith(w)), None):
        path = path.removeprefix(wrapper)
        expert = WRAPPERS[wrapper] or expert
    return LoraKey(name, expert, path, False, role)


def refusal(name: str) -> str | None:
    """The reason why such a key cannot be used in any model, or None."""
    return next((reason for pattern, reason in REFUSED if re.search(pattern, name)), None)


class Targets:
    """The tensors of one model that LoRA keys can change, by all their names in LoRA files."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.num_blocks = 1 + max((int(m[1]) for name in shapes if (m := _BLOCK.match(name))), default=-1)
        # Flat or dotted -> path -> Diffusers name.
        self._weights: dict[bool, dict[str, str]] = {False: {}, True: {}}
        self._biases: dict[bool, dict[str, str]] = {False: {}, True: {}}
        for name in shapes:
            for alias in {name, to_wan(name) or name}:
                table = self._biases if alias.endswith(".bias") else self._weights
                path = alias.removesuffix(".bias").removesuffix(".weight")
                table[False][path] = name
                table[True][path.replace(".", "_")] = name

    def find(self, key: LoraKey) -> str | None:
        """The Diffusers name of the tensor that `key` changes; None if the model has no such tensor.

        For `up_bias` and `alpha`, the weight of their layer.
        """
        weights, dot = self._weights[key.flat], "_" if key.flat else "."
        if key.role == "diff_b":
            return self._biases[key.flat].get(key.path)
        if key.role == "diff_m":
            tables = (f"{key.path}{dot}{name}" for name in ("modulation", "scale_shift_table"))
            return next((weights[table] for table in tables if table in weights), None)
        return weights.get(key.path)

    def reason_missing(self, key: LoraKey) -> str:
        """Why `find` returns None, with the most similar name of the model."""
        if _TEXT_ENCODER.match(key.name):
            return "LoRAs of text encoders are not supported"
        if (block := _BLOCK.match(key.path)) and int(block[1]) >= self.num_blocks:
            return f"the model has {self.num_blocks} blocks"
        if re.search(r"(k_img|v_img|add_k_proj|add_v_proj|norm_added_k)$|^img_emb|image_embedder", key.path):
            return "the model has no CLIP image input; this LoRA is for a Wan2.1 image-to-video model"
        if key.role == "diff_b" and self.find(LoraKey(key.name, None, key.path, key.flat, "diff")):
            return "this layer has no bias"
        if near := self._near(key):
            return f"no such layer; similar: {near}"
        return "no such layer"

    def _near(self, key: LoraKey) -> str | None:
        names: Iterable[str] = self._weights[key.flat]
        if block := _BLOCK.match(key.path):
            names = [name for name in names if name.startswith(block[0])]
        return next(iter(difflib.get_close_matches(key.path, names, n=1)), None)
