"""DreamerV3: mastering diverse domains through world models (arXiv 2301.04104v1), in one file.

    python dreamer_v3.py --env-id MsPacmanNoFrameskip-v4      train (Atari-100k setting)
    python dreamer_v3.py --env-id CartPole-v1 --size XXS      any Gymnasium environment
    python dreamer_v3.py --resume RUN_DIR                     go on exactly where a run stopped
    python dreamer_v3.py --evaluate RUN_DIR                   play fresh episodes, print the returns
    python dreamer_v3.py --dream RUN_DIR                      happened | reconstructed | imagined
    torchrun --nproc-per-node 2 dreamer_v3.py --env-id ...    several GPUs

The agent learns a *world model* from replayed sequences: a recurrent state-space model (RSSM) that
compresses observations into discrete codes and predicts the next code, reward and episode end. An
*actor* and a *critic* then learn purely inside that model, from imagined trajectories. One gradient
step of each, in this order, is one *update* (`Agent.train_step`).

What changed since DreamerV2 (each tag stands where the change happens)
    [V3-1]  symlog: vector inputs and targets, rewards and returns are squashed, Eq. 1-2
    [V3-2]  KL split into dynamics (0.5) and representation (0.1) loss, free bits 1 each, Eq. 5
    [V3-3]  1% uniform mixture in every categorical, so that no KL or log-probability explodes
    [V3-4]  reward and critic predict a two-hot distribution over 255 symlog buckets, Eq. 8-10
    [V3-5]  returns divided by an average of their 5-95 percentile range, at least 1, Eq. 11-12
    [V3-6]  targets come from the fast critic; the slow copy only regularises it
    [V3-7]  the continue head predicts whether the episode goes on; gamma is not in its target
    [V3-8]  learned initial state
    [V3-9]  SiLU and LayerNorm everywhere, no bias before a norm; output layers of the reward head
            and of the critic start at zero
    [V3-10] an action is stored with the observation that it was chosen at (V1, V2: that it led to)
    [V3-11] an imagination that starts at a terminal state has weight zero throughout (V2: from its
            second step on)

Symbols (paper -> code)
    x_t  image, vector    h_t  deter    z_t  stoch    s_t  feat = [deter, stoch]
    a_t  action           r_t  reward   c_t  cont     R^lambda_t  ret      v_t  value
    gamma  args.gamma     lambda  args.return_lambda        eta  args.actor_entropy
    sg()  .detach()       Per(R, p)  torch.quantile   q(z|h,x)  post_*     p(z|h)  prior_*

Dimension key (time-major throughout; the trailing shape comments are checked by a test)
    T  replay time   B  batch   H  imagination horizon   H1  H + 1   N = T * B  imagination starts
    A  action   E  embedding   D  deterministic state   S, K  latent groups and classes per group
    Z = S * K   F = D + Z  feature   U  hidden units   V  vector observation   I, I, C  image
    L  buckets of the two-hot distributions   P  environments

Time alignment. A row of the replay buffer holds what is known when the action is chosen:

    time             t=0      t=1      t=2    ...   t=n (last)     | next episode
    observation      x0       x1       x2           xn             | x0'
    reward           0        r1       r2           rn             | 0        received WITH x_t
    is_first         1        0        0            0              | 1
    is_terminal      0        0        0            terminated?    | 0        not at a time limit
    action           a0       a1       a2           zeros          | a0'      chosen AT x_t

    replay      (h,z)_{t-1}, a_{t-1} -> h_t;   h_t -> prior p(z_t|h_t);   h_t, x_t -> posterior
                where is_first: (h,z)_{t-1} := learned initial state, a_{t-1} := 0
                world-model loss: [t=0 ... t=T-1], every replayed step
    imagine     s_0 = a posterior state; a_t ~ actor(s_t); s_{t+1} ~ prior         t = 0 ... H
                rewards   r_1 ... r_H      from the states 1 ... H
                actor     [a_0 ... a_{H-1}]   each judged by R^lambda_t of its own state
                critic    [v_0 ... v_{H-1}]   v_H only bootstraps, a_H is never taken
                weights   w_t = gamma^t c_0 c_1 ... c_t     with c_0 the recorded 1 - is_terminal

Deviation (from the authors' code, danijar/dreamerv3 of June 2023)
    * A time limit is not a terminal, on Atari too: their wrapper treats them alike.
    * The unused prior sample of the replay loop is not drawn.
    * bfloat16 instead of float16 with loss scaling; the state that is carried and acting stay in
      float32.
    * log1p(|x|) for ln(|x| + 1), and torch's variance in place of E[x^2] - E[x]^2: less rounding.
    * The MLPs of vectors follow --size (theirs: --mlp-layers 5 --mlp-units 1024 in every preset).
    * The first update is due at --learning-starts (theirs: once B * T windows can be sampled).
    * Evaluation samples by default as theirs does; --eval-mode takes the most likely action.
"""

# ---------------------------------------------------------------------------------------- 1 imports
import math
import mmap
import shutil
import sys
from collections import deque
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import runs, video
from common.cli import check_numbers, parse
from common.envs import EnvConfig, EnvError, Envs, EnvSpec, EnvStep, default_action_repeat
from common.loop import Progress, any_rank, finite
from common.maths import symexp, symlog

SCRIPT = "dreamer_v3"

# ------------------------------------------------------------------------------------------- 2 Args
SIZES = {  # paper, table B.1; XXS is ours, for laptops and tests
    #           deter hidden units layers depth
    "XXS": dict(deter=128, hidden=128, units=128, layers=1, depth=8),
    "XS": dict(deter=256, hidden=256, units=256, layers=1, depth=24),
    "S": dict(deter=512, hidden=512, units=512, layers=2, depth=32),
    "M": dict(deter=1024, hidden=640, units=640, layers=3, depth=48),
    "L": dict(deter=2048, hidden=768, units=768, layers=4, depth=64),
    "XL": dict(deter=4096, hidden=1024, units=1024, layers=5, depth=96),
}


@dataclass(frozen=True)
class Args:
    """Every setting and its only default. `(paper: x)` is the value of the paper's table."""

    # The run
    exp_name: str = SCRIPT  # Name of this experiment, part of the run directory's name
    seed: int = 1  # Seed of everything random
    torch_deterministic: bool = True  # Ask cuDNN for deterministic kernels
    cuda: bool = True  # Use the GPU if there is one
    threads: int = 0  # CPU threads of torch (0: its own choice); 1 is best for tiny networks
    track: bool = False  # Also log to Weights & Biases
    wandb_project_name: str = "dreamer"  # Project name there
    capture_video: bool = False  # Write episodes of the first environment to RUN_DIR/videos
    runs_dir: str = "runs"  # Where run directories are made
    log_every: int = 250  # Timesteps between two points of the training curves
    video_every: int = 10_000  # Timesteps between two open-loop videos in TensorBoard (0: none)
    checkpoint_every: int = 5_000  # Timesteps between checkpoints; Ctrl-C and TERM write one too
    compile: bool = False  # torch.compile the networks; on a GPU also make updates a CUDA graph
    amp: Literal["auto", "on", "off"] = "auto"  # bfloat16; auto: where native, from 256 units on

    # Instead of a new run
    resume: str = ""  # Run directory to go on with, exactly where it stopped
    evaluate: str = ""  # Run directory whose agent plays fresh episodes; prints every return
    dream: str = ""  # Run directory whose agent's dreams go to RUN_DIR/videos as GIF and PNG
    offline: str = ""  # Run directory whose replay is trained on; no environment step is taken
    eval_episodes: int = 10  # Episodes of --evaluate
    eval_mode: bool = False  # Evaluate and dream with the most likely actions, not sampled ones
    eval_env_seed: int | None = None  # Seed of every episode of --evaluate and --dream (one track)
    dream_context: int = 5  # Frames that the agent sees before it dreams on alone
    dream_horizon: int = 45  # Frames of pure imagination

    # Environment
    env_id: str = "MsPacmanNoFrameskip-v4"  # Any Gymnasium id; `module:Id-v0` imports your own
    env_seed: int | None = None  # Seed of every episode of training (one level, one track)
    total_timesteps: int = 100_000  # Decisions of the agent; frames = timesteps x action repeat
    num_envs: int = 1  # Environments, in processes of their own if several; per torchrun process
    action_repeat: int = 0  # Times that an action is repeated (0: 4 on Atari, else 1)
    max_episode_steps: int = 0  # Time limit, not a terminal, in timesteps (0: environment's own)
    image_size: int = 64  # Images are resized to this height and width: a power of two, at least 8
    grayscale: bool = False  # Images in shades of grey
    clip_rewards: bool = False  # Learn from rewards clipped to [-1, 1]; returns stay as they are
    noop_max: int = 30  # Atari: up to this many no-ops at the start of an episode
    max_env_restarts: int = 10  # Restarts of broken environments before the run gives up
    env_timeout: float = 60.0  # Seconds after which an environment process counts as hung

    # Model size
    size: Literal["XXS", "XS", "S", "M", "L", "XL"] = "S"  # Sets the next five fields
    deter: int | None = None  # GRU recurrent units, size of h_t (paper, S: 512)
    hidden: int | None = None  # Hidden units inside the RSSM (paper, S: 512)
    units: int | None = None  # Dense hidden units of encoder, decoder and heads (paper, S: 512)
    layers: int | None = None  # MLP layers of encoder, decoder and heads (paper, S: 2)
    depth: int | None = None  # CNN multiplier: channels of the first stage (paper, S: 32)
    mlp_units: int | None = None  # Units of vector en- and decoder (None: --units; authors: 1024)
    mlp_layers: int | None = None  # Layers of vector en- and decoder (None: --layers; authors: 5)
    stoch: int = 32  # Number of latents z_t (paper: 32)
    classes: int = 32  # Classes per latent (paper: 32)
    bins: int = 255  # Two-hot buckets, on [-20, 20] in symlog space (paper: 255)

    # Replay
    train_ratio: float = 1024  # Replayed timesteps per collected one (paper, Atari 100k: 1024)
    batch_size: int = 16  # Sequences per batch, B (paper: 16)
    batch_length: int = 64  # Timesteps per sequence, T (paper: 64)
    buffer_size: int = 1_000_000  # Replay capacity in timesteps, first in, first out (paper: 1e6)
    learning_starts: int = 1024  # Timesteps of uniformly random actions before the first update

    # World model
    unimix: float = 0.01  # Share of the uniform distribution in every categorical (paper: 0.01)
    beta_pred: float = 1.0  # beta_pred, scale of image, vector, reward and continue loss (paper: 1)
    beta_dyn: float = 0.5  # beta_dyn, scale of the dynamics loss (paper: 0.5)
    beta_rep: float = 0.1  # beta_rep, scale of the representation loss (paper: 0.1)
    free_bits: float = 1.0  # Nats below which a KL loss is not pushed any further (paper: 1)
    model_lr: float = 1e-4  # Learning rate (paper: 1e-4)
    model_eps: float = 1e-8  # Adam epsilon (paper: 1e-8)
    model_clip: float = 1000.0  # Gradient clipping by global norm (paper: 1000)

    # Actor and critic
    horizon: int = 15  # Imagination horizon, H (paper: 15)
    discount_horizon: float = 333.0  # 1 / (1 - gamma) (paper: 333)
    return_lambda: float = 0.95  # Return lambda (paper: 0.95)
    critic_ema_decay: float = 0.98  # Decay of the slow critic (paper: 0.98)
    critic_ema_regularizer: float = 1.0  # Scale of the loss towards the slow critic (paper: 1)
    return_norm_low: float = 0.05  # Lower end of the return range (paper: 5th percentile)
    return_norm_high: float = 0.95  # Upper end of the return range (paper: 95th percentile)
    return_norm_limit: float = 1.0  # L, smaller return ranges are not scaled up (paper: 1)
    return_norm_decay: float = 0.99  # Decay of the return range (paper: 0.99)
    actor_entropy: float = 3e-4  # eta, scale of the entropy bonus (paper: 3e-4)
    actor_min_std: float = 0.1  # Smallest deviation of a continuous action (authors' code: 0.1)
    actor_max_std: float = 1.0  # Largest deviation of a continuous action (authors' code: 1.0)
    actor_lr: float = 3e-5  # Learning rate of the actor (paper: 3e-5)
    critic_lr: float = 3e-5  # Learning rate of the critic (paper: 3e-5)
    actor_eps: float = 1e-5  # Adam epsilon of the actor (paper: 1e-5)
    critic_eps: float = 1e-5  # Adam epsilon of the critic (paper: 1e-5)
    actor_clip: float = 100.0  # Gradient clipping of the actor (paper: 100)
    critic_clip: float = 100.0  # Gradient clipping of the critic (paper: 100)

    def __post_init__(self) -> None:
        """Fill in what follows from --size and --env-id, then refuse what cannot work."""
        derived = SIZES[self.size] | {"action_repeat": default_action_repeat(self.env_id)}
        derived |= {"mlp_units": self.units or derived["units"],
                    "mlp_layers": self.layers or derived["layers"]}
        for name, value in derived.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raise `runs.UserError`, one line, for a value that cannot work."""
        check_numbers(self, may_be_zero={
            "seed", "env_seed", "eval_env_seed", "threads", "video_every", "max_episode_steps",
            "noop_max", "unimix", "beta_pred", "beta_dyn", "beta_rep", "free_bits", "return_lambda",
            "learning_starts", "max_env_restarts", "critic_ema_decay", "critic_ema_regularizer",
            "actor_entropy", "return_norm_low", "return_norm_decay"})
        if self.discount_horizon <= 1:
            raise runs.UserError(f"--discount-horizon is {self.discount_horizon}; it must be above "
                                 "1 timestep.")
        if self.bins < 2:
            raise runs.UserError("--bins is 1; a number lies between two of them.")
        for name in ("unimix", "return_lambda", "critic_ema_decay", "return_norm_low",
                     "return_norm_high", "return_norm_decay"):
            if getattr(self, name) > 1:
                raise runs.UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it is "
                                     "a share, at most 1.")
        if self.batch_length < 2:
            raise runs.UserError("--batch-length is 1; a sequence has at least 2 timesteps.")
        if self.image_size < 8 or self.image_size & (self.image_size - 1):
            raise runs.UserError(f"--image-size is {self.image_size}; use 8, 16, 32, 64, 128, ...")
        training = not (self.evaluate or self.dream or self.offline)
        if training and self.batch_length > self.capacity:
            limit = "buffer-size" if self.buffer_size < self.total_timesteps else "total-timesteps"
            raise runs.UserError(
                f"--batch-length {self.batch_length} is longer than the replay buffer of one "
                f"environment ({self.capacity} timesteps): lower it, or raise --{limit}.")

    @property
    def gamma(self) -> float:
        """Discount factor, 1 - 1/333 by default."""
        return 1 - 1 / self.discount_horizon

    @property
    def capacity(self) -> int:
        """Rows of the replay ring of one environment; a run never needs more than it collects."""
        return math.ceil(min(self.buffer_size, self.total_timesteps) / self.num_envs)

    @property
    def env_config(self) -> EnvConfig:
        """What it takes to build one environment."""
        return EnvConfig(self.env_id, self.image_size, self.grayscale, self.action_repeat,
                         self.max_episode_steps, self.noop_max, self.clip_rewards,
                         render=self.capture_video)


# ---------------------------------------------------------------------------------- 3 replay buffer
class Batch(NamedTuple):
    """Replayed sequences; see the time alignment above. An absent observation is None."""

    image: Tensor | None  # (T, B, I, I, C) uint8
    vector: Tensor | None  # (T, B, V) float32
    action: Tensor  # (T, B, A) float32, chosen at this observation [V3-10]
    reward: Tensor  # (T, B) float32, received with this observation
    is_first: Tensor  # (T, B) bool
    is_terminal: Tensor  # (T, B) bool


class ReplayBuffer:
    """One ring of rows per environment: memory-mapped `.npy` files that outlive the process.

    Rows are numbered from the start of the run; row i lies in slot i % capacity. All environments
    advance together, so one `count` of complete rows serves all rings. A window of consecutive
    rows may be sampled if all of them lie in [oldest, count): it can cross the end of an episode
    (is_first marks the seam) but never the write position.

    What makes a resume exact: `count` comes from the checkpoint, while the rows that the killed
    process wrote after it have already replaced the oldest ones. `rows.npy` = [begun, complete]
    lies beside the rings; `begun` never goes back, so no row is taken for the one it replaced.
    """

    def __init__(self, folder: Path, spec: EnvSpec, capacity: int, num_envs: int, seed: int,
                 writable: bool = True):
        """Open the rings in `folder`, or make them. Raises `runs.UserError` if the disk is full
        or if the files are those of another environment or of other settings."""
        self.capacity, self.num_envs = capacity, num_envs
        self.rng = np.random.default_rng(seed)
        layout = {"action": (np.float32, (spec.action_dim,)), "reward": (np.float32, ()),
                  "is_first": (np.bool_, ()), "is_terminal": (np.bool_, ())}
        if spec.image_shape:
            layout["image"] = (np.uint8, spec.image_shape)
        if spec.vector_dim:
            layout["vector"] = (np.float32, (spec.vector_dim,))
        self.rings = {
            name: runs.open_array(folder / f"{name}.npy", dtype, (num_envs, capacity, *shape),
                                  writable)
            for name, (dtype, shape) in layout.items()}
        self.rows = runs.open_array(folder / "rows.npy", np.int64, (2,), writable)
        self.count = int(self.rows[1])
        self.gibibytes = sum(ring.nbytes for ring in self.rings.values()) / 2**30

    @property
    def oldest(self) -> int:
        """The oldest row that is still whole."""
        return max(0, int(self.rows[0]) - self.capacity)

    def windows(self, length: int) -> int:
        """Number of valid starts of a window of `length` rows in one ring."""
        return max(0, self.count - self.oldest - length + 1)

    def add(self, step: EnvStep, action: np.ndarray) -> None:
        """Append one row per environment: `step` and the action (P, A) chosen at it."""
        self.rows[0] = max(self.rows[0], self.count + 1)  # before the row is touched
        row = step._asdict() | {"action": action}
        for name, ring in self.rings.items():
            ring[:, self.count % self.capacity] = row[name]
        self.count += 1
        self.rows[1] = self.count

    def sample(self, batch_size: int, length: int, rng: np.random.Generator) -> Batch:
        """Draw windows, uniformly over all valid starts, as a time-major `Batch` on the CPU."""
        env = rng.integers(self.num_envs, size=batch_size)
        start = self.oldest + rng.integers(self.windows(length), size=batch_size)
        slot = (start + np.arange(length)[:, None]) % self.capacity
        arrays = {name: torch.from_numpy(ring[env, slot]) for name, ring in self.rings.items()}
        arrays["is_first"][0] = True  # the state before a window is unknown: start it afresh
        return Batch(arrays.pop("image", None), arrays.pop("vector", None), **arrays)

    def flush(self) -> None:
        """Write to disk and drop the pages from this process, so that its memory stays flat."""
        for array in (*self.rings.values(), self.rows):
            if array.flags.writeable:
                array.flush()
            if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
                array._mmap.madvise(mmap.MADV_DONTNEED)

    def state_dict(self) -> dict:
        """What the checkpoint must hold to make sense of the files."""
        return {"count": self.count, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        """Go back to a checkpoint: later rows are forgotten, and so are those they replaced."""
        if self.rows[0] < state["count"]:
            raise runs.UserError("the replay files are older than the checkpoint; restore both "
                                 "from the same copy of the run directory.")
        self.count, self.rng.bit_generator.state = state["count"], state["rng"]


class Feeder:
    """Batches for the device. On a GPU the next one is sampled, and copied in a stream of its own,
    while an update runs."""

    def __init__(self, replay: ReplayBuffer, device: torch.device, batch_size: int, length: int):
        self.replay, self.device, self.shape = replay, device, (batch_size, length)
        self.waiting = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def next(self) -> Batch:
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

    def draw(self) -> Batch:
        """Sample and copy; on a GPU this returns before the copy is done."""
        batch = self.replay.sample(*self.shape, self.replay.rng)
        with torch.cuda.stream(self.stream):  # on a CPU this does nothing
            return Batch(*(on_device(tensor, self.device) for tensor in batch))


def on_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Copy from the CPU, to a GPU through pinned memory: without it the copy would be waited for,
    and so would everything that the GPU was told to do before."""
    if tensor is None or device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


# ------------------------------------------------------------------------ 4 maths and distributions
def draw_classes(probs: Tensor) -> Tensor:
    """Draw a class index per row of `probs` (..., K) by inverting its cumulative distribution.

    One uniform number per draw; the Gumbel trick would need K of them and a logarithm each.
    """
    cumulative = probs.cumsum(-1)
    uniform = torch.rand_like(cumulative[..., -1:]) * cumulative[..., -1:]
    return (cumulative < uniform).sum(-1)


def draw_noise(mean: Tensor) -> Tensor:
    """Draw standard normal noise of the shape of `mean`."""
    return torch.randn_like(mean)


class OneHot:
    """One-hot categorical over the last dimension, mixed with a uniform distribution.

    p = (1 - unimix) softmax(raw) + unimix / K  [V3-3], paper section "World Model Learning".
    """

    def __init__(self, raw: Tensor, unimix: float):
        """`raw`: unnormalised logits (..., K) of any precision; everything here is in float32."""
        self.raw, self.unimix = raw.float(), unimix
        self.probs = self.raw.softmax(-1) * (1 - unimix) + unimix / raw.shape[-1]

    @cached_property
    def logits(self) -> Tensor:
        """Log-probabilities (..., K), finite: with unimix 0 they are taken before the softmax."""
        return self.probs.log() if self.unimix else self.raw.log_softmax(-1)

    def sample(self) -> Tensor:
        """Straight-through sample (..., K): forward one-hot, backward the gradient of `probs`."""
        index = draw_classes(self.probs.detach())
        onehot = torch.zeros_like(self.probs).scatter_(-1, index[..., None], 1)
        return onehot + (self.probs - self.probs.detach()) if self.probs.requires_grad else onehot

    def mode(self) -> Tensor:
        """The most likely class as one-hot (..., K), without gradient."""
        return F.one_hot(self.probs.argmax(-1), self.probs.shape[-1]).float()

    def log_prob(self, onehot: Tensor) -> Tensor:
        """Log-probability (...) of `onehot` (..., K)."""
        return (onehot * self.logits).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy (...) in nats."""
        return -(self.probs * self.logits).sum(-1)


class Gaussian:
    """Diagonal normal over the last dimension, for continuous actions; neither squashed nor cut."""

    def __init__(self, mean: Tensor, std: Tensor):
        """`mean`, `std`: (..., A)."""
        self.mean, self.std = mean, std

    def sample(self) -> Tensor:
        """Reparameterised sample (..., A)."""
        return self.mean + self.std * draw_noise(self.mean)

    def mode(self) -> Tensor:
        """The mean (..., A)."""
        return self.mean

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (...), summed over A."""
        nats = -0.5 * ((value - self.mean) / self.std).square() - self.std.log()
        return (nats - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy (...) in nats, summed over A."""
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class TwoHot:
    """Distribution of a number over buckets that are evenly spaced in symlog space. [V3-4]"""

    def __init__(self, logits: Tensor, buckets: Tensor):
        """`logits` (..., L); `buckets` (L,), their positions in symlog space."""
        self.logits, self.buckets = logits.float(), buckets

    @cached_property
    def normaliser(self) -> Tensor:
        """ln sum_i exp(logits_i) (...), once for both targets of the critic."""
        return self.logits.logsumexp(-1)

    def mean(self) -> Tensor:
        """symexp(sum_i p_i b_i) (...): the mean is taken in symlog space, then transformed."""
        return symexp(self.logits.softmax(-1) @ self.buckets)

    def log_prob(self, value: Tensor) -> Tensor:
        """sum_i twohot(symlog(value))_i ln p_i (...), Eq. 9-10.

        The weight is split between the two neighbouring buckets, more for the nearer one; a value
        out of range puts all of it on the end bucket.
        """
        last = len(self.buckets) - 1
        target = symlog(value).clamp(self.buckets[0], self.buckets[last])
        above = torch.searchsorted(self.buckets, target, right=True).clamp(max=last)
        below = above - 1
        low, high = self.buckets[below], self.buckets[above]
        share = (target - low) / (high - low)
        pair = self.logits.gather(-1, torch.stack([below, above], -1))
        return pair[..., 0].lerp(pair[..., 1], share) - self.normaliser


# ------------------------------------------------------------------------ 5 encoder, decoder, heads
def init_hidden(weight: Tensor) -> None:
    """Truncated normal whose variance is 1 / average fan (Xavier), cut at two sigma.

    From the authors' code: 0.8796 is the standard deviation that is left after the cut.
    """
    std = math.sqrt(1 / average_fan(weight)) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def init_output(layer: nn.Module, scale: float = 1.0) -> None:
    """Uniform with variance scale / average fan, bias 0; from the authors' code.

    For every layer without a norm: heads (reward and critic with scale 0 [V3-9]), the statistics of
    prior and posterior, and the first and the last layer of the decoder.
    """
    limit = math.sqrt(3 * scale / average_fan(layer.weight))
    nn.init.uniform_(layer.weight, -limit, limit)
    nn.init.zeros_(layer.bias)


def average_fan(weight: Tensor) -> float:
    """(fan in + fan out) / 2 of a weight (out, in, *kernel), the kernel's area included."""
    return (weight.shape[0] + weight.shape[1]) / 2 * weight[0, 0].numel()


class Dense(nn.Module):
    """Linear without bias -> LayerNorm -> SiLU, the hidden layer of every network. [V3-9]"""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.norm = nn.LayerNorm(outputs, eps=1e-3)
        init_hidden(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.activate(F.linear(x, self.weight))

    def activate(self, x: Tensor) -> Tensor:
        """Norm in float32, SiLU in the type of the products (authors' code; S in bf16 -0.17 GB)."""
        return F.silu(self.norm(x).to(x.dtype))


class MLP(nn.Sequential):
    """`layers` dense layers of `units` each."""

    def __init__(self, inputs: int, units: int, layers: int):
        super().__init__(*(Dense(units if i else inputs, units) for i in range(layers)))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of an image batch, at each pixel for itself.

    The images are channels-last in memory, so both permutations are free.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> the same shape and type; the norm itself is in float32."""
        dtype, x = x.dtype, x.permute(0, 2, 3, 1)
        if x.shape[-1] < 8 and not x.is_cuda:  # torch's kernel goes row by row: tiny networks -11%
            x = x.float() - x.float().mean(-1, keepdim=True)
            x = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
            return torch.addcmul(self.bias, x, self.weight).to(dtype).permute(0, 3, 1, 2)
        return super().forward(x).to(dtype).permute(0, 3, 1, 2)


def centre(image: Tensor | None) -> Tensor | None:
    """uint8 pixels -> float32 in [-0.5, 0.5], which the encoder sees and the decoder predicts."""
    return None if image is None else image.float().div_(255).sub_(0.5)


class Encoder(nn.Module):
    """Image and/or vector x_t -> embedding: CNN features, then MLP features."""

    def __init__(self, args: Args, spec: EnvSpec):
        super().__init__()
        self.embed_dim = 0
        if spec.image_shape:
            stages = int(math.log2(args.image_size // 4))  # each halves the image, down to 4 x 4
            widths = [spec.image_shape[-1]] + [args.depth * 2**i for i in range(stages)]
            self.cnn = nn.Sequential()
            for inputs, outputs in zip(widths, widths[1:]):
                conv = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False)
                init_hidden(conv.weight)
                self.cnn.extend([conv, ChannelNorm(outputs, eps=1e-3), nn.SiLU()])
            self.embed_dim += 4 * 4 * widths[-1]
        if spec.vector_dim:
            self.mlp = MLP(spec.vector_dim, args.mlp_units, args.mlp_layers)
            self.embed_dim += args.mlp_units

    def forward(self, image: Tensor | None, vector: Tensor | None) -> Tensor:
        """image (T, B, I, I, C) from `centre`, vector (T, B, V) -> (T, B, E)."""
        parts = []
        if image is not None:
            pixels = image.flatten(0, 1).permute(0, 3, 1, 2)  # channels-last in memory
            features = self.cnn(pixels).permute(0, 2, 3, 1)  # flattened as (h, w, c)
            parts.append(features.reshape(*image.shape[:2], -1))
        if vector is not None:
            parts.append(self.mlp(symlog(vector)))  # [V3-1]
        embed = torch.cat(parts, -1)  # (T, B, E)
        return embed


class Decoder(nn.Module):
    """Feature -> image and/or vector."""

    def __init__(self, args: Args, spec: EnvSpec, feat_dim: int):
        super().__init__()
        if spec.image_shape:
            stages = int(math.log2(args.image_size // 4))
            widths = [args.depth * 2**i for i in reversed(range(stages))] + [spec.image_shape[-1]]
            self.cnn_in = nn.Linear(feat_dim, 4 * 4 * widths[0])
            init_output(self.cnn_in)
            self.cnn = nn.Sequential()
            for inputs, outputs in zip(widths, widths[1:]):
                last = len(self.cnn) == 3 * (stages - 1)
                conv = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=last)
                init_output(conv) if last else init_hidden(conv.weight)
                self.cnn.append(conv)
                if not last:
                    self.cnn.extend([ChannelNorm(outputs, eps=1e-3), nn.SiLU()])
        if spec.vector_dim:
            self.mlp = MLP(feat_dim, args.mlp_units, args.mlp_layers)
            self.vector_out = nn.Linear(args.mlp_units, spec.vector_dim)
            init_output(self.vector_out)

    def image(self, feat: Tensor) -> Tensor:
        """(T, B, F) -> mean image (T, B, I, I, C), in float32, [-0.5, 0.5] where it is right."""
        seed = self.cnn_in(feat).reshape(-1, 4, 4, self.cnn[0].in_channels).permute(0, 3, 1, 2)
        pixels = self.cnn(seed).permute(0, 2, 3, 1)
        return pixels.reshape(*feat.shape[:-1], *pixels.shape[1:]).float()

    def vector(self, feat: Tensor) -> Tensor:
        """(T, B, F) -> vector (T, B, V) in symlog space, in float32. [V3-1]"""
        return self.vector_out(self.mlp(feat)).float()


class ContinueHead(nn.Module):
    """Feature -> logit of "the episode goes on". [V3-7]"""

    def __init__(self, args: Args, feat_dim: int):
        super().__init__()
        self.mlp = MLP(feat_dim, args.units, args.layers)
        self.out = nn.Linear(args.units, 1)
        init_output(self.out)

    def forward(self, feat: Tensor) -> Tensor:
        """(..., F) -> logit (...), in float32."""
        return self.out(self.mlp(feat)).squeeze(-1).float()


class TwoHotHead(nn.Module):
    """Feature -> `TwoHot` distribution of a number: the reward head and the critic. [V3-4]"""

    def __init__(self, args: Args, feat_dim: int):
        super().__init__()
        self.mlp = MLP(feat_dim, args.units, args.layers)
        self.out = nn.Linear(args.units, args.bins)
        init_output(self.out, scale=0.0)  # [V3-9] predicts 0 at first, not a random fortune
        self.register_buffer("buckets", torch.linspace(-20, 20, args.bins), persistent=False)

    def forward(self, feat: Tensor) -> TwoHot:
        """(..., F) -> distribution over (...)."""
        return TwoHot(self.out(self.mlp(feat)), self.buckets)


# ------------------------------------------------------------------------------------------- 6 RSSM
class State(NamedTuple):
    """Recurrent state of the model, and the action chosen there, which leads to the next one."""

    deter: Tensor  # (B, D) h_t
    stoch: Tensor  # (B, Z) z_t, the S one-hot groups side by side
    action: Tensor  # (B, A)


class RSSM(nn.Module):
    """Recurrent state-space model, Eq. 3: sequence model, representation and dynamics predictor."""

    def __init__(self, args: Args, action_dim: int, embed_dim: int):
        super().__init__()
        self.groups, self.classes, self.unimix = args.stoch, args.classes, args.unimix
        self.deter_dim, self.stoch_dim = args.deter, args.stoch * args.classes
        self.initial = nn.Parameter(torch.zeros(args.deter))  # [V3-8]
        self.img_in = Dense(self.stoch_dim + action_dim, args.hidden)
        self.gru = nn.Linear(args.deter + args.hidden, 3 * args.deter, bias=False)
        self.gru_norm = nn.LayerNorm(3 * args.deter, eps=1e-3)
        self.img_out = Dense(args.deter, args.hidden)
        self.img_stats = nn.Linear(args.hidden, self.stoch_dim)
        self.obs_out = Dense(args.deter + embed_dim, args.hidden)
        self.obs_stats = nn.Linear(args.hidden, self.stoch_dim)
        init_hidden(self.gru.weight)
        init_output(self.img_stats)
        init_output(self.obs_stats)

    def initial_state(self) -> tuple[Tensor, Tensor]:
        """deter (D,) = tanh(learned vector) and stoch (Z,) = mode of the prior there. [V3-8]"""
        deter = self.initial.tanh()
        return deter, self.prior(deter).mode().flatten(-2)

    def prior(self, deter: Tensor) -> OneHot:
        """Dynamics predictor p(z_t | h_t): (..., D) -> (..., S, K)."""
        return self.groups_of(self.img_stats(self.img_out(deter)))

    def groups_of(self, raw: Tensor) -> OneHot:
        """Raw logits (..., Z) -> S categoricals of K classes."""
        return OneHot(raw.unflatten(-1, (self.groups, self.classes)), self.unimix)

    def gate(self, deter: Tensor, parts: Tensor) -> Tensor:
        """Layer-normalised GRU cell, from the authors' code.

        c = tanh(sigmoid(reset) * cand);  u = sigmoid(update - 1);  h' = u c + (1 - u) h
        The -1 makes the state slow to change at first. `parts` (..., 3D) -> deter (..., D).
        """
        reset, cand, update = self.gru_norm(parts).float().chunk(3, -1)
        return deter.lerp(torch.tanh(reset.sigmoid() * cand), (update - 1).sigmoid())

    def imagine_step(self, deter: Tensor, stoch: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """One step without observation: (N, D), (N, Z), (N, A) -> next deter and prior stoch."""
        x = self.img_in(torch.cat([stoch, within_unit(action)], -1))
        next_deter = self.gate(deter, self.gru(torch.cat([deter, x.float()], -1)))
        return next_deter, self.prior(next_deter).sample().flatten(-2)

    def observe(self, embed: Tensor, prev_action: Tensor, is_first: Tensor, carry: State,
                any_first: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior states of a replayed sequence.

        Args:
            embed: (T, B, E).
            prev_action: (T, B, A), the action that led to each observation.
            is_first: (T, B); there the state starts from `initial_state` and the action is zero.
            carry: deter and stoch before the first observation.
            any_first: False spares the initial state where it is not needed (acting, size S: -10%).

        Returns:
            deter (T, B, D), stoch (T, B, Z), raw posterior logits (T, B, Z).

        Deviation: the authors' loop also draws from the prior here, for nothing.

        What does not depend on the previous state is computed for all T at once, the observation's
        and the action's share of two matrix products included: the loop is the recurrence alone.
        """
        keep = ~is_first[..., None]
        stoch_w, action_w = self.img_in.weight.split([self.stoch_dim, prev_action.shape[-1]], 1)
        deter_w, embed_w = self.obs_out.weight.split([self.deter_dim, embed.shape[-1]], 1)
        action_share = F.linear(within_unit(prev_action * keep), action_w)  # (T, B, U)
        embed_share = F.linear(embed, embed_w)  # (T, B, U)
        deter, stoch = carry.deter, carry.stoch
        initial = self.initial_state() if any_first else (deter, stoch)
        weights = stoch_w, deter_w
        deters, stochs, raws = [], [], []
        for keep_t, action_t, embed_t in zip(keep, action_share.unbind(), embed_share.unbind()):
            deter, stoch, raw = self.observe_step(deter, stoch, keep_t, action_t, embed_t, initial,
                                                  weights)
            deters.append(deter), stochs.append(stoch), raws.append(raw)
        return torch.stack(deters), torch.stack(stochs), torch.stack(raws)

    def observe_step(self, deter: Tensor, stoch: Tensor, keep: Tensor, action_share: Tensor,
                     embed_share: Tensor, initial: tuple[Tensor, Tensor],
                     weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One turn of the loop: (B, D), (B, Z) -> next deter, posterior stoch and raw logits."""
        kept_deter = torch.where(keep, deter, initial[0])  # (B, D)
        kept_stoch = torch.where(keep, stoch, initial[1])  # (B, Z)
        x = self.img_in.activate(F.linear(kept_stoch, weights[0]) + action_share)  # (B, U)
        next_deter = self.gate(kept_deter, self.gru(torch.cat([kept_deter, x.float()], -1)))
        y = self.obs_out.activate(F.linear(next_deter, weights[1]) + embed_share)  # (B, U)
        raw = self.obs_stats(y)  # (B, Z)
        return next_deter, self.groups_of(raw).sample().flatten(-2), raw


def within_unit(action: Tensor) -> Tensor:
    """a / max(1, |a|): the value of clipping to [-1, 1], with gradient 1 / max(1, |a|), not 0.

    From the authors' code: the actor's normal has no bounds, but the model must see actions as the
    environment does, and an actor outside of the bounds must still be pulled back.
    """
    return action / action.detach().abs().clamp(min=1)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continue head: what the world-model loss trains."""

    def __init__(self, args: Args, spec: EnvSpec):
        super().__init__()
        self.feat_dim = args.deter + args.stoch * args.classes
        self.encoder = Encoder(args, spec)
        self.rssm = RSSM(args, spec.action_dim, self.encoder.embed_dim)
        self.decoder = Decoder(args, spec, self.feat_dim)
        self.reward_head = TwoHotHead(args, self.feat_dim)
        self.continue_head = ContinueHead(args, self.feat_dim)


# ------------------------------------------------------------------------------- 7 actor and critic
class Actor(nn.Module):
    """Feature -> policy pi(a_t | s_t), Eq. 6."""

    def __init__(self, args: Args, spec: EnvSpec, feat_dim: int):
        super().__init__()
        self.discrete, self.unimix = spec.discrete, args.unimix
        self.min_std, self.max_std = args.actor_min_std, args.actor_max_std
        self.mlp = MLP(feat_dim, args.units, args.layers)
        self.out = nn.Linear(args.units, spec.action_dim)
        init_output(self.out)
        if not spec.discrete:
            self.std = nn.Linear(args.units, spec.action_dim)
            init_output(self.std)

    def forward(self, feat: Tensor) -> Tensor:
        """(..., F) -> parameters of the policy (..., A), or (..., 2A) for continuous actions."""
        x = self.mlp(feat)
        output = self.out(x) if self.discrete else torch.cat([self.out(x), self.std(x)], -1)
        return output.float()

    def policy(self, output: Tensor) -> OneHot | Gaussian:
        """Distribution of actions from `forward`'s output.

        Discrete: one-hot with the uniform mixture [V3-3]. Continuous: mean tanh(m), standard
        deviation between 0.1 and 1, 0.89 at first (authors' code).
        """
        if self.discrete:
            return OneHot(output, self.unimix)
        mean, raw_std = output.chunk(2, -1)
        std = (self.max_std - self.min_std) * (raw_std + 2).sigmoid() + self.min_std
        return Gaussian(mean.tanh(), std)


class ReturnScale(nn.Module):
    """S, a moving average of the range of returns between two percentiles, Eq. 12. [V3-5]"""

    def __init__(self, args: Args):
        super().__init__()
        self.decay, self.limit = args.return_norm_decay, args.return_norm_limit
        percentiles = torch.tensor([args.return_norm_low, args.return_norm_high])
        self.register_buffer("percentiles", percentiles, persistent=False)
        self.register_buffer("range", torch.zeros(2))  # starts at 0, no bias correction

    @torch.no_grad()
    def update(self, ret: Tensor) -> Tensor:
        """Take in returns (H, N) of any scale; give the divisor max(1, S) as a scalar."""
        now = torch.quantile(gather_ranks(ret.flatten()), self.percentiles)
        self.range.lerp_(now, 1 - self.decay)
        return (self.range[1] - self.range[0]).clamp(min=self.limit)


# ----------------------------------------------------------------------------------------- 8 losses
def world_model_loss(model: WorldModel, batch: Batch, carry: State,
                     args: Args) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """Scaled loss terms of the world model, each (T, B), over every replayed step. Eq. 4-5.

        L_pred = -ln p(x_t|s_t) - ln p(r_t|s_t) - ln p(c_t|s_t)
        L_dyn  = max(1, KL[ sg(q(z_t|h_t,x_t)) || p(z_t|h_t) ])     trains the prior
        L_rep  = max(1, KL[ q(z_t|h_t,x_t) || sg(p(z_t|h_t)) ])     trains the posterior
        L      = beta_pred L_pred + beta_dyn L_dyn + beta_rep L_rep

    Returns the terms, the posterior states deter (T, B, D) and stoch (T, B, Z), and statistics.
    """
    image = centre(batch.image)
    embed = model.encoder(image, batch.vector)  # (T, B, E)
    prev_action = torch.cat([carry.action[None], batch.action[:-1]])  # (T, B, A)
    deter, stoch, raw = model.rssm.observe(embed, prev_action, batch.is_first, carry)
    post, prior = model.rssm.groups_of(raw), model.rssm.prior(deter)
    feat = torch.cat([deter, stoch], -1)  # (T, B, F)

    losses = {}
    if image is not None:  # summed over pixels, no factor 1/2 (authors' code)
        squares = F.mse_loss(model.decoder.image(feat), image, reduction="none")  # (T, B, I, I, C)
        losses["image"] = args.beta_pred * squares.sum((-3, -2, -1))
    if batch.vector is not None:  # [V3-1] Eq. 1, but no factor 1/2 (authors' code)
        squared = (model.decoder.vector(feat) - symlog(batch.vector)).square()  # (T, B, V)
        close = squared < 1e-8  # from the authors' code: near enough is right
        losses["vector"] = args.beta_pred * squared.masked_fill(close, 0).sum(-1)
    losses["reward"] = -args.beta_pred * model.reward_head(feat).log_prob(batch.reward)
    losses["continue"] = args.beta_pred * F.binary_cross_entropy_with_logits(  # [V3-7]
        model.continue_head(feat), (~batch.is_terminal).float(), reduction="none")
    # [V3-2] Both have the same value; they differ in which side learns.
    dyn = (post.probs.detach() * (post.logits.detach() - prior.logits)).sum((-2, -1))  # (T, B)
    rep = (post.probs * (post.logits - prior.logits.detach())).sum((-2, -1))  # (T, B)
    losses["dyn"] = args.beta_dyn * dyn.clamp(min=args.free_bits)
    losses["rep"] = args.beta_rep * rep.clamp(min=args.free_bits)

    stats = {"latent/kl": dyn.detach().mean(),
             "latent/post_entropy": post.entropy().detach().sum(-1).mean(),
             "latent/prior_entropy": prior.entropy().detach().sum(-1).mean()}
    return losses, deter.detach(), stoch.detach(), stats


def imagine(model: WorldModel, actor: Actor, deter: Tensor, stoch: Tensor,
            horizon: int) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the actor through the prior for `horizon` steps from deter (N, D) and stoch (N, Z).

    Returns features (H1, N, F), the starts included, actions (H, N, A) and the actor's outputs
    (H, N, A or 2A), from which the losses rebuild the policy without running the actor again.

    Discrete actions learn by REINFORCE, so the dynamics need no gradient at all. The actor always
    sees detached features: it learns from what its actions lead to, not by bending the state.
    """
    feats, actions, outputs = [torch.cat([deter, stoch], -1)], [], []
    for _ in range(horizon):
        outputs.append(actor(feats[-1].detach()))
        with torch.set_grad_enabled(not actor.discrete):
            actions.append(actor.policy(outputs[-1]).sample())
            deter, stoch = model.rssm.imagine_step(deter, stoch, actions[-1])
            feats.append(torch.cat([deter, stoch], -1))
    return torch.stack(feats), torch.stack(actions), torch.stack(outputs)


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, lambda_: float) -> Tensor:
    """Returns (H, N) of imagined trajectories, Eq. 7.

        R_t = r_{t+1} + gamma c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}),    R_H = v_H

    Args:
        reward: (H, N), reward[t] is the one of state t + 1.
        value: (H1, N), critic at every state.
        discount: (H1, N), gamma times the continue flag of every state.
    """
    target = reward + discount[1:] * (1 - lambda_) * value[1:]  # (H, N)
    returns, last = [], value[-1]
    for t in reversed(range(len(reward))):
        last = target[t] + discount[t + 1] * lambda_ * last
        returns.append(last)
    return torch.stack(returns[::-1])


def actor_loss(policy: OneHot | Gaussian, action: Tensor, ret: Tensor, value: Tensor,
               weight: Tensor, scale: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Loss of the actor as a scalar, and the policy's entropy (H, N). Eq. 11. [V3-5]

        discrete      L = -sum_t w_t ( ln pi(a_t|s_t) sg((R_t - v_t) / max(1, S)) + eta H[pi] )
        continuous    L = -sum_t w_t (                   (R_t - v_t) / max(1, S)  + eta H[pi] )

    For continuous actions the gradient flows back through reward, value and dynamics, the
    baseline v_t included (authors' code). `ret`, `value` and `weight` are (H, N).
    """
    advantage = (ret - value) / scale  # (H, N)
    if isinstance(policy, OneHot):
        advantage = policy.log_prob(action.detach()) * advantage.detach()
    entropy = policy.entropy().reshape(advantage.shape)  # (H, N)
    return -(weight * (advantage + args.actor_entropy * entropy)).mean(), entropy


def critic_loss(value_dist: TwoHot, slow_value: Tensor, ret: Tensor, weight: Tensor,
                args: Args) -> Tensor:
    """Loss of the critic as a scalar, Eq. 10, plus the pull towards its slow copy. [V3-6]

        L = -sum_t w_t ( ln p(R_t|s_t) + rho ln p(v'_t|s_t) )    v' the mean of the slow critic,
                                                                 rho = args.critic_ema_regularizer
    """
    log_prob = value_dist.log_prob(ret.detach())  # (H, N)
    towards_slow = value_dist.log_prob(slow_value)  # (H, N)
    return -(weight * (log_prob + args.critic_ema_regularizer * towards_slow)).mean()


# ------------------------------------------------------------------------------------------ 9 agent
def gather_ranks(x: Tensor) -> Tensor:
    """Concatenate x (n,) of all processes: statistics must be those of the whole batch."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class Optimizer:
    """Adam on gradients clipped by their global norm."""

    def __init__(self, params, lr: float, eps: float, clip: float, graphed: bool = False):
        """`graphed`: a CUDA graph will hold the step."""
        self.params, self.clip = list(params), clip
        self.adam = torch.optim.Adam(self.params, lr, eps=eps, fused=True, capturable=graphed)

    def step(self, loss: Tensor, retain_graph: bool = False) -> Tensor:
        """Minimise a scalar loss by one step; returns the gradient norm before clipping.

        Only this optimiser's parameters get gradients, though the actor's loss passes through the
        world model and the critic. A norm that is not finite (a NaN loss makes it so, on every
        rank) skips the step on the device, without waiting. `finite` stops the run: on a CPU at
        once, on a GPU when it next looks, at a log or a save.
        """
        grads = torch.autograd.grad(loss, self.params, retain_graph=retain_graph)
        average_over_ranks(grads)
        norm = nn.utils.get_total_norm(grads)
        clipped = torch._foreach_mul(grads, self.clip / norm.clamp(min=self.clip))
        for param, grad in zip(self.params, clipped):
            param.grad = grad
        self.adam.found_inf = (~norm.isfinite()).float()
        self.adam.step()
        self.adam.zero_grad()  # frees them: size S 0.1 GB
        return norm


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


class GraphedUpdate:
    """`Agent.train_step` as a CUDA graph: one launch in place of ten thousand."""

    def __init__(self, agent: "Agent"):
        self.agent, self.graph, self.inputs, self.eager = agent, None, None, 3

    def __call__(self, batch: Batch, carry: State) -> None:
        """As `Agent.train_step`; the batch is copied to where the graph reads it."""
        agent = self.agent
        if self.eager:  # networks are compiled, Adam makes its moments, the slow critic is copied
            self.eager -= 1
            agent.train_step(batch, carry)
            return
        if self.graph is None:
            self.inputs = Batch(*(None if x is None else x.clone() for x in batch))
            self.graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                agent.train_step(self.inputs, carry)  # its metrics are where each replay writes
            agent.updates -= 1  # recording is not running
        for target, source in zip(self.inputs, batch):
            if target is not None:
                target.copy_(source)
        self.graph.replay()
        agent.updates += 1


class Agent(nn.Module):
    """World model, actor, critic and how they learn."""

    def __init__(self, args: Args, spec: EnvSpec, device: torch.device):
        super().__init__()
        self.args, self.spec, self.device = args, spec, device
        self.world_model = WorldModel(args, spec)
        feat_dim = self.world_model.feat_dim
        self.actor = Actor(args, spec, feat_dim)
        self.critic = TwoHotHead(args, feat_dim)
        self.slow_critic = TwoHotHead(args, feat_dim).requires_grad_(False)
        self.return_scale = ReturnScale(args)
        self.to(device, memory_format=torch.channels_last)
        self.graphed = args.compile and device.type == "cuda"
        self.model_opt = Optimizer(self.world_model.parameters(), args.model_lr, args.model_eps,
                                   args.model_clip, self.graphed)
        self.actor_opt = Optimizer(self.actor.parameters(), args.actor_lr, args.actor_eps,
                                   args.actor_clip, self.graphed)
        self.critic_opt = Optimizer(self.critic.parameters(), args.critic_lr, args.critic_eps,
                                    args.critic_clip, self.graphed)
        if args.compile:
            self.compile_networks()
        self.updates, self.metrics = 0, {}
        self.bf16 = use_bf16(args, device)

    def train_step(self, batch: Batch, carry: State) -> dict[str, Tensor]:
        """One update of world model, actor and critic; returns scalar metrics, still on the device.

        The order is the authors': the world model first, then imagination inside the *new* model,
        from the posterior states that the *old* one inferred.
        """
        with self.autocast():
            losses, deter, stoch, stats = world_model_loss(self.world_model, batch, carry,
                                                           self.args)
        model_loss = sum(losses.values()).mean()
        model_norm = self.model_opt.step(model_loss)
        metrics = {f"loss/{name}": loss.detach().mean() for name, loss in losses.items()}
        metrics |= stats | {"loss/model": model_loss.detach(), "grad_norm/model": model_norm}
        alive = (~batch.is_terminal).float()  # (T, B) [V3-11] a terminal start gets weight zero
        self.metrics = metrics | self.train_actor_critic(deter.flatten(0, 1), stoch.flatten(0, 1),
                                                         alive.flatten())
        return self.metrics

    def train_actor_critic(self, deter: Tensor, stoch: Tensor, alive: Tensor) -> dict[str, Tensor]:
        """Imagine from deter (N, D) and stoch (N, Z); alive (N,) is 1 - is_terminal there."""
        args, model = self.args, self.world_model
        with self.autocast():
            feat, action, output = imagine(model, self.actor, deter, stoch, args.horizon)
            value_dist = self.critic(feat)
            with torch.set_grad_enabled(not self.actor.discrete):
                reward_dist = model.reward_head(feat[1:])
            with torch.no_grad():
                slow_dist = self.slow_critic(feat[:-1])
                cont = (model.continue_head(feat) > 0).float()  # (H1, N) its mode
        value = value_dist.mean()  # (H1, N)
        reward = reward_dist.mean()  # (H, N)
        slow_value = slow_dist.mean()  # (H, N)
        discount = args.gamma * torch.cat([alive[None], cont[1:]])  # (H1, N)
        weight = (discount.cumprod(0) / args.gamma)[:-1]  # (H, N)
        # [V3-6] The targets come from the fast critic.
        ret = lambda_return(reward, value, discount, args.return_lambda)  # (H, N)
        scale = self.return_scale.update(ret)

        policy = self.actor.policy(output)
        loss_actor, entropy = actor_loss(policy, action, ret, value[:-1], weight, scale, args)
        starts = TwoHot(value_dist.logits[:-1], value_dist.buckets)
        loss_critic = critic_loss(starts, slow_value, ret, weight, args)
        # Continuous actions: both losses go back through the critic's pass over `feat`.
        actor_norm = self.actor_opt.step(loss_actor, retain_graph=not self.actor.discrete)
        critic_norm = self.critic_opt.step(loss_critic)
        self.update_slow_critic()
        return {"loss/actor": loss_actor.detach(), "loss/critic": loss_critic.detach(),
                "grad_norm/actor": actor_norm, "grad_norm/critic": critic_norm,
                "actor/entropy": entropy.detach().mean(), "imagined/return_scale": scale,
                "imagined/return": ret.detach().mean(), "imagined/value": value.detach().mean(),
                "imagined/reward": reward.detach().mean()}

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """Move the slow critic towards the critic; the first time, all the way (authors' code)."""
        share = 1.0 if self.updates == 0 else 1 - self.args.critic_ema_decay
        slow, fast = list(self.slow_critic.parameters()), list(self.critic.parameters())
        torch._foreach_lerp_(slow, fast, share)
        self.updates += 1

    @torch.no_grad()
    def act(self, step: EnvStep, carry: State, sample: bool = True) -> State:
        """Take in one observation per environment and choose actions: the next carry.

        `carry` is the state before, `carry.action` (P, A) the action that led to this observation.
        """
        image, vector, is_first = (
            None if array is None else on_device(torch.from_numpy(array)[None], self.device)
            for array in (step.image, step.vector, step.is_first))
        embed = self.world_model.encoder(centre(image), vector)
        deter, stoch, _ = self.world_model.rssm.observe(embed, carry.action[None], is_first, carry,
                                                        any_first=bool(step.is_first.any()))
        policy = self.actor.policy(self.actor(torch.cat([deter[0], stoch[0]], -1)))
        return State(deter[0], stoch[0], policy.sample() if sample else policy.mode())

    def blank_state(self, rows: int) -> State:
        """Zeros; a sequence begins with is_first, which puts the learned state in their place."""
        return State(*(torch.zeros(rows, width, device=self.device) for width in (
            self.args.deter, self.args.stoch * self.args.classes, self.spec.action_dim)))

    def compile_networks(self) -> None:
        """Compile the steps of the two loops and the networks that are called for all time.

        Once for every shape that occurs (acting, training, video), not once for all shapes.
        """
        torch._functorch.config.donated_buffer = False  # two losses share one backward graph
        torch._dynamo.config.recompile_limit = 64  # every Dense is a variant of the same code
        model = self.world_model
        for network in (model.encoder, model.reward_head.mlp, model.continue_head, self.actor,
                        self.critic.mlp, self.slow_critic.mlp):
            network.compile(dynamic=False)
        model.decoder.image = torch.compile(model.decoder.image, dynamic=False)
        model.rssm.observe_step = torch.compile(model.rssm.observe_step, dynamic=False)
        model.rssm.imagine_step = torch.compile(model.rssm.imagine_step, dynamic=False)

    def autocast(self) -> torch.autocast:
        """bfloat16 for matrix products and convolutions; parameters and losses stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def optimizers(self) -> dict[str, torch.optim.Adam]:
        """By name, for the checkpoint."""
        return {"model": self.model_opt.adam, "actor": self.actor_opt.adam,
                "critic": self.critic_opt.adam}


# ----------------------------------------------------------------------- 10 evaluation and dreaming
@torch.no_grad()
def open_loop(agent: Agent, batch: Batch, context: int) -> dict[str, np.ndarray]:
    """What happened, what the model reconstructs, and what it imagines, for the first sequence.

    The model infers its state from the first `context` observations of `batch` (T, B, ...); from
    there on it is given the recorded actions and nothing else. Videos of shape (T, I, I, C) uint8,
    or curves drawn as such for environments without images.
    """
    batch = Batch(*(on_device(tensor, agent.device) for tensor in batch))
    model, prev_action = agent.world_model, F.pad(batch.action[:-1], (0, 0, 0, 0, 1, 0))
    embed = model.encoder(centre(batch.image), batch.vector)
    replay_deter, replay_stoch, _ = model.rssm.observe(
        embed, prev_action, batch.is_first, agent.blank_state(batch.reward.shape[1]))
    feat = torch.cat([replay_deter, replay_stoch], -1)  # (T, B, F)

    imag_deter, imag_stoch = replay_deter[context - 1], replay_stoch[context - 1]
    imag_feat = [*feat[:context]]
    for action in batch.action[context - 1:-1]:
        imag_deter, imag_stoch = model.rssm.imagine_step(imag_deter, imag_stoch, action)
        imag_feat.append(torch.cat([imag_deter, imag_stoch], -1))

    feats = torch.stack([feat[:, :1], torch.stack(imag_feat)[:, :1]])
    names = ["what happened", "reconstruction", "imagination"]
    if batch.image is None:
        vectors = symexp(model.decoder.vector(feats))[:, :, 0]
        vectors = torch.stack([batch.vector[:, 0], *vectors])
        return dict(zip(names, video.curves(vectors.cpu().numpy())))
    images = model.decoder.image(feats.flatten(0, 1)).unflatten(0, (2, -1))[:, :, 0]
    images = torch.stack([batch.image[:, 0], *((images + 0.5).clamp(0, 1) * 255).round().byte()])
    return dict(zip(names, images.cpu().numpy()))


def load_agent(args: Args, run_dir: Path, spec: EnvSpec) -> Agent:
    """The agent of a run directory's checkpoint; on the CPU if it was trained on a GPU we lack."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    agent = Agent(args, spec, device)
    state = runs.load_checkpoint(run_dir / "checkpoint.pt", SCRIPT, device)
    agent.load_state_dict(state["agent"])
    return agent


def play(args: Args, agent: Agent, envs: Envs):
    """Endlessly yield each `EnvStep` and the action (P, A) that the agent takes there."""
    obs, carry = envs.reset(), agent.blank_state(envs.num_envs)
    while True:
        carry = agent.act(obs, carry, sample=not args.eval_mode)
        action = carry.action.cpu().numpy()
        yield obs, action
        obs = envs.step(action)


def evaluation_envs(args: Args, num_envs: int) -> Envs:
    """Environments whose seeds no training run has used."""
    return Envs(args.env_config, num_envs, args.seed + 10**6, args.max_env_restarts,
                args.env_timeout, args.eval_env_seed)


def evaluate(args: Args, run_dir: Path) -> list[float]:
    """Play fresh episodes with a trained agent; print every return, then mean and spread."""
    runs.seed_everything(args.seed + 10**6, args.torch_deterministic)
    num_envs = min(args.num_envs, args.eval_episodes)
    envs, returns = evaluation_envs(args, num_envs), []
    agent = load_agent(args, run_dir, envs.spec)
    # Every environment plays its share: to count who finishes first would favour short episodes.
    left = np.array([len(part) for part in np.array_split(range(args.eval_episodes), num_envs)])
    restarts = envs.restarts
    for obs, _ in play(args, agent, envs):
        broken, restarts = envs.restarts != restarts, envs.restarts  # their episodes do not count
        for env in np.flatnonzero(obs.is_last & (left > 0) & ~broken):
            left[env] -= 1
            returns.append(float(obs.episode_return[env]))
            print(f"episode {len(returns)}: return {returns[-1]:g}, "
                  f"length {obs.episode_length[env]}")
        if not left.any():
            break
    envs.close()
    print(f"mean {np.mean(returns):g}, standard deviation {np.std(returns):g}, "
          f"minimum {min(returns):g}, maximum {max(returns):g} over {len(returns)} episodes")
    return returns


def dream(args: Args, run_dir: Path) -> list[Path]:
    """Write what the agent imagines as RUN_DIR/videos/dream.gif and dream.png."""
    runs.seed_everything(args.seed + 10**6, args.torch_deterministic)
    envs = evaluation_envs(args, 1)
    agent = load_agent(args, run_dir, envs.spec)
    length, recorded = args.dream_context + args.dream_horizon, deque(maxlen=1000)
    for obs, action in play(args, agent, envs):
        recorded.append((obs, action))
        if obs.is_last.any() or len(recorded) == recorded.maxlen:
            break
    envs.close()
    middle = max(0, (len(recorded) - length) // 2)  # the first frames are often a still picture
    steps, actions = zip(*list(recorded)[middle:middle + length])
    if len(steps) <= args.dream_context:
        raise runs.UserError(f"the episode ended after {len(steps)} timesteps; "
                             "lower --dream-context.")
    arrays = {name: np.stack([getattr(step, name) for step in steps]) for name in Batch._fields
              if name != "action" and getattr(steps[0], name) is not None}
    arrays["is_first"][0] = True
    batch = Batch(**{"image": None, "vector": None, "action": torch.from_numpy(np.stack(actions))}
                  | {name: torch.from_numpy(array) for name, array in arrays.items()})
    videos = open_loop(agent, batch, args.dream_context)
    paths = [run_dir / "videos" / "dream.gif", run_dir / "videos" / "dream.png"]
    paths[0].parent.mkdir(exist_ok=True)
    video.save_gif(paths[0], video.side_by_side(videos, args.dream_context))
    video.save_strip(paths[1], np.stack(list(videos.values())), every=max(1, length // 10))
    print("what happened | reconstruction | imagination:", *paths)
    return paths


# ------------------------------------------------------------------------------------- 11 main loop
def use_bf16(args: Args, device: torch.device) -> bool:
    """Whether to multiply in bfloat16: where the hardware does it natively and it pays."""
    if args.amp != "auto":
        return args.amp == "on"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else (
        torch.cpu._is_avx512_bf16_supported())
    return native and args.units >= 256


def first_update(args: Args, world: int) -> int:
    """Timestep of the first update: --learning-starts, but each ring must hold a whole window."""
    whole_windows = args.num_envs * world * args.batch_length
    return 1 if args.offline else max(args.learning_starts, whole_windows)


def updates_due(args: Args, step: int, done: int, world: int = 1) -> int:
    """Updates to make now, so that every timestep is replayed `train_ratio` times on average."""
    steps, replayed = step - first_update(args, world), args.batch_size * args.batch_length
    return 1 + int(steps * args.train_ratio / replayed) - done if steps >= 0 else 0


def random_action(spec: EnvSpec, num_envs: int) -> np.ndarray:
    """Uniformly random actions (P, A): one-hot, or within [-1, 1]."""
    if spec.discrete:
        chosen = np.random.randint(spec.action_dim, size=num_envs)
        return np.eye(spec.action_dim, dtype=np.float32)[chosen]
    return np.random.uniform(-1, 1, (num_envs, spec.action_dim)).astype(np.float32)


def collect(agent: Agent, envs: Envs, replay: ReplayBuffer, carry: State | None,
            action: np.ndarray | None, explore: bool) -> tuple[EnvStep, State, np.ndarray]:
    """Step the environments with the last action, choose the next one, store the row.

    `carry` and `action` are None at first; with `explore` the action is random, but the state is
    kept up to date. The action comes back in numpy as well: to fetch it from a GPU in the next turn
    would be to wait for the update that was queued behind it.
    """
    obs = envs.reset() if action is None else envs.step(action)
    carry = carry or agent.blank_state(envs.num_envs)
    carry = agent.act(obs, carry)
    action = random_action(agent.spec, envs.num_envs) if explore else carry.action.cpu().numpy()
    action[obs.is_last] = 0  # at the end of an episode nothing is chosen
    replay.add(obs, action)
    return obs, carry._replace(action=on_device(torch.from_numpy(action), agent.device)), action


def train(args: Args, run_dir: Path | None) -> None:
    """The whole run, or the rest of the one in `run_dir`."""
    accelerator = "cuda" if args.cuda and torch.cuda.is_available() else "cpu"
    rank, world, local_rank = runs.setup_distributed(accelerator)
    if args.batch_size % world:
        raise runs.UserError(f"--batch-size {args.batch_size} does not divide among {world} "
                             "processes.")
    device = torch.device(accelerator, local_rank) if accelerator == "cuda" else torch.device("cpu")
    runs.seed_everything(args.seed, args.torch_deterministic)
    runs.keep_freed_memory()
    saved = runs.load_checkpoint(run_dir / "checkpoint.pt", SCRIPT, device) if run_dir else None
    if saved and len(saved["ranks"]) != world:
        raise runs.UserError(f"the run was made by {len(saved['ranks'])} processes, not {world}; "
                             "start as many.")
    seed = args.seed + 1_000 * rank + 1_000_000 * (saved["step"] if saved else 0)
    envs = Envs(args.env_config, args.num_envs, seed, args.max_env_restarts, args.env_timeout,
                args.env_seed)
    agent = Agent(args, envs.spec, device)
    run_dir = run_dir or open_run(args, rank)
    replay = open_replay(args, run_dir, envs.spec, rank, world)
    feeder = Feeder(replay, device, args.batch_size // world, args.batch_length)
    if rank:  # the same weights on every rank, but not the same draws
        runs.seed_everything(seed, args.torch_deterministic)
    step = restore(saved, agent, feeder, rank) if saved else 0
    if rank == 0:
        greet(args, run_dir, replay, agent, updates_due(args, args.total_timesteps, 0, world))
    logger = runs.Logger(run_dir, args.total_timesteps, step, rank == 0, args.track,
                         args.wandb_project_name, asdict(args))
    progress = Progress(step, agent.updates)
    episodes = video.EpisodeVideos(run_dir / "videos") if args.capture_video and rank == 0 else None
    agent.update = GraphedUpdate(agent) if agent.graphed else agent.train_step
    try:
        with runs.GracefulExit() as stop:
            save(run_dir, agent, feeder, step)  # so that there is always something to resume
            run_loop(args, run_dir, envs, agent, feeder, logger, episodes, stop, progress)
            save(run_dir, agent, feeder, progress.step)
            if stop.error:
                raise stop.error
    finally:
        agent.update = None  # nccl waits for ever for a CUDA graph that holds its collectives
        logger.close()
        envs.close()
        if episodes:
            episodes.close()
    if rank == 0 and progress.step < args.total_timesteps:
        print(f"stopped and saved; go on with: python {SCRIPT}.py --resume {run_dir}")


def run_loop(args: Args, run_dir: Path, envs: Envs, agent: Agent, feeder: Feeder,
             logger: runs.Logger, episodes: video.EpisodeVideos | None, stop: runs.GracefulExit,
             progress: Progress) -> None:
    """Act, store, train, log, save; until the last timestep or until told to stop."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    # A replayed sequence starts with is_first, so the state that is carried into it plays no part.
    carry, action, idle = None, None, agent.blank_state(feeder.shape[0])
    last_return = math.nan
    while progress.step < args.total_timesteps and not any_rank(stop.requested):
        obs, explore = None, progress.step < first_update(args, world)
        try:
            if not args.offline:
                obs, carry, action = collect(agent, envs, feeder.replay, carry, action, explore)
            if episodes and obs:
                episodes.add(envs.render, obs.is_first[0])
        except (EnvError, OSError) as error:  # what was learnt is not broken: `train` saves it
            stop.requested, stop.error = True, error
            if obs is None and world == 1:
                break  # several processes end this turn and stop together
        progress.advance(envs.num_envs * world)
        for env in np.flatnonzero(obs.is_last) if obs else ():
            last_return = obs.episode_return[env]
            logger.scalars({"charts/episodic_return": last_return,
                            "charts/episodic_length": obs.episode_length[env]}, progress.step)

        # On a GPU this only queues work, which runs while the environments take their next step.
        # Right after a resume there may be no whole window to replay yet.
        empty = not feeder.replay.windows(args.batch_length)
        due = updates_due(args, progress.step, agent.updates, world)
        for _ in range(0 if any_rank(empty) else due):
            agent.update(feeder.next(), idle)
            feeder.prepare()
            if agent.device.type == "cpu":
                finite(agent.metrics, agent.updates)

        if progress.due(args.log_every):
            speeds = progress.speeds(agent.updates)
            logger.scalars(speeds | finite(agent.metrics, agent.updates), progress.step)
        if progress.due(args.video_every) and agent.updates and not empty:
            batch = feeder.replay.sample(1, args.batch_length, np.random.default_rng(progress.step))
            context = min(args.dream_context, args.batch_length - 1)
            panels = open_loop(agent, batch, context)
            logger.video("open_loop", video.side_by_side(panels, context), progress.step)
        if progress.due(args.checkpoint_every):
            logger.flush()  # what is logged up to here is never logged again
            save(run_dir, agent, feeder, progress.step)
        logger.progress(progress.step, episodic_return=last_return, updates=agent.updates)


def open_replay(args: Args, run_dir: Path, spec: EnvSpec, rank: int, world: int) -> ReplayBuffer:
    """The replay of this run, or with --offline that of another, whose files are only read."""
    folder = Path(args.offline or run_dir) / "replay"
    if world > 1 and not (args.offline and (folder / "rows.npy").exists()):
        folder /= f"rank{rank}"  # a recording made by one process serves them all
    num_envs, capacity = args.num_envs, max(args.batch_length, math.ceil(args.capacity / world))
    try:
        if args.offline or folder.exists():  # on a resume, too, the rings keep their size
            num_envs, capacity = runs.array_shape(folder / "reward.npy")[:2]
        replay = ReplayBuffer(folder, spec, capacity, num_envs, args.seed + rank, not args.offline)
        if args.offline and not replay.windows(args.batch_length):
            raise runs.UserError(f"{folder} holds {replay.count} rows per environment, fewer than "
                                 f"--batch-length {args.batch_length}.")
        return replay
    except runs.UserError:
        if not (run_dir / "checkpoint.pt").exists():  # a new run that cannot begin leaves nothing
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


def open_run(args: Args, rank: int) -> Path:
    """Make a new run directory with its args.json; every rank gets the same one."""
    shared = [None]
    if rank == 0:
        shared = [runs.create_run_dir(args.runs_dir, args.env_id, args.exp_name, args.seed)]
        runs.save_args(shared[0], SCRIPT, asdict(args))
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def greet(args: Args, run_dir: Path, replay: ReplayBuffer, agent: Agent, updates: int) -> None:
    """Say where the run is, what it will take, and how to make it comfortable."""
    millions = sum(p.numel() for p in agent.parameters() if p.requires_grad) / 1e6
    print(f"run directory: {run_dir}")
    print(f"replay buffer: {replay.capacity * replay.num_envs:,} timesteps, "
          f"{replay.gibibytes:.2f} GiB of disk{' per rank' * dist.is_initialized()}")
    print(f"agent: size {args.size}, {millions:.2f} million parameters, on {agent.device}"
          f"{' in bfloat16' if agent.bf16 else ''}")
    if not updates:
        print("no update will be made: raise --total-timesteps, or lower --learning-starts")
    elif agent.device.type == "cpu" and args.units > SIZES["XXS"]["units"]:
        print(f"no GPU: {updates:,} updates of seconds each are ahead, for days; comfortable on a "
              "laptop: --size XXS --train-ratio 64, or a vector environment such as CartPole-v1")


def save(run_dir: Path, agent: Agent, feeder: Feeder, step: int) -> None:
    """Replay rows to disk first, then the checkpoint that refers to them; never a broken state."""
    finite(agent.metrics, agent.updates)
    feeder.replay.flush()
    mine = {"replay": feeder.replay.state_dict(), "rng": runs.rng_state(agent.device)}
    ranks = [mine]
    if dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        if dist.get_rank() > 0:
            return
    adam = {name: adam.state_dict()["state"] for name, adam in agent.optimizers().items()}
    state = {"step": step, "updates": agent.updates, "agent": agent.state_dict(), "adam": adam}
    runs.save_checkpoint(run_dir / "checkpoint.pt", state | {"ranks": ranks}, SCRIPT)


def restore(saved: dict, agent: Agent, feeder: Feeder, rank: int) -> int:
    """Undo `save`; returns the timestep."""
    agent.load_state_dict(saved["agent"])
    agent.updates = saved["updates"]
    for name, adam in agent.optimizers().items():  # learning rates are this call's, not the file's
        adam.load_state_dict(adam.state_dict() | {"state": saved["adam"][name]})
    feeder.replay.load_state_dict(saved["ranks"][rank]["replay"])
    runs.set_rng_state(saved["ranks"][rank]["rng"], agent.device)
    return saved["step"]


def main() -> None:
    """Train, resume, evaluate or dream; mistakes of the user get one line and exit status 1."""
    fixed = {"env_id", "size", *SIZES["S"], "mlp_units", "mlp_layers", "stoch", "classes", "bins",
             "num_envs", "buffer_size", "image_size", "grayscale", "train_ratio", "batch_size",
             "batch_length", "learning_starts",  # from train_ratio on: the schedule of updates
             "offline"}
    try:
        args, run_dir = parse(Args, SCRIPT, __doc__.partition("\n")[0], fixed)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.evaluate or args.dream:  # compiling takes longer than playing; no episode is filmed
            args = replace(args, compile=False, capture_video=False)
        mode = evaluate if args.evaluate else dream if args.dream else train
        mode(args, run_dir)
    except (runs.UserError, EnvError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
