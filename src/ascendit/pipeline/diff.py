"""Two checkpoints side by side, whatever layouts they lie in: names are compared as Diffusers has them.

Headers and configs only. Equal headers do not make equal numbers: `Diff.hashes` says whether those could be
compared, which takes the sha256 that ascendit leaves in `ascendit.json`. torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ascendit.checkpoint.expert import Expert
from ascendit.checkpoint.store import TensorInfo
from ascendit.pipeline.diff_report import NOT_COMPARED, Change, Diff, Kind
from ascendit.pipeline.expert_report import CONTAINERS, Summary, spelled
from ascendit.pipeline.inspect import inspect
from ascendit.pipeline.inspect_report import Report
from ascendit.pipeline.part_report import PartReport
from ascendit.spec import WanConfig

HEADS = ("num_attention_heads", "attention_head_dim")
VERSIONS = ("transformers_version", "torch_dtype", "dtype")
"""Keys of a config that say who wrote it and how; keys with a leading underscore do so too."""


def diff(a: Path | str | Report, b: Path | str | Report) -> Diff:
    """Compare two checkpoints of any layout; paths as for `inspect`, or what it returned.

    Raises what `inspect` raises. An expert that could not be understood is compared by the names on disk.
    """
    a = a if isinstance(a, Report) else inspect(a)
    b = b if isinstance(b, Report) else inspect(b)
    return Diff(a=a, b=b, changes=tuple(_changes(a, b)), hashes=_hashes(a, b))


def _changes(a: Report, b: Report) -> Iterator[Change]:
    left, right = ({p.name: p for p in report.parts} for report in (a, b))
    for name in dict.fromkeys([*left, *right]):
        if name not in left or name not in right:
            yield Change(part="parts", kind="part", name=name, a=_class(left, name), b=_class(right, name))
            continue
        one, other = left[name], right[name]
        if one.summary is not None and other.summary is not None:
            pairs = _expert_changes(one.summary, other.summary)
        else:
            pairs = _tensor_changes({t.name: t for t in one.tensors}, {t.name: t for t in other.tensors})
        for kind, key, x, y in pairs:
            yield Change(part=name, kind=kind, name=key, a=x, b=y)
        for key, x, y in _differing(*_configs(a, b, name)):
            yield Change(part=name, kind="config", name=key, a=x, b=y)
    if a.is_pipeline and b.is_pipeline:
        plain = [{k: v for k, v in r.layout.index.items() if not isinstance(v, list)} for r in (a, b)]
        for key, x, y in _differing(*map(_without_versions, plain)):
            yield Change(part="model_index.json", kind="config", name=key, a=x, b=y)


_Found = Iterator[tuple[Kind, str, Any, Any]]


def _expert_changes(one: Summary, other: Summary) -> _Found:
    left, right = dict.fromkeys(one.linears), dict.fromkeys(other.linears)
    a, b = one.expert, other.expert
    alike: set[str] = set()
    for name in [n for n in left if n in right]:
        if (x := _word(a, name)) != (y := _word(b, name)):
            yield "scheme", name, x, y
        else:
            alike.add(name)
        if (xs := _smooth(a, name)) != (ys := _smooth(b, name)):
            yield "smoothing", name, xs, ys
        if (left_shape := _shape(a, name)) != (right_shape := _shape(b, name)):
            yield "shape", f"{name}.weight", left_shape, right_shape
    yield from _tensor_changes(_others(a, left, right, alike), _others(b, left, right, alike))
    for key, x, y in _differing(a.attention, b.attention):
        yield "attention", key.removesuffix(".quant_type"), x, y


def _others(
    expert: Expert, left: Mapping[str, None], right: Mapping[str, None], alike: set[str]
) -> dict[str, TensorInfo]:
    """What is compared one by one: not the codes, and the scales only of layers that are alike."""
    found = {}
    for name, info in expert.tensors.items():
        layer, _, role = name.rpartition(".")
        in_both = layer in left and layer in right
        follows = role not in ("bias", "mul_scale") and layer not in alike
        if in_both and (role in ("weight", "mul_scale") or follows):
            continue
        found[name] = info
    return found


def _tensor_changes(a: Mapping[str, TensorInfo], b: Mapping[str, TensorInfo]) -> _Found:
    for name in dict.fromkeys([*a, *b]):
        x, y = a.get(name), b.get(name)
        if x is None or y is None:
            yield "tensor", name, _stored(x), _stored(y)
            continue
        if x.shape != y.shape:
            yield "shape", name, list(x.shape), list(y.shape)
        if x.dtype != y.dtype:
            yield "dtype", name, spelled(x.dtype), spelled(y.dtype)


def _word(expert: Expert, layer: str) -> str:
    """`mxfp4`, `mxfp4 in an FP8 container`, `bf16`, `fp32`."""
    found = expert.layers.get(layer)
    if found is None or found.scheme == "bf16":
        return spelled(expert.tensors[f"{layer}.weight"].dtype)
    where = CONTAINERS[found.container].partition(",")[0] if found.container in ("e4m3", "bf16") else ""
    return f"{found.scheme} {where}".rstrip()


def _smooth(expert: Expert, layer: str) -> str | None:
    found = expert.layers.get(layer)
    return "mul_scale" if found is not None and "mul_scale" in found.tensors else None


def _shape(expert: Expert, layer: str) -> list[int]:
    found = expert.layers.get(layer)
    return list(found.shape if found is not None else expert.tensors[f"{layer}.weight"].shape)


def _stored(info: TensorInfo | None) -> str | None:
    return None if info is None else f"{spelled(info.dtype)} {list(info.shape)}"


def _class(parts: Mapping[str, PartReport], name: str) -> str | None:
    return parts[name].class_name if name in parts else None


def _configs(a: Report, b: Report, name: str) -> Iterator[dict[str, Any]]:
    """The configs of a part in both, without what only says who wrote them.

    Those of transformers as they are understood: with Diffusers' defaults, `quantization_config` key by key,
    and without the number of heads where one side does not tell it.
    """
    experts = [next(p for p in report.parts if p.name == name).expert for report in (a, b)]
    for report, expert in zip((a, b), experts, strict=True):
        if expert is None or None in experts:
            yield _without_versions(report.layout.parts[name].config)
            continue
        config = {**WanConfig().to_dict(), **_without_versions(expert.config)}
        config |= {f"quantization_config.{key}": value for key, value in (expert.marker or {}).items()}
        unsure = any(e is not None and e.config_problem for e in experts)
        yield {key: value for key, value in config.items() if not (unsure and key in HEADS)}


def _without_versions(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in VERSIONS}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*a, *b]):
        x, y = a.get(key), b.get(key)
        if (list(x) if isinstance(x, tuple) else x) != (list(y) if isinstance(y, tuple) else y):
            yield key, x, y


def _hashes(a: Report, b: Report) -> str:
    """Compare the sha256 of the weight files, where both sides have them for files of the same names."""
    left, right = _file_hashes(a), _file_hashes(b)
    if not left or set(left) != set(right):
        return NOT_COMPARED
    return "same" if left == right else "different"


def _file_hashes(report: Report) -> dict[str, Any]:
    """Weight file -> sha256, as it was when ascendit wrote it."""
    files = (report.record or {}).get("files")
    found = files.items() if isinstance(files, dict) else ()
    return {name: value for name, value in found if name.endswith(".safetensors")}
