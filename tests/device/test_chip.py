"""Chips and the capability table: each row names an operator that exists."""

from __future__ import annotations

import pytest

from ascendit.device.chip import CHIPS, chip_of
from ascendit.device.operator_support import CAPABILITIES, capability, chips_for, no_matmul_for
from ascendit.twin import registry


@pytest.mark.parametrize(
    ("number", "name"), [(220, "a2"), (225, "a2"), (250, "a3"), (255, "a3"), (260, "a5")]
)
def test_chips_by_soc_number(number: int, name: str) -> None:
    chip = chip_of(number)
    assert chip is not None and chip.name == name


@pytest.mark.parametrize("number", [-1, 103, 202, 226, 240])
def test_other_soc_numbers_are_not_supported(number: int) -> None:
    assert chip_of(number) is None


def test_every_chip_has_plausible_figures() -> None:
    variants = [v for chip in CHIPS.values() for v in chip.variants]
    assert len({v.name for v in variants}) == len(variants)
    for v in variants:
        assert v.source and 16 <= v.memory_gib <= 256 and 200 <= v.bf16_tflops <= 1000, v.name
        assert v.int8_tflops == pytest.approx(2 * v.bf16_tflops, rel=0.01), v.name
        assert 500 <= v.memory_gbps <= 8000 and (v.link_gbps is None or v.link_gbps <= 2000), v.name
    for chip in CHIPS.values():
        assert chip.variants[0].name.startswith(chip.name)
        mx = "mxfp8" in {row.scheme for row in CAPABILITIES if row.support_on(chip.name) == "yes"}
        for v in chip.variants:
            assert v.name.partition("-")[0] == chip.name
            assert (v.fp8_tflops is not None) == (v.fp4_tflops is not None) == mx, v.name
            if v.fp8_tflops and v.fp4_tflops:
                assert v.fp8_tflops == v.int8_tflops and v.fp4_tflops == pytest.approx(2 * v.fp8_tflops, 0.01)


def test_newer_chips_are_faster_and_larger() -> None:
    a2, a3, a5 = (CHIPS[name].variants[0] for name in ("a2", "a3", "a5"))
    assert a2.bf16_tflops < a3.bf16_tflops < a5.bf16_tflops
    assert a2.memory_gib <= a3.memory_gib < a5.memory_gib
    memory = {v.name: v.memory_gib for chip in CHIPS.values() for v in chip.variants}
    assert (memory["a2-32g"], memory["a2-64g"], memory["a3"], memory["a5"]) == (32, 64, 64, 112)


def test_every_row_names_an_operator_and_an_alternative_for_other_chips() -> None:
    for row in CAPABILITIES:
        namespace, name = registry.split(row.operator)
        assert name in registry.frozen(namespace), row.operator
        answers = {row.support_on(chip) for chip in CHIPS}
        assert row.chips and (answers == {"yes"} or row.instead), row
        assert ("adapter" in answers) == bool(row.message), row
    keys = [(row.operator, row.mode) for row in CAPABILITIES]
    assert len(keys) == len(set(keys))


def test_rows_follow_the_vendor_documents() -> None:
    assert capability("npu_quant_matmul", "int8").chips == ("a2", "a3", "a5")
    for mode in ("mxfp8", "mxfp4", "w4a8", "fp8"):
        assert capability("npu_quant_matmul", mode).chips == ("a5",)
    assert capability("npu_prompt_flash_attention").chips == ("a2", "a3")
    assert capability("npu_block_sparse_attention").support_on("a5") == "unknown"
    assert capability("npu_rms_norm").chips == tuple(CHIPS)  # not in the table: on every chip


def test_each_quantized_scheme_has_its_matmul() -> None:
    schemes = {row.scheme for row in CAPABILITIES if "matmul" in row.operator} - {""}
    assert schemes == {"int8", "int8_block", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale", "w4a8"}


def test_chips_by_scheme() -> None:
    for scheme in ("int8", "int8_block"):
        assert chips_for({scheme, "bf16"}) == dict.fromkeys(("a2", "a3", "a5"), "native")
    for scheme in ("mxfp8", "mxfp4", "mxfp4_dualscale", "fp8"):
        assert chips_for({scheme}) == {"a2": "emulated", "a3": "emulated", "a5": "native"}
    assert chips_for({"int8", "mxfp8"})["a2"] == "emulated"
    assert chips_for({"fp8_128x128"})["a5"] == "emulated"


def test_a_scheme_without_a_matmul_is_refused() -> None:
    error = no_matmul_for("twin:a2", "a2", "w4a8")
    assert error.code == "E-CAP-01" and "has no matmul for it" in str(error)
    assert "needs  Atlas 350 (Ascend 950), a5; a2 has bf16, int8, int8_block" in str(error)
