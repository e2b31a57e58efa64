"""What a second process brings: seconds per update of one process and of two, with the same batch.

    python benchmarks/ranks.py                       tiny networks on images, one thread a process
    python benchmarks/ranks.py --size XS --rounds 5

Both are started by torchrun, one after the other, again and again; each process has one thread, so
that two of them can be twice as fast only if two cores are free. On GPUs each process takes one.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from side import synthetic_batch
from speed import SHAPES, save, start_record
from speed import Options as Speed

from common import devices
from common.envs import EnvSpec


@dataclass(frozen=True)
class Options:
    """What to measure."""

    script: Literal["dreamer_v1", "dreamer_v2", "dreamer_v3"] = "dreamer_v3"
    """Which agent; batch, images and actions are those of speed.py."""
    size: Literal["tiny", "XXS", "XS", "S", "paper"] = "tiny"
    """Networks; tiny is that of speed.py."""
    batch_size: int = 16
    """Sequences in the whole batch."""
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


def make_agent(options: Options, device: torch.device):
    """The script, and an agent of this size for the images and actions of speed.py."""
    script, shape = importlib.import_module(options.script), SHAPES[options.script]
    size = {"setting": "tiny"} if options.size == "tiny" else {"size": options.size}
    args = script.Args(**Speed(script=options.script, **size).sizes)
    if getattr(script, "TASKS", {}):
        script.fill(args, script.TASKS["discrete" if shape["discrete"] else "continuous"])
    spec = EnvSpec((64, 64, shape["channels"]), 0, shape["actions"], shape["discrete"])
    return script, script.Agent(args, spec, device)


def work(options: Options) -> None:
    """Train on this process's share of the batch; rank 0 prints the seconds of every update."""
    torch.set_num_threads(1)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world, local = devices.setup_distributed(accelerator)
    devices.seed_everything(0, False)
    device = torch.device(accelerator, local) if accelerator == "cuda" else torch.device("cpu")
    script, agent = make_agent(options, device)
    shape, rows = SHAPES[options.script], options.batch_size // world
    arrays = synthetic_batch(shape["batch_length"], rows, shape)
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    batch, carry, seconds = script.Batch(vector=None, **tensors), agent.zero_state(rows), []
    for _ in range(2 + options.updates):
        start = time.perf_counter()
        agent.train_step(batch, carry)
        devices.keep_freed_memory()  # as a run does after the first one
        if accelerator == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        print("seconds", json.dumps(seconds[2:]), flush=True)
    dist.destroy_process_group()


def start(options: Options, processes: int) -> float:
    """Median seconds per update of this many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(processes), __file__, "--worker", "--script", options.script, "--size",
               options.size, "--batch-size", str(options.batch_size), "--updates",
               str(options.updates)]
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
