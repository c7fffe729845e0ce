"""Quantize the demo model, look at the result, and write it as MindIE-SD wants it.

    python examples/02_quantize.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import ascendit

with tempfile.TemporaryDirectory() as folder:
    quantized = Path(folder) / "demo-mxfp4"
    report = ascendit.quantize("demo", quantized, scheme="mxfp4", keep=["blocks.0.*"], report=True)
    print("\n".join(report.lines()))
    print("\n".join(ascendit.inspect(quantized).lines()))
    print("\n".join(ascendit.repack(quantized, Path(folder) / "mindie", engine="mindie").lines()))
