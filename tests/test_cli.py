"""What a user meets at the command line, in processes of their own (`Runner` in conftest.py).

What needs no script, such as a damaged run directory, is in test_runs.py.
"""

import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS
from gymnasium import spaces
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import play
from common.cli import for_task
from common.files import UserError
from tests.command_lines import (MAIN, TIMING, assert_identical, assert_one_line, load, progress_of, run_dir_in,
                                 scalars, tiny_run)

ENV = "fake_envs:Counting"


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_written(folder: Path) -> int:
    """By a run that is under way."""
    try:
        return int(np.load(next(folder.glob("runs/*/replay/rows.npy")))[1])
    except (StopIteration, OSError, ValueError):
        return 0


# ---- Every script, from beginning to end ---------------------------------------------------------

@pytest.fixture(scope="module")
def trained(cli, tmp_path_factory):
    """script -> its run of 40 timesteps, and what it said; tests that write to it take a copy."""
    made = {}

    def train(script):
        if script not in made:
            folder = tmp_path_factory.mktemp(script)
            done = cli(script, *tiny_run(script, ENV, 40, "--capture-video"), cwd=folder)
            assert done.code == 0, str(done)
            made[script] = run_dir_in(folder), done
        return made[script]

    return train


@pytest.fixture
def copied(trained, tmp_path):
    return Path(shutil.copytree(trained(MAIN)[0], tmp_path / "run"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_from_beginning_to_end(script, trained, cli, tmp_path):
    """Trains, and again, bit for bit; goes on; plays, twice the same; dreams; learns from the recording."""
    run_dir, done = trained(script)
    assert "Warning" not in done.err and "Traceback" not in done.err, done.err
    before, files = scalars(run_dir), hashes(run_dir)
    assert {"loss/model", "loss/image", "loss/reward", "loss/actor", "loss/critic", "grad_norm/model",
            "grad_norm/actor", "grad_norm/critic"} <= before.keys()
    assert all(np.isfinite([value for _, value in curve]).all() for curve in before.values())

    again = cli(script, *tiny_run(script, ENV, 40), cwd=tmp_path)
    assert again.code == 0 and scalars(run_dir_in(tmp_path)) == before, str(again)
    assert_identical(load(run_dir_in(tmp_path), script), load(run_dir, script))

    copied = shutil.copytree(run_dir, tmp_path / "copied")
    done = cli(script, "--resume", copied, "--total-timesteps", 52, cwd=tmp_path)
    assert done.code == 0 and progress_of(copied, script)[0] == 52, str(done)
    after = scalars(copied)
    assert all(after[tag][:len(curve)] == curve for tag, curve in before.items()), "the past was changed"
    assert [step for step, _ in after["loss/model"]] == [20, 30, 40, 50]

    once, twice = (cli(script, "--evaluate", run_dir, "--eval-episodes", 2, cwd=tmp_path) for _ in range(2))
    assert once.code == 0 and once.err == "" and once.out == twice.out and "mean 15" in once.out, str(once)
    assert hashes(run_dir) == files

    dreams = cli(script, "--dream", copied, "--dream-context", 2, "--dream-horizon", 3, cwd=tmp_path)
    assert dreams.code == 0 and len(list(copied.glob("videos/dream.*"))) == 2, str(dreams)
    offline = cli(script, *tiny_run(script, ENV, 12), "--offline", run_dir, "--runs-dir", "offline", cwd=tmp_path)
    assert offline.code == 0 and hashes(run_dir) == files, str(offline)
    assert progress_of(next(tmp_path.glob("offline/*")), script)[1] > 0


def test_an_evaluation_is_filmed_if_that_is_asked_for(copied, cli, tmp_path):
    """The run was, which says nothing of an evaluation."""
    once, filmed = (cli(MAIN, "--evaluate", copied, "--eval-episodes", 2, *flags, cwd=tmp_path)
                    for flags in ((), ("--capture-video",)))
    assert once.code == 0 and once.out == filmed.out, str(filmed)
    films = sorted(path.name for path in copied.glob("videos/evaluation*"))
    assert films == ["evaluation-000000.mp4", "evaluation-000001.mp4"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("env", ["BoxVector", "Image"])
def test_other_kinds_of_environment(script, cli, tmp_path, env):
    """Vectors and continuous actions; images only, two environments; videos in the log and a dream."""
    flags = ["--num-envs", 2] if env == "Image" else []
    done = cli(script, *tiny_run(script, ENV + env, 24, *flags, video_every=12), cwd=tmp_path)
    assert done.code == 0 and "Traceback" not in done.err, str(done)
    run_dir = run_dir_in(tmp_path)
    assert [image.step for image in EventAccumulator(str(run_dir)).Reload().Images("open_loop")] == [24]
    dreams = cli(script, "--dream", run_dir, "--dream-context", 2, "--dream-horizon", 3, cwd=tmp_path)
    assert dreams.code == 0 and len(list(run_dir.glob("videos/*"))) == 2, str(dreams)


# ---- One script: what it leaves behind -----------------------------------------------------------

def test_run_directory(trained):
    run_dir, done = trained(MAIN)
    label = re.fullmatch(rf"tests\.fake_envs_Counting-v0__{MAIN}__1__\d{{8}}-\d{{6}}", run_dir.name)
    assert label and str(run_dir.relative_to(run_dir.parents[1])) in done.out
    names = {path.name for path in run_dir.iterdir()}
    assert {"args.json", "checkpoint.pt", "replay", "videos"} <= names
    assert [name for name in names if name.startswith("events.out.tfevents")]
    assert not list(run_dir.rglob("*.tmp"))
    assert {path.stem for path in (run_dir / "replay").glob("*.npy")} >= {"action", "reward", "image", "vector"}
    saved = json.loads((run_dir / "args.json").read_text())
    assert saved["script"] == MAIN and saved["args"]["deter"] == 8
    assert progress_of(run_dir) == (40, 21)
    assert [path for path in (run_dir / "videos").glob("episode-*.mp4") if path.stat().st_size]


def test_training_curves(trained):
    curves = scalars(trained(MAIN)[0])
    # CountingEnv: rewards 1 to 5; an episode ends at every sixth timestep
    assert curves["charts/episodic_return"] == [(step, 15.0) for step in range(6, 41, 6)]
    assert curves["charts/episodic_length"] == [(step, 5.0) for step in range(6, 41, 6)]
    assert [step for step, _ in curves["loss/model"]] == [20, 30, 40]
    assert set(TIMING) <= set(EventAccumulator(str(trained(MAIN)[0])).Reload().Tags()["scalars"])


def test_same_numbers_without_the_fork_server_and_others_with_another_seed(trained, cli, tmp_path):
    command = [sys.executable, str(ROOT / f"{MAIN}.py"), *tiny_run(MAIN, ENV, 40)]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = scalars(trained(MAIN)[0])
    assert scalars(run_dir_in(tmp_path)) == expected
    other = cli(MAIN, *tiny_run(MAIN, ENV, 40), "--seed", 2, "--runs-dir", "other/runs", cwd=tmp_path)
    assert other.code == 0 and scalars(run_dir_in(tmp_path / "other"))["loss/model"] != expected["loss/model"]


def test_terminated_run_is_saved_and_resumes(cli, tmp_path):
    """SIGTERM, as a cluster sends it: exit status 0, everything saved, the command to go on printed."""
    with cli.start(MAIN, *tiny_run(MAIN, ENV, 100_000, buffer_size=500), cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > 30)
        running.kill(signal.SIGTERM)
        done = running.wait()
    assert done.code == 0 and "Traceback" not in done.err, str(done)
    run_dir = run_dir_in(tmp_path)
    printed = re.search(rf"python \S*{MAIN}\.py --resume (\S+)", done.out)
    assert printed and (tmp_path / printed[1]).resolve() == run_dir.resolve(), str(done)
    step, updates = progress_of(run_dir)
    assert step == np.load(run_dir / "replay" / "rows.npy")[1] > 30 and updates == step - 19
    again = cli(MAIN, "--resume", printed[1], "--total-timesteps", step + 5, cwd=tmp_path)
    assert again.code == 0 and progress_of(run_dir) == (step + 5, updates + 5), str(again)


def test_a_stop_in_the_middle_of_many_updates(cli, tmp_path):
    """`--pretrain` of V1 is a quarter of an hour on a CPU; what is due stays due."""
    with cli.start(MAIN, *tiny_run(MAIN, ENV, 24), "--pretrain", 400, cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) >= 20)
        running.kill(signal.SIGTERM)
        done = running.wait()
    run_dir = run_dir_in(tmp_path)
    step, updates = progress_of(run_dir)
    assert done.code == 0 and step == 20 and updates < 400, str(done)
    assert cli(MAIN, "--resume", run_dir, cwd=tmp_path).code == 0
    assert progress_of(run_dir) == (24, 404)


def test_an_explicit_none_is_what_the_run_has(trained, cli, tmp_path):
    """Of a value that the kind of actions had filled in (TASKS), and which no preset of the size has."""
    for script, flag in (("dreamer_v1", "--sticky"), ("dreamer_v2", "--pcont")):
        run_dir = tmp_path / script
        shutil.copytree(trained(script)[0], run_dir)
        before = json.loads((run_dir / "args.json").read_text())["args"]
        done = cli(script, "--resume", run_dir, flag, "None", "--total-timesteps", 41, cwd=tmp_path)
        assert done.code == 0 and int(np.load(run_dir / "replay" / "rows.npy")[1]) == 41, str(done)
        after = json.loads((run_dir / "args.json").read_text())["args"]
        assert after[flag[2:]] == before[flag[2:]] is not None


def test_killed_between_checkpoints_with_a_short_ring(cli, tmp_path):
    """A checkpoint at 30, rows up to 60 and more written, a ring of 12: nothing of it is left."""
    done = cli(MAIN, *tiny_run(MAIN, ENV, 30, buffer_size=12), cwd=tmp_path)
    assert done.code == 0, str(done)
    run_dir = run_dir_in(tmp_path)
    checkpoint = (run_dir / "checkpoint.pt").read_bytes()
    assert cli(MAIN, "--resume", run_dir, "--total-timesteps", 70, cwd=tmp_path).code == 0
    (run_dir / "checkpoint.pt").write_bytes(checkpoint)  # as if killed at 70
    done = cli(MAIN, "--resume", run_dir, "--total-timesteps", 80, cwd=tmp_path)
    assert done.code == 0 and progress_of(run_dir)[0] == 80, str(done)


def test_evaluate_prints_every_return(trained, cli, tmp_path):
    done = cli(MAIN, "--evaluate", trained(MAIN)[0], "--eval-episodes", 3, "--eval-env-seed", 7, cwd=tmp_path)
    assert re.findall(r"return ([\d.]+)", done.out) == ["15"] * 3
    last = done.out.strip().split("\n")[-1]
    assert re.search(r"mean 15\b", last) and re.search(r"deviation 0\b", last) and "3 episodes" in last
    assert not list(tmp_path.iterdir())


def test_a_resume_says_that_its_replay_stays_small(copied, cli, tmp_path):
    same, grown = (cli(MAIN, "--resume", copied, "--total-timesteps", steps, cwd=tmp_path)
                   for steps in (40, 41))
    assert "replay buffer: 40 timesteps" in same.out and "note: the replay" not in same.out
    assert "note: the replay keeps the size that it was made with, 40 timesteps" in grown.out


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "tests.fake_envs:Counting-v0"])
def test_a_trained_agent_plays_in_a_program_of_ones_own(script, cli, env_id, tmp_path):
    """Three lines of the README: the actions are those of --evaluate, in the environment's terms."""
    done = cli(script, *tiny_run(script, ENV, 30), "--env-id", env_id, cwd=tmp_path)
    assert done.code == 0, str(done)
    run_dir = run_dir_in(tmp_path)
    agent = play.load(run_dir, env_seed=3)
    ours = play.play(agent.args, agent.agent, 1, env_seed=3)
    expected = [next(ours) for _ in range(9)]
    torch.manual_seed(agent.args.seed + 10**6)
    observation, _ = agent.env.reset(seed=3)
    state = None
    for _, obs, unit in expected:
        action, state = agent.play(observation, state)
        assert agent.env.action_space.contains(action), action
        space = agent.env.action_space
        wanted = (np.argmax(unit[0]) + space.start if isinstance(space, spaces.Discrete)
                  else space.low + (unit[0].clip(-1, 1) + 1) / 2 * (space.high - space.low))
        if obs.is_last[0]:
            break
        np.testing.assert_allclose(action, wanted, rtol=1e-6, atol=1e-6)
        observation, _, terminated, truncated, _ = agent.env.step(action)


def test_load_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        play.load(tmp_path)
    (tmp_path / "args.json").write_text('{"format": 2, "script": "os.path", "args": {}}')
    with pytest.raises(UserError, match="names the script 'os.path'"):
        play.load(tmp_path)


def test_dream_writes_pictures(copied, cli, tmp_path):
    before = hashes(copied)
    done = cli(MAIN, "--dream", copied, "--dream-context", 2, "--dream-horizon", 3, cwd=tmp_path)
    assert done.code == 0, str(done)
    after = hashes(copied)
    made = after.keys() - before.keys()
    assert {Path(name).suffix for name in made} == {".gif", ".png"}
    assert {name: after[name] for name in before} == before
    for name in made:
        assert Path(name).name in done.out
        with Image.open(copied / name) as image:
            assert min(image.size) > 50
            if image.format == "GIF":
                assert image.n_frames == 5


def test_offline_only_reads(copied, cli, tmp_path):
    """Also where it may not write; no environment step is taken, and there is nothing to wait for."""
    replay = copied / "replay"
    for path in (*replay.iterdir(), replay):
        path.chmod(0o555)
    done = cli(MAIN, *tiny_run(MAIN, ENV, 12), "--offline", copied, cwd=tmp_path)
    assert done.code == 0 and progress_of(run_dir_in(tmp_path)) == (12, 12), str(done)
    assert "charts/episodic_return" not in scalars(run_dir_in(tmp_path))
    replay.chmod(0o755)
    (replay / "vector.npy").unlink()
    done = cli(MAIN, *tiny_run(MAIN, ENV, 12), "--offline", copied, "--runs-dir", "again", cwd=tmp_path)
    assert_one_line(done, "vector.npy", "missing")
    assert not (replay / "vector.npy").exists() and not list(tmp_path.glob("again/*"))


# ---- Mistakes ------------------------------------------------------------------------------------

BAD = {
    "unknown id": (["--env-id", "CartPol-v1"], ["CartPol-v1", "CartPole"]),
    "missing module": (["--env-id", "no_such_module:Env-v0"], ["no_such_module"]),
    "negative learning rate": (["--model-lr", "-0.1"], ["--model-lr", "-0.1"]),
    "odd image size": (["--image-size", "60"], ["--image-size", "64"]),
    "tiny buffer": (["--buffer-size", "4"], ["--batch-length", "--buffer-size"]),
    "short run": (["--total-timesteps", "4"], ["--batch-length", "--total-timesteps"]),
    "gamma of one and more": (["--gamma", "1.5"], ["--gamma", "1"]),
    "one bucket": (["--bins", "1"], ["--bins"]),
    "over a hundred percent": (["--return-norm-high", "950"], ["--return-norm-high", "at most 100"]),
    "sequence of one": (["--batch-length", "1"], ["--batch-length", "at least 2"]),
    "no recording": (["--offline", "nowhere"], ["nowhere"]),
    "env that cannot be built": (["--env-id", "tests.fake_envs:RaiseInit-v0"], ["RaiseInit", "level"]),
    "unsupported action": (["--env-id", "tests.alignment_envs:Unbounded-v0"], ["Box(-inf, inf", "not supported"]),
    "old name": (["--horizon", "3"], ["--horizon is now --imag-horizon"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flag(cli, tmp_path, name):
    flags, words = BAD[name]
    assert_one_line(cli(MAIN, *tiny_run(MAIN, ENV, 40), *flags, cwd=tmp_path), *words)
    assert not list(tmp_path.glob("runs/*")), "a failed start leaves a run directory"


def test_an_environment_next_to_where_the_user_stands(cli, tmp_path):
    """The message of a missing module says "run from its folder?"; so that has to help."""
    (tmp_path / "my_env.py").write_text(
        "import gymnasium as gym\nfrom tests.fake_envs import CountingEnv\n"
        "gym.register('Mine-v0', entry_point=CountingEnv)\n")
    done = cli(MAIN, *tiny_run(MAIN, ENV, 12), "--env-id", "my_env:Mine-v0", cwd=tmp_path)
    assert done.code == 0, str(done)


@pytest.mark.parametrize("flags", [["--no-such-flag", "1"], ["--batch-size", "many"], ["--size", "XXXL"]])
def test_mistakes_that_tyro_finds(cli, tmp_path, flags):
    done = cli(MAIN, *flags, cwd=tmp_path)
    assert done.code == 2 and "Traceback" not in done.err and flags[0] in done.out + done.err, str(done)


@pytest.mark.parametrize("flags", [
    ["--env-id", "Other-v0"], ["--deter", "16"], ["--num-envs", "2"], ["--batch-size", "1"],
    ["--train-ratio", "9999"],  # would owe thousands of updates at once
    ["--clip-rewards", "clip"], ["--pixels"], ["--action-repeat", "2"]])
def test_flags_that_a_resume_cannot_change(copied, cli, tmp_path, flags):
    assert_one_line(cli(MAIN, "--resume", copied, *flags, cwd=tmp_path), "does not fit", *flags)


def test_a_run_of_another_script(copied, cli, tmp_path):
    saved = json.loads((copied / "args.json").read_text())
    (copied / "args.json").write_text(json.dumps(saved | {"script": "dreamer_v9"}))
    assert_one_line(cli(MAIN, "--resume", copied, cwd=tmp_path), "python dreamer_v9.py")


def test_a_full_disk_at_the_start(cli, tmp_path):
    """A limit on the size of files stands in for it: the replay buffer does not fit."""
    done = cli(MAIN, *tiny_run(MAIN, ENV, 40_000), cwd=tmp_path, file_limit=2_000_000)
    assert_one_line(done, "cannot write", "image.npy", "GiB")


def test_a_full_disk_later(copied, cli, tmp_path):
    """The checkpoint does not fit any more: the one before is intact, and the run can go on."""
    before = (copied / "checkpoint.pt").read_bytes()
    events = sum(path.stat().st_size for path in copied.glob("events*"))
    limit = max(20_000, events)
    assert len(before) > limit, "make the network larger"
    done = cli(MAIN, "--resume", copied, "--total-timesteps", 46, cwd=tmp_path, file_limit=limit)
    assert_one_line(done, "cannot write", "checkpoint.pt", "intact")
    assert (copied / "checkpoint.pt").read_bytes() == before
    done = cli(MAIN, "--resume", copied, "--total-timesteps", 46, cwd=tmp_path)
    assert done.code == 0 and progress_of(copied) == (46, 27), str(done)


@pytest.mark.parametrize("script", SCRIPTS)
def test_loss_that_is_not_a_number(script, tmp_path, monkeypatch):
    """In this process: the loss breaks at the fifth update; the last checkpoint stays as it was."""
    module = __import__(script)
    original, calls, kept = module.world_model_loss, [], {}

    def broken(*args, **kwargs):
        losses, *rest = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == 5:
            path = next(tmp_path.glob("*/checkpoint.pt"))
            kept[path] = path.read_bytes()
            losses["reward"] = losses["reward"] * float("nan")
        return losses, *rest

    monkeypatch.setattr(module, "world_model_loss", broken)
    flags = tiny_run(script, ENV, 60, "--runs-dir", tmp_path, "--checkpoint-every", 22)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as raised:
        module.main()
    assert re.match(r"error: loss/\w+ became nan at update 5;.*--resume", str(raised.value.code))
    (path, content), = kept.items()
    assert path.read_bytes() == content and progress_of(path.parent, script) == (22, 3)
    assert all(value.isfinite().all() for value in load(path.parent, script)["agent"].values())


def test_a_video_that_cannot_be_written_costs_nothing(cli, tmp_path):
    """The ninth episode's, in the middle of training: the run stops, and what was learnt is saved."""
    run = tiny_run(MAIN, "fake_envs:Shrinking", 300, "--capture-video")
    assert_one_line(cli(MAIN, *run, cwd=tmp_path), "recording.mp4", "(1, 1)", "the state is saved")
    assert progress_of(run_dir_in(tmp_path)) == (49, 30)
    done = cli(MAIN, "--resume", run_dir_in(tmp_path), "--total-timesteps", 70, cwd=tmp_path)
    assert done.code == 0, str(done)  # a new environment, that is at episode 0
    assert progress_of(run_dir_in(tmp_path)) == (70, 51)


def test_a_run_too_short_for_an_update_says_so(cli, tmp_path):
    done = cli(MAIN, *tiny_run(MAIN, ENV, 19), cwd=tmp_path)
    assert done.code == 0 and "--learning-starts" in done.out, str(done)
    assert progress_of(run_dir_in(tmp_path)) == (19, 0)


@pytest.mark.parametrize("env_id, said", [
    ("CartPole-v1", ()), (f"tests.{ENV}-v0", ("grayscale",)), ("ALE/Pong-v5", ("grayscale", "sticky"))])
def test_the_start_says_what_the_kind_of_actions_sets_and_has_an_effect(env_id, said, capsys):
    if "ALE" in env_id:
        pytest.importorskip("ale_py")
    module = importlib.import_module("dreamer_v2")
    args = for_task(module.Args(env_id=env_id), module.TASKS)
    line = capsys.readouterr().out
    assert args.grayscale and args.sticky and line.startswith("discrete actions, so: deter 600")
    assert [name for name in ("grayscale", "sticky") if name in line] == [*said]
