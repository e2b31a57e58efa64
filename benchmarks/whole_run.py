"""The posts' own whole-run benchmark: sheeprl exp=dreamer_vN_benchmarks and the same job by ours.

    python benchmarks/whole_run.py --peer-python /opt/sheeprl-venv/bin/python --threads 1

16,384 MsPacman steps (up to 30 no-ops, frame skip 4, 64 x 64 x 3), 960 updates at tiny sizes, a
memory-mapped buffer, TensorBoard and a checkpoint at step 10,000 and at the end. sheeprl's videos
are left out (ours are off too); everything else is its own default, the CPU included. The two run
one after the other, once: keep the machine quiet.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

import tyro
from speed import HERE, save, start_record, switch

THEIR_START = ("import ale_py, gymnasium; gymnasium.register_envs(ale_py); "
               "from sheeprl.cli import run; run()")
FLAGS = ("--env-id MsPacmanNoFrameskip-v4 --max-episode-steps 27000 --learning-starts 1024 "
         "--buffer-size 16384 --deter 8 --hidden 8 --units 8 --depth 2 --stoch 4 --log-every 5000 "
         "--video-every 0 --checkpoint-every 10000 --amp off --no-cuda --pretrain 1 "
         "--action-repeat 4 --imag-horizon 15")
OWN_FLAGS = {  # one update for every 16 steps: train ratio = batch size x batch length / 16
    "dreamer_v1": "--train-ratio 156.25 --actor-layers 1 --reward-layers 2 --critic-layers 3 "
                  "--clip-rewards none",
    "dreamer_v2": "--train-ratio 50 --layers 1 --classes 4 --clip-rewards none --sticky 0",
    "dreamer_v3": "--train-ratio 64 --layers 1 --classes 4",
}
OFF = {"dreamer_v1": ["pcont"], "dreamer_v2": ["pcont", "grayscale"], "dreamer_v3": []}


@dataclass(frozen=True)
class Options:
    """What to run."""

    script: Literal["dreamer_v1", "dreamer_v2", "dreamer_v3"] = "dreamer_v3"
    """Which agent."""
    peer_python: str = ""
    """Python of sheeprl's virtual environment; empty: only ours."""
    threads: int = 1
    """CPU threads of torch, for both."""
    steps: int = 16_384
    """Fewer for a trial; the benchmark is 16,384."""
    note: str = ""
    """Kept with the result, e.g. "busy machine"."""
    setting: str = "posts"
    """Name of the setting in the table."""


def clock(command: list[str], threads: int) -> float:
    """Seconds from start to end of a process, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, text=True,
                              stderr=subprocess.PIPE,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        return time.perf_counter() - start


def main() -> None:
    """Run one after the other."""
    options = tyro.cli(Options, description=__doc__)
    record = start_record("whole_run", options)
    commands = {"sheeprl": [
        options.peer_python, "-c", THEIR_START, f"exp={options.script}_benchmarks",
        "env.capture_video=False", f"algo.total_steps={options.steps}",
        f"num_threads={options.threads}"]} if options.peer_python else {}
    script = HERE.parent / f"{options.script}.py"
    off = [switch(script, name, False) for name in OFF[options.script]]
    commands["ours"] = [
        sys.executable, str(script), *FLAGS.split(), *OWN_FLAGS[options.script].split(),
        *" ".join(off).split(), "--total-timesteps", str(options.steps), "--threads",
        str(options.threads)]
    seconds = {}
    for name, command in commands.items():
        seconds[name] = clock(command, options.threads)
        print(f"{name}: {seconds[name]:.1f} s", flush=True)
    print(save(record | {"seconds": seconds}))


if __name__ == "__main__":
    main()
