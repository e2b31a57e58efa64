"""Rings of rows on the disk that outlive the process that wrote them, however it ended."""

import mmap
from pathlib import Path

import numpy as np

from common.files import UserError, open_array


class Rings:
    """One ring of rows per environment: a memory-mapped `.npy` file for each part of a row.

    Rows are numbered from the start of the run; row i lies in slot i % capacity. All environments
    advance together, so one `count` of complete rows serves all rings; the rows [oldest, count)
    can be read.

    What makes a resume exact: `count` comes from the checkpoint, while the rows that the killed
    process wrote after it have already replaced the oldest ones. `rows.npy` = [begun, complete]
    lies beside the rings; `begun` never goes back, so no row is taken for the one it replaced.
    """

    def __init__(self, folder: Path, layout: dict[str, tuple[type, tuple[int, ...]]],
                 capacity: int, num_envs: int, writable: bool = True):
        """Open the files in `folder`, or make them all; `layout` has type and shape of each part.

        Raises `UserError` if the disk is full, or if the files do not fit or are damaged.
        """
        self.capacity, self.num_envs = capacity, num_envs
        counters = folder / "rows.npy"  # made last: where it is, nothing may be missing
        mode = "r" if not writable else "r+" if counters.exists() else "w"
        self.files = {
            name: open_array(folder / f"{name}.npy", dtype, (num_envs, capacity, *shape), mode)
            for name, (dtype, shape) in layout.items()}
        self.rows = open_array(counters, np.int64, (2,), mode)
        begun, self.count = map(int, self.rows)
        if not 0 <= self.count <= begun:
            raise UserError(f"{counters} holds [{begun}, {self.count}], which cannot be: [rows "
                            "begun, rows complete]; restore it from a copy")
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
        """Write to disk and drop the pages from this process, so that its memory stays flat."""
        for file in (*self.files.values(), self.rows):
            if file.flags.writeable:
                file.flush()
            if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
                file._mmap.madvise(mmap.MADV_DONTNEED)

    def roll_back(self, count: int) -> None:
        """Go back to a checkpoint: later rows are forgotten, and so are those they replaced."""
        if self.rows[0] < count:
            raise UserError("the replay files are older than the checkpoint; restore both from the "
                            "same copy of the run directory.")
        self.count = count
