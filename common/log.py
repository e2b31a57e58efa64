"""TensorBoard, a progress bar, and Weights & Biases."""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from common.disk import UserError
from common.video import gif_bytes


def to_numbers(metrics: dict[str, Tensor], updates: int) -> dict[str, float]:
    """Scalar metrics as numbers. Raises UserError that names one that is not finite."""
    values = torch.stack(list(metrics.values())).tolist() if metrics else []
    for name, value in sorted(zip(metrics, values), key=lambda x: not x[0].startswith("loss/")):
        if not math.isfinite(value):
            raise UserError(f"{name} became {value} at update {updates}; the last checkpoint is "
                            "intact. Look at the environment's rewards and observations, or lower "
                            "the learning rate, then --resume")
    return dict(zip(metrics, values))


class Log:
    """The curves, the videos and the progress of a run; with enabled=False, nothing."""

    def __init__(self, run_dir: Path, args, step: int, updates: int, enabled: bool):
        self.total, self.writer, self.wandb = args.total_timesteps, None, None
        self.mark, self.print_at = (time.time(), step, updates), 0.0
        self.bar = tqdm(total=self.total, initial=min(step, self.total), unit=" steps",
                        disable=not (enabled and sys.stderr.isatty()), dynamic_ncols=True)
        if enabled and args.track:  # first: it hooks into SummaryWriter
            import wandb  # on a resume the name, as the id, continues the run there
            self.wandb = wandb.init(project=args.wandb_project_name, entity=args.wandb_entity,
                                    name=run_dir.name, id=run_dir.name, resume="allow",
                                    dir=str(run_dir), config=vars(args), sync_tensorboard=True)
        if enabled:
            # What a killed run has logged after its last checkpoint is struck out.
            self.writer = SummaryWriter(str(run_dir), purge_step=step + 1)
            settings = {name: value for name, value in vars(args).items() if value is not None}
            for part in hparams(settings, {"charts/episodic_return": 0.0}):
                self.writer.file_writer.add_summary(part)  # a table beside the other runs

    def scalars(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items() if self.writer else ():
            self.writer.add_scalar(tag, value, step)

    def video(self, tag: str, frames: np.ndarray, step: int) -> None:
        """Add (T, H, W, 3) uint8 frames as an animated image; add_video would need moviepy."""
        image = Summary.Image(height=frames.shape[1], width=frames.shape[2], colorspace=3,
                              encoded_image_string=gif_bytes(frames))
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self.writer.file_writer.add_summary(summary, step)

    def speeds(self, step: int, updates: int) -> dict[str, float]:
        before, self.mark = self.mark, (time.time(), step, updates)
        seconds, steps, done = (now - then for now, then in zip(self.mark, before))
        return {"charts/SPS": steps / seconds, "charts/updates_per_second": done / seconds}

    def progress(self, step: int, **postfix: float) -> None:
        """Move the bar; where stderr is no terminal, print a line a minute."""
        words = {name: f"{value:.5g}" for name, value in postfix.items()}
        if self.bar.disable and self.writer and time.time() > self.print_at:
            self.print_at = time.time() + 60
            print(f"timestep {step:,} of {self.total:,}", words, file=sys.stderr, flush=True)
        self.bar.set_postfix(words, refresh=False)
        self.bar.update(min(step, self.total) - self.bar.n)

    def flush(self) -> None:
        """Hand everything to the operating system: a KILL after this loses none of it."""
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        self.bar.close()
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()
