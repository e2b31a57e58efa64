"""Any Gymnasium environment behind one contract, singly or several in lockstep.

`make_env` gives one `gym.Env` whose observation is a Dict of `image` (uint8, H x W x C) and/or
`vector` (float32, flat) and whose action is `Discrete(A)` or `Box(-1, 1, (A,))`. `Envs` steps N of
them together and answers with one `EnvStep`, a batch of N rows:

    call            reset()    step(a0)   step(a1)  ...  step(a_n-1)    step(ignored)   step(a0')
    observation     x0         x1         x2             x_n            x0'             x1'
    reward          0          r1         r2             r_n            0               r1'
    is_first        1          0          0              0              1               0
    is_last         0          0          0              1              0               0
    is_terminal     0          0          0              terminated?    0               0

So the last observation of an episode is seen, with its reward, and the next `step` ignores that
environment's action and starts its next episode (Gymnasium's `AutoresetMode.NEXT_STEP`). A time
limit ends an episode (`is_last`) but is not a terminal: the agent must still bootstrap there.

What breaks in an environment does not break the run: see `Envs`. Whatever the user can mend is an
`EnvError` of one line, which says what to do.
"""

import contextlib
import difflib
import functools
import multiprocessing
import operator
import os
import pickle
import signal
import sys
import threading
import time
import types
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import gymnasium as gym
import numpy as np
from gymnasium import spaces

try:
    import ale_py  # registers the Atari ids

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner in every process
except ImportError:
    ale_py = None

START_SECONDS = 120.0  # to import, build and reset, on top of `timeout`: slow on a busy machine


class EnvError(Exception):
    """The environment cannot be used. The message is one line, fit to be shown to the user."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # the text of a space may have several


class EnvFailure(Exception):
    """One environment broke while it ran (internal: `Envs` rebuilds that environment)."""


@dataclass(frozen=True)
class EnvConfig:
    """All that it takes to build an environment, in this process or in another (picklable)."""

    env_id: str  # a Gymnasium id; "module:Id-v0" imports `module`, which registers the id
    image_size: int = 64  # pixels; height and width of the image
    grayscale: bool = False  # one channel instead of three
    action_repeat: int = 1  # environment steps per agent step (Atari: the frame skip)
    max_episode_steps: int = 0  # in agent steps; 0: the environment's own limit, else replaces it
    noop_max: int = 30  # Atari only: an episode starts with 1 to noop_max no-ops
    clip_rewards: bool = False  # EnvStep.reward within [-1, 1]; episode_return stays raw
    render: bool = False  # `Envs.render` gives frames


@dataclass(frozen=True)
class EnvSpec:
    """What an agent needs to know of an environment."""

    image_shape: tuple[int, int, int] | None  # (H, W, C)
    vector_dim: int  # V; 0: no vector
    action_dim: int  # A
    discrete: bool  # actions are one-hot, otherwise in [-1, 1]


class EnvStep(NamedTuple):
    """One row per environment, N in all."""

    image: np.ndarray | None  # (N, H, W, C) uint8
    vector: np.ndarray | None  # (N, V) float32
    reward: np.ndarray  # (N,) float32; received with this observation, 0 where is_first
    is_first: np.ndarray  # (N,) bool
    is_last: np.ndarray  # (N,) bool; terminated or truncated
    is_terminal: np.ndarray  # (N,) bool; terminated: nothing can be earned from here on
    episode_return: np.ndarray  # (N,) float64; unclipped, so far; complete where is_last
    episode_length: np.ndarray  # (N,) int64; agent steps so far


# ------------------------------------------------------------------------ one environment


def is_atari(env_id: str) -> bool:
    name = env_id.rpartition(":")[2]
    is_usual = name.startswith("ALE/") or "NoFrameskip-v" in name  # known even without ale_py
    return is_usual or _entry_point(env_id).startswith("ale_py")


def default_action_repeat(env_id: str) -> int:
    """4 for Atari, as in the papers, otherwise 1."""
    return 4 if is_atari(env_id) else 1


def make_env(config: EnvConfig) -> gym.Env:
    """Builds one environment under the contract of this file. Raises only EnvError."""
    try:
        return _make(config)
    except EnvError:
        raise
    except (Exception, SystemExit) as error:
        raise EnvError(_explain(config.env_id, error)) from error


def env_spec(env: gym.Env) -> EnvSpec:
    """The sizes of an environment that `make_env` made."""
    shapes = {key: space.shape for key, space in env.observation_space.items()}
    vector_dim, action_dim = sum(shapes.get("vector", ())), spaces.flatdim(env.action_space)
    is_discrete = isinstance(env.action_space, spaces.Discrete)
    return EnvSpec(shapes.get("image"), vector_dim, action_dim, is_discrete)


def _make(config: EnvConfig) -> gym.Env:
    if config.action_repeat < 1 or config.image_size < 1 or config.max_episode_steps < 0:
        raise EnvError(f"action_repeat and image_size start at 1, max_episode_steps at 0: {config}")
    if os.getcwd() not in sys.path:  # for `module:Id-v0`: the module is where the user stands
        sys.path.append(os.getcwd())
    kwargs = {"render_mode": "rgb_array"} if config.render else {}
    if config.max_episode_steps:
        kwargs["max_episode_steps"] = -1  # no limit in environment steps: ours counts agent steps
    if is_atari(config.env_id):
        if ale_py is None:
            raise EnvError(f"{config.env_id} needs Atari: {_install('atari')}")
        # frameskip=1 because the wrapper skips: it needs the last two frames for the maximum (a
        # sprite may be drawn on every other frame only). Sticky actions stay as the id has them
        # (NoFrameskip-v4: none, ALE/...-v5: 0.25), and so does ALE's limit of 108,000 frames.
        env = gym.make(config.env_id, disable_env_checker=True, frameskip=1, **kwargs)
        env = gym.wrappers.AtariPreprocessing(
            env, config.noop_max, config.action_repeat, config.image_size,
            terminal_on_life_loss=False, grayscale_obs=config.grayscale, grayscale_newaxis=True,
        )
    else:
        env = gym.make(config.env_id, disable_env_checker=True, **kwargs)
        env = ActionRepeat(env, config.action_repeat) if config.action_repeat > 1 else env
    if config.max_episode_steps:
        env = gym.wrappers.TimeLimit(env, config.max_episode_steps)
    return ImageAndVector(_standard_actions(env), config.image_size, config.grayscale)


class ActionRepeat(gym.Wrapper):
    """Repeats each action, sums the rewards, and stops where the episode ends."""

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        total = 0.0
        for _ in range(self.repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


def _standard_actions(env: gym.Env) -> gym.Env:
    """`Discrete(A)` counting from 0, or a flat `Box(-1, 1, (A,))`; clips what lies outside."""
    space = env.action_space
    if isinstance(space, spaces.Discrete):
        from_zero = spaces.Discrete(space.n)
        return gym.wrappers.TransformAction(env, lambda index: index + space.start, from_zero)
    is_float_box = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
    if not (is_float_box and space.is_bounded()):
        raise EnvError(f"action space {space} is not supported: use Discrete or bounded float Box")
    low, high = space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)

    def rescale(action):
        unit = np.clip(action, -1.0, 1.0).astype(np.float64)
        scaled = (low * (1 - unit) + high * (1 + unit)) / 2  # exact at both ends
        return scaled.reshape(space.shape).astype(space.dtype)

    return gym.wrappers.TransformAction(env, rescale, spaces.Box(-1.0, 1.0, low.shape, np.float32))


class ImageAndVector(gym.ObservationWrapper):
    """Sorts the parts of any observation into one image and one vector, and checks them.

    Images (uint8 of shape H x W, H x W x C or C x H x W, with C 1 or 3) are resized and stacked on
    channels; all else is flattened by Gymnasium's `flatten` (a Discrete becomes one-hot) and
    concatenated; both in the order of the keys. An observation that is not what its space promises
    (shape, kind of number, NaN, infinity) raises ValueError, for it would poison the replay buffer.
    """

    def __init__(self, env: gym.Env, image_size: int, grayscale: bool):
        super().__init__(env)
        self.image_size, self.grayscale = image_size, grayscale
        self.image_leaves, self.vector_leaves = [], []  # [(path of keys, space)]
        for path, space in _leaves(env.observation_space):
            (self.image_leaves if _is_image(space) else self.vector_leaves).append((path, space))
        parts = {}
        if self.image_leaves:
            channels = sum(self._to_image(space.low).shape[-1] for _, space in self.image_leaves)
            parts["image"] = spaces.Box(0, 255, (image_size, image_size, channels), np.uint8)
        if dim := sum(spaces.flatdim(space) for _, space in self.vector_leaves):
            parts["vector"] = spaces.Box(-np.inf, np.inf, (dim,), np.float32)
        if not parts:
            raise EnvError(f"observation space {env.observation_space} is empty")
        self.observation_space = spaces.Dict(parts)

    def observation(self, observation):
        result = {}
        if self.image_leaves:
            images = [self._to_image(_leaf(observation, *leaf)) for leaf in self.image_leaves]
            result["image"] = np.concatenate(images, axis=-1)
        if "vector" in self.observation_space.spaces:
            flat = [spaces.flatten(s, _leaf(observation, p, s)) for p, s in self.vector_leaves]
            result["vector"] = np.concatenate(flat).astype(np.float32)
            if not np.isfinite(result["vector"]).all():
                raise ValueError("the observation holds NaN or infinity")
        return result

    def _to_image(self, image: np.ndarray) -> np.ndarray:
        """(H, W), (H, W, C) or (C, H, W) -> (image_size, image_size, C)."""
        size = self.image_size
        if image.ndim == 3 and image.shape[-1] not in (1, 3):
            image = np.moveaxis(image, 0, -1)
        if self.grayscale and image.shape[2:] == (3,):
            image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
        if image.shape[:2] != (size, size):
            image = np.ascontiguousarray(image)
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
        return image.reshape(size, size, -1)  # OpenCV drops a channel axis of length 1


def _leaves(space: spaces.Space, path: tuple = ()):
    """Yields (path of keys, space) for every part of nested Dicts and Tuples, in order."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        is_dict = isinstance(space, spaces.Dict)
        for key, part in space.spaces.items() if is_dict else enumerate(space.spaces):
            yield from _leaves(part, (*path, key))
    elif isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)):
        yield path, space
    else:
        known = "Box, Discrete, MultiBinary, MultiDiscrete, or Dict and Tuple of these"
        raise EnvError(f"observation space {space} is not supported: use {known}")


def _is_image(space: spaces.Space) -> bool:
    shape = space.shape
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(shape) not in (2, 3):
        return False
    if len(shape) == 3 and shape[-1] not in (1, 3) and shape[0] not in (1, 3):
        raise EnvError(f"observation space {space} is not supported: an image has 1 or 3 channels")
    return True


def _leaf(observation, path: tuple, space: spaces.Space):
    """The part of `observation` at `path`, or ValueError if it is not what `space` promises."""
    value = functools.reduce(operator.getitem, path, observation)
    name = "".join(f"[{key!r}]" for key in path)
    if not isinstance(space, spaces.Box):
        if not space.contains(value):
            raise ValueError(f"observation{name} {value!r} is not in {space}")
        return value
    array = np.asarray(value)
    # A vector becomes float32 anyway, so any real numbers do; a picture of floats is a mistake.
    is_kind = array.dtype == np.uint8 if _is_image(space) else array.dtype.kind in "biuf"
    if array.shape != space.shape or not is_kind:
        raise ValueError(f"observation{name} is {array.dtype}{array.shape}, expected {space}")
    return array


def _entry_point(env_id: str) -> str:
    spec = gym.registry.get(env_id.rpartition(":")[2])
    return str(spec.entry_point) if spec else ""


def _install(extra: str) -> str:
    return f'pip install "gymnasium[{extra}]=={gym.__version__}"'


def _explain(env_id: str, error: BaseException) -> str:
    """One line for the user on why Gymnasium could not make `env_id`."""
    entry_point, name = _entry_point(env_id), env_id.rpartition(":")[2]
    if isinstance(error, gym.error.DependencyNotInstalled) and "gymnasium.envs." in entry_point:
        extra = entry_point.split(":")[0].split(".")[2]  # gymnasium.envs.box2d.car_racing:CarRacing
        return f"{env_id} needs a package: {_install(extra)}"
    if isinstance(error, ImportError) and not entry_point:
        return f"cannot import the module of {env_id!r} (run from its folder?): {_one_line(error)}"
    if isinstance(error, (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv)) or not entry_point:
        similar = difflib.get_close_matches(name, gym.registry) or ["your_module:YourEnv-v0"]
        return f"unknown environment id {env_id!r}; did you mean {' or '.join(similar)}?"
    return f"cannot build {env_id!r}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# ------------------------------------------------------------------------ several environments


class LocalEnv:
    """One environment in this process, with the return and the length of its episode.

    Used through `send(method, *args)` and then `recv()`, as RemoteEnv is; it is built at the first
    `recv`. A row is an `EnvStep` without the axis N.
    """

    def __init__(self, config: EnvConfig, seed: int, same_seed: bool):
        self.config, self.seed, self.same_seed = config, seed, same_seed
        self.env, self.length = None, -1

    def send(self, method, *args):
        self.request = method, args

    def recv(self, timeout: float = 0.0):
        """Raises EnvError if it cannot be built, EnvFailure if it breaks afterwards."""
        method, args = self.request
        if self.env is None:
            self.env = make_env(self.config)
            self.env.action_space.seed(self.seed)
        try:
            return method(self, *args)
        except (Exception, SystemExit) as error:
            raise EnvFailure(_one_line(error)) from error

    def close(self, patience: float = 0.0):
        with contextlib.suppress(Exception):
            self.env.close()

    def spec(self) -> EnvSpec:
        return env_spec(self.env)

    def reset(self) -> EnvStep:
        observation, _ = self.env.reset(seed=self.seed)
        # Later episodes go on with the environment's own generator, or all would be the same.
        self.seed = self.seed if self.same_seed else None
        self.episode_return, self.length = 0.0, 0
        return self._row(observation, 0.0, True, False, False)

    def step(self, action: np.ndarray) -> EnvStep:
        """action: (A,), one-hot or continuous."""
        is_discrete = isinstance(self.env.action_space, spaces.Discrete)
        native = np.argmax(action) if is_discrete else action
        observation, reward, terminated, truncated, _ = self.env.step(native)
        if not np.isfinite(np.float32(reward)):
            raise ValueError(f"the reward is {reward}")
        self.episode_return += float(reward)
        self.length += 1
        is_last = bool(terminated) or bool(truncated)
        return self._row(observation, float(reward), False, is_last, bool(terminated))

    def render(self) -> np.ndarray | None:
        return self.env.render() if self.length >= 0 else None

    def _row(self, observation: dict, reward: float, *ends: bool) -> EnvStep:
        reward = np.float32(np.clip(reward, -1, 1) if self.config.clip_rewards else reward)
        image, vector = observation.get("image"), observation.get("vector")
        return EnvStep(image, vector, reward, *ends, self.episode_return, self.length)


class RemoteEnv:
    """The same in a process of its own, which also survives a hang or a crash in there."""

    def __init__(self, config: EnvConfig, seed: int, same_seed: bool):
        # spawn, not fork: the parent has threads (torch), whose locks a fork would copy locked.
        context = multiprocessing.get_context("spawn")
        self.conn, theirs = context.Pipe()
        args = theirs, (config, seed, same_seed), gym.registry.get(config.env_id)
        self.process = context.Process(target=_serve, args=args, daemon=True)
        self.grace = START_SECONDS
        # spawn imports the parent's main script in the child: that is torch, seconds and hundreds
        # of megabytes for nothing. An empty module in its place leaves spawn nothing to import.
        main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
        try:
            self.process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            hint = "register it in a module and use the id module:Id-v0, or use 1 environment"
            raise EnvError(f"{config.env_id} cannot be sent to a process: {hint}") from error
        finally:
            sys.modules["__main__"] = main
            theirs.close()  # or the end of the child would not be the end of the pipe

    def send(self, method, *args):
        self.sent = time.monotonic()
        with contextlib.suppress(OSError):  # a dead process: recv tells
            self.conn.send((method, *args))

    def recv(self, timeout: float):
        """As LocalEnv.recv; EnvFailure also if no answer came `timeout` seconds after `send`."""
        deadline = self.sent + timeout + self.grace
        try:
            if not self.conn.poll(max(0.0, deadline - time.monotonic())):
                raise EnvFailure(f"no answer for {timeout:g} s")
            reply = self.conn.recv()
        except (EOFError, OSError) as error:
            self.process.join(1)
            raise EnvFailure(f"its process died, exit code {self.process.exitcode}") from error
        if isinstance(reply, Exception):
            raise reply
        self.grace = 0.0
        return reply

    def close(self, patience: float = 2.0):
        self.conn.close()  # the child takes this as the sign to leave
        self.process.join(patience)
        self.process.kill()
        self.process.join()


def _serve(conn, args: tuple, registered):
    """What the process of a RemoteEnv does: answers requests until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def leave_with_parent():  # even from within an environment that hangs
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    if registered is not None:  # by an import in the main script, which is not repeated here
        gym.registry.setdefault(registered.id, registered)
    slot = LocalEnv(*args)
    with contextlib.suppress(EOFError, OSError):
        while True:
            slot.send(*conn.recv())
            try:
                reply = slot.recv()
            except (EnvError, EnvFailure) as error:
                reply = error
            conn.send(reply)
    slot.close()


class Envs:
    """N environments in lockstep; see the top of the file for what `reset` and `step` return.

    One environment lives in this process, several in a process each. The stream of environment i
    depends on `seed` and i alone: its first reset gets a seed made of the two, later resets none.
    With `fixed_seed`, every reset of every environment gets exactly that seed.

    An environment that raises, dies or hangs (these two: in a process only), or that returns NaN,
    infinity or an observation that is not in its space, is reported on stderr and rebuilt. Its
    episode is closed as truncated: that step returns the last good observation, reward 0 and
    is_last; the next one is_first. EnvError after more than `max_restarts` of these in all, and at
    once if an environment cannot be built or its first reset fails.

    timeout: seconds that an environment may take to answer.
    """

    def __init__(
        self, config: EnvConfig, num_envs: int, seed: int,
        max_restarts: int = 10, timeout: float = 60.0, fixed_seed: int | None = None,
    ):
        if num_envs < 1:
            raise EnvError(f"the number of environments must be at least 1, got {num_envs}")
        self.config, self.num_envs, self.seed, self.fixed_seed = config, num_envs, seed, fixed_seed
        self.max_restarts, self.timeout = max_restarts, timeout
        self._restarts, self._steps, self._last = [0] * num_envs, 0, None
        self._slots = [self._open(index) for index in range(num_envs)]
        self.spec = self._exchange([(LocalEnv.spec,)] * num_envs)[0]

    @property
    def restarts(self) -> np.ndarray:
        """(N,) how often each environment had to be rebuilt."""
        return np.array(self._restarts)

    def reset(self) -> EnvStep:
        """Starts a new episode in every environment."""
        self._last = _stack(self._exchange([(LocalEnv.reset,)] * self.num_envs))
        return self._last

    def step(self, action: np.ndarray) -> EnvStep:
        """action: (N, A) float, one-hot or continuous (clipped to [-1, 1]).

        Raises ValueError for any other shape and for NaN: that is the agent's fault, and must not
        be blamed on the environment.
        """
        expected = (self.num_envs, self.spec.action_dim)
        if np.shape(action) != expected or not np.isfinite(action).all():
            raise ValueError(f"actions must be finite and of shape {expected}: {action!r}")
        if self._last is None:
            raise RuntimeError("call reset before step")
        self._steps += 1
        requests = [(LocalEnv.reset,) if is_last else (LocalEnv.step, row)
                    for row, is_last in zip(action, self._last.is_last)]
        self._last = _stack(self._exchange(requests))
        return self._last

    def render(self) -> np.ndarray | None:
        """The RGB frame of the first environment; None if it is being rebuilt. EnvError if not."""
        self._slots[0].send(LocalEnv.render)
        try:
            return self._slots[0].recv(self.timeout)
        except EnvFailure as error:
            hint = "without a display, set MUJOCO_GL=egl for MuJoCo or do not capture video"
            raise EnvError(f"{self.config.env_id} cannot render ({hint}): {error}") from error

    def close(self):
        """Ends the environments and their processes. May be called twice."""
        for slot in self._slots:
            slot.close()
        self._slots = []

    def _open(self, index: int):
        # Rebuilt with the same seed, it would run into the same failure, so that number counts.
        restarts = self._restarts[index]
        words = [self.seed, index, restarts] if restarts else [self.seed, index]
        seed = int(np.random.SeedSequence(words).generate_state(1)[0]) >> 1  # some want 31 bits
        kind = LocalEnv if self.num_envs == 1 else RemoteEnv
        fixed = self.fixed_seed
        return kind(self.config, seed if fixed is None else fixed, fixed is not None)

    def _exchange(self, requests: list[tuple]) -> list:
        """Sends all, then collects all, in order: they work at the same time, and no result
        depends on which is faster."""
        for slot, request in zip(self._slots, requests):
            slot.send(*request)
        return [self._collect(index, request) for index, request in enumerate(requests)]

    def _collect(self, index: int, request: tuple):
        while True:
            try:
                return self._slots[index].recv(self.timeout)
            except EnvFailure as failure:
                self._restart(index, failure)
            if request[0] is LocalEnv.step:
                good = EnvStep(*[None if x is None else x[index] for x in self._last])
                ends = {"is_first": False, "is_last": True, "is_terminal": False}
                return good._replace(reward=np.float32(0), **ends)
            self._slots[index].send(*request)  # an episode could not start: try again

    def _restart(self, index: int, failure: EnvFailure):
        if self._last is None:
            raise EnvError(f"{self.config.env_id} cannot start its first episode: {failure}")
        where = f"{self.config.env_id} (environment {index}) failed at step {self._steps}"
        self._restarts[index] += 1
        count = f"restart {sum(self._restarts)} of {self.max_restarts}"
        if sum(self._restarts) > self.max_restarts:
            raise EnvError(f"{where}, too often (max_restarts={self.max_restarts}): {failure}")
        print(f"{where}, {count}: {failure}", file=sys.stderr, flush=True)
        self._slots[index].close(patience=0.0)
        self._slots[index] = self._open(index)


def _stack(rows: list[EnvStep]) -> EnvStep:
    return EnvStep(*[None if column[0] is None else np.stack(column) for column in zip(*rows)])
