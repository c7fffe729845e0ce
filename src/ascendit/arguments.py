"""Wrong calls of the Python interface: each raises UsageError (E-USE-01), with a call that works.

    ascendit.load("demo", torch_dtype=torch.bfloat16)       # try    dtype="bfloat16"
    pipe.generate("a cat", save_path="cat.mp4")             # try    video.save("cat.mp4")

The names of other tools are those of `foreign.py`; no name of another tool is accepted.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

from ascendit.errors import UsageError
from ascendit.foreign import (
    ADVICE_FOR,
    COMMAND_OF,
    KEYWORD_OF,
    MANY,
    PATTERN_OF,
    SETTINGS,
    VALUES,
    normal,
    value_for,
)
from ascendit.foreign import translated as in_ascendit
from ascendit.option_text import LISTS

P = ParamSpec("P")
R = TypeVar("R")

CALLS = {
    "load": "ascendit.load(model, {})",
    "generate": "pipe.generate(prompt, {})",
    "save": "video.save(path, {})",
    "quantize": "ascendit.quantize(src, dst, {})",
    "repack": "ascendit.repack(src, dst, {})",
}
"""Function -> a call of it with one more argument."""
EXAMPLES = {
    "load": 'ascendit.load("demo")',
    "generate": 'pipe.generate("a red circle moves right on a black background")',
    "save": 'video.save("out.mp4")',
    "quantize": 'ascendit.quantize("model", "model-mxfp8", scheme="mxfp8")',
    "repack": 'ascendit.repack("model", "model-wan", to="wan")',
    "inspect": 'ascendit.inspect("model")',
    "contact_sheet": "ascendit.contact_sheet([video])",
    "quantize_": 'ascendit.quantize_(module, "mxfp8")',
}
"""Function -> a complete call."""
KEYWORDS_OF = {
    "load": "activation_rule attention attention_probabilities defaults device dtype emulate fast_layernorm"
    " force keep lora_skip loras max_memory nz on_progress ops parts recipe scheme step_policy sub_head"
    " text_on vae_dtype",
    "generate": "allow_flat boundary_ratio cancel fit flow_shift fps guidance_scale guidance_scale_2 height"
    " image last_image max_sequence_length negative_prompt num_frames num_inference_steps on_progress preset"
    " schedule seed solver timesteps width",
    "save": "crf metadata overwrite",
    "quantize": "calibrate copy dry_run engine force hash keep lora_skip loras max_shard_bytes on_progress"
    " overwrite recipe report resume scale_rule scheme smoothing",
    "repack": "base check copy dry_run engine on_progress overwrite resume to",
}
"""Function -> its keywords, for the hints of the others."""
POSITIONAL = {
    "load": ("device", "scheme", "dtype"),
    "generate": ("negative_prompt",),
    "save": ("fps",),
    "quantize": ("scheme", "engine"),
    "repack": ("to", "engine"),
    "inspect": ("check",),
    "contact_sheet": ("columns",),
    "quantize_": ("keep",),
}
"""Function -> the keywords that a surplus positional argument may be meant for."""
TEXTS = ("negative_prompt", "device", "scheme", "to")
"""Those of them whose value is a text."""
PATHS = ("src", "dst", "path")
"""Arguments of `quantize`, `repack` and `inspect` that are paths, or names of models."""
NAMES = {"attn_implementation": "attention", "quality": "crf", "sheet_path": "sheet", "num_videos": "seeds"}
NAMES |= dict.fromkeys([name for name, flag in MANY.items() if flag == "--num-videos"], "seeds")
NAMES |= dict.fromkeys([name for name, flag in MANY.items() if flag == "--prompts"], "prompts")
"""Names in other tools of keywords and of the keys of `_ANSWERS`, beside those of `foreign.py`."""

# ---- values -------------------------------------------------------------------------------------


def literal(value: Any) -> str | None:
    """The Python text of a value, a list or a named function; None for other objects."""
    if isinstance(value, (str, os.PathLike)):
        return json.dumps(os.fspath(value), ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        items = [literal(item) for item in value]
        return None if None in items else f"[{', '.join(map(str, items))}]"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    name = getattr(value, "__name__", "")
    return name if callable(value) and name.isidentifier() else None


def _argument(name: str, keyword: str, value: Any) -> str:
    """`keyword=value` for the value of the option `name`; without the value if that has no literal."""
    if keyword == "calibrate":
        prompts = literal(value) or '"prompts.txt"'
        return f"calibrate=Calibrator({prompts}), with from ascendit.pipeline.calibrate import Calibrator"
    if keyword == "crf" and normal(name) == "quality":
        return "crf=18"
    if keyword in LISTS:
        shown = literal(list(value) if isinstance(value, (list, tuple)) else [value])
    elif keyword in VALUES and value is not None and not (keyword == "metadata" and isinstance(value, bool)):
        texts = (value, type(value).__name__)
        ours = next((ours for text in texts if (ours := value_for(keyword, text))), None)
        if ours is None and str(value).lower() in ("auto", "default"):
            return f"omit {name}"
        if ours is None and keyword == "attention" and ("=" in str(value) or str(value) in VALUES["scheme"]):
            ours = str(value)
        if ours is None and keyword != "device":
            return " or ".join(f'{keyword}="{ours}"' for ours in VALUES[keyword])
        shown = literal(ours or str(value))
    else:
        shown = literal(value.item() if getattr(value, "shape", None) == () else value)
    return f"{keyword} instead of {name}" if shown is None else f"{keyword}={shown}"


# ---- options that are no keyword ----------------------------------------------------------------


def _size(name: str, value: Any) -> str:
    sides = re.findall(r"\d+", str(value))
    if len(sides) != 2:
        sides = ["1280", "720"] if sides == ["720"] else ["832", "480"]
    return f"width={sides[0]}, height={sides[1]}"


def _seconds(name: str, value: Any) -> str:
    number = value if isinstance(value, (int, float)) and 0 < value < 1e6 else 5
    return f"num_frames={4 * round(number * 4) + 1}: {number} s at 16 fps"


def _seeds(name: str, value: Any) -> str:
    each = f"range({value})" if isinstance(value, int) else literal(value) or "range(4)"
    return f"omit {name}: [pipe.generate(prompt, seed=seed) for seed in {each}] makes one video for each seed"


def _prompts(name: str, value: Any) -> str:
    return f"omit {name}: [pipe.generate(prompt) for prompt in prompts] makes one video for each prompt"


def _sheet(name: str, value: Any) -> str:
    path = value if isinstance(value, (str, os.PathLike)) else "sheet.png"
    return f"omit {name}: ascendit.contact_sheet([video]).save({literal(path)})"


def _output(name: str, value: Any) -> str:
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else "out.mp4"
    file = path if re.search(r"\.\w+$|/$", path) else f"{path}/out.mp4"
    return f"video.save({literal(file)})"


_ANSWERS: dict[str, Callable[[str, Any], str]] = {
    "size": _size,
    "seconds": _seconds,
    "seeds": _seeds,
    "prompts": _prompts,
    "sheet": _sheet,
    "output": _output,
    "dst": _output,
}
"""Option of the command line without a keyword -> the answer for Python."""

# ---- hints --------------------------------------------------------------------------------------


def _answer(function: str, name: str, keyword: str, value: Any) -> str | None:
    """The answer for an option of the command line that Python has no keyword for, or None."""
    if function in ("quantize", "repack"):
        if keyword in ("output", "dst"):
            return f"ascendit.{function}(src, {literal(value) or 'dst'})"
        return None
    if keyword == "prompt":
        return f"pipe.generate({literal(value) or 'prompt'})"
    text = _ANSWERS[keyword](name, value) if keyword in _ANSWERS else None
    if text and keyword in ("size", "seconds") and function != "generate":
        return CALLS["generate"].format(text.partition(":")[0])
    return text


def argument_hint(function: str, name: str, value: Any, allowed: Collection[str]) -> str:
    """The fix for an argument `name=value` that `function` does not have; `allowed`: its keywords."""
    other = normal(name).rstrip("_")
    keyword = NAMES.get(other, other)
    if keyword == other and other not in allowed:
        plain = literal(value) is not None and not callable(value)
        keyword, text = in_ascendit(other, value if plain else None)
        value = text if other in PATTERN_OF or other in SETTINGS else value
        if other in SETTINGS and text in ("true", "false"):
            value = text == "true"
    if keyword in allowed:
        return _argument(name, keyword, value)
    if answer := _answer(function, name, keyword, value):
        return answer
    advice = ADVICE_FOR.get(other)
    convert = function in ("quantize", "repack")
    order = ("quantize", "repack", "load", "generate", "save") if convert else CALLS
    for call in () if convert and advice else order:
        if call != function and keyword in KEYWORDS_OF[call].split():
            argument = _argument(name, keyword, value)
            if argument.startswith("omit ") or " instead of " in argument:
                argument = f"{keyword}=..."
            return CALLS[call].format(argument)
    if advice:
        return advice.replace("omit it", f"omit {name}")
    close = _typing_error(other, allowed)
    return _argument(name, close, value) if close else f"omit {name}"


def _typing_error(name: str, names: Collection[str]) -> str | None:
    """The one of `names` that `name` misspells, or None."""
    text = name.lower()
    for other in names:
        if sorted(other) == sorted(text):
            return other
    same_start = [other for other in names if other[:1] == text[:1]]
    return next(iter(get_close_matches(text, same_start, n=1, cutoff=0.8)), None)


def unknown_arguments(function: str, unknown: Mapping[str, Any], allowed: Collection[str]) -> UsageError:
    """The error E-USE-01 for keyword arguments that a function of the Python interface does not have."""
    name, value = next(iter(unknown.items()))
    needs = f"one of {', '.join(sorted(allowed))}"
    fix = argument_hint(function, name, value, allowed)
    return UsageError(f"unknown argument: {', '.join(unknown)}", needs=needs, fix=fix)


# ---- calls --------------------------------------------------------------------------------------


def checked_call(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function: arguments that are unknown, missing or without a name raise UsageError.

    Its code is E-USE-01. A function with `**options` checks their names itself.
    """
    parameters = inspect.signature(function).parameters.values()

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        _check_call(function.__name__, tuple(parameters), args, kwargs)
        return function(*args, **kwargs)

    return call


def _check_call(
    function: str,
    parameters: Sequence[inspect.Parameter],
    args: Sequence[Any],
    options: Mapping[str, Any],
) -> None:
    by_position = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    missing = [p.name for p in by_position[len(args) :] if p.default is p.empty and p.name not in options]
    if missing:
        _missing(function, missing, options)
    is_open = len(names) < len(parameters)
    unknown = {} if is_open else {name: value for name, value in options.items() if name not in names}
    if unknown:
        raise unknown_arguments(function, unknown, names[1:])
    if twice := [p.name for p in by_position[: len(args)] if p.name in options]:
        name = twice[0]
        raise UsageError(f"two values of {name}", needs="one", fix=f"omit {name}={literal(options[name])}")
    named = {**{p.name: value for p, value in zip(by_position, args, strict=False)}, **options}
    _check_paths(function, named)
    if surplus := args[len(by_position) :]:
        keywords = [*names, *KEYWORDS_OF.get(function, "").split()]
        value, choices = surplus[0], POSITIONAL[function]
        keyword = next((name for name in choices if value_for(name, value)), choices[0])
        fix = argument_hint(function, keyword, value, keywords)
        if keyword in TEXTS and not (isinstance(value, str) or value_for(keyword, value)):
            number_of_steps = function == "generate" and isinstance(value, int)
            fix = f"num_inference_steps={value}" if number_of_steps else EXAMPLES[function]
        number = len(by_position) - (names[0] == "self")
        raise UsageError(
            f"{number + len(surplus)} values without a name",
            needs=f"at most {number}; all others by name",
            fix=fix,
        )


def _check_paths(function: str, named: Mapping[str, Any]) -> None:
    """Raise UsageError (E-USE-01) for a path or a pattern of another type, before it is used as one."""
    for name, value in named.items():
        many = function == "repack" and name == "src" and isinstance(value, list | tuple)
        is_path = function in ("quantize", "repack", "inspect") and name in PATHS
        if is_path and not all(isinstance(x, str | os.PathLike) for x in (value if many else [value])):
            got = f"{name} is a {type(value).__name__}"
            raise UsageError(got, needs=f"{name}: a text or a path", fix=EXAMPLES[function])
    keep = named.get("keep") if function == "quantize" else None
    if keep is not None and not (isinstance(keep, list | tuple) and all(isinstance(x, str) for x in keep)):
        fix = f"keep=[{json.dumps(keep)}]" if isinstance(keep, str) else 'keep=["blocks.0.*"]'
        raise UsageError(f"keep={keep!r}", needs="keep: a list of patterns", fix=fix)


def _missing(function: str, missing: Sequence[str], options: Mapping[str, Any]) -> NoReturn:
    """Raise UsageError (E-USE-01) for a call without its first arguments."""
    first = {"path": "output"}.get(missing[0], missing[0])
    values = [literal(value) for name, value in options.items() if KEYWORD_OF.get(normal(name)) == first]
    fix = EXAMPLES[function]
    if len(missing) == 1 and values and values[0] is not None:
        fix = f"{fix.partition('(')[0]}({values[0]})"
    raise UsageError(f"{function} without {' and '.join(missing)}", needs=" and ".join(missing), fix=fix)


# ---- attributes ---------------------------------------------------------------------------------

_ATTRIBUTES = {
    "ascendit.load(model)": "from_pretrained from_single_file WanPipeline WanImageToVideoPipeline pipeline"
    " WanVideoPipeline WanVideoToVideoPipeline DiffusionPipeline AutoPipelineForText2Video load_model"
    " AutoPipelineForImage2Video load_pipeline VideoGenerator Omni WanT2V WanI2V WanTI2V",
    'ascendit.load(model, device="cuda") or device="npu"': "to",
    'ascendit.load(model, device="npu")': "npu",
    'ascendit.load(model, device="cuda")': "cuda",
    'ascendit.load(model, device="cpu")': "cpu",
    'ascendit.load(model, dtype="float16")': "half",
    'ascendit.load(model, dtype="bfloat16")': "bfloat16",
    'ascendit.load(model, dtype="float32")': "float",
    'ascendit.load(model, loras=["FILE"])': "load_lora_weights load_lora set_adapters fuse_lora unfuse_lora"
    " load_loras add_lora set_lora unload_lora_weights load_lora_adapter set_lora_adapter",
    'ascendit.load(model, attention="sdpa")': "enable_xformers_memory_efficient_attention"
    " set_attention_backend set_attn_processor enable_flash_attention",
    "ascendit.load(model, sub_head=1)": "enable_attention_slicing set_attention_slice",
    "ascendit.repack(src, dst)": "save_pretrained",
    'pipe.generate(prompt, solver="unipc")': "scheduler",
    "pipe.generate(prompt, on_progress=print)": "set_progress_bar_config progress_bar",
    'video.save("out.mp4")': "save export_to_video export_to_gif save_video cache_video"
    " export write write_video to_mp4 to_gif save_to",
    "ascendit.load(model).generate(prompt)": "generate generate_video text_to_video image_to_video",
    "pipe.text": "text_encoder tokenizer",
    "pipe.transformer": "unet dit",
    "pipe.clip": "image_encoder",
    "pipe.experts": "components",
    "pipe.defaults": "config",
    "video.frames": "images videos numpy to_numpy",
}
_ATTRIBUTE_OF = {name: fix for fix, names in _ATTRIBUTES.items() for name in names.split()}
"""Attribute in other tools -> the fix."""


class UnknownAttribute(UsageError, AttributeError):
    """An attribute of another tool (E-USE-01)."""


def attribute_error(owner: str, name: str, names: Collection[str]) -> AttributeError:
    """The error for an attribute that `owner` does not have; UnknownAttribute if there is a fix.

    `owner`: as Python names it, `module 'ascendit'`. `names`: the attributes that exist.
    """
    text = f"{owner} has no attribute {name!r}"
    if name.startswith("_"):
        return AttributeError(text)
    advice = ADVICE_FOR.get("offload" if "offload" in name else name.lower())
    fix = _ATTRIBUTE_OF.get(name) or (advice and advice.replace("omit it", f"omit {name}"))
    command = COMMAND_OF.get(name, "")
    if fix is None and owner.startswith("module"):
        fix = EXAMPLES.get(command)
    elif fix is None and command == "generate":
        fix = EXAMPLES[command]
    public = sorted(other for other in names if not other.startswith("_"))
    if fix is None and (close := _typing_error(name, public)):
        fix = f"{close} instead of {name}"
    if fix is None:
        return AttributeError(text)
    return UnknownAttribute(text, needs=f"one of {', '.join(public)}", fix=fix)
