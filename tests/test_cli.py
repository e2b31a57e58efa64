"""What a user meets at the command line.

Signals need processes of their own (`Runner` in conftest.py); what needs none runs in this one.
"""

import importlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS
from PIL import Image

from common.disk import load_checkpoint
from tests.command_lines import (ENV, MAIN, assert_identical, assert_says, call, flags, hashes,
                                 progress_of, read_log, run_dir_in, scalars)


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
            done = cli(script, *flags(script, steps=40), cwd=folder)
            assert done.code == 0, str(done)
            made[script] = run_dir_in(folder), done
        return made[script]

    return train


@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained(MAIN)[0], tmp_path / "run"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_from_beginning_to_end(script, trained, tmp_path, monkeypatch, capsys):
    """Trains, and again, bit for bit; goes on; plays, twice the same; dreams."""
    monkeypatch.chdir(tmp_path)
    run_dir, done = trained(script)
    assert not [word for word in ("Warning", "Traceback", "\r") if word in done.err], done.err
    before, files = scalars(run_dir), hashes(run_dir)
    norms = {f"grad_norm/{name}" for name in load_checkpoint(run_dir)["optimizers"]}
    assert {"loss/image", "loss/reward", "loss/actor", "loss/critic"} | norms <= before.keys()
    assert all(np.isfinite([value for _, value in curve]).all() for curve in before.values())

    assert call(script, *flags(script, steps=40)) == 0
    assert scalars(run_dir_in(tmp_path)) == before
    assert_identical(load_checkpoint(run_dir_in(tmp_path)), load_checkpoint(run_dir))

    copied = Path(shutil.copytree(run_dir, tmp_path / "copied"))
    assert call(script, "--resume", copied, "--total-timesteps", 52) == 0
    assert progress_of(copied) == (52, 33)
    after = scalars(copied)
    assert all(after[tag][:len(curve)] == curve for tag, curve in before.items())
    assert [step for step, _ in after["loss/actor"]] == [20, 30, 40, 50]

    said = []
    for _ in range(2):
        capsys.readouterr()
        assert call(script, "--evaluate", run_dir, "--eval-episodes", 3, "--num-envs", 2) == 0
        size = importlib.import_module(script).Args.size  # the default, which is not the run's
        assert_says(call(script, "--evaluate", run_dir, "--size", size), f"--size {size} does not")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and re.findall(r"return ([\d.]+)", said[0]) == ["15"] * 3
    assert re.search(r"mean 15\b.*deviation 0\b.*over 3 episodes", said[0])
    assert hashes(run_dir) == files

    before = hashes(copied)
    assert call(script, "--dream", copied, "--dream-context", 2, "--dream-horizon", 3) == 0
    made = hashes(copied).keys() - before.keys()
    assert made == {"videos/dream.gif", "videos/dream.png"}
    assert hashes(copied).items() > before.items()
    with Image.open(copied / "videos" / "dream.gif") as film:
        assert film.n_frames == 5 and min(film.size) > 50


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("env", ["BoxVector", "Image"])
def test_other_kinds_of_environment(script, tmp_path, monkeypatch, env):
    """Vectors and continuous actions; images only, two environments; videos and dreams."""
    monkeypatch.chdir(tmp_path)
    assert call(script, *flags(script, f"tests.fake_envs:Counting{env}-v0", 28, video_every=14,
                               num_envs=2 if env == "Image" else 1)) == 0
    run_dir = run_dir_in(tmp_path)
    assert {image.step for image in read_log(run_dir).Images("open_loop")} == {28}
    for who in ("recorded", "agent"):
        assert call(script, "--dream", run_dir, "--dream-context", 2, "--dream-horizon", 3,
                    "--dream-actions", who) == 0
    assert len(list(run_dir.glob("videos/dream*"))) == 4


def test_films_of_training_and_of_an_evaluation(tmp_path, monkeypatch):
    pytest.importorskip("moviepy")
    monkeypatch.chdir(tmp_path)
    assert call(MAIN, *flags(MAIN, steps=10, capture_video=True, action_repeat=2)) == 0
    videos = run_dir_in(tmp_path) / "videos"
    names = {path.name for path in videos.rglob("*.mp4")}
    assert names == {"film-episode-0.mp4", "film-episode-1.mp4"}
    shutil.rmtree(videos)
    assert call(MAIN, "--evaluate", run_dir_in(tmp_path), "--eval-episodes", 2) == 0
    assert not videos.exists(), "the run was filmed, which says nothing of an evaluation"
    evaluate = ["--evaluate", run_dir_in(tmp_path), "--eval-episodes", 4, "--capture-video"]
    assert call(MAIN, *evaluate) == 0
    films = [[cv2.VideoCapture(str(path)).get(what) for path in videos.rglob("*.mp4")]
             for what in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS)]
    assert len(films[0]) >= 4 and min(films[0]) > 0 and {*films[1]} == {15.0}, films  # 30 / 2


# ---- Processes, signals, paths -------------------------------------------------------------------

def test_a_run_without_our_runner_in_a_path_with_spaces(trained, tmp_path):
    """The same numbers as with the tests' fork server; and its hint is a command that works."""
    folder = tmp_path / "a place with spaces"
    folder.mkdir()
    shutil.copy(ROOT / f"{MAIN}.py", folder)
    shutil.copytree(ROOT / "common", folder / "common")
    (folder / "my_env.py").write_text((ROOT / "tests" / "fake_envs.py").read_text())
    command = [sys.executable, f"{folder}/{MAIN}.py", *flags(MAIN, "my_env:Counting-v0"),
               "--runs-dir", "my runs"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run_dir, = (folder / "my runs").iterdir()
    assert scalars(run_dir) == scalars(trained(MAIN)[0])
    hint = next(line for line in done.stdout.split("\n") if "--evaluate" in line)
    command = [sys.executable, *shlex.split(hint)[1:], "--eval-episodes", "1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "over 1 episodes" in done.stdout, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_resumes(cli, tmp_path, number):
    """SIGTERM is what a cluster sends. Exit status 0, and the command to go on is printed."""
    with cli.start(MAIN, *flags(MAIN, steps=100_000, buffer_size=500), cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > 30)
        running.kill(number)
        done = running.wait()
    assert done.code == 0 and "Traceback" not in done.err, str(done)
    run_dir = run_dir_in(tmp_path)
    step, updates = progress_of(run_dir)
    assert step == np.load(run_dir / "replay" / "rows.npy")[1] > 30 and updates == step - 19
    words = shlex.split(done.out[done.out.index("--resume"):].split("\n")[0])
    assert words[:2] == ["--resume", str(run_dir)]
    assert call(MAIN, *words[:2], "--total-timesteps", step + 5) == 0
    assert progress_of(run_dir) == (step + 5, updates + 5)


def test_a_stop_in_the_middle_of_many_updates(cli, tmp_path):
    """What was due remains due. A second Ctrl-C would not wait for the save."""
    with cli.start(MAIN, *flags(MAIN, steps=24, pretrain=400), cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) >= 20)
        running.kill(signal.SIGTERM)
        done = running.wait()
    run_dir = run_dir_in(tmp_path)
    step, updates = progress_of(run_dir)
    assert done.code == 0 and step == 20 and updates < 400, str(done)
    assert call(MAIN, "--resume", run_dir) == 0
    assert progress_of(run_dir) == (24, 404)


def test_an_environment_next_to_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near_env.py").write_text(
        "import gymnasium as gym\nfrom tests.fake_envs import CountingEnv\n"
        "gym.register('Near-v0', entry_point=CountingEnv)\n")
    assert call(MAIN, *flags(MAIN, "near_env:Near-v0", 12)) == 0


# ---- Flags ---------------------------------------------------------------------------------------

def shown(script: str, capsys, *words: str) -> dict[str, str]:
    """The default of each flag as --help shows it."""
    assert call(script, *words, "--help") == 0
    text = re.sub(r"[^\w\s().:,/'+-]", " ", re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out))
    parts = re.split(r"\s--(?:no-)?([a-z][a-z-]+)(?=[\s,])", text)
    found = {}
    for name, part in zip(parts[1::2], parts[2::2]):
        if default := re.search(r"\(default:\s+([^)]*?)\s*\)", part):
            found.setdefault(name, default[1])
    return found


def test_help_shows_the_values_that_will_be_used(script, capsys):
    Args = importlib.import_module(script).Args
    given = [{}, {"env_id": ENV, "size": "XXS"}]
    if importlib.util.find_spec("ale_py"):
        given.append({"env_id": "ALE/Pong-v5"})
    seen = []
    for fields in given:
        words = [word for name, value in fields.items()
                 for word in (f"--{name.replace('_', '-')}", value)]
        found, args = shown(script, capsys, *words), Args(**fields)
        for name in ("deter", "batch-length", "action-repeat", "env-id", "size", "log-every"):
            assert found[name] == str(getattr(args, name.replace("-", "_"))), name
        assert float(found["train-ratio"]) == args.train_ratio
        seen.append(found["deter"])
    assert seen[0] != seen[1]


WRONG = {
    "unknown id": (["--env-id", "CartPol-v1"], ["CartPol-v1", "CartPole"]),
    "unknown id of a module": (["--env-id", "tests.fake_envs:Nothing-v0"],
                               ["fake_envs", "Nothing-v0"]),
    "missing module": (["--env-id", "no_such_module:Env-v0"], ["no_such_module"]),
    "unsupported action": (["--env-id", "tests.alignment_envs:Unbounded-v0"],
                           ["Box(-inf, inf", "not supported"]),
    "negative rate": (["--model-lr", "-0.1"], ["--model-lr", "-0.1"]),
    "infinite rate": (["--actor-lr", "inf"], ["--actor-lr", "inf"]),
    "no rate": (["--critic-lr", "nan"], ["--critic-lr", "nan"]),
    "negative ratio": (["--train-ratio", "-1"], ["--train-ratio", "-1"]),
    "gamma of one and more": (["--gamma", "1.5"], ["--gamma", "1"]),
    "no environment": (["--num-envs", "0"], ["--num-envs is 0", "1"]),
    "negative interval": (["--video-every", "-1"], ["--video-every", "-1"]),
    "sequence of one": (["--batch-length", "1"], ["--batch-length"]),
    "no JSON": (["--env-kwargs", "{bad"], ["--env-kwargs is JSON", "continuous"]),
    "no object": (["--env-kwargs", "[1]"], ["--env-kwargs is JSON"]),
    "no run directory": (["--resume", "no where"], ["no where is not a run directory"]),
    "an empty name": (["--evaluate", ""], ["is not a run directory"]),
    "a seed beyond 64 bits": (["--seed", str(2**64)], ["--seed", "9,007,199,254,740,992"]),
    "two commands": (["--dream", "a", "--evaluate", "b"], ["--evaluate and --dream are two"]),
    "nothing to evaluate": (["--evaluate", "nowhere"], ["nowhere is not a run directory"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_one_line(script, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    given, words = WRONG[name]
    if given[0].endswith("-lr") and not hasattr(importlib.import_module(script).Args, "model_lr"):
        given, words = ["--lr", given[1]], ["--lr", given[1]]  # one rate for everything
    assert_says(call(script, *flags(script), *given), *words)
    assert not list(tmp_path.glob("runs/*")), "a failed start leaves a run directory"


@pytest.mark.parametrize("given, words", [
    (["--image-size", "60"], ["--image-size", "64"]), (["--bins", "1"], ["--bins"]),
    (["--return-norm-high", "950"], ["--return-norm"])])
def test_what_only_v3_has(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    assert_says(call(MAIN, *flags(MAIN), *given), *words)


@pytest.mark.parametrize("given", [["--no-such-flag", "1"], ["--batch-size", "many"],
                                   ["--size", "XXXL"]])
def test_mistakes_that_the_parsers_find(capsys, given):
    code = call(MAIN, *given)
    out, err = capsys.readouterr()
    assert code not in (0, None) and given[0] in f"{code}{out}{err}" and "Traceback" not in err


@pytest.mark.parametrize("given", [
    ["--env-id", "CartPole-v1"], ["--deter", "16"], ["--num-envs", "2"], ["--batch-size", "1"],
    ["--train-ratio", "9999"],  # would owe thousands of updates at once
    ["--clip-rewards", "clip"], ["--pixels"], ["--action-repeat", "2"],
    ["--env-kwargs", '{"a": 1}'], ["--max-episode-steps", "7"], ["--env-seed", "0"]])
def test_a_resume_refuses_what_fixes_rows_networks_or_pace(copied, given):
    before = hashes(copied)
    assert_says(call(MAIN, "--resume", copied, *given), given[0], str(copied))
    assert hashes(copied) == before


def test_a_resume_may_change_every_rate(script, trained, tmp_path):
    copied = Path(shutil.copytree(trained(script)[0], tmp_path / "run"))
    rates = [name for name in vars(importlib.import_module(script).Settings) if name.endswith("lr")]
    given = [word for name in rates for word in (f"--{name.replace('_', '-')}", 1e-5)]
    assert rates and call(script, "--resume", copied, *given) == 0


def test_a_resume_takes_the_rest_and_remembers_it(copied):
    assert call(MAIN, "--resume", copied, "--total-timesteps", 41, "--log-every", 5,
                "--actor-lr", 1e-5) == 0
    kept = json.loads((copied / "args.json").read_text())["args"]
    assert kept.items() >= {"total_timesteps": 41, "log_every": 5, "actor_lr": 1e-5,
                            "deter": 8}.items()
    assert "resume" not in kept and progress_of(copied) == (41, 22)


def test_no_two_parts_of_a_run_get_the_same_seed_for_its_environments(tmp_path, monkeypatch):
    """An evaluation on the episodes of the training would flatter, a resume would repeat them."""
    seeds, module = [], importlib.import_module(MAIN)
    for place in (module, importlib.import_module("common.play")):
        original = place.Envs
        monkeypatch.setattr(place, "Envs", lambda config, number, seed, original=original: (
            seeds.append(seed), original(config, number, seed))[1])
    monkeypatch.chdir(tmp_path)
    assert call(MAIN, *flags(MAIN, steps=6)) == 0
    for steps in (12, 18):
        assert call(MAIN, "--resume", run_dir_in(tmp_path), "--total-timesteps", steps) == 0
    assert call(MAIN, "--evaluate", run_dir_in(tmp_path), "--eval-episodes", 1) == 0
    assert len(seeds) == len({*seeds}) == 4
