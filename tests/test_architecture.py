"""The shape of the package, held by tests: import order, sizes, light imports, names, dependencies."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import ascendit

REPO = Path(__file__).resolve().parents[1]
SRC = REPO / "src" / "ascendit"
ENVIRONMENT = SRC / "device" / "environment.py"

# DESIGN section 2: a folder imports only what stands before it; folders of one row import each other lazily.
ORDER: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("spec",),
    ("native",),
    ("mx",),
    ("quant",),
    ("checkpoint",),
    ("convert",),
    ("device", "ops", "twin"),
    ("attention",),
    ("model",),
    ("parallel",),
    ("pipeline",),
    ("serve",),
    ("integrations",),
    ("cli",),
)
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}
PUBLIC_LIST_RANK = RANK["pipeline"] + 0.5  # `ascendit` itself stands for what it offers: load, Pipeline
SUBPACKAGES = frozenset(RANK) - {"errors", "spec"}

HEAVY = ("torch", "diffusers", "transformers", "av")
LIGHT = (
    "errors",
    "spec",
    "quant.*",
    "checkpoint.*",
    "pipeline.replay",
    "pipeline.request",
    "pipeline.progress",
    "pipeline.world",
    "pipeline.defaults",
    "checkpoint.folder",
    "cli.*",
)

MAX_FILE, MAX_TEST_FILE = 400, 600
MAX_FUNCTION, P90_FUNCTION, MAX_LOOP = 80, 40, 60

BANNED = frozenset({"torchvision", "torchaudio", "xfuser", "yunchang"})
OPTIONAL = frozenset({"torch_npu", "mindiesd", "modelscope"})  # tried, and done without
DISTRIBUTIONS = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}


def sources() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def module_name(path: Path) -> str:
    """`ascendit.pipeline.video` for src/ascendit/pipeline/video.py."""
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module: str) -> str:
    """`pipeline` for ascendit.pipeline.video; `` for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path) -> str:
    return str(path.relative_to(REPO))


# ---- imports ------------------------------------------------------------------------------------


def imports(tree: ast.AST, package: str, late: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Every import as (absolute dotted name, line, whether it is put off to a call or to type checking).

    `package` is what a relative import starts from.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from ((f"{base}.{alias.name}", node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ascendit":
            yield f"ascendit.{node.attr}", node.lineno, late  # what a plain `import ascendit` is used for
        else:
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, package, late or function or typing_only)


def imports_of(path: Path) -> Iterator[tuple[str, int, bool]]:
    name = module_name(path)
    yield from imports(tree_of(path), name if path.name == "__init__.py" else name.rpartition(".")[0])


def order_violations(own: str, found: Iterable[tuple[str, int, bool]]) -> list[str]:
    """What folder `own` may not import, as `line: reason`."""
    wrong = []
    for name, line, late in found:
        if not name.startswith("ascendit.") or name.startswith("ascendit.__"):
            continue  # `ascendit.__version__` is anyone's
        other = folder_of(name)
        rank = RANK.get(other, PUBLIC_LIST_RANK)
        peer = other != own and rank == RANK[own]
        if rank > RANK[own] or (peer and not late):
            rule = "only inside a function" if peer else "not at all: it stands later"
            wrong.append(f"{line}: {own} may import {name} {rule}")
    return wrong


@pytest.mark.parametrize("path", sources(), ids=place)
def test_a_folder_imports_only_what_stands_before_it(path: Path) -> None:
    own = folder_of(module_name(path))
    if own in ("", "__main__"):
        return  # the public list is lazy (tested below); `python -m ascendit` is the command line
    assert own in RANK, f"folder {own!r} has no place in ORDER; DESIGN section 2 says where it goes"
    assert order_violations(own, imports_of(path)) == []


def test_the_order_check_sees_violations() -> None:
    tree = ast.parse(
        "from ascendit.errors import UsageError\n"
        "from ..twin import schemas\n"
        "import ascendit.model.wan\n"
        "from ascendit import load, __version__\n"
        "def f():\n    from ascendit.device import npu\n    from ascendit import cli\n"
        "    import ascendit\n    return ascendit.load(ascendit.__version__)\n"
    )
    assert order_violations("ops", imports(tree, "ascendit.ops")) == [
        "2: ops may import ascendit.twin.registry only inside a function",
        "3: ops may import ascendit.model.wan not at all: it stands later",
        "4: ops may import ascendit.load not at all: it stands later",
        "7: ops may import ascendit.cli not at all: it stands later",
        "9: ops may import ascendit.load not at all: it stands later",
    ]


def test_nothing_imports_cli() -> None:
    inside = ("", "__main__", "cli")
    found = [
        f"{place(path)}:{line}"
        for path in sources()
        for name, line, _ in imports_of(path)
        if f"{name}.".startswith("ascendit.cli.") and folder_of(module_name(path)) not in inside
    ]
    assert found == []


def every_python_file() -> list[Path]:
    tops = ("src", "tests", "tools", "examples", "benchmarks")
    return [path for top in tops for path in sorted((REPO / top).rglob("*.py"))]


def test_no_torchvision_and_friends() -> None:
    found = [
        f"{place(path)}:{line}: {name}"
        for path in every_python_file()
        for name, line, _ in imports(tree_of(path), "")
        if name.partition(".")[0] in BANNED
    ]
    assert found == []


def test_what_is_imported_is_declared_with_lower_bounds_only() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(x for extra in project["optional-dependencies"].values() for x in extra),
    ]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+(>=[\d.]+)?", line)] == []
    declared = {re.split(">=", line)[0] for line in lines}
    assert not declared & BANNED
    missing = {}
    for path in sources():
        for name, line, _ in imports_of(path):
            top = name.partition(".")[0]
            known = top in sys.stdlib_module_names or top == "ascendit" or top in OPTIONAL
            if not known and DISTRIBUTIONS.get(top, top) not in declared:
                missing[top] = f"{place(path)}:{line}"
    assert missing == {}


def test_environment_is_read_in_one_place() -> None:
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    found = []
    for path in sources():
        taken = [(name, line) for name, line, _ in imports_of(path)]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute):
                taken.append((ast.unparse(node), node.lineno))
        uses = {line for name, line in taken if name.removeprefix("os.") in names and name.startswith("os.")}
        found += [f"{place(path)}:{line}" for line in sorted(uses) if path != ENVIRONMENT]
    assert found == [], "environment variables belong to environment.py"


# ---- light imports ------------------------------------------------------------------------------


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def light_modules() -> list[str]:
    found = []
    for path in sources():
        name = module_name(path).partition(".")[2]
        if any(name == rule or (rule.endswith(".*") and f"{name}.".startswith(rule[:-1])) for rule in LIGHT):
            found.append(f"ascendit.{name}")
    return found


def test_light_modules_import_nothing_heavy() -> None:
    modules = light_modules()
    assert "ascendit.errors" in modules and "ascendit.pipeline.request" in modules
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    heavy = [h for h in {HEAVY!r} if h in sys.modules]
    if heavy:
        print(name, "imports", *heavy)
        break
"""
    assert python(code) == ""


def test_importing_ascendit_is_light_and_fast() -> None:
    code = f"""
import sys, time
start = time.process_time()
import ascendit
print(time.process_time() - start, *[h for h in (*{HEAVY!r}, "numpy", "typer", "rich") if h in sys.modules])
"""
    seconds, *heavy = python(code).split()
    assert heavy == []
    assert float(seconds) < 0.2, f"{seconds} s of processor time"


# ---- sizes --------------------------------------------------------------------------------------


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name with place, lines from `def` to the end)."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{place(path)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_files_stay_small() -> None:
    limits = [(path, MAX_FILE) for path in sources()]
    limits += [(path, MAX_TEST_FILE) for path in sorted((REPO / "tests").rglob("*.py"))]
    sizes = [
        (place(path), len(path.read_text(encoding="utf-8").splitlines()), limit) for path, limit in limits
    ]
    assert [s for s in sizes if s[1] > s[2]] == []


def test_functions_stay_short() -> None:
    lengths = sorted((n, name) for path in sources() for name, n in functions(path))
    assert [x for x in lengths if x[0] > MAX_FUNCTION] == []
    assert lengths[int(0.9 * (len(lengths) - 1))][0] <= P90_FUNCTION, lengths[-len(lengths) // 10 :]


def test_the_generation_loop_can_be_read_at_one_glance() -> None:
    path = SRC / "pipeline" / "generate.py"
    if not path.exists():
        pytest.skip("pipeline/generate.py is not there yet")
    assert [x for x in functions(path) if x[1] > MAX_LOOP] == []


# ---- names --------------------------------------------------------------------------------------


def own_callables(module: ModuleType) -> set[str]:
    """Names of the public functions and classes that this module defines."""
    return {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


def importable() -> list[Path]:
    return [path for path in sources() if path.name != "__main__.py"]


def test_no_public_function_bears_a_subpackages_name() -> None:
    found = []
    for path in importable():
        name = module_name(path)
        # An operator bears the operator's name: `attention` in ops is torch's word for it.
        allowed = {"attention"} if folder_of(name) == "ops" else set()
        clashes = own_callables(importlib.import_module(name)) & SUBPACKAGES - allowed
        found += [f"{name}.{key}" for key in sorted(clashes)]
    assert found == []


def test_no_exported_name_hides_a_module() -> None:
    """`from x import y` must not give the function on one day and the module on another."""
    found = []
    for path in importable():
        if path.name == "__init__.py":
            names = vars(importlib.import_module(module_name(path)))
            inside = {p.stem for p in path.parent.glob("*.py")} | {p.name for p in path.parent.glob("*/")}
            found += [
                f"{place(path)}: {n}" for n in sorted(inside & set(names)) if not inspect.ismodule(names[n])
            ]
    assert found == []


def test_public_names_are_still_themselves_after_every_module_is_imported() -> None:
    for path in importable():
        importlib.import_module(module_name(path))
    for name in getattr(ascendit, "__all__", ()):
        value = getattr(ascendit, name)
        assert callable(value) or isinstance(value, str), f"ascendit.{name} is {value!r}"
        assert name not in SUBPACKAGES
