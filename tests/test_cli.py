"""What a user meets at the command line, in processes of their own (`Runner` in conftest.py)."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.runs import load_checkpoint

ENV = "tests.fake_envs:Counting-v0"
TINY = """--size XXS --deter 8 --hidden 8 --units 8 --stoch 2 --classes 2 --layers 1 --depth 2 --horizon 3
    --batch-size 3 --batch-length 5 --learning-starts 20 --train-ratio 15 --image-size 8 --threads 1
    --video-every 0 --log-every 10 --no-cuda --checkpoint-every 1000""".split()
TIMING = ("charts/SPS", "charts/updates_per_second")


def new_run(steps: int, *flags, env: str = ENV) -> list[str]:
    return ["--env-id", env, *TINY, "--total-timesteps", str(steps), *map(str, flags)]


def run_dir_in(folder: Path) -> Path:
    path, = (folder / "runs").iterdir()
    return path


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Of all event files together, without those that depend on the clock."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]
            if tag not in TIMING}


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def progress_of(run_dir: Path, script: str) -> tuple[int, int]:
    state = load_checkpoint(run_dir / "checkpoint.pt", script, "cpu")
    return state["step"], state["updates"]


def rows_written(folder: Path) -> int:
    """By a run that is under way."""
    try:
        return int(np.load(next(folder.glob("runs/*/replay/rows.npy")))[1])
    except (StopIteration, OSError, ValueError):
        return 0


def assert_user_error(done, *words: str, code: int = 1) -> None:
    """Exit status 1, one line that says what is wrong, no traceback."""
    lines = [line for line in done.err.split("\n") if line.startswith("error: ")]
    assert done.code == code and len(lines) == 1 and "Traceback" not in done.err, str(done)
    assert "Warning" not in done.err, str(done)
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in {lines[0]}"


# ---- A run and what can be done with it ----------------------------------------------------------

@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def trained(script, cli, tmp_path_factory):
    """A run of 40 timesteps; tests that write to it take a copy."""
    folder = tmp_path_factory.mktemp("trained")
    done = cli(script, *new_run(40), "--capture-video", cwd=folder)
    assert done.code == 0, str(done)
    return run_dir_in(folder), done


@pytest.fixture
def copied(trained, tmp_path):
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def test_run_directory(script, trained):
    run_dir, done = trained
    label = re.fullmatch(rf"tests\.fake_envs_Counting-v0__{script}__1__\d{{8}}-\d{{6}}", run_dir.name)
    assert label and str(run_dir.relative_to(run_dir.parents[1])) in done.out
    files = {path.name for path in run_dir.iterdir()}
    assert {"args.json", "checkpoint.pt", "replay", "videos"} <= files
    assert [name for name in files if name.startswith("events.out.tfevents")]
    assert not [name for name in files if name.endswith(".tmp")]
    assert {path.stem for path in (run_dir / "replay").glob("*.npy")} >= {"action", "reward", "image", "vector"}
    saved = json.loads((run_dir / "args.json").read_text())
    assert saved["script"] == script and saved["args"]["env_id"] == ENV and saved["args"]["deter"] == 8
    # the first update at step 20, then one per step: 15 replayed timesteps, as many as a batch holds
    assert progress_of(run_dir, script) == (40, 21)
    assert "Warning" not in done.err and "Traceback" not in done.err, done.err
    assert [path for path in (run_dir / "videos").glob("episode-*.mp4") if path.stat().st_size]


def test_training_curves(trained):
    curves = scalars(trained[0])
    # CountingEnv: rewards 1 to 5; an episode ends at every sixth timestep
    assert curves["charts/episodic_return"] == [(step, 15.0) for step in range(6, 41, 6)]
    assert curves["charts/episodic_length"] == [(step, 5.0) for step in range(6, 41, 6)]
    assert {"loss/model", "loss/image", "loss/reward", "loss/actor", "loss/critic", "grad_norm/model",
            "grad_norm/actor", "grad_norm/critic", "actor/entropy"} <= curves.keys()
    assert all(np.isfinite([value for _, value in curve]).all() for curve in curves.values())
    assert [step for step, _ in curves["loss/model"]] == [20, 30, 40]
    log = EventAccumulator(str(trained[0])).Reload()
    assert set(TIMING) <= set(log.Tags()["scalars"])


def test_same_seed_same_numbers(script, trained, cli, tmp_path):
    """Bit for bit; and another seed gives others. Once the ordinary way, without the fork server."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *new_run(40)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    again = run_dir_in(tmp_path)
    assert scalars(again) == scalars(trained[0])
    one, two = (load_checkpoint(path / "checkpoint.pt", script, "cpu") for path in (again, trained[0]))
    assert one["agent"].keys() == two["agent"].keys()
    assert all(torch.equal(one["agent"][name], two["agent"][name]) for name in one["agent"])
    (tmp_path / "other").mkdir()
    assert cli(script, *new_run(40, "--seed", 2), cwd=tmp_path / "other").code == 0
    other = scalars(run_dir_in(tmp_path / "other"))
    assert other["loss/model"] != scalars(again)["loss/model"]


def test_resume_goes_on(script, copied, cli, tmp_path):
    before = scalars(copied)
    done = cli(script, "--resume", copied, "--total-timesteps", 52, cwd=tmp_path)
    # The buffer was made for the 40 timesteps of the first call.
    assert done.code == 0, str(done)
    assert progress_of(copied, script) == (52, 33)
    after = scalars(copied)
    assert all(after[tag][:len(curve)] == curve for tag, curve in before.items()), "the past was changed"
    assert [step for step, _ in after["loss/model"]] == [20, 30, 40, 50]
    assert not [path for path in tmp_path.iterdir() if path != copied], "a second run directory"


def test_resume_of_a_finished_run_changes_nothing_that_matters(script, copied, cli, tmp_path):
    done = cli(script, "--resume", copied, cwd=tmp_path)
    assert done.code == 0 and progress_of(copied, script) == (40, 21), str(done)


def test_terminated_run_is_saved_and_resumes(script, cli, tmp_path):
    """SIGTERM, as a cluster sends it: exit status 0, everything saved, the command to go on printed."""
    with cli.start(script, *new_run(100_000, "--buffer-size", 500), cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > 30)
        running.kill(signal.SIGTERM)
        done = running.wait()
    assert done.code == 0 and "Traceback" not in done.err, str(done)
    run_dir = run_dir_in(tmp_path)
    printed = re.search(rf"python {script}\.py --resume (\S+)", done.out)
    assert printed and (tmp_path / printed[1]).resolve() == run_dir.resolve(), str(done)
    step, updates = progress_of(run_dir, script)
    assert step == np.load(run_dir / "replay" / "rows.npy")[1] > 30 and updates == step - 19
    again = cli(script, "--resume", printed[1], "--total-timesteps", step + 5, cwd=tmp_path)
    assert again.code == 0 and progress_of(run_dir, script) == (step + 5, updates + 5), str(again)


def test_killed_run_resumes_from_its_last_checkpoint(script, cli, tmp_path):
    """SIGKILL, with a ring that is shorter than the run."""
    run = new_run(100_000, "--buffer-size", 12, "--checkpoint-every", 40)
    with cli.start(script, *run, cwd=tmp_path) as running:
        running.wait_for(lambda: rows_written(tmp_path) > 44)
        running.kill(signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL
    run_dir = run_dir_in(tmp_path)
    step, _ = progress_of(run_dir, script)
    done = cli(script, "--resume", run_dir, "--total-timesteps", step + 40, cwd=tmp_path)
    assert done.code == 0 and progress_of(run_dir, script)[0] == step + 40, str(done)


def test_killed_between_checkpoints_with_a_short_ring(script, cli, tmp_path):
    """A checkpoint at 30, rows up to 60 and more written, a ring of 12: nothing of it is left."""
    done = cli(script, *new_run(30, "--buffer-size", 12), cwd=tmp_path)
    assert done.code == 0, str(done)
    run_dir = run_dir_in(tmp_path)
    checkpoint = (run_dir / "checkpoint.pt").read_bytes()
    assert cli(script, "--resume", run_dir, "--total-timesteps", 70, cwd=tmp_path).code == 0
    (run_dir / "checkpoint.pt").write_bytes(checkpoint)  # as if killed at 70
    done = cli(script, "--resume", run_dir, "--total-timesteps", 80, cwd=tmp_path)
    assert done.code == 0 and progress_of(run_dir, script)[0] == 80, str(done)


def test_evaluate_prints_every_return_and_changes_nothing(script, trained, cli, tmp_path):
    before = hashes(trained[0])
    once, again = (cli(script, "--evaluate", trained[0], "--eval-episodes", 3, cwd=tmp_path) for _ in range(2))
    assert once.code == 0 and once.err == "" and once.out == again.out, str(once)
    returns = re.findall(r"return ([\d.]+)", once.out)
    assert [float(number) for number in returns[:3]] == [15.0] * 3
    last = once.out.strip().split("\n")[-1]
    assert re.search(r"mean 15\b", last) and re.search(r"deviation 0\b", last) and "3 episodes" in last
    assert hashes(trained[0]) == before and not list(tmp_path.iterdir())


def test_dream_writes_pictures(script, copied, cli, tmp_path):
    before = hashes(copied)
    done = cli(script, "--dream", copied, "--dream-context", 2, "--dream-horizon", 3, cwd=tmp_path)
    assert done.code == 0, str(done)
    after = hashes(copied)
    made = after.keys() - before.keys()
    assert {Path(name).suffix for name in made} == {".gif", ".png"}
    assert {name: after[name] for name in before} == before
    for name in made:
        assert name in done.out or Path(name).name in done.out
        with Image.open(copied / name) as image:
            assert image.width > image.height > 0
            if image.format == "GIF":
                assert image.n_frames == 5


def test_offline_trains_from_a_recording(script, trained, cli, tmp_path):
    """Without a single step of the environment, and without touching the recording."""
    before = hashes(trained[0])
    done = cli(script, *new_run(30), "--offline", trained[0], cwd=tmp_path)
    assert done.code == 0 and hashes(trained[0]) == before, str(done)
    assert progress_of(run_dir_in(tmp_path), script) == (30, 30)  # nothing to wait for
    assert "charts/episodic_return" not in scalars(run_dir_in(tmp_path))


def test_offline_only_reads(script, copied, cli, tmp_path):
    """Also where it may not write; what is missing is not made up, and nothing is left behind."""
    replay = copied / "replay"
    for path in (*replay.iterdir(), replay):
        path.chmod(0o555)
    done = cli(script, *new_run(12), "--offline", copied, cwd=tmp_path)
    assert done.code == 0, str(done)
    replay.chmod(0o755)
    (replay / "vector.npy").rename(replay / "kept")
    done = cli(script, *new_run(12), "--offline", copied, "--runs-dir", "again", cwd=tmp_path)
    assert_user_error(done, "vector.npy", "missing")
    assert not (replay / "vector.npy").exists() and not list(tmp_path.glob("again/*"))
    (replay / "kept").rename(replay / "vector.npy")
    reward = np.load(replay / "reward.npy")[0]
    (replay / "reward.npy").unlink()
    np.save(replay / "reward.npy", reward)
    done = cli(script, *new_run(12), "--offline", copied, "--runs-dir", "again", cwd=tmp_path)
    assert_user_error(done, "reward.npy", "num_envs, capacity")


@pytest.mark.parametrize("env", ["tests.fake_envs:CountingBoxVector-v0", "tests.fake_envs:CountingImage-v0"])
def test_other_kinds_of_environment(script, cli, tmp_path, env):
    """Vectors and continuous actions; images only, two environments, videos in the log and a dream."""
    flags = ["--num-envs", 2, "--video-every", 12] if "Image" in env else ["--video-every", 12]
    done = cli(script, *new_run(24, *flags, env=env), cwd=tmp_path)
    assert done.code == 0 and "Traceback" not in done.err, str(done)
    run_dir = run_dir_in(tmp_path)
    log = EventAccumulator(str(run_dir)).Reload()
    assert len(log.Images("open_loop")) == 1
    dream = cli(script, "--dream", run_dir, "--dream-context", 2, "--dream-horizon", 3, cwd=tmp_path)
    assert dream.code == 0 and len(list(run_dir.glob("videos/*"))) == 2, str(dream)


# ---- Mistakes ------------------------------------------------------------------------------------

BAD = {
    "unknown id": (["--env-id", "CartPol-v1"], ["CartPol-v1", "CartPole"]),
    "missing module": (["--env-id", "no_such_module:Env-v0"], ["no_such_module"]),
    "zero batch": (["--batch-size", "0"], ["--batch-size", "0"]),
    "negative learning rate": (["--model-lr", "-0.1"], ["--model-lr", "-0.1"]),
    "not a number": (["--free-bits", "nan"], ["--free-bits", "nan"]),
    "negative seed": (["--seed", "-1"], ["--seed", "-1"]),
    "odd image size": (["--image-size", "60"], ["--image-size", "64"]),
    "tiny buffer": (["--buffer-size", "4"], ["--batch-length", "--buffer-size"]),
    "short run": (["--total-timesteps", "4"], ["--batch-length", "--total-timesteps"]),
    "no discount horizon": (["--discount-horizon", "1"], ["--discount-horizon", "above 1"]),
    "one bucket": (["--bins", "1"], ["--bins"]),
    "percent for a share": (["--return-norm-high", "95"], ["--return-norm-high", "at most 1"]),
    "sequence of one": (["--batch-length", "1"], ["--batch-length", "at least 2"]),
    "no directory": (["--resume", "nowhere"], ["nowhere"]),
    "no directory to evaluate": (["--evaluate", "nowhere"], ["nowhere"]),
    "no recording": (["--offline", "nowhere"], ["nowhere"]),
    "two modes": (["--evaluate", "nowhere", "--dream", "nowhere"], ["--evaluate", "--dream"]),
    "env that cannot be built": (["--env-id", "tests.fake_envs:RaiseInit-v0"], ["RaiseInit", "level"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flag(script, cli, tmp_path, name):
    flags, words = BAD[name]
    assert_user_error(cli(script, *new_run(40), *flags, cwd=tmp_path), *words)
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))
    assert not list(tmp_path.glob("runs/*")), "a failed start leaves a run directory"


@pytest.mark.parametrize("name", ["MultiDiscrete", "Unbounded", "TextObs"])
def test_unsupported_space(script, cli, tmp_path, name):
    done = cli(script, *new_run(40, env=f"tests.alignment_envs:{name}-v0"), cwd=tmp_path)
    space = {"MultiDiscrete": "MultiDiscrete([2 2])", "Unbounded": "Box(-inf, inf", "TextObs": "Text("}[name]
    assert_user_error(done, space, "not supported", "Discrete")


def test_an_environment_next_to_where_the_user_stands(script, cli, tmp_path):
    """The message of a missing module says "run from its folder?"; so that has to help."""
    (tmp_path / "my_env.py").write_text(
        "import gymnasium as gym\nfrom tests.fake_envs import CountingEnv\n"
        "gym.register('Mine-v0', entry_point=CountingEnv)\n")
    done = cli(script, *new_run(12, env="my_env:Mine-v0"), cwd=tmp_path)
    assert done.code == 0, str(done)


@pytest.mark.parametrize("flags", [["--no-such-flag", "1"], ["--batch-size", "many"], ["--size", "XXXL"]])
def test_mistakes_that_tyro_finds(script, cli, tmp_path, flags):
    done = cli(script, *flags, cwd=tmp_path)
    assert done.code == 2 and "Traceback" not in done.err and flags[0] in done.out + done.err, str(done)


def test_mistakes_with_a_run_directory(script, copied, cli, tmp_path):
    def error(*words, flags=()):
        assert_user_error(cli(script, "--resume", copied, *flags, cwd=tmp_path), *words)

    error("--env-id", "Other-v0", ENV, flags=["--env-id", "Other-v0"])
    error("--deter", "16", "8", flags=["--deter", "16"])
    error("--num-envs", flags=["--num-envs", "2"])
    error("--train-ratio", flags=["--train-ratio", "9999"])  # would owe thousands of updates at once
    error("--batch-size", flags=["--batch-size", "1"])

    whole = (copied / "checkpoint.pt").read_bytes()
    (copied / "checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    error("checkpoint.pt", "cut short")
    (copied / "checkpoint.pt").unlink()
    error("checkpoint.pt")
    (copied / "checkpoint.pt").write_bytes(whole)

    saved = json.loads((copied / "args.json").read_text())
    other = "dreamer_v1" if script != "dreamer_v1" else "dreamer_v2"
    (copied / "args.json").write_text(json.dumps(saved | {"script": other}))
    error(other, f"python {other}.py")
    (copied / "args.json").write_text(json.dumps(saved | {"args": saved["args"] | {"gone": 1}}))
    error("gone")
    (copied / "args.json").write_text("{")
    error("args.json")
    (copied / "args.json").unlink()
    error("not a run directory")


def test_resume_of_an_empty_directory(script, cli, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_user_error(cli(script, "--resume", "empty", cwd=tmp_path), "empty", "not a run directory")


def test_a_full_disk_at_the_start(script, cli, tmp_path):
    """A limit on the size of files stands in for it: the replay buffer does not fit."""
    done = cli(script, *new_run(40_000), cwd=tmp_path, file_limit=2_000_000)
    assert_user_error(done, "cannot write", "image.npy", "GiB")


def test_a_full_disk_later(script, copied, cli, tmp_path):
    """The checkpoint does not fit any more: the one before is intact, and the run can go on."""
    before = (copied / "checkpoint.pt").read_bytes()
    events = sum(path.stat().st_size for path in copied.glob("events*"))
    limit = max(20_000, events)
    assert len(before) > limit, "make the network larger"
    done = cli(script, "--resume", copied, "--total-timesteps", 46, cwd=tmp_path, file_limit=limit)
    assert_user_error(done, "cannot write", "checkpoint.pt", "intact")
    assert (copied / "checkpoint.pt").read_bytes() == before
    done = cli(script, "--resume", copied, "--total-timesteps", 46, cwd=tmp_path)
    assert done.code == 0 and progress_of(copied, script) == (46, 27), str(done)


def test_loss_that_is_not_a_number(script, tmp_path, monkeypatch, capsys):
    """In this process: the loss breaks at the fifth update; the last checkpoint stays as it was."""
    module = __import__(script)
    original, calls, kept = module.world_model_loss, [], {}

    def broken(*args, **kwargs):
        losses, *rest = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == 5:
            path = next(tmp_path.glob("*/checkpoint.pt"))
            kept[path] = path.read_bytes()
            losses["reward"] = losses["reward"] * float("nan")
        return losses, *rest

    monkeypatch.setattr(module, "world_model_loss", broken)
    argv = [script, *new_run(60, "--runs-dir", tmp_path, "--checkpoint-every", 22)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as raised:
        module.main()
    assert re.match(r"error: loss/\w+ became nan at update 5\b.*--resume", str(raised.value.code))
    (path, content), = kept.items()
    assert path.read_bytes() == content
    step, updates = progress_of(path.parent, script)
    assert (step, updates) == (22, 3)
    state = load_checkpoint(path, script, "cpu")
    assert all(value.isfinite().all() for value in state["agent"].values())


def test_broken_environment_saves_what_was_learnt(script, cli, tmp_path):
    """It fails in every episode: restarted as often as allowed, then one line, and a checkpoint."""
    run = new_run(300, "--max-env-restarts", 8, env="tests.fake_envs:Raise-v0")
    done = cli(script, *run, cwd=tmp_path)
    assert_user_error(done, "Raise-v0", "lost the ball")
    assert done.err.count("restart ") == 8
    assert progress_of(run_dir_in(tmp_path), script)[1] > 0


def test_a_video_that_cannot_be_written_costs_nothing(script, cli, tmp_path):
    """The ninth episode's, in the middle of training: the run stops, and what was learnt is saved."""
    run = new_run(300, "--capture-video", env="tests.fake_envs:Shrinking-v0")
    assert_user_error(cli(script, *run, cwd=tmp_path), "recording.mp4", "(1, 1)")
    assert progress_of(run_dir_in(tmp_path), script) == (49, 30)
    done = cli(script, "--resume", run_dir_in(tmp_path), "--total-timesteps", 70, cwd=tmp_path)
    assert done.code == 0, str(done)  # a new environment, that is at episode 0
    assert progress_of(run_dir_in(tmp_path), script) == (70, 51)


def test_a_run_too_short_for_an_update_says_so(script, cli, tmp_path):
    done = cli(script, *new_run(19), cwd=tmp_path)
    assert done.code == 0 and "--learning-starts" in done.out, str(done)
    assert progress_of(run_dir_in(tmp_path), script) == (19, 0)
