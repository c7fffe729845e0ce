"""How one and the same tensor is spelled by different tools, and its Diffusers name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from ascendit.checkpoint.names import to_diffusers, to_wan

Naming = Literal["diffusers", "wan"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What ComfyUI and others put before every name of a transformer."""
_WRAPPED = re.compile(r"\.linear(\.(?:weight(?:_\w+)?|bias))$|\.div(\.mul_scale)$")
"""msModelSlim moves a smoothed layer X to `X.linear` and puts `X.div.mul_scale` before it."""
_LEFTOVER = re.compile(r"(\.attn[12]\.)to_((?:[qk]_rot|quant_type))$")
"""SGLang and vLLM-Omni replace `self_attn.q` wherever it stands, in `self_attn.q_rot` too."""


def naming_of(names: Iterable[str]) -> Naming | None:
    """Whose names these are; None when no name is one of a Wan transformer."""
    votes = {"diffusers": 0, "wan": 0}
    known = False
    for name in names:
        bare = unwrapped(name)
        wan, diffusers = to_diffusers(bare) is not None, to_wan(bare) is not None
        known |= wan or diffusers
        votes["wan"] += wan and not diffusers
        votes["diffusers"] += diffusers and not wan
    if not known:
        return None
    return "wan" if votes["wan"] > votes["diffusers"] else "diffusers"


def canonical(name: str, naming: Naming) -> str:
    """The Diffusers name of a tensor or manifest entry, without prefix and wrapper.

    `naming` decides where both tell different things by one name, as `norm2` does. A name that nobody
    knows comes back without its prefix.
    """
    bare = unwrapped(name)
    if naming == "diffusers" and to_wan(bare) is not None:
        return bare
    return to_diffusers(bare) or _LEFTOVER.sub(r"\1\2", bare)


def unwrapped(name: str) -> str:
    """Without the prefix of a whole model and the wrapper of a smoothed layer."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    return _WRAPPED.sub(lambda found: found[1] or found[2], name)


def on_disk(name: str, naming: Naming) -> str:
    """A Diffusers name as the files spell it, for messages."""
    return (to_wan(name) or name) if naming == "wan" else name
