"""Whole runs, as processes, of environments that misbehave, and of checkpoints from elsewhere."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from common.disk import load_checkpoint
from common.play import load
from tests.command_lines import MAIN, assert_one_line, flags
from tests.command_lines import run_dir_in as run_in


def new_run(env: str, steps: int, **changes) -> list[str]:
    return flags(MAIN, f"tests.fake_envs:{env}-v0", steps, **changes)


def rows(run_dir: Path, name: str) -> np.ndarray:
    count = load_checkpoint(run_dir)["ranks"][0]["replay"]["count"]
    return np.load(run_dir / "replay" / f"{name}.npy")[0, :count]


def assert_fails(done, *words: str) -> None:
    """With exit status 1, and a last line, perhaps behind a traceback, that has these words."""
    last = done.err.strip().split("\n")[-1]
    missing = [word for word in ("error: ", *words) if word not in last]
    assert done.code == 1 and not missing, f"{missing}\n{done}"


# ---- Environments

@pytest.mark.parametrize("fault, says", {
    "Raise": "lost the ball", "SysExit": "failed", "Exit": "its process died",
    "NanObs": "NaN", "InfReward": "-inf", "DictFlag": "__all__"}.items())
def test_an_environment_that_fails_ends_the_run_saved(cli, tmp_path, fault, says):
    """Rows 0, 1, 2 of the first episode are good. A resume starts another, if that is mended."""
    done = cli(MAIN, *new_run(fault, 20), cwd=tmp_path)
    assert_fails(done, "is saved", "--resume", f"{fault}-v0", says)
    assert "Traceback" in done.err or fault in ("SysExit", "Exit")
    assert rows(run_in(tmp_path), "vector")[:, 0].tolist() == [0, 1, 2]
    assert_fails(cli(MAIN, "--evaluate", run_in(tmp_path), cwd=tmp_path), says)
    if fault == "Raise":
        (tmp_path / "mended").touch()
        done = cli(MAIN, "--resume", run_in(tmp_path), cwd=tmp_path)
        assert done.code == 0, str(done)
        first = rows(run_in(tmp_path), "is_first").nonzero()[0].tolist()
        assert first == [0, 3, 9, 15] and load_checkpoint(run_in(tmp_path))["step"] == 20


@pytest.mark.parametrize("where, exists", [("Init", False), ("Reset", True), ("", True)])
def test_ctrl_c_twice_ends_an_environment_that_hangs(cli, tmp_path, where, exists):
    with cli.start(MAIN, *new_run(f"Hang{where}", 40), cwd=tmp_path) as running:
        running.wait_for((tmp_path / "hangs").exists)
        running.kill(signal.SIGINT)
        if exists:  # else one was enough: the run had not begun
            running.wait_for(lambda: "Stopping" in running.err.read_text())
            running.kill(signal.SIGINT)
        done = running.wait()
    assert done.code == 130 and "Traceback" not in done.err, str(done)
    assert any((tmp_path / "runs").iterdir()) == exists


@pytest.mark.parametrize("env", ["Meddling", "MeddlingInit"])
def test_an_environment_that_changes_the_directory(cli, tmp_path, env):
    """All paths are relative to where the user stands, in a folder with a space in its name."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    done = cli(MAIN, *new_run(env, 20, checkpoint_every=5), cwd=folder)
    assert done.code == 0 and f"--evaluate '{run_in(folder)}'" in done.out, str(done)
    done = cli(MAIN, "--evaluate", run_in(folder).relative_to(folder), "--eval-episodes", 12,
               "--num-envs", 3, cwd=folder)
    assert done.code == 0 and done.out.count("episode ") == 12, str(done)


def test_a_temporary_folder_with_a_long_name(tmp_path):
    """A socket's path has some 100 characters."""
    (folder := tmp_path / ("x" * 120)).mkdir()
    command = [sys.executable, ROOT / f"{MAIN}.py", "--env-id", "CartPole-v1", "--size", "XXS"]
    done = subprocess.run(command, env=os.environ | {"TMPDIR": str(folder)}, cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 1 and "set TMPDIR to a shorter path" in done.stderr, done.stderr


def test_a_script_under_another_name(cli, tmp_path, monkeypatch):
    """One with a hyphen, which is no name of a module."""
    script = tmp_path / "my-dreamer.py"
    shutil.copy(ROOT / f"{MAIN}.py", script)
    done = cli(script.with_suffix(""), *new_run("Counting", 20), cwd=tmp_path)
    assert done.code == 0, str(done)
    monkeypatch.syspath_prepend(tmp_path)
    player = load(run_in(tmp_path))
    assert player.play(player.env.reset(seed=1)[0])[0] in player.env.action_space


# ---- Films, evaluations and dreams

@pytest.mark.parametrize("kind", ["Rgb", "Float", "Gray", "Pil", "Chw"])
def test_films_of_training(cli, tmp_path, kind):
    """Whatever a frame is, it costs the film alone, or the run ends saved; no word is of a disk."""
    pytest.importorskip("moviepy")
    done = cli(MAIN, *new_run(f"Render{kind}", 50, capture_video=True), cwd=tmp_path)
    assert "disk" not in done.err.replace(str(tmp_path), ""), str(done)
    films = len([*tmp_path.rglob("*.mp4")])
    if done.code == 0:  # episodes 0 and 1
        assert films == 2, str(done)
    else:
        assert kind != "Rgb" and not assert_fails(done, "is saved", f"Render{kind}-v0")


def test_what_cannot_be_rendered_cannot_be_filmed(cli, tmp_path):
    done = cli(MAIN, *new_run("Blind", 20, capture_video=True), cwd=tmp_path)
    assert_fails(done, "cannot make", "Blind-v0", "render_mode")
    assert not any((tmp_path / "runs").iterdir())


# ---- Checkpoints from elsewhere

@pytest.fixture
def copied(cli, tmp_path):
    done = cli(MAIN, *new_run("CountingBoxVector", 20), cwd=tmp_path)
    assert done.code == 0, str(done)
    return run_in(tmp_path)


def test_checkpoint_of_a_gpu_opens_on_the_cpu(copied, cli, tmp_path):
    """As a CUDA run writes it, with the state of the CUDA generator."""
    state = load_checkpoint(copied)
    state["ranks"][0]["rng"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(state, copied / "checkpoint.pt")
    done = cli(MAIN, "--resume", copied, "--total-timesteps", 30, cwd=tmp_path)
    assert done.code == 0 and "Traceback" not in done.err, str(done)
    assert load_checkpoint(copied)["step"] == 30
    assert cli(MAIN, "--evaluate", copied, "--eval-episodes", 1, cwd=tmp_path).code == 0


def test_checkpoint_with_code_in_it(copied, cli, tmp_path):
    """weights_only: what a stranger's file would run is not run."""
    trap = tmp_path / "trap"
    torch.save(load_checkpoint(copied) | {"trap": Trap(trap)}, copied / "checkpoint.pt")
    for mode in ("--resume", "--evaluate", "--dream"):
        assert_one_line(cli(MAIN, mode, copied, cwd=tmp_path), "checkpoint.pt")
    assert not trap.exists()


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
