"""Many layer names in few words: `blocks.0-4, blocks.7.attn1.*, condition_embedder.*`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable


def grouped(chosen: Iterable[str], among: Iterable[str]) -> tuple[str, ...]:
    """The names of `chosen`, a subset of `among`, in as few words as are exact.

    A part of the name tree that is chosen whole is one word: `condition_embedder.*`; blocks that are
    chosen alike share one: `blocks.0-4` whole, `blocks.5,7-9.ffn.*` in part. In the order of `among`.
    """
    wanted = set(chosen)
    every = list(among)
    sizes, hits = _counts(every), _counts(name for name in every if name in wanted)
    words: dict[tuple[str, str, str], list[int]] = {}
    for name in every:
        if name in wanted:
            node = _whole(name, sizes, hits)
            head, number, rest = _split(node)
            numbers = words.setdefault((head, "#" if number is not None else "", rest), [])
            if number is not None and number not in numbers[-1:]:
                numbers.append(number)
    blocks = {int(n) for _, n, _ in map(_split, every) if n is not None}
    return tuple(_word(head, numbers, rest, blocks) for (head, _, rest), numbers in words.items())


def _counts(names: Iterable[str]) -> dict[str, int]:
    """How many names lie below each node of the name tree, the names themselves included."""
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            counts[".".join(parts[:depth])] += 1
    return counts


def _whole(name: str, sizes: dict[str, int], hits: dict[str, int]) -> str:
    """The highest node above `name` of which everything is chosen, with `.*` if it is more than the name.

    `blocks` itself is none: its children are blocks, and are counted.
    """
    parts = name.split(".")
    for depth in range(1, len(parts)):
        node = ".".join(parts[:depth])
        if node == "blocks" or sizes[node] == 1:
            continue
        if sizes[node] == hits[node]:
            return f"{node}.*"
    return name


def _split(node: str) -> tuple[str, int | None, str]:
    """`blocks.3.ffn.*` -> ("blocks", 3, ".ffn.*"); a whole block has the rest ""."""
    head, _, tail = node.partition(".")
    number, _, rest = tail.partition(".")
    if head != "blocks" or not number.isdecimal():
        return node, None, ""
    return head, int(number), f".{rest}" if rest not in ("", "*") else ""


def _word(head: str, numbers: list[int], rest: str, blocks: Collection[int]) -> str:
    if not numbers:
        return head
    if set(numbers) == blocks and not rest:
        return f"{head}.*"
    return f"{head}.{ranges(numbers)}{rest}"


def ranges(numbers: Iterable[int]) -> str:
    """`0-4,7`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
