"""The choices of a run by step, kind and block, and the rows of their report."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascendit.attention.choice import AttentionPolicy
from ascendit.attention.steps import describe_on, ranges, report, resolve, row_lines
from ascendit.device.attention_kernels import Kind, parse_attention
from ascendit.device.attention_limits import AttentionCall
from ascendit.device.device import parse_device
from ascendit.schedule import Step, StepSchedule

SELF = AttentionCall(kind="self", dtype="bfloat16", heads=12, head_dim=128, queries=640, keys=640)
TEXT = AttentionCall(kind="text", dtype="bfloat16", heads=12, head_dim=128, queries=640, keys=512)
CALLS: dict[Kind, AttentionCall] = {"self": SELF, "text": TEXT}
DECLARED: dict[Kind, list[str | None]] = {"self": [None, "fp8", "fp8", "fp8"], "text": [None] * 4}


def policy(request: str = "") -> AttentionPolicy:
    return AttentionPolicy(
        device=parse_device("cpu"), request=parse_attention(request) if request else {}, sub_head=6
    )


def test_steps_kinds_and_blocks() -> None:
    steps = dict(enumerate(StepSchedule.parse("0-1:attention=bf16,3:attention=int8").resolve(5)))
    resolved = resolve(policy(), CALLS, DECLARED, steps)
    names = {step: [x.name for x in kinds["self"]] for step, kinds in resolved.items()}
    assert names == {
        0: ["cpu"] * 4,
        1: ["cpu"] * 4,
        2: ["cpu", "fp8", "fp8", "fp8"],
        3: ["int8"] * 4,
        4: ["cpu", "fp8", "fp8", "fp8"],
    }
    assert {x.name for kinds in resolved.values() for x in kinds["text"]} == {"cpu"}
    assert resolved[2]["self"] is resolved[4]["self"], "equal steps share their choices"


def test_rows_have_ranges_of_blocks_and_steps() -> None:
    steps = dict(enumerate(StepSchedule.parse("0-1:attention=bf16").resolve(5)))
    rows = report("transformer", resolve(policy(), CALLS, DECLARED, steps), describe_on(policy()))
    assert [(x.kind, x.kernel, x.blocks, x.steps, x.sub_head) for x in rows] == [
        ("self", "cpu", "0-3", "0-1", 6),
        ("text", "cpu", "0-3", "0-4", None),
        ("self", "cpu", "0", "2-4", 6),
        ("self", "fp8", "1-3", "2-4", 6),
    ]
    assert rows[0].reason.startswith("step policy: bf16; default; C++")
    assert rows[3].reason == "of the model; emulated: the same numbers, slower"
    assert rows[3].as_dict()["expert"] == "transformer" and rows[3].backend == "cpu"
    plain = describe_on(AttentionPolicy(device=parse_device("cpu"), reference=True))
    assert plain("fp8") == ("reference", "emulated: the same numbers, slower")
    text = row_lines(rows)
    assert text[0].startswith("text: cpu on cpu (default; ") and len(text) == 4
    assert text[3].startswith("self, transformer, blocks 1-3, steps 2-4: fp8 on cpu, 6 heads in one call")


@pytest.mark.parametrize(
    ("device", "about"), [("twin:a5", "quantized attention"), ("twin:a2", "emulated"), ("cuda", "quantized")]
)
def test_a_dry_run_tells_native_from_emulated_attention(device: str, about: str) -> None:
    describe = describe_on(AttentionPolicy(device=parse_device(device), emulate=True))
    assert describe("fp8")[1].startswith(about)


def test_one_head_is_singular() -> None:
    single = AttentionPolicy(device=parse_device("cpu"), sub_head=1)
    row = report("transformer", resolve(single, CALLS, DECLARED, {0: Step()}), describe_on(single))[0]
    assert ", 1 head in one call (" in row.choice


def test_one_line_for_a_kernel_of_all_kinds() -> None:
    plain = AttentionPolicy(device=parse_device("cpu"))
    steps = dict(enumerate(StepSchedule().resolve(2)))
    resolved = resolve(plain, CALLS, {"self": [None], "text": [None]}, steps)
    rows = report("transformer", resolved, describe_on(plain))
    (line,) = row_lines(rows)
    assert line.startswith("self and text: cpu on cpu (default; ")


@given(st.sets(st.integers(0, 40), min_size=1))
def test_ranges(numbers: set[int]) -> None:
    parsed: list[int] = []
    for item in ranges(sorted(numbers)).split(","):
        first, _, last = item.partition("-")
        parsed += range(int(first), int(last or first) + 1)
    assert parsed == sorted(numbers)
