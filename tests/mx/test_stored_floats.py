"""Block types of GGUF files against a float64 oracle that computes one element at a time, and the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import gguf
import numpy as np
import pytest
import torch
from gguf_files import FACTORS, kind_of, random_blocks

from ascendit.mx import stored_floats
from ascendit.mx.stored_floats import (
    COMPILED,
    DECODERS,
    PIECE,
    TYPES,
    decode_rows,
    library,
    reference,
    to_bfloat16,
)
from ascendit.native.build import Built

Blocks = np.ndarray
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def f16(blocks: Blocks, offset: int) -> np.ndarray:
    return blocks[:, offset : offset + 2].copy().view(np.float16)[:, 0].astype(np.float64)


def nibble(blocks: Blocks, start: int, i: int) -> np.ndarray:
    """Value `i` of a block of 32 nibbles: the first half is in the low ones."""
    return blocks[:, start + i % 16] >> (4 if i >= 16 else 0) & 15


def fifth(blocks: Blocks, start: int, i: int) -> np.ndarray:
    return (blocks[:, start + i // 8] >> (i % 8) & 1).astype(np.int64) << 4


def k_scales(blocks: Blocks, j: int) -> tuple[np.ndarray, np.ndarray]:
    """6-bit scale and minimum of group `j` in the 12 bytes from byte 4."""
    x = blocks[:, 4:16].astype(np.int64)
    if j < 4:
        return x[:, j] % 64, x[:, j + 4] % 64
    return x[:, j + 4] % 16 + x[:, j - 4] // 64 * 16, x[:, j + 4] // 16 + x[:, j] // 64 * 16


def q3_scale(blocks: Blocks, j: int) -> np.ndarray:
    """6-bit scale of group `j`, offset by 32: 4 bits in bytes 96 to 103, 2 bits in bytes 104 to 107."""
    x = blocks[:, 96:108].astype(np.int64)
    low = x[:, j % 8] // (16 if j >= 8 else 1) % 16
    return low + x[:, 8 + j % 4] // 4 ** (j // 4) % 4 * 16 - 32


def element(name: str, b: Blocks, i: int) -> np.ndarray:
    """Element `i` of each block, float64."""
    x = b.astype(np.int64)
    if name == "Q8_0":
        return f16(b, 0) * b[:, 2 + i].view(np.int8)
    if name == "Q4_0":
        return f16(b, 0) * (nibble(x, 2, i) - 8)
    if name == "Q4_1":
        return f16(b, 0) * nibble(x, 4, i) + f16(b, 2)
    if name == "Q5_0":
        return f16(b, 0) * ((nibble(x, 6, i) | fifth(b, 2, i)) - 16)
    if name == "Q5_1":
        return f16(b, 0) * (nibble(x, 8, i) | fifth(b, 4, i)) + f16(b, 2)
    if name == "IQ4_NL":
        return f16(b, 0) * np.asarray(IQ4)[nibble(x, 2, i)]
    group, half = i // 32, i // 128
    if name in ("Q4_K", "Q5_K"):
        scale, minimum = k_scales(b, group)
        start = 16 if name == "Q4_K" else 48
        q = x[:, start + group // 2 * 32 + i % 32] // (16 if group % 2 else 1) % 16
        if name == "Q5_K":
            q += x[:, 16 + i % 32] // 2**group % 2 * 16
        return f16(b, 0) * scale * q - f16(b, 2) * minimum
    if name == "Q6_K":
        low = x[:, half * 64 + i % 64] // (16 if i % 128 >= 64 else 1) % 16
        high = x[:, 128 + half * 32 + i % 32] // 4 ** (group % 4) % 4
        return f16(b, 208) * b[:, 192 + i // 16].view(np.int8) * (low + 16 * high - 32)
    shift = 4 ** (group % 4)
    if name == "Q2_K":
        scale = x[:, i // 16]
        q = x[:, 16 + half * 32 + i % 32] // shift % 4
        return f16(b, 80) * (scale % 16) * q - f16(b, 82) * (scale // 16)
    assert name == "Q3_K"
    q = x[:, 32 + half * 32 + i % 32] // shift % 4 - 4 * (1 - x[:, i % 32] // 2**group % 2)
    return f16(b, 108) * q3_scale(b, i // 16) * q


def oracle(name: str, blocks: Blocks) -> torch.Tensor:
    """Rounded to float32 and then to bfloat16, as ggml does."""
    values = np.stack([element(name, blocks, i) for i in range(block_sizes(name)[0])], axis=1)
    return torch.from_numpy(values).to(torch.float32).to(torch.bfloat16).view(-1)


def block_sizes(name: str) -> tuple[int, int]:
    return gguf.GGML_QUANT_SIZES[kind_of(name)]


def extreme_blocks(name: str) -> Blocks:
    """Blocks with random bytes and each special factor: subnormal, zero, largest, infinite, NaN."""
    special = (0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x7FFF, 0xFFFF)
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (len(special) ** 2, block_sizes(name)[1]), dtype=np.uint8)
    factors = np.asarray([(a, b) for a in special for b in special], np.uint16)
    for column, offset in enumerate(FACTORS[name]):
        blocks[:, offset : offset + 2] = factors[:, column : column + 1].view(np.uint8)
    return blocks


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, or both NaN."""
    return bool((a.view(torch.int16).eq(b.view(torch.int16)) | a.isnan() & b.isnan()).all())


def blocks_of(name: str) -> Iterator[tuple[str, Blocks]]:
    yield "random", random_blocks(name, (16, 4 * block_sizes(name)[0])).reshape(-1, block_sizes(name)[1])
    yield "extreme", extreme_blocks(name)


Path = Callable[[str, torch.Tensor], torch.Tensor]


def by_reference(name: str, data: torch.Tensor) -> torch.Tensor:
    return reference(name, data).to(torch.bfloat16)


def compiled(name: str, data: torch.Tensor) -> torch.Tensor:
    if library().library is None:
        pytest.skip(library().reason)
    out = torch.empty(data.numel() // block_sizes(name)[1] * block_sizes(name)[0], dtype=torch.bfloat16)
    assert to_bfloat16(name, data, out)
    return out


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, by_reference) for name in FACTORS] + [(name, compiled) for name in COMPILED],
)
def test_the_float64_oracle(name: str, path: Path) -> None:
    for label, blocks in blocks_of(name):
        with np.errstate(all="ignore"):
            expected = oracle(name, blocks)
        assert same(path(name, torch.from_numpy(blocks).view(-1)), expected), label
        assert bool(expected.isfinite().all()) == (label == "random")


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_one_that_the_package_decodes(name: str) -> None:
    values, nbytes = block_sizes(name)
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, ((PIECE + 3) if name in COMPILED else 3, nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, kind_of(name))
    out = torch.empty(len(blocks), values, dtype=torch.float32)
    decode_rows(name, memoryview(bytearray(blocks.tobytes())), None, out)
    np.testing.assert_array_equal(out.numpy(), expected)


def test_two_threads_decode_the_same() -> None:
    data = torch.from_numpy(random_blocks("Q4_K", (300, 1024))).view(-1)
    out = torch.empty(300 * 1024, dtype=torch.bfloat16)
    assert same(compiled("Q4_K", data), by_reference("Q4_K", data))
    to_bfloat16("Q4_K", data, out, threads=2)
    assert same(out, by_reference("Q4_K", data))


def test_without_a_compiler_the_reference_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_blocks("Q5_K", (8, 256))
    expected = torch.empty(8, 256, dtype=torch.bfloat16)
    decode_rows("Q5_K", memoryview(bytearray(data.tobytes())), None, expected)
    monkeypatch.setattr(stored_floats, "library", lambda: Built(None, "no compiler"))
    out = torch.empty(8, 256, dtype=torch.bfloat16)
    decode_rows("Q5_K", memoryview(bytearray(data.tobytes())), None, out)
    assert torch.equal(out, expected) and set(TYPES) < set(DECODERS)
