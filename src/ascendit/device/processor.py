"""The processor of this machine. Does not import torch."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from ascendit.device.cgroup import read_text


def processor_name() -> str:
    """The model of the processor, as `AMD EPYC 9R14`; the architecture if the system does not report it."""
    model = re.search(r"^model name\s*:\s*(.*)$", read_text(Path("/proc/cpuinfo")), re.M)
    return model[1] if model else platform.processor() or platform.machine()
