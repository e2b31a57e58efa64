"""Processors and processes: random numbers, batches for the device, CUDA graphs, several ranks."""

import ctypes
import gc
import inspect
import os
import random
import warnings
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.files import UserError


# ---------------------------------------------------------------- random numbers, memory, bfloat16
def prepare_torch(cuda: bool, threads: int) -> str:
    """Set the number of CPU threads (0: as it is); returns the kind of device to work on."""
    if threads:
        torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", ".*capturable=True")  # the optimisers are, graph or not
    return "cuda" if cuda and torch.cuda.is_available() else "cpu"


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy and torch on all devices; with several ranks give each its own seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # its choice depends on timing


def rng_state(device: torch.device) -> dict:
    """States of the generators of Python, NumPy and torch, as plain data for a checkpoint."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest),
             "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    """Undo `rng_state`; a run that moves to another kind of device starts that generator afresh."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def keep_freed_memory() -> None:
    """Let malloc keep large blocks that torch frees instead of giving them back to the kernel.

    Each update allocates the same tensors again; getting them zeroed from the kernel every time
    cost 23% (tiny networks) and 35% (size S, bfloat16) of an update on a CPU. To be called after
    the first update: what that one leaves for good then lies at the bottom of the heap and does not
    split it. The price is a higher peak of memory (V1: 3.0 GB, 2.4 without this, up to 3.7 if
    called earlier). Linux with glibc only.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: take blocks below 1 GiB from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def use_bf16(amp: str, device: torch.device, wide_enough: bool) -> bool:
    """Whether to multiply in bfloat16; with "auto": where the hardware does it and it pays."""
    if amp != "auto":
        return amp == "on"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else (
        torch.cpu._is_avx512_bf16_supported())
    return native and wide_enough


# ----------------------------------------------------------------------------- several processes
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
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    return rank, world, local


def max_over_ranks(value: int) -> int:
    """The largest `value` of all processes."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(int(value))  # on the CPU: an update may be running on the GPU
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def gather_ranks(x: Tensor) -> Tensor:
    """Concatenate x (n,) of all processes: statistics must be those of the whole batch."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, with the gradient of this one's share of it.

    For what is not linear in the mean, such as a limit that the mean of the whole batch must pass.
    """
    mean = x.mean()
    if not dist.is_initialized():
        return mean
    whole = mean.detach().clone()
    dist.all_reduce(whole)
    return mean + (whole / dist.get_world_size() - mean.detach())


def average_over_ranks(grads: tuple[Tensor, ...]) -> None:
    """Make `grads` those of the whole batch, of which each process has an equal share.

    This is all that training on several GPUs or machines takes: every rank starts from the same
    weights and applies the same gradient, so the weights stay equal.
    """
    if dist.is_initialized():
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([grad.numel() for grad in grads])
        for grad, mean in zip(grads, means):
            grad.copy_(mean.view_as(grad))


# --------------------------------------------------------------------------- feeding the device
def on_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Copy from the CPU, to a GPU through pinned memory: without it the copy would be waited for,
    and so would everything that the GPU was told to do before."""
    if tensor is None or device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Feeder:
    """Batches of a replay, any NamedTuple of tensors and None, on the device.

    On a GPU the next one is sampled, and copied in a stream of its own, while an update runs.
    """

    def __init__(self, replay, device: torch.device, batch_size: int, length: int):
        """`replay` has `rng`, `windows(length)` and `sample(batch_size, length, rng) -> Batch`."""
        self.replay, self.device, self.shape = replay, device, (batch_size, length)
        self.waiting, self.is_ready = None, False
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ready(self) -> bool:
        """Whether a whole window can be sampled on every rank; asks all ranks until it is so."""
        if not self.is_ready:
            self.is_ready = max_over_ranks(not self.replay.windows(self.shape[1])) == 0
        return self.is_ready

    def next(self):
        """The batch that was prepared, or a fresh one."""
        batch, self.waiting = self.waiting or self.draw(), None
        if self.stream:  # the update, and whoever gets this memory after it, come after the copy
            update = torch.cuda.current_stream(self.device)
            update.wait_stream(self.stream)
            for tensor in filter(torch.is_tensor, batch):
                tensor.record_stream(update)
        return batch

    def prepare(self) -> None:
        """Draw the next batch ahead. On a CPU there would be nothing to overlap it with."""
        if self.stream:
            self.waiting = self.draw()

    def draw(self):
        """Sample and copy; on a GPU this returns before the copy is done."""
        return self.to_device(self.replay.sample(*self.shape, self.replay.rng))

    def to_device(self, batch):
        """Copy a batch in this feeder's stream, which on a CPU does nothing."""
        with torch.cuda.stream(self.stream):
            return type(batch)(*(on_device(tensor, self.device) for tensor in batch))

    def state_dict(self) -> dict:
        """The batch that waits, on the CPU: a run that is resumed trains on it first."""
        if self.waiting is None:
            return {"waiting": None}
        if self.stream:
            self.stream.synchronize()
        return {"waiting": [x if x is None else x.cpu() for x in self.waiting]}

    def load_state_dict(self, state: dict) -> None:
        """Undo `state_dict`, also on another kind of device."""
        if state["waiting"] is not None:
            batch_type = inspect.signature(self.replay.sample).return_annotation
            self.waiting = self.to_device(batch_type(*state["waiting"]))


def compile_methods(*methods) -> None:
    """Put a compiled method in the place of each of these bound ones, on its own object.

    Compiled once for every shape that occurs (acting, training, video), not once for all shapes.
    """
    import torch._dynamo
    import torch._functorch.config  # not loaded by torch alone

    torch._functorch.config.donated_buffer = False  # two losses share one backward graph
    torch._dynamo.config.recompile_limit = 64  # every layer is a variant of the same code
    for method in methods:
        setattr(method.__self__, method.__name__, torch.compile(method, dynamic=False))


class CudaGraph:
    """`function(batch, *constants)` as a CUDA graph: one launch in place of thousands.

    It returns a dictionary of tensors, the same ones each time. The first `warmup` calls run as
    usual: networks are compiled, optimisers make their state. The batch of a later call is copied
    to where the graph reads it; the constants must be the same tensors each time.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]], warmup: int = 3):
        self.function, self.warmup = function, warmup
        self.stream = torch.cuda.Stream()
        self.graph = self.inputs = self.outputs = None

    def __call__(self, batch, *constants) -> dict[str, Tensor]:
        if self.warmup:
            self.warmup -= 1
            return self.run_aside(batch, *constants)
        if self.graph is None:
            self.inputs = type(batch)(*(None if x is None else x.clone() for x in batch))
            graph = torch.cuda.CUDAGraph()
            gc.collect()  # what is freed while it records, such as an older graph, would spoil it
            gc.disable()
            try:
                with torch.cuda.graph(graph):  # records, and runs nothing
                    self.outputs = self.function(self.inputs, *constants)
            finally:
                gc.enable()
            self.graph = graph
        for target, source in zip(self.inputs, batch):
            if target is not None:
                target.copy_(source)
        self.graph.replay()
        return self.outputs

    def run_aside(self, batch, *constants) -> dict[str, Tensor]:
        """An ordinary call, on a side stream: PyTorch asks for that before a graph is recorded."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.function(batch, *constants)
        current.wait_stream(self.stream)
        return outputs

    def free(self) -> None:
        """Let the graph go: nccl waits for ever for one that holds its collectives."""
        self.graph = self.inputs = self.outputs = None
