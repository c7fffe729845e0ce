"""What a first image adds to a run, for each of the three ways Wan models take one.

I2V (36 channels): mask and image latents are joined to the latents as channels. Wan2.1 I2V: CLIP tokens
too. TI2V: the clean image latents stand in the first latent frame, whose tokens are at timestep 0.
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
    """Nothing, for text-to-video; else the parts of one image."""

    channels: Tensor | None = None
    """[1, 4 + z, F, h, w] joined to the latents at each step."""
    first: Tensor | None = None
    """[1, z, 1, h, w] in the place of the first latent frame."""
    tokens: Tensor | None = None
    """[1, T, image_dim] for the image cross-attention."""

    def model_input(self, latents: Tensor) -> Tensor:
        """What the model sees in the place of `latents` [1, z, F, h, w]."""
        if self.channels is not None:
            return torch.cat([latents, self.channels], dim=1)
        return self.finish(latents)

    def finish(self, latents: Tensor) -> Tensor:
        """Latents with the given first frame in its place."""
        if self.first is None:
            return latents
        return torch.cat([self.first, latents[:, :, 1:]], dim=2)

    def timesteps(self, t: float, grid: Grid) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """(timesteps, spans) of the tokens: one row, or one for the given frame and one for the rest."""
        f, h, w = grid
        if self.first is None or f == 1:
            return ((t,) if self.first is None else (0.0,)), (f * h * w,)
        return (0.0, t), (h * w, (f - 1) * h * w)


def make_condition(
    task: Task, image: Any, request: GenerateRequest, vae: VideoCoder, clip: ImageEncoder | None
) -> Condition:
    """Encode the first image, a PIL image in RGB, for a model of this kind; None: nothing."""
    if image is None:
        return Condition()
    from diffusers.video_processor import VideoProcessor

    tokens = None if clip is None else clip.encode(image)
    # scaled as Diffusers does it: float32 [1, 3, 1, H, W] in [-1, 1]
    size = {"height": request.height, "width": request.width}
    picture: Tensor = VideoProcessor().preprocess(image, **size).float()[:, :, None]
    if task == "ti2v":
        return Condition(first=vae.encode(picture))
    rest = picture.new_zeros(1, 3, request.num_frames - 1, request.height, request.width)
    latents = vae.encode(torch.cat([picture, rest], dim=2))
    mask = latents.new_zeros(1, vae.frame_stride, *latents.shape[2:])
    mask[:, :, 0] = 1
    return Condition(channels=torch.cat([mask, latents], dim=1), tokens=tokens)
