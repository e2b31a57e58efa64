"""Environments that say which process made an observation, and some whose episodes are all alike.

Ids: `tests.resume_envs:Life-v0`, `BrokenOnRank1-v0`, `Same-v0`, `SameBoxVector-v0`.

A *life* is one process of a run that is killed and resumed. `lives.json` in the working directory
holds the row at which each life began, [0, 23, 23, 61, ...], so the last entry is the present life.
From it follows what every row of the replay must hold: row i belongs to the last life that began at
or before i; all that earlier lives wrote there was undone.
"""

import json
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from tests.fake_envs import CountingEnv

LENGTH = 5  # steps of an episode, which so has six rows


class Life(gym.Env):
    """vector = [observations since this process began, life, step of the episode].

    Reward 1 for the action 0, else 0: something that an agent can learn.
    """

    def __init__(self, render_mode=None):
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.life = len(json.loads(Path("lives.json").read_text())) - 1
        self.row = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now = 0
        return self.observe(), {}

    def step(self, action):
        self.now += 1
        return self.observe(), float(action == 0), self.now == LENGTH, False, {}

    def observe(self):
        self.row += 1
        return np.array([self.row, self.life, self.now], np.float32)


class BrokenOnRank1(Life):
    """Rank 1 of a distributed run loses its environment in the middle of the fourth episode."""

    def step(self, action):
        if os.environ.get("RANK") == "1" and self.row > 20:
            raise RuntimeError("lost the ball")
        return super().step(action)


class Same(CountingEnv):
    """Where an episode ends, nothing distinguishes a run that goes on from one that is resumed."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = np.zeros(3, int)
        return self.observe(), {}


def life_of(rows: np.ndarray, starts: list[int]) -> np.ndarray:
    """The life that each row of the replay belongs to."""
    return np.searchsorted(starts, rows, side="right") - 1


def check_rows(vector, action, reward, is_first, is_terminal, starts: list[int]) -> np.ndarray:
    """Numbers of the rows (T, B) that these arrays (T, B, ...) hold. AssertionError if they do not
    follow one another, if a life that was undone wrote one of them, or if fields do not belong
    together. The first is_first is not looked at: `sample` sets it."""
    row, life, step = np.asarray(vector).astype(int).transpose(2, 0, 1)
    rows = np.asarray(starts)[life] + row
    assert (rows == rows[0] + np.arange(len(rows))[:, None]).all(), f"not contiguous: {rows.T}"
    assert (life == life_of(rows, starts)).all(), f"rows {rows.T} of lives {life.T}: {starts}"
    assert (step == row % (LENGTH + 1)).all()
    assert (np.asarray(is_first)[1:] == (step == 0)[1:]).all()
    assert (np.asarray(is_terminal) == (step == LENGTH)).all()
    action, reward = np.asarray(action), np.asarray(reward)
    assert (action.sum(-1) == (step < LENGTH)).all(), "an action after the end, or none before it"
    earned = (action[:-1, ..., 0] == 1) & (step[1:] > 0)
    assert (reward[1:] == earned).all(), "a reward that the row before did not earn"
    return rows


gym.register("Life-v0", entry_point=f"{__name__}:Life")
gym.register("BrokenOnRank1-v0", entry_point=f"{__name__}:BrokenOnRank1")
gym.register("Same-v0", entry_point=f"{__name__}:Same")
gym.register("SameBoxVector-v0", entry_point=f"{__name__}:Same", kwargs={"continuous": True, "parts": "vector"})
