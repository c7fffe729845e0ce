"""What an Ascend card needs, piece by piece: driver, device files, CANN, torch_npu, MindIE-SD, operators.

`import torch` fails where torch_npu is installed and CANN is not, so nothing here imports either; a child
process with a time limit does. Versions that belong together are tables of what the vendor has published,
each with where; None, or no entry: no public page says. Rows older than the oldest torch that ascendit runs
with are left out.
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
"""Device files that every card needs beside its own davinciN."""
CANN_LIBRARIES = (
    "libascendcl.so",
    "libhccl.so",
    "libge_runner.so",
    "libgraph.so",
    "libnnopbase.so",
    "libopapi.so",
)
"""Of CANN: what torch_npu is linked against or opens by name."""
VERSION_FILES = ("ascend_toolkit_install.info", "{arch}-linux/ascend_toolkit_install.info", "version.cfg")


# ---- versions that belong together --------------------------------------------------------------


@dataclass(frozen=True)
class VersionSet:
    """One row. `cann`: 9.1 stands for every 9.1.x. `release`: the vendor's name of the torch_npu release."""

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
"""Newest first. ascendit's schemas are those of the first row; its CANN is not published."""
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
"""CANN -> driver, as its version begins; 25.7.RC1 is the Atlas 350's. From `CLUSTER_PAGE` and `CANN_PAGE`."""


@dataclass(frozen=True, kw_only=True)
class FoundVersions:
    """What a machine has; None for what it lacks."""

    torch: str | None = None
    torch_npu: str | None = None
    cann: str | None = None
    mindiesd: str | None = None
    driver: str | None = None


@dataclass(frozen=True)
class VersionMatch:
    """`stack`: the row of this torch_npu. `wrong`: of another row. `unlisted`: what no page tells."""

    stack: VersionSet | None
    wrong: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()


def match_versions(found: FoundVersions) -> VersionMatch:
    """The row that the machine's torch_npu is, and what beside it is not of that row."""
    public = (found.torch_npu or "").partition("+")[0]  # 2.10.0+cpu -> 2.10.0
    stack = next((s for s in VERSION_SETS if s.torch_npu == public), None)
    wrong, unlisted = [], []
    if stack is None:
        unlisted.append(f"torch_npu {found.torch_npu or 'none'} is in no published table")
    else:
        if found.torch is not None and found.torch.partition("+")[0] != stack.torch:
            wrong.append(f"torch {found.torch} is not the {stack.torch} of torch_npu {stack.torch_npu}")
        if stack.cann is None:
            unlisted.append(f"no CANN is published for torch_npu {stack.torch_npu}")
        elif found.cann is not None and not begins(found.cann, stack.cann):
            wrong.append(f"CANN {found.cann} is not the {stack.cann} of torch_npu {stack.torch_npu}")
    unlisted += _beside("MindIE-SD", found.mindiesd, found.cann, MINDIESD)
    unlisted += _beside("driver", found.driver, found.cann, DRIVERS)
    return VersionMatch(stack, tuple(wrong), tuple(unlisted))


def advise(found: FoundVersions) -> VersionSet:
    """The whole row that asks for the fewest changes: same CANN, then same torch, then the newest."""

    def score(stack: VersionSet) -> tuple[bool, bool, bool]:
        cann = found.cann is not None and stack.cann is not None and begins(found.cann, stack.cann)
        return cann, stack.cann is not None, _same_minor(found.torch, stack.torch)

    return max(VERSION_SETS, key=score)  # the first of equals


def _same_minor(version: str | None, other: str) -> bool:
    """2.13.0+cpu and 2.13.1"""
    return version_numbers(version or "")[:2] == version_numbers(other)[:2]


def begins(version: str, start: str) -> bool:
    """Whether `version` is `start` or one below it: 9.1.0 begins with 9.1, 9.10.0 does not."""
    version, start = version.lower(), start.lower()
    return version == start or version.startswith((f"{start}.", f"{start}-"))


def _beside(
    what: str, version: str | None, cann: str | None, table: Mapping[str, Sequence[str]]
) -> list[str]:
    """A line if a table has this CANN, and another `what` for it."""
    known = table.get(cann or "", ())
    if version is None or not known or any(begins(version, k) for k in known):
        return []
    return [f"{what} {version} is not among those published for CANN {cann}: {', '.join(known)}"]


# ---- the machine --------------------------------------------------------------------------------


def cards() -> list[str]:
    """The device files of cards, in order."""
    found = [p.name for p in DEV.glob("davinci[0-9]*")]
    return [str(DEV / name) for name in sorted(found, key=lambda n: int(re.sub(r"\D", "", n) or 0))]


def toolkits() -> list[Path]:
    """Toolkits on this disk, in the folders that CANN installs to: for all users, then for this one."""
    roots = (ASCEND, Path.home() / "Ascend")
    folders = (root / name for root in roots for name in ("cann", "ascend-toolkit"))
    return [folder for folder in folders if (folder / "set_env.sh").exists()]


def source_line() -> str:
    """The command that puts CANN into the environment."""
    return f"source {next(iter(toolkits()), ASCEND / 'ascend-toolkit')}/set_env.sh"


def here() -> bool:
    """Whether anything of an Ascend card is on this machine."""
    return bool(cards() or find_spec("torch_npu") or environment.toolkit_folder() or toolkits())


def nodes() -> list[ProbeRow]:
    """The device files, and whether this user may use them."""
    row = ProbeRow("NPU device files", "none", needed="read and write", part="npu", status="absent")
    if not (found := cards()):
        fix = "install the driver; in a container: --device /dev/davinci0 --device /dev/davinci_manager ..."
        return [replace(row, status="missing" if here() else "absent", fix=fix)]
    shared = [str(DEV / name) for name in SHARED_NODES]
    lacking = [p for p in shared if not Path(p).exists()]
    closed = [p for p in (*found, *shared) if Path(p).exists() and not os.access(p, os.R_OK | os.W_OK)]
    row = replace(row, found=f"{len(found)} x {found[0]}", status="ok", data={"cards": found})
    if lacking:
        row = replace(row, found=f"{row.found}; no {', '.join(lacking)}", status="broken")
        return [replace(row, fix=f"in a container: --device {' --device '.join(lacking)}")]
    if closed:
        row = replace(row, found=f"{row.found}; no access to {', '.join(closed)}", status="broken")
        return [replace(row, fix=f"sudo usermod -aG {_group(closed[0])} $USER, then log in again")]
    return [row]


def _group(path: str) -> str:
    try:
        return grp.getgrgid(os.stat(path).st_gid).gr_name
    except (OSError, KeyError):
        return "HwHiAiUser"


def driver_version() -> str | None:
    """From the driver's own file, else from npu-smi; containers often have only one of them."""
    found = re.search(r"^Version\s*=\s*([\w.]+)", probe.read(ASCEND / "driver" / "version.info"), re.M | re.I)
    if found is None and cards():
        found = re.search(r"Version:\s*([\w.]+)", probe.command(("npu-smi", "info")))
    return found[1] if found else None


def driver() -> list[ProbeRow]:
    """The kernel driver of the cards."""
    if not cards():
        return []
    found = driver_version()
    row = ProbeRow("Ascend driver", found or "unknown", needed="see the row of versions", part="npu")
    fix = f"mount {ASCEND}/driver into the container, or install the driver"
    return [row if found else replace(row, status="unlisted", fix=fix)]


# ---- CANN ---------------------------------------------------------------------------------------


def cann_version(folder: Path) -> str | None:
    """9.1.0. `version.cfg` has it behind its own number: [7.6.0.1.220:8.2.RC1]."""
    for name in VERSION_FILES:
        text = probe.read(folder / name.format(arch=platform.machine()))
        if found := re.search(r"version\s*=\s*\[?([^\s\]]+)", text, re.I):
            parts = [part for part in found[1].split(":") if part[:1].isdigit()]
            return parts[-1] if parts else found[1]
    return None


def cann() -> list[ProbeRow]:
    """The toolkit: sourced, there, and of which version."""
    row = ProbeRow("CANN toolkit", "none", needed="for an Ascend card", part="npu")
    folder = environment.toolkit_folder()
    if folder is None:
        if not (found := toolkits()):
            return [replace(row, status="missing" if here() else "absent", fix="install CANN")]
        return [replace(row, found=f"{found[0]}, set_env.sh not sourced", status="broken", fix=source_line())]
    if not folder.is_dir():
        return [replace(row, found=f"{folder}, which does not exist", status="broken", fix=source_line())]
    known = cann_version(folder)
    found_text = f"{known or 'unknown version'} in {folder}"
    return [replace(row, found=found_text, data={"version": known})]


def libraries() -> list[ProbeRow]:
    """What torch_npu loads from CANN."""
    folder = environment.toolkit_folder()
    if folder is None or not folder.is_dir():
        return []
    arch = f"{platform.machine()}-linux"
    places = (folder / "lib64", folder / arch / "lib64", *environment.library_folders())
    lacking = [name for name in CANN_LIBRARIES if not any((place / name).exists() for place in places)]
    count = len(CANN_LIBRARIES) - len(lacking)
    row = ProbeRow("CANN libraries", f"{count} of {len(CANN_LIBRARIES)}", needed="all", part="npu")
    if not lacking:
        return [row]
    found = f"{row.found}: {', '.join(lacking)} not found"
    fix = f"{source_line()}; with CANN 8.5 or newer also install its ops package"
    return [replace(row, found=found, status="broken", fix=fix, data={"missing": lacking})]


# ---- torch_npu and MindIE-SD --------------------------------------------------------------------


def found_versions() -> FoundVersions:
    """What this machine has of a stack."""
    folder = environment.toolkit_folder() or next(iter(toolkits()), None)
    cann = cann_version(folder) if folder else None
    return FoundVersions(cann=cann, driver=driver_version(), **installed("torch", "torch_npu", "mindiesd"))


def torch_npu() -> list[ProbeRow]:
    """The package, and whether it is that of the torch here."""
    versions, needed = installed("torch", "torch_npu"), "the minor version of torch, for an Ascend card"
    absent: Status = "missing" if here() else "absent"
    row = ProbeRow("torch_npu", "none", needed=needed, status=absent, part="npu")
    if (found := versions.get("torch_npu")) is None:
        stack = advise(found_versions())
        return [replace(row, fix=f"pip install torch=={stack.torch} torch_npu=={stack.torch_npu}")]
    torch = versions.get("torch", "?")
    if _same_minor(found, torch):
        return [replace(row, found=found, status="ok")]
    fix = f"install the torch_npu that belongs to torch {torch}"
    return [replace(row, found=found, status="broken", fix=fix)]


def stack() -> list[ProbeRow]:
    """Do torch, torch_npu, CANN, MindIE-SD and the driver belong together?"""
    found = found_versions()
    if found.torch_npu is None:
        return []
    told = match_versions(found)
    row = ProbeRow("versions together", str(told.stack or "no published row"), part="npu")
    published = vars(told.stack) if told.stack else None
    data = {"machine": vars(found), "row": published, "wrong": told.wrong, "unlisted": told.unlisted}
    row = replace(row, needed="one published row", data=data)
    words = "; ".join((*told.wrong, *told.unlisted))
    fix = f"install a published row: {advise(found)}"
    if told.wrong:
        return [replace(row, found=words, status="broken", fix=fix)]
    if told.unlisted:
        return [replace(row, found=words, status="unlisted", fix=f"if it does not run, {fix}")]
    return [row]


def devices() -> list[ProbeRow]:
    """The cards as torch_npu sees them."""
    row = ProbeRow("NPU device", "none", needed="optional", status="absent", part="npu")
    if not (found := cards()):
        return [replace(row, fix="not needed on the CPU")]
    row = replace(
        row, found=f"{len(found)} x {found[0]}", needed="usable", status="broken", fix=source_line()
    )
    if find_spec("torch_npu") is None:
        return [row]
    told = npu_in_a_child()
    if not told.get("cards"):
        return [replace(row, found=f"{row.found}, {told.get('error', 'none usable')}")]
    chip = chip_of(int(told["soc"]))
    memory = sorted({f"{c['memory'] / 2**30:.0f} GiB" for c in told["cards"] if c["memory"]})
    names = sorted({c["name"] for c in told["cards"]})
    words = f"{len(told['cards'])} x {', '.join(names)}" + (f", {', '.join(memory)}" if memory else "")
    row = replace(row, data={**told, "chip": chip.name if chip else None})
    if chip is None:
        known = ", ".join(c.product for c in CHIPS.values())
        words += f", SoC number {told['soc']}"
        return [replace(row, found=words, needed=known, fix="--device cpu, or another card")]
    return [replace(row, found=f"{words}, {chip.product}: {chip.name}", status="ok", fix="")]


def mindiesd() -> list[ProbeRow]:
    """Optional: one kernel where torch_npu needs two."""
    if find_spec("torch_npu") is None:
        return []
    row = ProbeRow("MindIE-SD", "none", needed="optional, for fewer kernels", status="absent")
    if (found := installed("mindiesd").get("mindiesd")) is None:
        return [row]
    told = npu_in_a_child()
    if "error" in told:  # the row of the device says it
        return [replace(row, found=found, status="not checked", fix=source_line())]
    if told["mindiesd"]:
        einops = "pip install einops, which it needs and does not ask for"
        fix = einops if "einops" in told["mindiesd"] else "reinstall it"
        return [replace(row, found=f"{found}, {told['mindiesd']}", status="broken", fix=fix)]
    return [replace(row, found=found, status="ok")]


def operators() -> list[ProbeRow]:
    """The operators that ascendit calls, looked up by name in torch.ops."""
    if find_spec("torch_npu") is None:
        return []
    told = npu_in_a_child()
    chip = chip_of(int(told.get("soc", -1)))
    needed = used_operators(chip.name if chip else None)
    row = ProbeRow("NPU operators", "not looked at", needed=f"{len(needed)} by name", part="npu")
    if "error" in told:
        return [replace(row, status="not checked", fix=source_line())]
    packages = [("torch_npu", "npu", [n for n in needed if "::" not in n])]
    if not told["mindiesd"] and installed("mindiesd"):  # else its own row says it
        packages.append(("MindIE-SD", "", [n for n in needed if n.startswith("mindiesd::")]))
    rows = []
    for package, part, names in packages:
        absent = [n for n in names if n not in told["operators"]]
        row = ProbeRow(f"{package} operators", f"{len(names) - len(absent)} of {len(names)}", part=part)
        row = replace(row, needed="what ascendit calls", data={"needed": names, "missing": absent})
        if absent:
            fix = f"install a published row: {advise(found_versions())}"
            row = replace(row, found=f"{row.found}: no {', '.join(absent)}", status="broken", fix=fix)
        rows.append(row)
    return rows


def used_operators(chip: str | None) -> list[str]:
    """The operators that ascendit calls, all of them or those that `chip` has; from the capability table."""
    rows = [r for r in CAPABILITIES if r.used_for and (chip is None or r.on(chip) == "yes")]
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
have = [n for space, name, n in spaces if hasattr(getattr(torch.ops, space), name)]
print(json.dumps({"cards": cards, "soc": soc, "mindiesd": problem, "operators": have}))
"""


@cache
def npu_in_a_child() -> dict[str, Any]:
    """Cards, SoC number, operators, and why MindIE-SD cannot be imported; or `{"error": ...}`."""
    return probe.child(f"NAMES = {used_operators(None)!r}\n{_CODE}")


NPU_PROBES: tuple[Probe, ...] = (
    torch_npu, cann, libraries, stack, driver, nodes, devices, mindiesd, operators
)  # fmt: skip
