"""Files, arrays, rings, args.json and checkpoints: what must survive a bad day."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from common import files, rundir
from common.devices import rng_state
from common.files import UserError, open_array
from common.rings import Rings

SCRIPT = "dreamer_v3"
HEADER = {"format": rundir.FORMAT_VERSION, "script": SCRIPT}
WHOLE = dict.fromkeys(rundir.PARTS, 0)


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


# ---- Run directory -------------------------------------------------------------------------------

def test_run_directories_are_named_and_never_shared(tmp_path):
    made = [rundir.create_run_dir(tmp_path / "runs", "ALE/Pong-v5:x", "v3", 1) for _ in range(2)]
    assert len(set(made)) == 2 and all(path.is_dir() for path in made)
    assert all(path.parent == tmp_path / "runs" for path in made)
    assert all(path.name.startswith("ALE_Pong-v5_x__v3__1__2") for path in made)


def test_run_directory_below_a_file_is_a_user_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot write .*runs"):
        rundir.create_run_dir(tmp_path / "runs", "Pong", "v3", 1)


def test_a_run_directory_has_one_owner(tmp_path):
    """Until the process that has it ends, however it ends."""
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from common.rundir import own_run_dir
        lock = own_run_dir(Path(sys.argv[1]))
        print("mine", flush=True)
        time.sleep(60)"""), tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match="another process trains in"):
        rundir.own_run_dir(tmp_path)
    rundir.save_args(tmp_path, SCRIPT, {})  # it may be replaced without losing the lock
    with pytest.raises(UserError, match="another process trains in"):
        rundir.own_run_dir(tmp_path)
    owner.kill()
    owner.communicate()
    assert rundir.own_run_dir(tmp_path)


def test_no_locks_no_owner(tmp_path, monkeypatch):
    """On Windows, and on a file system that has none."""
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(rundir.fcntl, "flock", refuse)
    assert rundir.own_run_dir(tmp_path)
    monkeypatch.setattr(rundir, "fcntl", None)
    assert rundir.own_run_dir(tmp_path)


def test_args_come_back(tmp_path):
    args = {"env_id": "ALE/Pong-v5", "lr": 1e-4, "size": None, "track": False, "é": [1, 2], "resume": ""}
    rundir.save_args(tmp_path, SCRIPT, args | {"resume": "runs/x"})
    assert rundir.load_args(tmp_path, SCRIPT) == args
    assert os.listdir(tmp_path) == ["args.json"]


@pytest.mark.parametrize("content, message", [
    (None, "not a run directory"),
    (b"", "empty or not JSON"),
    (b'{"format": 1, "scr', "empty or not JSON"),
    (b"\xff\xfe\x00", "empty or not JSON"),
    (b"[1, 2]", "not a file that this project wrote"),
    (json.dumps(HEADER).encode(), "lacks args"),
    (json.dumps(HEADER | {"args": None}).encode(), "not a file that this project wrote"),
    (b'{"format": 1, "script": "dreamer_v3", "args": {}}', "an older layout 1, this is 2"),
    (b'{"format": 3, "script": "dreamer_v3", "args": {}}', "a newer layout 3, this is 2"),
    (b'{"format": 2, "script": "dreamer_v2", "args": {}}', "by dreamer_v2, this is dreamer_v3"),
])
def test_bad_args_are_user_errors_of_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "args.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        rundir.load_args(tmp_path, SCRIPT)
    assert "\n" not in str(caught.value)


# ---- Checkpoint ----------------------------------------------------------------------------------

def some_state() -> dict:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return WHOLE | {"agent": model.state_dict(), "optimizers": optimizer.state_dict(), "step": 7,
                    "ranks": [rng_state(torch.device("cpu"))], "returns": [1.0],
                    "spec": {"image_shape": (8, 8, 3)}}


def test_checkpoint_comes_back(tmp_path):
    state = some_state()
    rundir.save_checkpoint(tmp_path / "checkpoint.pt", state, SCRIPT)
    found = rundir.load_checkpoint(tmp_path / "checkpoint.pt", SCRIPT)
    assert found["step"] == 7 and found["script"] == SCRIPT
    assert found["spec"] == state["spec"], "a tuple became a list"
    assert torch.equal(found["agent"]["weight"], state["agent"]["weight"])
    torch.testing.assert_close(found["optimizers"]["state"], state["optimizers"]["state"])
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_interrupted_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "checkpoint.pt"
    rundir.save_checkpoint(path, WHOLE | {"step": 1}, SCRIPT)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises((UserError, KeyboardInterrupt)) as caught:
            rundir.save_checkpoint(path, WHOLE | {"step": 2}, SCRIPT)
    assert ("previous checkpoint.pt is intact" in str(caught.value)) == isinstance(error, OSError)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    assert rundir.load_checkpoint(path, SCRIPT)["step"] == 1


def test_killed_in_the_middle_of_a_save(tmp_path):
    path = tmp_path / "checkpoint.pt"
    done = in_subprocess("""
        import os, sys
        from common import rundir
        whole = dict.fromkeys(rundir.PARTS, 1)
        rundir.save_checkpoint(sys.argv[1], whole, "dreamer_v3")
        os.replace = lambda *_: os.kill(os.getpid(), 9)
        rundir.save_checkpoint(sys.argv[1], whole | {"step": 2}, "dreamer_v3")
        """, path)
    assert done.returncode == -9, done.stderr
    assert rundir.load_checkpoint(path, SCRIPT)["step"] == 1
    rundir.save_checkpoint(path, {"step": 3}, SCRIPT)  # the leftover is used again
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_full_disk_is_a_user_error_and_leaves_the_previous_files(tmp_path):
    rundir.save_checkpoint(tmp_path / "checkpoint.pt", WHOLE, SCRIPT)
    files.reserve_file(tmp_path / "old.npy", 1000)
    messages = []

    def attempt(function, *arguments):
        with pytest.raises(UserError) as caught:
            function(*arguments)
        messages.append(str(caught.value))

    with file_size_limit(300_000):
        # 75_000 floats fit but for the last few bytes: those fail in flush, not in torch.save.
        for size in (60_000, 75_000, 74_700, 1_000_000):
            state = {"a": torch.zeros(size), "b": torch.zeros(size // 3)}
            attempt(rundir.save_checkpoint, tmp_path / "checkpoint.pt", state, SCRIPT)
            attempt(rundir.save_checkpoint, tmp_path / "first.pt", state, SCRIPT)
        attempt(rundir.save_args, tmp_path, SCRIPT, {"note": "x" * 400_000})
        attempt(files.reserve_file, tmp_path / "new.npy", 2**30)
        attempt(files.reserve_file, tmp_path / "old.npy", 2**30)
    assert all(re.match("cannot write.*File too large.*GiB free", line) for line in messages)
    assert all("previous checkpoint.pt is intact" in line for line in messages[0:8:2])
    assert not any("previous" in line for line in messages[1:8:2])
    assert all("1.00 GiB needed" in line for line in messages[-2:])
    rundir.load_checkpoint(tmp_path / "checkpoint.pt", SCRIPT)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.npy")}
    assert sizes == {"new.npy": 0, "old.npy": 1000}
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "first.pt").exists()


def test_cut_checkpoint_is_a_user_error_at_every_length(tmp_path):
    path = tmp_path / "checkpoint.pt"
    rundir.save_checkpoint(path, some_state(), SCRIPT)
    whole = path.read_bytes()
    for length in {*range(0, 70, 7), *range(70, len(whole), 997), *range(len(whole) - 40, len(whole), 3)}:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut short, damaged"):
            rundir.load_checkpoint(path, SCRIPT)


@pytest.mark.parametrize("state, message", [
    (HEADER | {"script": "dreamer_v1"}, "by dreamer_v1, this is dreamer_v3"),
    (HEADER | {"format": 0}, "an older layout 0, this is 2"),
    (HEADER | {"format": 9}, "a newer layout 9, this is 2"),
    (HEADER | WHOLE | {"format": "2"}, "not a file that this project wrote"),
    (HEADER | {"step": 3}, "lacks agent, episodes, optimizers, ranks, returns, spec, updates"),
    ({"step": 3}, "not a file that this project wrote"),
    (torch.zeros(3), "not a file that this project wrote"),
])
def test_foreign_checkpoints_are_user_errors(tmp_path, state, message):
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=message):
        rundir.load_checkpoint(tmp_path / "checkpoint.pt", SCRIPT)


def test_missing_checkpoint_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="stopped before its first checkpoint"):
        rundir.load_checkpoint(tmp_path / "checkpoint.pt", SCRIPT)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_cannot_run_code(tmp_path, zipped):
    state = HEADER | WHOLE | {"evil": Malicious(str(tmp_path / "broken_into"))}
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="damaged"):
        rundir.load_checkpoint(tmp_path / "c.pt", SCRIPT)
    assert not (tmp_path / "broken_into").exists()


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), Path("x")])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value):
    rundir.save_checkpoint(tmp_path / "c.pt", WHOLE | {"step": 1}, SCRIPT)
    with pytest.raises(TypeError, match="plain data only"):
        rundir.save_checkpoint(tmp_path / "c.pt", WHOLE | {"step": 2, "bad": [value]}, SCRIPT)
    assert rundir.load_checkpoint(tmp_path / "c.pt", SCRIPT)["step"] == 1


# ---- Arrays --------------------------------------------------------------------------------------

def on_disk(path) -> int:
    return path.stat().st_blocks * 512


def test_reserved_file_is_on_the_disk_and_keeps_its_content(tmp_path):
    path = tmp_path / "replay.npy"
    path.write_bytes(b"hello")
    files.reserve_file(path, 2**20)
    assert path.stat().st_size == 2**20 and on_disk(path) >= 2**20
    assert path.read_bytes()[:6] == b"hello\0"
    files.reserve_file(path, 100)  # never shortens
    assert path.stat().st_size == 2**20


def test_reserve_file_without_fallocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    files.reserve_file(tmp_path / "a", 5000)
    assert (tmp_path / "a").stat().st_size == 5000
    with pytest.raises(UserError, match="No space left.* GiB needed; free some space"):
        files.reserve_file(tmp_path / "b", 2**60)


def test_array_is_made_of_zeros_and_kept(tmp_path):
    path = tmp_path / "replay" / "rank0" / "image.npy"
    array = open_array(path, np.uint8, (2, 1000, 8))
    assert isinstance(array, np.memmap) and (array.shape, array.dtype) == ((2, 1000, 8), np.uint8)
    assert not array.any() and on_disk(path) >= path.stat().st_size == array.offset + array.nbytes
    array[1, 3] = 7
    array.flush()
    for mode in ("w", "r+", "r"):
        assert (open_array(path, np.uint8, (2, 1000, 8), mode) == array).all()
    assert (np.load(path) == array).all() and not files.read_array(path).flags.writeable
    assert os.listdir(path.parent) == ["image.npy"]


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.int64])
def test_array_types(tmp_path, dtype):
    for _ in range(2):
        assert open_array(tmp_path / "a.npy", dtype, (2,)).dtype == dtype


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_missing_array_is_a_user_error_and_not_made(tmp_path, mode):
    with pytest.raises(UserError, match="a.npy is missing"):
        open_array(tmp_path / "a.npy", np.uint8, (2,), mode)
    assert not os.listdir(tmp_path)


def test_space_of_a_sparse_array_is_reserved_when_it_is_opened(tmp_path):
    """Such as a copy made by rsync --sparse, or what a kill left between making and reserving."""
    path = tmp_path / "a.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, (2**20,))[-1] = 5
    if on_disk(path) >= 2**20:
        pytest.skip("no sparse files here")
    array = open_array(path, np.uint8, (2**20,))
    assert on_disk(path) >= 2**20 and array[-1] == 5 and not array[:-1].any()


@pytest.mark.parametrize("dtype, shape", [("u1", (2, 6)), ("u1", (2, 5, 1)), (bool, (2, 5))])
def test_array_of_other_settings_is_a_user_error(tmp_path, dtype, shape):
    open_array(tmp_path / "a.npy", np.uint8, (2, 5))[:] = 3
    with pytest.raises(UserError, match=r"a.npy holds uint8 \(2, 5\), not .* other settings"):
        open_array(tmp_path / "a.npy", dtype, shape)
    assert (np.load(tmp_path / "a.npy") == 3).all()


def test_cut_array_is_a_user_error_and_stays_as_it_is(tmp_path):
    path = tmp_path / "a.npy"
    open_array(path, np.float32, (10, 5))
    whole = path.read_bytes()
    for length in (0, 5, 9, 60, 127, 128, 129, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="a.npy is damaged"):
            open_array(path, np.float32, (10, 5))
        assert path.read_bytes() == whole[:length]


def test_an_archive_and_a_damaged_header_are_user_errors(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", np.zeros((2, 5)))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.zeros((2, 5)))
    header = (tmp_path / "b.npy").read_bytes()
    for garbage in (b"(((((", b"\xff\xfe{}", b"'" * 9, b"None,"):
        (tmp_path / "b.npy").write_bytes(header[:10] + garbage + header[10 + len(garbage):])
        for name in ("a.npy", "b.npy"):
            with pytest.raises(UserError, match=f"{name} is damaged"):
                files.read_array(tmp_path / name)


def test_no_space_for_an_array_is_a_user_error_that_leaves_nothing_behind(tmp_path):
    with file_size_limit(300_000), pytest.raises(UserError, match="File too large.*ulimit -f"):
        open_array(tmp_path / "new" / "a.npy", np.uint8, (400_000,))
    assert not os.listdir(tmp_path / "new")


def test_no_space_for_a_sparse_array_leaves_it_as_it_is(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    open_array(tmp_path / "a.npy", np.uint8, (1000,))[3] = 9
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="a.npy: No space left.*free some space"):
        open_array(tmp_path / "a.npy", np.uint8, (1000,))
    with pytest.raises(UserError, match="No space left"):
        open_array(tmp_path / "b.npy", np.uint8, (1000,))
    assert os.listdir(tmp_path) == ["a.npy"] and np.load(tmp_path / "a.npy")[3] == 9


def test_what_a_kill_while_an_array_was_made_left_is_replaced(tmp_path):
    (tmp_path / "a.npy.tmp").write_bytes(b"x" * 5000)
    assert not open_array(tmp_path / "a.npy", np.uint8, (1000,)).any()
    assert os.listdir(tmp_path) == ["a.npy"]


# ---- Rings ---------------------------------------------------------------------------------------

LAYOUT = {"x": (np.float32, (2,)), "n": (np.int64, ())}


def rings(folder, writable=True, capacity=4) -> Rings:
    return Rings(folder, LAYOUT, capacity, num_envs=2, writable=writable)


def fill(found: Rings, number: int) -> Rings:
    for _ in range(number):
        n = np.array([found.count, 1000 + found.count])
        found.append({"n": n, "x": np.stack([n, n], 1), "more": "is ignored"})
    return found


def test_rings_give_back_rows_by_their_numbers(tmp_path):
    found = fill(rings(tmp_path), 7)  # rows 0, 1, 2 have been overwritten
    assert (found.count, found.oldest, found.capacity, found.num_envs) == (7, 3, 4, 2)
    rows = np.array([[3, 5], [4, 6]])
    read = found.read(np.array([0, 1]), rows)
    assert (read["n"] == rows + [0, 1000]).all() and read["x"].shape == (2, 2, 2)
    read["n"][:] = -1  # a copy
    assert (found.read(np.array([0, 1]), rows)["n"] == rows + [0, 1000]).all()
    found.flush()
    again = rings(tmp_path, writable=False)
    assert (again.count, again.oldest) == (7, 3) and found.gibibytes == 2 * 4 * (8 + 8) / 2**30


def test_rolled_back_rings_forget_what_was_overwritten(tmp_path):
    fill(rings(tmp_path), 9)
    found = rings(tmp_path)
    found.roll_back(7)
    assert (found.count, found.oldest) == (7, 5), "rows 7 and 8 have replaced 3 and 4"
    fill(found, 2)
    assert (found.count, found.oldest) == (9, 5)
    with pytest.raises(UserError, match="older than the checkpoint"):
        found.roll_back(10)


@pytest.mark.parametrize("name", ["x", "n"])
def test_nothing_is_made_where_rings_have_been(tmp_path, name):
    fill(rings(tmp_path), 3)
    (tmp_path / f"{name}.npy").unlink()
    for writable in (True, False):
        with pytest.raises(UserError, match=f"{name}.npy is missing"):
            rings(tmp_path, writable)
    assert not (tmp_path / f"{name}.npy").exists()


@pytest.mark.parametrize("counters", [(-1, -1), (3, -2), (3, 4), (0, 1)])
def test_counters_that_cannot_be_are_refused(tmp_path, counters):
    fill(rings(tmp_path), 3)
    rings(tmp_path).rows[:] = counters
    for writable in (True, False):
        with pytest.raises(UserError, match=r"rows.npy holds \[.*cannot be"):
            rings(tmp_path, writable)


@pytest.mark.parametrize("counters", [(4, 3), (90, 70), (3, 3)])
def test_counters_that_a_killed_run_may_leave_are_not(tmp_path, counters):
    """In the midst of a row, and after it was resumed from an earlier checkpoint."""
    fill(rings(tmp_path), 3)
    rings(tmp_path).rows[:] = counters
    assert rings(tmp_path).count == counters[1]
