"""Whole runs in bad company: environments that misbehave, checkpoints from elsewhere.

The parts are tested in test_envs.py and test_runs.py; here the scripts run as processes of their own.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS

from common import runs

TINY = """--size XXS --deter 8 --hidden 8 --units 8 --stoch 2 --classes 2 --layers 1 --depth 2 --horizon 3
    --batch-size 3 --batch-length 5 --learning-starts 10 --train-ratio 15 --image-size 8 --threads 1
    --video-every 0 --log-every 10 --no-cuda""".split()


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


def new_run(env: str, steps: int, *flags) -> list[str]:
    return ["--env-id", f"tests.fake_envs:{env}-v0", *TINY, "--total-timesteps", steps, *flags]


def only(paths) -> Path:
    path, = paths
    return path


def assert_one_line(done, *words: str) -> None:
    lines = [line for line in done.err.split("\n") if line.startswith("error: ")]
    assert done.code == 1 and len(lines) == 1 and "Traceback" not in done.err, str(done)
    assert not [word for word in words if word not in lines[0]], lines[0]


def ring(run_dir: Path, name: str, rows: int) -> np.ndarray:
    return np.load(run_dir / "replay" / f"{name}.npy")[:, :rows]


# ---- Environments --------------------------------------------------------------------------------

# In this process; a step of the third row of every episode goes wrong, or its reset.
ALONE = {"Raise": "lost the ball", "SysExit": "SystemExit", "NanReward": "the reward is nan",
         "InfReward": "the reward is -inf", "NanObs": "NaN or infinity", "InfObs": "NaN or infinity",
         "Shape": "expected Box", "Dtype": "expected Box", "Missing": "vector"}


@pytest.mark.parametrize("fault", ALONE)
def test_the_run_goes_on(script, cli, tmp_path, fault):
    """Rows 0, 1, 2 of each episode are good, row 3 closes it as truncated with the last good
    observation; the third restart is one too many in a run of 20 steps only if it is not allowed."""
    done = cli(script, *new_run(fault, 20), cwd=tmp_path)
    assert done.code == 0 and "Traceback" not in done.err, str(done)
    lines = re.findall(rf"tests.fake_envs:{fault}-v0 \(environment 0\) failed at step (\d+), restart (\d) of 10: "
                       r"(.*)$", done.err, re.M)
    assert [(int(step), int(restart)) for step, restart, _ in lines] == [(3, 1), (7, 2), (11, 3), (15, 4), (19, 5)]
    assert all(ALONE[fault] in text for *_, text in lines), lines
    run_dir = only((tmp_path / "runs").iterdir())
    for name in ("reward", "vector", "image", "action"):
        assert np.isfinite(ring(run_dir, name, 20)).all()
    assert not ring(run_dir, "is_terminal", 20).any()
    assert ring(run_dir, "is_first", 20)[0].nonzero()[0].tolist() == [0, 4, 8, 12, 16]
    assert (ring(run_dir, "vector", 20)[0, 3::4] == ring(run_dir, "vector", 20)[0, 2::4]).all()
    assert not ring(run_dir, "action", 20)[0, 3::4].any() and not ring(run_dir, "reward", 20)[0, 3::4].any()
    state = runs.load_checkpoint(run_dir / "checkpoint.pt", script, "cpu")
    assert (state["step"], state["updates"]) == (20, 11)


@pytest.mark.parametrize("fault, says", [("Exit", "its process died, exit code 1"), ("Hang", "no answer for 0.5 s")])
def test_the_run_goes_on_although_a_process_dies_or_hangs(script, cli, tmp_path, fault, says):
    run = new_run(fault, 16, "--num-envs", 2, "--env-timeout", 0.5)
    with cli.start(script, *run, cwd=tmp_path) as running:
        done = running.wait(120)
    assert done.code == 0 and "Traceback" not in done.err, str(done)
    assert done.err.count("failed at step 3, restart") == 2 and done.err.count("failed at step 7, restart") == 2
    assert says in done.err and "(environment 1)" in done.err, str(done)
    run_dir = only((tmp_path / "runs").iterdir())
    assert all(first.nonzero()[0].tolist() == [0, 4] for first in ring(run_dir, "is_first", 8))
    assert not ring(run_dir, "is_terminal", 8).any()


def test_killed_worker_is_restarted(script, cli, tmp_path):
    """As the out-of-memory killer does it: in the midst of a healthy run."""
    run = new_run("Counting", 100_000, "--num-envs", 2, "--buffer-size", 100)
    with cli.start(script, *run, cwd=tmp_path) as running:
        running.wait_for(lambda: any(np.fromfile(path, np.int64)[-1] > 8 for path in
                                     tmp_path.glob("runs/*/replay/rows.npy")))
        table = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
        worker = [int(line.split()[0]) for line in table.splitlines()
                  if int(line.split()[1]) == running.pid and "spawn_main" in line]
        assert len(worker) == 2, table
        os.kill(worker[1], signal.SIGKILL)
        running.wait_for(lambda: "restart 1 of 10" in running.err.read_text())
        rows = np.fromfile(only(tmp_path.glob("runs/*/replay/rows.npy")), np.int64)[-1]
        running.wait_for(lambda: np.fromfile(only(tmp_path.glob("runs/*/replay/rows.npy")), np.int64)[-1] > rows + 5)
        running.kill()
        done = running.wait()
    assert done.code == 0 and done.err.count("restart ") == 1, str(done)
    assert "Counting-v0 (environment" in done.err and "its process died, exit code -9" in done.err


def test_restarts_used_up(script, cli, tmp_path):
    """One line with the environment and the step; the checkpoint is of the last whole step."""
    done = cli(script, *new_run("Raise", 100, "--max-env-restarts", 4), cwd=tmp_path)
    assert_one_line(done, "Raise-v0", "environment 0", "step 19", "max_restarts=4", "lost the ball")
    run_dir = only((tmp_path / "runs").iterdir())
    state = runs.load_checkpoint(run_dir / "checkpoint.pt", script, "cpu")
    # Row 0 is the reset, so the 19th step would have been row 19: rows 0 to 18 are there.
    assert state["ranks"][0]["replay"]["count"] == 19 and state["updates"] == 10
    assert state["step"] == 19, "the step that failed is counted, though it left no row"
    again = cli(script, "--resume", run_dir, "--max-env-restarts", 100, "--total-timesteps", 25, cwd=tmp_path)
    assert again.code == 0, str(again)
    state = runs.load_checkpoint(run_dir / "checkpoint.pt", script, "cpu")
    assert (state["step"], state["ranks"][0]["replay"]["count"], state["updates"]) == (25, 25, 16)
    # Every episode of this environment breaks; an evaluation counts none of them as a return.
    done = cli(script, "--evaluate", run_dir, "--max-env-restarts", 3, cwd=tmp_path)
    assert_one_line(done, "Raise-v0", "max_restarts=3")
    assert "episode" not in done.out, str(done)


@pytest.mark.parametrize("env, word", [("RaiseInit", "no such level"), ("RaiseFirstReset", "cannot reset")])
def test_environment_that_never_starts(script, cli, tmp_path, env, word):
    done = cli(script, *new_run(env, 40), cwd=tmp_path)
    assert_one_line(done, env, word)


def test_reset_that_always_fails_stops_the_run_saved(script, cli, tmp_path):
    """Each restarted environment is given its one good first reset, so the run even goes on."""
    done = cli(script, *new_run("RaiseReset", 40), cwd=tmp_path)
    assert done.code == 0 and "cannot reset" in done.err and "Traceback" not in done.err, str(done)


def test_every_episode_ends_at_once(script, cli, tmp_path):
    done = cli(script, *new_run("OneStep", 40), cwd=tmp_path)
    assert done.code == 0 and "Traceback" not in done.err, str(done)
    run_dir = only((tmp_path / "runs").iterdir())
    assert (ring(run_dir, "is_first", 40)[0] == [True, False] * 20).all()
    assert (ring(run_dir, "is_terminal", 40)[0] == [False, True] * 20).all()


# ---- Checkpoints from elsewhere ------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(script, cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    done = cli(script, *new_run("CountingBoxVector", 20), cwd=folder)
    assert done.code == 0, str(done)
    return only((folder / "runs").iterdir())


@pytest.fixture
def copied(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("half", [False, True])
def test_checkpoint_of_a_gpu_opens_on_the_cpu(script, copied, cli, tmp_path, half):
    """As a CUDA run writes it: Adam made with capturable=True, the CUDA generator's state in it."""
    path = copied / "checkpoint.pt"
    state = runs.load_checkpoint(path, script, "cpu")
    for moments in state["adam"].values():
        for entry in moments.values():  # a run without fused Adam counts its steps as int
            entry["step"] = entry["step"].double() if half else entry["step"].clone()
    state["ranks"][0]["rng"]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    runs.save_checkpoint(path, state, script)
    done = cli(script, "--resume", copied, "--total-timesteps", 30, cwd=tmp_path)
    assert done.code == 0 and "Traceback" not in done.err, str(done)
    now = runs.load_checkpoint(path, script, "cpu")
    assert now["step"] == 30 and "cuda" not in now["ranks"][0]["rng"]
    for name, moments in now["adam"].items():
        for key, entry in moments.items():
            assert entry["step"].dtype == torch.float32
            assert float(entry["step"]) == float(state["adam"][name][key]["step"]) + 10
    assert cli(script, "--evaluate", copied, "--eval-episodes", 1, cwd=tmp_path).code == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_checkpoint_moves_between_cpu_and_gpu(script, copied, cli, tmp_path):
    """A run of the CPU goes on on the GPU and then again on the CPU."""
    for steps, device in ((26, "--cuda"), (32, "--no-cuda"), (38, "--cuda")):
        done = cli(script, "--resume", copied, "--total-timesteps", steps, device, cwd=tmp_path)
        assert done.code == 0 and "Traceback" not in done.err, str(done)
        state = runs.load_checkpoint(copied / "checkpoint.pt", script, "cpu")
        assert state["step"] == steps and ("cuda" in state["ranks"][0]["rng"]) == (device == "--cuda")


@pytest.mark.parametrize("mode", ["--resume", "--evaluate", "--dream"])
@pytest.mark.parametrize("layout, word", [(0, "an older layout 0"), (99, "a newer layout 99")])
def test_other_layout(script, copied, cli, tmp_path, mode, layout, word):
    path = copied / "checkpoint.pt"
    torch.save(runs.load_checkpoint(path, script, "cpu") | {"format": layout}, path)
    before = path.read_bytes()
    assert_one_line(cli(script, mode, copied, cwd=tmp_path), "checkpoint.pt", word)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", ["--resume", "--evaluate", "--dream"])
def test_checkpoint_with_code_in_it(script, copied, cli, tmp_path, mode):
    """weights_only: what a stranger's file would run is not run."""
    trap = tmp_path / "trap"
    torch.save(runs.load_checkpoint(copied / "checkpoint.pt", script, "cpu") | {"trap": Trap(trap)},
               copied / "checkpoint.pt")
    assert_one_line(cli(script, mode, copied, cwd=tmp_path), "checkpoint.pt")
    assert not trap.exists()


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
