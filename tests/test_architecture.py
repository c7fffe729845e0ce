"""Tests of the package structure: import order, sizes, light imports, names, dependencies."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

import ascendit

REPO = Path(__file__).resolve().parents[1]
SRC = REPO / "src" / "ascendit"
ENVIRONMENT = SRC / "environment.py"

# Import order: a file or folder imports only names above it.
ORDER = (
    "version",
    "option_text",
    "errors",
    "foreign",
    "arguments",
    "validation",
    "environment",
    "exclusive",
    "progress",
    "report",
    "family",
    "names",
    "native",
    "mx",
    "schedule",
    "quant",
    "geometry",
    "checkpoint",
    "pages",
    "weights",
    "convert",
    "device",
    "kernels",
    "twin",
    "ops",
    "attention",
    "model",
    "caching",
    "vae",
    "text",
    "parallel",
    "pipeline",
    "demo",
    "inspect",
    "doctor",
    "plan",
    "verify",
    "serve",
    "integrations",
    "port",
    "conformance",
    "cli",
)
RANK = {name: rank for rank, name in enumerate(ORDER)}
PUBLIC_LIST_RANK = RANK["pipeline"] + 0.5  # `ascendit` exports load and Pipeline
SUBPACKAGES = {name for name in ORDER if not (SRC / f"{name}.py").exists()}

SAME_NAME = {
    "ops": {"attention"},
    "kernels": {"attention"},
    "inspect": {"inspect"},
    "cli": {"inspect", "doctor", "verify"},
}
# Imports of ascendit's modules inside a function, except in `cli`: (importer, imported) -> reason.
LATE = {
    ("pipeline.job", "pipeline.load.decode_kept"): "start-up: a call is checked before torch is imported",
    ("pipeline.job", "pipeline.load.build"): "start-up: a call is checked before torch is imported",
    ("pipeline.job", "pipeline.load.open_accelerator"): "start-up: only CUDA and NPUs need torch",
    ("pipeline.memory", "ops.open_device.free_bytes"): "start-up: only CUDA and NPUs need torch",
    ("checkpoint.hub", "checkpoint.modelscope.ENDPOINT"): "start-up: pydantic is needed for ms: names only",
    ("checkpoint.hub", "checkpoint.modelscope.download_model"): "start-up: pydantic is for ms: names only",
}

HEAVY = ("torch", "diffusers", "transformers", "av")
LIGHT = (
    "version",
    "option_text",
    "errors",
    "foreign",
    "arguments",
    "validation",
    "environment",
    "exclusive",
    "report",
    "family",
    "names",
    "schedule",
    "geometry",
    "native.*",
    "mx.formats",
    "mx.stored_floats",
    "quant.*",
    "checkpoint.*",
    "convert.repack",
    "attention.choice",
    "attention.measured",
    "attention.steps",
    "model.quantize_on_load",
    "pipeline.defaults",
    "pipeline.fit",
    "pipeline.images",
    "pipeline.sigmas",
    "pipeline.options",
    "pipeline.model_check",
    "pipeline.memory",
    "pipeline.estimate",
    "pipeline.request",
    "pipeline.job",
    "demo.world",
    "inspect.*",
    "doctor.machine",
    "cli.*",
)

MAX_FILE = 600
MAX_FUNCTION, P90_FUNCTION, MAX_LOOP = 80, 40, 60

BANNED = frozenset({"torchvision", "torchaudio", "xfuser", "yunchang"})
OPTIONAL = frozenset({"torch_npu", "mindiesd", "modelscope"})  # imported if available
DISTRIBUTIONS = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "pydantic_core": "pydantic"}


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


def label(path: Path) -> str:
    return str(path.relative_to(REPO))


# ---- imports ------------------------------------------------------------------------------------


def imports(tree: ast.AST, package: str, late: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Yield every import as (absolute dotted name, line, whether it is in a function or for type checking).

    `package` is the base of relative imports.
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
            yield f"ascendit.{node.attr}", node.lineno, late  # use of a plain `import ascendit`
        else:
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, package, late or function or typing_only)


def imports_of(path: Path) -> Iterator[tuple[str, int, bool]]:
    name = module_name(path)
    yield from imports(tree_of(path), name if path.name == "__init__.py" else name.rpartition(".")[0])


def order_violations(own: str, imported: Iterable[tuple[str, int, bool]]) -> list[str]:
    """Forbidden imports of `own`, as `line: reason`, including those in functions and for type checking."""
    wrong = []
    for name, line, _ in imported:
        if not name.startswith("ascendit.") or name.startswith("ascendit.__"):
            continue
        if RANK.get(folder_of(name), PUBLIC_LIST_RANK) > RANK[own]:
            wrong.append(f"{line}: {own} may not import {name}, which is below it")
    return wrong


@pytest.mark.parametrize("path", sources(), ids=label)
def test_a_folder_imports_only_folders_above_it(path: Path) -> None:
    own = folder_of(module_name(path))
    if own in ("", "__main__"):
        return  # the public list is lazy (tested below); `python -m ascendit` is the command line
    assert own in RANK, f"{own!r} is not in ORDER"
    assert order_violations(own, imports_of(path)) == []


def test_the_order_check_detects_violations() -> None:
    tree = ast.parse(
        "from ascendit.errors import UsageError\n"
        "from ..twin import schemas\n"
        "import ascendit.model.wan\n"
        "from ascendit import load\n"
        "def f():\n    from ascendit.ops import select\n    from ascendit import cli\n"
        "    import ascendit\n    return ascendit.load()\n"
    )
    assert order_violations("kernels", imports(tree, "ascendit.kernels")) == [
        "2: kernels may not import ascendit.twin.schemas, which is below it",
        "3: kernels may not import ascendit.model.wan, which is below it",
        "4: kernels may not import ascendit.load, which is below it",
        "6: kernels may not import ascendit.ops.select, which is below it",
        "7: kernels may not import ascendit.cli, which is below it",
        "9: kernels may not import ascendit.load, which is below it",
    ]


def import_graph() -> dict[str, set[str]]:
    """Module -> ascendit's modules that it imports: at the top, in functions and for type checking."""
    modules = {module_name(path): path for path in sources()}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = {name if name in modules else name.rpartition(".")[0] for name, _, _ in imports_of(path)}
        graph[module] = {t for t in targets if t in modules} - {module, "ascendit"}
    return graph


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reached = {module: reachable(graph, module) for module in graph}
    groups = {frozenset(m for m in graph if m in reached[n] and n in reached[m]) for n in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    reached_modules: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph[waiting.pop()] - reached_modules:
            reached_modules.add(target)
            waiting.append(target)
    return reached_modules


def test_no_import_cycles() -> None:
    assert cycles(import_graph()) == []


def test_the_cycle_check_detects_cycles() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert cycles(graph) == [["b", "c"], ["e", "f"]]


def test_loading_needs_few_modules() -> None:
    """Modules reachable from `pipeline.job`, including imports in functions, without empty files."""
    reached = reachable(import_graph(), "ascendit.pipeline.job")
    sizes = {module_name(path): path.stat().st_size for path in sources()}
    assert len([module for module in reached if sizes[module]]) <= 128


def late_imports() -> dict[tuple[str, str], str]:
    late = {}
    for path in sources():
        module = module_name(path)
        if folder_of(module) in ("", "cli"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for name, line, _ in imports(node, module.rpartition(".")[0]):
                    if name.startswith("ascendit.") and not name.startswith("ascendit.__"):
                        late[module.removeprefix("ascendit."), name.removeprefix("ascendit.")] = (
                            f"{label(path)}:{line}"
                        )
    return late


def test_imports_inside_functions_are_on_the_list() -> None:
    late = late_imports()
    assert {key: at for key, at in late.items() if key not in LATE} == {}
    assert [key for key in LATE if key not in late] == [], "no longer present: shorten the list"
    assert len(LATE) <= 20 and all(LATE.values())


def test_no_reexports() -> None:
    """No `from x import Y as Y`."""
    reexports = [
        f"{label(path)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and any(a.asname == a.name for a in node.names)
    ]
    assert reexports == []


def test_nothing_imports_cli() -> None:
    inside = ("", "__main__", "cli")
    importers = [
        f"{label(path)}:{line}"
        for path in sources()
        for name, line, _ in imports_of(path)
        if f"{name}.".startswith("ascendit.cli.") and folder_of(module_name(path)) not in inside
    ]
    assert importers == []


def every_python_file() -> list[Path]:
    tops = ("src", "tests", "tools", "examples", "benchmarks")
    return [path for top in tops for path in sorted((REPO / top).rglob("*.py"))]


def test_no_torchvision_and_friends() -> None:
    uses = [
        f"{label(path)}:{line}: {name}"
        for path in every_python_file()
        for name, line, _ in imports(tree_of(path), "")
        if name.partition(".")[0] in BANNED
    ]
    assert uses == []


def test_dependencies_are_declared_with_lower_bounds_only() -> None:
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
            satisfied = top in sys.stdlib_module_names or top == "ascendit" or top in OPTIONAL
            if not satisfied and DISTRIBUTIONS.get(top, top) not in declared:
                missing[top] = f"{label(path)}:{line}"
    assert missing == {}


def test_the_environment_is_read_in_one_file() -> None:
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    reads = []
    for path in sources():
        taken = [(name, line) for name, line, _ in imports_of(path)]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute):
                taken.append((ast.unparse(node), node.lineno))
        uses = {line for name, line in taken if name.removeprefix("os.") in names and name.startswith("os.")}
        reads += [f"{label(path)}:{line}" for line in sorted(uses) if path != ENVIRONMENT]
    assert reads == [], "environment variables belong to environment.py"


# ---- light imports ------------------------------------------------------------------------------


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def light_modules() -> list[str]:
    names = []
    for path in sources():
        name = module_name(path).partition(".")[2]
        if any(name == rule or (rule.endswith(".*") and f"{name}.".startswith(rule[:-1])) for rule in LIGHT):
            names.append(f"ascendit.{name}")
    return names


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


@pytest.mark.parametrize("name", ["cli.main", "cli.inspect", "cli.doctor", "doctor.machine"])
def test_commands_start_without_pydantic(name: str) -> None:
    """Importing it takes 0.2 s, and only options, requests, recipes and configs need it."""
    code = f"import ascendit.{name}, sys; print('pydantic' in sys.modules)"
    assert python(code) == "False"


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
    """(file, line and name; number of lines from `def` to the end)."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{label(path)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_files_stay_small() -> None:
    files = [*sources(), *sorted((REPO / "tests").rglob("*.py"))]
    lines = {label(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: n for path, n in lines.items() if n > MAX_FILE} == {}


def test_the_number_and_size_of_files() -> None:
    """A limited number of files of medium size."""
    lines = sorted(len(p.read_text(encoding="utf-8").splitlines()) for p in sources() if p.stat().st_size)
    assert len(lines) <= 237
    assert 150 <= lines[len(lines) // 2] <= 300


def test_functions_stay_short() -> None:
    lengths = sorted((n, name) for path in sources() for name, n in functions(path))
    assert [x for x in lengths if x[0] > MAX_FUNCTION] == []
    assert lengths[int(0.9 * (len(lengths) - 1))][0] <= P90_FUNCTION, lengths[-len(lengths) // 10 :]


def test_the_generation_loop_is_short() -> None:
    path = SRC / "pipeline" / "generate.py"
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


def test_no_public_function_has_the_name_of_a_subpackage() -> None:
    clashing = []
    for path in importable():
        name = module_name(path)
        # An operator has the operator's name, a command that of its folder.
        allowed = SAME_NAME.get(folder_of(name), set())
        clashes = own_callables(importlib.import_module(name)) & SUBPACKAGES - allowed
        clashing += [f"{name}.{key}" for key in sorted(clashes)]
    assert clashing == []


def test_no_exported_name_hides_a_module() -> None:
    """The result of `from x import y` must not depend on the modules imported before."""
    hidden = []
    for path in importable():
        if path.name == "__init__.py":
            names = vars(importlib.import_module(module_name(path)))
            inside = {p.stem for p in path.parent.glob("*.py")} | {p.name for p in path.parent.glob("*/")}
            hidden += [
                f"{label(path)}: {n}"
                for n in sorted(inside & set(names))
                if not inspect.ismodule(names[n])
                and f"{module_name(path)}.{n}" not in sys.modules  # if imported first, it hides nothing
            ]
    assert hidden == []


def test_public_names_are_unchanged_after_all_modules_are_imported() -> None:
    for path in importable():
        importlib.import_module(module_name(path))
    for name in getattr(ascendit, "__all__", ()):
        value = getattr(ascendit, name)
        assert callable(value) or isinstance(value, str), f"ascendit.{name} is {value!r}"
