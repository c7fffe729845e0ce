"""Downloads from both hubs: which files, how often, and what a wrong answer of the server leads to."""

from __future__ import annotations

import email.utils
import importlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT_1, FILES, WEIGHTS, StandIn
from hypothesis import given
from hypothesis import strategies as st

from ascendit.checkpoint.download_list import TOP_FILES, matching, part_files, weight_files
from ascendit.checkpoint.hub import fetch
from ascendit.errors import AscenditError, UsageError

on_both_hubs = pytest.mark.parametrize("name", ["hf:org/model", "ms:org/model"])


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a download waits, without waiting."""
    seconds: list[float] = []
    monkeypatch.setattr("ascendit.checkpoint.download.time.sleep", seconds.append)
    return seconds


def downloaded(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def refusal(name: str, cache: Path, server: StandIn) -> AscenditError:
    with pytest.raises(AscenditError) as e:
        fetch(name, cache=cache, endpoint=server.endpoint)
    assert e.value.code == "E-HUB-01"
    snapshots = cache / "models--org--model" / "snapshots"
    assert [p for p in snapshots.glob("*") if p.suffix != ".part" and name.startswith("ms:")] == []
    return e.value


# ---- the files ----------------------------------------------------------------------------------


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": shard for i, shard in enumerate(shards)}}).encode()


PARTS = {
    "_class_name": "WanPipeline",
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
DIFFUSERS = {
    "model_index.json": json.dumps(PARTS).encode(),
    "README.md": b"# card",
    "LICENSE.txt": b"Apache",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors.index.json": index("a.safetensors", "b.safetensors"),
    "transformer/a.safetensors": b"a",
    "transformer/b.safetensors": b"b",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors": b"m",
    "tokenizer/tokenizer.json": b"{}",
    "tokenizer/spiece.model": b"s",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"v",
}
UNUSED = {
    "transformer/c.safetensors": b"of another version",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"variant",
    "text_encoder/pytorch_model.bin": b"pickle",
    "text_encoder/onnx/model.onnx": b"onnx",
    "vae/nested/more.json": b"{}",
    "models_t5_umt5-xxl-enc-bf16.pth": b"pickle",
    "Wan2.1_VAE.pth": b"pickle",
    "Wan2_1.gguf": b"gguf",
    "whole.safetensors": b"whole",
    "examples/i2v_input.JPG": b"jpg",
    "google/umt5-xxl/spiece.model": b"s",
    "assets/a.mp4": b"mp4",
    ".gitattributes": b"",
}
CONFIG = {"config.json": b'{"_class_name": "WanModel"}', "README.md": b"# card"}
INDEX = "diffusion_pytorch_model.safetensors.index.json"
ORIGINAL = {**CONFIG, INDEX: index("diffusion_pytorch_model-00001-of-00001.safetensors")}
ORIGINAL |= {"diffusion_pytorch_model-00001-of-00001.safetensors": b"w"}
CASCADE = {
    f"{noise}_noise_model/{name}": data for noise in ("high", "low") for name, data in ORIGINAL.items()
}
del CASCADE["high_noise_model/README.md"], CASCADE["low_noise_model/README.md"]
EXPORT = {**CONFIG, "quant_model_description_w8a8_dynamic.json": b"{}"}
EXPORT |= {"quant_model_weight_w8a8_dynamic.safetensors": b"w"}
ONE_FILE = {"README.md": b"# card", "Wan2_1-T2V-1_3B_fp8.safetensors": b"w"}


@on_both_hubs
@pytest.mark.parametrize(
    "files",
    [DIFFUSERS, ORIGINAL, {**CASCADE, "README.md": b""}, EXPORT, ONE_FILE],
    ids=["diffusers", "original", "cascade", "export", "file"],
)
def test_only_files_that_are_read_are_downloaded(
    name: str, files: dict[str, bytes], tmp_path: Path, server: StandIn
) -> None:
    more = {k: v for k, v in UNUSED.items() if files is DIFFUSERS or k != "whole.safetensors"}
    server.files = {**files, **more}
    folder = fetch(name, cache=tmp_path, endpoint=server.endpoint)
    assert downloaded(folder) == set(files)


@on_both_hubs
def test_a_repository_of_other_formats_names_the_command_for_a_file(
    name: str, tmp_path: Path, server: StandIn
) -> None:
    server.files = {"README.md": b"# card", "TurboWan-quant.pth": b"w", "wan.gguf": b"w"}
    error = refusal(name, tmp_path, server)
    assert "TurboWan-quant.pth" in error.got and "wan.gguf" in error.got
    assert error.fix.endswith("download org/model TurboWan-quant.pth")


@on_both_hubs
@pytest.mark.parametrize("files", [DIFFUSERS, CASCADE], ids=["diffusers", "cascade"])
def test_the_experts_are_downloaded_by_a_later_call(
    name: str, files: dict[str, bytes], tmp_path: Path, server: StandIn
) -> None:
    server.files = {**files, "README.md": b"# card"}
    experts = {file for file in files if "transformer/" in file or "_noise_" in file}
    experts = {file for file in experts if file.endswith(".safetensors")}
    options: dict[str, Any] = {"cache": tmp_path, "endpoint": server.endpoint}
    for _ in range(2):
        folder = fetch(name, experts=False, **options)
        assert downloaded(folder) == set(server.files) - experts
    assert fetch(name, **options) == folder and downloaded(folder) == set(server.files)
    assert fetch(name, experts=False, **options) == folder
    sent = [request for request in server.requests if "GET" in request]
    assert all(len([request for request in sent if file in request]) <= 1 for file in experts)


@on_both_hubs
def test_a_repository_of_many_models_is_refused_before_the_download(
    name: str, tmp_path: Path, server: StandIn
) -> None:
    server.files = {"README.md": b"", **{f"Wan{i}.safetensors": b"w" for i in range(40)}}
    e = refusal(name, tmp_path, server)
    assert isinstance(e, UsageError)
    assert "40 weight files" in e.got
    assert not any(".safetensors" in request for request in server.requests)


@given(st.lists(st.sampled_from([*DIFFUSERS, *UNUSED, "transformer/x/../y.json", "a\nb.json"]), unique=True))
def test_no_unused_file_matches_any_step(names: list[str]) -> None:
    selected = matching(names, [*TOP_FILES, "transformer/*.json", "text_encoder/*.json", "vae/*.json"])
    assert set(selected) <= set(DIFFUSERS) - {"tokenizer/spiece.model"}


def test_names_of_parts_and_shards_are_literal(tmp_path: Path) -> None:
    entry = ["diffusers", "X"]
    parts = {
        "_class_name": "WanPipeline",
        "tr[a]*": entry,
        "../up": entry,
        "a/b": entry,
        "none": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    (tmp_path / "tr[a]*").mkdir()
    (tmp_path / "tr[a]*" / INDEX).write_bytes(index("s[1].safetensors", "../x.safetensors"))
    names = ["tr[a]*/c.json", "tra/c.json", "../up/c.json", "a/b/c.json", "none/c.json"]
    assert matching(names, part_files(tmp_path)) == ["tr[a]*/c.json"]
    names = ["tr[a]*/s[1].safetensors", "tr[a]*/s1.safetensors", "x.safetensors"]
    assert matching(names, weight_files(tmp_path)) == ["tr[a]*/s[1].safetensors"]


# ---- patience -----------------------------------------------------------------------------------


@on_both_hubs
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(
    name: str, status: int, tmp_path: Path, server: StandIn, waits: list[float]
) -> None:
    server.busy = [(status, {}), (status, {"Retry-After": "7"})]
    assert fetch(name, cache=tmp_path, endpoint=server.endpoint).name == COMMIT_1
    if name.startswith("ms:"):  # the Hub's library waits on its own
        assert waits == [1, 7]


def test_a_date_in_retry_after(tmp_path: Path, server: StandIn, waits: list[float]) -> None:
    server.busy = [
        (503, {"Retry-After": email.utils.formatdate(time.time() + 30)}),
        (503, {"Retry-After": "?"}),
    ]
    fetch("ms:org/model", cache=tmp_path, endpoint=server.endpoint)
    assert 25 < waits[0] <= 30
    assert waits[1] == 2


def test_a_server_that_wants_an_hour(tmp_path: Path, server: StandIn, waits: list[float]) -> None:
    server.busy = [(429, {"Retry-After": "3600"})]
    assert "asks to wait 3600 s" in refusal("ms:org/model", tmp_path, server).got
    assert waits == []


def test_the_number_of_tries(tmp_path: Path, server: StandIn, waits: list[float]) -> None:
    server.busy = [(503, {})] * 9
    assert "503" in refusal("ms:org/model", tmp_path, server).got
    assert waits == [1, 2, 4, 8]
    assert len(server.requests) == 5


@pytest.mark.parametrize("status", [400, 402, 405, 410])
def test_other_errors_are_not_repeated(
    status: int, tmp_path: Path, server: StandIn, waits: list[float]
) -> None:
    server.busy = [(status, {})]
    refusal("ms:org/model", tmp_path, server)
    assert waits == []


def test_a_busy_server_in_the_middle_of_the_files(
    tmp_path: Path, server: StandIn, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.break_off_at = 5000
    folder = fetch("ms:org/model", cache=tmp_path, endpoint=server.endpoint)
    assert (folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert waits == [1]


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "data:,x", "/loop"])
def test_redirects_to_other_schemes_and_loops(target: str, tmp_path: Path, server: StandIn) -> None:
    server.refuse = (302, {"Location": target})
    refusal("ms:org/model", tmp_path, server)


# ---- ranges -------------------------------------------------------------------------------------


def resumed(cache: Path, server: StandIn) -> Path:
    """A download that resumes at byte 5,000."""
    part = cache / "models--org--model" / "snapshots" / f"{COMMIT_1}.part" / f"{WEIGHTS}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(FILES[WEIGHTS][:5000])
    return fetch("ms:org/model", cache=cache, endpoint=server.endpoint)


@pytest.mark.parametrize("range", [None, ""])
def test_the_bar_shows_the_bytes_in_the_file(
    range: str | None, tmp_path: Path, server: StandIn, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a connection that broke off, and where the server then starts from the beginning."""
    shown: list[float] = []

    def close(bar: Any) -> None:
        if "safetensors" in bar.desc:
            shown.append(bar.n / bar.total)

    bars = importlib.import_module("huggingface_hub.utils.tqdm")
    monkeypatch.setattr(bars, "are_progress_bars_disabled", lambda name=None: False)
    monkeypatch.setattr("tqdm.tqdm.close", close)
    server.break_off_at, server.range = 5000, range
    fetch("ms:org/model", cache=tmp_path, endpoint=server.endpoint)
    assert waits and shown == [1.0]


def test_a_server_that_ignores_the_range(tmp_path: Path, server: StandIn) -> None:
    server.range = ""
    assert (resumed(tmp_path, server) / WEIGHTS).read_bytes() == FILES[WEIGHTS]


@pytest.mark.parametrize(
    "header", ["bytes 0-12799/12800", "bytes 5000-9999/12800", "bytes 5000-12799/99999", "bytes x", "items 1"]
)
def test_another_range_than_requested(header: str, tmp_path: Path, server: StandIn) -> None:
    server.range = header
    with pytest.raises(AscenditError, match="not the bytes from 5000") as e:
        resumed(tmp_path, server)
    assert e.value.code == "E-HUB-01"
    server.range = None
    folder = fetch("ms:org/model", cache=tmp_path, endpoint=server.endpoint)
    assert (folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]


@pytest.mark.parametrize("total", ["12800", "*"])
def test_the_right_range(total: str, tmp_path: Path, server: StandIn) -> None:
    server.range = f"bytes 5000-12799/{total}"
    assert (resumed(tmp_path, server) / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert server.requests[-1].endswith("bytes=5000-")


def test_a_partial_file_that_is_too_long(tmp_path: Path, server: StandIn) -> None:
    part = tmp_path / "models--org--model" / "snapshots" / f"{COMMIT_1}.part" / f"{WEIGHTS}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 20000)
    folder = fetch("ms:org/model", cache=tmp_path, endpoint=server.endpoint)
    assert (folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_a_shorter_body(tmp_path: Path, server: StandIn, waits: list[float]) -> None:
    server.sent[WEIGHTS] = FILES[WEIGHTS][:-1]
    assert f"{WEIGHTS}: the server sends the range" in refusal("ms:org/model", tmp_path, server).got
    assert waits == [1]


# ---- listings -----------------------------------------------------------------------------------


FILE: dict[str, Any] = {"Path": "config.json", "Type": "blob", "Size": 1}


def listing(**changes: Any) -> bytes:
    entry = {**FILE, "Sha256": "", "Revision": "r", **changes}
    return json.dumps({"Code": 200, "Success": True, "Data": {"Files": [entry]}}).encode()


def listing_of(*files: Any) -> bytes:
    return json.dumps({"Data": {"Files": files}}).encode()


SIZES = (-1, 2**60, "1", True, None, 1.5, float("inf"), float("nan"))
PATHS: tuple[Any, ...] = (
    *("", ".", "..", "/", "/etc/x", "a/../b", "../x", "a//b", "./a", "a\\b", "C:x", "a\0b", "a/", "a\nb"),
    *("a\x1b[2J", "\x9bq", "x" * 256, "x/" * 600 + "y", 5, None, ["a"]),
)
BAD_LISTINGS: dict[str, Callable[[], bytes]] = {
    "empty body": lambda: b"",
    "not text": lambda: b"\xff\xfe\x00",
    "html": lambda: b"<html>",
    "a list": lambda: b"[]",
    "no data": lambda: b'{"Data": null}',
    "no files": listing_of,
    "only folders": lambda: listing(Type="tree"),
    "deep": lambda: b'{"Data":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "huge": lambda: b'{"Data": "' + b"x" * 50_000_001 + b'"}',
    "number for a file": lambda: listing_of(1),
    "size 1e400": lambda: listing_of(FILE).replace(b'"Size": 1', b'"Size": 1e400'),
    "hash": lambda: listing(Sha256="xyz"),
    "twice": lambda: listing_of(FILE, FILE),
    "two cases": lambda: listing_of(FILE, {**FILE, "Path": "CONFIG.json"}),
    "file and folder": lambda: listing_of(FILE, {**FILE, "Path": "config.json/x"}),
    **{f"size {size!r}": partial(listing, Size=size) for size in SIZES},
    **{f"path {str(path)[:9]!r}": partial(listing, Path=path) for path in PATHS},
}


@pytest.mark.parametrize("kind", BAD_LISTINGS)
def test_an_invalid_listing(kind: str, tmp_path: Path, server: StandIn) -> None:
    server.listing = BAD_LISTINGS[kind]()
    start = time.monotonic()
    refusal("ms:org/model", tmp_path, server)
    assert time.monotonic() - start < 10
    assert not any("FilePath" in request for request in server.requests)


def test_a_long_revision(tmp_path: Path, server: StandIn) -> None:
    for name in ("hf:org/model@" + "x" * 5000, "ms:org/model@" + "x" * 5000, "hf:org/model@a\nb"):
        with pytest.raises(UsageError, match="hub name"):
            fetch(name, cache=tmp_path, endpoint=server.endpoint)
    assert server.requests == []


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("hf:Kijai/WanVideo_comfy/a/x.safetensors", "hf download Kijai/WanVideo_comfy a/x.safetensors"),
        ("ms:Kijai/WanVideo_comfy/x.safetensors", "modelscope download Kijai/WanVideo_comfy x.safetensors"),
    ],
)
def test_a_file_in_a_repository(name: str, fix: str) -> None:
    with pytest.raises(UsageError) as e:
        fetch(name)
    assert fix in e.value.fix
