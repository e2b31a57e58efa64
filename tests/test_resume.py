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
import torch
from conftest import SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.envs import EnvSpec
from common.runs import load_checkpoint
from tests.resume_envs import LENGTH, check_rows, life_of

TINY = """--size XXS --deter 8 --hidden 8 --units 8 --stoch 2 --classes 2 --layers 1 --depth 2 --horizon 3
    --batch-size 3 --batch-length 5 --train-ratio 15 --image-size 8 --threads 1 --no-cuda""".split()
TIMING = ("charts/SPS", "charts/updates_per_second")


def flags(text: str) -> list[str]:
    return [*TINY, *text.split()]


def only(paths) -> Path:
    path, = paths
    return path


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All curves, of all event files together, without those that depend on the clock."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]
            if tag not in TIMING}


def load(run_dir: Path, script: str) -> dict:
    return load_checkpoint(run_dir / "checkpoint.pt", script, "cpu")


def assert_identical(one, two, where="checkpoint") -> None:
    """Bit for bit, with the names of what differs."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            assert_identical(one[key], two[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for index, pair in enumerate(zip(one, two)):
            assert_identical(*pair, f"{where}[{index}]")
    else:
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, where


def assert_one_line(done, *words: str) -> None:
    lines = [line for line in done.err.split("\n") if line.startswith("error: ")]
    assert done.code == 1 and len(lines) == 1 and "Traceback" not in done.err, str(done)
    assert not [word for word in words if word not in lines[0]], lines[0]


def last_write(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


# ---- Exact, while no step of an environment lies between ------------------------------------------

ENVS = {"both": "tests.fake_envs:Counting-v0", "continuous": "tests.fake_envs:CountingBoxVector-v0"}
# Update s at timestep s, and everything that draws random numbers is on.
OFFLINE = flags("--learning-starts 1 --log-every 10 --video-every 30 --checkpoint-every 25")


@pytest.fixture(scope="module", params=ENVS)
def recording(request, script, cli, tmp_path_factory):
    """(environment, a run of 30 timesteps, a run of 200 updates on its replay)"""
    folder = tmp_path_factory.mktemp("offline")
    run = ["--env-id", ENVS[request.param], *flags("--learning-starts 29 --video-every 0"),
           "--total-timesteps", 30, "--runs-dir", "recorded"]
    assert cli(script, *run, cwd=folder).code == 0
    recorded = only((folder / "recorded").iterdir())
    run = ["--env-id", ENVS[request.param], *OFFLINE, "--offline", recorded]
    done = cli(script, *run, "--total-timesteps", 200, "--runs-dir", "straight", cwd=folder)
    assert done.code == 0, str(done)
    straight = only((folder / "straight").iterdir())
    assert (load(straight, script)["step"], load(straight, script)["updates"]) == (200, 200)
    return run, straight


def assert_same_run(one: Path, two: Path, script: str) -> None:
    """Parameters, moments, return scale, slow critic, counters, random states, sampler; curves."""
    a, b = load(one, script), load(two, script)
    assert {"step", "updates", "agent", "adam", "ranks"} <= a.keys()
    assert len(a["adam"]) == 3 and all(a["adam"].values()), "no moments"
    assert [name for name in a["agent"] if name.startswith("slow_critic")]
    assert_identical(a, b)
    assert scalars(one) == scalars(two)


def test_100_and_resume_and_100_are_200_updates(script, recording, cli, tmp_path):
    run, straight = recording
    assert cli(script, *run, "--total-timesteps", 100, cwd=tmp_path).code == 0
    resumed = only((tmp_path / "runs").iterdir())
    assert load(resumed, script)["updates"] == 100
    done = cli(script, "--resume", resumed, "--total-timesteps", 200, cwd=tmp_path)
    assert done.code == 0, str(done)
    assert_same_run(resumed, straight, script)


def test_stopped_and_killed_anywhere_it_is_still_200_updates(script, recording, cli, tmp_path):
    """TERM once, then KILL three times, at random moments."""
    run, straight = recording
    chance, first = random.Random(0), [*run, "--total-timesteps", 200]
    for number in (signal.SIGTERM, *[signal.SIGKILL] * 3, 0):
        paths = list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else []
        before = last_write(paths[0] / "checkpoint.pt") if paths else 0
        with cli.start(script, *(["--resume", paths[0]] if paths else first), cwd=tmp_path) as running:
            if number:
                running.wait_for(lambda: any(last_write(path) > before for path in
                                             (tmp_path / "runs").glob("*/checkpoint.pt")))
                time.sleep(chance.uniform(0, 0.3))
                with suppress(ProcessLookupError):  # a fast machine is done by now
                    running.kill(number)
            done = running.wait()
        assert done.code in (0, -signal.SIGKILL) and "Traceback" not in done.err, str(done)
    assert_same_run(only((tmp_path / "runs").iterdir()), straight, script)


# ---- With environment steps ----------------------------------------------------------------------

ONLINE = flags("--env-id tests.fake_envs:Counting-v0 --learning-starts 10 --log-every 10 --video-every 0")


def test_resume_restores_everything(script, cli, tmp_path):
    """A resume that has nothing left to do saves what it loaded: that must be all of it."""
    assert cli(script, *ONLINE, "--total-timesteps", 25, cwd=tmp_path).code == 0
    run_dir = only((tmp_path / "runs").iterdir())
    before, rows = load(run_dir, script), np.load(run_dir / "replay" / "rows.npy")
    content = (run_dir / "checkpoint.pt").stat().st_mtime_ns
    done = cli(script, "--resume", run_dir, cwd=tmp_path)
    assert done.code == 0 and last_write(run_dir / "checkpoint.pt") > content, str(done)
    assert_identical(load(run_dir, script), before)
    assert (before["step"], before["updates"]) == (25, 16)
    assert before["ranks"][0]["replay"]["count"] == 25
    assert {"python", "numpy", "torch"} <= before["ranks"][0]["rng"].keys()
    assert (np.load(run_dir / "replay" / "rows.npy") == rows).all()


def test_curves_go_on_without_gap_or_duplicate(script, cli, tmp_path):
    """Killed at 60 or later with a checkpoint at 40 that is younger than TensorBoard's last flush."""
    run = [*ONLINE, "--total-timesteps", 100_000, "--buffer-size", 100, "--checkpoint-every", 40]
    with cli.start(script, *run, cwd=tmp_path) as running:
        rows = "runs/*/replay/rows.npy"
        running.wait_for(lambda: any(np.fromfile(p, np.int64)[-1] >= 60 for p in tmp_path.glob(rows)))
        running.kill(signal.SIGKILL)
        running.wait()
    run_dir = only((tmp_path / "runs").iterdir())
    start = load(run_dir, script)["step"]
    done = cli(script, "--resume", run_dir, "--total-timesteps", start + 40, cwd=tmp_path)
    assert done.code == 0, str(done)
    curves = scalars(run_dir)
    assert [step for step, _ in curves["loss/model"]] == list(range(10, start + 41, 10))
    ends = [*range(6, start + 1, 6), *range(start + 6, start + 41, 6)]  # a new episode after the resume
    assert curves["charts/episodic_return"] == [(step, 15.0) for step in ends]


# ---- Killed again and again ----------------------------------------------------------------------

LIFE = flags("""--env-id tests.resume_envs:Life-v0 --learning-starts 16 --train-ratio 7.5 --log-every 20
    --buffer-size 64 --checkpoint-every 8 --video-every 50 --model-lr 3e-3 --actor-lr 3e-3
    --critic-lr 3e-3""")
TOTAL = 640  # timesteps of the whole run


class Kills:
    """One run, killed and resumed; after every kill all that it left is looked at."""

    def __init__(self, cli, script: str, folder: Path, num_envs: int):
        self.cli, self.script, self.folder, self.num_envs = cli, script, folder, num_envs
        self.module, self.starts, self.step, self.updates = __import__(script), [0], 0, 0
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
        return self.cli.start("tests/checked_run", self.script, *run, *more, cwd=self.folder)

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
        state = load(run_dir, self.script)
        count = state["ranks"][0]["replay"]["count"]
        assert state["step"] == count * num_envs >= self.step and state["updates"] >= self.updates
        self.step, self.updates = state["step"], state["updates"]

        replay = self.module.ReplayBuffer(run_dir / "replay", EnvSpec(None, 3, 2, True), 64 // num_envs,
                                          num_envs, 0)
        assert replay.rows[0] >= count
        replay.load_state_dict(state["ranks"][0]["replay"])
        rows = np.arange(replay.oldest, count)
        kept = {name: ring[:, rows % replay.capacity].swapaxes(0, 1) for name, ring in replay.rings.items()}
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
        assert load(self.run_dir, self.script)["step"] == total
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
def test_killed_at_random_moments(script, cli, tmp_path, num_envs, number):
    """The curve of the whole has every episode that was not undone, once; and the agent learns as
    well as in runs that nobody kills: its mean return over the second half is compared."""
    chance = random.Random(num_envs)
    others = (["writing", "running", "any", "running", "writing"] * number)[:number - 1]
    moments = ["running", *chance.sample(others, len(others))]  # a shuffle; first of all a checkpoint
    (tmp_path / "killed").mkdir()
    kills = Kills(cli, script, tmp_path / "killed", num_envs)
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
        run = Kills(cli, script, folder, 1)
        done = cli("tests/checked_run", script, *LIFE, "--seed", seed, "--total-timesteps", TOTAL, cwd=folder)
        assert done.code == 0, str(done)
        curve_of_run = scalars(run.run_dir)["charts/episodic_return"]
        assert [step for step, _ in curve_of_run] == run.ends(TOTAL)
        unbroken.append(mean_return(curve_of_run))
    killed, spread = mean_return(curve), max(np.ptp(unbroken), 0.5)
    assert min(unbroken) - spread <= killed <= max(unbroken) + spread, (killed, unbroken)


# ---- A full disk ---------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_the_disk_fills_up_during_a_run(script, cli, tmp_path):
    """The limit on the size of files falls between two checkpoints; the second does not fit."""
    run = [*ONLINE, "--total-timesteps", 100_000, "--buffer-size", 20, "--checkpoint-every", 20]
    with cli.start(script, *run, cwd=tmp_path) as running:
        def moments_saved():
            return any(path.stat().st_size > 90_000 for path in tmp_path.glob("runs/*/checkpoint.pt"))

        running.wait_for(moments_saved)
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
        done = running.wait()
    assert_one_line(done, "cannot write", "checkpoint.pt", "intact")
    run_dir = only((tmp_path / "runs").iterdir())
    assert not list(run_dir.glob("**/*.tmp"))
    start = load(run_dir, script)["step"]
    assert start >= 20 and start % 20 == 0
    done = cli(script, "--resume", run_dir, "--total-timesteps", start + 10, cwd=tmp_path)
    assert done.code == 0 and load(run_dir, script)["step"] == start + 10, str(done)


def no_room(script, cli, folder) -> list[Path]:
    """The files that are left where the replay buffer did not fit."""
    done = cli(script, *ONLINE, "--total-timesteps", 20_000, cwd=folder, file_limit=1_000_000)
    assert_one_line(done, "cannot write", "image.npy", "GiB needed", "ulimit")
    return [path for path in folder.rglob("*") if path.is_file()]


def test_no_room_for_the_replay_buffer(script, cli, tmp_path):
    """Said at the start; no file is cut short, and what is left is not taken for a run."""
    left = no_room(script, cli, tmp_path)
    assert not [path.name for path in left if path.name in ("image.npy", "checkpoint.pt") or ".tmp" in path.name]
    for run_dir in tmp_path.glob("runs/*"):
        assert_one_line(cli(script, "--resume", run_dir, cwd=tmp_path), "first checkpoint")


def test_no_room_leaves_nothing(script, cli, tmp_path):
    assert not no_room(script, cli, tmp_path)


def test_copied_run_directory_resumes(script, cli, tmp_path):
    """Nothing in it names the place where it was made."""
    (tmp_path / "one").mkdir()
    assert cli(script, *ONLINE, "--total-timesteps", 20, cwd=tmp_path / "one").code == 0
    moved = shutil.move(only((tmp_path / "one" / "runs").iterdir()), tmp_path / "two")
    done = cli(script, "--resume", moved, "--total-timesteps", 25, cwd=tmp_path)
    assert done.code == 0 and load(Path(moved), script)["step"] == 25, str(done)
