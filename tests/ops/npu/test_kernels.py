"""The NPU's operators on the twin: the reference's numbers, and the kernels selected on each chip."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops.arguments import D_HEAD, D, H, S, arguments
from ops.recorder import Recorder
from torch import Tensor

from ascendit import mx
from ascendit.device.chip import CHIPS
from ascendit.device.operator_support import capability
from ascendit.errors import UsageError
from ascendit.kernels import reference
from ascendit.ops.npu import elementwise, kernels
from ascendit.ops.npu.attention import fused_infer_attention
from ascendit.ops.operators import OPERATOR_NAMES, bind
from ascendit.twin.contract import TwinError

pytestmark = pytest.mark.usefixtures("twin")
LEAST_DB = 50.0


def db(expected: Tensor, actual: Tensor) -> float:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return mx.sqnr(expected, actual)


@pytest.mark.parametrize("chip", ["a2", "a3", "a5"])
@pytest.mark.parametrize("spans", [(S,), (5, S - 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_every_operator_gives_the_reference_numbers(name, dtype, spans, chip):
    args = arguments(name, dtype, spans)
    expected = getattr(reference, name)(*args)
    assert db(expected, getattr(bind(f"twin:{chip}"), name)(*args)) > LEAST_DB
    # A card must reach 50 dB; operators that compute in float32 are better.
    rounds_rows = name in ("adaln", "gated_residual")
    if dtype == torch.float32 or not rounds_rows:
        least = {torch.bfloat16: 52, torch.float16: 65, torch.float32: 110}[dtype]
        assert db(expected, getattr(bind(f"twin:{chip}"), name)(*args)) > least


@pytest.mark.parametrize("name", ["rope", "adaln", "gated_residual"])
def test_prepared_arguments_give_the_same_numbers_in_fewer_kernels(name):
    ops = bind("twin:a5")
    args = arguments(name, torch.bfloat16, (S,))
    at = {"rope": (1, 3), "adaln": (1, 3), "gated_residual": (2, 3)}[name]
    prepared_args = list(args)
    prepared_args[slice(*at)] = ops.prepare(name, *args[slice(*at)], dtype=torch.bfloat16)
    with torch.no_grad(), Recorder() as plain:
        expected = getattr(ops, name)(*args)
    with torch.no_grad(), Recorder() as prepared:
        actual = getattr(ops, name)(*prepared_args)
    assert torch.equal(actual, expected)
    assert prepared.launched.total() == (3 if name == "rope" else 1) < plain.launched.total()


def test_prepare_changes_nothing_where_it_saves_no_kernel():
    rows = torch.randn(2, 3)
    assert bind("cpu").prepare("rope", rows, dtype=torch.bfloat16) == (rows,)
    assert bind("twin:a5", "reference").prepare("rope", rows, dtype=torch.bfloat16) == (rows,)


def test_samples_of_a_batch_share_the_modulation_rows():
    x = torch.randn(2, 6, D)
    scale, shift = torch.randn(2, 2, D).unbind()
    expected = reference.adaln(x, scale, shift, (2, 4), 1e-6)
    for adaln in (elementwise.layer_norm_adaln, elementwise.mindiesd_adaln_v2):
        bind("twin:a5")
        assert db(expected, adaln(x, scale, shift, (2, 4), 1e-6)) > 110


def test_linear_flattens_its_input_to_two_axes():
    x, weight = torch.randn(2, 3, 8).to(torch.bfloat16), torch.randn(5, 8).to(torch.bfloat16)
    with torch.no_grad(), Recorder() as recorder:
        out = elementwise.linear(x, weight, None)
    assert torch.equal(out, F.linear(x, weight)) and recorder.launched == {"mm": 1}


@pytest.mark.parametrize("keys", [S, 21])
def test_fused_infer_attention(keys):
    bind("twin:a5")
    q, k, v = (torch.randn(1, n, H, D_HEAD).to(torch.bfloat16) for n in (S, keys, keys))
    k = k.transpose(1, 2).contiguous().transpose(1, 2)  # strided; the operator takes contiguous keys only
    assert db(reference.attention(q, k, v), fused_infer_attention(q, k, v)) > 52


@pytest.mark.parametrize(("head", "dtype"), [(24, torch.bfloat16), (32, torch.float32), (528, torch.float16)])
def test_unsupported_heads_of_the_infer_kernel_are_refused(head, dtype):
    q = torch.randn(1, 3, 1, head).to(dtype)
    bind("twin:a5")
    with (
        Recorder() as recorder,
        pytest.raises(UsageError, match=f"1, {head}.*{str(dtype)[6:]}: it takes") as e,
    ):
        fused_infer_attention(q, q, q)
    assert e.value.fix == 'attention="fusion", which takes it'
    assert not {n for n in recorder.launched if n.startswith("npu_")}


# ---- selection ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("chip", "adaln"), [("a2", "adaln"), ("a3", "adaln"), ("a5", "adaln_v2")])
def test_adaln_by_chip(chip, adaln, caplog):
    with caplog.at_level("INFO", logger="ascendit"):
        ops = bind(f"twin:{chip}")
    assert ops.choices["adaln"].startswith(f"npu: mindiesd::{adaln}: one kernel")
    assert f"operators on twin:{chip}: adaln -> npu: mindiesd::{adaln}" in caplog.text
    assert "--set ops=reference" in caplog.text
    skipped = "mindiesd::adaln_v2 does not run on"
    assert (skipped in ops.choices["adaln"]) is (chip != "a5")


def test_without_mindiesd(monkeypatch):
    monkeypatch.setattr(kernels, "missing", lambda call, *_: "not here" if "mindiesd" in call else "")
    ops = bind("twin:a5")
    assert ops.adaln is elementwise.layer_norm_adaln and "not here" in ops.choices["adaln"]
    assert "adaln" not in ops.prepared  # its rows stay float32


def test_an_operator_that_is_not_defined_is_not_selected():
    assert kernels.missing("mindiesd::adaln_v2", "a2") == "mindiesd::adaln_v2 does not run on a2"
    assert kernels.missing("npu_rms_norm", "a5") == "npu_rms_norm is not installed"  # the twin is off here
    assert kernels.missing("aten::layer_norm", "a5") == ""


def test_fast_layernorm_uses_mindiesd(caplog):
    assert bind("twin:a5").layer_norm is elementwise.layer_norm
    ops = bind("twin:a5", fast_layernorm=True)
    assert (
        ops.layer_norm is elementwise.mindiesd_layer_norm
        and "only with fast_layernorm" in ops.choices["layer_norm"]
    )
    args = arguments("layer_norm", torch.bfloat16, (S,))
    with torch.no_grad(), Recorder() as recorder:
        actual = ops.layer_norm(*args)
    assert db(reference.layer_norm(*args), actual) > 52
    assert recorder.launched == {"mindiesd::layernorm": 1}
    assert "default layer norm" not in caplog.text
    assert bind("cpu", fast_layernorm=True).layer_norm is bind("cpu").layer_norm
    assert "MindIE-SD has no operators on cpu" in caplog.text


def test_fast_layernorm_where_mindiesd_is_absent(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "missing", lambda call, *_: "not here" if "mindiesd" in call else "")
    assert bind("twin:a5", fast_layernorm=True).layer_norm is elementwise.layer_norm
    assert "fast_layernorm: not here; using the default layer norm" in caplog.text


def test_the_reference_can_be_forced():
    ops = bind("twin:a5", "reference")
    assert all(getattr(ops, n) is getattr(reference, n) for n in OPERATOR_NAMES) and not ops.prepared


def test_every_operator_has_a_kernel_on_every_chip():
    for chip in CHIPS:
        assert set(bind(f"twin:{chip}").choices) == set(OPERATOR_NAMES)
    calls = [k.needs for k in kernels.KERNELS if not k.needs.startswith("aten::")]
    assert all(
        capability(c).support_on("a5") == "yes" or c in ("mindiesd::adaln", "mindiesd::la") for c in calls
    )


def test_a_bound_operator_checks_the_active_chip():
    ops = bind("twin:a5")
    bind("twin:a2")
    with pytest.raises(TwinError, match="adaln_v2"):
        ops.adaln(*arguments("adaln", torch.bfloat16, (S,)))
