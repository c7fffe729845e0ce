"""The strength of a LoRA: alpha and rank, from every part of a file where tools write them.

| where | written by |
|---|---|
| tensor `<layer>.alpha` | kohya, musubi-tuner, LyCORIS, VideoX-Fun, ComfyUI |
| header `ss_network_alpha`, `ss_network_dim` | kohya, musubi-tuner, as a record beside the tensors |
| header `alpha`, `lora_alpha`, `network_alpha`, `transformer.lora_alpha`, ... | LightX2V, SimpleTuner |
| header `lora_adapter_metadata`, PEFT's configuration as JSON, maybe with `transformer.` | Diffusers |
| header `lora_config`, the same | finetrainers |
| `adapter_config.json` in the folder | PEFT, diffusion-pipe |
| numbers, texts and dicts in a pickle | programs with `torch.save`, in any of the ways above |

Several of them may be present if they agree. Without any, alpha is the rank: scale 1. The scale is
alpha / rank, or alpha / sqrt(rank) with rsLoRA.

Sources: `get_pattern_key` and `LoraConfig` of PEFT; `convert_lora.py` of musubi-tuner, which multiplies alpha
into the factors but leaves the header unchanged; `lycoris/modules/locon.py` for `rs_lora`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ascendit.checkpoint.component import EXPERTS, read_json
from ascendit.checkpoint.headers import read_metadata
from ascendit.errors import CheckpointError
from ascendit.report import counted
from ascendit.weights.lora.file import LoraFile, Problem, unusable_keys
from ascendit.weights.lora.keys import SKIPPED, LoraKey, expert_of, without_wrappers

# ---- names --------------------------------------------------------------------------------------

ALPHA_KEYS = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
RANK_KEYS = (
    *("r", "rank", "lora_r", "lora_rank", "lora_dim", "network_dim", "network_rank"),
    "ss_network_dim",
)
CONFIG_KEYS = ("lora_adapter_metadata", "lora_config", "peft_config", "adapter_config")
"""Keys of a header that contain a PEFT configuration as JSON, like others with `lora_alpha` in an object."""
ADAPTER_CONFIG = "adapter_config.json"
UNSUPPORTED = {
    "use_dora": "DoRA is not supported: it rescales complete rows of the weight",
    "use_qalora": "QALoRA is not supported: it pools the input",
    "kasa_config": "KaSA is not supported: it changes the weights of the model",
    "alora_invocation_tokens": "aLoRA is not supported: it changes only some tokens",
    "layer_replication": "replicated layers are not supported",
}
"""Field of a PEFT configuration that changes the result, if set -> reason."""
CHANGE_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` with which PEFT changes the weights of the model before training."""
_ABSENT = ("", "none", "null", "dynamic")
"""Texts without a value. `Dynamic`: kohya's `resize_lora.py`, which keeps an alpha tensor in each layer."""
_TRUE = ("true", "1", "yes", "on")
MERGE_FIX = "merge it with PEFT, then quantize the result"
HEADER_FIX = (
    "remove the header: safetensors.torch.save_file(safetensors.torch.load_file(FILE), NEW); without alpha "
    "tensors, pass alpha / rank as NEW:WEIGHT"
)
CONFIG_FIX = f"move the file to a folder without {ADAPTER_CONFIG}, or correct that"
ROUNDING = {"F16": 2**-11, "BF16": 2**-8, "F8_E4M3": 2**-4, "F8_E5M2": 2**-3}
"""Dtype of an alpha tensor -> the largest relative error of its value, if it is coarse."""


# ---- exceptions for some layers -----------------------------------------------------------------


class Patterns:
    """PEFT's `alpha_pattern` or `rank_pattern`: name of a layer, its end, or an expression -> value."""

    def __init__(self, table: Mapping[str, float]) -> None:
        """Raises ValueError for an expression that is invalid, or could take very long to match."""
        self.values = list(table.values())
        self._ends: dict[str, int] = {}
        self._expressions: dict[int, re.Pattern[str]] = {}
        for i, text in enumerate(table):
            if re.fullmatch(r"\^?[\w.-]+", text):
                self._ends[text] = i
            else:
                self._expressions[i] = _expression(text)

    def of(self, names: Iterable[str]) -> float | None:
        """The value of the first entry that matches one of the names of a layer, or ends it after a dot."""
        matches = []
        for name in names:
            parts = name.split(".")
            ends = [".".join(parts[i:]) for i in range(len(parts))]
            matches += [self._ends[end] for end in (f"^{name}", *ends) if end in self._ends]
            for i, expression in self._expressions.items():
                anchored = ends[:1] if expression.pattern.startswith("^") else ends
                matches += [i] if any(expression.fullmatch(end) for end in anchored) else []
        return self.values[min(matches)] if matches else None


def _expression(text: str) -> re.Pattern[str]:
    """Compile an expression whose time to match is limited: few groups and repetitions, none of a group."""
    slow = re.search(r"\)[*+?{]|\(\?|\\\d", text)
    counts = [len(re.findall(rf"(?<!\\)[{characters}]", text)) for characters in ("*+?{", "(")]
    if slow or max(counts) > 3 or len(text) > 500:
        raise ValueError(f"{text!r} is too complex")
    try:
        return re.compile(text)
    except re.error as e:
        raise ValueError(f"{text!r} is not a regular expression ({e})") from e


# ---- statements of a file about its strength -----------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One statement about alpha or rank."""

    origin: str
    """Where it is written, such as `header lora_alpha`."""
    expert: str | None = None
    """None: for every expert."""
    alpha: float | None = None
    rank: int | None = None
    alphas: Patterns = field(default_factory=lambda: Patterns({}))
    """Exceptions from `alpha`."""
    ranks: Patterns = field(default_factory=lambda: Patterns({}))
    over_root: bool = False
    """Divide by sqrt(rank), as rsLoRA does."""
    in_factors: bool = False
    """Alpha is a part of the factors already."""
    only_without_tensor: bool = False
    """Layers with an alpha tensor may have another alpha and rank."""

    def scale(self, alpha: float, rank: int) -> float:
        """The scale of a layer of this rank."""
        return 1.0 if self.in_factors else alpha / (math.sqrt(rank) if self.over_root else rank)


@dataclass(frozen=True)
class OwnAlpha:
    """The alpha tensor of a layer."""

    value: float
    rounding: float
    """Largest relative error of its dtype."""
    over_root: bool = False
    """The layer has musubi-tuner's `use_rslora_flag`."""


@dataclass(frozen=True)
class Strength:
    """The scale of a layer, and why."""

    scale: float
    rank: int
    alpha: float | None = None
    over_root: bool = False
    origins: tuple[str, ...] = ()
    in_factors: bool = False
    problem: str = ""
    """Two statements that disagree; empty if there are none."""

    @property
    def fix(self) -> str:
        """How to solve the `problem`."""
        return CONFIG_FIX if ADAPTER_CONFIG in self.problem else HEADER_FIX


@dataclass(frozen=True)
class Settings:
    """All statements of a file outside its tensors."""

    items: tuple[Setting, ...] = ()

    def of(
        self,
        key: LoraKey,
        names: Iterable[str],
        expert: str,
        rank: int,
        own: OwnAlpha | None,
        *,
        has_rank: bool = True,
    ) -> Strength:
        """The strength of a layer of `expert` with the factor `key` and these `names`.

        `own`: its alpha tensor. `has_rank`: the rank must equal the one that the settings name.
        """
        names = tuple(names)
        items = [x for x in self._scoped(key, expert) if not (own and x.only_without_tensor)]
        if has_rank and (problem := _rank_problem(items, names, rank)):
            return Strength(1.0, rank, problem=problem)
        alphas = [(x, alpha) for x in items if (alpha := x.alphas.of(names)) is not None]
        alphas = alphas or [(x, x.alpha) for x in items if x.alpha is not None]
        scales = [(x.scale(alpha, rank), alpha, x.origin) for x, alpha in alphas]
        if own is not None:
            scale = own.value / (math.sqrt(rank) if own.over_root else rank)
            scales.insert(0, (scale, own.value, "alpha tensors"))
        if not scales:
            return Strength(1.0, rank)
        scale, alpha, origin = scales[0]
        tolerance = own.rounding if own else 1e-6
        for other, other_alpha, other_origin in scales[1:]:
            if not math.isclose(scale, other, rel_tol=tolerance):
                got = (
                    f"scale {scale:g} (alpha {alpha:g}) from {origin}, but {other:g} (alpha {other_alpha:g})"
                )
                return Strength(1.0, rank, problem=f"{got} from {other_origin}")
        root = own.over_root if own else alphas[0][0].over_root
        in_factors = own is None and alphas[0][0].in_factors
        return Strength(scale, rank, alpha, root, tuple(origin for *_, origin in scales), in_factors)

    def _scoped(self, key: LoraKey, expert: str) -> list[Setting]:
        """The settings for any expert, and those for the expert of a key, or else for the first one."""
        present = {x.expert for x in self.items if x.alpha is not None or x.alphas.values}
        others = () if None in present else EXPERTS
        own = next((x for x in (key.expert, expert, *others) if x and x in present), None)
        return [x for x in self.items if x.expert in (None, own)]


def _rank_problem(items: Iterable[Setting], names: Iterable[str], rank: int) -> str:
    items, names = list(items), list(names)
    ranks = [(x, value) for x in items if (value := x.ranks.of(names)) is not None]
    ranks = ranks or [(x, x.rank) for x in items if x.rank is not None]
    wrong = [(x, value) for x, value in ranks if value != rank]
    return f"rank {rank} in its tensors, but {wrong[0][1]:g} in {wrong[0][0].origin}" if wrong else ""


# ---- report -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AppliedLora:
    """The keys of a file that one expert uses, and their strengths."""

    file: str
    weight: float
    num_keys: int
    skipped: Mapping[str, int]
    """Group -> number of keys that were left out."""
    strengths: tuple[Strength, ...]
    """Of each layer with factors."""

    def line(self) -> str:
        """`a.safetensors: 8 keys, scale 0.25 (alpha 1, rank 4; from header lora_alpha) x weight 0.8`."""
        parts = [counted(self.num_keys, "key")]
        parts += [f"{counted(n, 'key')} of group {group} skipped" for group, n in self.skipped.items()]
        if self.strengths:
            scales = [s.scale for s in self.strengths]
            parts.append(f"scale {_range(scales)} ({self._reason()})")
        return f"{self.file}: {', '.join(parts)} x weight {self.weight:g}"

    def _reason(self) -> str:
        alphas = [s.alpha for s in self.strengths if s.alpha is not None]
        ranks = f"rank {_range([s.rank for s in self.strengths])}"
        if not alphas:
            return f"no alpha in the file, {ranks}"
        root = ", rsLoRA" if any(s.over_root for s in self.strengths) else ""
        inside = "; already in the factors" if any(s.in_factors for s in self.strengths) else ""
        return f"alpha {_range(alphas)}, {ranks}{root}; from {', '.join(self.origins)}{inside}"

    @property
    def origins(self) -> list[str]:
        """Where the alphas are written."""
        return list(dict.fromkeys(origin for s in self.strengths for origin in s.origins))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`; a range is [smallest, largest], or absent without factors."""
        data: dict[str, Any] = {"keys": self.num_keys, "skipped": dict(self.skipped)}
        for name in ("scale", "alpha", "rank"):
            values = [value for s in self.strengths if (value := getattr(s, name)) is not None]
            data |= {name: [min(values), max(values)]} if values else {}
        return data | {"origins": self.origins, "note": self.line()}


def _range(values: Collection[float]) -> str:
    first, last = min(values), max(values)
    return f"{first:g}" if first == last else f"{first:g} to {last:g}"


# ---- reading ------------------------------------------------------------------------------------


def read_settings(file: LoraFile) -> Settings:
    """Read the header of a LoRA file or its values, and the configuration of PEFT in its folder.

    Raises CheckpointError: E-LRA-01 for settings that are invalid or not supported, E-CKP-06 for an
    `adapter_config.json` that is not a JSON object.
    """
    header = read_metadata(file.path)
    items = list(_parse(file.path, "header", header))
    for name, value in header.items():
        if name in CONFIG_KEYS or (value.lstrip().startswith("{") and '"lora_alpha"' in value):
            items += _parse(file.path, f"header {name}", _json_object(file.path, name, value))
    items += _parse(file.path, "pickle", file.settings)
    for name, value in file.settings.items():
        if name in CONFIG_KEYS or (isinstance(value, dict) and "lora_alpha" in value):
            items += _parse(file.path, f"pickle {name}", _json_object(file.path, name, value))
    config = file.path.parent / ADAPTER_CONFIG
    if config.is_file() and (fields := read_json(config)).keys() & {"peft_type", "lora_alpha"}:
        items += _parse(file.path, ADAPTER_CONFIG, fields)
    if _alpha_is_in_factors(header, file.keys):
        items = [replace(x, in_factors=x.origin == "header ss_network_alpha") for x in items]
    return Settings(tuple(items))


def _alpha_is_in_factors(header: Mapping[str, Any], keys: Iterable[LoraKey]) -> bool:
    """Whether musubi-tuner's `convert_lora.py` has multiplied alpha into the factors.

    Its own files have a hash in the header, flat names and alpha tensors. The converted ones have the same
    header, with the hash of the original, but dotted names and no alpha tensors.
    """
    own = "sshs_model_hash" in header and "networks.lora" in str(header.get("ss_network_module", ""))
    return own and not any(key.flat or key.role == "alpha" for key in keys)


def _json_object(path: Path, name: str, text: Any) -> dict[str, Any]:
    """Parse a JSON object; empty if it is other JSON. Raises CheckpointError (E-LRA-01)."""
    try:
        fields = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as e:
        raise unusable_keys(path, 1, [Problem(name, f"not JSON ({e})")]) from e
    return fields if isinstance(fields, dict) else {}


def _parse(path: Path, where: str, fields: Mapping[str, Any]) -> Iterator[Setting]:
    """The settings in a header or a PEFT configuration. Its keys may have the prefix of an expert."""
    scopes: dict[str, dict[str, Any]] = {}
    layers: dict[str, float] = {}
    for name, value in _flattened(fields):
        field_name, _ = without_wrappers(name)
        layer, _, last = field_name.rpartition(".")
        if not layer:
            scopes.setdefault(name.removesuffix(field_name), {})[field_name] = value
        elif last in ALPHA_KEYS and not re.search(SKIPPED["text"].pattern, field_name):
            alpha = _number(path, f"{where} {name}", value)
            layers |= {} if alpha is None else {f"^{layer}": alpha}
    for scope, config in scopes.items():
        yield from _Scope(path, where, scope, config).settings()
    if layers:
        yield Setting(f"{where} of each layer", alphas=Patterns(layers))


def _flattened(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields, with those of an object for one expert as `EXPERT.FIELD`."""
    for name, value in fields.items():
        if isinstance(value, dict) and not without_wrappers(f"{name}.")[0]:
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        else:
            yield name, value


@dataclass(frozen=True)
class _Scope:
    """The fields of a header or configuration with one prefix, which is removed."""

    path: Path
    where: str
    prefix: str
    fields: Mapping[str, Any]

    def settings(self) -> Iterator[Setting]:
        """The alphas and ranks. Raises CheckpointError (E-LRA-01)."""
        self.check()
        expert = expert_of(without_wrappers(self.prefix)[1])
        args = _json_object(self.path, "ss_network_args", self.fields.get("ss_network_args") or {})
        root = _is_true(self.fields.get("use_rslora"))
        ss_root = any(_is_true(args.get(name)) for name in ("use_rslora", "rs_lora", "rank_stabilized"))
        varies = any(re.search(r"(dim|alpha)s?$", str(name)) for name in args)
        for name in (*ALPHA_KEYS, *RANK_KEYS):
            value = self.number(name)
            if value is not None:
                yield Setting(
                    self.origin(name),
                    expert,
                    alpha=value if name in ALPHA_KEYS else None,
                    rank=int(value) if name in RANK_KEYS else None,
                    over_root=ss_root if name.startswith("ss_") else root,
                    only_without_tensor=varies and name.startswith("ss_"),
                )
        alphas, ranks = (self.patterns(name) for name in ("alpha_pattern", "rank_pattern"))
        if alphas.values:
            yield Setting(self.origin("alpha_pattern"), expert, alphas=alphas, over_root=root)
        if ranks.values:
            yield Setting(self.origin("rank_pattern"), expert, ranks=ranks)

    def number(self, name: str) -> float | None:
        """The value of a field; None if absent. kohya's alpha 0 means the rank, as in its tensors."""
        value = self.fields.get(name)
        if name == "ss_network_alpha" and str(value) in ("0", "0.0"):
            return None
        return _number(self.path, self.origin(name), value, whole=name in RANK_KEYS)

    def origin(self, name: str) -> str:
        """`header lora_alpha`."""
        return f"{self.where} {self.prefix}{name}"

    def check(self) -> None:
        """Refuse settings that change the result in another way than a LoRA."""
        kind, init = self.fields.get("peft_type") or "LORA", self.fields.get("init_lora_weights")
        reasons = [reason for name, reason in UNSUPPORTED.items() if _is_set(self.fields.get(name))]
        if kind not in ("LORA", "LOHA"):
            reasons.append(f"PEFT's {kind} is not supported")
        if isinstance(init, str) and init.startswith(CHANGE_THE_MODEL):
            reasons.append(f"init_lora_weights = {init!r}: PEFT changed the weights that it was trained on")
        if reasons:
            problem = Problem(f"{self.where} {self.prefix}".strip(), reasons[0], MERGE_FIX)
            raise unusable_keys(self.path, 1, [problem])

    def patterns(self, name: str) -> Patterns:
        """`alpha_pattern` or `rank_pattern`."""
        table = self.fields.get(name)
        if isinstance(table, str):
            table = None if table.strip().lower() in _ABSENT else _json_object(self.path, name, table)
        if table is not None and not isinstance(table, dict):
            raise _invalid(self.path, self.origin(name), f"{name} = {table!r}", "a table of layer names")
        values = {}
        for layer, value in (table or {}).items():
            number = _number(self.path, f"{self.origin(name)} {layer!r}", value, whole=name == "rank_pattern")
            if number is None:
                raise _invalid(self.path, self.origin(name), f"{layer!r} has {value!r}", "a number")
            values[layer] = number
        try:
            return Patterns(values)
        except ValueError as e:
            raise _invalid(self.path, self.origin(name), str(e), "layer names or short expressions") from e


def _number(path: Path, origin: str, value: Any, *, whole: bool = False) -> float | None:
    """A finite number other than 0, which may be text; None if absent. `whole`: a rank.

    Raises CheckpointError (E-LRA-01).
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in _ABSENT):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number) and number and not (whole and (number < 1 or number % 1)):
        return number
    name = origin.rpartition(" ")[2].rpartition(".")[2]
    needs = "a whole number above 0" if whole else "a finite number other than 0"
    raise _invalid(path, origin, f"{name} = {value!r}", needs)


def _invalid(path: Path, origin: str, got: str, needs: str) -> CheckpointError:
    fix = "correct the value, or remove it from the file"
    return unusable_keys(path, 1, [Problem(origin, f"{got} is not {needs}", fix)])


def _is_true(value: Any) -> bool:
    return str(value).strip().lower() in _TRUE


def _is_set(value: Any) -> bool:
    return bool(value) and str(value).strip().lower() not in (*_ABSENT, "false", "0")
