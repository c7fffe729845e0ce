"""The VAE, from Diffusers: videos to normalised latents and back; bit-identical to WanPipeline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ascendit.checkpoint.layout import Layout
from ascendit.checkpoint.weight_files import Shards
from ascendit.exclusive import Exclusive
from ascendit.geometry import latent_grid
from ascendit.model.library_component import load_library_part


class VideoCoder:
    """The VAE, with mean and standard deviation of its latents.

    Takes one video at a time, since Diffusers' VAE caches state meanwhile: a call waits for other threads.
    """

    def __init__(
        self, layout: Layout, shards: Shards, *, device: str, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model, self.device = load_library_part(layout.part("vae"), shards, dtype).to(device), device
        c = self.model.config
        self.z_dim, self.stride, self.frame_stride = c.z_dim, c.scale_factor_spatial, c.scale_factor_temporal
        # A multiplication by 1/std, rounded to the VAE's dtype, as in WanPipeline.
        self.mean = torch.tensor(c.latents_mean, device=device).view(1, -1, 1, 1, 1)
        self.inverse_std = 1.0 / torch.tensor(c.latents_std, device=device).view(1, -1, 1, 1, 1)
        self._turn = Exclusive("the VAE")
        self._calls: dict[int, Callable[[], object]] = {}

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """Shape of the latents of a video, [1, z_dim, F, h, w]."""
        strides = {"frame_stride": self.frame_stride, "stride": self.stride}
        return 1, self.z_dim, *latent_grid(num_frames, height, width, **strides)

    @torch.inference_mode()
    def encode(self, video: Tensor) -> Tensor:
        """Video [1, 3, F, H, W] in [-1, 1] -> normalised latents [1, z_dim, f, h, w], float32, unsampled."""
        with self._coding(self.model.encoder):
            mode = self.model.encode(video.to(self.device, self.model.dtype)).latent_dist.mode()
        latents: Tensor = (mode.float() - self.mean) * self.inverse_std
        return latents

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [1, z_dim, f, h, w] -> video [1, 3, F, H, W], roughly in [-1, 1], in the VAE's
        dtype.
        """
        dtype = self.model.dtype
        z = latents.to(self.device, dtype) / self.inverse_std.to(dtype) + self.mean.to(dtype)
        with self._coding(self.model.decoder):
            return self.model.decode(z, return_dict=False)[0]  # type: ignore[no-any-return]

    @contextmanager
    def between_frames(self, call: Callable[[], object]) -> Iterator[None]:
        """Make `encode` and `decode` of this thread call `call` before each latent frame; it may raise."""
        thread = threading.get_ident()
        self._calls[thread] = call
        try:
            yield
        finally:
            del self._calls[thread]

    @contextmanager
    def _coding(self, coder: Any) -> Iterator[None]:
        """Hold the VAE, and clear its cache at the end, so that an interrupted call leaves nothing in it."""
        call = self._calls.get(threading.get_ident())
        with self._turn.hold():
            hook = coder.register_forward_pre_hook(lambda *_: call and call() and None)
            try:
                yield
            finally:
                hook.remove()
                self.model.clear_cache()
