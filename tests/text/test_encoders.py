"""Warnings of words that the text encoder does not know."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demo_data import WORDINGS, caption
from transformers import PreTrainedTokenizerFast

from ascendit.checkpoint.hub import DEMO
from ascendit.demo import world
from ascendit.family import SPECS
from ascendit.text.encoders import TextEncoder, clean_prompt


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(DEMO.parents[1] / "tokenizer")


def warnings_of(tokenizer: Any, prompt: str, few_words: bool, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    encoder: Any = SimpleNamespace(tokenizer=tokenizer, few_words=few_words)
    ids = torch.tensor([tokenizer(clean_prompt(prompt))["input_ids"]])
    with caplog.at_level(logging.WARNING, "ascendit"):
        TextEncoder._warn_of_words(encoder, prompt, ids)
    return [record.getMessage() for record in caplog.records]


def test_words_that_the_demo_was_not_trained_on(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    (text,) = warnings_of(tokenizer, "A cat, a CAT plays the piano; red circles", True, caplog)
    assert text.startswith(
        "the text encoder does not know: cat, plays, piano, circles; its vocabulary: a, against, "
    )
    (text,) = warnings_of(tokenizer, "红色的圆 moves right", True, caplog)
    (symbols,) = warnings_of(tokenizer, "a \U0001f431, \u2764 + (red) circle!", True, caplog)
    assert "does not know: \U0001f431, \u2764, +; its" in symbols
    assert "does not know: 红色的圆; " in text and "triangle" in text and "<unk>" not in text
    assert SPECS["ascendit-demo"].few_words and sum(spec.few_words for spec in SPECS.values()) == 1


def test_the_captions_of_the_training_have_no_warning(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    directions = [world.Scene("red", "circle", name, "black") for name in world.DIRECTIONS]
    texts = {caption(scene, i, i // 3) for scene in directions for i in range(3 * len(WORDINGS))}
    others = [scene.prompt() for scene in list(world.scenes())[::7]]
    assert len(texts) > 40
    for text in (*texts, *others, ""):
        assert warnings_of(tokenizer, text, True, caplog) == [], text


def test_text_without_a_token_of_another_model(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(tokenizer, "a cat plays", False, caplog) == []
    (text,) = warnings_of(tokenizer, "a 🐱 plays 猫", False, caplog)
    assert text == "the text encoder does not know: 🐱, 猫"
