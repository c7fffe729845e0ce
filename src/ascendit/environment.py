"""Environment variables. No other module reads them.

Ascend users control other runtimes with `ALGO`, `FAST_LAYERNORM`, `USE_SUB_HEAD`, `T5_LOAD_CPU`,
`PRECISION` and `OVERLAP`. `read_environment` maps them to the options of ascendit; the table of options names
the variable of each. Flags override them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendit.errors import UsageError

TOOLKIT_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
"""Set by CANN's `set_env.sh` to the folder of the toolkit."""

_NOT_USED = {
    "PRECISION": "no effect, noise is always drawn on the CPU",
    "OVERLAP": "not used by this version, one device has nothing to overlap",
}


@dataclass(frozen=True)
class Variable:
    """An environment variable that sets an option."""

    name: str
    values: Mapping[str, Any]
    """Text of the variable -> value of the option; None: that without the option."""
    effect: str
    """Text of the note; `{}` is replaced by the value of the option."""
    switch: bool = False
    """Whether it accepts 0, on, off, true, false, yes and no as well as 1."""
    default: str = ""
    """The note for a value None."""
    number: bool = False
    """Whether it accepts whole numbers, not `values`; 0 is as unset."""


def read_environment(
    variables: Mapping[str, Variable], environ: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return option -> value, and a note on the effect of each variable that is set.

    `variables`: option -> the variable that sets it. Raises UsageError (E-USE-01) for an invalid switch or
    number.
    """
    environ = os.environ if environ is None else environ
    options: dict[str, Any] = {}
    notes = []
    for option, variable in variables.items():
        name, values = variable.name, variable.values
        text = environ.get(name, "").strip()
        if variable.switch:
            text = "1" if _is_on(environ, name) else ""
        if variable.number and text:
            values = {text: _number(name, text)}
            text = text if values[text] else ""
        if text in values:
            options |= {} if values[text] is None else {option: values[text]}
            effect = variable.default if values[text] is None else variable.effect.format(values[text])
            notes.append(f"{name}={text}: {effect}")
        elif text:
            notes.append(f"{name}={text}: not used by this version, which supports {', '.join(values)}")
    notes += [f"{name}={environ[name]}: {reason}" for name, reason in _NOT_USED.items() if environ.get(name)]
    return options, tuple(notes)


def set_missing(values: Mapping[str, str]) -> dict[str, str]:
    """Set the variables that are unset or empty; return the values that the others already have."""
    existing = values_of(values)
    os.environ.update({name: value for name, value in values.items() if name not in existing})
    return existing


def values_of(names: Iterable[str], environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name -> value of the variables that are set and not empty."""
    environ = os.environ if environ is None else environ
    return {name: environ[name] for name in names if environ.get(name)}


def toolkit_folder(environ: Mapping[str, str] | None = None) -> Path | None:
    """Folder of the CANN toolkit whose `set_env.sh` this shell has sourced, or None."""
    environ = os.environ if environ is None else environ
    for name in TOOLKIT_VARIABLES:
        if environ.get(name):
            return Path(environ[name])
    return None


def cache_home(environ: Mapping[str, str] | None = None) -> Path:
    """The folder for caches, XDG_CACHE_HOME or `~/.cache`. Raises RuntimeError if the user has no home."""
    environ = os.environ if environ is None else environ
    folder = Path(environ.get("XDG_CACHE_HOME", ""))
    return folder if folder.is_absolute() else Path("~/.cache").expanduser()


def library_folders(environ: Mapping[str, str] | None = None) -> tuple[Path, ...]:
    """The folders listed in LD_LIBRARY_PATH."""
    environ = os.environ if environ is None else environ
    return tuple(Path(p) for p in environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if p)


def without_device_plugins(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment for a child process in which `import torch` does not load torch_npu automatically."""
    environ = os.environ if environ is None else environ
    return {**environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def disable_device_plugins() -> None:
    """Stop `import torch` from loading torch_npu automatically, in this process and its children."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"


def accept_click_completion() -> None:
    """Accept `_ASCENDIT_COMPLETE=bash_source`, the order of Click, for typer's `source_bash`."""
    shell, _, action = os.environ.get("_ASCENDIT_COMPLETE", "").partition("_")
    if action in ("source", "complete"):
        os.environ["_ASCENDIT_COMPLETE"] = f"{action}_{shell}"


def join_bash_words() -> str:
    """During a completion of bash, join the pieces of `COMP_WORDS` that it has split at `:` and `=`.

    Returns the last word without the piece that bash replaces; empty if nothing was joined.
    """
    pieces, last = os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD", 0))
    if os.environ.get("_ASCENDIT_COMPLETE") != "complete_bash" or last >= len(pieces):
        return ""
    joined, typed, after_break = [pieces[0]], "", False
    for piece in pieces[1 : last + 1]:
        is_break = bool(re.fullmatch("[:=]+", piece))
        if is_break or after_break:
            joined[-1] += piece
            typed = joined[-1] if is_break else joined[-1].removesuffix(piece)
        else:
            joined.append(piece)
            typed = ""
        after_break = is_break
    os.environ |= {"COMP_WORDS": "\n".join(joined), "COMP_CWORD": str(len(joined) - 1)}
    return typed


def _number(name: str, text: str) -> int:
    if re.fullmatch(r"\d{1,9}", text):
        return int(text)
    raise UsageError(
        f"environment variable {name}={text!r}",
        needs=f"{name} to be a whole number",
        fix=f"export {name}=1, or unset {name}",
    )


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value in ("", "0", "false", "off", "no"):
        return False
    if value in ("1", "true", "on", "yes"):
        return True
    raise UsageError(
        f"environment variable {name}={environ[name]!r}",
        needs=f"{name} to be 0 or 1",
        fix=f"export {name}=1, or unset {name}",
    )
