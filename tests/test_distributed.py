"""N processes are one process with the whole batch; a real torchrun; what its processes leave behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS

from tests.command_lines import MAIN, assert_one_line, only, scalars, tiny_run
from tests.command_lines import load as load_run


def new_run(steps: int, *flags, env: str = "fake_envs:CountingVector") -> list[str]:
    return tiny_run(MAIN, env, steps, *flags, batch_size=4, train_ratio=20, buffer_size=200)


def ranks(cli, *argv, cwd: Path):
    """Two processes of the script."""
    return cli("tests/ranks", 2, ROOT / f"{MAIN}.py", *argv, cwd=cwd)


def load(folder: Path) -> dict:
    return load_run(only(folder.glob("runs/*")))


# ---- Two ranks are one process -------------------------------------------------------------------

@pytest.fixture(scope="module", params=["discrete", "continuous"])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=SCRIPTS)
def updates(request, kind, cli, tmp_path_factory):
    """What one process and each of two ranks have after five updates on the same batches."""
    folder = tmp_path_factory.mktemp("updates")
    arguments = request.param, kind, folder
    one = cli("tests/share_of_batch", *arguments, cwd=folder)
    two = cli("tests/ranks", 2, ROOT / "tests" / "share_of_batch.py", *arguments, cwd=folder)
    assert one.code == 0 and two.code == 0, f"{one}\n{two}"
    return [torch.load(folder / name, weights_only=True) for name in ("0of1.pt", "0of2.pt", "1of2.pt")]


def test_two_ranks_get_the_parameters_of_one_process(updates):
    whole, *parts = (found["agent"] for found in updates)
    assert whole.keys() == parts[0].keys() == parts[1].keys()
    for name, value in whole.items():
        assert torch.equal(parts[0][name], parts[1][name]), f"{name} differs between the ranks"
        assert (parts[0][name] - value).abs().max() < 1e-6, name


def test_two_ranks_see_the_returns_of_the_whole_batch(updates):
    whole, *parts = updates
    if "imagined/return_scale" not in whole["metrics"][0]:
        pytest.skip("returns are scaled in DreamerV3 only")
    for one, two, three in zip(whole["metrics"], parts[0]["metrics"], parts[1]["metrics"]):
        scales = [found["imagined/return_scale"] for found in (two, three, one)]
        assert scales[0] == scales[1] == pytest.approx(scales[2], abs=1e-5)
    scale = whole["agent"]["return_scale.range"]
    assert scale[1] - scale[0] > 0.01 and (scale - parts[0]["agent"]["return_scale.range"]).abs().max() < 1e-6


def test_two_ranks_clip_by_the_norm_of_the_whole_gradient(updates):
    whole, *parts = (found["metrics"] for found in updates)
    norms = [name for name in whole[0] if name.startswith("grad_norm/")]
    assert len(norms) == 3
    for one, two, three in zip(whole, *parts):
        for name in norms:
            assert two[name] == three[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), name
        for name in ("loss/model", "loss/actor", "loss/critic"):
            assert (two[name] + three[name]) / 2 == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


def test_the_shares_are_different(updates):
    """Or all of the above would say nothing."""
    _, one, two = updates
    assert not torch.equal(one["batch"], two["batch"])
    assert all(a["loss/model"] != b["loss/model"] for a, b in zip(one["metrics"], two["metrics"]))


# ---- A whole run ---------------------------------------------------------------------------------

def children(pid: int) -> list[int]:
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [line.split() for line in table.splitlines()]
    return [int(child) for child, parent in pairs if int(parent) == pid]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Torchrun:
    """A real one, on two processes; `ranks` are their process ids."""

    def __init__(self, *argv, cwd: Path):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   str(ROOT / f"{MAIN}.py"), *map(str, argv)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.log = cwd / "torchrun.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:  # the test failed while it ran
            for pid in self.ranks():
                os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()

    def ranks(self) -> list[int]:
        return children(self.process.pid)

    def wait_for(self, condition, seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def wait(self, seconds: float = 120.0) -> int:
        return self.process.wait(seconds)


def rows_written(folder: Path) -> int:
    return max((int(np.fromfile(p, np.int64)[-1]) for p in folder.glob("runs/*/replay/rank1/rows.npy")), default=0)


def test_torchrun_trains_stops_and_resumes(cli, tmp_path):
    """TERM to the launcher, then TERM to one rank of the resumed run."""
    with Torchrun(*new_run(100_000), cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > 20)
        ranks = running.ranks()
        running.process.terminate()
        running.wait()
    assert not [pid for pid in ranks if is_running(pid)], "a process is left over"
    run_dir = only((tmp_path / "runs").iterdir())
    files = sorted(path.name for path in run_dir.iterdir())
    assert [name.partition(".out")[0] for name in files] == ["args.json", "checkpoint.pt", "events", "lock", "replay"]
    assert sorted(path.name for path in (run_dir / "replay").iterdir()) == ["rank0", "rank1"]
    log = running.log.read_text()
    assert log.count("Traceback") == log.count("SignalException: Process") == 1, log  # the launcher's own
    assert log.count("run directory:") == log.count("stopped and saved") == 1, log
    assert_saved(tmp_path, more_than=40)

    stopped = load(tmp_path)["step"]
    with cli.start("tests/ranks", 2, ROOT / f"{MAIN}.py", "--resume", run_dir, cwd=tmp_path) as resumed:
        resumed.wait_for(lambda: rows_written(tmp_path) > stopped // 2 + 10)
        os.kill(children(resumed.pid)[1], signal.SIGTERM)
        done = resumed.wait()
    assert done.code == 0 and done.out.count("stopped and saved") == 1, str(done)
    assert_saved(tmp_path, more_than=stopped + 20)
    steps = [step for step, _ in scalars(run_dir)["loss/model"]]
    assert steps == list(range(20, load(tmp_path)["step"] + 1, 10)), "one rank writes, once"


def assert_saved(folder: Path, more_than: int) -> None:
    """Both ranks' rows, samplers, random states, due updates."""
    state, run_dir = load(folder), only((folder / "runs").iterdir())
    assert len(state["ranks"]) == 2 and state["step"] > more_than
    rows = [np.load(run_dir / "replay" / f"rank{rank}" / "rows.npy") for rank in (0, 1)]
    assert [row[1] * 2 for row in rows] == [part["replay"]["count"] * 2 for part in state["ranks"]]
    assert rows[0][1] * 2 == rows[1][1] * 2 == state["step"]
    assert state["step"] - 20 <= state["updates"] <= state["step"] - 19  # two are due each time: one may be left
    one, two = state["ranks"]
    assert not torch.equal(one["rng"]["torch"], two["rng"]["torch"])
    assert one["replay"]["rng"] != two["replay"]["rng"]


def test_ranks_explore_differently(cli, tmp_path):
    done = ranks(cli, *new_run(80, "--learning-starts", 70), cwd=tmp_path)
    assert done.code == 0, str(done)
    run_dir = only((tmp_path / "runs").iterdir())
    one, two = (np.load(run_dir / "replay" / f"rank{rank}" / "action.npy")[0, :35] for rank in (0, 1))
    assert (one != two).any(), "both ranks take the same random actions"



def test_batch_that_does_not_divide(cli, tmp_path):
    done = ranks(cli, *new_run(40, "--batch-size", 5), cwd=tmp_path)
    assert_one_line(done, "batch-size", "5", "2 processes", ranks=2)
    assert not (tmp_path / "runs").exists()


def test_environment_that_breaks_on_one_rank(cli, tmp_path):
    """Its rank says so in one line, no process hangs, and the last checkpoint of both can be resumed."""
    (tmp_path / "lives.json").write_text("[0]")
    argv = new_run(10_000, "--max-env-restarts", 2, "--checkpoint-every", 40, env="resume_envs:BrokenOnRank1")
    with cli.start("tests/ranks", 2, ROOT / f"{MAIN}.py", *argv, cwd=tmp_path) as running:
        done = running.wait(90)
    assert done.code == 1, str(done)
    assert len(re.findall("error: .*BrokenOnRank1-v0.*step 68.*lost the ball", done.err)) == 1, str(done)
    step = load(tmp_path)["step"]
    assert 80 <= step <= 138, str(done)
    again = ranks(cli, "--resume", only((tmp_path / "runs").iterdir()), "--total-timesteps", step + 10,
                  cwd=tmp_path)
    assert again.code == 0, str(again)
    assert_saved(tmp_path, more_than=step)


@pytest.mark.parametrize("made_by, started", [(1, 2), (2, 1)])
def test_other_number_of_processes(cli, tmp_path, made_by, started):
    """Refused in one line before anything is written."""
    def run(world, *argv):
        launcher = ["tests/ranks", 2, ROOT / f"{MAIN}.py"] if world == 2 else [MAIN]
        return cli(*launcher, *argv, cwd=tmp_path)

    assert run(made_by, *new_run(24)).code == 0
    run_dir = only((tmp_path / "runs").iterdir())
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert_one_line(run(started, "--resume", run_dir), f"{made_by} process", f"not {started}", ranks=2)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_interrupt_of_all_processes(cli, tmp_path):
    """Ctrl-C reaches every process of the terminal at once."""
    with cli.start("tests/ranks", 2, ROOT / f"{MAIN}.py", *new_run(100_000), cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > 15)
        for pid in children(running.pid):
            os.kill(pid, signal.SIGINT)
        done = running.wait()
    assert done.code == 0 and done.out.count("stopped and saved") == 1, str(done)
    assert_saved(tmp_path, more_than=30)


def test_ranks_leave_when_their_launcher_is_killed(cli, tmp_path):
    """Nobody tells them: they have another parent, and save."""
    with cli.start("tests/ranks", 2, ROOT / f"{MAIN}.py", *new_run(100_000), cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > 15)
        pids = children(running.pid)
        running.kill(signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL and len(pids) == 2
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert_saved(tmp_path, more_than=30)
