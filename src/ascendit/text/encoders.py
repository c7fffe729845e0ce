"""Encoders of prompt and first image, through transformers: tensors as WanPipeline has them, to the bit."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ascendit.checkpoint.layout import Layout
from ascendit.model.library_component import load_library_part, load_processor

log = logging.getLogger("ascendit")


def clean_prompt(text: str) -> str:
    """As the training captions were cleaned: broken Unicode mended, entities resolved, spaces folded."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


class TextEncoder:
    """Prompts to embeddings [1, max_sequence_length, text_dim], zero behind the last token.

    `text_on`: where UMT5 lives. `cpu`: stays in host memory (T5_LOAD_CPU=1); `device`: beside the
    denoiser; `drop`: read when a prompt must be encoded, then let go.
    """

    def __init__(self, layout: Layout, *, device: str, text_on: Literal["cpu", "device", "drop"]) -> None:
        self.part, self.text_on = layout.part("text_encoder"), text_on
        self.device = device if text_on != "cpu" else "cpu"
        self.tokenizer = load_processor(layout.part("tokenizer"))
        self.model = None if text_on == "drop" else self._load()
        self._seen: dict[tuple[str, int], Tensor] = {}

    def _load(self) -> Any:
        return load_library_part(self.part).to(self.device)

    @torch.inference_mode()
    def encode(self, prompts: list[str], max_sequence_length: int) -> list[Tensor]:
        """One embedding for each prompt, on this encoder's device. The last eight prompts are remembered."""
        wanted = [(clean_prompt(p), max_sequence_length) for p in prompts]
        new = [key for key in dict.fromkeys(wanted) if key not in self._seen]
        if new:
            model = self.model if self.model is not None else self._load()
            for key in new:
                self._seen[key] = self._encode_one(model, *key)
        out = [self._seen[key] for key in wanted]
        while len(self._seen) > 8:
            self._seen.pop(next(iter(self._seen)))
        return out

    def _encode_one(self, model: Any, prompt: str, length: int) -> Tensor:
        tokens = self.tokenizer(
            [prompt],
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask
        used = int(mask.sum())
        if used == length:
            log.warning("the prompt fills all %d tokens; what lies behind them is not used", length)
        hidden = model(tokens.input_ids.to(self.device), mask.to(self.device)).last_hidden_state
        hidden[:, used:] = 0
        return hidden  # type: ignore[no-any-return]


class ImageEncoder:
    """CLIP tokens of an image (Wan2.1 I2V): the last hidden layer but one.

    `gelu`: what computes the exact GELU where F.gelu does not; None: F.gelu.
    """

    def __init__(
        self, layout: Layout, *, device: str, gelu: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        from transformers.activations import GELUActivation

        self.processor = load_processor(layout.part("image_processor"))
        self.model, self.device = load_library_part(layout.part("image_encoder")).to(device), device
        if gelu is not None:
            for module in self.model.modules():
                if type(module) is GELUActivation:
                    module.forward = gelu  # its other activations stay

    @torch.inference_mode()
    def encode(self, image: Any) -> Tensor:
        """PIL image -> [1, tokens, image_dim]."""
        pixels = self.processor(images=image, return_tensors="pt").to(self.device)
        return self.model(**pixels, output_hidden_states=True).hidden_states[-2]  # type: ignore[no-any-return]
