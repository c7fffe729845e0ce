"""One file: raw bytes, and headers that do not fit them."""

from __future__ import annotations

import json

from broken.damage import combine, content, cut, head
from broken.models import NORM, WEIGHTS, raw, save
from broken.registry import case

ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
RAWS: dict[str, tuple[str, bytes]] = {
    "empty": ("a file of no bytes", b""),
    "seven_bytes": ("shorter than a header's length", b"\x01" * 7),
    "header_past_end": ("a header that ends after the file", raw({"x": ONE}, b"abcd", length=5000)),
    "header_length_max": ("a header of 2^64 - 1 bytes", b"\xff" * 8 + b"{}"),
    "header_length_zero": ("a header of no bytes", bytes(8)),
    "not_json": ("a header that is not JSON", raw(b"{garbage")),
    "not_utf8": ("a header that is not UTF-8", raw(b'{"\xff": {}}')),
    "list": ("a header that is a list", raw([])),
    "long_number": ("a number of 5,000 digits", raw(b'{"x": {"shape": [' + b"9" * 5000 + b"]}}")),
    "twice": (
        "a duplicate name",
        raw(b'{"x": %s, "x": %s}' % ((json.dumps(ONE).encode(),) * 2), b"abcd"),
    ),
    "overlap": (
        "two tensors on the same bytes",
        raw({"x": ONE, "y": {**ONE, "data_offsets": [2, 6]}}, b"abcdef"),
    ),
    "gap": ("bytes that no tensor owns", raw({"x": ONE, "y": {**ONE, "data_offsets": [6, 10]}}, bytes(10))),
    "tail": ("bytes after the last tensor", raw({"x": ONE}, bytes(9))),
    "infinity": (
        "an offset of 1e999",
        raw(b'{"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 1e999]}}', bytes(4)),
    ),
    "web_page": ("the page of a failed download", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
}
"""File in `raw` -> description, bytes."""
for _name, (_fault, _bytes) in RAWS.items():
    case(f"raw_{_name}", "single", _fault, content(WEIGHTS, _bytes), "E-CKP-02")


case(
    "header_deep", "single", "a header nested 100,000 deep", content(WEIGHTS, raw(b"[" * 100_000)), "E-CKP-02"
)
case("truncated", "single", "the last 100 bytes are missing", cut(100), "E-CKP-02")
case("truncated_header", "single", "cut in the middle of the header", cut(-300), "E-CKP-02")
case("dtype_unknown", "single", "a dtype F7", head(lambda h: h[NORM].update(dtype="F7")), "E-CKP-02")
case(
    "dtype_size",
    "single",
    "a byte count that is not shape x dtype",
    head(lambda h: h[NORM].update(dtype="F32")),
    "E-CKP-02",
)
case(
    "shape_size",
    "single",
    "a shape with more numbers than bytes",
    head(lambda h: h[NORM].update(shape=[65])),
    "E-CKP-02",
)
case("shape_negative", "single", "a negative size", head(lambda h: h[NORM].update(shape=[-64])), "E-CKP-02")
case("shape_huge", "single", "sizes of 2^62", head(lambda h: h[NORM].update(shape=[2**62] * 9)), "E-CKP-02")
case(
    "shape_string",
    "single",
    "a size that is a string",
    head(lambda h: h[NORM].update(shape=["64"])),
    "E-CKP-02",
)
case(
    "offsets_reversed",
    "single",
    "an end before its start",
    head(lambda h: h[NORM].update(data_offsets=[128, 0])),
    "E-CKP-02",
)
case("entry_null", "single", "a tensor that is null", head(lambda h: h.update({NORM: None})), "E-CKP-02")
case(
    "file_is_folder",
    "single",
    "a folder in place of the weights",
    combine(lambda f: (f / WEIGHTS).unlink(), lambda f: (f / WEIGHTS).mkdir()),
    "E-CKP-02",
)
case("no_weights", "single", "config.json alone", lambda f: (f / WEIGHTS).unlink(), "E-CKP-02")
case("single_truncated", "single", "a single file passed directly, cut", cut(7), "E-CKP-02", source=WEIGHTS)
case(
    "not_a_model",
    "single",
    "tensors of something else",
    lambda f: save(f / WEIGHTS, {"lm_head.weight": ("U8", (1,), b"x")}),
    "E-CKP-01",
)
case("no_tensors", "single", "a file without tensors", lambda f: save(f / WEIGHTS, {}), "E-CKP-01")
