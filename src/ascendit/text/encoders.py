"""Text and image encoders, from transformers; bit-identical to WanPipeline."""

from __future__ import annotations

import html
import logging
import re
import unicodedata
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ascendit.checkpoint.component import library_refusal
from ascendit.checkpoint.layout import Layout
from ascendit.checkpoint.part_check import library_config
from ascendit.checkpoint.part_configs import TextEncoderConfig
from ascendit.checkpoint.weight_files import Shards
from ascendit.errors import CheckpointError
from ascendit.exclusive import Exclusive
from ascendit.model.library_component import load_library_part, load_processor

log = logging.getLogger("ascendit")


def clean_prompt(text: str) -> str:
    """Clean a prompt like the training captions: fix broken Unicode, resolve entities, collapse spaces."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def _words(text: str) -> list[str]:
    """The words of a text, and its symbols that are not punctuation, as emoji."""
    parts = re.findall(r"\w+|[^\w\s]", text)
    return [part for part in parts if re.match(r"\w", part) or unicodedata.category(part)[0] == "S"]


class TextEncoder:
    """UMT5: prompts to embeddings [1, max_sequence_length, text_dim], zero after the last token.

    `text_on`: `cpu` keeps the model in host memory (T5_LOAD_CPU=1), `device` on the device of the denoiser,
    `drop` loads it for each new prompt and frees it. `shards`: its headers. `few_words`: warn of each word
    that is not one token.
    """

    def __init__(
        self,
        layout: Layout,
        shards: Shards,
        *,
        device: str,
        text_on: Literal["cpu", "device", "drop"],
        dtype: torch.dtype,
        few_words: bool = False,
    ) -> None:
        config = library_config(layout.part("text_encoder"))
        assert isinstance(config, TextEncoderConfig)
        self.num_embeddings = config.vocab_size
        self.part, self.shards, self.dtype = layout.part("text_encoder"), shards, dtype
        self.text_on, self.few_words = text_on, few_words
        self.device = device if text_on != "cpu" else "cpu"
        self.tokenizer = load_processor(layout.part("tokenizer"))
        self.tokenizer_path = layout.part("tokenizer").path
        self.model = None if text_on == "drop" else self._load()
        self._cache: dict[tuple[str, int], Tensor] = {}
        self._turn = Exclusive("the text encoder")

    def _load(self) -> Any:
        return load_library_part(self.part, self.shards, self.dtype).to(self.device)

    @torch.inference_mode()
    def encode(
        self,
        prompts: list[str],
        max_sequence_length: int,
        before_block: Callable[[], object] = lambda: None,
    ) -> list[Tensor]:
        """Embeddings [1, max_sequence_length, text_dim] in the encoder's dtype and device, one per prompt.

        The embeddings of the last eight prompts are cached. `before_block` is called before each block of
        the model and while another thread encodes, and may raise.
        """
        keys = [(clean_prompt(p), max_sequence_length) for p in prompts]
        with self._turn.hold(check=before_block):
            new = [key for key in dict.fromkeys(keys) if key not in self._cache]
            if new:
                model = self.model if self.model is not None else self._load()
                blocks = [m for m in model.modules() if type(m).__name__.endswith("Block")]
                hooks = [m.register_forward_pre_hook(lambda *_: before_block() and None) for m in blocks]
                try:
                    for key in new:
                        self._cache[key] = self._encode_one(model, *key)
                finally:
                    for hook in hooks:
                        hook.remove()
            embeddings = [self._cache[key] for key in keys]
            while len(self._cache) > 8:
                self._cache.pop(next(iter(self._cache)))
        return embeddings

    def _encode_one(self, model: Any, prompt: str, length: int) -> Tensor:
        ids, mask = self._tokenize(prompt, length)
        used = int(mask.sum())
        if used == length:
            log.warning("the prompt fills all %d tokens; any text beyond them is ignored", length)
        self._warn_of_words(prompt, ids)
        hidden = model(ids.to(self.device), mask.to(self.device)).last_hidden_state
        hidden[:, used:] = 0
        return hidden  # type: ignore[no-any-return]

    def _warn_of_words(self, prompt: str, ids: Tensor) -> None:
        """Log the words without a token; `ids`: token numbers of the prompt, int64 [1, length]."""
        unk = self.tokenizer.unk_token_id
        if self.few_words:
            vocabulary = {"a", *(x[1:] for x in self.tokenizer.get_vocab() if len(x) > 2 and x[0] == "▁")}
            unknown = [w for w in _words(prompt.lower()) if w not in vocabulary]
            ending = f"; its vocabulary: {', '.join(sorted(vocabulary))}"
        elif unk is not None and bool((ids == unk).any()):
            unknown = [w for w in prompt.split() if unk in self.tokenizer(w)["input_ids"]]
            ending = ""
        else:
            return
        if unknown:
            listed = ", ".join(dict.fromkeys(unknown))
            log.warning("the text encoder does not know: %s%s", listed, ending)

    def _tokenize(self, prompt: str, length: int) -> tuple[Tensor, Tensor]:
        """(token numbers, attention mask), int64 [1, length], of a prompt.

        Raises CheckpointError: E-CKP-06 if the tokenizer fails, E-CKP-07 for a token without an embedding.
        """
        try:
            tokens = self.tokenizer(
                [prompt],
                padding="max_length",
                max_length=length,
                truncation=True,
                add_special_tokens=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
        except BaseException as e:
            raise library_refusal(self.tokenizer_path, e) from e
        largest, count = int(ids.max()), self.num_embeddings
        if largest >= count:
            raise CheckpointError(
                f"{self.tokenizer_path} has a token of number {largest}, {self.part.path} {count} embeddings",
                needs="tokenizer and text encoder of one model",
                fix="download tokenizer and text_encoder again, both from the same revision of the model",
                code="E-CKP-07",
            )
        return ids, mask


class ImageEncoder:
    """CLIP image encoder (Wan2.1 I2V): images to the hidden states of the second-to-last layer.

    `gelu`: exact GELU for devices whose F.gelu is not exact; None: F.gelu. `shards`: its headers.
    """

    def __init__(
        self,
        layout: Layout,
        shards: Shards,
        *,
        device: str,
        gelu: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype,
    ) -> None:
        from transformers.activations import GELUActivation

        self.processor = load_processor(layout.part("image_processor"))
        model = load_library_part(layout.part("image_encoder"), shards, dtype)
        self.model, self.device = model.to(device), device
        if gelu is not None:
            for module in self.model.modules():
                if type(module) is GELUActivation:
                    module.forward = gelu

    @torch.inference_mode()
    def encode(self, images: Any) -> Tensor:
        """Hidden states [n, tokens, image_dim] of one PIL image or a list of n, in the encoder's dtype."""
        pixels = self.processor(images=images, return_tensors="pt").to(self.device)
        return self.model(**pixels, output_hidden_states=True).hidden_states[-2]  # type: ignore[no-any-return]
