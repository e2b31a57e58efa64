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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.runs import load_checkpoint

RUN = """--env-id tests.fake_envs:CountingVector-v0 --size XXS --deter 8 --hidden 8 --units 8 --stoch 2
    --classes 2 --layers 1 --depth 2 --horizon 3 --batch-size 4 --batch-length 5 --learning-starts 20
    --train-ratio 20 --threads 1 --no-cuda --log-every 10 --buffer-size 200""".split()


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


def only(paths) -> Path:
    path, = paths
    return path


def load(folder: Path, script: str) -> dict:
    return load_checkpoint(only(folder.glob("runs/*")) / "checkpoint.pt", script, "cpu")


def assert_one_line(done, *words: str, ranks: int = 1) -> None:
    """The same line from every rank that gets as far."""
    lines = [line for line in done.err.split("\n") if line.startswith("error: ")]
    assert done.code == 1 and 1 <= len(lines) <= ranks, str(done)
    assert len(set(lines)) == 1 and "Traceback" not in done.err, str(done)
    assert not [word for word in words if word not in lines[0]], lines[0]


# ---- Two ranks are one process -------------------------------------------------------------------

@pytest.fixture(scope="module", params=["discrete", "continuous"])
def updates(request, script, cli, tmp_path_factory):
    """What one process and each of two ranks have after five updates on the same batches."""
    folder = tmp_path_factory.mktemp("updates")
    one = cli("tests/share_of_batch", script, request.param, folder, cwd=folder)
    two = cli("tests/ranks", 2, ROOT / "tests" / "share_of_batch.py", script, request.param, folder, cwd=folder)
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
    for one, two, three in zip(whole["metrics"], parts[0]["metrics"], parts[1]["metrics"]):
        assert two["imagined/return_scale"] == three["imagined/return_scale"] == pytest.approx(one["imagined/return_scale"], abs=1e-5)
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

    def __init__(self, script: str, *argv, cwd: Path):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   str(ROOT / f"{script}.py"), *map(str, argv)]
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


def test_torchrun_trains_stops_and_resumes(script, cli, tmp_path):
    """TERM to the launcher, then TERM to one rank of the resumed run."""
    with Torchrun(script, *RUN, "--total-timesteps", 100_000, cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > 20)
        ranks = running.ranks()
        running.process.terminate()
        running.wait()
    assert not [pid for pid in ranks if is_running(pid)], "a process is left over"
    run_dir = only((tmp_path / "runs").iterdir())
    files = sorted(path.name for path in run_dir.iterdir())
    assert [name.partition(".out")[0] for name in files] == ["args.json", "checkpoint.pt", "events", "replay"]
    assert sorted(path.name for path in (run_dir / "replay").iterdir()) == ["rank0", "rank1"]
    log = running.log.read_text()
    assert log.count("Traceback") == log.count("SignalException: Process") == 1, log  # the launcher's own
    assert log.count("run directory:") == log.count("stopped and saved") == 1, log
    assert_saved(tmp_path, script, more_than=40)

    stopped = load(tmp_path, script)["step"]
    with Torchrun(script, "--resume", run_dir, cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > stopped // 2 + 10)
        os.kill(running.ranks()[1], signal.SIGTERM)
        assert running.wait() == 0, running.log.read_text()
    assert "stopped and saved" in running.log.read_text()
    assert_saved(tmp_path, script, more_than=stopped + 20)
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    steps = [event.step for event in log.Scalars("loss/model")]
    assert steps == list(range(20, load(tmp_path, script)["step"] + 1, 10)), "one rank writes, once"


def assert_saved(folder: Path, script: str, more_than: int, short: int = 0) -> None:
    """Both ranks' rows (of rank 1 up to `short` fewer), samplers, random states, due updates."""
    state, run_dir = load(folder, script), only((folder / "runs").iterdir())
    assert len(state["ranks"]) == 2 and state["step"] > more_than
    rows = [np.load(run_dir / "replay" / f"rank{rank}" / "rows.npy") for rank in (0, 1)]
    assert [row[1] * 2 for row in rows] == [part["replay"]["count"] * 2 for part in state["ranks"]]
    assert rows[0][1] * 2 == state["step"]
    assert state["step"] - 2 * short <= rows[1][1] * 2 <= state["step"]
    assert state["updates"] == state["step"] - 19
    one, two = state["ranks"]
    assert not torch.equal(one["rng"]["torch"], two["rng"]["torch"])
    assert one["replay"]["rng"] != two["replay"]["rng"]


def test_ranks_explore_differently(script, cli, tmp_path):
    done = cli("tests/ranks", 2, ROOT / f"{script}.py", *RUN, "--total-timesteps", 80, "--learning-starts", 70,
               cwd=tmp_path)
    assert done.code == 0, str(done)
    run_dir = only((tmp_path / "runs").iterdir())
    one, two = (np.load(run_dir / "replay" / f"rank{rank}" / "action.npy")[0, :35] for rank in (0, 1))
    assert (one != two).any(), "both ranks take the same random actions"




def test_batch_that_does_not_divide(script, cli, tmp_path):
    argv = [*RUN, "--total-timesteps", 40, "--batch-size", 5]
    done = cli("tests/ranks", 2, ROOT / f"{script}.py", *argv, cwd=tmp_path)
    assert_one_line(done, "batch-size", "5", "2 processes", ranks=2)
    assert not (tmp_path / "runs").exists()


def test_environment_that_breaks_on_one_rank(script, cli, tmp_path):
    """Its rank says so in one line, no process hangs, and the last checkpoint of both can be resumed."""
    (tmp_path / "lives.json").write_text("[0]")
    argv = [*RUN, "--env-id", "tests.resume_envs:BrokenOnRank1-v0", "--total-timesteps", 10_000,
            "--max-env-restarts", 2, "--checkpoint-every", 40]
    with cli.start("tests/ranks", 2, ROOT / f"{script}.py", *argv, cwd=tmp_path) as running:
        done = running.wait(90)
    assert done.code == 1, str(done)
    assert len(re.findall("error: .*BrokenOnRank1-v0.*step 68.*lost the ball", done.err)) == 1, str(done)
    step = load(tmp_path, script)["step"]
    assert 80 <= step <= 138, str(done)
    again = cli("tests/ranks", 2, ROOT / f"{script}.py", "--resume", only((tmp_path / "runs").iterdir()),
                "--total-timesteps", step + 10, cwd=tmp_path)
    assert again.code == 0, str(again)
    assert_saved(tmp_path, script, more_than=step, short=1)  # the turn in which rank 1 broke


@pytest.mark.parametrize("made_by, started", [(1, 2), (2, 1)])
def test_other_number_of_processes(script, cli, tmp_path, made_by, started):
    """Refused in one line before anything is written."""
    def run(world, *argv):
        launcher = ["tests/ranks", 2, ROOT / f"{script}.py"] if world == 2 else [script]
        return cli(*launcher, *argv, cwd=tmp_path)

    assert run(made_by, *RUN, "--total-timesteps", 24).code == 0
    run_dir = only((tmp_path / "runs").iterdir())
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert_one_line(run(started, "--resume", run_dir), f"{made_by} process", f"not {started}", ranks=2)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_interrupt_of_all_processes(script, cli, tmp_path):
    """Ctrl-C reaches every process of the terminal at once."""
    with cli.start("tests/ranks", 2, ROOT / f"{script}.py", *RUN, "--total-timesteps", 100_000,
                   cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > 15)
        for pid in children(running.pid):
            os.kill(pid, signal.SIGINT)
        done = running.wait()
    assert done.code == 0 and done.out.count("stopped and saved") == 1, str(done)
    assert_saved(tmp_path, script, more_than=30)
