"""Bookkeeping of a main loop: when something is due, how fast it goes, whether it is still sane."""

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from common.runs import UserError


class Progress:
    """Counts timesteps and tells when something is due every so many of them."""

    def __init__(self, step: int, updates: int):
        self.step, self.before = step, step
        self.clock, self.mark = time.perf_counter(), (step, updates)

    def advance(self, timesteps: int) -> None:
        """One turn of the main loop."""
        self.before, self.step = self.step, self.step + timesteps

    def due(self, every: int) -> bool:
        """Whether this turn crossed a multiple of `every`; never if that is 0."""
        return every > 0 and self.step // every > self.before // every

    def speeds(self, updates: int) -> dict[str, float]:
        """Timesteps and updates per second since the last call."""
        now, (step, before) = time.perf_counter(), self.mark
        seconds, self.clock, self.mark = now - self.clock, now, (self.step, updates)
        return {"charts/SPS": (self.step - step) / seconds,
                "charts/updates_per_second": (updates - before) / seconds}


def finite(metrics: dict[str, Tensor], updates: int) -> dict[str, float]:
    """Scalar metrics as numbers. Raises UserError that names the first one that is not finite."""
    if not metrics:  # before the first update
        return {}
    values = dict(zip(metrics, torch.stack(list(metrics.values())).tolist()))
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} became {value} at update {updates}; that step of its optimiser was not "
                "applied, and the last checkpoint is intact. Look at the environment's rewards and "
                "observations or lower the learning rate, then --resume.")
    return values


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set in any process: all must leave the main loop in the same turn."""
    if not dist.is_initialized():
        return flag
    shared = torch.tensor(float(flag))  # on the CPU: an update may be running on the GPU
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)
