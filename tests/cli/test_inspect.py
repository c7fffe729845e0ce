"""`ascendit inspect`."""

from __future__ import annotations

import shutil

import pytest
from pipeline.headers import floats, write_expert

from ascendit.inspect import checkpoint


class FakeReport:
    def __init__(self, ok: bool) -> None:
        self.ok = ok

    def lines(self) -> list[str]:
        return ["Model  x", "Checks  1 missing"]

    def layer_lines(self) -> list[str]:
        return ["layer  scheme"]

    def problem_texts(self) -> list[str]:
        return [] if self.ok else ["E-CKP-04  1 missing"]

    def as_dict(self, *, layers: bool) -> dict[str, object]:
        return {"ok": self.ok, "layers": layers}


@pytest.mark.parametrize("ok", [True, False])
def test_it_prints_the_report(run, model, monkeypatch, ok):
    monkeypatch.setattr(checkpoint, "inspect", lambda path: FakeReport(ok))
    ended = run("inspect", model)
    assert ended.out == "Model  x\nChecks  1 missing\n" and ended.err == ""
    assert ended.code == (0 if ok else 1)
    assert run("inspect", model, "--json").json == {"ok": ok, "layers": False}
    ended = run("inspect", model, "--layers")
    assert ended.out == "layer  scheme\n" and ended.code == (0 if ok else 1)
    assert ended.err == ("" if ok else "note: E-CKP-04  1 missing\n")
    assert run("inspect", model, "--layers", "--json").json == {"ok": ok, "layers": True}


def test_a_folder_without_weights_is_incomplete(run, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "m")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    ended = run("inspect", folder, "--json")
    assert ended.code == 1
    assert "transformer" in ended.out and ended.json


def test_no_folder(run):
    ended = run("inspect", "/no/such/folder")
    assert ended.code == 2 and ended.err.startswith("error[E-USE-02]: no model at /no/such/folder")


def test_diff_exits_with_1_when_something_differs(run, tmp_path):
    a = write_expert(tmp_path / "a", floats())
    b = write_expert(tmp_path / "b", floats() | {"proj_out.bias": ("F32", (64,))})
    same = run("inspect", a, "--diff", a)
    assert same.code == 0 and same.out.splitlines()[-1].endswith("same headers and configs")
    other = run("inspect", a, "--diff", b)
    assert other.code == 1 and "bf16 -> fp32   bias of proj_out" in other.out
    data = run("inspect", a, "--diff", b, "--json")
    assert data.code == 1
    assert [c["name"] for c in data.json["changes"]] == ["proj_out.bias"]


def test_diff_of_a_missing_folder_is_an_error_not_a_difference(run, tmp_path):
    a = write_expert(tmp_path / "a", floats())
    assert run("inspect", a, "--diff", tmp_path / "none").code == 2


def test_diff_of_a_damaged_model_with_itself_fails(run, tmp_path):
    tensors = floats()
    del tensors["proj_out.bias"]
    a = write_expert(tmp_path / "a", tensors)
    assert run("inspect", a, "--diff", a).code == 1


def test_layers_and_diff_exclude_each_other(run, tmp_path):
    ended = run("inspect", tmp_path, "--diff", tmp_path, "--layers")
    assert ended.code == 2
    assert ended.err.splitlines() == [
        "error[E-USE-01]: --layers and --diff",
        "  needs  one of them",
        "  try    omit one; --diff --json lists all",
    ]


def test_check_and_values(run, tmp_path):
    a = write_expert(tmp_path / "a", floats())
    b = write_expert(tmp_path / "b", floats())
    unchecked = run("inspect", a, "--check")
    assert unchecked.code == 1 and "E-CKP-11" in unchecked.out
    assert run("inspect", a, "--check", "--json").json["check"]["problem"]["code"] == "E-CKP-11"
    equal = run("inspect", a, "--diff", b, "--values")
    assert equal.code == 0 and "equal numbers" in equal.out
    with open(b / "diffusion_pytorch_model.safetensors", "r+b") as f:
        f.seek(-1, 2)
        f.write(b"\1")
    assert run("inspect", a, "--diff", b).code == 0
    different = run("inspect", a, "--diff", b, "--values", "--json")
    assert different.code == 1 and different.json["values"]["parts"]["transformer"]["different"] == 1
    assert run("inspect", a, "--values").code == 2
