"""How fast an update, an acting step and the environments are, beside a peer, in one run.

    python benchmarks/speed.py --script dreamer_v2 --peer sheeprl --peer-python VENV/bin/python
    python benchmarks/speed.py --setting tiny --threads 1 --peer sheeprl --peer-python ...
    python benchmarks/speed.py --setting tiny --threads 1 --old OTHER_CHECKOUT/dreamer_v3.py
    python benchmarks/speed.py --scaling --envs             also: batch shapes, environments
    python benchmarks/speed.py --profile                    only: where an update spends its time
    python benchmarks/speed.py --table --write              results/*.json into the README, speed.md

Every side (ours, an older version of it, the peer; float32, bf16) is one process, and they take
turns: A B, B A, A B ... A machine that is busy for a minute is then busy for all; a ratio is the
median over the rounds. All sides have the same networks, batch, images and actions: in a setting of
the paper those of the authors' (V1: control, V2 and V3: Atari).
"""

import datetime
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Literal

import torch
import tyro

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
from common.cli import fill  # noqa: E402

SHAPES = {  # of the batch, the images and the actions
    "dreamer_v1": dict(size="paper", batch_size=50, batch_length=50, channels=3, actions=6,
                       discrete=False),
    "dreamer_v2": dict(size="paper", batch_size=16, batch_length=50, channels=1, actions=9,
                       discrete=True),
    "dreamer_v3": dict(size="S", batch_size=16, batch_length=64, channels=3, actions=9,
                       discrete=True),
}
LAYERS = ("layers", "reward_layers", "critic_layers", "pcont_layers", "actor_layers")
TINY = dict(deter=64, hidden=64, units=64, stoch=8, classes=8, depth=4) | dict.fromkeys(LAYERS, 1)
MARKS = ("<!-- speed:begin -->", "<!-- speed:end -->")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    script: Literal["dreamer_v1", "dreamer_v2", "dreamer_v3"] = "dreamer_v3"
    """Our side."""
    setting: Literal["size", "tiny"] = "size"
    """The sizes of --size, or small ones: deter 64, 8 (x 8) latents, depth 4, one layer of 64."""
    size: Literal["XXS", "XS", "S", "M", "L", "XL", "paper"] | None = None
    """Preset of the script (None: S for V3, otherwise paper)."""
    batch_size: int | None = None
    """None, as in the next ones: as in the paper."""
    batch_length: int | None = None
    horizon: int = 15
    channels: int | None = None
    """Of the images: 1 is grey."""
    actions: int | None = None
    discrete: bool | None = None
    """Kind of actions."""
    peer: Literal["", "sheeprl"] = ""
    """Whom to compare with."""
    peer_python: str = sys.executable
    """Python of the peer's virtual environment."""
    old: str = ""
    """Also measure this older version of the script, which lies in a whole checkout."""
    amp: Literal["auto", "on", "off", "both"] = "auto"
    """bfloat16; auto: both where the processor multiplies it natively, otherwise off."""
    compile: bool = False
    """torch.compile on our side; its time is reported apart."""
    cuda_graph: bool = False
    """On our side: each update is one CUDA graph."""
    peer_compile: bool = False
    """The same on the peer's side."""
    threads: int = 0
    """CPU threads of torch (0: its own choice)."""
    rounds: int = 7
    """Timed updates of each side, after three that are not."""
    scaling: bool = False
    """Also time updates over batch length and over batch size."""
    envs: bool = False
    """Also count environment steps per second."""
    profile: bool = False
    """Print where an update of ours spends its time, and nothing else."""
    note: str = ""
    """Kept with the result, e.g. "busy machine"."""
    results: str = str(HERE / "results")
    """Folder of the record."""
    table: bool = False
    """Print the table of all results, as Markdown, and measure nothing."""
    write: bool = False
    """With --table: all of it into results/speed.md, the main rows into README.md."""

    def __post_init__(self) -> None:
        """Fill in the shapes of the paper."""
        fill(self, SHAPES[self.script])
        if self.old and not Path(self.old).is_file():
            sys.exit(f"there is no {self.old}")

    @property
    def presets(self) -> dict:
        """What the script fills in for this size and these actions."""
        module = importlib.import_module(self.script)
        if self.size not in module.SIZES:
            sys.exit(f"{self.script} has no size {self.size}, but {', '.join(module.SIZES)}")
        kind = "discrete" if self.discrete else "continuous"
        return getattr(module, "TASKS", {}).get(kind, {}) | module.SIZES[self.size]

    @property
    def sizes(self) -> dict[str, int]:
        """Of the networks."""
        sizes = {name: self.presets[name] for name in TINY if name in self.presets}
        return {name: TINY[name] for name in sizes} if self.setting == "tiny" else sizes

    @property
    def precisions(self) -> list[bool]:
        """Whether bf16, for each run of a side."""
        native = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
        return {"on": [True], "off": [False], "both": [False, True],
                "auto": [False, True] if native else [False]}[self.amp]


# --------------------------------------------------------------------------------------- measuring
class Process:
    """A side at work, see side.py."""

    def __init__(self, python: str, file: str, setting: dict):
        environment = os.environ | ({"OMP_NUM_THREADS": str(setting["threads"])}
                                    if setting["threads"] else {})
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, str(HERE / file), json.dumps(setting)], text=True, bufsize=1, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)

    def ask(self, what: str, **details) -> dict:
        """One request and its reply."""
        try:
            self.process.stdin.write(json.dumps({"do": what} | details) + "\n")
            reply = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):  # it died
            self.process.wait()
            self.errors.seek(0)
            reply = {"error": self.errors.read()[-2000:]}
        if "error" in reply:
            sys.exit(f"{self.process.args[1]}: {what}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Let it end."""
        self.process.stdin.close()
        self.process.wait()


def start_sides(options: Options) -> dict[str, Process]:
    """By name, e.g. "ours float32"."""
    sides, old = {}, Path(options.old).resolve()
    for bf16 in options.precisions:
        setting = {name: getattr(options, name) for name in (
            "script", "sizes", "horizon", "actions", "discrete", "channels", "threads",
            "cuda_graph")}
        setting |= {"bf16": bf16, "pcont": options.presets.get("pcont")}
        precision = "bf16" if bf16 else "float32"
        if options.peer:
            name = " ".join([options.peer, precision] + ["compiled"] * options.peer_compile)
            sides[name] = Process(options.peer_python, f"side_{options.peer}.py",
                                  setting | {"compile": options.peer_compile})
        setting["compile"] = options.compile
        compiled = [precision] + ["graph"] * options.cuda_graph + ["compiled"] * options.compile
        if options.old:
            sides[" ".join(["old", *compiled])] = Process(
                sys.executable, "side_ours.py",
                setting | {"root": str(old.parent), "script": old.stem})
        sides[" ".join(["ours", *compiled])] = Process(
            sys.executable, "side_ours.py", setting | {"root": str(HERE.parent)})
    return sides


def measure(options: Options) -> dict:
    """Everything about all sides, in turns."""
    sides = start_sides(options)
    results = {name: {} for name in sides}
    for name, side in sides.items():
        side.ask("batch", length=options.batch_length, rows=options.batch_size)
        warm_up = side.ask("update", repeat=3)["seconds"]  # a side gets faster for some updates
        results[name] |= {"first_update": warm_up[0], "update": []}
        results[name] |= side.ask("parameters")
    time_updates(sides, results, options.rounds)
    for name, side in sides.items():
        results[name]["peak_memory"] = side.ask("memory")["bytes"]
    time_acting(sides, results, max(options.rounds, 7))
    measure_more(sides, results, options)
    ours = next(side for name, side in sides.items() if name.startswith("ours"))
    rates = {key: max(ours.ask("matmul", bf16=bf16)["flops_per_second"] for _ in range(3))
             for key, bf16 in (("float32", False), ("bf16", True))}
    for side in sides.values():
        side.close()
    return {"sides": results, "matmul": rates}


def time_updates(sides: dict[str, Process], results: dict, rounds: int) -> None:
    """Rounds of one update of each side, every second round in the opposite order."""
    for index in range(rounds):
        for name in list(sides)[::-1 if index % 2 else 1]:
            results[name]["update"] += sides[name].ask("update", repeat=1)["seconds"]
            print(f"round {index}, {name}: {results[name]['update'][-1]:.3f} s", flush=True)


def time_acting(sides: dict[str, Process], results: dict, rounds: int) -> None:
    """The same for acting: medians of 20 steps."""
    for rows in (1, 16):
        for _ in range(rounds):
            for name, side in sides.items():
                seconds = side.ask("act", rows=rows, repeat=20)["seconds"]
                results[name].setdefault(f"act_{rows}", []).append(statistics.median(seconds))


def measure_more(sides: dict[str, Process], results: dict, options: Options) -> None:
    """What is counted, not timed, and what was asked for."""
    ours = [name for name in sides if name.startswith("ours")]
    for name, side in sides.items():
        if not {"compiled", "graph"} & set(name.split()):
            results[name] |= side.ask("flops")
    for name in ours * options.scaling:
        results[name]["scaling"] = scaling(sides[name], options)
    if options.envs:
        results[ours[0]]["envs"] = environments(sides[ours[0]])


def scaling(side: Process, options: Options) -> dict:
    """Median seconds per update over batch length and over batch size."""
    shapes = {"length": [(length, options.batch_size) for length in (16, 32, 64, 128)],
              "size": [(options.batch_length, rows) for rows in (4, 8, 16, 32)]}
    table = {}
    for axis, pairs in shapes.items():
        table[axis] = {}
        for length, rows in pairs:
            side.ask("batch", length=length, rows=rows)
            side.ask("update", repeat=1)
            median = statistics.median(side.ask("update", repeat=3)["seconds"])
            table[axis][length if axis == "length" else rows] = median
            print(f"batch {rows} x {length}: {median:.3f} s", flush=True)
    return table


def environments(side: Process) -> list[dict]:
    """Steps per second of 1, 2 and 4 environments, at random and with the agent acting."""
    rows = []
    for env_id, acting in (("CartPole-v1", False), ("MsPacmanNoFrameskip-v4", False),
                           ("MsPacmanNoFrameskip-v4", True)):
        for num_envs in (1, 2, 4):
            row = {"env_id": env_id, "num_envs": num_envs, "acting": acting}
            rows.append(row | side.ask("envs", seconds=4.0, **row))
            print(rows[-1], flush=True)
    return rows


# ----------------------------------------------------------------------------------------- results
def git(*command: str) -> str:
    """Output of a git command in this repository; nothing where there is no git."""
    try:
        return subprocess.run(["git", *command], cwd=HERE, text=True, capture_output=True).stdout.strip()
    except OSError:
        return ""


def machine() -> dict:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load_average": os.getloadavg()[0], "python": platform.python_version()} | {
            name: version(name) for name in ("torch", "numpy", "gymnasium", "ale-py", "mujoco")
            if list(distributions(name=name))}


def start_record(kind: str, options) -> dict:
    """All that a result depends on, taken before the code is loaded: commits may come meanwhile."""
    now = datetime.datetime.now(datetime.UTC)
    dirty = "-dirty" if git("status", "--porcelain", "-uno") else ""
    return {"kind": kind, "date": f"{now:%Y-%m-%d %H:%M:%S} UTC",
            "commit": (git("rev-parse", "HEAD") or os.environ.get("COMMIT", "")) + dirty,
            "machine": machine(),
            "options": vars(options) | {  # no path of this machine
                "peer_python": Path(options.peer_python).name, "old": Path(options.old).name}}


def save(record: dict) -> Path:
    """Write one result."""
    options = record["options"]
    folder = Path(options.pop("results", HERE / "results"))
    stamp = "".join(c for c in record["date"] if c.isdigit())
    name = f"{record['kind']}_{options['script']}_{options['setting']}_{stamp}.json"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Quartiles over the rounds of ours / theirs: what the two did right after one another."""
    found = [a / b for a, b in zip(ours, theirs)]
    return statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3


def summary(record: dict) -> str:
    """The rows of the table, and how far ours is from the others."""
    sides, lines = record["sides"], speed_rows(record)
    for name, side in sides.items():
        for other in sides if name.startswith("ours") else ():
            if other.split()[1] == name.split()[1] and other != name:
                low, middle, high = ratios(side["update"], sides[other]["update"])
                lines.append(f"{name} / {other}: {middle:.3f} (quartiles {low:.3f}, {high:.3f}); "
                             f"parameters {side['parameters']:,} / "
                             f"{sides[other]['parameters']:,}")
    return "\n".join(lines)


def size_name(options: dict) -> str:
    """What stands in the table."""
    return "tiny" if options["setting"] == "tiny" else options["size"]


def speed_rows(record: dict) -> list[str]:
    """Rows of the table: one per side of one measurement."""
    sides, options, rows = record["sides"], record["options"], []
    for name, side in sides.items():
        seconds = statistics.median(side["update"])
        compiling = side["first_update"] - seconds if "compiled" in name else 0
        peer = next((other for key, other in sides.items() if options["peer"]
                     and key.split()[:2] == [options["peer"], name.split()[1]]), None)
        share = ratios(side["update"], peer["update"])[1] if peer and peer is not side else None
        cells = [options["script"], size_name(options), options["threads"] or "all",
                 name + (f" ({compiling:.0f} s)" if compiling else ""), f"{seconds:.3g}",
                 "" if share is None else f"{share:.2f}", f"{side['peak_memory'] / 1e9:.1f} GB"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def remark(record: dict) -> str:
    """What was measured, on which commit, and its note."""
    options, commit = record["options"], record["commit"]
    what = [options["script"], size_name(options) if "size" in options else "",
            f"--threads {options['threads']}" if options.get("threads") else "",
            "graph" * options.get("cuda_graph", False), "compiled" * options.get("compile", False)]
    note = f"; {options['note']}" if options.get("note") else ""
    return f"{' '.join(filter(None, what))} ({commit[:9]}{commit[40:]}{note})"


def latest_records() -> list[dict]:
    """Of every kind of measurement on every machine the latest, sorted; without those of --old."""
    latest = {}
    records = [json.loads(path.read_text()) for path in HERE.glob("results/*.json")]
    for record in sorted((r for r in records if "kind" in r), key=lambda r: r["date"]):
        options = record["options"] = {"script": "dreamer_v3"} | record["options"]
        keys = ("script", "setting", "size", "threads", "compile", "cuda_graph", "amp")
        if options.get("peer") or not options.get("old"):
            latest[(record["kind"], place(record), *(options.get(k) or None for k in keys))] = record
    return [latest[key] for key in sorted(latest, key=str)]


def place(record: dict) -> str:
    """The machine in one line."""
    where = record["machine"]
    cpu = f"{where['cpu']}{', avx512_bf16' * where['avx512_bf16']}, {where['cores']} cores"
    return f"{where['gpu'] or cpu}, torch {where['torch']}"


def table() -> str:
    """Markdown of the latest results."""
    parts, records = [], latest_records()
    head = ["script", "size", "threads", "side", "s / update", "share of the peer", "peak memory"]
    for where in dict.fromkeys(place(record) for record in records):
        here = [record for record in records if place(record) == where]
        speeds = [record for record in here if record["kind"] == "speed"]
        parts.append(f"{where}, {max(record['date'] for record in here)[:10]}")
        if speeds:
            lines = [row for record in speeds for row in speed_rows(record)]
            parts.append("\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]))
            parts.append("Measured on: " + ", ".join(map(remark, speeds)) + ".")
        parts += [other_line(record) for record in here if record["kind"] != "speed"]
    if not any(record["machine"]["gpu"] for record in records):
        parts.append("CUDA: not measured.")
    return "\n\n".join(parts)


def brief() -> str:
    """The rows for the README: each script at the authors' setting beside the peer, not compiled.

    Of one script in one precision the latest measurement on machines of one name.
    """
    rows = {}
    for record in sorted(latest_records(), key=lambda record: record["date"]):
        options, sides = record["options"], record.get("sides", {})
        if record["kind"] != "speed" or options["setting"] != "size" or not options["peer"]:
            continue
        for name, ours in sides.items():
            theirs = sides.get(name.replace("ours", options["peer"]))
            if name.startswith("ours") and "compiled" not in name and theirs:
                seconds = [f"{statistics.median(side['update']):.3g}" for side in (theirs, ours)]
                memory = [f"{side['peak_memory'] / 1e9:.1f}" for side in (theirs, ours)]
                share = ratios(ours["update"], theirs["update"])[1]
                what = f"{options['script']} {options['size']}, {name.split()[1]}"
                rows[what, place(record)] = [what, *seconds, f"{share:.2f}", " / ".join(memory),
                                             place(record), record["commit"][:9] + record["commit"][40:]]
    head = ["", "sheeprl s/update", "ours s/update", "share", "GB, theirs / ours", "machine", "commit"]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|",
                      *(f"| {' | '.join(rows[key])} |" for key in sorted(rows))])


def other_line(record: dict) -> str:
    """A result of whole_run.py or of ranks.py in one line."""
    options, seconds = record["options"], record["seconds"]
    if record["kind"] == "whole_run":
        times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
        return f"Whole run of the posts, {options['steps']:,} of 16,384 steps: {times}. " \
               f"{remark(record)}"
    times = " and ".join(f"{statistics.median(values):.3g}" for values in seconds.values())
    return (f"One and two processes (one thread each, the same whole batch): {times} s per update, "
            f"{record['speedup']:.2f} times as fast (median over paired rounds). {remark(record)}")


def switch(script: Path, name: str, on: bool) -> str:
    """A flag of a script that is on or off: with a value, if its help says so."""
    shown = subprocess.run([sys.executable, str(script), "--help"], text=True, capture_output=True)
    takes_value = f"--{name} {{" in shown.stdout
    return f"--{name} {on}" if takes_value else f"--{name}" if on else f"--no-{name}"


def write_between(marks: tuple[str, str], text: str) -> None:
    """Replace what stands between the marks in the README."""
    readme = HERE.parent / "README.md"
    before, rest = readme.read_text().split(marks[0])
    readme.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.split(marks[1])[1]}")


def main() -> None:
    """Measure, or make the table."""
    options = tyro.cli(Options, description=__doc__)
    if options.table:
        print(table())
        if options.write:
            write_between(MARKS, brief())
            (HERE / "results" / "speed.md").write_text(
                "Made by `python benchmarks/speed.py --table --write`.\n\n" + table() + "\n")
    elif options.profile:
        side = list(start_sides(options).values())[-1]
        side.ask("batch", length=options.batch_length, rows=options.batch_size)
        side.ask("update", repeat=2)
        print(side.ask("profile", rows=20)["table"])
    else:
        record = start_record("speed", options)
        if options.old:
            record["old_blob"] = git("hash-object", str(Path(options.old).resolve()))
        record |= measure(options)
        print(summary(record), save(record), sep="\n")


if __name__ == "__main__":
    main()
