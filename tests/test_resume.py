"""A run that is stopped, killed or out of disk space goes on exactly where its checkpoint says."""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import SCRIPTS

from common.disk import load_checkpoint
from common.spaces import EnvSpec
from tests.command_lines import (MAIN, assert_identical, assert_one_line, assert_says, call, flags,
                                 progress_of, run_dir_in, scalars)
from tests.resume_envs import LENGTH, check_rows, life_of


def last_checkpoint(folder: Path) -> int:
    """When it was written, in nanoseconds; 0: there is none."""
    return max([path.stat().st_mtime_ns for path in folder.glob("runs/*/checkpoint.pt")], default=0)


def has_ended(running) -> bool:
    try:
        os.kill(running.pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_for_checkpoints(running, folder: Path, number: int) -> None:
    """Until the run has written so many, or has ended."""
    before = last_checkpoint(folder)
    for _ in range(number):
        running.wait_for(lambda before=before: (
            last_checkpoint(folder) > before or has_ended(running)))
        before = last_checkpoint(folder)


def kill_later(running, seconds: float) -> None:
    """A fast machine may be done by then."""
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        running.kill(signal.SIGKILL)


# ---- To the bit ----------------------------------------------------------------------------------

BOTH, CONTINUOUS = "tests.resume_envs:Same-v0", "tests.resume_envs:SameBoxVector-v0"
TOTAL = 222  # timesteps: 203 updates; episodes of 6 rows, so that 24, 120, ... end one


def exact(script: str, env: str, steps: int, rows: int = 100) -> list[str]:
    """Everything that draws random numbers is on; a ring of 100 rows wraps twice."""
    return flags(script, env, steps, buffer_size=rows, video_every=30, checkpoint_every=24)


@pytest.fixture
def straight(tmp_path_factory):
    """A run of 203 updates that nothing interrupts."""
    def make(script, env, rows=100):
        folder = tmp_path_factory.mktemp("straight")
        assert call(script, *exact(script, env, TOTAL, rows), "--runs-dir", folder / "runs") == 0
        return run_dir_in(folder)

    return make


def assert_same_run(one: Path, two: Path) -> None:
    """Parameters, moments, statistics, slow critic, counters, random states; rows; curves."""
    a, b = load_checkpoint(one), load_checkpoint(two)
    assert a["updates"] == 203 and a["optimizers"] and all(a["optimizers"].values())
    assert_identical(a, b)
    for name in {"image", "vector", "action", "reward", "is_first", "is_terminal"} & {
            path.stem for path in (one / "replay").iterdir()}:  # the others may have leftovers
        assert (np.load(one / f"replay/{name}.npy") == np.load(two / f"replay/{name}.npy")).all()
    assert scalars(one) == scalars(two)


@pytest.mark.parametrize("script, env", [(MAIN, BOTH), *((name, CONTINUOUS) for name in SCRIPTS)])
def test_100_updates_and_a_resume_and_100_are_200(script, env, straight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(script, *exact(script, env, 120)) == 0
    run_dir = run_dir_in(tmp_path)
    assert progress_of(run_dir) == (120, 101)
    assert call(script, "--resume", run_dir, "--total-timesteps", TOTAL) == 0
    assert_same_run(run_dir, straight(script, env))


@pytest.mark.parametrize("script, env", [(MAIN, BOTH), (SCRIPTS[-1], CONTINUOUS)])
def test_killed_again_and_again_it_is_still_200_updates(script, env, straight, cli, tmp_path):
    """At random moments: what came after the last checkpoint is made again, and is the same.

    The ring is not full: otherwise rows that a killed process has overwritten would be missed.
    """
    chance, run = random.Random(0), exact(script, env, TOTAL, TOTAL)
    for is_killed in (True, True, True, True, False):
        with cli.start(script, *run, cwd=tmp_path) as running:
            if is_killed:
                wait_for_checkpoints(running, tmp_path, 2)  # the first one is written at the start
                kill_later(running, chance.uniform(0, 0.2))
            done = running.wait()
        assert done.code in (0, -signal.SIGKILL), str(done)  # a worker may complain
        run = ["--resume", run_dir_in(tmp_path)]
    assert done.code == 0
    assert_same_run(run_dir_in(tmp_path), straight(script, env, TOTAL))


# ---- A replay that survives a KILL ---------------------------------------------------------------

CAPACITY = 64


def life(num_envs: int) -> list[str]:
    return flags(MAIN, "tests.resume_envs:Life-v0", 10**6, num_envs=num_envs, buffer_size=CAPACITY,
                 checkpoint_every=8, learning_starts=8, train_ratio=7.5)


def look(run_dir: Path, num_envs: int, starts: list[int], step: int) -> int:
    """Check all rows that a kill has left; the step of the checkpoint, which is past `step`."""
    state, module = load_checkpoint(run_dir), __import__(MAIN)
    mine = state["ranks"][0]["replay"]
    assert state["step"] == mine["count"] * num_envs > step
    replay = module.ReplayBuffer(run_dir / "replay", EnvSpec(None, 3, 2, True), 1, num_envs, 0)
    assert replay.rings.rows[0] >= mine["count"] and replay.rings.capacity == CAPACITY // num_envs
    replay.load_state_dict(mine)
    rows = np.arange(replay.rings.oldest, mine["count"])
    kept = replay.rings.read(np.arange(num_envs), rows[:, None])
    assert (check_rows(**kept, starts=starts) == rows[:, None]).all()
    return state["step"]


@pytest.mark.parametrize("num_envs, kills", [(1, 6), (2, 3)])
def test_no_row_that_a_kill_undid_is_trained_on(cli, tmp_path, num_envs, kills):
    """Every batch is checked as it is drawn (checked_run.py), and all rows after each kill; the
    curve has every episode that was not undone, once."""
    chance, starts, step = random.Random(num_envs), [0], 0
    run = life(num_envs)
    for _ in range(kills):
        (tmp_path / "lives.json").write_text(json.dumps(starts))
        with cli.start("tests/checked_run", MAIN, *run, cwd=tmp_path) as running:
            wait_for_checkpoints(running, tmp_path, chance.randint(3, 8))
            kill_later(running, chance.uniform(0, 0.06))
            done = running.wait()
        assert done.code == -signal.SIGKILL, str(done)
        step = look(run_dir_in(tmp_path), num_envs, starts, step)
        starts.append(step // num_envs)
        run = ["--resume", run_dir_in(tmp_path)]
    (tmp_path / "lives.json").write_text(json.dumps(starts))
    total = max(step, 2 * CAPACITY) + 16
    done = cli("tests/checked_run", MAIN, *run, "--total-timesteps", total, cwd=tmp_path)
    assert done.code == 0 and progress_of(run_dir_in(tmp_path))[0] == total, str(done)
    assert not list(tmp_path.rglob("*.tmp"))
    rows = np.arange(total // num_envs)
    last = rows[(rows - np.asarray(starts)[life_of(rows, starts)]) % (LENGTH + 1) == LENGTH]
    ends = [(int(row) + 1) * num_envs for row in last for _ in range(num_envs)]
    assert [at for at, _ in scalars(run_dir_in(tmp_path))["charts/episodic_return"]] == ends


def test_a_replay_that_is_older_than_the_checkpoint_is_refused(tmp_path, monkeypatch):
    """Such as of a copy that was made while the run went on. Moved as a whole, it resumes."""
    monkeypatch.chdir(tmp_path)
    assert call(MAIN, *flags(MAIN, steps=24)) == 0
    moved = shutil.move(run_dir_in(tmp_path), tmp_path / "another place")
    assert call(MAIN, "--resume", moved, "--total-timesteps", 26) == 0
    assert progress_of(Path(moved)) == (26, 7)
    np.save(Path(moved) / "replay" / "rows.npy", np.int64([9, 9]))
    assert_says(call(MAIN, "--resume", moved, "--total-timesteps", 30), "older than the checkpoint")


# ---- A full disk ---------------------------------------------------------------------------------

def test_the_disk_fills_up_during_a_run(cli, tmp_path):
    """The limit on the size of files falls between two checkpoints; the second does not fit."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("needs Linux")
    run = flags(MAIN, steps=100_000, buffer_size=100, checkpoint_every=30, log_every=1000)
    with cli.start(MAIN, *run, cwd=tmp_path) as running:
        wait_for_checkpoints(running, tmp_path, 2)  # now it has the optimisers' moments
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
        done = running.wait()
    assert_one_line(done, "cannot write", "checkpoint.pt")
    run_dir = run_dir_in(tmp_path)
    assert not list(run_dir.rglob("*.tmp"))
    step, updates = progress_of(run_dir)
    assert step >= 30 and step % 30 == 0 and updates == step - 19
    assert call(MAIN, "--resume", run_dir, "--total-timesteps", step + 10) == 0
    assert progress_of(run_dir) == (step + 10, updates + 10)


def test_no_room_for_the_replay_is_said_at_the_start_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    assert_says(call(MAIN, *flags(MAIN, steps=20_000)), "No space left", "--buffer-size")
    assert not list((tmp_path / "runs").iterdir())
