"""Keep the latents of a run beside its video: on request, and whenever the run fails after its last step."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendit.checkpoint.file_copy import write_error
from ascendit.cli.interruptions import cancelled
from ascendit.cli.output import Output
from ascendit.errors import AscenditError, EnvironmentProblem, UsageError
from ascendit.report import shell_line

log = logging.getLogger("ascendit")

if TYPE_CHECKING:
    from ascendit.pipeline.job import Prepared


def latents_file(output: Path) -> Path:
    """`circle.latents.safetensors` for `circle.mp4`, `circle.png` and the folder `circle/`."""
    from ascendit.pipeline.latents import SUFFIX
    from ascendit.pipeline.video_codecs import WRITERS

    is_format = output.suffix[1:].lower() in WRITERS
    return output.with_name(f"{output.stem if is_format else output.name}{SUFFIX}")


def check_latents_file(output: Path, *, overwrite: bool) -> None:
    """Check that the file of `--keep-latents` can be written.

    Raises UsageError (E-USE-03) if it exists, EnvironmentProblem (E-ENV-02) if its name is too long.
    """
    from ascendit.pipeline.latents import new_file
    from ascendit.pipeline.video import check_name

    file = latents_file(output)
    check_name(new_file(file))
    if file.is_dir():
        fix = f"move the folder: {shell_line(['mv', str(file), f'{file}.old'])}"
        raise UsageError(f"{file} is a folder", needs="a name for the latents", fix=fix, code="E-USE-03")
    if os.path.lexists(file) and not overwrite:
        needs = "a new name; files are overwritten only with --overwrite"
        raise UsageError(f"{file} already exists", needs=needs, fix="--overwrite", code="E-USE-03")


def keep_latents(latents: Any, prepared: Prepared, output: Path) -> None:
    """Write the file of `--keep-latents` beside the video `output`, which exists.

    Raises EnvironmentProblem: E-ENV-04 for a full disk, E-ENV-02 for a folder or name that is refused.
    """
    file = latents_file(output)
    try:
        save_latents(latents, prepared, file)
    except OSError as e:
        error: EnvironmentProblem = write_error(file.parent, e)
        error.got = f"the latents are not kept, {error.got}; the video is in {output}"
        raise error from e


def save_latents(latents: Any, prepared: Prepared, file: Path) -> Path:
    """Write the latents of a run, float32 [1, z, F, h, w]. Raises OSError."""
    from ascendit.pipeline.latents import KeptLatents
    from ascendit.pipeline.video import installed_versions

    options, kept = prepared.model.options, prepared.latents
    if kept is None:
        kept = KeptLatents(
            latents=latents,
            request=prepared.request,
            source=options.model,
            loaded=options.record,
            versions=installed_versions(),
        )
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
            log.warning("the latents could not be kept: %s", problem)
            raise error from problem
        command = ["ascendit", "generate", "--latents", str(file), "-o", output]
        if getattr(error, "code", "") in ("E-OUT-02", "E-OUT-04"):
            command.append("--allow-flat")
        if isinstance(error, KeyboardInterrupt):
            raise _with_latents(cancelled(), file, command) from error
        if isinstance(error, AscenditError):
            _with_latents(error, file, command)
            raise
        out.note(f"the latents are in {file}; decode them again with: {shell_line(command)}")
        raise


def _with_latents(error: AscenditError, file: Path, command: list[str]) -> AscenditError:
    if error.code == "E-CAN-01":
        error.needs = "nothing: no video was written"
        error.fix = shell_line(command)
    else:
        error.fix += f"; to decode again: {shell_line(command)}"
    error.got += f"; the latents are in {file}"
    error.kept_in = str(file)
    return error


def _save_anywhere(latents: Any, prepared: Prepared, output: Path) -> Path:
    """Save beside the output under a new or short name, or in the folder for temporary files.

    Raises OSError.
    """
    from ascendit.pipeline.latents import SUFFIX

    first, short = latents_file(output), f"video{SUFFIX}"
    temporary = Path(tempfile.gettempdir())
    for file in (first, first.with_name(short), temporary / first.name):
        with suppress(OSError):
            return save_latents(latents, prepared, _free(file))
    return save_latents(latents, prepared, _free(temporary / short))


def _free(file: Path) -> Path:
    stem, *suffixes = file.name.rsplit(".", 2)
    names = (file.with_name(".".join([f"{stem}-{n}", *suffixes])) for n in count(2))
    exists = os.path.lexists
    return file if not exists(file) else next(name for name in names if not exists(name))
