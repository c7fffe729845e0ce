"""One LoRA file: its header, the settings that PEFT stores elsewhere, and what a module adds to a tensor.

Shapes: the tensor is [N, ...]; its other axes are flattened to K. r is the rank.

| kind | tensors | what is added |
|---|---|---|
| lora | down [r, K], up [N, r] | up @ down; a convolution's `down` is [r, C, kt, kh, kw] |
| diff | diff [N, ...] | diff; also of a bias, a norm or the modulation |
| loha | hada_w1_a, hada_w2_a [N, r], hada_w1_b, hada_w2_b [r, K] | (w1_a @ w1_b) * (w2_a @ w2_b) |
| lokr | lokr_w1 [a, b], lokr_w2 [c, d], each whole or as _a @ _b; N = ac, K = bd | kron(w1, w2) |

Sources of the formulas: `comfy/weight_adapter/{lora,loha,lokr}.py` of ComfyUI, which follow LyCORIS.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendit.checkpoint.component import EXPERTS, read_json
from ascendit.checkpoint.reader import RowReader, ShardSpec, TensorInfo, read_header
from ascendit.errors import CheckpointError, UsageError
from ascendit.weights.lora.keys import IGNORED, Key, split_key

if TYPE_CHECKING:
    import torch


# ---- the file -----------------------------------------------------------------------------------

MAX_SHOWN_KEYS = 5
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
    """What PEFT stores outside the tensors: `lora_alpha`, exceptions from it, and what it is divided by."""

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
    return UsageError(found, needs="one .safetensors file", fix=fix)


def refused(path: Path, total: int, problems: list[Problem]) -> CheckpointError:
    """E-LRA-01: the first keys that cannot be used, and how many more there are."""
    problems = sorted(problems, key=lambda problem: problem.key)
    shown = "; ".join(f"{p.key}: {p.why}" for p in problems[:MAX_SHOWN_KEYS])
    more = f"; and {len(problems) - MAX_SHOWN_KEYS} more" if len(problems) > MAX_SHOWN_KEYS else ""
    return CheckpointError(
        f"{path}: {len(problems)} of {total} keys cannot be used: {shown}{more}",
        needs="every key of a LoRA to change a tensor of this model; none is left out in silence",
        fix=problems[0].fix,
        code="E-LRA-01",
    )


def _scalings(path: Path) -> dict[str | None, Scaling]:
    """Diffusers keeps `lora_adapter_metadata` in the header, PEFT `adapter_config.json` beside the file."""
    text = _metadata(path).get("lora_adapter_metadata")
    if text is None:
        beside = path.parent / "adapter_config.json"
        is_peft = path.name == "adapter_model.safetensors" and beside.exists()
        return {None: _scaling(path, read_json(beside)) if is_peft else Scaling()}
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError) as e:
        raise refused(path, 1, [Problem("lora_adapter_metadata", f"not JSON ({e})")]) from e
    scalings: dict[str | None, Scaling] = {}
    for prefix in EXPERTS:
        items = config.items() if isinstance(config, dict) else ()
        part = {k.removeprefix(f"{prefix}."): v for k, v in items if k.startswith(f"{prefix}.")}
        if part:
            scalings[prefix] = _scaling(path, part)
    return {None: scalings.get("transformer", Scaling()), **scalings}


def _metadata(path: Path) -> dict[str, Any]:
    """`__metadata__` of a file whose header `read_header` found good."""
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    found = header.get("__metadata__")
    return found if isinstance(found, dict) else {}


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


# ---- what a module adds, in float64 -------------------------------------------------------------

Factor = tuple[str, str, str]
"""Roles of one matrix: stored whole, or as the product of two halves; "" where a kind has no such tensor."""
FACTORS: dict[str, tuple[Factor, ...]] = {
    "lora": (("", "up", "down"),),
    "loha": (("", "hada_w1_a", "hada_w1_b"), ("", "hada_w2_a", "hada_w2_b")),
    "lokr": (("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b")),
    "diff": (("diff", "", ""),),
}
"""Kind -> the matrices that make it up, without `alpha` and `up_bias`."""
FACTOR_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""What factors and deltas may be stored as."""
Rows = Callable[[int, int], "torch.Tensor"]
"""(start, stop) -> what is added to these rows, [stop - start, K] float64."""


@dataclass(frozen=True)
class Delta:
    """One module of one file and the tensor that it changes."""

    kind: str
    """A key of `FACTORS`."""
    target: str
    tensors: Mapping[str, TensorInfo]
    """Role -> where it is stored."""
    scale: float
    """WEIGHT x alpha / rank."""

    def open(self) -> Rows:
        """Read the factors. Raises CheckpointError E-LRA-01 for a value that is not finite."""
        rows = _kronecker(self.tensors) if self.kind == "lokr" else _product(self.tensors, self.kind)
        return lambda start, stop: rows(start, stop).mul_(self.scale)


def read_rows(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Rows of a stored tensor, [stop - start, K] float64, in memory of their own."""
    import torch

    part = ShardSpec(0, start, stop - start)
    with RowReader() as reader:
        rows = reader.tensor(info, part).to(torch.float64).reshape(stop - start, -1)
    if not torch.isfinite(rows).all():
        raise CheckpointError(
            f"{info.file}: {info.name} holds values that are not finite",
            needs="numbers in every tensor of a LoRA",
            fix="get the LoRA again, or another checkpoint of its training",
            code="E-LRA-01",
        )
    return rows


def _matrix(tensors: Mapping[str, TensorInfo], whole: str, left: str, right: str) -> Rows:
    """Rows of a factor. Halves are kept in memory; a whole one is read as it is needed."""
    if whole in tensors:
        info = tensors[whole]
        return lambda start, stop: read_rows(info, start, stop)
    a, b = (read_rows(tensors[half], 0, tensors[half].shape[0]) for half in (left, right))
    return lambda start, stop: a[start:stop] @ b


def _product(tensors: Mapping[str, TensorInfo], kind: str) -> Rows:
    """Rows of all matrices of a kind, multiplied one by one."""
    matrices = [_matrix(tensors, *factor) for factor in FACTORS[kind]]
    return lambda start, stop: functools.reduce(operator.imul, (rows(start, stop) for rows in matrices))


def _kronecker(tensors: Mapping[str, TensorInfo]) -> Rows:
    import torch

    def complete(whole: str, left: str, right: str) -> torch.Tensor:
        height = tensors[whole if whole in tensors else left].shape[0]
        return _matrix(tensors, whole, left, right)(0, height)

    w1, w2 = (complete(*factor) for factor in FACTORS["lokr"])

    def rows(start: int, stop: int) -> torch.Tensor:
        """Row n of kron(w1, w2) is row n // c of w1 times row n % c of w2, all pairs."""
        n = torch.arange(start, stop)
        left, right = w1[n // len(w2)], w2[n % len(w2)]
        return (left[:, :, None] * right[:, None, :]).reshape(stop - start, -1)

    return rows


# ---- whether the tensors of a module fit together -----------------------------------------------


def roles_of(kind: str) -> tuple[str, ...]:
    """All roles that a module of this kind can have."""
    return tuple(role for factor in FACTORS[kind] for role in factor if role)


def gaps(kind: str, found: Collection[str]) -> str:
    """The roles that `found` lacks to be a whole module, as words; empty when it is whole."""
    missing = []
    for whole, *halves in FACTORS[kind]:
        absent = [half for half in halves if half not in found]
        if len(absent) == 1:
            missing += absent
        elif whole in found and not absent:
            missing.append(f"either {whole} or its halves")
        elif whole not in found and absent:
            missing += [whole] if whole else absent
    return " and ".join(missing)


def misfit(kind: str, tensors: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> str | None:
    """Why the tensors of a whole module do not make a change of a tensor of this shape; None: they do."""
    if kind == "diff":
        found = tensors["diff"].shape
        return None if _core(found) == _core(shape) else f"{list(found)} is no change of the {list(shape)}"
    flat = {role: (info.shape[0], math.prod(info.shape[1:])) for role, info in tensors.items()}
    for _, left, right in FACTORS[kind]:
        if left in flat and (flat[left][1] != flat[right][0] or not flat[right][0]):
            return f"ranks differ ({left} {list(tensors[left].shape)}, {right} {list(tensors[right].shape)})"
    made = [
        flat[whole] if whole in flat else (flat[left][0], flat[right][1])
        for whole, left, right in FACTORS[kind]
    ]
    if kind == "lokr":
        made = [(made[0][0] * made[1][0], made[0][1] * made[1][1])]
    if any(size != (shape[0], math.prod(shape[1:])) for size in made):
        return f"makes {list(made[0])}, which is no change of the {list(shape)}"
    if kind == "lora" and len(down := tensors["down"].shape) == len(shape) and down[1:] != shape[1:]:
        return f"down {list(down)} has another kernel than the {list(shape)}"
    return None


def rank_of(kind: str, tensors: Mapping[str, TensorInfo]) -> int | None:
    """The rank that `alpha` is divided by; None: there is none, and `alpha` means nothing (as in LyCORIS)."""
    rights = [right for _, _, right in FACTORS[kind] if right in tensors]
    if not rights:
        return None
    return tensors[rights[-1 if kind == "lokr" else 0]].shape[0]


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the leading axes of size 1, which modulation tables have or have not."""
    return shape if not shape or shape[0] != 1 else _core(shape[1:])
