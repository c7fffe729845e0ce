"""Shell completion of hidden flags, `KEY=VALUE` settings, groups of LoRA keys and models' files.

bash splits a word at `:` and `=`. Here its pieces are joined; answers omit all but the last.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from ascendit.checkpoint.weight_sets import WEIGHT_SUFFIXES
from ascendit.environment import join_bash_words
from ascendit.errors import escaped


class Command(TyperCommand):
    """A command whose hidden flags are completed too."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The flags that begin with `incomplete`."""
        hidden = [param for param in self.params if getattr(param, "hidden", False)]
        for param in hidden:
            param.hidden = False  # type: ignore[attr-defined]
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            for param in hidden:
                param.hidden = True  # type: ignore[attr-defined]


def _groups(incomplete: str) -> list[str]:
    from ascendit.weights.lora.keys import SKIPPED

    return [group for group in SKIPPED if group.startswith(incomplete)]


def _settings(ctx: typer.Context, incomplete: str) -> list[str]:
    """The settings of a command: `solver=euler`; for a key of any value, `width=` and an example.

    bash adds no space after the key of several answers.
    """
    from ascendit.cli.generate_options import KEYS
    from ascendit.pipeline.request import GenerateRequest
    from ascendit.validation import TYPE_LABELS, non_optional

    texts = []
    for key in KEYS if ctx.info_name == "generate" else GenerateRequest.model_fields:
        kind = non_optional(KEYS[key])
        values = get_args(kind) if get_origin(kind) is Literal else ("true", "false") if kind is bool else ()
        example = TYPE_LABELS.get(kind, ("", "VALUE"))[1].replace(" ", "-")
        texts += [f"{key}={value}" for value in values or ("", example)]
    return [text for text in texts if text.startswith(incomplete)]


COMPLETERS: dict[str, Callable[..., list[str]]] = {"--lora-skip": _groups, "--set": _settings}
"""Flag -> the function that completes its value."""


def with_files(names: list[str], incomplete: str) -> list[str]:
    """`names` of models with the folders and weight files that begin alike.

    Empty if there are no names: the shell itself completes paths then.
    """
    folder, start = os.path.split(incomplete)
    try:
        entries = [*os.scandir(os.path.expanduser(folder) or ".")] if names else []
    except OSError:
        entries = []
    paths = [
        os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry.name.startswith(start) and re.fullmatch(r"\w[\w.+@-]*", entry.name)
        if entry.is_dir() or entry.name.endswith(WEIGHT_SUFFIXES)
    ]
    return names + sorted(paths)


@contextmanager
def joined_pieces() -> Iterator[None]:
    """During a completion of bash: join the pieces, and omit all but the last from each answer."""
    typed = join_bash_words()
    if not typed:
        yield
        return
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        for line in text.getvalue().splitlines():
            starts = (start for start in (typed, typed.partition("=")[2]) if start and line.startswith(start))
            print(escaped(line.removeprefix(next(starts, ""))))
