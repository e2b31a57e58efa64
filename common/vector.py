"""Several environments in lockstep: `Envs` answers every call with one `EnvStep` of P rows.

The last observation of an episode is seen, with its reward. The next `step` ignores that
environment's action and starts its next episode (Gymnasium's `AutoresetMode.NEXT_STEP`).
Every environment has a process of its own, even a single one: it cannot touch the agent's random
numbers, threads or working directory, and its crash does not end the run unsaved.
"""

import multiprocessing
import os
import random
import sys
import threading
import types
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv

from common.envs import EnvConfig, find, make_env
from common.spaces import EnvError, env_spec

# A server that has imported what all need forks the processes; Windows has none.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class EnvStep(NamedTuple):
    """One row per environment, P in all."""

    image: np.ndarray | None  # (P, H, W, C) uint8
    vector: np.ndarray | None  # (P, V) float32
    reward: np.ndarray  # (P,) float32; received with this observation, 0 where is_first
    is_first: np.ndarray  # (P,) bool
    is_last: np.ndarray  # (P,) bool; terminated or truncated
    is_terminal: np.ndarray  # (P,) bool; terminated: nothing can be earned from here on
    episode_return: np.ndarray  # (P,) float64; so far; complete where is_last
    episode_length: np.ndarray  # (P,) int64; agent steps so far


class Envs:
    """P environments in lockstep; `notices` says what may not be as the user intended.

    One that fails, or whose process dies, raises EnvError, behind the traceback of what happened.
    """

    def __init__(self, config: EnvConfig, num_envs: int, seed: int):
        self.num_envs, self.config = num_envs, config
        # The seed of an environment depends on `seed` and its number alone. Some want 31 bits.
        seeds = (np.random.SeedSequence(seed).generate_state(num_envs) >> 1).tolist()
        self.seeds = seeds if config.seed is None else [config.seed] * num_envs
        with self._explained():
            registered = gym.registry.get(find(config.env_id))
            makers = [partial(make_here, config, registered, os.getpid(), index, seed)
                      for index, seed in enumerate(seeds)]
            # multiprocessing would import the main script, and with it torch, in each process.
            multiprocessing.set_forkserver_preload(["ale_py", "cv2", "gymnasium.vector"])
            main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
            try:
                self.vector = AsyncVectorEnv(makers, context=METHOD)
            finally:
                sys.modules["__main__"] = main
            self.notices, names = (self.vector.get_attr(key)[0] for key in ("notices", "names"))
        self.spec = env_spec(self.vector.single_observation_space, self.vector.single_action_space,
                             names)

    def reset(self) -> EnvStep:
        with self._explained():
            observation, _ = self.vector.reset(seed=self.seeds)
        if observation.get("image", np.full(1, 255)).max() < 16:
            hint = "rgb_array" in self.vector.metadata.get("render_modes", ()) and "; try --pixels"
            sys.stderr.write(f"\nnote: the first picture is almost black{hint or ''}\n")
        no = np.zeros(self.num_envs, bool)
        self.returns, self.lengths, self.is_last = np.zeros(self.num_envs), no.astype(int), ~no
        return self._row(observation, np.zeros(self.num_envs), no, no)

    def step(self, action: np.ndarray) -> EnvStep:
        """action: (P, A) float, one-hot or continuous (clipped to [-1, 1])."""
        native = np.argmax(action, 1) if self.spec.discrete else action
        with self._explained():
            observation, reward, terminated, truncated, _ = self.vector.step(native)
        return self._row(observation, reward, terminated, truncated)

    def close(self) -> None:
        self.vector.closed = True  # Gymnasium's own `close` waits for one that hangs
        for pipe in filter(None, self.vector.parent_pipes):
            with suppress(OSError):  # it is dead
                pipe.send(("close", None))
        for process in self.vector.processes:
            process.join(60 if self.config.films else 2)  # a film has to be written
            process.kill()

    def _row(self, observation, reward, terminated, truncated) -> EnvStep:
        is_first, self.is_last = self.is_last, terminated | truncated
        self.returns = np.where(is_first, 0.0, self.returns + reward)
        self.lengths = np.where(is_first, 0, self.lengths + 1)
        return EnvStep(observation.get("image"), observation.get("vector"),
                       reward.astype(np.float32), is_first, self.is_last, terminated, self.returns,
                       self.lengths)

    @contextmanager
    def _explained(self):
        """Turn whatever an environment raises, and the end of its process, into an EnvError."""
        try:
            yield
        except EnvError:
            raise
        except Exception as error:  # Gymnasium has printed the traceback of the process
            died = isinstance(error, EOFError | BrokenPipeError | ConnectionResetError)
            text = "its process died" if died else f"{type(error).__name__}: {error}"
            text += "; set TMPDIR to a shorter path" * ("AF_UNIX" in text)
            raise EnvError(f"{self.config.env_id} failed: {text}") from error


def make_here(config: EnvConfig, registered, parent: int, index: int, seed: int) -> gym.Env:
    """The environment in its process; also in the parent, where Gymnasium only reads the spaces."""
    if os.getpid() == parent:
        import torch  # not in the processes; the random numbers here are the agent's
        folder, drawn = os.getcwd(), np.random.get_state()
        with torch.random.fork_rng([]):
            env = make_env(replace(config, films=config.films and ""))
        np.random.set_state(drawn)
        os.chdir(folder)
        return env
    if hasattr(os, "setsid"):  # Ctrl-C, and what `timeout` sends, is the parent's to handle
        os.setsid()
    threading.Thread(target=leave_with_parent, daemon=True).start()
    random.seed(seed)  # an environment may draw from the global generators
    np.random.seed(seed)
    if registered and ":" not in config.env_id:  # by the main script, not imported here
        gym.registry.setdefault(registered.id, registered)
    return make_env(replace(config, films=None) if index else config)


def leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # even from within an environment that hangs
