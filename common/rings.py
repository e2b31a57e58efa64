"""Rings of rows on the disk that outlive the process that wrote them, however it ended."""

import mmap
import os
from pathlib import Path

import numpy as np

from common.disk import UserError


class Rings:
    """One ring of rows per environment: a memory-mapped `.npy` file for each part of a row.

    Rows are numbered from the start of the run; row i lies in slot i % capacity. All environments
    advance together, so one `count` of complete rows serves all rings. The rows [oldest, count)
    can be read.

    A resume is exact because `count` comes from the checkpoint, while the rows that a killed
    process wrote after it have already replaced the oldest ones: `rows.npy` = [begun, complete]
    lies beside the rings, and `begun` never goes back, so no row is taken for the one it replaced.
    """

    def __init__(self, folder: Path, layout: dict[str, tuple[type, tuple[int, ...]]],
                 capacity: int, num_envs: int):
        """Open the files in `folder`, or make them; `layout` has type and shape of each part.

        Raises `UserError` if the disk is full, or if the files belong to another environment.
        """
        if (folder / "rows.npy").exists():  # of a resumed run: the rings keep their size
            capacity = open_array(folder / "reward.npy").shape[1]
        self.capacity, self.num_envs = capacity, num_envs
        self.files = {name: open_array(folder / f"{name}.npy", dtype, (num_envs, capacity, *shape))
                      for name, (dtype, shape) in layout.items()}
        self.rows = open_array(folder / "rows.npy", np.int64, (2,))  # last: then none is missing
        self.count = int(self.rows[1])
        self.gibibytes = sum(file.nbytes for file in self.files.values()) / 2**30

    @property
    def oldest(self) -> int:
        """The oldest row that is still whole."""
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
    """Memory-mapped `.npy` file. If there is none, it is made and its disk space reserved.

    Without that reserve, a disk that fills up later kills the process in the middle of a write
    (SIGBUS). macOS and Windows cannot reserve.
    """
    if dtype and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        nbytes = np.lib.format.open_memmap(temporary, "w+", dtype, shape).nbytes
        try:
            with open(temporary, "r+b") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
        except OSError as error:
            temporary.unlink()
            raise UserError(f"cannot reserve {nbytes / 2**30:.2f} GiB for {path}: {error.strerror}"
                            "; lower --buffer-size, or take another --runs-dir") from error
        temporary.rename(path)
    try:
        array = np.lib.format.open_memmap(path, "r+")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if dtype and (array.dtype, array.shape) != (np.dtype(dtype), shape):
        raise UserError(f"{path} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}: "
                        "it belongs to another kind of environment")
    return array
