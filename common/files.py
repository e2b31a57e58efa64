"""Files that are whole at every moment, and arrays whose disk space is reserved."""

import errno
import math
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

CURES = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space in your disk quota",
         errno.EFBIG: "raise the file-size limit (ulimit -f)"}


class UserError(Exception):
    """One line that says what is wrong and what to do about it; nobody needs its traceback."""


def free_disk(path: Path | str) -> int:
    """Bytes that can still be written where `path` is, or will be."""
    place = Path(path).absolute()
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


@contextmanager
def explain_write(path: Path | str, note: str = ""):
    """Turn a failed write into a UserError with the path, the free space and the cure."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save hides the OSError behind a RuntimeError about an unexpected file position.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        parts = [f"cannot write {path}: {cause.strerror or cause}",
                 f"{free_disk(path) / 2**30:.2f} GiB free", note, CURES.get(cause.errno, "")]
        raise UserError("; ".join(part for part in parts if part)) from error


@contextmanager
def replace_when_done(path: Path):
    """Yield a file that takes the place of `path` only when it is whole and on the disk.

    Killed at any moment, `path` holds all of the old content or all of the new.
    """
    temporary = path.with_name(path.name + ".tmp")  # a fixed name: leftovers do not pile up
    with explain_write(path, f"the previous {path.name} is intact" if path.exists() else ""):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # an interrupt as well
            temporary.unlink(missing_ok=True)
            raise
    with suppress(OSError):  # Windows cannot sync a directory
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # or a power cut undoes the rename
        finally:
            os.close(directory)


def reserve_file(path: Path | str, nbytes: int) -> None:
    """Give `path` at least nbytes on the disk, keeping what it holds.

    A memory-mapped write that finds the disk full kills the process (SIGBUS) without a message;
    after this there is none. macOS cannot reserve: there we can only compare with what is free.
    """
    with explain_write(path, f"{nbytes / 2**30:.2f} GiB needed"), open(path, "ab") as file:
        held = os.fstat(file.fileno()).st_size
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except AttributeError:
            if nbytes - held > free_disk(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            file.truncate(max(nbytes, held))
        except OSError:
            file.truncate(held)  # give back the part that it got
            raise


def open_array(path: Path, dtype: type, shape: tuple[int, ...], mode: str = "w") -> np.memmap:
    """Memory-mapped `.npy` file of this type and shape, all of its disk space reserved.

    mode: "w" makes it, of zeros, unless it is there; "r+" and "r" (which reserves nothing) make
    none. Raises UserError if the disk is full or if the file is missing, damaged or another one.
    """
    with explain_write(path):
        if mode == "w" and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_when_done(path) as file:
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.flush()
                reserve_file(file.name, file.tell() + math.prod(shape) * np.dtype(dtype).itemsize)
    found = read_array(path)  # "r+" would lengthen a file that was cut short
    if (found.dtype, found.shape) != (np.dtype(dtype), shape):
        raise UserError(f"{path} holds {found.dtype} {found.shape}, not {np.dtype(dtype)} "
                        f"{shape}; the run was made with other settings")
    if mode == "r":
        return found
    reserve_file(path, path.stat().st_size)  # a copy may have come out sparse
    with explain_write(path):
        return np.lib.format.open_memmap(path, "r+")


def read_array(path: Path) -> np.memmap:
    """Memory-mapped `.npy` file, to read from. Raises UserError if there is none."""
    try:
        return np.lib.format.open_memmap(path, "r")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; it was moved, or this is the recording of another "
                        "kind of environment") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged header raises nearly everything
        raise UserError(f"{path} is damaged or no .npy file; restore it from a copy") from error
