"""`ascendit bench attention`: measure every attention kernel of a device, for the automatic choice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendit.cli.interruptions import Interrupt
from ascendit.cli.main import Json, flag
from ascendit.cli.output import Output
from ascendit.cli.progress import progress_view
from ascendit.errors import UsageError
from ascendit.family import SPECS
from ascendit.geometry import latent_grid, num_tokens, patch_grid
from ascendit.report import columns, group_by, short_path

if TYPE_CHECKING:
    from ascendit.attention.bench import Benchmark
    from ascendit.attention.measured import Measurement, Shape

TARGETS = ("attention",)
MODEL = SPECS["Wan2.2-T2V-A14B"]
"""The model of `--shape 720p` and `480p`: 81 frames, 40 heads of 128."""
NAMED_SIZES = {"720p": (1280, 720), "480p": (832, 480)}
HEAD_DIM = 128
TEXT_TOKENS = 512
"""Keys of the cross-attention: text is padded to this length."""


def bench(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(metavar="attention", help="The operator to measure.")],
    shape: Annotated[
        str, flag("--shape SHAPE", "720p, 480p, or TOKENS,HEADS,HEADSIZE as 4096,12,128.")
    ] = "480p",
    cross: Annotated[
        int, flag("--cross N", "Keys of the cross-attention, measured too; 0: self-attention only.")
    ] = TEXT_TOKENS,
    device: Annotated[str, flag("--device NAME", "cpu, cuda, npu, or twin:a5.")] = "cpu",
    repeats: Annotated[int, flag("--repeats N", "Calls of each kernel; fewer if one is slow.")] = 9,
    output: Annotated[
        Path | None,
        flag("-o, --output FILE", "Write the results here, not where the automatic choice reads them."),
    ] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace an existing FILE.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the attention kernels of a device. The fastest becomes the default for such lengths.

    Errors are those against attention in float32; times are medians. Quantized attention is measured but not
    chosen automatically, nor are kernels that differ by more than rounding.
    """
    out: Output = ctx.obj
    shapes = _shapes(target, shape, cross, repeats)
    parsed = _check_output(device, output, overwrite)
    from ascendit.attention.bench import run_benchmark

    with out.work(), progress_view(silent=out.silent) as view, Interrupt(silent=out.silent) as interrupt:
        result = run_benchmark(
            parsed,
            shapes,
            repeats=repeats,
            on_progress=lambda event: view.show(event, f"{event.name}  {event.step}/{event.total}"),
            on_note=out.note,
            cancel=interrupt.event,
        )
    file = _write(result, output)
    out.result({**result.as_dict(), "file": None if file is None else str(file)}, _lines(result, out.width))
    if file is None:
        out.note("times of a twin are those of this processor, so they are not written")
    else:
        out.note(f"written to {short_path(file)}" + ("" if output else ", which the automatic choice reads"))


def _shapes(target: str, text: str, cross: int, repeats: int) -> list[Shape]:
    """The shapes to measure. Raises UsageError (E-USE-01) for an invalid call."""
    from ascendit.attention.measured import Shape

    if target not in TARGETS:
        raise UsageError(f"bench {target}", needs=" or ".join(TARGETS), fix=f"ascendit bench {TARGETS[0]}")
    for name, number, least in (("--cross", cross, 0), ("--repeats", repeats, 1)):
        if number < least:
            raise UsageError(f"{name} {number}", needs=f"at least {least}", fix=f"{name} {max(least, 1)}")
    tokens, heads, head_dim = named_shape(text) if text in NAMED_SIZES else _numbers(text)
    sizes = {"self": tokens, "cross": cross}
    return [
        Shape(kind=kind, queries=tokens, keys=keys, heads=heads, head_dim=head_dim)  # type: ignore[arg-type]
        for kind, keys in sizes.items()
        if keys
    ]


def named_shape(name: str) -> tuple[int, int, int]:
    """Tokens, heads and head size of `MODEL` at a size of `NAMED_SIZES`."""
    width, height = NAMED_SIZES[name]
    latents = latent_grid(MODEL.num_frames, height, width, frame_stride=4, stride=8)
    return num_tokens(patch_grid(latents, (1, 2, 2))), MODEL.dim // HEAD_DIM, HEAD_DIM


def _numbers(text: str) -> tuple[int, int, int]:
    numbers = re.fullmatch(r"([1-9]\d{0,6}),([1-9]\d{0,3}),([1-9]\d{0,3})", text.replace(" ", ""))
    if not numbers:
        raise UsageError(
            f"--shape {text}",
            needs=f"{', '.join(NAMED_SIZES)}, or TOKENS,HEADS,HEADSIZE",
            fix="--shape 4096,12,128",
        )
    tokens, heads, head_dim = map(int, numbers.groups())
    return tokens, heads, head_dim


def _check_output(device: str, output: Path | None, overwrite: bool) -> Any:
    """The parsed device. Raises UsageError for an output that cannot be written."""
    from ascendit.device.device import parse_device
    from ascendit.pages.page import check_report_file

    parsed = parse_device(device)
    if output is not None:
        if parsed.is_emulated:
            raise UsageError(
                f"--output with --device {parsed}, whose times are those of this processor",
                needs="cpu, cuda or npu",
                fix="omit --output; --json prints the times",
            )
        check_report_file(output, overwrite=overwrite, flag="--output", any_name=True)
    return parsed


def _write(result: Benchmark, output: Path | None) -> Path | None:
    """Write the rows to `output`, or to the file that the choice reads, whose other shapes remain."""
    from ascendit.attention.measured import cached_file, file_data, merged, read_measurements
    from ascendit.pages.page import write_report

    if result.device.is_emulated:
        return None
    hardware, rows, file = result.hardware, result.rows, output
    if file is None:
        file = cached_file(hardware)
        rows = merged(read_measurements(file, hardware), rows)
    write_report(file, file_data(hardware, rows) | {"threads": result.threads})
    return file


HEAD = ("kernel", "ms", "TFLOP/s", "peak", "error", "calls", "heads")


def _lines(result: Benchmark, width: int | None) -> Iterator[str]:
    versions = "   ".join(f"{name} {version}" for name, version in result.as_dict()["versions"].items())
    threads = "" if result.device.is_accelerator else f", {result.threads} threads"
    yield f"Attention on {result.device}: {result.hardware}{threads}   {versions}"
    for shape, rows in group_by(result.rows, lambda row: row.shape).items():
        yield from ("", f"{shape.kind}-attention, {shape}, {rows[0].dtype}")
        yield from columns([HEAD, *map(_cells, rows)], indent="  ", width=width)
    if result.skipped:
        yield from ("", "Not measured")
        yield from columns(sorted({*result.skipped}), indent="  ", width=width)


def _cells(row: Measurement) -> tuple[str, ...]:
    name = f"{row.scheme} ({row.kernel})" if row.scheme else row.kernel
    rates = (f"{row.tflops:.3f}", f"{row.peak_tflops:.3f}")
    heads = f"{row.measured_heads} of {row.shape.heads}"
    return name, f"{row.seconds * 1e3:.5g}", *rates, f"{row.error:.1e}", str(row.repeats), heads
