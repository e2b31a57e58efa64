"""The posts' own whole-run benchmark: sheeprl exp=dreamer_v3_benchmarks and the same job by ours.

    python benchmarks/whole_run.py --peer-python /opt/sheeprl-venv/bin/python --threads 1

16,384 MsPacman steps (up to 30 no-ops, frame skip 4, 64 x 64 x 3), 960 updates of
16 x 64 at tiny sizes, a memory-mapped buffer, TensorBoard and a checkpoint at step 10,000 and at
the end. sheeprl's videos are left out (ours are off too); everything else is its own default,
the CPU included. The two run one after the other, once: keep the machine quiet.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import tyro
from speed import HERE, save, start_record

THEIR_START = ("import ale_py, gymnasium; gymnasium.register_envs(ale_py); "
               "from sheeprl.cli import run; run()")


@dataclass(frozen=True)
class Options:
    """What to run."""

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


def main() -> None:
    """Run one after the other, each from start to end of its process."""
    options = tyro.cli(Options, description=__doc__)
    record = start_record("whole_run", options)
    ours = [sys.executable, str(HERE.parent / "dreamer_v3.py"),
            *"--env-id MsPacmanNoFrameskip-v4 --max-episode-steps 27000 --learning-starts 1024 "
             "--train-ratio 64 --buffer-size 16384 --deter 8 --hidden 8 --units 8 --layers 1 "
             "--depth 2 --stoch 4 --classes 4 --log-every 5000 --video-every 0 "
             "--checkpoint-every 10000 --amp off --no-cuda".split(),
            "--total-timesteps", str(options.steps), "--threads", str(options.threads)]
    theirs = [options.peer_python, "-c", THEIR_START, "exp=dreamer_v3_benchmarks",
              "env.capture_video=False", f"algo.total_steps={options.steps}",
              f"num_threads={options.threads}"]
    commands = ({"sheeprl": theirs} if options.peer_python else {}) | {"ours": ours}
    seconds = {}
    for name, command in commands.items():
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL,
                           env=os.environ | {"OMP_NUM_THREADS": str(options.threads)})
            seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.1f} s", flush=True)
    print(save(record | {"seconds": seconds}))


if __name__ == "__main__":
    main()
