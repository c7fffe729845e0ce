"""Wrong calls are refused, each with an error that names a fix; they count no launch."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
import torch
from twin import wrong_calls as wrong
from twin.wrong_calls import BF16, E4M3, rand
from twin.wrong_matmuls import MATMUL

import ascendit.twin
from ascendit.twin import contract
from ascendit.twin.contract import TwinError
from ascendit.twin.registry import OPERATORS, signature

npu = torch.ops.npu

CASES = [("a5", *c) for c in (*wrong.MX_QUANT, *MATMUL, *wrong.OTHERS, *wrong.A5)] + [
    (chip, *c) for chip in ("a2", "a3") for c in wrong.A2
]


@pytest.mark.parametrize(
    ("chip", "call", "refusal", "fix"),
    [(c, *fields) for c, _, *fields in CASES],
    ids=[f"{c}-{n}" for c, n, *_ in CASES],
)
def test_a_wrong_call_is_refused(
    on: Callable[[str], None], chip: str, call: Callable[[], Any], refusal: str, fix: str
) -> None:
    on(chip)
    refusal = refusal.replace(" on a2", f" on {chip}") if chip == "a3" and "fp8 on" in refusal else refusal
    with pytest.raises(TwinError) as caught:
        call()
    error = caught.value
    assert isinstance(error, RuntimeError) and re.search(refusal, error.got), error.got
    assert re.search(fix, error.fix), error.fix
    assert error.needs and str(error).startswith(f"[{error.code}] {error.got}\n  needs  ")
    operators = {"npu_quant_matmul", "npu_dual_level_quant_matmul", "npu_fusion_attention", "npu_rotary_mul"}
    assert not operators & set(ascendit.twin.launches())


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40 and len({n for _, n, *_ in CASES}) >= 100


def test_the_builders_without_changes_are_correct_calls() -> None:
    """Otherwise a refusal above might have another cause."""
    for name in (
        "mx_quant",
        "mxfp8",
        "fp4",
        "w4a8",
        "int8",
        "int8_blocks",
        "dual",
        "rotate",
        "fusion",
        "infer",
        "adaln",
        "sparse",
    ):
        getattr(wrong, name)()


@pytest.mark.parametrize("mode", ["mxfp8", "mxfp4", "w4a8", "fp8"])
def test_fp8_and_fp4_matmuls_on_a2_are_refused_with_both_fixes(on: Callable[[str], None], mode: str) -> None:
    calls = {"mxfp8": wrong.mxfp8, "mxfp4": wrong.fp4, "w4a8": wrong.w4a8}
    (q, s), (w, ws) = (npu.npu_dynamic_quant(rand(4, 64), dst_type=E4M3) for _ in range(2))

    def fp8(change: Callable[[dict[str, Any]], Any]) -> Any:
        arguments = {"x1": q, "x2": w.t(), "scale": ws, "pertoken_scale": s, "output_dtype": BF16}
        change(arguments)
        return npu.npu_quant_matmul(**arguments)

    with pytest.raises(
        TwinError,
        match=rf"aclnnQuantMatmulV5 failed.*{mode} on a2.*\n.*a5.*\n.*int8_block are native.*with emul",
    ):
        calls.get(mode, fp8)(lambda arguments: on("a2"))


def test_unknown_arguments_are_named() -> None:
    x = rand(4, 96)
    text = "Unknown keyword argument 'dtype' for operator 'npu::npu_dynamic_mx_quant'. Schema: "
    with pytest.raises(RuntimeError, match=text):
        npu.npu_dynamic_mx_quant(x, dtype=E4M3)
    with pytest.raises(TwinError, match=text):
        ascendit.twin.call("npu_dynamic_mx_quant", x, dtype=E4M3)
    with pytest.raises(TwinError, match="pre_tokens.*npu_fusion_attention"):  # torch_npu has pre_tockens
        ascendit.twin.call("npu_fusion_attention", x, x, x, 1, "BNSD", pre_tokens=5)
    with pytest.raises(TwinError, match="is missing value for argument 'gamma'"):
        ascendit.twin.call("npu_rms_norm", x)
    with pytest.raises(TwinError, match="2 positional arguments for operator"):
        ascendit.twin.call("npu_dynamic_mx_quant", x, -1)
    with pytest.raises(TwinError, match="operator npu_nothing.*\n.*torch_npu 2.13.0.*\n.*check the spelling"):
        ascendit.twin.call("npu_nothing", x)


# ---- the table of refusals ----------------------------------------------------------------------


def test_each_refusal_has_a_text_and_each_text_the_values_it_names() -> None:
    """A refusal that no test reaches would otherwise fail at run time."""
    texts = {
        f"{family}.{name}": row for family, rows in contract.refusals().items() for name, row in rows.items()
    }
    arguments = {n for name in OPERATORS for n in signature(name).names} | {"layout", "heads"}
    used: set[str] = set()
    for path in Path(contract.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            used |= {k for k in texts if isinstance(node, ast.Constant) and node.value == k}
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(("require", "refuse")):
                continue
            keys = [c.value for a in node.args for c in ast.walk(a) if isinstance(c, ast.Constant)]
            passed = {k.arg for k in node.keywords}
            for key in (k for k in keys if k in texts):
                fields = {f for t in texts[key].values() for _, f, _, _ in Formatter().parse(t) if f}
                placeholders = {re.split(r"[.\[]", f)[0] for f in fields}
                of_call = arguments if isinstance(node.func, ast.Attribute) else set()
                assert None in passed or placeholders <= passed | of_call, (path.name, key)
    assert all(row.keys() == {"got", "needs", "fix"} for row in texts.values())
    assert used == set(texts)


def test_a_refusal_may_have_its_texts_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"fix": "pass {x}", "needs": "a number", "got": "{x:list}"}
    monkeypatch.setattr(contract, "refusals", lambda: {"call": {"odd": row}})
    with pytest.raises(TwinError) as e:
        contract.refuse("call.odd", x=[1, 2])
    assert (e.value.got, e.value.needs, e.value.fix) == ("1, 2", "a number", "pass [1, 2]")
