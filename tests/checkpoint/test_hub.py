"""Names to folders, and downloads, against a local server with the API of both hubs."""

from __future__ import annotations

import logging
import warnings
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from urllib.parse import parse_qs

import pytest
from hub_server import COMMIT_1, COMMIT_2, FILES, KEPT, WEIGHTS, Handler, StandIn

from ascendit.checkpoint import hub
from ascendit.checkpoint.hub import fetch, model_folder
from ascendit.checkpoint.layout import recognise
from ascendit.errors import AscenditError, EnvironmentProblem, UsageError


@pytest.fixture
def no_server() -> str:
    """An endpoint without a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        return f"http://127.0.0.1:{s.server_port}"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(
    name: str, error_class: type[AscenditError], cache: Path, endpoint: str, **more: Any
) -> AscenditError:
    with pytest.raises(error_class) as e:
        fetch(name, cache=cache, endpoint=endpoint, **more)
    assert type(e.value) is error_class
    assert e.value.code == "E-HUB-01"
    assert name.partition("@")[0] in e.value.got
    return e.value


on_both_hubs = pytest.mark.parametrize("name", ["hf:org/model", "ms:org/model"])


@on_both_hubs
def test_a_download_is_complete_pinned_and_logged_once(
    name: str, tmp_path: Path, server: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ascendit"):
        folder = fetch(name, cache=tmp_path, endpoint=server.endpoint)
    assert folder == tmp_path / "models--org--model" / "snapshots" / COMMIT_1
    assert files_of(folder) == {n: d for n, d in FILES.items() if n in KEPT}
    layout = recognise(folder)
    assert (layout.name, layout.source) == ("model", f"org/model@{COMMIT_1}")
    assert [r.getMessage() for r in caplog.records if r.name == "ascendit"] == [
        f"{name}@{COMMIT_1} in {folder}"
    ]


@on_both_hubs
def test_the_second_time_no_file_is_downloaded(name: str, tmp_path: Path, server: StandIn) -> None:
    folder = fetch(name, cache=tmp_path, endpoint=server.endpoint)
    server.requests.clear()
    assert fetch(name, cache=tmp_path, endpoint=server.endpoint) == folder
    assert len(server.requests) == 1  # the commit of the branch
    server.requests.clear()
    assert fetch(f"{name}@{COMMIT_1}", cache=tmp_path, endpoint=server.endpoint) == folder
    assert server.requests == []  # a commit never changes


@on_both_hubs
def test_a_branch_that_moved(name: str, tmp_path: Path, server: StandIn) -> None:
    old = fetch(name, cache=tmp_path, endpoint=server.endpoint)
    server.revisions |= {"main": COMMIT_2, "master": COMMIT_2, COMMIT_2: COMMIT_2}
    server.files["README.md"] = b"# new card"
    new = fetch(name, cache=tmp_path, endpoint=server.endpoint)
    assert (old.name, new.name) == (COMMIT_1, COMMIT_2)
    assert [(f / "README.md").read_bytes() for f in (old, new)] == [b"# card", b"# new card"]


@on_both_hubs
@pytest.mark.parametrize("revision", ["v1.0", COMMIT_1])
def test_a_revision_by_name_or_argument(name: str, revision: str, tmp_path: Path, server: StandIn) -> None:
    server.revisions |= {"main": COMMIT_2, "master": COMMIT_2}
    assert fetch(f"{name}@{revision}", cache=tmp_path, endpoint=server.endpoint).name == COMMIT_1
    assert fetch(name, revision=revision, cache=tmp_path, endpoint=server.endpoint).name == COMMIT_1


@on_both_hubs
def test_without_network_the_cached_copy_is_used(
    name: str, tmp_path: Path, server: StandIn, no_server: str
) -> None:
    folder = fetch(name, cache=tmp_path, endpoint=server.endpoint)
    assert fetch(name, cache=tmp_path, endpoint=no_server) == folder
    assert fetch(name, revision=COMMIT_1, cache=tmp_path, endpoint=no_server) == folder
    e = refused(name, EnvironmentProblem, tmp_path, no_server, revision="v1.0")
    assert "or a complete copy in the cache" in e.needs


@on_both_hubs
def test_without_network_and_copy(name: str, tmp_path: Path, no_server: str) -> None:
    assert "network" in refused(name, EnvironmentProblem, tmp_path, no_server).fix


@pytest.mark.parametrize("name", ["hf:org/other", "ms:org/other"])
def test_an_unknown_name(name: str, tmp_path: Path, server: StandIn) -> None:
    e = refused(name, UsageError, tmp_path, server.endpoint)
    assert "no such model" in e.got
    assert "correct the name" in e.fix


@on_both_hubs
def test_an_unknown_revision(name: str, tmp_path: Path, server: StandIn) -> None:
    e = refused(name, UsageError, tmp_path, server.endpoint, revision="v9")
    assert f"{name}@v9" in e.got
    assert "revision" in e.got


def test_gated_and_private(tmp_path: Path, server: StandIn) -> None:
    server.refuse = (403, {"X-Error-Code": "GatedRepo"})
    assert "hf auth login" in refused("hf:org/model", EnvironmentProblem, tmp_path, server.endpoint).fix
    server.refuse = (401, {"X-Error-Code": "RepoNotFound"})
    assert "hf auth login" in refused("hf:org/model", UsageError, tmp_path, server.endpoint).fix
    e = refused("ms:org/model", EnvironmentProblem, tmp_path, server.endpoint)
    assert "access refused (HTTP 401)" in e.got
    assert "logged in" in e.fix


def test_after_a_refusal_the_cached_copy_is_not_used(tmp_path: Path, server: StandIn) -> None:
    fetch("ms:org/model", cache=tmp_path, endpoint=server.endpoint)
    server.refuse = (401, {})
    e = refused("ms:org/model", EnvironmentProblem, tmp_path, server.endpoint)
    assert "access refused (HTTP 401)" in e.got


@pytest.mark.parametrize(
    "name",
    [
        *(
            "org/model",
            "hf:",
            "hf:model",
            "hf:a/b/c",
            "hf:../x",
            "hf:/etc/passwd",
            "s3:org/model",
            "ms:org/mo del",
        ),
        *("hf:org/model@../../x", "ms:org/model@/x", "ms:org/model@..", "ms:org/a--b", "hf:org/model?x=1"),
    ],
)
def test_an_invalid_name(name: str, tmp_path: Path) -> None:
    e = refused(name, UsageError, tmp_path, "http://127.0.0.1:1")
    assert "hf:org/name or ms:org/name" in e.needs


def test_two_revisions(tmp_path: Path) -> None:
    e = refused("hf:org/model@a", UsageError, tmp_path, "http://127.0.0.1:1", revision="b")
    assert "at most one revision" in e.needs


@on_both_hubs
def test_a_damaged_download_is_refused_and_fetched_again(name: str, tmp_path: Path, server: StandIn) -> None:
    server.sent[WEIGHTS] = FILES[WEIGHTS][:-1] + b"?"  # the right size
    e = refused(name, EnvironmentProblem, tmp_path, server.endpoint)
    assert f"{WEIGHTS} was damaged during the download" in e.got
    assert "sha256" in e.got
    server.sent.clear()
    server.requests.clear()
    folder = fetch(name, cache=tmp_path, endpoint=server.endpoint)
    assert files_of(folder)[WEIGHTS] == FILES[WEIGHTS]
    assert not any("config.json" in r for r in server.requests)  # complete files are not downloaded again


@on_both_hubs
@pytest.mark.parametrize("path", ["../../evil.json", "transformer/../../../evil.json", "/tmp/evil.json"])
def test_a_file_outside_the_folder(name: str, path: str, tmp_path: Path, server: StandIn) -> None:
    server.files[path] = b"evil"
    server.files["evil.json"] = server.files["tmp/evil.json"] = b"evil"  # would be sent if normalised
    cache = tmp_path / "deep" / "cache"
    before = Path("/tmp/evil.json").exists()
    if name.startswith("ms:"):
        assert "evil.json" in refused(name, EnvironmentProblem, cache, server.endpoint).got
    else:
        fetch(name, cache=cache, endpoint=server.endpoint)
    assert list(tmp_path.rglob("evil.json")) == []
    assert Path("/tmp/evil.json").exists() == before


def test_modelscope_resumes_a_broken_download(
    tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.break_off_at = 5000
    folder = fetch("ms:org/model", cache=tmp_path, endpoint=server.endpoint)
    assert files_of(folder)[WEIGHTS] == FILES[WEIGHTS]
    assert [r.rpartition(" ")[2] for r in server.requests if WEIGHTS in r][1:] == ["bytes=5000-"]
    assert not list(tmp_path.rglob("*.incomplete"))


def test_modelscope_leaves_no_folder_after_an_error(
    tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:

    def broken(url: str, file: IO[bytes], **options: Any) -> None:
        data = FILES[parse_qs(url)["FilePath"][0]]
        file.seek(0)
        file.write(data[:5000])
        if len(data) > 5000:
            raise OSError("the connection broke off")

    with monkeypatch.context() as patch:
        patch.setattr("ascendit.checkpoint.download.download", broken)
        e = refused("ms:org/model", EnvironmentProblem, tmp_path, server.endpoint)
    assert "the connection broke off" in e.got
    assert "run it again" in e.fix
    assert [p.name for p in (tmp_path / "models--org--model" / "snapshots").iterdir()] == [f"{COMMIT_1}.part"]
    assert fetch("ms:org/model", cache=tmp_path, endpoint=server.endpoint).name == COMMIT_1
    assert [r for r in server.requests if WEIGHTS in r][-1].endswith("bytes=5000-")


def test_modelscope_without_a_commit_is_pinned_by_content(tmp_path: Path, server: StandIn) -> None:
    server.commits = False
    first = fetch("ms:org/model", cache=tmp_path / "a", endpoint=server.endpoint)
    assert first.name != COMMIT_1
    assert len(first.name) == 40
    assert fetch("ms:org/model", cache=tmp_path / "b", endpoint=server.endpoint).name == first.name
    server.files["README.md"] = b"# new"
    assert fetch("ms:org/model", cache=tmp_path / "a", endpoint=server.endpoint).name != first.name


def test_modelscope_size_is_checked(tmp_path: Path, server: StandIn) -> None:
    server.sent["README.md"] = b"# card and more"
    e = refused("ms:org/model", EnvironmentProblem, tmp_path, server.endpoint)
    assert "README.md: the server sends more than the 6 bytes that it listed" in e.got


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"Data": null}', b'{"Data": {"Files": [{}]}}'])
def test_modelscope_with_an_invalid_response(
    answer: bytes, tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "json", lambda self, data: self.answer(answer))
    e = refused("ms:org/model", EnvironmentProblem, tmp_path, server.endpoint)
    assert "unexpected response" in e.got or "the hub lists" in e.got


def test_modelscope_with_its_own_error_response(
    tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = b'{"Code": 10010205001, "Success": false, "Message": "record not found", "Data": null}'
    monkeypatch.setattr(Handler, "json", lambda self, data: self.answer(answer))
    assert "record not found" in refused("ms:org/model", UsageError, tmp_path, server.endpoint).got


@on_both_hubs
def test_too_little_disk(name: str, tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=12_000))
    filters = list(warnings.filters)
    monkeypatch.setattr("warnings.catch_warnings", None)  # they are those of the process, not of a thread
    e = refused(name, EnvironmentProblem, tmp_path, server.endpoint)
    assert "12.5 KiB to download, 11.7 KiB free" in e.got and "another disk" in e.fix
    assert not any(WEIGHTS in r for r in server.requests) and warnings.filters == filters


def test_a_cache_that_cannot_be_written(tmp_path: Path, server: StandIn) -> None:
    (tmp_path / "file").touch()
    e = refused("ms:org/model", EnvironmentProblem, tmp_path / "file", server.endpoint)
    assert "writable" in e.fix


# ---- folder of a name ----------------------------------------------------------------------------


def test_cache_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("ascendit.checkpoint.hub.fetch", lambda name, experts=True: Path("/cache") / name)
    monkeypatch.setattr(hub, "DEMO", tmp_path / "demo")
    (tmp_path / "demo").mkdir()
    assert model_folder("demo") == tmp_path / "demo"
    assert model_folder(tmp_path) == model_folder(str(tmp_path)) == tmp_path
    for name in ("hf:org/name", "ms:org/name@v1"):
        assert model_folder(name) == Path("/cache") / name


def test_absent(tmp_path, monkeypatch):
    with pytest.raises(UsageError) as e:
        model_folder("Wan-AI/Wan2.2")
    assert e.value.code == "E-USE-02" and "hf:" in e.value.fix
    monkeypatch.setattr(hub, "DEMO", tmp_path / "demo")
    with pytest.raises(EnvironmentProblem, match="install the package again"):
        model_folder("demo")
