"""DreamerV3: mastering diverse domains through world models (arXiv 2301.04104v1), in one file.

    python dreamer_v3.py --env-id MsPacmanNoFrameskip-v4      train (Atari-100k setting)
    python dreamer_v3.py --env-id CartPole-v1 --size XXS      any Gymnasium environment
    python dreamer_v3.py --resume RUN_DIR                     continue exactly where a run stopped
    python dreamer_v3.py --evaluate RUN_DIR                   play fresh episodes, print the returns
    python dreamer_v3.py --dream RUN_DIR                      happened | reconstructed | imagined
    torchrun --nproc-per-node 2 dreamer_v3.py --env-id ...    several GPUs

The agent learns a *world model* from replayed sequences. An *actor* and a *critic* then learn from
trajectories that they imagine in that model. One update (`Agent.train_step`):

    batch                 <- B windows of T consecutive rows of the replay buffer
    embed                 <- encoder(image, vector)
    deter, stoch          <- RSSM along time: posterior states, and the prior at each of them
    world model           learns to predict image, vector, reward, end, and its own next posterior
    feat, action          <- from each of the N = T * B posterior states, H steps of prior and actor
    reward, cont, value   <- heads and critic at the imagined states
    ret                   <- lambda-return, backwards along the imagined steps
    actor                 learns what leads to a higher return
    critic                learns to predict the return; a slow copy of it follows

One step of the RSSM. Training and acting take the posterior, imagination takes the prior:

    h_{t-1} --------------------------.
    z_{t-1} --.                       v
    a_{t-1} --+--> img_in -------> [ GRU ] ------> h_t --+--> img_out --> prior     p(z_t | h_t)
                                                         v
    x_t ----------> encoder ------> embed -----------> obs_out ------> posterior q(z_t | h_t, x_t)

Time alignment. A row of the replay buffer holds what is known when the action is chosen:

    time             t=0      t=1      t=2    ...   t=n (last)     | next episode
    observation      x0       x1       x2           xn             | x0'
    reward           0        r1       r2           rn             | 0        received WITH x_t
    is_first         1        0        0            0              | 1
    is_terminal      0        0        0            terminated?    | 0        not at a time limit
    action           a0       a1       a2           zeros          | a0'      chosen AT x_t

    replay      (h,z)_{t-1}, a_{t-1} -> h_t;   h_t -> prior p(z_t|h_t);   h_t, x_t -> posterior
                where is_first: (h,z)_{t-1} := the initial state, a_{t-1} := 0
                world-model loss: [t=0 ... t=T-1], every replayed step
    imagine     s_0 = a posterior state;   a_t ~ actor(s_t), s_{t+1} ~ prior       t = 0 ... H-1
                critic    [v_0 ... v_{H-1}]   v_H only bootstraps: R_H = v_H
                rewards   r_1 ... r_H  and  c_1 ... c_H  from the states 1 ... H
                actor     [a_0 ... a_{H-1}]   each judged by R_t, the return of its own state
                weights   w_t = gamma^t c_0 c_1 ... c_t     with c_0 the recorded 1 - is_terminal
                target    R_t = r_{t+1} + gamma c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1})

Symbols (paper -> code), and the sizes that the shape comments name, time-major
    x_t  image, vector    h_t  deter    z_t  stoch    s_t  feat = [deter, stoch]
    a_t  action           r_t  reward   c_t  cont     R^lambda_t  ret      v_t  value
    gamma  args.gamma     lambda  args.return_lambda        eta  args.actor_entropy
    v'_t  slow_value      sg()  .detach()    q(z|h,x)  post    p(z|h)  prior
    Dimension key
    T  replay time, 64     B  batch, 16     N = T * B  imagination starts, 1024     (size S, Atari)
    H  imagination horizon, 15     H1  H + 1     G  H - 1     A  action, 9     P  environments, 1
    E  embedding, 4096     D  deterministic state, 512     S, K  latents and classes, 32 each
    Z = S * K  stochastic state, 1024     F = D + Z  feature, 1536     U  hidden units, 512
    M  two-hot buckets, 255     V  vector observation     I, I, C  image, 64 64 3
    Equations of the paper stand where they are computed ("Eq. 7"); Eq. 2, symlog and symexp, is in
    common/maths.py.

What changed since DreamerV2 (each tag stands where the change happens), and what it is good for.
From the paper:
    [V3-1]  symlog squashes vector inputs and targets, rewards and returns, Eq. 1-2. Else large
            numbers drown the other losses; V2 squashed rewards by tanh, which hides large rewards.
    [V3-2]  KL as dynamics (0.5) and representation (0.1) loss, free bits of 1 nat for each state,
            Eq. 5. V2 needed another KL scale for each domain; without free bits codes collapse.
    [V3-3]  1% uniform mixture in latents and discrete policy: no KL or log-probability explodes.
    [V3-4]  reward head and critic predict a two-hot distribution over 255 symlog buckets, Eq. 8-10.
            A squared error follows rare large returns too slowly, or diverges.
    [V3-5]  returns are divided by their 5-95 percentile range, if above 1, Eq. 11-12. Without it
            the entropy scale must be tuned to the size of each task's rewards.
    [V3-6]  targets come from the critic itself (and so does the baseline: code); its slow copy, an
            average, regularises it. V2 took both from a copy that is up to 100 updates old.
    [V3-7]  the continue head, in every domain, predicts whether the episode goes on: its target has
            no gamma in it.
    [V3-8]  SiLU and LayerNorm everywhere (code: no bias before a norm): a rate for all sizes.
    [V3-9]  the output layers of reward head and critic start at zero. Random first returns would
            teach the actor nonsense.
    [V3-10] no weight decay, other rates and clips (code: epsilon after unbiasing).
    One setting for all domains (V2: TASKS).
From the authors' code only:
    [V3-11] learned initial state (V2: zeros).
    [V3-12] convolutions with kernels of 4x4 (paper: 3x3) and "same" padding, down to an image of
            4x4 pixels; initialisers.
    [V3-13] squared errors of image and vector without the factor 1/2 of a normal distribution.
    [V3-14] H terms in the actor's loss: an action is judged by the return of the state where it is
            chosen (V2: H - 1, by that of the state it leads to); terminal starts weigh zero.
    [V3-15] continuous actions from a normal (V2: truncated), clipped for model and environment.
Tags [V1-n] and [V2-n] are explained in dreamer_v1.py and dreamer_v2.py.

Deviation (from the authors' code, danijar/dreamerv3 8fa35f8 of June 2023)
    * A time limit is not a terminal, on Atari too: their wrapper treats them alike.
    * bfloat16 is the default where the hardware supports it, from 256 --units on. Their Atari-100k
      setting computes in float32 (`--amp off`), others in float16 with loss scaling. State and
      acting stay in float32.
    * We do not draw the prior sample that their replay loop draws and never uses.
    * log1p(|x|) for ln(|x| + 1), torch's variance for E[x^2] - E[x]^2 in LayerNorm: less rounding.
    * One environment (theirs: 4 for control); 100,000 decisions on Atari, which is the benchmark's
      number (theirs: 150,000); 1 to 30 no-ops at the start of a game (theirs: 0 to 29).
    * Evaluation samples by default as theirs does; --eval-greedy takes the most likely action. It
      is a command of its own (theirs evaluates while it trains).
    * --size XXS is ours, for laptops; few of its numbers are the paper's. Two of its choices are
      those of their code of 2024: REINFORCE for continuous actions, too, and imagined steps weighed
      by the probability that the episode goes on (--cont-mean).
"""

# ---------------------------------------------------------------------------------------- 1 imports
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
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
SIZES = {  # of the paper; XXS is ours, and benchmarks/results/laptop/preset.md says why it is so
    "XXS": dict(
        deter=128, hidden=128, units=128, layers=1, depth=8, mlp_units=512, mlp_layers=2, stoch=16,
        classes=16, bins=63, batch_length=16, train_ratio=64.0, model_lr=5e-4, actor_lr=3e-4,
        critic_lr=5e-4, gamma=0.99, beta_pred=5.0, actor_grad="reinforce", cont_mean=True,
        actor_entropy=3e-3),
    "XS": dict(deter=256, hidden=256, units=256, layers=1, depth=24),
    "S": {},
    "M": dict(deter=1024, hidden=640, units=640, layers=3, depth=48),
    "L": dict(deter=2048, hidden=768, units=768, layers=4, depth=64),
    "XL": dict(deter=4096, hidden=1024, units=1024, layers=5, depth=96),
}


@dataclass(frozen=True)
class Settings:
    """Every setting of the algorithm; a resume keeps all but the rates and the length."""

    env_id: str = "MsPacmanNoFrameskip-v4"  # Any Gymnasium id; `module:Id-v0` imports your own
    total_timesteps: int = 100_000  # Decisions of the agent; frames = these x action repeat
    size: Literal["XXS", "XS", "S", "M", "L", "XL"] = "S"  # Preset; XXS is for laptops
    num_envs: int = 1  # Environments, each in a process of its own; per torchrun process
    action_repeat: int = 1  # Times that an action is repeated (Atari: 4, DeepMind Control: 2)
    pixels: bool = False  # Observe the rendered picture instead of what the environment gives
    image_size: int = 64  # Images are resized to this height and width: a power of two, at least 8
    grayscale: bool = False  # Images in shades of grey
    sticky: float = 0.0  # Atari: chance that the last action is repeated
    clip_rewards: Literal["none", "tanh", "clip"] = "none"  # How rewards are squashed

    train_ratio: float = 1024.0  # Replayed timesteps per collected one
    batch_size: int = 16  # Sequences per batch, B
    batch_length: int = 64  # Timesteps per sequence, T
    learning_starts: int = 1024  # Random actions until so many (overlapping) windows fit
    buffer_size: int = 1_000_000  # Replay capacity in timesteps, first in, first out
    pretrain: int = 1  # Updates that are made at once when training begins

    bins: int = 255  # Two-hot buckets, on [-20, 20] in symlog space
    deter: int = 512  # GRU recurrent units, size of h_t
    hidden: int = 512  # Hidden units inside the RSSM
    depth: int = 32  # CNN multiplier: channels of the first stage
    mlp_units: int = 1024  # Units of vector en- and decoder (authors' code)
    mlp_layers: int = 5  # Layers of vector en- and decoder (authors' code)
    units: int = 512  # Dense hidden units of the heads
    layers: int = 2  # MLP layers of the heads
    stoch: int = 32  # Number of latents that make up z_t
    classes: int = 32  # Classes of each of them

    model_lr: float = 1e-4  # Learning rate of the world model
    model_eps: float = 1e-8  # Adam epsilon
    model_clip: float = 1000.0  # Gradient clipping by global norm
    unimix: float = 0.01  # Share of the uniform distribution in latents and discrete policy
    beta_pred: float = 1.0  # Scale of image, vector, reward and continue loss
    beta_dyn: float = 0.5  # Scale of the dynamics loss
    beta_rep: float = 0.1  # Scale of the representation loss
    free_bits: float = 1.0  # Nats below which a KL loss is not pushed any further

    imag_horizon: int = 15  # Imagination horizon, H
    gamma: float = 1 - 1 / 333  # Discount factor
    return_lambda: float = 0.95  # Return lambda
    actor_lr: float = 3e-5  # Learning rate of the actor
    actor_eps: float = 1e-5  # Adam epsilon of the actor
    actor_clip: float = 100.0  # Gradient clipping of the actor
    actor_entropy: float = 3e-4  # eta, scale of the entropy bonus
    actor_grad: Literal["auto", "reinforce", "dynamics"] = "auto"  # auto: reinforce if one-hot
    actor_min_std: float = 0.1  # Smallest deviation of a continuous action
    actor_max_std: float = 1.0  # Largest deviation of a continuous action
    cont_mean: bool = False  # Imagined c_t is a probability; else 1 or 0, the likelier one
    critic_lr: float = 3e-5  # Learning rate of the critic
    critic_eps: float = 1e-5  # Adam epsilon of the critic
    critic_clip: float = 100.0  # Gradient clipping of the critic
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

        Raises `UserError`, one line, for a value that cannot work.
        """
        self.fill(TASKS, SIZES, flags)
        self.check(may_be_zero={"learning_starts", "pretrain"}, shares={
            "sticky", "unimix", "gamma", "return_lambda", "critic_ema_decay", "return_norm_decay"})
        if not self.return_norm_low <= self.return_norm_high <= 100:
            raise UserError("--return-norm-low and -high are percentiles, the lower one first")
        if self.image_size < 8 or self.image_size & (self.image_size - 1):
            raise UserError(f"--image-size is {self.image_size}; use 8, 16, 32, 64, 128, ...")
        if min(self.bins, self.batch_length) < 2:
            raise UserError("--bins and --batch-length start at 2")

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


class ReplayBuffer:
    """One ring of rows per environment, in memory-mapped files that outlive the process.

    Rows are numbered from the start of the run. A window of consecutive rows may be sampled if all
    of them are still there: it can cross the end of an episode (is_first marks the seam) but never
    the write position.
    """

    def __init__(self, folder: Path, spec: EnvSpec, capacity: int, num_envs: int, seed: int):
        """Open the rings in `folder`, or make them. `UserError`: a full disk, or others' files."""
        layout = {"action": (np.float32, (spec.action_dim,)), "reward": (np.float32, ()),
                  "is_first": (np.bool_, ()), "is_terminal": (np.bool_, ())}
        if spec.image_shape:
            layout["image"] = (np.uint8, spec.image_shape)
        if spec.vector_dim:
            layout["vector"] = (np.float32, (spec.vector_dim,))
        self.rings = Rings(folder, layout, capacity, num_envs)
        self.rng = np.random.default_rng(seed)

    def windows(self, length: int) -> int:
        """Number of valid starts of a window of `length` rows in one ring."""
        return max(0, self.rings.count - self.rings.oldest - length + 1)

    def add(self, obs: EnvStep, action: np.ndarray) -> None:
        """Append one row per environment: `obs` and the action (P, A) chosen at it."""
        self.rings.append(obs._asdict() | {"action": action})

    def sample(self, batch_size: int, length: int, rng: np.random.Generator) -> Batch:
        """Draw windows, uniformly over all valid starts, as a time-major `Batch` on the CPU."""
        env = rng.integers(self.rings.num_envs, size=batch_size)
        start = self.rings.oldest + rng.integers(self.windows(length), size=batch_size)
        rows = self.rings.read(env, start + np.arange(length)[:, None])
        rows["is_first"][0] = True  # the state before a window is unknown: start it afresh
        return to_batch(rows)

    def state_dict(self) -> dict:
        """What the checkpoint must hold to make sense of the files."""
        return {"count": self.rings.count, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        """Go back to a checkpoint: later rows are forgotten, and so are those they replaced."""
        self.rings.roll_back(state["count"])
        self.rng.bit_generator.state = state["rng"]


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

    def mode(self) -> Tensor:
        """1 where the flag is more likely than not, else 0 (...), without gradient. [V3-7]"""
        return (self.logit > 0).float()


class TwoHot:
    """Distribution of a number over buckets that are evenly spaced in symlog space. [V3-4]"""

    def __init__(self, logits: Tensor):
        """`logits` (..., M), one for each bucket between symlog values -20 and 20."""
        self.logits = logits
        self.buckets = torch.linspace(-20, 20, logits.shape[-1], device=logits.device)

    @cached_property
    def normaliser(self) -> Tensor:
        """ln sum_i exp(logits_i) (...), once for both targets of the critic."""
        return self.logits.logsumexp(-1)

    def mean(self) -> Tensor:
        """symexp(sum_i p_i b_i) (...), Eq. 8: the mean in symlog space, then transformed."""
        with torch.autocast(self.logits.device.type, enabled=False):  # bfloat16 is too coarse
            return symexp(self.logits.softmax(-1) @ self.buckets)

    def log_prob(self, value: Tensor) -> Tensor:
        """sum_i twohot(symlog(value))_i ln p_i (...), Eq. 9.

        The weight is split between the two neighbouring buckets, more for the nearer one; a value
        out of range puts all of it on the end bucket. Both weights sum to 1, so the normaliser of
        ln p_i = logits_i - normaliser is subtracted once.
        """
        last = len(self.buckets) - 1
        target = symlog(value).clamp(self.buckets[0], self.buckets[last])
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
    """a / max(1, |a|): the value of clipping to [-1, 1], with gradient 1 / max(1, |a|). [V3-15]

    From the authors' code: the environment clips actions, the replay holds them as drawn, so the
    model must clip, too. A plain clip has no gradient outside of the bounds to bring them back.
    """
    return action / action.detach().abs().clamp(min=1)


# ------------------------------------------------------------------------ 5 encoder, decoder, heads
def init_hidden(layer: nn.Module) -> nn.Module:
    """Truncated normal of variance 2 / (fan in + fan out), cut at two sigma. [V3-12]

    From the authors' code, for a layer with a norm behind it; the others have `init_output`.
    0.8796 is the standard deviation that is left after the cut.
    """
    # A weight is (out, in) or (out, in, height, width): both fans count the kernel's area.
    fans = sum(layer.weight.shape[:2]) * layer.weight[0, 0].numel()
    std = math.sqrt(2 / fans) / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    return layer


def init_output(layer: nn.Module) -> nn.Module:
    """Glorot uniform weights, zero biases. Gives the layer back."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Norm(nn.LayerNorm):
    """LayerNorm over the last dimension, in float32; the result has the type of the input."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape and type."""
        return super().forward(x).to(x.dtype)


class Linear(nn.Linear):
    """Linear layer with the initialisation of the authors' code."""

    def reset_parameters(self) -> None:
        """Called by `nn.Linear.__init__`."""
        init_output(self)


class Dense(Linear):
    """Linear without bias -> LayerNorm -> SiLU, the hidden layer of every network. [V3-8]"""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.norm = Norm(outputs)

    def reset_parameters(self) -> None:
        """Called by `nn.Linear.__init__`."""
        init_hidden(self)

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
            stages = int(math.log2(args.image_size // 4))  # each halves the image, down to 4 x 4
            widths = [spec.image_shape[-1]] + [args.depth * 2**i for i in range(stages)]
            for inputs, outputs in zip(widths, widths[1:]):  # [V3-12]
                conv = init_hidden(nn.Conv2d(inputs, outputs, 4, 2, padding=1, bias=False))
                self.cnn.extend([conv, ChannelNorm(outputs), nn.SiLU()])
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
        return torch.cat(parts, -1)


class Decoder(nn.Module):
    """Feature -> image and/or vector."""

    def __init__(self, args: Args, spec: EnvSpec, feat_dim: int):
        super().__init__()
        if spec.image_shape:
            self.cnn, self.start = nn.Sequential(), 4  # from 4 x 4 pixels
            stages = int(math.log2(args.image_size // 4))
            widths = [args.depth * 2**i for i in reversed(range(stages))] + [spec.image_shape[-1]]
            for inputs, outputs in zip(widths[:-1], widths[1:-1]):  # [V3-12]
                conv = init_hidden(nn.ConvTranspose2d(inputs, outputs, 4, 2, padding=1, bias=False))
                self.cnn.extend([conv, ChannelNorm(outputs), nn.SiLU()])
            self.cnn.append(init_output(nn.ConvTranspose2d(*widths[-2:], 4, stride=2, padding=1)))
            self.cnn_in = Linear(feat_dim, self.start**2 * widths[0])
        if spec.vector_dim:
            self.vector_head = Head(feat_dim, args.mlp_units, args.mlp_layers, spec.vector_dim)

    def image(self, feat: Tensor) -> Tensor:
        """(T, B, F) -> mean image (T, B, I, I, C), in float32; the targets lie in [-0.5, 0.5]."""
        grid = self.cnn_in(feat).reshape(-1, self.start, self.start, self.cnn[0].in_channels)
        pixels = self.cnn(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return pixels.reshape(*feat.shape[:-1], *pixels.shape[1:]).float()

    def vector(self, feat: Tensor) -> Tensor:
        """(T, B, F) -> vector (T, B, V) as its loss sees it, in float32."""
        return self.vector_head(feat)


# ------------------------------------------------------------------------------------------- 6 RSSM
class State(NamedTuple):
    """Recurrent state of the model, and the action chosen there, which leads to the next one."""

    deter: Tensor  # (B, D) h_t
    stoch: Tensor  # (B, Z) z_t
    action: Tensor  # (B, A)


class NormGRUCell(nn.Module):
    """GRU with one LayerNorm over its three gates, from the authors' code. [V2-3]

        r, c, u = split(norm(W [h, x]))
        c' = tanh(sigmoid(r) c);   u' = sigmoid(u - 1);   h' = u' c' + (1 - u') h
    """

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.norm = Norm(3 * units)
        self.linear = init_hidden(nn.Linear(units + inputs, 3 * units, bias=False))  # [V3-8]

    def forward(self, x: Tensor, deter: Tensor) -> Tensor:
        """(B, U) and h_{t-1} (B, D) -> h_t (B, D), in float32."""
        parts = self.norm(self.linear(torch.cat([deter, x.to(deter.dtype)], -1))).float()
        reset, cand, update = parts.chunk(3, -1)
        # The -1 makes the state change slowly at first.
        return deter.lerp(torch.tanh(reset.sigmoid() * cand), (update - 1).sigmoid())


class RSSM(nn.Module):
    """Recurrent state-space model: the recurrence, the prior and the posterior. Eq. 3

    The authors' names: `img_` is imagination, not image; `obs_` sees the observation, too.
    """

    def __init__(self, args: Args, action_dim: int, embed_dim: int):
        super().__init__()
        self.img_in = SplitDense(args.stoch_dim, action_dim, args.hidden)
        self.img_out = Dense(args.deter, args.hidden)
        self.obs_out = SplitDense(args.deter, embed_dim, args.hidden)
        self.gru = NormGRUCell(args.hidden, args.deter)  # [V2-3]
        self.img_stats = Linear(args.hidden, args.stoch_dim)
        self.obs_stats = Linear(args.hidden, args.stoch_dim)
        self.groups, self.unimix = args.stoch, args.unimix
        self.initial = nn.Parameter(torch.zeros(args.deter))  # [V3-11]

    def initial_state(self) -> tuple[Tensor, Tensor]:
        """deter (D,) = tanh(learned vector) and stoch (Z,) = mode of the prior there. [V3-11]"""
        deter = self.initial.tanh()
        return deter, self.prior(deter).mode()

    def project_action(self, action: Tensor) -> Tensor:
        """What an action (..., A) adds to the product of `img_in` (..., U)."""
        return self.img_in.project(within_unit(action))  # [V3-15]

    def latent(self, raw: Tensor) -> Latent:
        """Raw statistics from the last layer -> distribution of z_t."""
        return Latent(raw, self.groups, self.unimix)  # [V2-1] [V3-3]

    def prior(self, deter: Tensor) -> Latent:
        """p(z_t | h_t), from h_t (..., D)."""
        return self.latent(self.img_stats(self.img_out(deter)))

    def img_step(self, deter: Tensor, stoch: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """One imagined step: h (N, D), z (N, Z), a (N, A) -> next h (N, D), z ~ prior (N, Z)."""
        # img_in([z, a]) = silu(norm(W_z z + W_a a)), and project_action gives W_a a
        x = self.img_in(stoch, self.project_action(action))  # (N, U)
        next_deter = self.gru(x, deter)  # (N, D)
        return next_deter, self.prior(next_deter).sample()

    def obs_step(self, deter: Tensor, stoch: Tensor, action_in: Tensor,
                 embed_in: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One observed step: h (B, D), z (B, Z) -> next h (B, D), z ~ posterior (B, Z), and its
        raw statistics. `action_in`, `embed_in` (B, U): what both add to the two products.
        """
        x = self.img_in(stoch, action_in)  # (B, U)
        next_deter = self.gru(x, deter)  # (B, D)
        raw = self.obs_stats(self.obs_out(next_deter, embed_in))
        return next_deter, self.latent(raw).sample(), raw

    def observe(self, embed: Tensor, prev_action: Tensor, is_first: Tensor, deter: Tensor,
                stoch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Infer the states of a sequence from its embeddings and the actions that led to them.

        `embed` (T, B, E), `prev_action` (T, B, A); `deter` (B, D) and `stoch` (B, Z) before that.
        Where `is_first` (T, B), an episode begins: with the initial state and a zero action. What
        does not depend on the previous state is computed for all T at once, so that the loop holds
        the recurrence alone. Returns deter (T, B, D), stoch (T, B, Z), and raw statistics.
        """
        first_deter, first_stoch = self.initial_state()
        action_in = self.project_action(prev_action * ~is_first[..., None])  # (T, B, U)
        embed_in = self.obs_out.project(embed)  # (T, B, U)
        deters, stochs, raws = [], [], []
        for first, action_t, embed_t in zip(is_first[..., None], action_in, embed_in):
            deter = torch.where(first, first_deter, deter)
            stoch = torch.where(first, first_stoch, stoch)
            deter, stoch, raw = self.obs_step(deter, stoch, action_t, embed_t)
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
        self.cont_head = Head(feat_dim, args.units, args.layers, 1)
        self.reward_head = Head(feat_dim, args.units, args.layers, args.bins)
        nn.init.zeros_(self.reward_head.out.weight)  # [V3-9]

    def reward(self, feat: Tensor) -> TwoHot:
        """(..., F) -> distribution of the reward (...) received with that state. [V3-4]"""
        return TwoHot(self.reward_head(feat))

    def cont(self, feat: Tensor) -> Bernoulli:
        """(..., F) -> distribution of "the episode goes on" (...), without gamma. [V3-7]"""
        return Bernoulli(self.cont_head(feat).squeeze(-1))


# ------------------------------------------------------------------------------- 7 actor and critic
class Actor(nn.Module):
    """Feature -> policy pi(a_t | s_t), Eq. 6."""

    def __init__(self, args: Args, spec: EnvSpec, feat_dim: int):
        super().__init__()
        self.discrete = spec.discrete
        self.head = Head(feat_dim, args.units, args.layers, spec.action_dim)
        if not spec.discrete:
            self.std = Linear(args.units, spec.action_dim)  # [V2-11]
        # Whether the gradient comes back through the dynamics, not from REINFORCE. [V2-4]
        self.dynamics = {"auto": not spec.discrete, "reinforce": False,
                         "dynamics": True}[args.actor_grad]
        self.min_std, self.max_std = args.actor_min_std, args.actor_max_std
        self.unimix = args.unimix

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

    reward = {"none": batch.reward, "tanh": batch.reward.tanh(),
              "clip": batch.reward.clamp(-1, 1)}[args.clip_rewards]  # (T, B)
    losses, metrics = {}, {"latent/post_entropy": post.entropy(),
                           "latent/prior_entropy": prior.entropy()}
    if image is not None:  # [V3-13]
        squared = F.mse_loss(model.decoder.image(feat), image, reduction="none")  # (T, B, I, I, C)
        losses["image"] = args.beta_pred * squared.sum((-3, -2, -1))
    if batch.vector is not None:  # [V3-1] Eq. 1  [V3-13]
        error = (model.decoder.vector(feat) - symlog(batch.vector)).square()  # (T, B, V)
        close = error < 1e-8  # the authors' code counts this as no error
        losses["vector"] = args.beta_pred * error.masked_fill(close, 0).sum(-1)
    losses["reward"] = -args.beta_pred * model.reward(feat).log_prob(reward)
    going_on = (~batch.is_terminal).float()  # (T, B) [V3-7]
    losses["cont"] = -args.beta_pred * model.cont(feat).log_prob(going_on)
    # [V3-2] Both have the same value; they differ in which side learns.
    kl_dyn, kl_rep = post.detach().kl(prior), post.kl(prior.detach())
    losses["dyn"] = args.beta_dyn * kl_dyn.clamp(min=args.free_bits)
    losses["rep"] = args.beta_rep * kl_rep.clamp(min=args.free_bits)
    metrics["latent/kl"] = kl_dyn
    return losses, deter.detach(), stoch.detach(), metrics


def imagine(model: WorldModel, actor: Actor, deter: Tensor, stoch: Tensor,
            horizon: int) -> tuple[Tensor, Tensor, Tensor]:
    """Follow actor and prior for `horizon` steps from deter (N, D) and stoch (N, Z). [V1-1]
    Returns features (H1, N, F), the starts included, actions (H, N, A) and the actor's outputs
    (H, N, A or 2A), from which the losses rebuild the policy without running the actor again.

    REINFORCE needs no gradient of the dynamics at all [V2-4]. The actor always sees detached
    features: its gradient comes through ln pi, or through its actions.
    """
    feats, actions, raws = [torch.cat([deter, stoch], -1)], [], []
    for _ in range(horizon):
        raws.append(actor(feats[-1].detach()))
        with torch.set_grad_enabled(actor.dynamics):
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
               scale: Tensor, weight: Tensor, dynamics: bool,
               args: Args) -> tuple[Tensor, Tensor]:
    """Loss of the actor as a scalar, and the policy's entropy (H, N). Eq. 11, with
        REINFORCE   L = -mean w_t ( ln pi(a_t|s_t) sg(A_t) + eta H[pi(.|s_t)] )
        dynamics    L = -mean w_t (                   A_t  + eta H[pi(.|s_t)] )
    and A_t = (R_t - v_t) / max(1, range), where the paper writes S for the range of the returns.
    Weights w_t and baseline v_t are in the authors' code only. Through the dynamics the gradient
    passes reward, value and baseline. `ret`, `baseline` and `weight` are (H, N).
    """
    objective = (ret - baseline) / scale  # (H, N) [V1-2] [V3-5]
    if not dynamics:  # [V2-4]
        objective = policy.log_prob(action.detach()) * objective.detach()  # (H, N)
    entropy = policy.entropy()  # [V2-5]
    return -(weight * (objective + args.actor_entropy * entropy)).mean(), entropy


def critic_loss(value_dist: TwoHot, ret: Tensor, slow_value: Tensor, weight: Tensor,
                args: Args) -> Tensor:
    """Loss of the critic as a scalar, Eq. 10, and the pull towards its slow copy. [V3-6]
        L = -mean w_t ( ln p(R_t|s_t) + regularizer ln p(v'_t|s_t) )
    v' is the mean of the slow critic. Only the authors' code has the weights w_t. All are (H, N).
    """
    log_prob = value_dist.log_prob(ret.detach())  # (H, N)
    log_prob_slow = value_dist.log_prob(slow_value)  # (H, N)
    return -(weight * (log_prob + args.critic_ema_regularizer * log_prob_slow)).mean()


# ------------------------------------------------------------------------------------------ 9 agent
class Optimizer:
    """Adam, on gradients clipped by their global norm."""

    def __init__(self, module: nn.Module, lr: float, eps: float, clip: float):
        self.params, self.clip = list(module.parameters()), clip
        self.adam = torch.optim.Adam(self.params, lr, eps=eps, fused=True,
                                     capturable=self.params[0].is_cuda)  # for a CUDA graph

    def grads(self, loss: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        """Gradients of a scalar loss for these parameters alone, also through other networks."""
        grads = torch.autograd.grad(loss, self.params, retain_graph=retain_graph)
        average_over_ranks(grads)
        return grads

    @torch.no_grad()
    def apply(self, grads: tuple[Tensor, ...]) -> Tensor:
        """Take one step; returns the global norm of the gradients before clipping."""
        norm = nn.utils.get_total_norm(grads)
        clipped = torch._foreach_mul(grads, self.clip / norm.clamp(min=self.clip))
        # Textbook Adam, without weight decay. [V3-10]
        for param, grad in zip(self.params, clipped):
            param.grad = grad
        self.adam.step()
        self.adam.zero_grad()  # frees them
        return norm

    def state_dict(self) -> dict:
        """Adam's moments and counter."""
        return self.adam.state_dict()["state"]

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` gave. Learning rates stay those of this call's flags."""
        self.adam.load_state_dict(self.adam.state_dict() | {"state": state})


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
        self.return_scale = ReturnScale(args)  # [V3-5]
        self.to(device, memory_format=torch.channels_last)
        self.model_opt = Optimizer(self.world_model, args.model_lr, args.model_eps, args.model_clip)
        self.actor_opt = Optimizer(self.actor, args.actor_lr, args.actor_eps, args.actor_clip)
        self.critic_opt = Optimizer(self.critic, args.critic_lr, args.critic_eps, args.critic_clip)
        self.bf16 = use_bf16(args.amp, device, args.units >= 256)
        if args.compile:
            rssm, networks = self.world_model.rssm, (Encoder, Head, Actor)
            compile_methods(rssm.obs_step, rssm.img_step, self.world_model.decoder.image,
                            *(x.forward for x in self.modules() if isinstance(x, networks)))
        if args.cuda_graph and device.type == "cuda":
            self.learn = CudaGraph(self.learn)

    def train_step(self, batch: Batch, carry: State) -> dict[str, Tensor]:
        """One update; returns scalar metrics. `carry` is the state before row 0: in training it has
        no effect, because row 0 of every window is marked is_first; parity and tests set it."""
        metrics = self.learn(batch, carry)
        self.update_slow_critic()
        self.updates += 1
        return metrics

    def learn(self, batch: Batch, carry: State) -> dict[str, Tensor]:
        """A step of world model, actor and critic, all on the device: a CUDA graph records it.

        The order is the authors': the world model first, then imagination inside of the *new*
        model, from the posterior states that the *old* one inferred. [V2-10]
        """
        args, model = self.args, self.world_model
        # World model
        with self.autocast():
            losses, deter, stoch, metrics = world_model_loss(model, batch, carry, args)
        loss_model = sum(loss.mean() for loss in losses.values())  # Eq. 4
        model_norm = self.model_opt.apply(self.model_opt.grads(loss_model))  # [V2-10]

        # Imagination, from every posterior state
        with self.autocast():
            feat, action, raw = imagine(model, self.actor, deter.flatten(0, 1),
                                        stoch.flatten(0, 1), args.imag_horizon)
            with torch.set_grad_enabled(self.actor.dynamics):
                reward = model.reward(feat[1:]).mean()  # (H, N)
            value_dist = self.critic(feat)
            value = value_dist.mean()  # (H1, N)
            with torch.no_grad():
                cont_dist = model.cont(feat[1:])  # [V3-7]
                cont = cont_dist.mean() if args.cont_mean else cont_dist.mode()  # (H, N)
                slow_value = self.slow_critic(feat[:-1]).mean()  # (H, N)

        # Returns. What follows from state t is r_{t+1}, c_{t+1} here; Eq. 7 writes r_t, c_t for it
        #     alive      c_0         0 if the start is a terminal
        #     discount   gamma c_1,  gamma c_2,    ...  gamma c_H
        #     weight     c_0,        gamma c_0 c_1, ...  gamma^(H-1) c_0 ... c_{H-1}
        alive = (~batch.is_terminal).float().flatten()  # (N,) [V2-7] [V3-14]
        discount = args.gamma * cont  # (H, N)
        weight = torch.cat([alive[None], discount[:-1]]).cumprod(0)  # (H, N) [V1-5]
        ret = lambda_return(reward, discount, value[1:], args.return_lambda)  # (H, N) [V1-3] [V3-6]
        scale = metrics["imagined/return_scale"] = self.return_scale.update(ret)
        metrics["imagined/explained"] = 1 - (ret - value[:-1]).var() / ret.var().clamp(1e-8)

        # Actor and critic
        loss_actor, entropy = actor_loss(self.actor.policy(raw), action, ret, value[:-1], scale,
                                         weight, self.actor.dynamics, args)  # [V3-14]
        loss_critic = critic_loss(value_dist[:-1], ret, slow_value, weight, args)
        metrics["actor/entropy"] = entropy
        # Through the dynamics, the actor's loss needs the critic's graph, too.
        actor_grads = self.actor_opt.grads(loss_actor, retain_graph=self.actor.dynamics)
        critic_grads = self.critic_opt.grads(loss_critic)
        actor_norm, critic_norm = (self.actor_opt.apply(actor_grads),
                                   self.critic_opt.apply(critic_grads))

        metrics |= {f"loss/{name}": loss for name, loss in losses.items()} | {
            "loss/model": loss_model, "loss/actor": loss_actor, "loss/critic": loss_critic,
            "grad_norm/model": model_norm, "grad_norm/actor": actor_norm,
            "grad_norm/critic": critic_norm, "imagined/return": ret, "imagined/value": value,
            "imagined/reward": reward}
        return {name: values.detach().mean() for name, values in metrics.items()}

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """Move the slow critic towards the critic; the first time, all the way. [V2-6] [V3-6]"""
        rate = 1.0 if self.updates == 0 else 1 - self.args.critic_ema_decay
        slow, fast = list(self.slow_critic.parameters()), list(self.critic.parameters())
        torch._foreach_lerp_(slow, fast, rate)

    @torch.no_grad()
    def act(self, obs: EnvStep, state: State, sample: bool = True, random: bool = False) -> State:
        """Take in one observation per environment and choose actions: the next state.

        `state` is the one before; `state.action` (P, A) led to this observation. `sample`: draw
        from the policy, else take its mode. `random`: uniformly random actions. At the end of an
        episode nothing is chosen: the action is zero.
        """
        image, vector, is_first, is_last = (
            None if array is None else on_device(torch.from_numpy(array)[None], self.device)
            for array in (obs.image, obs.vector, obs.is_first, obs.is_last))
        embed = self.world_model.encoder(centre(image), vector)
        deter, stoch, _ = self.world_model.rssm.observe(
            embed, state.action[None], is_first, state.deter, state.stoch)
        policy = self.actor.policy(self.actor(torch.cat([deter[0], stoch[0]], -1)))
        action = policy.sample() if sample else policy.mode()
        if random:
            action = random_actions(action, self.spec.discrete)
        return State(deter[0], stoch[0], action * ~is_last[0, :, None])

    def zero_state(self, rows: int) -> State:
        """Zeros; a sequence begins with is_first, where the RSSM puts its own initial state."""
        return State(*(torch.zeros(rows, width, device=self.device) for width in (
            self.args.deter, self.args.stoch_dim, self.spec.action_dim)))

    def autocast(self) -> torch.autocast:
        """bfloat16 for matrix products and convolutions; parameters and losses stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def optimizers(self) -> dict[str, Optimizer]:
        """By name, for the checkpoint."""
        return {"model": self.model_opt, "actor": self.actor_opt, "critic": self.critic_opt}


def random_actions(like: Tensor, discrete: bool) -> Tensor:
    """Uniformly random actions (P, A), shaped as `like`: one-hot, or within [-1, 1]."""
    noise = torch.rand_like(like)
    return F.one_hot(noise.argmax(-1), like.shape[-1]).float() if discrete else 2 * noise - 1


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

    The model infers its state from the first `context` observations of `batch` (T, B, ...). From
    there on it is given the recorded actions and nothing else, up to the end of that episode; or,
    with B = 1, what `choose(picture, action)` makes of the imagined picture and the agent's own
    action; None ends it. Videos (T, I, I, C) uint8, or vectors (T, V) float32.
    """
    ends = batch.is_first[context:, 0].nonzero()
    length = context + int(ends[0]) if len(ends) else len(batch.reward)
    batch = Batch(*(x if x is None else on_device(x[:length], agent.device) for x in batch))
    model, carry = agent.world_model, agent.zero_state(batch.reward.shape[1])
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
    return max(1, args.learning_starts) + args.num_envs * ranks * (args.batch_length - 1)


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
        replay = run.open_replay(ReplayBuffer, envs.spec, args.capacity)
        feeder = Feeder(replay, run.device, args.batch_size // run.ranks, args.batch_length)
        run.start(envs, agent, feeder, open_loop, first_update(args, run.ranks))

        obs, state, metrics = envs.reset(), agent.zero_state(args.num_envs), {}
        carry = agent.zero_state(args.batch_size // run.ranks)
        while run.step < args.total_timesteps and not run.stopping():
            random = run.step < first_update(args, run.ranks)
            state = agent.act(obs, state, random=random)  # act
            action = state.action.cpu().numpy()
            replay.add(obs, action)  # store
            run.step += args.num_envs * run.ranks
            due = updates_due(args, run.step, agent.updates, run.ranks) if feeder.ready() else 0
            for _ in range(due):
                metrics = agent.train_step(feeder.next(), carry)  # train
                feeder.prepare()  # draw the next batch while a GPU works on this one
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
