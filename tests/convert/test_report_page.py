"""The HTML report of `quantize`: the values in its tables, and escaped names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ascendit.convert.report import QuantizedExpert, QuantizeReport, StoredLayer
from ascendit.convert.report_page import quantize_page
from ascendit.pages import charts

EXPERT = QuantizedExpert(
    name="transformer",
    schemes={"mxfp8": 80, "bf16": 6},
    kept={},
    bytes_before=3 << 20,
    bytes_after=3 << 19,
    num_weights=3 << 19,
)
REPORT = QuantizeReport(
    path=Path("out"),
    source="org/name",
    recipe="default",
    model_kind="t2v",
    experts=(EXPERT,),
    dry_run=False,
    seconds=2.0,
)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plots, which take seconds, have tests of their own."""
    for name in ("bars", "by_depth", "grid"):
        monkeypatch.setattr(charts, name, lambda *args: f"<svg>{len(args)}</svg>")


def test_the_page_of_quantize() -> None:
    evil = "<b>blocks</b>"
    sqnr = {f"blocks.{n}.attn1.to_q": 30.0 - n for n in range(12)}
    stored = {name: StoredLayer("mxfp8", 8.25) for name in sqnr} | {"proj_out": StoredLayer("bf16", 16.0)}
    expert = replace(EXPERT, sqnr=sqnr, stored=stored, kept={evil: ("proj_out",)})
    report = replace(REPORT, experts=(expert,), recipe=evil, source=evil)
    text = quantize_page(report).markup()
    assert evil not in text and text.count("&lt;b&gt;blocks&lt;/b&gt;") == 3
    worst = text.partition("The 10 worst layers of transformer")[2].partition("</table>")[0]
    rows = re.findall(r"<td>(.*?)</td><td>(.*?)</td><td class='n'>(.*?)</td>", worst)
    assert rows == [
        (f"blocks.{n}.attn1.to_q", "mxfp8, 8.25 bits", f"{30 - n:.2f} dB") for n in range(11, 1, -1)
    ]
    assert "<td>proj_out</td><td>bf16</td><td class='n'>16.00</td><td class='n'>-</td>" in text
    assert "3.0 MiB" in text and "1.5 MiB" in text and "24.50 dB" in text  # the mean


def test_a_page_without_measurements_has_no_plot_of_them() -> None:
    text = quantize_page(REPORT).markup()
    assert "SQNR of the weights" not in text and "Formats" in text
