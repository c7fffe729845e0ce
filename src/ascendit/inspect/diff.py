"""Compare two checkpoints of any layout, by the Diffusers names of their tensors.

Reads only headers, configs and tokenizers. Equal headers do not imply equal numbers: the sha256 in
`ascendit.json` are compared if both checkpoints have them (`Diff.hashes`), but the files may have changed
since. `check` reads the files and compares them with their record, `values` decodes both and compares the
numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ascendit.checkpoint.component import CONFIG_FILES, Part, check_regular
from ascendit.checkpoint.quant_metadata import QUANT_TYPE
from ascendit.checkpoint.sources import sha256_of
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.transformer import Expert
from ascendit.checkpoint.trust import TOKENIZER_CONFIGS, TOKENIZER_FILES
from ascendit.errors import CheckpointError, UsageError
from ascendit.family import WanConfig
from ascendit.inspect.checkpoint import inspect
from ascendit.inspect.report import ModelReport, PartReport
from ascendit.inspect.transformer_report import PACKINGS, ExpertSummary, dtype_name
from ascendit.inspect.values import ValueDiff, compare_values
from ascendit.names import grouped, sort_names
from ascendit.pages.page import Page, Section, Table, check_report_file, write_report
from ascendit.progress import OnProgress
from ascendit.report import columns, counted, group_by, human_bytes, json_data, shell_line, titled

ChangeKind = Literal["part", "tensor", "scheme", "smoothing", "shape", "dtype", "attention", "config", "file"]
LAYER_KINDS = ("scheme", "smoothing", "attention")
"""Changes of these kinds name a layer, the others a tensor."""
MAX_LINES = 12  # printed per kind of difference; --json has all
MAX_WIDTH = 100
TITLE_WIDTH = 9
NOT_COMPARED = "not compared: no sha256 of the same files recorded on both sides"
HASHES = {"same": "recorded hashes are equal", "different": "recorded hashes differ"}
SAME_HEADERS = "same headers and configs, different sha256"

HEAD_KEYS = ("num_attention_heads", "attention_head_dim")
VERSION_KEYS = ("transformers_version", "torch_dtype", "dtype")
"""Keys of a config about the program that wrote it; also all keys with a leading underscore."""

_Changes = Iterator[tuple[ChangeKind, str, Any, Any]]


@dataclass(frozen=True)
class Change:
    """One difference. `a`, `b`: the values on both sides as plain data; None if absent."""

    part: str
    kind: ChangeKind
    name: str
    a: Any
    b: Any


@dataclass(frozen=True, kw_only=True)
class Diff:
    """The differences between the checkpoints `a` and `b`."""

    a: ModelReport
    b: ModelReport
    changes: tuple[Change, ...]
    hashes: str
    """The recorded sha256: `same`, `different`, or the reason for not comparing them."""
    values: ValueDiff | None = None
    """The comparison of the numbers, with `values`."""

    @property
    def same(self) -> bool:
        """Whether there are no differences: of the numbers with `values`, else of headers and hashes."""
        if self.values is not None:
            return self.values.same
        return not self.changes and self.hashes != "different"

    @property
    def checked(self) -> bool:
        """Whether the files of both sides were read and agree with their records."""
        reports = (self.a, self.b)
        return all(r.files is not None and r.files.problem is None for r in reports)

    def _hash_text(self) -> str:
        if self.hashes not in HASHES:
            return self.hashes + (" (see --values)" if self.values is None else "")
        read = self.a.files is not None and self.b.files is not None
        files = "not read (see --check and --values)" if not read else "not as recorded"
        return f"{HASHES[self.hashes]}; files {'read, they agree with them' if self.checked else files}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        sides = {"a": _side(self.a), "b": _side(self.b)}
        return {
            "same": self.same,
            **sides,
            "hashes": self.hashes,
            "checked": self.checked,
            "changes": json_data(self.changes),
            "values": json_data(self.values),
        }

    def lines(self, width: int | None = None) -> list[str]:
        """Lines for a terminal. `width`: of the terminal."""
        sides = {"A": self.a, "B": self.b}
        head = [(title, _side_text(_side(report))) for title, report in sides.items()]
        head += [
            ("Problem", f"{x}  {text}") for x, report in sides.items() for text in report.problem_texts()
        ]
        lines = columns(head, first_width=TITLE_WIDTH, width=width)
        by_part = group_by(self.changes, lambda c: c.part)
        alike = group_by(by_part, lambda part: repr([(c.kind, c.name, c.a, c.b) for c in by_part[part]]))
        for parts in alike.values():
            blocks = _blocks(by_part[parts[0]], self)
            table = columns(titled(blocks), indent="  ", first_width=TITLE_WIDTH, width=width)
            lines += ["", ", ".join(parts), *table]
        before, after = (_side(report)["nbytes"] for report in sides.values())
        ratio = f"   {after / before:.3f} x" if before else ""
        size = f"{human_bytes(before)} -> {human_bytes(after)} in the transformers{ratio}"
        hashes = self._hash_text()
        result = counted(len(self.changes), "difference")
        if not self.changes:
            result = SAME_HEADERS if self.hashes == "different" else "same headers and configs"
        end = [("Bytes", size), ("Values", hashes)]
        if self.values is not None:
            lines += self.values.lines(width)
            end = [("Bytes", size), ("Hashes", hashes), ("Values", self.values.summary())]
            result += ", equal numbers" if self.values.same else ", different numbers"
        return [*lines, "", *columns([*end, ("Result", result)], first_width=TITLE_WIDTH, width=width)]

    def page(self) -> Page:
        """The HTML report of the numbers. Imports matplotlib."""
        sides = {"A": self.a, "B": self.b}
        about = {side: _side_text(_side(report)) for side, report in sides.items()}
        names = [report.layout.name for report in sides.values()]
        command = shell_line(["ascendit", "inspect", names[0], "--diff", names[1], "--values", "--report"])
        about |= {"command": command, "hashes": self._hash_text()}
        numbers = self.values.sections() if self.values is not None else ()
        rows = [(c.part, c.kind, c.name, _text(c.a), _text(c.b)) for c in self.changes]
        title = counted(len(rows), "difference")
        changes = Table(head=("part", "kind", "name", "A", "B"), rows=rows, title=title, folded=True)
        sections = (*numbers, Section("Headers and configs", [changes] if rows else [], title))
        return Page(title=f"Numbers: {names[0]} and {names[1]}", about=about, sections=sections)


def diff(
    a: Path | str | ModelReport,
    b: Path | str | ModelReport,
    *,
    check: bool = False,
    values: bool = False,
    report: Path | str | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Diff:
    """Compare two checkpoints of any layout: paths as accepted by `inspect`, or its reports.

    `check`: first compare the files of both with their records, as `inspect` does. `values`: decode both and
    compare the numbers, see `values.compare_values`. `report`: also write the numbers to this .html or .json
    file; `overwrite` replaces an existing one. An expert that could not be read as a Wan transformer is
    compared by its names on disk.

    Raises UsageError (E-USE-01) for `report` without `values`, and the errors of `inspect` and
    `check_report_file`.
    """
    file = None if report is None else Path(report).expanduser()
    if file is not None:
        if not values:
            raise UsageError("a report without values", needs="a comparison of numbers", fix="values=True")
        check_report_file(file, overwrite=overwrite)
    a, b = (
        x if isinstance(x, ModelReport) else inspect(x, check=check, on_progress=on_progress) for x in (a, b)
    )
    left, right = _file_hashes(a), _file_hashes(b)
    hashes = "same" if left == right else "different"
    if not left or set(left) != set(right):
        hashes = NOT_COMPARED
    numbers = compare_values(a, b, on_progress) if values else None
    result = Diff(a=a, b=b, changes=tuple(_changes(a, b)), hashes=hashes, values=numbers)
    if file is not None:
        write_report(file, result.as_dict(), result.page)
    return result


def _file_hashes(report: ModelReport) -> dict[str, Any]:
    """Weight file -> sha256 at the time ascendit wrote it."""
    files = (report.record or {}).get("files")
    entries = files.items() if isinstance(files, dict) else ()
    return {name: value for name, value in entries if name.endswith(".safetensors")}


# ---- differences --------------------------------------------------------------------------------


def _changes(a: ModelReport, b: ModelReport) -> Iterator[Change]:
    left, right = ({p.name: p for p in report.parts} for report in (a, b))
    for name in dict.fromkeys([*left, *right]):
        one, other = left.get(name), right.get(name)
        if one is None or other is None:
            yield Change("parts", "part", name, one and one.class_name, other and other.class_name)
            continue
        if one.summary is not None and other.summary is not None:
            pairs = _expert_changes(one.summary, other.summary)
            configs = _expert_configs(one.summary.expert, other.summary.expert)
        else:
            pairs = _tensor_changes(one.named, other.named)
            configs = [_without_versions(report.layout.parts[name].config) for report in (a, b)]
        yield from (Change(name, *pair) for pair in pairs)
        yield from (Change(name, "config", *pair) for pair in _differing(*configs))
        files = [_tokenizer_files(report.layout.parts[name]) for report in (a, b)]
        yield from (Change(name, "file", *pair) for pair in _differing(*files))
    if a.is_pipeline and b.is_pipeline:
        indices = [{k: v for k, v in r.layout.index.items() if not isinstance(v, list)} for r in (a, b)]
        for pair in _differing(*map(_without_versions, indices)):
            yield Change("model_index.json", "config", *pair)


def _tokenizer_files(part: Part) -> dict[str, str]:
    """The other files of a tokenizer, with the first digits of their sha256."""
    if part.name != "tokenizer":
        return {}
    compared = CONFIG_FILES.get(part.name, ())  # by their values, in `part.config`
    digests = {}
    for name in (*TOKENIZER_FILES, *(name for name in TOKENIZER_CONFIGS if name not in compared)):
        file = part.folder / name
        try:
            check_regular(file)
            digests[file.name] = f"sha256 {sha256_of(file)[:12]}..."
        except (CheckpointError, OSError):  # a problem in the report of its side
            continue
    return digests


def _expert_changes(one: ExpertSummary, other: ExpertSummary) -> _Changes:
    a, b = one.expert, other.expert
    others = set(other.linears)
    shared = dict.fromkeys(name for name in one.linears if name in others)
    alike: set[str] = set()
    for name in shared:
        x, y = _linear(a, name), _linear(b, name)
        kinds: tuple[ChangeKind, ...] = ("scheme", "smoothing", "shape")
        for kind in kinds:
            if x[kind] != y[kind]:
                yield kind, f"{name}.weight" if kind == "shape" else name, x[kind], y[kind]
        if x["scheme"] == y["scheme"]:
            alike.add(name)
    yield from _tensor_changes(_other_tensors(a, shared, alike), _other_tensors(b, shared, alike))
    for key, xs, ys in _differing(a.attention, b.attention):
        yield "attention", key.removesuffix(QUANT_TYPE), xs, ys


def _linear(expert: Expert, name: str) -> dict[ChangeKind, Any]:
    """The properties of a linear layer that are compared.

    Scheme: `mxfp4`, `mxfp4 unpacked to FP8`, `bf16`, `fp32`.
    """
    layer, weight = expert.layers.get(name), expert.tensors[f"{name}.weight"]
    if layer is None:
        return {"scheme": dtype_name(weight.dtype), "smoothing": None, "shape": list(weight.shape)}
    scheme = dtype_name(weight.dtype) if layer.scheme == "bf16" else layer.scheme
    if layer.scheme != "bf16" and layer.packing in ("e4m3", "bf16"):
        scheme = f"{scheme} {PACKINGS[layer.packing].partition(',')[0]}"
    smoothing = "mul_scale" if "mul_scale" in layer.tensors else None
    return {"scheme": scheme, "smoothing": smoothing, "shape": list(layer.shape)}


def _other_tensors(expert: Expert, shared: Mapping[str, None], alike: set[str]) -> dict[str, TensorInfo]:
    """Tensors to compare one by one: no quantized weights, and scales only of layers with the same scheme."""
    others = {}
    for name, info in expert.tensors.items():
        layer, _, role = name.rpartition(".")
        is_scale = role != "bias" and layer not in alike
        if layer not in shared or not (role in ("weight", "mul_scale") or is_scale):
            others[name] = info
    return others


def _tensor_changes(a: Mapping[str, TensorInfo], b: Mapping[str, TensorInfo]) -> _Changes:
    for name in dict.fromkeys([*a, *b]):
        x, y = a.get(name), b.get(name)
        if x is None or y is None:
            yield "tensor", name, _stored(x), _stored(y)
            continue
        if x.shape != y.shape:
            yield "shape", name, list(x.shape), list(y.shape)
        if x.dtype != y.dtype:
            yield "dtype", name, dtype_name(x.dtype), dtype_name(y.dtype)


def _stored(info: TensorInfo | None) -> str | None:
    return None if info is None else f"{dtype_name(info.dtype)} {list(info.shape)}"


def _expert_configs(a: Expert, b: Expert) -> list[dict[str, Any]]:
    """Configs to compare: with Diffusers' defaults, and `quantization_config` key by key.

    Without the number of heads if one side does not have it.
    """
    unknown = HEAD_KEYS if a.config_problem or b.config_problem else ()
    configs = []
    for expert in (a, b):
        config = {**WanConfig().to_dict(), **_without_versions(expert.config)}
        config |= {
            f"quantization_config.{key}": value for key, value in (expert.quantization_config or {}).items()
        }
        configs.append({key: value for key, value in config.items() if key not in unknown})
    return configs


def _without_versions(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in VERSION_KEYS}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*a, *b]):
        x, y = a.get(key), b.get(key)
        if (list(x) if isinstance(x, tuple) else x) != (list(y) if isinstance(y, tuple) else y):
            yield key, x, y


# ---- text ---------------------------------------------------------------------------------------


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


def _side_text(side: Mapping[str, Any]) -> str:
    texts = [side["name"], f"layout {side['kind']}", side["format"], human_bytes(side["nbytes"])]
    return "   ".join([*texts, side["path"]])


def _blocks(changes: Iterable[Change], result: Diff) -> Iterator[tuple[str, list[str]]]:
    """Title and lines: equal changes of many layers share a line; changes of a config have one each."""
    alike = group_by(changes, _line_key)
    for title, keys in group_by(alike, lambda key: key[0]).items():
        texts = [_alike_text(alike[key], result) for key in keys[:MAX_LINES]]
        more = [f"and {len(keys) - MAX_LINES} more; --json has all"] if len(keys) > MAX_LINES else []
        yield title, texts + more


def _line_key(change: Change) -> tuple[str, ...]:
    """Changes with an equal key share a line; the first item is the title."""
    if change.kind in ("tensor", "part"):
        return (f"only in {'A' if change.b is None else 'B'}",)
    alone = (change.name,) if change.kind in ("config", "file") else ()
    return (change.kind, _text(change.a), _text(change.b), *alone)


def _alike_text(changes: list[Change], result: Diff) -> str:
    first, names = changes[0], [c.name for c in changes]
    step = f"{_text(first.a)} -> {_text(first.b)}"
    if first.kind in ("config", "file"):
        return f"{first.name}  {step}"
    text = ", ".join(names if first.kind == "part" else _grouped_names(first, names, result))
    count = f"   ({len(names)})" if len(names) > 1 else ""
    return f"{text}{count}" if first.kind in ("tensor", "part") else f"{step}   {text}{count}"


def _grouped_names(change: Change, names: list[str], result: Diff) -> Iterator[str]:
    """`blocks.0-4` for layers, `bias of blocks.0-4` for tensors; groups never include unchanged names."""
    parts = [part for report in (result.a, result.b) for part in report.parts if part.name == change.part]
    all_names = sort_names({*names, *(name for part in parts for name in _names_like(change, part))})
    if change.kind in LAYER_KINDS:
        yield from grouped(names, all_names)
        return
    owners = _by_role(all_names)
    for role, changed in _by_role(names).items():
        text = ", ".join(grouped(changed, owners[role]))
        yield f"{role} of {text}" if text else role


def _by_role(names: Iterable[str]) -> dict[str, dict[str, None]]:
    """Last component of a name -> the prefixes before it, in order."""
    by_role = group_by(names, lambda name: name.rpartition(".")[2])
    return {r: dict.fromkeys(n.rpartition(".")[0] for n in group if "." in n) for r, group in by_role.items()}


def _names_like(change: Change, part: PartReport) -> Iterable[str]:
    """All names in `part` of the kind that `change` names."""
    if part.summary is None:
        return part.named
    if change.kind == "attention":
        return part.summary.attentions
    return part.summary.linears if change.kind in LAYER_KINDS else part.summary.expert.tensors


def _text(value: object) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= MAX_WIDTH else f"{text[: MAX_WIDTH - 3]}..."
