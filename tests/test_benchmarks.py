"""The benchmarks fit the scripts: their flags, their sizes, and the tables made of results."""

import dataclasses
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
from common.vector import EnvStep
from tests.conftest import ROOT, SCRIPTS

sys.path.append(str(ROOT / "benchmarks"))
import foresight
import gpu
import learning
import side
import speed
import torch


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_has_flags_of_its_script(script):
    fields = {field.name for field in dataclasses.fields(importlib.import_module(script).Args)}
    for command in learning.COMMANDS[script].values():
        assert {flag.removeprefix("no-").replace("-", "_") for flag in re.findall(r"--(\S+)", command)} <= fields


@pytest.mark.parametrize("script", SCRIPTS)
def test_both_sides_get_all_sizes_of_the_networks(script):
    paper, tiny = (speed.setting(speed.Options(script=script, size=size)) for size in ("", "tiny"))
    assert {"deter", "hidden", "units", "depth", "stoch"} <= paper["sizes"].keys() == tiny["sizes"].keys()
    assert tiny["sizes"]["deter"] == 64 < paper["sizes"]["deter"]


@pytest.mark.parametrize("vector", [0, 4])
def test_a_side_makes_updates_at_these_sizes(vector):
    found = speed.setting(speed.Options(size="tiny", vector=vector, threads=1))
    ours = side.Ours(found | {"root": str(ROOT), "device": "cpu"})
    ours.batch(length=6, rows=2)
    before = [weight.clone() for weight in ours.agent.parameters()]
    assert ours.update()["seconds"] > 0 and ours.parameters()["parameters"] > 10_000
    assert any(not torch.equal(*pair) for pair in zip(before, ours.agent.parameters()))
    assert ours.agent.args.deter == 64 and (ours.data.image is None) == bool(vector)


def measured(seconds: float) -> dict:
    return {"update": [seconds] * 3, "peak_memory": 2e9, "first_update": 9.0}


def test_a_row_of_the_table_has_the_share_of_the_others_in_the_same_precision():
    sides = {f"{who} {precision}": measured(seconds) for who, precision, seconds in (
        ("sheeprl", "float32", 4.0), ("old", "float32 compiled", 2.5), ("ours", "float32 compiled", 2.0),
        ("sheeprl", "bf16", 2.0), ("ours", "bf16 compiled", 0.5))}
    options = vars(speed.Options(script="dreamer_v2", size="paper", threads=2, note="busy"))
    rows = speed.rows({"sides": sides, "options": options, "matmul": {"float32": 2e11, "bf16": 4e11},
                       "date": "2026-11-22 10:00:00 UTC", "commit": "a" * 40})
    assert rows[2] == ["dreamer_v2", "paper", "2", "ours float32 compiled", "2", "0.50 (0.50 to 0.50)",
                       "0.80 (0.80 to 0.80)", "2.0", "9", "200", "2026-11-22 aaaaaaaaa, busy"]
    assert rows[4][4:7] == ["0.5", "0.25 (0.25 to 0.25)", ""] and rows[0][5:7] == rows[1][5:7] == ["", ""]


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

def test_gpu_benchmark_on_a_cpu(monkeypatch, tmp_path, capsys):
    """Its steps at tiny sizes; what one of them breaks on stays its own."""
    only = ("losses dreamer_v1", "synchronisation dreamer_v2", "speed dreamer_v2 paper bf16",
            "acting dreamer_v3", "real_run dreamer_v1")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--results", str(tmp_path),
                                      "--minutes", "100", "--only", *only])
    monkeypatch.setattr(gpu, "SLOWEST", 3000.0)  # on a busy machine
    made = gpu.plan
    monkeypatch.setattr(gpu, "plan", lambda options: made(options) | {"speed dreamer_v1 broken": ("speed", {
        "script": "dreamer_v1", "mode": "no such mode", "size": "", "device": "cpu", "tiny": True})})
    gpu.main()
    said = capsys.readouterr().out
    record, = (json.loads(path.read_text()) for path in tmp_path.iterdir())
    steps = record["steps"]
    assert "no such mode" in steps["speed dreamer_v1 broken"]["said"]
    assert "losses dreamer_v1 bf16: differs from float32 by" in said
    for how in ("drawn", "drawn again", "by rule"):
        first = steps["losses dreamer_v1 float32"][how][0]
        assert len(first) >= 5 and gpu.difference(first, steps["losses dreamer_v1 bf16"][how][0]) < 0.05
    assert steps["speed dreamer_v2 paper bf16"]["kernels"] > 1000
    assert steps["acting dreamer_v3"]["envs_1"]["act_ms"] > 0
    assert "killed at 1" in said and "failed: nothing" in said
    real = steps["real_run dreamer_v1"]
    assert real["dream_bytes"] > 1000 and "done" in real["torchrun"]["said"]


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
    spec, device = dreamer_v3.EnvSpec(None, 1, 1, False), torch.device("cpu")
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
    shown = "".join(path.read_text() for path in speed.MARKED)
    tables = {"speed": speed.brief()} | {name: learning.table(name) for name in learning.SETS}
    for name, table in tables.items():
        begin, end = (f"<!-- {name}:{part} -->" for part in ("begin", "end"))
        assert begin not in shown or not table or f"{begin}\n{table}\n{end}" in shown
    assert speed.table() == (ROOT / "benchmarks" / "results" / "speed" / "table.md").read_text().strip()


def test_every_result_of_the_table_was_made_by_the_command_above_it():
    for script, tasks in learning.COMMANDS.items():
        for task, seed in itertools.product(tasks, range(1, 10)):
            job = learning.Job(script, task, seed)
            if job.result.exists():
                found = json.loads(job.result.read_text())
                command = found["command"].replace(" --threads 1", "")  # which is the default now
                before = job.flags.replace(learning.BEFORE, "")  # it was the default then
                assert sorted(command.split()) in [
                    sorted(f"python {script}.py {flags}".split()) for flags in (job.flags, before)]
                assert not found["commit"].endswith("-dirty")
