"""The report: one row for each call, the launches per scheme and chip, and the problems."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from npu import loop
from npu.calls import ATTENTION, OURS

from ascendit.device.chip import CHIPS

FORWARD, BLOCK = 100, 26
"""Limits of launches: a forward of two layers in BF16, a block with MindIE-SD's operators."""
KERNELS = {("int8_block", "a2"): 16, ("int8_block", "a3"): 16, ("int8_block", "a5"): 2}
"""(scheme, chip) -> limit of kernels that quantize an activation, where it is not 1."""
SCALAR = "H2D 4"
"""A number that torch_npu copies for `torch.where`; allowed in emulated kernels."""
CONTROL = "aten::special_bessel_j0"
"""An operator without a kernel. The dry run calls it last, to test that a fall-back is detected."""
EXPECTED = {
    "npu_rms_norm_dynamic_mx_quant": "the adapter returns an empty rstd, its Meta kernel does not",
    "npu_add_rms_norm_dynamic_mx_quant": "the adapter returns an empty rstd, its Meta kernel does not",
    "mindiesd::rainfusionattention": "the second result of the adapter has the shape and dtype of the first",
}
"""Operators whose results may differ in the dry run -> the reason. ascendit calls none of them."""


TABLE = re.compile(r"(<!-- dry run: (\w+) -->\n).*?(<!-- end of the table -->)", re.DOTALL)


def make(*, schemas: dict[str, Any], meta: dict[str, Any], dry: dict[str, Any]) -> dict[str, Any]:
    """The complete report. `problems`: one text for each, empty if there are none."""
    rows = merged(meta["calls"], dry)
    report = {"schemas": schemas, "controls": meta["controls"], "calls": rows, "dry": dry}
    return report | {"accepted": accepted(rows), "problems": list(problems(report))}


def merged(meta: Sequence[Mapping[str, str]], dry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each call and chip. `meta`, `dry`: "same" as the twin, "none" (no kernel) or a difference."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for chip, run in dry.items():
        for call in [*run["samples"], *run["calls"]]:
            row = {"chip": chip, "operators": [], **call}
            if operator := row.pop("operator", None):
                row["operators"] = [operator]
            rows[chip, call["name"]] = row
    for call in meta:
        row = rows[call["chip"], call["name"]]
        row["operators"] = list(dict.fromkeys([*row["operators"], call["operator"]]))
        row["meta"] = worse(row.get("meta", "same"), call["meta"])
    return [{"meta": "none", **row} for row in rows.values()]


def worse(a: str, b: str) -> str:
    """The worse result: a difference, then no kernel, then "same"."""
    return max(a, b, key=lambda v: {"same": 0, "none": 1}.get(v, 2))


def accepted(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Chip -> number of calls that twin, Meta kernel and dry run accept with equal results."""
    alike = [row["chip"] for row in rows if row["meta"] == row["dry"] == "same"]
    return {chip: alike.count(chip) for chip in CHIPS}


def problems(report: Mapping[str, Any]) -> Iterator[str]:
    """One line for each problem."""
    for package, result in report["schemas"].items():
        yield from (f"schema of {package}: {line}" for line in result["different"])
    yield from (
        f"the Meta kernels accepted a wrong call: {c}" for c in report["controls"] if "refused" not in c
    )
    for row in report["calls"]:
        where = f"{row['name']} on {row['chip']}"
        if row["meta"] not in ("same", "none"):
            yield f"{where}: the Meta kernel {row['meta']}"
        excused = row["dry"].startswith("gives") and set(row["operators"]) & set(EXPECTED)
        if row["dry"] != "same" and not excused:
            yield f"{where}: the dry run {row['dry']}"
        yield from (f"{where}: {line}" for line in _call_problems(row))
    for chip, run in report["dry"].items():
        yield from (f"{chip}: {line}" for line in _run_problems(run))


def _call_problems(row: Mapping[str, Any]) -> Iterator[str]:
    """Calls in the loop must not wait; a quantization and a quantized matmul are one kernel, or `KERNELS`."""
    if not row["name"].startswith(OURS) or row["dry"] != "same" or ": weight" in row["name"]:
        return
    host = [line for line in row["host"] if row.get("most") != 0 or line != SCALAR]
    if host:
        yield f"the host waits or copies: {', '.join(host)}"
    most = row.get("most")
    if most is None:
        most = 3 if row["scheme"] == "bf16" else KERNELS.get((row["scheme"], row["chip"]), 1)
        most = 1 if ": matmul" in row["name"] else most + (", smoothed" in row["name"])
    if len(row["launched"]) > (most or len(row["launched"])):
        yield f"{len(row['launched'])} kernels instead of {most}: {', '.join(row['launched'])}"


def _run_problems(run: Mapping[str, Any]) -> Iterator[str]:
    """Problems of a complete model on one chip."""
    control = [line for line in run["fallbacks"] if CONTROL in line]
    yield from (line for line in run["fallbacks"] if line not in control)
    if not control or not run["controls"]["item"]:
        yield f"a fall-back or a wait is not detected: {control}, {run['controls']}"
    yield from (f"schema of mindiesd::{name}" for name, same in run["mindiesd"].items() if not same)
    for part, most in (("forward", FORWARD), ("block", BLOCK)):
        if (count := run["model"][part]["launches"]) > most:
            yield f"{part}: {count} launches, at most {most} are allowed"
        if run["model"][part]["host"]:
            yield f"{part}: the host waits or copies: {', '.join(run['model'][part]['host'])}"
    yield from loop.problems(run["video"])


# ---- as text ------------------------------------------------------------------------------------


def text(report: Mapping[str, Any]) -> str:
    """The report as text."""
    lines = [f"{p}: {s['count']} schemas, {len(s['different'])} differ" for p, s in report["schemas"].items()]
    lines += ["", *table(("call", "operators", "Meta", "dry run", "kernels of the last chip"), _rows(report))]
    total = report["accepted"]
    counts = ", ".join(f"{n} on {chip}" for chip, n in total.items())
    lines += ["", f"accepted by twin, Meta kernels and dry run: {sum(total.values())} calls ({counts})"]
    lines += ["", *launches(report), "", *attention(report), "", *table(*loop.rows(report["dry"])), ""]
    excused = {r["operators"][0] for r in report["calls"] if r["dry"] != "same"} & set(EXPECTED)
    lines += [f"expected: {name}: {EXPECTED[name]}" for name in sorted(excused)]
    lines += [f"control: {line}" for line in report["controls"]]
    return "\n".join(
        [*lines, *(f"WRONG {p}" for p in report["problems"]), f"{len(report['problems'])} problems"]
    )


def _rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    names = list(dict.fromkeys(row["name"] for row in report["calls"]))
    rows = []
    for name in names:
        calls = [row for row in report["calls"] if row["name"] == name]
        marks = (" ".join(_mark(row, part) for row in calls) for part in ("meta", "dry"))
        operators = ", ".join(calls[-1]["operators"]) or "aten"
        kernels = ", ".join(k.removeprefix("aclnn") for k in calls[-1]["launched"])
        rows.append((name, operators, *marks, kernels))
    return rows


def _mark(row: Mapping[str, Any], part: str) -> str:
    """The chip for "same", `-` for no kernel, `!` and the chip for a difference."""
    if row[part] == "none":
        return " -"
    return row["chip"] if row[part] == "same" else f"!{row['chip']}"


def launches(report: Mapping[str, Any]) -> list[str]:
    """Kernels per scheme and chip, as a Markdown table."""
    runs = report["dry"]
    rows: list[tuple[str, ...]] = []
    for part, label in (
        ("forward", "bf16: a forward of two layers"),
        ("diffusers", "bf16: the same by Diffusers"),
        ("block", "bf16: a block of it"),
    ):
        rows.append((label, *(str(run["model"][part]["launches"]) for run in runs.values())))
    decode = (run["video"]["decode"] for run in runs.values())
    rows.append(("decoding by the demo's VAE", *(f"{d['launches']}, {len(d['host'])} waits" for d in decode)))
    names = [r["name"] for r in report["calls"] if r["name"].endswith((": quantize", ": matmul"))]
    for name in dict.fromkeys(n for n in names if "bias" not in n):
        kernels = {
            r["chip"]: f"{len(r['launched'])} of PyTorch"
            if len(r["launched"]) > 3
            else "+".join(k.removeprefix("aclnn") for k in r["launched"])
            for r in report["calls"]
            if r["name"] == name
        }
        rows.append((name.removeprefix(OURS), *(kernels.get(chip, "no matmul") for chip in runs)))
    return list(table(("launches", *runs), rows))


def attention(report: Mapping[str, Any]) -> list[str]:
    """Kernels of each attention on each chip, as a Markdown table; calls with equal kernels share a row."""
    by_name: dict[str, dict[str, str]] = {}
    for row in report["calls"]:
        if row["name"].startswith(OURS + ATTENTION):
            by_name.setdefault(row["name"], {})[row["chip"]] = _launched(row)
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, launched in by_name.items():
        kernel, _, kind = name.removeprefix(f"{OURS}{ATTENTION} ").partition(": ")
        kinds.setdefault((kernel, *(launched.get(chip, "-") for chip in CHIPS)), []).append(kind)
    rows = [(kernel, "; ".join(names), *cells) for (kernel, *cells), names in kinds.items()]
    return list(table((ATTENTION, "calls", *CHIPS), rows))


def _launched(row: Mapping[str, Any]) -> str:
    """`3 DynamicMxQuantV3, FusedInferAttentionScoreV5`; the number of kernels if it has no limit."""
    if row.get("most") == 0:
        return f"{len(row['launched'])} kernels"
    counts = Counter(k.removeprefix("aclnn") for k in row["launched"])
    return ", ".join(f"{n} {kernel}" if n > 1 else kernel for kernel, n in counts.items())


def renew(page: str, report: Mapping[str, Any]) -> str:
    """`page` with renewed tables, each from `<!-- dry run: NAME -->` to `<!-- end of the table -->`."""
    tables = {
        "launches": launches(report),
        "attention": attention(report),
        "loop": table(*loop.rows(report["dry"])),
    }
    lines = {name: "".join(f"{line}\n" for line in rows) for name, rows in tables.items()}
    return TABLE.sub(lambda m: f"{m[1]}{lines[m[2]]}{m[3]}", page)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Markdown with aligned columns."""
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
    for row in (head, ["-" * w for w in widths], *rows):
        yield "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
