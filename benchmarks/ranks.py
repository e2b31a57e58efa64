"""What a second process brings: seconds per update of one process and of two, with the same batch.

    python benchmarks/ranks.py                       tiny networks on images, one thread a process
    python benchmarks/ranks.py --size XS --rounds 5

Both are started by torchrun, one after the other, again and again; each process has one thread, so
that two of them can be twice as fast only if two cores are free. On GPUs each process takes one.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import dreamer_v3  # noqa: E402
from benchmarks.side import synthetic_batch  # noqa: E402
from benchmarks.speed import TINY, save, start_record  # noqa: E402
from common import runs  # noqa: E402
from common.envs import EnvSpec  # noqa: E402


@dataclass(frozen=True)
class Options:
    """What to measure."""

    size: Literal["tiny", "XXS", "XS", "S"] = "tiny"
    """Networks; tiny is that of speed.py."""
    batch_size: int = 16
    """Sequences of 64 timesteps in the whole batch."""
    rounds: int = 3
    """Starts of each number of processes."""
    updates: int = 5
    """Timed updates of each start, after two that are not."""
    note: str = ""
    """Kept with the result, e.g. "busy machine"."""
    setting: str = "ranks"
    """Name of the setting."""
    worker: bool = False
    """One of the processes; torchrun sets this."""


def work(options: Options) -> None:
    """Train on this process's share of the batch; rank 0 prints the seconds of every update."""
    torch.set_num_threads(1)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world, local = runs.setup_distributed(accelerator)
    runs.seed_everything(0, False)
    runs.keep_freed_memory()
    sizes = TINY if options.size == "tiny" else dict(size=options.size)
    device = torch.device(accelerator, local) if accelerator == "cuda" else torch.device("cpu")
    agent = dreamer_v3.Agent(dreamer_v3.Args(**sizes), EnvSpec((64, 64, 3), 0, 9, True), device)
    arrays = synthetic_batch(64, options.batch_size // world, 9)
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    batch, seconds = dreamer_v3.Batch(vector=None, **tensors), []
    for _ in range(2 + options.updates):
        start = time.perf_counter()
        agent.train_step(batch, agent.blank_state(options.batch_size // world))
        if accelerator == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        print("seconds", json.dumps(seconds[2:]), flush=True)
    dist.destroy_process_group()


def start(options: Options, processes: int) -> float:
    """Median seconds per update of this many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(processes), __file__, "--worker", "--size", options.size, "--batch-size",
               str(options.batch_size), "--updates", str(options.updates)]
    done = subprocess.run(command, text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("seconds")]
    if not lines:
        sys.exit(f"{processes} processes failed:\n{done.stderr[-2000:]}")
    return statistics.median(json.loads(lines[0].partition(" ")[2]))


def main() -> None:
    """Take turns, and write down what came of it."""
    options = tyro.cli(Options, description=__doc__)
    if options.worker:
        return work(options)
    record = start_record("ranks", options)
    seconds = {1: [], 2: []}
    for _ in range(options.rounds):
        for processes in seconds:
            seconds[processes].append(start(options, processes))
            print(f"{processes} processes: {seconds[processes][-1]:.3f} s per update", flush=True)
    speedup = statistics.median(one / two for one, two in zip(seconds[1], seconds[2]))
    print(f"two processes are {speedup:.2f} times as fast as one")
    print(save(record | {"seconds": seconds, "speedup": speedup}))


if __name__ == "__main__":
    main()
