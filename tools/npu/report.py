"""The report: one row for each call, the launches per scheme and chip, and what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from npu import loop
from npu.calls import OURS

from ascendit.device.chip import CHIPS

FORWARD, BLOCK = 100, 26
"""At most so many launches: a forward of two layers in BF16, a block with MindIE-SD's operators."""
CONTROL = "aten::special_bessel_j0"
"""Without a kernel: the dry run calls it last, to see that a fall-back is seen."""
KNOWN = {
    "npu_rms_norm_dynamic_mx_quant": "the adapter gives rstd empty, its Meta kernel does not",
    "npu_add_rms_norm_dynamic_mx_quant": "the adapter gives rstd empty, its Meta kernel does not",
    "mindiesd::rainfusionattention": "the adapter gives the second result the shape and dtype of the first",
}
"""Operators whose results differ in the dry run, and why that may be. ascendit calls none of them."""


PLACE = re.compile(r"(<!-- dry run: (\w+) -->\n).*?(<!-- end of the table -->)", re.DOTALL)


def make(*, schemas: dict[str, Any], meta: dict[str, Any], dry: dict[str, Any]) -> dict[str, Any]:
    """Everything in one, with `problems`: what is wrong, nothing if all is well."""
    rows = merged(meta["calls"], dry)
    found = {"schemas": schemas, "controls": meta["controls"], "calls": rows, "dry": dry}
    return found | {"accepted": accepted(rows), "problems": list(problems(found))}


def merged(meta: Sequence[Mapping[str, str]], dry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each call and chip. `meta`, `dry`: "same" as the twin, "none" (no kernel), or not."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for chip, one in dry.items():
        for call in [*one["samples"], *one["calls"]]:
            row = {"chip": chip, "operators": [], **call}
            if operator := row.pop("operator", None):
                row["operators"] = [operator]
            rows[chip, call["name"]] = row
    for one in meta:
        row = rows[one["chip"], one["name"]]
        row["operators"] = list(dict.fromkeys([*row["operators"], one["operator"]]))
        row["meta"] = worse(row.get("meta", "same"), one["meta"])
    return [{"meta": "none", **row} for row in rows.values()]


def worse(a: str, b: str) -> str:
    """A difference before no kernel before the same."""
    return max(a, b, key=lambda v: {"same": 0, "none": 1}.get(v, 2))


def accepted(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Chip -> calls that twin, Meta kernel and dry run accept alike."""
    alike = [row["chip"] for row in rows if row["meta"] == row["dry"] == "same"]
    return {chip: alike.count(chip) for chip in CHIPS}


def problems(found: Mapping[str, Any]) -> Iterator[str]:
    """One line for each thing that is wrong."""
    for package, one in found["schemas"].items():
        yield from (f"schema of {package}: {line}" for line in one["different"])
    yield from (f"the Meta kernels took a wrong call: {c}" for c in found["controls"] if "refused" not in c)
    for row in found["calls"]:
        where = f"{row['name']} on {row['chip']}"
        if row["meta"] not in ("same", "none"):
            yield f"{where}: the Meta kernel {row['meta']}"
        known = row["dry"].startswith("gives") and set(row["operators"]) & set(KNOWN)
        if row["dry"] != "same" and not known:
            yield f"{where}: the dry run {row['dry']}"
        yield from (f"{where}: {line}" for line in _call_problems(row))
    for chip, one in found["dry"].items():
        yield from (f"{chip}: {line}" for line in _run_problems(one))


def _call_problems(row: Mapping[str, Any]) -> Iterator[str]:
    """What the loop calls waits for nothing, and codes are one kernel to make, one to multiply."""
    if not row["name"].startswith(OURS) or row["dry"] != "same" or ": weight" in row["name"]:
        return
    if row["host"]:
        yield f"the host waits or copies: {', '.join(row['host'])}"
    most = 3 if row["scheme"] == "bf16" else 2 if ": smoothed" in row["name"] else 1
    if len(row["launched"]) > most:
        yield f"{len(row['launched'])} kernels instead of {most}: {', '.join(row['launched'])}"


def _run_problems(one: Mapping[str, Any]) -> Iterator[str]:
    """Of a whole model on one chip."""
    control = [line for line in one["fallbacks"] if CONTROL in line]
    yield from (line for line in one["fallbacks"] if line not in control)
    if not control or not one["controls"]["item"]:
        yield f"a fall-back or a wait goes unseen: {control}, {one['controls']}"
    yield from (f"schema of mindiesd::{name}" for name, same in one["mindiesd"].items() if not same)
    for part, most in (("forward", FORWARD), ("block", BLOCK)):
        if (count := one["model"][part]["launches"]) > most:
            yield f"{part}: {count} launches, at most {most} are allowed"
        if one["model"][part]["host"]:
            yield f"{part}: the host waits or copies: {', '.join(one['model'][part]['host'])}"
    yield from loop.problems(one["video"])


# ---- as text ------------------------------------------------------------------------------------


def text(found: Mapping[str, Any]) -> str:
    """What the tool prints."""
    lines = [f"{p}: {s['count']} schemas, {len(s['different'])} differ" for p, s in found["schemas"].items()]
    lines += ["", *table(("call", "operators", "Meta", "dry run", "kernels of the last chip"), _rows(found))]
    total = found["accepted"]
    counts = ", ".join(f"{n} on {chip}" for chip, n in total.items())
    lines += ["", f"accepted by twin, Meta kernels and dry run alike: {sum(total.values())} calls ({counts})"]
    lines += ["", *launches(found), "", *table(*loop.rows(found["dry"])), ""]
    known = {r["operators"][0] for r in found["calls"] if r["dry"] != "same"} & set(KNOWN)
    lines += [f"known: {name}: {KNOWN[name]}" for name in sorted(known)]
    lines += [f"control: {line}" for line in found["controls"]]
    return "\n".join(
        [*lines, *(f"WRONG {p}" for p in found["problems"]), f"{len(found['problems'])} problems"]
    )


def _rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    names = list(dict.fromkeys(row["name"] for row in found["calls"]))
    rows = []
    for name in names:
        of = [row for row in found["calls"] if row["name"] == name]
        marks = (" ".join(_mark(row, part) for row in of) for part in ("meta", "dry"))
        operators = ", ".join(of[-1]["operators"]) or "aten"
        rows.append((name, operators, *marks, ", ".join(k.removeprefix("aclnn") for k in of[-1]["launched"])))
    return rows


def _mark(row: Mapping[str, Any], part: str) -> str:
    """The chip where it is the same, `-` where there is no kernel, `!` and the chip where it differs."""
    if row[part] == "none":
        return " -"
    return row["chip"] if row[part] == "same" else f"!{row['chip']}"


def launches(found: Mapping[str, Any]) -> list[str]:
    """Kernels per scheme and chip, as a Markdown table."""
    runs = found["dry"]
    rows: list[tuple[str, ...]] = []
    for part, words in (
        ("forward", "bf16: a forward of two layers"),
        ("diffusers", "bf16: the same by Diffusers"),
        ("block", "bf16: a block of it"),
    ):
        rows.append((words, *(str(one["model"][part]["launches"]) for one in runs.values())))
    decode = (one["video"]["decode"] for one in runs.values())
    rows.append(("decoding by the demo's VAE", *(f"{d['launches']}, {len(d['host'])} waits" for d in decode)))
    names = [r["name"] for r in found["calls"] if r["name"].endswith((": tokens", ": matmul"))]
    for name in dict.fromkeys(n for n in names if "bias" not in n):
        of = {
            r["chip"]: "+".join(k.removeprefix("aclnn") for k in r["launched"])
            for r in found["calls"]
            if r["name"] == name
        }
        rows.append((name.removeprefix(OURS), *(of.get(chip, "no matmul") for chip in runs)))
    return list(table(("launches", *runs), rows))


def renewed(page: str, found: Mapping[str, Any]) -> str:
    """A page with its tables made new, each from `<!-- dry run: NAME -->` to `<!-- end of the table -->`."""
    made = {"launches": launches(found), "loop": table(*loop.rows(found["dry"]))}
    lines = {name: "".join(f"{line}\n" for line in of) for name, of in made.items()}
    return PLACE.sub(lambda m: f"{m[1]}{lines[m[2]]}{m[3]}", page)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Markdown with aligned columns."""
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
    for row in (head, ["-" * w for w in widths], *rows):
        yield "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
