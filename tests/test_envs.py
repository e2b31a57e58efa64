"""common/envs.py and vector.py: contract, autoreset, seeding, misbehaviour, and error messages."""

import dataclasses
import importlib.util
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from contextlib import closing

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from common import envs as envs_module
from common.envs import (
    EnvConfig, EnvError, EnvSpec, default_action_repeat, env_spec, make_env, probe,
)
from common.vector import Envs
from tests.fake_envs import LENGTH, CountingEnv, EchoEnv, SampleEnv

FAKE = "tests.fake_envs:"
PONG = "PongNoFrameskip-v4"


def counting(**kwargs):
    return EnvConfig(FAKE + "Counting-v0", **kwargs)


def actions(spec: EnvSpec, num_envs: int, rng: np.random.Generator) -> np.ndarray:
    if spec.discrete:
        chosen = rng.integers(spec.action_dim, size=num_envs)
        return np.eye(spec.action_dim, dtype=np.float32)[chosen]
    return rng.uniform(-1, 1, (num_envs, spec.action_dim)).astype(np.float32)


def play(config, num_envs, steps, seed=0, same_action=False, **kwargs):
    """The EnvSteps of `steps` random steps after a reset, and the stack of their fields."""
    rng = np.random.default_rng(7)
    with closing(Envs(config, num_envs, seed, **kwargs)) as envs:
        trace = [envs.reset()]
        for _ in range(steps):
            action = actions(envs.spec, 1 if same_action else num_envs, rng)
            trace.append(envs.step(np.repeat(action, num_envs, 0) if same_action else action))
    return type(trace[0])(*[None if f[0] is None else np.stack(f) for f in zip(*trace)])


def assert_same(left, right):
    for name, a, b in zip(left._fields, left, right):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.fixture
def register():
    """register(callable) -> an id of this process, forgotten after the test."""
    names = []

    def add(entry_point, **kwargs):
        names.append(f"Temporary{len(names)}-v0")
        gym.register(names[-1], entry_point=entry_point, **kwargs)
        return names[-1]

    yield add
    for name in names:
        del gym.registry[name]


# ------------------------------------------------------------------------ contract


@pytest.mark.parametrize(
    "env_id, repeat, expected",
    [
        ("CartPole-v1", 1, EnvSpec(None, 4, 2, True)),
        ("Pendulum-v1", 2, EnvSpec(None, 3, 1, False)),
        (PONG, 4, EnvSpec((64, 64, 3), 0, 6, True)),
        ("ALE/Pong-v5", 4, EnvSpec((64, 64, 3), 0, 6, True)),
        ("CarRacing-v3", 1, EnvSpec((64, 64, 3), 0, 3, False)),
        ("Blackjack-v1", 1, EnvSpec(None, 32 + 11 + 2, 2, True)),
        (FAKE + "Counting-v0", 1, EnvSpec((64, 64, 3), 3, 3, True)),
        (FAKE + "CountingBoxVector-v0", 1, EnvSpec(None, 3, 2, False)),
    ],
)
def test_contract(env_id, repeat, expected):
    if env_id.startswith("CarRacing"):
        pytest.importorskip("Box2D")
    if "Pong" in env_id:
        pytest.importorskip("ale_py")
    with closing(Envs(EnvConfig(env_id, action_repeat=repeat), 1, seed=0)) as envs:
        assert envs.spec == expected
        step = envs.reset()
        assert step.is_first.all() and step.reward == 0 and step.episode_length == 0
        rng = np.random.default_rng(0)
        for _ in range(20):
            step = envs.step(actions(envs.spec, 1, rng))
            if expected.image_shape:
                assert step.image.shape == (1, *expected.image_shape)
                assert step.image.dtype == np.uint8 and step.image.std() > 0 or "Count" in env_id
            if expected.vector_dim:
                assert step.vector.shape == (1, expected.vector_dim)
                assert step.vector.dtype == np.float32 and np.isfinite(step.vector).all()
        assert (step.image is None) == (expected.image_shape is None)
        assert (step.vector is None) == (expected.vector_dim == 0)
        fields = step._asdict().items()
        kinds = {name: (x.shape, x.dtype.name) for name, x in fields if x is not None}
        assert kinds["reward"] == ((1,), "float32")
        assert {kinds[n] for n in ("is_first", "is_last", "is_terminal")} == {((1,), "bool")}
        assert kinds["episode_return"] == ((1,), "float64")
        assert kinds["episode_length"] == ((1,), "int64")


@pytest.mark.parametrize("env_id", ["CountingBox-v0", "Counting-v0"])
def test_make_env_spaces(env_id):
    env = make_env(EnvConfig(FAKE + env_id, image_size=16, grayscale=True))
    assert env.observation_space["image"] == spaces.Box(0, 255, (16, 16, 1), np.uint8)
    assert env.observation_space["vector"].dtype == np.float32
    box = spaces.Box(-1, 1, (2,), np.float32)
    assert env.action_space == (box if "Box" in env_id else spaces.Discrete(3))
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)


def test_config_is_picklable_and_frozen():
    config = counting(grayscale=True)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.image_size = 3


def test_default_action_repeat():
    ids = [PONG, "ALE/Pong-v5", "Pong-v4", "Pong", "ale_py:ALE/Pong-v5", "CartPole-v1", "CartPole", "Nonsense"]
    assert [default_action_repeat(i) for i in ids] == [4, 4, 4, 4, 4, 1, 1, 1]


# ------------------------------------------------------------------------ observations


def observe(register, space):
    """(what the environment gave, what came out, EnvSpec) for one reset."""
    env = make_env(EnvConfig(register(lambda: SampleEnv(space)), image_size=8))
    observation, _ = env.reset(seed=1)
    return env.unwrapped.given, observation, env_spec(env)


def test_dict_stacks_images_and_flattens_the_rest(register):
    u8 = lambda *shape: spaces.Box(0, 255, shape, np.uint8)  # noqa: E731
    space = spaces.Dict(
        a=u8(8, 8, 3),
        b=spaces.Dict(first=u8(1, 8, 8), grid=spaces.Box(-1, 1, (2, 3), np.float64)),
        c=spaces.Tuple((spaces.Discrete(4, start=2), spaces.MultiBinary(3), u8(8, 8))),
        d=spaces.MultiDiscrete([2, 3]),
        e=u8(5),
    )
    given, out, spec = observe(register, space)
    assert spec == EnvSpec((8, 8, 3 + 1 + 1), 6 + 4 + 3 + 5 + 5, 2, True)
    images = [given["a"], np.moveaxis(given["b"]["first"], 0, -1), given["c"][2][..., None]]
    np.testing.assert_array_equal(out["image"], np.concatenate(images, -1))
    rest = [(space["b"]["grid"], given["b"]["grid"]), (space["c"][0], given["c"][0]),
            (space["c"][1], given["c"][1]), (space["d"], given["d"]), (space["e"], given["e"])]
    flat = np.concatenate([spaces.flatten(s, value) for s, value in rest])
    np.testing.assert_allclose(out["vector"], flat, rtol=1e-6)


@pytest.mark.parametrize("shape, channels", [
    ((16, 12), 1), ((16, 12, 1), 1), ((16, 12, 3), 3), ((1, 16, 12), 1), ((3, 16, 12), 3),
    ((16, 12, 4), 4), ((4, 16, 12), 4), ((24, 20, 9), 9), ((16, 24, 20), 16), ((4, 16, 12, 3), 12)])
def test_images_of_every_layout_are_resized_by_area(register, shape, channels):
    given, out, spec = observe(register, spaces.Box(0, 255, shape, np.uint8))
    assert out["image"].shape == spec.image_shape == (8, 8, channels) and not spec.notices
    axes = {2: "hw", 4: "khwc"}.get(len(shape), "hwc" if shape[-1] == channels else "chw")
    sides = axes.index("h"), axes.index("w")
    mean = out["image"].mean((0, 1))
    assert np.abs(mean - given.mean(sides).ravel()).max() < 1  # area keeps the mean


@pytest.mark.parametrize("shape", [(16, 12, 3), (3, 16, 12), (16, 12, 1), (16, 12, 4)])
def test_floats_that_look_like_a_picture_become_one(register, shape):
    given, out, spec = observe(register, spaces.Dict(rgb=spaces.Box(0, 1, shape, np.float32)))
    assert spec.image_shape == (8, 8, min(shape)) and spec.vector_dim == 0
    assert abs(out["image"].mean() - 255 * given["rgb"].mean()) < 1
    notice, = spec.notices
    assert notice == "the observation's part 'rgb' looks like a picture and is taken for one"


@pytest.mark.parametrize("space", [
    spaces.Box(0, 1, (16, 12), np.float32), spaces.Box(0, 1, (4, 4, 3), np.float32),
    spaces.Box(0, 1, (16, 12, 2), np.float32), spaces.Box(-1, 1, (16, 12, 3), np.float32)])
def test_floats_that_do_not_remain_numbers(register, space):
    _, out, spec = observe(register, space)
    assert spec == EnvSpec(None, space.low.size, 2, True) and not spec.notices


def test_a_float_picture_outside_of_its_bounds_is_not_scaled(register):
    env = make_env(EnvConfig(register(lambda: SampleEnv(spaces.Box(0, 1, (9, 9, 3), np.float32)))))
    for value in (255.0, np.nan):
        with pytest.raises(ValueError, match="the observation's picture has NaN or values outside"):
            env.observation(np.full((9, 9, 3), value, np.float32))


def test_text_is_left_out_with_a_notice(register):
    space = spaces.Dict(mission=spaces.Text(9), pos=spaces.Box(-1, 1, (2,)))
    given, out, spec = observe(register, space)
    np.testing.assert_array_equal(out["vector"], given["pos"])
    notice, = spec.notices
    assert notice == "the observation's part 'mission' is text, which the agent does not see"


@pytest.mark.parametrize("space, action_space, summary", [
    (spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,)), "vector 3; 1 continuous action"),
    (spaces.Dict(goal=spaces.Tuple((spaces.Discrete(4), spaces.Box(-1, 1, ()))),
                 pos=spaces.Box(-1, 1, (2,)), rgb=spaces.Box(0, 255, (9, 9, 3), np.uint8)),
     spaces.Discrete(5),
     "image 8x8x3 from 'rgb'; vector 7 from 'goal/0', 'goal/1', 'pos'; 5 discrete actions"),
    (spaces.Box(0, 255, (9, 9), np.uint8), spaces.MultiDiscrete([2, 3]),
     "image 8x8x1; 6 discrete actions, all combinations of MultiDiscrete([2 3])"),
])
def test_summary_says_what_was_understood(register, space, action_space, summary):
    env_id = register(lambda: SampleEnv(space, action_space))
    assert probe(EnvConfig(env_id, image_size=8)).summary == summary
    assert probe(EnvConfig(env_id, image_size=8, action_repeat=2)).summary == f"{summary}; each for 2 frames"


def test_codes_in_place_of_a_picture_are_noticed(capfd):
    """MiniGrid's symbolic view: its space says 255, its values are small."""
    for env_id, says in (("Codes-v0", True), ("CountingImage-v0", False)):  # that one begins black
        play(EnvConfig(FAKE + env_id), 1, steps=2 * LENGTH)
        err = capfd.readouterr().err
        assert err.count("is 8 of 255; if these are codes") == says


def test_grayscale_is_luminance(register):
    env_id = register(lambda: SampleEnv(spaces.Box(0, 255, (8, 8, 3), np.uint8)))
    env = make_env(EnvConfig(env_id, image_size=8, grayscale=True))
    out, _ = env.reset(seed=0)
    luminance = env.unwrapped.given @ np.array([0.299, 0.587, 0.114])
    assert np.abs(out["image"][..., 0] - luminance).max() < 1


def test_observation_is_not_overwritten_by_the_next_step():
    with closing(Envs(counting(), 1, 0)) as envs:
        first = envs.reset()
        envs.step(np.eye(3)[:1])
        np.testing.assert_array_equal(first.vector, [[0, 0, 0]])


# ------------------------------------------------------------------------ actions


def echo(register, space, action):
    env = make_env(EnvConfig(register(lambda: EchoEnv(space))))
    env.reset(seed=0)
    return env.step(action)[0]["vector"]


def test_box_actions_reach_asymmetric_bounds_and_are_clipped(register):
    low, high = np.array([-2, 0, 3], np.float32), np.array([6, 0.1, 3], np.float32)
    space = spaces.Box(low, high)
    for action, expected in [([-1] * 3, low), ([1] * 3, high), ([-9] * 3, low), ([7] * 3, high),
                             ([0, 0, 0], (low + high) / 2), ([0.5, -0.5, 0.3], [4, 0.025, 3])]:
        vector = echo(register, space, np.array(action, np.float32))
        np.testing.assert_allclose(vector, expected, rtol=1e-6)


def test_box_actions_of_any_shape_and_dtype(register):
    space = spaces.Box(-3, 3, (2, 3), np.float64)  # EchoEnv asserts that the space contains them
    vector = echo(register, space, np.linspace(-1, 1, 6, dtype=np.float32))
    np.testing.assert_allclose(vector, np.linspace(-3, 3, 6), atol=1e-6)


@pytest.mark.parametrize("space", [
    spaces.MultiDiscrete([2, 3], start=[0, 5]), spaces.MultiDiscrete([[2, 1], [3, 2]]),
    spaces.MultiBinary(3), spaces.MultiBinary([2, 2]), spaces.MultiDiscrete([32, 32])])
def test_every_combination_is_one_discrete_action(register, space):
    env = make_env(EnvConfig(register(lambda: EchoEnv(space))))
    env.reset(seed=0)
    seen = {tuple(env.step(index)[0]["vector"]) for index in range(env.action_space.n)}
    assert len(seen) == env.action_space.n == np.prod(np.reshape(
        space.nvec if isinstance(space, spaces.MultiDiscrete) else 2 * np.ones(space.shape), -1))


def test_one_hot_becomes_a_discrete_action_from_its_start(register):
    config = EnvConfig(register(lambda: EchoEnv(spaces.Discrete(4, start=5))))
    with closing(Envs(config, 1, 0)) as envs:
        envs.reset()
        assert [envs.step(np.eye(4)[i : i + 1]).vector.item() for i in range(4)] == [5, 6, 7, 8]


@pytest.mark.parametrize("bad", [np.zeros((2, 3)), np.zeros(3), np.full((1, 3), np.nan)])
def test_bad_actions_are_the_callers_fault(bad):
    with closing(Envs(counting(), 1, 0)) as envs:
        envs.reset()
        with pytest.raises(ValueError, match="finite and of shape"):
            envs.step(bad)


def test_step_before_reset():
    with closing(Envs(counting(), 1, 0)) as envs, pytest.raises(RuntimeError, match="reset"):
        envs.step(np.eye(3)[:1])


# ------------------------------------------------------------------------ time


@pytest.mark.parametrize("num_envs", [1, 3])
def test_next_step_autoreset(num_envs):
    trace = play(counting(image_size=8), num_envs, steps=2 * (LENGTH + 1))
    t = np.arange(2 * (LENGTH + 1) + 1)
    step, episode = t % (LENGTH + 1), t // (LENGTH + 1)
    for n in range(num_envs):
        total = episode * LENGTH + step
        np.testing.assert_array_equal(trace.vector[:, n], np.stack([step, episode, total], -1))
        np.testing.assert_array_equal(trace.image[:, n, 3, 5], trace.vector[:, n])
        np.testing.assert_array_equal(trace.reward[:, n], step)
        np.testing.assert_array_equal(trace.is_first[:, n], step == 0)
        np.testing.assert_array_equal(trace.is_last[:, n], step == LENGTH)
        np.testing.assert_array_equal(trace.is_terminal[:, n], step == LENGTH)
        np.testing.assert_array_equal(trace.episode_return[:, n], step * (step + 1) / 2)
        np.testing.assert_array_equal(trace.episode_length[:, n], step)


def test_reset_starts_new_episodes_in_the_middle():
    with closing(Envs(counting(), 1, 0)) as envs:
        envs.reset(), envs.step(np.eye(3)[:1])
        step = envs.reset()
        assert step.vector.tolist() == [[0, 1, 1]] and step.is_first.all() and step.reward == 0


def test_environments_that_end_at_once_are_legal():
    trace = play(EnvConfig(FAKE + "OneStep-v0"), 1, steps=6)
    assert trace.is_last[:, 0].tolist() == [False, True] * 3 + [False]
    assert trace.is_first[:, 0].tolist() == [True, False] * 3 + [True]


def test_truncation_by_the_environment_is_not_a_terminal():
    trace = play(EnvConfig(FAKE + "CountingTruncated-v0"), 1, steps=LENGTH)
    assert trace.is_last[-1].all() and not trace.is_terminal.any()


def test_time_limit_is_not_a_terminal_but_falling_is():
    limited = play(EnvConfig("CartPole-v1", max_episode_steps=7), 1, steps=7)
    assert limited.is_last[:, 0].tolist() == [False] * 7 + [True] and not limited.is_terminal.any()
    falling = play(EnvConfig("CartPole-v1"), 1, steps=200, seed=3)
    ends = falling.is_last[:, 0]
    assert ends.any() and np.array_equal(falling.is_terminal[:, 0], ends)


def test_max_episode_steps_replaces_the_limit_and_counts_agent_steps():
    trace = play(EnvConfig("Pendulum-v1", max_episode_steps=210), 1, steps=210)  # its own: 200
    assert np.flatnonzero(trace.is_last).tolist() == [210]
    trace = play(EnvConfig("Pendulum-v1", action_repeat=4, max_episode_steps=9), 1, steps=9)
    assert np.flatnonzero(trace.is_last).tolist() == [9]
    trace = play(EnvConfig("Pendulum-v1", action_repeat=4), 1, steps=50)
    assert np.flatnonzero(trace.is_last).tolist() == [50]


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    trace = play(counting(action_repeat=3), 1, steps=3)
    assert trace.reward[:, 0].tolist() == [0, 1 + 2 + 3, 4 + 5, 0]
    assert trace.vector[:, 0, 0].tolist() == [0, 3, 5, 0]
    assert trace.episode_length[:, 0].tolist() == [0, 1, 2, 0]


# ------------------------------------------------------------------------ Atari


def test_atari_follows_the_papers():
    pytest.importorskip("ale_py")
    for env_id, given, sticky in [(PONG, None, 0.0), ("ALE/Pong-v5", None, 0.25),
                                  (PONG, 0.25, 0.25), ("ale_py:ALE/Pong-v5", 0.0, 0.0)]:
        env = make_env(EnvConfig(env_id, action_repeat=4, sticky=given))
        ale = env.unwrapped.ale
        assert ale.getFloat("repeat_action_probability") == sticky
        assert ale.getInt("max_num_frames_per_episode") == 108_000
        env.reset(seed=0)
        before = ale.getEpisodeFrameNumber()
        assert 1 <= before <= 30  # no-ops
        env.step(0)
        assert ale.getEpisodeFrameNumber() - before == 4


def test_atari_losing_a_life_goes_on_and_losing_all_is_terminal():
    pytest.importorskip("ale_py")
    config = EnvConfig("BreakoutNoFrameskip-v4", action_repeat=4, grayscale=True, image_size=32)
    env = make_env(config)
    assert env.observation_space["image"].shape == (32, 32, 1)
    env.reset(seed=0)
    lives, terminated, truncated = [5], False, False
    while not (terminated or truncated):
        *_, terminated, truncated, info = env.step(1)  # fire, never move
        lives.append(info["lives"])
    assert terminated and not truncated and set(lives) == {5, 4, 3, 2, 1, 0}


def test_atari_frame_limit_is_not_a_terminal(register):
    pytest.importorskip("ale_py")
    kwargs = dict(gym.spec(PONG).kwargs, max_num_frames_per_episode=100)
    config = EnvConfig(register("ale_py.env:AtariEnv", kwargs=kwargs), action_repeat=4, noop_max=0)
    trace = play(config, 1, steps=25)
    assert np.flatnonzero(trace.is_last).tolist() == [25] and not trace.is_terminal.any()


# ------------------------------------------------------------------------ pixels, other packages


@pytest.mark.parametrize("num_envs", [1, 2])
def test_pixels_are_the_rendered_picture(num_envs):
    config = EnvConfig(FAKE + "CountingVector-v0", image_size=8, pixels=True, action_repeat=2)
    trace = play(config, num_envs, steps=2)
    assert trace.vector is None and trace.image.shape == (3, num_envs, 8, 8, 3)
    assert trace.image[:, 0, 3, 5, 0].tolist() == [0, 2, 4]


def test_pixels_of_a_task_of_numbers():
    trace = play(EnvConfig("Pendulum-v1", pixels=True), 1, steps=4)
    assert trace.image.shape == (5, 1, 64, 64, 3) and len(np.unique(trace.image, axis=0)) > 2


def test_the_same_seed_gives_the_same_pixels(monkeypatch, tmp_path):
    """Gymnasium points MuJoCo's camera once, at what it renders first."""
    pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    config = EnvConfig("HalfCheetah-v5", pixels=True)
    try:
        first, again = (play(config, 1, steps=2) for _ in range(2))
    except EnvError as error:
        pytest.skip(f"cannot render here: {error}")
    assert_same(first, again)


def test_pixels_that_cannot_be_rendered(register, monkeypatch):
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    for config in (EnvConfig(FAKE + "Echo-v0", pixels=True),
                   EnvConfig(register(lambda: SampleEnv(spaces.Discrete(2))), pixels=True)):
        text = error_of(config)
        assert "to be rendered, it must accept render_mode='rgb_array'" in text
        with monkeypatch.context() as with_mujoco:
            with_mujoco.setitem(sys.modules, "mujoco", sys)
            assert "set MUJOCO_GL=egl or MUJOCO_GL=osmesa" in error_of(config)


@pytest.mark.parametrize("set_by_user, expected", [(None, "egl"), ("osmesa", "osmesa")])
def test_mujoco_is_told_to_render_without_a_display(monkeypatch, set_by_user, expected):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    if set_by_user:
        monkeypatch.setenv("MUJOCO_GL", set_by_user)
    make_env(counting())
    assert os.environ.get("MUJOCO_GL") == set_by_user, "only what renders needs a display"
    monkeypatch.setenv("MUJOCO_GL", set_by_user or "")
    if not set_by_user:
        monkeypatch.delenv("MUJOCO_GL")
    make_env(counting(pixels=True))
    assert os.environ["MUJOCO_GL"] == expected


@pytest.mark.parametrize("env_id, package, module", [
    ("dm_control/walker-walk-v0", "shimmy[dm-control]", "shimmy"),
    ("MiniGrid-Empty-5x5-v0", "minigrid", "minigrid"),
    ("VizdoomBasic-v1", "vizdoom", "vizdoom.gymnasium_wrapper"),
    ("BabyAI-GoToObj-v0", "minigrid", "minigrid")])
def test_packages_that_register_their_ids(monkeypatch, env_id, package, module):
    monkeypatch.setitem(sys.modules, module, None)  # `import module` raises ImportError
    if module == "shimmy":
        monkeypatch.setitem(sys.modules, "dm_control", types.ModuleType("dm_control"))
    assert error_of(EnvConfig(env_id)) == f'{env_id} needs a package: pip install "{package}"'
    registering = types.ModuleType(module)
    monkeypatch.setitem(sys.modules, module, registering)
    assert "unknown environment id" in error_of(EnvConfig(env_id))  # it was imported, at least


def test_the_task_of_the_readme(monkeypatch, tmp_path):
    """The newcomer's first environment: twenty steps, and a reward for the largest of three numbers."""
    lines = (ROOT / "README.md").read_text().partition("<!-- my_task:begin -->\n")[2]
    code = textwrap.dedent(lines.partition("<!-- my_task:end -->")[0])
    (tmp_path / "my_task.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    steps = []
    with closing(Envs(EnvConfig("my_task:MyTask-v1"), 1, 0)) as envs:
        steps.append(envs.reset())
        while len(steps) < 42:  # the best action in the first episode, the worst in the second
            goal = steps[-1].vector * (1 if len(steps) < 21 else -1)
            steps.append(envs.step(np.eye(3, dtype=np.float32)[goal.argmax(-1)]))
    assert [i for i, step in enumerate(steps) if step.is_last] == [20, 41]
    assert [float(step.reward[0]) for step in steps] == [0.0] + 20 * [1.0] + 21 * [0.0]
    assert not any(step.is_terminal for step in steps)  # a time limit
    check_env(gym.make("my_task:MyTask-v1").unwrapped)


def test_the_wrapper_for_crafter(monkeypatch, tmp_path):
    """Crafter, or, where that is not installed, something that behaves like it."""
    lines = (ROOT / "common" / "README.md").read_text().partition("<!-- crafter:begin -->\n")[2]
    code = textwrap.dedent(lines.partition("<!-- crafter:end -->")[0])
    is_real = importlib.util.find_spec("crafter") is not None
    if not is_real:
        monkeypatch.setitem(sys.modules, "crafter", types.SimpleNamespace(Env=LikeCrafter))
    (tmp_path / "crafter_env.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    trace = play(EnvConfig("crafter_env:Crafter-v1"), 1, steps=40)
    assert trace.image.shape == (41, 1, 64, 64, 3)
    if not is_real:
        assert trace.is_last[:, 0].nonzero()[0].tolist() == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
        assert trace.is_terminal[:, 0].nonzero()[0].tolist() == [3, 11, 19, 27, 35]


class LikeCrafter:
    """An episode of three steps; every other one ends by death."""

    episodes = 0

    def __init__(self, seed):
        LikeCrafter.episodes += 1
        self.steps, self.dies = 0, LikeCrafter.episodes % 2
        assert 0 <= seed < 2**31

    def reset(self):
        return np.zeros((64, 64, 3), np.uint8)

    def step(self, action):
        self.steps += 1
        done = self.steps == 3
        return self.reset(), 0.1, done, {"discount": 1.0 - (done and self.dies)}


def test_dm_control():
    pytest.importorskip("shimmy") and pytest.importorskip("dm_control")
    trace = play(EnvConfig("dm_control/walker-walk-v0", action_repeat=2), 2, steps=500)
    assert trace.vector.shape == (501, 2, 24) and 0 <= trace.reward.min() <= trace.reward.max() <= 2
    assert trace.is_last[-1].all() and not trace.is_terminal.any()


def test_minigrid(capfd):
    pytest.importorskip("minigrid")
    spec = probe(EnvConfig("MiniGrid-Empty-5x5-v0"))
    assert spec == EnvSpec((64, 64, 3), 4, 7, True) and "'mission' is text" in spec.notices[0]
    assert play(EnvConfig("MiniGrid-Empty-5x5-v0"), 2, steps=9).reward.shape == (10, 2)
    assert "is 8 of 255; if these are codes" in capfd.readouterr().err


# ------------------------------------------------------------------------ seeding and processes


@pytest.mark.parametrize("env_id", ["CartPole-v1", "LunarLander-v3", PONG])
def test_same_seed_same_stream(env_id):
    pytest.importorskip({"LunarLander-v3": "Box2D", PONG: "ale_py"}.get(env_id, "numpy"))
    config = EnvConfig(env_id, image_size=16)
    first, again = (play(config, 1, steps=60, seed=5) for _ in range(2))
    assert_same(first, again)
    other = play(config, 1, steps=60, seed=6)
    observation = "vector" if other.image is None else "image"
    assert not np.array_equal(getattr(first, observation), getattr(other, observation))


def test_episodes_differ_unless_the_seed_is_fixed():
    starts = []
    for fixed_seed in (None, 3):
        config = EnvConfig("Pendulum-v1", max_episode_steps=2)
        trace = play(config, 2 if fixed_seed else 1, steps=8, fixed_seed=fixed_seed)
        starts.append(trace.vector[trace.is_first])
    assert len(np.unique(starts[0], axis=0)) == 3
    assert len(np.unique(starts[1], axis=0)) == 1
    by_hand, _ = gym.make("Pendulum-v1").reset(seed=3)
    np.testing.assert_array_equal(starts[1][0], by_hand)


def test_two_processes_equal_each_alone():
    """Environment 0 of two is that of one; the number of environments does not matter."""
    config = EnvConfig("CartPole-v1", max_episode_steps=9)
    alone = play(config, 1, steps=30, same_action=True)
    pair = play(config, 2, steps=30, same_action=True)
    three = play(config, 3, steps=30, same_action=True)
    for name, one, two, many in zip(alone._fields, alone, pair, three):
        if one is not None:
            np.testing.assert_array_equal(one, two[:, :1], err_msg=name)
            np.testing.assert_array_equal(two, many[:, :2], err_msg=name)
    assert not np.array_equal(pair.vector[:, 0], pair.vector[:, 1])


def test_render():
    for num_envs in (1, 2):
        with closing(Envs(counting(render=True), num_envs, 0)) as envs:
            assert envs.render() is None
            envs.reset()
            envs.step(np.eye(3)[[0] * num_envs])
            assert envs.render()[0, 0].tolist() == [1, 0, 1]


def test_ids_of_the_main_script_reach_the_processes(register):
    env_id = register("tests.fake_envs:CountingEnv", kwargs={"length": 2})
    assert play(EnvConfig(env_id), 2, steps=2).is_last[-1].all()
    env_id = register(lambda: CountingEnv(length=2))
    assert play(EnvConfig(env_id), 2, steps=2).is_last[-1].all()
    lock = threading.Lock()  # cannot be sent anywhere
    with pytest.raises(EnvError, match="processes .* do not start.*module:Id-v0"):
        Envs(EnvConfig(register(lambda: (lock, CountingEnv())[1])), 2, 0)


SCRIPT = """
    import os, sys, time
    from common.vector import *
    marker = sys.argv[2]
    open(marker, "a").write("imported\\n")     # once, if processes do not import the main script
    if __name__ == "__main__":
        envs = Envs(EnvConfig("tests.fake_envs:Hang-v0"), 2, 0)
        envs.reset()
        print(*[process.pid for process in envs._vector.processes], flush=True)
        if sys.argv[1] == "hang":
            for _ in range(3): envs.step(np.eye(3)[[0, 0]])
        time.sleep(60)
"""


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize("state", ["idle", "hang"])
def test_processes_die_with_a_killed_parent_and_do_not_import_its_script(tmp_path, state):
    script, marker = tmp_path / "main.py", tmp_path / "marker"
    script.write_text(textwrap.dedent(SCRIPT))
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, str(script), state, str(marker)]
    env = dict(os.environ, PYTHONPATH=root)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        pids = parent.stdout.readline().split()
        assert len(pids) == 2 and all(map(alive, pids))
        time.sleep(0.3 if state == "hang" else 0)
        parent.kill()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))
    assert marker.read_text() == "imported\n"


def test_processes_ignore_ctrl_c_and_leave_by_themselves_on_close():
    envs = Envs(counting(), 2, 0)
    processes = envs._vector.processes
    envs.reset()
    for process in processes:
        os.kill(process.pid, signal.SIGINT)
    assert envs.step(np.eye(3)[[0, 0]]).vector[:, 0].tolist() == [1, 1]
    envs.close(), envs.close()
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_signal_to_the_group_is_for_the_parent_alone():
    """`timeout 1h python dreamer_v3.py` signals the whole group."""
    with closing(Envs(counting(), 2, 0)) as envs:
        groups = {os.getpgid(process.pid) for process in envs._vector.processes}
        envs.reset()
        groups |= {os.getpgid(process.pid) for process in envs._vector.processes}
        assert os.getpgid(0) not in groups


# ------------------------------------------------------------------------ misbehaviour

FAULTS = {
    "Raise": r"RuntimeError: lost the ball \(.*fake_envs.py, line \d+\)$",
    "SysExit": "SystemExit: 3", "NanReward": "the reward is nan", "InfReward": "the reward is -inf",
    "TextReward": "ValueError: the reward 'much' is not a number$",
    "NanObs": "the observation holds NaN", "InfObs": "the observation holds NaN or infinity",
    "Shape": r"the observation's part 'image' is uint8\(4, 8, 3\), expected Box",
    "Dtype": "the observation's part 'image' is float64",
    "Missing": r"the observation's part 'vector' cannot be read: KeyError\('vector'\)",
    "Ragged": "the observation's part 'vector' cannot be read: ValueError",
}


def check_closed_as_truncated(trace, n):
    """Every episode of a BrokenEnv breaks at its third step: rows 0 1 2 2', 0 1 2 2'."""
    assert trace.vector[:, n, 0].tolist() == [0, 1, 2, 2, 0, 1, 2, 2, 0]
    assert trace.is_first[:, n].tolist() == [True, False, False, False] * 2 + [True]
    assert trace.is_last[:, n].tolist() == [False, False, False, True] * 2 + [False]
    assert not trace.is_terminal[:, n].any()
    assert trace.reward[:, n].tolist() == [0, 1, 2, 0] * 2 + [0]
    assert trace.episode_return[:, n].tolist() == [0, 1, 3, 3] * 2 + [0]
    assert trace.episode_length[:, n].tolist() == [0, 1, 2, 2] * 2 + [0]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_this_process(fault, capfd):
    trace = play(EnvConfig(f"{FAKE}{fault}-v0"), 1, steps=8)
    check_closed_as_truncated(trace, 0)
    first, second = capfd.readouterr().err.strip().split("\n")
    for line, step, number in [(first, 3, 1), (second, 7, 2)]:
        assert line.startswith(f"{FAKE}{fault}-v0 (environment 0) failed at step {step}, "
                               f"restart {number} of 10: ")
        assert re.search(FAULTS[fault], line), line


def test_faults_in_processes(capfd):
    trace = play(EnvConfig(FAKE + "Raise-v0"), 2, steps=8)
    check_closed_as_truncated(trace, 0)
    check_closed_as_truncated(trace, 1)
    lines = capfd.readouterr().err.strip().split("\n")
    assert len(lines) == 4 and all("lost the ball" in line for line in lines)
    assert "(environment 1) failed at step 7, restart 4 of 10" in lines[3]


@pytest.mark.parametrize("fault, says", [("Exit", r"died \(exit codes \[1, 1\]\)"),
                                         ("Hang", "gave no answer for 0.5 s")])
def test_a_process_that_dies_or_hangs_ends_the_run_in_one_line(fault, says, capfd):
    with closing(Envs(EnvConfig(f"{FAKE}{fault}-v0"), 2, 0, timeout=0.5)) as envs:
        envs.reset()
        with pytest.raises(EnvError, match=f"a process of .*{fault}-v0 {says}"):
            for _ in range(3):
                envs.step(np.eye(3)[[0, 0]])
    assert not any(process.is_alive() for process in envs._vector.processes)
    assert not capfd.readouterr().err


def test_an_environment_in_this_process_that_hangs_ends_the_run_in_one_line(capfd):
    before = signal.getsignal(signal.SIGALRM)
    with closing(Envs(EnvConfig(f"{FAKE}Hang-v0"), 1, 0, timeout=0.5)) as envs:
        envs.reset()
        with pytest.raises(EnvError, match="Hang-v0 gave no answer for 0.5 s"):
            for _ in range(3):
                envs.step(np.eye(3)[:1])
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and not capfd.readouterr().err


class OldGym(gym.Env):
    """Has the interface of Gym before 0.26: no info from `reset`, or four values from `step`."""

    action_space = spaces.Discrete(2)

    def __init__(self, parts: int, is_old_reset: bool):
        self.is_old_reset, self.names = is_old_reset, "abcd"[:parts]
        numbers = spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space = spaces.Dict(dict.fromkeys(self.names, numbers)) if parts else numbers

    def reset(self, *, seed=None, options=None):
        observation = self.observation_space.sample()
        return observation if self.is_old_reset else (observation, {})

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, {}


@pytest.mark.parametrize("parts, is_old_reset", [(0, True), (2, True), (3, True), (1, False)])
def test_an_environment_of_old_gym_is_told_what_to_return(register, parts, is_old_reset, capfd):
    config = EnvConfig(register(lambda: OldGym(parts, is_old_reset)))
    with pytest.raises(EnvError, match=re.escape("reset must return (observation, info), step (")):
        with closing(Envs(config, 1, 0)) as envs:
            envs.reset()
            for _ in range(22):  # each second one starts an episode
                envs.step(np.eye(2)[:1])


def test_a_missing_part_is_told_with_those_that_are_there(register):
    env = SampleEnv(spaces.Dict(here=spaces.Box(0, 1, (2,))))
    env.reset = lambda **kwargs: ({"there": np.zeros(2, np.float32)}, {})
    text = error_of(EnvConfig(register(lambda: env)), 1)
    assert "part 'here' cannot be read: KeyError('here'); there are ['there']" in text


def test_a_render_that_gives_nothing_is_an_error(register):
    env = CountingEnv(render_mode="rgb_array")
    env.render = lambda: None
    with closing(Envs(EnvConfig(register(lambda **kwargs: env), render=True), 1, 0)) as envs:
        envs.reset()
        with pytest.raises(EnvError, match=r"cannot render: render\(\) gave None \(to "):
            envs.render()


def test_a_reward_may_be_an_array_of_one():
    trace = play(EnvConfig(FAKE + "ArrayReward-v0"), 1, steps=LENGTH)
    assert trace.reward[:, 0].tolist() == [0, 1, 2, 3, 4, 5] and trace.is_terminal[-1].all()


def test_a_failing_reset_is_retried_within_the_step(capfd):
    with closing(Envs(EnvConfig(FAKE + "RaiseReset-v0"), 1, 0)) as envs:
        envs.reset()
        for _ in range(LENGTH):
            step = envs.step(np.eye(3)[:1])
        assert step.is_terminal.all()
        step = envs.step(np.eye(3)[:1])
    assert step.is_first.all() and step.vector.tolist() == [[0, 0, 0]]
    assert "failed at step 6, restart 1 of 10: RuntimeError: cannot reset" in capfd.readouterr().err


def test_a_rebuilt_environment_gets_another_seed(register):
    class Breaks(type(gym.make("CartPole-v1").unwrapped)):
        def step(self, action):
            raise RuntimeError("always")

    config = EnvConfig(register(Breaks))
    traces = [play(config, 1, steps=6, max_restarts=3) for _ in range(2)]
    starts = traces[0].vector[traces[0].is_first]
    assert len(np.unique(starts, axis=0)) == len(starts) == 4
    assert_same(*traces)


def test_an_environment_that_changes_when_rebuilt(register):
    sizes = iter([2, 3])

    class Changing(EchoEnv):
        def __init__(self):
            super().__init__(spaces.MultiBinary(next(sizes)))

        def step(self, action):
            raise RuntimeError("broken")

    with closing(Envs(EnvConfig(register(Changing)), 1, 0)) as envs:
        envs.reset()
        assert envs.step(np.eye(4)[:1]).is_last.all()
        with pytest.raises(EnvError, match="has another observation space when rebuilt"):
            envs.step(np.eye(4)[:1])


@pytest.mark.parametrize("num_envs", [1, 2])
def test_restart_limit(num_envs):
    with closing(Envs(EnvConfig(FAKE + "Raise-v0"), num_envs, 0, max_restarts=2)) as envs:
        envs.reset()
        with pytest.raises(EnvError, match=r"too often \(max_restarts=2\): RuntimeError: lost"):
            for _ in range(20):
                envs.step(np.eye(3)[[0] * num_envs])
        assert envs._steps == {1: 11, 2: 7}[num_envs]  # the third failure of all


# ------------------------------------------------------------------------ EnvErrors


def error_of(config, num_envs=None) -> str:
    with pytest.raises(EnvError) as caught:
        if num_envs is None:
            make_env(config)
        else:
            with closing(Envs(config, num_envs, 0)) as envs:
                envs.reset()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("env_id, expected", [
    ("CartPol-v1", "unknown environment id 'CartPol-v1'; did you mean CartPole-v1"),
    ("CartPole-v7", "CartPole-v1"),
    ("CarRacing-v2", "CarRacing-v3"),
    ("MsPackmanNoFrameskip-v4", "MsPacmanNoFrameskip-v4"),
    ("ALE/Pongg-v5", "ALE/Pong-v5"),
    (FAKE + "Countin-v0", f"registers no 'Countin-v0'; did you mean {FAKE}Counting-v0"),
    ("Thermostat-v0", "'Thermostat-v0'; one of your own is your_module:Thermostat-v0"),
    ("common.mine:X-v0", "'common.mine:X-v0' (give yours another name)"),
    ("qqqq", "unknown environment id 'qqqq'"),
    ("not a valid id!", "unknown environment id"),
    ("a:b:c", "unknown environment id"),
    ("", "unknown environment id ''"),
    ("no_such_module:X-v0", "cannot import the module of 'no_such_module:X-v0'"),
    (FAKE + "RaiseInit-v0", "RuntimeError: no such level"),
])
def test_ids_that_cannot_be_made(env_id, expected):
    make_env(counting())  # registers the fake ids
    if "ALE" in env_id or "Pack" in env_id:
        pytest.importorskip("ale_py")
    assert expected in error_of(EnvConfig(env_id))


@pytest.mark.parametrize("text, expected", [
    ("import gymnasium\n1 / 0", "ZeroDivisionError: division by zero (FILE, line 2)"),
    ("import no_such", "ModuleNotFoundError: No module named 'no_such' (FILE, line 1)"),
    ("import gymnasium\ngymnasium.make('CartPol-v1')", "(FILE, line 2)"),
    ("x = = 1", "SyntaxError: invalid syntax (broken_module.py, line 1)"),
    ("from tests.fake_envs import CountingEnv as C\nimport gymnasium\n"
     "gymnasium.register('Its-v0', lambda: C(hue=3))",
     "TypeError: CountingEnv.__init__() got an unexpected keyword argument 'hue' (FILE, line 3)"),
])
def test_an_error_in_the_users_module_is_shown_with_its_line(
        monkeypatch, tmp_path, text, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "broken_module.py").write_text(text)
    found = error_of(EnvConfig("broken_module:Its-v0"))
    gym.registry.pop("Its-v0", None)
    sys.modules.pop("broken_module", None)
    assert found.startswith("cannot build 'broken_module:Its-v0': "), found
    assert found.endswith(expected.replace("FILE", str(tmp_path / "broken_module.py"))), found


@pytest.mark.parametrize("num_envs", [1, 2])
def test_errors_at_the_start_are_not_worth_restarts(num_envs, capfd):
    assert "did you mean" in error_of(EnvConfig("CartPol-v1"), num_envs)
    assert "no such level" in error_of(EnvConfig(FAKE + "RaiseInit-v0"), num_envs)
    text = error_of(EnvConfig(FAKE + "RaiseFirstReset-v0"), num_envs)
    assert "cannot start its first episode: RuntimeError: cannot reset (" in text
    assert re.search(r"fake_envs.py, line \d+\)$", text)
    assert "restart" not in capfd.readouterr().err


@pytest.mark.parametrize("package, env_id", [
    ("Box2D", "LunarLander-v3"), ("mujoco", "HalfCheetah-v5"), ("pygame", None)])
def test_missing_package(monkeypatch, register, package, env_id):
    def missing(**kwargs):
        raise gym.error.DependencyNotInstalled(package)

    if env_id is None:  # not one of Gymnasium's own: say what it said
        assert "DependencyNotInstalled: pygame" in error_of(EnvConfig(register(missing)))
        return
    for name in [m for m in sys.modules if m.startswith(("gymnasium.envs.box2d", package))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # `import package` raises ImportError
    for name in [m for m in sys.modules if m.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, name)
    extra = package.lower()
    expected = f'{env_id} needs a package: pip install "gymnasium[{extra}]=={gym.__version__}"'
    assert error_of(EnvConfig(env_id)) == expected


def test_missing_ale(monkeypatch):
    monkeypatch.setattr(envs_module, "ale_py", None)
    assert f'pip install "gymnasium[atari]=={gym.__version__}"' in error_of(EnvConfig(PONG))


@pytest.mark.parametrize("space, expected", [
    (spaces.Box(-np.inf, 1, (2,), np.float32), "Box(-inf, 1.0, (2,), float32)"),
    (spaces.Box(np.arange(98, dtype=np.float32), np.inf), "(98,), float32"),  # several lines
    (spaces.Box(np.finfo(np.float32).min, 1, (2,), np.float32), "(2,), float32"),
    (spaces.Box(0, 5, (2,), np.int64), "int64"),
    (spaces.MultiDiscrete([32, 33]), "it has 1,056 combinations"),
    (spaces.Dict(a=spaces.Discrete(2)), "Dict('a': Discrete(2))"),
])
def test_unsupported_actions(register, space, expected):
    text = error_of(EnvConfig(register(lambda: SampleEnv(spaces.Discrete(2), space))))
    assert text.startswith("action space") and expected in text
    assert text.endswith("use Discrete, MultiDiscrete, MultiBinary or float Box with finite bounds") or (
        "combinations" in text)


@pytest.mark.parametrize("space, expected", [
    (spaces.Text(5), "no part that is a picture or numbers"),
    (spaces.Dict(a=spaces.Text(5)), "Text"),
    (spaces.Dict(a=spaces.Sequence(spaces.Discrete(3))), "Sequence"),
    (spaces.Box(0, 255, (17, 84, 84), np.uint8), "a picture has up to 16 channels"),
    (spaces.Box(0, 255, (6, 84, 84, 3), np.uint8), "a picture has up to 16 channels"),
    (spaces.Dict(), "no part that is a picture or numbers"),
])
def test_unsupported_observations(register, space, expected):
    text = error_of(EnvConfig(register(lambda: SampleEnv(space))))
    assert text.startswith("observation space") and expected in text


@pytest.mark.parametrize(
    "bad", [{"action_repeat": 0}, {"image_size": 0}, {"max_episode_steps": -1}])
def test_bad_numbers(bad):
    assert error_of(counting(**bad)).startswith("action_repeat and image_size start at 1")
    assert error_of(counting(sticky=1.5)).startswith("action_repeat and image_size start")
    assert "at least 1, got 0" in error_of(counting(), num_envs=0)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_rendering_that_fails(num_envs):
    with closing(Envs(EnvConfig(FAKE + "Echo-v0", render=True), num_envs, 0)) as envs:
        envs.reset()
        with pytest.raises(EnvError, match="cannot render: NotImplementedError"):
            envs.render()
