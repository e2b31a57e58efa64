"""The run directory, its files, arrays and rings: what must survive a bad day."""

import errno
import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from common.disk import (Rings, UserError, create_run_dir, load_args, load_checkpoint, lock_run_dir,
                         open_array, replace_when_done, save_args)
from tests.command_lines import file_size_limit


def python(code: str, *arguments) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]


def save(path: Path, value) -> None:
    with replace_when_done(path) as file:
        torch.save(value, file)


# ---- Run directory -------------------------------------------------------------------------------

def test_a_run_directory_is_named_for_its_run(tmp_path, monkeypatch):
    """Also a relative one stays where it was made: an environment may change the directory."""
    monkeypatch.chdir(tmp_path)
    made = create_run_dir("my runs", "ALE/Pong-v5:x", "v3", 1)
    assert made.is_dir() and made.is_absolute() and made.parent == tmp_path / "my runs"
    assert made.name.startswith("ALE_Pong-v5_x__v3__1__2")


def test_a_run_directory_has_one_owner(tmp_path):
    """Until the process that has it ends, however it ends."""
    owner = subprocess.Popen(python("""
        import sys, time
        from pathlib import Path
        from common.disk import lock_run_dir
        lock = lock_run_dir(Path(sys.argv[1]))
        print("mine", flush=True)
        time.sleep(600)""", tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match="another process trains in"):
            lock_run_dir(tmp_path)
    finally:
        owner.kill()
        owner.communicate()
    with lock_run_dir(tmp_path):
        pass


def test_args_come_back(tmp_path):
    args = {"env_id": "ALE/Pong-v5", "lr": 1e-4, "size": None, "track": False, "é": "1 2"}
    save_args(tmp_path, "dreamer_v3", args | {"resume": "runs/x"})
    assert load_args(tmp_path) == ("dreamer_v3", args)
    assert os.listdir(tmp_path) == ["args.json"]


@pytest.mark.parametrize("content", [None, b"", b'{"scr', b"\xff\xfe\x00",
                                     b"[1]", b'{"script": "x"}', b'{"script": "x", "args": 1}'])
def test_what_is_no_run_directory_is_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "args.json").write_bytes(content)
    with pytest.raises(UserError, match="is not a run directory") as caught:
        load_args(tmp_path)
    assert "\n" not in str(caught.value)


# ---- Checkpoint ----------------------------------------------------------------------------------

@pytest.mark.parametrize("broken", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_an_interrupted_save_keeps_the_previous_file(tmp_path, monkeypatch, broken, error):
    save(tmp_path / "checkpoint.pt", {"spec": 1})

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises((UserError, KeyboardInterrupt)):
            save(tmp_path / "checkpoint.pt", {"spec": 2})
    assert load_checkpoint(tmp_path) == {"spec": 1}


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_killed_in_the_middle_of_a_save(tmp_path, moment):
    done = subprocess.run(python("""
        import os, sys, torch
        from pathlib import Path
        from common.disk import replace_when_done
        for value in (1, 2):
            with replace_when_done(Path(sys.argv[1]) / "checkpoint.pt") as file:
                torch.save({"spec": value}, file)
            setattr(os, sys.argv[2], lambda *_: os.kill(os.getpid(), 9))""",
        tmp_path, moment), cwd=ROOT)
    assert done.returncode == -9 and load_checkpoint(tmp_path) == {"spec": 1}
    save(tmp_path / "checkpoint.pt", {"spec": 3})  # over what the kill left
    assert load_checkpoint(tmp_path) == {"spec": 3} and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_full_disk_is_one_line_and_leaves_the_previous_checkpoint(tmp_path):
    save(tmp_path / "checkpoint.pt", {"spec": 1})
    with file_size_limit(300_000):
        # 75,000 floats fit except for the last few bytes: those fail in flush, not in torch.save.
        for size in (60_000, 75_000, 74_700, 1_000_000):
            for name in ("checkpoint.pt", "first.pt"):
                with pytest.raises(UserError, match=f"cannot write .*{name}: .*too large"):
                    save(tmp_path / name, {"a": torch.zeros(size), "b": torch.zeros(size // 3)})
    assert load_checkpoint(tmp_path) == {"spec": 1} and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_checkpoint_that_was_cut_or_changed_is_one_line(tmp_path):
    path, weights = tmp_path / "checkpoint.pt", torch.arange(600.0)
    save(path, {"agent": weights, "spec": 7})
    whole = path.read_bytes()
    for place in range(0, len(whole), 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        with suppress(UserError):
            assert torch.equal(load_checkpoint(tmp_path)["agent"], weights), place
    for other in ([1], {}, torch.zeros(3)):
        save(path, other)
        with pytest.raises(UserError, match="checkpoint.pt .*damaged"):
            load_checkpoint(tmp_path)
    for length in (*range(0, 70, 7), *range(70, len(whole), 97), len(whole) - 10, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="checkpoint.pt .*damaged"):
            load_checkpoint(tmp_path)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_cannot_run_code(tmp_path, zipped):
    state = {"step": 1, "evil": Malicious(str(tmp_path / "broken_into"))}
    torch.save(state, tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "broken_into").exists()


# ---- Arrays --------------------------------------------------------------------------------------

def test_an_array_is_made_of_zeros_its_disk_space_reserved_and_kept(tmp_path):
    path = tmp_path / "replay" / "rank0" / "image.npy"
    array = open_array(path, np.uint8, (2, 100_000, 8))
    assert isinstance(array, np.memmap) and not array.any()
    if hasattr(os, "posix_fallocate"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size == array.offset + array.nbytes
    array[1, 3] = 7
    array.flush()
    assert (open_array(path, np.uint8, (2, 100_000, 8)) == array).all()
    assert (np.load(path) == array).all() and os.listdir(path.parent) == ["image.npy"]


def test_no_space_for_an_array_is_one_line_and_the_array_is_not_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="a.npy.*No space left.*--buffer-size"):
        open_array(tmp_path / "new" / "a.npy", np.uint8, (2**20,))
    assert not (tmp_path / "new" / "a.npy").exists()


def test_what_a_kill_while_an_array_was_made_left_is_replaced(tmp_path):
    (tmp_path / "a.tmp").write_bytes(b"x" * 5000)
    assert not open_array(tmp_path / "a.npy", np.uint8, (1000,)).any()
    assert os.listdir(tmp_path) == ["a.npy"]


@pytest.mark.parametrize("dtype, shape", [("u1", (2, 6)), ("u1", (2, 5, 1)), (bool, (2, 5))])
def test_an_array_of_another_environment_is_refused(tmp_path, dtype, shape):
    open_array(tmp_path / "a.npy", np.uint8, (2, 5))[:] = 3
    with pytest.raises(UserError, match=r"a.npy holds uint8 \(2, 5\), not .* another kind"):
        open_array(tmp_path / "a.npy", dtype, shape)
    assert (np.load(tmp_path / "a.npy") == 3).all()


def test_what_is_no_array_is_refused_and_stays_as_it_is(tmp_path):
    path = tmp_path / "a.npy"
    for content in (b"", b"\x93NUMPY", b"x" * 500):
        path.write_bytes(content)
        with pytest.raises(UserError, match="a.npy"):
            open_array(path, np.float32, (10, 5))
        assert path.read_bytes() == content


# ---- Rings ---------------------------------------------------------------------------------------

LAYOUT = {"reward": (np.float32, (2,)), "n": (np.int64, ())}


def rings(folder, capacity=4) -> Rings:
    return Rings(folder, LAYOUT, capacity, num_envs=2)


def fill(found: Rings, number: int) -> Rings:
    for _ in range(number):
        n = np.array([found.count, 1000 + found.count])
        found.append({"n": n, "reward": np.stack([n, n], 1), "more": "is ignored"})
    return found


def test_rings_give_back_rows_by_their_numbers(tmp_path):
    found = fill(rings(tmp_path), 7)  # rows 0, 1, 2 have been overwritten
    assert (found.count, found.oldest, found.capacity, found.num_envs) == (7, 3, 4, 2)
    rows = np.array([[3, 5], [4, 6]])
    read = found.read(np.array([0, 1]), rows)
    assert (read["n"] == rows + [0, 1000]).all() and read["reward"].shape == (2, 2, 2)
    read["n"][:] = -1  # a copy
    assert (found.read(np.array([0, 1]), rows)["n"] == rows + [0, 1000]).all()
    found.flush()
    again = rings(tmp_path, capacity=9)  # of a run that is resumed for longer: its size stays
    assert (again.count, again.oldest, again.capacity) == (7, 3, 4)
    assert found.gibibytes == 2 * 4 * (8 + 8) / 2**30


def test_rings_that_went_back_forget_what_was_overwritten(tmp_path):
    fill(rings(tmp_path), 9)
    found = rings(tmp_path)
    found.roll_back(7)
    assert (found.count, found.oldest) == (7, 5), "rows 7 and 8 have replaced 3 and 4"
    fill(found, 2)
    assert (found.count, found.oldest) == (9, 5)
    with pytest.raises(UserError, match="older than the checkpoint"):
        found.roll_back(10)


@pytest.mark.parametrize("counters", [(4, 3), (90, 70), (3, 3)])
def test_counters_that_a_killed_run_may_leave(tmp_path, counters):
    """In the midst of a row, and after it was resumed from an earlier checkpoint."""
    fill(rings(tmp_path), 3)
    rings(tmp_path).rows[:] = counters
    assert rings(tmp_path).count == counters[1]


@pytest.mark.parametrize("part", ["reward", "n"])
def test_a_part_that_is_missing_or_cut_is_not_made_anew(tmp_path, part):
    """Zeros in its place would be trained on."""
    fill(rings(tmp_path), 3)
    path = tmp_path / f"{part}.npy"
    for damage in (lambda: os.truncate(path, path.stat().st_size - 9), path.unlink):
        damage()
        with pytest.raises(UserError, match=f"{part}.npy"):
            rings(tmp_path)
