"""Read one LoRA file: its header, and the change of each tensor.

Shapes: the tensor is [N, ...]; its other axes are flattened to K. r is the rank.

| kind | tensors | added to the tensor |
|---|---|---|
| lora | down [r, K], up [N, r] | up @ down; a convolution's `down` is [r, C, kt, kh, kw] |
| diff | diff [N, ...] | diff; also of a bias, a norm or the modulation |
| loha | hada_w1_a, hada_w2_a [N, r], hada_w1_b, hada_w2_b [r, K] | (w1_a @ w1_b) * (w2_a @ w2_b) |
| lokr | lokr_w1 [a, b], lokr_w2 [c, d], each complete or as _a @ _b; N = ac, K = bd | kron(w1, w2) |

Source of the formulas: `comfy/weight_adapter/{lora,loha,lokr}.py` of ComfyUI, which follow LyCORIS.
"""

from __future__ import annotations

import functools
import math
import operator
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendit.checkpoint.component import noise_of
from ascendit.checkpoint.headers import read_header, read_values
from ascendit.checkpoint.reader import RowReader, ShardSpec
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.weight_sets import PICKLED
from ascendit.errors import CheckpointError, UsageError
from ascendit.report import shell_line
from ascendit.weights.lora.keys import IGNORED, LoraKey, split_key, without_wrappers

if TYPE_CHECKING:
    import torch


# ---- the file -----------------------------------------------------------------------------------

MERGE_FIX = "merge it into the model with the program that made it, and use the merged model"
MAX_SHOWN_KEYS = 5
"""Maximum number of keys listed in an error."""
SUFFIXES = (".safetensors", *PICKLED)
"""Endings of LoRA files."""
_ADAPTER_STEMS = ("adapter_model", "pytorch_lora_weights")


@dataclass(frozen=True)
class Problem:
    """A key that cannot be used, with the reason and a fix."""

    key: str
    reason: str
    fix: str = "use a LoRA for this model, or remove the key from the file if it is not needed"
    group: str = ""
    """The group of `SKIPPED` that the key is part of."""


@dataclass(frozen=True)
class LoraFile:
    """The header of a LoRA file."""

    path: Path
    infos: Mapping[str, TensorInfo]
    keys: tuple[LoraKey, ...]
    values: Mapping[str, Any] = field(default_factory=dict)
    """Alphas of layers that a pickle has as numbers, by key."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other values beside the tensors of a pickle."""


def open_file(path: Path) -> LoraFile:
    """Read the header of a LoRA file.

    Raises UsageError: E-USE-02 for a missing file, E-USE-01 for one that has none of the `SUFFIXES`;
    CheckpointError: those of `read_header`, E-LRA-01 for a file without keys.
    """
    if not path.exists():
        raise _missing(str(path))
    if path.is_dir() or path.suffix.lower() not in SUFFIXES:
        raise _not_a_lora(path)
    infos, beside = read_header(path), read_values(path)
    values = {name: value for name, value in beside.items() if _scales_a_layer(name)}
    keys = tuple(split_key(name) for name in (*infos, *values) if name not in IGNORED)
    if not infos:
        raise unusable_keys(path, 0, [Problem("(none)", "the file has no tensors")])
    return LoraFile(path, infos, keys, values, {n: x for n, x in beside.items() if n not in values})


def _scales_a_layer(name: str) -> bool:
    """Whether this is a key such as `blocks.0.attn1.to_q.alpha`, and not the alpha of all layers."""
    return "." in without_wrappers(name)[0] and split_key(name).role in ("alpha", "rslora")


def adapter_file(path: Path) -> Path:
    """The adapter or only LoRA file of a folder, safetensors first; other paths are returned unchanged."""
    files = _files_in(path) if os.path.isdir(path) else []
    files = [file for file in files if file.suffix == SUFFIXES[0]] or files
    files = [file for file in files if file.stem in _ADAPTER_STEMS] or files
    return files[0] if len(files) == 1 else path


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)


def _missing(text: str) -> UsageError:
    """The error for a path without a file, as the name of a repository, a URL or an unknown expert."""
    needs = "FILE[:WEIGHT], transformer=FILE[:WEIGHT] or transformer_2=FILE[:WEIGHT]"
    fix = "correct the path"
    hub, _, address = text.partition(":")
    name, equals, file = text.partition("=")
    if hub in ("hf", "ms", "http", "https"):
        needs = "a file on this machine; ascendit downloads models, but no LoRA files"
        fix = f"{_download(hub, address)}, and pass the path of the file"
    elif equals and name.isidentifier():
        example = shell_line([f"low={file}"])
        fix = f"correct the path, or write high= or low= instead of {name}=, as --lora {example}"
    return UsageError(f"no LoRA file at {text}", needs=needs, fix=fix, code="E-USE-02")


def _download(hub: str, address: str) -> str:
    """The shell command that downloads `hub:address`, `org/name[@revision][/file]` or the end of a URL."""
    if hub.startswith("http"):
        return shell_line(["curl", "-LO", f"{hub}://{address.lstrip('/')}"])  # a path has lost one slash
    org, _, others = address.partition("/")
    repo, _, file = others.partition("/")
    repo, _, revision = repo.partition("@")
    version = ["--revision", revision] if revision else []
    program = "hf" if hub == "hf" else "modelscope"
    return shell_line([program, "download", f"{org}/{repo}", *filter(None, [file]), *version])


def _not_a_lora(path: Path) -> UsageError:
    got = f"LoRA {path} is not a .safetensors file or one of torch.save"
    if path.is_dir():
        names = ", ".join(file.name for file in _files_in(path)[:3])
        got = f"LoRA {path} is a folder" + (f" with {names}" if names else "")
    needs = f"one file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, or a folder with one"
    noises = {noise_of(file.stem): file for file in (_files_in(path) if path.is_dir() else [])}
    fix = "pass the path of a .safetensors file"
    if len(noises) == len(_files_in(path)) == 2 and noises.keys() == {"high", "low"}:
        texts = [f"{noise}={noises[noise]}" for noise in ("high", "low")]
        fix = "pass one file for each expert: " + " ".join(shell_line(["--lora", text]) for text in texts)
    return UsageError(got, needs=needs, fix=fix)


def unusable_keys(path: Path, total: int, problems: list[Problem]) -> CheckpointError:
    """The error E-LRA-01 with the first keys that cannot be used, and the number of others."""
    problems = sorted(problems, key=lambda problem: problem.key)
    shown = "; ".join(f"{p.key}: {p.reason}" for p in problems[:MAX_SHOWN_KEYS])
    more = f"; and {len(problems) - MAX_SHOWN_KEYS} more" if len(problems) > MAX_SHOWN_KEYS else ""
    groups = sorted({problem.group for problem in problems})
    skip = " ".join(f"--lora-skip {group}" for group in groups)
    fixes = sorted((p.fix for p in problems if not p.group), key=lambda fix: fix == Problem.fix)
    fix = next(iter(fixes), f"use a LoRA for this model, or add {skip}")
    return CheckpointError(
        f"{path}: {len(problems)} of {total} keys cannot be used: {shown}{more}",
        needs="a LoRA in which every key changes a tensor of this model; no key is skipped silently",
        fix=fix,
        code="E-LRA-01",
    )


# ---- the change of a tensor, in float64 ---------------------------------------------------------

Factor = tuple[str, str, str]
"""Roles of one matrix: complete, left half, right half (left @ right); "" if the kind has no such tensor."""
FACTORS: dict[str, tuple[Factor, ...]] = {
    "lora": (("", "up", "down"),),
    "loha": (("", "hada_w1_a", "hada_w1_b"), ("", "hada_w2_a", "hada_w2_b")),
    "lokr": (("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b")),
    "diff": (("diff", "", ""),),
}
"""Kind -> its matrices, without `alpha` and `up_bias`."""
FACTOR_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Supported dtypes of factors and differences."""
Rows = Callable[[int, int], "torch.Tensor"]
"""(start, stop) -> the change of these rows, [stop - start, K] float64."""


@dataclass(frozen=True)
class Delta:
    """The change of one tensor by one module of a file."""

    kind: str
    """A key of `FACTORS`."""
    target: str
    tensors: Mapping[str, TensorInfo]
    """Role -> where it is stored."""
    scale: float
    """WEIGHT x alpha / rank."""

    def open(self) -> Rows:
        """Read the factors; return a function that computes rows of the change.

        Raises CheckpointError (E-LRA-01) for a value that is not finite.
        """
        rows = _kronecker(self.tensors) if self.kind == "lokr" else _product(self.tensors, self.kind)
        return lambda start, stop: rows(start, stop).mul_(self.scale)


def read_rows(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Read rows as [stop - start, K] float64.

    Raises CheckpointError (E-LRA-01) for values that are not finite.
    """
    import torch

    shard = ShardSpec(0, start, stop - start)
    with RowReader() as reader:
        rows = reader.read_tensor(info, shard).to(torch.float64).reshape(stop - start, -1)
    if not torch.isfinite(rows).all():
        raise CheckpointError(
            f"{info.file}: {info.name} has values that are not finite",
            needs="finite numbers in every tensor of a LoRA",
            fix="download the LoRA again, or use another checkpoint of its training",
            code="E-LRA-01",
        )
    return rows


def _matrix(tensors: Mapping[str, TensorInfo], whole: str, left: str, right: str) -> Rows:
    """Rows of a factor. Halves are held in memory; a complete matrix is read when needed."""
    if whole in tensors:
        info = tensors[whole]
        return lambda start, stop: read_rows(info, start, stop)
    a, b = (read_rows(tensors[half], 0, tensors[half].shape[0]) for half in (left, right))
    return lambda start, stop: a[start:stop] @ b


def _product(tensors: Mapping[str, TensorInfo], kind: str) -> Rows:
    """Rows of the elementwise product of all matrices of a kind."""
    matrices = [_matrix(tensors, *factor) for factor in FACTORS[kind]]
    return lambda start, stop: functools.reduce(operator.imul, (rows(start, stop) for rows in matrices))


def _kronecker(tensors: Mapping[str, TensorInfo]) -> Rows:
    import torch

    def complete(whole: str, left: str, right: str) -> torch.Tensor:
        height = tensors[whole if whole in tensors else left].shape[0]
        return _matrix(tensors, whole, left, right)(0, height)

    w1, w2 = (complete(*factor) for factor in FACTORS["lokr"])

    def rows(start: int, stop: int) -> torch.Tensor:
        """Row n of kron(w1, w2) is the outer product of row n // c of w1 and row n % c of w2."""
        n = torch.arange(start, stop)
        left, right = w1[n // len(w2)], w2[n % len(w2)]
        return (left[:, :, None] * right[:, None, :]).reshape(stop - start, -1)

    return rows


# ---- checks of the tensors of a module ----------------------------------------------------------


def roles_of(kind: str) -> tuple[str, ...]:
    """All roles of a module of this kind."""
    return tuple(role for factor in FACTORS[kind] for role in factor if role)


def missing_roles(kind: str, roles: Collection[str]) -> str:
    """The roles that are missing for a complete module, as text; empty if it is complete."""
    missing = []
    for whole, *halves in FACTORS[kind]:
        absent = [half for half in halves if half not in roles]
        if len(absent) == 1:
            missing += absent
        elif whole in roles and not absent:
            missing.append(f"either {whole} or its halves")
        elif whole not in roles and absent:
            missing += [whole] if whole else absent
    return " and ".join(missing)


def shape_problem(kind: str, tensors: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> str | None:
    """Why a complete module does not match a tensor of this shape; None if it does."""
    if kind == "diff":
        diff = tensors["diff"].shape
        return None if _core(diff) == _core(shape) else f"{list(diff)} does not match the {list(shape)}"
    flat = {role: (info.shape[0], math.prod(info.shape[1:])) for role, info in tensors.items()}
    for _, left, right in FACTORS[kind]:
        if left in flat and (flat[left][1] != flat[right][0] or not flat[right][0]):
            shapes = f"({left} {list(tensors[left].shape)}, {right} {list(tensors[right].shape)})"
            return f"{'ranks differ' if flat[right][0] else 'the rank is 0'} {shapes}"
    sizes = [
        flat[whole] if whole in flat else (flat[left][0], flat[right][1])
        for whole, left, right in FACTORS[kind]
    ]
    if kind == "lokr":
        sizes = [(sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1])]
    if any(size != (shape[0], math.prod(shape[1:])) for size in sizes):
        return f"its product {list(sizes[0])} does not match the {list(shape)}"
    if kind == "lora" and len(down := tensors["down"].shape) == len(shape) and down[1:] != shape[1:]:
        return f"down {list(down)} has another kernel size than the {list(shape)}"
    return None


def rank_of(kind: str, tensors: Mapping[str, TensorInfo]) -> int | None:
    """The rank, which divides `alpha`; None if there is no rank: `alpha` is then ignored, as in LyCORIS."""
    rights = [right for _, _, right in FACTORS[kind] if right in tensors]
    if not rights:
        return None
    return tensors[rights[-1 if kind == "lokr" else 0]].shape[0]


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without leading axes of size 1, which are optional in modulation tables."""
    return shape if not shape or shape[0] != 1 else _core(shape[1:])
