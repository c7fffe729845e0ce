"""Names to folders, and downloads, against a local server with the API of both hubs."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from ascendit.checkpoint import hub
from ascendit.checkpoint.hub import fetch, model_folder
from ascendit.checkpoint.layout import recognise
from ascendit.errors import AscenditError, EnvironmentProblem, UsageError

COMMIT_1, COMMIT_2 = "1" * 40, "2" * 40
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FILES: dict[str, bytes] = {
    "model_index.json": json.dumps(
        {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    ).encode(),
    "transformer/config.json": b'{"_class_name": "WanTransformer3DModel"}',
    WEIGHTS: bytes(range(256)) * 50,
    "README.md": b"# card",
    "assets/picture.PNG": b"png",
    "transformer/old.bin": b"bin",
}
KEPT = {"model_index.json", "transformer/config.json", WEIGHTS, "README.md"}


class StandIn(ThreadingHTTPServer):
    """Serves `org/model` in every revision of `revisions` (branch or commit -> commit)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.revisions = {"main": COMMIT_1, "master": COMMIT_1, "v1.0": COMMIT_1, COMMIT_1: COMMIT_1}
        self.files = dict(FILES)
        self.sent: dict[str, bytes] = {}
        """Content sent instead of the announced one."""
        self.commits = True
        """Whether the ModelScope API reports the commit of its listing."""
        self.refuse: tuple[int, dict[str, str]] | None = None
        self.break_off_at: int | None = None
        self.requests: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        range_header = self.headers.get("Range")
        self.server.requests.append(
            f"{self.command} {unquote(self.path)}" + (f" {range_header}" if range_header else "")
        )
        if self.server.refuse:
            return self.answer(b"{}", status=self.server.refuse[0], **self.server.refuse[1])
        segments = unquote(url.path).strip("/").split("/")
        if segments[:4] == ["api", "models", "org", "model"]:
            return self.huggingface_api(segments[4], segments[5])
        if segments[:3] == ["org", "model", "resolve"]:
            name = "/".join(segments[4:])
            etag = hashlib.sha256(self.server.files[name]).hexdigest()
            return self.send_file(name, ETag=f'"{etag}"', **{"X-Repo-Commit": segments[3]})
        if segments[:6] == ["api", "v1", "models", "org", "model", "repo"]:
            return self.modelscope_api(segments[6:], query)
        return self.answer(b"{}", status=404, **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def huggingface_api(self, verb: str, revision: str) -> None:
        commit = self.server.revisions.get(revision)
        if commit is None:
            return self.answer(b"{}", status=404, **{"X-Error-Code": "RevisionNotFound"})
        if verb == "revision":
            return self.json({"id": "org/model", "sha": commit})
        tree = []
        for name, data in self.server.files.items():
            digest = hashlib.sha256(data).hexdigest()
            lfs = {"lfs": {"oid": digest, "size": len(data), "pointerSize": 130}} if name == WEIGHTS else {}
            tree.append({"type": "file", "path": name, "oid": digest[:40], "size": len(data)} | lfs)
        return self.json(tree)

    def modelscope_api(self, segments: list[str], query: dict[str, str]) -> None:
        commit = self.server.revisions.get(query["Revision"])
        if commit is None:
            return self.answer(b"{}", status=404)
        if segments != ["files"]:
            return self.send_file(query["FilePath"])
        assert query["Recursive"] == "True"
        entries: list[dict[str, Any]] = [{"Path": "transformer", "Type": "tree", "Size": 0, "Sha256": ""}]
        for name, data in self.server.files.items():
            digest = hashlib.sha256(data).hexdigest()
            entries.append(
                {"Path": name, "Type": "blob", "Size": len(data), "Sha256": digest, "Revision": commit}
            )
        latest = {"Id": commit} if self.server.commits else {"Id": "", "ShortId": commit[:7]}
        return self.json(
            {"Code": 200, "Success": True, "Data": {"Files": entries, "LatestCommitter": latest}}
        )

    def send_file(self, name: str, **headers: Any) -> None:
        data = self.server.sent.get(name, self.server.files[name])
        range_header = self.headers.get("Range")
        if range_header:
            start = int(range_header.removeprefix("bytes=").rstrip("-"))
            span = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            return self.answer(data[start:], status=206, **headers, **span)
        return self.answer(data, **headers)

    def json(self, data: object) -> None:
        headers: dict[str, Any] = {"Content-Type": "application/json"}
        self.answer(json.dumps(data).encode(), **headers)

    def answer(self, data: bytes, status: int = 200, **headers: Any) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.server.break_off_at
        if limit is not None and len(data) > limit:
            self.server.break_off_at = None
            self.wfile.write(data[:limit])
            self.close_connection = True
        else:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    with StandIn() as stand_in:
        thread = threading.Thread(target=stand_in.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield stand_in
        stand_in.shutdown()
        thread.join()


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
    server.files["evil.json"] = server.files["tmp/evil.json"] = (
        b"evil"  # would be sent if the name were normalised
    )
    cache = tmp_path / "deep" / "cache"
    before = Path("/tmp/evil.json").exists()
    try:
        folder = fetch(name, cache=cache, endpoint=server.endpoint)
    except EnvironmentProblem as e:
        assert e.code == "E-HUB-01"
        assert "evil.json" in e.got
    else:  # a library may remove the leading slash
        assert (name, path) == ("hf:org/model", "/tmp/evil.json")
        assert (folder / "tmp" / "evil.json").exists()
    outside = [p for p in tmp_path.rglob("evil.json") if cache / "models--org--model" not in p.parents]
    assert outside == []
    assert Path("/tmp/evil.json").exists() == before


def test_modelscope_resumes_a_broken_download(
    tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
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
        file.write(data[:5000])
        if len(data) > 5000:
            raise OSError("the connection broke off")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", broken)
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
    assert "should be of size 6 but has size 15 (README.md)" in e.got


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"Data": null}', b'{"Data": {"Files": [{}]}}'])
def test_modelscope_with_an_invalid_response(
    answer: bytes, tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "json", lambda self, data: self.answer(answer))
    assert "unexpected response" in refused("ms:org/model", EnvironmentProblem, tmp_path, server.endpoint).got


def test_modelscope_with_its_own_error_response(
    tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = b'{"Code": 10010205001, "Success": false, "Message": "record not found", "Data": null}'
    monkeypatch.setattr(Handler, "json", lambda self, data: self.answer(answer))
    assert "record not found" in refused("ms:org/model", UsageError, tmp_path, server.endpoint).got


def test_too_little_disk(tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    e = refused("ms:org/model", EnvironmentProblem, tmp_path, server.endpoint)
    assert "0.0 GiB free" in e.got
    assert not any("FilePath" in r for r in server.requests)


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
    with pytest.raises(EnvironmentProblem, match="install ascendit again"):
        model_folder("demo")
