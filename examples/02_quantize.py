"""Quantize the demo model, look at it, write it for MindIE-SD: python examples/02_quantize.py [OUTPUT]"""

import sys
from pathlib import Path

import ascendit


def main() -> None:
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/demo-mxfp4")
    report = ascendit.quantize("demo", output, scheme="mxfp4", keep=["blocks.0.*"], report=True)
    print(*report.lines(), "", sep="\n")
    print(*ascendit.inspect(output).lines(), "", sep="\n")
    dialect = output.with_name(f"{output.name}-mindie")
    print(*ascendit.repack(output, dialect, engine="mindie", check=True).lines(), sep="\n")


if __name__ == "__main__":
    main()
