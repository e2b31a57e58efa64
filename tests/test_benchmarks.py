"""The benchmarks fit the scripts: their flags, their sizes, and the tables made of results."""

import importlib
import itertools
import json
import re
import sys
import types

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

import dreamer_v3
from common.envs import EnvSpec
from common.vector import EnvStep
from tests.conftest import ROOT, SCRIPTS

sys.path.append(str(ROOT / "benchmarks"))
import foresight
import gpu
import learning
import speed
import torch
import whole_run


def flags_of(script: str) -> set[str]:
    module = importlib.import_module(script)
    return {name.replace("_", "-") for name in module.Args.__dataclass_fields__}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_has_flags_of_its_script(script):
    commands = [*learning.COMMANDS[script].values(), whole_run.FLAGS + whole_run.OWN_FLAGS[script]]
    for command in commands:
        used = {flag.removeprefix("no-") for flag in re.findall(r"--(\S+)", command)}
        assert used <= flags_of(script)
    assert set(whole_run.OFF[script]) <= flags_of(script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_both_sides_get_all_sizes_of_the_networks(script):
    paper, tiny = speed.Options(script=script), speed.Options(script=script, setting="tiny")
    assert paper.sizes.keys() == tiny.sizes.keys() <= set(importlib.import_module(script).Args.__dataclass_fields__)
    assert {"deter", "hidden", "units", "depth", "stoch"} <= paper.sizes.keys()
    assert tiny.sizes["deter"] == 64 < paper.sizes["deter"]


def test_a_row_of_the_table_has_the_share_of_the_peer_in_the_same_precision():
    sides = {f"{who} {precision}": {"update": [seconds] * 3, "peak_memory": 2e9, "first_update": 9.0}
             for who, precision, seconds in (("sheeprl", "float32", 4.0), ("ours", "float32", 2.0),
                                             ("sheeprl", "bf16", 2.0), ("ours", "bf16", 0.5))}
    options = vars(speed.Options(script="dreamer_v2", peer="sheeprl", threads=2))
    rows = speed.speed_rows({"sides": sides, "options": options})
    assert rows[1] == "| dreamer_v2 | paper | 2 | ours float32 | 2 | 0.50 | 2.0 GB |"
    assert rows[3] == "| dreamer_v2 | paper | 2 | ours bf16 | 0.5 | 0.25 | 2.0 GB |"
    assert rows[0].split("|")[6].strip() == ""


def test_a_row_of_learning_names_seeds_that_the_limit_stopped():
    found = {"1": {"mean": 500.0, "worst": 490.0, "minutes": 3.2, "commit": "a" * 40, "stopped_by_limit": False},
             "2": {"mean": 99.5, "worst": 9.0, "minutes": 8.9, "commit": "a" * 40, "stopped_by_limit": True}}
    assert learning.row("dreamer_v1", "cartpole", found) == (
        f"| dreamer_v1 | cartpole | 1: 500.0, 2: 99.5 (stopped early) | 400 | 9 | 3 to 9 | {'a' * 9} |")


def test_the_curve_of_a_resumed_run_leaves_the_break_out(tmp_path, monkeypatch):
    clock = iter(())
    monkeypatch.setattr("time.time", lambda: next(clock))
    (tmp_path / "args.json").write_text(json.dumps({"args": {"action_repeat": 4}}))
    assert learning.run_directory(tmp_path / "no_log") is None
    log = tmp_path / "log"
    log.write_text(f"run directory: {tmp_path}\nenvironment: ...")
    assert learning.run_directory(log) is None  # nothing was saved yet
    (tmp_path / "checkpoint.pt").touch()
    assert learning.run_directory(log) == tmp_path
    for start, steps, first in ((100.0, (10, 20), True), (500.0, (20, 30), False)):
        clock = itertools.repeat(start)  # the killed process had logged step 20, the next one does it again
        writer = SummaryWriter(str(tmp_path), purge_step=None if first else 11)
        for step in steps:
            clock = itertools.repeat(start + step)
            for name, value in (("episodic_return", -step), ("episodic_length", 5), ("updates", 2 * step)):
                writer.add_scalar(f"charts/{name}", value, step)
        writer.close()
    seconds = learning.write_curve(tmp_path, tmp_path / "curve.csv")
    assert (tmp_path / "curve.csv").read_text().splitlines() == [
        "timesteps,frames,return,length,updates,seconds", "10,40,-10,5,20,10.0", "20,80,-20,5,40,40.0",
        "30,120,-30,5,60,50.0"]
    assert seconds == 50.0


# ---- gpu.py --------------------------------------------------------------------------------------

def test_every_step_of_the_gpu_benchmark_has_its_place():
    for device in ("cuda", "cpu"):
        plan = gpu.plan(gpu.Options(device=device, peer_python="python"))
        assert {function for function, _ in plan.values()} == gpu.STEPS.keys()
        assert list(plan)[0].startswith("parity") and plan.keys() != gpu.plan(gpu.Options()).keys()
    assert any("graph compiled" in name for name in gpu.plan(gpu.Options()))


def test_gpu_benchmark_on_a_cpu(monkeypatch, tmp_path, capsys):
    """Its steps at tiny sizes, one script for each; what one of them breaks on stays its own."""
    only = ("losses dreamer_v1", "synchronisation dreamer_v2", "speed dreamer_v2 no such size bf16",
            "real_run dreamer_v1")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--results", str(tmp_path),
                                      "--minutes", "100", "--only", *only])
    monkeypatch.setattr(gpu, "SLOWEST", 3000.0)  # on a busy machine
    monkeypatch.setitem(gpu.SIZES, "dreamer_v2", ("no such size",))
    gpu.main()
    said = capsys.readouterr().out
    record, = (json.loads(path.read_text()) for path in tmp_path.iterdir())
    steps = record["steps"]
    assert list(steps) == [name for name in gpu.plan(gpu.Options(device="cpu")) if name.startswith(only)]
    assert "no such size" in steps["speed dreamer_v2 no such size bf16"]["said"]
    assert "losses dreamer_v1 bf16: differs from float32 by" in said
    for how in ("drawn", "drawn again", "by rule"):
        first = steps["losses dreamer_v1 float32"][how][0]
        assert len(first) >= 5 and gpu.difference(first, steps["losses dreamer_v1 bf16"][how][0]) < 0.05
    assert "killed at 1" in said and "failed: nothing; in parts 0 tensors differ" in said
    real = steps["real_run dreamer_v1"]
    assert real["dream_bytes"] > 1000 and min(real["in_parts"]["updates"]) > 15
    assert "done" in real["torchrun"]["said"]


def test_gpu_benchmark_tells_unequal_weights(tmp_path):
    paths = [tmp_path / name for name in ("one.pt", "other.pt")]
    for path, value in zip(paths, (1.0, 2.0)):
        torch.save({"agent": {"same": torch.zeros(2), "changed": torch.full((2,), value)}}, path)
    assert gpu.unequal_tensors(*paths) == ["changed"] and not gpu.unequal_tensors(*paths[:1] * 2)
    assert gpu.unequal_tensors(paths[0])


def test_gpu_benchmark_without_a_gpu_or_without_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="there is no CUDA device"):
        gpu.main()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(tmp_path), "--device", "cpu",
                                      "--minutes", "0.01"])
    gpu.main()
    record, = (json.loads(path.read_text()) for path in tmp_path.iterdir())
    assert {step["skipped"] for step in record["steps"].values()} == {"no time left"}


# ---- foresight.py --------------------------------------------------------------------------------

class Foreseeing:
    """An agent that knows all: the reward of a row is the sum of the actions since its window began."""

    __module__ = "dreamer_v3"
    spec, device = EnvSpec(None, 1, 1, False), torch.device("cpu")
    args = types.SimpleNamespace(clip_rewards="none")

    def __init__(self):
        rssm = types.SimpleNamespace(observe=self.observe, img_step=lambda d, s, a: (d + a, s))
        self.world_model = types.SimpleNamespace(
            rssm=rssm, encoder=lambda image, vector: vector,
            reward=lambda feat: types.SimpleNamespace(mean=lambda: feat[..., 0]))
        self.actor = type("Actor", (), {"__call__": lambda self, feat: feat, "policy": lambda self, raw: (
            types.SimpleNamespace(sample=lambda: torch.full((*raw.shape[:-1], 1), 0.5)))})()

    def zero_state(self, rows):
        return types.SimpleNamespace(deter=torch.zeros(rows, 1), stoch=torch.zeros(rows, 1),
                                     action=torch.zeros(rows, 1))

    def observe(self, embed, prev_action, is_first, deter, stoch):
        assert is_first[0].all()  # what was before the window is unknown
        return prev_action.cumsum(0), torch.zeros_like(prev_action), None


def test_foresight_compares_each_reward_with_what_was_said_of_it(tmp_path):
    options = foresight.Options(tmp_path, rows=200, length=20, warmup=4, horizon=3)
    actions = np.random.default_rng(0).integers(-1, 2, 200).astype(np.float32)
    (tmp_path / "replay").mkdir()
    replay = dreamer_v3.ReplayBuffer(tmp_path / "replay", Foreseeing.spec, 200, 1, 0)
    no, zero = np.zeros(1, bool), np.zeros(1, np.float32)
    for t, action in enumerate(actions):
        reward = actions[t // 20 * 20:t].sum()
        obs = EnvStep(None, zero[None], zero + reward, no, no, no, zero, zero)
        replay.add(obs, zero[None] + action)
    found = foresight.foresight(Foreseeing(), options)
    rewards = np.array([actions[t // 20 * 20:t].sum() for t in range(180)]).reshape(9, 20)
    assert found.keys() == {"with the observation", "1 ahead", "3 ahead", "policy"}
    for name, since in (("with the observation", 4), ("1 ahead", 5), ("3 ahead", 7)):
        asked = rewards[:, since:]
        assert found[name]["positive real"] == found[name]["positive seen"] == asked[asked > 0].sum() > 0
        assert found[name]["negative real"] == found[name]["negative seen"] == asked[asked < 0].sum() < 0
        assert found[name]["zero seen"] == 0
    assert found["policy"]["real"] == pytest.approx(rewards.mean())
    assert found["policy"]["imagined"] == pytest.approx(rewards[:, 4:].mean() + 0.5 * (1 + 2 + 3) / 3)


# ---- Tables in the README ------------------------------------------------------------------------

def test_generated_tables_are_not_stale():
    """`python benchmarks/speed.py --table --write`, and the same of learning.py, make them anew."""
    readme = (ROOT / "README.md").read_text()
    for marks, table in ((speed.MARKS, speed.brief()), (learning.MARKS, learning.table())):
        shown = readme.partition(marks[0] + "\n")[2].partition("\n" + marks[1])[0]
        assert shown == table
    paths = ["dreamer_v3.py", *(f"common/{name}.py" for name in ("rings", "maths", "runs", "rundir"))]
    lines = [len((ROOT / path).read_text().splitlines()) for path in paths]
    assert f"| {sum(lines):,} in 5, of which the script {lines[0]:,} |" in readme
    assert speed.table() in (ROOT / "benchmarks" / "results" / "speed.md").read_text()


def test_every_result_of_the_table_was_made_by_the_command_above_it():
    jobs = [(script, task) for script, tasks in learning.COMMANDS.items() for task in tasks]
    for script, task in jobs:
        for path in learning.HERE.glob(f"results/learning_{script}_{task}_?.json"):
            job = learning.Job(script, task, int(path.stem.rpartition("_")[2]))
            assert json.loads(path.read_text())["command"] == f"python {script}.py {job.flags}"
