"""TensorBoard, a progress bar, and Weights & Biases."""

import math
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.files import UserError, explain_write
from common.video import gif_bytes


def to_numbers(metrics: dict[str, Tensor], updates: int) -> dict[str, float]:
    """Scalar metrics as numbers. Raises UserError that names the first one that is not finite."""
    if not metrics:  # before the first update
        return {}
    values = dict(zip(metrics, torch.stack(list(metrics.values())).tolist()))
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    for name in sorted(broken, key=lambda name: not name.startswith("loss/")):  # the cause first
        raise UserError(
            f"{name} became {values[name]} at update {updates}; nothing of that is saved, the last "
            "checkpoint is intact. Look at the environment's rewards and observations or lower the "
            "learning rate, then --resume.")
    return values


class Logger:
    """The curves, the videos and the progress bar of a run; with enabled=False, nothing.

    On a resume, what the killed run logged after its last checkpoint is struck out (purge_step).
    A video is some 100 kB that stays in the event file: whoever calls `video` sets the cadence.
    """

    def __init__(self, run_dir: Path | str, args, step: int = 0, updates: int = 0,
                 resumed: bool = False, enabled: bool = True):
        """`args`: total_timesteps, track and its wandb_*, all shown in a table."""
        self.run_dir, self.total = Path(run_dir), args.total_timesteps
        self.writer = self.wandb = None
        self.mark = time.perf_counter(), step, updates
        # A log file gets one line of the bar per minute instead of ten per second.
        self.bar = tqdm(total=self.total, initial=min(step, self.total), disable=not enabled,
                        unit=" steps", mininterval=0.1 if sys.stderr.isatty() else 60,
                        dynamic_ncols=True)
        if not enabled:
            return
        if args.track:  # first: it hooks into SummaryWriter
            self.wandb = start_wandb(self.run_dir, args)
        threading.excepthook = quiet_writer
        with explain_write(run_dir):
            self.writer = SummaryWriter(str(run_dir), flush_secs=10,
                                        purge_step=step + 1 if resumed else None)
        if not resumed:
            rows = [f"|{name}|{value}|" for name, value in vars(args).items()]
            self.writer.add_text("hyperparameters", "\n".join(["|name|value|", "|-|-|", *rows]))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add a point to each of these curves."""
        if self.writer:
            with explain_write(self.run_dir):
                for tag, value in values.items():
                    self.writer.add_scalar(tag, value, step)

    def video(self, tag: str, frames: np.ndarray, step: int, fps: float = 15) -> None:
        """Add (T, H, W, C) uint8 frames as an animated image; add_video would need moviepy."""
        if self.writer:
            image = Summary.Image(height=frames.shape[1], width=frames.shape[2], colorspace=3,
                                  encoded_image_string=gif_bytes(frames, fps))
            summary = Summary(value=[Summary.Value(tag=tag, image=image)])
            with explain_write(self.run_dir):
                self.writer.file_writer.add_summary(summary, step)

    def speeds(self, step: int, updates: int) -> dict[str, float]:
        """Timesteps and updates per second since the last call."""
        before, self.mark = self.mark, (time.perf_counter(), step, updates)
        seconds = self.mark[0] - before[0]
        return {"charts/SPS": (step - before[1]) / seconds,
                "charts/updates_per_second": (updates - before[2]) / seconds}

    def progress(self, step: int, **postfix: float) -> None:
        """Move the bar."""
        self.bar.set_postfix({k: f"{v:.5g}" for k, v in postfix.items()}, refresh=False)
        self.bar.update(min(step, self.total) - self.bar.n)

    def flush(self) -> None:
        """Hand everything to the operating system: a KILL after this loses none of it."""
        if self.writer:
            with explain_write(self.run_dir):
                self.writer.flush()

    def close(self) -> None:
        """End the bar and the files."""
        self.bar.close()
        if self.writer:
            with explain_write(self.run_dir):
                self.writer.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(run_dir: Path, args):
    """Begin or go on with a run of Weights & Biases, which from here on copies TensorBoard's."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("no wandb here; pip install wandb, or leave --track out") from error
    name = run_dir.resolve().name  # as the id, a resumed run goes on there
    wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=name, id=name,
               resume="allow", dir=str(run_dir), config=vars(args), sync_tensorboard=True)
    return wandb


def quiet_writer(hook: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread prints a traceback of what its next call in the main thread raises."""
    if "AsyncWriter" not in type(hook.thread).__name__:
        threading.__excepthook__(hook)
