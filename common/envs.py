"""One environment, of any Gymnasium id, behind one contract. Several: see `common/vector.py`.

`make_env` gives one `gym.Env` whose observation is a Dict of `image` (uint8, H x W x C) and/or
`vector` (float32, flat) and whose action is `Discrete(A)` or `Box(-1, 1, (A,))`. A time limit is
`truncated`, not `terminated`: the agent must still bootstrap there. Whatever the user can mend is
an `EnvError` of one line, which says what to do.
"""

import functools
import importlib
import math
import operator
import os
import sys
from dataclasses import dataclass, field

import cv2
import gymnasium as gym
import numpy as np
from gymnasium import spaces

from common.env_errors import EnvError, entry_point, reason

try:
    import ale_py  # registers the Atari ids

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner in every process
except ImportError:
    ale_py = None

PACKAGES = {  # how an id begins: what to install; modules whose import registers such ids
    "dm_control": ("shimmy[dm-control]", "dm_control", "shimmy"),
    "MiniGrid": ("minigrid", "minigrid"), "BabyAI": ("minigrid", "minigrid"),
    "Vizdoom": ("vizdoom", "vizdoom.gymnasium_wrapper"),
}
COMBINED = spaces.MultiBinary, spaces.MultiDiscrete
NUMBERS = spaces.Box, spaces.Discrete, *COMBINED
COLOURS, MAX_CHANNELS = (1, 3, 4), 16  # a grey, an RGB or an RGBA picture; a stack of several


@dataclass(frozen=True)
class EnvConfig:
    """All that it takes to build an environment, in this process or in another (picklable)."""

    env_id: str  # a Gymnasium id; "module:Id-v0" imports `module`, which registers the id
    image_size: int = 64  # pixels; height and width of the image
    grayscale: bool = False  # one channel instead of three
    action_repeat: int = 1  # environment steps per agent step (Atari: the frame skip)
    max_episode_steps: int = 0  # in agent steps; 0: the environment's own limit, else replaces it
    noop_max: int = 30  # Atari only: an episode starts with 1 to noop_max no-ops
    render: bool = False  # `Envs.render` gives frames
    pixels: bool = False  # the rendered picture is the observation (it is anyway on Atari)
    sticky: float | None = None  # Atari only: chance that an action is ignored; None: the id's


@dataclass(frozen=True)
class EnvSpec:
    """What an agent needs to know of an environment, and what its user may want to read."""

    image_shape: tuple[int, int, int] | None  # (H, W, C)
    vector_dim: int  # V; 0: no vector
    action_dim: int  # A
    discrete: bool  # actions are one-hot, otherwise in [-1, 1]
    summary: str = field(default="", compare=False)  # one line: what was understood
    notices: tuple[str, ...] = field(default=(), compare=False)  # what may not be as intended


def is_atari(env_id: str) -> bool:
    """Whether this is an Atari game. The usual ids are known even without ale_py."""
    usual = "ALE/" in env_id or "NoFrameskip-v" in env_id
    return usual or entry_point(env_id).startswith("ale_py")


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
        raise EnvError(reason(config, error, is_atari(config.env_id))) from error


def probe(config: EnvConfig) -> EnvSpec:
    """The spec of an environment that is built for this alone."""
    with make_env(config) as env:
        return env_spec(env)


def env_spec(env: gym.Env) -> EnvSpec:
    """The sizes of an environment that `make_env` made, and a description of it in words."""
    shapes = {key: space.shape for key, space in env.observation_space.items()}
    words, action_dim = [], spaces.flatdim(env.action_space)
    for key, shape in shapes.items():
        leaves = env.images if key == "image" else env.vectors
        names = ", ".join(repr("/".join(map(str, path))) for path, *_ in leaves if path)
        words += [f"{key} {'x'.join(map(str, shape))}" + (names and f" from {names}")]
    is_discrete, given = isinstance(env.action_space, spaces.Discrete), env.unwrapped.action_space
    words += [f"{action_dim} {'discrete' if is_discrete else 'continuous'} action"
              + "s" * (action_dim > 1)
              + f", all combinations of {given}" * isinstance(given, COMBINED)]
    words += [f"each for {env.frames} frames"] * (env.frames > 1)
    return EnvSpec(shapes.get("image"), sum(shapes.get("vector", ())), action_dim, is_discrete,
                   " ".join("; ".join(words).split()), tuple(env.notices))


def _make(config: EnvConfig) -> gym.Env:
    least = min(config.action_repeat, config.image_size, config.max_episode_steps + 1)
    if least < 1 or not 0 <= (config.sticky or 0) <= 1:
        raise EnvError("action_repeat and image_size start at 1, max_episode_steps at 0, and "
                       f"sticky is a probability: {config}")
    if os.getcwd() not in sys.path:  # for `module:Id-v0`: the module is where the user stands
        sys.path.append(os.getcwd())
    kwargs = {"max_episode_steps": -1} if config.max_episode_steps else {}  # ours: agent steps
    if config.render or config.pixels:
        kwargs["render_mode"] = "rgb_array"
        if not any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY"))) and sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo's own choice needs a display
    _import_package(config.env_id)
    if is_atari(config.env_id):
        env = _make_atari(config, kwargs)
    else:
        env = gym.make(config.env_id, disable_env_checker=True, **kwargs)
        if config.action_repeat > 1:
            env = gym.wrappers.RepeatAction(env, config.action_repeat)
        if config.pixels:
            env.reset(seed=0)  # or the next line's reset and MuJoCo's camera would be random
            env = gym.wrappers.AddRenderObservation(env, render_only=True)
    if config.max_episode_steps:
        env = gym.wrappers.TimeLimit(env, config.max_episode_steps)
    env = ImageAndVector(_standard_actions(env), config.image_size, config.grayscale)
    env.frames = config.action_repeat
    return env


def _import_package(env_id: str) -> None:
    package, *modules = next((PACKAGES[x] for x in PACKAGES if env_id.startswith(x)), ("",))
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        raise EnvError(f'{env_id} needs a package: pip install "{package}"') from error


def _make_atari(config: EnvConfig, kwargs: dict) -> gym.Env:
    if ale_py is None:
        raise gym.error.DependencyNotInstalled("ale_py")
    if config.sticky is not None:  # the ids have their own: NoFrameskip-v4 0, ALE/...-v5 0.25
        kwargs["repeat_action_probability"] = config.sticky
    # frameskip=1 because the wrapper skips: it takes the maximum of the last two frames (a sprite
    # may be drawn on every other frame only). ALE's own limit of 108,000 frames stays.
    env = gym.make(config.env_id, disable_env_checker=True, frameskip=1, **kwargs)
    return gym.wrappers.AtariPreprocessing(
        env, config.noop_max, config.action_repeat, config.image_size,
        terminal_on_life_loss=False, grayscale_obs=config.grayscale, grayscale_newaxis=True)


def _standard_actions(env: gym.Env) -> gym.Env:
    """`Discrete(A)` counting from 0, or a flat `Box(-1, 1, (A,))`; clips what lies outside."""
    space = env.action_space
    if isinstance(space, spaces.Discrete):
        return gym.wrappers.TransformAction(env, lambda index: index + space.start,
                                            spaces.Discrete(space.n))
    if isinstance(space, COMBINED):
        return _combined_actions(env)
    is_float_box = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
    low, high = (np.ravel(getattr(space, x, np.inf)).astype(np.float64) for x in ("low", "high"))
    if not (is_float_box and max(abs(low).max(), abs(high).max()) < np.finfo(np.float32).max):
        raise EnvError(f"action space {space} is not supported: use Discrete, MultiDiscrete, "
                       "MultiBinary or float Box with finite bounds")

    def rescale(action):
        unit = np.clip(action, -1.0, 1.0).astype(np.float64)
        scaled = (low * (1 - unit) + high * (1 + unit)) / 2  # exact at both ends
        return scaled.reshape(space.shape).astype(space.dtype)

    return gym.wrappers.TransformAction(env, rescale, spaces.Box(-1.0, 1.0, low.shape, np.float32))


def _combined_actions(env: gym.Env) -> gym.Env:
    """One choice among all combinations of the parts of a MultiDiscrete or MultiBinary action."""
    space = env.action_space
    start = getattr(space, "start", 0)  # a MultiBinary has none
    sizes = np.ravel(getattr(space, "nvec", np.full(space.shape, 2))).tolist()
    if (count := math.prod(sizes)) > 1024:
        raise EnvError(f"action space {space} is not supported: it has {count:,} combinations, "
                       "more than 1,024; leave some out with a wrapper")

    def split(index):
        return (np.reshape(np.unravel_index(index, sizes), space.shape) + start).astype(space.dtype)

    return gym.wrappers.TransformAction(env, split, spaces.Discrete(count))


class ImageAndVector(gym.ObservationWrapper):
    """Sorts the parts of any observation into one image and one vector, and checks them.

    Pictures (see `_is_image`) are resized and stacked on channels; all else but text is flattened
    (a Discrete becomes one-hot) and concatenated; both in the order of the keys. What the space
    does not promise (shape, kind of number, NaN) raises ValueError: it would poison the replay.
    """

    def __init__(self, env: gym.Env, image_size: int, grayscale: bool):
        super().__init__(env)
        self.size, self.grayscale, self.notices, self.frames = image_size, grayscale, [], 1
        self.images, self.vectors = [], []  # [(path of keys, space, kinds of numbers)]
        for path, space in _leaves(env.observation_space):
            if not isinstance(space, NUMBERS):
                self.notices.append(f"{_part(path)} is text, which the agent does not see")
            elif _is_image(space):
                self.images.append((path, space, space.dtype.kind))
                if space.dtype != np.uint8:
                    self.notices.append(f"{_part(path)} looks like a picture and is taken for one")
            else:  # it becomes float32 anyway, so any real numbers do
                self.vectors.append((path, space, "biuf"))
        parts = {}
        if channels := sum(self._to_image(leaf[1].low).shape[-1] for leaf in self.images):
            parts["image"] = spaces.Box(0, 255, (image_size, image_size, channels), np.uint8)
        if dim := sum(spaces.flatdim(leaf[1]) for leaf in self.vectors):
            parts["vector"] = spaces.Box(-np.inf, np.inf, (dim,), np.float32)
        if not parts:
            raise EnvError(f"observation space {env.observation_space} is not supported: it has "
                           "no part that is a picture or numbers")
        self.observation_space = spaces.Dict(parts)

    def observation(self, observation):
        result = {}
        if self.images:
            images = [self._to_image(_leaf(observation, *leaf)) for leaf in self.images]
            result["image"] = np.concatenate(images, axis=-1)
        if "vector" in self.observation_space.spaces:
            flat = [spaces.flatten(leaf[1], _leaf(observation, *leaf)) for leaf in self.vectors]
            result["vector"] = np.concatenate(flat).astype(np.float32)
            if not np.isfinite(result["vector"]).all():
                raise ValueError("the observation holds NaN or infinity")
        return result

    def _to_image(self, image: np.ndarray) -> np.ndarray:
        """Any picture that `_is_image` knows -> (image_size, image_size, C) uint8."""
        if image.dtype != np.uint8:
            if not (image.min() >= -0.01 and image.max() <= 1.01):  # as with NaN
                raise ValueError("the observation's picture has NaN or values outside of [0, 1]")
            image = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
        first, last = image.shape[0], image.shape[-1]
        if image.ndim == 4:
            image = np.concatenate(image, axis=-1)
        elif image.ndim == 3 and last not in COLOURS and (first in COLOURS or first < last):
            image = np.moveaxis(image, 0, -1)
        if self.grayscale and image.shape[2:] == (3,):
            image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
        if image.shape[:2] != (self.size, self.size):  # OpenCV takes at most 4 channels at once
            parts = np.split(image, range(4, image.shape[2], 4), 2) if image.ndim == 3 else [image]
            image = np.dstack([cv2.resize(np.ascontiguousarray(part), (self.size, self.size),
                                          interpolation=cv2.INTER_AREA) for part in parts])
        return image.reshape(self.size, self.size, -1)


def _is_image(space: spaces.Space) -> bool:
    """uint8 with the axes HW, HWC, CHW or KHWC (K pictures); or a colour picture in [0, 1]."""
    shape = space.shape
    if not isinstance(space, spaces.Box) or len(shape) not in (2, 3, 4):
        return False
    channels = {2: 1, 3: min(shape[0], shape[-1]), 4: shape[0] * shape[-1]}[len(shape)]
    if space.dtype == np.uint8 and channels > MAX_CHANNELS:
        raise EnvError(f"observation space {space} is not supported: a picture has up to "
                       f"{MAX_CHANNELS} channels, which are its first or its last axis")
    is_unit = space.dtype.kind == "f" and (space.low == 0).all() and (space.high == 1).all()
    is_colour = len(shape) == 3 and channels in COLOURS and sorted(shape)[1] >= 8
    return space.dtype == np.uint8 or (is_unit and is_colour)


def _leaves(space: spaces.Space, path: tuple = ()):
    """Yields (path of keys, space) for every part of nested Dicts and Tuples, in order."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        is_dict = isinstance(space, spaces.Dict)
        for key, part in space.spaces.items() if is_dict else enumerate(space.spaces):
            yield from _leaves(part, (*path, key))
    elif isinstance(space, NUMBERS) or getattr(space.dtype, "kind", "") == "U":  # U: text
        yield path, space
    else:
        raise EnvError(f"observation space {space} is not supported: use Box, Discrete, "
                       "MultiBinary, MultiDiscrete, or Dict and Tuple of these")


def _leaf(observation, path: tuple, space: spaces.Space, kinds: str):
    """The part of `observation` at `path`, or ValueError if it is not what `space` promises."""
    is_box = isinstance(space, spaces.Box)
    try:
        value = functools.reduce(operator.getitem, path, observation)
        value = np.asarray(value) if is_box else value
    except (LookupError, TypeError, ValueError) as error:
        keys = f"; there are {[*observation]}" if isinstance(observation, dict) else ""
        raise ValueError(f"{_part(path)} cannot be read: {error!r}{keys}") from error
    if is_box and (value.shape != space.shape or value.dtype.kind not in kinds):
        raise ValueError(f"{_part(path)} is {value.dtype}{value.shape}, expected {space}")
    if not is_box and not space.contains(value):
        raise ValueError(f"{_part(path)} is {value!r}, expected {space}")
    return value


def _part(path: tuple) -> str:
    return f"the observation's part {'/'.join(map(str, path))!r}" if path else "the observation"
