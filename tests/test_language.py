"""The language of sources, docs and messages: a word list, and what a public docstring has to say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SRC = REPO / "src" / "ascendit"

# ---- words that stay out ------------------------------------------------------------------------

WORDS = (
    "found|given|now|put|puts|place|places|placed|what|whatever|whoever|told|stands|lies|lie|form|forms|codes"
    "|nobody|somebody"
)
"""Anywhere in text, and as a part of a name between underscores."""
PHRASES = (
    r"hangs? on",
    r"cannot be(?=[,.;:)]|$)",
    r"(?:is|are|be) whole(?! number)",
    r"(?:that|which|where there) (?:is|are) none",
    r"as (?:it|they) (?:is|are)(?=[,.;:)]|$)",
    r"comes? to(?! (?:the|rest))",
    r"of ours",
    r"in (?:few )?words",
    r"layers? on",
)
NAMES = frozenset(
    "told made asked seen words wide rest known why which doubtful leader member dialect spelling".split()
)
"""Not names of a variable, a parameter, a function or an attribute; they may be words of a sentence."""
ALLOWED = re.compile(
    r"\bin[- ]place\b|\b(?:error|exit|status)[- _]codes\b"
    r"|\bdatetime\.now\b|\bwhat\(\)|output\.put\(|shutil\.which\b"
    r"|\"(?:found|given|placed)\"|\} not found in TORCH_DTYPE_ENUM_VALUE",
    re.IGNORECASE,
)
"""Terms of the field, names of other libraries, three keys of `--json` output, an error text of torch_npu."""
BANNED = re.compile(
    rf"(?<![A-Za-z])(?:{WORDS}|(?:{'|'.join(PHRASES)}))(?![A-Za-z])", re.IGNORECASE | re.MULTILINE
)
TEXTS = [
    *(p for p in sorted(SRC.rglob("*")) if p.suffix in {".py", ".cpp", ".h", ".toml", ".html"}),
    *sorted((REPO / "docs").glob("*.md")),
    *sorted((REPO / "benchmarks").glob("*.*")),
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")),
]


def label(path: Path) -> str:
    return str(path.relative_to(REPO))


def hits(text: str) -> Iterator[str]:
    """`line: words of the line` for each word of the list in `text`."""
    text = ALLOWED.sub(lambda m: "-" * len(m[0]), text)
    for match in BANNED.finditer(text):
        line = text.count("\n", 0, match.start())
        yield f"{line + 1}: {match[0]}: {text.splitlines()[line].strip()}"


@pytest.mark.parametrize("path", TEXTS, ids=label)
def test_no_word_of_the_list(path: Path) -> None:
    problems = list(hits(path.read_text(encoding="utf-8")))
    assert not problems, "\n".join(problems)


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and ast.unparse(node) != "shutil.which":
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


SOURCES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_no_vague_name(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    problems = sorted({f"{line}: {name}" for line, name in names(tree) if name.strip("_").lower() in NAMES})
    assert not problems, "\n".join(problems)


def test_the_word_list_sees_words() -> None:
    for text in ("files_found = 1", "What is told", "it hangs on", "scales that cannot be.", "FOUND", "_now"):
        assert list(hits(text)), text
    for text in ("in place", "exit codes", "foundation", "knowing", "format", "replace", "it cannot be read"):
        assert not list(hits(text)), text


# ---- public docstrings --------------------------------------------------------------------------

TENSORS = re.compile(r"\b(?:Tensor|Encoded|Activation|PreparedWeight)\b")
SHAPE = re.compile(r"\[[^\]\n]*\]")
DTYPE = re.compile(
    r"dtype|bf16|fp16|fp32|\b(?:b?float|int|uint)\d+|bool|e4m3|e5m2|e2m1|E8M0|complex|index", re.I
)
ELSEWHERE = re.compile(r"\b(?:See|As|Like|Same as) `")
"""The docstring leaves shapes to another function or record."""
RAISES = re.compile(r"\w+Error\b|OutOfMemory|Cancelled|\bE-[A-Z]{3}\b")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Functions and methods whose names, and those of their classes, have no leading underscore."""
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        for item in inner:
            if isinstance(item, Function) and not item.name.startswith("_"):
                yield item


def handles_tensors(function: Function) -> bool:
    every = function.args
    arguments = [*every.posonlyargs, *every.args, *every.kwonlyargs]
    annotations = [*(a.annotation for a in arguments), function.returns]
    return any(TENSORS.search(ast.unparse(a)) for a in annotations if a is not None)


def raises(function: Function) -> bool:
    """It has a `raise` of its own that makes an error; `raise` alone passes one on."""
    return any(
        isinstance(node, ast.Raise)
        and node.exc is not None
        and not ast.unparse(node.exc).startswith(("AssertionError", "NotImplementedError", "AttributeError"))
        for node in ast.walk(function)
    )


def docstring_problems(tree: ast.Module) -> Iterator[str]:
    for function in public_functions(tree):
        doc = ast.get_docstring(function) or ""
        named = f"{function.lineno}: {function.name}"
        if handles_tensors(function) and not ELSEWHERE.search(doc):
            if not SHAPE.search(doc):
                yield f"{named}: no shape in brackets"
            if not DTYPE.search(doc):
                yield f"{named}: no dtype"
        if raises(function) and not RAISES.search(doc):
            yield f"{named}: raises, and does not name the error"


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_public_docstrings_give_shapes_dtypes_and_errors(path: Path) -> None:
    problems = list(docstring_problems(ast.parse(path.read_text(encoding="utf-8"))))
    assert not problems, "\n".join(problems)


def test_the_docstring_check_sees_gaps() -> None:
    source = "def f(x: Tensor) -> Tensor:\n    '''Twice x.'''\n    raise ValueError(x)\n"
    assert len(list(docstring_problems(ast.parse(source)))) == 3
    source = source.replace("Twice x.", "Twice x [N, K], float32. ValueError: always.")
    assert not list(docstring_problems(ast.parse(source)))
