"""Commands in copies of one process that has imported ascendit and its libraries.

    with warm_commands(tmp_path) as folder:  # has `ascendit` and `python`; goes first in PATH
        subprocess.run([folder / "ascendit", "models"])

A command connects to the process, which forks and runs it with the arguments, folder, environment, and
standard streams of the caller. This saves the imports, 2 to 5 s for each command.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import socketserver
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

CLIENT = """\
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
request = json.dumps({"argv": sys.argv[2:], "cwd": os.getcwd(), "environ": dict(os.environ)}).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
sys.exit(int.from_bytes(server.recv(1), "big"))
"""


@contextmanager
def warm_commands(folder: Path) -> Iterator[Path]:
    """A subfolder of `folder` with the commands `ascendit` and `python`, usable inside the context."""
    address, commands, client = folder / "s", folder / "bin", folder / "client.py"
    commands.mkdir()
    client.write_text(CLIENT)
    for name in ("ascendit", "python"):
        file = commands / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{client}" "{address}" {name} "$@"\n')
        file.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address], start_new_session=True)
    try:
        while not address.exists():
            assert server.poll() is None, "the process did not start"
            time.sleep(0.05)
        yield commands
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


# ---- the process --------------------------------------------------------------------------------


class Handler(socketserver.BaseRequestHandler):
    """One command: `ForkingMixIn` runs `handle` in a child, which forks the command and sends its status."""

    def handle(self) -> None:
        size, streams, _, _ = socket.recv_fds(self.request, 8, 3)
        data = b""
        while len(data) < int.from_bytes(size, "big"):
            data += self.request.recv(1 << 20)
        request = json.loads(data)
        if (child := os.fork()) == 0:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            os.chdir(request["cwd"])
            os.environ.clear()
            os.environ.update(request["environ"])
            os._exit(_run(*request["argv"]))
        for stream in streams:
            os.close(stream)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.request.sendall((code if code >= 0 else 128 - code).to_bytes(1, "big"))


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    max_children = 8
    parent = os.getppid()

    def service_actions(self) -> None:
        super().service_actions()
        if os.getppid() != self.parent:  # the tests were killed
            os._exit(1)


def _run(name: str, *arguments: str) -> int:
    """Run a command to its end and return its exit status."""
    sys.path[0] = ""
    try:
        if name == "ascendit":
            sys.argv = [name, *arguments]
            runpy.run_module("ascendit", run_name="__main__")
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = list(arguments)
            runpy.run_path(arguments[0], run_name="__main__")
        code: object = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _serve(address: str) -> None:
    from diffusers import AutoencoderKLWan, WanPipeline  # noqa: F401
    from transformers import AutoTokenizer, UMT5EncoderModel  # noqa: F401

    import ascendit.cli.main
    import ascendit.convert.quantize
    import ascendit.convert.repack
    import ascendit.pipeline.job
    import ascendit.verify.quality  # noqa: F401

    with Server(f"{address}.new", Handler) as server:
        os.rename(f"{address}.new", address)  # it exists once it accepts
        server.serve_forever()


if __name__ == "__main__":
    _serve(sys.argv[1])
