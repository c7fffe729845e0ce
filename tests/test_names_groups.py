"""Many names in few words."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascendit.names import all_linears, grouped, ranges

EVERY = all_linears({"num_layers": 8})
BLOCK = [name.removeprefix("blocks.0.") for name in EVERY if name.startswith("blocks.0.")]


def of_block(*numbers: int) -> list[str]:
    return [f"blocks.{n}.{layer}" for n in numbers for layer in BLOCK]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([], ()),
        (EVERY, ("condition_embedder.*", "blocks.*", "proj_out")),
        (of_block(0, 1, 2, 3, 4), ("blocks.0-4",)),
        (of_block(0, 2, 3, 7), ("blocks.0,2-3,7",)),
        (["blocks.3.attn2.to_out.0"], ("blocks.3.attn2.to_out.0",)),
        ([f"blocks.{n}.ffn.net.2" for n in range(8)], ("blocks.0-7.ffn.net.2",)),
        (of_block(0) + ["blocks.3.attn2.to_out.0"], ("blocks.0", "blocks.3.attn2.to_out.0")),
        ([n for n in EVERY if ".attn1." in n], ("blocks.0-7.attn1.*",)),
        (["condition_embedder.time_proj"], ("condition_embedder.time_proj",)),
        (
            ["condition_embedder.text_embedder.linear_1", "condition_embedder.text_embedder.linear_2"],
            ("condition_embedder.text_embedder.*",),
        ),
    ],
)
def test_groups(chosen: list[str], words: tuple[str, ...]) -> None:
    assert grouped(chosen, EVERY) == words


def test_ranges() -> None:
    assert ranges([7, 0, 1, 2, 4]) == "0-2,4,7"


def matches(word: str, name: str) -> bool:
    """What a reader takes a word to mean."""
    found = re.fullmatch(r"blocks\.([\d,-]+)(.*)", word)
    if found is None:
        return name == word or (word.endswith(".*") and name.startswith(word[:-1]))
    numbers = set()
    for span in found[1].split(","):
        first, _, last = span.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    rest = found[2] or ".*"
    return any(
        name == f"blocks.{n}{rest}" or (rest.endswith(".*") and name.startswith(f"blocks.{n}{rest[:-1]}"))
        for n in numbers
    )


@given(st.sets(st.sampled_from(EVERY)))
def test_the_words_mean_exactly_the_chosen(chosen: set[str]) -> None:
    words = grouped(chosen, EVERY)
    assert {name for name in EVERY if any(matches(w, name) for w in words)} == chosen
    assert len(words) == len(set(words))
