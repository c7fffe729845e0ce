"""Write the tables of README.md and docs/ from the code, so that no page tells an old default or flag.

    python tools/docs_tables.py            # renews the tables
    python tools/docs_tables.py --check    # changes nothing; exit code 1 and the names of stale pages

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; its name is a key of `TABLES`.
A test runs the check.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from ascendit.errors import CODES, AscenditError
from ascendit.pipeline import world
from ascendit.spec import SPECS, Size, WanSpec

REPO = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---- the Wan family -----------------------------------------------------------------------------


def size_text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def guidance_text(spec: WanSpec) -> str:
    high, low = spec.guidance_scale, spec.guidance_scale_2
    return f"{high:g}" if low is None else f"{high:g} / {low:g}"


def shift_text(spec: WanSpec) -> str:
    """`5; 3 at 832x480, 480x832`."""
    shifts: dict[float, list[str]] = {}
    for size, shift in spec.flow_shift_by_size.items():
        shifts.setdefault(shift, []).append(size_text(size))
    return "; ".join(
        [f"{spec.flow_shift:g}", *(f"{s:g} at {', '.join(sizes)}" for s, sizes in shifts.items())]
    )


def boundary_text(spec: WanSpec) -> str:
    return "-" if spec.boundary_ratio is None else f"{spec.boundary_ratio:g}"


def defaults_table() -> str:
    head = ("model", "input", "size", "frames", "fps", "steps", "shift", "guidance", "boundary")
    words = {"t2v": "text", "i2v": "image + text", "ti2v": "text, image optional"}
    return table(
        head,
        (
            (s.name, words[s.task], size_text(s.sizes[0]), s.num_frames, s.fps, s.num_inference_steps)
            + (shift_text(s), guidance_text(s), boundary_text(s))
            for s in SPECS.values()
        ),
    )


def shapes_table() -> str:
    head = ("model", "experts", "width", "layers", "channels in / out", "sizes", "size multiple")
    return table(
        head,
        (
            (s.name, s.num_experts, s.dim, s.num_layers, f"{s.in_channels} / {s.out_channels}")
            + (", ".join(map(size_text, s.sizes)), s.size_multiple)
            for s in SPECS.values()
        ),
    )


# ---- errors -------------------------------------------------------------------------------------


def codes_table() -> str:
    return table(("code", "meaning"), ((f'<a id="{c.lower()}"></a>`{c}`', text) for c, text in CODES.items()))


def classes(base: type[AscenditError] = AscenditError) -> Iterator[type[AscenditError]]:
    yield base
    for child in base.__subclasses__():
        yield from classes(child)


def exits_table() -> str:
    rows: list[tuple[int, str, str]] = [(0, "-", "Done.")]
    rows += sorted(
        (c.exit_code, f"`{c.__name__}`", (c.__doc__ or "").splitlines()[0])
        for c in classes()
        if c is not AscenditError and c.__module__ == "ascendit.errors"
    )
    return table(("exit code", "class", "meaning"), rows)


# ---- the command line ---------------------------------------------------------------------------


def command(name: str) -> Any:
    """The click command `ascendit NAME`, or `ascendit` itself."""
    import typer.main

    from ascendit.cli.main import app

    group: Any = typer.main.get_command(app)
    return group.commands[name] if name else group


def flags_table(name: str) -> str:
    def row(param: Any) -> tuple[str, str]:
        names = ", ".join(f"`{opt}`" for opt in param.opts)
        value = f" `{param.metavar}`" if param.metavar else ""
        default = f" Default {param.default}." if isinstance(param.default, int) and param.default > 1 else ""
        return escape(f"{names}{value}"), escape(f"{param.help}{default}")

    params = command(name).params
    return table(("flag", "meaning"), (row(p) for p in params if p.param_type_name == "option"))


def commands_table() -> str:
    return table(
        ("command", "does"), ((f"`ascendit {n}`", summary(c)) for n, c in command("").commands.items())
    )


def summary(cmd: Any) -> str:
    return escape(cmd.help.split("\n")[0])


def escape(text: str) -> str:
    """`text` so that Markdown shows it as it is, inside a table too."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def settings_table() -> str:
    """What `--set` and `--config` know."""
    from ascendit.cli.options import known

    return table(("key", "value"), ((f"`{key}`", value_text(hint)) for key, hint in known().items()))


def value_text(hint: Any) -> str:
    """A type in words: `int | None` is a whole number."""
    kinds = (
        [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    )
    if get_origin(kinds[0]) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(kinds[0]))
    words = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", tuple: "numbers"}
    return words[get_origin(kinds[0]) or kinds[0]]


# ---- the demo's world ---------------------------------------------------------------------------


def world_table() -> str:
    rows = {
        "colour": world.COLOURS,
        "shape": world.SHAPES,
        "direction": world.DIRECTIONS,
        "background": world.BACKGROUNDS,
        "wording": world.WORDINGS,
    }

    def text(words: Iterable[str], mark: str) -> str:
        return ", ".join(f"{mark}{w}{mark}" for w in words)

    return table(
        ("part", "count", "words"),
        ((part, len(words), text(words, "`" if part == "wording" else "")) for part, words in rows.items()),
    )


TABLES: dict[str, Callable[[], str]] = {
    "defaults": defaults_table,
    "shapes": shapes_table,
    "codes": codes_table,
    "exits": exits_table,
    "commands": commands_table,
    "flags": lambda: flags_table(""),
    "flags-generate": lambda: flags_table("generate"),
    "flags-inspect": lambda: flags_table("inspect"),
    "flags-verify": lambda: flags_table("verify"),
    "flags-doctor": lambda: flags_table("doctor"),
    "settings": settings_table,
    "world": world_table,
}


def rewrite(text: str) -> str:
    """`text` with every table made new. Raises KeyError for a name that is not in `TABLES`."""
    return PLACE.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", text)


def pages() -> list[Path]:
    return [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is stale")
    check = parser.parse_args().check
    stale = [(page, new) for page in pages() if (new := rewrite(old := page.read_text())) != old]
    for page, new in stale:
        print(page.relative_to(REPO), "is stale" if check else "written")
        if not check:
            page.write_text(new)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
