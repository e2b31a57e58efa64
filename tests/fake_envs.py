"""Tiny environments whose every observation is known beforehand, and some that misbehave.

Ids: `tests.fake_envs:Counting-v0` and so on, see the end of the file.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from PIL import Image

TWO = spaces.Discrete(2)
LENGTH = 5  # steps per episode, unless told otherwise


class CountingEnv(gym.Env):
    """Observations say when they are: (step of the episode, episode, step since construction).

    `vector` holds these numbers, which start at 0, and `image` (8 x 8 x 3) has them modulo 256 as
    its channels. The reward is the step of the episode: 1, 2, ... LENGTH.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, parts="both", continuous=False, length=LENGTH, terminates=True, render_mode=None):
        self.parts, self.length, self.terminates = parts, length, terminates
        self.render_mode = render_mode
        image = spaces.Box(0, 255, (8, 8, 3), np.uint8)
        vector = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        both = spaces.Dict(image=image, vector=vector)
        self.observation_space = {"both": both, "image": image, "vector": vector}[parts]
        self.action_space = spaces.Box(-1, 1, (2,)) if continuous else spaces.Discrete(3)
        self.count = np.array([0, -1, 0])  # step of the episode, episode, step since construction

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = np.array([0, self.count[1] + 1, self.count[2]])
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.count = self.count + [1, 0, 1]
        ends = bool(self.count[0] >= self.length)
        reward = float(self.count[0])
        return self.observe(), reward, ends and self.terminates, ends and not self.terminates, {}

    def render(self):
        return self.image()

    def image(self):
        return np.broadcast_to(self.count % 256, (8, 8, 3)).astype(np.uint8)

    def observe(self):
        vector = self.count.astype(np.float32)
        return {"image": self.image(), "vector": vector} if self.parts == "both" else (
            self.image() if self.parts == "image" else vector)


class RenderEnv(CountingEnv):
    """Its `render` gives what simulators and older environments give: see `kind`."""

    def __init__(self, kind, **kwargs):
        super().__init__(parts="vector", length=20, **kwargs)
        self.kind = kind

    def render(self):
        frame = np.zeros((48, 60, 3), np.uint8)
        frame[:, : 3 * self.count[0]] = 255
        return {"pil": Image.fromarray(frame), "gray": frame[..., 0], "rgb": frame,
                "float": frame.astype(np.float32) / 255, "chw": frame.transpose(2, 0, 1)}[self.kind]


class BlindEnv(CountingEnv):
    """It cannot be rendered, and knows no `render_mode`."""

    def __init__(self):
        super().__init__()


class MeddlingEnv(CountingEnv):
    """It uses the generators of numpy and of torch, and moves the working directory."""

    def __init__(self, in_init=False, **kwargs):
        super().__init__(parts="vector", **kwargs)
        if in_init:
            self.observe()

    def observe(self):
        os.chdir(tempfile.gettempdir())
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(3)
        return np.random.uniform(-1, 1, 3).astype(np.float32)


class BrokenEnv(CountingEnv):
    """It has a fault at the third step of every episode, or where its name says."""

    def __init__(self, fault, **kwargs):
        super().__init__(**kwargs)
        self.fault = fault
        if fault == "raise_init":
            raise RuntimeError("no such\nlevel")
        if fault == "hang_init":
            self.hang()

    def hang(self):
        Path("hangs").touch()
        time.sleep(10**6)

    def reset(self, *, seed=None, options=None):
        if self.fault == "hang_reset":
            self.hang()
        if self.fault == "raise_first_reset":
            raise RuntimeError("cannot reset")
        return super().reset(seed=seed)

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if self.count[0] != 3:
            return observation, reward, terminated, truncated, info
        if self.fault == "raise" and not Path("mended").exists():
            raise RuntimeError("lost\nthe ball")
        if self.fault == "sys_exit":
            raise SystemExit(3)
        if self.fault == "exit":
            os._exit(1)
        if self.fault == "hang":
            self.hang()
        image, vector = observation["image"], observation["vector"]
        observation = {"nan_obs": {"image": image, "vector": vector * np.nan}, "inf_obs": {
            "image": image, "vector": vector + np.inf}, "shape": {"image": image, "vector": vector[:2]},
                       "dtype": {"image": image / 255.0, "vector": vector}, "missing": {"image": image},
                       "ragged": {"image": image, "vector": [1, [2, 3], 4]}}.get(self.fault, observation)
        reward = {"nan_reward": np.nan, "inf_reward": -np.inf, "text_reward": "much",
                  "two_rewards": np.array([1.0, 2.0])}.get(self.fault, reward)
        flag = {"dict_flag": {"__all__": True}, "text_flag": "False", "nan_flag": np.nan,
                "two_flags": np.array([True, False]), "half_flag": 0.5}.get(self.fault, terminated)
        return observation, reward, flag, truncated, info


class EchoEnv(gym.Env):
    """The observation is the last action as the environment received it, flat; 0 at reset."""

    def __init__(self, action_space=TWO, render_mode=None):
        self.action_space = action_space
        size = int(np.prod(action_space.shape))
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return np.asarray(action, np.float32).reshape(-1), 0.0, False, False, {}


class SampleEnv(gym.Env):
    """Any observation space: each observation is a sample of it, kept in `given`."""

    def __init__(self, observation_space, action_space=TWO):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.given = self.observation_space.sample()
        return self.given, {}

    def step(self, action):
        self.given = self.observation_space.sample()
        return self.given, 0.0, False, False, {}


ENVS = {
    "Counting": (CountingEnv, {}),
    "CountingBox": (CountingEnv, {"continuous": True}),
    "CountingImage": (CountingEnv, {"parts": "image"}),
    "CountingVector": (CountingEnv, {"parts": "vector"}),
    "CountingTruncated": (CountingEnv, {"terminates": False}),
    "CountingBoxVector": (CountingEnv, {"continuous": True, "parts": "vector"}),
    "Blind": (BlindEnv, {}), "Echo": (EchoEnv, {}), "Meddling": (MeddlingEnv, {}),
    "MeddlingInit": (MeddlingEnv, {"in_init": True}),
}
FAULTS = """raise raise_init raise_first_reset sys_exit exit hang hang_init hang_reset nan_reward
    inf_reward text_reward two_rewards nan_obs inf_obs shape dtype missing ragged dict_flag
    text_flag nan_flag two_flags half_flag""".split()
ENVS |= {fault.title().replace("_", ""): (BrokenEnv, {"fault": fault}) for fault in FAULTS}
ENVS |= {f"Render{kind.title()}": (RenderEnv, {"kind": kind})
         for kind in ("pil", "gray", "rgb", "float", "chw")}
for name, (entry_point, kwargs) in ENVS.items():  # "nan_reward" is NanReward-v0
    gym.register(f"{name}-v0", entry_point=f"{__name__}:{entry_point.__name__}", kwargs=kwargs)
