"""The exception tree: exit codes, error texts, and agreement of the error codes in sources and table."""

from __future__ import annotations

import ast
import inspect
import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from ascendit import errors
from ascendit.errors import OutOfMemory, escaped, is_out_of_memory, out_of_memory
from ascendit.option_text import command_line

SOURCES = Path(errors.__file__).parent
# In the table but not raised yet.
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


def error_codes() -> dict[str, list[str]]:
    """Strings of the sources that are error codes -> files, without the table in errors.py."""
    files_of_code: dict[str, list[str]] = {}
    for file in sorted(SOURCES.rglob("*.py")):
        if file.name == "errors.py" and file.parent == SOURCES:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"E-[A-Z]+-\d+", node.value):
                    files_of_code.setdefault(node.value, []).append(str(file.relative_to(SOURCES)))
    return files_of_code


def code_defaults() -> dict[str, str]:
    """Classes with a default code -> the code."""
    defaults = {n: inspect.signature(c).parameters["code"].default for n, c in classes().items()}
    return {name: code for name, code in defaults.items() if code is not inspect.Parameter.empty}


def raised_calls() -> list[tuple[str, ast.Call]]:
    """All calls of the tree's classes in the sources, with `file:line`."""
    calls = []
    for file in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in TREE:
                    calls.append((f"{file.relative_to(SOURCES)}:{node.lineno}", node))
    return calls


def test_tree_and_exit_status() -> None:
    assert {n: (c.__bases__[0].__name__, c.exit_code) for n, c in classes().items()} == TREE


def test_the_tree_in_the_docstring_is_correct() -> None:
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
    data = {"code": "E-REQ-01", "got": "80 frames", "needs": "4n+1"}
    for fix in ("--frames 81", "num_frames=81"):
        with command_line() if fix[0] == "-" else nullcontext():
            assert str(error) == f"[E-REQ-01] 80 frames\n  needs  4n+1\n  try    {fix}"
            assert error.as_dict() == data | {"try": fix}
            assert (error.got, error.needs, error.fix, error.code) == ("80 frames", "4n+1", fix, "E-REQ-01")
    assert error.args == ("80 frames",)


def test_an_unknown_code_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError, match="E-XXX-99"):
        errors.UsageError("a", needs="b", fix="c", code="E-XXX-99")


def test_needs_fix_and_code_are_required() -> None:
    with pytest.raises(TypeError, match="needs"):
        errors.UsageError("a")  # type: ignore[call-arg]


def test_code_defaults() -> None:
    usual = {
        "UsageError": "E-USE-01",
        "RequestError": "E-REQ-03",
        "OutOfMemory": "E-MEM-01",
        "Cancelled": "E-CAN-01",
    }
    assert code_defaults() == usual
    for name, code in usual.items():
        assert getattr(errors, name)("a", needs="b", fix="c").code == code
    with pytest.raises(TypeError, match="code"):
        errors.CheckpointError("a", needs="b", fix="c")  # type: ignore[call-arg]


def test_every_code_is_well_formed_and_described() -> None:
    for code, text in errors.ERROR_CODES.items():
        assert re.fullmatch(r"E-[A-Z]{3}-\d\d", code), code
        assert text and not text.endswith("."), code
    assert len(set(errors.ERROR_CODES.values())) == len(errors.ERROR_CODES)


def test_every_code_in_the_sources_is_in_the_table() -> None:
    unknown = {c: files for c, files in error_codes().items() if c not in errors.ERROR_CODES}
    assert not unknown


def test_every_code_in_the_table_is_used_or_reserved() -> None:
    unused = set(errors.ERROR_CODES) - set(error_codes()) - set(code_defaults().values())
    assert unused - RESERVED == set(), "in the table but never raised"
    assert set(errors.ERROR_CODES) >= RESERVED


def test_every_raise_gives_needs_fix_and_code() -> None:
    calls = raised_calls()
    assert calls
    for location, call in calls:
        passed = {k.arg for k in call.keywords}
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        needed = {"needs", "fix"} if name in code_defaults() else {"needs", "fix", "code"}
        assert None in passed or passed >= needed, location


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


def test_the_error_has_the_required_and_the_free_memory() -> None:
    error = out_of_memory(torch.OutOfMemoryError(CUDA), "decode", "cuda")
    assert isinstance(error, OutOfMemory) and error.exit_code == 4 and error.code == "E-MEM-01"
    assert error.got == "out of memory on cuda in stage decode"
    assert error.needs == "20.00 GiB more; 3.25 GiB is free"
    assert "smaller width" in error.fix and 'text_on="drop"' in error.fix


def test_without_numbers() -> None:
    assert out_of_memory(MemoryError(), "denoise", "cuda").needs == "more memory"


# ---- control characters -------------------------------------------------------------------------

UNPRINTED = [*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]


def test_no_character_that_controls_a_terminal_or_the_direction_of_text_is_left() -> None:
    for number in [*UNPRINTED, 0xD800, 0xDC80, 0xDFFF, 0xFEFF, 0x61C]:
        text = escaped(f"a{chr(number)}b")
        assert text.isprintable() and text.startswith("a\\") and text.endswith("b"), hex(number)
        assert escaped(text) == text
    for text in ("", "plain", "é 猫 ▁ 👩‍🚀 — “x”", "a\\nb", "a b"):
        assert escaped(text) == text
    assert escaped("a\nb\tc\rd\x1b[2J\x9b\u202e") == "a\\nb\\tc\\rd\\x1b[2J\\x9b\\u202e"
    assert escaped(os.fsdecode(b"caf\xe9")) == "caf\\xe9"


def test_the_text_of_an_error_has_three_lines_and_no_control_characters() -> None:
    error = errors.CheckpointError("a\x1b[2J\nb", needs="c\u202e", fix="d\r", code="E-CKP-04")
    assert str(error) == "[E-CKP-04] a\\x1b[2J\\nb\n  needs  c\\u202e\n  try    d\\r"
    assert error.as_dict()["got"] == "a\x1b[2J\nb"
