"""Conditioning on a first image, and a last one, in the variants of Wan models.

I2V (36 channels): mask and image latents are concatenated to the latents as channels. Wan2.1 I2V adds
CLIP tokens, FLF2V those of both images. TI2V: the image latents replace the first latent frame, whose tokens
have timestep 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascendit.family import Task
from ascendit.geometry import Grid
from ascendit.pipeline.request import GenerateRequest
from ascendit.text.encoders import ImageEncoder
from ascendit.vae.autoencoder import VideoCoder


@dataclass(frozen=True)
class Condition:
    """The encoded image; empty for text-to-video."""

    channels: Tensor | None = None
    """[1, 4 + z, F, h, w] float32: mask and image latents, concatenated to the latents at each step."""
    first: Tensor | None = None
    """[1, z, 1, h, w] float32: replaces the first latent frame."""
    tokens: Tensor | None = None
    """[1, T, image_dim], with a last image [2, T, image_dim]: CLIP tokens for the image cross-attention."""

    def model_input(self, latents: Tensor) -> Tensor:
        """The model's input [1, C, F, h, w], float32: `latents` [1, z, F, h, w] combined with the image, if
        any.
        """
        if self.channels is not None:
            return torch.cat([latents, self.channels], dim=1)
        return self.finish(latents)

    def finish(self, latents: Tensor) -> Tensor:
        """Latents [1, z, F, h, w], float32, with the first frame replaced by the image's."""
        if self.first is None:
            return latents
        return torch.cat([self.first, latents[:, :, 1:]], dim=2)

    def timesteps(self, t: float, grid: Grid) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """(timesteps, token counts): one segment; or the image's frame at 0, then the other frames at `t`."""
        f, h, w = grid
        if self.first is None or f == 1:
            return ((t,) if self.first is None else (0.0,)), (f * h * w,)
        return (0.0, t), (h * w, (f - 1) * h * w)


def make_condition(
    task: Task,
    image: Any,
    request: GenerateRequest,
    vae: VideoCoder,
    clip: ImageEncoder | None,
    last_image: Any = None,
) -> Condition:
    """Encode the first and the last image, PIL images in RGB or None, for a model of this task."""
    if image is None:
        return Condition()
    from diffusers.video_processor import VideoProcessor

    images = [image] if last_image is None else [image, last_image]
    tokens = None if clip is None else clip.encode(images)
    size = {"height": request.height, "width": request.width}
    frames = VideoProcessor().preprocess(images, **size).float()  # [1 or 2, 3, H, W], -1 to 1
    first, *last = frames[:, :, None].split(1)
    if task == "ti2v":
        return Condition(first=vae.encode(first))
    blank = first.new_zeros(1, 3, request.num_frames - len(images), request.height, request.width)
    latents = vae.encode(torch.cat([first, blank, *last], dim=2))
    mask = latents.new_zeros(1, vae.frame_stride, *latents.shape[2:])
    mask[:, :, 0] = 1
    if last:
        mask[:, -1, -1] = 1  # the last frame of the last latent frame
    return Condition(channels=torch.cat([mask, latents], dim=1), tokens=tokens)
