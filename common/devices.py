"""Processors and processes: threads, bfloat16, batches, CUDA graphs, and ranks under torchrun."""

import ctypes
import gc
import os
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor


def prepare_torch(args, seed: int) -> None:
    """Set threads and cuDNN as the flags say, and seed torch."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic  # its choice depends on timing
    warnings.filterwarnings("ignore", ".*capturable=True")  # the optimisers are, graph or not
    torch.manual_seed(seed)


def keep_freed_memory() -> None:
    """Let malloc keep large blocks that torch frees, or an update on a CPU takes a third longer.
    Call it after the first update, so that what that one leaves for good lies at the bottom."""
    with suppress(OSError, AttributeError):  # Linux with glibc alone has it
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


def on_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Copy from the CPU. Without pinned memory the CPU waits for the copy and all earlier work."""
    is_here = tensor is None or device.type == "cpu"
    return tensor if is_here else tensor.pin_memory().to(device, non_blocking=True)


class Feeder:
    """Batches of a replay on the device. On a GPU the CPU draws the next one during an update."""

    def __init__(self, replay, device: torch.device, batch_size: int, length: int):
        """`replay` has `rng`, `windows(length)` and `sample(batch_size, length, rng) -> Batch`."""
        self.replay, self.device, self.shape = replay, device, (batch_size, length)
        self.waiting, self.is_ready = None, False

    def ready(self) -> bool:
        """Whether a whole window can be sampled on every rank; asks all ranks until it is so."""
        self.is_ready = self.is_ready or not max_over_ranks(not self.replay.windows(self.shape[1]))
        return self.is_ready

    def next(self):
        batch = self.waiting or self.replay.sample(*self.shape, self.replay.rng)
        self.waiting = None
        return type(batch)(*(on_device(tensor, self.device) for tensor in batch))

    def prepare(self) -> None:
        if self.device.type == "cuda":
            self.waiting = self.replay.sample(*self.shape, self.replay.rng)


def compile_methods(*methods) -> None:
    """Put a compiled method in the place of each of these bound ones, on its own object."""
    import torch._dynamo
    import torch._functorch.config  # not loaded by torch alone
    torch._functorch.config.donated_buffer = False  # two losses share one backward graph
    torch._dynamo.config.recompile_limit = 64  # every layer is a variant of the same code
    for method in methods:  # for every shape that occurs, not once for all of them
        setattr(method.__self__, method.__name__, torch.compile(method, dynamic=False))


class CudaGraph:
    """`function(batch, *constants)` as a CUDA graph: one launch in place of thousands.

    It returns a dictionary of tensors, the same ones each time. The first `warmup` calls run as
    usual: networks are compiled, optimisers make their state. The constants must be the same
    tensors each time; the batch of a later call is copied to where the graph reads it.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]], warmup: int = 3):
        self.function, self.warmup, self.stream = function, warmup, torch.cuda.Stream()
        self.graph = self.inputs = self.outputs = None

    def __call__(self, batch, *constants) -> dict[str, Tensor]:
        if self.warmup:  # on a side stream: PyTorch asks for that before a graph is recorded
            self.warmup -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(batch, *constants)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.graph is None:
            self.inputs = type(batch)(*(None if x is None else x.clone() for x in batch))
            self.graph = torch.cuda.CUDAGraph()
            gc.collect()  # what is freed while it records, such as an older graph, would spoil it
            with torch.cuda.graph(self.graph):  # records, and runs nothing
                self.outputs = self.function(self.inputs, *constants)
        for target, source in zip(self.inputs, batch):
            if target is not None:
                target.copy_(source)
        self.graph.replay()
        return self.outputs

    def free(self) -> None:
        self.graph = self.inputs = self.outputs = None  # nccl waits for one that holds collectives


# ------------------------------------------- several processes; without torchrun these do nothing
def join(cuda: bool) -> tuple[int, int, torch.device]:
    """Rank, number of processes, and the device of this one; joins the others under torchrun."""
    kind = "cuda" if cuda and torch.cuda.is_available() else "cpu"
    if not {"LOCAL_RANK", "RANK", "WORLD_SIZE"} <= os.environ.keys():
        return 0, 1, torch.device(kind)
    device = torch.device(kind if kind == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}")
    if kind == "cuda":
        torch.cuda.set_device(device)  # nccl deadlocks when two processes share a GPU
    # gloo beside nccl: an agreement of the CPUs must not wait for the GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def gather(value) -> list:
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def max_over_ranks(value: int) -> int:
    shared = torch.tensor(int(value))  # on the CPU: an update may be running on the GPU
    if dist.is_initialized():
        dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def gather_ranks(x: Tensor) -> Tensor:
    """Concatenate x (n,) of all processes: statistics must be those of the whole batch."""
    if not dist.is_initialized():
        return x
    whole = x.new_empty(dist.get_world_size() * len(x))
    dist.all_gather_into_tensor(whole, x)
    return whole


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, with the gradient of this one's share of it."""
    mean = x.mean()
    return mean + (gather_ranks(x.detach().flatten()).mean() - mean.detach())


def average_over_ranks(grads: tuple[Tensor, ...]) -> None:
    """Make `grads` those of the whole batch: each process has an equal share, and equal weights."""
    if dist.is_initialized():
        flat = torch.cat([grad.flatten() for grad in grads])  # one message, not a hundred
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([grad.numel() for grad in grads])
        for grad, mean in zip(grads, means):
            grad.copy_(mean.view_as(grad))
