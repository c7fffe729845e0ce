"""Plots of a report as SVG text, drawn by matplotlib in colours that suit a light and a dark page.

matplotlib is imported by the functions: `page.check_report_file` checks first that it is installed.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Any

from ascendit.errors import escaped
from ascendit.report import group_by

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (
    *("#4285f4", "#e8710a", "#1e9e57", "#d93a6a", "#9061c2", "#00a0a0", "#b58900", "#8a7264"),
    *("#6b8e23", "#c05ad0", "#5f7fa8", "#d2604e"),
)
MARKERS = "os^Dv<>pXPh*"
MAX_KINDS = 12
"""Curves in one plot; the others share one name."""
TEXT, GRID = "#010203", "#040506"
"""Placeholders for the colours of text and lines; the page sets them."""
WIDTH = 9.6  # inches
_BLOCK = re.compile(r"(.*?)\bblocks?\.(\d+)\.(.+)")
_IDS = re.compile(r'<g id="[^"]*">|<!--.*?-->\s*', re.DOTALL)
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ascendit",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor"), TEXT),
    "ytick.labelcolor": TEXT,
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "grid.linewidth": 0.6,
}


def import_problem() -> str:
    """The reason why matplotlib cannot be imported; "" if it can."""
    try:
        import matplotlib.backends.backend_svg
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        return str(e)
    return ""


def depth_of(name: str) -> tuple[str, int] | None:
    """(kind, number of the block) of a layer or tensor: `blocks.3.ffn.net.2` is `ffn.net.2` in block 3."""
    match = _BLOCK.fullmatch(name)
    return (match[1] + match[3], int(match[2])) if match else None


def by_depth(panels: Mapping[str, Mapping[str, float]], label: str, *, log: bool = False) -> str:
    """A curve over the blocks for each kind of layer. `panels`: title -> layer -> value.

    Layers outside the blocks have no depth, and are not in the plot.
    """
    kinds = _kinds(panels)
    with _figure(len(panels), 3.1) as (figure, axes):
        for axis, (title, values) in zip(axes, panels.items(), strict=True):
            curves = group_by(_located(values), lambda item: item[0])
            for kind, style in kinds.items():
                points = sorted((depth, value) for _, depth, value in curves.get(kind, ()))
                if points:
                    axis.plot(*zip(*points, strict=True), label=_label(kind), **style)
            axis.set(title=_label(title), ylabel=label)
            _log_scale(axis, log)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[-1].set_xlabel("block")
        _legend(figure, axes)
        return _svg(figure)


def _located(values: Mapping[str, float]) -> list[tuple[str, int, float]]:
    located = ((depth_of(name), value) for name, value in values.items())
    return [(*where, value) for where, value in located if where is not None]


def _kinds(panels: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Kind -> style of its curve, in order of occurrence; grey for all but the `MAX_KINDS` lowest."""
    lowest: dict[str, float] = {}
    for values in panels.values():
        for kind, _, value in _located(values):
            lowest[kind] = min(value, lowest.get(kind, value))
    shown = set(sorted(lowest, key=lambda kind: lowest[kind])[:MAX_KINDS])
    looks = cycle(zip(COLOURS, MARKERS, strict=True))
    common = {"linewidth": 1.1, "markersize": 3.6}
    styles = {}
    for kind in lowest:
        if kind in shown:
            colour, marker = next(looks)
            styles[kind] = {"color": colour, "marker": marker, **common}
    grey = {"color": "#8b929c", "linewidth": 0.7, "alpha": 0.6}
    return {kind: styles.get(kind, grey) for kind in lowest}


def grid(panels: Mapping[str, Mapping[str, str]]) -> str:
    """Kinds of layers over the blocks, a coloured cell for each layer. `panels`: title -> layer -> value."""
    located = {
        title: {where: text for name, text in values.items() if (where := depth_of(name)) is not None}
        for title, values in panels.items()
    }
    texts = list(dict.fromkeys(text for cells in located.values() for text in cells.values()))
    kinds = list(dict.fromkeys(kind for cells in located.values() for kind, _ in cells))
    colours = dict(zip(texts, cycle(COLOURS), strict=False))
    with _figure(len(panels), 0.7 + 0.17 * len(kinds)) as (figure, axes):
        from matplotlib.patches import Patch

        for axis, (title, cells) in zip(axes, located.items(), strict=True):
            for text, group in group_by(cells, cells.__getitem__).items():
                boxes = group_by(group, lambda where: kinds.index(where[0]))
                for row, at in boxes.items():
                    spans = [(depth - 0.46, 0.92) for _, depth in at]
                    axis.broken_barh(spans, (row - 0.42, 0.84), color=colours[text], linewidth=0)
            last = max((depth for _, depth in cells), default=0)
            axis.set(title=_label(title), ylim=(len(kinds) - 0.4, -0.6), xlim=(-0.7, last + 0.7))
            axis.set_yticks(range(len(kinds)), map(_label, kinds))
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(False)
        axes[-1].set_xlabel("block")
        patches = [Patch(color=colour, label=_label(text)) for text, colour in colours.items()]
        figure.legend(handles=patches, loc="outside right upper")
        return _svg(figure)


def bars(values: Mapping[str, float], label: str, texts: Mapping[str, str]) -> str:
    """Horizontal bars, each with a text. `values`: name -> length, `texts`: name -> text."""
    with _figure(1, 0.5 + 0.27 * len(values)) as (figure, [axis]):
        drawn = axis.barh(range(len(values)), list(values.values()), 0.66, color=COLOURS[0])
        axis.bar_label(drawn, [_label(texts[name]) for name in values], padding=4)
        axis.set_yticks(range(len(values)), map(_label, values))
        axis.set(xlabel=label, ylim=(len(values) - 0.4, -0.6))
        axis.margins(x=0.16)
        if all(isinstance(value, int) for value in values.values()):
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(False, axis="y")
        return _svg(figure)


def spread(groups: Mapping[str, Sequence[float]], label: str) -> str:
    """A row of dots for each group, one per value, with a line at their median. `groups`: name -> values."""
    with _figure(1, 0.5 + 0.3 * len(groups)) as (figure, [axis]):
        for row, values in enumerate(groups.values()):
            heights = [row + 0.2 * ((7 * i) % 11 - 5) / 5 for i in range(len(values))]
            size = (
                {"markersize": 5.0, "alpha": 0.8} if len(values) < 30 else {"markersize": 2.6, "alpha": 0.45}
            )
            axis.plot(values, heights, "o", color=COLOURS[0], markeredgewidth=0, **size)
            if values:
                axis.plot([median(values)] * 2, [row - 0.34, row + 0.34], color=COLOURS[1], linewidth=2)
        axis.set_yticks(range(len(groups)), map(_label, groups))
        axis.set(xlabel=label, ylim=(len(groups) - 0.4, -0.6))
        axis.grid(False, axis="y")
        return _svg(figure)


def curves(series: Mapping[str, Sequence[float]], label: str, x_label: str, *, log: bool = False) -> str:
    """A curve for each name over the numbers 1, 2, .."""
    looks = cycle(zip(COLOURS, MARKERS, strict=True))
    with _figure(1, 3.4) as (figure, axes):
        for (name, values), (colour, marker) in zip(series.items(), looks, strict=False):
            style = {"color": colour, "marker": marker, "markersize": 3.6, "linewidth": 1.1}
            axes[0].plot(range(1, len(values) + 1), values, label=_label(name), **style)
        axes[0].set(xlabel=x_label, ylabel=label)
        _log_scale(axes[0], log)
        axes[0].xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, axes)
        return _svg(figure)


# ---- drawing ------------------------------------------------------------------------------------


@contextmanager
def _figure(panels: int, height: float) -> Iterator[tuple[Figure, list[Any]]]:
    """A figure with panels below each other; `height` of one in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser has its own fonts
        figure = Figure((WIDTH, max(1.2, height * panels)), layout="constrained")
        yield figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def _log_scale(axis: Any, log: bool) -> None:
    """Use a logarithmic y axis with plain numbers, if `log` is set and there are positive values."""
    if not log or axis.dataLim.y1 <= 0:
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    low, high = axis.get_ylim()
    axis.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else "")


def _legend(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend for all panels, beside them, if there is more than one curve."""
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")


def _svg(figure: Figure) -> str:
    """SVG to embed, in the colours and the font of the page, without ids that another plot may have too."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(TEXT, "currentColor").replace(GRID, "var(--line)")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return _IDS.sub(lambda match: "<g>" if match[0].startswith("<g") else "", text).strip()


def _label(text: str) -> str:
    return escaped(text)
