"""The prompts of a calibration: a text file with one on each line, or some of the demo model's own.

A line may begin with the first frame and a tab, for models that start from an image. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ascendit.checkpoint.layout import Layout
from ascendit.errors import UsageError
from ascendit.pipeline import world
from ascendit.pipeline.defaults import defaults_for
from ascendit.pipeline.request import Defaults, GenerateRequest, resolve

DEMO_PROMPTS = 8
"""As many for `demo`."""
_STRIDE = 157
"""Shares no factor with the number of scenes: neighbours in the list differ in everything."""


@dataclass(frozen=True)
class Prompt:
    """What to run."""

    text: str
    image: Path | None = None
    """The first frame."""


def read_prompts(given: str | Path | int | Sequence[str], defaults: Defaults) -> list[Prompt]:
    """`given`: a file, `demo`, a number of the demo model's prompts, or the prompts themselves.

    UsageError E-USE-01: no prompts in it, or the demo's for another model; E-USE-02: no such file.
    """
    text = str(given) if isinstance(given, str | Path | int) else ""
    if isinstance(given, str | Path | int) and (text == "demo" or text.lstrip("-").isdecimal()):
        return _of_the_demo(DEMO_PROMPTS if text == "demo" else int(text), defaults)
    if isinstance(given, str | Path):
        return _from_file(Path(given).expanduser())
    assert not isinstance(given, int)
    return [Prompt(line) for line in given] or _refuse("no prompts")


def requests_for(
    prompts: Iterable[Prompt], defaults: Defaults, fields: dict[str, Any]
) -> list[GenerateRequest]:
    """One request for each, with the model's own steps, size and guidance, and its number as its seed.

    `fields`: of GenerateRequest, over the defaults. UsageError E-REQ-04 for a missing image or one too many.
    """
    made = []
    for i, prompt in enumerate(prompts):
        if defaults.task == "i2v" and prompt.image is None:
            raise UsageError(
                f"prompt {i + 1} has no image, and {defaults.model} starts from one",
                needs="lines of the form FILE<tab>PROMPT, FILE being the first frame",
                fix="put the image and a tab before the prompt",
                code="E-REQ-04",
            )
        image = None if prompt.image is None else str(prompt.image)
        made.append(resolve(defaults, prompt.text, image=image, **{"seed": i} | fields))
    return made


def digest(prompts: Iterable[Prompt]) -> str:
    """sha256 of all texts and images, in their order. UsageError E-USE-02 for an image that is not there."""
    what = []
    for prompt in prompts:
        if prompt.image is not None and not prompt.image.is_file():
            raise _absent(prompt.image, "the first frame of a prompt")
        image = prompt.image and hashlib.sha256(prompt.image.read_bytes()).hexdigest()
        what.append([prompt.text, image])
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def defaults_of(layout: Layout) -> Defaults:
    """Of a whole pipeline. CheckpointError E-CKP-01: transformers alone cannot be run."""
    layout.require_pipeline()
    return defaults_for(layout)


def _of_the_demo(count: int, defaults: Defaults) -> list[Prompt]:
    """Scenes that it was trained on, in all its wordings."""
    if defaults.spec is None or defaults.spec.name != "ascendit-demo":
        _refuse(f"prompts of the demo model for {defaults.model}")
    back = world.kept_back()
    shown = [scene for scene in world.scenes() if scene.triple not in back]
    if not 1 <= count <= len(shown):
        _refuse(f"{count} prompts of the demo model, which has {len(shown)}")
    chosen = [shown[i * _STRIDE % len(shown)] for i in range(count)]
    return [Prompt(scene.prompt(i, i)) for i, scene in enumerate(chosen)]


def _from_file(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(path, "the prompts to calibrate with") from None
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8"
        _refuse(f"prompts in {path}: {reason}")
    found = []
    for line in lines:
        head, tab, tail = line.partition("\t")
        if line.strip():
            image = path.parent / Path(head.strip()).expanduser() if tab else None
            found.append(Prompt((tail if tab else head).strip(), image))
    return found or _refuse(f"no prompts in {path}")


def _refuse(got: str) -> NoReturn:
    raise UsageError(
        got,
        needs="a text file with one prompt on each line, or a number for the demo model's own",
        fix="--calibrate prompts.txt with prompts like those it will be used for; --calibrate 8 for the demo",
        code="E-USE-01",
    )


def _absent(path: Path, what: str) -> UsageError:
    return UsageError(f"no file {path}", needs=what, fix="correct the path", code="E-USE-02")
