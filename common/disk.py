"""A run on the disk: its directory, its one owner, args.json, checkpoint.pt and rings of rows."""

import json
import mmap
import os
import re
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

MODES = ("resume", "evaluate", "dream")  # flags that name a run directory


class UserError(Exception):
    """One line that says what is wrong and what to do about it; nobody needs its traceback."""


def create_run_dir(root: str, env_id: str, exp_name: str, seed: int) -> Path:
    name = f"{env_id}__{exp_name}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    (path := Path(root).absolute() / re.sub("[/:]", "_", name)).mkdir(parents=True)
    return path


def lock_run_dir(run_dir: Path):
    try:
        return FileLock(run_dir / "lock", blocking=False).acquire()
    except Timeout as error:
        raise UserError(f"another process trains in {run_dir}; stop it first") from error


@contextmanager
def replace_when_done(path: Path):
    """Yield a file that takes the place of `path` when it is whole and on the disk: a KILL at any
    moment leaves all of the old content or all of the new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns the first into the second
        temporary.unlink(missing_ok=True)
        why = error if isinstance(error, OSError) else error.__context__ or error
        raise UserError(f"cannot write {path}: {why}") from error


def save_args(run_dir: Path, script: str, args: dict) -> None:
    """Write args.json: the script that makes the run, and its arguments except the mode."""
    kept = {name: value for name, value in args.items() if name not in MODES}
    with replace_when_done(run_dir / "args.json") as file:
        file.write(json.dumps({"script": script, "args": kept}, indent=2).encode())


def load_args(run_dir: Path | str) -> tuple[str, dict]:
    try:
        found = json.loads((Path(run_dir) / "args.json").read_text())
        return str(found["script"]), dict(found["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir} is not a run directory: no args.json of a run in it") from error


def load_checkpoint(run_dir: Path) -> dict:
    """Read a checkpoint to the CPU. weights_only: it is data, and cannot run code."""
    try:
        is_damaged = zipfile.ZipFile(path := run_dir / "checkpoint.pt").testzip()  # torch looks at
        found = {} if is_damaged else torch.load(path, "cpu", weights_only=True)  # no check sum
        return {**found, "spec": found["spec"]}
    except Exception as error:  # whatever a damaged file may raise
        raise UserError(f"{run_dir}/checkpoint.pt is missing or damaged; restore it") from error


class Rings:
    """One ring of rows per environment: a memory-mapped `.npy` file for each part of a row.

    Row i of the run lies in slot i % capacity; the rows [oldest, count) can be read. A resume is
    exact: `count` comes from the checkpoint, and `rows.npy` = [begun, complete], of which `begun`
    never goes back, tells which of the oldest rows a killed process has replaced.
    """

    def __init__(self, folder: Path, layout: dict[str, tuple[type, tuple[int, ...]]],
                 capacity: int, num_envs: int):
        """Open the files in `folder`, or make them; `layout` has type and shape of each part."""
        if (folder / "rows.npy").exists():  # of a resumed run: the rings keep their size
            capacity = [open_array(folder / f"{name}.npy").shape[1] for name in layout][0]
        self.capacity, self.num_envs = capacity, num_envs
        self.files = {name: open_array(folder / f"{name}.npy", dtype, (num_envs, capacity, *shape))
                      for name, (dtype, shape) in layout.items()}
        self.rows = open_array(folder / "rows.npy", np.int64, (2,))  # last: then none is missing
        self.count = int(self.rows[1])
        self.gibibytes = sum(file.nbytes for file in self.files.values()) / 2**30

    @property
    def oldest(self) -> int:
        return max(0, int(self.rows[0]) - self.capacity)

    def append(self, row: dict[str, np.ndarray]) -> None:
        """Add a row per environment; parts that the rings do not keep are ignored."""
        self.rows[0] = max(self.rows[0], self.count + 1)  # before the row is touched
        for name, file in self.files.items():
            file[:, self.count % self.capacity] = row[name]
        self.count += 1
        self.rows[1] = self.count

    def read(self, env: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Copies (T, B, ...) of the rows with numbers `rows` (T, B) of the environments (B,)."""
        return {name: file[env, rows % self.capacity] for name, file in self.files.items()}

    def flush(self) -> None:
        """Write to the disk and drop the pages from this process, so that its memory stays flat."""
        for file in (*self.files.values(), self.rows):
            file.flush()
            if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
                file._mmap.madvise(mmap.MADV_DONTNEED)

    def roll_back(self, count: int) -> None:
        """Go back to a checkpoint: later rows are forgotten, and so are those they replaced."""
        if self.rows[0] < count:
            raise UserError("the replay files are older than the checkpoint; restore both from the "
                            "same copy of the run directory")
        self.count = count


def open_array(path: Path, dtype: type | None = None,
               shape: tuple[int, ...] | None = None) -> np.memmap:
    """Memory-mapped `.npy` file. If there is none, it is made and its disk space reserved, or a
    full disk would kill the process later (SIGBUS); only Linux can reserve."""
    try:
        if dtype and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            np.lib.format.open_memmap(temporary, "w+", dtype, shape)
            with open(temporary, "r+b") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
            temporary.rename(path)
        np.lib.format.open_memmap(path, "r")  # fails if the file is cut off; "r+" would add zeros
        array = np.lib.format.open_memmap(path, "r+")
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"cannot open {path}: {error}; restore it, or set --buffer-size") from error
    if dtype and (array.dtype, array.shape) != (np.dtype(dtype), shape):
        raise UserError(f"{path} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}: "
                        "it belongs to another kind of environment")
    return array
