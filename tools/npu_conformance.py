"""Compare ascendit's NPU code with the real torch_npu 2.13.0 and MindIE-SD 3.1.0, without a card or CANN.

    python tools/npu_conformance.py            # tables; exit code 1 on a difference
    python tools/npu_conformance.py --json
    python tools/npu_conformance.py --docs docs/npu-conformance.md    # renew the tables of the page

(a) The frozen schemas of the twin equal those of the wheels. (b) The wheel's own Meta kernels accept every
valid call, (c) with the twin's shapes and dtypes. The dry run executes the real packages over a stub CANN, as
a2, a3 and a5. See docs/npu-conformance.md. Exit code 3: no wheel, no compiler, or another version of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fake_cann.build import NoCompiler, build
from npu import report, schemas, wheels

import ascendit
from ascendit.device.chip import CHIPS

TOOLS = Path(__file__).resolve().parent
LIBRARIES = ("torch_npu/lib/*.so", "torch_npu/_C*.so", "mindiesd/plugin/torch213/*.so")
FALLBACK = "fall back to run on the CPU"
"""Part of torch_npu's warning for an operator without a kernel. The dry run ends with one, as a control."""


class Failed(Exception):
    """A subprocess failed; the text has the end of its stderr."""


def check(cache: Path = wheels.CACHE) -> dict[str, Any]:
    """The complete report. Raises NoWheel or NoCompiler if one is missing."""
    check_torch()
    files = [wheels.download(name, cache) for name in (wheels.TORCH_NPU, wheels.MINDIESD, wheels.EINOPS)]
    packages = wheels.unpack(files, cache)
    libraries = [path for pattern in LIBRARIES for path in sorted(packages.glob(pattern))]
    stub = build(libraries, cache)
    ours, theirs = schemas.frozen("torch_npu_2.13.0"), schemas.of_torch_npu(files[0])
    mindiesd = schemas.frozen("mindiesd_3.1.0")
    meta, _ = run("npu.meta", str(files[0]))
    dry = {}
    for chip in CHIPS.values():
        env = {"FAKE_CANN_SOC": chip.soc_name, "LD_LIBRARY_PATH": str(stub)}
        dry[chip.name], errors = run("npu.dry", packages=packages, **env)
        dry[chip.name]["fallbacks"] = [line for line in errors.splitlines() if FALLBACK in line]
    return report.make(
        schemas={
            "torch_npu": {"count": len(ours), "different": schemas.differences(ours, theirs)},
            "mindiesd": {"count": len(mindiesd), "different": schemas.absent(mindiesd, libraries[-1])},
        },
        meta=meta,
        dry=dry,
    )


def check_torch() -> None:
    """Raises NoWheel unless torch is the version for which the wheel was built."""
    import torch

    version = wheels.TORCH_NPU.partition("==")[2].rpartition(".")[0]
    if not torch.__version__.startswith(f"{version}."):
        raise wheels.NoWheel(f"torch is {torch.__version__}; {wheels.TORCH_NPU} is for torch {version}")


def run(module: str, *arguments: str, packages: Path | None = None, **env: str) -> tuple[Any, str]:
    """The JSON that a module of `tools/npu` writes in its own process, and its stderr."""
    path = [packages, Path(ascendit.__file__).parents[1], TOOLS]
    own = {k: v for k, v in os.environ.items() if not k.startswith(("ASCEND", "PYTHON"))}
    own |= {"PYTHONPATH": os.pathsep.join(str(p) for p in path if p), "OMP_NUM_THREADS": "1", **env}
    own["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", module, *arguments, str(out)]
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise Failed(f"{' '.join(command[1:3])} {env}: {done.stderr.strip()[-3000:]}")
        return json.loads(out.read_text()), done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--docs", type=Path, help="renew the tables of this page")
    parser.add_argument("--cache", type=Path, default=wheels.CACHE, help="folder for wheels and the stub")
    args = parser.parse_args()
    try:
        result = check(args.cache)
    except (wheels.NoWheel, NoCompiler) as e:
        print(f"not checked: {e}", file=sys.stderr)
        return 3
    except Failed as e:
        print(f"failed: {e}", file=sys.stderr)
        return 1
    if args.docs:
        args.docs.write_text(report.renew(args.docs.read_text(), result))
    print(json.dumps(result, indent=1) if args.json else report.text(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
