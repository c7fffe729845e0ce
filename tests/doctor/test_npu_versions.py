"""The published rows, and which of them a machine is."""

from __future__ import annotations

import pytest

from ascendit.doctor import machine as machine_module
from ascendit.doctor.npu import DRIVERS, MINDIESD, STACKS, Found, advise, begins, match
from ascendit.doctor.report import at_least


def test_the_table_is_sound() -> None:
    assert len({s.torch_npu for s in STACKS}) == len(STACKS)
    for s in STACKS:
        assert at_least(s.torch, machine_module.LIBRARIES["torch"]), (
            s
        )  # what ascendit does not run with is left out
        assert s.torch_npu.partition(".post")[0] == s.torch and s.source.startswith("https://")
        assert (s.cann is None) == (s.release is None)
    cann = {s.cann for s in STACKS if s.cann}
    assert set(DRIVERS) <= set(MINDIESD) and all(any(begins(m, c) for m in MINDIESD) for c in cann)


def test_the_first_row_is_the_torch_npu_whose_schemas_are_frozen() -> None:
    from ascendit.twin.registry import VERSIONS

    assert VERSIONS["npu"] == f"torch_npu_{STACKS[0].torch_npu}"


@pytest.mark.parametrize("stack", [s for s in STACKS if s.cann], ids=str)
def test_each_row_matches_itself(stack) -> None:
    found = match(Found(torch=f"{stack.torch}+cpu", torch_npu=stack.torch_npu, cann=stack.cann))
    assert found.stack == stack and not found.wrong and not found.unlisted


def test_another_cann_and_another_torch() -> None:
    found = match(Found(torch="2.11.0", torch_npu="2.10.0", cann="8.5.0"))
    assert found.wrong == (
        "torch 2.11.0 is not the 2.10.0 of torch_npu 2.10.0",
        "CANN 8.5.0 is not the 9.0.0 of torch_npu 2.10.0",
    )


def test_what_no_page_tells() -> None:
    found = match(Found(torch="2.13.0", torch_npu="2.13.0", cann="9.1.0"))
    assert found.unlisted == ("no CANN is published for torch_npu 2.13.0",) and not found.wrong
    assert match(Found(torch_npu="2.14.0")).unlisted == ("torch_npu 2.14.0 is in no published table",)


def test_mindiesd_and_driver_beside_cann() -> None:
    machine = Found(torch="2.9.0", torch_npu="2.9.0", cann="8.5.0", mindiesd="3.1.0", driver="24.1.rc3")
    words = match(machine).unlisted
    assert words[0] == "MindIE-SD 3.1.0 is not among those published for CANN 8.5.0: 3.0.0, 2.3.0"
    assert words[1].startswith("driver 24.1.rc3 is not among those published for CANN 8.5.0: 25.5")
    assert not match(Found(torch_npu="2.9.0", cann="8.5.0", mindiesd="2.3.0", driver="25.3.2")).unlisted


@pytest.mark.parametrize(
    ("found", "torch_npu"),
    [
        (Found(torch="2.11.0", cann="9.1.0"), "2.11.0.post2"),
        (Found(torch="2.15.0", cann="8.5.0"), "2.9.0"),
        (Found(torch="2.10.0"), "2.10.0.post6"),
        (Found(), "2.12.0.post2"),
    ],
)
def test_which_row_to_install(found, torch_npu) -> None:
    assert advise(found).torch_npu == torch_npu


@pytest.mark.parametrize(
    ("version", "start", "answer"),
    [
        ("9.1.0", "9.1", True),
        ("9.10.0", "9.1", False),
        ("25.7.RC1", "25.7.rc1", True),
        ("9.1", "9.1.0", False),
    ],
)
def test_begins(version: str, start: str, answer: bool) -> None:
    assert begins(version, start) is answer
