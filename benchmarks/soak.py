"""Whether memory stays flat and the disk holds what was announced, over a long training run.

    python benchmarks/soak.py                               30 minutes, size XXS, CartPole
    python benchmarks/soak.py --minutes 1
    python benchmarks/soak.py --flags "--num-envs 2 --video-every 500"

Growth is the mean of the last fifth of the run over the mean of the second fifth; the first is for
warming up. `anonymous` is what the process really owns. `resident` also counts pages of the replay
files that happen to be mapped: they are dropped at each checkpoint, and the kernel takes them back
when it needs room. Linux only (/proc).
"""

import datetime
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Options:
    """What to run, and for how long."""

    minutes: float = 30.0
    """Length of the run."""
    script: Literal["dreamer_v1", "dreamer_v2", "dreamer_v3"] = "dreamer_v3"
    """Which agent."""
    every: float = 2.0
    """Seconds between two samples."""
    trace: bool = False
    """Also print the lines of Python that own more memory at the end (tracemalloc; slow)."""
    flags: str = ""
    """Further flags for the script, at the end of the line, in quotes."""


# Small batches, so that much happens in a minute, and so that what an update needs for a moment
# does not hide what is never given back.
SETTING = """--env-id CartPole-v1 --size XXS --train-ratio 16 --batch-size 4 --batch-length 16
    --imag-horizon 5 --learning-starts 128 --total-timesteps 100000000 --buffer-size 1000000
    --log-every 100 --video-every 1000 --checkpoint-every 1000 --no-cuda --threads 1
    --capture-video""".split()

TRACER = """
import runpy, sys, threading, time, tracemalloc
tracemalloc.start(8)
def watch(warm_up, end):
    time.sleep(warm_up)
    before = tracemalloc.take_snapshot()
    time.sleep(end)
    for line in tracemalloc.take_snapshot().compare_to(before, "lineno")[:12]:
        print("trace:", line, flush=True)
threading.Thread(target=watch, args=(float(sys.argv[1]), float(sys.argv[2])), daemon=True).start()
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def memory(pid: int) -> dict[str, int]:
    """Bytes of the process, in all and by kind."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    table = dict(line.split(":", 1) for line in lines if line.startswith(("Rss", "VmRSS")))
    names = {"resident": "VmRSS", "anonymous": "RssAnon", "file": "RssFile"}
    return {name: int(table[key].split()[0]) * 1024 for name, key in names.items()}


def used(paths) -> int:
    """Bytes on the disk, not the nominal length."""
    return sum(path.stat().st_blocks * 512 for path in paths if path.is_file())


def sample(pid: int, run_dir: Path | None, begun: float) -> dict:
    """Memory of the process and disk of its run directory, now."""
    found = {"seconds": round(time.monotonic() - begun, 1)} | memory(pid)
    if run_dir:
        rows = run_dir / "replay" / "rows.npy"
        found |= {"rows": int.from_bytes(rows.read_bytes()[-8:], "little") if rows.exists() else 0,
                  "replay": used(run_dir.glob("replay/**/*")),
                  "events": used(run_dir.glob("events*")),
                  "videos": used(run_dir.glob("videos/*"))}
    return found


def growth(samples: list[dict], name: str) -> float:
    """Percent by which the last fifth lies above the second."""
    fifth = len(samples) // 5
    early, late = ([s[name] for s in part] for part in (samples[fifth:2 * fifth], samples[-fifth:]))
    return 100 * (sum(late) / sum(early) - 1)


def watch(options: Options, folder: Path) -> list[dict]:
    """Run, sample, stop with TERM."""
    seconds = 60 * options.minutes
    tracer = ["-c", TRACER, str(seconds / 4), str(seconds * 0.7)] if options.trace else []
    command = [sys.executable, *tracer, str(HERE.parent / f"{options.script}.py"), *SETTING,
               *shlex.split(options.flags), "--runs-dir", str(folder / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    samples, begun = [], time.monotonic()
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        try:
            while time.monotonic() - begun < seconds:
                time.sleep(options.every)
                if process.poll() is not None:
                    sys.exit(f"the run ended by itself:\n{(folder / 'err').read_text()}")
                samples.append(sample(process.pid, next(folder.glob("runs/*"), None), begun))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    return samples


def report(options: Options, samples: list[dict], printed: str) -> dict:
    """What the samples say; `printed` is what the run itself said."""
    announced = float(re.search(r"replay buffer: .*?([\d.]+) GiB", printed)[1])
    last, running = samples[-1], [s for s in samples if s.get("rows")]
    rows, kinds = last["rows"] - running[0]["rows"], ("resident", "anonymous", "file")
    return {
        "setting": " ".join([options.script, *SETTING, options.flags]).strip(),
        "minutes": options.minutes, "timesteps": last["rows"],
        "growth_percent": {name: round(growth(samples, name), 2) for name in kinds},
        "peak_mib": {name: round(max(s[name] for s in samples) / 2**20, 1) for name in kinds},
        "replay_gib": {"announced": announced,
                       "used_first": round(running[0]["replay"] / 2**30, 4),
                       "used_last": round(last["replay"] / 2**30, 4)},
        "bytes_per_timestep": {
            name: round((last[name] - running[0][name]) / max(1, rows), 1)
            for name in ("events", "videos")},
        "events_mib": round(last["events"] / 2**20, 2),
        "videos_mib": round(last["videos"] / 2**20, 2),
        "samples": samples,
    }


def main() -> None:
    """Watch a run, and write down what came of it."""
    options = tyro.cli(Options, description=__doc__.partition("\n")[0])
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=9"], cwd=HERE,
                            text=True, capture_output=True).stdout.strip()
    with tempfile.TemporaryDirectory() as name:
        samples, printed = watch(options, Path(name)), (Path(name) / "out").read_text()
    print(*(line for line in printed.splitlines() if line.startswith("trace:")), sep="\n")
    result = report(options, samples, printed)
    machine = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "commit": commit,
               "torch": torch.__version__, "python": platform.python_version(),
               "platform": platform.platform(), "cpus": os.cpu_count()}
    path = HERE / "results" / f"soak_{options.script}.json"
    path.write_text(json.dumps(machine | result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "samples"},
                     indent=1))
    print(path)


if __name__ == "__main__":
    main()
