"""Keep the latents of a run beside its video: on request, and whenever the run fails after its last step."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendit.cli.interruptions import cancelled
from ascendit.cli.output import Output
from ascendit.errors import AscenditError, UsageError

if TYPE_CHECKING:
    from ascendit.pipeline.job import Prepared


def latents_file(output: Path) -> Path:
    """`circle.latents.safetensors` for `circle.mp4`, `circle.png` and the folder `circle/`."""
    from ascendit.pipeline.latents import SUFFIX
    from ascendit.pipeline.video_codecs import WRITERS

    is_format = output.suffix[1:].lower() in WRITERS
    return output.with_name(f"{output.stem if is_format else output.name}{SUFFIX}")


def check_latents_file(output: Path, *, overwrite: bool) -> None:
    """Raise UsageError (E-USE-03) if the file of `--keep-latents` exists."""
    if (file := latents_file(output)).exists() and not overwrite:
        needs = "a new name; files are overwritten only with --overwrite"
        raise UsageError(f"{file} already exists", needs=needs, fix="--overwrite", code="E-USE-03")


def save_latents(latents: Any, prepared: Prepared, file: Path) -> Path:
    """Write the latents of a run, float32 [1, z, F, h, w]. Raises OSError."""
    from ascendit.pipeline.latents import KeptLatents

    options, request = prepared.model.options, prepared.request
    kept = KeptLatents(latents=latents, request=request, source=options.model, loaded=options.record)
    return kept.save(file)


@contextmanager
def latents_kept_on_failure(prepared: Prepared, output: str, out: Output) -> Iterator[None]:
    """Save the latents of an exception that has some, and name their file and command in its text.

    Raises the exception again; Ctrl-C becomes Cancelled (E-CAN-01).
    """
    try:
        yield
    except BaseException as error:
        latents = getattr(error, "latents", None)
        if latents is None or prepared.latents is not None:  # decoding again: the file exists
            raise
        try:
            file = _save_anywhere(latents, prepared, Path(output))
        except OSError as problem:
            print(f"the latents could not be kept: {problem}", file=sys.stderr)
            raise error from problem
        command = ["ascendit", "generate", "--latents", str(file), "-o", output]
        if getattr(error, "code", "") in ("E-OUT-02", "E-OUT-04"):
            command.append("--allow-flat")
        if isinstance(error, KeyboardInterrupt):
            raise _with_latents(cancelled(), file, command) from error
        if isinstance(error, AscenditError):
            _with_latents(error, file, command)
            raise
        out.note(f"the latents are in {file}; decode them again with: {shlex.join(command)}")
        raise


def _with_latents(error: AscenditError, file: Path, command: list[str]) -> AscenditError:
    if error.code == "E-CAN-01":
        error.needs = "no cleanup: no video was written"
        error.fix = shlex.join(command)
    else:
        error.fix += f"; to decode again: {shlex.join(command)}"
    error.got += f"; the latents are in {file}"
    error.kept_in = str(file)
    return error


def _save_anywhere(latents: Any, prepared: Prepared, output: Path) -> Path:
    """Save beside the output under a new name, or in the folder for temporary files. Raises OSError."""
    first = latents_file(output)
    try:
        return save_latents(latents, prepared, _free(first))
    except OSError:
        return save_latents(latents, prepared, _free(Path(tempfile.gettempdir()) / first.name))


def _free(file: Path) -> Path:
    stem, *suffixes = file.name.rsplit(".", 2)
    names = (file.with_name(".".join([f"{stem}-{n}", *suffixes])) for n in count(2))
    return file if not file.exists() else next(name for name in names if not name.exists())
