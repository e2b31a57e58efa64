"""Several environments in lockstep: `Envs` answers every call with one `EnvStep` of N rows.

    call            reset()    step(a0)   step(a1)  ...  step(a_n-1)    step(ignored)   step(a0')
    observation     x0         x1         x2             x_n            x0'             x1'
    reward          0          r1         r2             r_n            0               r1'
    is_first        1          0          0              0              1               0
    is_last         0          0          0              1              0               0
    is_terminal     0          0          0              terminated?    0               0

So the last observation of an episode is seen, with its reward, and the next `step` ignores that
environment's action and starts its next episode: this is Gymnasium's `AutoresetMode.NEXT_STEP`.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.vector.async_vector_env import _async_worker

from common.env_errors import RESULTS, EnvError, explain, rendering
from common.envs import PACKAGES, EnvConfig, env_spec, make_env

START_SECONDS = 120.0  # to import and build, on top of `timeout`: slow on a busy machine


class EnvStep(NamedTuple):
    """One row per environment, N in all."""

    image: np.ndarray | None  # (N, H, W, C) uint8
    vector: np.ndarray | None  # (N, V) float32
    reward: np.ndarray  # (N,) float32; received with this observation, 0 where is_first
    is_first: np.ndarray  # (N,) bool
    is_last: np.ndarray  # (N,) bool; terminated or truncated
    is_terminal: np.ndarray  # (N,) bool; terminated: nothing can be earned from here on
    episode_return: np.ndarray  # (N,) float64; so far; complete where is_last
    episode_length: np.ndarray  # (N,) int64; agent steps so far


class Envs:
    """N environments in lockstep; see the top of the file for what `reset` and `step` return.

    One environment lives in this process, several in a process each. The stream of environment i
    depends on `seed` and i alone: its first reset gets a seed made of the two, later resets none.
    With `fixed_seed`, every reset of every environment gets exactly that seed.

    An environment that raises or exits, or that returns NaN, infinity or an observation that is not
    in its space, is reported on stderr and rebuilt. Its episode is closed as truncated: that step
    returns the last good observation, reward 0 and is_last; the next one is_first. EnvError after
    more than `max_restarts` of these in all, and at once if an environment cannot be built, its
    first reset fails, its process dies, or it takes more than `timeout` seconds to answer.
    """

    def __init__(self, config: EnvConfig, num_envs: int, seed: int, max_restarts: int = 10,
                 timeout: float = 60.0, fixed_seed: int | None = None):
        if num_envs < 1:
            raise EnvError(f"the number of environments must be at least 1, got {num_envs}")
        env = make_env(config)
        self.config, self.num_envs, self.spec = config, num_envs, env_spec(env)
        self.max_restarts, self.timeout = max_restarts, timeout
        self.restarts = np.zeros(num_envs, int)  # how often each environment had to be rebuilt
        self._steps, self._is_last = 0, None
        self._return, self._length = np.zeros(num_envs), np.zeros(num_envs, int)
        # What the main script registered is sent to the processes, which do not import that script.
        registered = gym.registry.get(config.env_id)
        if config.env_id.startswith(tuple(PACKAGES)):
            registered = None  # they import the package themselves
        makers = [partial(SturdyEnv, config, env.observation_space, env.action_space, (seed, index),
                          fixed_seed, max_restarts, registered) for index in range(num_envs)]
        if num_envs == 1:
            self._vector = SyncVectorEnv([partial(makers[0], env=env)], copy=False)
        else:
            env.close()
            self._vector = _start_processes(makers)
        self._vector.limit = timeout + START_SECONDS

    def reset(self) -> EnvStep:
        """Starts a new episode in every environment."""
        with self._answering():
            observation, infos = self._vector.reset()
        if self._is_last is None and 0 < observation.get("image", np.zeros(1)).max() < 16:
            print(f"note: the brightest pixel of the first picture of {self.config.env_id} is "
                  f"{observation['image'].max()} of 255; if these are codes, not colours, turn "
                  "`pixels` on", file=sys.stderr, flush=True)
        no = np.zeros(self.num_envs, bool)
        return self._row(observation, infos, np.zeros(self.num_envs), ~no, no, no)

    def step(self, action: np.ndarray) -> EnvStep:
        """action: (N, A) float, one-hot or continuous (clipped to [-1, 1]).

        Raises ValueError for any other shape and for NaN: that is the agent's fault, and must not
        be blamed on the environment.
        """
        expected = (self.num_envs, self.spec.action_dim)
        if np.shape(action) != expected or not np.isfinite(action).all():
            raise ValueError(f"actions must be finite and of shape {expected}: {action!r}")
        if self._is_last is None:
            raise RuntimeError("call reset before step")
        self._steps += 1
        native = np.argmax(action, 1) if self.spec.discrete else action
        with self._answering():
            observation, reward, terminated, truncated, infos = self._vector.step(native)
        return self._row(observation, infos, reward, self._is_last, terminated, truncated)

    def render(self) -> np.ndarray | None:
        """The RGB frame of the first environment; None if it is being rebuilt. EnvError if not."""
        with self._answering():
            frame = self._vector.render()[0]
        if isinstance(frame, str):
            raise EnvError(f"{self.config.env_id} cannot render: {frame} ({rendering()})")
        return frame

    def close(self):
        """Ends the environments and their processes. May be called twice."""
        if self.num_envs == 1:
            self._vector.close()
        elif not self._vector.closed:
            self._vector.closed = True
            for pipe in self._vector.parent_pipes:
                with contextlib.suppress(OSError):  # its process is dead
                    pipe.send(("close", None))
            deadline = time.monotonic() + 2
            for process in self._vector.processes:
                process.join(max(0, deadline - time.monotonic()))
                process.kill()  # it hangs, or it has left anyway
                process.join()

    def _row(self, observation, infos, reward, is_first, terminated, truncated) -> EnvStep:
        for index, reasons in enumerate(infos.get("failed", ())):
            for reason in reasons or ():
                self._count(index, reason)
        failed = infos.get("_failed", False)
        self._vector.limit = self.timeout + START_SECONDS * np.any(failed)
        self._is_last = terminated | truncated
        self._return = np.where(is_first, 0.0, self._return + reward)
        self._length = np.where(is_first, 0, self._length + 1 - failed)
        # Copies, because Gymnasium writes the next observation into the same arrays.
        image, vector = (np.array(observation[key]) if key in observation else None
                         for key in ("image", "vector"))
        return EnvStep(image, vector, reward.astype(np.float32), is_first, self._is_last,
                       terminated, self._return, self._length)

    def _count(self, index: int, reason: str | EnvError):
        """One more failure of an environment; an EnvError if there is no going on."""
        if isinstance(reason, EnvError):
            raise reason
        self.restarts = self.restarts + (np.arange(self.num_envs) == index)
        count = self.restarts.sum()
        where = f"{self.config.env_id} (environment {index}) failed at step {self._steps}"
        if count > self.max_restarts:
            raise EnvError(f"{where}, too often (max_restarts={self.max_restarts}): {reason}")
        print(f"{where}, restart {count} of {self.max_restarts}: {reason}", file=sys.stderr,
              flush=True)

    @contextlib.contextmanager
    def _answering(self):
        """Makes an EnvError of an environment that hangs, and of a process that died."""
        try:
            with self._alarm() if self.num_envs == 1 else contextlib.nullcontext():
                yield
        except BaseException as error:
            self.close()  # also after Ctrl-C: what answers are on their way is not known
            if not isinstance(error, (multiprocessing.TimeoutError, EOFError, OSError)):
                raise
            is_late = isinstance(error, multiprocessing.TimeoutError)
            what = f"gave no answer for {self._vector.limit:g} s" if is_late else "died"
            codes = [process.exitcode for process in self._vector.processes]
            text = f"a process of {self.config.env_id} {what} (exit codes {codes})"
            raise EnvError(text) from error

    @contextlib.contextmanager
    def _alarm(self):
        """Ends what the one environment in this process does (in Python) when it takes too long."""
        is_main_thread = threading.current_thread() is threading.main_thread()
        if not (is_main_thread and hasattr(signal, "SIGALRM")):  # no other thread gets signals
            yield
            return

        def ring(number, frame):
            raise EnvError(f"{self.config.env_id} gave no answer for {self._vector.limit:g} s")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, self._vector.limit)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@dataclass(eq=False)
class SturdyEnv(gym.Env):
    """One environment that never raises: what breaks is rebuilt, and `info["failed"]` tells why.

    It lives where the environment lives: a process of several would end with what it raises.
    """

    config: EnvConfig
    observation_space: gym.Space
    action_space: gym.Space
    entropy: tuple[int, int]  # of its seeds: the seed of all, and which one this is
    fixed_seed: int | None
    max_restarts: int
    registered: gym.envs.registration.EnvSpec | None  # what the id means, if not known anyway
    env: gym.Env | None = None  # None: built by the next reset
    is_new = True
    restarts, last = 0, None

    def reset(self, *, seed=None, options=None):
        """Starts an episode, in a new environment if the old one broke; chooses the seed itself."""
        failed = []
        while len(failed) <= self.max_restarts:
            try:
                self.last = self._start()
                break
            except (Exception, SystemExit) as error:
                failed.append(self._drop(error))
                if isinstance(failed[-1], EnvError):
                    break
        observation = self.last or self.observation_space.sample()
        return observation, {"failed": failed} if failed else {}

    def step(self, action):
        """As the environment does; if that fails, ends the episode with what was seen last."""
        try:
            observation, reward, terminated, truncated, _ = self.env.step(action)
            reward, terminated, truncated = _number(reward), bool(terminated), bool(truncated)
        except (Exception, SystemExit) as error:
            return self.last, 0.0, False, True, {"failed": [self._drop(error)]}
        self.last = observation
        return observation, reward, terminated, truncated, {}

    def render(self) -> np.ndarray | str | None:
        """A frame of the first environment, None of the others, or the reason why there is none."""
        if self.entropy[1] or self.env is None or self.last is None:
            return None
        try:
            frame = self.env.render()
            return "render() gave None" if frame is None else frame
        except (Exception, SystemExit) as error:
            return explain(error)

    def close(self):
        with contextlib.suppress(Exception):
            self.env.close()

    def _start(self) -> dict:
        if self.env is None:
            if self.registered:
                gym.registry.setdefault(self.registered.id, self.registered)
            self.env, self.is_new = make_env(self.config), True
            if self.env.observation_space != self.observation_space:
                raise EnvError(f"{self.config.env_id} has another observation space when rebuilt")
        seed = self.fixed_seed
        if self.is_new and seed is None:
            # Rebuilt with the same seed, it would run into the same failure, so that number counts.
            words = [*self.entropy, self.restarts] if self.restarts else self.entropy
            seed = int(np.random.SeedSequence(words).generate_state(1)[0]) >> 1  # some want 31 bits
        self.is_new = False
        return self.env.reset(seed=seed)[0]

    def _drop(self, error: BaseException) -> str | EnvError:
        """Lets the broken environment go. An EnvError if another one would be no better."""
        self.close()
        self.env, self.restarts = None, self.restarts + 1
        if self.last is None and not isinstance(error, EnvError):
            text = f"{self.config.env_id} cannot start its first episode: {explain(error)}"
            is_told = RESULTS in text or not isinstance(error, ValueError)
            return EnvError(text if is_told else f"{text}; {RESULTS}")
        return error if isinstance(error, EnvError) else explain(error)


def _number(reward) -> float:
    """A reward of any type, also in an array of one."""
    try:
        number = float(np.asarray(reward).item())
    except (TypeError, ValueError) as error:
        raise ValueError(f"the reward {reward!r} is not a number") from error
    if not abs(number) <= np.finfo(np.float32).max:  # NaN is not, either
        raise ValueError(f"the reward is {number}")
    return number


class Processes(AsyncVectorEnv):
    """Gymnasium's environments in a process each, with a time limit for every answer."""

    limit = START_SECONDS

    def _poll_pipe_envs(self, timeout=None):
        return super()._poll_pipe_envs(self.limit if timeout is None else timeout)


def _start_processes(makers: list) -> Processes:
    """Starts a process for each environment, cheaply and deaf to Ctrl-C.

    A server that has imported what they all need forks them, so they share its memory.
    multiprocessing would also import the main script in each of them, and with it torch: seconds
    and hundreds of megabytes for nothing. An empty module in its place leaves it nothing to import.
    """
    multiprocessing.set_forkserver_preload(["ale_py", "cv2", "gymnasium.vector"])
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread:  # no other may do this
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit it
    try:
        return Processes(makers, copy=False, context="forkserver", worker=_worker)
    except Exception as error:
        raise EnvError(f"the processes of the environments do not start: {explain(error)}; use 1 "
                       "environment, or an id module:Id-v0 of a module of yours") from error
    finally:
        sys.modules["__main__"] = main
        if is_main_thread:
            signal.signal(signal.SIGINT, handler)


def _worker(*args):
    """What a process does: Gymnasium's loop, until the parent is gone, even if it was killed."""
    os.setsid()  # signals to the group, such as those of `timeout`, are the parent's to handle
    gym.logger.min_level = gym.logger.ERROR  # the parent has shown the warnings
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):  # nobody is there any more
        _async_worker(*args)


def _leave_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # even from within an environment that hangs
