"""Two processes of one gloo group, started once for all tests that use them; they call functions by name.

def scaled(rank: int, by: float) -> float: ...             # in tests/model/sharded.py

results = gloo("model.sharded:scaled", 2.0)                # [of rank 0, of rank 1]
"""

from __future__ import annotations

import importlib
import multiprocessing
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RANKS = 2
SECONDS = 120


class Gloo:
    """The processes; `gloo(name, *args)` calls `name(rank, *args)` in each of them."""

    def __init__(self, meeting: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(RANKS):
            pipe, child_pipe = context.Pipe()
            process = context.Process(target=serve, args=(rank, str(meeting), child_pipe), daemon=True)
            process.start()
            child_pipe.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def __call__(self, name: str, *args: Any) -> list[Any]:
        """Return the results by rank. RuntimeError with the traceback of the first failed rank."""
        for pipe in self._pipes:
            pipe.send((name, args))
        results = []
        for pipe in self._pipes:
            if not pipe.poll(SECONDS):
                raise RuntimeError(f"{name}: no answer in {SECONDS} s")
            results.append(pipe.recv())
        for failed, value in results:
            if failed:
                raise RuntimeError(value)
        return [value for _, value in results]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def serve(rank: int, meeting: str, pipe: Connection) -> None:
    """One process: join the group, then answer calls until it is killed."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    while True:
        name, args = pipe.recv()
        module, _, function = name.partition(":")
        torch.manual_seed(0)
        try:
            pipe.send((False, getattr(importlib.import_module(module), function)(rank, *args)))
        except BaseException:
            pipe.send((True, f"rank {rank}: {traceback.format_exc()}"))
