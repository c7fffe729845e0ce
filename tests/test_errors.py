"""The exception tree: exit codes, what an error says, and codes that the sources and the table agree on."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from ascendit import errors
from ascendit.errors import OutOfMemory, is_out_of_memory, out_of_memory

SOURCES = Path(errors.__file__).parent
# Codes that stand in the table before the code that raises them.
RESERVED: set[str] = set()

TREE = {
    "AscenditError": ("Exception", 1),
    "UsageError": ("AscenditError", 2),
    "RequestError": ("UsageError", 2),
    "CheckpointError": ("AscenditError", 1),
    "QualityError": ("AscenditError", 1),
    "EnvironmentProblem": ("AscenditError", 3),
    "OutOfMemory": ("EnvironmentProblem", 4),
    "Cancelled": ("AscenditError", 130),
}


def classes() -> dict[str, type[errors.AscenditError]]:
    return {
        n: c
        for n, c in vars(errors).items()
        if inspect.isclass(c) and issubclass(c, errors.AscenditError) and c.__module__ == errors.__name__
    }


def codes_in_sources() -> dict[str, list[str]]:
    """Every string in the sources that looks like a code, and the files it stands in; the table left out."""
    found: dict[str, list[str]] = {}
    for file in sorted(SOURCES.rglob("*.py")):
        if file.name == "errors.py" and file.parent == SOURCES:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"E-[A-Z]+-\d+", node.value):
                    found.setdefault(node.value, []).append(str(file.relative_to(SOURCES)))
    return found


def default_codes() -> dict[str, str]:
    """The classes whose code can be left out, and what it is then."""
    codes = {n: inspect.signature(c).parameters["code"].default for n, c in classes().items()}
    return {name: code for name, code in codes.items() if code is not inspect.Parameter.empty}


def raised_calls() -> list[tuple[str, ast.Call]]:
    """Every call of a class of the tree in the sources, with `file:line`."""
    found = []
    for file in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in TREE:
                    found.append((f"{file.relative_to(SOURCES)}:{node.lineno}", node))
    return found


def test_tree_and_exit_codes() -> None:
    assert {n: (c.__bases__[0].__name__, c.exit_code) for n, c in classes().items()} == TREE


def test_the_tree_drawn_at_the_top_is_the_tree_in_the_code() -> None:
    assert errors.__doc__ is not None
    drawn = {"AscenditError": ("Exception", 1)}
    above = {0: "AscenditError"}  # the last name at each indent
    for indent, name, code in re.findall(r"^( +)[x+] (\w+) +(\d+)", errors.__doc__, re.MULTILINE):
        drawn[name] = (above[len(indent) - 2], int(code))
        above[len(indent)] = name
    assert drawn == TREE


@pytest.mark.parametrize("name", TREE)
def test_text_has_got_needs_and_try(name: str) -> None:
    error = classes()[name]("80 frames", needs="4n+1", fix="--frames 81", code="E-REQ-01")
    assert str(error) == "[E-REQ-01] 80 frames\n  needs  4n+1\n  try    --frames 81"
    assert error.as_dict() == {"code": "E-REQ-01", "got": "80 frames", "needs": "4n+1", "try": "--frames 81"}
    assert (error.got, error.needs, error.fix, error.code) == ("80 frames", "4n+1", "--frames 81", "E-REQ-01")
    assert error.args == ("80 frames",)


def test_an_unknown_code_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="E-XXX-99"):
        errors.UsageError("a", needs="b", fix="c", code="E-XXX-99")


def test_got_needs_fix_and_code_cannot_be_left_out() -> None:
    with pytest.raises(TypeError, match="needs"):
        errors.UsageError("a")  # type: ignore[call-arg]


def test_a_class_whose_errors_mostly_have_one_code_has_it_as_the_default() -> None:
    usual = {
        "UsageError": "E-USE-01",
        "RequestError": "E-REQ-03",
        "OutOfMemory": "E-MEM-01",
        "Cancelled": "E-CAN-01",
    }
    assert default_codes() == usual
    for name, code in usual.items():
        assert getattr(errors, name)("a", needs="b", fix="c").code == code
    with pytest.raises(TypeError, match="code"):
        errors.CheckpointError("a", needs="b", fix="c")  # type: ignore[call-arg]


def test_codes_are_well_formed_and_described() -> None:
    for code, text in errors.ERROR_CODES.items():
        assert re.fullmatch(r"E-[A-Z]{3}-\d\d", code), code
        assert text and not text.endswith("."), code
    assert len(set(errors.ERROR_CODES.values())) == len(errors.ERROR_CODES)


def test_every_code_in_the_sources_is_in_the_table() -> None:
    unknown = {c: files for c, files in codes_in_sources().items() if c not in errors.ERROR_CODES}
    assert not unknown


def test_every_code_in_the_table_is_used_or_reserved() -> None:
    unused = set(errors.ERROR_CODES) - set(codes_in_sources()) - set(default_codes().values())
    assert unused - RESERVED == set(), "in the table, raised nowhere"
    assert set(errors.ERROR_CODES) >= RESERVED


def test_every_raise_gives_needs_fix_and_code() -> None:
    calls = raised_calls()
    assert calls
    for where, call in calls:
        given = {k.arg for k in call.keywords}
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        needed = {"needs", "fix"} if name in default_codes() else {"needs", "fix", "code"}
        assert None in given or given >= needed, where


# ---- out of memory ------------------------------------------------------------------------------

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
    "3.25 GiB is free. Process 1 has 75.00 GiB memory in use."
)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(CUDA), True),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"
            ),
            True,
        ),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_recognised(error: BaseException, answer: bool) -> None:
    assert is_out_of_memory(error) is answer


def test_the_real_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as e:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(e.value)
    assert out_of_memory(e.value).needs.startswith(f"{2**20:.1f} GiB more; ")


def test_told_with_required_and_free() -> None:
    error = out_of_memory(torch.OutOfMemoryError(CUDA), "decode", "cuda")
    assert isinstance(error, OutOfMemory) and error.exit_code == 4 and error.code == "E-MEM-01"
    assert error.got == "out of memory on cuda in stage decode"
    assert error.needs == "20.00 GiB more; 3.25 GiB is free"
    assert "--size" in error.fix


def test_without_numbers() -> None:
    assert out_of_memory(MemoryError(), "denoise", "cuda").needs == "more memory"
