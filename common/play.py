"""Playing a trained agent: `--evaluate`, `--dream`, and `load` for a program of your own."""

import importlib
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.devices import prepare_torch
from common.disk import UserError, load_args, load_checkpoint
from common.envs import make_env
from common.run import load_weights
from common.spaces import EnvSpec
from common.vector import Envs, EnvStep
from common.video import draw, gif_bytes, to_rgb


def load_agent(agent_type: type, args, run_dir: Path):
    """The agent of a run directory's checkpoint; on the CPU if it was trained on a GPU we lack."""
    saved = load_checkpoint(run_dir)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    spec = EnvSpec(**saved["spec"])  # to compile takes longer than to play
    agent = agent_type(replace(args, compile=False, cuda_graph=False), spec, device)
    load_weights(agent, saved, spec, run_dir)
    print(f"the agent of timestep {saved.get('step', 0):,}", flush=True)  # as of its checkpoint
    return agent


def play(args, agent, num_envs: int, films: str | None = None):
    seed = args.seed + 10**6  # no training run has used it
    prepare_torch(args, seed)
    config = replace(args.env_config, films=films, film_all=True, seed=args.eval_env_seed)
    envs = Envs(config, num_envs, seed)
    try:
        if envs.spec != agent.spec:
            raise UserError(f"the environment is {envs.spec}, the agent knows {agent.spec}")
        obs, state = envs.reset(), agent.zero_state(num_envs)
        while True:
            state = agent.act(obs, state, sample=not args.eval_greedy)
            action = state.action.cpu().numpy()
            yield obs, action
            obs = envs.step(action)
    finally:
        envs.close()


def evaluate(args, agent, run_dir: Path) -> list[float]:
    count, num_envs, returns = args.eval_episodes, min(args.num_envs, args.eval_episodes), []
    # Every environment plays its share: to count who finishes first would favour short episodes.
    left = np.array([len(part) for part in np.array_split(range(count), num_envs)])
    films = str(run_dir / "videos") if args.capture_video else None
    for obs, _ in play(args, agent, num_envs, films):
        for env in np.flatnonzero(obs.is_last & (left > 0)):
            left[env] -= 1
            returns.append(float(obs.episode_return[env]))
            print(f"episode {len(returns)}: return {returns[-1]:g}, length "
                  f"{obs.episode_length[env]}", flush=True)
        if not left.any():
            break
    print(f"mean {np.mean(returns):g}, standard deviation {np.std(returns):g}, minimum "
          f"{min(returns):g}, maximum {max(returns):g} over {count} episodes")
    return returns


def dream(args, agent, run_dir: Path, open_loop, to_batch) -> None:
    """Write what the script's `open_loop` gives as RUN_DIR/videos/dream.gif and dream.png."""
    context, length, steps = args.dream_context, args.dream_context + args.dream_horizon, deque()
    for obs, action in play(args, agent, 1):
        steps.append(obs._asdict() | {"action": action})
        if obs.is_last.any() or len(steps) == 1000:
            break
    middle = max(0, (len(steps) - length) // 2)  # the first frames are often a still picture
    steps, choose, name = list(steps)[middle:middle + length], None, "dream.gif"
    if len(steps) <= context:
        raise UserError(f"the episode ended after {len(steps)} timesteps; lower --dream-context")
    if args.dream_actions != "recorded":  # a dream may last longer than what really happened
        steps += steps[-1:] * (length - len(steps))
        is_keyboard = args.dream_actions == "keyboard"
        choose = Keyboard(args, agent) if is_keyboard else lambda picture, action: action
        name = f"dream_{args.dream_actions}.gif"
    rows = {name: np.stack([step[name] for step in steps]) for name, part in steps[0].items()
            if part is not None and name not in ("is_last", "episode_return", "episode_length")}
    rows["is_first"][:] = [[True]] + [[False]] * (len(steps) - 1)
    series, path = open_loop(agent, to_batch(rows), context, choose), run_dir / "videos" / name
    frames, strip = draw(series, context, agent.spec.names, max(1, length // 10))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gif_bytes(frames))
    Image.fromarray(strip).save(path.with_suffix(".png"))
    print("what happened | reconstruction | imagination:", path, path.with_suffix(".png"))


class Keyboard:
    """Shows each imagined picture in a window; keys held there choose the action: the environment's
    own, as in `gymnasium.utils.play`, else 1, 2, ...; arrows for two continuous numbers."""

    def __init__(self, args, agent):
        if not agent.spec.image_shape:
            raise UserError("a dream of numbers cannot be played; train with --pixels")
        import pygame
        pygame.display.init()
        env = make_env(args.env_config).unwrapped
        named = env.get_keys_to_action() if hasattr(env, "get_keys_to_action") else {
            (str(index + 1),): index for index in range(agent.spec.action_dim)}
        self.keys = {tuple(key if isinstance(key, int) else pygame.key.key_code(key)
                           for key in keys): index for keys, index in named.items()}
        self.pygame, self.discrete = pygame, agent.spec.discrete
        self.window, self.clock = pygame.display.set_mode((512, 512)), pygame.time.Clock()

    def __call__(self, picture: np.ndarray, action: torch.Tensor) -> torch.Tensor | None:
        pygame, chosen = self.pygame, torch.zeros_like(action)
        frame = pygame.surfarray.make_surface(to_rgb(picture).swapaxes(0, 1))
        pygame.transform.scale(frame, (512, 512), self.window)
        pygame.display.flip()
        self.clock.tick(15)
        if pygame.event.get(pygame.QUIT):
            pygame.quit()
            return None
        pygame.event.pump()
        held = pygame.key.get_pressed()
        if self.discrete:
            ready = [keys for keys in self.keys if all(held[key] for key in keys)]
            chosen[0, self.keys[max(ready, key=len)] if ready else 0] = 1
        else:
            side = held[pygame.K_RIGHT] - held[pygame.K_LEFT]
            ahead = held[pygame.K_UP] - held[pygame.K_DOWN]
            chosen[0, :2] = torch.tensor([side, ahead][:chosen.shape[-1]])
        return chosen


def load(run_dir: Path | str, **flags) -> "Player":
    """The trained agent of a run directory; `flags` (cuda=False) differ from the run's `Args`."""
    script, stored = load_args(run_dir)
    module = importlib.import_module(script)
    args = module.Args(**stored | flags)
    return Player(args, load_agent(module.Agent, args, Path(run_dir)))


class Player:
    """A trained agent; `env` is a new environment with its --action-repeat, --pixels and so on."""

    def __init__(self, args, agent):
        self.args, self.agent = args, agent
        self.observations = make_env(args.env_config)  # sorts an observation into its parts
        self.actions = self.observations.env  # makes an action of the environment of ours
        self.env = self.actions.env

    def play(self, observation, state=None):
        """(action, state) for an observation and the state of the last call (None: a first one)."""
        parts, is_first = self.observations.observation(observation), state is None
        image, vector = (parts[key][None] if key in parts else None for key in ("image", "vector"))
        no, zero = np.zeros(1, bool), np.zeros(1)
        obs = EnvStep(image, vector, zero, no | is_first, no, no, zero, zero)
        state = self.agent.zero_state(1) if is_first else state
        state = self.agent.act(obs, state, sample=not self.args.eval_greedy)
        action = state.action[0].cpu().numpy()
        return self.actions.action(action.argmax() if self.agent.spec.discrete else action), state
