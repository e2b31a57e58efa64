"""Runs in this process: what surrounds a main loop, and all that is used from Python."""

import importlib
import inspect
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from gymnasium import spaces
from PIL import Image

from common import cli, play, run
from common.disk import UserError, load_checkpoint, lock_run_dir
from common.log import Log
from common.run import Run
from common.spaces import EnvSpec
from tests.command_lines import (ENV, MAIN, TIMING, assert_says, call, flags, hashes, progress_of,
                                 read_log, run_dir_in, scalars, settings)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 24 timesteps, of which tests take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    assert call(MAIN, *flags(MAIN, steps=24), "--runs-dir", folder / "runs") == 0
    return run_dir_in(folder)


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copied"))


# ---- Curves, videos, checkpoints -----------------------------------------------------------------

def test_training_curves(tmp_path):
    assert call(MAIN, *flags(MAIN, steps=40)) == 0
    curves = scalars(run_dir_in(tmp_path))
    # CountingEnv: rewards 1 to 5; an episode ends at every sixth timestep
    assert curves["charts/episodic_return"] == [(step, 15.0) for step in range(6, 41, 6)]
    assert curves["charts/episodic_length"] == [(step, 5.0) for step in range(6, 41, 6)]
    assert [step for step, _ in curves["loss/model"]] == [20, 30, 40]
    log = read_log(run_dir_in(tmp_path))
    assert set(TIMING) <= set(log.Tags()["scalars"])
    hparams = log.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"total_timesteps" in hparams, "HPARAMS of TensorBoard compares runs"
    assert curves["charts/replay_size"][-1] == (40, 40)


@pytest.mark.parametrize("every, steps, seen", [
    (20, 50, [20, 40, 50]), (20, 40, [20, 40]), (0, 40, []), (100, 40, [40]), (4, 19, [])])
def test_videos_of_the_open_loop(tmp_path, every, steps, seen):
    """Every so often, once there has been an update, and at the end, also of a short run."""
    assert call(MAIN, *flags(MAIN, steps=steps, video_every=every)) == 0
    log = read_log(run_dir_in(tmp_path))
    images = log.Images("open_loop") if seen else []
    assert sorted({event.step for event in images}) == seen and (seen or not log.Tags()["images"])
    for event in images:
        film = Image.open(io.BytesIO(event.encoded_image_string))
        assert (film.format, film.info["loop"]) == ("GIF", 0) and film.n_frames > 1


def test_a_checkpoint_by_the_clock(tmp_path, monkeypatch):
    counted, original = [], Run.save
    monkeypatch.setattr(Run, "save", lambda self: (counted.append(self.step), original(self)))
    assert call(MAIN, *flags(MAIN, steps=20, checkpoint_every=8)) == 0
    assert counted == [0, 8, 16, 20]
    counted.clear()
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", -1)
    assert call(MAIN, *flags(MAIN, steps=5), "--runs-dir", "again") == 0
    assert counted == [0, 0, 1, 2, 3, 4, 5]


def log_of(folder: Path, step: int = 0) -> Log:
    return Log(folder, SimpleNamespace(total_timesteps=20, track=False), step, 0, True)


@pytest.mark.parametrize("saved", [0, 6])
def test_a_resume_strikes_out_what_came_after_the_checkpoint(tmp_path, saved, monkeypatch):
    """Also what a run logged that was killed before its first periodic checkpoint."""
    clock = itertools.count(1_000_000)  # event files are read in the order of their names, seconds
    monkeypatch.setattr("time.time", lambda: next(clock))
    killed = log_of(tmp_path)
    for step in range(1, 11):
        killed.scalars({"charts/a": 1.0}, step)
    killed.close()
    resumed = log_of(tmp_path, saved)
    resumed.scalars({"charts/a": 2.0}, 8)
    resumed.close()
    assert scalars(tmp_path)["charts/a"] == [*((s, 1.0) for s in range(1, saved + 1)), (8, 2.0)]


def test_plain_lines_or_a_bar_where_stderr_is_a_terminal(tmp_path, monkeypatch, capsys):
    def say() -> str:
        log = log_of(tmp_path)
        for step in (1, 2, 23):  # four environments: 20 timesteps are not a multiple
            log.progress(step, mean_return=15.0, updates=1)
        log.close()
        return capsys.readouterr().err

    line = say()
    assert line.count("\n") == 1 and "\r" not in line
    assert "timestep 1 of 20" in line and "15" in line
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = say()
    assert "\r" in bar and "/20" in bar and "timestep" not in bar


def test_weights_and_biases(tmp_path, monkeypatch):
    run_flags = flags(MAIN, steps=6, track=True, wandb_project_name="p", wandb_entity="team")
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    assert_says(call(MAIN, *run_flags), "wandb")
    assert not list(tmp_path.glob("runs/*"))
    given, at_work = {}, SimpleNamespace(finish=lambda: given.update(finished=True))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        init=lambda **all: given.update(all) or at_work))
    assert call(MAIN, *run_flags) == 0
    name = run_dir_in(tmp_path).name
    assert given.items() >= {"project": "p", "entity": "team", "name": name, "id": name,
                             "finished": True, "sync_tensorboard": True}.items()
    assert given["config"]["total_timesteps"] == 6


# ---- What goes wrong -----------------------------------------------------------------------------

def test_a_loss_that_is_not_a_number(script, tmp_path, monkeypatch):
    """At the fifth update; the last checkpoint stays as it was, even if the clock strikes."""
    module = importlib.import_module(script)
    original, calls, kept = module.world_model_loss, [], {}

    def broken(*args, **kwargs):
        losses, *rest = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == 5:
            path = run_dir_in(tmp_path) / "checkpoint.pt"
            kept[path] = path.read_bytes()
            losses["reward"] = losses["reward"] * float("nan")
            monkeypatch.setattr(run, "CHECKPOINT_SECONDS", -1)
        return losses, *rest

    monkeypatch.setattr(module, "world_model_loss", broken)
    said = call(script, *flags(script, steps=60, checkpoint_every=22))
    assert_says(said, "became nan at update 5", "--resume")
    (path, content), = kept.items()
    assert path.read_bytes() == content and progress_of(path.parent) == (22, 3)
    assert all(value.isfinite().all() for value in load_checkpoint(path.parent)["agent"].values())


def test_an_environment_that_fails_ends_the_run_saved(tmp_path):
    """In one line that names the command to go on with; so does the exit of its process."""
    for env in ("Raise", "Exit"):
        said = call(MAIN, *flags(MAIN, f"tests.fake_envs:{env}-v0"), "--runs-dir", env)
        run_dir, = (tmp_path / env).iterdir()
        assert_says(said, "saved", f"python {MAIN}.py --resume {run_dir}")
        assert progress_of(run_dir) == (3, 0)


@pytest.mark.parametrize("env", ["RaiseInit", "RaiseFirstReset"])
def test_a_run_that_cannot_begin_leaves_nothing(tmp_path, env):
    said = call(MAIN, *flags(MAIN, f"tests.fake_envs:{env}-v0"))
    assert_says(said, "no such level" if env == "RaiseInit" else "cannot reset")
    assert env == "RaiseFirstReset" or not list(tmp_path.glob("runs/*"))


def test_a_run_has_one_owner(copied):
    """Evaluations and dreams only read, so they do not ask."""
    with lock_run_dir(copied):
        assert_says(call(MAIN, "--resume", copied, "--total-timesteps", 30), "another process")
        assert call(MAIN, "--evaluate", copied, "--eval-episodes", 1) == 0
    assert call(MAIN, "--resume", copied, "--total-timesteps", 26) == 0


def change_args(run_dir: Path, **changes) -> None:
    found = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps(found | {"args": found["args"] | changes}))


def change_checkpoint(run_dir: Path, **changes) -> None:
    torch.save(load_checkpoint(run_dir) | changes, run_dir / "checkpoint.pt")


DAMAGES = {
    "a checkpoint that was cut": (lambda d: os.truncate(d / "checkpoint.pt", 5000), "damaged"),
    "an empty checkpoint": (lambda d: os.truncate(d / "checkpoint.pt", 0), "damaged"),
    "no checkpoint": (lambda d: (d / "checkpoint.pt").unlink(), "checkpoint.pt"),
    "recorded data": (lambda d: torch.save(
        {k: v for k, v in load_checkpoint(d).items() if k != "ranks"}, d / "checkpoint.pt"),
        "is of recorded data"),
    "another network": (lambda d: change_checkpoint(d, agent={}), "does not fit"),
    "other sizes": (lambda d: change_args(d, deter=16), "does not fit"),
    "another environment": (lambda d: change_args(d, env_id="CartPole-v1"), "environment"),
    "another script": (lambda d: (d / "args.json").write_text(
        '{"script": "dreamer_v9", "args": {}}'), "dreamer_v9"),
    "a newer version": (lambda d: change_args(d, gone=1), "gone"),
    "no args.json": (lambda d: (d / "args.json").unlink(), "is not a run directory"),
    "no rewards": (lambda d: (d / "replay" / "reward.npy").unlink(), "reward.npy"),
    "no images": (lambda d: (d / "replay" / "image.npy").unlink(), "image.npy"),
    "no replay": (lambda d: shutil.rmtree(d / "replay"), "older than the checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wrong_run_directory_is_one_line(copied, name):
    damage, message = DAMAGES[name]
    damage(copied)
    assert_says(call(MAIN, "--resume", copied, "--total-timesteps", 30), message)
    if name not in ("no rewards", "no images", "no replay", "recorded data"):
        assert_says(call(MAIN, "--evaluate", copied), message)


# ---- From Python ---------------------------------------------------------------------------------

def parsed(script: str, *argv):
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *argv])
        return cli.parse(module.Args, script, "")[0]


def test_args_from_python_are_those_of_the_command_line(script):
    """Defaults, what the task and the size change, and what stands there; in that order."""
    Args = importlib.import_module(script).Args
    pong = {"env_id": "PongNoFrameskip-v4"} if importlib.util.find_spec("ale_py") else {}
    small = {"size": "XXS", "deter": 16}
    for given in ({"env_id": ENV, "size": "XXS"}, {"env_id": ENV}, small | pong, pong):
        args = Args(**given)
        words = [word for name, value in given.items()
                 for word in (f"--{name.replace('_', '-')}", str(value))]
        assert parsed(script, *words) == args == Args(**asdict(args)) and "fill" not in vars(args)
        changed = replace(args, seed=5)
        assert asdict(changed) == asdict(args) | {"seed": 5}
    assert Args(env_id=ENV, size="XXS").deter != Args(env_id=ENV).deter
    assert Args(size="XXS", deter=16).deter == 16 and Args(gamma=0).gamma == 0
    with pytest.raises((TypeError, UserError), match="no_such"):
        Args(no_such=1)


def test_training_from_python(script, tmp_path, capsys):
    """And going on, in the same process, as in a notebook; Ctrl-C is Python's again."""
    module = importlib.import_module(script)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    args = module.Args(**settings(script, steps=24))
    run_dir = module.train(args)
    assert progress_of(run_dir) == (24, 5) and run_dir == run_dir_in(tmp_path)
    module.train(replace(args, total_timesteps=26), run_dir)
    assert progress_of(run_dir) == (26, 7)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    command = re.search(r"python (\S+) --evaluate", capsys.readouterr().out)[1]
    assert Path(command).stem == script, "a command that would train anew"


def test_training_in_a_thread(tmp_path):
    """Only the main thread may handle signals."""
    module, errors = importlib.import_module(MAIN), []

    def work():
        try:
            module.train(module.Args(**settings(MAIN, steps=24)))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors and progress_of(run_dir_in(tmp_path)) == (24, 5)


def test_the_first_lines_of_a_copier(script, tmp_path):
    """A world model, imagination and returns on tensors; an agent and a replay without a run."""
    m = importlib.import_module(script)
    args = m.Args(**settings(script))
    spec = EnvSpec(image_shape=None, vector_dim=3, action_dim=2, discrete=True)
    model = m.WorldModel(args, spec)
    actor = m.Actor(args, spec, args.deter + args.stoch_dim)
    deter, stoch = torch.zeros(4, args.deter), torch.zeros(4, args.stoch_dim)
    feat = m.imagine(model, actor, deter, stoch, horizon=6)
    feat = feat if torch.is_tensor(feat) else feat[0]
    assert feat.shape == (7, 4, args.deter + args.stoch_dim)
    ret = m.lambda_return(torch.ones(6, 4), torch.full((6, 4), 0.5), torch.zeros(6, 4), 0.95)
    assert ret.shape == (6, 4) and float(ret[-1, 0]) == 1 and torch.isfinite(feat).all()

    agent = m.Agent(args, spec, torch.device("cpu"))
    replay = m.ReplayBuffer(tmp_path, spec, 50, 1, 0)
    for t in range(20):
        replay.rings.append({"vector": np.full((1, 3), t), "action": np.eye(2)[[t % 2]],
                             "reward": np.ones(1), "is_first": np.array([t == 0]),
                             "is_terminal": np.zeros(1, bool)})
    carry = "carry" in inspect.signature(agent.train_step).parameters
    batch = replay.sample(args.batch_size, args.batch_length, replay.rng)
    found = agent.train_step(batch, *[agent.zero_state(args.batch_size)] * carry)
    metrics = found if isinstance(found, dict) else found[0]
    assert agent.updates == 1 and torch.isfinite(torch.stack(list(metrics.values()))).all()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", ENV])
def test_a_trained_agent_plays_in_a_program_of_ones_own(script, env_id, tmp_path):
    """Its actions are those of --evaluate, in the environment's terms."""
    assert call(script, *flags(script, env_id, steps=24, env_seed=3)) == 0
    agent = play.load(run_dir_in(tmp_path), eval_env_seed=3)
    ours = play.play(agent.args, agent.agent, 1)
    expected = [next(ours) for _ in range(5)]
    ours.close()
    torch.manual_seed(agent.args.seed + 10**6)
    observation, _ = agent.env.reset(seed=3)
    state, space = None, agent.env.action_space
    for _, unit in expected:
        action, state = agent.play(observation, state)
        assert space.contains(action), action
        if isinstance(space, spaces.Discrete):
            assert action == np.argmax(unit[0]) + space.start
        else:
            wanted = space.low + (unit[0].clip(-1, 1) + 1) / 2 * (space.high - space.low)
            np.testing.assert_allclose(action, wanted, 1e-5, 1e-5 * np.abs(space.high).max())
        observation, _, *_ = agent.env.step(action)


def test_load_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        play.load(tmp_path)


def test_learning_from_recorded_data(tmp_path, monkeypatch, capsys):
    """The lines of the README, with fewer updates; then --evaluate and --dream as after a run."""
    text = (ROOT / "README.md").read_text() + (ROOT / "tests" / "README.md").read_text()
    code = re.search(r"<!-- offline:begin -->\s*```python\n(.*?)```", text, re.S)[1]
    assert "range(20_000)" in code
    env, rows = gym.make("CartPole-v1"), []
    for episode in range(4):
        vector, _ = env.reset(seed=episode)
        reward, terminated, first = 0.0, False, True
        while True:
            action = env.np_random.integers(2)
            rows.append((vector, np.eye(2)[action] * (not terminated), reward, first, terminated))
            if terminated:
                break
            vector, reward, terminated, _, _ = env.step(action)
            first = False
    parts = {name: np.array(part) for name, part in zip(
        ("vector", "action", "reward", "is_first", "is_terminal"), zip(*rows))}
    np.savez("recorded.npz", **parts)
    Path("learn.py").write_text(code.replace("range(20_000)", "range(2)"))
    runpy.run_path("learn.py")
    run_dir, = (tmp_path / "runs").iterdir()
    replay = np.load(run_dir / "replay" / "vector.npy")
    assert replay.shape == (1, len(rows), 4) and (replay[0] == parts["vector"]).all()
    before = hashes(run_dir)
    assert call(MAIN, "--evaluate", run_dir, "--eval-episodes", 1) == 0
    assert "over 1 episodes" in capsys.readouterr().out and hashes(run_dir) == before
