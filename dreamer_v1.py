"""DreamerV1: dream to control, by latent imagination (arXiv 1912.01603v3), in one file.

    python dreamer_v1.py --env-id MsPacmanNoFrameskip-v4      train (discrete actions)
    python dreamer_v1.py --env-id CarRacing-v3 --action-repeat 2          continuous actions
    python dreamer_v1.py --env-id CartPole-v1 --size XXS      any Gymnasium environment
    python dreamer_v1.py --resume RUN_DIR                     continue exactly where a run stopped
    python dreamer_v1.py --evaluate RUN_DIR                   play fresh episodes, print the returns
    python dreamer_v1.py --dream RUN_DIR                      happened | reconstructed | imagined
    torchrun --nproc-per-node 2 dreamer_v1.py --env-id ...    several GPUs

The agent learns a *world model* from replayed sequences. An *actor* and a *critic* then learn from
trajectories that they imagine in that model. One update (`Agent.train_step`):

    batch                 <- B windows of T consecutive rows of the replay buffer
    embed                 <- encoder(image, vector)
    deter, stoch          <- RSSM along time: posterior states, and the prior at each of them
    world model           learns to predict image, vector, reward, end, and its own next posterior
    feat, action          <- from each of the N = T * B posterior states, H steps of prior and actor
    reward, discount, value <- heads and critic at the imagined states
    ret                   <- lambda-return, backwards along the imagined steps
    actor                 learns what leads to a higher return
    critic                learns to predict the return

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
                critic    [v_1 ... v_{H-1}]   v_H only bootstraps
                rewards   r_1 ... r_{H-1}  and discounts  d_1 ... d_{H-1}  from the states 1 ... H-1
                actor     [a_0 ... a_{H-1}]   by the gradient of V_1 ... V_{H-1}; s_0 is left out
                weights   w_t = d_1 ... d_{t-1}     (with --pcont times 1 - is_terminal of s_0)
                target    V_t = r_t + d_t ((1 - lambda) v_{t+1} + lambda V_{t+1}),     V_H = v_H

Symbols (paper -> code), and the sizes that the shape comments name, time-major
    o_t  image, vector (x_t here)       s_t  feat = [deter, stoch] (h_t, z_t here)
    a_t  action           r_t  reward           V_lambda  ret (V_t here)       v_t  value
    gamma  args.gamma     lambda  args.return_lambda        beta  args.kl_scale
    p, q  the paper's posterior and prior: here `post` and `prior`, written q(z|h,x) and p(z|h) as
          in the later papers
    Dimension key
    T  replay time, 50     B  batch, 50     N = T * B  imagination starts, 2500         (control)
    (with --pcont N = (T - 1) * B; Atari: H 10, N 2450, A 9)
    H  imagination horizon, 15     H1  H + 1     G  H - 1     A  action, 6     P  environments, 1
    E  embedding, 1024     D  deterministic state, 200     Z  stochastic state, 30
    F = D + Z  feature, 230     U  hidden units, 200     V  vector observation
    I, I, C  image, 64 64 3     K  classes of a one-hot action
    Equations of the paper stand where they are computed ("Eq. 6").

What DreamerV1 brought (each tag stands where it happens), and what it is good for.
From the paper:
    [V1-1]  actor and critic learn from trajectories imagined in latent space, without an image.
            PlaNet, before it, searched for actions anew at every step and saw no further than H.
    [V1-2]  the actor follows the gradient of the return itself, back through the dynamics.
    [V1-3]  lambda-returns, which end in the critic's value, look beyond the horizon.
    [V1-4]  where ends are predicted, the discount is gamma times the chance of going on: an
            imagined episode fades out.
    [V1-5]  each term is weighted by the discounts before it. Without it the end of an imagined
            trajectory counts as much as its start, though it may never be reached. (By
            gamma^(t-1) where no end is predicted: authors' code.)
    [V1-6]  noise on the actions while data is collected: normal, or a random action.
    [V1-7]  free nats: while the batch's mean KL is below them, the KL has no gradient. (The mean,
            not each KL: authors' code.)
From the authors' code only: 400 units (paper: 300), 2 to 4 layers (paper: 3).

Deviation (from the authors' code, danijar/dreamer 56d4d44)
    * No update is spent on building the variables.
    * bfloat16 is the default where the hardware supports it, from 256 units on (theirs: float16
      with loss scaling). `--amp off` is float32. State and acting stay in float32.
    * --size XXS is ours, for laptops, and so are vector observations.
    * A row holds the action chosen at its observation (theirs: the one that led to it). Theirs
      feeds the action before a window into the zero state; here that action is zero.
    * Windows are drawn from one ring, uniformly, the running episode and the last step of each
      included; they may cross the end of an episode, where is_first resets the state. Theirs lie
      in complete episodes of more than T rows, drawn uniformly whatever their length, without the
      last step.
    * The ring has an end (--buffer-size); they keep every episode.
    * Latent noise is drawn for each row; theirs is one vector for a batch: it looks accidental.
    * Updates are spread over the timesteps (theirs: 100 at once, every 1,000 frames). Our counts
      are timesteps (--expl-decay: frames), theirs frames: the same at an action repeat of 2.
    * Atari takes the paper's setting for discrete control (TASKS), with exploration drawn for each
      environment; theirs adds normal noise unless told otherwise. Ends are predicted on every task
      but DeepMind Control's, which have none (theirs: only if asked for). The chance of a random
      action is halved every 200,000 frames, so from 0.4 to 0.1 in 400,000: their form, our number
      (paper: linearly, over 200,000 updates, here 4 million frames).
    * With --pcont terminal starts have weight zero; the authors' windows hold no terminal state.
    * Images are resized by area (theirs: bilinear); `--clip-rewards clip` is ours;
      charts/episodic_return is that of training, with its noise (theirs: also of test episodes).
    * Random and other episodes are not played to their end before training goes on.
    * Evaluation takes tanh(mean), theirs the best of 100 samples.
    * The action repeat is 1 (control: 2, Atari: 4), theirs is 2 everywhere; no time limit of 1,000
      frames is imposed, and a lost life ends nothing. The last picture of an Atari episode is the
      last one (theirs repeats the one before). The row that ends an episode counts as a timestep.
"""

# ---------------------------------------------------------------------------------------- 1 imports
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common.cli import RunArgs, one_line_errors, parse
from common.devices import (CudaGraph, Feeder, average_over_ranks, compile_methods, mean_over_ranks,
                            on_device, use_bf16)
from common.disk import Rings, UserError
from common.envs import EnvConfig
from common.play import dream, evaluate, load_agent
from common.run import Run
from common.spaces import EnvSpec
from common.vector import Envs, EnvStep

SCRIPT = Path(__file__).stem

# ------------------------------------------------------------------------------------------- 2 Args
TASKS = {  # the paper's discrete control (expl_decay is ours), the authors' DeepMind Control
    "atari": dict(
        action_repeat=4, sticky=0.25, clip_rewards="tanh", imag_horizon=10, kl_scale=0.1,
        expl_amount=0.4, expl_min=0.1, expl_decay=200_000.0),
    "control": dict(action_repeat=2, pcont=False)}
SIZES = {  # XXS is ours, for laptops and tests
    "XXS": dict(
        deter=128, hidden=128, units=128, reward_layers=2, critic_layers=2, pcont_layers=2,
        actor_layers=2, depth=8, mlp_units=128, mlp_layers=2, batch_size=16, batch_length=16,
        train_ratio=64.0, total_timesteps=100_000, learning_starts=500, model_lr=1e-3,
        actor_lr=1e-4, critic_lr=1e-3, gamma=0.98, kl_scale=0.01, free_nats=0.0,
        clip_rewards="none", imag_horizon=15, expl_amount=0.3, expl_decay=8000.0, expl_min=0.0),
    "paper": {},
}


@dataclass(frozen=True)
class Settings:
    """Every setting of the algorithm; a resume keeps all but the rates and the length."""

    env_id: str = "MsPacmanNoFrameskip-v4"  # Any Gymnasium id; `module:Id-v0` imports your own
    total_timesteps: int = 2_500_000  # Decisions of the agent; frames = these x action repeat
    size: Literal["XXS", "paper"] = "paper"  # Preset; XXS is for laptops
    num_envs: int = 1  # Environments, each in a process of its own; per torchrun process
    action_repeat: int = 1  # Times that an action is repeated (Atari: 4, DeepMind Control: 2)
    pixels: bool = False  # Observe the rendered picture instead of what the environment gives
    grayscale: bool = False  # Images in shades of grey
    sticky: float = 0.0  # Atari: chance that the last action is repeated
    clip_rewards: Literal["none", "tanh", "clip"] = "none"  # How rewards are squashed
    pcont: bool = True  # Predict when an episode ends

    train_ratio: float = 500.0  # Replayed timesteps per collected one
    batch_size: int = 50  # Sequences per batch, B
    batch_length: int = 50  # Timesteps per sequence, T
    learning_starts: int = 2500  # Random actions until so many (overlapping) windows fit
    buffer_size: int = 1_000_000  # Replay capacity in timesteps, first in, first out
    pretrain: int = 100  # Updates that are made at once when training begins

    deter: int = 200  # GRU recurrent units, size of h_t
    hidden: int = 200  # Hidden units inside the RSSM
    depth: int = 32  # CNN multiplier: channels of the first stage
    mlp_units: int = 400  # Units of vector en- and decoder
    mlp_layers: int = 4  # Layers of vector en- and decoder
    units: int = 400  # Dense hidden units of the heads
    reward_layers: int = 2  # MLP layers of the reward head
    critic_layers: int = 3  # MLP layers of the critic
    pcont_layers: int = 3  # MLP layers of the head that predicts ends
    actor_layers: int = 4  # MLP layers of the actor
    stoch: int = 30  # Size of z_t

    model_lr: float = 6e-4  # Learning rate of the world model
    model_eps: float = 1e-7  # Adam epsilon
    model_clip: float = 100.0  # Gradient clipping by global norm
    kl_scale: float = 1.0  # Scale of the KL loss, beta
    free_nats: float = 3.0  # Mean KL below which the KL loss no longer pushes
    pcont_scale: float = 10.0  # Scale of the loss of --pcont

    imag_horizon: int = 15  # Imagination horizon, H
    gamma: float = 0.99  # Discount factor
    return_lambda: float = 0.95  # Return lambda
    actor_lr: float = 8e-5  # Learning rate of the actor
    actor_eps: float = 1e-7  # Adam epsilon of the actor
    actor_clip: float = 100.0  # Gradient clipping of the actor
    actor_min_std: float = 1e-4  # Smallest deviation of a continuous action
    actor_init_std: float = 5.0  # Deviation of a continuous action at first, before the tanh
    critic_lr: float = 8e-5  # Learning rate of the critic
    critic_eps: float = 1e-7  # Adam epsilon of the critic
    critic_clip: float = 100.0  # Gradient clipping of the critic
    expl_amount: float = 0.3  # Noise on actions: deviation, or chance of a random one
    expl_decay: float = 0.0  # Frames after which it is half as large (0: never)
    expl_min: float = 0.0  # It does not decay below this


@dataclass(frozen=True, init=False)
class Args(RunArgs, Settings):
    """Settings of the algorithm and of the run."""

    eval_greedy: bool = True  # Evaluate and dream with the most likely actions

    def __init__(self, **flags):
        """Defaults; over them what TASKS has for `env_id`, what SIZES has for `size`, and `flags`.

        Raises `UserError`, one line, for a value that cannot work.
        """
        self.fill(TASKS, SIZES, flags)
        self.check(may_be_zero={"learning_starts", "pretrain"}, shares={
            "sticky", "gamma", "return_lambda"})
        if min(self.imag_horizon, self.batch_length) < 2:
            raise UserError("--imag-horizon and --batch-length start at 2")

    @property
    def stoch_dim(self) -> int:
        """Size of the flat stochastic state, Z."""
        return self.stoch

    @property
    def capacity(self) -> int:
        """Rows of the replay ring of one environment; a run never needs more than it collects."""
        return math.ceil(min(self.buffer_size, self.total_timesteps) / self.num_envs)

    @property
    def env_config(self) -> EnvConfig:
        """What it takes to build one environment."""
        return EnvConfig(self.env_id, 64, self.grayscale, self.action_repeat,
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


class Normal:
    """Normal distribution of numbers, each for itself and with variance 1."""

    def __init__(self, loc: Tensor):
        """`loc` (...), their means."""
        self.loc = loc

    def mean(self) -> Tensor:
        """Means (...)."""
        return self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-densities (...) of `value` (...)."""
        squared = F.mse_loss(self.loc, value, reduction="none")
        # In place, for of images these are hundreds of MB.
        return squared.mul_(-0.5).sub_(0.5 * math.log(2 * math.pi))


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

    def entropy(self) -> Tensor:
        """Entropy (...) in nats, summed over A."""
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class TanhNormal(Gaussian):
    """tanh of a diagonal normal, for continuous actions."""

    def sample(self) -> Tensor:
        """Reparameterised sample (..., A)."""
        return super().sample().tanh()

    def mode(self) -> Tensor:
        """tanh of the mean (..., A)."""
        return self.mean.tanh()


class OneHot:
    """One-hot categorical over the last dimension."""

    def __init__(self, raw: Tensor):
        """`raw`: unnormalised logits (..., K) of any precision."""
        self.raw = raw.float()  # everything here is in float32
        self.probs = self.raw.softmax(-1)

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


class Latent(Gaussian):
    """The stochastic state z_t: a diagonal normal."""

    def __init__(self, raw: Tensor):
        """`raw` (..., 2 Z): means, and the deviations before softplus; they are 0.1 at least."""
        mean, raw_std = raw.float().chunk(2, -1)
        super().__init__(mean, F.softplus(raw_std) + 0.1)

    def kl(self, other: "Latent") -> Tensor:
        """KL[self || other] (...) in nats, summed over Z."""
        ratio, shift = self.std / other.std, (self.mean - other.mean) / other.std
        return (0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).sum(-1)


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


# ------------------------------------------------------------------------ 5 encoder, decoder, heads
def init_output(layer: nn.Module) -> nn.Module:
    """Glorot uniform weights, zero biases. Gives the layer back."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Linear(nn.Linear):
    """Linear layer with the initialisation of the authors' code."""

    def reset_parameters(self) -> None:
        """Called by `nn.Linear.__init__`."""
        init_output(self)


class Dense(Linear):
    """Linear -> ELU, the hidden layer of every network."""

    def activate(self, x: Tensor) -> Tensor:
        """What follows the product (..., outputs)."""
        return F.elu(x, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.activate(super().forward(x))


class SplitDense(Dense):
    """Dense layer of a concatenation: W [a, b] = W_a a + W_b b, then what `activate` does.

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
            widths = [spec.image_shape[-1], *(args.depth * i for i in (1, 2, 4, 8))]
            for inputs, outputs in zip(widths, widths[1:]):  # 64 -> 31 -> 14 -> 6 -> 2 pixels
                conv = init_output(nn.Conv2d(inputs, outputs, 4, stride=2))
                self.cnn.extend([conv, nn.ReLU()])
            self.embed_dim += 2 * 2 * widths[-1]
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
            parts.append(self.mlp(vector))
        return torch.cat(parts, -1)


class PixelToGrid(nn.ConvTranspose2d):
    """Transposed convolution of a single pixel: one matrix product, which is much faster."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, 1, 1) -> (n, outputs, size, size), channels-last in memory."""
        grid = x.flatten(1) @ self.weight.permute(0, 2, 3, 1).flatten(1)
        return (grid.unflatten(1, (*self.kernel_size, -1)) + self.bias).permute(0, 3, 1, 2)


class Decoder(nn.Module):
    """Feature -> image and/or vector."""

    def __init__(self, args: Args, spec: EnvSpec, feat_dim: int):
        super().__init__()
        if spec.image_shape:
            self.cnn, self.start = nn.Sequential(), 1  # from 1 x 1 pixel
            widths = [*(args.depth * i for i in (32, 4, 2, 1)), spec.image_shape[-1]]
            kinds = (PixelToGrid, *[nn.ConvTranspose2d] * 3)
            for kind, inputs, outputs, size in zip(kinds, widths, widths[1:], (5, 5, 6, 6)):
                conv = init_output(kind(inputs, outputs, size, stride=2))  # 5, 13, 30, 64 pixels
                self.cnn.extend([conv, nn.ReLU()])
            del self.cnn[-1]  # the last layer is linear
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


class GRUCell(nn.GRUCell):
    """The plain GRU, with Keras' initialisation."""

    def reset_parameters(self) -> None:
        """Glorot uniform weights for the input, orthogonal ones for the state, zero biases."""
        nn.init.xavier_uniform_(self.weight_ih)
        nn.init.orthogonal_(self.weight_hh)
        nn.init.zeros_(self.bias_ih)
        nn.init.zeros_(self.bias_hh)

    def forward(self, x: Tensor, deter: Tensor) -> Tensor:
        """(B, U) and h_{t-1} (B, D) -> h_t (B, D), in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float(), deter)


class RSSM(nn.Module):
    """Recurrent state-space model: the recurrence, the prior and the posterior. Eq. 1

    The authors' names: `img_` is imagination, not image; `obs_` sees the observation, too.
    """

    def __init__(self, args: Args, action_dim: int, embed_dim: int):
        super().__init__()
        self.img_in = SplitDense(args.stoch_dim, action_dim, args.hidden)
        self.img_out = Dense(args.deter, args.hidden)
        self.obs_out = SplitDense(args.deter, embed_dim, args.hidden)
        self.gru = GRUCell(args.hidden, args.deter)
        self.img_stats = Linear(args.hidden, 2 * args.stoch_dim)
        self.obs_stats = Linear(args.hidden, 2 * args.stoch_dim)
        self.deter_dim, self.stoch_dim = args.deter, args.stoch_dim

    def initial_state(self) -> tuple[Tensor, Tensor]:
        """Zeros: deter (D,) and stoch (Z,)."""
        zeros = self.img_stats.bias.new_zeros
        return zeros(self.deter_dim), zeros(self.stoch_dim)

    def project_action(self, action: Tensor) -> Tensor:
        """What an action (..., A) adds to the product of `img_in` (..., U)."""
        return self.img_in.project(action)

    def latent(self, raw: Tensor) -> Latent:
        """Raw statistics from the last layer -> distribution of z_t."""
        return Latent(raw)

    def prior(self, deter: Tensor) -> Latent:
        """p(z_t | h_t), from h_t (..., D)."""
        return self.latent(self.img_stats(self.img_out(deter)))

    def img_step(self, deter: Tensor, stoch: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """One imagined step: h (N, D), z (N, Z), a (N, A) -> next h (N, D), z ~ prior (N, Z)."""
        # img_in([z, a]) = elu(W_z z + W_a a + b), and project_action gives W_a a + b
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
    """Encoder, RSSM, decoder, reward and discount head: what the world-model loss trains. Eq. 1"""

    def __init__(self, args: Args, spec: EnvSpec):
        super().__init__()
        self.feat_dim = feat_dim = args.deter + args.stoch_dim
        self.encoder = Encoder(args, spec)
        self.rssm = RSSM(args, spec.action_dim, self.encoder.embed_dim)
        self.decoder = Decoder(args, spec, feat_dim)
        if args.pcont:
            self.discount_head = Head(feat_dim, args.units, args.pcont_layers, 1)
        self.reward_head = Head(feat_dim, args.units, args.reward_layers, 1)

    def reward(self, feat: Tensor) -> Normal:
        """(..., F) -> normal distribution of the reward (...) received with that state."""
        return Normal(self.reward_head(feat).squeeze(-1))

    def discount(self, feat: Tensor) -> Bernoulli:
        """(..., F) -> distribution (...) whose mean is gamma times P(the episode goes on)."""
        return Bernoulli(self.discount_head(feat).squeeze(-1))


# ------------------------------------------------------------------------------- 7 actor and critic
class Actor(nn.Module):
    """Feature -> policy pi(a_t | s_t), Eq. 2."""

    def __init__(self, args: Args, spec: EnvSpec, feat_dim: int):
        super().__init__()
        self.discrete = spec.discrete
        outputs = spec.action_dim if spec.discrete else 2 * spec.action_dim
        self.head = Head(feat_dim, args.units, args.actor_layers, outputs)
        self.min_std, std = args.actor_min_std, args.actor_init_std
        self.std_offset = std + math.log(-math.expm1(-std))  # softplus of it is `std`

    def forward(self, feat: Tensor) -> Tensor:
        """(..., F) -> parameters of the policy (..., A), or (..., 2A) for continuous actions."""
        return self.head(feat)

    def policy(self, raw: Tensor) -> OneHot | Gaussian:
        """Distribution of actions from `forward`'s output: one-hot, or from mean and deviation."""
        if not self.discrete:
            mean, raw_std = raw.chunk(2, -1)  # a mean within 5, a deviation of 5 at first
            std = F.softplus(raw_std + self.std_offset) + self.min_std
            return TanhNormal(5 * (mean / 5).tanh(), std)
        return OneHot(raw)


class Critic(nn.Module):
    """Feature -> distribution of the return from there, Eq. 3."""

    def __init__(self, args: Args, feat_dim: int):
        super().__init__()
        self.head = Head(feat_dim, args.units, args.critic_layers, 1)

    def forward(self, feat: Tensor) -> Normal:
        """(..., F) -> distribution over (...), a normal one."""
        return Normal(self.head(feat).squeeze(-1))


# ----------------------------------------------------------------------------------------- 8 losses
def world_model_loss(model: WorldModel, batch: Batch, carry: State,
                     args: Args) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """Scaled loss terms of the world model, (T, B) or scalars, over every replayed step. Eq. 10:
        L = -ln p(x_t|s_t) - ln p(r_t|s_t) - pcont_scale ln p(gamma_t|s_t)
            + beta max(free_nats, mean KL[ q(z_t|h_t,x_t) || p(z_t|h_t) ])
    ln p(gamma_t|s_t) is the paper's for discrete control; pcont_scale and the limit of the mean are
    the authors' code.

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
    if image is not None:
        log_prob = Normal(model.decoder.image(feat)).log_prob(image)  # (T, B, I, I, C)
        losses["image"] = -log_prob.sum((-3, -2, -1))
    if batch.vector is not None:
        losses["vector"] = -Normal(model.decoder.vector(feat)).log_prob(batch.vector).sum(-1)
    losses["reward"] = -model.reward(feat).log_prob(reward)
    if args.pcont:
        discount = args.gamma * (~batch.is_terminal).float()  # (T, B)
        losses["discount"] = -args.pcont_scale * model.discount(feat).log_prob(discount)
    kl = post.kl(prior)  # (T, B)
    losses["kl"] = args.kl_scale * mean_over_ranks(kl).clamp(min=args.free_nats)  # [V1-7]
    metrics["latent/kl"] = kl
    return losses, deter.detach(), stoch.detach(), metrics


def imagine(model: WorldModel, actor: Actor, deter: Tensor, stoch: Tensor,
            horizon: int) -> Tensor:
    """Follow actor and prior for `horizon` steps from deter (N, D) and stoch (N, Z). [V1-1]
    Returns features (H1, N, F), the starts included.
    The gradient comes back through the dynamics [V1-2], but the actor always sees detached
    features: its gradient comes through its actions alone.
    """
    feats = [torch.cat([deter, stoch], -1)]
    for _ in range(horizon):
        action = actor.policy(actor(feats[-1].detach())).sample()
        deter, stoch = model.rssm.img_step(deter, stoch, action)
        feats.append(torch.cat([deter, stoch], -1))
    return torch.stack(feats)


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


def actor_loss(ret: Tensor, weight: Tensor) -> Tensor:
    """Loss of the actor as a scalar. Eq. 7:
        L = -mean w_t V_t
    The gradient reaches the actor by reward, discount and value, back through the dynamics. All
    tensors are (G, N); w_t are the discounts before t, multiplied. [V1-5]
    """
    return -(weight * ret).mean()


def critic_loss(value_dist: Normal, ret: Tensor, weight: Tensor) -> Tensor:
    """Loss of the critic as a scalar, with the constant of a normal distribution. Eq. 8:
        L = -mean w_t ln p(V_t|s_t) = mean w_t ( 1/2 (v_t - sg(V_t))^2 + const )
    All tensors have the same shape; w_t are the discounts before t, multiplied.
    """
    log_prob = value_dist.log_prob(ret.detach())
    return -(weight * log_prob).mean()


# ------------------------------------------------------------------------------------------ 9 agent
class Optimizer:
    """Adam, on gradients clipped by their global norm."""

    def __init__(self, module: nn.Module, lr: float, eps: float, clip: float):
        self.params, self.clip = list(module.parameters()), clip
        self.lr, self.eps = lr, eps
        self.mean = [torch.zeros_like(param) for param in self.params]
        self.square = [torch.zeros_like(param) for param in self.params]
        self.count = torch.zeros((), dtype=torch.float64, device=self.params[0].device)

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
        # Adam that adds epsilon to sqrt(v) before the bias correction, as TensorFlow does: at the
        # first step it counts 30 times more than the same epsilon in PyTorch.
        self.count += 1
        torch._foreach_lerp_(self.mean, clipped, 1 - 0.9)
        torch._foreach_mul_(self.square, 0.999)
        torch._foreach_addcmul_(self.square, clipped, clipped, 1 - 0.999)
        rate = self.lr * (1 - 0.999**self.count).sqrt() / (1 - 0.9**self.count)
        divisor = torch._foreach_sqrt(self.square)
        torch._foreach_add_(divisor, self.eps)
        torch._foreach_div_(divisor, rate.float())
        torch._foreach_addcdiv_(self.params, self.mean, divisor, -1.0)
        return norm

    def state_dict(self) -> dict:
        """Adam's moments and counter."""
        return {"mean": self.mean, "square": self.square, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` gave. Learning rates stay those of this call's flags."""
        for ours, saved in zip([*self.mean, *self.square, self.count],
                               [*state["mean"], *state["square"], state["count"]]):
            ours.copy_(saved)


class Agent(nn.Module):
    """World model, actor, critic and how they learn."""

    def __init__(self, args: Args, spec: EnvSpec, device: torch.device):
        super().__init__()
        self.args, self.spec, self.device, self.updates = args, spec, device, 0
        self.world_model = WorldModel(args, spec)
        feat_dim = self.world_model.feat_dim
        self.actor = Actor(args, spec, feat_dim)
        self.critic = Critic(args, feat_dim)
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
        self.updates += 1
        return metrics

    def learn(self, batch: Batch, carry: State) -> dict[str, Tensor]:
        """A step of world model, actor and critic, all on the device: a CUDA graph records it.

        All three losses and gradients come from the weights before the update (authors' code).
        """
        args, model = self.args, self.world_model
        # World model
        with self.autocast():
            losses, deter, stoch, metrics = world_model_loss(model, batch, carry, args)
        loss_model = sum(loss.mean() for loss in losses.values())  # Eq. 10
        model_grads = self.model_opt.grads(loss_model)  # applied below

        # Imagination, from every posterior state
        with self.autocast():
            if args.pcont:  # but the last of each window, which could be terminal
                deter, stoch = deter[:-1], stoch[:-1]
            feat = imagine(model, self.actor, deter.flatten(0, 1), stoch.flatten(0, 1),
                           args.imag_horizon)[1:]  # (H, N, F)
            reward = model.reward(feat[:-1]).mean()  # (G, N)
            value = self.critic(feat).mean()  # (H, N)
            discount = torch.full_like(reward, args.gamma)  # (G, N)
            if args.pcont:
                discount = model.discount(feat[:-1]).mean()  # (G, N) [V1-4] gamma included

        # Returns: reward and discount are those of state t itself, as in Eq. 6
        alive = torch.ones_like(discount[:1])  # (1, N)
        if args.pcont:  # a terminal row inside a window is no start either (theirs has none there)
            alive = (~batch.is_terminal[:-1]).float().view(1, -1)  # (1, N)
        weight = torch.cat([alive, discount[:-1]]).cumprod(0).detach()  # (G, N) [V1-5]
        ret = lambda_return(reward, discount, value[1:], args.return_lambda)  # (G, N) [V1-3]
        metrics["imagined/explained"] = 1 - (ret - value[:-1]).var() / ret.var().clamp(1e-8)

        # Actor and critic
        loss_actor = actor_loss(ret, weight)
        loss_critic = critic_loss(Normal(value[:-1]), ret, weight)
        # Through the dynamics, the actor's loss needs the critic's graph, too.
        actor_grads = self.actor_opt.grads(loss_actor, retain_graph=True)
        critic_grads = self.critic_opt.grads(loss_critic)
        model_norm = self.model_opt.apply(model_grads)
        actor_norm, critic_norm = (self.actor_opt.apply(actor_grads),
                                   self.critic_opt.apply(critic_grads))

        metrics |= {f"loss/{name}": loss for name, loss in losses.items()} | {
            "loss/model": loss_model, "loss/actor": loss_actor, "loss/critic": loss_critic,
            "grad_norm/model": model_norm, "grad_norm/actor": actor_norm,
            "grad_norm/critic": critic_norm, "imagined/return": ret, "imagined/value": value,
            "imagined/reward": reward}
        return {name: values.detach().mean() for name, values in metrics.items()}

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
        return model.decoder.vector(feat)
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
    """Number of updates to make now. `done` were made before; `ranks` processes share the work.

    From the first update on, each collected timestep is replayed `train_ratio` times on average;
    --pretrain updates come on top.
    """
    steps, replayed = step - first_update(args, ranks), args.batch_size * args.batch_length
    if steps < 0:
        return 0
    return args.pretrain + int(steps * args.train_ratio / replayed) - done


def explore(args: Args, step: int, state: State, obs: EnvStep, discrete: bool) -> State:
    """Noise on the actions (P, A) of `state`: normal, or a random action now and then. [V1-6]"""
    halvings = step * args.action_repeat / args.expl_decay if args.expl_decay else 0
    amount = max(args.expl_min, args.expl_amount * 0.5**halvings)
    if discrete:
        is_random = torch.rand_like(state.action[:, :1]) < amount
        noisy = torch.where(is_random, random_actions(state.action, discrete), state.action)
    else:
        noisy = (state.action + amount * draw_noise(state.action)).clamp(-1, 1)
    goes_on = on_device(torch.from_numpy(~obs.is_last), noisy.device)  # else nothing is chosen
    return state._replace(action=noisy * goes_on[:, None])


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
            if not random:
                state = explore(args, run.step, state, obs, envs.spec.discrete)
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
