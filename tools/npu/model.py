"""A Wan model of two layers and the demo's whole way to latents and frames, traced over the stub CANN."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from npu.trace import Stub, Trace

import ascendit
from ascendit.device.backends import Device
from ascendit.model.load import place
from ascendit.model.wan import WanConfig, WanTransformer
from ascendit.ops.bind import bind
from ascendit.pipeline import generate

STEPS, LAYERS = 4, 2
CONFIG = WanConfig(
    num_attention_heads=2, attention_head_dim=32, text_dim=32, freq_dim=64, ffn_dim=128, num_layers=LAYERS
)
LATENTS = (1, 16, 3, 6, 4)


def counted(trace: Trace) -> dict[str, Any]:
    """For the report."""
    return {"launches": len(trace.launched), "kernels": trace.counts, "host": trace.host}


def forward(device: Device, stub: Stub) -> dict[str, Any]:
    """Launches of one forward of two layers whose modulation is new, and of one block in it."""
    with torch.device("meta"):
        model = WanTransformer(CONFIG, bind(device))
    for name, p in list(model.named_parameters()):
        kept = any(k in name.split(".") for k in model.KEEP_FP32)
        value = torch.full(p.shape, 0.01)
        place(model, name, value, device.torch_name, torch.float32 if kept else torch.bfloat16)
    model.eval()
    x = torch.zeros(LATENTS, device=device.torch_name)
    text = torch.zeros(1, 8, CONFIG.text_dim, device=device.torch_name)
    state, prepared = stub.during(lambda: model.prepare(model.grid_of(x), text, timesteps=(500.0,)))
    _, whole = stub.during(lambda: model(x, 500.0, state))
    mod = model.modulation((500.0,), (state.num_tokens,))
    tokens = torch.zeros(1, state.num_tokens, CONFIG.dim, device=device.torch_name, dtype=torch.bfloat16)
    _, block = stub.during(lambda: model.run_block(0, model.blocks[0], tokens, mod, state))
    return {"prepare": counted(prepared), "forward": counted(whole), "block": counted(block)}


def diffusers_forward(device: Device, stub: Stub) -> dict[str, Any]:
    """The same with Diffusers' model, for comparison."""
    from diffusers import WanTransformer3DModel

    names = ("num_attention_heads", "attention_head_dim", "text_dim", "freq_dim", "ffn_dim", "num_layers")
    model = WanTransformer3DModel(**{n: getattr(CONFIG, n) for n in names})
    model = model.to(device.torch_name, torch.bfloat16).eval()
    x = torch.zeros(LATENTS, device=device.torch_name, dtype=torch.bfloat16)
    text = torch.zeros(1, 8, CONFIG.text_dim, device=device.torch_name, dtype=torch.bfloat16)
    at = torch.tensor([500], device=device.torch_name)
    _, trace = stub.during(lambda: model(x, at, text, return_dict=False))
    return {"diffusers": counted(trace)}


def video(device: Device, stub: Stub) -> dict[str, Any]:
    """The demo, both experts cut to two layers: each step of the loop by itself, then the decoding."""
    pipe = ascendit.load("demo", device=device.torch_name, dtype="bfloat16")
    for expert in (pipe.transformer, pipe.transformer_2):
        if expert is not None:
            expert.blocks = expert.blocks[:LAYERS]
    request = pipe.request("a red circle", seed=1, num_inference_steps=STEPS, num_frames=5)
    steps: list[dict[str, Any]] = []

    def report(event: Any) -> None:
        trace = stub.take()
        if event.stage == "denoise":
            steps.append({"expert": event.expert, **counted(trace)})

    with mock.patch.object(generate, "finite", lambda latents: latents):  # no number here means anything
        latents = generate.denoise(pipe, request, None, report, None)
    with torch.no_grad():
        frames, decoding = stub.during(lambda: pipe.vae.decode(latents))
    return {"steps": steps, "decode": counted(decoding), "frames": list(frames.shape)}
