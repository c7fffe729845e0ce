"""How a model was loaded, as it stands beside a video, and the command that makes the video again. No torch.

`load_record` is what `load` keeps of its arguments; `replay_line` turns it back into flags, for the line that
`generate` prints and for the JSON beside a video; `--config` reads the record itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ascendit.pipeline.request import GenerateRequest

DEFAULTS: Mapping[str, str] = {"device": "cpu", "text_on": "device"}
"""What `load` does where nothing is said; a replay line leaves these out."""
FLAGS = ("device", "text_on", "scheme", "recipe", "step_policy", "emulate")
SETTINGS = (
    "keep",
    "activation_rule",
    "dtype",
    "vae_dtype",
    "ops",
    "attention",
    "nz",
    "fast_layernorm",
    "force",
)
"""These have no flag of their own: `--set KEY=VALUE`."""


def load_record(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `load` that shape a video, ready for JSON: what was left open is left out.

    `given`: by name, other names too. Words where `load` takes an object, `keep` as a list.
    """
    found = {name: _plain(name, given.get(name)) for name in (*FLAGS, *SETTINGS)}
    return {name: value for name, value in found.items() if value not in (None, False, "", [])}


def replay_line(request: GenerateRequest, model: str, loaded: Mapping[str, Any]) -> str:
    """The command that makes this video again. `model`: as it was given to `load`. `loaded`: a record."""
    words = []
    for name in FLAGS:
        if (value := loaded.get(name)) and value != DEFAULTS.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name in SETTINGS:
        if value := loaded.get(name):
            words += ["--set", f"{name}={setting_text(value)}"]
    start = "ascendit generate"
    return request.replay_line(model).replace(start, shlex.join([*start.split(), *words]), 1)


def setting_text(value: Any) -> str:
    """A value of a record as `--set` takes it."""
    if isinstance(value, (list, tuple)):
        return ";".join(value)
    return "true" if value is True else str(value)


def _plain(name: str, value: Any) -> Any:
    if name == "keep":
        return [str(pattern) for pattern in value or ()]
    if name == "emulate" and value is True:
        return "decode-on-use"
    if value is None or isinstance(value, bool) or (name == "ops" and value == "auto"):
        return value if isinstance(value, bool) else None
    text = str(value)  # of a StepPolicy, a path, a torch.dtype
    return text.removeprefix("torch.") if name.endswith("dtype") else text
