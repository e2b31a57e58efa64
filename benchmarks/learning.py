"""Does it learn? Runs the README's commands on several seeds and writes down what came of it.

    python benchmarks/learning.py --task cartpole --seeds 1 2 3      train and evaluate each seed
    python benchmarks/learning.py --table --write                    results into the README

Every run is the command that a user types, in a process of its own; its result is committed whatever
it is: command, commit, machine, wall time of the training, and every return of the evaluation.
"""

import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]
from benchmarks.speed import machine  # noqa: E402

TASKS = {  # what a user types: the flags behind `python dreamer_v3.py`, and the mean return to reach
    "cartpole": ("--env-id CartPole-v1 --action-repeat 3 --discount-horizon 30 --size XXS "
                 "--mlp-units 1024 --stoch 16 --classes 16 --bins 63 --batch-length 16 "
                 "--train-ratio 256 --beta-pred 5 --model-lr 5e-4 --actor-lr 3e-4 "
                 "--critic-lr 5e-4 --total-timesteps 7500 --threads 1", 450),
    "pendulum": ("--env-id Pendulum-v1 --total-timesteps 6000 --size XXS --stoch 8 --classes 8 "
                 "--batch-length 32 --train-ratio 128 --model-lr 5e-4 --actor-lr 3e-4 "
                 "--critic-lr 5e-4 --threads 1", -250),
}
MARKS = ("<!-- laptop:begin -->", "<!-- laptop:end -->")


@dataclass(frozen=True)
class Options:
    """What to run."""

    task: Literal[tuple(TASKS)] = "cartpole"
    """Which of the README's commands."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run each."""
    episodes: int = 20
    """Episodes of the evaluation."""
    runs_dir: str = "runs"
    """Where the run directories go."""
    table: bool = False
    """Only print the table of the results that are there."""
    write: bool = False
    """Put the table into the README."""


def call(flags: str) -> tuple[str, float]:
    """Output and wall time in seconds of one command of the script."""
    start = time.perf_counter()
    command = [sys.executable, str(HERE.parent / "dreamer_v3.py"), *shlex.split(flags)]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr}")
    return done.stdout, time.perf_counter() - start


def git(*command: str) -> str:
    """Output of a git command in this repository."""
    return subprocess.run(["git", *command], cwd=HERE, text=True, capture_output=True).stdout.strip()


def run(options: Options, seed: int) -> None:
    """Train and evaluate one seed; write benchmarks/results/learning_TASK_SEED.json."""
    flags, target = TASKS[options.task]
    changed = git("status", "--porcelain", "--", "../dreamer_v3.py", "../common")
    commit = git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    output, seconds = call(f"{flags} --seed {seed} --runs-dir {options.runs_dir}")
    run_dir = re.search(r"run directory: (.*)", output)[1]
    evaluation, _ = call(f"--evaluate {run_dir} --eval-episodes {options.episodes} --eval-mode")
    returns = [float(value) for value in re.findall(r"return (\S+),", evaluation)]
    record = {"command": f"python dreamer_v3.py {flags} --seed {seed}", "commit": commit,
              "machine": machine(), "training_minutes": round(seconds / 60, 1), "target": target,
              "mean": statistics.mean(returns), "returns": returns}
    path = HERE / "results" / f"learning_{options.task}_{seed}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{options.task} seed {seed}: mean {record['mean']:.1f} after {seconds / 60:.1f} minutes")


def table() -> str:
    """Markdown: the commands, and one row per committed result."""
    parts, rows = [], ["| task | seed | mean of evaluation (target) | worst, best | minutes | commit |",
                       "|---|---|---|---|---|---|"]
    for task, (flags, _) in TASKS.items():
        parts.append(f"    python dreamer_v3.py {flags}")
        for path in sorted(HERE.glob(f"results/learning_{task}_*.json")):
            found = json.loads(path.read_text())
            rows.append(f"| {task} | {path.stem.split('_')[-1]} | {found['mean']:.1f} "
                        f"({found['target']}) | {min(found['returns']):.0f}, "
                        f"{max(found['returns']):.0f} | {found['training_minutes']} | "
                        f"{found['commit'][:9]} |")
    return "\n".join([*parts, "", *rows])


def main() -> None:
    """Run the seeds, or make the table."""
    options = tyro.cli(Options, description=__doc__)
    if not options.table:
        for seed in options.seeds:
            run(options, seed)
        return
    print(table())
    if options.write:
        readme = HERE.parent / "README.md"
        before, rest = readme.read_text().split(MARKS[0])
        readme.write_text(f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
