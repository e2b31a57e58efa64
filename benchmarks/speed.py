"""How long an update takes: ours, an older checkout's and sheeprl's, measured in turns.

    python benchmarks/speed.py --script dreamer_v2                    the authors' setting
    python benchmarks/speed.py --size XXS --threads 1 --vector 4      the laptop preset
    python benchmarks/speed.py --old OTHER_CHECKOUT                   beside another version
    python benchmarks/speed.py --peer VENV/bin/python                 beside sheeprl 0.8.4
    python benchmarks/speed.py --table --write                        all records into the README

Each side (ours, the older one, the peer; in float32, in bfloat16) is one process, and they take
turns: A B, B A, A B ... A busy minute then slows all of them down. A share is the median of the
rounds, with the quartiles in brackets. All sides have the same networks, batch, images and actions.
`side_sheeprl.py` says how to install sheeprl. On a GPU the same commands measure the GPU.
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
from side import make_args

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
TASKS = {"dreamer_v1": ("dm_control/walker-walk-v0", 6, False)}  # the authors': actions, discrete
ATARI = ("MsPacmanNoFrameskip-v4", 9, True)  # of the other scripts
LAYERS = ("layers", "reward_layers", "critic_layers", "pcont_layers", "actor_layers")
TINY = dict(deter=64, hidden=64, units=64, stoch=8, classes=8, depth=4) | dict.fromkeys(LAYERS, 1)
MARKED = (HERE.parent / "README.md", HERE / "results" / "README.md")  # have tables between marks


@dataclass(frozen=True)
class Options:
    """What to measure."""

    script: Literal["dreamer_v1", "dreamer_v2", "dreamer_v3", "dreamer_v3_2025"] = "dreamer_v3"
    """Which agent."""
    size: str = ""
    """--size of the script (empty: its default), or "tiny": deter 64, 8 latents, layers of 64."""
    vector: int = 0  # Observe a vector of so many numbers in place of images; not with --peer
    peer: str = ""  # Also measure sheeprl: the Python of its virtual environment
    old: str = ""  # Also measure the script of another checkout: its folder
    amp: Literal["auto", "on", "off", "both"] = "auto"
    """bfloat16; auto: both where the processor multiplies it natively, otherwise off."""
    compile: bool = False  # torch.compile on our sides; the first update shows how long it takes
    cuda_graph: bool = False  # On our sides each update is one CUDA graph
    threads: int = 0  # CPU threads of torch (0: its own choice)
    rounds: int = 7  # Timed updates of each side, after three or more that are not timed
    note: str = ""  # Kept with the result, e.g. "busy machine"
    results: str = str(HERE / "results" / "speed")
    """Folder of the record; a new record replaces the one of the same setting."""
    table: bool = False  # Print the table of all records, as Markdown, and measure nothing
    write: bool = False
    """With --table: all of it into results/speed/table.md, the main rows into README.md."""

    def __post_init__(self) -> None:
        """Refuse a checkout without this script."""
        if self.old and not Path(self.old, f"{self.script}.py").is_file():
            sys.exit(f"error: there is no {self.script}.py in {self.old}")


def setting(options: Options) -> dict:
    """All that a side has to know, in numbers: the same for all sides."""
    module = importlib.import_module(options.script)
    env_id, actions, discrete = TASKS.get(options.script, ATARI)
    is_tiny = options.size == "tiny"
    found = {"script": options.script, "env_id": env_id, "size": "" if is_tiny else options.size,
             "actions": actions, "discrete": discrete, "vector": options.vector,
             "threads": options.threads, "bf16": False, "compile": False, "cuda_graph": False}
    args = make_args(module, found)
    sizes = {name: TINY[name] if is_tiny else getattr(args, name)
             for name in TINY if hasattr(args, name)}
    return found | {"size": args.size, "sizes": sizes, "horizon": args.imag_horizon,
                    "pcont": getattr(args, "pcont", None), "channels": 1 if args.grayscale else 3,
                    "length": args.batch_length, "rows": args.batch_size}


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


def start_sides(options: Options) -> dict[str, Process]:
    """By name, e.g. "ours float32"."""
    sides, common = {}, setting(options)
    ours = {"compile": options.compile, "cuda_graph": options.cuda_graph}
    native = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    wanted = {"auto": "both" if native else "off"}.get(options.amp, options.amp)
    for bf16 in {"on": [True], "off": [False], "both": [False, True]}[wanted]:
        common["bf16"], precision = bf16, "bf16" if bf16 else "float32"
        if options.peer:
            sides[f"sheeprl {precision}"] = Process(options.peer, "side_sheeprl.py", common)
        name = " ".join([precision] + ["graph"] * options.cuda_graph
                        + ["compiled"] * options.compile)
        roots = {"old": options.old} if options.old else {}
        for who, root in (roots | {"ours": HERE.parent}).items():
            sides[f"{who} {name}"] = Process(
                sys.executable, "side.py", common | ours | {"root": str(Path(root).resolve())})
    return sides


def measure(options: Options) -> dict:
    """Everything about all sides."""
    sides, results, common = start_sides(options), {}, setting(options)
    for name, side in sides.items():
        side.ask("batch", length=common["length"], rows=common["rows"])
        warm_up = [side.ask("update")["seconds"] for _ in range(3 + options.cuda_graph)]
        results[name] = {"first_update": max(warm_up), "update": []} | side.ask("parameters")
    for index in range(options.rounds):
        for name in list(sides)[::-1 if index % 2 else 1]:
            results[name]["update"].append(sides[name].ask("update")["seconds"])
            print(f"round {index}, {name}: {results[name]['update'][-1]:.3f} s", flush=True)
    for name, side in sides.items():
        results[name]["peak_memory"] = side.ask("memory")["bytes"]
    ours = [side for name, side in sides.items() if name.startswith("ours")][-1]
    rates = {key: ours.ask("matmul", bf16=key == "bf16")["flops_per_second"]
             for key in ("float32", "bf16")}
    for side in sides.values():  # without a line to read a side ends
        side.process.stdin.close()
        side.process.wait()
    return {"sides": results, "matmul": rates}


# ----------------------------------------------------------------------------------------- records
def git(*command: str, folder: Path = HERE) -> str:
    """Output of a git command in this repository; nothing where there is no git."""
    try:
        return subprocess.run(["git", *command], cwd=folder, text=True,
                              capture_output=True).stdout.strip()
    except OSError:
        return ""


def commit(folder: Path = HERE) -> str:
    """The commit of a checkout; its end says whether code differs from it."""
    code = ("--", ":/*.py", ":(exclude,top)tests")
    dirty = "-dirty" if git("status", "--porcelain", "-uno", *code, folder=folder) else ""
    return (git("rev-parse", "HEAD", folder=folder) or os.environ.get("COMMIT", "")) + dirty


def short(commit: str) -> str:
    """A commit as a table shows it."""
    return commit[:9] + commit[40:]


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


def record_path(options: Options) -> Path:
    """One file for each setting."""
    words = [options.script, options.size or setting(options)["size"]]
    words += [f"vector{options.vector}"] * bool(options.vector)
    words += [f"{options.threads}_thread{'s' * (options.threads > 1)}"] * bool(options.threads)
    words += ["cuda"] * torch.cuda.is_available() + ["graph"] * options.cuda_graph
    words += ["compiled"] * options.compile + ["old"] * bool(options.old)
    return Path(options.results) / f"{'_'.join(words)}.json"


def start_record(options: Options) -> dict:
    """What a result depends on, taken before the measurement: commits may come meanwhile."""
    now = datetime.datetime.now(datetime.UTC)
    chosen = vars(options) | {"size": options.size or setting(options)["size"],
                              "peer": "sheeprl" if options.peer else "", "old": bool(options.old)}
    return {"date": f"{now:%Y-%m-%d %H:%M:%S} UTC", "commit": commit(), "machine": machine(),
            "options": {name: value for name, value in chosen.items()
                        if name not in ("results", "table", "write")}} | (
           {"old_commit": commit(Path(options.old))} if options.old else {})


# ------------------------------------------------------------------------------------------ tables
def share(ours: dict, theirs: dict | None) -> str:
    """Median and quartiles, over the rounds, of our seconds over theirs."""
    if theirs is None or theirs is ours:
        return ""
    found = [a / b for a, b in zip(ours["update"], theirs["update"])]
    low, middle, high = (statistics.quantiles(found, n=4, method="inclusive")
                         if len(found) > 1 else found * 3)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def other_side(record: dict, name: str, who: str) -> dict | None:
    """The side of `who` in the precision of this one; an older checkout's in its mode, too."""
    precision = name.split()[1]
    mode = name.partition(" ")[2] if who == "old" else precision
    return record["sides"].get(f"{who} {mode}")


def size_name(options: dict) -> str:
    """What stands in the table; older records have the tiny sizes in another field."""
    size = "tiny" if options.get("setting") == "tiny" else options["size"]
    return size + (f", vector {options['vector']}" if options.get("vector") else "")


def rows(record: dict) -> list[list[str]]:
    """Rows of the table: one for each side of one measurement."""
    options, found = record["options"], []
    for name, side in record["sides"].items():
        peer, old = (other_side(record, name, who) if name.startswith("ours") else None
                     for who in ("sheeprl", "old"))
        rate = record["matmul"][name.split()[1]] / 1e9
        found.append([
            options["script"], size_name(options), str(options["threads"] or "all"), name,
            f"{statistics.median(side['update']):.3g}", share(side, peer), share(side, old),
            f"{side['peak_memory'] / 1e9:.1f}", f"{side['first_update']:.0f}", f"{rate:.0f}",
            ", ".join(filter(None, [f"{record['date'][:10]} {short(record['commit'])}",
                                    options.get("note")]))])
    return found


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def place(record: dict) -> str:
    """The machine in one line."""
    where = record["machine"]
    cpu = f"{where['cpu']}{', avx512_bf16' * where['avx512_bf16']}, {where['cores']} cores"
    return f"{where['gpu'] or cpu}, torch {where['torch']}"


def records() -> list[dict]:
    """All that are kept, the oldest first."""
    found = [json.loads(path.read_text()) for path in HERE.glob("results/speed/*.json")]
    return sorted(found, key=lambda record: record["date"])


def table() -> str:
    """Markdown of all records, by machine."""
    parts = ["Made by `python benchmarks/speed.py --table --write`. A share is the median of the "
             "rounds, with quartiles. The first update includes compiling. The last number is the "
             "rate of a large product on that day: machines of one name differ in it."]
    head = ["script", "size", "threads", "side", "s / update", "share of sheeprl",
            "share of the older", "peak GB", "first update, s", "GFLOP/s", "measured"]
    kept = sorted(records(), key=lambda record: (
        record["options"]["script"], size_name(record["options"]), record["options"]["threads"]))
    for where in dict.fromkeys(map(place, kept)):
        body = [row for record in kept if place(record) == where for row in rows(record)]
        parts += [where, markdown(head, body)]
    return "\n\n".join(parts)


def brief() -> str:
    """The rows for the README: each script at the authors' setting beside the peer, not compiled.

    The latest measurement, in bfloat16 if it has both.
    """
    found = {}
    for record in records():
        options = record["options"]
        for name, ours in record["sides"].items():
            theirs = other_side(record, name, "sheeprl")
            is_plain = name.startswith("ours") and "compiled" not in name
            if is_plain and theirs and size_name(options) != "tiny":
                seconds = [f"{statistics.median(side['update']):.3g}" for side in (theirs, ours)]
                memory = " / ".join(f"{side['peak_memory'] / 1e9:.1f}" for side in (theirs, ours))
                what = f"{options['script']} {options['size']}, {name.partition(' ')[2]}"
                found[options["script"]] = [what, *seconds, share(ours, theirs), memory,
                                            place(record), short(record["commit"])]
    head = ["", "sheeprl s/update", "ours s/update", "share", "GB, theirs / ours", "machine",
            "commit"]
    return markdown(head, [found[key] for key in sorted(found)])


def write_between(name: str, text: str) -> None:
    """Replace what stands between the marks of this name, in whichever README has them."""
    begin, end = (f"<!-- {name}:{part} -->" for part in ("begin", "end"))
    for path in MARKED:
        before, mark, rest = path.read_text().partition(begin)
        if mark:
            path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    """Measure, or make the table."""
    options = tyro.cli(Options, description=__doc__)
    if options.table:
        print(table())
        if options.write:
            write_between("speed", brief())
            (HERE / "results" / "speed" / "table.md").write_text(table() + "\n")
        return
    record, path = start_record(options), record_path(options)
    record |= measure(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    for row in rows(record):
        print(f"{row[3]}: {row[4]} s, {row[7]} GB"
              + f"; of sheeprl {row[5]}" * bool(row[5]) + f"; of the older {row[6]}" * bool(row[6]))
    print(path)


if __name__ == "__main__":
    main()
