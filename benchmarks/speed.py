"""How fast an update, an acting step and the environments are, beside a peer, in one run.

    python benchmarks/speed.py --script dreamer_v3 --size S
    python benchmarks/speed.py --peer sheeprl --peer-python /opt/sheeprl-venv/bin/python
    python benchmarks/speed.py --setting tiny --threads 1 --peer sheeprl --peer-python ...
    python benchmarks/speed.py --scaling --envs             also: batch shapes, environments
    python benchmarks/speed.py --profile                    only: where an update spends its time
    python benchmarks/speed.py --table --write              results/*.json into the README

Every side (ours, the peer; float32, bf16) is one process, and they take turns: A B A B ... A
machine that is busy for a minute is then busy for all; a ratio is the median over the rounds.
"""

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import tyro

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]
from dreamer_v3 import SIZES  # noqa: E402

TINY = dict(deter=64, hidden=64, units=64, stoch=8, classes=8, depth=4, layers=1)
MARKS = ("<!-- speed:begin -->", "<!-- speed:end -->")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    script: Literal["dreamer_v1", "dreamer_v2", "dreamer_v3"] = "dreamer_v3"
    """Our side."""
    setting: Literal["size", "tiny"] = "size"
    """The sizes of --size, or those of the posts' small runs: deter 64, 8 x 8 latents, depth 4."""
    size: Literal["XXS", "XS", "S", "M", "L", "XL"] = "S"
    """Preset of the paper."""
    batch_size: int = 16
    batch_length: int = 64
    horizon: int = 15
    actions: int = 9
    peer: Literal["", "sheeprl"] = ""
    """Whom to compare with."""
    peer_python: str = sys.executable
    """Python of the peer's virtual environment."""
    amp: Literal["auto", "on", "off", "both"] = "auto"
    """bfloat16; auto: both where the processor multiplies it natively, otherwise off."""
    compile: bool = False
    """torch.compile on our side; its time is reported apart."""
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
    table: bool = False
    """Print the table of all results, as Markdown, and measure nothing."""
    write: bool = False
    """With --table: into README.md, between its marks."""

    @property
    def sizes(self) -> dict[str, int]:
        """Of the networks."""
        return TINY if self.setting == "tiny" else {"stoch": 32, "classes": 32} | SIZES[self.size]

    @property
    def precisions(self) -> list[bool]:
        """Whether bf16, for each run of a side."""
        native = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
        return {"on": [True], "off": [False], "both": [False, True],
                "auto": [False, True] if native else [False]}[self.amp]


class Process:
    """A side at work, see side.py."""

    def __init__(self, python: str, file: str, setting: dict):
        environment = os.environ | ({"OMP_NUM_THREADS": str(setting["threads"])}
                                    if setting["threads"] else {})
        self.process = subprocess.Popen(
            [python, str(HERE / file), json.dumps(setting)], text=True, bufsize=1, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def ask(self, what: str, **details) -> dict:
        """One request and its reply."""
        self.process.stdin.write(json.dumps({"do": what} | details) + "\n")
        reply = json.loads(self.process.stdout.readline() or '{"error": "the process died"}')
        if "error" in reply:
            sys.exit(f"{self.process.args[1]}: {what}: {reply['error']}")
        return reply

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def start_sides(options: Options) -> dict[str, Process]:
    """By name, e.g. "ours float32"."""
    sides = {}
    for bf16 in options.precisions:
        setting = {"script": options.script, "sizes": options.sizes, "horizon": options.horizon,
                   "actions": options.actions, "threads": options.threads, "bf16": bf16}
        precision = "bf16" if bf16 else "float32"
        if options.peer:
            name = " ".join([options.peer, precision] + ["compiled"] * options.peer_compile)
            sides[name] = Process(options.peer_python, f"side_{options.peer}.py",
                                  setting | {"compile": options.peer_compile})
        name = " ".join(["ours", precision] + ["compiled"] * options.compile)
        setting["compile"] = options.compile
        sides[name] = Process(sys.executable, "side_ours.py", setting)
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
    for index in range(options.rounds):
        for name, side in sides.items():
            results[name]["update"] += side.ask("update", repeat=1)["seconds"]
            print(f"round {index}, {name}: {results[name]['update'][-1]:.3f} s", flush=True)
    for rows in (1, 16):
        for _ in range(max(options.rounds, 7)):
            for name, side in sides.items():
                seconds = side.ask("act", rows=rows, repeat=20)["seconds"]
                results[name].setdefault(f"act_{rows}", []).append(statistics.median(seconds))
    ours = [name for name in sides if name.startswith("ours")]
    for name, side in sides.items():
        results[name] |= {"peak_memory": side.ask("memory")["bytes"]}
        if "compiled" not in name:
            results[name] |= side.ask("flops")
    for name in ours * options.scaling:
        results[name]["scaling"] = scaling(sides[name], options)
    if options.envs:
        results[ours[0]]["envs"] = environments(sides[ours[0]])
    rates = {key: max(sides[ours[0]].ask("matmul", bf16=bf16)["flops_per_second"] for _ in range(3))
             for key, bf16 in (("float32", False), ("bf16", True))}
    for side in sides.values():
        side.close()
    return {"sides": results, "matmul": rates}


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


def machine() -> dict:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load_average": os.getloadavg()[0], "python": platform.python_version()} | {
            name: version(name) for name in ("torch", "numpy", "gymnasium", "ale-py")}


def start_record(kind: str, options) -> dict:
    """All that a result depends on, taken before the code is loaded: commits may come meanwhile."""
    def git(*command):
        done = subprocess.run(["git", *command], cwd=HERE, text=True, capture_output=True)
        return done.stdout.strip()
    now = datetime.datetime.now(datetime.UTC)
    dirty = "-dirty" if git("status", "--porcelain", "-uno") else ""
    return {"kind": kind, "date": f"{now:%Y-%m-%d %H:%M:%S} UTC",
            "commit": git("rev-parse", "HEAD") + dirty, "machine": machine(),
            "options": vars(options)}


def save(record: dict) -> Path:
    """Write one result."""
    stamp = "".join(c for c in record["date"] if c.isdigit())
    path = HERE / "results" / f"{record['kind']}_{record['options']['setting']}_{stamp}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of ours / theirs: what the two did right after one another."""
    return statistics.median(a / b for a, b in zip(ours, theirs))


def speed_rows(record: dict) -> list[str]:
    """Rows of the table: one per side of one measurement."""
    sides, options, rows = record["sides"], record["options"], []
    kinds = ("update", "act_1", "act_16")
    best = {key: min((s[key] for n, s in sides.items() if not n.startswith("ours")), default=None,
                     key=statistics.median) for key in kinds}
    for name, side in sides.items():
        seconds, precision = statistics.median(side["update"]), name.split()[1]
        same = [other["flops"] for key, other in sides.items()
                if key.split()[0] == name.split()[0] and "flops" in other]
        flops = side.get("flops") or max(same, default=math.nan)
        acting = [f"{1e3 * statistics.median(side[key]):.1f}" for key in ("act_1", "act_16")]
        compiling = side["first_update"] - seconds if "compiled" in name else 0
        is_ours = name.startswith("ours")
        ratios = [f"{ratio(side[key], best[key]):.2f}" if best[key] and is_ours else ""
                  for key in kinds]
        plain = sides.get(f"{options['peer']} float32")  # the peer's default
        of_plain = f"{ratio(side['update'], plain['update']):.2f}" if plain and is_ours else ""
        size = options["size"] if options["setting"] == "size" else options["setting"]
        rows.append(" | ".join([
            "", size, str(options["threads"] or "all"),
            name + (f" ({compiling:.0f} s)" if compiling else ""),
            f"{seconds:.3g}", ratios[0], of_plain, " / ".join(acting),
            " / ".join(filter(None, ratios[1:])),
            f"{side['peak_memory'] / 1e9:.1f} GB", f"{side['parameters'] / 1e6:.2f} M",
            *(["", ""] if math.isnan(flops) else  # of compiled networks torch counts none
              [f"{flops / 1e9:.0f}", f"{flops / seconds / record['matmul'][precision]:.0%}"]), ""
        ]).strip())
    return rows


def environment_rates(rows: list[dict]) -> list[str]:
    """One text per environment and way of acting."""
    rates = {}
    for row in rows:
        kind = f"{row['env_id']} {'with the agent' if row['acting'] else 'at random'}"
        rates.setdefault(kind, []).append(f"{row['per_second']:.0f}")
    return [f"{kind} {', '.join(values)}" for kind, values in rates.items()]


def remark(record: dict) -> str:
    """Commit and note of one measurement."""
    note = record["options"].get("note")
    return f" ({record['commit'][:9]}{record['commit'][40:]}{'; ' if note else ''}{note or ''})"


def table() -> str:
    """Markdown of the latest result of every kind of measurement."""
    latest = {}
    records = [json.loads(path.read_text()) for path in HERE.glob("results/*.json")]
    for record in sorted((r for r in records if "kind" in r), key=lambda r: r["date"]):
        options, where = record["options"], record["machine"]
        chosen = [options.get(key) for key in ("setting", "size", "threads", "compile")]
        place = where["gpu"] or f"{where['cpu']}{', avx512_bf16' * where['avx512_bf16']}"
        latest[(record["kind"], place, *chosen)] = record
    parts = []
    for place in dict.fromkeys(key[1] for key in latest):
        speeds = sorted((r for k, r in latest.items() if k[0] == "speed" and k[1] == place),
                        key=lambda r: [r["options"][key] for key in ("compile", "setting")])
        wholes = [r for k, r in latest.items() if k[0] == "whole_run" and k[1] == place]
        ranks = [r for k, r in latest.items() if k[0] == "ranks" and k[1] == place]
        about = (speeds + wholes + ranks)[0]
        where = about["machine"]
        parts.append(f"{place}, {where['cores']} cores, torch {where['torch']}, "
                     f"{about['date'][:10]}")
        if speeds:
            rates = {dtype: max(record["matmul"][dtype] for record in speeds)
                     for dtype in speeds[-1]["matmul"]}
            parts[-1] += "; matrix product " + ", ".join(
                f"{rate / 1e9:.3g} GFLOP/s in {dtype}" for dtype, rate in rates.items())
            head = ["size", "threads", "side", "s / update", "share of the peer's fastest",
                    "share of the peer's float32", "acting, ms (1 / 16 rows)",
                    "share of the peer's fastest", "peak memory", "parameters", "GFLOP / update",
                    "of the matmul rate"]
            lines = [row for record in speeds for row in speed_rows(record)]
            parts.append("\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]))
            parts.append("Batches of 16 x 64. Size tiny is deter 64, 8 x 8 latents, depth 4, one "
                         "layer of 64. Measured on: " + ", ".join(
                f"{speed_rows(record)[0].split(' |')[0][2:]}, threads: "
                f"{record['options']['threads']}{', compiled' * record['options']['compile']}"
                f"{remark(record)}"
                for record in speeds))
        for record in speeds:
            for name, side in record["sides"].items():
                for axis, row in side.get("scaling", {}).items():
                    times = ", ".join(f"{n}: {seconds:.3g}" for n, seconds in row.items())
                    parts.append(f"Seconds per update over batch {axis}, {name}: {times}")
                if "envs" in side:
                    parts.append("Environment steps per second of 1, 2 and 4 environments (one "
                                 "runs in our process, several in processes of their own): "
                                 + "; ".join(environment_rates(side["envs"])))
        for record in wholes:
            parts.append(f"Whole run of the posts, {record['options']['steps']:,} of 16,384 steps, "
                         f"threads: {record['options']['threads']}: " + ", ".join(
                f"{name} {seconds:.0f} s" for name, seconds in record["seconds"].items())
                         + remark(record))
        for record in ranks:
            times = " and ".join(f"{statistics.median(s):.3g}" for s in record["seconds"].values())
            parts.append(f"One and two processes ({record['options']['size']}, one thread each, "
                         f"the same whole batch): {times} s per update, "
                         f"{record['speedup']:.2f} times as fast (median over paired rounds)"
                         + remark(record))
    if not any(record["machine"]["gpu"] for record in latest.values()):
        parts.append("CUDA: not measured.")
    return "\n\n".join(parts)


def main() -> None:
    """Measure, or make the table."""
    options = tyro.cli(Options, description=__doc__)
    if options.table:
        text = table()
        print(text)
        if options.write:
            readme = HERE.parent / "README.md"
            before, rest = readme.read_text().split(MARKS[0])
            after = rest.split(MARKS[1])[1]
            readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")
    elif options.profile:
        side = list(start_sides(options).values())[-1]
        side.ask("batch", length=options.batch_length, rows=options.batch_size)
        side.ask("update", repeat=2)
        print(side.ask("profile", rows=20)["table"])
    else:
        record = start_record("speed", options)
        record |= measure(options)
        print("\n".join(speed_rows(record)), save(record), sep="\n")


if __name__ == "__main__":
    main()
