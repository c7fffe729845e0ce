"""One LoRA file: its header, its keys, and the settings that PEFT keeps outside the tensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascendit.checkpoint.lora_names import IGNORED, Key, split_key
from ascendit.checkpoint.part import read_json
from ascendit.checkpoint.store import TensorInfo, read_header
from ascendit.errors import CheckpointError, UsageError

SHOWN = 5
"""How many keys an error names."""
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


@dataclass(frozen=True)
class Problem:
    """A key that cannot be used, why, and what helps."""

    key: str
    why: str
    fix: str = "use a LoRA made for this model; or remove the key from the file, if you can do without it"


@dataclass(frozen=True)
class Scaling:
    """What PEFT keeps outside the tensors: `lora_alpha`, exceptions from it, and what it is divided by."""

    alpha: float | None = None
    exceptions: Mapping[str, float] = field(default_factory=dict)
    """The end of a layer's name -> its alpha."""
    over_root: bool = False
    """Divide by sqrt(rank), as rsLoRA does."""

    def of(self, path: str, rank: int) -> float:
        """The scale of a layer whose file has no `alpha` tensor for it."""
        named = (a for end, a in self.exceptions.items() if path == end or path.endswith(f".{end}"))
        alpha = next(named, self.alpha)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.over_root else rank)


@dataclass(frozen=True)
class LoraFile:
    """The header of a file."""

    path: Path
    infos: Mapping[str, TensorInfo]
    keys: tuple[Key, ...]
    scalings: Mapping[str | None, Scaling]
    """By the expert that a key names."""

    @property
    def names_experts(self) -> bool:
        """`transformer.` stands before the keys of any expert; beside `transformer_2.` it means the first."""
        return any(key.expert == "transformer_2" for key in self.keys)

    def scaling(self, key: Key) -> Scaling:
        """What scales a module that has no `alpha`."""
        return self.scalings.get(key.expert, self.scalings[None])


def open_file(path: Path) -> LoraFile:
    """Read the header. Raises UsageError E-USE-01/02 for a path that is no safetensors file, CheckpointError
    E-CKP-02 for a damaged one and E-LRA-01 for one without keys or with settings that cannot be followed."""
    if not path.exists():
        raise UsageError(
            f"no LoRA file at {path}",
            needs="FILE[:WEIGHT], transformer=FILE[:WEIGHT] or transformer_2=FILE[:WEIGHT]",
            fix="correct the path",
            code="E-USE-02",
        )
    if path.is_dir() or path.suffix != ".safetensors":
        raise _not_safetensors(path)
    infos = read_header(path)
    keys = tuple(split_key(name) for name in infos if name not in IGNORED)
    if not keys:
        raise refused(path, 0, [Problem("(none)", "the file holds no tensors")])
    return LoraFile(path, infos, keys, _scalings(path))


def _not_safetensors(path: Path) -> UsageError:
    found = f"LoRA {path} is no .safetensors file"
    fix = "give the path of a .safetensors file"
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.safetensors"))
        found = f"LoRA {path} is a folder" + (f", which holds {', '.join(inside[:3])}" if inside else "")
    elif path.suffix in _PICKLES:
        found += ": a pickle can run any code when it is read"
        fix = "save its tensors with safetensors.torch.save_file, on a machine where you trust the file"
    return UsageError(found, needs="one .safetensors file", fix=fix, code="E-USE-01")


def refused(path: Path, total: int, problems: list[Problem]) -> CheckpointError:
    """E-LRA-01: the first keys that cannot be used, and how many more there are."""
    problems = sorted(problems, key=lambda problem: problem.key)
    shown = "; ".join(f"{p.key}: {p.why}" for p in problems[:SHOWN])
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return CheckpointError(
        f"{path}: {len(problems)} of {total} keys cannot be used: {shown}{more}",
        needs="every key of a LoRA to change a tensor of this model; none is left out in silence",
        fix=problems[0].fix,
        code="E-LRA-01",
    )


def _scalings(path: Path) -> dict[str | None, Scaling]:
    """Diffusers keeps `lora_adapter_metadata` in the header, PEFT `adapter_config.json` beside the file."""
    text = _metadata(path).get("lora_adapter_metadata")
    if text is not None:
        try:
            config = json.loads(text)
        except (TypeError, ValueError, RecursionError) as e:
            raise refused(path, 1, [Problem("lora_adapter_metadata", f"not JSON ({e})")]) from e
        prefixes = ("transformer", "transformer_2")
        parts = {p: _below(config, f"{p}.") for p in prefixes} if isinstance(config, dict) else {}
        found: dict[str | None, Scaling] = {
            prefix: _scaling(path, part) for prefix, part in parts.items() if part
        }
        return {None: found.get("transformer", Scaling()), **found}
    beside = path.parent / "adapter_config.json"
    if path.name == "adapter_model.safetensors" and beside.exists():
        return {None: _scaling(path, read_json(beside))}
    return {None: Scaling()}


def _metadata(path: Path) -> dict[str, Any]:
    """`__metadata__` of a file whose header `read_header` found good."""
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    found = header.get("__metadata__")
    return found if isinstance(found, dict) else {}


def _below(config: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}


def _scaling(path: Path, config: dict[str, Any]) -> Scaling:
    """Of a PEFT configuration; what it asks for and cannot be done is refused."""
    alpha, exceptions = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        why = f"PEFT's {kind} is not folded"
    elif config.get("use_dora"):
        why = "DoRA is not folded: it rescales whole rows of the weight"
    elif not (alpha is None or _number(alpha)) or not isinstance(exceptions, dict):
        why = f"lora_alpha = {alpha!r} and alpha_pattern = {exceptions!r} are no scales"
    elif odd := [k for k, v in exceptions.items() if not _number(v) or re.search(r"[^\w.^-]", k)]:
        why = f"alpha_pattern has {odd[0]!r}, which is no layer's name with a number"
    else:
        plain = {k.removeprefix("^"): float(v) for k, v in exceptions.items()}
        return Scaling(None if alpha is None else float(alpha), plain, config.get("use_rslora") is True)
    raise refused(
        path, 1, [Problem("the file's PEFT settings", why, "merge it with PEFT, then quantize the result")]
    )


def _number(value: object) -> bool:
    """Something to scale by."""
    return isinstance(value, int | float) and math.isfinite(value) and bool(value) and value is not True
