"""An environment whose every observation says when it is and which action led to it.

Id: `tests.alignment_envs:Recall-v0`, RecallTruncated-v0 (never terminates), RecallBox-v0
(continuous), and Unbounded-v0 (its actions are not supported).
"""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

LENGTHS = (3, 1, 5, 2)  # steps of the episodes, over and over


class Recall(gym.Env):
    """vector = [episode, step, reward, the action that it was given: index, or two numbers].

    -1 stands for "no action", at the start of an episode. The reward is 100 x episode + step.
    """

    def __init__(self, continuous=False, terminates=True, action_space=None, render_mode=None):
        self.continuous, self.terminates = continuous, terminates
        size = 5 if continuous else 4
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = action_space or (spaces.Box(-1, 1, (2,)) if continuous else spaces.Discrete(3))
        self.episode = -1

    def vector(self, reward: float, action) -> np.ndarray:
        return np.array([self.episode, self.now, reward, *action], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.now = self.episode + 1, 0
        return self.vector(0, [-1, -1] if self.continuous else [-1]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.now += 1
        reward = 100.0 * self.episode + self.now
        ends = self.now == LENGTHS[self.episode % len(LENGTHS)]
        observation = self.vector(reward, action if self.continuous else [action])
        return observation, reward, ends and self.terminates, ends and not self.terminates, {}


gym.register("Unbounded-v0", entry_point=f"{__name__}:Recall",
             kwargs={"action_space": spaces.Box(-np.inf, np.inf, (1,))})
for name, kwargs in {"Recall": {}, "RecallTruncated": {"terminates": False},
                     "RecallBox": {"continuous": True}}.items():
    gym.register(f"{name}-v0", entry_point=f"{__name__}:Recall", kwargs=kwargs)
