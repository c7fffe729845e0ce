"""Every variant of the encoder against the reference: all bits equal, for any value and length."""

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


@pytest.fixture(params=encoders.VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    encoders.use(request.param, monkeypatch)
    yield request.param
    encoders.forget()


# ---- inputs -------------------------------------------------------------------------------------


def shuffled(x: Tensor, length: int) -> Tensor:
    """The finite numbers of `x` in random order, in rows."""
    x = x[x.isfinite()]
    x = x[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))]
    return x[: x.numel() // length * length].view(-1, length)


def spoiled(x: Tensor) -> Tensor:
    x[::3, 5], x[::5, -1], x[::7, 600:640] = torch.nan, -torch.inf, torch.inf
    x[1], x[2], x[4, 512:1024] = 0.0, -0.0, 0.0
    return x


def spread(rows: int, length: int) -> Tensor:
    """Gaussian values, each row scaled by another power of two."""
    generator = torch.Generator().manual_seed(rows)
    powers = torch.randint(-45, 45, (rows, 1), generator=generator).float()
    return torch.randn(rows, length, generator=generator) * torch.exp2(powers)


def every_half() -> Tensor:
    return torch.arange(0x10000, dtype=torch.int32).to(torch.int16).view(torch.float16)


def random_bits() -> Tensor:
    """float32 [400, 523]: random bits, in half of the rows finite."""
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
def expected_for(name: str, fmt: str, rule: str) -> tuple[Tensor, Encoded]:
    torch.manual_seed(0)
    x = {**BF16, **OTHERS}[name]()
    return x, reference_encode(x, fmt, scale_rule=rule)


def differing(a: Encoded, b: Encoded) -> dict[str, int]:
    """Number of differing bytes of each tensor; NaN is compared as bytes too."""
    pairs = {
        "qdata": (a.qdata, b.qdata),
        "scale": (a.scale, b.scale),
        "dual_scale": (a.dual_scale, b.dual_scale),
    }
    counts = {
        name: int((x.view(torch.uint8) != y.view(torch.uint8)).sum())
        for name, (x, y) in pairs.items()
        if x is not None and y is not None
    }
    return {name: count for name, count in counts.items() if count}


@pytest.fixture
def redone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of units that the reference encoded again, for each call."""
    counts: list[int] = []
    redo = reference.encode_marked

    def counted(rows: Tensor, out: reference.Parts, marks: Tensor, *arguments: Any) -> None:
        counts.append(int((marks != 0).sum()))
        redo(rows, out, marks, *arguments)

    monkeypatch.setattr(reference, "encode_marked", counted)
    return counts


# ---- all bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "rule"), RULES)
def test_every_rule_equals_the_reference(variant: str, fmt: str, rule: str) -> None:
    names = [*BF16, *(n for n in OTHERS if n.startswith("float32") or not rule.startswith("msms:"))]
    if variant == "aarch64" and (fmt, rule) not in DEFAULTS:
        names = names[:4]
    for name in names:
        x, expected = expected_for(name, fmt, rule)
        assert not differing(expected, encode(x, fmt, scale_rule=rule)), (variant, name)


@pytest.mark.parametrize(("fmt", "rule"), DEFAULTS)
def test_a_hundred_thousand_blocks(fmt: str, rule: str) -> None:
    check_many(fmt, rule, seeds=range(3))


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "rule"), RULES)
def test_a_million_blocks(fmt: str, rule: str) -> None:
    check_many(fmt, rule, seeds=range(33))


def check_many(fmt: str, rule: str, seeds: range) -> None:
    """For each seed, every bfloat16 magnitude is the largest of one block, in random order."""
    amax = every_finite_amax()
    for seed in seeds:
        order = torch.randperm(amax.numel(), generator=torch.Generator().manual_seed(seed))
        blocks = torch.cat((blocks_of(amax[order], seed), random_blocks(256, seed)))
        x = blocks.view(-1, 32 * (257 if seed % 2 else 128))
        assert not differing(reference_encode(x, fmt, scale_rule=rule), encode(x, fmt, scale_rule=rule))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("fmt", "rule"), [r for r in RULES if not r[1].startswith("msms:")])
def test_a_million_blocks_of_other_dtypes(fmt: str, rule: str, dtype: torch.dtype) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-(2**31), 2**31, (1600, 1024), generator=generator).to(torch.int32).view(dtype)
        smaller = torch.randint(-24, 1, x.shape, generator=generator)
        x = torch.ldexp(x.where(x.isfinite(), 1.0).float(), smaller).to(dtype)
        assert not differing(reference_encode(x, fmt, scale_rule=rule), encode(x, fmt, scale_rule=rule))


@pytest.mark.parametrize("rounding", ["half_away", "floor"])
@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4", "mxfp4_dualscale", "int8"])
def test_other_roundings_equal_the_reference(fmt: str, rounding: str) -> None:
    x = spread(50, 600).bfloat16()
    assert not differing(reference_encode(x, fmt, rounding=rounding), encode(x, fmt, rounding=rounding))


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4_dualscale", "int8"])
def test_any_axis_and_any_number_of_axes(variant: str, fmt: str) -> None:
    if variant == "aarch64":
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
def test_the_number_of_threads_does_not_change_results(fmt: str, rule: str, length: int) -> None:
    x = torch.randn(110, length).bfloat16()
    torch.set_num_threads(1)
    alone = encode(x, fmt, scale_rule=rule)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert not differing(alone, encode(x, fmt, scale_rule=rule))
    assert not differing(alone, reference_encode(x, fmt, scale_rule=rule))


# ---- selection ---------------------------------------------------------------------------------


def selected() -> dict[tuple[str, str, torch.dtype], str]:
    """(format, rule, dtype) -> module and function of its encoder, such as `encoder._in_pieces`."""
    names = {}
    for name, rule in RULES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            fmt = lookup(name)
            rounding = "half_away" if rule.startswith("msms:") and fmt.block else "rint"
            encode_with = encoder.encoder(fmt, rule, rounding, dtype)
            function = getattr(encode_with, "func", encode_with)
            module = function.__module__.rpartition(".")[2]
            names[name, rule, dtype] = f"{module}.{function.__qualname__.partition('.')[0]}"
    return names


def test_the_rules_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rules of msModelSlim and of NPUs for bfloat16; the search ends in one of them."""
    encoders.use("native", monkeypatch)
    assert "compiled from native/encode.cpp, " in native_encoder.library().reason
    not_compiled = {key for key, made_by in selected().items() if not made_by.startswith("native_encoder.")}
    assert {rule for _, rule, dtype in not_compiled if dtype == torch.bfloat16} == {SEARCH}
    assert {r for _, r, d in not_compiled if d == torch.float32 and not r.startswith("msms:")} == set()
    assert {n for n, r, d in not_compiled if d == torch.float16 and not r.startswith("msms:")} == {
        "mxfp4_dualscale"
    }


def test_the_rules_that_are_fast_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders.use("pytorch", monkeypatch)
    assert native_encoder.library() == build.Built(None, "no compiler wanted")
    encoder_of = selected()
    encoders.forget()
    for name, rule in RULES:
        in_pieces = encoder_of[name, rule, torch.bfloat16] == "encoder._in_pieces"
        assert in_pieces != (rule.startswith("msms:") or FORMATS[name].kind == "tile")


def test_without_a_compiler_there_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_tensor_that_is_not_on_the_cpu_uses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "encoder", lambda *a: pytest.fail("an encoder was selected"))
    meta = encode(torch.empty(4, 64, dtype=torch.bfloat16, device="meta"), "mxfp8")
    assert meta.qdata.device.type == "meta" and meta.scale.shape == (4, 2)


def test_a_parameter_can_be_encoded() -> None:
    x = torch.nn.Parameter(torch.randn(4, 64))
    assert not differing(encode(x, "mxfp8"), reference_encode(x.detach(), "mxfp8"))


# ---- details of the fast variants ---------------------------------------------------------------


def test_undecided_units_are_encoded_by_the_reference(variant: str, redone: list[int]) -> None:
    """Native: tiny blocks under msModelSlim's rules. PyTorch: non-finite blocks."""
    if variant == "aarch64":
        pytest.skip("nothing that depends on the processor")
    x = torch.randn(5, 70).bfloat16()
    x[3, 32:] = bf16_from_bits(torch.arange(38))
    x[4, :3] = torch.inf
    rule = "ceil" if variant == "pytorch" else "msms:mse_round"
    assert not differing(reference_encode(x, "mxfp8", scale_rule=rule), encode(x, "mxfp8", scale_rule=rule))
    assert redone == [1 if variant == "pytorch" else 2]


def test_errors_too_close_for_float32_sums_are_left_to_the_reference(
    redone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders.use("native", monkeypatch)
    x = (torch.randn(64, 5120) * 0.02).bfloat16()
    encoded = encode(x, "mxfp4", scale_rule="msms:fouroversix")
    assert 0 < sum(redone) < 10  # of 10240 blocks
    assert not differing(reference_encode(x, "mxfp4", scale_rule="msms:fouroversix"), encoded)


def test_tables_have_every_magnitude() -> None:
    table = native_encoder.rule_tables(lookup("mxfp8").element, "ceil")  # type: ignore[arg-type]
    assert table.shape == (1, 0x8000) and table[0, 0x7F80:].eq(255).all()
    assert native_encoder.rule_tables(E2M1, "msms:fouroversix").shape == (2, 0x8000)
    first, last, turn = native_encoder.search_tables()
    for c, constant in enumerate(msmodelslim.CEIL_X_CANDIDATES):
        table = native_encoder.rule_tables(E2M1, f"msms:ceil_x:{constant}")[0]
        assert torch.equal(table, torch.where(c < turn, first, last))


def test_early_powers_equal_torch_log2() -> None:
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
    encoders.use("pytorch", monkeypatch)
    torch.set_num_threads(2)
    x = spoiled(torch.randn(shape)).bfloat16()
    encoded = encode(x, fmt)
    encoders.forget()
    assert not differing(reference_encode(x, fmt), encoded)
    assert torch.get_num_threads() == 2


def test_many_callers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders.use("native", monkeypatch)
    torch.set_num_threads(2)
    inputs = [torch.randn(200, 5120).bfloat16() for _ in range(4)]
    expected = [reference_encode(x, "mxfp8") for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for encoded, reference_encoded in zip(
                pool.map(lambda x: encode(x, "mxfp8"), inputs), expected, strict=True
            ):
                assert not differing(reference_encoded, encoded)
