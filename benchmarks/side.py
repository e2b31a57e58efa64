"""A side of a speed comparison: one process that holds one agent and does what it is told.

It reads a line of JSON at a time, so that several sides can take turns on one machine:

    {"do": "update"}    ->    {"seconds": 6.1}

`Ours` is one of our scripts, of this checkout or of another; `side_sheeprl.py` is the other side.
This file runs under either Python: it needs numpy and torch.
"""

import importlib
import inspect
import json
import os
import resource
import sys
import time
import traceback

import numpy as np
import torch


def synthetic_batch(length: int, rows: int, setting: dict) -> dict[str, np.ndarray | None]:
    """A replayed batch, time-major, the same on every side: noise to see, two seams.

    `setting`: `channels` of the image, or the size of a `vector` in its place; number of `actions`,
    and whether they are `discrete`.
    """
    rng, actions, vector = np.random.default_rng(0), setting["actions"], setting.get("vector")
    is_first = np.zeros((length, rows), bool)
    is_first[0], is_first[length // 2, 0] = True, True
    action = rng.uniform(-1, 1, (length, rows, actions)).astype(np.float32)
    if setting["discrete"]:
        action = np.eye(actions, dtype=np.float32)[action.argmax(-1)]
    image = None if vector else rng.integers(
        256, size=(length, rows, 64, 64, setting["channels"]), dtype=np.uint8)
    numbers = rng.standard_normal((length, rows, vector)).astype(np.float32) if vector else None
    return {"image": image, "vector": numbers, "action": action,
            "reward": rng.standard_normal((length, rows)).astype(np.float32),
            "is_first": is_first, "is_terminal": np.roll(is_first, -1, 0) & ~is_first}


def make_args(module, setting: dict, **flags):
    """`Args` of a new run of a script."""
    size = {"size": setting["size"]} if setting["size"] else {}
    args = module.Args(env_id=setting["env_id"], **size, **flags)
    if hasattr(module, "fill") and module.TASKS:  # a checkout in which fields are None at first
        module.fill(args, module.TASKS["discrete" if setting["discrete"] else "continuous"])
    return args


class Side:
    """Base class. A subclass has `batch`, `parameters` and `agent_step`, which is one update."""

    def __init__(self, setting: dict):
        """`setting`: see `setting` in speed.py."""
        self.setting = setting
        if setting["threads"]:
            torch.set_num_threads(setting["threads"])
        torch.manual_seed(0)
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(setting.get("device", found))

    def update(self) -> dict:
        """Seconds of one update."""
        return {"seconds": self.clock(self.agent_step)}

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
        seconds = min(self.clock(lambda: a @ b) for _ in range(15))
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


class Ours(Side):
    """`Agent.train_step` of the script in the checkout that `setting["root"]` names."""

    def __init__(self, setting: dict):
        super().__init__(setting)
        sys.path[:0] = [setting["root"]]
        self.script = importlib.import_module(setting["script"])
        self.devices = importlib.import_module("common.devices")
        graph = {"cuda_graph": True} if setting["cuda_graph"] else {}
        args = make_args(self.script, setting, **setting["sizes"], **graph,
                         compile=setting["compile"], amp="on" if setting["bf16"] else "off")
        image = None if setting["vector"] else (64, 64, setting["channels"])
        spec = self.script.EnvSpec(image, setting["vector"], setting["actions"],
                                   setting["discrete"])
        self.agent = self.script.Agent(args, spec, self.device)

    def batch(self, length: int, rows: int) -> None:
        """Use a batch of this shape from here on."""
        arrays = synthetic_batch(length, rows, self.setting)
        self.data = self.script.Batch(**{
            name: None if array is None else torch.from_numpy(array).to(self.device)
            for name, array in arrays.items()})
        self.carry = self.agent.zero_state(rows)

    def train(self, batch) -> dict:
        """The metrics of an update. A script that replays its states takes no `carry`."""
        takes = inspect.signature(self.agent.train_step).parameters
        found = self.agent.train_step(*(batch, self.carry)[:len(takes)])
        return found if isinstance(found, dict) else found[0]

    def agent_step(self) -> None:
        """One update."""
        self.train(self.data)
        self.devices.keep_freed_memory()  # as a run does after the first one

    def parameters(self) -> dict:
        """Trained parameters; the slow critic is a copy."""
        return {"parameters": sum(p.numel() for p in self.agent.parameters() if p.requires_grad)}


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


if __name__ == "__main__":
    serve(Ours)
