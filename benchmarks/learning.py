"""Does it learn? Runs the README's commands on several seeds and writes down what came of it.

    python benchmarks/learning.py --parallel 2                   every script, task and seed
    python benchmarks/learning.py --scripts dreamer_v2 --tasks cartpole --seeds 1
    python benchmarks/learning.py --tasks boxing --limit 180     other sets: carracing, atari100k, control
    python benchmarks/learning.py --table --write                results into the README

Every run is the command that a user types, in a process of its own, on a copy of the
code as it is at the start. Its result is kept whatever it is, in results/learning_*.json, with the
learning curve beside it as CSV. Start it again after a break: what this code has done already is
left out, and a run that was stopped, by its time limit or by a KILL, goes on where it was. One
that its limit stopped is evaluated all the same; the table says so.
"""

import csv
import hashlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from speed import HERE, git, machine, switch, write_between
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

TARGETS = {  # mean return of the evaluation
    "dreamer_v3": {"cartpole": 450, "pendulum": -250, "inverted_pendulum": 900},
    "dreamer_v2": {"cartpole": 400, "pendulum": -300},
    "dreamer_v1": {"cartpole": 400, "pendulum": -300},
}
SETS = {  # name: the tasks that it stands for; each task is a set of its own, too
    "laptop": ("cartpole", "pendulum", "inverted_pendulum", "cartpole_pixels", "acrobot"),
    "boxing": ("boxing",), "carracing": ("carracing",),
    "atari100k": ("atari100k_mspacman", "atari100k_boxing", "atari100k_pong"),  # for a GPU
    "control": ("control_walker", "control_swingup"),  # for a GPU
}
SETS |= {task: (task,) for tasks in [*SETS.values()] for task in tasks}
BOXING = ("--env-id BoxingNoFrameskip-v4 --deter 512 --hidden 256 --units 256 --layers 2 "
          "--depth 16 --stoch 16 --classes 16 --batch-length 32 --train-ratio 448 --model-lr 2e-4 "
          "--actor-lr 6e-5 --critic-lr 6e-5 --total-timesteps 14400 --threads 1")
V3_LAPTOP = {  # one preset for all of them; poles have a flag of their own
    "cartpole": ("CartPole-v1 --action-repeat 2", 15_000), "pendulum": ("Pendulum-v1", 15_000),
    "inverted_pendulum": ("InvertedPendulum-v5 --action-repeat 2", 15_000),
    "cartpole_pixels": ("CartPole-v1 --pixels", 10_000), "acrobot": ("Acrobot-v1", 10_000),
}
COMMANDS = {  # what a user types behind `python SCRIPT.py`
    "dreamer_v3": {
        "boxing": f"--size XS {BOXING}",
        **{f"atari100k_{name.lower()}": f"--env-id {name}NoFrameskip-v4 --cuda-graph"
           for name in ("MsPacman", "Boxing", "Pong")},
        **{f"control_{name}": f"--env-id dm_control/{env_id}-v0 --action-repeat 2 --cuda-graph "
           "--total-timesteps 250000 --train-ratio 512"
           for name, env_id in (("walker", "walker-walk"), ("swingup", "cartpole-swingup"))},
        **{task: f"--env-id {env_id} --size XXS --total-timesteps {timesteps} --threads 1"
           for task, (env_id, timesteps) in V3_LAPTOP.items()},
    },
    "dreamer_v2": {
        "boxing": f"--size XXS {BOXING} --clip-rewards tanh --kl-scale 0.1 --actor-entropy 1e-3 "
                  "--gamma 0.99",
        "cartpole": "--env-id CartPole-v1 --size XXS --action-repeat 2 --total-timesteps 20000 "
                    "--threads 1",
        "pendulum": "--env-id Pendulum-v1 --size XXS --gamma 0.95 --kl-scale 0.1 --actor-lr 1e-4 "
                    "--train-ratio 256 --total-timesteps 5000 --threads 1",
    },
    "dreamer_v1": {
        "carracing": "--env-id CarRacing-v3 --size XXS --depth 16 --kl-scale 1 --free-nats 3 "
                     "--action-repeat 4 --max-episode-steps 250 --env-seed 5 "
                     "--total-timesteps 20000 --threads 1",
        "cartpole": "--env-id CartPole-v1 --size XXS --action-repeat 2 --total-timesteps 10000 "
                    "--threads 1",
        "pendulum": "--env-id Pendulum-v1 --size XXS --gamma 0.95 --kl-scale 0.1 --free-nats 1 "
                    "--train-ratio 256 --expl-decay 0 --total-timesteps 5000 --threads 1",
    },
}
MARKS = ("<!-- laptop:begin -->", "<!-- laptop:end -->")
PATIENCE = 900  # seconds for a run that was told to stop: an update, and all of its files


@dataclass(frozen=True)
class Options:
    """What to run."""

    scripts: tuple[Literal[tuple(COMMANDS)], ...] = tuple(COMMANDS)
    """Which agents."""
    tasks: tuple[Literal[tuple(SETS)], ...] = ("laptop",)
    """Which tasks, or sets of them."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run each."""
    parallel: int = 1
    """Runs at the same time; on the small tasks each has one thread."""
    threads: int | None = None
    """Instead of the command's, for a run that has the machine to itself; kept with the result."""
    limit: float = 60.0
    """Minutes after which a run is stopped and evaluated as it is."""
    episodes: int = 20
    """Episodes of the evaluation."""
    runs_dir: str = "runs/learning"
    """Where run directories and the output of each run go."""
    keep: bool = False
    """Also leave out what older code or other flags have a result for."""
    note: str = ""
    """Kept with the results, e.g. "busy machine"."""
    table: bool = False
    """Only print the table of the results that are there."""
    write: bool = False
    """With --table: into README.md, between its marks."""


@dataclass(frozen=True)
class Code:
    """A copy of scripts and common/ that nobody edits while the runs go on."""

    folder: Path
    commit: str
    digest: str

    @classmethod
    def copy(cls, folder: Path) -> "Code":
        """Take the copy; its name is a digest of its content."""
        files = sorted([*HERE.parent.glob("dreamer_v*.py"), *HERE.parent.glob("common/*.py")])
        changed = git("status", "--porcelain", "--", *map(str, files))
        content = {path.relative_to(HERE.parent): path.read_bytes() for path in files}
        digest = hashlib.sha256(repr(content).encode()).hexdigest()[:12]
        for name, text in content.items():
            (folder / digest / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / digest / name).write_bytes(text)
        return cls(folder / digest, git("rev-parse", "HEAD") + "-dirty" * bool(changed), digest)

    def digest_of(self, script: str) -> str:
        """What a result of `script` depends on: this script and common/."""
        paths = [self.folder / f"{script}.py", *sorted(self.folder.glob("common/*.py"))]
        return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


@dataclass(frozen=True)
class Job:
    """One run."""

    script: str
    task: str
    seed: int

    @property
    def name(self) -> str:
        """Of its result."""
        return f"{self.script}_{self.task}_{self.seed}"

    @property
    def result(self) -> Path:
        """Where its result goes; the curve goes beside it."""
        return HERE / "results" / f"learning_{self.name}.json"

    @property
    def flags(self) -> str:
        """What a user types behind the script."""
        return f"{COMMANDS[self.script][self.task]} --seed {self.seed}"

    def is_done(self, options: Options, code: Code) -> bool:
        """Whether there is a result, by this code and these flags unless --keep."""
        if options.keep or not self.result.exists():
            return self.result.exists()
        found = json.loads(self.result.read_text())
        return (found["code"] == code.digest_of(self.script) and not found["stopped_by_limit"]
                and found["command"] == f"python {self.script}.py {self.flags}")


def call(code: Code, script: str, flags: str, log: Path, limit: float,
         mode: str = "w") -> tuple[str, bool]:
    """Output of one command of a script, and whether it was stopped after `limit` minutes."""
    command = [sys.executable, str(code.folder / f"{script}.py"), *shlex.split(flags)]
    with open(log, mode) as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            process.wait(60 * limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it saves its state and ends
            process.wait(PATIENCE)
            return log.read_text(), True
        finally:
            process.kill()
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{log.read_text()[-2000:]}")
    return log.read_text(), False


def run(job: Job, options: Options, code: Code) -> dict:
    """Train, or go on with training, and evaluate; write the result and the curve."""
    folder = Path(options.runs_dir).resolve()
    key = hashlib.sha256(f"{code.digest_of(job.script)} {job.flags}".encode()).hexdigest()[:12]
    log = folder / f"{job.name}_{key}.log"
    begun = run_directory(log)
    threads = f" --threads {options.threads}" if options.threads else ""
    _, stopped = call(code, job.script, (f"--resume {begun}" if begun else
                      f"{job.flags} --runs-dir {folder}") + threads, log, options.limit, "a")
    run_dir = run_directory(log)
    greedy = switch(code.folder / f"{job.script}.py", "eval-greedy", True)
    evaluation, _ = call(
        code, job.script, f"--evaluate {run_dir} --eval-episodes {options.episodes} {greedy}"
        + " --eval-env-seed 5 10 200 5000 77" * (job.task == "carracing"),  # the track, four others
        folder / f"{job.name}_evaluation.log", options.limit)
    returns = [float(value) for value in re.findall(r"return (\S+),", evaluation)]
    timesteps, updates = progress(run_dir)
    total = json.loads((run_dir / "args.json").read_text())["args"]["total_timesteps"]
    if timesteps < total and not stopped:
        raise RuntimeError(f"interrupted after {timesteps} of {total} timesteps")
    seconds = write_curve(run_dir, job.result.with_suffix(".csv"))
    record = {"command": f"python {job.script}.py {job.flags}", "commit": code.commit,
              "code": code.digest_of(job.script), "machine": machine(), "note": options.note,
              "parallel": options.parallel, "threads": options.threads,
              "target": TARGETS[job.script].get(job.task), "stopped_by_limit": stopped,
              "minutes": round(seconds / 60, 1),
              "timesteps": timesteps, "updates": updates, "mean": statistics.mean(returns),
              "worst": min(returns), "best": max(returns), "returns": returns}
    job.result.write_text(json.dumps(record, indent=1) + "\n")
    return record


def run_directory(log: Path) -> Path | None:
    """The one that the output of a run names, if there is something to resume in it."""
    found = log.exists() and re.search(r"run directory: (.*)", log.read_text())
    return Path(found[1]) if found and Path(found[1], "checkpoint.pt").exists() else None


def progress(run_dir: Path) -> tuple[int, int]:
    """Timesteps and updates of a run, from its checkpoint."""
    import torch  # takes seconds
    saved = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    return saved["step"], saved["updates"]


def write_curve(run_dir: Path, path: Path) -> float:
    """A row for each training episode; returns the seconds of the run, without its breaks."""
    spans = []  # from the first to the last event of each process
    for file in sorted(run_dir.glob("events.out.tfevents.*")):
        times = [event.wall_time for event in EventFileLoader(str(file)).Load()]
        spans.append((times[0], times[-1]))
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    repeat = json.loads((run_dir / "args.json").read_text())["args"]["action_repeat"]
    tags = [f"charts/{name}" for name in ("episodic_return", "episodic_length", "updates")]
    is_any = tags[0] in events.Tags()["scalars"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["timesteps", "frames", "return", "length", "updates", "seconds"])
        for point, length, updates in zip(*map(events.Scalars, tags)) if is_any else ():
            passed = sum(min(max(point.wall_time - first, 0), last - first)
                         for first, last in spans)
            writer.writerow([point.step, point.step * repeat, f"{point.value:g}",
                             int(length.value), int(updates.value), round(passed, 1)])
    return sum(last - first for first, last in spans)


def attempt(job: Job, options: Options, code: Code) -> bool:
    """Run and report; a run that fails does not stop the others."""
    try:
        found = run(job, options, code)
    except Exception as error:  # whatever it is, it is reported, and the others go on
        print(f"{job.name}: {error!r}", flush=True)
        return False
    print(f"{job.name}: mean {found['mean']:.1f} (worst {found['worst']:.1f}, best "
          f"{found['best']:.1f}), {found['updates']} updates in {found['minutes']:.1f} minutes"
          f"{', stopped by the limit' * found['stopped_by_limit']}", flush=True)
    return True


def run_all(options: Options) -> bool:
    """All runs that have no result yet; returns whether none failed."""
    folder = Path(options.runs_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    code = Code.copy(folder / "code")
    tasks = [task for name in options.tasks for task in SETS[name]]
    jobs = [Job(script, task, seed) for seed in options.seeds for task in tasks
            for script in options.scripts if task in COMMANDS[script]]
    todo = [job for job in jobs if not job.is_done(options, code)]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are done; output: {folder}", flush=True)
    with ThreadPoolExecutor(options.parallel) as pool:
        return all(list(pool.map(lambda job: attempt(job, options, code), todo)))


def table() -> str:
    """Markdown: the commands, and one row per script and task."""
    commands, rows = [], []
    for script, tasks in COMMANDS.items():
        for task, flags in tasks.items():
            if task not in SETS["laptop"]:
                continue
            paths = sorted(HERE.glob(f"results/learning_{script}_{task}_[0-9]*.json"))
            found = {path.stem.split("_")[-1]: json.loads(path.read_text()) for path in paths}
            commands.append(f"    python {script}.py {flags}")
            if found:
                rows.append(row(script, task, found))
    head = ["script", "task", "mean return by seed", "target", "worst episode", "minutes", "commit"]
    return "\n".join([*commands, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])


def row(script: str, task: str, found: dict[str, dict]) -> str:
    """One row; `found` holds the results by seed."""
    means = ", ".join(f"{seed}: {record['mean']:.1f}"
                      f"{' (stopped early)' * record['stopped_by_limit']}"
                      for seed, record in found.items())
    minutes = [round(record["minutes"]) for record in found.values()]
    commits = {record["commit"][:9] + record["commit"][40:] for record in found.values()}
    cells = [script, task, means, TARGETS[script].get(task, "none"),
             f"{min(record['worst'] for record in found.values()):.0f}",
             " to ".join(map(str, sorted({min(minutes), max(minutes)}))),
             ", ".join(sorted(commits))]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Run the seeds, or make the table."""
    options = tyro.cli(Options, description=__doc__)
    if not options.table:
        sys.exit(0 if run_all(options) else 1)
    print(table())
    if options.write:
        write_between(MARKS, table())


if __name__ == "__main__":
    main()
