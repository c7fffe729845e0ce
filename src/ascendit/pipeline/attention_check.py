"""The attention kernels of a checked request, before weights are loaded. Does not import torch.

`Prepared.attention` has the rows of the report; the errors are those of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ascendit.attention.choice import AttentionPolicy, calls_of
from ascendit.attention.measured import fastest
from ascendit.attention.steps import AttentionRow, Resolved, describe_on, report, resolve
from ascendit.checkpoint.transformer import Expert, model_config
from ascendit.device.attention_kernels import ATTENTION_KERNELS, Kind, parse_attention
from ascendit.device.attention_limits import LONG, kernels_on
from ascendit.device.device import Device
from ascendit.errors import UsageError
from ascendit.model.quantize_on_load import stored_dtype
from ascendit.native.build import processor_name, unavailable
from ascendit.pipeline.options import LoadOptions, PreparedModel
from ascendit.pipeline.request import GenerateRequest
from ascendit.pipeline.sigmas import expert_of
from ascendit.schedule import Step, StepSchedule
from ascendit.weights.applied_recipe import AppliedRecipe, attention_schemes

SPLIT = ("cpu", "fusion", "fused_infer")
"""The kernels that `attention_probabilities` changes, on a CPU and on a twin."""


def policy_of(options: LoadOptions, device: Device, schedule: StepSchedule) -> AttentionPolicy:
    """The requests of `options` and of the step schedule.

    Raises UsageError (E-USE-01) for `attention_probabilities` on a device whose kernels do not have them.
    """
    if options.attention_probabilities and (device.is_accelerator or options.ops):
        where = "ops=reference" if options.ops else f"device {device}"
        raise UsageError(
            f"attention_probabilities={options.attention_probabilities} with {where}",
            needs="the BF16 attention of a CPU or a twin",
            fix="omit --set attention_probabilities",
        )
    policy = AttentionPolicy(
        device=device,
        schedule=schedule,
        request=parse_attention(options.attention) if options.attention else {},
        sub_head=options.sub_head,
        probabilities=options.attention_probabilities,
        reference=options.ops is not None,
        emulate=options.emulate is not None,
    )
    if device.is_accelerator:  # it has to be open to know its model: see `load.open_accelerator`
        return policy
    return replace(policy, missing=_missing, measured=partial(fastest, hardware=processor_name()))


def _missing(name: str) -> str:
    """Why this machine cannot compile a kernel, "" if it can or need not."""
    source = ATTENTION_KERNELS[name].source
    return unavailable(source) if source else ""


def check_policy(model: PreparedModel) -> None:
    """Check the requests and the step schedule against a model; no kernel is too long for the video here.

    Raises the errors of `resolve`, and UsageError (E-USE-01) for `attention_probabilities` without effect.
    """
    steps = dict(enumerate(model.schedule.settings))
    contexts: dict[Kind, int] = {"text": LONG}
    if model.needs_image_encoder:
        contexts["image"] = LONG
    names: set[str] = set()
    for expert, applied in model.experts:
        resolved = _resolved(model, expert, applied, LONG, contexts, steps)
        names |= {x.name for kinds in resolved.values() for choices in kinds.values() for x in choices}
    _check_probabilities(model, names)


def _check_probabilities(model: PreparedModel, names: set[str]) -> None:
    """Raise UsageError (E-USE-01) for `attention_probabilities` if none of the kernels `names` has them."""
    numbers = model.options.attention_probabilities
    if numbers and not names & {*SPLIT}:
        raise UsageError(
            f"attention_probabilities={numbers} with attention by {', '.join(sorted(names))}",
            needs=f"the kernel {' or '.join(name for name in SPLIT if name in kernels_on(model.device))}",
            fix="omit --set attention_probabilities",
        )


def attention_rows(
    model: PreparedModel, request: GenerateRequest, tokens: int, image_tokens: int
) -> tuple[AttentionRow, ...]:
    """The kernels of a request. `tokens`: those of the video. Raises the errors of `check_policy`."""
    contexts: dict[Kind, int] = {"text": request.max_sequence_length}
    contexts |= {"image": image_tokens} if image_tokens else {}
    schedule = request.denoising_schedule
    settings = model.schedule.resolve(len(schedule.timesteps))
    names = [expert_of(t, request.boundary_ratio) for t in schedule.timesteps]
    rows: list[AttentionRow] = []
    for expert, applied in model.experts:
        steps = {i: settings[i] for i, name in enumerate(names) if name == expert.name}
        resolved = _resolved(model, expert, applied, tokens, contexts, steps)
        rows += report(expert.name, resolved, describe_on(model.attention))
    _check_probabilities(model, {row.kernel for row in rows})
    return tuple(rows)


def _resolved(
    model: PreparedModel,
    expert: Expert,
    applied: AppliedRecipe | None,
    tokens: int,
    contexts: Mapping[Kind, int],
    steps: Mapping[int, Step],
) -> Resolved:
    config, schemes = model_config(expert), attention_schemes(expert, applied)
    calls = calls_of(config, model.dtype or stored_dtype(expert, applied), tokens, contexts)
    blocks = range(config.num_layers)
    names = {kind: "attn1" if kind == "self" else "attn2" for kind in calls}
    declared = {k: [schemes.get(f"blocks.{i}.{name}") for i in blocks] for k, name in names.items()}
    return resolve(model.attention, calls, declared, steps)
