"""The check against the real torch_npu: its parts, and at the end the whole of it."""

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
"""Right calls that twin, Meta kernels and dry run must accept alike."""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of tools/ by its name."""
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
    assert build.build([], tmp_path) == folder  # made once
    library = ctypes.CDLL(str(folder / "libopapi.so"))
    library.fake_cann_take.restype = ctypes.c_char_p
    library.aclCreateTensor.restype = ctypes.c_void_p
    return library


def test_what_a_library_needs_is_read_from_its_file(tool: Any, tmp_path: Path) -> None:
    elf = tool("fake_cann.elf")
    path = Path(_ctypes.__file__)
    if path.read_bytes()[:6] != b"\x7fELF\x02\x01":
        pytest.skip("no 64-bit ELF here")
    found = elf.read(path)
    assert {"PyErr_SetString", "PyTuple_Type"} <= found.undefined and "PyInit__ctypes" not in found.undefined
    assert any(name.startswith("libffi") for name in found.needed)
    assert "PyInit__ctypes" in found.words(rb"PyInit\w+")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ValueError, match=r"text.so is not a 64-bit little-endian ELF file"):
        elf.read(tmp_path / "text.so")


def test_names_become_functions_once(tool: Any) -> None:
    build = tool("fake_cann.build")
    text = build.generate(["aclnnAdd", "aclnnAddGetWorkspaceSize", "aclrtMalloc", "aclrtCmoAsync"])
    assert '__asm__("aclnnAdd"); int stub_0(void) { fake_cann_record("launch aclnnAdd"); return 0; }' in text
    assert '"aclnnAddGetWorkspaceSize"); int stub_1(void) {  return 0; }' in text  # no launch yet
    assert '"stub aclrtCmoAsync"' in text and "aclrtMalloc" not in text  # runtime.c has it


def test_names_that_are_put_together_later_are_there_too(tool: Any) -> None:
    build, elf = tool("fake_cann.build"), tool("fake_cann.elf")
    asks = frozenset({"aclrtFree", "_ZN3atb13CreateContextEv", "printf", "_ZN2at5empty"})
    library = elf.Library("libx.so", ("libhccl.so", "libc10.so"), asks, b"\0aclnnMulAdd\0acl\0")
    found = build.symbols([library])
    assert found == ["_ZN3atb13CreateContextEv", "aclnnMulAdd", "aclnnMulAddGetWorkspaceSize", "aclrtFree"]
    assert {"libhccl.so", "libopapi.so"} <= set(build.library_names([library]))
    assert "libc10.so" not in build.library_names([library])


def test_the_stub_copies_and_remembers(stub: ctypes.CDLL) -> None:
    memory, source = ctypes.c_void_p(), ctypes.create_string_buffer(b"abcdefgh")
    assert stub.aclrtMalloc(ctypes.byref(memory), ctypes.c_size_t(8), 0) == 0
    assert stub.aclrtMemcpy(memory, ctypes.c_size_t(8), source, ctypes.c_size_t(8), 1) == 0
    assert stub.aclrtMemcpy(memory, ctypes.c_size_t(4), source, ctypes.c_size_t(8), 1) != 0  # too small
    assert ctypes.string_at(memory, 8) == b"abcdefgh"
    stub.aclrtSynchronizeDevice()
    wanted = b"copy H2D 8\nsync aclrtMemcpy\nsync aclrtSynchronizeDevice\n"
    assert stub.fake_cann_take() == wanted and stub.fake_cann_take() == b""
    assert stub.aclrtFree(memory) == 0


def test_addresses_can_be_reserved_before_there_is_memory(stub: ctypes.CDLL) -> None:
    memory = ctypes.c_void_p()
    size = ctypes.c_size_t(1 << 36)
    assert stub.aclrtReserveMemAddress(ctypes.byref(memory), size, ctypes.c_size_t(0), None, 0) == 0
    ctypes.memset(memory.value or 0, 7, 4096)
    assert stub.aclrtReleaseMemAddress(memory) == 0


@pytest.mark.parametrize(
    ("dtype", "shape", "wanted"),
    [(2, (33, 70), (3, 3, 16, 32)), (27, (33, 70), (5, 3, 16, 16)), (2, (2, 16, 32), (2, 1, 1, 16, 32))],
)
def test_the_storage_of_an_nz_tensor(stub: ctypes.CDLL, dtype: int, shape: Any, wanted: Any) -> None:
    dims = (ctypes.c_int64 * len(shape))(*shape)
    none, zero, count = ctypes.c_void_p(), ctypes.c_int64(0), ctypes.c_uint64(len(shape))
    tensor = stub.aclCreateTensor(dims, count, dtype, none, zero, 2, none, zero, none)
    out, number, actual = ctypes.POINTER(ctypes.c_int64)(), ctypes.c_uint64(), ctypes.c_int()
    found = [ctypes.byref(x) for x in (out, number, actual)]
    stub.aclnnNpuFormatCastCalculateSizeAndFormat(ctypes.c_void_p(tensor), 29, dtype, *found)
    assert tuple(out[: number.value]) == wanted and actual.value == 29


# ---- the report ---------------------------------------------------------------------------------


TOKENS = "ops: int8: tokens"
OURS = {"name": TOKENS, "scheme": "int8", "dry": "same", "launched": ["aclnnA"], "host": []}


def a_way(*steps: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What the loop did in one way."""
    return {"quantized": False, "texts": 1, "nz": False, "layers": 1, "steps": list(steps)} | changes


def run_of_one_chip(**changes: Any) -> dict[str, Any]:
    """A dry run in which all is well, with something changed."""
    well: dict[str, Any] = {"launches": 72, "kernels": {"aclnnAdd": 72}, "host": []}
    step = {**well, "expert": "transformer", "branches": 2, "strided": []}
    return {
        "samples": [{"name": "rope", "operator": "npu_rotary_mul", "dry": "same", "launched": []}],
        "calls": [OURS],
        "model": {"forward": well, "block": {**well, "launches": 26}, "diffusers": well},
        "video": {"ways": {"bf16": a_way(step, step)}, "decode": well},
        "mindiesd": {"adaln": True},
        "fallbacks": ["'aten::special_bessel_j0.out' will fall back"],
        "controls": {"item": ["D2H 4"]},
    } | changes


META = [
    {"chip": "a5", "name": "rope", "operator": "npu_rotary_mul", "meta": "same"},
    {"chip": "a5", "name": TOKENS, "operator": "npu_dynamic_quant", "meta": "same"},
]


def made(tool: Any, meta: Any = META, controls: Any = ("a: refused: b",), **changes: Any) -> dict[str, Any]:
    schemas = {"torch_npu": {"count": 1, "different": []}}
    given = {"calls": meta, "controls": list(controls)}
    found = tool("npu.report").make(schemas=schemas, meta=given, dry={"a5": run_of_one_chip(**changes)})
    return dict(found)


def test_a_report_without_problems(tool: Any) -> None:
    found = made(tool)
    assert found["problems"] == [] and found["accepted"] == {"a2": 0, "a3": 0, "a5": 2}
    text = tool("npu.report").text(found)
    assert "| rope              | npu_rotary_mul    | a5   | a5      |" in text and "0 problems" in text
    assert "| bf16: a forward of two layers | 72          |" in text


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"meta": [{**META[0], "meta": "gives 1"}]}, "rope on a5: the Meta kernel gives 1"),
        ({"controls": ["a: accepted"]}, "the Meta kernels took a wrong call: a: accepted"),
        ({"fallbacks": ["aten::x"]}, "a5: aten::x"),
        ({"fallbacks": []}, "a5: a fall-back or a wait goes unseen: [], {'item': ['D2H 4']}"),
        ({"mindiesd": {"adaln": False}}, "a5: schema of mindiesd::adaln"),
        (
            {"samples": [{"name": "r", "operator": "npu_gelu", "dry": "gives 2", "launched": []}]},
            "r on a5: the dry run gives 2",
        ),
        ({"calls": [{**OURS, "launched": ["a", "b"]}]}, f"{TOKENS} on a5: 2 kernels instead of 1: a, b"),
        ({"calls": [{**OURS, "host": ["D2H 1"]}]}, f"{TOKENS} on a5: the host waits or copies: D2H 1"),
    ],
)
def test_what_is_wrong_is_told(tool: Any, changes: dict[str, Any], wanted: str) -> None:
    if "samples" in changes or "calls" in changes:
        changes = {"meta": [], **changes}
    assert wanted in made(tool, **changes)["problems"]


def test_a_step_that_waits_or_launches_too_much_is_told(tool: Any) -> None:
    run = run_of_one_chip()
    run["model"]["forward"] = {**run["model"]["forward"], "launches": 101}
    first, second = run["video"]["ways"]["bf16"]["steps"]
    waits = {**second, "host": ["aclrtSynchronizeStream"], "kernels": {"aclop:Conv2D": 1}}
    run["video"]["ways"]["bf16"]["steps"] = [first, waits]
    found = made(tool, model=run["model"], video=run["video"])["problems"]
    assert found == [
        "a5: forward: 101 launches, at most 100 are allowed",
        "a5: bf16, step 1: the host waits or copies: aclrtSynchronizeStream",
        "a5: bf16, step 1: aclop:Conv2D, an old kernel",
    ]


def quantized_step(expert: str, **changes: int) -> dict[str, Any]:
    """A later step of one layer and two branches on codes, all of it right."""
    kernels = {"aclnnDynamicMxQuantV3": 12, "aclnnQuantMatmulV5": 12} | changes
    strided = [["aclnnRmsNorm", "s"]] * 4 + [["aclnnFlashAttentionScoreV4", "s"]] * 2
    given = {"launches": 40, "kernels": kernels, "host": [], "strided": strided}
    return given | {"expert": expert, "branches": 2}


FIRST = {"aclnnDynamicMxQuantV3": 14, "aclnnQuantMatmulV5": 14}
"""The text of each branch is quantized once, its keys and values are one matmul."""


def test_the_loop_on_codes(tool: Any) -> None:
    right = a_way(quantized_step("a", **FIRST), quantized_step("a"), quantized=True)
    loop = tool("npu.loop")
    decode: dict[str, Any] = {"host": [], "kernels": {}}
    assert list(loop.problems({"ways": {"x": right}, "decode": decode})) == []
    copied = quantized_step("a")
    copied["strided"] += [["aclnnFlashAttentionScoreV4", "s"], ["aclnnGeluV2", "s"]]
    for steps, more, wanted in (
        ([quantized_step("a")], {}, ["step 0: 12 matmuls on codes, not 14", "step 0: 12 quantizations, not"]),
        ([quantized_step("a", **FIRST)], {"texts": 3}, ["step 0: 14 quantizations, not 12 and 6 of texts"]),
        ([right["steps"][0], quantized_step("a", aclnnQuantMatmulV5=16)], {}, ["step 1: 16 matmuls"]),
        ([right["steps"][0], copied], {}, ["step 1: 3 strided arguments of", "step 1: 1 strided arguments"]),
        ([quantized_step("a", **FIRST, aclnnNpuFormatCast=1)], {}, ["step 0: aclnnNpuFormatCast in the"]),
        ([], {"nz": True, "round_trip": [2]}, ["weights in format [2] after a way to the host and back"]),
        (right["steps"][:1], {"nz": True, "round_trip": [29]}, ["step 0: 0 of 14 matmuls read FRACTAL_NZ"]),
    ):
        video = {"ways": {"x": right | {"steps": steps} | more}, "decode": decode}
        found = list(loop.problems(video))
        assert len(found) == len(wanted), found
        assert all(f"x, {w}" in f or f"x: {w}" in f for w, f in zip(wanted, found, strict=True)), found


def test_the_table_of_the_loop(tool: Any) -> None:
    way = a_way(quantized_step("a", **FIRST), quantized_step("a"), quantized=True)
    runs = {"a2": {"video": {"ways": {}}}, "a5": {"video": {"ways": {"mxfp8": way}}}}
    head, rows = tool("npu.loop").rows(runs)
    assert head[-2:] == ("launches, a2", "launches, a5")
    assert rows == [("mxfp8", "1", "7", "6 + 6", "3", "0", "no matmul", "40")]


def test_a_page_gets_new_tables(tool: Any) -> None:
    page = "a\n<!-- dry run: loop -->\nold\n<!-- end of the table -->\nb\n"
    new = tool("npu.report").renewed(page, {"dry": {"a5": run_of_one_chip()}, "calls": []})
    assert new.startswith("a\n<!-- dry run: loop -->\n| linear layers |") and new.endswith("table -->\nb\n")
    assert "old" not in new


def test_only_a_result_is_excused_never_a_refusal(tool: Any) -> None:
    for dry, count in (("gives 1", 0), ("RuntimeError: no", 1)):
        sample = {"name": "r", "operator": "mindiesd::rainfusionattention", "dry": dry, "launched": []}
        assert len(made(tool, meta=[], samples=[sample])["problems"]) == count


def test_schemas_are_compared_both_ways(tool: Any) -> None:
    found = tool("npu.schemas").differences({"a": "a()", "b": "b()"}, {"b": "b(x)", "c": "c()"})
    assert found == ["only in the twin: a()", "only in the wheel: c()", "b() is b(x)"]


# ---- the whole ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The report on the real packages; skipped where they cannot be had."""
    command = [sys.executable, str(TOOLS / "npu_conformance.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=REPO)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_nothing_differs_from_the_real_packages(whole: dict[str, Any]) -> None:
    assert whole["problems"] == []
    assert whole["schemas"]["torch_npu"]["count"] == 426 and whole["schemas"]["mindiesd"]["count"] == 16


@pytest.mark.slow
def test_right_calls_are_accepted_by_all_three(whole: dict[str, Any]) -> None:
    assert all(count >= LEAST for count in whole["accepted"].values()), whole["accepted"]
    alike = {row["name"] for row in whole["calls"] if row["meta"] == row["dry"] == "same"}
    assert {"mxfp8 matmul", "mxfp4 matmul, NZ", "w4a8 matmul", "int8 matmul", "rope", "attention"} <= alike
    assert {f"ops: {s}, NZ, bias: matmul" for s in ("int8", "mxfp8", "mxfp4", "w4a8")} <= alike


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["a2", "a3", "a5"])
def test_launches_on_the_real_dispatcher(whole: dict[str, Any], chip: str) -> None:
    """As many as `tests/model/test_npu_launches.py` counts on the twin."""
    run = whole["dry"][chip]
    assert run["model"]["forward"]["launches"] == 72 and run["model"]["block"]["launches"] == 26
    assert run["model"]["diffusers"]["launches"] > 200
    kernels = run["model"]["forward"]["kernels"]
    assert kernels["aclnnRmsNorm"] == 6 and kernels["aclnnRotaryPositionEmbeddingV2"] == 4
    assert kernels["aclnnAdaLayerNormV2" if chip == "a5" else "aclnnAdaLayerNorm"] == 5
    assert len(run["video"]["ways"]) == (13 if chip == "a5" else 4)
    assert all(len(way["steps"]) == 4 for way in run["video"]["ways"].values())
    assert run["video"]["frames"] == [1, 3, 5, 64, 64]


@pytest.mark.slow
def test_the_page_has_the_tables_of_this_run(whole: dict[str, Any], tool: Any) -> None:
    page = (REPO / "docs" / "npu-conformance.md").read_text()
    assert tool("npu.report").renewed(page, whole) == page, "run tools/npu_conformance.py --docs"


@pytest.mark.slow
def test_each_scheme_has_its_kernels(whole: dict[str, Any]) -> None:
    seen = {(r["chip"], r["name"]): r["launched"] for r in whole["calls"]}
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
            assert seen[chip, f"ops: {scheme}: tokens"] == [quantizer]
            assert seen[chip, f"ops: {scheme}: matmul"] == [nd]
            if scheme not in ("fp8", "mxfp4_dualscale"):  # the one has no NZ form, the other nothing else
                assert seen[chip, f"ops: {scheme}, NZ: matmul"] == ["aclnnQuantMatmulWeightNz"]
