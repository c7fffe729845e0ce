"""Two checkpoints side by side, whatever their layouts: names are compared as Diffusers has them.

Headers and configs only. Equal headers do not make equal numbers: `Diff.hashes` says whether those could be
compared, which takes the sha256 that ascendit leaves in `ascendit.json`. torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ascendit.checkpoint.quant_metadata import QUANT_TYPE
from ascendit.checkpoint.reader import TensorInfo
from ascendit.checkpoint.transformer import Expert
from ascendit.family import WanConfig
from ascendit.inspect.checkpoint import inspect
from ascendit.inspect.report import ModelReport, PartReport
from ascendit.inspect.transformer_report import CONTAINERS, ExpertSummary, dtype_name
from ascendit.names import grouped, sort_names
from ascendit.report import human_bytes

ChangeKind = Literal["part", "tensor", "scheme", "smoothing", "shape", "dtype", "attention", "config"]
LAYER_KINDS = ("scheme", "smoothing", "attention")
"""Changes of these kinds have the name of a layer, the others that of a tensor."""
MAX_LINES = 12  # lines for one kind of difference on a screen; --json has all
MAX_WIDTH = 100
NOT_COMPARED = "not compared: headers only (both need the sha256 of the same files in ascendit.json)"
SAME_HEADERS = "the same headers and configs, other numbers"

HEAD_KEYS = ("num_attention_heads", "attention_head_dim")
VERSION_KEYS = ("transformers_version", "torch_dtype", "dtype")
"""Keys of a config that say who wrote it and how; keys with a leading underscore do so too."""

_Found = Iterator[tuple[ChangeKind, str, Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that differs. `a`, `b`: plain values; None where that side has no such thing."""

    part: str
    kind: ChangeKind
    name: str
    a: Any
    b: Any

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("part", "kind", "name", "a", "b")}


@dataclass(frozen=True, kw_only=True)
class Diff:
    """What differs between the checkpoints `a` and `b`."""

    a: ModelReport
    b: ModelReport
    changes: tuple[Change, ...]
    hashes: str
    """`same`, `different`, or why they say nothing."""

    @property
    def same(self) -> bool:
        """Whether nothing differs that was compared."""
        return not self.changes and self.hashes != "different"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: plain data."""
        return {
            "same": self.same,
            "a": _side(self.a),
            "b": _side(self.b),
            "hashes": self.hashes,
            "changes": [change.as_dict() for change in self.changes],
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        sides = [_side(self.a), _side(self.b)]
        lines = [
            f"{title:<9}  {side['name']}   layout {side['kind']}   {side['format']}   "
            f"{human_bytes(side['nbytes'])}   {side['path']}"
            for title, side in zip(("A", "B"), sides, strict=True)
        ]
        for title, report in (("A", self.a), ("B", self.b)):
            lines += [f"{'Problem':<9}  {title}  {text}" for text in report.problem_texts()]
        for title, changes in _by_part(self.changes):
            lines += ["", title, *_part_lines(changes, self)]
        before, after = (side["nbytes"] for side in sides)
        ratio = f"   {after / before:.3f} x" if before else ""
        lines += [
            "",
            f"{'Bytes':<9}  {human_bytes(before)} -> {human_bytes(after)} in the transformers{ratio}",
        ]
        source = "" if self.hashes == NOT_COMPARED else " by the sha256 in ascendit.json"
        lines.append(f"{'Values':<9}  {self.hashes}{source}")
        verdict = f"{len(self.changes)} differences"
        if not self.changes:
            same = self.hashes != "different"
            verdict = "headers and configs are the same" if same else SAME_HEADERS
        return [*lines, f"{'Result':<9}  {verdict}"]


def diff(a: Path | str | ModelReport, b: Path | str | ModelReport) -> Diff:
    """Compare two checkpoints of any layout; paths as for `inspect`, or what it returned.

    Raises what `inspect` raises. An expert that could not be understood is compared by the names on disk.
    """
    a = a if isinstance(a, ModelReport) else inspect(a)
    b = b if isinstance(b, ModelReport) else inspect(b)
    return Diff(a=a, b=b, changes=tuple(_changes(a, b)), hashes=_hashes(a, b))


# ---- what differs -------------------------------------------------------------------------------


def _changes(a: ModelReport, b: ModelReport) -> Iterator[Change]:
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


def _expert_changes(one: ExpertSummary, other: ExpertSummary) -> _Found:
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
        yield "attention", key.removesuffix(QUANT_TYPE), x, y


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
            yield "dtype", name, dtype_name(x.dtype), dtype_name(y.dtype)


def _word(expert: Expert, layer: str) -> str:
    """`mxfp4`, `mxfp4 in an FP8 container`, `bf16`, `fp32`."""
    found = expert.layers.get(layer)
    if found is None or found.scheme == "bf16":
        return dtype_name(expert.tensors[f"{layer}.weight"].dtype)
    where = CONTAINERS[found.container].partition(",")[0] if found.container in ("e4m3", "bf16") else ""
    return f"{found.scheme} {where}".rstrip()


def _smooth(expert: Expert, layer: str) -> str | None:
    found = expert.layers.get(layer)
    return "mul_scale" if found is not None and "mul_scale" in found.tensors else None


def _shape(expert: Expert, layer: str) -> list[int]:
    found = expert.layers.get(layer)
    return list(found.shape if found is not None else expert.tensors[f"{layer}.weight"].shape)


def _stored(info: TensorInfo | None) -> str | None:
    return None if info is None else f"{dtype_name(info.dtype)} {list(info.shape)}"


def _class(parts: Mapping[str, PartReport], name: str) -> str | None:
    return parts[name].class_name if name in parts else None


def _configs(a: ModelReport, b: ModelReport, name: str) -> Iterator[dict[str, Any]]:
    """The configs of a part in both, without what only says who wrote them.

    Those of transformers as they are understood: with Diffusers' defaults, `quantization_config` key by key,
    and without the number of heads if one side does not know it.
    """
    experts = [next(p for p in report.parts if p.name == name).expert for report in (a, b)]
    for report, expert in zip((a, b), experts, strict=True):
        if expert is None or None in experts:
            yield _without_versions(report.layout.parts[name].config)
            continue
        config = {**WanConfig().to_dict(), **_without_versions(expert.config)}
        config |= {f"quantization_config.{key}": value for key, value in (expert.marker or {}).items()}
        unsure = any(e is not None and e.config_problem for e in experts)
        yield {key: value for key, value in config.items() if not (unsure and key in HEAD_KEYS)}


def _without_versions(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in VERSION_KEYS}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*a, *b]):
        x, y = a.get(key), b.get(key)
        if (list(x) if isinstance(x, tuple) else x) != (list(y) if isinstance(y, tuple) else y):
            yield key, x, y


def _hashes(a: ModelReport, b: ModelReport) -> str:
    """Compare the sha256 of the weight files, where both sides have them for files of the same names."""
    left, right = _file_hashes(a), _file_hashes(b)
    if not left or set(left) != set(right):
        return NOT_COMPARED
    return "same" if left == right else "different"


def _file_hashes(report: ModelReport) -> dict[str, Any]:
    """Weight file -> sha256, as it was when ascendit wrote it."""
    files = (report.record or {}).get("files")
    found = files.items() if isinstance(files, dict) else ()
    return {name: value for name, value in found if name.endswith(".safetensors")}


# ---- the words for it ---------------------------------------------------------------------------


def _side(report: ModelReport) -> dict[str, Any]:
    formats = dict.fromkeys(part.format for part in report.experts)
    return {
        "name": report.layout.name,
        "path": str(report.layout.root),
        "kind": report.layout.kind,
        "ok": report.ok,
        "format": " / ".join(formats),
        "nbytes": sum(part.nbytes for part in report.experts),
    }


def _by_part(changes: Iterable[Change]) -> Iterator[tuple[str, list[Change]]]:
    """The changes of each part; parts that differ in the same way stand together."""
    parts: dict[str, list[Change]] = {}
    for c in changes:
        parts.setdefault(c.part, []).append(c)
    alike: dict[str, list[str]] = {}
    for part, found in parts.items():
        alike.setdefault(repr([(c.kind, c.name, c.a, c.b) for c in found]), []).append(part)
    for names in alike.values():
        yield ", ".join(names), parts[names[0]]


def _part_lines(changes: list[Change], found: Diff) -> list[str]:
    """Equal changes of many layers share a line; those of a config have one each."""
    alike: dict[tuple[str, ...], list[Change]] = {}
    for c in changes:
        alike.setdefault(_what(c), []).append(c)
    texts: dict[str, list[str]] = {}
    for what, members in alike.items():
        texts.setdefault(what[0], []).append(_alike_text(members, found))
    return [line for title, lines in texts.items() for line in _limited(title, lines)]


def _what(change: Change) -> tuple[str, ...]:
    """Title first; changes that have all of it in common are alike."""
    if change.kind in ("tensor", "part"):
        return (f"only in {'A' if change.b is None else 'B'}",)
    alone = (change.name,) if change.kind == "config" else ()
    return (change.kind, _text(change.a), _text(change.b), *alone)


def _alike_text(members: list[Change], found: Diff) -> str:
    first = members[0]
    step = f"{_text(first.a)} -> {_text(first.b)}"
    if first.kind == "config":
        return f"{first.name}  {step}"
    names = [c.name for c in members]
    words = ", ".join(_words(first, names, found))
    many = f"   ({len(names)})" if len(names) > 1 else ""
    return f"{words}{many}" if first.kind in ("tensor", "part") else f"{step}   {words}{many}"


def _words(change: Change, names: list[str], found: Diff) -> Iterator[str]:
    """`blocks.0-4` for layers, `bias of blocks.0-4` for tensors."""
    if change.kind == "part":
        yield from names
        return
    every = _every_name(change, found) + names
    if change.kind in LAYER_KINDS:
        yield from grouped(names, dict.fromkeys(every))
        return
    owners = _by_role(every)
    for role, chosen in _by_role(names).items():
        words = ", ".join(grouped(chosen, owners[role]))
        yield f"{role} of {words}" if words else role


def _by_role(names: Iterable[str]) -> dict[str, dict[str, None]]:
    """Last part of a name -> what comes before it, in order."""
    owners: dict[str, dict[str, None]] = {}
    for name in names:
        owner, _, role = name.rpartition(".")
        owners.setdefault(role, {}).update({owner: None} if owner else {})
    return owners


def _limited(title: str, texts: list[str]) -> Iterator[str]:
    more = len(texts) - MAX_LINES
    shown = texts[:MAX_LINES] + ([f"and {more} more; --json has all"] if more > 0 else [])
    for index, text in enumerate(shown):
        yield f"  {'' if index else title:<9}  {text}"


def _every_name(change: Change, found: Diff) -> list[str]:
    """The names of that sort on both sides, so that a group says no more than it means."""
    every: dict[str, None] = {}
    for part in (p for report in (found.a, found.b) for p in report.parts if p.name == change.part):
        if part.summary is None:
            every |= dict.fromkeys(t.name for t in part.tensors)
        elif change.kind == "attention":
            every |= dict.fromkeys(part.summary.attentions)
        else:
            layers = change.kind in LAYER_KINDS
            every |= dict.fromkeys(part.summary.linears if layers else part.summary.expert.tensors)
    return sort_names(every)


def _text(value: object) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= MAX_WIDTH else f"{text[: MAX_WIDTH - 3]}..."
