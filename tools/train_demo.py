"""Train the demo model from scratch: VAE, text encoder and the two experts, on the synthetic world.

    python tools/train_demo.py --out build/demo            # about 100 minutes on two CPU cores
    python tools/train_demo.py --out build/demo --export src/ascendit/demo/models/demo

Stages run in order. Each saves its result and is skipped if that file exists. An interrupted stage resumes
from its last checkpoint. All random numbers come from `--seed`. The log is appended to
`tools/train_demo.log`. A GPU is used if there is one.

Read the model config first: `vae()`, `text_encoder()`, `denoiser()`; then the stages, in order.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_data import WORDINGS, caption, draw_motion, render
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ascendit.demo import world

REPO = Path(__file__).resolve().parents[1]
LATENT = (8, 5, 16, 16)  # channels, frames, height, width of a 17 x 64 x 64 video
TEXT_TOKENS = 28  # tokens of the longest caption; the padding up to 512 is folded into one token
SHIFT = 4.0
BOUNDARY = 0.875


# ---- the networks -------------------------------------------------------------------------------


def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT[0],
        dim_mult=[1, 2, 3],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
        scale_factor_temporal=4,
        latents_mean=[0.0] * LATENT[0],
        latents_std=[1.0] * LATENT[0],
    )


def text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=64,
        d_kv=32,
        num_heads=2,
        d_ff=160,
        num_layers=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def denoiser() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        text_dim=64,
        freq_dim=128,
        ffn_dim=448,
        num_layers=8,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=1024,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer: one token for each word of the world's captions, letters for other words."""
    vocabulary: set[str] = set()
    for scene in world.scenes():
        for w, d in itertools.product(range(len(WORDINGS)), range(3)):
            vocabulary |= {c.strip(".,") for c in caption(scene, w, d).split()}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -4.0) for word in sorted(vocabulary)]
    pieces += [(c, -12.0) for c in "▁abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"]
    tok = Tokenizer(models.Unigram(pieces, unk_id=2))
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tok.decoder = decoders.Metaspace()
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


# ---- data ---------------------------------------------------------------------------------------


def training_scenes() -> list[world.Scene]:
    held_out = world.held_out()
    return [s for s in world.scenes() if s.triple not in held_out]


def clip(rng: np.random.Generator, scene: world.Scene, frames: int, start: int = 0) -> torch.Tensor:
    """`frames` consecutive frames of a rendered video: float32 [3, F, H, W] in [-1, 1]."""
    motion = draw_motion(rng, scene.direction)
    video = render(scene, motion, only=range(start, start + frames))
    return torch.from_numpy(video).permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)


def clip_batch(rng: np.random.Generator, n: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Videos [n, 3, F, H, W] and the loss weight of each pixel [n, 1, F, H, W] (5 on the object)."""
    every = list(world.scenes())  # the VAE may see every scene; only captions are held out
    xs = []
    for _ in range(n):
        scene = every[rng.integers(len(every))]
        xs.append(clip(rng, scene, frames, int(rng.integers(world.FRAMES - frames + 1))))
    x = torch.stack(xs)
    thing = (x - x[:, :, :1, :1, :1]).abs().amax(1, keepdim=True) > 0.05
    edge = F.max_pool3d(thing.float(), (1, 5, 5), 1, (0, 2, 2))
    return x, 1.0 + 4.0 * edge


# ---- optimiser: Muon for matrices, AdamW for other parameters -----------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest (semi-)orthogonal matrix by five Newton-Schulz steps (K. Jordan, 2024)."""

    def __init__(
        self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    g = p.grad.lerp(m, group["momentum"]).flatten(1)  # Nesterov
                    alike.setdefault(tuple(g.shape), []).append((p, g))
            for (rows, columns), pairs in alike.items():  # matrices of one shape together
                updates = orthogonalise(torch.stack([g for _, g in pairs]))
                scale = max(1.0, rows / columns) ** 0.5
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def orthogonalise(g: torch.Tensor) -> torch.Tensor:
    """Push the singular values of each matrix in g [n, rows, columns] towards 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.mT if tall else x).to(g.dtype)


def optimisers(modules: list[torch.nn.Module], lr_muon: float, lr_adam: float) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for module in modules:
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            plain = p.ndim < 2 or p.flatten(1).shape[1] < 16 or p.shape[0] < 16
            special = any(k in name for k in ("scale_shift", "embed", "proj_out", "shared", "gamma", "bias"))
            (others if plain or special else matrices).append(p)
    return [
        Muon(matrices, lr=lr_muon),
        torch.optim.AdamW(others, lr=lr_adam, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int, *, hold: float, floor: float, warmup: int = 30) -> float:
    """Warm up, hold for a share of the steps, then fall linearly to `floor`."""
    up, done = min(1.0, (step + 1) / warmup), step / steps
    down = 1.0 if done < hold else (1.0 - done) / (1.0 - hold)
    return up * (floor + (1 - floor) * down)


# ---- a resumable training loop ------------------------------------------------------------------


class Run:
    """Output folder, log, and the training loop of every stage."""

    def __init__(self, out: Path, seed: int, device: str, budget: float, echo: Path) -> None:
        self.out, self.seed, self.device, self.budget, self.echo = out, seed, device, budget, echo
        out.mkdir(parents=True, exist_ok=True)

    def log(self, text: str) -> None:
        print(text, flush=True)
        with self.echo.open("a") as f:
            f.write(text + "\n")

    def loop(
        self,
        stage: str,
        modules: dict[str, torch.nn.Module],
        opts: list[torch.optim.Optimizer],
        steps: int,
        loss_fn: Callable[[int, np.random.Generator], dict[str, torch.Tensor]],
        *,
        ema: float | None = None,
        log_every: int = 50,
        hold: float = 0.5,
        floor: float = 0.0,
    ) -> None:
        """Run `steps` steps (scaled by the budget), save every 200, and load the EMA weights at the end."""
        steps = max(2, int(steps * self.budget))
        path = self.out / f"{stage}.partial.pt"
        base = [[g["lr"] for g in o.param_groups] for o in opts]
        shadow = {k: copy.deepcopy(m).requires_grad_(False) for k, m in modules.items()} if ema else {}
        first = 0
        if path.exists():
            saved = torch.load(path, map_location=self.device, weights_only=False)
            first = saved["step"]
            for k, m in modules.items():
                m.load_state_dict(saved["modules"][k])
            for k, m in shadow.items():
                m.load_state_dict(saved["shadow"][k])
            for o, s in zip(opts, saved["opts"], strict=True):
                o.load_state_dict(s)
        self.log(f"{stage}: {steps} steps from {first}")
        clock, sums = time.perf_counter(), {}
        for step in range(first, steps):
            rng = np.random.default_rng([self.seed, hash_stage(stage), step])
            torch.manual_seed(int(rng.integers(2**31)))
            for o, lrs in zip(opts, base, strict=True):
                for g, lr in zip(o.param_groups, lrs, strict=True):
                    g["lr"] = lr * rate(step, steps, hold=hold, floor=floor)
            losses = loss_fn(step, rng)
            losses["loss"].backward()
            for m in modules.values():
                torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            for o in opts:
                o.step()
                o.zero_grad(set_to_none=True)
            keep = min(ema or 0.0, (step + 1) / (step + 10))
            for k, s in shadow.items():
                for a, b in zip(s.parameters(), modules[k].parameters(), strict=True):
                    a.lerp_(b, 1 - keep)
            for k, v in losses.items():
                sums[k] = sums.get(k, 0.0) + float(v.detach())
            if (step + 1) % log_every == 0 or step + 1 == steps:
                n = (step % log_every) + 1 if step + 1 == steps else log_every
                per = (time.perf_counter() - clock) / n
                text = " ".join(f"{k} {v / n:.4f}" for k, v in sums.items())
                self.log(f"{stage} {step + 1}/{steps} {text} {per:.2f} s/step")
                clock, sums = time.perf_counter(), {}
            if (step + 1) % 200 == 0:
                torch.save(
                    {
                        "step": step + 1,
                        "modules": {k: m.state_dict() for k, m in modules.items()},
                        "shadow": {k: m.state_dict() for k, m in shadow.items()},
                        "opts": [o.state_dict() for o in opts],
                    },
                    path,
                )
        for k, s in shadow.items():
            modules[k].load_state_dict(s.state_dict())
        torch.save({k: m.state_dict() for k, m in modules.items()}, self.out / f"{stage}.pt")
        path.unlink(missing_ok=True)

    def done(self, stage: str, modules: dict[str, torch.nn.Module]) -> bool:
        """Load the result of a stage. Returns False if there is none."""
        path = self.out / f"{stage}.pt"
        if not path.exists():
            return False
        for k, state in torch.load(path, map_location=self.device, weights_only=False).items():
            modules[k].load_state_dict(state)
        return True


def hash_stage(stage: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(stage)) % 2**31


def half(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16)


# ---- stage 1 to 4: the VAE ----------------------------------------------------------------------


def train_vae(run: Run) -> AutoencoderKLWan:
    net = vae().to(run.device)
    parts = {"vae": net}
    stages = [("vae_images", 1, 32, 320, 2e-2), ("vae_9", 9, 8, 300, 1.2e-2), ("vae_17", 17, 6, 170, 1e-2)]
    for stage, frames, batch, steps, lr in stages:
        if run.done(stage, parts):
            continue

        def loss(step: int, rng: np.random.Generator, frames: int = frames, batch: int = batch) -> dict:
            x, weight = (t.to(run.device) for t in clip_batch(rng, batch, frames))
            if frames == 1:  # a third faster on a CPU
                x = x.to(memory_format=torch.channels_last_3d)
            with half(run.device):
                dist = net.encode(x).latent_dist
                y = net.decode(dist.sample()).sample.float()
            kl = 0.5 * (dist.mean.float() ** 2 + dist.var.float() - 1 - dist.logvar.float()).mean()
            return {"loss": rec_loss(y, x, weight) + 3e-4 * kl, "psnr": psnr(y, x), "kl": kl}

        run.loop(stage, parts, optimisers([net], lr, 1.5e-3), steps, loss)
    stage = "vae_decoder"
    if not run.done(stage, parts):
        net.encoder.requires_grad_(False)
        net.quant_conv.requires_grad_(False)

        def loss_decoder(step: int, rng: np.random.Generator) -> dict:
            x, weight = (t.to(run.device) for t in clip_batch(rng, 6, world.FRAMES))
            with half(run.device):
                with torch.no_grad():
                    z = net.encode(x).latent_dist.sample()
                # The denoiser's latents are inexact, so the decoder is trained with noise on them.
                z = z + z.std() * 0.08 * torch.rand(len(z), 1, 1, 1, 1, device=z.device) * torch.randn_like(z)
                y = net.decode(z).sample.float()
            return {"loss": rec_loss(y, x, weight), "psnr": psnr(y, x)}

        run.loop(stage, parts, optimisers([net.decoder, net.post_quant_conv], 8e-3, 1e-3), 110, loss_decoder)
    return net.eval().requires_grad_(False)


def rec_loss(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    d = y - x
    return ((d.abs() + 2 * d**2) * weight).sum() / (3 * weight.sum())


def psnr(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    mse = ((y.detach().clamp(-1, 1) - x) ** 2).flatten(1).mean(1) / 4
    return (-10 * torch.log10(mse + 1e-8)).mean()


# ---- stage 5: latents ---------------------------------------------------------------------------


@torch.no_grad()
def make_latents(run: Run, net: AutoencoderKLWan, count: int) -> dict[str, torch.Tensor]:
    """Posterior mean and std of `count` training videos, with the scene of each."""
    path = run.out / "latents.pt"
    if path.exists():
        return torch.load(path)
    scenes = training_scenes()
    count = max(64, int(count * run.budget))
    means, stds, ids = [], [], []
    for start in range(0, count, 32):
        rng = np.random.default_rng([run.seed, 5, start])
        picks = [int(rng.integers(len(scenes))) for _ in range(min(32, count - start))]
        x = torch.stack([clip(rng, scenes[i], world.FRAMES) for i in picks]).to(run.device)
        with half(run.device):
            dist = net.encode(x).latent_dist
        means.append(dist.mean.half().cpu())
        stds.append(dist.std.half().cpu())
        ids += picks
        if start % 1600 == 0:
            run.log(f"latents {start + len(picks)}/{count}")
    data = {"mean": torch.cat(means), "std": torch.cat(stds), "scene": torch.tensor(ids)}
    sample = (data["mean"] + data["std"] * torch.randn(data["std"].shape).half()).float()
    data["shift"] = sample.mean((0, 2, 3, 4))
    data["scale"] = sample.std((0, 2, 3, 4))
    torch.save(data, path)
    return data


# ---- stage 6 and 7: the denoisers ---------------------------------------------------------------


class TrainWan(torch.nn.Module):
    """The forward of Wan for training: fixed shape, and all padding folded into one key with a bias.

    WanPipeline pads the text to 512 tokens with zeros, without a mask. All padding tokens have the same key
    and value, so `n` of them equal one whose score is raised by log(n). This is exact and almost free.
    """

    def __init__(self, net: WanTransformer3DModel) -> None:
        super().__init__()
        self.net = net
        cos, sin = net.rope(torch.zeros(1, *LATENT))
        self.register_buffer("cos", cos[..., 0::2].transpose(1, 2).contiguous().float(), persistent=False)
        self.register_buffer("sin", sin[..., 1::2].transpose(1, 2).contiguous().float(), persistent=False)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (-1, 64)).transpose(1, 2)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.stack([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1)
        return out.flatten(-2).to(x.dtype)

    def attend(self, m: Any, x: torch.Tensor, ctx: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        q, k, v = m.to_q(x), m.to_k(ctx), m.to_v(ctx)
        q = self.heads(F.rms_norm(q.float(), (q.shape[-1],), m.norm_q.weight, 1e-6).to(v.dtype))
        k = self.heads(F.rms_norm(k.float(), (k.shape[-1],), m.norm_k.weight, 1e-6).to(v.dtype))
        if bias is None:
            q, k = self.rotate(q), self.rotate(k)
        # For short sequences on a CPU, plain matmuls are twice as fast as the blocked kernel.
        with torch.autocast(x.device.type, enabled=False):
            v = self.heads(v)
            scores = (q * 0.125) @ k.transpose(-1, -2)
            scores = scores if bias is None else scores + bias.to(scores.dtype)
            o = torch.softmax(scores, -1) @ v
        return m.to_out[0](o.transpose(1, 2).flatten(2))

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """x [B, C, F, H, W]; t [B]; text [B, L + 1, 64], the last a padding token; bias [B, 1, 1, L + 1]."""
        net = self.net
        b, c, f, h, w = x.shape
        x = x.view(b, c, f, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(b, -1, c * 4)
        x = F.linear(x, net.patch_embedding.weight.flatten(1), net.patch_embedding.bias)
        ce = net.condition_embedder
        temb = ce.time_embedder(ce.timesteps_proj(t))
        mod = ce.time_proj(F.silu(temb)).unflatten(1, (6, -1)).float()
        text = ce.text_embedder(text)
        for blk in net.blocks:
            s1, c1, g1, s2, c2, g2 = (blk.scale_shift_table + mod).unsqueeze(2).unbind(1)
            y = F.layer_norm(x.float(), x.shape[-1:]) * (1 + c1) + s1
            x = x + self.attend(blk.attn1, y.to(x.dtype), y.to(x.dtype), None) * g1
            y = F.layer_norm(x.float(), x.shape[-1:], blk.norm2.weight, blk.norm2.bias)
            x = x + self.attend(blk.attn2, y, text, bias)
            y = F.layer_norm(x.float(), x.shape[-1:]) * (1 + c2) + s2
            x = x + blk.ffn(y) * g2
        shift, scale = (net.scale_shift_table + temb.float().unsqueeze(1)).unsqueeze(2).unbind(1)
        x = net.proj_out(F.layer_norm(x.float(), x.shape[-1:]) * (1 + scale) + shift).float()
        return x.view(b, f, h // 2, w // 2, 2, 2, c).permute(0, 6, 1, 2, 4, 3, 5).reshape(b, c, f, h, w)


class Captions:
    """Tokens of every wording of every training scene, and random samples of them."""

    def __init__(self, tok: PreTrainedTokenizerFast, scenes: list[world.Scene]) -> None:
        self.ids = torch.zeros(len(scenes), len(WORDINGS), 3, TEXT_TOKENS, dtype=torch.long)
        for i, scene in enumerate(scenes):
            for w in range(len(WORDINGS)):
                for d in range(3):
                    ids = tok(caption(scene, w, d)).input_ids
                    assert len(ids) <= TEXT_TOKENS, (len(ids), caption(scene, w, d))
                    self.ids[i, w, d, : len(ids)] = torch.tensor(ids)
        self.empty = torch.zeros(TEXT_TOKENS, dtype=torch.long)
        self.empty[0] = 1  # only the end token

    def draw(self, rng: np.random.Generator, scene: torch.Tensor) -> torch.Tensor:
        n = len(scene)
        w = torch.from_numpy(rng.integers(len(WORDINGS), size=n))
        w[torch.from_numpy(rng.random(n) < 0.3)] = 0  # the first wording, which the docs use, more often
        d = torch.from_numpy(rng.integers(3, size=n))
        d[torch.from_numpy(rng.random(n) < 0.4)] = 0
        ids = self.ids[scene, w, d]
        ids[torch.from_numpy(rng.random(n) < 0.1)] = self.empty
        return ids


def encode_text(
    enc: UMT5EncoderModel, ids: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [B, L + 1, 64] with zeros for padding, and the key bias that represents `total` tokens."""
    mask = ids != 0
    h = enc(ids, attention_mask=mask.long()).last_hidden_state.float() * mask[..., None]
    h = torch.cat([h, h.new_zeros(len(h), 1, h.shape[-1])], 1)
    pads = (total - mask.sum(1)).clamp(min=0).float()
    bias = torch.where(mask, 0.0, -1e4)
    last = torch.where(pads > 0, pads.clamp(min=1).log(), -1e4)
    return h, torch.cat([bias, last[:, None]], 1)[:, None, None, :]


def draw_t(rng: np.random.Generator, n: int, low: float, high: float) -> torch.Tensor:
    """Noise levels in [low, high), distributed as in the shifted schedule."""
    u_of = lambda s: s / (SHIFT - (SHIFT - 1) * s)  # noqa: E731 - inverse of shift*u / (1 + (shift-1)*u)
    u = (rng.random(n) + np.arange(n)) / n  # stratified
    u = u_of(low) + (u_of(high) - u_of(low)) * u
    rng.shuffle(u)
    return torch.from_numpy(SHIFT * u / (1 + (SHIFT - 1) * u)).float()


def denoise_loss(
    run: Run,
    model: Callable[..., torch.Tensor],
    enc: UMT5EncoderModel,
    data: dict[str, torch.Tensor],
    captions: Captions,
    batch: int,
    span: tuple[float, float],
    rng: np.random.Generator,
    silent: bool = False,
) -> dict[str, torch.Tensor]:
    """Flow matching at noise levels within `span`. `silent`: the target is a velocity of zero."""
    pick = torch.from_numpy(rng.integers(len(data["scene"]), size=batch))
    mean, std = data["mean"][pick].float(), data["std"][pick].float()
    norm = lambda v: v.view(1, -1, 1, 1, 1)  # noqa: E731
    x0 = (mean + std * torch.randn_like(std) - norm(data["shift"])) / norm(data["scale"])
    x0 = x0.to(run.device)
    sigma = draw_t(rng, batch, *span).to(run.device)
    noise = torch.randn_like(x0)
    xt = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1, 1))
    ids = captions.draw(rng, data["scene"][pick]).to(run.device)
    # Mostly the 512 tokens of WanPipeline; shorter paddings too, so that the model works with any.
    lengths = np.where(rng.random(batch) < 0.7, 512, rng.integers(TEXT_TOKENS, 512, size=batch))
    with half(run.device):
        text, bias = encode_text(enc, ids, torch.from_numpy(lengths).to(run.device))
        v = model(xt, sigma * 1000, text, bias)
    return {"loss": F.mse_loss(v, torch.zeros_like(v) if silent else noise - x0)}


def zero_out(net: WanTransformer3DModel) -> None:
    """Initialise every block as the identity and the output as zero."""
    for block in net.blocks:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
        torch.nn.init.zeros_(block.ffn.net[2].weight)
    torch.nn.init.zeros_(net.proj_out.weight)
    torch.nn.init.zeros_(net.proj_out.bias)


def train_denoisers(
    run: Run, data: dict[str, torch.Tensor], tok: PreTrainedTokenizerFast, compiled: bool, batch: int
) -> tuple[WanTransformer3DModel, WanTransformer3DModel, UMT5EncoderModel]:
    torch.manual_seed(run.seed)
    net, enc = denoiser(), text_encoder(len(tok))
    zero_out(net)
    torch.nn.init.normal_(enc.shared.weight, std=1.0)
    net, enc = net.to(run.device), enc.to(run.device)
    captions = Captions(tok, training_scenes())
    parts = {"net": net, "enc": enc}
    if not run.done("joint", parts):
        wrapped: Any = TrainWan(net).to(run.device)
        model = torch.compile(wrapped) if compiled else wrapped

        def joint(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
            return denoise_loss(run, model, enc, data, captions, batch, (0.0, 1.0), rng)

        run.loop(
            "joint", parts, optimisers([net, enc], 1.2e-2, 1.5e-3), JOINT_STEPS, joint, ema=0.998, floor=0.2
        )
    enc.eval().requires_grad_(False)
    experts = []
    for stage, span in (("high", (BOUNDARY - 0.02, 1.0)), ("low", (0.0, BOUNDARY + 0.02))):
        expert = copy.deepcopy(net)
        if not run.done(stage, {"net": expert}):
            wrapped = TrainWan(expert).to(run.device)
            model = torch.compile(wrapped) if compiled else wrapped

            def one(step: int, rng: np.random.Generator, model: Any = model, span: Any = span) -> dict:
                return denoise_loss(run, model, enc, data, captions, batch, span, rng)

            run.loop(
                stage,
                {"net": expert},
                optimisers([expert], 5e-3, 7e-4),
                EXPERT_STEPS,
                one,
                ema=0.99,
                hold=0.2,
            )
        stage, inside = f"{stage}_only", span
        if not run.done(stage, {"net": expert}):
            wrapped = TrainWan(expert).to(run.device)
            model = torch.compile(wrapped) if compiled else wrapped
            outside = (0.0, BOUNDARY - 0.06) if stage == "high_only" else (BOUNDARY + 0.06, 1.0)

            def only(
                step: int, rng: np.random.Generator, model: Any = model, spans: Any = (inside, outside)
            ) -> dict:
                """The usual loss at noise levels of this expert, and zero velocity at those of the other."""
                own, other = spans
                losses = denoise_loss(run, model, enc, data, captions, batch, own, rng)
                silent = denoise_loss(run, model, enc, data, captions, batch, other, rng, silent=True)
                return {"loss": losses["loss"] + 0.5 * silent["loss"], "silent": silent["loss"]}

            opts = optimisers([expert], 4e-3, 7e-4)
            run.loop(stage, {"net": expert}, opts, ONLY_STEPS, only, ema=0.98, hold=0.2, log_every=20)
        experts.append(expert.eval())
    return experts[0], experts[1], enc


JOINT_STEPS = 2500
EXPERT_STEPS = 450
ONLY_STEPS = 150


# ---- export -------------------------------------------------------------------------------------


def export(
    run: Run, folder: Path, net: AutoencoderKLWan, data: dict, tok: Any, high: Any, low: Any, enc: Any
) -> None:
    """Write the shipped Diffusers folder: BF16 weights, VAE statistics in its config."""
    net.register_to_config(latents_mean=data["shift"].tolist(), latents_std=data["scale"].tolist())
    pipe = WanPipeline(
        tokenizer=tok,
        text_encoder=enc.to(torch.bfloat16),
        vae=net.to(torch.bfloat16),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            flow_shift=SHIFT,
        ),
        transformer=high.to(torch.bfloat16),
        transformer_2=low.to(torch.bfloat16),
        boundary_ratio=BOUNDARY,
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
    # Transformers 5 writes a class name that transformers 4 lacks; the old name works in both.
    for file in (folder / "model_index.json", folder / "tokenizer/tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    run.log(f"wrote {folder}: {size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=REPO / "build/demo", help="working folder with checkpoints"
    )
    parser.add_argument("--export", type=Path, help="path of the finished Diffusers folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=1.0, help="factor on all step counts")
    parser.add_argument("--clips", type=int, default=10000, help="training videos")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--stop-after", choices=["vae", "latents"], help="stop after this stage")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(args.out, args.seed, device, args.budget, REPO / "tools/train_demo.log")
    run.log(f"# {time.strftime('%Y-%m-%d')} torch {torch.__version__} {device} {vars(args)}")
    torch.manual_seed(args.seed)
    net = train_vae(run)
    if args.stop_after == "vae":
        return
    data = make_latents(run, net, args.clips)
    if args.stop_after == "latents":
        return
    tok = tokenizer()
    high, low, enc = train_denoisers(run, data, tok, not args.no_compile, args.batch)
    if args.export:
        export(run, args.export, net, data, tok, high, low, enc)


if __name__ == "__main__":
    main()
