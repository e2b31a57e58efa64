"""A run on the disk: its directory, the lock of its one owner, args.json and checkpoint.pt."""

import json
import os
import pickle
import re
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

MODES = ("resume", "evaluate", "dream")  # flags that name a run directory


class UserError(Exception):
    """One line that says what is wrong and what to do about it; nobody needs its traceback."""


def create_run_dir(root: str, env_id: str, exp_name: str, seed: int) -> Path:
    """Make <root>/<env-id>__<exp-name>__<seed>__<time>, which must not be there yet."""
    name = f"{env_id}__{exp_name}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path(root).absolute() / re.sub("[/:]", "_", name)
    path.mkdir(parents=True)
    return path


def lock_run_dir(run_dir: Path) -> FileLock:
    """A lock that this process holds while the object lives. UserError if another one has it."""
    lock = FileLock(run_dir / "lock", blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"another process trains in {run_dir}; stop it first") from error
    return lock


@contextmanager
def replace_when_done(path: Path):
    """Yield a file that takes the place of `path` only when it is whole and on the disk.

    Killed at any moment, `path` holds all of the old content or all of the new.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns the first into the second
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.__context__ or error}") from error


def save_args(run_dir: Path, script: str, args: dict) -> None:
    """Write args.json: the script that makes the run, and its arguments except the mode."""
    kept = {name: value for name, value in args.items() if name not in MODES}
    with replace_when_done(run_dir / "args.json") as file:
        file.write(json.dumps({"script": script, "args": kept}, indent=2).encode())


def load_args(run_dir: Path | str) -> tuple[str, dict]:
    """The script and the arguments that `save_args` wrote."""
    try:
        found = json.loads((Path(run_dir) / "args.json").read_text())
        return str(found["script"]), dict(found["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir} is not a run directory: {error!r}") from error


def load_checkpoint(run_dir: Path) -> dict:
    """Read a checkpoint to the CPU. weights_only: it is data, and cannot run code."""
    path = run_dir / "checkpoint.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged, or no checkpoint of this project; restore it from a "
                        "copy, or start a new run") from error
