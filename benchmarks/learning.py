"""Does it learn? Runs the README's commands on several seeds and writes down what came of it.

    python benchmarks/learning.py --parallel 2                   the set "laptop", each script
    python benchmarks/learning.py --tasks control --seeds 1 2 --limit 120
    python benchmarks/learning.py --table --write                tables of all sets into the READMEs

Every run is the command that a user types, in a process of its own, on a copy of the code as it is
at the start. Its result is kept whatever it is, in results/SET/SCRIPT_TASK_SEED.json, with the
learning curve beside it as CSV. Start it again after a break: it leaves out what this code has done
already, and it continues a run that was stopped, by its time limit or by a KILL. A run that its
limit stopped is evaluated all the same; the table says so.
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
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from speed import HERE, commit, machine, markdown, short, write_between
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

TARGETS = {  # mean return of the evaluation; of other tasks the least of the published seeds
    "cartpole": {"dreamer_v1": 400, "dreamer_v2": 400, "dreamer_v3": 450},
    "pendulum": {"dreamer_v1": -300, "dreamer_v2": -300, "dreamer_v3": -250},
    "inverted_pendulum": {"dreamer_v3": 900}, "acrobot": {"dreamer_v3": -150},
}
CONTROL = {f"control_{name.replace('-', '_')}": name for name in (
    "cartpole-swingup", "walker-walk", "reacher-easy", "finger-spin", "cheetah-run")}
PIXELS = {f"{task}_pixels": CONTROL[task] for task in [*CONTROL][:2]}  # for V1 and V2
GAMES = {f"atari100k_{name.lower()}": name for name in ("MsPacman", "Boxing", "Pong")}
SETS = {  # name, which is that of the folder: its tasks. A task is a choice of its own, too
    "laptop": ("cartpole", "pendulum", "inverted_pendulum", "cartpole_pixels", "acrobot"),
    "boxing": ("boxing",), "mspacman": ("mspacman",), "carracing": ("carracing",),
    "control": (*CONTROL, *PIXELS),
    "atari100k": tuple(GAMES),  # wants a GPU
}
CHOICES = SETS | {task: (task,) for tasks in SETS.values() for task in tasks}
TRACKS = {"carracing": (5, 10, 200, 5000, 77)}  # --eval-env-seed: the one of training, four others
GAME = ("--env-id {}NoFrameskip-v4 --deter 512 --hidden 256 --units 256 --layers 2 --depth {} "
        "--stoch 16 --classes 16 --batch-length 32 --train-ratio {} {} --total-timesteps {}")
RATES = "--model-lr 2e-4 --actor-lr 6e-5 --critic-lr 6e-5"  # twice the paper's
BEFORE = " --actor-entropy 3e-4"  # as in the XXS of the records, run before it was 3e-3 there
LAPTOP = {  # V3: one preset for all of them
    "cartpole": ("CartPole-v1 --action-repeat 2", 15_000), "pendulum": ("Pendulum-v1", 15_000),
    "inverted_pendulum": ("InvertedPendulum-v5", 15_000), "acrobot": ("Acrobot-v1", 10_000),
    "cartpole_pixels": (f"CartPole-v1 --pixels{BEFORE}", 10_000)}
DMC = "--env-id dm_control/{}-v0 --size XXS --action-repeat 2 --total-timesteps 25000"
OF_V3 = {task: DMC.format(name) for task, name in CONTROL.items()}
COMMANDS = {  # what a user types behind `python SCRIPT.py`
    "dreamer_v3": {
        "boxing": f"--size XS {GAME.format('Boxing', 16, 448, RATES, 14400)}",
        "mspacman": f"--size XS {GAME.format('MsPacman', 16, 160, RATES, 25000)}",
        **{task: f"--env-id {name}NoFrameskip-v4 --cuda-graph" for task, name in GAMES.items()},
        **{task: f"--env-id {env_id} --size XXS --total-timesteps {timesteps}"
           for task, (env_id, timesteps) in LAPTOP.items()},
        **{task: flags + BEFORE for task, flags in OF_V3.items()},
    },
    "dreamer_v3_2025": {
        "boxing": f"--size 1M {GAME.format('Boxing', 8, 448, '--lr 8e-5', 14400)}",
        **{task: f"--env-id {LAPTOP[task][0].split()[0]} --size XXS --total-timesteps 15000"
           for task in ("cartpole", "pendulum", "inverted_pendulum", "acrobot")},
        **{task: OF_V3[task] for task in [*CONTROL][:3]}},
    "dreamer_v2": {
        "boxing": f"--size XXS {GAME.format('Boxing', 16, 448, RATES, 14400)} --clip-rewards tanh "
                  "--kl-scale 0.1 --actor-entropy 1e-3 --gamma 0.99",
        "cartpole": "--env-id CartPole-v1 --size XXS --action-repeat 2 --total-timesteps 20000",
        "pendulum": "--env-id Pendulum-v1 --size XXS --gamma 0.95 --kl-scale 0.1 --actor-lr 1e-4 "
                    "--train-ratio 256 --total-timesteps 5000",
        **{task: f"{DMC.format(name)} --pixels" for task, name in PIXELS.items()},
    },
    "dreamer_v1": {
        "carracing": "--env-id CarRacing-v3 --size XXS --depth 16 --kl-scale 1 --free-nats 3 "
                     "--action-repeat 4 --max-episode-steps 250 --env-seed 5 "
                     "--total-timesteps 20000",
        "cartpole": "--env-id CartPole-v1 --size XXS --action-repeat 2 --total-timesteps 10000",
        "pendulum": "--env-id Pendulum-v1 --size XXS --gamma 0.95 --kl-scale 0.1 --free-nats 1 "
                    "--train-ratio 256 --expl-decay 0 --total-timesteps 5000",
        **{task: f"{DMC.format(name)} --pixels" for task, name in PIXELS.items()},
    },
}
PUBLISHED = {  # the authors' curves: file, suite of a task of control
    "dreamer_v1": ("dreamerv1", "dmc"), "dreamer_v2": ("dreamerv2", "dmc"),
    **dict.fromkeys(("dreamer_v3", "dreamer_v3_2025"), ("dreamerv3_2023", "dmc_proprio")),
}
SAME_GAME = {"boxing": "boxing", "mspacman": "ms_pacman"} | {
    f"atari100k_{name.replace('_', '')}": name for name in ("ms_pacman", "boxing", "pong")}
PATIENCE = 900  # seconds for a run that was told to stop: an update, and all of its files


@dataclass(frozen=True)
class Options:
    """What to run."""

    scripts: tuple[Literal[tuple(COMMANDS)], ...] = tuple(COMMANDS)  # Which agents
    tasks: tuple[Literal[tuple(CHOICES)], ...] = ("laptop",)  # Which tasks, or sets of them
    seeds: tuple[int, ...] = (1, 2, 3)  # One run each
    parallel: int = 1  # Runs at the same time; on the small tasks each has one thread
    threads: int | None = None
    """Instead of the command's, for a run that has the machine to itself; kept with the result."""
    limit: float = 60.0  # Minutes after which a run is stopped and evaluated as it is
    episodes: int = 20  # Episodes of the evaluation
    runs_dir: str = "runs/learning"  # Where run directories and the output of each run go
    keep: bool = False  # Also leave out what older code or other flags have a result for
    note: str = ""  # Kept with the results, e.g. "busy machine"
    table: bool = False  # Only print the tables of the results that are there
    write: bool = False
    """With --table: between the marks of each set, in README.md or results/README.md."""


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
        content = {path.relative_to(HERE.parent): path.read_bytes() for path in files}
        digest = hashlib.sha256(repr(content).encode()).hexdigest()[:12]
        for name, text in content.items():
            (folder / digest / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / digest / name).write_bytes(text)
        return cls(folder / digest, commit(), digest)

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
        folder = next(name for name, tasks in SETS.items() if self.task in tasks)
        return HERE / "results" / folder / f"{self.name}.json"

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
         mode: str = "w") -> tuple[bool, list[int]]:
    """Run a command of a script, for at most `limit` minutes.

    Returns whether the limit stopped it, and its own memory in MiB, every ten seconds.
    """
    command, memory = [sys.executable, str(code.folder / f"{script}.py"), *shlex.split(flags)], []
    end, stopped = time.monotonic() + 60 * limit, False
    with open(log, mode) as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            while process.poll() is None and not stopped:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    memory += own_memory(process.pid)
                    stopped = time.monotonic() > end
            if stopped:
                process.send_signal(signal.SIGTERM)  # it saves its state and ends
                process.wait(PATIENCE)
        finally:
            process.kill()
    if process.returncode and not stopped:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{log.read_text()[-2000:]}")
    return stopped, memory


def own_memory(pid: int) -> list[int]:
    """[MiB] that a process owns, without the files that it has mapped; [] where no /proc is."""
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return []
    return [int(found[1]) // 1024] if found else []


def run(job: Job, options: Options, code: Code) -> dict:
    """Train, or go on with training, and evaluate; write the result and the curve."""
    folder = Path(options.runs_dir).resolve()
    key = hashlib.sha256(f"{code.digest_of(job.script)} {job.flags}".encode()).hexdigest()[:12]
    log = folder / f"{job.name}_{key}.log"
    begun = run_directory(log)
    threads = f" --threads {options.threads}" if options.threads else ""
    stopped, memory = call(code, job.script, (f"--resume {begun}" if begun else
                           f"{job.flags} --runs-dir {folder}") + threads, log, options.limit, "a")
    run_dir, returns = run_directory(log), []
    for track in TRACKS.get(job.task, (None,)):
        output = folder / f"{job.name}_evaluation.log"
        call(code, job.script, f"--evaluate {run_dir} --eval-episodes {options.episodes} "
             "--eval-greedy" + (f" --eval-env-seed {track}" if track else ""), output,
             options.limit)
        returns += [float(value) for value in re.findall(r"return (\S+),", output.read_text())]
    saved = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    total = json.loads((run_dir / "args.json").read_text())["args"]["total_timesteps"]
    if saved["step"] < total and not stopped:
        raise RuntimeError(f"interrupted after {saved['step']} of {total} timesteps")
    job.result.parent.mkdir(parents=True, exist_ok=True)
    seconds = write_curve(run_dir, job.result.with_suffix(".csv"))
    fifth = len(memory) // 5  # the first fifth is for warming up
    record = {"command": f"python {job.script}.py {job.flags}", "commit": code.commit,
              "code": code.digest_of(job.script), "machine": machine(), "note": options.note,
              "parallel": options.parallel, "threads": options.threads,
              "stopped_by_limit": stopped, "minutes": round(seconds / 60, 1),
              "memory_mib": [round(statistics.mean(memory[start:start + fifth]))
                             for start in (fifth, 4 * fifth)] if fifth else None,
              "timesteps": saved["step"], "updates": saved["updates"],
              "mean": statistics.mean(returns), "worst": min(returns), "best": max(returns),
              "returns": returns}
    job.result.write_text(json.dumps(record, indent=1) + "\n")
    return record


def run_directory(log: Path) -> Path | None:
    """The one that the output of a run names, if there is something to resume in it."""
    found = log.exists() and re.search(r"run directory: (.*)", log.read_text())
    return Path(found[1]) if found and Path(found[1], "checkpoint.pt").exists() else None


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
    except Exception as error:
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
    tasks = [task for name in options.tasks for task in CHOICES[name]]
    jobs = [Job(script, task, seed) for seed in options.seeds for task in tasks
            for script in options.scripts if task in COMMANDS[script]]
    todo = [job for job in jobs if not job.is_done(options, code)]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are done; output: {folder}", flush=True)
    with ThreadPoolExecutor(options.parallel) as pool:
        return all(list(pool.map(lambda job: attempt(job, options, code), todo)))


def published(script: str, task: str) -> list[list[tuple[float, float]]]:
    """Frames and returns of each seed that the authors published for this task."""
    name, suite = PUBLISHED[script]
    wanted = suite, re.sub("^control_|_pixels$", "", task)
    if task in SAME_GAME:
        wanted = "atari100k", SAME_GAME[task]  # V2's curves of games begin at a million frames
    seeds = defaultdict(list)
    with open(HERE / "results" / "published" / f"{name}.csv") as file:
        for row in csv.DictReader(file):
            if (row["suite"], row["task"]) == wanted:
                seeds[row["seed"]].append((float(row["env_frames"]), float(row["episode_return"])))
    return list(seeds.values())


def target(script: str, task: str, frames: float) -> tuple[float, ...]:
    """What a seed has to reach; or the least and the greatest published seed after these frames."""
    if task in TARGETS:
        return (TARGETS[task][script.removesuffix("_2025")],)
    found = [np.interp(frames, *zip(*curve)) for curve in published(script, task)]
    return (round(min(found), 1), round(max(found), 1)) if found else ()


def table(name: str) -> str:
    """Markdown of a set: the commands, and one row for each script and task."""
    commands, rows = [], []
    for script, tasks in COMMANDS.items():
        for task in (task for task in tasks if task in SETS[name]):
            paths = sorted(HERE.glob(f"results/{name}/{script}_{task}_[0-9]*.json"))
            found = {path.stem.split("_")[-1]: json.loads(path.read_text()) for path in paths}
            if found:
                commands.append(f"    python {script}.py {tasks[task]}")
                rows.append(row(script, task, found))
    head = ["script", "task", "mean return by seed", "target", "seeds that reached it",
            "worst episode", "minutes by seed", "commit"]
    return "\n".join([*commands, "", markdown(head, rows)]) if rows else ""


def row(script: str, task: str, found: dict[str, dict]) -> list:
    """One row; `found` holds the results by seed."""
    records, wanted, reached = found.values(), (), 0
    for record in sorted(records, key=lambda record: record["timesteps"]):
        wanted = target(script, task, record["timesteps"] * repeat(record["command"]))
        reached += bool(wanted) and record["mean"] >= wanted[0]
    shown = "published: {:.0f} to {:.0f}" if wanted[1:] else "{}" if wanted else "none"
    return [script, task, ", ".join(f"{seed}: {record['mean']:.1f}"
                                    f"{' (stopped early)' * record['stopped_by_limit']}"
                                    for seed, record in found.items()),
            shown.format(*wanted), f"{reached} of {len(found)}" if wanted else "",
            f"{min(record['worst'] for record in records):.0f}",
            ", ".join(f"{record['minutes']:.0f}" for record in records),
            ", ".join(sorted({short(record["commit"]) for record in records}))]


def repeat(command: str) -> int:
    """Frames of a timestep."""
    asked = re.search(r"--action-repeat (\d+)", command)
    return int(asked[1]) if asked else 4 if "NoFrameskip" in command else 1


def main() -> None:
    """Run the seeds, or make the tables."""
    options = tyro.cli(Options, description=__doc__)
    if not options.table:
        sys.exit(0 if run_all(options) else 1)
    for name in SETS:
        if text := table(name):
            print(f"{name}\n\n{text}\n")
            if options.write:
                write_between(name, text)


if __name__ == "__main__":
    main()
