"""The plots: every value is drawn, in colours of the page, with escaped names."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from ascendit.errors import escaped
from ascendit.pages import charts

LINK = "{http://www.w3.org/1999/xlink}href"
LAYERS = {f"blocks.{n}.{kind}": 20.0 + n for n in range(40) for kind in ("attn1.to_q", "ffn.net.2")}


def read(svg: str) -> ElementTree.Element:
    """The SVG, which must be well-formed and self-contained."""
    root = ElementTree.fromstring(svg)
    elements = list(root.iter())
    assert all(e.get(LINK, "#").startswith("#") for e in elements)
    assert not any(e.tag.endswith(("script", "image", "foreignObject")) for e in elements)
    assert charts.TEXT not in svg and charts.GRID not in svg
    assert "currentColor" in svg and "var(--line)" in svg
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(e.itertext()).strip() for e in root.iter() if e.tag.endswith("}text")]


def test_a_name_has_a_kind_and_a_depth() -> None:
    assert charts.depth_of("blocks.12.attn1.to_out.0") == ("attn1.to_out.0", 12)
    assert charts.depth_of("encoder.block.3.layer.0.q.weight") == ("encoder.layer.0.q.weight", 3)
    assert charts.depth_of("proj_out") is None and charts.depth_of("decoder.up_blocks.1.conv") is None


def test_a_curve_has_a_marker_for_every_layer() -> None:
    outside = {"proj_out": 3.0}
    root = read(charts.by_depth({"transformer": LAYERS | outside, "transformer_2": LAYERS}, "dB"))
    uses = [e.get("style", "") for e in root.iter() if e.tag.endswith("}use")]
    per_colour = [sum(f"fill: {colour}" in style for style in uses) for colour in charts.COLOURS[:2]]
    assert per_colour == [2 * 40 + 1, 2 * 40 + 1]  # and one in the legend
    assert {"transformer", "transformer_2", "attn1.to_q", "ffn.net.2", "block", "dB"} <= set(texts(root))


def test_many_kinds_share_grey() -> None:
    values = {f"blocks.{n}.layer{k}": float(k) for n in range(2) for k in range(30)}
    svg = charts.by_depth({"a": values}, "dB")
    assert all(colour in svg for colour in charts.COLOURS) and "#8b929c" in svg
    read(svg)


def test_the_grid_has_a_colour_for_each_format() -> None:
    formats = {name: "mxfp8, 8.25 bits" if "attn" in name else "bf16" for name in LAYERS}
    root = read(charts.grid({"transformer": formats}))
    assert {"mxfp8, 8.25 bits", "bf16", "attn1.to_q", "ffn.net.2"} <= set(texts(root))
    paths = [e.get("style", "") for e in root.iter() if e.tag.endswith("}path")]
    assert sum(charts.COLOURS[0] in style for style in paths) == 40 + 1  # and the legend


def test_bars_dots_and_curves() -> None:
    root = read(charts.bars({"int8": 3, "fp8": 1}, "videos", {"int8": "3 of 3", "fp8": "1 of 3"}))
    assert {"int8", "fp8", "3 of 3", "1 of 3", "videos"} <= set(texts(root))
    root = read(charts.spread({"int8": [1.0, 2.0, 2.5], "fp8": []}, "dB"))
    dots = [e for e in root.iter() if e.tag.endswith("}use") and charts.COLOURS[0] in e.get("style", "")]
    assert len(dots) == 3
    shown = texts(read(charts.curves({"a": [0.001, 0.1], "b": [0.01, 1.0]}, "L2", "step", log=True)))
    assert {"a", "b", "L2", "step", "0.01"} <= set(shown) and not any("mathdefault" in t for t in shown)
    read(charts.curves({"a": [0.0, 0.0]}, "L2", "step", log=True))


@pytest.mark.parametrize("name", ["<script>x</script>", "$x^2$", "a\x1b[31m\u202e", "\ud800", "模型 &amp;"])
def test_names_are_text(name: str) -> None:
    svg = charts.bars({name: 1.0}, "share", {name: name})
    shown = texts(read(svg))
    assert "\x1b" not in svg and "\u202e" not in svg and "\ud800" not in svg
    assert shown.count(escaped(name)) == 2


def test_equal_values_give_equal_plots() -> None:
    assert charts.by_depth({"a": LAYERS}, "dB") == charts.by_depth({"a": LAYERS}, "dB")
