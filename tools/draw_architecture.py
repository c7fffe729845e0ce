"""Draw the pictures of README.md and docs/architecture.md.

    python tools/draw_architecture.py            # write docs/images/architecture.svg and overview.svg
    python tools/draw_architecture.py --check    # write nothing; exit code 1 and the stale pictures

`architecture.svg` is drawn from the imports of src/ascendit: a row for each folder in import order, and a dot
for each folder that it imports. `overview.svg` is laid out by hand. The output depends on the sources only.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SRC = REPO / "src" / "ascendit"
IMAGES = REPO / "docs" / "images"

GROUPS: dict[str, dict[str, str]] = {
    "facts": {
        "basics": "error codes, environment, progress, reports",
        "family": "the Wan models: sizes, frames, defaults",
        "names": "tensor and layer names, Diffusers' and original",
    },
    "numbers and precision": {
        "native": "build and cache of the C++ sources",
        "mx": "number formats, scale rules, encoders",
        "schedule": "precision of each denoising step",
        "quant": "schemes, recipes, fused layers, engines",
        "geometry": "pixels to latents to tokens",
    },
    "disk": {
        "checkpoint": "folders, headers, manifest: read and write",
        "pages": "report files: JSON and HTML with plots",
        "weights": "a transformer as a stream of tensors; LoRA",
        "convert": "quantize and repack",
    },
    "hardware": {
        "device": "devices and chips as data",
        "kernels": "operators in PyTorch and C++; the reference",
        "twin": "NPU operators on CPU tensors",
        "ops": "kernels of CUDA and NPU; the choice of a kernel",
        "attention": "which kernel when; quantized attention; measuring",
    },
    "model": {
        "model": "the Wan transformer, its layers and loader",
        "vae": "latents to pixels, by Diffusers",
        "text": "prompts to embeddings, by transformers",
    },
    "run": {"pipeline": "request, solver, loop, video"},
    "questions": {
        "demo": "scenes of the demo model, and their judge",
        "inspect": "contents of a checkpoint",
        "doctor": "readiness of this machine",
        "verify": "quality of the videos",
    },
    "outside": {
        "integrations": "the bridge into Diffusers",
        "cli": "one file for each command",
    },
}
"""Group -> folder -> its subject. All folders together are in import order."""

FOLDERS = [row for rows in GROUPS.values() for row in rows]
LIGHT = ("#2563eb", "#7c3aed", "#0f766e", "#c2410c", "#be185d", "#15803d", "#a16207", "#475569")
DARK = ("#60a5fa", "#a78bfa", "#2dd4bf", "#fb923c", "#f472b6", "#4ade80", "#facc15", "#94a3b8")
FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"


def row_of(module: str) -> str:
    """`mx` for ascendit.mx.codec, `basics` for ascendit.errors and other files without a row of their own."""
    name = module.partition(".")[2].partition(".")[0]
    return name if name in FOLDERS or (SRC / name).is_dir() else "basics"


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, including imports in functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_rows() -> dict[str, set[str]]:
    """Row -> the other rows that it imports."""
    edges: dict[str, set[str]] = {row: set() for row in FOLDERS}
    for path in sorted(SRC.rglob("*.py")):
        row = row_of(".".join(path.relative_to(SRC.parent).with_suffix("").parts))
        if path.parent == SRC and path.stem.startswith("__") or not path.stat().st_size:
            continue  # the list of public names; empty files
        assert row in edges, f"{row}: add it to GROUPS in tools/draw_architecture.py"
        targets = {row_of(name) for name in imported(path) if name.startswith("ascendit.")}
        edges[row] |= targets & set(FOLDERS) - {row}
    return edges


# ---- SVG ----------------------------------------------------------------------------------------


def text(x: float, y: float, content: str, style: str = "", **more: str) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:g}" y="{y:g}" class="{style}"{attributes}>{escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, style: str, radius: float = 6) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" class="{style}"/>'
    )


def picture(width: float, height: float, title: str, parts: list[str]) -> str:
    """An SVG with its own background, in the colours of the reader's light or dark mode."""

    def colours(group: tuple[str, ...], page: str, ink: str, soft: str, line: str) -> str:
        fills = "".join(f".g{i}{{fill:{c}}}.s{i}{{stroke:{c}}}" for i, c in enumerate(group))
        inks = f".page{{fill:{page};stroke:{line}}}.ink{{fill:{ink}}}.soft{{fill:{soft}}}"
        lines = f".line{{stroke:{line}}}.flow{{stroke:{soft}}}.head{{fill:{soft}}}.on{{fill:{page}}}"
        return fills + inks + lines

    style = (
        f"text{{font-family:{FONT};font-size:13px}}.bold{{font-weight:600}}.small{{font-size:12px}}"
        ".mono{font-family:ui-monospace,'SF Mono',Menlo,'DejaVu Sans Mono',monospace}"
        ".end{text-anchor:end}.mid{text-anchor:middle}.tint{fill-opacity:.1}.open{fill:none;stroke-width:1.5}"
        + colours(LIGHT, "#ffffff", "#1f2328", "#59636e", "#d1d9e0")
        + f"@media(prefers-color-scheme:dark){{{colours(DARK, '#151b23', '#f0f6fc', '#9198a1', '#3d444d')}}}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
    lines = [f'{head} height="{height:g}" role="img">', f"<title>{escape(title)}</title>"]
    lines += [f"<style>{style}</style>", box(0.5, 0.5, width - 1, height - 1, "page", 10)]
    return "\n".join([*lines, *parts, "</svg>\n"])


# ---- the folders --------------------------------------------------------------------------------

ROW, GAP, CELL = 23, 7, 20
TOP, GROUP, NAME, SUBJECT, MATRIX = 118, 20, 126, 232, 552


def draw_architecture() -> str:
    """A row for each folder; dots at the folders that it imports. All dots are left of the diagonal."""
    edges = import_rows()
    rows = [(i, row, subject) for i, group in enumerate(GROUPS.values()) for row, subject in group.items()]
    column = {row: MATRIX + CELL * j + CELL / 2 for j, (_, row, _) in enumerate(rows)}
    parts = [text(GROUP, 36, "src/ascendit in import order", "ink bold")]
    parts += [text(GROUP, 58, "A dot: this folder imports the one named above the column.", "soft small")]
    parts += [text(GROUP, 76, "A folder imports only folders above it, so no dot is right", "soft small")]
    parts += [text(GROUP, 94, "of the filled squares.", "soft small")]
    y, last = float(TOP), -1
    for i, row, subject in rows:
        if i != last:
            y += GAP if last >= 0 else 0
            name, count = list(GROUPS.items())[i]
            height = ROW * len(count)
            parts.append(box(12, y, MATRIX + CELL * len(rows), height, f"g{i} tint"))
            halves = name.split(" and ") if len(name) > 12 else [name]
            lines = [f"{halves[0]} and", halves[1]] if len(halves) > 1 else halves
            parts += [text(GROUP, y + 16 + 15 * n, line, f"g{i} small bold") for n, line in enumerate(lines)]
            last = i
        middle, x = y + ROW / 2, column[row]
        parts.append(text(NAME, middle + 4, row, "ink bold mono"))
        parts.append(text(SUBJECT, middle + 4, subject, "soft small"))
        parts.append(box(x - 7, middle - 7, 14, 14, f"g{i}", 3))
        for group, target, _ in rows:
            if target in edges[row]:
                parts.append(f'<circle cx="{column[target]:g}" cy="{middle:g}" r="4.5" class="g{group}"/>')
        rotation = f"rotate(-60 {x:g} {TOP - 8})"
        parts.append(text(x, TOP - 8, row, "ink small mono", transform=rotation))
        y += ROW
    return picture(MATRIX + CELL * len(rows) + 36, y + 14, "The folders of ascendit and their imports", parts)


# ---- the overview -------------------------------------------------------------------------------


def card(x: float, y: float, width: float, group: int, title: str, *lines: str) -> list[str]:
    height = 34 + 17 * len(lines)
    parts = [box(x, y, width, height, f"g{group} tint", 8), box(x, y, width, height, f"s{group} open", 8)]
    parts.append(text(x + 14, y + 23, title, f"g{group} bold"))
    return parts + [text(x + 14, y + 42 + 17 * n, line, "ink small") for n, line in enumerate(lines)]


def arrow(points: str, label: str, x: float, y: float, style: str = "mid") -> list[str]:
    line = f'<path d="{points}" class="flow open" marker-end="url(#head)"/>'
    return [line, text(x, y, label, f"ink small mono bold {style}")] if label else [line]


def draw_overview() -> str:
    """From a checkpoint to a video, and the command of each arrow."""
    marker = '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    parts = [f'{marker}orient="auto"><path d="M0 0L8 4L0 8z" class="head"/></marker></defs>']
    parts += card(24, 66, 202, 0, "Wan checkpoint", "Diffusers or original names", "BF16 or FP32, LoRA files")
    exports = ("msModelSlim, vLLM-Omni,", "SGLang, FP8 tiles")
    parts += card(24, 204, 202, 0, "Quantized export", *exports)
    stored = ("MXFP8, MXFP4, INT8, FP8", "Diffusers layout", "manifest of every tensor")
    parts += card(352, 118, 202, 2, "One quantized folder", *stored)
    parts += card(700, 66, 216, 5, "Video", "mp4, webm, gif or png frames", "the request beside it")
    parts += card(700, 258, 216, 6, "Other engines", "vLLM-Omni, SGLang,", "MindIE-SD")
    parts += arrow("M226 100C290 100 290 144 346 144", "quantize", 282, 88)
    parts += arrow("M226 238C290 238 290 178 346 178", "repack", 282, 256)
    parts += arrow("M554 152C630 152 630 112 694 112", "generate", 626, 172)
    parts += arrow("M554 186C630 186 630 292 694 292", "repack --for", 610, 292)
    parts += arrow("M125 66C125 26 210 26 300 26L620 26C740 26 808 26 808 60", "", 0, 0)
    parts += [
        text(452, 46, "generate: as stored, or quantized while loading (--scheme)", "ink small mono mid")
    ]
    parts += [text(453, 228, "inspect: contents, checks, engines", "soft small mono mid")]
    parts += [text(808, 152, "verify: is it right?", "soft small mono mid")]
    for n, (device, subject) in enumerate(DEVICES):
        x = 24 + 226 * n
        parts += [box(x, 362, 214, 34, "g3 tint", 8), text(x + 12, 384, device, "g3 bold mono small")]
        parts += [text(x + 202, 384, subject, "ink small end")]
    parts.append(
        text(24, 350, "generate runs on any of these, with the same noise from the same seed:", "soft small")
    )
    return picture(940, 418, "From a checkpoint to a video with ascendit", parts)


DEVICES = (
    ("cpu", "any machine"),
    ("cuda", "NVIDIA card"),
    ("npu", "Ascend card"),
    ("twin:a5", "Ascend on a CPU"),
)
PICTURES: dict[str, Callable[[], str]] = {
    "architecture.svg": draw_architecture,
    "overview.svg": draw_overview,
}


def stale_pictures() -> dict[Path, str]:
    """Files that are absent or differ from the sources -> their new content."""
    new = {IMAGES / name: draw() for name, draw in PICTURES.items()}
    return {p: svg for p, svg in new.items() if not p.exists() or p.read_text(encoding="utf-8") != svg}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if a picture is stale"
    )
    check = parser.parse_args().check
    stale = stale_pictures()
    for path, svg in stale.items():
        print(path.relative_to(REPO), "is stale" if check else "written")
        if not check:
            path.write_text(svg, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
