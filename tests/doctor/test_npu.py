"""The Ascend probes on simulated machines: files in a folder, and answers of a child process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ascendit.doctor import npu, probe
from ascendit.doctor.machine import PYTHON_LIBRARIES, examine
from ascendit.doctor.npu import (
    DRIVERS,
    MINDIESD,
    VERSION_SETS,
    InstalledVersions,
    advise,
    begins,
    match_versions,
)
from ascendit.doctor.probe import ProbeRow, at_least

A5 = {"name": "Ascend950PR", "memory": 112 * 2**30}


class Machine:
    """A simulated machine: its files, its packages, and torch_npu's answers in a child process."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.set = root, monkeypatch.setenv
        self.packages: dict[str, str] = {"torch": "2.10.0"}
        self.answers: dict[str, Any] = {"cards": [A5], "soc": 260, "mindiesd": "", "operators": []}
        for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "LD_LIBRARY_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(npu, "ASCEND", root / "Ascend")
        monkeypatch.setattr(npu, "DEV", root / "dev")
        monkeypatch.setattr(Path, "home", lambda: root / "home")
        monkeypatch.setattr(npu, "find_spec", lambda name: name if name in self.packages else None)
        monkeypatch.setattr(
            npu, "installed", lambda *names: {n: self.packages[n] for n in names if n in self.packages}
        )
        monkeypatch.setattr(probe, "run_command", lambda args: "")
        monkeypatch.setattr(npu, "npu_in_a_child", lambda: self.answers)

    def write(self, path: str, text: str = "") -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def plug_in(self, *numbers: int) -> None:
        for name in (*(f"davinci{n}" for n in numbers), *npu.SHARED_NODES):
            self.write(f"dev/{name}")

    def install_cann(self, version: str = "9.1.0", *, sourced: bool = True) -> Path:
        folder = self.write("Ascend/cann/set_env.sh").parent
        self.write("Ascend/cann/version.cfg", f"runtime_running_version=[7.9.0.1.220:{version}]\n")
        for name in npu.CANN_LIBRARIES:
            self.write(f"Ascend/cann/lib64/{name}")
        if sourced:
            self.set("ASCEND_HOME_PATH", str(folder))
        return folder


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.fixture
def complete(machine: Machine) -> Machine:
    """All packages of one published row, with eight cards."""
    machine.plug_in(*range(8))
    machine.install_cann()
    machine.write("Ascend/driver/version.info", "Version=25.7.RC1\npackage_version=25.7\n")
    machine.packages |= {"torch_npu": "2.10.0.post4", "mindiesd": "3.1.0"}
    machine.answers |= {"cards": [A5] * 8, "operators": npu.used_operators(None)}
    return machine


def rows() -> dict[str, ProbeRow]:
    report = examine(npu.NPU_PROBES)
    assert not [r for r in report.rows if r.status == "probe failed"], report
    return {r.item: r for r in report.rows}


def test_a_machine_without_ascend_software(machine: Machine) -> None:
    items = rows()
    assert set(items) == {"torch_npu", "CANN toolkit", "NPU device files", "NPU device"}
    assert all(r.status == "absent" and not r.required for r in items.values())
    assert examine(npu.NPU_PROBES).npu is None


def test_a_complete_machine(complete: Machine) -> None:
    items = rows()
    assert {r.status for r in items.values()} == {"ok"}, items
    assert items["CANN toolkit"].detected == f"9.1.0 in {complete.root}/Ascend/cann"
    assert items["CANN libraries"].detected == "6 of 6"
    assert items["Ascend driver"].detected == "25.7.RC1"
    assert items["NPU device files"].detected == f"8 x {complete.root}/dev/davinci0"
    assert items["NPU device"].detected == "8 x Ascend950PR, 112 GiB, Atlas 350 (Ascend 950): a5"
    assert items["NPU device"].data["chip"] == "a5"
    assert items["versions together"].detected == "torch 2.10.0, torch_npu 2.10.0.post4, CANN 9.1.0"
    assert items["torch_npu operators"].detected == "13 of 13"
    assert items["MindIE-SD operators"].data["needed"] == [
        "mindiesd::layernorm",
        "mindiesd::adaln_v2",
        "mindiesd::fused_infer_attention_score_v2",
    ]
    report = examine(npu.NPU_PROBES)
    assert report.npu is True
    assert report.as_dict()["ready"] == {"cpu": True, "npu": True}


def test_cann_that_is_not_sourced(complete: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASCEND_HOME_PATH")
    complete.answers = {"error": "ImportError: libhccl.so: cannot open shared object file"}
    items = rows()
    line = f"source {complete.root}/Ascend/cann/set_env.sh"
    assert items["CANN toolkit"].status == "broken" and items["CANN toolkit"].fix == line
    assert items["CANN toolkit"].detected.endswith("set_env.sh not sourced")
    assert items["NPU device"].fix == line and "libhccl.so" in items["NPU device"].detected
    assert items["NPU operators"].status == "not checked"
    assert items["versions together"].status == "ok"  # the version is still read from disk
    assert examine(npu.NPU_PROBES).npu is False


def test_torch_npu_without_cann(machine: Machine) -> None:
    machine.packages["torch_npu"] = "2.10.0.post4"
    machine.answers = {"error": "ImportError: libhccl.so: cannot open shared object file"}
    items = rows()
    assert items["CANN toolkit"].status == "missing" and items["CANN toolkit"].fix == "install CANN"
    assert items["torch_npu"].status == "ok"


def test_a_missing_cann_folder_and_missing_libraries(machine: Machine) -> None:
    machine.set("ASCEND_HOME_PATH", str(machine.root / "gone"))
    assert rows()["CANN toolkit"].detected.endswith("gone, which does not exist")
    folder = machine.install_cann()
    (folder / "lib64" / "libopapi.so").unlink()
    (folder / "lib64" / "libhccl.so").unlink()
    row = rows()["CANN libraries"]
    assert row.status == "broken" and row.data == {"missing": ["libhccl.so", "libopapi.so"]}
    assert row.detected == "4 of 6: libhccl.so, libopapi.so missing" and "ops package" in row.fix
    machine.write("elsewhere/libopapi.so")
    machine.write("elsewhere/libhccl.so")
    machine.set("LD_LIBRARY_PATH", str(machine.root / "elsewhere"))
    assert rows()["CANN libraries"].status == "ok"


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        ("ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.5.0\n", "8.5.0"),
        ("version.cfg", "# version: 1.0\n", None),
        ("version.cfg", "runtime_running_version=[7.6.0.1.220:8.2.RC1]\n", "8.2.RC1"),
        ("version.cfg", "nothing of it\n", None),
    ],
)
def test_the_files_with_the_version_of_cann(
    machine: Machine, file: str, text: str, version: str | None
) -> None:
    assert npu.cann_version(machine.write(f"cann/{file}", text).parent) == version


def test_torch_npu_of_another_torch(complete: Machine) -> None:
    complete.packages["torch"] = "2.12.0+cpu"
    items = rows()
    assert items["torch_npu"].status == "broken" and items["torch_npu"].fix.endswith("torch 2.12.0+cpu")
    row = items["versions together"]
    assert row.status == "broken" and row.data["row"]["torch"] == "2.10.0"
    assert row.detected == "torch 2.12.0+cpu, but torch_npu 2.10.0.post4 needs 2.10.0"
    assert row.fix == "install a published row: torch 2.12.0, torch_npu 2.12.0.post2, CANN 9.1"
    assert examine(npu.NPU_PROBES).npu is False


def test_torch_npu_missing_beside_cann(machine: Machine) -> None:
    machine.install_cann("8.5.0")
    row = rows()["torch_npu"]
    assert row.status == "missing" and row.fix == "pip install torch==2.9.0 torch_npu==2.9.0"


def test_an_unlisted_version_is_no_error(complete: Machine) -> None:
    complete.packages |= {"torch_npu": "2.10.0.post9"}
    row = rows()["versions together"]
    assert row.status == "unlisted" and "torch_npu 2.10.0.post9 is in no published table" in row.detected
    assert row.fix.startswith("if it does not run, install a published row: torch 2.10.0")
    assert examine(npu.NPU_PROBES).npu is True


def test_device_files_of_a_container(complete: Machine) -> None:
    (complete.root / "dev" / "devmm_svm").unlink()
    row = rows()["NPU device files"]
    assert (
        row.status == "broken"
        and row.fix == f"in a container: docker run --device {complete.root}/dev/devmm_svm"
    )


def test_missing_permissions_for_a_card(complete: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("davinci3"))
    row = rows()["NPU device files"]
    assert row.status == "broken" and f"no access to {complete.root}/dev/davinci3" in row.detected
    assert row.fix.startswith("sudo usermod -aG ") and row.fix.endswith("$USER, then log in again")


def test_cards_are_sorted_by_number(machine: Machine) -> None:
    machine.plug_in(10, 2, 0)
    assert [Path(p).name for p in npu.cards()] == ["davinci0", "davinci2", "davinci10"]


def test_the_driver_version_comes_from_npu_smi_if_its_file_is_missing(
    complete: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (complete.root / "Ascend" / "driver" / "version.info").unlink()
    assert rows()["Ascend driver"].status == "unlisted"
    text = "+----+\n| npu-smi 25.5.1                   Version: 25.5.1                |\n"
    monkeypatch.setattr(probe, "run_command", lambda args: text if args == ("npu-smi", "info") else "")
    items = rows()
    assert items["Ascend driver"].detected == "25.5.1"
    assert "driver 25.5.1 is not among those published for CANN 9.1.0" in items["versions together"].detected


def test_missing_operators_of_torch_npu_are_reported(complete: Machine) -> None:
    complete.answers["operators"] = [n for n in complete.answers["operators"] if "dual_level" not in n]
    row = rows()["torch_npu operators"]
    assert row.status == "broken" and row.detected.startswith("11 of 13: no npu_dynamic_dual_level_mx_quant")
    assert len(row.data["missing"]) == 2
    complete.answers["soc"] = 220  # a2 needs none of them
    assert rows()["torch_npu operators"].status == "ok"


@pytest.mark.parametrize(
    ("problem", "status", "fix"),
    [
        ("ModuleNotFoundError: No module named 'einops'", "broken", "pip install einops"),
        ("OSError: libmindiesd.so", "broken", "reinstall it"),
    ],
)
def test_an_import_error_of_mindiesd_is_reported(
    complete: Machine, problem: str, status: str, fix: str
) -> None:
    complete.answers["mindiesd"] = problem
    items = rows()
    assert items["MindIE-SD"].status == status and items["MindIE-SD"].fix.startswith(fix)
    assert "MindIE-SD operators" not in items and items["torch_npu operators"].status == "ok"
    assert examine(npu.NPU_PROBES).npu is True  # it is optional


def test_an_unsupported_chip_is_reported(complete: Machine) -> None:
    complete.answers["soc"] = 103
    row = rows()["NPU device"]
    assert row.status == "broken" and "SoC number 103" in row.detected and "Atlas A2" in row.needed


def test_other_probes_run_if_one_raises(complete: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> dict[str, Any]:
        raise OSError("dcmi init failed")

    monkeypatch.setattr(npu, "npu_in_a_child", failing)
    report = examine(npu.NPU_PROBES)
    states = {r.item: r.status for r in report.rows}
    assert states["devices"] == states["operators"] == states["mindiesd"] == "probe failed"
    assert states["CANN toolkit"] == states["versions together"] == states["NPU device files"] == "ok"


@pytest.mark.parametrize(
    ("body", "error"), [("import os; os.abort()", "code -6"), ("raise OSError('x')", "OSError")]
)
def test_a_torch_npu_that_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, error: str
) -> None:
    """The real child process, with a fake torch_npu that fails on import."""
    (tmp_path / "torch_npu.py").write_text(body)
    (tmp_path / "torch.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    npu.npu_in_a_child.cache_clear()
    assert error in npu.npu_in_a_child()["error"]
    npu.npu_in_a_child.cache_clear()


def test_the_answer_of_the_child_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards, one operator of each package, and no function for the memory."""
    (tmp_path / "torch_npu.py").write_text("class npu:\n    get_soc_version = staticmethod(lambda: 220)\n")
    (tmp_path / "mindiesd.py").write_text("print('banner')\n")
    (tmp_path / "torch.py").write_text(
        "class npu:\n    device_count = staticmethod(lambda: 2)\n"
        "    get_device_name = staticmethod('910B{}'.format)\n"
        "class ops:\n    class npu:\n        npu_gelu = 1\n    class mindiesd:\n        adaln = 1\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    npu.npu_in_a_child.cache_clear()
    probe_npu: Callable[[], dict[str, Any]] = npu.npu_in_a_child
    assert probe_npu() == {
        "cards": [{"name": "910B0", "memory": None}, {"name": "910B1", "memory": None}],
        "soc": 220,
        "mindiesd": "",
        "operators": ["npu_gelu", "mindiesd::adaln"],
    }
    npu.npu_in_a_child.cache_clear()


# ---- compatible versions --------------------------------------------------------------------------


def test_the_table_is_consistent() -> None:
    assert len({s.torch_npu for s in VERSION_SETS}) == len(VERSION_SETS)
    for s in VERSION_SETS:
        assert at_least(s.torch, PYTHON_LIBRARIES["torch"]), s  # unsupported versions are left out
        assert s.torch_npu.partition(".post")[0] == s.torch and s.source.startswith("https://")
        assert (s.cann is None) == (s.release is None)
    cann = {s.cann for s in VERSION_SETS if s.cann}
    assert set(DRIVERS) <= set(MINDIESD) and all(any(begins(m, c) for m in MINDIESD) for c in cann)


def test_the_first_row_is_the_torch_npu_whose_schemas_are_frozen() -> None:
    from ascendit.twin.registry import VERSIONS

    assert VERSIONS["npu"] == f"torch_npu_{VERSION_SETS[0].torch_npu}"


@pytest.mark.parametrize("stack", [s for s in VERSION_SETS if s.cann], ids=str)
def test_each_row_matches_itself(stack) -> None:
    result = match_versions(
        InstalledVersions(torch=f"{stack.torch}+cpu", torch_npu=stack.torch_npu, cann=stack.cann)
    )
    assert result.stack == stack and not result.wrong and not result.unlisted


def test_mismatched_cann_and_torch_are_wrong() -> None:
    result = match_versions(InstalledVersions(torch="2.11.0", torch_npu="2.10.0", cann="8.5.0"))
    assert result.wrong == (
        "torch 2.11.0, but torch_npu 2.10.0 needs 2.10.0",
        "CANN 8.5.0, but torch_npu 2.10.0 needs 9.0.0",
    )


def test_unpublished_versions_are_unlisted() -> None:
    result = match_versions(InstalledVersions(torch="2.13.0", torch_npu="2.13.0", cann="9.1.0"))
    assert result.unlisted == ("no CANN is published for torch_npu 2.13.0",) and not result.wrong
    assert match_versions(InstalledVersions(torch_npu="2.14.0")).unlisted == (
        "torch_npu 2.14.0 is in no published table",
    )


def test_mindiesd_and_driver_beside_cann() -> None:
    machine = InstalledVersions(
        torch="2.9.0", torch_npu="2.9.0", cann="8.5.0", mindiesd="3.1.0", driver="24.1.rc3"
    )
    unlisted = match_versions(machine).unlisted
    assert unlisted[0] == "MindIE-SD 3.1.0 is not among those published for CANN 8.5.0: 3.0.0, 2.3.0"
    assert unlisted[1].startswith("driver 24.1.rc3 is not among those published for CANN 8.5.0: 25.5")
    assert not match_versions(
        InstalledVersions(torch_npu="2.9.0", cann="8.5.0", mindiesd="2.3.0", driver="25.3.2")
    ).unlisted


@pytest.mark.parametrize(
    ("versions", "torch_npu"),
    [
        (InstalledVersions(torch="2.11.0", cann="9.1.0"), "2.11.0.post2"),
        (InstalledVersions(torch="2.15.0", cann="8.5.0"), "2.9.0"),
        (InstalledVersions(torch="2.10.0"), "2.10.0.post6"),
        (InstalledVersions(), "2.12.0.post2"),
    ],
)
def test_the_advised_row_to_install(versions, torch_npu) -> None:
    assert advise(versions).torch_npu == torch_npu


@pytest.mark.parametrize(
    ("version", "start", "answer"),
    [
        ("9.1.0", "9.1", True),
        ("9.10.0", "9.1", False),
        ("25.7.RC1", "25.7.rc1", True),
        ("9.1", "9.1.0", False),
    ],
)
def test_begins(version: str, start: str, answer: bool) -> None:
    assert begins(version, start) is answer
