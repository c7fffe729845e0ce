"""Recipes: ordered rules that assign schemes to layers by name. Does not import torch.

A recipe is a TOML file, either a built-in one in `recipes/` or any other path.

    about = "MXFP4 after five blocks of MXFP8"
    name = "mixed"                 # optional; default: the name of the file
    kinds = ["t2v"]                # optional: intended model kinds; others get a warning
    round_to = "bf16"              # optional: round every tensor to this dtype first
    step_policy = "0-1:w4a8"       # optional: denoising steps in another precision, see `schedule`

    [[rules]]                      # the last rule that matches a layer wins
    layers = "*"                   # a pattern or a list of them; `*` crosses dots
    scheme = "mxfp4"               # if omitted: the scheme that the user requests
    scale_rule = "max:7"           # optional, a rule of `mx.formats`; default: that of the scheme

    [[rules]]
    layers = "blocks.[0-4].*"
    scheme = "mxfp8"
    kinds = ["t2v"]                # optional: the rule applies only to these model kinds

    [[attention]]                  # quantized attention; for each key the last one wins
    layers = "*.attn1"
    quant_type = "FP8_DYNAMIC"     # msModelSlim's name of the scheme; "" removes it
    rotate = true                  # store Hadamard rotations q_rot and k_rot, which FP8 and MX use anyway

A recipe may have either kind of entry, or both. A pattern is matched against Diffusers' and original Wan
names of the linear layers in blocks; if it matches none, against embedders, `time_proj` and `proj_out`. A
pattern that matches no layer is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, InstanceOf, PlainSerializer, model_validator

from ascendit.errors import UsageError
from ascendit.family import Task
from ascendit.names import all_linears, block_linears
from ascendit.quant.layer_rules import (
    LIST_LAYERS,
    OUTSIDE,
    AttentionRule,
    AttentionScheme,
    Kinds,
    LayerRule,
    LayerScheme,
    matches,
    wan_attention,
)
from ascendit.quant.schemes import QUANTIZED
from ascendit.quant.vllm_omni_config import is_omni_config, read_omni_config
from ascendit.schedule import StepSchedule
from ascendit.validation import Model, described, problem, read_settings, usage_error

FOLDER = Path(__file__).parent / "recipes"


def _schedule(value: object) -> object:
    if not isinstance(value, str):
        return value
    return StepSchedule.parse(value) if value else StepSchedule()


Text = Annotated[str, described("about and source are not texts")]
RoundTo = Annotated[Literal["", "bf16"], described('round_to {got} is not "bf16"')]
Schedule = Annotated[
    InstanceOf[StepSchedule],
    BeforeValidator(_schedule),
    PlainSerializer(str),
    described("step_policy {got} is not a text"),
]
Rules = Annotated[tuple[LayerRule, ...], described("rules is not a list of tables, [[rules]]")]
Attention = Annotated[
    tuple[AttentionRule, ...], described("attention is not a list of tables, [[attention]]")
]


class Recipe(Model):
    """Ordered rules; the last match wins."""

    title = "the file"
    name: str
    about: Text = ""
    source: Text = ""
    kinds: Kinds = ()
    round_to: RoundTo = ""
    """`bf16`: as `convert_model_dtype` in msModelSlim's recipes; "": keep the dtype of the source."""
    step_policy: Schedule = StepSchedule()
    rules: Rules = ()
    attention: Attention = ()

    @model_validator(mode="after")
    def _has_rules(self) -> Self:
        if not self.rules and not self.attention:
            raise problem("it has no [[rules]] and no [[attention]]")
        return self

    def layer_schemes(
        self, config: Mapping[str, Any], *, model_kind: Task, keep: Sequence[str] = ()
    ) -> tuple[LayerScheme, ...]:
        """The scheme of every linear layer, in model order. `keep`: patterns of layers that stay in BF16.

        Raises UsageError (E-USE-05) for a pattern that matches no layer.
        """
        blocks, linears = block_linears(_without_nulls(config)), all_linears(_without_nulls(config))
        inside = frozenset(blocks)
        layers = {
            n: LayerScheme(n, "bf16", None, "no rule names it" if n in inside else OUTSIDE) for n in linears
        }
        return tuple((layers | self.ruled(blocks, linears, model_kind, keep)).values())

    def ruled(
        self,
        inside: Sequence[str],
        linears: Sequence[str],
        model_kind: Task | None,
        keep: Sequence[str] = (),
        *,
        fix: str = LIST_LAYERS,
    ) -> dict[str, LayerScheme]:
        """Name -> scheme of the layers that the rules, and then `keep`, match; the last match wins.

        A pattern is matched against `inside`; only if nothing there matches, against all `linears`. Raises
        UsageError (E-USE-05), with `fix`, for a pattern that matches no layer.
        """
        rules = [(rule, self.name) for rule in self.rules if not rule.kinds or model_kind in rule.kinds]
        rules += [(LayerRule(layers=(pattern,), scheme="bf16"), "--keep") for pattern in keep]
        return {
            name: LayerScheme(name, rule.scheme or "bf16", rule.scale_rule, reason)
            for rule, reason, names in matches(rules, (inside, linears), fix=fix)
            for name in names
        }

    def attention_schemes(
        self, config: Mapping[str, Any], *, model_kind: Task
    ) -> tuple[AttentionScheme, ...]:
        """The attentions with an entry or rotations. Raises UsageError (E-USE-05) like `layer_schemes`."""
        linears = block_linears(_without_nulls(config))
        attentions = tuple(dict.fromkeys(n.rsplit(".to_q", 1)[0] for n in linears if n.endswith(".to_q")))
        schemes = {name: AttentionScheme(name, "", False) for name in attentions}
        rules = [(rule, self.name) for rule in self.attention if not rule.kinds or model_kind in rule.kinds]
        for rule, _, names in matches(rules, (attentions,), wan_attention):
            changes = rule.model_dump(include={"quant_type", "rotate"}, exclude_none=True)
            schemes |= {name: replace(schemes[name], **changes) for name in names}
        return tuple(a for a in schemes.values() if a.quant_type or a.rotate)

    def as_dict(self) -> dict[str, Any]:
        """JSON data for `ascendit.json`, sufficient to recreate the TOML file."""
        return self.model_dump(mode="json", exclude_defaults=True)


def recipe_names() -> list[str]:
    """Names of the built-in recipes, `default` first."""
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return sorted(names, key=lambda name: name != "default")


def load_recipe(name_or_path: str, scheme: str | None = None, scale_rule: str | None = None) -> Recipe:
    """Load a recipe by name, by path of a TOML file (ends in .toml, or has a slash), or from the JSON text of
    vLLM-Omni's `quantization_config`.

    `scheme` and `scale_rule` are filled into the rules without a scheme. Raises UsageError: E-USE-02 for an
    unknown name or missing file; E-USE-01 for a file that is not a recipe, a missing or unknown scheme, a
    scheme although all rules have one, and a scale rule that the scheme does not support.
    """
    if is_omni_config(name_or_path):
        config, name = read_omni_config(name_or_path), "quantization_config"
        _check_no_scheme(name, scheme, scale_rule)
        about = "as vLLM-Omni reads it"
        return Recipe(name=name, about=about, rules=config.rules, step_policy=config.step_policy)
    path = Path(name_or_path)
    is_path = path.suffix == ".toml" or len(path.parts) > 1
    file = path if is_path else FOLDER / f"{name_or_path}.toml"
    try:
        data = read_settings(file)
        recipe = Recipe.model_validate({"name": path.stem} | data, context=file)
        return recipe.model_copy(update={"rules": _filled(recipe, scheme, scale_rule)})
    except OSError as e:
        raise UsageError(
            f"no recipe {name_or_path!r}" + (f": {e.strerror}" if is_path else ""),
            needs=f"one of {', '.join(recipe_names())}, or the path of a TOML file",
            fix="correct the path" if is_path else _recipe_fix(name_or_path),
            code="E-USE-02",
        ) from e
    except ValueError as e:  # not TOML, not UTF-8, or an error of pydantic
        raise usage_error(
            e,
            source=str(file),
            syntax="TOML",
            needs="a recipe: TOML with [[rules]], each with layers, scheme and scale_rule",
            fix=f"correct the file; {FOLDER / 'ascend-w8a8f8.toml'} is an example",
        ) from e


def _recipe_fix(name: str) -> str:
    close = get_close_matches(name, recipe_names(), n=1)
    fix = f"--recipe {close[0]}" if close else "--recipe default --scheme mxfp8"
    return f"{fix}; the name of a recipe file ends in .toml"


def _filled(recipe: Recipe, scheme: str | None, scale_rule: str | None) -> tuple[LayerRule, ...]:
    """The rules, with `scheme` and `scale_rule` filled into those without a scheme."""
    open_rules = [rule for rule in recipe.rules if rule.scheme is None]
    if open_rules and scheme is None:
        raise no_scheme(f"recipe {recipe.name}")
    if not open_rules:
        _check_no_scheme(recipe.name, scheme, scale_rule)
    requested = {"scheme": scheme, "scale_rule": scale_rule}
    filled = {rule: LayerRule(**requested | rule.model_dump(exclude_none=True)) for rule in open_rules}
    return tuple(filled.get(rule, rule) for rule in recipe.rules)


def _check_no_scheme(name: str, scheme: str | None, scale_rule: str | None) -> None:
    if (scheme, scale_rule) != (None, None):
        raise UsageError(
            f"scheme {scheme}{f' with scale rule {scale_rule}' if scale_rule else ''} for the recipe {name}",
            needs="a recipe with a rule that names no scheme; every rule of this one names its scheme",
            fix="omit --scheme and --scale-rule, or use the recipe default",
        )


def no_scheme(subject: str) -> UsageError:
    """The error E-USE-01 for a call with neither a scheme nor a recipe with schemes."""
    return UsageError(
        f"{subject} without a scheme",
        needs=f"a scheme ({', '.join(QUANTIZED)}), or a recipe with schemes"
        f" ({', '.join(name for name in recipe_names() if name != 'default')})",
        fix="add --scheme mxfp8",
    )


def _without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without unknown values (some files lack the number of heads), which layers do not depend
    on.
    """
    return {key: value for key, value in config.items() if value is not None}
