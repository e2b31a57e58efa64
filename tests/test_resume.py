"""A run that is stopped, killed or out of disk space goes on exactly where its checkpoint says.

The scripts run as processes of their own (`Runner` in conftest.py).
"""

import json
import random
import resource
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import SCRIPTS

from common.envs import EnvSpec
from tests.command_lines import MAIN, assert_identical, assert_one_line, load, only, scalars, tiny_run
from tests.resume_envs import LENGTH, check_rows, life_of


def last_write(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


# ---- Exact, while no step of an environment lies between ------------------------------------------

BOTH, CONTINUOUS = "fake_envs:Counting", "fake_envs:CountingBoxVector"


@pytest.fixture(scope="module")
def recordings(cli, tmp_path_factory):
    """(script, environment) -> the flags of runs on a replay of 30 timesteps, and one of 200 updates."""
    made = {}

    def make(script, env):
        if (script, env) not in made:
            folder = tmp_path_factory.mktemp("offline")
            run = tiny_run(script, env, 30, "--runs-dir", "recorded", learning_starts=29)
            assert cli(script, *run, cwd=folder).code == 0
            # Update s at timestep s, and everything that draws random numbers is on.
            run = tiny_run(script, env, 200, "--offline", only((folder / "recorded").iterdir()),
                           "--checkpoint-every", 25, learning_starts=1, video_every=30)
            done = cli(script, *run, "--runs-dir", "straight", cwd=folder)
            assert done.code == 0, str(done)
            made[script, env] = run, only((folder / "straight").iterdir())
        return made[script, env]

    return make


def assert_same_run(one: Path, two: Path, script: str) -> None:
    """Parameters, moments, statistics, slow critic, counters, random states, sampler; curves."""
    a, b = load(one, script), load(two, script)
    assert len(a["optimizers"]) == 3 and all(a["optimizers"].values()), "no moments"
    assert_identical(a, b)
    assert scalars(one) == scalars(two)


@pytest.mark.parametrize("script, env", [*((script, CONTINUOUS) for script in SCRIPTS), (MAIN, BOTH)])
def test_100_and_resume_and_100_are_200_updates(script, env, recordings, cli, tmp_path):
    run, straight = recordings(script, env)
    assert cli(script, *run, "--total-timesteps", 100, cwd=tmp_path).code == 0
    resumed = only((tmp_path / "runs").iterdir())
    done = cli(script, "--resume", resumed, "--total-timesteps", 200, cwd=tmp_path)
    assert done.code == 0, str(done)
    assert_same_run(resumed, straight, script)


def test_stopped_and_killed_anywhere_it_is_still_200_updates(recordings, cli, tmp_path):
    """TERM once, then KILL three times, at random moments."""
    run, straight = recordings(MAIN, BOTH)
    chance = random.Random(0)
    for number in (signal.SIGTERM, *[signal.SIGKILL] * 3, 0):
        paths = list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else []
        before = last_write(paths[0] / "checkpoint.pt") if paths else 0
        with cli.start(MAIN, *(["--resume", paths[0]] if paths else run), cwd=tmp_path) as running:
            if number:
                running.wait_for(lambda before=before: any(last_write(path) > before for path in
                                                           (tmp_path / "runs").glob("*/checkpoint.pt")))
                time.sleep(chance.uniform(0, 0.3))
                with suppress(ProcessLookupError):  # a fast machine is done by now
                    running.kill(number)
            done = running.wait()
        assert done.code in (0, -signal.SIGKILL) and "Traceback" not in done.err, str(done)
    assert_same_run(only((tmp_path / "runs").iterdir()), straight, MAIN)


# ---- With environment steps ----------------------------------------------------------------------

def online(steps: int, *more, **changes) -> list[str]:
    return tiny_run(MAIN, BOTH, steps, *more, **{"learning_starts": 10} | changes)


def test_resume_restores_everything(cli, tmp_path):
    """A resume that has nothing left to do saves what it loaded: that must be all of it."""
    assert cli(MAIN, *online(25), cwd=tmp_path).code == 0
    run_dir = only((tmp_path / "runs").iterdir())
    before, rows = load(run_dir), np.load(run_dir / "replay" / "rows.npy")
    content = (run_dir / "checkpoint.pt").stat().st_mtime_ns
    done = cli(MAIN, "--resume", run_dir, cwd=tmp_path)
    assert done.code == 0 and last_write(run_dir / "checkpoint.pt") > content, str(done)
    assert_identical(load(run_dir), before)
    assert (before["step"], before["updates"]) == (25, 16)
    assert before["ranks"][0]["replay"]["count"] == 25
    assert {"python", "numpy", "torch"} <= before["ranks"][0]["rng"].keys()
    assert (np.load(run_dir / "replay" / "rows.npy") == rows).all()


def test_curves_go_on_without_gap_or_duplicate(cli, tmp_path):
    """Killed at 60 or later with a checkpoint at 40 that is younger than TensorBoard's last flush."""
    run = online(100_000, "--buffer-size", 100, "--checkpoint-every", 40)
    with cli.start(MAIN, *run, cwd=tmp_path) as running:
        rows = "runs/*/replay/rows.npy"
        running.wait_for(lambda: any(np.fromfile(p, np.int64)[-1] >= 60 for p in tmp_path.glob(rows)))
        running.kill(signal.SIGKILL)
        running.wait()
    run_dir = only((tmp_path / "runs").iterdir())
    start = load(run_dir)["step"]
    done = cli(MAIN, "--resume", run_dir, "--total-timesteps", start + 40, cwd=tmp_path)
    assert done.code == 0, str(done)
    curves = scalars(run_dir)
    assert [step for step, _ in curves["loss/model"]] == list(range(10, start + 41, 10))
    ends = [*range(6, start + 1, 6), *range(start + 6, start + 41, 6)]  # a new episode after the resume
    assert curves["charts/episodic_return"] == [(step, 15.0) for step in ends]


# ---- Killed again and again ----------------------------------------------------------------------

TOTAL = 640  # timesteps of the whole run
LIFE = tiny_run(MAIN, "resume_envs:Life", TOTAL, learning_starts=16, train_ratio=7.5, log_every=20, buffer_size=64,
                checkpoint_every=8, video_every=50, model_lr=3e-3, actor_lr=3e-3, critic_lr=3e-3)


class Kills:
    """One run, killed and resumed; after every kill all that it left is looked at."""

    def __init__(self, cli, folder: Path, num_envs: int):
        self.cli, self.folder, self.num_envs = cli, folder, num_envs
        self.module, self.starts, self.step, self.updates = __import__(MAIN), [0], 0, 0
        self.found_tmp = self.rows_checked = 0
        self.begin_life()

    def begin_life(self) -> None:
        (self.folder / "lives.json").write_text(json.dumps(self.starts))

    @property
    def run_dir(self) -> Path:
        return only((self.folder / "runs").iterdir())

    def start(self, *more):
        run = ["--resume", self.run_dir] if (self.folder / "runs").exists() else [
            *LIFE, "--num-envs", self.num_envs]
        return self.cli.start("tests/checked_run", MAIN, *run, *more, cwd=self.folder)

    def kill_once(self, chance: random.Random, moment: str) -> None:
        """moment: "any", counted from the start of the process; "running", after up to five of its
        checkpoints; "writing", the same, then as soon as a checkpoint is seen half-written.

        Counted in checkpoints, so that on a slow machine, too, a life gets somewhere."""
        written, before = chance.randint(1, 5), self.last_checkpoint()
        delay = chance.uniform(0, 1 if moment == "any" else 0.06)
        with self.start("--total-timesteps", 10**6) as running:
            deadline = time.monotonic() + 60
            for _ in range(written if moment != "any" else 0):
                while self.last_checkpoint() == before and time.monotonic() < deadline:
                    time.sleep(0.002)
                before = self.last_checkpoint()
            time.sleep(delay)
            if moment == "writing":
                temporary = self.run_dir / "checkpoint.pt.tmp"
                while not temporary.exists() and time.monotonic() < deadline:
                    time.sleep(0.0002)
            running.kill(signal.SIGKILL)
            done = running.wait()
        assert done.code == -signal.SIGKILL and "Traceback" not in done.err, str(done)

    def last_checkpoint(self) -> int:
        return max([last_write(path) for path in self.folder.glob("runs/*/checkpoint.pt")], default=0)

    def look(self) -> None:
        """Everything that the issue promises of what a kill leaves behind."""
        run_dir, num_envs = self.run_dir, self.num_envs
        self.found_tmp += (run_dir / "checkpoint.pt.tmp").exists()
        saved = json.loads((run_dir / "args.json").read_text())["args"]
        assert saved["env_id"] == "tests.resume_envs:Life-v0" and saved["num_envs"] == num_envs
        state = load(run_dir)
        count = state["ranks"][0]["replay"]["count"]
        assert state["step"] == count * num_envs >= self.step and state["updates"] >= self.updates
        self.step, self.updates = state["step"], state["updates"]

        replay = self.module.ReplayBuffer(run_dir / "replay", EnvSpec(None, 3, 2, True), 64 // num_envs,
                                          num_envs, 0)
        rings = replay.rings
        assert rings.rows[0] >= count
        replay.load_state_dict(state["ranks"][0]["replay"])
        rows = np.arange(rings.oldest, count)
        kept = rings.read(np.arange(num_envs), rows[:, None])
        if len(rows):
            assert (check_rows(**kept, starts=self.starts) == rows[:, None]).all()
            self.rows_checked += len(rows)
        if replay.windows(5):
            batch = replay.sample(64, 5, replay.rng)
            seen = check_rows(*batch[1:], starts=self.starts)
            assert rows[0] <= seen.min() and seen.max() < count
        self.starts.append(count)
        self.begin_life()

    def finish(self, total: int) -> None:
        with self.start("--total-timesteps", total) as running:
            done = running.wait()
        assert done.code == 0 and "Traceback" not in done.err, str(done)
        assert load(self.run_dir)["step"] == total
        assert not list(self.run_dir.glob("**/*.tmp"))

    def ends(self, total: int) -> list[int]:
        """Timesteps at which an episode ended that was not undone."""
        rows = np.arange(total // self.num_envs)
        in_life = rows - np.asarray(self.starts)[life_of(rows, self.starts)]
        last = rows[in_life % (LENGTH + 1) == LENGTH]
        return [int(row + 1) * self.num_envs for row in last for _ in range(self.num_envs)]


def mean_return(curve: list[tuple[int, float]]) -> float:
    return float(np.mean([value for step, value in curve if step > TOTAL // 2]))


@pytest.mark.parametrize("num_envs, number", [(1, 25), (2, 8)])
def test_killed_at_random_moments(cli, tmp_path, num_envs, number):
    """The curve of the whole has every episode that was not undone, once; and the agent learns as
    well as in runs that nobody kills: its mean return over the second half is compared."""
    chance = random.Random(num_envs)
    others = (["writing", "running", "any", "running", "writing"] * number)[:number - 1]
    moments = ["running", *chance.sample(others, len(others))]  # a shuffle; first of all a checkpoint
    (tmp_path / "killed").mkdir()
    kills = Kills(cli, tmp_path / "killed", num_envs)
    for moment in moments:
        kills.kill_once(chance, moment)
        kills.look()
    total = max(TOTAL, kills.step + 48) if num_envs == 1 else kills.step + 48
    kills.finish(total)
    assert kills.found_tmp > 0 or num_envs > 1, "no kill hit a checkpoint that was being written"
    assert kills.rows_checked > 10 * number and kills.starts[-1] > 64 // num_envs, "the ring never wrapped"
    curve = scalars(kills.run_dir)["charts/episodic_return"]
    assert [step for step, _ in curve] == kills.ends(total)
    if num_envs > 1:
        return

    unbroken = []
    for seed in (2, 3, 4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        run = Kills(cli, folder, 1)
        done = cli("tests/checked_run", MAIN, *LIFE, "--seed", seed, "--total-timesteps", TOTAL, cwd=folder)
        assert done.code == 0, str(done)
        curve_of_run = scalars(run.run_dir)["charts/episodic_return"]
        assert [step for step, _ in curve_of_run] == run.ends(TOTAL)
        unbroken.append(mean_return(curve_of_run))
    killed, spread = mean_return(curve), max(np.ptp(unbroken), 0.5)
    assert min(unbroken) - spread <= killed <= max(unbroken) + spread, (killed, unbroken)


# ---- A full disk ---------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_the_disk_fills_up_during_a_run(cli, tmp_path):
    """The limit on the size of files falls between two checkpoints; the second does not fit."""
    run = online(100_000, "--buffer-size", 20, "--checkpoint-every", 20)
    with cli.start(MAIN, *run, cwd=tmp_path) as running:
        def moments_saved():
            return any(path.stat().st_size > 90_000 for path in tmp_path.glob("runs/*/checkpoint.pt"))

        running.wait_for(moments_saved)
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
        done = running.wait()
    assert_one_line(done, "cannot write", "checkpoint.pt", "intact")
    run_dir = only((tmp_path / "runs").iterdir())
    assert not list(run_dir.glob("**/*.tmp"))
    start = load(run_dir)["step"]
    assert start >= 20 and start % 20 == 0
    done = cli(MAIN, "--resume", run_dir, "--total-timesteps", start + 10, cwd=tmp_path)
    assert done.code == 0 and load(run_dir)["step"] == start + 10, str(done)


def no_room(cli, folder) -> list[Path]:
    """The files that are left where the replay buffer did not fit."""
    done = cli(MAIN, *online(20_000), cwd=folder, file_limit=1_000_000)
    assert_one_line(done, "cannot write", "image.npy", "GiB needed", "ulimit")
    return [path for path in folder.rglob("*") if path.is_file()]


def test_no_room_for_the_replay_buffer(cli, tmp_path):
    """Said at the start; no file is cut short, and what is left is not taken for a run."""
    left = no_room(cli, tmp_path)
    assert not [path.name for path in left if path.name in ("image.npy", "checkpoint.pt") or ".tmp" in path.name]
    for run_dir in tmp_path.glob("runs/*"):
        assert_one_line(cli(MAIN, "--resume", run_dir, cwd=tmp_path), "first checkpoint")


def test_no_room_leaves_nothing(cli, tmp_path):
    assert not no_room(cli, tmp_path)


def test_copied_run_directory_resumes(cli, tmp_path):
    """Nothing in it names the place where it was made."""
    (tmp_path / "one").mkdir()
    assert cli(MAIN, *online(20), cwd=tmp_path / "one").code == 0
    moved = shutil.move(only((tmp_path / "one" / "runs").iterdir()), tmp_path / "two")
    done = cli(MAIN, "--resume", moved, "--total-timesteps", 25, cwd=tmp_path)
    assert done.code == 0 and load(Path(moved))["step"] == 25, str(done)
