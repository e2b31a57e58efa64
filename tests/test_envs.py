"""common/spaces.py, envs.py and vector.py: what an environment of any kind becomes."""

import os
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, wait_until
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

import dreamer_v1
import dreamer_v2
import dreamer_v3
from common.envs import EnvConfig, benchmark, make_env
from common.spaces import EnvError, EnvSpec, env_spec
from common.vector import Envs
from tests.fake_envs import LENGTH, CountingEnv, EchoEnv, SampleEnv

FAKE = "tests.fake_envs:"
PONG = "PongNoFrameskip-v4"


def fake(name="Counting", **kwargs):
    return EnvConfig(f"{FAKE}{name}-v0", **kwargs)


def box(low, high, *shape, dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


def actions(spec: EnvSpec, num_envs: int, rng: np.random.Generator) -> np.ndarray:
    if spec.discrete:
        one_hot = np.eye(spec.action_dim, dtype=np.float32)
        return one_hot[rng.integers(spec.action_dim, size=num_envs)]
    return rng.uniform(-1, 1, (num_envs, spec.action_dim)).astype(np.float32)


def play(config, num_envs, steps, seed=0, same_action=False):
    """The EnvSteps of `steps` random steps after a reset, and the stack of their fields."""
    rng = np.random.default_rng(7)
    with closing(Envs(config, num_envs, seed)) as envs:
        trace = [envs.reset()]
        for _ in range(steps):
            action = actions(envs.spec, 1 if same_action else num_envs, rng)
            trace.append(envs.step(np.repeat(action, num_envs, 0) if same_action else action))
    return type(trace[0])(*[None if f[0] is None else np.stack(f) for f in zip(*trace)])


@pytest.fixture
def register():
    """register(callable) -> an id of this process, forgotten after the test."""
    def add(entry_point):
        gym.registry.pop("Temporary-v0", None)
        gym.register("Temporary-v0", entry_point=entry_point)
        return "Temporary-v0"

    yield add
    gym.registry.pop("Temporary-v0", None)


@pytest.fixture
def module(monkeypatch, tmp_path):
    """module(name, code): a file that can be imported, and that stands where the user is."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def write(name, code):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))

    return write


# ---- contract

@pytest.mark.parametrize("env_id, repeat, expected", [
    ("CartPole-v1", 1, EnvSpec(None, 4, 2, True)), ("Pendulum-v1", 2, EnvSpec(None, 3, 1, False)),
    (PONG, 4, EnvSpec((64, 64, 3), 0, 6, True)), ("ALE/Pong-v5", 4, EnvSpec((64, 64, 3), 0, 6, True)),
    ("dm_control/walker-walk-v0", 2, EnvSpec(None, 24, 6, False)), ("MiniGrid-Empty-5x5-v0", 1, EnvSpec(
        (64, 64, 3), 4, 7, True)), (FAKE + "Counting-v0", 1, EnvSpec((64, 64, 3), 3, 3, True))])
def test_contract(env_id, repeat, expected):
    needs = {"dm": "shimmy", "Po": "ale_py", "AL": "ale_py", "Mi": "minigrid"}
    pytest.importorskip(needs.get(env_id[:2], "numpy"))
    with closing(Envs(EnvConfig(env_id, action_repeat=repeat), 1, seed=0)) as envs:
        assert envs.spec == expected
        steps, rng = [envs.reset()], np.random.default_rng(0)
        assert steps[0].is_first.all() and steps[0].reward == 0 and steps[0].episode_length == 0
        steps += [envs.step(actions(envs.spec, 1, rng)) for _ in range(20)]
    kinds = {"reward": "float32", "is_first": "bool", "is_last": "bool", "is_terminal": "bool",
             "episode_return": "float64", "episode_length": "int64"}
    kinds |= {"image": "uint8"} if expected.image_shape else {}
    kinds |= {"vector": "float32"} if expected.vector_dim else {}
    for step in steps:
        found = {name: part for name, part in step._asdict().items() if part is not None}
        assert {name: part.dtype.name for name, part in found.items()} == kinds
        for name, part in found.items():
            shapes = {"image": expected.image_shape, "vector": (expected.vector_dim,)}
            assert part.shape == (1, *shapes.get(name, ()))


def test_what_a_benchmark_changes():
    """By whose task it is, not by the kind of its actions."""
    pytest.importorskip("ale_py") and pytest.importorskip("shimmy")
    ids = {"atari": [PONG, "ALE/Pong-v5", "Pong-v4", "Pong", "ale_py:ALE/Pong-v5"],
           "control": ["dm_control/walker-walk-v0"],
           "other": ["CartPole-v1", "CartPole", "Pendulum-v1", "Nonsense", FAKE + "Counting-v0"]}
    assert {kind: [benchmark(x) for x in some] for kind, some in ids.items()} == {
        kind: [kind] * len(some) for kind, some in ids.items()}
    envs = PONG, *ids["control"], "CartPole-v1", "Pendulum-v1"
    for script in (dreamer_v1, dreamer_v2, dreamer_v3):
        atari, control, discrete, continuous = (script.Args(env_id=x) for x in envs)
        assert [x.action_repeat for x in (atari, control, discrete, continuous)] == [4, 2, 1, 1]
        assert not (control.grayscale or discrete.grayscale or continuous.grayscale)
        assert atari.grayscale == (script is dreamer_v2)
        assert atari.sticky == (0.0 if script is dreamer_v3 else 0.25)
        assert script is dreamer_v3 or (discrete.pcont and continuous.pcont), "tasks that end"


# ---- observations

def observe(register, space, **kwargs):
    """(what the environment gave, what came out, EnvSpec, notices) for one reset."""
    env = make_env(EnvConfig(register(lambda: SampleEnv(space)), image_size=8, **kwargs))
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    spec = env_spec(env.observation_space, env.action_space)
    return env.unwrapped.given, observation, spec, env.notices


@pytest.mark.parametrize("space, names", [
    (box(-1, 1, 2), ["number 1", "number 2"]), (spaces.Dict(goal=box(-1, 1, 2), at=spaces.Tuple((
        box(0, 255, 8, 8, dtype=np.uint8), spaces.Discrete(2)))),
        ["goal 1", "goal 2", "at 1 1", "at 1 2"])])
def test_numbers_are_named_by_their_parts(register, space, names):
    with closing(Envs(EnvConfig(register(lambda: SampleEnv(space))), 1, 0)) as envs:
        assert [*envs.spec.names] == names


def test_dict_stacks_images_and_flattens_the_rest(register):
    u8 = lambda *shape: box(0, 255, *shape, dtype=np.uint8)  # noqa: E731
    space = spaces.Dict(a=u8(8, 8, 3), b=spaces.Dict(first=u8(1, 8, 8), position=box(
        -1, 1, 6, dtype=np.float64)), c=spaces.Tuple((spaces.Discrete(4, start=2), spaces.MultiBinary(
            3), u8(8, 8))), d=spaces.MultiDiscrete([2, 3]), e=u8(5), mission=spaces.Text(9))
    given, out, spec, notices = observe(register, space)
    assert spec == EnvSpec((8, 8, 3 + 1 + 1), 6 + 4 + 3 + 5 + 5, 2, True) and not notices
    images = [given["a"], np.moveaxis(given["b"]["first"], 0, -1), given["c"][2][..., None]]
    np.testing.assert_array_equal(out["image"], np.concatenate(images, -1))
    rest = [(space["b"]["position"], given["b"]["position"]), (space["c"][0], given["c"][0]),
            (space["c"][1], given["c"][1]), (space["d"], given["d"]), (space["e"], given["e"])]
    flat = np.concatenate([spaces.flatten(s, value) for s, value in rest])
    np.testing.assert_allclose(out["vector"], flat, rtol=1e-6)


@pytest.mark.parametrize("shape, channels", [
    ((16, 12), 1), ((16, 12, 1), 1), ((16, 12, 3), 3), ((1, 16, 12), 1), ((3, 16, 12), 3),
    ((16, 12, 4), 4), ((4, 16, 12), 4), ((24, 20, 9), 9), ((16, 24, 20), 16), ((4, 16, 12, 3), 12),
    ((16, 16, 20), 20)])
def test_images_of_every_layout_are_resized_by_area(register, shape, channels):
    """Luminance if grey is asked for."""
    space = box(0, 255, *shape, dtype=np.uint8)
    given, out, spec, notices = observe(register, space)
    assert out["image"].shape == spec.image_shape == (8, 8, channels) and not notices
    axes = {2: "hw", 4: "khwc"}.get(len(shape), "hwc" if shape[-1] == channels else "chw")
    sides = axes.index("h"), axes.index("w")
    mean = out["image"].mean((0, 1))
    assert np.abs(mean - given.mean(sides).ravel()).max() < 1  # area keeps the mean
    if channels == 3:
        grey = observe(register, space, grayscale=True)[1]["image"].mean((0, 1))
        assert grey.shape == (1,) and abs(grey[0] - mean @ [0.299, 0.587, 0.114]) < 1


@pytest.mark.parametrize("low, high, dtype", [
    (0, 1, np.float32), (0, 255, np.float32), (-1, 1, np.float64), (0, 255, np.int64)])
@pytest.mark.parametrize("shape", [(32, 24, 3), (3, 32, 24), (32, 24, 1), (32, 24), (4, 32, 24)])
def test_what_looks_like_a_picture_becomes_one(register, low, high, dtype, shape):
    space = spaces.Dict(rgb=box(low, high, *shape, dtype=dtype))
    given, out, spec, notices = observe(register, space)
    channels = 1 if len(shape) == 2 else min(shape)
    assert spec == EnvSpec((8, 8, channels), 0, 2, True) and len(notices) == 1
    assert abs(out["image"].mean() - 255 * (given["rgb"].mean() - low) / (high - low)) < 1


@pytest.mark.parametrize("space", [box(0, 1, 4, 4, 3), box(-5, 5, 32, 24, 3)])
def test_what_may_be_a_picture_is_noticed(register, space):
    _, out, spec, notices = observe(register, space)
    assert spec == EnvSpec(None, space.low.size, 2, True) and "for numbers" in notices[0]


def test_a_dark_first_picture_is_noticed(capfd):
    for name, is_dark in (("CountingImage", True), ("CountingVector", False)):
        play(fake(name), 1, steps=1)
        said = "".join(capfd.readouterr())
        assert said.count("almost black") == said.count("--pixels") == is_dark
        assert "WARN" not in said, "it was registered twice"


# ---- actions

def test_box_actions_reach_asymmetric_bounds_and_are_clipped(register):
    low, high = np.array([[-2, 0, 3]], np.float64), np.array([[6, 0.1, 3]], np.float64)
    space = spaces.Box(low, high, dtype=np.float64)  # EchoEnv asserts that it contains the action
    env = make_env(EnvConfig(register(lambda: EchoEnv(space))))
    env.reset(seed=0)
    for action, expected in [([-1] * 3, low), ([1] * 3, high), ([-9] * 3, low), ([7] * 3, high),
                             ([0, 0, 0], (low + high) / 2), ([0.5, -0.5, 0.3], [4, 0.025, 3])]:
        vector = env.step(np.array(action, np.float32))[0]["vector"]
        np.testing.assert_allclose(vector, np.ravel(expected), rtol=1e-6)


@pytest.mark.parametrize("space, count", [(spaces.Discrete(4, start=5), 4), (
    spaces.MultiDiscrete([2, 3], start=[0, 5]), 6), (spaces.MultiDiscrete([[2, 1], [3, 2]]), 12), (
        spaces.MultiBinary(3), 8), (spaces.MultiBinary([2, 2]), 16), (spaces.MultiDiscrete([32, 32]), 1024)])
def test_every_combination_is_one_discrete_action(register, space, count):
    env = make_env(EnvConfig(register(lambda: EchoEnv(space))))
    env.reset(seed=0)
    seen = {tuple(env.step(index)[0]["vector"]) for index in range(env.action_space.n)}
    assert len(seen) == env.action_space.n == count


# ---- time

@pytest.mark.parametrize("num_envs", [1, 3])
def test_next_step_autoreset(num_envs):
    trace = play(fake(image_size=8), num_envs, steps=2 * (LENGTH + 1))
    t = np.arange(2 * (LENGTH + 1) + 1)
    step, episode = t % (LENGTH + 1), t // (LENGTH + 1)
    vector = np.stack([step, episode, episode * LENGTH + step], -1)
    expected = {"vector": vector, "reward": step, "is_first": step == 0, "is_last": step == LENGTH,
                "is_terminal": step == LENGTH, "episode_return": step * (step + 1) / 2, "episode_length": step}
    for n in range(num_envs):
        np.testing.assert_array_equal(trace.image[:, n, 3, 5], vector)
        for name, values in expected.items():
            np.testing.assert_array_equal(getattr(trace, name)[:, n], values, err_msg=name)


def test_time_limits_are_not_terminals():
    """--max-episode-steps counts agent steps and replaces the environment's own limit."""
    for config, steps in [
            (fake("CountingTruncated"), LENGTH), (EnvConfig("CartPole-v1", max_episode_steps=7), 7),
            (EnvConfig("Pendulum-v1", max_episode_steps=210), 210),  # its own: 200
            (EnvConfig("Pendulum-v1", action_repeat=4, max_episode_steps=9), 9),
            (EnvConfig("Pendulum-v1", action_repeat=4), 50)]:
        trace = play(config, 1, steps)
        assert trace.is_last[:, 0].nonzero()[0].tolist() == [steps] and not trace.is_terminal.any()


# ---- Atari

def test_atari_follows_the_papers():
    pytest.importorskip("ale_py")
    for env_id, sticky in [(PONG, 0.0), ("ALE/Pong-v5", 0.0), (PONG, 0.25), ("ALE/Pong-v5", 0.25)]:
        env = make_env(EnvConfig(env_id, action_repeat=4, sticky=sticky))
        ale = env.unwrapped.ale
        assert ale.getFloat("repeat_action_probability") == sticky
        assert ale.getInt("max_num_frames_per_episode") == 108_000
        env.reset(seed=0)
        before = ale.getEpisodeFrameNumber()  # no-ops
        env.step(0)
        assert 1 <= before <= 30 and ale.getEpisodeFrameNumber() == before + 4


@pytest.mark.parametrize("game, grayscale", [("MsPacman", False), ("Breakout", True)])
def test_the_last_picture_of_an_atari_episode_is_fresh(game, grayscale):
    """And a lost life does not end the episode, but losing all is a terminal."""
    pytest.importorskip("ale_py")
    config = EnvConfig(f"{game}NoFrameskip-v4", action_repeat=4, grayscale=grayscale)
    env, rng = make_env(config), np.random.default_rng(0)
    env.reset(seed=0)
    ale, ends, lives = env.unwrapped.ale, (False, False), set()
    while not any(ends):
        observation, _, *ends, _ = env.step(rng.integers(env.action_space.n))
        lives.add(ale.lives())
    assert ends == [True, False] and lives == set(range(max(lives) + 1)) and len(lives) > 2
    screen = ale.getScreenGrayscale() if grayscale else ale.getScreenRGB()
    screen = cv2.resize(screen, (64, 64), interpolation=cv2.INTER_AREA).reshape(64, 64, -1)
    np.testing.assert_array_equal(observation["image"], screen)


def test_a_variant_of_a_game_is_known_as_atari_the_first_time(module):
    """Also its frame limit is no terminal."""
    pytest.importorskip("ale_py")
    module("variant", """
        import gymnasium
        gymnasium.register("PongHard-v0", "ale_py.env:AtariEnv", kwargs=dict(
            game="pong", mode=0, difficulty=1, obs_type="rgb", max_num_frames_per_episode=100))""")
    args = dreamer_v2.Args(env_id="variant:PongHard-v0")
    assert args.action_repeat == 4 and args.grayscale
    trace = play(EnvConfig(args.env_id, action_repeat=4, noop_max=0), 1, steps=25)
    assert trace.is_last[:, 0].nonzero()[0].tolist() == [25] and not trace.is_terminal.any()


# ---- rendered

def test_pixels_are_the_rendered_picture():
    trace = play(fake("CountingVector", image_size=8, pixels=True, action_repeat=2), 2, steps=3)
    assert trace.vector is None and trace.image.shape == (4, 2, 8, 8, 3)
    assert trace.image[:, 0, 3, 5, 0].tolist() == [0, 2, 4, 5]
    assert trace.reward[:, 0].tolist() == [0, 1 + 2, 3 + 4, 5]
    trace = play(EnvConfig("Pendulum-v1", pixels=True), 1, steps=4)
    assert trace.image.shape == (5, 1, 64, 64, 3) and len(np.unique(trace.image, axis=0)) > 2


@pytest.mark.parametrize("kind", ["Rgb", "Gray", "Chw", "Pil", "Float"])
def test_frames_of_every_kind(kind):
    config = fake(f"Render{kind}", pixels=True)
    means = play(config, 1, steps=10).image.mean((1, 2, 3, 4))
    np.testing.assert_allclose(means, 255 * 3 * np.arange(11) / 60, atol=1)


@pytest.mark.parametrize("task, camera", [("walker-walk", 0), ("quadruped-walk", 2)])
def test_dm_control_is_seen_by_the_authors_camera(task, camera):
    pytest.importorskip("shimmy")
    try:
        env = make_env(EnvConfig(f"dm_control/{task}-v0", pixels=True, action_repeat=2))
    except EnvError as error:
        pytest.skip(f"cannot render here: {error}")
    env.reset(seed=0)
    for _ in range(3):
        image = env.step(env.action_space.sample())[0]["image"]
    physics = env.unwrapped._env.physics
    seen = {number: np.abs(image - physics.render(64, 64, camera_id=number).astype(float)).mean()
            for number in (-1, 0, 1, 2)[:camera + 2]}
    assert seen[camera] < 1 < min(x for number, x in seen.items() if number != camera), seen


def test_dm_control_prints_no_warning_without_a_display():
    pytest.importorskip("shimmy")
    env = {name: os.environ[name] for name in os.environ.keys() - {"DISPLAY", "MUJOCO_GL"}}
    code = "from common.envs import *; make_env(EnvConfig('dm_control/cartpole-swingup-v0'))"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and "GLFW" not in done.stderr, done.stderr


# ---- README's environments

def code_in(path, name: str) -> str:
    code = path.read_text().split(f"<!-- {name}:begin -->\n")[1].split(f"<!-- {name}:end -->")[0]
    return "\n".join(line for line in code.split("\n") if not line.startswith("```"))


def test_the_task_of_the_readme(module):
    """The newcomer's environment: twenty steps, and a reward for the largest of three numbers."""
    module("my_task", code_in(ROOT / "README.md", "my_task"))
    with closing(Envs(EnvConfig("my_task:MyTask-v1"), 1, 0)) as envs:
        steps = [envs.reset()]
        while not steps[-1].is_last:
            steps.append(envs.step(np.eye(3, dtype=np.float32)[steps[-1].vector.argmax(-1)]))
    assert len(steps) == 21 and steps[-1].episode_return == 20 and not steps[-1].is_terminal
    check_env(gym.make("my_task:MyTask-v1").unwrapped)


def test_the_wrapper_for_crafter(module):
    """With something that behaves like Crafter: every episode ends by death after three steps."""
    module("crafter", """
        import numpy as np
        class Env:
            def __init__(self, seed):
                self.steps = 0
            def reset(self):
                return np.zeros((64, 64, 3), np.uint8)
            def step(self, action):
                self.steps += 1
                return self.reset(), 0.1, self.steps == 3, {"discount": float(self.steps < 3)}""")
    module("crafter_env", code_in(ROOT / "common" / "README.md", "crafter"))
    trace = play(EnvConfig("crafter_env:Crafter-v1"), 1, steps=16)
    assert trace.image.shape == (17, 1, 64, 64, 3)
    assert trace.is_last[:, 0].nonzero()[0].tolist() == [3, 7, 11, 15]
    assert (trace.is_terminal == trace.is_last).all()


# ---- seeds and processes

@pytest.mark.parametrize("env_id", ["LunarLander-v3", PONG, FAKE + "Meddling-v0"])
def test_same_seed_same_stream(env_id):
    """Environment 0 of three is that of one; no two environments, episodes or seeds are alike."""
    pytest.importorskip({"LunarLander-v3": "Box2D", PONG: "ale_py"}.get(env_id, "numpy"))
    config = EnvConfig(env_id, image_size=16, max_episode_steps=20)
    one, three = (play(config, n, steps=60, seed=5, same_action=True) for n in (1, 3))
    other = play(config, 1, steps=60, seed=6, same_action=True)
    name = "vector" if one.image is None else "image"
    np.testing.assert_array_equal(getattr(one, name), getattr(three, name)[:, :1])
    starts = np.concatenate([getattr(x, name)[x.is_first] for x in (three, other)])
    assert env_id == PONG or len(np.unique(starts, axis=0)) == len(starts)  # Pong: no-ops


@pytest.mark.parametrize("name", ["Meddling", "MeddlingInit"])
def test_an_environment_cannot_touch_the_agent(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state(), str(np.random.get_state())
    play(fake(name), 2, steps=2 * LENGTH)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]
    assert os.getcwd() == str(tmp_path)


def test_env_seed_fixes_every_episode():
    trace = play(EnvConfig("Pendulum-v1", max_episode_steps=2, seed=3), 2, steps=8)
    expected, _ = gym.make("Pendulum-v1").reset(seed=3)
    np.testing.assert_array_equal(trace.vector[trace.is_first], [expected] * 6)


def test_arguments_and_wrappers(register):
    """--env-kwargs, and a function as entry point, which is how a user adds a wrapper."""
    trace = play(fake(kwargs='{"length": 2, "continuous": true}'), 2, steps=2)
    assert trace.is_last[-1].all()
    env_id = register(lambda: gym.wrappers.RescaleObservation(
        CountingEnv(parts="image", length=2), np.uint8(0), np.uint8(1)))
    trace = play(EnvConfig(env_id), 2, steps=2)  # an id of this process reaches the others
    assert trace.is_last[-1].all() and trace.image.max() <= 1


SCRIPT = """
    import sys, time
    from common.vector import *
    open("marker", "a").write("imported ")  # once, if processes do not import the main script
    if __name__ == "__main__":
        import torch
        envs = Envs(EnvConfig("tests.fake_envs:Hang-v0"), 2, 0)
        print(*[process.pid for process in envs.vector.processes], flush=True)
        envs.reset()
        if sys.argv[1] == "hang":
            for _ in range(3): envs.step(np.eye(3)[[0, 0]])
        time.sleep(600)
"""


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second if it ends when it was opened
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize("state", ["idle", "hang"])
def test_processes_die_with_a_killed_parent_and_import_no_torch(tmp_path, state):
    (tmp_path / "main.py").write_text(textwrap.dedent(SCRIPT))
    with subprocess.Popen([sys.executable, "main.py", state], stdout=subprocess.PIPE, text=True,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)), cwd=tmp_path) as parent:
        pids = parent.stdout.readline().split()
        were_alive = [alive(pid) for pid in pids]
        maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
        if state == "hang":
            wait_until((tmp_path / "hangs").exists)
        parent.kill()  # before any assertion, because leaving the block waits for the process
    assert were_alive == [True, True] and "libtorch" not in maps
    wait_until(lambda: not any(map(alive, pids)))
    assert (tmp_path / "marker").read_text() == "imported "


def test_processes_end_by_themselves_and_one_that_is_killed_is_named():
    """No signal of the group reaches them: Ctrl-C, or what `timeout 1h python` sends."""
    envs = Envs(fake(), 2, 0)
    envs.reset()
    processes = envs.vector.processes
    assert os.getpgid(0) not in {os.getpgid(process.pid) for process in processes}
    processes[1].kill()  # as the out-of-memory killer does it
    processes[1].join()
    with pytest.raises(EnvError, match="its process died"):
        envs.step(np.eye(3)[[0, 0]])
    envs.close(), envs.close()
    assert [process.exitcode for process in processes] == [0, -9]


@pytest.mark.parametrize("space, given, bad", [
    (box(0, 9, 3, dtype=np.int64), [0.7, 1.9, 3.2], [0.7, np.nan, 3]),
    (box(0, 255, 3, dtype=np.uint8), [300, -1, 0.5], [1, 2]),
    (spaces.Dict(a=box(0, 1, 2), b=box(0, 1, 3)), {"a": [1, 2], "b": [3, 4, 5]},
     {"a": [1, 2, 3], "b": [4, 5]})])
def test_numbers_are_what_the_environment_gave_not_what_its_space_can_hold(register, space, given, bad):
    env = make_env(EnvConfig(register(lambda: SampleEnv(space))))
    wanted = [1, 2, 3, 4, 5] if isinstance(given, dict) else given
    np.testing.assert_array_equal(env.observation(given)["vector"], np.float32(wanted))
    with pytest.raises(ValueError, match="the observation has"):
        env.observation(bad)


# ---- errors of one line

def error_of(config, num_envs=2) -> str:
    with pytest.raises(EnvError) as caught, closing(Envs(config, num_envs, 0)) as envs:
        envs.reset()
        for _ in range(3):
            envs.step(actions(envs.spec, num_envs, np.random.default_rng(0)))
    return " ".join(str(caught.value).split())


FAULTS = {
    "Raise": "RuntimeError: lost the ball", "RaiseInit": "no such level", "SysExit": "",
    "RaiseFirstReset": "cannot reset", "Exit": "its process died", "NanReward": "is nan",
    "InfReward": "is -inf", "TextReward": "is 'much'", "TwoRewards": "is array([1., 2.])",
    "NanObs": "NaN", "InfObs": "infinity",
    "Shape": "(2,)", "Dtype": "float64", "Missing": "vector", "Ragged": "", "DictFlag": "__all__",
    "TextFlag": "'False'", "NanFlag": "nan", "TwoFlags": "array([ True, False])", "HalfFlag": "0.5"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault):
    text = error_of(fake(fault))
    assert f"{fault}-v0" in text and FAULTS[fault] in text, text
    assert "reset" not in text or fault == "RaiseFirstReset", "it is blamed on the wrong call"


@pytest.mark.parametrize("env_id, expected", [("CartPol-v1", "module:Id-v0"), ("CartPole-v7", "CartPole"), (
    "ALE/Pongg-v5", "Pongg"), (FAKE + "Countin-v0", "fake_envs.py registers no 'Countin-v0'"), *[
        (f"{name}:X-v0", "registers no 'X-v0'") for name in ("test", "code", "queue")], (
            "not a valid id!", "not a valid id!"), ("a:b:c", "a:b:c"), ("", "''"),
                                              ("no_such_module:X-v0", "No module named 'no_such_module'")])
def test_ids_that_cannot_be_made(env_id, expected):
    assert expected in error_of(EnvConfig(env_id))


@pytest.mark.parametrize("env_id, package, module", [
    ("dm_control/walker-walk-v0", "shimmy[dm-control]", "shimmy"),
    ("MiniGrid-Empty-5x5-v0", "minigrid", "minigrid"), (PONG, "ale-py", "ale_py"),
    ("VizdoomBasic-v1", "vizdoom", "vizdoom.gymnasium_wrapper")])
def test_packages_that_register_their_ids(monkeypatch, env_id, package, module):
    monkeypatch.setitem(sys.modules, module, None)  # `import module` raises ImportError
    text = error_of(EnvConfig(env_id))
    assert "pip install" in text and package in text


@pytest.mark.parametrize("space, action_space, expected", [
    (box(0, 1, 2), box(-np.inf, 1, 2), "Box(-inf, 1.0, (2,), float32) is not supported"),
    (box(0, 1, 2), box(0, 5, 2, dtype=np.int64), "int64) is not supported"),
    (box(0, 1, 2), spaces.MultiDiscrete([32, 33]), "1,056 combinations"), (box(
        0, 1, 2), spaces.Dict(a=spaces.Discrete(2)), "Dict('a': Discrete(2)) is not supported"), (spaces.Text(
            5), spaces.Discrete(2), "no part that is a picture or numbers"), (spaces.Dict(a=spaces.Sequence(
                spaces.Discrete(3))), spaces.Discrete(2), "Sequence"), (box(0, 1, 2), None, "rgb_array")])
def test_what_is_not_supported_is_named(register, space, action_space, expected):
    env_id = register(lambda: SampleEnv(space, action_space or spaces.Discrete(2)))
    assert expected in error_of(EnvConfig(env_id, pixels=action_space is None))
