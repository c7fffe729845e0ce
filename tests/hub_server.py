"""A local server with the API of both hubs. It can send wrong, broken and slow answers."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

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
        self.busy: list[tuple[int, dict[str, str]]] = []
        """Answers to the next requests instead of the right ones: status and headers."""
        self.range: str | None = None
        """Content-Range of a resumed download instead of the right one; empty: the range is ignored."""
        self.listing: bytes | None = None
        """Body of ModelScope's listing instead of the right one."""
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
        if self.server.busy:
            status, headers = self.server.busy.pop(0)
            return self.answer(b"{}", status=status, **headers)
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
        if self.server.listing is not None:
            return self.answer(self.server.listing)
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
        if range_header and self.server.range != "":
            start = int(range_header.removeprefix("bytes=").rstrip("-"))
            span = {"Content-Range": self.server.range or f"bytes {start}-{len(data) - 1}/{len(data)}"}
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
