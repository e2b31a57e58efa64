"""What both sides of a speed comparison share; runs under either Python (needs numpy and torch).

A side is one process that holds one agent and does what it is told, a line of JSON at a time:

    {"do": "update", "repeat": 1}    ->    {"seconds": [6.1]}

so that several of them can take turns on one machine, and slow minutes hit all of them alike.
"""

import json
import os
import resource
import sys
import time
import traceback

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode


def synthetic_batch(length: int, rows: int, shape: dict) -> dict[str, np.ndarray]:
    """A replayed batch, time-major, the same on every side: noise for images, two seams.

    `shape`: `channels` of the image, number of `actions`, and whether they are `discrete`.
    """
    rng, actions = np.random.default_rng(0), shape["actions"]
    is_first = np.zeros((length, rows), bool)
    is_first[0], is_first[length // 2, 0] = True, True
    action = rng.uniform(-1, 1, (length, rows, actions)).astype(np.float32)
    if shape["discrete"]:
        action = np.eye(actions, dtype=np.float32)[action.argmax(-1)]
    pixels = rng.integers(256, size=(length, rows, 64, 64, shape["channels"]), dtype=np.uint8)
    return {"image": pixels, "action": action,
            "reward": rng.standard_normal((length, rows)).astype(np.float32),
            "is_first": is_first, "is_terminal": np.roll(is_first, -1, 0) & ~is_first}


class Side:
    """Base class: a subclass makes `self.agent_step()`, one update, and `self.act_step(rows)`."""

    def __init__(self, setting: dict):
        """`setting`: script, sizes, pcont, horizon, actions, discrete, channels, threads, bf16,
        compile."""
        self.setting = setting
        if setting["threads"]:
            torch.set_num_threads(setting["threads"])
        torch.manual_seed(0)
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(setting.get("device", found))

    def batch(self, length: int, rows: int) -> None:
        """Use a batch of this shape from here on."""
        raise NotImplementedError

    def update(self, repeat: int) -> dict:
        """Seconds of each of `repeat` updates."""
        return {"seconds": [self.clock(self.agent_step) for _ in range(repeat)]}

    def act(self, rows: int, repeat: int) -> dict:
        """Seconds of each of `repeat` acting steps with `rows` environments."""
        step = self.act_step(rows)
        step(), step()
        return {"seconds": [self.clock(step) for _ in range(repeat)]}

    def flops(self) -> dict:
        """Floating-point operations of an update, as torch counts them: products only."""
        with FlopCounterMode(display=False) as counter:
            self.agent_step()
        return {"flops": counter.get_total_flops()}

    def profile(self, rows: int) -> dict:
        """Where an update spends its time: the `rows` operators with the most of their own."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            self.agent_step()
        key = f"self_{self.device.type}_time_total"
        return {"table": profile.key_averages().table(sort_by=key, row_limit=rows)}

    def memory(self) -> dict:
        """Peak bytes so far: of the card, with the pools of graphs, or of the process."""
        if self.device.type == "cuda":
            return {"bytes": torch.cuda.max_memory_reserved()}
        return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    def matmul(self, bf16: bool) -> dict:
        """The best rate of a matrix product of the size of an imagination step, in FLOP/s."""
        dtype = torch.bfloat16 if bf16 else torch.float32
        native = self.device.type == "cuda" or not bf16 or torch.cpu._is_avx512_bf16_supported()
        n, k, m = (16384 if native else 64), 1536, 512  # emulated, the whole would take minutes
        a, b = (torch.randn(shape, device=self.device, dtype=dtype) for shape in ((n, k), (k, m)))
        a @ b
        seconds = min(self.clock(lambda: a @ b) for _ in range(5))
        return {"flops_per_second": 2 * n * k * m / seconds}

    def clock(self, function) -> float:
        """Seconds that `function` takes, on the GPU too."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def serve(side_type: type[Side]) -> None:
    """Do what standard input asks for until it is closed; anything that is printed goes to stderr.

    The setting is the command line's one argument, as JSON.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    side = side_type(json.loads(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(side, request.pop("do"))(**request) or {}
        except Exception:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
