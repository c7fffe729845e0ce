"""An output folder appears complete or not at all: after kills, full disks, races, at unusual paths."""

import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kill
import pytest
from stored import stored_tensors

from ascendit.checkpoint.journal import Journal
from ascendit.checkpoint.output_folder import Staging
from ascendit.checkpoint.weight_files import Shards
from ascendit.checkpoint.writer import ShardWriter, TensorSpec
from ascendit.errors import AscenditError, Cancelled, EnvironmentProblem, UsageError


def stage(dst: Path | str, *, sources: tuple[Path, ...] = (), **options: Any) -> Staging:
    return Staging(Path(dst), sources=sources, **{"fingerprint": "f", **options})


def refused(dst: Path | str, code: str, **options: Any) -> AscenditError:
    """Return the error; check that nothing new is left beside `dst`."""
    before = sorted(os.listdir(Path(dst).parent)) if Path(dst).parent.is_dir() else None
    with pytest.raises((UsageError, EnvironmentProblem)) as e:
        stage(dst, **options)
    assert e.value.code == code, str(e.value)
    after = sorted(os.listdir(Path(dst).parent)) if Path(dst).parent.is_dir() else None
    assert before == after
    return e.value


def partial(dst: Path) -> Path:
    return dst.parent / f".{dst.name}.partial"


# ---- publishing and resuming


def test_the_output_appears_by_one_rename(tmp_path: Path) -> None:
    dst = tmp_path / "out"
    with stage(dst) as staging:
        (staging.path / "a").mkdir()
        (staging.path / "a" / "f").write_text("x")
        assert not dst.exists() and staging.path.name == "out"
        inode = staging.path.stat().st_ino
        staging.publish()
        assert dst.stat().st_ino == inode
    assert kill.contents(dst) == {"a/f": b"x"}, "the journal stays outside"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_an_unpublished_output_is_removed(tmp_path: Path, error: type[BaseException] | None) -> None:
    try:
        with stage(tmp_path / "new" / "er" / "out") as staging:
            (staging.path / "f").write_text("x")
            if error:
                raise error
    except BaseException as e:
        assert type(e) is error
    assert os.listdir(tmp_path) == [], "created parents are removed too"


def cancelled() -> Cancelled:
    return Cancelled("cancelled", needs="-", fix="-", code="E-CAN-01")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), cancelled()])
def test_complete_files_are_preserved_after_ctrl_c(
    tmp_path: Path, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    dst = tmp_path / "out"
    with caplog.at_level(logging.INFO, "ascendit"), pytest.raises(type(error)):
        with stage(dst) as staging:
            (staging.path / "f").write_text("xyz")
            staging.journal.add(staging.path / "f", 3)
            raise error
    assert f"kept {partial(dst)}: the resume option continues it" in caplog.text
    with stage(dst, resume=True) as staging:
        assert (staging.path / "f").read_text() == "xyz"
        done = staging.journal.complete(staging.path / "f")
        assert done is not None and done.nbytes == 3
        staging.publish()
    assert os.listdir(tmp_path) == ["out"]


def test_keep_preserves_files_after_any_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), stage(tmp_path / "out") as staging:
        staging.keep = True
        (staging.path / "f").write_text("x")
        raise RuntimeError
    assert (partial(tmp_path / "out") / "out" / "f").read_text() == "x"


def killed_run(dst: Path, *, fingerprint: str = "f") -> Path:
    """The partial output of a killed run with one complete file."""
    with pytest.raises(KeyboardInterrupt), stage(dst, fingerprint=fingerprint) as staging:
        (staging.path / "f").write_text("x")
        staging.journal.add(staging.path / "f", 1)
        raise KeyboardInterrupt
    return partial(dst)


def test_without_resume_the_partial_output_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = killed_run(tmp_path / "out")
    with caplog.at_level(logging.INFO, "ascendit"), stage(tmp_path / "out") as staging:
        assert os.listdir(staging.path) == []
        assert staging.journal.count == 0
    assert f"removing {folder}, the output of a killed run: the resume option would" in caplog.text
    assert os.listdir(tmp_path) == []


def test_resume_with_other_options_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = killed_run(tmp_path / "out", fingerprint="other")
    before = kill.contents(folder)
    e = refused(tmp_path / "out", "E-USE-01", resume=True)
    assert e.got == f"{folder} is from a run with another source, other options or another version"
    assert "without resume" in e.fix
    assert kill.contents(folder) == before
    stage(tmp_path / "out", fingerprint="other", resume=True).publish()


@pytest.mark.parametrize("damage", ["boot", "not json", "list", "entry"])
def test_resume_starts_over_if_the_journal_is_invalid(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After a restart of the machine, writes of a killed process may not be on disk."""
    journal = killed_run(tmp_path / "out") / "journal.json"
    data = json.loads(journal.read_text())
    if damage == "entry":
        data["files"]["f"] = {"size": 1}
    else:
        data["boot"] = "another"
    journal.write_text({"not json": "{", "list": "[]"}.get(damage, json.dumps(data)))
    with (
        caplog.at_level(logging.INFO, "ascendit"),
        stage(tmp_path / "out", resume=True) as staging,
    ):
        assert os.listdir(staging.path) == [] and staging.journal.count == 0
    assert "it is damaged, or the machine has restarted" in caplog.text


def test_resume_without_partial_output_is_a_normal_run(tmp_path: Path) -> None:
    with stage(tmp_path / "out", resume=True) as staging:
        staging.publish()
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("moment", ["empty", "half a journal", "no output folder"])
def test_every_partial_output_is_reused_or_removed(tmp_path: Path, moment: str) -> None:
    folder = partial(tmp_path / "out")
    folder.mkdir()
    if moment == "half a journal":
        (folder / "journal.json.new").write_text("{")
    if moment == "no output folder":
        Journal(folder / "journal.json", folder / "out", "f").write()
    for resume in (True, False):
        with stage(tmp_path / "out", resume=resume) as staging:
            (staging.path / "f").write_text("x")
            if not resume:
                staging.publish()
            else:
                staging.keep = True
    assert kill.contents(tmp_path / "out") == {"f": b"x"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "folder of others"])
def test_files_of_others_are_never_removed(tmp_path: Path, kind: str) -> None:
    folder, other = partial(tmp_path / "out"), tmp_path / "other"
    if kind == "file":
        folder.write_text("x")
    elif kind == "folder of others":
        folder.mkdir()
        (folder / "diary").write_text("x")
    else:
        if kind == "link":
            killed_run(tmp_path / "out").rename(other)
        folder.symlink_to(other)
    for resume in (False, True):
        e = refused(tmp_path / "out", "E-USE-03", resume=resume)
        assert e.got == f"{folder} exists, and it is not the output of a killed run"
    assert os.path.lexists(folder)
    if kind == "link":
        assert (other / "out" / "f").exists()


# ---- paths


@pytest.mark.parametrize("kind", ["file", "folder", "empty", "dangling link", "."])
def test_an_output_that_exists_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dst = tmp_path / "out"
    if kind == "file":
        dst.write_text("x")
    elif kind in ("folder", "empty"):
        dst.mkdir()
        if kind == "folder":
            (dst / "f").write_text("x")
    elif kind == "dangling link":
        dst.symlink_to(tmp_path / "nothing")
    else:
        monkeypatch.chdir(tmp_path)
        dst = Path(".")
    e = refused(dst, "E-USE-03")
    assert "already exists" in e.got and "nothing is overwritten" in e.needs


@pytest.mark.parametrize("name", ["", "/", "..", "missing/..", "a\0b"])
def test_an_output_without_a_name_is_refused(tmp_path: Path, name: str) -> None:
    code = "E-USE-03" if name in ("", "/", "..") else "E-USE-01"
    refused(Path(name) if name in ("", "/") else tmp_path / name, code)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("notation", ["relative", "slash", "below a link", "up from a link"])
def test_every_notation_of_a_path(tmp_path: Path, notation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    monkeypatch.chdir(tmp_path)
    dst, real = {
        "relative": ("out", "out"),
        "slash": (f"{tmp_path}/out/", "out"),
        "below a link": (f"{tmp_path}/link/out", "real/deep/out"),
        "up from a link": ("link/../out", "real/out"),
    }[notation]
    with stage(dst) as staging:
        monkeypatch.chdir("/")  # a relative path is relative to the folder where the run began
        (staging.path / "f").write_text("x")
        staging.publish()
    assert kill.contents(tmp_path / real) == {"f": b"x"}


@pytest.mark.parametrize("position", ["inside", "same", "deep", "by a link", "around", "a partial output"])
def test_output_and_input_inside_each_other(tmp_path: Path, position: str) -> None:
    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    dst, source = {
        "inside": (model / "out", model),
        "same": (model, model),
        "deep": (model / "new" / "out", model),
        "by a link": (tmp_path / "link" / "out", model),
        "around": (model, model / "transformer"),
        "a partial output": (tmp_path / "out", tmp_path / ".out.partial" / "out"),
    }[position]
    if position == "a partial output":
        killed_run(dst)
    e = refused(dst, "E-USE-06", sources=(tmp_path / "elsewhere", source))
    assert e.needs == "an output folder that neither is inside a source folder nor contains one"
    assert source.exists() and (model / "transformer").is_dir()


def test_output_beside_a_source_with_a_similar_name(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    stage(tmp_path / "model-new", sources=(tmp_path / "model",)).publish()
    assert (tmp_path / "model-new").is_dir()


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    e = refused(tmp_path / "f" / "out", "E-ENV-02")
    assert "cannot write in" in e.got


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    e = refused(tmp_path / ("x" * 250), "E-ENV-02")
    assert "File name too long" in e.got


def test_a_parent_that_is_read_only() -> None:
    """Run as another user, because root may write everywhere, in a folder that all users can enter."""
    code = """
import os
from pathlib import Path
from ascendit.checkpoint.output_folder import Staging
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
try:
    Staging(Path(sys.argv[1]), sources=[], fingerprint="f")
except Exception as e:
    print(e)
"""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        for name in ("out", "new/out"):
            argv = kill.python(code, Path(folder) / name)
            done = subprocess.run(argv, capture_output=True, text=True, check=True)
            assert "[E-ENV-02] cannot write in" in done.stdout
            assert "Permission denied" in done.stdout


# ---- concurrent runs


def test_two_runs_of_one_output(tmp_path: Path) -> None:
    dst = tmp_path / "out"
    with stage(dst) as staging:
        (staging.path / "f").write_text("x")
        for resume in (False, True):
            with pytest.raises(UsageError) as e:
                stage(dst, resume=resume)
            assert e.value.code == "E-USE-03"
            assert e.value.got == f"another run is writing .out.partial in {tmp_path}"
        staging.publish()
    assert kill.contents(dst) == {"f": b"x"}
    assert "already exists" in refused(dst, "E-USE-03").got


def test_one_of_many_simultaneous_runs_wins(tmp_path: Path) -> None:
    code = """
import time
from pathlib import Path
from ascendit.checkpoint.output_folder import Staging
from ascendit.errors import UsageError
try:
    with Staging(Path(sys.argv[1]), sources=[], fingerprint="f") as staging:
        (staging.path / "who").write_text(sys.argv[2])
        time.sleep(0.05)
        (staging.path / "again").write_text(sys.argv[2])
        staging.publish()
    print("won")
except UsageError as e:
    print(e.code)
"""
    for turn in range(3):
        dst = tmp_path / str(turn)
        runs = [subprocess.Popen(kill.python(code, dst, i), stdout=subprocess.PIPE) for i in range(4)]
        answers = sorted(run.communicate()[0].decode().strip() for run in runs)
        assert answers == ["E-USE-03"] * 3 + ["won"]
        output = kill.contents(dst)
        assert len(output) == 2 and output["who"] == output["again"]
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    stage(tmp_path / "out").publish()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "empty", "folder", "link"])
def test_an_output_created_during_the_run_is_not_replaced(tmp_path: Path, kind: str) -> None:
    dst = tmp_path / "out"
    with pytest.raises(UsageError) as e, stage(dst) as staging:
        (staging.path / "f").write_text("x")
        if kind == "file":
            dst.write_text("y")
        elif kind == "link":
            dst.symlink_to("nothing")
        else:
            dst.mkdir()
            if kind == "folder":
                (dst / "g").write_text("y")
        staging.publish()
    assert e.value.code == "E-USE-03"
    assert e.value.got == f"{dst} was created by another program during this run"
    assert str(staging.path) in e.value.fix
    assert kill.contents(staging.path) == {"f": b"x"}, "the partial output is preserved"
    if kind in ("empty", "folder"):
        assert os.listdir(dst) == (["g"] if kind == "folder" else [])
    else:
        assert dst.is_file() if kind == "file" else os.readlink(dst) == "nothing"


# ---- disk space


def test_too_little_disk_space_is_reported_before_writing(tmp_path: Path) -> None:
    needed = shutil.disk_usage(tmp_path).free * 2
    e = refused(tmp_path / "out", "E-ENV-04", needs_bytes=needed)
    assert e.got.startswith(f"{needed:,} bytes (") and "bytes available" in e.got
    assert e.needs.split()[0].replace(",", "").isdigit(), "the missing bytes"
    assert os.listdir(tmp_path) == []


def test_bytes_of_a_killed_run_count_as_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), stage(tmp_path / "out") as staging:
        (staging.path / "f").write_bytes(bytes(1 << 20))
        staging.journal.add(staging.path / "f", 1 << 20)
        raise KeyboardInterrupt
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    stage(tmp_path / "out", resume=True, needs_bytes=1 << 20)._release()
    refused(tmp_path / "out", "E-ENV-04", resume=True, needs_bytes=2 << 20)
    assert (partial(tmp_path / "out") / "out" / "f").exists(), "the run can still be resumed"


@pytest.mark.parametrize("number", [28, 122, 27])
def test_a_disk_that_fills_up_during_the_run(tmp_path: Path, number: int) -> None:
    with pytest.raises(EnvironmentProblem) as e, stage(tmp_path / "out", needs_bytes=7) as staging:
        (staging.path / "f").write_text("x")
        staging.journal.add(staging.path / "f", 1)
        raise OSError(number, os.strerror(number), "config.json")
    assert e.value.code == "E-ENV-04"
    assert e.value.got.startswith("7 bytes (0.00 GiB) to write below ")
    assert os.strerror(number) in e.value.got
    assert os.listdir(tmp_path) == []


def test_a_real_small_disk(tmp_path: Path) -> None:
    """On a file system of 1 MiB in memory, 2 MiB do not fit as shards, as a copied component, or as JSON."""
    code = """
import os
from pathlib import Path
from ascendit.checkpoint.output_folder import Staging, link_or_copy
from ascendit.checkpoint.writer import ShardWriter, TensorSpec
disk, big = Path(sys.argv[1]), Path(sys.argv[2])
for case in ("shards", "copy", "json", "known"):
    try:
        needs = (2 << 20) * (case == "known")
        with Staging(disk / "out", sources=[], fingerprint="f", needs_bytes=needs) as staging:
            if case == "shards":
                ShardWriter(staging.path, [TensorSpec("w", "U8", (2 << 20,))])
            elif case == "copy":
                link_or_copy(big, staging.path / "part", copy=True)
            elif case == "json":
                (staging.path / "f").write_bytes(bytes(2 << 20))
    except Exception as e:
        print(case, e.code, e.got)
    assert os.listdir(disk) == [], os.listdir(disk)
"""
    disk, big = tmp_path / "disk", tmp_path / "big"
    disk.mkdir()
    big.mkdir()
    (big / "f").write_bytes(os.urandom(2 << 20))
    script = 'mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"'
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(disk)]
    try:
        subprocess.run([*argv, "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a file system here")
    done = subprocess.run([*argv, *kill.python(code, disk, big)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        [case, "E-ENV-04"] for case in ("shards", "copy", "json", "known")
    ]
    assert all("bytes available" in line[2] for line in lines)
    assert lines[3][2].startswith("2,097,152 bytes")


# ---- killed

JOB = """
import time
from pathlib import Path
from ascendit.checkpoint.output_folder import Staging
from ascendit.checkpoint.writer import ShardWriter, TensorSpec
dst, pause = Path(sys.argv[1]), float(sys.argv[3])
with Staging(dst, sources=[], fingerprint="f", resume=sys.argv[2] == "resume") as staging:
    print("begun", flush=True)
    (staging.path / "model_index.json").write_text("{}")
    skipped = 0
    for expert in ("transformer", "transformer_2"):
        folder = staging.path / expert
        folder.mkdir(exist_ok=True)
        specs = [TensorSpec(f"{expert}.{i}", "U8", (4000,)) for i in range(12)]
        with ShardWriter(folder, specs, max_shard_bytes=8000, journal=staging.journal, hash=True) as writer:
            for i, spec in enumerate(specs):
                if writer.done(spec.name):
                    skipped += 1
                    continue
                for half in range(2):
                    writer.append(spec.name, bytes([i + half]) * 2000)
                    time.sleep(pause)
    staging.publish()
print("skipped", skipped)
"""


def check_complete(dst: Path) -> None:
    assert sorted(os.listdir(dst)) == ["model_index.json", "transformer", "transformer_2"]
    for expert in ("transformer", "transformer_2"):
        assert len(Shards.open(dst / expert).files) == 6
        tensors = {name: bytes(tensor.numpy()) for name, tensor in stored_tensors(dst / expert).items()}
        assert tensors == {f"{expert}.{i}": bytes([i]) * 2000 + bytes([i + 1]) * 2000 for i in range(12)}


def run_on_a_copy(folder: Path, to: Path, mode: str) -> int:
    """Copy the partial output and run again there. Return the number of skipped tensors."""
    to.mkdir()
    if folder.exists():
        shutil.copytree(folder, to / folder.name)
    names: dict[str, Any] = {"sys": SimpleNamespace(argv=["", to / "out", mode, 0])}
    exec(JOB, names)  # no subprocess: twenty of them take seconds
    check_complete(to / "out")
    assert os.listdir(to) == ["out"]
    shutil.rmtree(to)
    return int(names["skipped"])


def test_killed_at_ten_moments(tmp_path: Path) -> None:
    """An output is always complete; after a kill, a new run and a resumed one complete it."""
    dst = tmp_path / "out"
    skipped: list[int] = []

    def run_again() -> None:
        assert run_on_a_copy(partial(dst), tmp_path / "again", "anew") == 0
        skipped.append(run_on_a_copy(partial(dst), tmp_path / "again", "resume"))

    argv = kill.python(JOB, dst, "anew", 0.005)
    moments = kill.moments(seed=7, count=10, longest=0.3)
    killed = kill.kill_often(argv, dst, moments, check_complete, ready="begun", each=run_again)
    assert killed >= 5, "most kills are during the run"
    assert max(skipped) > 0


def test_killed_and_resumed_again_and_again(tmp_path: Path) -> None:
    """Each run resumes the killed one, so that one finally completes."""
    dst = tmp_path / "out"
    argv = kill.python(JOB, dst, "resume", 0.005)
    for moment in kill.moments(seed=8, count=30, longest=0.1, shortest=0.03):
        kill.run_and_kill(argv, moment, ready="begun")
        if dst.exists():
            break
    else:
        subprocess.run(argv, capture_output=True, check=True)
    check_complete(dst)
    shutil.rmtree(partial(dst), ignore_errors=True)  # if a run was killed just after its rename
    assert os.listdir(tmp_path) == ["out"]


def test_resume_reuses_complete_files_only(tmp_path: Path) -> None:
    dst = tmp_path / "out"
    journal = partial(dst) / "journal.json"

    def three_done() -> bool:
        return journal.exists() and journal.read_text().count(".safetensors") >= 3

    assert kill.run_and_kill(kill.python(JOB, dst, "anew", 0.005), 0.002, until=three_done)
    completed = Journal.read(journal, partial(dst) / "out")
    assert completed is not None and 3 <= completed.count < 12
    expected = [f for f in partial(dst).rglob("*.safetensors") if completed.complete(f)]
    times = {f.name: f.stat().st_mtime_ns for f in expected}
    done = subprocess.run(kill.python(JOB, dst, "resume", 0), capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["skipped", str(2 * completed.count)]
    check_complete(dst)
    assert {n: (dst / "transformer" / n).stat().st_mtime_ns for n in times} == times
    assert os.listdir(tmp_path) == ["out"]


def test_the_lock_ends_with_the_process(tmp_path: Path) -> None:
    dst = tmp_path / "out"
    argv = kill.python(JOB, dst, "anew", 1)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        with pytest.raises(UsageError, match="another run is writing"):
            stage(dst)
    finally:
        process.kill()
        process.communicate()
    stage(dst).publish()
    assert dst.is_dir()


def test_a_shard_writer_resumes_in_a_staging_folder(tmp_path: Path) -> None:
    """Journal keys are relative, so the parent may be renamed or moved."""
    specs = [TensorSpec("a", "U8", (4,)), TensorSpec("b", "U8", (4,))]
    (tmp_path / "one").mkdir()
    with pytest.raises(KeyboardInterrupt), stage(tmp_path / "one" / "out") as staging:
        with ShardWriter(staging.path, specs, max_shard_bytes=4, journal=staging.journal) as writer:
            writer.append("a", b"aaaa")
            raise KeyboardInterrupt
    (tmp_path / "one").rename(tmp_path / "two")
    with stage(tmp_path / "two" / "out", resume=True) as staging:
        with ShardWriter(staging.path, specs, max_shard_bytes=4, journal=staging.journal) as writer:
            assert (writer.done("a"), writer.done("b")) == (True, False)
            writer.append("b", b"bbbb")
        staging.publish()
    tensors = stored_tensors(tmp_path / "two" / "out")
    assert bytes(tensors["a"].numpy()) + bytes(tensors["b"].numpy()) == b"aaaabbbb"
