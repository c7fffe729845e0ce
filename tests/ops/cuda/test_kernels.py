"""Dense operators by Triton: when they are taken. Their numbers are in `test_triton_kernels.py`."""

from __future__ import annotations

import pytest
import torch

from ascendit.kernels import reference
from ascendit.ops.cuda import kernels

NAMES = ("rms_norm", "layer_norm", "adaln", "gated_residual", "rope")


def test_without_a_card_there_are_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.triton_kernels_on("cuda") == ()


def test_none_is_tried_before_it_is_chosen(monkeypatch):
    tried: list[str] = []

    def problem(function, place):
        tried.append(function.__name__)
        return "wrong"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "triton_steps", lambda: (object(), "3.9"))
    monkeypatch.setattr(kernels, "problem_of_operator", problem)
    listed = {k.operator: k for k in kernels.triton_kernels_on("cuda")}
    assert set(listed) == set(NAMES) and tried == []
    assert listed["rope"].missing() == "wrong" and tried == ["rope"]


def test_one_that_is_wrong_or_breaks_is_not_taken_and_named(monkeypatch, caplog):
    def adaln(x, scale, shift, spans, eps):
        return reference.adaln(x, scale, shift + 1, spans, eps)

    def rope(x, cos, sin):
        raise RuntimeError("no compiler\nand more")

    with caplog.at_level("INFO", logger="ascendit"):
        assert "relative error" in kernels.problem_of_operator(adaln, "cpu")
        assert kernels.problem_of_operator(rope, "cpu") == "RuntimeError: no compiler"
    assert "rope on cpu is not computed by Triton: RuntimeError: no compiler" in caplog.text
    before = torch.get_rng_state()
    assert [kernels.problem_of_operator(getattr(reference, name), "cpu") for name in NAMES] == [""] * 5
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_card_all_are_right():
    assert {k.operator: k.missing() for k in kernels.triton_kernels_on("cuda")} == dict.fromkeys(NAMES, "")
