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
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ascendit.checkpoint.component import EXPERTS, read_json
from ascendit.checkpoint.headers import read_metadata
from ascendit.errors import CheckpointError
from ascendit.report import counted
from ascendit.weights.lora.fields import (
    ADAPTER_CONFIG,
    ALPHA_KEYS,
    CONFIG_KEYS,
    PATTERN_KEYS,
    RANK_KEYS,
    ROOT_KEY,
    SCALE_KEYS,
    Fields,
    Patterns,
    invalid,
    is_absent,
    is_number,
    is_other,
    is_set,
    number,
    objects,
    plain,
    switch,
)
from ascendit.weights.lora.file import MERGE_FIX, LoraFile, Problem, unusable_keys
from ascendit.weights.lora.keys import LoraKey, without_wrappers

# ---- tables ---------------------------------------------------------------------------------------

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
PEFT_DEFAULT = 8
"""Alpha and rank in a configuration of PEFT without them."""
HEADER_FIX = (
    "remove the header: safetensors.torch.save_file(safetensors.torch.load_file(FILE), NEW); without alpha "
    "tensors, pass alpha / rank as NEW:WEIGHT"
)
CONFIG_FIX = f"move the file to a folder without {ADAPTER_CONFIG}, or correct that"
ROUNDING = {"F16": 2**-11, "BF16": 2**-8, "F8_E4M3": 2**-4, "F8_E5M2": 2**-3}
"""Dtype of an alpha tensor -> the largest relative error of its value, if it is coarse."""


# ---- statements of a file about its strength -----------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One statement about alpha or rank."""

    origin: str
    """Where it is written, such as `header lora_alpha`."""
    expert: str | None = None
    """None: for every expert."""
    alpha: float | None = None
    """0, in kohya's files: the rank."""
    rank: int | None = None
    alphas: Patterns = field(default_factory=lambda: Patterns({}))
    """Exceptions from `alpha`."""
    ranks: Patterns = field(default_factory=lambda: Patterns({}))
    over_root: bool | None = None
    """Whether alpha is divided by sqrt(rank), as rsLoRA does."""
    divisor: int | None = None
    """Of alpha, if it is not the rank of the tensors: PEFT's LoKr."""
    in_factors: bool = False
    """Alpha is a part of the factors already."""
    is_default: bool = False
    """PEFT's default, if nothing else names an alpha."""
    only_without_tensor: bool = False
    """Layers with an alpha tensor may have another alpha and rank."""

    def scale(self, alpha: float, rank: int, root: bool) -> float:
        """The scale of a layer of this rank."""
        if self.in_factors:
            return 1.0
        return alpha / self.divisor if self.divisor else scale_of(alpha, rank, root)

    def alpha_of(self, names: Collection[str], rank: int) -> float | None:
        """Alpha of the layer with these names; None if this is not a statement about it."""
        alpha = self.alpha if self.alpha is not None else self.alphas.of(names)
        return rank if alpha == 0 else alpha


def scale_of(alpha: float, rank: int, root: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    return alpha / (math.sqrt(rank) if root else rank)


@dataclass(frozen=True)
class OwnAlpha:
    """The alpha tensor of a layer."""

    value: float
    rounding: float
    """Largest relative error of its dtype."""


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
        flag: bool | None = None,
        has_rank: bool = True,
    ) -> Strength:
        """The strength of a layer of `expert` with the factor `key` and these `names`.

        `own`: its alpha tensor. `flag`: musubi-tuner's `use_rslora_flag`. `has_rank`: the rank must equal the
        one that the settings name.
        """
        names = tuple(names)
        scoped = self._scoped(key, expert)
        items = [x for x in scoped if not (own and x.only_without_tensor)]
        if has_rank and (problem := _rank_problem(items, names, rank)):
            return Strength(1.0, rank, problem=problem)
        roots = {x.over_root: x.origin for x in reversed(scoped) if x.over_root is not None}
        roots |= {} if flag is None else {flag: "use_rslora_flag tensors"}
        if len(roots) == 2:
            problem = f"rsLoRA according to {roots[True]}, but not according to {roots[False]}"
            return Strength(1.0, rank, problem=problem)
        root = True in roots
        scales = [(x.scale(a, rank, root), a, x.origin) for x, a in _alphas(items, names, rank, own)]
        if own is not None:
            alpha = own.value or rank
            inside = root and not flag and _root_is_in_tensors(own, scoped, names, rank, roots[True])
            if inside is None:
                problem = f"alpha {alpha:g} in its tensors: unclear with rsLoRA in {roots[True]}"
                return Strength(1.0, rank, problem=problem)
            root = root and not inside
            scales.insert(0, (scale_of(alpha, rank, root), alpha, "alpha tensors"))
        if not scales:
            problem = f"no alpha, but rsLoRA in {roots[True]}: the strength is unclear" if root else ""
            if tables := [x.origin for x in items if x.alphas.values and not x.only_without_tensor]:
                problem = f"no alpha for this layer, but for others in {tables[0]}"
            return Strength(1.0, rank, problem=problem)
        scale, alpha, origin = scales[0]
        tolerance = own.rounding if own else 1e-6
        for other, other_alpha, other_origin in scales[1:]:
            if not math.isclose(scale, other, rel_tol=tolerance):
                got = (
                    f"scale {scale:g} (alpha {alpha:g}) from {origin}, but {other:g} (alpha {other_alpha:g})"
                )
                return Strength(1.0, rank, problem=f"{got} from {other_origin}")
        in_factors = own is None and any(x.in_factors and x.origin == origin for x in items)
        return Strength(scale, rank, alpha, root, tuple(origin for *_, origin in scales), in_factors)

    @property
    def divisor(self) -> int | None:
        """The rank in the configuration of PEFT's LoKr, which also scales two complete factors."""
        return next((x.divisor for x in self.items if x.divisor), None)

    def _scoped(self, key: LoraKey, expert: str) -> list[Setting]:
        """The settings for any expert, and those for the expert of a key, or else for the first one."""
        present = {
            x.expert for x in self.items if x.alpha is not None or x.alphas.values or x.over_root is not None
        }
        others = () if None in present else EXPERTS
        own = next((x for x in (key.expert, expert, *others) if x and x in present), None)
        return [x for x in self.items if x.expert in (None, own)]


def _alphas(
    items: Iterable[Setting], names: Collection[str], rank: int, own: OwnAlpha | None = None
) -> list[tuple[Setting, float]]:
    """The alphas of a layer: those of exceptions, or else of statements, or else PEFT's default."""
    items = list(items)
    matched = [(x, alpha) for x in items if (alpha := x.alpha_of(names, rank)) is not None]
    for group in (
        [(x, alpha) for x, alpha in matched if x.alpha is None],
        [(x, alpha) for x, alpha in matched if x.alpha is not None and not x.is_default],
        [(x, alpha) for x, alpha in matched if x.is_default and own is None],
    ):
        if group:
            return group
    return []


def _root_is_in_tensors(
    own: OwnAlpha, scoped: Iterable[Setting], names: Collection[str], rank: int, origin: str
) -> bool | None:
    """Whether an alpha tensor is multiplied by sqrt(rank) already, as LyCORIS does; None if unclear."""
    alphas = [alpha for x, alpha in _alphas(scoped, names, rank, own)]
    for inside, factor in ((False, 1.0), (True, math.sqrt(rank))):
        if any(
            math.isclose(own.value or rank, alpha * factor, rel_tol=max(own.rounding, 1e-6))
            for alpha in alphas
        ):
            return inside
    return None if alphas or origin.startswith("header ss_") else False


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
    scopes = list(objects(file.path, "header", header, is_header=True))
    scopes += objects(file.path, "pickle", file.settings, is_header=True)
    config = file.path.parent / ADAPTER_CONFIG
    if config.is_file():
        scopes += objects(file.path, ADAPTER_CONFIG, read_json(config))
    items = [setting for scope in scopes if _is_read(scope) for setting in _Scope(scope).settings()]
    items += _layer_settings(scopes)
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


def _is_read(scope: Fields) -> bool:
    """Whether an object is a configuration of LoRA: at known names, or with fields about the strength."""
    name = scope.where.partition(" ")[2]
    at_top = not name or without_wrappers(name)[0].lower() in CONFIG_KEYS
    return not scope.layer and (at_top or scope.is_about_lora)


def _layer_settings(scopes: Iterable[Fields]) -> Iterator[Setting]:
    """One setting for all alphas of single layers in the same header or configuration, per expert."""
    layers: dict[tuple[str, str | None], dict[str, float]] = {}
    for scope in scopes:
        for written, name, value in scope.items if scope.layer else ():
            if name in ALPHA_KEYS:
                alpha = number(scope.path, scope.origin(written), value)
                table = layers.setdefault((scope.where, scope.expert), {})
                table |= {} if alpha is None else {f"^{scope.layer}": alpha}
            elif "alpha" in name and is_number(value):
                raise _unclear(scope, written, value)
    for (where, expert), table in layers.items():
        if table:
            yield Setting(f"{where} of each layer", expert, alphas=Patterns(table))


def _order(item: tuple[str, str, Any]) -> tuple[int, str]:
    """The order in which statements are compared and named in messages."""
    return ALPHA_KEYS.index(item[1]) if item[1] in ALPHA_KEYS else len(ALPHA_KEYS), item[0]


def _unclear(scope: Fields, written: str, value: Any) -> CheckpointError:
    reason = f"{value!r} may change the strength in a way that is not supported"
    return unusable_keys(scope.path, 1, [Problem(scope.origin(written), reason, HEADER_FIX)])


@dataclass(frozen=True)
class _Scope:
    """The fields of one object that is a configuration of LoRA."""

    fields: Fields

    def settings(self) -> Iterator[Setting]:
        """The alphas, ranks and switches. Raises CheckpointError (E-LRA-01)."""
        kind = self.check()
        path, expert = self.fields.path, self.fields.expert
        rank = next((self.rank(x) for x in self.fields.items if x[1] in RANK_KEYS), None)
        divisor = (rank or PEFT_DEFAULT) if kind == "LOKR" else None
        has_alpha = False
        for written, name, value in sorted(self.fields.items, key=_order):
            origin = self.fields.origin(written)
            is_kohya = name == "ss_network_alpha" and str(value) in ("0", "0.0")
            varies = name.startswith("ss_") and self.varies()
            if name in ALPHA_KEYS:
                alpha = 0.0 if is_kohya else number(path, origin, value)
                has_alpha |= alpha is not None
                yield Setting(origin, expert, alpha=alpha, divisor=divisor, only_without_tensor=varies)
            elif name in RANK_KEYS or (name == "linear" and self.fields.get("linear_alpha") is not None):
                yield Setting(
                    origin, expert, rank=self.rank((written, name, value)), only_without_tensor=varies
                )
            elif name in PATTERN_KEYS or name.endswith("alphas"):
                yield from self.patterns(written, name, value, divisor)
            elif name == "conv_alpha":
                alpha = number(path, origin, value)
                table = {} if alpha is None else {"patch_embedding": alpha}
                yield Setting(origin, expert, alphas=Patterns(table), only_without_tensor=True)
            elif isinstance(value, str) and ROOT_KEY.match(plain(value)):  # such as lora_type = rslora
                yield Setting(origin, expert, over_root=True)
            elif ROOT_KEY.search(name):
                yield Setting(origin, expert, over_root=switch(path, origin, value))
            elif name in SCALE_KEYS and is_number(value) and float(value) != 1:
                raise _unclear(self.fields, written, value)
            elif "alpha" in name and is_number(value):
                raise _unclear(self.fields, written, value)
        if kind and not has_alpha:
            if empty := [written for written, name, _ in self.fields.items if name in ALPHA_KEYS]:
                raise _unclear(self.fields, empty[0], None)
            origin = f"PEFT's default in {self.fields.where}"
            ranks = None if rank else PEFT_DEFAULT
            yield Setting(origin, expert, alpha=PEFT_DEFAULT, rank=ranks, divisor=divisor, is_default=True)

    def rank(self, item: tuple[str, str, Any]) -> int | None:
        """The rank in a field; None if absent."""
        value = number(self.fields.path, self.fields.origin(item[0]), item[2], whole=True)
        return None if value is None else int(value)

    def varies(self) -> bool:
        """Whether kohya's arguments name other ranks or alphas for some layers."""
        args = self.fields.get("ss_network_args")
        args = json.loads(args) if isinstance(args, str) and not is_absent(args) else args
        return isinstance(args, dict) and any(
            str(name).rstrip("s").endswith(("dim", "alpha")) for name in args
        )

    def check(self) -> str:
        """The kind of PEFT, or "". Refuse settings that change the result in another way than a LoRA."""
        named, init = self.fields.get("peft_type"), self.fields.get("init_lora_weights")
        kind = "" if is_absent(named) else str(named).rpartition(".")[2].upper()
        reasons = [reason for name, reason in UNSUPPORTED.items() if is_set(self.fields.get(name))]
        if kind not in ("", "LORA", "LOHA", "LOKR"):
            reasons.append(f"PEFT's {kind} is not supported")
        if kind == "LOKR" and is_set(self.fields.get("rank_pattern")):
            reasons.append("PEFT's LoKr with several ranks is not supported")
        if isinstance(init, str) and init.startswith(CHANGE_THE_MODEL):
            reasons.append(f"init_lora_weights = {init!r}: PEFT changed the weights that it was trained on")
        if reasons:
            name = ".".join((self.fields.where, *self.fields.parents))
            raise unusable_keys(self.fields.path, 1, [Problem(name, reasons[0], MERGE_FIX)])
        return kind

    def patterns(self, written: str, name: str, value: Any, divisor: int | None) -> Iterator[Setting]:
        """`alpha_pattern`, `rank_pattern`, or a table of an alpha for each layer."""
        path, origin = self.fields.path, self.fields.origin(written)
        if isinstance(value, str) and not is_absent(value):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as e:
                if name not in PATTERN_KEYS:
                    return
                raise unusable_keys(path, 1, [Problem(origin, f"not JSON ({e})")]) from e
        if not is_absent(value) and not isinstance(value, dict):
            raise invalid(path, origin, f"{written} = {value!r}", "a table of layer names")
        table = {}
        for layer, entry in {} if is_absent(value) else value.items():
            if name not in PATTERN_KEYS and is_other(layer):
                continue
            size = number(path, f"{origin} {layer!r}", entry, whole=name == "rank_pattern")
            if size is None:
                raise invalid(path, origin, f"{layer!r} has {entry!r}", "a number")
            if name not in PATTERN_KEYS:
                layer = without_wrappers(layer)[0].removesuffix(".alpha")
            table[layer] = size
        try:
            patterns = Patterns(table)
        except ValueError as e:
            raise invalid(path, origin, str(e), "layer names or short expressions") from e
        if table and name == "rank_pattern":
            yield Setting(origin, self.fields.expert, ranks=patterns)
        elif table:
            yield Setting(origin, self.fields.expert, alphas=patterns, divisor=divisor)
