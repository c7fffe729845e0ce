"""Fields of the header or configuration of a LoRA file: spellings, nested objects and values.

`objects` yields every object of a header or a configuration, also in lists and in JSON texts. A dotted name
means the same as nested objects: `{"transformer.r": 4}` is `{"transformer": {"r": 4}}`. Names are compared in
lower case with `_`: `loraAlpha`, `LORA_ALPHA` and `lora-alpha` are `lora_alpha`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendit.errors import CheckpointError
from ascendit.weights.lora.file import Problem, unusable_keys
from ascendit.weights.lora.keys import SKIPPED, WRAPPERS, expert_of

# ---- names --------------------------------------------------------------------------------------

ALPHA_KEYS = (
    *("lora_alpha", "alpha", "network_alpha", "lora_network_alpha", "linear_alpha"),
    "ss_network_alpha",
)
RANK_KEYS = (
    *("r", "rank", "lora_r", "lora_rank", "lora_dim", "network_dim", "network_rank"),
    "ss_network_dim",
)
SCALE_KEYS = ("scaling", "lora_scale", "lora_scaling", "network_scale", "network_scaling")
"""Fields of unclear meaning, which are refused unless 1: alpha / rank, or a weight for users."""
PATTERN_KEYS = ("alpha_pattern", "rank_pattern")
CONFIG_KEYS = ("lora_adapter_metadata", "lora_config", "peft_config", "adapter_config", "ss_network_args")
"""Keys of a header that contain a configuration as JSON. Others may, with a field about the strength."""
ROOT_KEY = re.compile(r"(^|_)(use_?)?(rs_?lora|rank_?stabili[sz])")
"""Fields that say whether alpha is divided by sqrt(rank)."""
ADAPTER_CONFIG = "adapter_config.json"
_OTHER_PARTS = re.compile(
    r"dataset|tag_frequency|bucket|caption|prompt|workflow|optimizer|scheduler|comment|validation"
)
"""Objects of a header about the training, with names chosen by users, such as tags of images."""
_LAYER = re.compile(r"blocks?[._]\d|embed|attn|ffn|norm|proj|modulation|^head\b")
"""In the path of a layer, unlike the name of an adapter or a part of a configuration."""
_ABSENT = ("", "none", "null", "dynamic")
"""Texts without a value. `Dynamic`: kohya's `resize_lora.py`, which keeps an alpha tensor in each layer."""
_TRUE, _FALSE = ("true", "1", "1.0", "yes", "on"), ("false", "0", "0.0", "no", "off")
_MAX_DEPTH = 20


def plain(name: str) -> str:
    """A name in lower case with `_` between its parts."""
    text = re.sub(r"RS_?LoRA|RsLoRA", "Rslora", name.strip()).replace("LoRA", "Lora")
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text)
    return re.sub(r"[\s_-]+", "_", text).lower()


# ---- objects ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fields:
    """The fields of one object of a header or a configuration."""

    path: Path
    where: str
    """`header`, `header NAME` or `adapter_config.json`."""
    parents: tuple[str, ...]
    """Names of the objects around it, such as `transformer`, `default`."""
    items: tuple[tuple[str, str, Any], ...]
    """(name as written, plain name, value)."""

    @property
    def expert(self) -> str | None:
        """The expert that the parents name."""
        return expert_of(f"{name.lower()}." for name in self.parents)

    @property
    def layer(self) -> str:
        """The path of the layer that the parents name; empty if they name none."""
        number = next((i for i, x in enumerate(self.parents) if f"{x.lower()}." not in WRAPPERS), None)
        path = ".".join(self.parents[number:]) if number is not None else ""
        return path if _LAYER.search(path) else ""

    @property
    def is_about_lora(self) -> bool:
        """Whether one of the fields is about the strength. A rank alone may be that of a process."""
        own = (*ALPHA_KEYS, *PATTERN_KEYS, "peft_type", "conv_alpha")
        return any(
            name in own
            or name.endswith("alphas")
            or ROOT_KEY.search(name)
            or ("alpha" in name and is_number(value))
            for _, name, value in self.items
        )

    def get(self, name: str) -> Any:
        """The value of a field by its plain name; None if absent."""
        return next((value for _, own, value in self.items if own == name), None)

    def origin(self, written: str) -> str:
        """`header lora_alpha`."""
        return f"{self.where} {written}"


def objects(
    path: Path, where: str, fields: Mapping[str, Any], *, is_header: bool = False
) -> Iterator[Fields]:
    """Every object in a header or a configuration, without those of text encoders.

    A header has texts, of which those in JSON are objects too. Raises CheckpointError (E-LRA-01) for one of
    `CONFIG_KEYS` that is not an object.
    """
    yield from _split(path, where, (), "", fields, 0, descend=not is_header)
    for name, text in fields.items() if is_header else ():
        value = None if is_other(name) else _decoded(path, name, text)
        if isinstance(value, dict | list) and not _is_table(plain(name)):
            parents = () if plain(name) in CONFIG_KEYS else tuple(re.split(r"[./:]", name))
            yield from _split(path, f"{where} {name}", parents, "", value, 0)


def _split(
    path: Path,
    where: str,
    parents: tuple[str, ...],
    prefix: str,
    value: Any,
    depth: int,
    descend: bool = True,
) -> Iterator[Fields]:
    """The objects in a value; `prefix` is that of the names in messages."""
    if depth > _MAX_DEPTH:
        raise invalid(path, where, f"{prefix}..", f"an object with at most {_MAX_DEPTH} levels")
    if isinstance(value, list):
        for item in value:
            yield from _split(path, where, parents, prefix, item, depth + 1)
    if not isinstance(value, dict):
        return
    groups: dict[tuple[str, ...], list[tuple[str, str, Any]]] = {}
    for name, item in value.items():
        *outer, last = re.split(r"[./:]", str(name))
        scope = (*parents, *outer)
        if any(is_other(parent) for parent in (*scope, last)):
            continue
        groups.setdefault(scope, []).append((f"{prefix}{name}", plain(last), item))
        item = _decoded(path, f"{where} {prefix}{name}", item) if descend else None
        if isinstance(item, dict | list) and not _is_table(plain(last)):
            yield from _split(path, where, (*scope, last), f"{prefix}{name}.", item, depth + 1)
    for scope, items in groups.items():
        yield Fields(path, where, scope, tuple(items))


def _is_table(name: str) -> bool:
    """Whether the names in an object are those of layers."""
    return name.endswith(("alphas", *PATTERN_KEYS))


def is_other(name: str) -> bool:
    """Whether an object or a field is about a text encoder or the training."""
    name = plain(name)
    return bool(re.search(SKIPPED["text"].pattern, f"{name}.") or _OTHER_PARTS.search(name))


def _decoded(path: Path, name: str, value: Any) -> Any:
    """A value, or the object or list of a JSON text, which may contain JSON texts again.

    Raises CheckpointError (E-LRA-01) for one of `CONFIG_KEYS` that is not an object, and for a text like an
    object with an alpha that is not JSON.
    """
    required = plain(name) in CONFIG_KEYS and not is_absent(value)
    for _ in range(4):
        if not isinstance(value, str) or not (required or re.match(r'["\\\s]*[\[{]', value)):
            break
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            about = re.match(r"\s*\{", value) and re.search(r"alpha\W*[:=]|rs_?lora", value, re.IGNORECASE)
            if required or (about and not is_other(name)):
                raise unusable_keys(path, 1, [Problem(name, f"not JSON ({e})")]) from e
            return value
    if required and not isinstance(value, dict | list | None):
        raise invalid(path, name, f"{name} = {value!r}", "an object")
    return value


# ---- values -------------------------------------------------------------------------------------


def number(path: Path, origin: str, value: Any, *, whole: bool = False) -> float | None:
    """A finite number other than 0, which may be text; None if absent. `whole`: a rank.

    Raises CheckpointError (E-LRA-01).
    """
    if is_absent(value):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number) and number and not (whole and (number < 1 or number % 1)):
        return number
    name = origin.rpartition(" ")[2].rpartition(".")[2]
    needs = "a whole number above 0" if whole else "a finite number other than 0"
    raise invalid(path, origin, f"{name} = {value!r}", needs)


def invalid(path: Path, origin: str, got: str, needs: str) -> CheckpointError:
    fix = "correct the value, or remove it from the file"
    return unusable_keys(path, 1, [Problem(origin, f"{got} is not {needs}", fix)])


def is_absent(value: Any) -> bool:
    """Whether a field has no value."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _ABSENT)


def is_number(value: Any) -> bool:
    """Whether a value is a number, or a text of one."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def switch(path: Path, origin: str, value: Any) -> bool | None:
    """True or false, which may be text; None if absent. Raises CheckpointError (E-LRA-01)."""
    text = str(value).strip().lower()
    if is_absent(value) or text in (*_TRUE, *_FALSE):
        return None if is_absent(value) else text in _TRUE
    raise invalid(path, origin, f"{origin} = {value!r}", "true or false")


def is_set(value: Any) -> bool:
    """Whether a field has a value other than false or 0."""
    return bool(value) and str(value).strip().lower() not in (*_ABSENT, *_FALSE)


# ---- exceptions for some layers -----------------------------------------------------------------


class Patterns:
    """PEFT's `alpha_pattern` or `rank_pattern`: name of a layer, its end, or an expression -> value."""

    def __init__(self, table: Mapping[str, float]) -> None:
        """Raises ValueError for an expression that is invalid, or could take very long to match."""
        self.values = list(table.values())
        self._ends: dict[str, int] = {}
        self._dotted: dict[int, list[tuple[int, re.Pattern[str], bool]]] = {}
        # Number of characters -> expressions without repetitions, such as `attn..to_q`.
        self._expressions: dict[int, re.Pattern[str]] = {}
        for i, text in enumerate(table):
            if re.fullmatch(r"[\w-]+", text):
                self._ends[text] = i
            elif re.fullmatch(r"\^?[\w.-]+", text):
                name = text.removeprefix("^")
                self._dotted.setdefault(len(name), []).append((i, re.compile(name), name != text))
            else:
                self._expressions[i] = _expression(text)

    def of(self, names: Iterable[str]) -> float | None:
        """The value of the first entry that matches one of the names of a layer, or ends it after a dot."""
        matches = []
        for name in names:
            parts = name.split(".")
            ends = [".".join(parts[i:]) for i in range(len(parts))]
            for end in ends:
                matches += [self._ends[end]] if end in self._ends else []
                for i, expression, anchored in self._dotted.get(len(end), ()):
                    matches += [i] if expression.fullmatch(end) and (end == name or not anchored) else []
            for i, expression in self._expressions.items():
                tried = ends[:1] if expression.pattern.startswith("^") else ends
                matches += [i] if any(expression.fullmatch(end) for end in tried) else []
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
