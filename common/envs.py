"""One environment, of any Gymnasium id, behind one contract. Several: see `common/vector.py`.

`make_env` gives one `gym.Env` whose observation is a Dict of `image` (uint8, H x W x C) and/or
`vector` (float32, flat) and whose action is `Discrete(A)` or `Box(-1, 1, (A,))`.
"""

import ctypes.util
import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial

import gymnasium as gym
import numpy as np
from gymnasium import wrappers

from common.spaces import EnvError, ImageAndVector, standard_actions
from common.video import to_rgb

PACKAGES = {  # part of a plain id: what to import, what to install
    "dm_control/": ("shimmy", "shimmy[dm-control]"), "MiniGrid-": ("minigrid", "minigrid"),
    "BabyAI-": ("minigrid", "minigrid"), "Vizdoom": ("vizdoom.gymnasium_wrapper", "vizdoom"),
    "ALE/": ("ale_py", "ale-py"), "NoFrameskip": ("ale_py", "ale-py")}


@dataclass(frozen=True)
class EnvConfig:
    """All that it takes to build an environment, in this process or in another (picklable)."""

    env_id: str  # a Gymnasium id; "module:Id-v0" imports `module`, which registers the id
    image_size: int = 64  # pixels; height and width of the image
    grayscale: bool = False  # one channel instead of three
    action_repeat: int = 1  # environment steps per agent step (Atari: the frame skip)
    max_episode_steps: int = 0  # in agent steps; 0: the environment's own limit, else replaces it
    noop_max: int = 30  # Atari only: an episode starts with 1 to noop_max no-ops
    sticky: float = 0.0  # Atari only: chance that the last action is repeated
    pixels: bool = False  # the rendered picture is the observation (it is anyway on Atari)
    seed: int | None = None  # of every episode: one level, one track
    kwargs: str = "{}"  # arguments of the environment's constructor, as JSON
    films: str | None = None  # folder for films by Gymnasium's RecordVideo ("": rendered, no film)
    film_all: bool = False  # of every episode, not only of 0, 1, 8, 27, ...


def find(env_id: str) -> str:
    """Import the module that registers an id; gives the id without it."""
    module, _, name = env_id.rpartition(":")
    known, package = next((PACKAGES[x] for x in PACKAGES if x in name and not module), ("", ""))
    if os.getcwd() not in sys.path:  # the module is where the user stands
        sys.path.append(os.getcwd())
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):  # MuJoCo's choice needs one
        os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "disabled")
        os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")  # or SDL prints an error that is none
    try:
        found = importlib.import_module(module or known or "gymnasium")
    except ImportError as error:
        hint = f"; pip install '{package}'" if package else "; start it where that module is"
        raise EnvError(f"{env_id} cannot be imported: {error}{hint}") from error
    if module and name not in gym.registry:
        raise EnvError(f"{found.__file__} registers no {name!r}: is that the module you mean?")
    return name


def benchmark(env_id: str) -> str:
    """Whose habits a task follows: "atari", "control" (DeepMind's) or "other"."""
    if env_id.startswith("dm_control/"):  # known without its package
        return "control"
    name, known = find(env_id), gym.registry.items()  # an id may lack its version
    entries = [str(spec.entry_point) for id_, spec in known if f"{id_}-v".startswith(f"{name}-v")]
    return "atari" if any(entry.startswith("ale_py") for entry in entries) else "other"


def make_env(config: EnvConfig) -> gym.Env:
    """Build one environment under the contract of this file. Raises only EnvError."""
    try:
        return _make(config)
    except EnvError:
        raise
    except (Exception, SystemExit) as error:
        hint = ("; Atari: ALE/MsPacman-v5; your own: module:Id-v0" if isinstance(
            error, gym.error.Error) else traceback.print_exc() or "")
        raise EnvError(f"cannot make {config.env_id!r}: {error}{hint}") from error


def _make(config: EnvConfig) -> gym.Env:
    find(config.env_id)
    kwargs, size, kind = json.loads(config.kwargs), config.image_size, benchmark(config.env_id)
    if config.max_episode_steps:
        kwargs["max_episode_steps"] = -1  # ours counts agent steps
    if config.pixels or config.films is not None:
        kwargs["render_mode"] = "rgb_array"
    if kind == "atari":
        import ale_py
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        # frameskip=1 because the wrapper skips: it takes the maximum of the last two frames, as a
        # sprite may be drawn on every other frame only. ALE's own limit of 108,000 frames stays.
        kwargs |= {"frameskip": 1, "repeat_action_probability": config.sticky}
    if kind == "control":  # the authors' cameras; the free one loses the walker
        sizes = {"height": size, "width": size} if config.pixels else {}
        kwargs["render_kwargs"] = {"camera_id": 2 * ("quadruped" in config.env_id)} | sizes
    env = gym.make(config.env_id, disable_env_checker=True, **kwargs)
    if kind == "atari":
        env = Atari(env, config.noop_max, config.action_repeat, size,
                    grayscale_obs=config.grayscale, grayscale_newaxis=True)
    elif config.action_repeat > 1:
        env = wrappers.RepeatAction(env, config.action_repeat)
    if config.pixels and kind != "atari":
        env.reset(seed=0)  # the next line resets without a seed, which would be random
        env = wrappers.AddRenderObservation(Frames(env), render_only=True)
    if config.films:
        trigger = (lambda episode: True) if config.film_all else None
        folder = f"{config.films}/{time.strftime('%Y%m%d-%H%M%S')}"
        env = wrappers.RecordVideo(Frames(env), folder, trigger, name_prefix="film", fps=max(
            1, (env.metadata.get("render_fps") or 30) // config.action_repeat))  # in real time
    if config.max_episode_steps:
        env = wrappers.TimeLimit(env, config.max_episode_steps)
    env = ImageAndVector(standard_actions(env), size, config.grayscale)
    if config.seed is not None:  # Gymnasium's autoreset names no seed
        env.reset = partial(env.reset, seed=config.seed)
    return env


class Frames(gym.Wrapper):
    """`render` as (H, W, 3) uint8, also of floats in [0, 1], grey, (3, H, W), and Pillow."""

    def render(self):
        frame = np.asarray(given := self.env.render())
        if frame.dtype.kind == "f" and 0 <= frame.min() and frame.max() <= 1:
            frame = np.rint(255 * frame).astype(np.uint8)
        if frame.dtype != np.uint8 or frame.ndim not in (2, 3):
            raise ValueError(f"`render` gave {type(given)}, {frame.dtype} {frame.shape}")
        frame = np.atleast_3d(frame)
        is_chw = frame.shape[0] in (1, 3) and frame.shape[2] > 4
        return to_rgb(np.moveaxis(frame, 0, -1) if is_chw else frame)


class Atari(wrappers.AtariPreprocessing):
    """Gymnasium's, but an episode ends with a fresh picture, as in the authors' V3 of 2023.
    Gymnasium (and the authors' V1 and V2) repeat the one before: no model can see the end."""

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if terminated or truncated:
            grab = self.ale.getScreenGrayscale if self.grayscale_obs else self.ale.getScreenRGB
            grab(self.obs_buffer[0])
            self.obs_buffer[1].fill(0)
            observation = self._get_obs()
        return observation, reward, terminated, truncated, info
