"""Whole runs in bad company: environments that misbehave, checkpoints from elsewhere.

The parts are tested in test_envs.py, test_files.py and test_runs.py; here a script runs as a process
of its own.
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

from common.rundir import save_checkpoint
from tests.command_lines import MAIN, assert_one_line, load, only, tiny_run


def new_run(env: str, steps: int, *flags) -> list[str]:
    return tiny_run(MAIN, f"fake_envs:{env}", steps, *flags, learning_starts=10)


def ring(run_dir: Path, name: str, rows: int) -> np.ndarray:
    return np.load(run_dir / "replay" / f"{name}.npy")[:, :rows]


# ---- Environments --------------------------------------------------------------------------------

# In this process; a step of the third row of every episode goes wrong, or its reset.
ALONE = {"Raise": "lost the ball", "SysExit": "SystemExit", "NanReward": "the reward is nan",
         "InfReward": "the reward is -inf", "NanObs": "NaN or infinity", "InfObs": "NaN or infinity",
         "Shape": "expected Box", "Dtype": "expected Box", "Missing": "vector"}


@pytest.mark.parametrize("fault", ALONE)
def test_the_run_goes_on(cli, tmp_path, fault):
    """Rows 0, 1, 2 of each episode are good, row 3 closes it as truncated with the last good
    observation; the third restart is one too many in a run of 20 steps only if it is not allowed."""
    done = cli(MAIN, *new_run(fault, 20), cwd=tmp_path)
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
    state = load(run_dir)
    assert (state["step"], state["updates"]) == (20, 11)


@pytest.mark.parametrize("fault, says", [("Exit", "died (exit codes [1, 1])"), ("Hang", "gave no answer for 0.5 s")])
def test_a_process_that_dies_or_hangs_stops_the_run_saved(cli, tmp_path, fault, says):
    done = cli(MAIN, *new_run(fault, 16, "--num-envs", 2, "--env-timeout", 0.5), cwd=tmp_path)
    assert_one_line(done, f"{fault}-v0", says, "is saved; mend that, then go on with", "--resume")
    state = load(only((tmp_path / "runs").iterdir()))
    assert state["ranks"][0]["replay"]["count"] == 3, "the reset and two good steps"


def workers_of(pid: int) -> list[int]:
    """The processes of the environments: children of the fork server, which is a child of the run."""
    table = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    forked = {int(line.split()[0]): int(line.split()[1]) for line in table.splitlines()
              if "multiprocessing.forkserver" in line}
    return [child for child, parent in forked.items() if forked.get(parent) == pid]


def test_killed_worker_stops_the_run_and_resume_goes_on(cli, tmp_path):
    """As the out-of-memory killer does it: in the midst of a healthy run."""
    run = new_run("Counting", 100_000, "--num-envs", 2, "--buffer-size", 100)
    with cli.start(MAIN, *run, cwd=tmp_path) as running:
        running.wait_for(lambda: any(np.fromfile(path, np.int64)[-1] > 8 for path in
                                     tmp_path.glob("runs/*/replay/rows.npy")))
        workers = workers_of(running.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        done = running.wait()
    assert_one_line(done, "Counting-v0", "died (exit codes [0, -9])", "is saved; mend that, then go on with", "--resume")
    run_dir = only((tmp_path / "runs").iterdir())
    step = load(run_dir)["step"]
    again = cli(MAIN, "--resume", run_dir, "--total-timesteps", step + 20, cwd=tmp_path)
    assert again.code == 0 and load(run_dir)["step"] == step + 20, str(again)


def test_restarts_used_up(cli, tmp_path):
    """One line with the environment and the step; the checkpoint is of the last whole step."""
    done = cli(MAIN, *new_run("Raise", 100, "--max-env-restarts", 4), cwd=tmp_path)
    assert_one_line(done, "Raise-v0", "environment 0", "step 19", "max_restarts=4", "lost the ball")
    run_dir = only((tmp_path / "runs").iterdir())
    state = load(run_dir)
    # Row 0 is the reset, so the 19th step would have been row 19: rows 0 to 18 are there.
    assert state["ranks"][0]["replay"]["count"] == 19 and state["updates"] == 10
    assert state["step"] == 19, "the step that failed is counted, though it left no row"
    again = cli(MAIN, "--resume", run_dir, "--max-env-restarts", 100, "--total-timesteps", 25, cwd=tmp_path)
    assert again.code == 0, str(again)
    state = load(run_dir)
    assert (state["step"], state["ranks"][0]["replay"]["count"], state["updates"]) == (25, 25, 16)
    # Every episode of this environment breaks; an evaluation counts none of them as a return.
    done = cli(MAIN, "--evaluate", run_dir, "--max-env-restarts", 3, cwd=tmp_path)
    assert_one_line(done, "Raise-v0", "max_restarts=3")
    assert "episode" not in done.out, str(done)


@pytest.mark.parametrize("env, word", [("RaiseInit", "no such level"), ("RaiseFirstReset", "cannot reset")])
def test_environment_that_never_starts(cli, tmp_path, env, word):
    done = cli(MAIN, *new_run(env, 40), cwd=tmp_path)
    assert_one_line(done, env, word)


def test_reset_that_always_fails_stops_the_run_saved(cli, tmp_path):
    """Each restarted environment is given its one good first reset, so the run even goes on."""
    done = cli(MAIN, *new_run("RaiseReset", 40), cwd=tmp_path)
    assert done.code == 0 and "cannot reset" in done.err and "Traceback" not in done.err, str(done)


def test_every_episode_ends_at_once(cli, tmp_path):
    done = cli(MAIN, *new_run("OneStep", 40), cwd=tmp_path)
    assert done.code == 0 and "Traceback" not in done.err, str(done)
    run_dir = only((tmp_path / "runs").iterdir())
    assert (ring(run_dir, "is_first", 40)[0] == [True, False] * 20).all()
    assert (ring(run_dir, "is_terminal", 40)[0] == [False, True] * 20).all()


# ---- Checkpoints from elsewhere ------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    done = cli(MAIN, *new_run("CountingBoxVector", 20), cwd=folder)
    assert done.code == 0, str(done)
    return only((folder / "runs").iterdir())


@pytest.fixture
def copied(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("half", [False, True])
def test_checkpoint_of_a_gpu_opens_on_the_cpu(copied, cli, tmp_path, half):
    """As a CUDA run writes it: Adam made with capturable=True, the CUDA generator's state in it."""
    path = copied / "checkpoint.pt"
    state = load(copied)
    for moments in state["optimizers"].values():
        for entry in moments.values():  # a run without fused Adam counts its steps as int
            entry["step"] = entry["step"].double() if half else entry["step"].clone()
    state["ranks"][0]["rng"]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    save_checkpoint(path, state, MAIN)
    done = cli(MAIN, "--resume", copied, "--total-timesteps", 30, cwd=tmp_path)
    assert done.code == 0 and "Traceback" not in done.err, str(done)
    now = load(copied)
    assert now["step"] == 30 and "cuda" not in now["ranks"][0]["rng"]
    for name, moments in now["optimizers"].items():
        for key, entry in moments.items():
            assert entry["step"].dtype == torch.float32
            assert float(entry["step"]) == float(state["optimizers"][name][key]["step"]) + 10
    assert cli(MAIN, "--evaluate", copied, "--eval-episodes", 1, cwd=tmp_path).code == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_checkpoint_moves_between_cpu_and_gpu(copied, cli, tmp_path):
    """A run of the CPU goes on on the GPU and then again on the CPU."""
    for steps, device in ((26, "--cuda"), (32, "--no-cuda"), (38, "--cuda")):
        done = cli(MAIN, "--resume", copied, "--total-timesteps", steps, device, cwd=tmp_path)
        assert done.code == 0 and "Traceback" not in done.err, str(done)
        state = load(copied)
        assert state["step"] == steps and ("cuda" in state["ranks"][0]["rng"]) == (device == "--cuda")


@pytest.mark.parametrize("mode", ["--resume", "--evaluate", "--dream"])
@pytest.mark.parametrize("layout, word", [(0, "an older layout 0"), (99, "a newer layout 99")])
def test_other_layout(copied, cli, tmp_path, mode, layout, word):
    path = copied / "checkpoint.pt"
    torch.save(load(copied) | {"format": layout}, path)
    before = path.read_bytes()
    assert_one_line(cli(MAIN, mode, copied, cwd=tmp_path), "checkpoint.pt", word)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", ["--resume", "--evaluate", "--dream"])
def test_checkpoint_with_code_in_it(copied, cli, tmp_path, mode):
    """weights_only: what a stranger's file would run is not run."""
    trap = tmp_path / "trap"
    torch.save(load(copied) | {"trap": Trap(trap)},
               copied / "checkpoint.pt")
    assert_one_line(cli(MAIN, mode, copied, cwd=tmp_path), "checkpoint.pt")
    assert not trap.exists()


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
