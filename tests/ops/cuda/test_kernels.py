"""Selection of the dense Triton operators; `test_triton_kernels.py` tests their numbers."""

from __future__ import annotations

import pytest
import torch

from ascendit.kernels import reference
from ascendit.ops.cuda import kernels

NAMES = ("rms_norm", "layer_norm", "adaln", "gated_residual", "rope")


def test_there_are_no_triton_kernels_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.triton_kernels_on("cuda") == ()


def test_a_kernel_is_tried_only_when_it_is_selected(monkeypatch):
    tried: list[str] = []

    def problem(function, device):
        tried.append(function.__name__)
        return "wrong"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "triton_steps", lambda: (object(), "3.9"))
    monkeypatch.setattr(kernels, "problem_of_operator", problem)
    listed = {k.operator: k for k in kernels.triton_kernels_on("cuda")}
    assert set(listed) == set(NAMES) and tried == []
    assert listed["rope"].missing() == "wrong" and tried == ["rope"]


def test_a_wrong_or_failing_kernel_is_logged_and_not_used(monkeypatch, caplog):
    def adaln(x, scale, shift, spans, eps):
        return reference.adaln(x, scale, shift + 1, spans, eps)

    def rope(x, cos, sin):
        raise RuntimeError("no compiler\nand more")

    with caplog.at_level("INFO", logger="ascendit"):
        assert "relative error" in kernels.problem_of_operator(adaln, "cpu")
        assert kernels.problem_of_operator(rope, "cpu") == "RuntimeError: no compiler"
    assert "rope on cpu does not use Triton: RuntimeError: no compiler" in caplog.text
    before = torch.get_rng_state()
    assert [kernels.problem_of_operator(getattr(reference, name), "cpu") for name in NAMES] == [""] * 5
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_all_kernels_are_correct_on_a_gpu():
    assert {k.operator: k.missing() for k in kernels.triton_kernels_on("cuda")} == dict.fromkeys(NAMES, "")
