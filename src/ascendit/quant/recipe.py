"""Which layer gets which scheme: ordered rules over real layer names, as data. No torch.

A recipe is a TOML file. Those of ascendit are in `recipes/`; a path names any other.

    about = "MXFP4 after five blocks of MXFP8"
    kinds = ["t2v"]                # optional: model kinds it is made for; on others it runs with a warning
    round_to = "bf16"              # optional: every tensor is rounded to this before anything else
    step_policy = "0-1:w4a8"       # optional: denoising steps in another precision, see `schedule`

    [[rules]]                      # the last rule that matches a layer wins
    layers = "*"                   # a pattern or a list of them; `*` crosses dots
    scheme = "mxfp4"               # left out: the scheme that is asked for
    scale_rule = "max:7"           # optional, a rule of `mx.formats`; left out: the default of the scheme

    [[rules]]
    layers = "blocks.[0-4].*"
    scheme = "mxfp8"
    kinds = ["t2v"]                # optional: the rule is for these model kinds alone

    [[attention]]                  # entries for the attention of an NPU; key by key the last one wins
    layers = "*.attn1"
    quant_type = "FP8_DYNAMIC"     # msModelSlim's words; "" takes it away
    rotate = true                  # store Hadamard rotations q_rot and k_rot

A pattern is compared with Diffusers' name of a layer and with the original Wan one. It means linears of the
blocks; only one that matches none of these reaches embedders, `time_proj` and `proj_out`. One that matches
nothing is an error.
"""

from __future__ import annotations

import logging
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendit.errors import CheckpointError, UsageError
from ascendit.family import Task
from ascendit.mx.formats import lookup, resolve_rule
from ascendit.names import all_linears, block_linears
from ascendit.quant.layer_rules import (
    MODEL_KINDS,
    OUTSIDE,
    AttentionRule,
    AttentionScheme,
    LayerRule,
    LayerScheme,
    matching,
    no_layer,
    ruled,
    wan_attention,
)
from ascendit.quant.schemes import QUANTIZED, SCHEMES
from ascendit.quant.vllm_omni_config import is_omni_config, read_omni_config
from ascendit.schedule import StepSchedule

log = logging.getLogger("ascendit")
FOLDER = Path(__file__).parent / "recipes"
QUANT_TYPES = ("FP8_DYNAMIC", "MXFP8_DYNAMIC", "MXFP4_DYNAMIC", "INT8_DYNAMIC")


@dataclass(frozen=True)
class Recipe:
    """Rules in order, the last that matches wins."""

    name: str
    about: str
    rules: tuple[LayerRule, ...]
    attention: tuple[AttentionRule, ...] = ()
    kinds: tuple[str, ...] = ()
    source: str = ""
    round_to: str = ""
    """`bf16`: as msModelSlim's `convert_model_dtype`, which its recipes have; "": as the source has it."""
    step_policy: StepSchedule = StepSchedule()

    def layer_schemes(
        self, config: Mapping[str, Any], *, model_kind: Task, keep: Sequence[str] = ()
    ) -> tuple[LayerScheme, ...]:
        """Every linear layer of the model, in its order. `keep`: patterns of layers that stay BF16.

        UsageError E-USE-05 for a pattern that matches no layer.
        """
        blocks, every = block_linears(_known(config)), all_linears(_known(config))
        inside = frozenset(blocks)
        layers = {
            n: LayerScheme(n, "bf16", None, "no rule names it" if n in inside else OUTSIDE) for n in every
        }
        return tuple((layers | ruled(self.rules_for(model_kind, keep), blocks, every)).values())

    def rules_for(self, model_kind: Task | None, keep: Sequence[str] = ()) -> list[tuple[LayerRule, str]]:
        """The rules for a kind of model, and `keep` as more of them, each with where it comes from."""
        rules = [(rule, self.name) for rule in self.rules if not rule.kinds or model_kind in rule.kinds]
        return rules + [(LayerRule((pattern,), "bf16", None), "--keep") for pattern in keep]

    def attention_schemes(
        self, config: Mapping[str, Any], *, model_kind: Task
    ) -> tuple[AttentionScheme, ...]:
        """The attentions that get an entry or rotations. UsageError E-USE-05 as in `layer_schemes`."""
        linears = block_linears(_known(config))
        every = tuple(dict.fromkeys(n.rsplit(".to_q", 1)[0] for n in linears if n.endswith(".to_q")))
        found = {name: AttentionScheme(name, "", False) for name in every}
        for rule in self.attention:
            if rule.kinds and model_kind not in rule.kinds:
                continue
            for pattern in rule.layers:
                if not (names := matching(pattern, every, wan_attention)):
                    raise no_layer(pattern, self.name, every)
                for name in names:
                    old = found[name]
                    quant_type = old.quant_type if rule.quant_type is None else rule.quant_type
                    rotate = old.rotate if rule.rotate is None else rule.rotate
                    found[name] = AttentionScheme(name, quant_type, rotate)
        return tuple(a for a in found.values() if a.quant_type or a.rotate)

    def as_dict(self) -> dict[str, Any]:
        """For `ascendit.json`: enough to write the same TOML again."""
        rules = [_without_none(vars(rule)) for rule in self.rules]
        attention = [_without_none(vars(rule)) for rule in self.attention]
        head: dict[str, Any] = {"name": self.name, "about": self.about, "source": self.source}
        head |= {"kinds": list(self.kinds), "round_to": self.round_to, "step_policy": str(self.step_policy)}
        return {k: v for k, v in (head | {"rules": rules, "attention": attention}).items() if v}


def recipe_names() -> list[str]:
    """The recipes that come with ascendit, `default` first."""
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return sorted(names, key=lambda name: name != "default")


def load_recipe(name_or_path: str, scheme: str | None = None, scale_rule: str | None = None) -> Recipe:
    """A recipe by name or by the path of its TOML file (ends in .toml, or has a slash), or from vLLM-Omni's
    `quantization_config` as JSON.

    `scheme` and `scale_rule` go into the rules that name no scheme. Raises UsageError: E-USE-02 for a name
    or file that is not there, E-USE-01 for a file that is no recipe, a scheme that is missing or unknown, one
    that the recipe has no place for, and a scale rule that its scheme does not have.
    """
    if is_omni_config(name_or_path):
        rules, policy = read_omni_config(name_or_path)
        _scheme_in_every_rule("quantization_config", scheme, scale_rule)
        return Recipe("quantization_config", "as vLLM-Omni reads it", rules, step_policy=policy)
    path = Path(name_or_path)
    is_path = path.suffix == ".toml" or len(path.parts) > 1
    file = path if is_path else FOLDER / f"{name_or_path}.toml"
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(
            f"no recipe {name_or_path!r}",
            needs=f"one of {', '.join(recipe_names())}, or the path of a TOML file",
            fix="check the spelling; a file of your own ends in .toml",
            code="E-USE-02",
        ) from e
    except ValueError as e:  # not TOML, or not UTF-8
        raise _bad(file, f"it is not TOML ({e})") from e
    return _parse(data, path.stem, file, scheme, scale_rule)


# ---- reading a TOML file ------------------------------------------------------------------------

_KEYS = {"about", "source", "kinds", "round_to", "step_policy", "rules", "attention"}
_RULE_KEYS = {"layers", "scheme", "scale_rule", "kinds"}
_ATTENTION_KEYS = {"layers", "quant_type", "rotate", "kinds"}


def _parse(data: dict[str, Any], name: str, file: Path, scheme: str | None, scale_rule: str | None) -> Recipe:
    _check_keys(data, _KEYS, file, "the file")
    texts = {key: data.get(key, "") for key in ("about", "source")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise _bad(file, "about and source are no text")
    if (round_to := data.get("round_to", "")) not in ("", "bf16"):
        raise _bad(file, f'round_to {round_to!r} is not "bf16"')
    entries = _tables(data, "rules", file)
    if not entries:
        raise _bad(file, "it has no [[rules]]")
    open_rules = [entry for entry in entries if "scheme" not in entry]
    if open_rules and scheme is None:
        raise no_scheme(f"recipe {name}")
    if not open_rules:
        _scheme_in_every_rule(name, scheme, scale_rule)
    rules = tuple(_rule(entry, file, scheme, scale_rule) for entry in entries)
    attention = tuple(_attention_rule(entry, file) for entry in _tables(data, "attention", file))
    policy = _step_policy(data.get("step_policy", ""), file)
    return Recipe(
        name, texts["about"], rules, attention, _kinds(data, file), texts["source"], round_to, policy
    )


def _step_policy(text: object, file: Path) -> StepSchedule:
    if not isinstance(text, str):
        raise _bad(file, f"step_policy {text!r} is no text")
    return StepSchedule.parse(text) if text else StepSchedule()


def _scheme_in_every_rule(name: str, scheme: str | None, scale_rule: str | None) -> None:
    if (scheme, scale_rule) != (None, None):
        raise UsageError(
            f"scheme {scheme}{f' with scale rule {scale_rule}' if scale_rule else ''} for the recipe {name}",
            needs="a recipe that leaves the scheme open; this one has a scheme in every rule",
            fix="leave --scheme and --scale-rule out, or take the recipe default",
            code="E-USE-01",
        )


def no_scheme(what: str) -> UsageError:
    """Neither scheme nor a recipe that has one."""
    return UsageError(
        f"{what} without a scheme",
        needs=f"a scheme ({', '.join(QUANTIZED)}), or a recipe that says it"
        f" ({', '.join(name for name in recipe_names() if name != 'default')})",
        fix="add --scheme mxfp8",
        code="E-USE-01",
    )


def _rule(entry: dict[str, Any], file: Path, scheme: str | None, scale_rule: str | None) -> LayerRule:
    _check_keys(entry, _RULE_KEYS, file, "a rule")
    chosen = entry.get("scheme", scheme)
    if chosen not in SCHEMES:
        raise UsageError(
            f"scheme {chosen!r}" + (f" in {file}" if "scheme" in entry else ""),
            needs=f"one of {', '.join(SCHEMES)}",
            fix="check the spelling",
            code="E-USE-01",
        )
    given = entry.get("scale_rule", scale_rule if "scheme" not in entry else None)
    form = SCHEMES[chosen].weight
    if not form and given is not None:
        raise _bad(file, f"scale rule {given!r} for {chosen}, which has no scales")
    if given is not None and not isinstance(given, str):
        raise _bad(file, f"scale_rule {given!r} is no text")
    rule = resolve_rule(lookup(form), given) if form else None
    return LayerRule(_patterns(entry, file), chosen, rule, _kinds(entry, file))


def _attention_rule(entry: dict[str, Any], file: Path) -> AttentionRule:
    _check_keys(entry, _ATTENTION_KEYS, file, "an attention entry")
    quant_type, rotate = entry.get("quant_type"), entry.get("rotate")
    if quant_type not in (None, "", *QUANT_TYPES):
        raise _bad(file, f'quant_type {quant_type!r} is not one of {", ".join(QUANT_TYPES)} or ""')
    if rotate is not None and not isinstance(rotate, bool):
        raise _bad(file, f"rotate {rotate!r} is not true or false")
    return AttentionRule(_patterns(entry, file), quant_type, rotate, _kinds(entry, file))


def _patterns(entry: dict[str, Any], file: Path) -> tuple[str, ...]:
    layers = entry.get("layers")
    found = (layers,) if isinstance(layers, str) else layers
    if not isinstance(found, list | tuple) or not found or not all(isinstance(p, str) and p for p in found):
        raise _bad(file, f"layers = {layers!r}, not a pattern or a list of them")
    return tuple(found)


def _kinds(entry: dict[str, Any], file: Path) -> tuple[str, ...]:
    kinds = entry.get("kinds", [])
    if not isinstance(kinds, list) or not all(kind in MODEL_KINDS for kind in kinds):
        raise _bad(file, f"kinds = {kinds!r}, not a list of {', '.join(MODEL_KINDS)}")
    return tuple(kinds)


def _tables(data: dict[str, Any], key: str, file: Path) -> list[dict[str, Any]]:
    tables = data.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise _bad(file, f"{key} is no list of tables, [[{key}]]")
    return tables


def _check_keys(table: dict[str, Any], known: set[str], file: Path, where: str) -> None:
    if unknown := sorted(set(table) - known):
        raise _bad(file, f"{where} has {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _bad(file: Path, problem: str) -> UsageError:
    return UsageError(
        f"{file}: {problem}",
        needs="a recipe: TOML with [[rules]], each with layers, scheme and scale_rule",
        fix=f"correct it; {FOLDER / 'ascend-w8a8f8.toml'} is one to copy from",
        code="E-USE-01",
    )


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the files did not tell, such as the number of heads; layers do not depend on it."""
    return {key: value for key, value in config.items() if value is not None}


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v not in (None, ())}


def say_attention(name: str, quant_types: Iterable[str], path: Path | str = "") -> None:
    """Log once which quantization of attentions a model asks for and does not get.

    `quant_types`: one for each attention, from a recipe, or from the manifest at `path`. CheckpointError
    E-CKP-07 for one that is not in `QUANT_TYPES`.
    """
    asked = Counter(quant_types)
    if unknown := sorted(asked.keys() - set(QUANT_TYPES)):
        raise CheckpointError(
            f"{path}: attention of type {', '.join(unknown)} in the manifest",
            needs=f"one of {', '.join(QUANT_TYPES)}",
            fix="correct quant_model_description.json, or export the model again",
            code="E-CKP-07",
        )
    if asked:
        words = ", ".join(f"{word} for {n}" for word, n in asked.items())
        log.warning("%s: quantized attention (%s) runs in BF16 here", name, words)
