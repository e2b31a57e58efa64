"""One command for the day a GPU is at hand: are the scripts right on it, how fast, do they run?

    python benchmarks/gpu.py                                 as much as fits in eight minutes
    python benchmarks/gpu.py --script v3 --minutes 5
    python benchmarks/gpu.py --peer-python VENV/bin/python   also sheeprl 0.8.4, see side_sheeprl.py
    python benchmarks/gpu.py --device cpu                    the same steps with tiny networks

In this order: parity with the authors' numbers; losses of the first updates in each mode beside
float32's; host synchronisation inside an update; updates a second, memory and kernels; acting and
environments; the peer; a real run that is killed, resumed, evaluated and made to dream. Every step
is a process of its own: one that crashes or hangs costs itself alone. results/gpu_*.json is
written after each step, so a run that is stopped leaves what it had.

By estimate all steps take half an hour, most of it compiling. Where time is short, first what does not
need the GPU alone, the three scripts at once with a folder each; then what is timed; then compiling:

    for v in v1 v2 v3; do python benchmarks/gpu.py --script $v --minutes 5 --results out/$v --only \\
        parity "losses dreamer_$v float32" "losses dreamer_$v graph" synchronisation real_run & done; wait
    python benchmarks/gpu.py --results out --only "speed dreamer_v3 S" "speed dreamer_v2" \\
        "speed dreamer_v1" acting peer
    python benchmarks/gpu.py --results out --only "speed dreamer_v3 S bf16 compiled" \\
        "speed dreamer_v3 S bf16 graph compiled" "losses dreamer_v3"
"""

import importlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import tyro
from side_ours import Ours
from speed import HERE, git, machine
from speed import Options as Speed

MODES = {  # of an update: what differs from float32
    "float32": {}, "bf16": dict(bf16=True), "graph": dict(cuda_graph=True),
    "bf16 graph": dict(bf16=True, cuda_graph=True), "bf16 compiled": dict(bf16=True, compile=True),
    "bf16 graph compiled": dict(bf16=True, cuda_graph=True, compile=True)}
SIZES = {"dreamer_v3": ("S", "XL"), "dreamer_v2": ("paper",), "dreamer_v1": ("paper",)}
UPDATES = 5  # a CUDA graph is recorded in the fourth
SLOWEST = 300.0  # seconds that a step may take
SAID = 5000  # characters that are kept of what a failed step said
GAME = "MsPacmanNoFrameskip-v4"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    script: Literal["v1", "v2", "v3"] | None = None
    """None: all three, V3 first."""
    minutes: float = 8.0
    """After which what has not been done is left out."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: tiny networks, to see that this file works."""
    peer_python: str = ""
    """Python of sheeprl's virtual environment."""
    results: str = str(HERE / "results")
    """Folder of the record."""
    only: tuple[str, ...] = ()
    """Names of steps, or how they begin; none: all."""

    @property
    def is_tiny(self) -> bool:
        """Whether this is no measurement."""
        return self.device == "cpu"


# ------------------------------------------------------------------------------- steps, each a process
def parity(script: str, device: str, **_) -> dict:
    """The fixtures in float32, TF32 off, with ten times the CPU's tolerances."""
    command = ["-m", "tests.parity", script[-2:], "--device", device, "--slack", "10"]
    done = subprocess.run([sys.executable, *command], cwd=HERE.parent, text=True, capture_output=True)
    lines = (done.stdout + done.stderr).splitlines()
    total = [line for line in lines if " fixtures, " in line] or [f"exit status {done.returncode}"]
    kept = [line for line in lines if line.startswith("largest") or line.endswith("FAIL")]
    return {"exit_status": done.returncode, "summary": total, "lines": kept[:40]}


def side(script: str, device: str, size: str, mode: str, tiny: bool) -> Ours:
    """An agent of ours with a batch, at the sizes of the authors' setting or at tiny ones."""
    flags = {"bf16": False, "compile": False} | MODES[mode]
    options = Speed(script=script, size=size, setting="tiny" if tiny else "size")
    importlib.import_module("common.devices").seed_everything(0, deterministic=True)  # as a run
    made = Ours({name: getattr(options, name) for name in (
        "script", "sizes", "horizon", "actions", "discrete", "channels")} | flags | {
        "threads": 1 if tiny else 0, "root": str(HERE.parent), "device": device})
    made.batch(*((8, 2) if tiny else (options.batch_length, options.batch_size)))
    return made


def losses(script: str, mode: str, **rest) -> dict:
    """Losses of the first updates: twice from one seed, and with a rule in place of random draws.

    Compiled code draws other numbers than plain code does from the same seed; a graph does not.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    module, found = importlib.import_module(script), {}
    for how in ("drawn", "drawn again", "by rule"):  # what differs between the first two is not exact
        if how == "by rule":
            module.draw_classes = lambda probs: probs.argmax(-1)
            for name in {"draw_noise", "draw_truncated"} & vars(module).keys():
                setattr(module, name, lambda like, *_: torch.full_like(like, 0.5))
        ours = side(script, mode=mode, **rest)
        torch.manual_seed(1)
        found[how] = []
        for _ in range(UPDATES):
            metrics = ours.agent.train_step(ours.data, ours.carry)
            found[how].append({name: float(value) for name, value in metrics.items()
                               if name.startswith("loss/")})
        if hasattr(ours.agent.learn, "free"):
            ours.agent.learn.free()
    return found


def synchronisation(device: str, **rest) -> dict:
    """Whether an update, or feeding it with a batch, makes the host wait for the GPU."""
    ours = side(device=device, **rest)
    batch = type(ours.data)(*(None if x is None else x.cpu() for x in ours.data))
    replay = SimpleNamespace(rng=None, sample=lambda *_: batch)
    feeder = ours.script.Feeder(replay, ours.device, *reversed(batch.reward.shape))

    def turn():
        ours.agent.train_step(feeder.next(), ours.carry)
        feeder.prepare()

    for _ in range(UPDATES):
        turn()
    if device == "cpu":
        return {"skipped": "there is nothing to wait for on a CPU"}
    torch.cuda.set_sync_debug_mode("error")
    turn()
    return {"waits": False}


def speed(script: str, mode: str, size: str, device: str, tiny: bool) -> dict:
    """Updates a second and peak memory; without a graph also kernels, and the host's share."""
    ours = side(script, device, size, mode, tiny)
    first = [ours.clock(ours.agent_step) for _ in range(UPDATES)]
    count = 3 if tiny else max(10, min(200, int(3 / min(first))))
    hosts = []

    def updates():
        for _ in range(count):
            start = time.perf_counter()
            ours.agent_step()
            hosts.append(time.perf_counter() - start)

    seconds = ours.clock(updates) / count
    found = {"seconds": seconds, "updates_per_second": 1 / seconds, "first": first,
             "host_seconds": statistics.median(hosts), "peak_bytes": ours.memory()["bytes"]}
    if "graph" in mode or "compiled" in mode:
        return found
    try:
        return found | kernels(ours, device)
    except RuntimeError as error:  # the profiler's, which must not cost what was measured
        return found | {"profiler": repr(error)}


def kernels(ours: Ours, device: str) -> dict:
    """How many kernels an update launches, how long they take, and the ten dearest."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=kinds) as profile:
        ours.agent_step()
        ours.wait()
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    events = [event for event in profile.events()
              if event.device_type == kind and not getattr(event, "is_user_annotation", False)]
    total: dict[str, list[float]] = {}
    for event in events:
        time_us = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        total.setdefault(event.name[:80], []).append(time_us)
    dearest = sorted(total, key=lambda name: -sum(total[name]))[:10]
    return {"kernels": len(events), "kernel_seconds": sum(map(sum, total.values())) / 1e6,
            "dearest": [{"name": name, "count": len(total[name]), "ms": sum(total[name]) / 1e3}
                        for name in dearest]}


def acting(device: str, tiny: bool, **rest) -> dict:
    """Milliseconds to act; environment steps a second with the agent acting and learning."""
    ours, found = side(device=device, tiny=tiny, **rest), {}
    for _ in range(UPDATES):
        ours.agent_step()
    for rows in (1, 16):
        times = ours.act(rows, 5 if tiny else 200)["seconds"]
        found[f"act_{rows}_ms"] = 1e3 * statistics.median(times)
    for num_envs in (1,) if tiny else (1, 4, 16):
        found[f"envs_{num_envs}"] = loop(ours, num_envs, seconds=0.5 if tiny else 6.0)
    return found


def loop(ours: Ours, num_envs: int, seconds: float) -> dict:
    """Act, update once, step the environments, as the main loop does: the GPU works meanwhile."""
    config = ours.script.EnvConfig(GAME, action_repeat=4,
                                   grayscale=ours.setting["channels"] == 1)
    envs, turns = ours.script.Envs(config, num_envs, seed=0), 0
    try:
        obs, state = envs.reset(), ours.zero_state(num_envs)
        ours.wait()
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            state = ours.agent.act(obs, state)
            chosen = state.action.argmax(-1).cpu().numpy() % envs.spec.action_dim
            ours.agent_step()
            obs = envs.step(np.eye(envs.spec.action_dim)[chosen])
            turns += 1
        ours.wait()
        passed = time.perf_counter() - start
    finally:
        envs.close()
    return {"timesteps_per_second": turns * num_envs / passed, "updates_per_second": turns / passed}


def real_run(script: str, device: str, tiny: bool, **_) -> dict:
    """200 timesteps of the real command: KILLed, resumed, evaluated, made to dream.

    Then from its recording alone, which takes no step of an environment: 20 timesteps in one go and
    in two, which must end with the same weights. And 120 timesteps of continuous actions, by torchrun.
    """
    flags = ["--total-timesteps", "200", "--learning-starts", "70", "--checkpoint-every", "20",
             "--pretrain", "1", "--max-episode-steps", "60", "--threads", "1"]
    flags += ["--video-every", "100"] if device == "cuda" else ["--no-cuda", "--train-ratio", "20"]
    if tiny:
        flags += ["--size", "XXS", "--batch-size", "2", "--batch-length", "8", "--depth", "2"]
    else:
        flags += ["--cuda-graph"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parent / f"{script}.py")]

        def call(*more: str) -> dict:
            done = subprocess.run([*command, *more], cwd=folder, text=True, capture_output=True)
            return {"exit_status": done.returncode, "said": (done.stdout + done.stderr)[-SAID:]}

        rows = Path(folder)
        with open(rows / "said", "w") as said:
            first = subprocess.Popen([*command, "--env-id", GAME, *flags],
                                     cwd=folder, stdout=said, stderr=subprocess.STDOUT)
        while first.poll() is None and not any(
                np.load(path)[1] > 100 for path in rows.glob("runs/*/replay/rows.npy")):
            time.sleep(0.1)
        if first.poll() is not None:
            return {"error": f"exit status {first.returncode} before it was killed",
                    "said": (rows / "said").read_text()[-SAID:]}
        first.send_signal(signal.SIGKILL)
        first.wait()
        run_dir = next(rows.glob("runs/*"))
        found = {"killed_at": int(np.load(run_dir / "replay" / "rows.npy")[1]),
                 "resume": call("--resume", str(run_dir)),
                 "evaluate": call("--evaluate", str(run_dir), "--eval-episodes", "2"),
                 "dream": call("--dream", str(run_dir), "--dream-horizon", "10")}
        gif = run_dir / "videos" / "dream.gif"
        found |= {"dream_bytes": gif.stat().st_size if gif.exists() else 0}
        recorded = [*flags, "--env-id", GAME, "--offline", str(run_dir), "--checkpoint-every", "10"]
        recorded += ["--train-ratio", "20" if tiny else "2500"]  # an update a timestep, or more
        whole = [call(*recorded, "--total-timesteps", "20", "--runs-dir", "whole")]
        parts = [call(*recorded, "--total-timesteps", "10", "--runs-dir", "parts")]
        parts += [call("--resume", str(path), "--total-timesteps", "20") for path in rows.glob("parts/*")]
        saved = [path for name in ("whole", "parts") for path in rows.glob(f"{name}/*/checkpoint.pt")]
        updates = [torch.load(path, map_location="cpu", weights_only=True)["updates"] for path in saved]
        found["in_parts"] = {"exit_status": max(part["exit_status"] for part in whole + parts),
                             "said": parts[-1]["said"], "updates": updates,
                             "unequal": unequal_tensors(*saved)}
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        found["torchrun"] = call("--env-id", "Pendulum-v1", *flags, "--total-timesteps", "120")
        return found


def unequal_tensors(*checkpoints: Path) -> list[str]:
    """Names of the weights that differ between two checkpoints; a message if there are not two."""
    if len(checkpoints) != 2:
        return ["there are no two checkpoints"]
    one, other = (torch.load(path, map_location="cpu", weights_only=True)["agent"]
                  for path in checkpoints)
    return [name for name in one if not torch.equal(one[name], other[name])]


def peer(script: str, tiny: bool, peer_python: str, results: str, **_) -> dict:
    """`speed.py` beside sheeprl, eager and with our CUDA graph; it keeps records of its own."""
    found = {}
    for graph in ("no-cuda-graph", "cuda-graph") if torch.cuda.is_available() else ("no-cuda-graph",):
        done = subprocess.run([
            sys.executable, str(HERE / "speed.py"), "--script", script, "--peer", "sheeprl", f"--{graph}",
            "--peer-python", peer_python, "--amp", "both", "--rounds", "15", "--results", results,
            *["--setting", "tiny"] * tiny], text=True, capture_output=True)
        found[graph] = {"exit_status": done.returncode, "said": (done.stdout + done.stderr)[-3000:]}
    return found


STEPS = {step.__name__: step for step in (
    parity, losses, synchronisation, speed, acting, peer, real_run)}


# -------------------------------------------------------------------------------------------- the whole
def plan(options: Options) -> dict[str, tuple[str, dict]]:
    """Name -> which function with which arguments, the most telling first."""
    scripts = [f"dreamer_{options.script}"] if options.script else ["dreamer_v3", "dreamer_v2", "dreamer_v1"]
    tiny, modes = options.is_tiny, list(MODES)
    if tiny:  # a graph needs CUDA, and compiling takes a minute
        modes = [mode for mode in modes if "graph" not in mode and "compiled" not in mode]
    common = {"device": options.device, "tiny": tiny}
    steps = {f"parity {script}": ("parity", dict(script=script) | common) for script in scripts}
    quick = [mode for mode in modes if "compiled" not in mode]
    for chosen in (quick, [mode for mode in modes if mode not in quick]):
        for script in scripts:
            size = SIZES[script][0]
            for mode in chosen:
                steps[f"losses {script} {mode}"] = "losses", dict(
                    script=script, mode=mode, size=size) | common
            if chosen is quick:
                steps[f"synchronisation {script}"] = "synchronisation", dict(
                    script=script, mode="bf16", size=size) | common
        for script in scripts:
            steps |= speeds(script, SIZES[script][:1], chosen, common)
        for script in scripts if chosen is quick else ():
            steps[f"real_run {script}"] = "real_run", dict(script=script) | common
            steps[f"acting {script}"] = "acting", dict(
                script=script, mode="bf16" if tiny else "bf16 graph", size=SIZES[script][0]) | common
            if options.peer_python:
                steps[f"peer {script}"] = "peer", dict(
                    script=script, peer_python=options.peer_python, results=options.results) | common
    for script in scripts if not tiny else ():
        steps |= speeds(script, SIZES[script][1:], modes, common)
    return {name: step for name, step in steps.items()
            if not options.only or name.startswith(options.only)}


def speeds(script: str, sizes: tuple[str, ...], modes: list[str], common: dict) -> dict:
    """The steps that time an update."""
    return {f"speed {script} {size} {mode}": ("speed", dict(script=script, mode=mode, size=size) | common)
            for size in sizes for mode in modes}


def carry_out(function: str, arguments: dict, seconds: float) -> dict:
    """A step in a process of its own."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        command = [sys.executable, __file__, "step", function, json.dumps(arguments), answer.name]
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              process_group=0) as process:  # not a session: it must end with us
            try:
                said, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                said, _ = process.communicate()
                return {"error": f"took more than {seconds:.0f} s", "said": said[-SAID:]}
        text = answer.read()
    return json.loads(text) if text else {"error": f"exit status {process.returncode}",
                                          "said": said[-SAID:]}


def difference(first: dict[str, float], other: dict[str, float]) -> float:
    """The largest relative difference of a loss; those near 0 count against 1; NaN is infinite."""
    if not all(map(math.isfinite, [*first.values(), *other.values()])):
        return math.inf
    return max(abs(other[name] - value) / max(1.0, abs(value)) for name, value in first.items())


def summary(steps: dict[str, dict]) -> str:
    """What was found, as Markdown."""
    lines = []
    for name, found in steps.items():
        script = name.split()[1]
        if "error" in found or "skipped" in found:
            lines.append(f"{name}: {found.get('error') or found['skipped']}")
        elif name.startswith("parity"):
            lines.append(f"{name}: {' '.join(found['summary'])}")
        elif name.startswith("losses"):
            how = "by rule" if "compiled" in name else "drawn"
            base = "bf16" if "bf16 " in name else "float32"
            plain = steps.get(f"losses {script} {base}", {}).get(how)
            if plain and not name.endswith(" float32"):
                worst = [difference(*pair) for pair in zip(plain, found[how])]
                again = max(map(difference, found["drawn"], found["drawn again"]))
                lines.append(f"{name}: differs from {base} by {worst[0]:.2e} in the first update, "
                             f"by {max(worst):.2e} at most in {UPDATES} ({how}), from itself by {again:.2e}")
        elif name.startswith("synchronisation"):
            lines.append(f"{name}: none")
        elif name.startswith("acting"):
            lines.append(f"{name}: " + ", ".join(
                f"{key} {value:.2f}" if isinstance(value, float) else
                f"{key} {value['timesteps_per_second']:.0f} timesteps/s" for key, value in found.items() if key != "took"))
        elif name.startswith("real_run"):
            codes = {key: part["exit_status"] for key, part in found.items()
                     if isinstance(part, dict) and part["exit_status"]}
            lines.append(f"{name}: killed at {found['killed_at']}, failed: {codes or 'nothing'}; "
                         f"in parts {len(found['in_parts']['unequal'])} tensors differ")
    rows = ["| script, size, mode | updates/s | host ms | peak GB | kernels | first update s |",
            "|---|---|---|---|---|---|"]
    rows += [f"| {name.removeprefix('speed ')} | {found['updates_per_second']:.3g} "
             f"| {1e3 * found['host_seconds']:.1f} | {found['peak_bytes'] / 1e9:.2f} "
             f"| {found.get('kernels', '')} | {max(found['first']):.1f} |"
             for name, found in steps.items() if "updates_per_second" in found]
    return "\n".join([*lines, "", *rows])


def main() -> None:
    """All steps, as far as the time reaches."""
    options = tyro.cli(Options, description=__doc__)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device; --device cpu tries the steps at tiny sizes.")
    begin, dirty = time.time(), "-dirty" if git("status", "--porcelain", "-uno") else ""
    record = {"gpu": machine(), "commit": (git("rev-parse", "HEAD") or os.environ.get("COMMIT", "")) + dirty,
              "steps": {},
              "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(begin))}
    if torch.cuda.is_available():
        record["gpu"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                          "memory": torch.cuda.get_device_properties(0).total_memory}
    stamp = time.strftime("%Y%m%d%H%M%S", time.gmtime(begin))
    path = Path(options.results) / f"gpu_{options.device}_{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, (function, arguments) in plan(options).items():
        left = begin + 60 * options.minutes - time.time()
        start = time.time()
        found = (carry_out(function, arguments, min(left, SLOWEST)) if left > 5
                 else {"skipped": "no time left"})
        record["steps"][name] = found | {"took": round(time.time() - start, 1)}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {found.get('error') or found.get('skipped') or 'done'} "
              f"({time.time() - start:.0f} s)", flush=True)
    print(summary(record["steps"]), path, sep="\n")


def step(function: str, arguments: str, answer: str) -> None:
    """What a step's process does."""
    found = STEPS[function](**json.loads(arguments))
    text = json.dumps(found)
    assert math.isfinite(found.get("seconds", 0.0)), text
    Path(answer).write_text(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        step(*sys.argv[2:])
    else:
        main()
