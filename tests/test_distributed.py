"""N processes are one process with the whole batch; a real torchrun, and what it leaves behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS

from common.disk import load_checkpoint
from tests.command_lines import MAIN, assert_says, flags, only, scalars

HANG = 300.0  # seconds after which a process that should have left counts as hanging


def new_run(steps: int, env: str = "fake_envs:CountingVector", **changes) -> list[str]:
    """Two ranks make their first update at step 20: then 12 windows of 5 rows can be drawn."""
    ours = dict(batch_size=4, train_ratio=20.0, buffer_size=200, learning_starts=12)
    return flags(MAIN, f"tests.{env}-v0", steps, **ours | changes)


def two(*argv) -> tuple:
    """Two processes of the script, for `cli` and `cli.start`."""
    return "tests/ranks", 2, ROOT / f"{MAIN}.py", *argv


def load(folder: Path) -> dict:
    return load_checkpoint(only(folder.glob("runs/*")))


def assert_refused(done, *words: str) -> None:
    """Exit status 1 and one line that says why, the same from each rank that says it."""
    lines = [line for line in done.err.split("\n") if line.startswith("error: ")]
    assert done.code == 1 and len(set(lines)) == 1 and "Traceback" not in done.err, str(done)
    assert_says(lines[0], *words)


# ---- Two ranks are one process -------------------------------------------------------------------

@pytest.fixture(scope="module", params=["discrete", "continuous"])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=SCRIPTS)
def updates(request, kind, cli, tmp_path_factory):
    """What one process and each of two ranks have after five updates on the same batches."""
    folder = tmp_path_factory.mktemp("updates")
    arguments = request.param, kind, folder
    done = [cli("tests/share_of_batch", *arguments, cwd=folder),
            cli("tests/ranks", 2, ROOT / "tests" / "share_of_batch.py", *arguments, cwd=folder)]
    assert [one.code for one in done] == [0, 0], f"{done[0]}\n{done[1]}"
    return [torch.load(folder / name, weights_only=True)
            for name in ("0of1.pt", "0of2.pt", "1of2.pt")]


def test_two_ranks_get_the_parameters_of_one_process(updates):
    """And the return scale of V3, to rounding.

    The sums have another order, so errors are relative to the largest number of a tensor, or to 1,
    the size of most inputs. They are 6e-7 at most (measured on an Intel Xeon); gradients
    of one network that are not averaged give 5e-4 or more, a return scale or free nats of a share
    of the batch 2e-3 or more.
    """
    whole, *parts = (found["agent"] for found in updates)
    assert whole.keys() == parts[0].keys() == parts[1].keys()
    for name, value in whole.items():
        assert torch.equal(parts[0][name], parts[1][name]), f"{name} differs between the ranks"
        limit = 2e-5 * float(value.abs().max().clamp(min=1))
        assert (parts[0][name] - value).abs().max() < limit, name
    if "return_scale.range" in whole:
        low, high = whole["return_scale.range"]
        assert high - low > 0.01


def test_two_ranks_clip_by_the_norm_of_the_whole_gradient(updates):
    """Norms differ by 1e-6 of their size at most; by 2% or more where something is not averaged."""
    whole, *parts = (found["metrics"] for found in updates)
    same = [name for name in whole[0] if name.startswith("grad_norm/") or name.endswith("_scale")]
    one_loss = "loss/all" in whole[0]
    assert len(same) == (1 if one_loss else 3) + ("imagined/return_scale" in whole[0])
    names = ["loss/actor", "loss/critic", "loss/all" if one_loss else "loss/model"]
    for one, *both in zip(whole, *parts):
        for name in same:
            assert both[0][name] == both[1][name] == pytest.approx(one[name], rel=1e-4), name
        for name in names:  # means of numbers near 1
            mean = (both[0][name] + both[1][name]) / 2
            assert mean == pytest.approx(one[name], rel=1e-4, abs=1e-4), name


def test_the_shares_are_different(updates):
    """Or all of the above would say nothing."""
    _, one, two = updates
    assert not torch.equal(one["batch"], two["batch"])
    assert all(a["loss/reward"] != b["loss/reward"] for a, b in zip(one["metrics"], two["metrics"]))
    for limit in one["limit"].values():
        assert any((a["latent/kl"] < limit) != (b["latent/kl"] < limit)
                   for a, b in zip(one["metrics"], two["metrics"]))


# ---- A whole run ---------------------------------------------------------------------------------

def processes() -> dict[int, int]:
    """{process: its parent}, without those that are dead and only wait for their parent."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True,
                           text=True).stdout
    rows = [line.split() for line in table.splitlines()]
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


def children(pid: int) -> list[int]:
    return [child for child, parent in processes().items() if parent == pid]


class Torchrun:
    """A real one, on two processes."""

    def __init__(self, *argv, cwd: Path):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", "2", str(ROOT / f"{MAIN}.py"), *map(str, argv)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.log = cwd / "torchrun.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log,
                                            stderr=log)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:  # the test failed while it ran
            for pid in children(self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + HANG
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)


def rows_written(folder: Path) -> int:
    files = folder.glob("runs/*/replay/rank1/rows.npy")
    return max((int(np.fromfile(path, np.int64)[-1]) for path in files), default=0)


def assert_saved(folder: Path, more_than: int) -> None:
    """Both ranks' rows, samplers, random states, due updates."""
    state, run_dir = load(folder), only((folder / "runs").iterdir())
    assert len(state["ranks"]) == 2 and state["step"] > more_than
    rows = [np.load(run_dir / "replay" / f"rank{rank}" / "rows.npy")[1] * 2 for rank in (0, 1)]
    assert rows == [part["replay"]["count"] * 2 for part in state["ranks"]] == [state["step"]] * 2
    # Two updates are due each time: one may be left.
    assert state["step"] - 20 <= state["updates"] <= state["step"] - 19
    one, two = state["ranks"]
    assert one["replay"]["rng"] != two["replay"]["rng"]
    assert not torch.equal(one["rng"], two["rng"])


def test_torchrun_trains_stops_and_resumes(cli, tmp_path):
    """TERM to the launcher, then TERM to one rank of the resumed run."""
    with Torchrun(*new_run(100_000), cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > 20)
        ranks = children(running.process.pid)
        running.process.terminate()
        running.process.wait(HANG)
    assert len(ranks) == 2 and not set(ranks) & processes().keys(), "a process is left over"
    log, run_dir = running.log.read_text(), only((tmp_path / "runs").iterdir())
    assert log.count("run directory:") == log.count("stopped and saved") == 1, log
    assert len(list(run_dir.glob("events*"))) == len(list(run_dir.glob("checkpoint.pt*"))) == 1
    assert sorted(path.name for path in (run_dir / "replay").iterdir()) == ["rank0", "rank1"]
    assert_saved(tmp_path, more_than=40)

    stopped = load(tmp_path)["step"]
    with cli.start(*two("--resume", run_dir), cwd=tmp_path) as resumed:
        resumed.wait_for(lambda: rows_written(tmp_path) > stopped // 2 + 10)
        os.kill(children(resumed.pid)[1], signal.SIGTERM)
        done = resumed.wait()
    assert done.code == 0 and done.out.count("stopped and saved") == 1, str(done)
    assert_saved(tmp_path, more_than=stopped + 20)
    steps = [step for step, _ in scalars(run_dir)["loss/model"]]
    assert steps == list(range(20, load(tmp_path)["step"] + 1, 10)), "one rank writes, once"


def test_ranks_explore_differently(cli, tmp_path):
    done = cli(*two(*new_run(80, learning_starts=70)), cwd=tmp_path)
    assert done.code == 0, str(done)
    run_dir = only((tmp_path / "runs").iterdir())
    one, other = (np.load(run_dir / "replay" / f"rank{rank}" / "action.npy")[0, :35]
                  for rank in (0, 1))
    assert (one != other).any(), "both ranks take the same random actions"


def test_batch_that_does_not_divide(cli, tmp_path):
    done = cli(*two(*new_run(40, batch_size=5)), cwd=tmp_path)
    assert_refused(done, "batch-size", "5", "2 processes")
    assert not (tmp_path / "runs").exists()


def test_environment_that_breaks_on_one_rank(cli, tmp_path):
    """Its rank says so in one line, no process hangs, and the last checkpoint can be resumed."""
    (tmp_path / "lives.json").write_text("[0]")
    argv = new_run(10_000, "resume_envs:BrokenOnRank1", checkpoint_every=20)
    done = cli(*two(*argv), cwd=tmp_path)
    assert done.code == 1, str(done)
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len([line for line in lines if "lost the ball" in line]) == 1, str(done)
    step = load(tmp_path)["step"]
    assert step >= 20, str(done)
    again = cli(*two("--resume", only((tmp_path / "runs").iterdir()), "--total-timesteps",
                     step + 10), cwd=tmp_path)
    assert again.code == 0, str(again)
    assert_saved(tmp_path, more_than=step)


@pytest.mark.parametrize("made_by, started", [(1, 2), (2, 1)])
def test_other_number_of_processes(cli, tmp_path, made_by, started):
    """Refused in one line before anything is written."""
    def run(world, *argv):
        return cli(*(two(*argv) if world == 2 else (MAIN, *argv)), cwd=tmp_path)

    assert run(made_by, *new_run(24)).code == 0
    run_dir = only((tmp_path / "runs").iterdir())
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    done = run(started, "--resume", run_dir)
    assert_refused(done, f"start {made_by} process")
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_interrupt_of_all_processes(cli, tmp_path):
    """Ctrl-C reaches every process of the terminal at once."""
    with cli.start(*two(*new_run(100_000)), cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > 15)
        for pid in children(running.pid):
            os.kill(pid, signal.SIGINT)
        done = running.wait()
    assert done.code == 0 and done.out.count("stopped and saved") == 1, str(done)
    assert_saved(tmp_path, more_than=30)


def test_ranks_leave_when_their_launcher_is_killed(cli, tmp_path):
    """Nobody tells them: they have another parent, and save."""
    with cli.start(*two(*new_run(100_000)), cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > 15)
        pids = children(running.pid)
        running.kill(signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL and len(pids) == 2
    deadline = time.monotonic() + HANG
    while set(pids) & processes().keys():
        assert time.monotonic() < deadline, "a process is left over"
        time.sleep(0.05)
    assert_saved(tmp_path, more_than=30)
