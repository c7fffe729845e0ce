"""A Wan model of two layers and the demo's run to latents and frames, traced over the stub CANN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from npu import ways
from npu.trace import Stub, Trace
from torch import nn

import ascendit
from ascendit.device.device import Device
from ascendit.family import WanConfig
from ascendit.model.linear import QuantLinear
from ascendit.model.wan import WanTransformer
from ascendit.ops.operators import Schemes, bind
from ascendit.pipeline import generate
from ascendit.pipeline.generate import Pipeline

STEPS, LAYERS = 4, 2
"""Two steps for each expert."""
CONFIG = WanConfig(
    num_attention_heads=2, attention_head_dim=32, text_dim=32, freq_dim=64, ffn_dim=128, num_layers=LAYERS
)
LATENTS = (1, 16, 3, 6, 4)


def counted(trace: Trace) -> dict[str, Any]:
    """A trace as data for the report."""
    data = {"launches": len(trace.launched), "kernels": trace.counts, "host": trace.host}
    return data | {"strided": list(trace.strided)}


def forward(device: Device, stub: Stub) -> dict[str, Any]:
    """Launches of one forward of two layers that computes its modulation, and of one of its blocks."""
    with torch.device("meta"):
        model = WanTransformer(CONFIG, bind(device))
    for name, p in list(model.named_parameters()):
        is_float32 = any(k in name.split(".") for k in model.KEEP_FP32)
        value = torch.full(p.shape, 0.01, dtype=torch.float32 if is_float32 else torch.bfloat16)
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(value.to(device.torch_name), requires_grad=False)
        model.get_submodule(owner).register_parameter(leaf, parameter)
    model.eval()
    x = torch.zeros(LATENTS, device=device.torch_name)
    text = torch.zeros(1, 8, CONFIG.text_dim, device=device.torch_name)
    state, prepared = stub.during(lambda: model.prepare(model.grid_of(x), text, timesteps=(500.0,)))
    _, trace = stub.during(lambda: model(x, 500.0, state))
    mod = model.modulation((500.0,), (len(state.shared.part),))
    hidden = torch.zeros(
        1, len(state.shared.part), CONFIG.dim, device=device.torch_name, dtype=torch.bfloat16
    )
    _, block = stub.during(lambda: model.blocks[0](0, hidden, mod, state))
    return {"prepare": counted(prepared), "forward": counted(trace), "block": counted(block)}


def diffusers_forward(device: Device, stub: Stub) -> dict[str, Any]:
    """The same forward with Diffusers' model, for comparison."""
    from diffusers import WanTransformer3DModel

    names = ("num_attention_heads", "attention_head_dim", "text_dim", "freq_dim", "ffn_dim", "num_layers")
    model = WanTransformer3DModel(**{n: getattr(CONFIG, n) for n in names})
    model = model.to(device.torch_name, torch.bfloat16).eval()
    x = torch.zeros(LATENTS, device=device.torch_name, dtype=torch.bfloat16)
    text = torch.zeros(1, 8, CONFIG.text_dim, device=device.torch_name, dtype=torch.bfloat16)
    t = torch.tensor([500], device=device.torch_name)
    _, trace = stub.during(lambda: model(x, t, text, return_dict=False))
    return {"diffusers": counted(trace)}


def videos(device: Device, stub: Stub) -> dict[str, Any]:
    """The demo in every variant of this chip, both experts cut to two layers, and its VAE once."""
    pipe = ascendit.load("demo", device=device.torch_name, dtype="bfloat16")
    report: dict[str, Any] = {"ways": {}}
    for way in ways.on(pipe.device):
        first, second = ways.experts(pipe, way, LAYERS)
        small = replace(pipe, transformer=first, transformer_2=second, policy=ways.policy(way))
        latents, steps = denoise(small, stub)
        traits = {"quantized": bool(way.schemes), "texts": LAYERS if way.smooth else 1, "nz": way.in_nz}
        report["ways"][way.name] = {**traits, "layers": LAYERS, "steps": steps}
        if way.in_nz:
            report["ways"][way.name]["round_trip"] = round_trip(first, device)
    with torch.no_grad():
        frames, decoding = stub.during(lambda: pipe.vae.decode(latents))
    return report | {"decode": counted(decoding), "frames": list(frames.shape)}


def denoise(pipe: Pipeline, stub: Stub) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The trace of each step of the loop; the preparation of both experts before it is left out."""
    request = pipe.request("a red circle", seed=1, num_inference_steps=STEPS, num_frames=5)
    steps: list[dict[str, Any]] = []
    share = generate.share

    def shared(*args: Any) -> Any:
        result = share(*args)
        stub.take()
        return result

    def report(event: Any) -> None:
        trace = stub.take()
        if event.stage == "denoise":
            branches = 2 if request.guidance_for(high=event.expert == "transformer") > 1 else 1
            precision = pipe.policy.settings_of(event.step - 1).precision
            steps.append(
                {"expert": event.expert, "precision": precision, "branches": branches, **counted(trace)}
            )

    refuse = AssertionError("a weight is prepared in the loop")
    with (
        mock.patch.object(generate, "share", shared),
        mock.patch.object(generate, "check_finite", lambda latents: latents),  # the numbers have no meaning
        mock.patch.object(Schemes, "prepare_weight", side_effect=refuse),
    ):
        latents = generate.denoise(pipe, request, None, report, None)
    return latents, steps


def round_trip(model: WanTransformer, device: Device) -> list[int]:
    """The layouts of a block's weights after a round trip to the host."""
    block = model.blocks[0].to("cpu").to(device.torch_name)
    weights = [m.group.weight.qdata for m in block.modules() if isinstance(m, QuantLinear)]
    return sorted({int(torch.ops.npu.get_npu_format(qdata)) for qdata in weights})
