"""Probes of the requirements of an Ascend card: driver, device files, CANN, torch_npu, MindIE-SD, operators.

`import torch` fails if torch_npu is installed without CANN, so both are imported only in a child process with
a time limit. The tables of compatible versions are the vendor's, with their sources; None or a missing entry
means that no public page has the version. Rows older than the oldest supported torch are left out.
"""

from __future__ import annotations

import grp
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ascendit import environment
from ascendit.device.chip import CHIPS, chip_of
from ascendit.device.operator_support import CAPABILITIES
from ascendit.doctor import probe
from ascendit.doctor.probe import Probe, ProbeRow, Status, version_numbers
from ascendit.version import installed

TORCH_NPU_PAGE = "https://gitcode.com/Ascend/pytorch/blob/master/COMPATIBILITY.md"
MINDIE_PAGE = "https://www.hiascend.com/document/detail/en/mindie/310/releasenote/docs/en/release_note.md"
CANN_PAGE = "https://www.hiascend.com/document/detail/en/canncommercial/850/releasenote/releasenote_0000.html"
CLUSTER_PAGE = "https://www.hiascend.com/document/detail/en/mindcluster/2610/patchnote/mxreleasenote_006.html"
WHEEL_PAGE = "https://pypi.org/project/torch-npu/2.13.0/"

ASCEND = Path("/usr/local/Ascend")
DEV = Path("/dev")
SHARED_NODES = ("davinci_manager", "devmm_svm", "hisi_hdc")
"""Device files that all cards share, in addition to davinciN of each card."""
CANN_LIBRARIES = (
    "libascendcl.so",
    "libhccl.so",
    "libge_runner.so",
    "libgraph.so",
    "libnnopbase.so",
    "libopapi.so",
)
"""Libraries of CANN that torch_npu links against or opens by name."""
VERSION_FILES = ("ascend_toolkit_install.info", "{arch}-linux/ascend_toolkit_install.info", "version.cfg")


# ---- compatible versions ------------------------------------------------------------------------


@dataclass(frozen=True)
class VersionSet:
    """Compatible versions. `cann`: 9.1 means any 9.1.x. `release`: the vendor's name of this torch_npu."""

    torch_npu: str
    torch: str
    cann: str | None
    release: str | None
    source: str = TORCH_NPU_PAGE

    def __str__(self) -> str:
        return f"torch {self.torch}, torch_npu {self.torch_npu}, CANN {self.cann or 'not published'}"


VERSION_SETS: tuple[VersionSet, ...] = (
    VersionSet("2.13.0", "2.13.0", None, None, WHEEL_PAGE),
    VersionSet("2.12.0.post2", "2.12.0", "9.1", "26.1.1"),
    VersionSet("2.11.0.post2", "2.11.0", "9.1", "26.1.1"),
    VersionSet("2.10.0.post6", "2.10.0", "9.1", "26.1.1"),
    VersionSet("2.9.0.post8", "2.9.0", "9.1", "26.1.1"),
    VersionSet("2.12.0", "2.12.0", "9.1.0", "26.1.0"),
    VersionSet("2.11.0", "2.11.0", "9.1.0", "26.1.0"),
    VersionSet("2.10.0.post4", "2.10.0", "9.1.0", "26.1.0"),
    VersionSet("2.9.0.post6", "2.9.0", "9.1.0", "26.1.0"),
    VersionSet("2.10.0", "2.10.0", "9.0.0", "26.0.0"),
    VersionSet("2.9.0.post2", "2.9.0", "9.0.0", "26.0.0"),
    VersionSet("2.9.0", "2.9.0", "8.5.0", "7.3.0"),
)
"""Newest first. The twin has the schemas of the first row, whose CANN version is not published."""
MINDIESD: Mapping[str, tuple[str, ...]] = {
    "9.1.0": ("3.1.0",),
    "9.0.1": ("3.1.0",),
    "9.0.0": ("3.1.0", "3.0.0"),
    "8.5.1": ("3.0.0",),
    "8.5.0": ("3.0.0", "2.3.0"),
}
"""CANN -> MindIE-SD, from `MINDIE_PAGE`."""
DRIVERS: Mapping[str, tuple[str, ...]] = {
    "9.1.0": ("26.1.0", "25.7.RC1"),
    "8.5.0": ("25.5", "25.3", "25.2", "25.0"),
}
"""CANN -> prefixes of driver versions; 25.7.RC1 is for the Atlas 350. From `CLUSTER_PAGE` and `CANN_PAGE`."""


@dataclass(frozen=True, kw_only=True)
class InstalledVersions:
    """Versions on a machine; None if not installed."""

    torch: str | None = None
    torch_npu: str | None = None
    cann: str | None = None
    mindiesd: str | None = None
    driver: str | None = None


@dataclass(frozen=True)
class VersionMatch:
    """Result of `match_versions`.

    `stack`: the row of this torch_npu. `wrong`: installed versions that contradict it. `unlisted`: installed
    versions that are in no row.
    """

    stack: VersionSet | None
    wrong: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()


def match_versions(versions: InstalledVersions) -> VersionMatch:
    """Find the row of the installed torch_npu and the other installed versions that contradict it."""
    public = (versions.torch_npu or "").partition("+")[0]  # 2.10.0+cpu -> 2.10.0
    stack = next((s for s in VERSION_SETS if s.torch_npu == public), None)
    wrong, unlisted = [], []
    if stack is None:
        unlisted.append(f"torch_npu {versions.torch_npu or 'none'} is in no published table")
    else:
        if versions.torch is not None and versions.torch.partition("+")[0] != stack.torch:
            wrong.append(f"torch {versions.torch}, but torch_npu {stack.torch_npu} needs {stack.torch}")
        if stack.cann is None:
            unlisted.append(f"no CANN is published for torch_npu {stack.torch_npu}")
        elif versions.cann is not None and not begins(versions.cann, stack.cann):
            wrong.append(f"CANN {versions.cann}, but torch_npu {stack.torch_npu} needs {stack.cann}")
    unlisted += _unlisted("MindIE-SD", versions.mindiesd, versions.cann, MINDIESD)
    unlisted += _unlisted("driver", versions.driver, versions.cann, DRIVERS)
    return VersionMatch(stack, tuple(wrong), tuple(unlisted))


def advise(versions: InstalledVersions) -> VersionSet:
    """The row that needs the fewest changes: same CANN, then same torch, then the newest."""

    def score(stack: VersionSet) -> tuple[bool, bool, bool]:
        cann = versions.cann is not None and stack.cann is not None and begins(versions.cann, stack.cann)
        return cann, stack.cann is not None, _same_minor(versions.torch, stack.torch)

    return max(VERSION_SETS, key=score)  # the first of equals


def _same_minor(version: str | None, other: str) -> bool:
    """Whether major and minor version are equal, as in 2.13.0+cpu and 2.13.1."""
    return version_numbers(version or "")[:2] == version_numbers(other)[:2]


def begins(version: str, start: str) -> bool:
    """Whether `version` equals `start` or refines it: 9.1.0 begins with 9.1, 9.10.0 does not."""
    version, start = version.lower(), start.lower()
    return version == start or version.startswith((f"{start}.", f"{start}-"))


def _unlisted(
    package: str, version: str | None, cann: str | None, table: Mapping[str, Sequence[str]]
) -> list[str]:
    """A line if the table has other versions of `package` for this CANN."""
    published = table.get(cann or "", ())
    if version is None or not published or any(begins(version, v) for v in published):
        return []
    return [f"{package} {version} is not among those published for CANN {cann}: {', '.join(published)}"]


# ---- the machine --------------------------------------------------------------------------------


def cards() -> list[str]:
    """Paths of the device files of cards, in order."""
    names = [p.name for p in DEV.glob("davinci[0-9]*")]
    return [str(DEV / name) for name in sorted(names, key=lambda n: int(re.sub(r"\D", "", n) or 0))]


def toolkits() -> list[Path]:
    """CANN toolkits in the default folders of its installer: for all users, then for this user."""
    roots = (ASCEND, Path.home() / "Ascend")
    folders = (root / name for root in roots for name in ("cann", "ascend-toolkit"))
    return [folder for folder in folders if (folder / "set_env.sh").exists()]


def source_line() -> str:
    """The command that adds CANN to the environment."""
    return f"source {next(iter(toolkits()), ASCEND / 'ascend-toolkit')}/set_env.sh"


def has_npu_parts() -> bool:
    """Whether this machine has any hardware or software of an Ascend card."""
    return bool(cards() or find_spec("torch_npu") or environment.toolkit_folder() or toolkits())


def nodes() -> list[ProbeRow]:
    """The device files, and whether this user can read and write them."""
    row = ProbeRow("NPU device files", "none", needed="read and write", part="npu", status="absent")
    if not (files := cards()):
        fix = "install the driver; in a container: docker run --device /dev/davinci0 --device .."
        return [replace(row, status="missing" if has_npu_parts() else "absent", fix=fix)]
    shared = [str(DEV / name) for name in SHARED_NODES]
    missing = [p for p in shared if not Path(p).exists()]
    denied = [p for p in (*files, *shared) if Path(p).exists() and not os.access(p, os.R_OK | os.W_OK)]
    row = replace(row, detected=f"{len(files)} x {files[0]}", status="ok", data={"cards": files})
    if missing:
        row = replace(row, detected=f"{row.detected}; no {', '.join(missing)}", status="broken")
        return [replace(row, fix=f"in a container: docker run --device {' --device '.join(missing)}")]
    if denied:
        row = replace(row, detected=f"{row.detected}; no access to {', '.join(denied)}", status="broken")
        return [replace(row, fix=f"sudo usermod -aG {_group(denied[0])} $USER, then log in again")]
    return [row]


def _group(path: str) -> str:
    try:
        return grp.getgrgid(os.stat(path).st_gid).gr_name
    except (OSError, KeyError):
        return "HwHiAiUser"


def driver_version() -> str | None:
    """Read the version from the driver's version.info, else from npu-smi: containers often have only one."""
    match = re.search(
        r"^Version\s*=\s*([\w.]+)", probe.read_text(ASCEND / "driver" / "version.info"), re.M | re.I
    )
    if match is None and cards():
        match = re.search(r"Version:\s*([\w.]+)", probe.run_command(("npu-smi", "info")))
    return match[1] if match else None


def driver() -> list[ProbeRow]:
    """The driver of the cards."""
    if not cards():
        return []
    version = driver_version()
    row = ProbeRow("Ascend driver", version or "unknown", needed="see the row of versions", part="npu")
    fix = f"mount {ASCEND}/driver into the container, or install the driver"
    return [row if version else replace(row, status="unlisted", fix=fix)]


# ---- CANN ---------------------------------------------------------------------------------------


def cann_version(folder: Path) -> str | None:
    """The version of CANN, such as 9.1.0.

    In `version.cfg` it follows an internal number: [7.6.0.1.220:8.2.RC1].
    """
    for name in VERSION_FILES:
        text = probe.read_text(folder / name.format(arch=platform.machine()))
        if match := re.search(r"version\s*=\s*\[?([^\s\]]+)", text, re.I):
            versions = [item for item in match[1].split(":") if item[:1].isdigit()]
            return versions[-1] if versions else match[1]
    return None


def cann() -> list[ProbeRow]:
    """The CANN toolkit: whether its set_env.sh was sourced, and its version."""
    row = ProbeRow("CANN toolkit", "none", needed="for an Ascend card", part="npu")
    folder = environment.toolkit_folder()
    if folder is None:
        if not (folders := toolkits()):
            return [replace(row, status="missing" if has_npu_parts() else "absent", fix="install CANN")]
        detected = f"{folders[0]}, set_env.sh not sourced"
        return [replace(row, detected=detected, status="broken", fix=source_line())]
    if not folder.is_dir():
        return [replace(row, detected=f"{folder}, which does not exist", status="broken", fix=source_line())]
    version = cann_version(folder)
    return [replace(row, detected=f"{version or 'unknown version'} in {folder}", data={"version": version})]


def libraries() -> list[ProbeRow]:
    """The libraries that torch_npu loads from CANN."""
    folder = environment.toolkit_folder()
    if folder is None or not folder.is_dir():
        return []
    arch = f"{platform.machine()}-linux"
    folders = (folder / "lib64", folder / arch / "lib64", *environment.library_folders())
    missing = [name for name in CANN_LIBRARIES if not any((f / name).exists() for f in folders)]
    count = len(CANN_LIBRARIES) - len(missing)
    row = ProbeRow("CANN libraries", f"{count} of {len(CANN_LIBRARIES)}", needed="all", part="npu")
    if not missing:
        return [row]
    detected = f"{row.detected}: {', '.join(missing)} missing"
    fix = f"{source_line()}; with CANN 8.5 or newer also install its ops package"
    return [replace(row, detected=detected, status="broken", fix=fix, data={"missing": missing})]


# ---- torch_npu and MindIE-SD --------------------------------------------------------------------


def installed_versions() -> InstalledVersions:
    """The versions on this machine."""
    folder = environment.toolkit_folder() or next(iter(toolkits()), None)
    cann = cann_version(folder) if folder else None
    return InstalledVersions(
        cann=cann, driver=driver_version(), **installed("torch", "torch_npu", "mindiesd")
    )


def torch_npu() -> list[ProbeRow]:
    """The package, and whether it matches the installed torch."""
    versions, needed = installed("torch", "torch_npu"), "the minor version of torch, for an Ascend card"
    absent: Status = "missing" if has_npu_parts() else "absent"
    row = ProbeRow("torch_npu", "none", needed=needed, status=absent, part="npu")
    if (version := versions.get("torch_npu")) is None:
        stack = advise(installed_versions())
        return [replace(row, fix=f"pip install torch=={stack.torch} torch_npu=={stack.torch_npu}")]
    torch = versions.get("torch", "?")
    if _same_minor(version, torch):
        return [replace(row, detected=version, status="ok")]
    fix = f"install the torch_npu for torch {torch}"
    return [replace(row, detected=version, status="broken", fix=fix)]


def stack() -> list[ProbeRow]:
    """Whether torch, torch_npu, CANN, MindIE-SD and the driver are compatible."""
    versions = installed_versions()
    if versions.torch_npu is None:
        return []
    match = match_versions(versions)
    row = ProbeRow("versions together", str(match.stack or "no published row"), part="npu")
    published = vars(match.stack) if match.stack else None
    data = {"machine": vars(versions), "row": published, "wrong": match.wrong, "unlisted": match.unlisted}
    row = replace(row, needed="one published row", data=data)
    problems = "; ".join((*match.wrong, *match.unlisted))
    fix = f"install a published row: {advise(versions)}"
    if match.wrong:
        return [replace(row, detected=problems, status="broken", fix=fix)]
    if match.unlisted:
        return [replace(row, detected=problems, status="unlisted", fix=f"if it does not run, {fix}")]
    return [row]


def devices() -> list[ProbeRow]:
    """The cards that torch_npu can use."""
    row = ProbeRow("NPU device", "none", needed="optional", status="absent", part="npu")
    if not (files := cards()):
        return [replace(row, fix="not needed on the CPU")]
    detected = f"{len(files)} x {files[0]}"
    row = replace(row, detected=detected, needed="usable", status="broken", fix=source_line())
    if find_spec("torch_npu") is None:
        return [row]
    answer = npu_in_a_child()
    if not answer.get("cards"):
        return [replace(row, detected=f"{detected}, {answer.get('error', 'none usable')}")]
    chip = chip_of(int(answer["soc"]))
    memory = sorted({f"{c['memory'] / 2**30:.0f} GiB" for c in answer["cards"] if c["memory"]})
    names = sorted({c["name"] for c in answer["cards"]})
    label = f"{len(answer['cards'])} x {', '.join(names)}" + (f", {', '.join(memory)}" if memory else "")
    row = replace(row, data={**answer, "chip": chip.name if chip else None})
    if chip is None:
        products = ", ".join(c.product for c in CHIPS.values())
        label += f", SoC number {answer['soc']}"
        return [replace(row, detected=label, needed=products, fix="use --device cpu, or another card")]
    return [replace(row, detected=f"{label}, {chip.product}: {chip.name}", status="ok", fix="")]


def mindiesd() -> list[ProbeRow]:
    """MindIE-SD, optional: it has one kernel for AdaLN, torch_npu two."""
    if find_spec("torch_npu") is None:
        return []
    row = ProbeRow("MindIE-SD", "none", needed="optional, for fewer kernels", status="absent")
    if (version := installed("mindiesd").get("mindiesd")) is None:
        return [row]
    answer = npu_in_a_child()
    if "error" in answer:  # reported by the row of the device
        return [replace(row, detected=version, status="not checked", fix=source_line())]
    if answer["mindiesd"]:
        einops = "pip install einops, a dependency that MindIE-SD does not declare"
        fix = einops if "einops" in answer["mindiesd"] else "reinstall it"
        return [replace(row, detected=f"{version}, {answer['mindiesd']}", status="broken", fix=fix)]
    return [replace(row, detected=version, status="ok")]


def operators() -> list[ProbeRow]:
    """The operators that ascendit calls, looked up by name in torch.ops."""
    if find_spec("torch_npu") is None:
        return []
    answer = npu_in_a_child()
    chip = chip_of(int(answer.get("soc", -1)))
    needed = used_operators(chip.name if chip else None)
    row = ProbeRow("NPU operators", "not checked", needed=f"{len(needed)} by name", part="npu")
    if "error" in answer:
        return [replace(row, status="not checked", fix=source_line())]
    packages = [("torch_npu", "npu", [n for n in needed if "::" not in n])]
    if not answer["mindiesd"] and installed("mindiesd"):  # otherwise reported by the row of MindIE-SD
        packages.append(("MindIE-SD", "", [n for n in needed if n.startswith("mindiesd::")]))
    rows = []
    for package, part, names in packages:
        missing = [n for n in names if n not in answer["operators"]]
        row = ProbeRow(f"{package} operators", f"{len(names) - len(missing)} of {len(names)}", part=part)
        row = replace(row, needed="those that ascendit calls", data={"needed": names, "missing": missing})
        if missing:
            fix = f"install a published row: {advise(installed_versions())}"
            detected = f"{row.detected}: no {', '.join(missing)}"
            row = replace(row, detected=detected, status="broken", fix=fix)
        rows.append(row)
    return rows


def used_operators(chip: str | None) -> list[str]:
    """The operators that ascendit calls, all of them or only those of `chip`, from the capability table."""
    rows = [r for r in CAPABILITIES if r.used_for and (chip is None or r.support_on(chip) == "yes")]
    return list(dict.fromkeys(r.operator for r in rows))


_CODE = """
import json, torch, torch_npu
def memory(i):
    try:
        return torch.npu.mem_get_info(i)[1]
    except Exception:
        return None
count = torch.npu.device_count()
cards = [{"name": torch.npu.get_device_name(i), "memory": memory(i)} for i in range(count)]
soc = torch_npu.npu.get_soc_version() if count else -1
problem = "not installed"
try:
    import mindiesd
    problem = ""
except Exception as e:
    problem = problem if getattr(e, "name", "") == "mindiesd" else f"{type(e).__name__}: {e}".splitlines()[0]
spaces = [(n.rpartition("::")[0] or "npu", n.rpartition("::")[2], n) for n in NAMES]
available = [n for space, name, n in spaces if hasattr(getattr(torch.ops, space), name)]
print(json.dumps({"cards": cards, "soc": soc, "mindiesd": problem, "operators": available}))
"""


@cache
def npu_in_a_child() -> dict[str, Any]:
    """Cards, SoC number, operators, and the import error of MindIE-SD; or `{"error": ...}`."""
    return probe.run_child(f"NAMES = {used_operators(None)!r}\n{_CODE}")


NPU_PROBES: tuple[Probe, ...] = (
    torch_npu, cann, libraries, stack, driver, nodes, devices, mindiesd, operators
)  # fmt: skip
