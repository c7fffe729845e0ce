"""The denoising loop in every variant: requirements on its steps, and the table of their launches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

QUANTIZE, MULTIPLY = re.compile(r"aclnnDynamic\w*Quant"), re.compile(r"QuantMatmul")
NZ_MATMUL = "WeightNz"
LINEARS = 6
"""Quantizations and matmuls of one block: QKV, out, Q of the text, out, and two of the feed-forward."""
FIRST = LINEARS + 1
"""Matmuls in the first step of an expert or precision: one more for keys and values of the text."""
COPIES = {"aclnnRmsNorm": 2, "aclnnFlashAttentionScore": 1}
"""Strided parts of the fused product of Q, K and V that a block passes on; CANN copies each of them."""
READS_STRIDES = re.compile(r"Matmul|aclnnAddmm|aclnnMm|aclnnInplaceCopy|aclnnCast")
"""Kernels that read a transposed or strided argument without a copy."""
FRACTAL_NZ = 29


@dataclass(frozen=True)
class Step:
    """One step of one variant on one chip. `first`: of its expert or precision, which prepares the text."""

    number: int
    first: bool
    blocks: int
    """Executed blocks: layers times branches of guidance."""
    traced: Mapping[str, Any]

    def count(self, pattern: re.Pattern[str]) -> int:
        """Launches of kernels whose names match `pattern`."""
        return int(sum(n for name, n in self.traced["kernels"].items() if pattern.search(name)))

    @property
    def copies(self) -> dict[str, int]:
        """Kernel, without its version -> number of arguments that CANN copies for it."""
        counts: dict[str, int] = {}
        for name, _ in self.traced["strided"]:
            if not READS_STRIDES.search(name):
                kernel = re.sub(r"V\d+$", "", name)
                counts[kernel] = counts.get(kernel, 0) + 1
        return counts


def steps(way: Mapping[str, Any]) -> Iterator[Step]:
    """The steps of one variant, in order."""
    previous = None
    for number, traced in enumerate(way["steps"]):
        prepared = (traced["expert"], traced.get("precision"))
        first, previous = prepared != previous, prepared
        yield Step(number, first, way["layers"] * traced["branches"], traced)


def problems(video: Mapping[str, Any]) -> Iterator[str]:
    """One line for each problem in the loop or in the decoding after it."""
    for name, way in video["ways"].items():
        for step in steps(way):
            yield from (f"{name}, step {step.number}: {line}" for line in _step_problems(way, step))
        if way["nz"] and way["round_trip"] != [FRACTAL_NZ]:
            yield f"{name}: weights in format {way['round_trip']} after a round trip to the host, not 29"
    yield from (f"decode: {line}" for line in _always(video["decode"]))


def _always(traced: Mapping[str, Any]) -> Iterator[str]:
    if traced["host"]:
        yield f"the host waits or copies: {', '.join(traced['host'])}"
    yield from (f"{k}, an old kernel" for k in traced["kernels"] if k.startswith("aclop:"))
    yield from (f"{k} in the loop" for k in traced["kernels"] if "FormatCast" in k)


def _step_problems(way: Mapping[str, Any], step: Step) -> Iterator[str]:
    yield from _always(step.traced)
    expected = step.blocks * (FIRST if step.first else LINEARS) * way["quantized"]
    texts = step.traced["branches"] * way["texts"] * step.first * way["quantized"]
    if (count := step.count(MULTIPLY)) != expected:
        yield f"{count} quantized matmuls, not {expected}"
    activations = step.blocks * LINEARS * way["quantized"]
    if (count := step.count(QUANTIZE)) != activations + texts:
        yield f"{count} quantizations, not {activations} and {texts} of texts"
    if way["nz"] and step.count(re.compile(NZ_MATMUL)) != expected:
        yield f"{step.count(re.compile(NZ_MATMUL))} of {expected} matmuls read FRACTAL_NZ"
    if not step.first:
        most = {kernel: n * step.blocks * way["quantized"] for kernel, n in COPIES.items()}
        for kernel, count in step.copies.items():
            if count > most.get(kernel, 0):
                yield f"{count} strided arguments of {kernel}, at most {most.get(kernel, 0)} are allowed"


# ---- as a table ---------------------------------------------------------------------------------


HEAD = ("linear layers", "texts quantized", "matmuls, first", "quantized + matmuls", "copied", "waits")
"""A variant; in the first step of an expert the quantized texts, and the matmuls of a block; in later steps
the quantizations and matmuls of a block, and the arguments that CANN copies; in all steps waits and copies
of the host."""


def rows(runs: Mapping[str, Any]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Head and rows: a row for each variant. The last columns: launches of a later step on each chip."""
    head = (*HEAD, *(f"launches, {chip}" for chip in runs))
    names = dict.fromkeys(name for run in runs.values() for name in run["video"]["ways"])
    return head, [_row(name, runs) for name in names]


def _row(name: str, runs: Mapping[str, Any]) -> tuple[str, ...]:
    by_chip = {chip: run["video"]["ways"].get(name) for chip, run in runs.items()}
    ways = [way for way in by_chip.values() if way]
    first = [next(step for step in steps(way) if step.first) for way in ways]
    later = [next(step for step in steps(way) if not step.first) for way in ways]
    quantized = [s.count(QUANTIZE) - LINEARS * s.blocks if s.count(QUANTIZE) else 0 for s in first]
    texts = _same(n // s.traced["branches"] for n, s in zip(quantized, first, strict=True))
    multiplied = _same(_each(s.count(MULTIPLY), s.blocks) for s in first)
    products = _same(
        f"{_each(s.count(QUANTIZE), s.blocks)} + {_each(s.count(MULTIPLY), s.blocks)}" for s in later
    )
    copies = _same(_each(sum(s.copies.values()), s.blocks) for s in later)
    host = _same(sum(len(s.traced["host"]) for s in steps(way)) for way in ways)
    chips = [chip for chip, way in by_chip.items() if way]
    counts = dict(zip(chips, (str(s.traced["launches"]) for s in later), strict=True))
    launches = (counts.get(chip, "no matmul") for chip in runs)
    return (name, texts, multiplied, products, copies, host, *launches)


def _each(count: int, blocks: int) -> str:
    return f"{count / blocks:g}"


def _same(values: Iterator[Any]) -> str:
    """One value if the chips agree, else the value of each."""
    return " / ".join(dict.fromkeys(str(value) for value in values))
