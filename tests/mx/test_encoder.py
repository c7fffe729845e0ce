"""Every way to encode against the reference: not one bit may differ, for any number and any length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from mx import encoders
from mx.blocks import bf16_from_bits, blocks_of, every_bf16, every_finite_amax, random_blocks
from mx.encoders import reference_encode
from torch import Tensor

from ascendit.mx import encoder, msmodelslim, native_encoder, reference
from ascendit.mx.codec import Encoded, encode
from ascendit.mx.formats import E2M1, FORMATS, SEARCH, lookup
from ascendit.native import build

VALUES = {"max:": ("6", "7", "7.25", "12"), "msms:ceil_x:": ("6", "7.25", "12", "search")}
RULES = [
    (name, rule + value)
    for name, fmt in FORMATS.items()
    for rule in fmt.rules
    for value in VALUES.get(rule, ("",))
    if (rule, value) != ("max:", "7")
]
DEFAULTS = [(name, fmt.default_rule) for name, fmt in FORMATS.items()]


@pytest.fixture(params=encoders.WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    encoders.take(request.param, monkeypatch)
    yield request.param
    encoders.forget()


# ---- inputs -------------------------------------------------------------------------------------


def shuffled(x: Tensor, length: int) -> Tensor:
    """The finite numbers of `x` in any order, in rows."""
    x = x[x.isfinite()]
    x = x[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))]
    return x[: x.numel() // length * length].view(-1, length)


def spoiled(x: Tensor) -> Tensor:
    x[::3, 5], x[::5, -1], x[::7, 600:640] = torch.nan, -torch.inf, torch.inf
    x[1], x[2], x[4, 512:1024] = 0.0, -0.0, 0.0
    return x


def spread(rows: int, length: int) -> Tensor:
    """Gaussian, each row at its own power of two."""
    generator = torch.Generator().manual_seed(rows)
    powers = torch.randint(-45, 45, (rows, 1), generator=generator).float()
    return torch.randn(rows, length, generator=generator) * torch.exp2(powers)


def every_half() -> Tensor:
    return torch.arange(0x10000, dtype=torch.int32).to(torch.int16).view(torch.float16)


def random_bits() -> Tensor:
    """float32 [400, 523]: any bits, in half of the rows finite ones."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (400, 523), generator=generator).to(torch.int32)
    x = bits.view(torch.float32)
    return torch.cat((x[:200], x[200:].where(x[200:].isfinite(), 1.5)))


BF16: dict[str, Callable[[], Tensor]] = {
    "all 65536 numbers in turn": lambda: every_bf16().view(-1, 32),
    "all finite numbers in rows": lambda: shuffled(every_bf16(), 1088),
    "every fifth largest number": lambda: blocks_of(every_finite_amax()[::5], seed=0),
    "random exponents": lambda: random_blocks(2000, seed=5),
    "weights": lambda: (torch.randn(40, 1536) * 0.02).bfloat16(),
    "odd length": lambda: spread(60, 33 * 16 + 7).bfloat16(),
    "next to zero": lambda: (torch.randn(20, 600) * 2.0**-128).bfloat16(),
    "not finite": lambda: spoiled(torch.randn(30, 1111)).bfloat16(),
    "one number": lambda: torch.tensor([[-3.0], [0.0], [1e38]]).bfloat16(),
}
OTHERS: dict[str, Callable[[], Tensor]] = {
    "float32, random bits": random_bits,
    "float32, weights": lambda: torch.randn(40, 1536) * 0.02,
    "float32, next to zero": lambda: torch.randn(20, 600) * 2.0**-140,
    "float32, not finite": lambda: spoiled(torch.randn(30, 1111)),
    "float16, all 65536 numbers": lambda: every_half().view(-1, 32),
    "float16, finite ones in rows": lambda: shuffled(every_half(), 1056),
    "float16, not finite": lambda: spoiled(torch.randn(30, 1111)).half(),
}


@cache
def wanted(name: str, fmt: str, rule: str) -> tuple[Tensor, Encoded]:
    torch.manual_seed(0)
    x = {**BF16, **OTHERS}[name]()
    return x, reference_encode(x, fmt, scale_rule=rule)


def differing(a: Encoded, b: Encoded) -> dict[str, int]:
    """How many bytes of each tensor differ; NaN as bytes too."""
    pairs = {
        "qdata": (a.qdata, b.qdata),
        "scale": (a.scale, b.scale),
        "dual_scale": (a.dual_scale, b.dual_scale),
    }
    found = {
        name: int((x.view(torch.uint8) != y.view(torch.uint8)).sum())
        for name, (x, y) in pairs.items()
        if x is not None and y is not None
    }
    return {name: count for name, count in found.items() if count}


@pytest.fixture
def redone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many units went back to the reference, call by call."""
    counts: list[int] = []
    redo = reference.encode_marked

    def counted(rows: Tensor, out: reference.Parts, marks: Tensor, *rest: Any) -> None:
        counts.append(int((marks != 0).sum()))
        redo(rows, out, marks, *rest)

    monkeypatch.setattr(reference, "encode_marked", counted)
    return counts


# ---- the bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "rule"), RULES)
def test_every_rule_is_the_reference(way: str, fmt: str, rule: str) -> None:
    names = [*BF16, *(n for n in OTHERS if n.startswith("float32") or not rule.startswith("msms:"))]
    if way == "aarch64" and (fmt, rule) not in DEFAULTS:
        names = names[:4]
    for name in names:
        x, expected = wanted(name, fmt, rule)
        assert not differing(expected, encode(x, fmt, scale_rule=rule)), (way, name)


@pytest.mark.parametrize(("fmt", "rule"), DEFAULTS)
def test_a_hundred_thousand_blocks(fmt: str, rule: str) -> None:
    check_many(fmt, rule, seeds=range(3))


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "rule"), RULES)
def test_a_million_blocks(fmt: str, rule: str) -> None:
    check_many(fmt, rule, seeds=range(33))


def check_many(fmt: str, rule: str, seeds: range) -> None:
    """Each magnitude that a bfloat16 has is the largest of a block, in random order; so for each seed."""
    amax = every_finite_amax()
    for seed in seeds:
        order = torch.randperm(amax.numel(), generator=torch.Generator().manual_seed(seed))
        blocks = torch.cat((blocks_of(amax[order], seed), random_blocks(256, seed)))
        x = blocks.view(-1, 32 * (257 if seed % 2 else 128))
        assert not differing(reference_encode(x, fmt, scale_rule=rule), encode(x, fmt, scale_rule=rule))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("fmt", "rule"), [r for r in RULES if not r[1].startswith("msms:")])
def test_a_million_blocks_of_other_types(fmt: str, rule: str, dtype: torch.dtype) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-(2**31), 2**31, (1600, 1024), generator=generator).to(torch.int32).view(dtype)
        smaller = torch.randint(-24, 1, x.shape, generator=generator)
        x = torch.ldexp(x.where(x.isfinite(), 1.0).float(), smaller).to(dtype)
        assert not differing(reference_encode(x, fmt, scale_rule=rule), encode(x, fmt, scale_rule=rule))


@pytest.mark.parametrize("rounding", ["half_away", "floor"])
@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4", "mxfp4_dualscale", "int8"])
def test_other_roundings_are_the_reference(fmt: str, rounding: str) -> None:
    x = spread(50, 600).bfloat16()
    assert not differing(reference_encode(x, fmt, rounding=rounding), encode(x, fmt, rounding=rounding))


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4_dualscale", "int8"])
def test_any_axis_and_any_number_of_axes(way: str, fmt: str) -> None:
    if way == "aarch64":
        pytest.skip("nothing that depends on the processor")
    x = torch.randn(3, 70, 5).bfloat16()
    for axis in range(3):
        assert not differing(reference_encode(x, fmt, axis=axis), encode(x, fmt, axis=axis))
    assert not differing(reference_encode(x.flatten(), fmt), encode(x.flatten(), fmt))
    assert encode(x[:0], fmt).shape == (0, 70, 5)


@pytest.mark.parametrize(
    ("fmt", "rule"), [*DEFAULTS, ("mxfp8", "msms:mse_round"), ("mxfp4", "msms:ceil_x:search")]
)
@pytest.mark.parametrize("length", [5120, 5120 + 40])
def test_threads_do_not_matter(fmt: str, rule: str, length: int) -> None:
    x = torch.randn(110, length).bfloat16()
    torch.set_num_threads(1)
    alone = encode(x, fmt, scale_rule=rule)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert not differing(alone, encode(x, fmt, scale_rule=rule))
    assert not differing(alone, reference_encode(x, fmt, scale_rule=rule))


# ---- the choice ---------------------------------------------------------------------------------


def kinds() -> dict[tuple[str, str, torch.dtype], str]:
    """(format, rule, dtype) -> the module and the function that made its encoder: `encoder._in_pieces`."""
    found = {}
    for name, rule in RULES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            fmt = lookup(name)
            rounding = "half_away" if rule.startswith("msms:") and fmt.block else "rint"
            encode_with = encoder.encoder(fmt, rule, rounding, dtype)
            function = getattr(encode_with, "func", encode_with)
            module = function.__module__.rpartition(".")[2]
            found[name, rule, dtype] = f"{module}.{function.__qualname__.partition('.')[0]}"
    return found


def test_which_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that msModelSlim or an NPU does with bfloat16; the search ends in one of them."""
    encoders.take("native", monkeypatch)
    assert "compiled from native/encode.cpp, " in native_encoder.library().reason
    plain = {key for key, made_by in kinds().items() if not made_by.startswith("native_encoder.")}
    assert {rule for _, rule, dtype in plain if dtype == torch.bfloat16} == {SEARCH}
    assert {r for _, r, d in plain if d == torch.float32 and not r.startswith("msms:")} == set()
    assert {n for n, r, d in plain if d == torch.float16 and not r.startswith("msms:")} == {"mxfp4_dualscale"}


def test_which_are_quick_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders.take("pytorch", monkeypatch)
    assert native_encoder.library() == build.Built(None, "no compiler wanted")
    found = kinds()
    encoders.forget()
    for name, rule in RULES:
        in_pieces = found[name, rule, torch.bfloat16] == "encoder._in_pieces"
        assert in_pieces != rule.startswith("msms:")


def test_no_compiler_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    for cached in (build.native, native_encoder.library, encoder.encoder):
        cached.cache_clear()
    x = torch.randn(4, 64).bfloat16()
    try:
        encoded, built = encode(x, "mxfp8"), native_encoder.library()
    finally:
        for cached in (build.native, native_encoder.library, encoder.encoder):
            cached.cache_clear()
    assert built == build.Built(None, "no C++ compiler (g++, clang++, c++) on PATH")
    assert not differing(encoded, reference_encode(x, "mxfp8"))


def test_what_is_no_plain_cpu_tensor_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "encoder", lambda *a: pytest.fail("an encoder was looked for"))
    meta = encode(torch.empty(4, 64, dtype=torch.bfloat16, device="meta"), "mxfp8")
    assert meta.qdata.device.type == "meta" and meta.scale.shape == (4, 2)


def test_a_parameter_is_encoded_too() -> None:
    x = torch.nn.Parameter(torch.randn(4, 64))
    assert not differing(encode(x, "mxfp8"), reference_encode(x.detach(), "mxfp8"))


# ---- what the fast ways are made of -------------------------------------------------------------


def test_doubts_are_settled_by_the_reference(way: str, redone: list[int]) -> None:
    """Tiny blocks under msModelSlim's rules; in PyTorch the spoiled ones."""
    if way == "aarch64":
        pytest.skip("nothing that depends on the processor")
    x = torch.randn(5, 70).bfloat16()
    x[3, 32:] = bf16_from_bits(torch.arange(38))
    x[4, :3] = torch.inf
    rule = "ceil" if way == "pytorch" else "msms:mse_round"
    assert not differing(reference_encode(x, "mxfp8", scale_rule=rule), encode(x, "mxfp8", scale_rule=rule))
    assert redone == [1 if way == "pytorch" else 2]


def test_errors_that_float32_sums_cannot_tell_apart_are_left_to_them(
    redone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders.take("native", monkeypatch)
    x = (torch.randn(64, 5120) * 0.02).bfloat16()
    found = encode(x, "mxfp4", scale_rule="msms:fouroversix")
    assert 0 < sum(redone) < 10  # of 10240 blocks
    assert not differing(reference_encode(x, "mxfp4", scale_rule="msms:fouroversix"), found)


def test_tables_hold_every_magnitude() -> None:
    every = native_encoder.rule_tables(lookup("mxfp8").element, "ceil")  # type: ignore[arg-type]
    assert every.shape == (1, 0x8000) and every[0, 0x7F80:].eq(255).all()
    assert native_encoder.rule_tables(E2M1, "msms:fouroversix").shape == (2, 0x8000)
    first, last, turn = native_encoder.search_tables()
    for c, constant in enumerate(msmodelslim.CEIL_X_CANDIDATES):
        table = native_encoder.rule_tables(E2M1, f"msms:ceil_x:{constant}")[0]
        assert torch.equal(table, torch.where(c < turn, first, last))


def test_early_powers_are_those_of_torch_log2() -> None:
    early = native_encoder.early_powers()
    assert early is not None
    for i in (1, 60, 120, 126, 127, 128, 131, 254):
        last = (i << 23) - int(early[i])
        numbers = torch.tensor([last - 1, last], dtype=torch.int32).view(torch.float32)
        assert torch.log2(numbers).floor().tolist() == [i - 128, i - 127]


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4", "mxfp4_dualscale", "int8"])
@pytest.mark.parametrize("shape", [(5, encoder.PIECE + 40), (700, 1544)])
def test_pytorch_on_threads_and_in_pieces(
    fmt: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders.take("pytorch", monkeypatch)
    torch.set_num_threads(2)
    x = spoiled(torch.randn(shape)).bfloat16()
    found = encode(x, fmt)
    encoders.forget()
    assert not differing(reference_encode(x, fmt), found)
    assert torch.get_num_threads() == 2


def test_many_callers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders.take("native", monkeypatch)
    torch.set_num_threads(2)
    inputs = [torch.randn(200, 5120).bfloat16() for _ in range(4)]
    expected = [reference_encode(x, "mxfp8") for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, right in zip(pool.map(lambda x: encode(x, "mxfp8"), inputs), expected, strict=True):
                assert not differing(right, found)
