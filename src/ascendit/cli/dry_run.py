"""The output of `ascendit generate --dry-run`: the resolved request, its work and its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ascendit.attention.steps import row_lines
from ascendit.convert.report import lora_lines
from ascendit.family import PRESETS
from ascendit.pipeline.estimate import Estimate, estimate_run, human_flops
from ascendit.pipeline.memory import memory_of
from ascendit.pipeline.options import FLAGS
from ascendit.pipeline.sigmas import is_high_noise
from ascendit.report import beginning, columns, human_bytes

if TYPE_CHECKING:
    from ascendit.cli.generate_options import Call
    from ascendit.cli.generate_plan import Planned
    from ascendit.cli.output import Output
    from ascendit.pipeline.job import Prepared
    from ascendit.pipeline.request import GenerateRequest


def print_dry_run(plan: Sequence[Planned], out: Output, *, many: bool) -> None:
    """Print the plan of the run: every value of the request, device, work, memory, output and replay.

    `many`: values of the first video, then prompt, seed and output of each.
    """
    first = plan[0]
    prepared, call, output = first.prepared, first.call, first.output
    request, options, model = prepared.request, prepared.model.options, prepared.model
    replay = first.replay(allow_flat=call.allow_flat)
    with out.work():
        estimate = estimate_run(prepared)
    schedule = request.denoising_schedule
    memory = estimate.memory if prepared.latents is None else memory_of(model)
    denoiser = memory.parts["transformer"]
    schemes = sorted({x for part in memory.parts.values() for x in part.schemes}) or ["bf16"]
    data = {
        "dry_run": True,
        "model": options.model,
        "folder": str(model.layout.root),
        "output": str(output),
        "latents": str(call.latents) if call.latents else None,
        "request": request.model_dump(),
        "given": sorted({*call.fields} - {"seconds", "preset"}),
        "preset": call.fields.get("preset"),
        "defaults_from": list(model.defaults.sources),
        "difference": model.defaults.difference or None,
        "images": prepared.images,
        "schedule": asdict(schedule),
        "video_tokens": estimate.work.tokens,
        "text_tokens": request.max_sequence_length,
        **{name: getattr(options, name) for name in FLAGS},
        "loras": prepared.loras,
        "dtype": denoiser.dtype,
        "schemes": schemes,
        "attention": [row.as_dict() for row in prepared.attention],
        **estimate.as_dict(),
        "replay": replay,
    }
    if many:
        data["videos"] = [
            {"prompt": x.prepared.request.prompt, "seed": x.prepared.request.seed, "output": x.output}
            for x in plan
        ]
    shown, origin = request.model_dump(exclude_none=True), _origins(call, request)
    if request.image is None:
        del shown["fit"]
    quantized = ", ".join(schemes) if denoiser.schemes else "not quantized"
    if prepared.latents is not None:
        out.result(data, _decode_lines(prepared, estimate, call, output, replay))
        return
    lines = [
        f"would run  {model.defaults.model} in {model.layout.root}",
        "request",
        *columns(((k, f"{v if v != '' else repr('')}{origin(k)}") for k, v in shown.items()), indent="  "),
        *(f"{field:<10} {text}" for field, text in prepared.images.items()),
        f"timesteps  {_timesteps(request, schedule.timesteps)}",
        "defaults from",
        *(f"  {source}" for source in _sources(prepared, call, out)),
        f"device     {model.device}; denoiser in {denoiser.dtype}, {quantized}",
        *_attention_lines(prepared),
        *(f"LoRA       {line}" for line in lora_lines(prepared.loras)),
        *_size_lines(estimate, request.max_sequence_length, request.num_inference_steps),
        f"output     {output}",
        f"replay     {replay}",
        *(_video_lines(plan) if many else ()),
    ]
    out.result(data, lines)


def _attention_lines(prepared: Prepared) -> list[str]:
    """The kernels of the run."""
    return [f"{'' if n else 'attention':<10} {text}" for n, text in enumerate(row_lines(prepared.attention))]


def _video_lines(plan: Sequence[Planned]) -> list[str]:
    """Number, seed, output and prompt of each video."""
    requests = [planned.prepared.request for planned in plan]
    rows = ((f"seed {r.seed}", x.output, beginning(r.prompt)) for r, x in zip(requests, plan, strict=True))
    return [f"videos     {len(plan)}, the values above are those of the first", *columns(rows, indent="  ")]


def _decode_lines(prepared: Prepared, estimate: Estimate, call: Call, output: str, replay: str) -> list[str]:
    """The plan of `--latents`: only the VAE runs."""
    request, model = prepared.request, prepared.model
    shape = f"{request.width}x{request.height}, {request.num_frames} frames, {request.fps} fps"
    return [
        f"would decode {shape}, with the VAE of {model.defaults.model} in {model.layout.root}",
        f"latents    {call.latents}; no step is repeated",
        f"prompt     {request.prompt}",
        f"seed       {request.seed}",
        f"device     {model.device}",
        *_memory_lines(estimate),
        f"output     {output}",
        f"replay     {replay}",
    ]


def _origins(call: Call, request: GenerateRequest) -> Callable[[str], str]:
    """Field -> the note behind its value: a preset or the model's default; empty for values of the call."""
    explicit = {*call.fields, "prompt"} | ({"num_frames"} if "seconds" in call.fields else set())
    preset = call.fields.get("preset")
    values = PRESETS[preset].fields if preset else {}
    by_preset = {name for name, value in values.items() if getattr(request, name) == value} - explicit
    bases = {"guidance_scale_2": "guidance_scale", "num_inference_steps": "timesteps"}

    def origin(name: str) -> str:
        base = bases.get(name, "")
        text = "  (default)"
        if name in explicit:
            text = ""
        elif name in ("width", "height") and request.image is not None:
            text = "  (from the image)"
        elif name in by_preset or base in by_preset:
            text = f"  (preset {preset})"
        elif base in explicit:
            text = f"  (from {base})"
        unused = name == "negative_prompt" and not request.do_classifier_free_guidance
        return text + ("  (not used: guidance is at most 1)" if unused and request.negative_prompt else "")

    return origin


def _sources(prepared: Prepared, call: Call, out: Output) -> list[str]:
    """The origin of the values that the call does not set; without the difference that a warning names."""
    defaults, preset = prepared.model.defaults, call.fields.get("preset")
    warned = not out.silent and bool(set(defaults.differing) - set(call.fields))
    lines = [text for text in defaults.sources if not (warned and text == defaults.difference)]
    if preset:
        names = [name for name in PRESETS[preset].fields if name not in call.fields]
        return [f"{', '.join(names)}: preset {preset}", *(f"without the preset: {text}" for text in lines)]
    schedule = prepared.request.schedule
    return lines if "schedule" in call.fields else [*lines, f"schedule: {schedule} (of every model)"]


def _timesteps(request: GenerateRequest, timesteps: Sequence[float]) -> str:
    """The timesteps of a run, the first and last few of many, and the expert of each."""
    texts = [f"{t:.6g}" for t in timesteps]
    text = ", ".join(texts if len(texts) <= 12 else [*texts[:6], "..", *texts[-3:]])
    if request.boundary_ratio is None:
        return text
    high = sum(is_high_noise(t, request.boundary_ratio) for t in timesteps)
    return f"{text} ({high} high-noise, {len(timesteps) - high} low-noise)"


def _size_lines(estimate: Estimate, text_tokens: int, steps: int) -> list[str]:
    """Work, memory and warnings."""
    work = estimate.work
    counts = {steps: "one pass per step", 2 * steps: "two passes per step"}
    passes = counts.get(work.passes, f"{work.passes} passes in {steps} steps")
    size = f"{human_flops(work.flops_per_step)} per step, {human_flops(work.flops)} in all"
    tokens = f"{work.tokens} video and {text_tokens} text tokens"
    return [f"work       {tokens}, {passes}: {size}", *_memory_lines(estimate)]


def _memory_lines(estimate: Estimate) -> list[str]:
    """Memory and warnings."""
    memory = estimate.memory
    lines = [f"memory     {human_bytes(memory.weights_bytes)} of weights; activations come on top"]
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
