"""Shared by all tests: few threads, fixed seeds, and each tiny model built once."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples on every machine, and no time limits, because a busy machine is not a failure.
settings.register_profile("ascendit", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("ascendit")

THREADS = 2
if "PYTEST_XDIST_WORKER" in os.environ:
    # The other processors have their own workers. Child processes read the variable.
    THREADS = 1
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Compile the native code before the workers start, so that it is compiled once."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        from ascendit.native import build

        with ThreadPoolExecutor() as pool:
            list(pool.map(build.native, build.REQUIRED_FEATURES))


LONG = ("cli", "demo", "docs")
"""Folders with the longest files; these run first, so that no worker has a long one left at the end."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.parent.name not in LONG)


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    """Fixed seeds and threads, without importing torch or NumPy for tests that do not need them.

    Also the log level, which a command sets, here in the process of the tests.
    """
    random.seed(0)
    logging.getLogger("ascendit").setLevel(logging.NOTSET)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(THREADS)
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder(name)`: the folder of a builder in `tiny.BUILDERS`, built once; damage only copies."""
    import tiny

    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            built[name] = tiny.BUILDERS[name](tmp_path_factory.mktemp("tiny") / name)
        return built[name]

    return build


def _fixture(name: str) -> Any:
    @pytest.fixture(scope="session", name=f"tiny_{name}")
    def folder(tiny_folder: Callable[[str], Path]) -> Path:
        return tiny_folder(name)

    return folder


tiny_t2v_cascade = _fixture("t2v_cascade")
tiny_t2v_single = _fixture("t2v_single")
tiny_ti2v = _fixture("ti2v")
tiny_ti2v_image = _fixture("ti2v_image")
tiny_i2v_cascade = _fixture("i2v_cascade")
tiny_i2v_21 = _fixture("i2v_21")
tiny_flf2v = _fixture("flf2v")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the commands `ascendit` and `python`, which start without importing."""
    from warm_process import warm_commands

    with warm_commands(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.fixture
def twin() -> Iterator[None]:
    """For a test that opens a `twin:` device: remove torch.ops.npu afterwards."""
    yield
    import ascendit.twin

    ascendit.twin.disable()
    ascendit.twin.reset()


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`gloo("model.sharded:function", *args)`: results of two processes of one group, see `gloo.py`."""
    from gloo import Gloo

    group = Gloo(tmp_path_factory.mktemp("gloo") / "meeting")
    yield group
    group.close()


# ---- the `try` line of every error --------------------------------------------------------------


class _Fixes:
    """The fixes of all errors that were made since the last look, each checked once."""

    def __init__(self) -> None:
        self.checked: set[str] = set()
        self.new: set[str] = set()

    def watch(self) -> None:
        from ascendit.errors import AscenditError

        def record(error: AscenditError, name: str, value: Any) -> None:
            if name == "_fix" and value not in self.checked:
                self.new.add(value)
            object.__setattr__(error, name, value)

        AscenditError.__setattr__ = record  # type: ignore[method-assign, assignment]

    def problems(self) -> list[str]:
        from fix_lines import problems

        fixes, self.new = self.new, set()
        self.checked |= fixes
        return [f"{problem}   in the fix: {fix}" for fix in sorted(fixes) for problem in problems(fix)]


_FIXES = _Fixes()
_FIXES.watch()


@pytest.fixture(autouse=True)
def _fixes_exist() -> Iterator[None]:
    """The fix of each error names only commands, flags, keywords and values that exist."""
    yield
    assert not (bad := _FIXES.problems() if _FIXES.new else []), "\n".join(bad)
