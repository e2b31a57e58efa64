"""Any observation as one image and one vector, any action as a choice or as numbers in [-1, 1]."""

import math
from dataclasses import dataclass, field

import cv2
import gymnasium as gym
import numpy as np
from gymnasium import spaces, wrappers

COLOURS = (1, 3, 4)  # channels of a grey, an RGB or an RGBA picture
BOUNDS = {"image": (0, 255, np.uint8), "vector": (-np.inf, np.inf, np.float32)}


class EnvError(Exception):
    """The environment cannot be used. One line for the user, who can mend it."""


@dataclass(frozen=True)
class EnvSpec:
    """What an agent needs to know of an environment."""

    image_shape: tuple[int, int, int] | None  # (H, W, C)
    vector_dim: int  # V; 0: no vector
    action_dim: int  # A
    discrete: bool  # actions are one-hot, otherwise in [-1, 1]
    names: tuple[str, ...] = field(default=(), compare=False, repr=False)  # of the V numbers


def env_spec(observation_space: spaces.Dict, action_space: spaces.Space, names=()) -> EnvSpec:
    shapes = {key: space.shape for key, space in observation_space.items()}
    return EnvSpec(shapes.get("image"), sum(shapes.get("vector", ())), spaces.flatdim(action_space),
                   isinstance(action_space, spaces.Discrete), names)


def standard_actions(env: gym.Env) -> gym.Env:
    """`Discrete(A)` counting from 0, or a flat `Box(-1, 1, (A,))`; clips what lies outside."""
    space = env.action_space
    if isinstance(space, spaces.Discrete):
        return wrappers.TransformAction(env, lambda index: index + space.start,
                                        spaces.Discrete(space.n))
    if isinstance(space, spaces.MultiBinary | spaces.MultiDiscrete):  # one of all combinations
        sizes = np.ravel(getattr(space, "nvec", np.full(space.shape, 2))).tolist()
        start, count = getattr(space, "start", 0), math.prod(sizes)
        if count > 1024:
            raise EnvError(f"action space {space} has {count:,} combinations, more than 1,024; "
                           "leave some out with a wrapper")
        return wrappers.TransformAction(env, lambda index: (np.reshape(
            np.unravel_index(index, sizes), space.shape) + start).astype(space.dtype),
            spaces.Discrete(count))
    if not (isinstance(space, spaces.Box) and space.is_bounded() and space.dtype.kind == "f"):
        raise EnvError(f"action space {space} is not supported: use Discrete, MultiDiscrete, "
                       "MultiBinary or float Box with finite bounds")
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)

    def rescale(action):
        unit = np.clip(action, -1.0, 1.0).astype(np.float64).reshape(space.shape)
        return np.clip((low * (1 - unit) + high * (1 + unit)) / 2, low, high).astype(space.dtype)

    return wrappers.TransformAction(env, rescale, spaces.Box(-1.0, 1.0, (low.size,), np.float32))


class ImageAndVector(gym.Wrapper):
    """Sorts the parts of an observation into one image and one vector; checks what `env` gives.

    Pictures (see `is_picture`) are resized and stacked on channels. Everything else except text is
    flattened as Gymnasium does it (a Discrete becomes one-hot). ValueError: another shape or kind
    of number, NaN, an end that is not True or False.
    """

    def __init__(self, env: gym.Env, image_size: int, grayscale: bool):
        super().__init__(env)
        self.size, self.grayscale, self.shapes = image_size, grayscale, None
        sample = env.observation_space.sample()
        found = [*parts(env.observation_space, sample)]
        self.pictures = [is_picture(space) for _, space, _ in found]
        self.notices = [  # what may not be as the user intended
            f"{name or 'the'} {space} is taken for {'a picture' if picture else 'numbers'}"
            for (name, space, _), picture in zip(found, self.pictures)
            if len(space.shape or ()) > 1 and not (picture and space.dtype == np.uint8)]
        self.names = tuple(f"{name or 'number'} {number + 1}" for (name, space, _), picture
                           in zip(found, self.pictures) if not picture
                           for number in range(spaces.flatdim(space)))
        self.shapes = {key: part.shape for key, part in self.observation(sample).items()}
        if not self.shapes:
            raise EnvError(f"observation space {env.observation_space} is not supported: it has "
                           "no part that is a picture or numbers")
        self.observation_space = spaces.Dict({
            key: spaces.Box(*BOUNDS[key][:2], shape, BOUNDS[key][2])
            for key, shape in self.shapes.items()})

    def reset(self, *, seed=None, options=None):
        return self.observation(self.env.reset(seed=seed, options=options)[0]), {}

    def step(self, action):
        observation, reward, terminated, truncated, _ = self.env.step(action)
        reward, *ends = map(number, (reward, terminated, truncated))
        if not set(ends) <= {0, 1}:
            raise ValueError(f"an end is {terminated!r} or {truncated!r}, expected True or False")
        return self.observation(observation), reward, *map(bool, ends), {}

    def observation(self, observation) -> dict[str, np.ndarray]:
        """{"image": (image_size, image_size, C) uint8, "vector": (V,) float32}, or one of them."""
        result = {"image": [], "vector": []}
        found = parts(self.env.observation_space, observation)
        for (_, space, part), picture in zip(found, self.pictures):
            if picture:
                result["image"].append(self.to_image(space, np.asarray(part)))
            elif isinstance(space, spaces.Box) and np.size(part) == math.prod(space.shape):
                result["vector"].append(np.ravel(part).astype(np.float32))  # flatten would round
            elif space.contains(part):
                result["vector"].append(spaces.flatten(space, part).astype(np.float32))
            else:
                raise ValueError(f"the observation has {np.shape(part)} {part!r}, not {space}")
        result = {key: np.concatenate(x, -1) for key, x in result.items() if any(map(np.size, x))}
        shapes, finite = {key: part.shape for key, part in result.items()}, np.isfinite
        if self.shapes and not (shapes == self.shapes and finite(result.get("vector", 0)).all()):
            raise ValueError("the observation has " + ("NaN or infinity" if shapes == self.shapes
                                                       else f"{shapes}, not {self.shapes}"))
        return result

    def to_image(self, space: spaces.Box, image: np.ndarray) -> np.ndarray:
        """(H, W), (H, W, C), (C, H, W) or (K, H, W, C) -> (image_size, image_size, channels)."""
        if image.dtype != np.uint8:
            low, high = space.low.astype(np.float64), space.high.astype(np.float64)
            unit = (image - low) / (high - low)
            is_other = image.dtype.kind == "f" and space.dtype.kind != "f"
            if is_other or not (unit.min() >= -0.01 and unit.max() <= 1.01):  # as with NaN
                raise ValueError(f"a picture has {image.dtype} beyond {space}")
            image = np.rint(255 * unit.clip(0, 1)).astype(np.uint8)
        if image.ndim == 4:
            image = np.concatenate(image, -1)
        elif image.ndim == 3 and image.shape[-1] not in COLOURS and (
                image.shape[0] in COLOURS or image.shape[0] < min(image.shape[1:])):
            image = np.moveaxis(image, 0, -1)
        if self.grayscale and image.shape[2:] == (3,):
            image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
        if image.shape[:2] == (self.size, self.size):
            return image.reshape(self.size, self.size, -1)
        planes = np.moveaxis(np.atleast_3d(image), -1, 0)  # OpenCV takes at most 4 channels at once
        return np.stack([cv2.resize(np.ascontiguousarray(plane), (self.size, self.size),
                                    interpolation=cv2.INTER_AREA) for plane in planes], -1)


def parts(space: spaces.Space, value, name: str = ""):
    """(name, space, value) of every part of nested Dicts and Tuples except text, in order."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        is_dict = isinstance(space, spaces.Dict)
        for key, part in space.spaces.items() if is_dict else enumerate(space.spaces):
            yield from parts(part, value[key], f"{name} {key}".strip())
    elif isinstance(value, str):
        return  # text, also of a space of the environment's own
    elif space.is_np_flattenable:
        yield name, space, value
    else:
        raise EnvError(f"observation space {space} is not supported: use Box, Discrete, "
                       "MultiBinary, MultiDiscrete, or Dict and Tuple of these")


def is_picture(space: spaces.Space) -> bool:
    """uint8 with 2 to 4 axes, or other numbers with the shape and the bounds of a picture."""
    if not isinstance(space, spaces.Box) or not 2 <= len(space.shape) <= 4:
        return False
    *channels, height, width = sorted(space.shape)
    bounds = set(zip(space.low.ravel().tolist(), space.high.ravel().tolist()))
    return space.dtype == np.uint8 or (bounds in ({(0, 255)}, {(0, 1)}, {(-1, 1)}) and height >= 16
                                       and max(channels, default=1) <= 16)


def number(value) -> float:
    """A finite number of any type, also in an array of one; ValueError if it is none."""
    found = np.asarray(value)
    if found.size != 1 or found.dtype.kind not in "biuf" or not (
            abs(found.item()) <= np.finfo(np.float32).max):  # as with NaN
        raise ValueError(f"a reward or an end is {value!r}, expected one number")
    return float(found.item())
