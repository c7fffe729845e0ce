"""The cache of compiled libraries: private, verified, and safe with several processes.

The library of these tests has one function, `answer`, which returns 42; that of an attacker returns 13.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ascendit.native import build, cache

COMPILER = build.find_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
NOBODY = 65534
CHILD = """
import filelock, logging, os, sys  # filelock now: another user may be unable to read it
from pathlib import Path
from ascendit.native import build
if user := int(sys.argv[2]):
    os.setgroups([]), os.setgid(user), os.setuid(user)
logging.basicConfig(level="WARNING", format="%(message)s")
build.SOURCES, build.OPTIONAL_FLAGS = Path(sys.argv[1]), ((),)
build.REQUIRED_FEATURES["answer"] = frozenset()
built = build.native("answer")
print(built.library.answer() if built.library else built.reason)
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that other users can read, with sources in `src`."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "src").mkdir()
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o1777)
    (folder / "src" / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    yield folder
    shutil.rmtree(folder)


def start(home: Path, *, user: int = 0, umask: int = -1, **environ: str) -> Any:
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"], "TMPDIR": str(home / "tmp")}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(home / "src"), str(user)],
        env=paths | {"XDG_CACHE_HOME": str(home / "cache"), "PYTHONDONTWRITEBYTECODE": "1"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        umask=umask,
        cwd=home,
    )


def finish(child: Any) -> tuple[str, str]:
    """Output and log of a child, which must not fail."""
    out, log = child.communicate(timeout=120)
    assert child.returncode == 0, log
    return out.strip(), log.strip()


def run(home: Path, **settings: Any) -> tuple[str, str]:
    return finish(start(home, **settings))


def folder_of(home: Path) -> Path:
    return home / "cache" / "ascendit" / "native"


def library_of(home: Path) -> Path:
    (file,) = folder_of(home).glob("answer-*.so")
    return file


def planted(home: Path) -> bytes:
    """A complete file of the cache, with the code of an attacker."""
    source, target = home / "evil.cpp", home / "evil.so"
    source.write_text('extern "C" int answer() { return 13; }\n')
    subprocess.run([str(COMPILER), "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    return target.read_bytes() + hashlib.sha256(target.read_bytes()).digest()


# ---- one user -----------------------------------------------------------------------------------


def test_folders_and_file_are_private_under_any_umask(home: Path) -> None:
    assert run(home, umask=0) == ("42", "")
    for folder in (home / "cache", home / "cache" / "ascendit", folder_of(home)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(library_of(home).stat().st_mode) & 0o077 == 0
    content = library_of(home).read_bytes()
    assert hashlib.sha256(content[:-32]).digest() == content[-32:]


def hole(file: Path, content: bytes) -> None:
    with open(file, "wb") as f:
        f.write(content[:4096])
        f.truncate(len(content))


def link(file: Path, content: bytes) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))


def pipe(file: Path, content: bytes) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGE: dict[str, Callable[[Path, bytes], object]] = {
    "half": lambda file, content: file.write_bytes(content[: len(content) // 2]),
    "90 %": lambda file, content: file.write_bytes(content[: len(content) * 9 // 10]),
    "last byte lost": lambda file, content: file.write_bytes(content[:-1]),
    "first page and a hole": hole,
    "zeros": lambda file, content: file.write_bytes(bytes(len(content))),
    "empty": lambda file, content: file.write_bytes(b""),
    "a flipped bit": lambda file, content: file.write_bytes(
        content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    ),
    "no checksum": lambda file, content: file.write_bytes(content[:-32]),
    "huge": lambda file, content: os.truncate(file, 2**40),
    "a link": link,
    "a pipe": pipe,
    "others can write": lambda file, content: file.chmod(0o666),
}


def test_a_damaged_file_is_compiled_again(home: Path, tmp_path: Path) -> None:
    run(home)
    name, content = library_of(home).name, library_of(home).read_bytes()
    children = {}
    for kind, damage in DAMAGE.items():
        folder = tmp_path / kind / "ascendit" / "native"
        shutil.copytree(folder_of(home), folder)
        damage(folder / name, content)
        folder.chmod(0o700)
        children[kind] = start(home, XDG_CACHE_HOME=str(tmp_path / kind))
    for kind, child in children.items():
        out, log = finish(child)
        assert (out, "it is compiled again" in log, log.count("\n")) == ("42", True, 0), (kind, log)
        repaired = tmp_path / kind / "ascendit" / "native" / name
        assert repaired.is_file() and not repaired.is_symlink() and repaired.stat().st_size == len(content)


def test_a_folder_that_others_can_write_to_is_not_used(home: Path) -> None:
    run(home)
    file = library_of(home)
    file.write_bytes(planted(home))
    folder_of(home).chmod(0o777)
    out, log = run(home)
    assert out == "42" and "others can write to it (mode 0777)" in log and log.count("\n") == 0
    fix = log.partition("try: ")[2]
    assert fix == f"chmod 700 {folder_of(home)}"
    private = home / "tmp" / f"ascendit-{os.geteuid()}" / "native"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700 and len(list(private.glob("*.so"))) == 1
    file.unlink()
    subprocess.run(fix.split(), check=True)
    assert run(home) == ("42", "")


def test_a_link_is_not_followed(home: Path) -> None:
    (home / "cache" / "ascendit").mkdir(parents=True)
    (home / "elsewhere").mkdir(0o700)
    folder_of(home).symlink_to(home / "elsewhere")
    out, log = run(home)
    assert out == "42" and log.endswith(f"a link; try: rm {folder_of(home)}")
    assert not list((home / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"XDG_CACHE_HOME": "relative"}, "home/.cache/ascendit/native"),
        ({"XDG_CACHE_HOME": "", "HOME": "relative"}, "tmp/ascendit-{}/native"),
        ({"XDG_CACHE_HOME": "{}/src/answer.cpp"}, "tmp/ascendit-{}/native"),
    ],
)
def test_the_folder_follows_the_environment(home: Path, environ: dict[str, str], folder: str) -> None:
    values = {k: v.format(home) for k, v in environ.items()}
    out, log = run(home, **({"HOME": str(home / "home")} | values))
    assert out == "42" and len(list((home / folder.format(os.geteuid())).glob("answer-*.so"))) == 1
    assert ("try: export XDG_CACHE_HOME=" in log) == folder.startswith("tmp")
    assert not (home / "relative").exists()


def test_files_are_synced_before_they_are_renamed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def record(*args: Any, **settings: Any) -> Any:
            calls.append(name)
            return call(*args, **settings)

        return record

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name))
    with cache.open_folder(home / "cache") as folder:
        folder.store("x.so", b"content")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_full_disk_leaves_no_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with cache.open_folder(home / "cache") as folder:
        with pytest.raises(cache.CacheError, match="No space left"):
            folder.store("x.so", b"content")
    assert not list((home / "cache").iterdir())


# ---- several processes --------------------------------------------------------------------------


def slow_compiler(home: Path, seconds: float) -> str:
    """PATH with a compiler that takes longer, and writes a line to `calls` for each library."""
    script = home / "bin" / "g++"
    script.parent.mkdir()
    line = f'echo call >> "{home}/calls"; sleep {seconds}'
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) {line};; esac\nexec "{COMPILER}" "$@"\n')
    script.chmod(0o755)
    return f"{script.parent}{os.pathsep}{os.environ['PATH']}"


def test_processes_that_start_together_compile_once(home: Path) -> None:
    path = slow_compiler(home, 0.5)
    children = [start(home, PATH=path) for _ in range(4)]
    assert [finish(child) for child in children] == [("42", "")] * 4
    assert (home / "calls").read_text() == "call\n"
    assert not list(folder_of(home).glob("*.tmp"))


def test_a_process_that_is_killed_blocks_no_other(home: Path) -> None:
    path = slow_compiler(home, 1)
    child = start(home, PATH=path)
    while not (home / "calls").exists():
        time.sleep(0.01)
    child.kill()
    child.communicate()
    assert run(home, PATH=path) == ("42", "")
    assert {file.suffix for file in folder_of(home).iterdir()} == {".so", ".lock"}


def test_a_stopped_process_delays_others_for_a_limited_time(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.1)
    with cache.open_folder(home / "cache") as one, cache.open_folder(home / "cache") as two:
        with one.lock("answer"), two.lock("answer"):
            pass
    assert "compiling without it" in caplog.text


# ---- another user -------------------------------------------------------------------------------


@needs_root
def test_a_folder_of_another_user_is_not_used(home: Path) -> None:
    run(home)
    library_of(home).write_bytes(planted(home))
    os.chown(folder_of(home), NOBODY, NOBODY)
    out, log = run(home)
    assert out == "42" and f"belongs to user {NOBODY}, not to 0" in log and "export XDG_CACHE_HOME=" in log


@needs_root
def test_a_file_of_another_user_is_replaced(home: Path) -> None:
    run(home)
    file = library_of(home)
    file.write_bytes(planted(home))
    os.chown(file, NOBODY, NOBODY)
    out, log = run(home)
    assert out == "42" and f"belongs to user {NOBODY}, not to 0; it is compiled again" in log
    assert library_of(home).stat().st_uid == 0 and run(home) == ("42", "")


@needs_root
def test_two_users_of_one_folder(home: Path) -> None:
    """Such as HOME=/tmp in a container: the second user neither loads nor changes what the first has."""
    (home / "cache").mkdir()
    (home / "cache").chmod(0o777)
    assert run(home, user=NOBODY, umask=0) == ("42", "")
    before = library_of(home).read_bytes()
    out, log = run(home, umask=0)
    assert out == "42" and f"belongs to user {NOBODY}" in log and library_of(home).read_bytes() == before


@needs_root
def test_a_user_without_a_home(home: Path) -> None:
    out, log = run(home, user=NOBODY, XDG_CACHE_HOME="", HOME="/nonexistent")
    assert out == "42" and "/nonexistent" in log and "try: export XDG_CACHE_HOME=" in log
    assert len(list((home / "tmp" / f"ascendit-{NOBODY}" / "native").glob("*.so"))) == 1
