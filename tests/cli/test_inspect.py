"""`ascendit inspect`."""

from __future__ import annotations

import json
import shutil

import pytest
from convert.models import write_model
from pipeline.headers import floats, write_expert

from ascendit.convert.quantize import quantize
from ascendit.errors import UsageError
from ascendit.inspect import checkpoint
from ascendit.inspect.diff import diff


class FakeReport:
    def __init__(self, ok: bool) -> None:
        self.ok = ok

    def lines(self, width: int | None) -> list[str]:
        return ["Model  x", "Checks  1 missing"]

    def layer_lines(self, width: int | None) -> list[str]:
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
        "  try    omit --layers; --json lists the differences of all layers",
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


# ---- --report -----------------------------------------------------------------------------------


def test_a_report_of_numbers(run, tmp_path):
    a = write_model(tmp_path / "a", experts=1)
    b = tmp_path / "b"
    quantize(a, b, scheme="mxfp4")
    args = ("inspect", a, "--diff", b, "--values", "--report")
    ended = run(*args, tmp_path / "r.html")
    assert ended.code == 1 and f"note: report: {tmp_path / 'r.html'}" in ended.err
    text = (tmp_path / "r.html").read_text()
    assert text.count("<svg") == 2 and "Worst tensors" in text and "bf16 -&gt; mxfp4" in text
    worst = next(line for line in ended.out.splitlines() if "worst first" in line)
    name = ended.out.splitlines()[ended.out.splitlines().index(worst) + 1].split()[-4]
    assert f"<td>{name}</td>" in text.partition("Worst tensors")[2].partition("</tr>\n<tr>")[0]
    assert run(*args, tmp_path / "r.json", "-q").code == 1
    assert json.loads((tmp_path / "r.json").read_text())["values"]["same"] is False
    before = (tmp_path / "r.json").read_text()
    ended = run(*args, tmp_path / "r.json")
    assert ended.code == 2 and "error[E-USE-03]" in ended.err
    assert run(*args, tmp_path / "r.json", "--overwrite").code == 1
    assert (tmp_path / "r.json").read_text() == before


def test_a_report_needs_numbers_and_a_name(run, model, tmp_path):
    for args in (("--report", "r.html"), ("--diff", model, "--report", "r.html")):
        ended = run("inspect", model, *args)
        assert ended.code == 2 and "error[E-USE-01]: --report r.html without --values" in ended.err
    ended = run("inspect", model, "--diff", model, "--values", "--report", tmp_path / "r.txt")
    assert ended.code == 2 and "error[E-USE-01]" in ended.err and "r.html" in ended.err
    with pytest.raises(UsageError, match="E-USE-01"):
        diff(model, model, report=tmp_path / "r.html")


def test_the_experts_come_first_in_layers(run, model):
    names = [line.partition(".")[0] for line in run("inspect", model, "--layers").out.splitlines()[1:]]
    assert list(dict.fromkeys(names)) == ["transformer", "transformer_2", "text_encoder", "vae"]
