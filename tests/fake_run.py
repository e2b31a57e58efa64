"""A script in small: the main loop of the real ones around an agent that adds numbers up.

    python tests/fake_run.py ARGS...            it does all that `common/` does for a run

Episodes have five steps and a return of 15. `--fail STEP` breaks the environment at that call of
`step` (0: of `reset`, 999: when it is built), `--nan STEP` the loss at that update.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.cli import check_numbers, one_line_errors, parse
from common.devices import Feeder
from common.envs import EnvError, EnvSpec
from common.rings import Rings
from common.runs import Run

SCRIPT = "fake_run"
LOOK = SimpleNamespace(loop=0)  # how often `open_loop` ran in this process


@dataclass(frozen=True)
class Args:
    """Those of the real scripts that `common/` reads."""

    # The task (a resume keeps these)
    env_id: str = "Sum-v0"  # Any id
    num_envs: int = 1  # Environments
    clip_rewards: bool = False  # Nothing
    width: int = 3  # Length of the observation
    size: str = "tiny"  # Nothing
    batch_size: int = 2  # Sequences
    batch_length: int = 4  # Timesteps

    # The run
    total_timesteps: int = 40  # Decisions of the agent
    fail: int | None = None  # See above
    nan: int = 0  # See above
    speed: float = 1.0  # Nothing
    level: Literal["easy", "hard"] = "easy"  # Nothing
    exp_name: str = SCRIPT  # Name
    seed: int = 1  # Seed
    torch_deterministic: bool = True  # Nothing
    cuda: bool = False  # Nothing
    threads: int = 1  # Threads
    compile: bool = False  # Nothing
    cuda_graph: bool = False  # Nothing
    track: bool = False  # Nothing
    wandb_project_name: str = "x"  # Nothing
    wandb_entity: str | None = None  # Nothing
    capture_video: bool = False  # Films
    runs_dir: str = "runs"  # Where
    log_every: int = 10  # Timesteps
    video_every: int = 0  # Timesteps
    checkpoint_every: int = 1000  # Timesteps
    env_timeout: float = 60.0  # Nothing
    max_env_restarts: int = 10  # Nothing

    # Instead
    resume: str = ""  # Go on
    evaluate: str = ""  # Play
    dream: str = ""  # Dream
    offline: str = ""  # Read
    eval_episodes: int = 3  # Episodes
    eval_greedy: bool = False  # Nothing
    eval_env_seed: tuple[int, ...] = ()  # Levels
    dream_context: int = 2  # Frames
    dream_horizon: int = 3  # Frames

    def __post_init__(self):
        check_numbers(self, {"fail", "nan", "video_every", "speed"}, {"speed": 2})

    @property
    def env_config(self):
        return Config(self)


@dataclass(frozen=True)
class Config:
    """What FakeEnvs is built from."""

    args: Args
    render: bool = False


class Batch(NamedTuple):
    vector: Tensor
    image: Tensor | None


class State(NamedTuple):
    action: Tensor


class FakeEnvs:
    """An `Envs` without environments: counts its steps; five of them are an episode."""

    def __init__(self, config, num_envs, seed, *_):
        args, self.num_envs, self.calls = config.args, num_envs, 0
        self.spec, self.fail = EnvSpec(None, args.width, 2, True), args.fail
        self.restarts, self.now, self.closed = np.zeros(num_envs, int), -1, False
        self.break_at(999)

    def break_at(self, call):
        if self.fail is not None and self.fail == call:
            raise EnvError("lost the ball")

    def reset(self):
        self.break_at(0)
        return self.step(None)

    def step(self, action):
        if action is not None:
            self.calls += 1
            self.break_at(self.calls)
        self.now = (self.now + 1) % 6
        ones, t = np.ones(self.num_envs), self.now
        return Obs(ones[:, None] * np.arange(self.spec.vector_dim) + t, None, ones * t, ones * t == 0,
                   ones * t == 5, ones * t == 5, ones * t * (t + 1) / 2, ones * t)

    def render(self):
        return np.zeros((1, 1, 3) if self.calls > 12 else (16, 16, 3), np.uint8)

    def close(self):
        self.closed = True


class Obs(NamedTuple):
    vector: np.ndarray
    image: None
    reward: np.ndarray
    is_first: np.ndarray
    is_last: np.ndarray
    is_terminal: np.ndarray
    episode_return: np.ndarray
    episode_length: np.ndarray


class Replay:
    def __init__(self, folder, spec, capacity, num_envs, seed, writable=True):
        layout = {"reward": (np.float32, ()), "vector": (np.float32, (spec.vector_dim,))}
        self.rings = Rings(folder, layout, capacity, num_envs, writable)
        self.rng = np.random.default_rng(seed)

    def windows(self, length):
        return max(0, self.rings.count - self.rings.oldest - length + 1)

    def add(self, obs, action):
        self.rings.append(obs._asdict())

    def sample(self, batch_size, length, rng) -> Batch:
        env = rng.integers(self.rings.num_envs, size=batch_size)
        start = self.rings.oldest + rng.integers(self.windows(length), size=batch_size)
        rows = self.rings.read(env, start + np.arange(length)[:, None])
        return Batch(torch.from_numpy(rows["vector"]), None)

    def state_dict(self):
        return {"count": self.rings.count, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        self.rings.roll_back(state["count"])
        self.rng.bit_generator.state = state["rng"]


class Agent(torch.nn.Module):
    """Adds up what it is trained on, and noise."""

    def __init__(self, args, spec, device):
        super().__init__()
        self.args, self.spec, self.device = args, spec, device
        self.total = torch.nn.Parameter(torch.zeros(spec.vector_dim))
        self.updates, self.bf16, self.learn = 0, False, None

    def zero_state(self, rows):
        return State(torch.zeros(rows, 2))

    def act(self, obs, state, sample=True, random=False):
        return State(torch.rand(len(obs.reward), 2))

    @torch.no_grad()
    def train_step(self, batch, blank):
        self.total += batch.vector.sum((0, 1)) + torch.rand(len(self.total))
        self.updates += 1
        loss = torch.tensor(float("nan")) if self.updates == self.args.nan else self.total.sum()
        return {"loss/total": loss, "loss/other": torch.tensor(1.0)}

    def optimizers(self):
        return {}


def open_loop(agent, batch, context):
    """A black and a white video; draws a random number, as a real one does."""
    LOOK.loop += 1
    torch.rand(1)
    T = len(batch.vector)
    return {"one": np.zeros((T, 8, 8, 3), np.uint8), "two": np.full((T, 8, 8, 3), 255, np.uint8)}


def train(args, run_dir: Path | None) -> None:
    with Run(SCRIPT, args, run_dir) as run:
        envs = FakeEnvs(args.env_config, args.num_envs, run.seed)
        agent = Agent(args, envs.spec, run.device)
        replay = run.open_replay(Replay, envs.spec, args.total_timesteps)
        feeder = Feeder(replay, run.device, args.batch_size // run.ranks, args.batch_length)
        run.start(envs, agent, feeder, open_loop, planned=args.total_timesteps - 9)
        obs, state, metrics = envs.reset(), agent.zero_state(args.num_envs), {}
        while run.step < args.total_timesteps and not run.stopping():
            if not args.offline:
                state = agent.act(obs, state)
                replay.add(obs, state.action)
            run.step += args.num_envs * run.ranks
            if feeder.ready() and run.step >= 10:
                metrics = agent.train_step(feeder.next(), None)
                feeder.prepare()
            run.log_and_save(obs, metrics)
            if not args.offline:
                obs = envs.step(state.action)


def to_batch(rows):
    return Batch(torch.from_numpy(rows["vector"]), None)


def main() -> None:
    from common import play

    play.Envs = FakeEnvs
    with one_line_errors():
        args, run_dir = parse(Args, SCRIPT, "A small script.", {})
        if args.evaluate:
            play.evaluate(args, play.load_agent(Agent, args, run_dir, SCRIPT))
        elif args.dream:
            play.dream(args, run_dir, play.load_agent(Agent, args, run_dir, SCRIPT), open_loop, to_batch)
        else:
            train(args, run_dir)


if __name__ == "__main__":
    main()
