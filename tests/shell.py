"""Command lines as bash reads them."""

from __future__ import annotations

import os
import subprocess


def split(line: str) -> list[str]:
    """The words of a command line, with `$'..'` quotes, which `shlex` does not know."""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    command = ["bash", "-c", f"printf '%s\\0' {line}"]
    output = subprocess.run(command, capture_output=True, check=True, env=environment).stdout
    return output.decode().split("\0")[:-1]
