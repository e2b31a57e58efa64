"""One command for the day a GPU is at hand: are the scripts right on it, how fast, do they run?

    python benchmarks/gpu.py                                 as much as fits in eight minutes
    python benchmarks/gpu.py --peer VENV/bin/python          also sheeprl 0.8.4, see side_sheeprl.py
    python benchmarks/gpu.py --device cpu                    the same steps with tiny networks

The steps, in this order: parity with the authors' numbers; losses of the first updates in each mode
beside those in float32; host synchronisation inside an update; updates a second, memory, kernels;
a real run that is killed, resumed, evaluated and made to dream; acting and environments; the peer;
what has to be compiled. Every step is a process of its own: one that crashes or hangs costs itself
alone. The record, results/gpu/*.json, is written after each step.

All steps take half an hour by estimate, most of it compiling. Where time is short, begin with what
does not need the GPU alone, the scripts at once with a folder each; then time, then compile:

    for v in 1 2 3 3_2025; do python benchmarks/gpu.py --script dreamer_v$v --minutes 5 \\
        --results out/$v --only parity "losses dreamer_v$v float32" "losses dreamer_v$v graph" \\
        synchronisation real_run & done; wait
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
from side import Ours, make_args
from speed import HERE, commit, machine, markdown, setting
from speed import Options as Speed

MODES = {  # of an update: what differs from float32
    "float32": {}, "bf16": dict(bf16=True), "graph": dict(cuda_graph=True),
    "bf16 graph": dict(bf16=True, cuda_graph=True), "bf16 compiled": dict(bf16=True, compile=True),
    "bf16 graph compiled": dict(bf16=True, cuda_graph=True, compile=True)}
SIZES = {  # of each script, the authors' first
    script: sizes for script, sizes in {
        "dreamer_v3": ("S", "XL"), "dreamer_v2": ("paper",), "dreamer_v1": ("paper",),
        "dreamer_v3_2025": ("",)}.items() if (HERE.parent / f"{script}.py").exists()}
UPDATES = 5  # a CUDA graph is recorded in the fourth
SLOWEST = 300.0  # seconds that a step may take
SAID = 5000  # characters that are kept of what a failed step said
GAME = "MsPacmanNoFrameskip-v4"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    script: Literal[("", *SIZES)] = ""  # Empty: all of them, V3 first
    minutes: float = 8.0  # After which what has not been done is left out
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: tiny networks, to see that this file works
    peer: str = ""  # Python of sheeprl's virtual environment
    results: str = str(HERE / "results" / "gpu")  # Folder of the record
    only: tuple[str, ...] = ()  # Names of steps, or how they begin; none: all


# ---------------------------------------------------------------------------- steps, each a process
def parity(script: str, device: str, **_) -> dict:
    """The fixtures in float32, TF32 off, with ten times the CPU's tolerances."""
    command = [sys.executable, "-m", "tests.parity", script.removeprefix("dreamer_"),
               "--device", device, "--slack", "10"]
    done = subprocess.run(command, cwd=HERE.parent, text=True, capture_output=True)
    lines = (done.stdout + done.stderr).splitlines()
    total = [line for line in lines if " fixtures, " in line] or lines[-1:]
    kept = [line for line in lines if line.startswith("largest") or line.endswith("FAIL")]
    return {"exit_status": done.returncode, "summary": total, "lines": kept[:40]}


def side(script: str, device: str, size: str, mode: str, tiny: bool) -> Ours:
    """An agent of ours with a batch, at the sizes of the authors' setting or at tiny ones."""
    found = setting(Speed(script=script, size="tiny" if tiny else size, threads=int(tiny)))
    module, devices = map(importlib.import_module, (script, "common.devices"))
    devices.prepare_torch(make_args(module, found, threads=int(tiny)), 0)  # as a run
    made = Ours(found | MODES[mode] | {"root": str(HERE.parent), "device": device})
    made.batch(*((8, 2) if tiny else (found["length"], found["rows"])))
    return made


def losses(script: str, mode: str, **rest) -> dict:
    """Losses of the first updates: twice from one seed, and with a rule in place of random draws.

    Compiled code draws other numbers than plain code does from the same seed; a graph does not.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    module, found = importlib.import_module(script), {}
    for how in ("drawn", "drawn again", "by rule"):  # the first two differ where it is not exact
        if how == "by rule":
            module.draw_classes = lambda probs: probs.argmax(-1)
            for name in {"draw_noise", "draw_truncated"} & vars(module).keys():
                setattr(module, name, lambda like, *_: torch.full_like(like, 0.5))
        ours = side(script, mode=mode, **rest)
        torch.manual_seed(1)
        found[how] = []
        for _ in range(UPDATES):
            found[how].append({name: float(value) for name, value in ours.train(ours.data).items()
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
        ours.train(feeder.next())
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
    except RuntimeError as error:  # of the profiler: it must not cost what was measured
        return found | {"profiler": repr(error)}


def kernels(ours: Ours, device: str) -> dict:
    """How many kernels an update launches, how long they take, and the ten dearest."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=kinds) as profile:
        ours.agent_step()
        ours.wait()
    name, kind = f"self_{device if device == 'cpu' else 'device'}_time_total", device.upper()
    events = [event for event in profile.events() if event.device_type.name == kind
              and not getattr(event, "is_user_annotation", False)]
    total: dict[str, list[float]] = {}
    for event in events:
        total.setdefault(event.name[:80], []).append(getattr(event, name))
    dearest = sorted(total, key=lambda kernel: -sum(total[kernel]))[:10]
    return {"kernels": len(events), "kernel_seconds": sum(map(sum, total.values())) / 1e6,
            "dearest": [{"name": kernel, "count": len(total[kernel]),
                         "ms": sum(total[kernel]) / 1e3} for kernel in dearest]}


def acting(device: str, tiny: bool, **rest) -> dict:
    """Timesteps a second of the loop: act, update once, step the environments meanwhile."""
    ours, found = side(device=device, tiny=tiny, **rest), {}
    config = ours.script.EnvConfig(GAME, action_repeat=4, grayscale=ours.setting["channels"] == 1)
    for _ in range(UPDATES):
        ours.agent_step()
    for num_envs in (1,) if tiny else (1, 4, 16):
        several, turns = ours.script.Envs(config, num_envs, seed=0), 0
        obs, state = several.reset(), ours.agent.zero_state(num_envs)
        count = several.spec.action_dim
        times = [ours.clock(lambda: ours.agent.act(obs, state).action.cpu())  # noqa: B023
                 for _ in range(5 if tiny else 200)]
        begin, passed = time.perf_counter(), 0.0
        while passed < (0.5 if tiny else 6.0):
            state = ours.agent.act(obs, state)
            chosen = state.action.argmax(-1).cpu().numpy() % count
            ours.agent_step()
            obs, turns = several.step(np.eye(count)[chosen]), turns + 1
            passed = time.perf_counter() - begin
        several.close()
        found[f"envs_{num_envs}"] = {"timesteps_per_second": turns * num_envs / passed,
                                     "updates_per_second": turns / passed,
                                     "act_ms": 1e3 * statistics.median(times)}
    return found


def real_run(script: str, device: str, tiny: bool, **_) -> dict:
    """200 timesteps of the real command: KILLed, resumed, evaluated, made to dream.

    And 120 timesteps of continuous actions, by torchrun.
    """
    flags = ["--total-timesteps", "200", "--learning-starts", "70", "--checkpoint-every", "20",
             "--pretrain", "1", "--max-episode-steps", "60", "--threads", "1"]
    flags += ["--video-every", "100"] if device == "cuda" else ["--no-cuda", "--train-ratio", "20"]
    flags += ["--size", "XXS", "--batch-size", "2", "--batch-length", "8", "--depth", "2"] * tiny
    flags += ["--cuda-graph"] * (not tiny)
    command = [sys.executable, str(HERE.parent / f"{script}.py")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def call(*more: str) -> dict:
            done = subprocess.run([*command, *more], cwd=folder, text=True, capture_output=True)
            return {"exit_status": done.returncode, "said": (done.stdout + done.stderr)[-SAID:]}

        with open(folder / "said", "w") as said:
            first = subprocess.Popen([*command, "--env-id", GAME, *flags],
                                     cwd=folder, stdout=said, stderr=subprocess.STDOUT)
        while first.poll() is None and not any(
                rows_of(path) > 100 for path in folder.glob("runs/*")):
            time.sleep(0.1)
        if first.poll() is not None:
            return {"error": f"exit status {first.returncode} before it was killed",
                    "said": (folder / "said").read_text()[-SAID:]}
        first.send_signal(signal.SIGKILL)
        first.wait()
        run_dir = next(folder.glob("runs/*"))
        found = {"killed_at": rows_of(run_dir), "resume": call("--resume", str(run_dir)),
                 "evaluate": call("--evaluate", str(run_dir), "--eval-episodes", "2"),
                 "dream": call("--dream", str(run_dir), "--dream-horizon", "10")}
        found["dream_bytes"] = sum(gif.stat().st_size for gif in run_dir.glob("videos/dream.gif"))
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        found["torchrun"] = call("--env-id", "Pendulum-v1", *flags, "--total-timesteps", "120")
    return found


def rows_of(run_dir: Path) -> int:
    """Timesteps that the replay of a run holds so far."""
    path = run_dir / "replay" / "rows.npy"
    return int(np.load(path)[1]) if path.exists() else 0


def peer(script: str, tiny: bool, peer: str, results: str, **_) -> dict:
    """`speed.py` beside sheeprl, eager and with our CUDA graph; it keeps records of its own."""
    found = {}
    for graph in ("no-cuda-graph", "cuda-graph")[:1 + torch.cuda.is_available()]:
        done = subprocess.run([
            sys.executable, str(HERE / "speed.py"), "--script", script, "--peer", peer,
            f"--{graph}", "--amp", "both", "--rounds", "15", "--results", results,
            *["--size", "tiny"] * tiny], text=True, capture_output=True)
        found[graph] = {"exit_status": done.returncode, "said": (done.stdout + done.stderr)[-SAID:]}
    return found


STEPS = {step.__name__: step for step in (
    parity, losses, synchronisation, speed, acting, peer, real_run)}


# ---------------------------------------------------------------------------------------- the whole
def plan(options: Options) -> dict[str, tuple[str, dict]]:
    """Name -> which function with which arguments, the most telling first."""
    scripts, tiny = [options.script] if options.script else [*SIZES], options.device == "cpu"
    eager = [mode for mode in MODES if "compiled" not in mode and not (tiny and "graph" in mode)]
    compiled = [mode for mode in MODES if "compiled" in mode and not tiny]  # takes a minute
    steps = {}

    def add(function: str, script: str, *name: str, **arguments) -> None:
        words = " ".join(filter(None, (function, script, *name)))
        steps[words] = function, {"script": script, "device": options.device, "tiny": tiny,
                                  **arguments}

    for script in scripts:
        add("parity", script)
    for modes in (eager, compiled):
        for script in scripts:
            for mode in modes:
                add("losses", script, mode, mode=mode, size=SIZES[script][0])
            if modes is eager:
                add("synchronisation", script, mode="bf16", size=SIZES[script][0])
        for script in scripts:
            for mode in modes:
                add("speed", script, SIZES[script][0], mode, mode=mode, size=SIZES[script][0])
        for script in scripts if modes is eager else ():
            add("real_run", script)
            add("acting", script, mode="bf16" if tiny else "bf16 graph", size=SIZES[script][0])
            if options.peer and script != "dreamer_v3_2025":
                add("peer", script, peer=options.peer, results=options.results)
    for script in scripts if not tiny else ():
        for size in SIZES[script][1:]:
            for mode in eager + compiled:
                add("speed", script, size, mode, mode=mode, size=size)
    return {name: step for name, step in steps.items()
            if not options.only or name.startswith(options.only)}


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
        function, script = name.split()[:2]
        if "error" in found or "skipped" in found:
            lines.append(f"{name}: {found.get('error') or found['skipped']}")
        elif function == "parity":
            lines.append(f"{name}: {' '.join(found['summary'])}")
        elif function == "losses":
            how = "by rule" if "compiled" in name else "drawn"
            base = "bf16" if "bf16 " in name else "float32"
            plain = steps.get(f"losses {script} {base}", {}).get(how)
            if plain and not name.endswith(" float32"):
                worst = [difference(*pair) for pair in zip(plain, found[how])]
                again = max(map(difference, found["drawn"], found["drawn again"]))
                lines.append(f"{name}: differs from {base} by {worst[0]:.2e} in the first update, "
                             f"{max(worst):.2e} in {UPDATES} ({how}), from itself by {again:.2e}")
        elif function == "synchronisation":
            lines.append(f"{name}: none")
        elif function == "acting":
            lines += [f"{name}: {key}: {part['timesteps_per_second']:.0f} timesteps/s, acting "
                      f"{part['act_ms']:.1f} ms" for key, part in found.items() if key != "took"]
        elif function == "real_run":
            failed = [key for key, part in found.items()
                      if isinstance(part, dict) and part["exit_status"]]
            lines.append(f"{name}: killed at {found['killed_at']}, failed: {failed or 'nothing'}")
    head = ["script, size, mode", "updates/s", "host ms", "peak GB", "kernels", "first update s"]
    rows = [[name.removeprefix("speed "), f"{found['updates_per_second']:.3g}",
             f"{1e3 * found['host_seconds']:.1f}", f"{found['peak_bytes'] / 1e9:.2f}",
             found.get("kernels", ""), f"{max(found['first']):.1f}"]
            for name, found in steps.items() if "updates_per_second" in found]
    return "\n".join([*lines, "", markdown(head, rows)])


def main() -> None:
    """All steps, as far as the time reaches."""
    options = tyro.cli(Options, description=__doc__)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device; --device cpu tries the steps at tiny sizes.")
    begin = time.time()
    record = {"gpu": machine(), "commit": commit(), "steps": {},
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
    Path(answer).write_text(json.dumps(STEPS[function](**json.loads(arguments))))


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        step(*sys.argv[2:])
    else:
        main()
