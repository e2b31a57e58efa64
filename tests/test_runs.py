"""Whole runs of tests/fake_run.py, in this process: what `common/` does around a main loop."""

import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import devices, play, rundir, runs
from common.devices import CudaGraph, Feeder
from common.envs import EnvSpec
from common.files import UserError
from common.logger import Logger
from tests import fake_run

CPU = torch.device("cpu")


def in_subprocess(code: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)


class Runner:
    """Calls fake_run's `main` with a command line; gives what it said."""

    def __init__(self, folder: Path, monkeypatch, capsys):
        self.folder, self.patch, self.capsys = folder, monkeypatch, capsys
        monkeypatch.chdir(folder)
        fake_run.LOOK.loop = 0

    def __call__(self, *flags, code=None) -> str:
        """`code`: the exit status that is expected; what was written to stderr is then returned."""
        self.patch.setattr(sys, "argv", ["fake_run.py", *map(str, flags)])
        said = ""
        try:
            fake_run.main()
            assert code is None, "it did not fail"
        except SystemExit as leaving:
            message = leaving.code if isinstance(leaving.code, str) else ""
            assert code == (1 if message else leaving.code), leaving.code
            said = message
        out, err = self.capsys.readouterr()
        assert "Traceback" not in err and said.count("\n") == 0
        return said or (err if code else out)

    @property
    def dir(self) -> Path:
        path, = (self.folder / "runs").iterdir()
        return path

    @property
    def saved(self) -> dict:
        return rundir.load_checkpoint(self.dir / "checkpoint.pt", fake_run.SCRIPT)

    def log(self) -> EventAccumulator:
        return EventAccumulator(str(self.dir), size_guidance={"scalars": 0, "images": 0}).Reload()

    def steps(self, tag: str) -> list[int]:
        return [event.step for event in self.log().Scalars(tag)]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    return Runner(tmp_path, monkeypatch, capsys)


# ---- From beginning to end -----------------------------------------------------------------------

def test_a_run_says_what_it_is_and_what_can_be_done_with_it(run):
    out = run("--total-timesteps", "4e1")
    assert {path.name.partition(".out")[0] for path in run.dir.iterdir()} == {
        "args.json", "checkpoint.pt", "events", "lock", "replay"}
    where = run.dir.relative_to(run.folder)
    for line in (f"run directory: {where}", "replay buffer: 40 timesteps, 0.00 GiB of disk",
                 "6 episodes; mean return of the last 6: 15", f"done; all of it is in {where}", f"fake_run.py --evaluate {where}",
                 f"fake_run.py --dream {where}"):
        assert line in out
    assert (run.saved["step"], run.saved["updates"], run.saved["episodes"]) == (40, 31, 6)
    assert run.steps("loss/total") == [10, 20, 30, 40]
    assert run.steps("charts/episodic_return") == [6, 12, 18, 24, 30, 36]
    assert "nothing left to do after 40 timesteps; raise --total-timesteps" in run("--resume", run.dir)


def test_a_resume_is_exact_and_remembers_its_flags(run, finished):
    """Without a step of the environment, which begins a new episode. A video changes nothing."""
    start = ["--offline", finished, "--video-every", 20, "--total-timesteps"]
    run(*start, 60)
    whole = run.saved
    shutil.rmtree(run.folder / "runs")
    run(*start, 30)
    run("--resume", run.dir, "--total-timesteps", 60, "--log-every", 5)
    assert torch.equal(whole["agent"]["total"], run.saved["agent"]["total"])
    assert whole["ranks"][0]["replay"]["rng"] == run.saved["ranks"][0]["replay"]["rng"]
    assert torch.equal(whole["ranks"][0]["rng"]["torch"], run.saved["ranks"][0]["rng"]["torch"])
    assert run.steps("loss/total") == [10, 20, 30, 35, 40, 45, 50, 55, 60]
    kept = json.loads((run.dir / "args.json").read_text())["args"]
    assert (kept["total_timesteps"], kept["log_every"], kept["resume"]) == (60, 5, "")
    assert run("--resume", run.dir, "--width", 4, code=1).startswith("error: --width 4 does not fit")


@pytest.mark.parametrize("every, steps, seen", [(20, 50, [20, 40, 50]), (20, 40, [20, 40]), (0, 40, []),
                                                (100, 40, [40]), (4, 9, []), (4, 14, [12, 14])])
def test_videos_of_the_open_loop(run, every, steps, seen):
    """Every so often, once there has been an update, and at the end, also of a short run."""
    run("--total-timesteps", steps, "--video-every", every)
    log = run.log()
    assert [event.step for event in log.Images("open_loop")] == seen if seen else not log.Tags()["images"]
    run("--resume", run.dir)
    assert fake_run.LOOK.loop == len(seen), "a resume with nothing to do makes none"


def test_a_checkpoint_by_the_clock(run, monkeypatch):
    counted = []
    original = runs.save_checkpoint
    monkeypatch.setattr(runs, "save_checkpoint", lambda path, state, script: (
        counted.append(state["step"]), original(path, state, script)))
    run("--total-timesteps", 20, "--checkpoint-every", 8)
    assert counted == [0, 8, 16, 20]
    counted.clear()
    shutil.rmtree(run.folder / "runs")
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)
    run("--total-timesteps", 5)
    assert counted == [0, 0, 1, 2, 3, 4, 5]


def test_no_clock_saves_what_is_not_finite(run, monkeypatch):
    """Many updates are made in one turn; the clock may strike between two of them."""
    original, counted = runs.Run.stopping, []
    monkeypatch.setattr(runs, "save_checkpoint", lambda path, state, script: counted.append(state["step"]))
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(runs.Run, "stopping", lambda self, metrics=None: original(
        self, {"loss/total": torch.tensor(float("nan"))}))
    assert "loss/total became nan" in run("--total-timesteps", 40, code=1)
    assert counted == [0], "the first one, of before the loop"


def test_offline_only_reads(run, tmp_path):
    run("--total-timesteps", 20)
    recording = shutil.move(run.dir, tmp_path / "recording")
    (recording / "lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in recording.rglob("*")}
    out = run("--total-timesteps", 30, "--offline", recording)
    assert "episodes" not in out and run.saved["updates"] == 21
    assert {path: path.stat().st_mtime_ns for path in recording.rglob("*")} == before
    (recording / "replay" / "reward.npy").write_bytes(b"")
    assert "reward.npy is damaged" in run("--offline", recording, "--runs-dir", "again", code=1)
    np.save(recording / "replay" / "reward.npy", np.zeros(20, np.float32))
    assert "write array[None]" in run("--offline", recording, "--runs-dir", "again", code=1)
    assert not list(tmp_path.glob("again/*")), "a failed start leaves a run directory"


# ---- What goes wrong -----------------------------------------------------------------------------

def test_a_broken_environment_costs_nothing(run):
    said = run("--fail", 17, "--total-timesteps", 30, code=1)
    assert said == ("error: lost the ball; the state is saved; mend that, then go on with: python fake_run.py --resume "
                    f"{run.dir.relative_to(run.folder)}")
    assert (run.saved["step"], run.saved["ranks"][0]["replay"]["count"]) == (17, 17)
    assert "done" in run("--resume", run.dir, "--fail", 1000) and run.saved["step"] == 30


@pytest.mark.parametrize("call", [999, 0])
def test_a_run_that_cannot_begin_leaves_nothing(run, call):
    assert run("--fail", call, code=1) == "error: lost the ball"
    assert not list(run.folder.glob("runs/*"))


def test_a_video_that_fails_costs_nothing(run):
    said = run("--capture-video", "--total-timesteps", 60, code=1)
    assert "recording.mp4" in said and "the state is saved" in said
    assert run.saved["step"] == 49  # in the ninth episode
    assert sorted(path.name for path in run.dir.glob("videos/*.mp4")) == [
        "episode-000000.mp4", "episode-000001.mp4"]


def test_a_number_that_is_not_finite_stops_the_run(run):
    said = run("--nan", 5, "--total-timesteps", 30, "--checkpoint-every", 12, code=1)
    assert said.startswith("error: loss/total became nan at update 5;") and "--resume" in said
    assert run.saved["step"] == 12


def test_a_run_has_one_owner(run):
    run("--total-timesteps", 20)
    lock = rundir.own_run_dir(run.dir)
    assert "another process trains in" in run("--resume", run.dir, "--total-timesteps", 30, code=1)
    assert "over 3 episodes" in run("--evaluate", run.dir)
    assert "dream.gif" in run("--dream", run.dir)
    run("--total-timesteps", 12, "--offline", run.dir, "--runs-dir", "other")
    lock.close()
    run("--resume", run.dir, "--total-timesteps", 30)


def damage_checkpoint(run_dir, **changes) -> None:
    found = torch.load(run_dir / "checkpoint.pt", weights_only=True) | changes
    torch.save({name: value for name, value in found.items() if value is not None}, run_dir / "checkpoint.pt")


def damage_args(run_dir, **changes) -> None:
    found = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps(found | {"args": found["args"] | changes}))


DAMAGES = {
    "a part is gone": (lambda d: damage_checkpoint(d, optimizers=None), "lacks optimizers"),
    "another network": (lambda d: damage_checkpoint(d, agent={"total": torch.zeros(7)}), "does not fit this code"),
    "no network": (lambda d: damage_checkpoint(d, agent={}), "does not fit this code"),
    "no spec": (lambda d: damage_checkpoint(d, spec={}), "does not fit this code"),
    "another environment": (lambda d: damage_checkpoint(d, spec=vars(EnvSpec((8, 8, 3), 3, 2, False))),
                            "image_shape is None, was (8, 8, 3); discrete is True, was False"),
    "text for a number": (lambda d: damage_args(d, batch_size="2"), "'2' for batch_size"),
    "null": (lambda d: damage_args(d, seed=None), "None for seed"),
    "number for a yes": (lambda d: damage_args(d, cuda=1), "1 for cuda"),
    "yes for a number": (lambda d: damage_args(d, speed=True), "True for speed"),
    "no such choice": (lambda d: damage_args(d, level="odd"), "'odd' for level"),
    "text among seeds": (lambda d: damage_args(d, eval_env_seed=[1, "2"]), "for eval_env_seed"),
    "unknown": (lambda d: damage_args(d, gone=1), "does not know: gone"),
    "no rewards": (lambda d: (d / "replay" / "reward.npy").unlink(), "reward.npy is missing"),
    "no vectors": (lambda d: (d / "replay" / "vector.npy").unlink(), "vector.npy is missing"),
    "no counters": (lambda d: (d / "replay" / "rows.npy").unlink(), "rows.npy is missing"),
    "no replay": (lambda d: shutil.rmtree(d / "replay"), "rows.npy is missing"),
    "an older replay": (lambda d: np.save(d / "replay" / "rows.npy", np.int64([9, 9])), "older than the checkpoint"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 20 timesteps, of which tests take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["fake_run.py", "--total-timesteps", "20"])
        fake_run.main()
    path, = (folder / "runs").iterdir()
    return path


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_directory_is_one_line(run, finished, name):
    shutil.copytree(finished, run.folder / "runs" / "one")
    damage, message = DAMAGES[name]
    damage(run.dir)
    before = {path: path.read_bytes() for path in run.dir.rglob("*") if path.is_file()}
    said = run("--resume", run.dir, "--total-timesteps", 30, code=1)
    assert said.startswith("error: ") and message in said
    assert {path: path.read_bytes() for path in run.dir.rglob("*") if path.is_file()} == before


def test_integers_and_numbers_may_stand_for_one_another(run, finished):
    shutil.copytree(finished, run.folder / "runs" / "one")
    damage_args(run.dir, speed=1, eval_env_seed=[1, 2], fail=None)
    assert "environment seed 2" in run("--evaluate", run.dir)


# ---- The command line ----------------------------------------------------------------------------

def test_help_shows_the_groups_of_args(run):
    out = run("--help", code=0)
    titles = ["The task options", "a resume keeps these", "The run options", "Instead options"]
    assert [line for title in titles for line in out.splitlines() if title in line] and all(
        out.index(one) < out.index(two) for one, two in zip(titles, titles[1:]))
    assert "--eval-env-seed" in out and "Length of the observation (default: 3)" in out


@pytest.mark.parametrize("flags, message", [
    (["--eval-mode"], "--eval-mode is now --eval-greedy."),
    (["--no-eval-mode"], "--no-eval-mode is now --eval-greedy."),
    (["--horizon=3"], "--horizon is now --imag-horizon."),
    (["--speed", "-1"], "--speed is -1.0; it must be at least 0."),
    (["--speed", "3"], "--speed is 3.0; it must be at most 2."),
    (["--speed", "nan"], "--speed is nan"),
    (["--num-envs", "0"], "--num-envs is 0; it must be above 0."),
    (["--eval-env-seed", "3", "-1"], "--eval-env-seed is -1; it must be at least 0."),
    (["--resume", "a", "--dream", "b"], "--resume and --dream exclude each other."),
    (["--resume", "a"], "a is not a run directory"),
])
def test_bad_flags(run, flags, message):
    assert message in run(*flags, code=1) and not list(run.folder.iterdir())


@pytest.mark.parametrize("text, value", [("12", 12), ("1e1", 10), ("1_2", 12), ("1.5e1", 15),
                                         ("1.5", None), ("x", None), ("inf", None), ("nan", None)])
def test_integers(run, text, value):
    if value is None:
        assert "total-timesteps" in run("--total-timesteps", text, code=2)
    else:
        run("--total-timesteps", text)
        assert run.saved["step"] == value


# ---- Playing -------------------------------------------------------------------------------------

def test_no_two_parts_of_a_run_get_the_same_seed_for_its_environments(run, monkeypatch):
    """An evaluation on the episodes of the training would flatter, a resume would repeat them."""
    original, seeds = fake_run.FakeEnvs.__init__, []

    def record(self, config, num_envs, seed, *rest):
        seeds.append(seed)
        original(self, config, num_envs, seed, *rest)

    monkeypatch.setattr(fake_run.FakeEnvs, "__init__", record)
    monkeypatch.setattr(fake_run, "Envs", fake_run.FakeEnvs, raising=False)
    run("--total-timesteps", 10)
    run("--resume", run.dir, "--total-timesteps", 20)
    run("--resume", run.dir, "--total-timesteps", 30)
    run("--evaluate", run.dir)
    assert len(set(seeds)) == 4, seeds


def test_evaluation_of_several_levels(run, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    out = run("--evaluate", finished, "--eval-env-seed", 5, 0, "--eval-episodes", 2, "--num-envs", 2)
    assert out.count("return 15, length 5") == 4
    assert "environment seed 5: mean 15" in out and "environment seed 0: mean 15" in out
    assert out.splitlines()[-1].endswith("over 4 episodes")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_evaluation_that_is_interrupted_says_what_it_has(run, finished, monkeypatch):
    original, calls = fake_run.FakeEnvs.step, []

    def step(self, action):
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return original(self, action)

    monkeypatch.setattr(fake_run.FakeEnvs, "step", step)
    monkeypatch.setattr(sys, "argv", ["fake_run.py", "--evaluate", str(finished)])
    with pytest.raises(SystemExit) as leaving:
        fake_run.main()
    out, err = run.capsys.readouterr()
    assert (leaving.value.code, err) == (130, "\ninterrupted\n") and "over 2 episodes" in out


def test_evaluation_without_an_end_names_the_cure(run, finished, monkeypatch):
    monkeypatch.setattr(play, "PATIENCE", 4)
    run.patch.setattr(sys, "argv", ["fake_run.py", "--evaluate", str(finished)])
    fake_run.main()
    assert "no episode has ended in 4 timesteps; --max-episode-steps" in run.capsys.readouterr().err


def test_other_spaces_than_the_agents(run, finished, monkeypatch):
    monkeypatch.setattr(fake_run.FakeEnvs, "break_at", lambda self, call: vars(self).update(
        spec=EnvSpec(None, 3, 5, True)))
    assert "action_dim is 5, was 2" in run("--evaluate", finished, code=1)


# ---- Randomness, processes, signals --------------------------------------------------------------

def test_random_state_goes_on_where_it_was():
    def draw():
        return random.random(), float(np.random.rand()), np.random.randn(), float(torch.rand(()))

    devices.seed_everything(3, deterministic=True)
    first = draw()
    buffer = io.BytesIO()
    torch.save(devices.rng_state(CPU), buffer)
    expected = draw()
    devices.seed_everything(3, deterministic=False)
    assert draw() == first
    buffer.seek(0)
    devices.set_rng_state(torch.load(buffer, weights_only=True), CPU)
    assert draw() == expected


def test_distributed_only_under_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert devices.setup_distributed("cpu") == (0, 1, 0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": port}
    for name, value in {**launched, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    assert devices.setup_distributed("cpu") == (0, 1, 0)
    assert torch.distributed.get_backend() == "gloo"
    assert devices.max_over_ranks(2) == 2 and float(devices.mean_over_ranks(torch.tensor([1.0, 2]))) == 1.5
    torch.distributed.destroy_process_group()


LOOP = """
    import signal, sys, time
    from common.runs import GracefulExit
    old = signal.getsignal(signal.SIGTERM)
    with GracefulExit() as stop:
        print("ready", flush=True)
        while not stop.requested:
            time.sleep(0.01)
        print("stopping", flush=True)
        if len(sys.argv) > 1:
            time.sleep(30)
    assert signal.getsignal(signal.SIGTERM) == old
    print("saved", flush=True)
    """


@pytest.mark.parametrize("number, twice", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_graceful_exit(number, twice):
    command = [sys.executable, "-c", textwrap.dedent(LOOP), *(["wait"] if twice else [])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "stopping\n"
        if twice:
            process.send_signal(number)
        # Not communicate(): it would miss what readline() has already read ahead.
        rest, errors = process.stdout.read(), process.stderr.read()
        process.wait(timeout=20)
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()
    assert "Stopping after this step" in errors and "Traceback" not in errors
    assert ("interrupted" in errors) == twice
    assert (rest, process.returncode == 0) == (("", False) if twice else ("saved\n", True))


def test_interrupt_during_the_imports_is_one_line():
    code = "import common, os, signal, time\nprint('ready', flush=True)\ntime.sleep(30)"
    with subprocess.Popen(  # a job in the background of a script may have been told to ignore Ctrl-C
            [sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == "\ninterrupted\n"
    assert process.returncode == -signal.SIGINT  # 130 in a shell


# ---- Feeding the device --------------------------------------------------------------------------

def fed(folder, rows=12) -> Feeder:
    replay = fake_run.Replay(folder, EnvSpec(None, 3, 2, True), 20, 1, 5)
    for n in range(rows):
        replay.rings.append({"vector": np.full((1, 3), n), "reward": np.zeros(1)})
    return Feeder(replay, CPU, 2, 4)


def test_the_batch_that_waits_is_in_the_checkpoint(tmp_path):
    """As on a GPU: drawn ahead from 12 rows, and trained on after a resume, when there are more."""
    feeder = fed(tmp_path / "one")
    feeder.waiting = waiting = feeder.draw()
    feeder.replay.rings.flush()
    state = {"replay": feeder.replay.state_dict(), "feeder": feeder.state_dict()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    resumed = fed(tmp_path / "two", rows=0)
    resumed.replay.load_state_dict(state["replay"])
    resumed.load_state_dict(state["feeder"])
    assert torch.equal(resumed.next().vector, waiting.vector) and isinstance(waiting, fake_run.Batch)
    feeder.next()
    assert torch.equal(resumed.next().vector, feeder.next().vector)
    assert feeder.state_dict() == {"waiting": None}


def test_a_feeder_is_ready_when_there_is_a_window(tmp_path, monkeypatch):
    feeder, asked = fed(tmp_path, rows=3), []
    monkeypatch.setattr(devices, "max_over_ranks", lambda value: asked.append(value) or value)
    assert not feeder.ready() and not feeder.ready()
    feeder.replay.rings.append({"vector": np.zeros((1, 3)), "reward": np.zeros(1)})
    assert feeder.ready() and feeder.ready() and asked == [True, True, False], "once ready, nobody is asked"


def test_a_cuda_graph_warms_up_aside_and_reads_new_batches(monkeypatch):
    """With CUDA simulated: three calls on a side stream, a capture, then replays."""
    where, calls = ["main"], []

    @contextmanager
    def stream(name):
        where.append(name)
        yield
        where.pop()

    aside = SimpleNamespace(wait_stream=lambda other: calls.append(("aside waits for", other.name)), name="aside")
    main = SimpleNamespace(wait_stream=lambda other: calls.append(("main waits for", other.name)), name="main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: aside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: stream(s.name))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(  # works where it was recorded
        replay=lambda: graph.outputs["sum"].copy_(graph.inputs.vector.sum() + constant.sum())))

    def function(batch, constant):
        calls.append(where[-1])
        return {"sum": batch.vector.sum() + constant.sum()}

    graph, constant = CudaGraph(function), torch.ones(2)
    batches = [fake_run.Batch(torch.full((2, 2), float(n)), None) for n in range(6)]
    assert [float(graph(batch, constant)["sum"]) for batch in batches] == [2, 6, 10, 14, 18, 22]
    assert calls == [("aside waits for", "main"), "aside", ("main waits for", "aside")] * 3 + ["main"]
    graph.free()
    assert graph.graph is graph.inputs is graph.outputs is None


# ---- Log -----------------------------------------------------------------------------------------

SETTINGS = fake_run.Args(total_timesteps=20)


def read_log(path) -> EventAccumulator:
    return EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0}).Reload()


@pytest.mark.parametrize("saved", [0, 6])
def test_resume_strikes_out_what_came_after_the_checkpoint(tmp_path, saved):
    """Also what a run logged that was killed before its first periodic checkpoint."""
    killed = Logger(tmp_path, SETTINGS)
    for step in range(1, 11):
        killed.scalars({"charts/a": 1.0}, step)
        killed.progress(step, episode=12345.678)
    killed.close()
    time.sleep(1.1)  # event files are read in the order of their names: seconds, then a counter
    resumed = Logger(tmp_path, SETTINGS, step=saved, resumed=True)
    resumed.scalars({"charts/a": 2.0}, 8)
    resumed.close()
    events = read_log(tmp_path).Scalars("charts/a")
    assert [(e.step, e.value) for e in events] == [*((s, 1.0) for s in range(1, saved + 1)), (8, 2.0)]
    assert resumed.bar.n == saved and killed.bar.n == 10
    text = read_log(tmp_path).Tensors("hyperparameters/text_summary")
    assert len(text) == 1 and b"|total_timesteps|20|" in text[0].tensor_proto.string_val[0]


def test_the_bar_ends_at_its_end(tmp_path):
    logger = Logger(tmp_path, SETTINGS)
    logger.progress(23)  # four environments: 20 timesteps are not a multiple
    logger.close()
    assert logger.bar.n == 20


@pytest.mark.parametrize("C", [1, 3])
def test_video_in_the_log_is_an_animation(tmp_path, C):
    logger = Logger(tmp_path, SETTINGS)
    logger.video("dream", np.arange(6, dtype=np.uint8).repeat(16 * 20 * C).reshape(6, 16, 20, C) * 40, step=3)
    logger.close()
    event, = read_log(tmp_path).Images("dream")
    image = Image.open(io.BytesIO(event.encoded_image_string))
    assert event.step == 3 and (event.width, event.height) == (20, 16)
    assert image.format == "GIF" and image.n_frames == 6 and image.info["loop"] == 0


def test_disabled_logger_does_nothing(tmp_path, capfd):
    logger = Logger(tmp_path, fake_run.Args(track=True), enabled=False)
    logger.scalars({"a": 1.0}, 1)
    logger.video("b", np.zeros((1, 8, 8, 3), np.uint8), 1)
    logger.progress(3, c=1.0)
    logger.flush()
    logger.close()
    assert not os.listdir(tmp_path) and capfd.readouterr() == ("", "")


def test_wandb_is_optional_and_gets_its_names(tmp_path, monkeypatch):
    args = fake_run.Args(track=True, wandb_project_name="p", wandb_entity="team")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Logger(tmp_path, args)
    given = {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **all: given.update(all),
                                                              finish=lambda: given.update(finished=True)))
    Logger(tmp_path, args).close()
    assert given.items() >= {"project": "p", "entity": "team", "name": tmp_path.name, "finished": True}.items()


def test_full_disk_under_the_log_is_one_line(tmp_path):
    """TensorBoard writes in a thread of its own, which would print a traceback."""
    done = in_subprocess("""
        import resource, sys, time
        from common.cli import one_line_errors
        from common.logger import Logger
        from tests.fake_run import Args
        with one_line_errors():
            logger = Logger(sys.argv[1], Args())
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
            try:
                for step in range(100_000):
                    logger.scalars({"a": 1.0}, step)
                    if step % 1000 == 0:
                        logger.flush()
            finally:
                logger.close()
        """, tmp_path)
    lines = [line for line in done.stderr.replace("\r", "\n").split("\n") if line and "steps/s" not in line]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: cannot write") and "File too large" in lines[0]
