"""Which layer gets which scheme: ordered rules over real layer names, as data. No torch.

A recipe is a TOML file. Those of ascendit are in `recipes/`; a path names any other.

    about = "MXFP4 after five blocks of MXFP8"
    name = "mixed"                 # optional: else that of the file
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

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from ascendit.validation import Model, described, problem, usage_error

FOLDER = Path(__file__).parent / "recipes"


def _schedule(given: object) -> object:
    if not isinstance(given, str):
        return given
    return StepSchedule.parse(given) if given else StepSchedule()


Text = Annotated[str, described("about and source are no text")]
RoundTo = Annotated[Literal["", "bf16"], described('round_to {got} is not "bf16"')]
Schedule = Annotated[
    InstanceOf[StepSchedule],
    BeforeValidator(_schedule),
    PlainSerializer(str),
    described("step_policy {got} is no text"),
]
Rules = Annotated[tuple[LayerRule, ...], described("rules is no list of tables, [[rules]]")]
Attention = Annotated[tuple[AttentionRule, ...], described("attention is no list of tables, [[attention]]")]


class Recipe(Model):
    """Rules in order, the last that matches wins."""

    title = "the file"
    name: str
    about: Text = ""
    source: Text = ""
    kinds: Kinds = ()
    round_to: RoundTo = ""
    """`bf16`: as msModelSlim's `convert_model_dtype`, which its recipes have; "": as the source has it."""
    step_policy: Schedule = StepSchedule()
    rules: Rules = ()
    attention: Attention = ()

    @model_validator(mode="after")
    def _has_rules(self) -> Self:
        if not self.rules:
            raise problem("it has no [[rules]]")
        return self

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
        return tuple((layers | self.ruled(blocks, every, model_kind, keep)).values())

    def ruled(
        self,
        inside: Sequence[str],
        every: Sequence[str],
        model_kind: Task | None,
        keep: Sequence[str] = (),
        *,
        fix: str = LIST_LAYERS,
    ) -> dict[str, LayerScheme]:
        """The layers that a rule, or `keep` after them, matches; the last one wins.

        A pattern means layers of `inside`; only one that matches none of these reaches the others of `every`.
        UsageError E-USE-05, with `fix`, for one that matches nothing.
        """
        rules = [(rule, self.name) for rule in self.rules if not rule.kinds or model_kind in rule.kinds]
        rules += [(LayerRule(layers=(pattern,), scheme="bf16"), "--keep") for pattern in keep]
        return {
            name: LayerScheme(name, rule.scheme or "bf16", rule.scale_rule, why)
            for rule, why, names in matches(rules, (inside, every), fix=fix)
            for name in names
        }

    def attention_schemes(
        self, config: Mapping[str, Any], *, model_kind: Task
    ) -> tuple[AttentionScheme, ...]:
        """The attentions that get an entry or rotations. UsageError E-USE-05 as in `layer_schemes`."""
        linears = block_linears(_known(config))
        every = tuple(dict.fromkeys(n.rsplit(".to_q", 1)[0] for n in linears if n.endswith(".to_q")))
        found = {name: AttentionScheme(name, "", False) for name in every}
        rules = [(rule, self.name) for rule in self.attention if not rule.kinds or model_kind in rule.kinds]
        for rule, _, names in matches(rules, (every,), wan_attention):
            said = rule.model_dump(include={"quant_type", "rotate"}, exclude_none=True)
            found |= {name: replace(found[name], **said) for name in names}
        return tuple(a for a in found.values() if a.quant_type or a.rotate)

    def as_dict(self) -> dict[str, Any]:
        """For `ascendit.json`: enough to write the same TOML again."""
        return self.model_dump(mode="json", exclude_defaults=True)


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
        config, name = read_omni_config(name_or_path), "quantization_config"
        _check_no_scheme(name, scheme, scale_rule)
        about = "as vLLM-Omni reads it"
        return Recipe(name=name, about=about, rules=config.rules, step_policy=config.step_policy)
    path = Path(name_or_path)
    is_path = path.suffix == ".toml" or len(path.parts) > 1
    file = path if is_path else FOLDER / f"{name_or_path}.toml"
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        recipe = Recipe.model_validate({"name": path.stem} | data, context=file)
        return recipe.model_copy(update={"rules": _filled(recipe, scheme, scale_rule)})
    except OSError as e:
        raise UsageError(
            f"no recipe {name_or_path!r}",
            needs=f"one of {', '.join(recipe_names())}, or the path of a TOML file",
            fix="check the spelling; a file of your own ends in .toml",
            code="E-USE-02",
        ) from e
    except ValueError as e:  # not TOML, not UTF-8, or pydantic's
        raise usage_error(
            e,
            where=str(file),
            syntax="TOML",
            needs="a recipe: TOML with [[rules]], each with layers, scheme and scale_rule",
            fix=f"correct it; {FOLDER / 'ascend-w8a8f8.toml'} is one to copy from",
        ) from e


def _filled(recipe: Recipe, scheme: str | None, scale_rule: str | None) -> tuple[LayerRule, ...]:
    """The rules, with what is asked for in those that leave the scheme open."""
    opened = [rule for rule in recipe.rules if rule.scheme is None]
    if opened and scheme is None:
        raise no_scheme(f"recipe {recipe.name}")
    if not opened:
        _check_no_scheme(recipe.name, scheme, scale_rule)
    asked = {"scheme": scheme, "scale_rule": scale_rule}
    filled = {rule: LayerRule(**asked | rule.model_dump(exclude_none=True)) for rule in opened}
    return tuple(filled.get(rule, rule) for rule in recipe.rules)


def _check_no_scheme(name: str, scheme: str | None, scale_rule: str | None) -> None:
    if (scheme, scale_rule) != (None, None):
        raise UsageError(
            f"scheme {scheme}{f' with scale rule {scale_rule}' if scale_rule else ''} for the recipe {name}",
            needs="a recipe that leaves the scheme open; this one has a scheme in every rule",
            fix="leave --scheme and --scale-rule out, or take the recipe default",
        )


def no_scheme(what: str) -> UsageError:
    """Neither scheme nor a recipe that has one."""
    return UsageError(
        f"{what} without a scheme",
        needs=f"a scheme ({', '.join(QUANTIZED)}), or a recipe that says it"
        f" ({', '.join(name for name in recipe_names() if name != 'default')})",
        fix="add --scheme mxfp8",
    )


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the files did not tell, such as the number of heads; layers do not depend on it."""
    return {key: value for key, value in config.items() if value is not None}
