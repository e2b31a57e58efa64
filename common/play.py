"""Playing a trained agent: `--evaluate`, `--dream`, and `load` for a program of your own."""

import importlib
import sys
from collections import deque
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.cli import stored_args
from common.devices import prepare_torch, seed_everything
from common.envs import EnvSpec, env_spec, make_env
from common.files import UserError
from common.rundir import load_checkpoint, script_of
from common.runs import check_spec, explain_mismatch
from common.vector import Envs, EnvStep
from common.video import EpisodeVideos, as_frames, gif_bytes, save_strip, side_by_side

PATIENCE = 10_000  # timesteps without the end of an episode until a note says what to do
ROW = ("image", "vector", "action", "reward", "is_first", "is_terminal")  # what is learnt from
KEPT = 1000  # timesteps of an episode of which a dream takes the middle


def load_agent(agent_type: type, args, run_dir: Path, script: str):
    """The agent of a run directory's checkpoint; on the CPU if it was trained on a GPU we lack."""
    device = torch.device(prepare_torch(args.cuda, args.threads))
    saved = load_checkpoint(run_dir / "checkpoint.pt", script)
    with explain_mismatch(run_dir):
        # To compile, or to record a graph, takes longer than to play.
        plain = replace(args, compile=False, cuda_graph=False)
        agent = agent_type(plain, EnvSpec(**saved["spec"]), device)
        agent.load_state_dict(saved["agent"])
    return agent


def load(run_dir: Path | str, **flags) -> "Player":
    """The trained agent of a run directory, to act in a program of your own.

    flags: fields of the script's `Args` that shall differ from those of the run, such as
    eval_greedy=True (otherwise actions are drawn) or cuda=False. Raises UserError if there is no
    agent, EnvError if its environment cannot be made: its module must be importable.
    """
    run_dir = Path(run_dir)
    script = script_of(run_dir)
    module = importlib.import_module(script)
    args = replace(stored_args(module.Args, run_dir, script), **flags)
    return Player(args, load_agent(module.Agent, args, run_dir, script))


class Player:
    """A trained agent in the terms of the environment that it was trained on.

    `env` is a new one of these, as Gymnasium made it, but with --action-repeat, and on Atari with
    its preprocessing; with --pixels its observation is the picture.
    """

    def __init__(self, args, agent):
        self.args, self.agent = args, agent
        self._observations = make_env(args.env_config)  # sorts an observation into its parts
        self._actions = self._observations.env  # makes an action of the environment of ours
        self.env = self._actions.env
        check_spec(env_spec(self._observations), agent.spec, args.env_id)

    def play(self, observation, state=None):
        """(action, state) for what `env.reset` or `env.step` returned.

        `state` is what the last call returned; None at the first observation of an episode. For an
        environment that `env` is not: repeat the action as in training; with --pixels, give the
        picture that `render` returns.
        """
        parts, is_first = self._observations.observation(observation), state is None
        image, vector = (parts[key][None] if key in parts else None for key in ("image", "vector"))
        no, zero = np.zeros(1, bool), np.zeros(1)
        obs = EnvStep(image, vector, zero, no | is_first, no, no, zero, zero)
        state = self.agent.zero_state(1) if is_first else state
        state = self.agent.act(obs, state, sample=not self.args.eval_greedy)
        action = state.action[0].cpu().numpy()
        return self._actions.action(action.argmax() if self.agent.spec.discrete else action), state


def play(args, agent, num_envs: int, env_seed: int | None):
    """Endlessly yield the environments, their observation and the agent's action (P, A) there."""
    config = replace(args.env_config, render=bool(args.capture_video and args.evaluate))
    seed = args.seed + 10**6  # no training run has used it
    seed_everything(seed, args.torch_deterministic)
    envs = Envs(config, num_envs, seed, args.max_env_restarts, args.env_timeout, env_seed)
    try:
        check_spec(envs.spec, agent.spec, args.evaluate or args.dream)
        obs, state = envs.reset(), agent.zero_state(num_envs)
        while True:
            state = agent.act(obs, state, sample=not args.eval_greedy)
            action = state.action.cpu().numpy()
            yield envs, obs, action
            obs = envs.step(action)
    finally:
        envs.close()


def evaluate(args, agent) -> list[float]:
    """Play fresh episodes with a trained agent; print every return, then mean and spread.

    With several `--eval-env-seed`: as many episodes on each of those levels.
    """
    returns = {level: [] for level in args.eval_env_seed or (None,)}
    try:
        for level, found in returns.items():
            found.extend(episodes(args, agent, level))
    finally:  # also if it was interrupted
        together = sum(returns.values(), [])
        for level, found in returns.items():
            if len(returns) > 1 and found:
                print(f"environment seed {level}: {summary(found)}")
        if together:
            print(summary(together))
    return together


def episodes(args, agent, env_seed: int | None):
    """Play `eval_episodes` episodes; print and yield the return of each."""
    count, num_envs = args.eval_episodes, min(args.num_envs, args.eval_episodes)
    # Every environment plays its share: to count who finishes first would favour short episodes.
    left = np.array([len(part) for part in np.array_split(range(count), num_envs)])
    restarts, number = np.zeros(num_envs, int), 0
    films = EpisodeVideos(Path(args.evaluate) / "videos", name="evaluation")
    with (tqdm(total=count, unit=" episodes", disable=None, leave=False) as bar,  # on a terminal
          closing(films)):
        for step, (envs, obs, _) in enumerate(play(args, agent, num_envs, env_seed)):
            if args.capture_video and args.evaluate:
                films.add(envs.render, obs.is_first[0])
            bar.set_postfix_str(f"timestep {step:,}", refresh=step % 100 == 0)
            if step == PATIENCE and not number:
                bar.write(f"no episode has ended in {step:,} timesteps; --max-episode-steps ends "
                          "them", file=sys.stderr)
            broken, restarts = envs.restarts != restarts, envs.restarts  # these do not count
            for env in np.flatnonzero(obs.is_last & (left > 0) & ~broken):
                left[env] -= 1
                number += 1
                bar.update()
                bar.write(f"episode {number}: return {obs.episode_return[env]:g}, "
                          f"length {obs.episode_length[env]}")
                yield float(obs.episode_return[env])
            if not left.any():
                return


def summary(returns: list[float]) -> str:
    """Mean and spread, in words."""
    return (f"mean {np.mean(returns):g}, standard deviation {np.std(returns):g}, "
            f"minimum {min(returns):g}, maximum {max(returns):g} over {len(returns)} episodes")


def dream(args, run_dir: Path, agent, open_loop, to_batch) -> list[Path]:
    """Write what the agent imagines as RUN_DIR/videos/dream.gif and dream.png.

    `to_batch(rows)` turns arrays (T, 1, ...) by the names ROW into a batch, and
    `open_loop(agent, batch, context)` gives the videos of it by their titles.
    """
    length, recorded = args.dream_context + args.dream_horizon, deque(maxlen=KEPT)
    for _, obs, action in play(args, agent, 1, (args.eval_env_seed or (None,))[0]):
        recorded.append(obs._asdict() | {"action": action})
        if obs.is_last.any() or len(recorded) == KEPT:
            break
    middle = max(0, (len(recorded) - length) // 2)  # the first frames are often a still picture
    steps = list(recorded)[middle:middle + length]
    if len(steps) <= args.dream_context:
        raise UserError(f"the episode ended after {len(steps)} timesteps; lower --dream-context.")
    rows = {name: np.stack([step[name] for step in steps])
            for name in ROW if steps[0][name] is not None}
    rows["is_first"][0] = True
    videos = as_frames(open_loop(agent, to_batch(rows), args.dream_context))
    paths = [run_dir / "videos" / "dream.gif", run_dir / "videos" / "dream.png"]
    paths[0].parent.mkdir(exist_ok=True)
    paths[0].write_bytes(gif_bytes(side_by_side(videos, args.dream_context)))
    save_strip(paths[1], videos, args.dream_context, every=max(1, length // 10))
    print("what happened | reconstruction | imagination:", *paths)
    return paths
