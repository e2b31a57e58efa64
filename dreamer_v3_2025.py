"""DreamerV3 as of 2025: the revised paper (arXiv 2301.04104v2, Nature 2025), in one file.

    python dreamer_v3_2025.py --env-id MsPacmanNoFrameskip-v4    train (Atari-100k setting, 12M)
    python dreamer_v3_2025.py --env-id CartPole-v1 --size XXS    any Gymnasium environment
    python dreamer_v3_2025.py --resume RUN_DIR                   go on exactly where a run stopped
    python dreamer_v3_2025.py --evaluate RUN_DIR                 play episodes, print the returns
    python dreamer_v3_2025.py --dream RUN_DIR                    happened | reconstructed | imagined
    torchrun --nproc-per-node 2 dreamer_v3_2025.py --env-id ...  several GPUs

The agent learns a *world model* from replayed sequences. An *actor* and a *critic* learn at the
same time from trajectories that they imagine in that model. One update (`Agent.train_step`):

    batch, context        <- B windows of T + 1 consecutive rows of the replay, the newest first
    embed                 <- encoder(image, vector)
    deter, stoch          <- RSSM along time from the context row's latents: posteriors and priors
    world model           loss: predict image, vector, reward, end, and its own next posterior
    feat, action          <- from each of the N = T * B posterior states, H steps of prior and actor
    reward, cont, value   <- heads and critic at the imagined states
    ret                   <- lambda-return, backwards along the imagined steps
    actor                 loss: do what leads to a higher return
    critic                loss: predict the return, the imagined one and the one along the replay
    all of them           <- one step down the sum of these losses; then the slow critic follows
    replay                <- deter, stoch, in the rows that they were inferred for

One step of the RSSM. Training and acting take the posterior, imagination takes the prior:

    h_{t-1} --+-> deter_in --.
              `--------------|-------.    (block by block)
    z_{t-1} ----> stoch_in --+       v
    a_{t-1} ----> action_in -+--> [ GRU ] ------> h_t --+--> img_out --> prior     p(z_t | h_t)
                                                        v
    x_t --------> encoder -------> embed -----------> obs_out ------> posterior q(z_t | h_t, x_t)

Time alignment. A row of the replay buffer holds what is known when the action is chosen:

    time             t=0      t=1      t=2    ...   t=n (last)     | next episode
    observation      x0       x1       x2           xn             | x0'
    reward           0        r1       r2           rn             | 0        received WITH x_t
    is_first         1        0        0            0              | 1
    is_terminal      0        0        0            terminated?    | 0        not at a time limit
    action           a0       a1       a2           zeros          | a0'      chosen AT x_t
    latents          h0 z0    h1 z1    h2 z2        hn zn          | h0' z0'  inferred last [R-15]

    replay      (h,z)_{t-1}, a_{t-1} -> h_t;   h_t -> prior p(z_t|h_t);   h_t, x_t -> posterior
                where is_first: (h,z)_{t-1} := 0, a_{t-1} := 0
                a window: t=-1, the context row, gives its stored h, z and a; no loss
                world-model loss: [t=0 ... t=T-1], every row but the context row
    imagine     s_0 = a posterior state;   a_t ~ actor(s_t), s_{t+1} ~ prior       t = 0 ... H-1
                critic    [v_0 ... v_{H-1}]   v_H only bootstraps: R_H = v_H
                rewards   r_1 ... r_H  and  c_0 ... c_H, in which gamma is, from the states
                actor     [a_0 ... a_{H-1}]   each judged by R_t, the return of its own state
                weights   w_t = c_0 c_1 ... c_t
                target    R_t = r_{t+1} + c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1})
    replay      critic    [v_0 ... v_{T-2}]   episode's end: no loss, lambda 0; R^imag_t: R_0 from t
                target    R_t = r_{t+1} + gamma (1 - is_terminal_{t+1})
                                ((1 - lambda) R^imag_{t+1} + lambda R_{t+1})
    windows     | 0 ... T | T+1 ... 2T+1 | ...   rows of an environment; each is used as soon as it
                is complete, once and in order [R-16]; the rest of a batch starts anywhere

Symbols (paper -> code), and the sizes that the shape comments name, time-major
    x_t  image, vector    h_t  deter    z_t  stoch    s_t  feat = [deter, stoch]
    a_t  action           r_t  reward   c_t  cont     R^lambda_t  ret      v_t  value
    gamma  args.gamma     lambda  args.return_lambda        eta  args.actor_entropy
    v'_t  slow_value      sg()  .detach()    q(z|h,x)  post    p(z|h)  prior
    Dimension key
    T  replay time, 64     B  batch, 16     N = T * B  imagination starts, 1024   (size 12M, Atari)
    H  imagination horizon, 15     H1  H + 1     G  H - 1     A  action, 9     P  environments, 1
    E  embedding, 1024     D  deterministic state, 2048     S, K  latents and classes, 32 16
    Z = S * K  stochastic state, 512     F = D + Z  feature, 2560     U  hidden units, 256
    M  two-hot buckets, 255     V  vector observation     I, I, C  image, 64 64 3
    Equations have the numbers of version 1 of the paper ("Eq. 7"), as in dreamer_v3.py.

What changed since DreamerV3 of 2023 (each tag stands where it happens), and what it is good for. We
had the authors' code at hand; "paper" below is what we recall of the revision's text.
    [R-1]   recurrence: h, z and a are embedded first; the GRU's units form 8 blocks. A
            dense GRU of as many units would take three times the products.
    [R-2]   RMSNorm for LayerNorm, with biases before it: one pass less over the numbers.
    [R-3]   image: convolutions of 5x5, then the maximum of 2x2 pixels, or the reverse. Strided ones
            treat pixels unlike their neighbours. The paper has strided ones; the code has a switch.
    [R-4]   decoder: h (by blocks) and z have paths of their own; a sigmoid keeps pixels in range.
    [R-5]   two-hot buckets are the numbers themselves, symexp(-20 ... 20), and the mean is taken
            there. A mean in symlog space is too close to 0 where returns are random.
    [R-6]   sequences begin with a zero state (2023: learned).
    [R-7]   dynamics loss with scale 1 (2023: 0.5).
    [R-8]   the continue head's target has gamma in it again (as in V2), imagination takes its
            probability, also at the start (2023: likelier value; recorded at the start).
    [R-9]   REINFORCE for continuous actions, too: one estimator, and no gradient in imagination.
    [R-10]  actor: outputs start small, so choices start close to uniform. No uniform share in the
            discrete policy: the paper has 1%, and so has the code's config, but nothing reads it.
    [R-11]  the critic also learns along the replay, from real rewards, and this gradient reaches
            the world model: latents keep what values need, even if pictures do not show it.
    [R-12]  the slow critic starts as a copy of the critic (2023: after the first update).
    [R-13]  one loss, one optimiser, one rate: imagination runs in the model before its step.
    [R-14]  LaProp, gradients clipped to 0.3 of each tensor's norm, 1000 updates of warm-up: no
            clip to tune for each loss, no overshooting. Paper: beta2 0.99, code 0.999.
    [R-15]  replay rows hold latents; a window starts from those of the row before it; fresh ones
            are written back. 2023: windows start blind, in the middle of an episode.
    [R-16]  the newest windows are replayed first, each once: nothing waits for its first use.
    [R-17]  the untrained policy acts first (2023: uniformly random actions).
    [R-18]  sizes by one width; our default, 12M, is for one machine (theirs: 200M; control by
            vectors: 1M). Replay ratio 256 is the code's (paper: 128). Control: repeat 2 and ratio
            512 are the paper's (code: 1; 1024, images 256), the length is Atari's (code: 1.1M).
    [R-19]  initialisers: truncated normal, variance 1 / fan in (2023: mean of both fans, uniform).
Kept from 2023: 1% uniform mixture of latents, free bits, symlog, percentile scale. The tags [V1-n],
[V2-n] and [V3-n] are explained in the script of that version.

Deviation (from the authors' code, danijar/dreamerv3 e3f0224 of May 2026)
    * A time limit is not a terminal, on Atari too: their wrapper treats them alike.
    * bfloat16 is the default where the hardware supports it, from 256 --units on; theirs always
      uses it. State, acting and the continue head stay in float32; stored h is in float16.
    * Latents are written back after the update (theirs: one update later), and the weights that act
      are the newest (theirs: one step old). On a GPU the next batch is drawn during an update: its
      latents are one update old, and a resume skips it, with the first use of its new windows.
    * Several vectors are one to us, so their output layers are clipped as one. Where pixels of a
      maximum tie, one gets the gradient (theirs: shared). Integers: as in V3 (theirs: one-hot).
    * Atari starts with 1 to 30 no-ops (theirs: 0 to 30), pictures are resized by area (theirs:
      bilinear), and the last one is always fresh. One environment (theirs: 16 for control).
    * Evaluation samples by default as theirs does; --eval-greedy takes the most likely action. It
      is a command of its own (theirs has both kinds).
    * --size XXS is ours, for laptops.
"""

# ---------------------------------------------------------------------------------------- 1 imports
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common.cli import RunArgs, one_line_errors, parse
from common.devices import (CudaGraph, Feeder, average_over_ranks, compile_methods, gather_ranks,
                            on_device, use_bf16)
from common.disk import Rings, UserError
from common.envs import EnvConfig
from common.maths import symexp, symlog
from common.play import dream, evaluate, load_agent
from common.run import Run
from common.spaces import EnvSpec
from common.vector import Envs, EnvStep

SCRIPT = Path(__file__).stem

# ------------------------------------------------------------------------------------------- 2 Args
TASKS = {  # what differs for a benchmark
    "atari": dict(action_repeat=4), "control": dict(action_repeat=2, train_ratio=512.0)}
DEPTHS = 2, 3, 4, 4  # channels of the stages of encoder and decoder, times --depth
SIZES = {  # of the authors' code, by one width d [R-18]; XXS is ours
    name: dict(deter=128 * d, hidden=16 * d, units=16 * d, depth=d, classes=d) for name, d in {
        "1M": 4, "12M": 16, "25M": 24, "50M": 32, "100M": 48, "200M": 64, "400M": 96}.items()
} | {"XXS": dict(deter=256, hidden=64, depth=8, units=128, stoch=16, bins=63, batch_length=16,
                 train_ratio=64.0, lr=4e-4, warmup=200, gamma=0.99, beta_pred=5.0,
                 actor_entropy=3e-3)}


@dataclass(frozen=True)
class Settings:
    """Every setting of the algorithm; a resume keeps all but rate and length."""

    env_id: str = "MsPacmanNoFrameskip-v4"  # Any Gymnasium id; `module:Id-v0` imports your own
    total_timesteps: int = 110_000  # Decisions of the agent; frames = these x action repeat
    size: Literal[tuple(SIZES)] = "12M"  # Preset; XXS is for laptops (paper, we recall: 200M)
    num_envs: int = 1  # Environments, each in a process of its own; per torchrun process
    action_repeat: int = 1  # Times that an action is repeated (Atari: 4, DeepMind Control: 2)
    pixels: bool = False  # Observe the rendered picture instead of what the environment gives
    image_size: int = 64  # Images are resized to this height and width: a multiple of 16
    grayscale: bool = False  # Images in shades of grey
    sticky: float = 0.0  # Atari: chance that the last action is repeated

    train_ratio: float = 256.0  # Replayed timesteps per collected one (paper, we recall: 128)
    batch_size: int = 16  # Sequences per batch, B
    batch_length: int = 64  # Timesteps per sequence, T
    replay_context: Literal[0, 1] = 1  # 1: a window starts from stored latents; 0: from zeros
    learning_starts: int = 1024  # Windows of T timesteps that are collected first
    buffer_size: int = 5_000_000  # Replay capacity in timesteps, first in, first out
    pretrain: int = 1  # Updates that are made at once when training begins

    bins: int = 255  # Two-hot buckets, on [-20, 20] in symlog space
    deter: int = 2048  # GRU recurrent units, size of h_t
    blocks: int = 8  # Blocks that these units form
    hidden: int = 256  # Hidden units inside the RSSM
    depth: int = 16  # CNN multiplier: half of the channels of the first stage
    units: int = 256  # Dense hidden units of the heads, and of vector en- and decoder
    layers: int = 3  # MLP layers of actor, critic, and vector en- and decoder
    head_layers: int = 1  # MLP layers of reward and continue head
    stoch: int = 32  # Number of latents that make up z_t
    classes: int = 16  # Classes of each of them

    lr: float = 4e-5  # Learning rate of everything
    warmup: int = 1000  # Updates in which it rises from 0
    agc: float = 0.3  # Largest gradient of a parameter, as a share of its norm (0: any)
    beta1: float = 0.9  # LaProp: decay of the mean of scaled gradients
    beta2: float = 0.999  # LaProp: decay of the mean of squares (paper, we recall: 0.99)
    eps: float = 1e-20  # LaProp epsilon

    unimix: float = 0.01  # Share of the uniform distribution in latents
    beta_pred: float = 1.0  # Scale of image, vector, reward and continue loss
    beta_dyn: float = 1.0  # Scale of the dynamics loss
    beta_rep: float = 0.1  # Scale of the representation loss
    free_bits: float = 1.0  # Nats below which a KL loss is not pushed any further

    imag_horizon: int = 15  # Imagination horizon, H
    gamma: float = 1 - 1 / 333  # Discount factor
    return_lambda: float = 0.95  # Return lambda
    actor_entropy: float = 3e-4  # eta, scale of the entropy bonus
    actor_unimix: float = 0.0  # Share of the uniform distribution (paper, we recall: 0.01)
    actor_min_std: float = 0.1  # Smallest deviation of a continuous action
    actor_max_std: float = 1.0  # Largest deviation of a continuous action
    beta_replay: float = 0.3  # Scale of the critic's loss on replayed rewards
    critic_ema_decay: float = 0.98  # Decay of the slow critic
    critic_ema_regularizer: float = 1.0  # Scale of the loss towards the slow critic
    return_norm_low: float = 5.0  # Lower end of the return range, a percentile
    return_norm_high: float = 95.0  # Upper end of the return range, a percentile
    return_norm_limit: float = 1.0  # Smaller return ranges are not scaled up
    return_norm_decay: float = 0.99  # Decay of the return range


@dataclass(frozen=True, init=False)
class Args(RunArgs, Settings):
    """Settings of the algorithm and of the run."""

    def __init__(self, **flags):
        """Defaults; over them what TASKS has for `env_id`, what SIZES has for `size`, and `flags`.
        Raises `UserError`, one line, for a value that cannot work."""
        self.fill(TASKS, SIZES, flags)
        self.check(may_be_zero={"learning_starts", "pretrain", "replay_context", "warmup"}, shares={
            "sticky", "unimix", "actor_unimix", "gamma", "return_lambda", "critic_ema_decay",
            "return_norm_decay", "beta1", "beta2"})
        if not self.return_norm_low <= self.return_norm_high <= 100:
            raise UserError("--return-norm-low and -high are percentiles, the lower one first")
        if self.image_size % 16:
            raise UserError(f"--image-size is {self.image_size}; use 16, 32, 48, 64, 80, ...")
        if min(self.bins, self.batch_length) < 2 or self.bins % 2 == 0:
            raise UserError("--bins is odd and starts at 3, --batch-length starts at 2")
        if self.deter % self.blocks or DEPTHS[-1] * self.depth % self.blocks:
            raise UserError("--deter and 4 * --depth are multiples of --blocks")

    @property
    def stoch_dim(self) -> int:
        """Size of the flat stochastic state, Z."""
        return self.stoch * self.classes

    @property
    def capacity(self) -> int:
        """Rows of the replay ring of one environment; a run never needs more than it collects."""
        return math.ceil(min(self.buffer_size, self.total_timesteps) / self.num_envs)

    @property
    def env_config(self) -> EnvConfig:
        """What it takes to build one environment."""
        return EnvConfig(self.env_id, self.image_size, self.grayscale, self.action_repeat,
                         self.max_episode_steps, self.noop_max, self.sticky, self.pixels,
                         self.env_seed, self.env_kwargs)


# ---------------------------------------------------------------------------------- 3 replay buffer
class Batch(NamedTuple):
    """Replayed sequences; see the time alignment above. An absent observation is None."""

    image: Tensor | None  # (T, B, I, I, C) uint8
    vector: Tensor | None  # (T, B, V) float32
    action: Tensor  # (T, B, A) float32, chosen at this observation
    reward: Tensor  # (T, B) float32, received with this observation
    is_first: Tensor  # (T, B) bool
    is_terminal: Tensor  # (T, B) bool
    # The context row, before the first one; None: the state there is zero
    deter: Tensor | None = None  # (1, B, D) float32, as an update or acting last inferred it
    stoch: Tensor | None = None  # (1, B, Z) float32
    prev_action: Tensor | None = None  # (1, B, A) float32, chosen there
    place: Tensor | None = None  # (2, B) environment and number of the first row


class ReplayBuffer:
    """One ring of rows per environment, in memory-mapped files that outlive the process.

    Rows are numbered from the start of the run. A window of consecutive rows may be sampled if all
    of them are still there: it can cross the end of an episode (is_first marks the seam) but never
    the write position. A row also holds the latents that were inferred for it last. [R-15]

    A killed run goes on from its checkpoint, but updates after the checkpoint have refreshed
    latents of rows before it. So a row has two places for latents, each stamped with the number of
    the refresh that wrote it (acting: 0); a refresh spares what the last checkpoint may need.
    """

    def __init__(self, folder: Path, spec: EnvSpec, capacity: int, num_envs: int, seed: int,
                 latents: tuple[int, int] | None = None):
        """Open the rings in `folder`, or make them. `UserError`: a full disk, or others' files.
        `latents`: sizes of deter and stoch; None: windows have no context row."""
        layout = {"action": (np.float32, (spec.action_dim,)), "reward": (np.float32, ()),
                  "is_first": (np.bool_, ()), "is_terminal": (np.bool_, ())}
        if spec.image_shape:
            layout["image"] = (np.uint8, spec.image_shape)
        if spec.vector_dim:
            layout["vector"] = (np.float32, (spec.vector_dim,))
        self.parts, self.context = list(layout), int(latents is not None)
        if latents:
            layout |= {"deter": (np.float16, (2, latents[0])), "stoch": (np.bool_, (2, latents[1])),
                       "stamp": (np.int64, (2,))}
        self.online = self.refreshed = self.kept = 0  # see `newest`, `refresh` and `state_dict`
        self.rings = Rings(folder, layout, capacity + self.context, num_envs)
        self.rng = np.random.default_rng(seed)

    def windows(self, length: int) -> int:
        """Number of valid starts of a window of `length` rows in one ring."""
        return max(0, self.rings.count - self.rings.oldest - length - self.context + 1)

    def add(self, obs: EnvStep, action: np.ndarray, state: "State | None" = None) -> None:
        """Append one row per environment: `obs`, the action (P, A) chosen at it, its latents."""
        row = obs._asdict() | {"action": action, "stamp": 0}
        if self.context:
            row |= {"deter": state.deter[:, None].cpu(), "stoch": state.stoch[:, None].cpu()}
        self.rings.append(row)

    def sample(self, batch_size: int, length: int, rng: np.random.Generator) -> Batch:
        """Draw windows as a time-major `Batch` on the CPU: the newest, then uniformly. [R-16]"""
        files, env = self.rings.files, rng.integers(self.rings.num_envs, size=batch_size)
        start = self.rings.oldest + rng.integers(self.windows(length), size=batch_size)
        if rng is self.rng:  # only updates use up what is new, a video does not
            new_env, new_start = self.newest(batch_size, length + self.context)
            env[:len(new_env)], start[:len(new_start)] = new_env, new_start
        first = start + self.context
        slots = (first + np.arange(-self.context, length)[:, None]) % self.rings.capacity
        rows = {name: files[name][env, slots] for name in self.parts}
        if not self.context:
            rows["is_first"][0] = True  # the state before a window is unknown: start it afresh
            return to_batch(rows)
        latest = files["stamp"][env, slots[:1]].argmax(-1)
        latents = {name: files[name][env, slots[:1], latest].astype(np.float32)
                   for name in ("deter", "stoch")}
        return to_batch({name: array[1:] for name, array in rows.items()} | latents | {
            "prev_action": rows["action"][:1], "place": np.stack([env, first])})

    def newest(self, batch_size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Environments and first rows of up to `batch_size` windows that are due for the first
        time. [R-16]  Window n of a ring has its rows n * length ... (n + 1) * length - 1. Each is
        used once, in order; n goes round the environments. Those that are overwritten are skipped.
        """
        num_envs = self.rings.num_envs
        self.online = max(self.online, math.ceil(self.rings.oldest / length) * num_envs)
        complete = self.rings.count // length * num_envs
        numbers = np.arange(self.online, min(complete, self.online + batch_size))
        self.online += len(numbers)
        return numbers % num_envs, numbers // num_envs * length

    def refresh(self, batch: Batch, deter: Tensor, stoch: Tensor) -> None:
        """Put deter (T, B, D) and stoch (T, B, Z), inferred by an update, into its rows. [R-15]"""
        if batch.place is None:
            return
        files, (env, start) = self.rings.files, batch.place.cpu().numpy()
        rows = start + np.arange(len(deter))[:, None]
        whole = rows >= self.rings.oldest  # a row that is gone by now belongs to another time
        at = np.broadcast_to(env, rows.shape)[whole], rows[whole] % self.rings.capacity
        stamps = files["stamp"][at]
        # Over the copy that is newer than the last checkpoint, else over the older one.
        side = np.where(stamps.max(-1) > self.kept, stamps.argmax(-1), 1 - stamps.argmax(-1))
        self.refreshed += 1
        files["deter"][*at, side] = deter.cpu().numpy()[whole]
        files["stoch"][*at, side] = stoch.cpu().numpy()[whole]
        files["stamp"][*at, side] = self.refreshed

    def state_dict(self) -> dict:
        """What the checkpoint must hold to make sense of the files. Until the next one, `refresh`
        keeps the latents that the files hold now."""
        self.kept = self.refreshed
        return {"count": self.rings.count, "rng": self.rng.bit_generator.state,
                "online": self.online, "refreshed": self.refreshed}

    def load_state_dict(self, state: dict) -> None:
        """Go back to a checkpoint: later rows are forgotten, and so are those they replaced."""
        self.rings.roll_back(state["count"])
        self.rng.bit_generator.state = state["rng"]
        self.online, self.refreshed = state["online"], state["refreshed"]
        self.kept = self.refreshed
        if self.context:
            stamps = self.rings.files["stamp"]
            stamps[stamps > self.refreshed] = -1  # of updates that are undone


def to_batch(rows: dict[str, np.ndarray]) -> Batch:
    """Arrays (T, B, ...) by the names of `Batch` -> tensors on the CPU that share their memory."""
    tensors = {name: torch.from_numpy(array) for name, array in rows.items()}
    return Batch(tensors.pop("image", None), tensors.pop("vector", None), **tensors)


def previous_actions(batch: Batch, action_before: Tensor) -> Tensor:
    """The action (T, B, A) that led to each observation; `action_before` (B, A) led to the first.

    Rows hold the action chosen *at* an observation. The RSSM wants the one before it.
    """
    return torch.cat([action_before[None], batch.action[:-1]])


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


class Gaussian:
    """Diagonal normal over the last dimension."""

    def __init__(self, mean: Tensor, std: Tensor):
        """`mean`, `std`: (..., A)."""
        self.mean, self.std = mean, std

    def noise(self) -> Tensor:
        """Standard normal noise (..., A)."""
        return draw_noise(self.mean)

    def sample(self) -> Tensor:
        """Reparameterised sample (..., A)."""
        return self.mean + self.std * self.noise()

    def mode(self) -> Tensor:
        """The mean (..., A)."""
        return self.mean

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (...), summed over A. [V2-4]"""
        nats = -0.5 * ((value - self.mean) / self.std).square() - self.std.log()
        return (nats - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy (...) in nats, summed over A."""
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class OneHot:
    """One-hot categorical over the last dimension."""

    def __init__(self, raw: Tensor, unimix: float):
        """`raw`: logits (..., K) of any precision; p = (1 - unimix) softmax(raw) + unimix / K."""
        self.raw, self.unimix = raw.float(), unimix  # everything here is in float32
        self.probs = self.raw.softmax(-1) * (1 - unimix) + unimix / raw.shape[-1]  # [V3-3]

    @cached_property
    def logits(self) -> Tensor:
        """Log-probabilities (..., K); without the mixture a probability may round to 0."""
        return self.probs.log() if self.unimix else self.raw.log_softmax(-1)

    def sample(self) -> Tensor:
        """Straight-through sample (..., K): forward one-hot, backward the gradient of `probs`."""
        index = draw_classes(self.probs.detach())
        onehot = torch.zeros_like(self.probs).scatter_(-1, index[..., None], 1)
        if not self.probs.requires_grad:
            return onehot
        return onehot + (self.probs - self.probs.detach())

    def mode(self) -> Tensor:
        """The most likely class as one-hot (..., K), without gradient."""
        return F.one_hot(self.probs.argmax(-1), self.probs.shape[-1]).float()

    def log_prob(self, onehot: Tensor) -> Tensor:
        """Log-probability (...) of `onehot` (..., K), which gets no gradient. [V2-4]"""
        return (onehot.detach() * self.logits).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy (...) in nats."""
        return -(self.probs * self.logits).sum(-1)


class Latent(OneHot):
    """The stochastic state z_t: S independent one-hot categoricals, side by side, (Z,). [V2-1]"""

    def __init__(self, raw: Tensor, groups: int, unimix: float):
        """`raw`: logits (..., Z) before softmax and uniform share."""
        super().__init__(raw.unflatten(-1, (groups, -1)), unimix)

    def sample(self) -> Tensor:
        """Straight-through sample (..., Z)."""
        return super().sample().flatten(-2)

    def mode(self) -> Tensor:
        """The most likely classes (..., Z), without gradient."""
        return super().mode().flatten(-2)

    def entropy(self) -> Tensor:
        """Entropy (...) in nats, summed over S."""
        return super().entropy().sum(-1)

    def kl(self, other: "Latent") -> Tensor:
        """KL[self || other] (...) in nats, summed over S."""
        return (self.probs * (self.logits - other.logits)).sum((-2, -1))

    def detach(self) -> "Latent":
        """The same distribution, without gradient."""
        twin = object.__new__(Latent)  # __init__ would compute the softmax again
        twin.probs, twin.logits = self.probs.detach(), self.logits.detach()
        return twin


class Bernoulli:
    """Distribution of a flag: does the episode go on?"""

    def __init__(self, logit: Tensor):
        """`logit` (...) of the flag being 1."""
        self.logit = logit

    def mean(self) -> Tensor:
        """Probability of 1 (...)."""
        return self.logit.sigmoid()

    def log_prob(self, flag: Tensor) -> Tensor:
        """Log-probability (...) of `flag` (...), or cross-entropy where it is a probability."""
        return -F.binary_cross_entropy_with_logits(self.logit, flag, reduction="none")


class TwoHot:
    """Distribution of a number over buckets that are evenly spaced in symlog space. [V3-4]"""

    def __init__(self, logits: Tensor):
        """`logits` (..., M), one for each bucket between symlog values -20 and 20."""
        self.logits = logits
        half = logits.shape[-1] // 2
        low = symexp(torch.linspace(-20, 0, half + 1, device=logits.device))
        self.positive = -low[:-1].flip(0)  # exact mirror images
        self.buckets = torch.cat([low, self.positive])

    @cached_property
    def normaliser(self) -> Tensor:
        """ln sum_i exp(logits_i) (...), once for both targets of the critic."""
        return self.logits.logsumexp(-1)

    def mean(self) -> Tensor:
        """sum_i p_i b_i (...), the mean of the numbers themselves. [R-5] Each bucket and its mirror
        image are added first, or equal logits would not give exactly 0: the buckets are huge."""
        half, probs = len(self.positive), self.logits.softmax(-1)
        return ((probs[..., half + 1:] - probs[..., :half].flip(-1)) * self.positive).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """sum_i twohot(value)_i ln p_i (...), without symlog [R-5]: the two buckets around a value
        share a weight of 1, so the normaliser of ln p_i = logits_i - normaliser is subtracted once.
        """
        last = len(self.buckets) - 1
        target = value.clamp(self.buckets[0], self.buckets[last])
        above = torch.searchsorted(self.buckets, target, right=True).clamp(max=last)
        below = above - 1
        low, high = self.buckets[below], self.buckets[above]
        weight_above = (target - low) / (high - low)
        pair = self.logits.gather(-1, torch.stack([below, above], -1))
        return pair[..., 0].lerp(pair[..., 1], weight_above) - self.normaliser

    def __getitem__(self, steps: slice) -> "TwoHot":
        """The distributions of some of the steps, the first dimension."""
        return TwoHot(self.logits[steps])


def within_unit(action: Tensor) -> Tensor:
    """a / max(1, |a|): clipped as in the environment; the replay holds what was drawn. [V3-15]"""
    return action / action.detach().abs().clamp(min=1)


# ------------------------------------------------------------------------ 5 encoder, decoder, heads
def init_weights(layer: nn.Module, fan_in: int, scale: float = 1.0) -> None:
    """Normal of variance 1 / fan in after it is cut at two sigma; zero bias. [R-19]"""
    std = scale / math.sqrt(fan_in) / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)


class Norm(nn.RMSNorm):
    """RMSNorm over the last dimension, in float32; the result has the type of the input. [R-2]"""

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> x / sqrt(mean(x^2) + 1e-4) * weight, of the same shape and type."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / x.shape[-1] + 1e-4).rsqrt()
        return (x * scale * self.weight).to(x.dtype)


class Linear(nn.Linear):
    """Linear layer with the initialisation of the authors' code."""

    def reset_parameters(self) -> None:
        """Called by `nn.Linear.__init__`."""
        init_weights(self, self.in_features)


class Dense(Linear):
    """Linear -> RMSNorm -> SiLU, the hidden layer of every network. [R-2]"""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.norm = Norm(outputs)

    def activate(self, x: Tensor) -> Tensor:
        """What follows the product (..., outputs)."""
        return F.silu(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.activate(super().forward(x))


class SplitDense(Dense):
    """Dense layer of a concatenation: silu(norm(W [a, b])) = silu(norm(W_a a + W_b b)).

    Where b is known for all timesteps in advance, `project` computes W_b b for all of them at once,
    and only W_a a is left for the loop. W_a and W_b are two parameters because the gradient of a
    slice of one would be padded with zeros at every step of the loop.
    """

    def __init__(self, inputs_a: int, inputs_b: int, outputs: int):
        super().__init__(inputs_a + inputs_b, outputs)
        weight_a, weight_b = self.weight.detach().split([inputs_a, inputs_b], 1)
        del self.weight
        self.weight_a = nn.Parameter(weight_a.clone())
        self.weight_b = nn.Parameter(weight_b.clone())

    def project(self, b: Tensor) -> Tensor:
        """(..., inputs_b) -> W_b b, and the bias if there is one (..., outputs)."""
        return F.linear(b, self.weight_b, self.bias)

    def forward(self, a: Tensor, projected_b: Tensor) -> Tensor:
        """(..., inputs_a) and `project`'s output -> (..., outputs)."""
        return self.activate(F.linear(a, self.weight_a) + projected_b)


class BlockLinear(nn.Module):
    """Linear layers side by side: each block of the outputs sees one block of the inputs. [R-1]"""

    def __init__(self, inputs: int, outputs: int, blocks: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.empty(outputs))
        init_weights(self, inputs)  # the authors' code counts the inputs of all blocks

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs) -> (n, outputs); one batched matrix product for all blocks."""
        blocks = x.unflatten(-1, (len(self.weight), -1)).transpose(0, 1)
        bias = self.bias.unflatten(0, (len(self.weight), 1, -1))
        return torch.baddbmm(bias, blocks, self.weight).transpose(0, 1).flatten(-2)


class SplitBlockLinear(BlockLinear):
    """Block-linear layer whose blocks all see a and b, too: two matrix products for all blocks
    together, split for the reason of `SplitDense`."""

    def __init__(self, inputs: int, inputs_a: int, inputs_b: int, outputs: int, blocks: int):
        super().__init__(inputs + blocks * (inputs_a + inputs_b), outputs, blocks)
        parts = self.weight.detach().split([inputs // blocks, inputs_a, inputs_b], 1)
        self.weight = nn.Parameter(parts[0].clone())
        self.weight_a, self.weight_b = (
            nn.Parameter(part.transpose(1, 2).flatten(0, 1).clone()) for part in parts[1:])

    def project(self, b: Tensor) -> Tensor:
        """(..., inputs_b) -> W_b b (..., outputs)."""
        return F.linear(b, self.weight_b)

    def forward(self, x: Tensor, a: Tensor, projected_b: Tensor) -> Tensor:
        """(n, inputs), (n, inputs_a) and `project`'s output -> (n, outputs)."""
        return super().forward(x) + F.linear(a, self.weight_a) + projected_b


class MLP(nn.Sequential):
    """`layers` dense layers of `units` each."""

    def __init__(self, inputs: int, units: int, layers: int):
        super().__init__(*(Dense(units if i else inputs, units) for i in range(layers)))


class Head(nn.Module):
    """MLP and an output layer: features -> the parameters of a distribution, in float32."""

    def __init__(self, inputs: int, units: int, layers: int, outputs: int):
        super().__init__()
        self.mlp, self.out = MLP(inputs, units, layers), Linear(units, outputs)

    def forward(self, feat: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        x = self.mlp(feat)
        if self.out.out_features > 1:
            return self.out(x).float()
        with torch.autocast(x.device.type, enabled=False):  # a number needs more than 3 digits
            return self.out(x.float())


class ChannelNorm(Norm):
    """Norm over the channels of an image batch, at each pixel for itself. [V3-8]"""

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w), channels-last in memory, so that permutations are free -> the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Conv(nn.Conv2d):
    """Convolution of 5x5 pixels that keeps the size of the image. [R-3]"""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 5, padding=2)

    def reset_parameters(self) -> None:
        """Called by `nn.Conv2d.__init__`."""
        init_weights(self, 25 * self.in_channels)


class UpConv(Conv):
    """Each pixel repeated 2x2 times, then a convolution of 5x5; computed on the small image. [R-3]

    The 5 pixels in a row that an output pixel sees are 3 different ones, and which of them are
    repeated depends on whether it is the first or the second of its pair. So the four output pixels
    of an input pixel are four channels of one convolution of 3x3: 36 products instead of 100.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        repeats = [[[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]],
                   [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]]
        self.register_buffer("repeats", torch.tensor(repeats).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, 2 h, 2 w)."""
        with torch.autocast(x.device.type, enabled=False):
            kernel = torch.einsum("atk,bsl,oikl->oabits", self.repeats, self.repeats, self.weight)
        pixels = F.conv2d(x, kernel.flatten(0, 2), self.bias.repeat_interleave(4), padding=1)
        return F.pixel_shuffle(pixels, 2)


def centre(image: Tensor | None) -> Tensor | None:
    """uint8 pixels -> float32 in [-0.5, 0.5], which the encoder sees and the decoder predicts."""
    return None if image is None else image.float().div_(255).sub_(0.5)


class Encoder(nn.Module):
    """Image and/or vector x_t -> embedding: CNN features, then MLP features."""

    def __init__(self, args: Args, spec: EnvSpec):
        super().__init__()
        self.embed_dim = 0
        if spec.image_shape:
            self.cnn = nn.Sequential()
            widths = [spec.image_shape[-1]] + [args.depth * factor for factor in DEPTHS]
            for inputs, outputs in zip(widths, widths[1:]):  # each halves the image
                self.cnn.extend([Conv(inputs, outputs), nn.MaxPool2d(2), ChannelNorm(outputs),
                                 nn.SiLU()])
            self.embed_dim += (args.image_size // 16)**2 * widths[-1]
        if spec.vector_dim:
            self.mlp = MLP(spec.vector_dim, args.units, args.layers)
            self.embed_dim += args.units

    def forward(self, image: Tensor | None, vector: Tensor | None) -> Tensor:
        """image (T, B, I, I, C) from `centre`, vector (T, B, V) -> (T, B, E)."""
        parts = []
        if image is not None:
            pixels = image.flatten(0, 1).permute(0, 3, 1, 2)  # channels-last in memory
            features = self.cnn(pixels).permute(0, 2, 3, 1)  # flattened as (h, w, c)
            parts.append(features.reshape(*image.shape[:2], -1))
        if vector is not None:
            parts.append(self.mlp(symlog(vector)))  # [V3-1]
        return torch.cat(parts, -1)


class Decoder(nn.Module):
    """Feature -> image and/or vector."""

    def __init__(self, args: Args, spec: EnvSpec, feat_dim: int):
        super().__init__()
        self.sizes = args.deter, args.stoch_dim
        if spec.image_shape:
            self.cnn, self.start = nn.Sequential(), args.image_size // 16  # 4, of 64 pixels
            widths = [args.depth * factor for factor in reversed(DEPTHS)] + [spec.image_shape[-1]]
            for inputs, outputs in zip(widths[:-1], widths[1:-1]):
                self.cnn.extend([UpConv(inputs, outputs), ChannelNorm(outputs), nn.SiLU()])
            self.cnn.append(UpConv(*widths[-2:]))
            grid = self.start**2 * widths[0]
            self.deter_in = BlockLinear(args.deter, grid, args.blocks)
            self.stoch_in = nn.Sequential(Dense(args.stoch_dim, 2 * args.units),
                                          Linear(2 * args.units, grid))
            self.norm = Norm(widths[0])
        if spec.vector_dim:
            self.vector_head = Head(feat_dim, args.units, args.layers, spec.vector_dim)

    def image(self, feat: Tensor) -> Tensor:
        """(T, B, F) -> mean image (T, B, I, I, C), in float32; the targets lie in [-0.5, 0.5]."""
        deter, stoch = feat.flatten(0, -2).split(self.sizes, -1)
        blocks, size = len(self.deter_in.weight), self.start
        by_deter = self.deter_in(deter).unflatten(-1, (blocks, size, size, -1))
        by_deter = by_deter.permute(0, 2, 3, 1, 4).flatten(-2)  # the channels, block by block
        grid = by_deter + self.stoch_in(stoch).unflatten(-1, (size, size, -1))
        pixels = self.cnn(F.silu(self.norm(grid)).permute(0, 3, 1, 2))
        pixels = pixels.permute(0, 2, 3, 1).float().sigmoid() - 0.5
        return pixels.reshape(*feat.shape[:-1], *pixels.shape[1:])

    def vector(self, feat: Tensor) -> Tensor:
        """(T, B, F) -> vector (T, B, V) as its loss sees it, in float32."""
        return self.vector_head(feat)


# ------------------------------------------------------------------------------------------- 6 RSSM
class State(NamedTuple):
    """Recurrent state of the model, and the action chosen there, which leads to the next one."""

    deter: Tensor  # (B, D) h_t
    stoch: Tensor  # (B, Z) z_t
    action: Tensor  # (B, A)


class BlockGRUCell(nn.Module):
    """GRU whose units form blocks; a block sees itself, and what x and a say of all. [R-1]

        y       = SiLU(norm(W_h h + W_x x + W_a a))      W_h and V: within each block
        r, c, u = V y
        c' = tanh(sigmoid(r) c);   u' = sigmoid(u - 1);   h' = u' c' + (1 - u') h
    """

    def __init__(self, inputs: int, action_inputs: int, units: int, blocks: int):
        super().__init__()
        self.hidden = SplitBlockLinear(units, inputs, action_inputs, units, blocks)
        self.norm = Norm(units)
        self.gates = BlockLinear(units, 3 * units, blocks)

    def forward(self, x: Tensor, action_in: Tensor, deter: Tensor) -> Tensor:
        """x (n, 2U), W_a a (n, D) and h_{t-1} (n, D) -> h_t (n, D), in float32."""
        y = F.silu(self.norm(self.hidden(deter, x, action_in)))  # (..., D)
        parts = self.gates(y).float().unflatten(-1, (len(self.gates.weight), 3, -1))
        reset, cand, update = (part.flatten(-2) for part in parts.unbind(-2))
        # The -1 makes the state change slowly at first.
        return deter.lerp(torch.tanh(reset.sigmoid() * cand), (update - 1).sigmoid())


class RSSM(nn.Module):
    """Recurrent state-space model: the recurrence, the prior and the posterior. Eq. 3

    Names as in V3: `img_` is imagination, not image; `obs_` sees the observation, too.
    """

    def __init__(self, args: Args, action_dim: int, embed_dim: int):
        super().__init__()
        self.deter_in, self.stoch_in, self.action_in = (
            Dense(width, args.hidden) for width in (args.deter, args.stoch_dim, action_dim))
        self.img_out = MLP(args.deter, args.hidden, 2)
        self.obs_out = SplitDense(args.deter, embed_dim, args.hidden)
        self.gru = BlockGRUCell(2 * args.hidden, args.hidden, args.deter, args.blocks)
        self.img_stats = Linear(args.hidden, args.stoch_dim)
        self.obs_stats = Linear(args.hidden, args.stoch_dim)
        self.groups, self.unimix = args.stoch, args.unimix

    def project_action(self, action: Tensor) -> Tensor:
        """What an action (..., A) adds to the hidden layer of the GRU (..., D)."""
        return self.gru.hidden.project(self.action_in(within_unit(action)))  # [V3-15]

    def recur(self, deter: Tensor, stoch: Tensor, action_in: Tensor) -> Tensor:
        """h_{t-1} (..., D), z_{t-1} (..., Z) and what `project_action` gives -> h_t (..., D)."""
        x = torch.cat([self.deter_in(deter), self.stoch_in(stoch)], -1)  # (..., 2U)
        return self.gru(x, action_in, deter)

    def latent(self, raw: Tensor) -> Latent:
        """Raw statistics from the last layer -> distribution of z_t."""
        return Latent(raw, self.groups, self.unimix)  # [V2-1] [V3-3]

    def prior(self, deter: Tensor) -> Latent:
        """p(z_t | h_t), from h_t (..., D)."""
        return self.latent(self.img_stats(self.img_out(deter)))

    def img_step(self, deter: Tensor, stoch: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """One imagined step: h (N, D), z (N, Z), a (N, A) -> next h (N, D), z ~ prior (N, Z)."""
        next_deter = self.recur(deter, stoch, self.project_action(action))  # (N, D)
        return next_deter, self.prior(next_deter).sample()

    def obs_step(self, deter: Tensor, stoch: Tensor, action_in: Tensor,
                 embed_in: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One observed step: h (B, D), z (B, Z) -> next h (B, D), z ~ posterior (B, Z), and its
        raw statistics. `action_in` (B, D), `embed_in` (B, U): what both add to the two products.
        """
        next_deter = self.recur(deter, stoch, action_in)  # (B, D)
        raw = self.obs_stats(self.obs_out(next_deter, embed_in))
        return next_deter, self.latent(raw).sample(), raw

    def observe(self, embed: Tensor, prev_action: Tensor, is_first: Tensor, deter: Tensor,
                stoch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Infer the states of a sequence from its embeddings and the actions that led to them.

        `embed` (T, B, E), `prev_action` (T, B, A); `deter` (B, D) and `stoch` (B, Z) before that.
        Where `is_first` (T, B), an episode begins: with zero state and action [R-6]. What
        does not depend on the previous state is computed for all T at once, so that the loop holds
        the recurrence alone. Returns deter (T, B, D), stoch (T, B, Z), and raw statistics.
        """
        action_in = self.project_action(prev_action * ~is_first[..., None])  # (T, B, D)
        embed_in = self.obs_out.project(embed)  # (T, B, U)
        deters, stochs, raws = [], [], []
        for first, action_t, embed_t in zip(is_first[..., None], action_in, embed_in):
            deter, stoch, raw = self.obs_step(deter * ~first, stoch * ~first, action_t, embed_t)
            deters.append(deter), stochs.append(stoch), raws.append(raw)
        return torch.stack(deters), torch.stack(stochs), torch.stack(raws)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continue head: what the world-model loss trains. Eq. 3"""

    def __init__(self, args: Args, spec: EnvSpec):
        super().__init__()
        self.feat_dim = feat_dim = args.deter + args.stoch_dim
        self.encoder = Encoder(args, spec)
        self.rssm = RSSM(args, spec.action_dim, self.encoder.embed_dim)
        self.decoder = Decoder(args, spec, feat_dim)
        self.cont_head = Head(feat_dim, args.units, args.head_layers, 1)
        self.reward_head = Head(feat_dim, args.units, args.head_layers, args.bins)
        nn.init.zeros_(self.reward_head.out.weight)  # [V3-9]

    def reward(self, feat: Tensor) -> TwoHot:
        """(..., F) -> distribution of the reward (...) received with that state. [V3-4]"""
        return TwoHot(self.reward_head(feat))

    def cont(self, feat: Tensor) -> Bernoulli:
        """(..., F) -> distribution of "the episode goes on" (...), with gamma in it. [R-8]"""
        return Bernoulli(self.cont_head(feat).squeeze(-1))


# ------------------------------------------------------------------------------- 7 actor and critic
class Actor(nn.Module):
    """Feature -> policy pi(a_t | s_t), Eq. 6."""

    def __init__(self, args: Args, spec: EnvSpec, feat_dim: int):
        super().__init__()
        self.discrete = spec.discrete
        self.head = Head(feat_dim, args.units, args.layers, spec.action_dim)
        init_weights(self.head.out, args.units, 0.01)
        if not spec.discrete:
            self.std = Linear(args.units, spec.action_dim)  # [V2-11]
            init_weights(self.std, args.units, 0.01)
        self.min_std, self.max_std = args.actor_min_std, args.actor_max_std
        self.unimix = args.actor_unimix

    def forward(self, feat: Tensor) -> Tensor:
        """(..., F) -> parameters of the policy (..., A), or (..., 2A) for continuous actions."""
        if self.discrete:
            return self.head(feat)
        x = self.head.mlp(feat)
        return torch.cat([self.head.out(x), self.std(x)], -1).float()

    def policy(self, raw: Tensor) -> OneHot | Gaussian:
        """Distribution of actions from `forward`'s output: one-hot, or from mean and deviation."""
        if not self.discrete:
            mean, raw_std = raw.chunk(2, -1)  # the deviation is 0.1 to 1, 0.89 at first [V3-15]
            std = (self.max_std - self.min_std) * (raw_std + 2).sigmoid() + self.min_std
            return Gaussian(mean.tanh(), std)
        return OneHot(raw, self.unimix)  # [V3-3]


class Critic(nn.Module):
    """Feature -> distribution of the return from there, Eq. 6."""

    def __init__(self, args: Args, feat_dim: int):
        super().__init__()
        self.head = Head(feat_dim, args.units, args.layers, args.bins)
        nn.init.zeros_(self.head.out.weight)  # [V3-9]

    def forward(self, feat: Tensor) -> TwoHot:
        """(..., F) -> distribution over (...). [V3-4]"""
        return TwoHot(self.head(feat))


class ReturnScale(nn.Module):
    """A moving average of the range of returns between two percentiles, Eq. 12. [V3-5]"""

    def __init__(self, args: Args):
        super().__init__()
        self.decay, self.limit = args.return_norm_decay, args.return_norm_limit
        percentiles = torch.tensor([args.return_norm_low, args.return_norm_high]) / 100
        self.register_buffer("percentiles", percentiles, persistent=False)
        self.register_buffer("range", torch.zeros(2))  # starts at 0, no bias correction

    @torch.no_grad()
    def update(self, ret: Tensor) -> Tensor:
        """Take in returns (H, N) of any scale; give the divisor max(1, range) as a scalar."""
        now = torch.quantile(gather_ranks(ret.flatten()), self.percentiles)
        self.range.lerp_(now, 1 - self.decay)
        return (self.range[1] - self.range[0]).clamp(min=self.limit)


# ----------------------------------------------------------------------------------------- 8 losses
def world_model_loss(model: WorldModel, batch: Batch, carry: State,
                     args: Args) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """Scaled loss terms of the world model, each (T, B), over every replayed step. Eq. 4-5:
        L_pred = -ln p(x_t|s_t) - ln p(r_t|s_t) - ln p(c_t|s_t)
        L_dyn  = max(1, KL[ sg(q(z_t|h_t,x_t)) || p(z_t|h_t) ])     trains the prior
        L_rep  = max(1, KL[ q(z_t|h_t,x_t) || sg(p(z_t|h_t)) ])     trains the posterior
        L      = beta_pred L_pred + beta_dyn L_dyn + beta_rep L_rep

    Returns the terms, the posterior states deter (T, B, D) and stoch (T, B, Z), and statistics.
    """
    image = centre(batch.image)
    embed = model.encoder(image, batch.vector)  # (T, B, E)
    prev_action = previous_actions(batch, carry.action)  # (T, B, A)
    deter, stoch, raw = model.rssm.observe(embed, prev_action, batch.is_first, carry.deter,
                                           carry.stoch)
    post, prior = model.rssm.latent(raw), model.rssm.prior(deter)
    feat = torch.cat([deter, stoch], -1)  # (T, B, F)

    losses, metrics = {}, {"latent/post_entropy": post.entropy(),
                           "latent/prior_entropy": prior.entropy()}
    if image is not None:  # [V3-13]
        squared = F.mse_loss(model.decoder.image(feat), image, reduction="none")  # (T, B, I, I, C)
        losses["image"] = args.beta_pred * squared.sum((-3, -2, -1))
    if batch.vector is not None:  # [V3-1] Eq. 1  [V3-13]
        error = (model.decoder.vector(feat) - symlog(batch.vector)).square()  # (T, B, V)
        losses["vector"] = args.beta_pred * error.sum(-1)
    losses["reward"] = -args.beta_pred * model.reward(feat).log_prob(batch.reward)
    going_on = args.gamma * (~batch.is_terminal).float()  # (T, B)
    losses["cont"] = -args.beta_pred * model.cont(feat).log_prob(going_on)
    # [V3-2] Both have the same value; they differ in which side learns.
    kl_dyn, kl_rep = post.detach().kl(prior), post.kl(prior.detach())
    losses["dyn"] = args.beta_dyn * kl_dyn.clamp(min=args.free_bits)
    losses["rep"] = args.beta_rep * kl_rep.clamp(min=args.free_bits)
    metrics["latent/kl"] = kl_dyn
    return losses, deter, stoch, metrics


def imagine(model: WorldModel, actor: Actor, deter: Tensor, stoch: Tensor,
            horizon: int) -> tuple[Tensor, Tensor, Tensor]:
    """Follow actor and prior for `horizon` steps from deter (N, D) and stoch (N, Z). [V1-1]
    Returns features (H1, N, F), the starts included, actions (H, N, A) and the actor's outputs
    (H, N, A or 2A), from which the losses rebuild the policy without running the actor again; they
    alone have a gradient. [R-9]
    """
    feats, actions, raws = [torch.cat([deter, stoch], -1)], [], []
    for _ in range(horizon):
        raws.append(actor(feats[-1]))
        with torch.no_grad():
            actions.append(actor.policy(raws[-1]).sample())
            deter, stoch = model.rssm.img_step(deter, stoch, actions[-1])
            feats.append(torch.cat([deter, stoch], -1))
    return torch.stack(feats), torch.stack(actions), torch.stack(raws)


def lambda_return(reward: Tensor, discount: Tensor, next_value: Tensor, lambda_: float) -> Tensor:
    """Lambda-returns of imagined trajectories, one per step: (H, N), or (G, N) in V1.

        R_t = reward_t + discount_t ((1 - lambda) next_value_t + lambda R_{t+1})

    After the last step the critic bootstraps: there R_{t+1} is next_value_t. All arguments have the
    shape of the result and are aligned: what follows from step t stands at index t.
    """
    target = reward + discount * (1 - lambda_) * next_value
    returns, last = [], next_value[-1]
    for t in reversed(range(len(reward))):
        last = target[t] + discount[t] * lambda_ * last
        returns.append(last)
    return torch.stack(returns[::-1])


def actor_loss(policy: OneHot | Gaussian, action: Tensor, ret: Tensor, baseline: Tensor,
               scale: Tensor, weight: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Loss of the actor as a scalar, and the policy's entropy (H, N). Eq. 11, with
        REINFORCE   L = -mean w_t ( ln pi(a_t|s_t) sg(A_t) + eta H[pi(.|s_t)] )      [R-9]
    and A_t = (R_t - v_t) / max(1, range), where the paper writes S for the range of the returns.
    Version 1 has no v_t; only the authors' code has w_t. `ret`, `baseline` and `weight` are
    (H, N).
    """
    advantage = (ret - baseline) / scale  # (H, N) [V1-2] [V3-5]
    objective = policy.log_prob(action) * advantage  # (H, N)
    entropy = policy.entropy()  # [V2-5]
    return -(weight * (objective + args.actor_entropy * entropy)).mean(), entropy


def critic_loss(value_dist: TwoHot, ret: Tensor, slow_value: Tensor, weight: Tensor,
                args: Args) -> Tensor:
    """Loss of the critic as a scalar, Eq. 10, and the pull towards its slow copy. [V3-6]
        L = -mean w_t ( ln p(R_t|s_t) + regularizer ln p(v'_t|s_t) )
    v' is the mean of the slow critic. Only the authors' code has the weights w_t. All are (H, N),
    along the replay (T-1, B).
    """
    log_prob = value_dist.log_prob(ret.detach())  # (...)
    log_prob_slow = value_dist.log_prob(slow_value)  # (...)
    return -(weight * (log_prob + args.critic_ema_regularizer * log_prob_slow)).mean()


def replay_critic_loss(value_dist: TwoHot, batch: Batch, imag_ret: Tensor, slow_value: Tensor,
                       args: Args) -> Tensor:
    """Loss of the critic on replayed rewards, as a scalar. [R-11]
        R_t = r_{t+1} + gamma (1 - is_terminal_{t+1}) ((1 - lambda) v_{t+1} + lambda R_{t+1})
        L   = -mean w_t ( ln p(R_t|s_t) + regularizer ln p(v'_t|s_t) )     t = 0 ... T-2
    v_t is the imagined return from s_t and ends the recursion. w_t is 0 at the last state of an
    episode, where R_{t-1} = r_t + gamma (1 - is_terminal_t) v_t; else 1. All tensors are (T, B).
    """
    ends = torch.cat([batch.is_first[1:], torch.zeros_like(batch.is_first[:1])])  # (T, B) bool
    discount = args.gamma * (~batch.is_terminal).float()  # (T, B)
    reward = batch.reward + ends * discount * imag_ret  # (T, B)
    ret = lambda_return(reward[1:], (discount * ~ends)[1:], imag_ret[1:], args.return_lambda)
    return critic_loss(value_dist[:-1], ret, slow_value[:-1], (~ends).float()[:-1], args)


# ------------------------------------------------------------------------------------------ 9 agent
class Optimizer:
    """LaProp, on gradients that are clipped to a share of each parameter's own norm. [R-14]

        nu <- beta2 nu + (1 - beta2) g^2;   mu <- beta1 mu + (1 - beta1) g / sqrt(nu)
    with both means unbiased. Adam takes the mean first: old gradients are divided by new sizes.
    """

    def __init__(self, module: nn.Module, args: Args):
        names, self.params = zip(*((re.sub("_[ab]$", "", name), param) for name, param in
                                   module.named_parameters() if param.requires_grad))
        self.tensor_of = torch.tensor([names.index(name) for name in names],  # split parts: one
                                      device=self.params[0].device)
        self.nu, self.mu = ([torch.zeros_like(param) for param in self.params] for _ in range(2))
        self.step = torch.zeros((), device=self.params[0].device)  # a tensor, for a CUDA graph
        self.lr, self.warmup, self.agc = args.lr, args.warmup, args.agc or 1e30
        self.beta1, self.beta2, self.eps = args.beta1, args.beta2, args.eps

    def grads(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Gradients of a scalar loss for these parameters."""
        grads = torch.autograd.grad(loss, self.params)
        average_over_ranks(grads)
        return grads

    @torch.no_grad()
    def apply(self, grads: tuple[Tensor, ...]) -> Tensor:
        """Take one step; returns the global norm of the gradients before clipping."""
        norms, limits = self.norms(grads), self.agc * self.norms(self.params).clamp(min=1e-3)
        clipped = torch._foreach_mul(grads, list((limits / norms.clamp(min=limits)).unbind()))
        self.step += 1
        unbias = (1 - self.beta1**self.step), (1 - self.beta2**self.step)
        torch._foreach_mul_(self.nu, self.beta2)
        torch._foreach_addcmul_(self.nu, clipped, clipped, 1 - self.beta2)
        roots = torch._foreach_sqrt(torch._foreach_div(self.nu, unbias[1]))
        torch._foreach_add_(roots, self.eps)
        torch._foreach_lerp_(self.mu, torch._foreach_div(clipped, roots), 1 - self.beta1)
        # The rate rises from 0, so the first step moves nothing.
        warm = ((self.step - 1) / self.warmup).clamp(max=1) if self.warmup else 1.0
        torch._foreach_sub_(self.params, torch._foreach_mul(self.mu, self.lr * warm / unbias[0]))
        return nn.utils.get_total_norm(grads)

    def norms(self, values: tuple[Tensor, ...]) -> Tensor:
        """For each of `values`, the norm of the whole tensor that it belongs to."""
        squares = torch.stack(torch._foreach_norm(values)).square()
        sums = torch.zeros_like(squares).index_add_(0, self.tensor_of, squares)
        return sums[self.tensor_of].sqrt()

    def state_dict(self) -> dict:
        """LaProp's moments and counter."""
        return {"step": self.step, "nu": self.nu, "mu": self.mu}

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` gave. Learning rates stay those of this call's flags."""
        self.step.copy_(state["step"])
        for mine, saved in zip((*self.nu, *self.mu), (*state["nu"], *state["mu"]), strict=True):
            mine.copy_(saved)


class Agent(nn.Module):
    """World model, actor, critic and how they learn."""

    def __init__(self, args: Args, spec: EnvSpec, device: torch.device):
        super().__init__()
        self.args, self.spec, self.device, self.updates = args, spec, device, 0
        self.world_model = WorldModel(args, spec)
        feat_dim = self.world_model.feat_dim
        self.actor = Actor(args, spec, feat_dim)
        self.critic = Critic(args, feat_dim)
        self.slow_critic = Critic(args, feat_dim).requires_grad_(False)  # [V2-6]
        self.slow_critic.load_state_dict(self.critic.state_dict())
        self.return_scale = ReturnScale(args)  # [V3-5]
        self.to(device, memory_format=torch.channels_last)
        self.optimizer = Optimizer(self, args)
        self.bf16 = use_bf16(args.amp, device, args.units >= 256)
        if args.compile:
            rssm, networks = self.world_model.rssm, (Encoder, Head, Actor)
            compile_methods(rssm.obs_step, rssm.img_step, self.world_model.decoder.image,
                            *(x.forward for x in self.modules() if isinstance(x, networks)))
        if args.cuda_graph and device.type == "cuda":
            self.learn = CudaGraph(self.learn)

    def train_step(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """One update; returns scalar metrics, and deter and stoch (T, B, ...) of the batch."""
        metrics, deter, stoch = self.learn(batch)
        self.update_slow_critic()
        self.updates += 1
        return metrics, deter, stoch

    def learn(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """One step of everything, down one loss [R-13]. A CUDA graph records it: no value leaves
        the device. Imagination runs inside of the model as it was before the step."""
        args, model = self.args, self.world_model
        # World model
        with self.autocast():
            losses, deter, stoch, metrics = world_model_loss(model, batch, self.carry(batch), args)
            replay_value_dist = self.critic(torch.cat([deter, stoch], -1))

        # Imagination, from every posterior state
        with self.autocast():
            feat, action, raw = imagine(model, self.actor, deter.detach().flatten(0, 1),
                                        stoch.detach().flatten(0, 1), args.imag_horizon)
            value_dist = self.critic(feat)
            with torch.no_grad():
                reward = model.reward(feat[1:]).mean()  # (H, N)
                cont = model.cont(feat).mean()  # (H1, N)
                value = value_dist.mean()  # (H1, N)
                slow_value = self.slow_critic(feat[:-1]).mean()  # (H, N)

        # Returns. What follows from state t is r_{t+1}, c_{t+1} here; Eq. 7 writes r_t, c_t for it
        weight = cont[:-1].cumprod(0)  # (H, N) [V1-5]
        ret = lambda_return(reward, cont[1:], value[1:], args.return_lambda)  # (H, N) [V1-3] [V3-6]
        scale = metrics["imagined/return_scale"] = self.return_scale.update(ret)
        metrics["imagined/explained"] = 1 - (ret - value[:-1]).var() / ret.var().clamp(1e-8)

        # Actor and critic
        losses["actor"], metrics["actor/entropy"] = actor_loss(
            self.actor.policy(raw), action, ret, value[:-1], scale, weight, args)  # [V3-14]
        losses["critic"] = critic_loss(value_dist[:-1], ret, slow_value, weight, args)
        starts = batch.reward.shape
        losses["replay_critic"] = args.beta_replay * replay_critic_loss(
            replay_value_dist, batch, ret[0].view(starts), slow_value[0].view(starts), args)

        total = sum(loss.mean() for loss in losses.values())
        norm = self.optimizer.apply(self.optimizer.grads(total))
        metrics |= {f"loss/{name}": loss for name, loss in losses.items()} | {
            "loss/all": total, "grad_norm/all": norm, "imagined/return": ret,
            "imagined/value": value, "imagined/reward": reward}
        metrics = {name: values.detach().mean() for name, values in metrics.items()}
        return metrics, deter.detach(), stoch.detach()

    def carry(self, batch: Batch) -> State:
        """The state before row 0 of the windows. [R-15]"""
        if batch.deter is None:
            return self.zero_state(batch.reward.shape[1])
        return State(batch.deter[0], batch.stoch[0], batch.prev_action[0])

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """Move the slow critic towards the critic. [V2-6] [V3-6]"""
        slow, fast = list(self.slow_critic.parameters()), list(self.critic.parameters())
        torch._foreach_lerp_(slow, fast, 1 - self.args.critic_ema_decay)

    @torch.no_grad()
    def act(self, obs: EnvStep, state: State, sample: bool = True) -> State:
        """Take in one observation per environment and choose actions: the next state.

        `state` is the one before; `state.action` (P, A) led to this observation. `sample`: draw
        from the policy, else take its mode. At the end of an episode nothing is chosen: the action
        is zero.
        """
        image, vector, is_first, is_last = (
            None if array is None else on_device(torch.from_numpy(array)[None], self.device)
            for array in (obs.image, obs.vector, obs.is_first, obs.is_last))
        embed = self.world_model.encoder(centre(image), vector)
        deter, stoch, _ = self.world_model.rssm.observe(
            embed, state.action[None], is_first, state.deter, state.stoch)
        policy = self.actor.policy(self.actor(torch.cat([deter[0], stoch[0]], -1)))
        action = policy.sample() if sample else policy.mode()
        return State(deter[0], stoch[0], action * ~is_last[0, :, None])

    def zero_state(self, rows: int) -> State:
        """Zeros, with which a sequence begins. [R-6]"""
        return State(*(torch.zeros(rows, width, device=self.device) for width in (
            self.args.deter, self.args.stoch_dim, self.spec.action_dim)))

    def autocast(self) -> torch.autocast:
        """bfloat16 for matrix products and convolutions; parameters and losses stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def optimizers(self) -> dict[str, Optimizer]:
        """By name, for the checkpoint."""
        return {"all": self.optimizer}


# -------------------------------------------------------------------------------------- 10 dreaming
def decode(model: WorldModel, feat: Tensor) -> Tensor:
    """(T, B, F) -> images (T, B, I, I, C) uint8, or vectors (T, B, V) where there are no images."""
    if not hasattr(model.decoder, "cnn"):
        return symexp(model.decoder.vector(feat))
    return ((model.decoder.image(feat) + 0.5).clamp(0, 1) * 255).round().byte()


@torch.no_grad()
def open_loop(agent: Agent, batch: Batch, context: int,
              choose: Callable | None = None) -> dict[str, np.ndarray]:
    """What happened, what the model reconstructs, and what it imagines, for the first sequence.

    The model infers its state from the first `context` observations of the batch. From
    there on it is given the recorded actions and nothing else, up to the end of that episode; or,
    with B = 1, what `choose(picture, action)` makes of the imagined picture and the agent's own
    action; None ends it. Videos (T, I, I, C) uint8, or vectors (T, V) float32.
    """
    ends = batch.is_first[context:, 0].nonzero()
    length = context + int(ends[0]) if len(ends) else len(batch.reward)
    batch = Batch(*(x if x is None else on_device(x[:length], agent.device) for x in batch))
    model, carry = agent.world_model, agent.carry(batch)
    replay_deter, replay_stoch, _ = model.rssm.observe(
        model.encoder(centre(batch.image), batch.vector), previous_actions(batch, carry.action),
        batch.is_first, carry.deter, carry.stoch)
    feat = torch.cat([replay_deter, replay_stoch], -1)  # (T, B, F)

    imag_deter, imag_stoch = replay_deter[context - 1], replay_stoch[context - 1]
    imag_feat = [*feat[:context]]
    for action in batch.action[context - 1:-1]:
        if choose:
            own = agent.actor.policy(agent.actor(imag_feat[-1])).sample()
            action = choose(decode(model, imag_feat[-1][None])[0, 0].cpu().numpy(), own)
            if action is None:
                break
        imag_deter, imag_stoch = model.rssm.img_step(imag_deter, imag_stoch, action)
        imag_feat.append(torch.cat([imag_deter, imag_stoch], -1))

    seen = torch.stack(imag_feat)  # (T, B, F)
    truth = batch.vector if batch.image is None else batch.image
    series = (truth, decode(model, feat), decode(model, seen))
    names = ["what happened", "reconstruction", "imagination"]
    return {name: one[:len(seen), 0].cpu().numpy() for name, one in zip(names, series)}


# ------------------------------------------------------------------------------------- 11 main loop
def first_update(args: Args, ranks: int) -> int:
    """Timestep of the first update, when --learning-starts windows, at least one, can be drawn."""
    rows = args.batch_length + args.replay_context  # of a window
    return max(1, args.learning_starts) + args.num_envs * ranks * (rows - 1)


def updates_due(args: Args, step: int, done: int, ranks: int = 1) -> int:
    """Number of updates to make now, of `ranks` processes together; `done` were made before.

    Each collected timestep is replayed `train_ratio` times on average; --pretrain comes on top.
    """
    steps, replayed = step - first_update(args, ranks), args.batch_size * args.batch_length
    if steps < 0:
        return 0
    return args.pretrain + int(steps * args.train_ratio / replayed) - done


def train(args: Args, run_dir: Path | None = None) -> Path:
    """The whole run, or the rest of the one in `run_dir`; returns its directory."""
    with Run(SCRIPT, args, run_dir) as run:
        envs = Envs(replace(args.env_config, films=run.films), args.num_envs, run.seed)
        agent = Agent(args, envs.spec, run.device)
        latents = (args.deter, args.stoch_dim) if args.replay_context else None
        replay = run.open_replay(partial(ReplayBuffer, latents=latents), envs.spec, args.capacity)
        feeder = Feeder(replay, run.device, args.batch_size // run.ranks, args.batch_length)
        run.start(envs, agent, feeder, open_loop, first_update(args, run.ranks))

        obs, state, metrics = envs.reset(), agent.zero_state(args.num_envs), {}
        while run.step < args.total_timesteps and not run.stopping():
            state = agent.act(obs, state)  # act
            action = state.action.cpu().numpy()
            replay.add(obs, action, state)  # store
            run.step += args.num_envs * run.ranks
            due = updates_due(args, run.step, agent.updates, run.ranks) if feeder.ready() else 0
            for _ in range(due):
                batch = feeder.next()
                metrics, deter, stoch = agent.train_step(batch)  # train
                feeder.prepare()  # draw the next batch while a GPU works on this one
                replay.refresh(batch, deter, stoch)
                if run.stopping(metrics):
                    break
            run.log_and_save(obs, metrics)  # log
            obs = envs.step(action)  # step
        return run.dir


def main() -> None:
    """Train, resume, evaluate or dream; a mistake of the user gets one line and exit status 1."""
    with one_line_errors():
        args, run_dir = parse(Args, SCRIPT, __doc__.partition("\n")[0])
        if args.evaluate:
            evaluate(args, load_agent(Agent, args, run_dir), run_dir)
        elif args.dream:
            dream(args, load_agent(Agent, args, run_dir), run_dir, open_loop, to_batch)
        else:
            train(args, run_dir)


if __name__ == "__main__":
    main()
