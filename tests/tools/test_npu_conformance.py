"""The comparison with the real torch_npu: its parts, and the complete check."""

from __future__ import annotations

import _ctypes
import ctypes
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
TOOLS = REPO / "tools"
LEAST = 30
"""Valid calls that twin, Meta kernels and dry run must accept with equal results, at least."""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a module of tools/ by name."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module


# ---- the stub CANN ------------------------------------------------------------------------------


@pytest.fixture
def stub(tool: Any, tmp_path: Path) -> ctypes.CDLL:
    build = tool("fake_cann.build")
    try:
        folder = build.build([], tmp_path)
    except build.NoCompiler as e:
        pytest.skip(str(e))
    assert build.build([], tmp_path) == folder  # built once
    library = ctypes.CDLL(str(folder / "libopapi.so"))
    library.fake_cann_take.restype = ctypes.c_char_p
    library.aclCreateTensor.restype = ctypes.c_void_p
    return library


def test_needed_libraries_and_symbols_are_read_from_the_file(tool: Any, tmp_path: Path) -> None:
    elf = tool("fake_cann.elf")
    path = Path(_ctypes.__file__)
    if path.read_bytes()[:6] != b"\x7fELF\x02\x01":
        pytest.skip("no 64-bit ELF here")
    library = elf.read(path)
    assert {"PyErr_SetString", "PyTuple_Type"} <= library.undefined
    assert "PyInit__ctypes" not in library.undefined
    assert any(name.startswith("libffi") for name in library.needed)
    assert "PyInit__ctypes" in library.strings(rb"PyInit\w+")
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(ValueError, match=r"text.so is not a 64-bit little-endian ELF file"):
        elf.read(tmp_path / "text.so")


def test_each_name_becomes_one_function(tool: Any) -> None:
    build = tool("fake_cann.build")
    text = build.generate(["aclnnAdd", "aclnnAddGetWorkspaceSize", "aclrtMalloc", "aclrtCmoAsync"])
    assert '__asm__("aclnnAdd"); int stub_0(void) { fake_cann_record("launch aclnnAdd"); return 0; }' in text
    assert '"aclnnAddGetWorkspaceSize"); int stub_1(void) {  return 0; }' in text  # no launch yet
    assert '"stub aclrtCmoAsync"' in text and "aclrtMalloc" not in text  # runtime.c has it


def test_names_composed_at_run_time_are_included(tool: Any) -> None:
    build, elf = tool("fake_cann.build"), tool("fake_cann.elf")
    undefined = frozenset({"aclrtFree", "_ZN3atb13CreateContextEv", "printf", "_ZN2at5empty"})
    library = elf.Library("libx.so", ("libhccl.so", "libc10.so"), undefined, b"\0aclnnMulAdd\0acl\0")
    symbols = build.symbols([library])
    assert symbols == ["_ZN3atb13CreateContextEv", "aclnnMulAdd", "aclnnMulAddGetWorkspaceSize", "aclrtFree"]
    assert {"libhccl.so", "libopapi.so"} <= set(build.library_names([library]))
    assert "libc10.so" not in build.library_names([library])


def test_the_stub_copies_and_records(stub: ctypes.CDLL) -> None:
    memory, source = ctypes.c_void_p(), ctypes.create_string_buffer(b"abcdefgh")
    assert stub.aclrtMalloc(ctypes.byref(memory), ctypes.c_size_t(8), 0) == 0
    assert stub.aclrtMemcpy(memory, ctypes.c_size_t(8), source, ctypes.c_size_t(8), 1) == 0
    assert stub.aclrtMemcpy(memory, ctypes.c_size_t(4), source, ctypes.c_size_t(8), 1) != 0  # too small
    assert ctypes.string_at(memory, 8) == b"abcdefgh"
    stub.aclrtSynchronizeDevice()
    expected = b"copy H2D 8\nsync aclrtMemcpy\nsync aclrtSynchronizeDevice\n"
    assert stub.fake_cann_take() == expected and stub.fake_cann_take() == b""
    assert stub.aclrtFree(memory) == 0


def test_addresses_can_be_reserved_without_memory(stub: ctypes.CDLL) -> None:
    memory = ctypes.c_void_p()
    size = ctypes.c_size_t(1 << 36)
    assert stub.aclrtReserveMemAddress(ctypes.byref(memory), size, ctypes.c_size_t(0), None, 0) == 0
    ctypes.memset(memory.value or 0, 7, 4096)
    assert stub.aclrtReleaseMemAddress(memory) == 0


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [(2, (33, 70), (3, 3, 16, 32)), (27, (33, 70), (5, 3, 16, 16)), (2, (2, 16, 32), (2, 1, 1, 16, 32))],
)
def test_the_storage_of_an_nz_tensor(stub: ctypes.CDLL, dtype: int, shape: Any, expected: Any) -> None:
    dims = (ctypes.c_int64 * len(shape))(*shape)
    none, zero, count = ctypes.c_void_p(), ctypes.c_int64(0), ctypes.c_uint64(len(shape))
    tensor = stub.aclCreateTensor(dims, count, dtype, none, zero, 2, none, zero, none)
    out, number, actual = ctypes.POINTER(ctypes.c_int64)(), ctypes.c_uint64(), ctypes.c_int()
    results = [ctypes.byref(x) for x in (out, number, actual)]
    stub.aclnnNpuFormatCastCalculateSizeAndFormat(ctypes.c_void_p(tensor), 29, dtype, *results)
    assert tuple(out[: number.value]) == expected and actual.value == 29


# ---- the report ---------------------------------------------------------------------------------


QUANTIZE = "ops: int8: quantize"
OURS = {"name": QUANTIZE, "scheme": "int8", "dry": "same", "launched": ["aclnnA"], "host": []}


def make_way(*steps: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The steps of the loop in one variant."""
    return {"quantized": False, "texts": 1, "nz": False, "layers": 1, "steps": list(steps)} | changes


def run_of_one_chip(**changes: Any) -> dict[str, Any]:
    """A dry run without problems, with `changes`."""
    good: dict[str, Any] = {"launches": 72, "kernels": {"aclnnAdd": 72}, "host": []}
    step = {**good, "expert": "transformer", "branches": 2, "strided": []}
    return {
        "samples": [{"name": "rope", "operator": "npu_rotary_mul", "dry": "same", "launched": []}],
        "calls": [OURS],
        "model": {"forward": good, "block": {**good, "launches": 26}, "diffusers": good},
        "video": {"ways": {"bf16": make_way(step, step)}, "decode": good},
        "mindiesd": {"adaln": True},
        "fallbacks": ["'aten::special_bessel_j0.out' will fall back"],
        "controls": {"item": ["D2H 4"]},
    } | changes


META = [
    {"chip": "a5", "name": "rope", "operator": "npu_rotary_mul", "meta": "same"},
    {"chip": "a5", "name": QUANTIZE, "operator": "npu_dynamic_quant", "meta": "same"},
]


def make_report(
    tool: Any, meta: Any = META, controls: Any = ("a: refused: b",), **changes: Any
) -> dict[str, Any]:
    schemas = {"torch_npu": {"count": 1, "different": []}}
    results = {"calls": meta, "controls": list(controls)}
    return dict(
        tool("npu.report").make(schemas=schemas, meta=results, dry={"a5": run_of_one_chip(**changes)})
    )


def test_a_report_without_problems(tool: Any) -> None:
    report = make_report(tool)
    assert report["problems"] == [] and report["accepted"] == {"a2": 0, "a3": 0, "a5": 2}
    text = tool("npu.report").text(report)
    assert "| rope                | npu_rotary_mul    | a5   | a5      |" in text and "0 problems" in text
    assert "| bf16: a forward of two layers | 72          |" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"meta": [{**META[0], "meta": "gives 1"}]}, "rope on a5: the Meta kernel gives 1"),
        ({"controls": ["a: accepted"]}, "the Meta kernels accepted a wrong call: a: accepted"),
        ({"fallbacks": ["aten::x"]}, "a5: aten::x"),
        ({"fallbacks": []}, "a5: a fall-back or a wait is not detected: [], {'item': ['D2H 4']}"),
        ({"mindiesd": {"adaln": False}}, "a5: schema of mindiesd::adaln"),
        (
            {"samples": [{"name": "r", "operator": "npu_gelu", "dry": "gives 2", "launched": []}]},
            "r on a5: the dry run gives 2",
        ),
        ({"calls": [{**OURS, "launched": ["a", "b"]}]}, f"{QUANTIZE} on a5: 2 kernels instead of 1: a, b"),
        ({"calls": [{**OURS, "host": ["D2H 1"]}]}, f"{QUANTIZE} on a5: the host waits or copies: D2H 1"),
    ],
)
def test_problems_are_reported(tool: Any, changes: dict[str, Any], expected: str) -> None:
    if "samples" in changes or "calls" in changes:
        changes = {"meta": [], **changes}
    assert expected in make_report(tool, **changes)["problems"]


def test_attention_has_its_own_table_and_limits(tool: Any) -> None:
    def call(name: str, most: int, launched: list[str], host: list[str]) -> dict[str, Any]:
        return {**OURS, "name": f"ops: attention {name}", "most": most, "launched": launched, "host": host}

    fp8 = ["aclnnQuant", "aclnnQuant", "aclnnInfer"]
    calls = [call(f"fp8, npu: {kind}", 3, fp8, []) for kind in ("self", "cross")]
    calls += [call("int8, emulated: self", 0, ["aclnnAdd"] * 50, ["H2D 4"])]
    report = make_report(tool, meta=[], calls=calls)
    assert report["problems"] == []
    rows = tool("npu.report").attention(report)
    assert "| fp8, npu       | self; cross | -  | -  | 2 Quant, Infer |" in rows
    assert "| int8, emulated | self        | -  | -  | 50 kernels     |" in rows
    calls = [call("fp8, npu: self", 2, fp8, []), call("int8, emulated: self", 0, [], ["D2H 4"])]
    assert make_report(tool, meta=[], calls=calls)["problems"] == [
        "ops: attention fp8, npu: self on a5: 3 kernels instead of 2: aclnnQuant, aclnnQuant, aclnnInfer",
        "ops: attention int8, emulated: self on a5: the host waits or copies: D2H 4",
    ]


def test_waits_and_too_many_launches_are_reported(tool: Any) -> None:
    run = run_of_one_chip()
    run["model"]["forward"] = {**run["model"]["forward"], "launches": 101}
    first, second = run["video"]["ways"]["bf16"]["steps"]
    waits = {**second, "host": ["aclrtSynchronizeStream"], "kernels": {"aclop:Conv2D": 1}}
    run["video"]["ways"]["bf16"]["steps"] = [first, waits]
    problems = make_report(tool, model=run["model"], video=run["video"])["problems"]
    assert problems == [
        "a5: forward: 101 launches, at most 100 are allowed",
        "a5: bf16, step 1: the host waits or copies: aclrtSynchronizeStream",
        "a5: bf16, step 1: aclop:Conv2D, an old kernel",
    ]


def quantized_step(expert: str, **changes: int) -> dict[str, Any]:
    """A later step of one quantized layer and two branches, without problems."""
    kernels = {"aclnnDynamicMxQuantV3": 12, "aclnnQuantMatmulV5": 12} | changes
    strided = [["aclnnRmsNorm", "s"]] * 4 + [["aclnnFlashAttentionScoreV4", "s"]] * 2
    step = {"launches": 40, "kernels": kernels, "host": [], "strided": strided}
    return step | {"expert": expert, "branches": 2}


FIRST = {"aclnnDynamicMxQuantV3": 14, "aclnnQuantMatmulV5": 14}
"""In the first step the text of each branch is quantized once, and its keys and values are one matmul."""


def test_the_quantized_loop(tool: Any) -> None:
    right = make_way(quantized_step("a", **FIRST), quantized_step("a"), quantized=True)
    loop = tool("npu.loop")
    decode: dict[str, Any] = {"host": [], "kernels": {}}
    assert list(loop.problems({"ways": {"x": right}, "decode": decode})) == []
    copied = quantized_step("a")
    copied["strided"] += [["aclnnFlashAttentionScoreV4", "s"], ["aclnnGeluV2", "s"]]
    for steps, changes, expected in (
        (
            [quantized_step("a")],
            {},
            ["step 0: 12 quantized matmuls, not 14", "step 0: 12 quantizations, not"],
        ),
        ([quantized_step("a", **FIRST)], {"texts": 3}, ["step 0: 14 quantizations, not 12 and 6 of texts"]),
        (
            [right["steps"][0], quantized_step("a", aclnnQuantMatmulV5=16)],
            {},
            ["step 1: 16 quantized matmuls"],
        ),
        ([right["steps"][0], copied], {}, ["step 1: 3 strided arguments of", "step 1: 1 strided arguments"]),
        ([quantized_step("a", **FIRST, aclnnNpuFormatCast=1)], {}, ["step 0: aclnnNpuFormatCast in the"]),
        ([], {"nz": True, "round_trip": [2]}, ["weights in format [2] after a round trip to the host"]),
        (right["steps"][:1], {"nz": True, "round_trip": [29]}, ["step 0: 0 of 14 matmuls read FRACTAL_NZ"]),
    ):
        video = {"ways": {"x": right | {"steps": steps} | changes}, "decode": decode}
        problems = list(loop.problems(video))
        assert len(problems) == len(expected), problems
        pairs = zip(expected, problems, strict=True)
        assert all(f"x, {text}" in p or f"x: {text}" in p for text, p in pairs), problems


def test_the_table_of_the_loop(tool: Any) -> None:
    way = make_way(quantized_step("a", **FIRST), quantized_step("a"), quantized=True)
    runs = {"a2": {"video": {"ways": {}}}, "a5": {"video": {"ways": {"mxfp8": way}}}}
    head, rows = tool("npu.loop").rows(runs)
    assert head[-2:] == ("launches, a2", "launches, a5")
    assert rows == [("mxfp8", "1", "7", "6 + 6", "3", "0", "no matmul", "40")]


def test_the_tables_of_a_page_are_renewed(tool: Any) -> None:
    page = "a\n<!-- dry run: loop -->\nold\n<!-- end of the table -->\nb\n"
    new = tool("npu.report").renew(page, {"dry": {"a5": run_of_one_chip()}, "calls": []})
    assert new.startswith("a\n<!-- dry run: loop -->\n| linear layers |") and new.endswith("table -->\nb\n")
    assert "old" not in new


def test_expected_differences_excuse_results_but_not_errors(tool: Any) -> None:
    for dry, count in (("gives 1", 0), ("RuntimeError: no", 1)):
        sample = {"name": "r", "operator": "mindiesd::rainfusionattention", "dry": dry, "launched": []}
        assert len(make_report(tool, meta=[], samples=[sample])["problems"]) == count


def test_schemas_are_compared_both_ways(tool: Any) -> None:
    lines = tool("npu.schemas").differences({"a": "a()", "b": "b()"}, {"b": "b(x)", "c": "c()"})
    assert lines == ["only in the twin: a()", "only in the wheel: c()", "b() is b(x)"]


# ---- the complete check -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_report() -> dict[str, Any]:
    """The report on the real packages; skipped if they are not available."""
    command = [sys.executable, str(TOOLS / "npu_conformance.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=REPO)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_nothing_differs_from_the_real_packages(real_report: dict[str, Any]) -> None:
    assert real_report["problems"] == []
    assert (
        real_report["schemas"]["torch_npu"]["count"] == 426
        and real_report["schemas"]["mindiesd"]["count"] == 16
    )


@pytest.mark.slow
def test_valid_calls_are_accepted_by_all_three(real_report: dict[str, Any]) -> None:
    assert all(count >= LEAST for count in real_report["accepted"].values()), real_report["accepted"]
    alike = {row["name"] for row in real_report["calls"] if row["meta"] == row["dry"] == "same"}
    assert {"mxfp8 matmul", "mxfp4 matmul, NZ", "w4a8 matmul", "int8 matmul", "rope", "attention"} <= alike
    assert {f"ops: {s}, NZ, bias: matmul" for s in ("int8", "mxfp8", "mxfp4", "w4a8")} <= alike


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["a2", "a3", "a5"])
def test_launches_on_the_real_dispatcher(real_report: dict[str, Any], chip: str) -> None:
    """The same counts as on the twin in `tests/model/test_npu_launches.py`."""
    run = real_report["dry"][chip]
    assert run["model"]["forward"]["launches"] == 72 and run["model"]["block"]["launches"] == 26
    assert run["model"]["diffusers"]["launches"] > 200
    kernels = run["model"]["forward"]["kernels"]
    assert kernels["aclnnRmsNorm"] == 6 and kernels["aclnnRotaryPositionEmbeddingV2"] == 4
    assert kernels["aclnnAdaLayerNormV2" if chip == "a5" else "aclnnAdaLayerNorm"] == 5
    assert len(run["video"]["ways"]) == (13 if chip == "a5" else 4)
    assert all(len(way["steps"]) == 4 for way in run["video"]["ways"].values())
    assert run["video"]["frames"] == [1, 3, 5, 64, 64]


@pytest.mark.slow
def test_the_page_has_the_tables_of_this_run(real_report: dict[str, Any], tool: Any) -> None:
    page = (REPO / "docs" / "npu-conformance.md").read_text()
    assert tool("npu.report").renew(page, real_report) == page, "run tools/npu_conformance.py --docs"


@pytest.mark.slow
def test_each_scheme_has_its_kernels(real_report: dict[str, Any]) -> None:
    launched = {(r["chip"], r["name"]): r["launched"] for r in real_report["calls"]}
    dual = "aclnnDualLevelQuantMatmulWeightNz"
    for scheme, quantizer in (
        ("int8", "aclnnDynamicQuantV2"),
        ("fp8", "aclnnDynamicQuantV2"),
        ("mxfp8", "aclnnDynamicMxQuantV3"),
        ("mxfp4", "aclnnDynamicMxQuantV3"),
        ("mxfp4_dualscale", "aclnnDynamicDualLevelMxQuant"),
        ("w4a8", "aclnnDynamicMxQuantV3"),
    ):
        nd = dual if "dual" in scheme else "aclnnQuantMatmulV5"
        for chip in ("a2", "a3", "a5") if scheme == "int8" else ("a5",):
            assert launched[chip, f"ops: {scheme}: quantize"] == [quantizer]
            assert launched[chip, f"ops: {scheme}: matmul"] == [nd]
            if scheme not in ("fp8", "mxfp4_dualscale"):  # fp8 has no NZ kernel, dual-scale has only NZ
                assert launched[chip, f"ops: {scheme}, NZ: matmul"] == ["aclnnQuantMatmulWeightNz"]
