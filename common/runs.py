"""What surrounds a run: its directory, checkpoint files, log, seeds, signals and processes.

With several processes only rank 0 makes files; the others give their Logger enabled=False.
"""

import ctypes
import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.video import gif_bytes

FORMAT_VERSION = 1  # layout of args.json and checkpoint.pt
CURES = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space in your disk quota",
         errno.EFBIG: "raise the file-size limit (ulimit -f)"}


class UserError(Exception):
    """One line that says what is wrong and what to do about it; nobody needs its traceback."""


def free_disk(path: Path | str) -> int:
    """Bytes that can still be written where `path` is, or will be."""
    place = Path(path).absolute()
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


@contextmanager
def _explain_write(path: Path | str, note: str = ""):
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
def _replace_when_done(path: Path):
    """Yield a file that takes the place of `path` only when it is whole and on the disk.

    Killed at any moment, `path` holds all of the old content or all of the new.
    """
    temporary = path.with_name(path.name + ".tmp")  # a fixed name: leftovers do not pile up
    with _explain_write(path, f"the previous {path.name} is intact" if path.exists() else ""):
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
    with _explain_write(path, f"{nbytes / 2**30:.2f} GiB needed"):
        with open(path, "ab") as file:
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


def open_array(path: Path, dtype: type, shape: tuple[int, ...], writable: bool = True) -> np.memmap:
    """Memory-mapped `.npy` of zeros, all of its disk space reserved; an existing one is kept.

    With writable=False the file must be there, and stays as it is. Raises UserError if the disk is
    full or if the file is missing, damaged or has another shape or type.
    """
    with _explain_write(path):
        if not path.exists() and not writable:
            raise UserError(f"{path} is missing; the recording is of another kind of environment")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _replace_when_done(path) as file:
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.flush()
                reserve_file(file.name, file.tell() + math.prod(shape) * np.dtype(dtype).itemsize)
        try:
            found = np.lib.format.open_memmap(path, "r")  # "r+" would lengthen a file cut short
        except ValueError as error:
            raise UserError(f"{path} is damaged or no .npy file; restore it from a copy") from error
        if (found.dtype, found.shape) != (np.dtype(dtype), shape):
            raise UserError(f"{path} holds {found.dtype} {found.shape}, not {np.dtype(dtype)} "
                            f"{shape}; the run was made with other settings")
        if not writable:
            return found
        reserve_file(path, path.stat().st_size)  # a copy may have come out sparse
        return np.lib.format.open_memmap(path, "r+")


def array_shape(path: Path) -> tuple[int, ...]:
    """Shape, of at least two dimensions, of a `.npy` file that must be there."""
    try:
        shape = np.load(path, mmap_mode="r").shape
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}; give a run directory with a replay buffer") from error
    if len(shape) < 2:
        raise UserError(f"{path} has shape {shape}, not (num_envs, capacity, ...); for one "
                        "environment write array[None]")
    return shape


def create_run_dir(root: Path | str, env_id: str, exp_name: str, seed: int) -> Path:
    """Make <root>/<env-id>__<exp-name>__<seed>__<time>, never one that is already there."""
    label = f"{env_id}__{exp_name}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    name = label.replace("/", "_").replace(":", "_")
    with _explain_write(root):
        Path(root).mkdir(parents=True, exist_ok=True)
        for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(1))):
            with suppress(FileExistsError):  # another run started in this second
                (Path(root) / (name + suffix)).mkdir()
                return Path(root) / (name + suffix)


def _check_header(path: Path, found: object, script: str, content: str = "script") -> None:
    layout = found.get("format") if isinstance(found, dict) else None
    if not isinstance(layout, int) or not {"script", content} <= found.keys():
        raise UserError(f"{path} is not a file that this project wrote; check the directory")
    if layout != FORMAT_VERSION:
        age = "an older" if layout < FORMAT_VERSION else "a newer"
        raise UserError(f"{path} was written by {age} layout {layout}, this is {FORMAT_VERSION}; "
                        "use the version of the code that wrote it, or start a new run")
    if found["script"] != script:
        raise UserError(f"{path} was written by {found['script']}, this is {script}; "
                        f"use python {found['script']}.py")


def save_args(run_dir: Path | str, script: str, args: dict) -> None:
    content = {"format": FORMAT_VERSION, "script": script, "args": args}
    with _replace_when_done(Path(run_dir) / "args.json") as file:
        file.write(json.dumps(content, indent=2).encode())


def load_args(run_dir: Path | str, script: str) -> dict:
    """The arguments that `script` saved. JSON has no tuples: they come back as lists."""
    path = Path(run_dir) / "args.json"
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{run_dir} is not a run directory (args.json: {error.strerror}); "
                        "give one under runs/") from error
    except ValueError as error:
        raise UserError(f"{path} is empty or not JSON; restore it or start a new run") from error
    _check_header(path, found, script, content="args")
    return found["args"]


def save_checkpoint(path: Path | str, state: dict, script: str) -> None:
    """Write tensors and plain data; a crash or a full disk leaves the previous checkpoint whole."""
    with _replace_when_done(Path(path)) as file:
        torch.save({**state, "format": FORMAT_VERSION, "script": script}, file)
        file.flush()
        # Find out now, not on the day of the resume, that load_checkpoint would refuse something.
        if refused := torch.serialization.get_unsafe_globals_in_checkpoint(file.name):
            raise TypeError(f"a checkpoint takes tensors and plain data only, not {refused}")


def load_checkpoint(path: Path | str, script: str, device: torch.device | str) -> dict:
    """Read a checkpoint of `script`. weights_only: a file from a stranger cannot run code."""
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except (torch.OutOfMemoryError, MemoryError):  # says nothing about the file
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}; was the run stopped before "
                        "its first checkpoint?") from error
    except Exception as error:  # pickle and zip raise nearly everything
        raise UserError(f"{path} is cut short, damaged or no checkpoint of this project; "
                        "restore a copy of it or start a new run") from error
    _check_header(Path(path), found, script)
    return found


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy and torch on all devices; with several ranks give each its own seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # its choice depends on timing


def keep_freed_memory() -> None:
    """Let malloc keep large blocks that torch frees instead of giving them back to the kernel.

    Each update allocates the same tensors again; getting them zeroed from the kernel every time
    cost 23% (tiny networks) and 35% (size S, bfloat16) of an update on a CPU. The price is a higher
    peak of memory (size S: 1.9 to 2.2 GB). Linux with glibc only.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: take blocks below 1 GiB from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap


def rng_state(device: torch.device | str) -> dict:
    """What seed_everything seeded, as it stands now, as plain data and tensors."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest),
             "torch": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: torch.device | str) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())  # load_checkpoint moved it to the device
    if torch.device(device).type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def setup_distributed(device_type: str) -> tuple[int, int, int]:
    """(rank, world size, local rank) under torchrun, with the group joined; else (0, 1, 0)."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, 0
    rank, world, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device_type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} has no GPU, this machine has "
                            f"{torch.cuda.device_count()}; lower --nproc-per-node")
        torch.cuda.set_device(local)  # nccl deadlocks when two share a GPU
    # gloo beside nccl: what only the CPUs need to agree on must not wait for the GPUs.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    return rank, world, local


class GracefulExit:
    """Within it, Ctrl-C and SIGTERM only set `requested`; a Ctrl-C after that stops at once."""

    def __init__(self):
        self.requested, self.error = False, None  # error: what the caller stops for, if anything

    def __enter__(self):
        self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        with suppress(OSError):  # print() may not be called in a handler
            os.write(2, b"\nStopping after this step; Ctrl-C stops at once and saves nothing.\n")


class Logger:
    """TensorBoard, a progress bar and, if `track`, Weights & Biases; with enabled=False, nothing.

    On resume, what the killed run logged after its last checkpoint is struck out (purge_step).
    A video is some 100 kB that stays in the event file: whoever calls `video` sets the cadence.
    """

    def __init__(self, run_dir: Path | str, total_steps: int, initial_step: int = 0,
                 enabled: bool = True, track: bool = False, wandb_project: str | None = None,
                 hyperparameters: dict | None = None):
        self.writer = self.wandb = None
        self.run_dir = Path(run_dir)
        # A log file gets one line of the bar per minute instead of ten per second.
        self.bar = tqdm(total=total_steps, initial=initial_step, disable=not enabled, unit=" steps",
                        mininterval=0.1 if sys.stderr.isatty() else 60, dynamic_ncols=True)
        if not enabled:
            return
        if track:  # first: it hooks into SummaryWriter
            self._start_wandb(wandb_project, hyperparameters)
        with _explain_write(run_dir):
            self.writer = SummaryWriter(str(run_dir), flush_secs=10,
                                        purge_step=initial_step + 1 if initial_step else None)
        if hyperparameters and not initial_step:
            rows = [f"|{name}|{value}|" for name, value in hyperparameters.items()]
            self.writer.add_text("hyperparameters", "\n".join(["|name|value|", "|-|-|", *rows]))

    def _start_wandb(self, project: str | None, hyperparameters: dict | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("no wandb here; pip install wandb, or leave --track out") from error
        name = self.run_dir.resolve().name  # as the id, a resumed run goes on there
        wandb.init(project=project, name=name, id=name, resume="allow", dir=str(self.run_dir),
                   config=hyperparameters, sync_tensorboard=True)
        self.wandb = wandb

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self.writer:
            with _explain_write(self.run_dir):
                for tag, value in values.items():
                    self.writer.add_scalar(tag, value, step)

    def video(self, tag: str, frames: np.ndarray, step: int, fps: float = 15) -> None:
        """Add (T, H, W, C) uint8 frames as an animated image; add_video would need moviepy."""
        if self.writer:
            image = Summary.Image(height=frames.shape[1], width=frames.shape[2], colorspace=3,
                                  encoded_image_string=gif_bytes(frames, fps))
            summary = Summary(value=[Summary.Value(tag=tag, image=image)])
            with _explain_write(self.run_dir):
                self.writer.file_writer.add_summary(summary, step)

    def progress(self, step: int, **postfix: float | str) -> None:
        shown = {k: v if isinstance(v, str) else f"{v:.5g}" for k, v in postfix.items()}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def flush(self) -> None:
        """Hand everything to the operating system: a KILL after this loses none of it."""
        if self.writer:
            with _explain_write(self.run_dir):
                self.writer.flush()

    def close(self) -> None:
        self.bar.close()
        if self.writer:
            with _explain_write(self.run_dir):
                self.writer.close()
        if self.wandb:
            self.wandb.finish()
