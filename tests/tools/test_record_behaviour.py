"""Volatile values are not recorded, recording twice gives the same, and a changed value is reported."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPO / "tools")
    return importlib.import_module("record_behaviour")


@pytest.fixture
def values(tool: ModuleType) -> ModuleType:
    return importlib.import_module("behaviour.values")


def context(tool: ModuleType, root: Path) -> Any:
    names = {"/tmp/a": "<work>", "/tmp/a/demo": "<demo>"}
    return tool.Context(work=root, sources=root, tests=root, demo=root, names=names)


def test_volatile_values_are_omitted(tool: ModuleType, tmp_path: Path) -> None:
    report = {"seconds": 1.5, "rows": [{"versions": {"torch": "2.9"}, "layers": 3}], "path": "/tmp/a/demo/x"}
    data = json.loads(context(tool, tmp_path).json(report))
    assert data == {"seconds": "-", "rows": [{"versions": "-", "layers": 3}], "path": "<demo>/x"}


def test_versions_and_free_memory_of_doctor_are_omitted(values: ModuleType) -> None:
    rows = [("torch", "2.13.0+cpu, 2 threads"), ("memory", "12 of 23 GiB free"), ("CUDA device", "none")]
    data = values.scrubbed([{"item": item, "found": result, "status": "ok"} for item, result in rows])
    assert [row["found"] for row in data] == ["- 2 threads", "-", "none"]


def test_paths_source_files_and_versions_are_replaced_in_texts(tool: ModuleType, tmp_path: Path) -> None:
    text = "steps: demo (family.py) in /tmp/a/new\n| torch | 2.13.0+cpu |\n"
    assert context(tool, tmp_path).text(text) == "steps: demo (<file>) in <work>/new\n| torch | - |\n"


def test_a_tensor_is_dtype_shape_and_bytes(values: ModuleType) -> None:
    x = torch.arange(6.0)
    variants = [x, x.view(2, 3), x.to(torch.bfloat16), x.flip(0), x.view(torch.int32), x.numpy()[:5]]
    assert len({value for y in variants for _, value in values.items("x", y)}) == len(variants)
    assert dict(values.items("x", [x, {"a": None}])).keys() == {"x.0", "x.1.a"}


def test_a_folder_is_recorded_tensor_by_tensor(tool: ModuleType, values: ModuleType, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    save_file(tensors, tmp_path / "w.safetensors")
    (tmp_path / "link").symlink_to("w.safetensors")
    first = dict(values.folder("k", tmp_path, context(tool, tmp_path)))
    assert {"k/link", "k/w.safetensors/a", "k/w.safetensors/b", "k/w.safetensors/:order"} <= first.keys()
    save_file(tensors | {"b": torch.ones(3)}, tmp_path / "w.safetensors")
    second = dict(values.folder("k", tmp_path, context(tool, tmp_path)))
    assert tool.differences(first, second).keys() == {"k/w.safetensors/b"}


def test_errors_are_recorded_by_class_and_code_with_separate_texts(values: ModuleType) -> None:
    def refuse() -> None:
        raise KeyError("no such thing")

    data = dict(values.outcome("area/case", refuse))
    assert data == {"area/case": "refused: KeyError", "messages/area/case": "'no such thing'"}


def test_differences_list_missing_new_and_changed_keys(tool: ModuleType) -> None:
    a = {"on/x/a/1": "1", "on/x/b": "same", "on/x/gone": "1", "on/messages/m": "old", "off/y/1": "1"}
    b = {"on/x/a/1": "2", "on/x/b": "same", "on/x/new": "1", "on/messages/m": "new"}
    assert tool.differences(a, b, ["messages"]) == {
        "off/y": "only in one recording",
        "on/x/a/1": "1  ->  2",
        "on/x/gone": "is gone",
        "on/x/new": "is new",
    }
    assert "off/y" not in tool.differences(a, b, common=True)
    assert tool.differences(a, b)["on/messages/m"] == "old  ->  new"
    assert tool.change("a\nb\nc", "a\nB\nc").split() == ["-b", "+B"]


def test_recording_twice_is_equal_and_a_change_is_reported(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        assert tool.main(["record", str(file), "--only", "codes", "--native", "on"]) == 0
    args = ["compare", *map(str, files)]
    assert tool.main(args) == 0
    changed = json.loads(files[1].read_bytes())
    changed["any/codes/E-USE-01/meaning"] = "another"
    files[1].write_text(json.dumps(changed))
    capsys.readouterr()
    assert tool.main(args) == 1
    assert capsys.readouterr().out.splitlines() == [
        "any/codes/E-USE-01/meaning: bad value for an option  ->  another",
        f"any/codes: 1 of {len(changed)} keys differ",
        f"1 differences in {len(changed)} keys",
    ]
