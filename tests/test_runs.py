"""Run directories, checkpoints, log, signals, animations, symlog: what must survive a bad day."""

import errno
import io
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import time
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import runs, video
from common.maths import symexp, symlog
from common.runs import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "dreamer_v3"


def in_subprocess(code: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)


@contextmanager
def file_size_limit(nbytes: int):
    """A full disk, nearly: a file that grows beyond it gets an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def moving_square(T=6, C=3) -> np.ndarray:
    frames = np.zeros((T, 16, 20, C), np.uint8)
    for t in range(T):
        frames[t, 4:8, 2 * t:2 * t + 4] = 200
    return frames


# ---- Run directory -------------------------------------------------------------------------------

def test_run_directories_are_named_and_never_shared(tmp_path):
    made = [runs.create_run_dir(tmp_path / "runs", "ALE/Pong-v5:x", "v3", 1) for _ in range(3)]
    assert len(set(made)) == 3 and all(path.is_dir() for path in made)
    assert all(path.parent == tmp_path / "runs" for path in made)
    assert all(path.name.startswith("ALE_Pong-v5_x__v3__1__2") for path in made)


def test_run_directory_below_a_file_is_a_user_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot write .*runs"):
        runs.create_run_dir(tmp_path / "runs", "Pong", "v3", 1)


def test_args_come_back(tmp_path):
    args = {"env_id": "ALE/Pong-v5", "lr": 1e-4, "size": None, "track": False, "é": [1, 2]}
    runs.save_args(tmp_path, SCRIPT, args)
    assert runs.load_args(tmp_path, SCRIPT) == args
    assert os.listdir(tmp_path) == ["args.json"]


@pytest.mark.parametrize("content, message", [
    (None, "not a run directory"),
    (b"", "empty or not JSON"),
    (b'{"format": 1, "scr', "empty or not JSON"),
    (b"\xff\xfe\x00", "empty or not JSON"),
    (b"[1, 2]", "not a file that this project wrote"),
    (b'{"format": 1, "script": "dreamer_v3"}', "not a file that this project wrote"),
    (b'{"format": 0, "script": "dreamer_v3", "args": {}}', "an older layout 0, this is 1"),
    (b'{"format": 2, "script": "dreamer_v3", "args": {}}', "a newer layout 2, this is 1"),
    (b'{"format": 1, "script": "dreamer_v2", "args": {}}', "by dreamer_v2, this is dreamer_v3"),
])
def test_bad_args_are_user_errors_of_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "args.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        runs.load_args(tmp_path, SCRIPT)
    assert "\n" not in str(caught.value)


def test_missing_run_directory_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a run directory"):
        runs.load_args(tmp_path / "nowhere", SCRIPT)


# ---- Checkpoint ----------------------------------------------------------------------------------

def some_state() -> dict:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7,
            "rng": runs.rng_state("cpu"), "half": torch.ones(3, dtype=torch.bfloat16)}


def test_checkpoint_comes_back(tmp_path):
    state = some_state()
    runs.save_checkpoint(tmp_path / "checkpoint.pt", state, SCRIPT)
    found = runs.load_checkpoint(tmp_path / "checkpoint.pt", SCRIPT, "cpu")
    assert found["step"] == 7 and found["format"] == 1 and found["script"] == SCRIPT
    assert torch.equal(found["model"]["weight"], state["model"]["weight"])
    torch.testing.assert_close(found["optimizer"]["state"], state["optimizer"]["state"])
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_interrupted_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "checkpoint.pt"
    runs.save_checkpoint(path, {"step": 1}, SCRIPT)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises((UserError, KeyboardInterrupt)) as caught:
            runs.save_checkpoint(path, {"step": 2}, SCRIPT)
    assert ("previous checkpoint.pt is intact" in str(caught.value)) == isinstance(error, OSError)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    assert runs.load_checkpoint(path, SCRIPT, "cpu")["step"] == 1


def test_killed_in_the_middle_of_a_save(tmp_path):
    path = tmp_path / "checkpoint.pt"
    done = in_subprocess("""
        import os, sys
        from common import runs
        runs.save_checkpoint(sys.argv[1], {"step": 1}, "dreamer_v3")
        os.replace = lambda *_: os.kill(os.getpid(), 9)
        runs.save_checkpoint(sys.argv[1], {"step": 2}, "dreamer_v3")
        """, path)
    assert done.returncode == -9, done.stderr
    assert runs.load_checkpoint(path, SCRIPT, "cpu")["step"] == 1
    runs.save_checkpoint(path, {"step": 3}, SCRIPT)  # the leftover is used again
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_full_disk_is_a_user_error_and_leaves_the_previous_files(tmp_path):
    runs.save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1}, SCRIPT)
    runs.reserve_file(tmp_path / "old.npy", 1000)
    messages = []

    def attempt(function, *arguments):
        with pytest.raises(UserError) as caught:
            function(*arguments)
        messages.append(str(caught.value))

    with file_size_limit(300_000):
        # 75_000 floats fit but for the last few bytes: those fail in flush, not in torch.save.
        for size in (60_000, 75_000, 74_700, 1_000_000):
            state = {"a": torch.zeros(size), "b": torch.zeros(size // 3)}
            attempt(runs.save_checkpoint, tmp_path / "checkpoint.pt", state, SCRIPT)
            attempt(runs.save_checkpoint, tmp_path / "first.pt", state, SCRIPT)
        attempt(runs.save_args, tmp_path, SCRIPT, {"note": "x" * 400_000})
        attempt(runs.reserve_file, tmp_path / "new.npy", 2**30)
        attempt(runs.reserve_file, tmp_path / "old.npy", 2**30)
    assert all(re.match("cannot write.*File too large.*GiB free", line) for line in messages)
    assert all("previous checkpoint.pt is intact" in line for line in messages[0:8:2])
    assert not any("previous" in line for line in messages[1:8:2])
    assert all("1.00 GiB needed" in line for line in messages[-2:])
    assert runs.load_checkpoint(tmp_path / "checkpoint.pt", SCRIPT, "cpu")["step"] == 1
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.npy")}
    assert sizes == {"new.npy": 0, "old.npy": 1000}
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "first.pt").exists()


def test_cut_checkpoint_is_a_user_error_at_every_length(tmp_path):
    path = tmp_path / "checkpoint.pt"
    runs.save_checkpoint(path, some_state(), SCRIPT)
    whole = path.read_bytes()
    for length in {*range(0, 70), *range(70, len(whole), 997), *range(len(whole) - 40, len(whole))}:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut short, damaged"):
            runs.load_checkpoint(path, SCRIPT, "cpu")


@pytest.mark.parametrize("state, message", [
    ({"format": 1, "script": "dreamer_v1"}, "by dreamer_v1, this is dreamer_v3"),
    ({"format": 0, "script": SCRIPT}, "an older layout 0, this is 1"),
    ({"format": 9, "script": SCRIPT}, "a newer layout 9, this is 1"),
    ({"step": 3}, "not a file that this project wrote"),
    (torch.zeros(3), "not a file that this project wrote"),
])
def test_foreign_checkpoints_are_user_errors(tmp_path, state, message):
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=message):
        runs.load_checkpoint(tmp_path / "checkpoint.pt", SCRIPT, "cpu")


def test_missing_checkpoint_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="stopped before its first checkpoint"):
        runs.load_checkpoint(tmp_path / "checkpoint.pt", SCRIPT, "cpu")


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_cannot_run_code(tmp_path, zipped):
    state = {"format": 1, "script": SCRIPT, "evil": Malicious(str(tmp_path / "broken_into"))}
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="damaged"):
        runs.load_checkpoint(tmp_path / "c.pt", SCRIPT, "cpu")
    assert not (tmp_path / "broken_into").exists()


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), Path("x")])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value):
    runs.save_checkpoint(tmp_path / "c.pt", {"step": 1}, SCRIPT)
    with pytest.raises(TypeError, match="plain data only"):
        runs.save_checkpoint(tmp_path / "c.pt", {"step": 2, "bad": [value]}, SCRIPT)
    assert runs.load_checkpoint(tmp_path / "c.pt", SCRIPT, "cpu")["step"] == 1


def test_reserved_file_is_on_the_disk_and_keeps_its_content(tmp_path):
    path = tmp_path / "replay.npy"
    path.write_bytes(b"hello")
    runs.reserve_file(path, 2**20)
    assert path.stat().st_size == 2**20 and path.stat().st_blocks * 512 >= 2**20
    assert path.read_bytes()[:6] == b"hello\0"
    runs.reserve_file(path, 100)  # never shortens
    assert path.stat().st_size == 2**20


def test_reserve_file_without_fallocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    runs.reserve_file(tmp_path / "a", 5000)
    assert (tmp_path / "a").stat().st_size == 5000
    with pytest.raises(UserError, match="No space left.* GiB needed; free some space"):
        runs.reserve_file(tmp_path / "b", 2**60)


def on_disk(path) -> int:
    return path.stat().st_blocks * 512


def test_array_is_made_of_zeros_and_kept(tmp_path):
    path = tmp_path / "replay" / "rank0" / "image.npy"
    array = runs.open_array(path, np.uint8, (2, 1000, 8))
    assert isinstance(array, np.memmap) and (array.shape, array.dtype) == ((2, 1000, 8), np.uint8)
    assert not array.any() and on_disk(path) >= path.stat().st_size == array.offset + array.nbytes
    array[1, 3] = 7
    array.flush()
    assert (runs.open_array(path, np.uint8, (2, 1000, 8)) == array).all()
    assert (np.load(path) == array).all() and runs.array_shape(path) == (2, 1000, 8)
    assert os.listdir(path.parent) == ["image.npy"]


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.int64])
def test_array_types(tmp_path, dtype):
    for _ in range(2):
        assert runs.open_array(tmp_path / "a.npy", dtype, (2,)).dtype == dtype


def test_space_of_a_sparse_array_is_reserved_when_it_is_opened(tmp_path):
    """Such as a copy made by rsync --sparse, or what a kill left between making and reserving."""
    path = tmp_path / "a.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, (2**20,))[-1] = 5
    if on_disk(path) >= 2**20:
        pytest.skip("no sparse files here")
    array = runs.open_array(path, np.uint8, (2**20,))
    assert on_disk(path) >= 2**20 and array[-1] == 5 and not array[:-1].any()


@pytest.mark.parametrize("dtype, shape", [("u1", (2, 6)), ("u1", (2, 5, 1)), (bool, (2, 5))])
def test_array_of_other_settings_is_a_user_error(tmp_path, dtype, shape):
    runs.open_array(tmp_path / "a.npy", np.uint8, (2, 5))[:] = 3
    with pytest.raises(UserError, match=r"a.npy holds uint8 \(2, 5\), not .* other settings"):
        runs.open_array(tmp_path / "a.npy", dtype, shape)
    assert (np.load(tmp_path / "a.npy") == 3).all()


def test_cut_array_is_a_user_error_and_stays_as_it_is(tmp_path):
    path = tmp_path / "a.npy"
    runs.open_array(path, np.float32, (10, 5))
    whole = path.read_bytes()
    for length in (0, 5, 9, 60, 127, 128, 129, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="a.npy is damaged"):
            runs.open_array(path, np.float32, (10, 5))
        assert path.read_bytes() == whole[:length]


def test_no_space_for_an_array_is_a_user_error_that_leaves_nothing_behind(tmp_path):
    with file_size_limit(300_000), pytest.raises(UserError, match="File too large.*ulimit -f"):
        runs.open_array(tmp_path / "new" / "a.npy", np.uint8, (400_000,))
    assert not os.listdir(tmp_path / "new")


def test_no_space_for_a_sparse_array_leaves_it_as_it_is(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    runs.open_array(tmp_path / "a.npy", np.uint8, (1000,))[3] = 9
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="a.npy: No space left.*free some space"):
        runs.open_array(tmp_path / "a.npy", np.uint8, (1000,))
    with pytest.raises(UserError, match="No space left"):
        runs.open_array(tmp_path / "b.npy", np.uint8, (1000,))
    assert os.listdir(tmp_path) == ["a.npy"] and np.load(tmp_path / "a.npy")[3] == 9


def test_what_a_kill_while_an_array_was_made_left_is_replaced(tmp_path):
    (tmp_path / "a.npy.tmp").write_bytes(b"x" * 5000)
    assert not runs.open_array(tmp_path / "a.npy", np.uint8, (1000,)).any()
    assert os.listdir(tmp_path) == ["a.npy"]


def test_array_shape_of_nothing_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="with a replay buffer"):
        runs.array_shape(tmp_path / "reward.npy")


def test_free_disk_of_a_path_to_be(tmp_path):
    assert runs.free_disk(tmp_path / "not" / "yet") > 0


# ---- Randomness, processes, signals --------------------------------------------------------------

def test_random_state_goes_on_where_it_was(tmp_path):
    def draw():
        return random.random(), float(np.random.rand()), np.random.randn(), float(torch.rand(()))

    runs.seed_everything(3, deterministic=True)
    first = draw()
    runs.save_checkpoint(tmp_path / "c.pt", {"rng": runs.rng_state("cpu")}, SCRIPT)
    expected = draw()
    runs.seed_everything(3, deterministic=False)
    assert draw() == first
    runs.set_rng_state(runs.load_checkpoint(tmp_path / "c.pt", SCRIPT, "cpu")["rng"], "cpu")
    assert draw() == expected


def test_distributed_only_under_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert runs.setup_distributed("cpu") == (0, 1, 0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": port}
    for name, value in {**launched, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    assert runs.setup_distributed("cpu") == (0, 1, 0)
    assert torch.distributed.get_backend() == "gloo"
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
    assert "Stopping after this step" in errors
    assert ("KeyboardInterrupt" in errors) == twice
    assert (rest, process.returncode == 0) == (("", False) if twice else ("saved\n", True))


# ---- Log -----------------------------------------------------------------------------------------

def read_log(path) -> EventAccumulator:
    return EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_resume_strikes_out_what_came_after_the_checkpoint(tmp_path):
    killed = runs.Logger(tmp_path, 20, hyperparameters={"lr": 1e-4})
    for step in range(0, 11):
        killed.scalars({"charts/a": 1.0}, step)
        killed.progress(step, episode=12345.678, speed="3/s")
    killed.close()
    time.sleep(1.1)  # event files are read in the order of their names: seconds, then a counter
    resumed = runs.Logger(tmp_path, 20, initial_step=6, hyperparameters={"lr": 1e-4})
    resumed.scalars({"charts/a": 2.0}, 8)
    resumed.close()
    events = read_log(tmp_path).Scalars("charts/a")
    assert [(e.step, e.value) for e in events] == [*((s, 1.0) for s in range(7)), (8, 2.0)]
    assert resumed.bar.n == 6 and killed.bar.n == 10
    text = read_log(tmp_path).Tensors("hyperparameters/text_summary")
    assert len(text) == 1 and b"|lr|0.0001|" in text[0].tensor_proto.string_val[0]


@pytest.mark.parametrize("C", [1, 3])
def test_video_in_the_log_is_an_animation(tmp_path, C):
    logger = runs.Logger(tmp_path, 20)
    logger.video("dream", moving_square(C=C), step=3)
    logger.close()
    event, = read_log(tmp_path).Images("dream")
    image = Image.open(io.BytesIO(event.encoded_image_string))
    assert event.step == 3 and (event.width, event.height) == (20, 16)
    assert image.format == "GIF" and image.n_frames == 6 and image.info["loop"] == 0


def test_disabled_logger_does_nothing(tmp_path, capfd):
    logger = runs.Logger(tmp_path, 20, enabled=False, track=True)
    logger.scalars({"a": 1.0}, 1)
    logger.video("b", moving_square(), 1)
    logger.progress(3, c=1.0)
    logger.close()
    assert not os.listdir(tmp_path) and capfd.readouterr() == ("", "")


def test_wandb_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        runs.Logger(tmp_path, 20, track=True)


def test_full_disk_under_the_log_is_a_user_error(tmp_path):
    done = in_subprocess("""
        import contextlib, resource, sys
        from common import runs
        logger = runs.Logger(sys.argv[1], 20)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            for step in range(1000):
                logger.scalars({"a": 1.0}, step)
                with contextlib.suppress(OSError):  # then the next call must say so
                    logger.writer.flush()
        except runs.UserError as error:
            print(error)
        """, tmp_path)
    assert done.stdout.startswith("cannot write") and "File too large" in done.stdout, done.stderr


# ---- Animations ----------------------------------------------------------------------------------

@pytest.mark.parametrize("fps, delay", [(15, 70), (20, 50), (1000, 20)])
def test_gif(tmp_path, fps, delay):
    video.save_gif(tmp_path / "a.gif", moving_square(), fps)
    image = Image.open(tmp_path / "a.gif")
    assert (image.n_frames, image.info["loop"], image.info["duration"]) == (6, 0, delay)
    image.seek(4)
    shown = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(shown - moving_square()[4]).max() <= 8


def test_strip(tmp_path):
    stack = np.stack([moving_square(C=1), moving_square(C=1)])
    video.save_strip(tmp_path / "a.png", stack, every=2, scale=3)
    assert Image.open(tmp_path / "a.png").size == (3 * (20 * 3 + 2), 2 * (16 * 3 + 2))


def test_side_by_side_marks_the_imagination():
    panels = {"truth": moving_square(), "dream": moving_square(C=1), "blind": moving_square(C=6)}
    pages = video.side_by_side(panels, context=4, scale=2)
    assert pages.shape == (6, 26 + 32 + 8, 3 * (40 + 8), 3) and pages.dtype == np.uint8
    corners = pages[:, -1, -1].tolist()
    assert corners == [list(video.SEEN)] * 4 + [list(video.IMAGINED)] * 2
    assert (pages[:, -1, 0] == video.OTHER).all()
    picture = pages[5, 26 + 4:-4, 4:44]
    assert (picture == video.enlarge(moving_square()[5], 2)).all()


def test_side_by_side_enlarges_to_about_200_pixels():
    for size, shown in [(64, 192), (96, 192), (128, 256), (192, 192), (512, 512)]:
        pages = video.side_by_side({"a": np.zeros((1, size, size, 3), np.uint8)}, context=1)
        assert pages.shape == (1, 26 + shown + 8, shown + 8, 3)


# ---- Curves --------------------------------------------------------------------------------------

def shows(picture, colour) -> bool:
    return (picture == colour).all(-1).any()


def waves(T=20, V=3) -> np.ndarray:
    return np.sin(np.arange(T)[:, None] * 0.3 + np.arange(V)) * 10.0**np.arange(V)


def test_curves_grow_and_stay():
    truth = waves()
    films = video.curves(np.stack([truth, truth + 0.1, -truth]).astype(np.float32), size=120)
    assert films.shape == (3, 20, 120, 120, 3) and films.dtype == np.uint8
    for t in range(20):
        now = round((t + 0.5) / 20 * 120)
        assert not shows(films[0, t, :, now + 3:], video.LINES[0])  # nothing of the future
        assert all(shows(films[r, t, :, now - 3:now + 3], video.LINES[0]) for r in range(3))
        past = films[:, t - 1:t + 1, :, :max(0, now - 10)]
        assert (past == past[:, :1]).all()


def test_curves_each_in_a_lane_of_the_truths_scale():
    films = video.curves(np.stack([waves(), waves() * 100]), size=120)
    for d in range(3):
        lane = films[:, -1, 40 * d:40 * (d + 1)]
        assert all(shows(picture, video.LINES[d]) for picture in lane)
        assert not any(shows(lane, colour) for colour in video.LINES if colour != video.LINES[d])
        rows = np.flatnonzero((lane[0] == video.LINES[d]).all(-1).any(-1))
        assert 2 <= rows.min() < 10 and 30 < rows.max() < 38  # most of the lane, but not its edge


def test_curves_have_the_truth_beneath():
    films = video.curves(np.stack([waves(V=1), waves(V=1), -waves(V=1)]), size=120)
    assert (films[1] == films[0]).mean() > 0.98  # where they agree, it is hidden
    assert shows(films[2, -1], video.GREY) and not shows(films[0, -1], video.GREY)


@pytest.mark.filterwarnings("error")
def test_curves_of_awkward_values():
    flat = video.curves(np.full((2, 4, 1), 5.0) + np.array([0, 1e-7]).reshape(2, 1, 1), size=40)
    assert (flat[0] == flat[1]).all() and shows(flat[0, 0], video.LINES[0])
    nothing = video.curves(np.full((2, 4, 1), np.nan), size=40)
    assert (nothing == nothing[0, 0, 0, 0]).all()
    broken = np.tile(waves(V=1), (2, 1, 1))
    broken[1, 10:] = np.nan
    films = video.curves(broken, size=120)
    assert (films[1, 9:, :, :53] == films[1, 9, :, :53]).all()
    assert not shows(films[1, -1, :, 63:], video.LINES[0]) and shows(films[1, -1], video.GREY)
    huge = np.full((2, 5, 9), 3e38, np.float32)  # the ninth dimension is not drawn
    huge[:, 2], huge[1, 3], huge[0, 4] = -3e38, np.inf, -np.inf
    assert video.curves(huge, size=40).shape == (2, 5, 40, 40, 3)
    assert video.curves(np.zeros((1, 1, 1)), size=40).shape == (1, 1, 40, 40, 3)


# ---- Episode videos ------------------------------------------------------------------------------

def film(path) -> tuple[int, tuple]:
    opened = cv2.VideoCapture(str(path))
    return int(opened.get(cv2.CAP_PROP_FRAME_COUNT)), opened.read()[1].shape


def record(folder, lengths, shape=(16, 20, 3)) -> int:
    """Play episodes of these lengths; returns how often a frame was asked for."""
    videos, asked = video.EpisodeVideos(folder, fps=15), []

    def render():
        asked.append(1)
        return np.full(shape, 10 * len(asked) % 256, np.uint8)

    for length in lengths:
        for t in range(length):
            videos.add(render, is_first=np.bool_(t == 0))
    videos.close()
    videos.close()
    return len(asked)


def test_episodes_are_recorded_at_cubes_and_then_at_thousands(tmp_path):
    videos = video.EpisodeVideos(tmp_path)
    assert not videos.wanted()
    found = []
    for _ in range(3001):
        videos.add(lambda: None, is_first=True)  # None: the environment is being rebuilt
        found += [videos.episode] if videos.wanted() else []
    assert found == [0, 1, 8, 27, 64, 125, 216, 343, 512, 729, 1000, 2000, 3000]
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("C", [1, 3])
def test_episode_videos(tmp_path, C):
    folder = tmp_path / "run" / "videos"
    assert record(folder, [3, 4, 5, 5, 5, 5, 5, 5, 6, 5], shape=(16, 20, C)) == 3 + 4 + 6
    assert {path.name: film(path) for path in folder.iterdir()} == {
        "episode-000000.mp4": (3, (16, 20, 3)), "episode-000001.mp4": (4, (16, 20, 3)),
        "episode-000008.mp4": (6, (16, 20, 3))}


def test_episode_video_shows_the_frames_in_their_colours(tmp_path):
    videos = video.EpisodeVideos(tmp_path)
    for t in range(5):
        videos.add(lambda: np.tile(np.uint8([200, 100, 20]), (64, 64, 1)), is_first=t == 0)
    videos.close()
    shown = cv2.VideoCapture(str(tmp_path / "episode-000000.mp4")).read()[1][32, 32, ::-1]
    assert np.abs(shown.astype(int) - [200, 100, 20]).max() < 10


def test_resumed_run_keeps_the_videos_that_are_there(tmp_path):
    for length in (3, 4, 5):
        record(tmp_path, [length])
    (tmp_path / "recording.mp4").write_bytes(b"what a killed run left")
    record(tmp_path, [6])
    assert {path.name: film(path)[0] for path in tmp_path.iterdir()} == {
        "episode-000000.mp4": 3, "episode-000000-1.mp4": 4,
        "episode-000000-2.mp4": 5, "episode-000000-3.mp4": 6}


def test_episode_video_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="cannot write .*recording.mp4"):
        record(tmp_path, [2], shape=(1, 1, 3))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory|File exists"):
        record(tmp_path / "file", [2])


def test_full_disk_under_an_episode_video(tmp_path):
    videos, rng = video.EpisodeVideos(tmp_path), np.random.default_rng(0)
    with file_size_limit(5000), pytest.raises(OSError, match="is the disk full?"):
        for t in range(20):
            videos.add(lambda: rng.integers(256, size=(64, 64, 3), dtype=np.uint8), t == 0)
        videos.close()
    assert os.listdir(tmp_path) == ["recording.mp4"]


# ---- symlog --------------------------------------------------------------------------------------

def value_and_derivative(function, x):
    leaf = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    y = function(leaf)
    return y.detach().numpy(), torch.autograd.grad(y.sum(), leaf)[0].numpy()


def test_symlog_is_exact_and_symexp_its_inverse():
    x = np.array([-1e12, -100, -1, -1e-8, 1e-20, 1e-4, 0.5, 7, 1e9])
    y, slope = value_and_derivative(symlog, x)
    np.testing.assert_allclose(y, np.sign(x) * np.log1p(np.abs(x)), rtol=1e-6)
    np.testing.assert_allclose(slope, 1 / (1 + np.abs(x)), rtol=1e-6)
    np.testing.assert_allclose(value_and_derivative(symexp, y)[0], x, rtol=1e-5)
    assert symlog(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert symexp(torch.ones(2, dtype=torch.float16)).dtype == torch.float32


@pytest.mark.parametrize("name, function", [("symlog", symlog), ("symexp", symexp)])
def test_symlog_gives_the_authors_numbers(name, function):
    """Also at x = 0, where their derivative is 0. They use log(1 + x): 6e-8 off near 0."""
    files = sorted((ROOT / "tests" / "golden").glob("**/v3_math.npz"))
    files += sorted((ROOT.parent / "shared" / "golden").glob("**/v3_math.npz"))
    if not files:
        pytest.skip("v3_math.npz is not there")
    golden = np.load(files[0])
    y, slope = value_and_derivative(function, golden[f"{name}/x"])
    np.testing.assert_allclose(y, golden[f"{name}/y"], rtol=2e-5, atol=6e-8)
    np.testing.assert_allclose(slope, golden[f"{name}/dydx"], rtol=2e-5)
