"""The output of `ascendit generate --dry-run`: the resolved request, its work and its memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendit.pipeline.estimate import Estimate, human_flops
from ascendit.pipeline.options import FLAGS
from ascendit.report import columns, human_bytes

if TYPE_CHECKING:
    from ascendit.cli.generate_options import Call
    from ascendit.cli.output import Output
    from ascendit.pipeline.job import Prepared


def print_dry_run(prepared: Prepared, call: Call, output: Path, out: Output) -> None:
    """Print what the run would do: every value of the request, device, work, memory, output and replay."""
    request, options, model = prepared.request, prepared.model.options, prepared.model
    with out.work():
        estimate = prepared.estimate
    denoiser = estimate.memory.parts["transformer"]
    schemes = sorted({x for part in estimate.memory.parts.values() for x in part.schemes}) or ["bf16"]
    data = {
        "dry_run": True,
        "model": options.model,
        "folder": str(model.layout.root),
        "output": str(output),
        "request": request.model_dump(),
        "given": sorted({*call.fields} - {"seconds"}),
        "defaults_from": list(model.defaults.sources),
        "video_tokens": estimate.work.tokens,
        "text_tokens": request.max_sequence_length,
        **{name: getattr(options, name) for name in FLAGS},
        "dtype": denoiser.dtype,
        "schemes": schemes,
        **estimate.as_dict(),
        "replay": prepared.replay,
    }
    explicit = {*call.fields, "prompt"} | ({"num_frames"} if "seconds" in call.fields else set())
    shown = [(k, v) for k, v in request.model_dump().items() if v is not None]
    quantized = ", ".join(schemes) if denoiser.schemes else "not quantized"
    lines = [
        f"would run  {model.defaults.model} in {model.layout.root}",
        "request",
        *columns(((k, f"{v}" if k in explicit else f"{v}  (default)") for k, v in shown), indent="  "),
        "defaults from",
        *(f"  {source}" for source in model.defaults.sources),
        f"device     {model.device}; denoiser in {denoiser.dtype}, {quantized}",
        *_size_lines(estimate, request.max_sequence_length, request.do_classifier_free_guidance),
        f"output     {output}",
        f"replay     {prepared.replay}",
    ]
    out.result(data, lines)


def _size_lines(estimate: Estimate, text_tokens: int, guided: bool) -> list[str]:
    """Work, memory and warnings."""
    work, memory = estimate.work, estimate.memory
    passes = "two passes" if guided else "one pass"
    size = f"{human_flops(work.flops_per_step)} per step, {human_flops(work.flops)} in all"
    lines = [
        f"work       {work.tokens} video and {text_tokens} text tokens, {passes} per step: {size}",
        f"memory     {human_bytes(memory.weights_bytes)} of weights; activations come on top",
    ]
    parts: list[tuple[Any, ...]] = [
        (
            name,
            human_bytes(part.bytes),
            ", ".join((part.dtype, *part.schemes)),
            _where(part.device, part.until),
        )
        for name, part in memory.parts.items()
    ]
    free = ((device, x) for device, x in memory.available.items() if x is not None)
    parts += [("free", human_bytes(x), f"on {device}", "") for device, x in free]
    lines += columns(parts, indent="  ")
    return lines + [f"warning    {text}" for text in estimate.warnings]


def _where(device: str, until: str) -> str:
    return f"on {device}" + (f" until {until}" if until else "")
