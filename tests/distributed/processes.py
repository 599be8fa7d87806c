"""Real processes on the CPU for a test: they meet through a file, so that no port can be taken."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

LIMIT = 120.0  # seconds for a whole run


def run_processes(function: Callable, world: int, folder: Path, *, patience: float = 60, lost: int | None = None):
    """What `function(rank, world)`, of a module's top level, returned in each of `world` processes (gloo).

    `patience` is the time in seconds that they wait for each other; `lost` is the rank that need not come to an end.
    """
    # one process imports what all need, and each of the others is a copy of it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_bpgcn.training.sharded_ranking"])
    processes = {
        rank: context.Process(target=_enter, args=(function, rank, world, folder, patience), daemon=True)
        for rank in range(world)
    }
    for process in processes.values():
        process.start()
    results = {rank: folder / f"rank{rank}.pt" for rank in range(world) if rank != lost}
    end = time.monotonic() + LIMIT
    try:
        while not all(path.exists() for path in results.values()):
            ended = {rank: processes[rank].exitcode for rank in results if processes[rank].exitcode is not None}
            assert not ended, f"Processes ended without a result; exit codes {ended}."
            assert time.monotonic() < end, f"The processes did not come to an end within {LIMIT} s."
            time.sleep(0.02)
    finally:
        for process in processes.values():
            process.kill()
            process.join()
    return [torch.load(path) for path in results.values()]


def _enter(function: Callable, rank: int, world: int, folder: Path, patience: float) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    # a process that starts late is no lost one
    store.set(f"started{rank}", "")
    store.wait([f"started{other}" for other in range(world)], timedelta(seconds=LIMIT))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=patience))
    unfinished = folder / f"rank{rank}.unfinished"
    torch.save(function(rank, world), unfinished)
    unfinished.rename(unfinished.with_suffix(".pt"))
    # to end now would break connections that others still use
    threading.Event().wait()


def error_of(function: Callable, *args, **kwargs) -> str:
    """The type and the words of the error that a call raises, or an empty string."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
