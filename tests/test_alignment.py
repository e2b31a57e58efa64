"""Which action belongs to which observation and reward, from the environment to the losses.

The first half runs the real `main`, in this process, on an environment whose observations say when
they are and which action led to them (tests/alignment_envs.py), so that every replayed row can be
checked against the next one. The second half puts counters in the place of the networks, and looks
at what enters each loss: the diagrams in the docstrings of the three scripts, as a table.
"""

import functools
import importlib
import inspect
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS

from tests.alignment_envs import LENGTHS
from tests.tiny import has_flag, tiny_agent, tiny_batch, tiny_spec

TINY = dict(deter=8, hidden=8, units=8, stoch=2, classes=2, layers=1, reward_layers=1,
            critic_layers=1, pcont_layers=1, actor_layers=1, mlp_units=8, mlp_layers=1, depth=2,
            imag_horizon=3, batch_size=3, batch_length=5, bins=5, total_timesteps=48,
            learning_starts=24, train_ratio=15, pretrain=1, threads=1, checkpoint_every=1000,
            video_every=0, log_every=1000)


@contextmanager
def recorded(owner, name: str):
    """Let a function or method do its work; note its arguments, by name, and what it returns."""
    original, calls = getattr(owner, name), []
    names = list(inspect.signature(original).parameters)

    def wrapper(*args, **kwargs):
        copies = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
        result = original(*args, **kwargs)
        calls.append(SimpleNamespace(**dict(zip(names, copies)), **kwargs, result=result))
        return result

    setattr(owner, name, wrapper)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


# ---- From the environment to the model -----------------------------------------------------------

def run(module, tmp_path, monkeypatch, env: str, **flags) -> dict[str, np.ndarray]:
    """Train for a few steps; the rows of the replay buffer, (environments, rows, ...) each."""
    flags = {name: value for name, value in TINY.items() if has_flag(module, name)} | flags
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", [
        module.SCRIPT, "--env-id", f"tests.alignment_envs:{env}-v0", "--size", "XXS", "--no-cuda",
        "--runs-dir", str(tmp_path), *argv])
    numpy_state = np.random.get_state()
    module.main()
    np.random.set_state(numpy_state)
    replay, = tmp_path.glob("*/replay")
    rings = {path.stem: np.load(path) for path in replay.glob("*.npy")}
    complete = rings.pop("rows")[1]
    return {name: ring[:, :complete] for name, ring in rings.items()}


@pytest.fixture(scope="module", params=SCRIPTS)
def module(request):
    return importlib.import_module(request.param)


newest = pytest.mark.parametrize("module", SCRIPTS[-1:], indirect=True)


def check_rows(rows: dict[str, np.ndarray], env: str, num_envs: int) -> None:
    episode, step, reward, *echo = np.moveaxis(rows["vector"], -1, 0)
    assert rows["reward"].shape == (num_envs, 48 // num_envs)

    # Episodes of the lengths that they ought to have, each observation once and in order.
    expected = [(e, s) for e in range(48) for s in range(LENGTHS[e % len(LENGTHS)] + 1)]
    for env_index in range(num_envs):
        assert list(zip(episode[env_index], step[env_index])) == expected[:48 // num_envs]

    # Flags; a time limit is not a terminal.
    is_last = step == np.array(LENGTHS)[episode.astype(int) % len(LENGTHS)]
    assert (rows["is_first"] == (step == 0)).all()
    assert (rows["is_terminal"] == (is_last & (env != "RecallTruncated"))).all()
    assert is_last.sum() > 5 * num_envs

    # The reward came with the observation: 100 e + t at step t, 0 at the start.
    assert (rows["reward"] == reward).all()
    assert (reward == np.where(step == 0, 0, 100 * episode + step)).all()

    # The action of a row led to the next row; after the last one of an episode there is none.
    action, follows = rows["action"], ~is_last[:, :-1]
    assert not action[is_last].any()
    assert (rows["is_first"][:, 1:] == is_last[:, :-1]).all()
    if env == "RecallBox":
        led_to = np.stack(echo, -1)[:, 1:]
        assert (np.clip(action[:, :-1], -1, 1)[follows] == led_to[follows]).all()
        assert len(np.unique(action)) > 40
    else:
        assert (action[~is_last].sum(-1) == 1).all() and set(np.unique(action)) == {0, 1}
        assert (action[:, :-1].argmax(-1)[follows] == echo[0][:, 1:][follows]).all()
        assert set(action[~is_last].argmax(-1)) == {0, 1, 2}


@pytest.mark.parametrize("env, num_envs", [("RecallBox", 1), ("Recall", 2)])
def test_rows_and_what_the_agent_makes_of_them(module, tmp_path, monkeypatch, env, num_envs):
    """The rows; acting goes on from the action that led here; the model gets the one before."""
    box = env == "RecallBox"
    with (recorded(module.Agent, "act") as acts, recorded(module.RSSM, "observe") as observes,
          recorded(module.Agent, "train_step") as steps):
        check_rows(run(module, tmp_path, monkeypatch, env, num_envs=num_envs), env, num_envs)

    def echo(action):
        return action.clamp(-1, 1).numpy() if box else action.argmax(-1)[..., None].numpy()

    assert len(acts) == 48 // num_envs
    seen = 0
    for call in acts:  # while actions are random, too, the state is kept up to date
        middle = ~call.obs.is_first
        assert (echo(call.state.action)[middle] == call.obs.vector[middle, 3:]).all()
        seen += middle.sum()
    assert seen > 25

    replayed = [call for call in observes if len(call.embed) > 1]
    assert len(replayed) == len(steps) > 10
    for call, step in zip(replayed, steps):
        batch, middle = step.batch, ~step.batch.is_first
        assert call.embed.shape[:2] == call.prev_action.shape[:2] == (5, 3)
        assert torch.equal(call.prev_action[1:], batch.action[:-1])
        if has_flag(module, "replay_context"):  # the row before the window is known
            assert torch.equal(call.prev_action[0], batch.prev_action[0])
        else:
            assert torch.equal(call.prev_action[0], step.carry.action)
            assert not step.carry.action.any() and call.is_first[0].all()
        assert torch.equal(call.is_first, batch.is_first)
        assert (echo(call.prev_action)[middle] == batch.vector[middle][:, 3:].numpy()).all()
        assert (batch.vector[..., 1][middle] > 0).all()


@newest
@pytest.mark.parametrize("env", ["Recall", "RecallTruncated"])
def test_rows_of_other_environments(module, tmp_path, monkeypatch, env):
    check_rows(run(module, tmp_path, monkeypatch, env), env, 1)


@newest
def test_a_limit_of_ours_is_not_a_terminal(module, tmp_path, monkeypatch):
    rows = run(module, tmp_path, monkeypatch, "Recall", max_episode_steps=2)
    episode, step = rows["vector"][0, :, 0], rows["vector"][0, :, 1]
    lengths = np.minimum(LENGTHS, 2)[episode.astype(int) % len(LENGTHS)]
    own_end = step == np.array(LENGTHS)[episode.astype(int) % len(LENGTHS)]
    assert step.max() == 2 and (own_end & (step == 2)).any() and (~own_end & (step == 2)).any()
    assert (rows["is_terminal"][0] == own_end).all()
    assert not rows["action"][0, step == lengths].any()


def test_a_sequence_does_not_see_what_came_before_its_start(module):
    """is_first in the middle: state and action of the steps before do not matter."""
    torch.manual_seed(0)
    agent = tiny_agent(module)
    embed, action = torch.randn(5, 1, agent.world_model.encoder.embed_dim), torch.rand(5, 1, 2)
    is_first, zero = torch.tensor([True, False, True, False, False])[:, None], agent.zero_state(1)

    def states(embed, action, carry):
        torch.manual_seed(1)
        return agent.world_model.rssm.observe(embed, action, is_first, carry.deter, carry.stoch)[0]

    base, changed = states(embed, action, zero), action.clone()
    changed[:3] *= -1  # action[2] led to the first step of the second episode
    other = states(torch.cat([embed[:2] + 1, embed[2:]]), changed, zero)
    assert not torch.allclose(base[1], other[1])
    torch.testing.assert_close(base[2:], other[2:])
    carried = states(embed, action, module.State(*(torch.ones_like(x) for x in zero)))
    torch.testing.assert_close(base, carried)  # is_first at the start, too
    changed[3] *= -1
    assert not torch.allclose(base[3], states(embed, changed, zero)[3])


def test_a_state_depends_on_its_own_episode_up_to_now(module):
    """Not on other sequences, on the future, or on what came before is_first."""
    torch.manual_seed(0)
    agent = tiny_agent(module)
    batch = tiny_batch(module, agent)
    batch.vector.requires_grad_()
    batch.is_first[1:] = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 1]]) > 0
    with recorded(agent.world_model, "reward") as calls:
        module.world_model_loss(agent.world_model, batch, agent.zero_state(3), agent.args)
    reward, start = calls[0].result.mean(), [0] * 3
    for t, b in np.ndindex(5, 3):
        start[b] = t if batch.is_first[t, b] else start[b]
        grad, = torch.autograd.grad(reward[t, b], batch.vector, retain_graph=True)
        expected = torch.zeros(5, 3, dtype=torch.bool)
        expected[start[b]:t + 1, b] = True
        assert torch.equal(grad.any(-1), expected), (t, b)


def test_acting_is_replay_one_step_at_a_time(module, monkeypatch):
    """With the same draws the agent has the states in which it learns."""
    torch.manual_seed(0)
    monkeypatch.setattr(module, "draw_classes", lambda probs: probs.argmax(-1))
    monkeypatch.setattr(module, "draw_noise", lambda mean: torch.full_like(mean, 0.5))
    agent = tiny_agent(module)
    model, batch, state = agent.world_model, tiny_batch(module, agent), agent.zero_state(3)
    deter, stoch, _ = model.rssm.observe(
        model.encoder(None, batch.vector), module.previous_actions(batch, state.action),
        batch.is_first, state.deter, state.stoch)
    for t in range(5):
        rows = {name: getattr(batch, name)[t].numpy() for name in ("vector", "reward", "is_first")}
        obs = module.EnvStep(image=None, is_last=np.zeros(3, bool), is_terminal=None,
                             episode_return=None, episode_length=None, **rows)
        state = agent.act(obs, state)._replace(action=batch.action[t])
        torch.testing.assert_close(state.deter, deter[t])
        torch.testing.assert_close(state.stoch, stoch[t])


# ---- From the states to the losses ---------------------------------------------------------------

H, T, B = 4, 3, 2
GAMMA = 0.5
FLAGS = (1.0, 0.9, 0.8, 0.7, 0.6)  # that the episode goes on, at the imagined states 0 to 4


class Told:
    """A distribution that says what its mean is, and which of the imagined states it is of."""

    def __init__(self, value: torch.Tensor, steps: torch.Tensor):
        self.value, self.steps = value, steps

    def mean(self):
        return self.value

    mode = mean

    def __getitem__(self, index):
        return Told(self.value[index], self.steps[index])


class Policy:
    """`raw` is the number of the imagined state; the action chosen there is 10 more."""

    def __init__(self, raw):
        self.raw = raw

    def sample(self):
        return self.raw.expand(-1, 2) + 10


class NoOptimizer:
    """Learns nothing."""

    def grads(self, loss, retain_graph=False):
        return ()

    def apply(self, grads):
        return torch.zeros(())


def counting_agent(module, monkeypatch, is_terminal: torch.Tensor, goes_on: tuple[float, ...]):
    """An agent in whose world a state says which imagined step it is, and where it began.

    Feature 0 is the step, feature -1 the number of the start, t B + b. A reward is 100 + step, a
    value 200 + step, that of the slow critic 300 + step, a flag `goes_on[step]`. Also a batch.
    """
    flags = {"pcont": True} if has_flag(module, "pcont") else {}
    agent = tiny_agent(module, imag_horizon=H, batch_length=T, batch_size=B, gamma=GAMMA,
                       **flags)
    model = agent.world_model
    deter, stoch = (torch.zeros(T, B, x.shape[-1]) for x in agent.zero_state(1)[:2])
    stoch[:] = torch.arange(T * B).view(T, B, 1)
    monkeypatch.setattr(module, "world_model_loss", lambda *arguments: (
        {"image": torch.zeros(T, B)}, deter, stoch, {}))

    def img_step(deter, stoch, action):
        assert (action == deter[:, :1] + 10).all(), "an action of another state"
        return deter + 1, stoch

    model.rssm.img_step = img_step
    model.reward = lambda feat: Told(100 + feat[..., 0], feat[..., 0])
    model.cont = model.discount = lambda feat: Told(
        torch.tensor(goes_on)[feat[..., 0].long()], feat[..., 0])
    agent.critic.forward = lambda feat: Told(200 + feat[..., 0], feat[..., 0])
    agent.actor.forward = lambda feat: feat[..., :1]
    agent.actor.policy = Policy
    if hasattr(agent, "slow_critic"):
        agent.slow_critic.forward = lambda feat: Told(300 + feat[..., 0], feat[..., 0])
    for name in ("model_opt", "actor_opt", "critic_opt", "optimizer"):
        setattr(agent, name, NoOptimizer())
    return agent, tiny_batch(module, agent, is_terminal=is_terminal)


def learn(module, monkeypatch, is_terminal: torch.Tensor,
          goes_on: tuple[float, ...] = FLAGS) -> SimpleNamespace:
    """What `Agent.learn` gives to `lambda_return` and to the two losses."""
    agent, batch = counting_agent(module, monkeypatch, is_terminal, goes_on)

    def no_loss(shipped, result):
        return functools.wraps(shipped)(lambda *arguments: result)

    scalar = torch.zeros(())
    result = scalar if module.SCRIPT == "dreamer_v1" else (scalar, torch.zeros(H, T * B))
    monkeypatch.setattr(module, "actor_loss", no_loss(module.actor_loss, result))
    monkeypatch.setattr(module, "critic_loss", no_loss(module.critic_loss, scalar))
    revised, carry = has_flag(module, "replay_context"), agent.zero_state(B)
    if revised:
        monkeypatch.setattr(module, "replay_critic_loss",
                            no_loss(module.replay_critic_loss, scalar))
    with (recorded(module, "lambda_return") as returns, recorded(module, "actor_loss") as actor,
          recorded(module, "critic_loss") as critic):
        agent.learn(batch) if revised else agent.learn(batch, carry)
    assert len(returns) == len(actor) == len(critic) == 1
    return SimpleNamespace(actor=actor[0], critic=critic[0], returns=returns[0])


def is_row(tensor: torch.Tensor, *numbers: float) -> None:
    """`tensor` (steps, N) holds these numbers along the steps, for every start."""
    expected = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, tensor.shape[-1])
    torch.testing.assert_close(tensor, expected)


NEVER = torch.zeros(T, B, dtype=torch.bool)


@pytest.mark.parametrize("module", SCRIPTS[2:], indirect=True)
def test_what_enters_the_losses_of_v3(module, monkeypatch):
    """[V3-6] [V3-14] [R-8] H = 4: states 0 to 4, H terms everywhere."""
    found = learn(module, monkeypatch, NEVER)
    revised = module.SCRIPT == "dreamer_v3_2025"  # flags have gamma in them, the first one counts
    gamma, start = (1, FLAGS[0]) if revised else (GAMMA, 1)
    is_row(found.returns.reward, 101, 102, 103, 104)  # what the actions 0 ... 3 led to
    is_row(found.returns.discount, *(gamma * flag for flag in FLAGS[1:]))
    is_row(found.returns.next_value, 201, 202, 203, 204)
    is_row(found.actor.policy.raw[..., 0], 0, 1, 2, 3)
    is_row(found.actor.action[..., 0], 10, 11, 12, 13)
    is_row(found.actor.baseline, 200, 201, 202, 203)
    is_row(found.critic.value_dist.steps, 0, 1, 2, 3)
    is_row(found.critic.slow_value, 300, 301, 302, 303)
    for loss in (found.actor, found.critic):
        assert loss.ret is found.returns.result and loss.weight.shape == (H, T * B)
        is_row(loss.weight, *(gamma**t * start * p for t, p in enumerate([1, 0.9, 0.72, 0.504])))


def test_what_enters_the_losses_of_v2(monkeypatch):
    """[V2-6] [V2-7] Facts 22 to 28: H terms for the critic, H - 1 for the actor."""
    found = learn(importlib.import_module("dreamer_v2"), monkeypatch, NEVER)
    is_row(found.returns.reward, 100, 101, 102, 103)  # of the state itself, from the start on
    is_row(found.returns.discount, GAMMA, 0.9, 0.8, 0.7)  # the first one is recorded
    is_row(found.returns.next_value, 301, 302, 303, 304)  # the slow critic's
    is_row(found.actor.policy.raw[..., 0], 0, 1, 2)
    is_row(found.actor.action[..., 0], 10, 11, 12)
    is_row(found.actor.baseline, 300, 301, 302)
    assert torch.equal(found.actor.ret, found.returns.result[1:])  # of the states that they lead to
    is_row(found.actor.weight, 1, GAMMA, GAMMA * 0.9)
    is_row(found.critic.value_dist.steps, 0, 1, 2, 3)
    assert found.critic.ret is found.returns.result
    is_row(found.critic.weight, 1, GAMMA, GAMMA * 0.9, GAMMA * 0.9 * 0.8)


def test_what_enters_the_losses_of_v1(monkeypatch):
    """Facts 19 to 23: the states 1 to 4; the last one bootstraps, so H - 1 terms."""
    found = learn(importlib.import_module("dreamer_v1"), monkeypatch, NEVER)
    is_row(found.returns.reward, 101, 102, 103)
    is_row(found.returns.discount, 0.9, 0.8, 0.7)  # of the same state as the reward
    is_row(found.returns.next_value, 202, 203, 204)
    is_row(found.critic.value_dist.mean(), 201, 202, 203)
    for loss in (found.actor, found.critic):
        assert loss.ret is found.returns.result
        is_row(loss.weight, 1, 0.9, 0.9 * 0.8)
    assert found.returns.reward.shape[1] == (T - 1) * B  # the last of a window could be terminal


@pytest.mark.parametrize("module", SCRIPTS[:3], indirect=True)  # of starts, too
def test_nothing_is_learnt_from_what_lies_behind_an_end(module, monkeypatch):
    """A recorded terminal, start t B + b, ends the imagined episode at its start; others go on."""
    is_terminal = NEVER.clone()
    is_terminal[1, 1] = True
    found = learn(module, monkeypatch, is_terminal, goes_on=(1.0,) * 5)
    ended, gone_on = found.critic.weight[:, B + 1], found.critic.weight[:, B]
    if module.SCRIPT == "dreamer_v3":  # [V3-14] not even from the start itself
        assert ended.tolist() == [0] * H and gone_on.tolist() == [GAMMA**t for t in range(H)]
        assert not found.actor.weight[:, B + 1].any()
    elif module.SCRIPT == "dreamer_v2":  # [V2-7] fact 24
        assert ended.tolist() == [1] + [0] * (H - 1) and gone_on.tolist() == [1] + [GAMMA] * (H - 1)
        assert found.returns.result[0, B + 1] == 100  # its reward, and nothing after it
    else:  # in the authors' windows there is none
        assert ended.tolist() == [0] * (H - 1) and gone_on.tolist() == [1] * (H - 1)
        assert not found.actor.weight[:, B + 1].any()
    over = learn(module, monkeypatch, NEVER, goes_on=(0.0,) * 5)
    first = 1 if module.SCRIPT != "dreamer_v2" else 2  # V2: what is recorded of the start counts
    assert over.critic.weight[first - 1:first].all() and not over.critic.weight[first:].any()


# ---- The open-loop video -------------------------------------------------------------------------

@pytest.mark.parametrize("ends, length", [(None, 8), (5, 5), (7, 7), (3, 3), (2, 8)])
def test_the_video_stops_at_the_end_of_the_episode(module, ends, length):
    """3 frames of context. A dream across a reset would go on in a world that is no more.

    It gets the action that was chosen at each frame, from the last one of the context on.
    """
    torch.manual_seed(0)
    agent = tiny_agent(module, batch_length=8, batch_size=2)
    batch = tiny_batch(module, agent)
    batch.is_first[1:] = False
    batch.is_first[4, 1] = True  # of a sequence that is not shown
    if ends:
        batch.is_first[ends, 0] = True
    with recorded(agent.world_model.rssm, "img_step") as calls:
        video = module.open_loop(agent, batch, 3)
    assert list(video) == ["what happened", "reconstruction", "imagination"]
    assert {frames.shape for frames in video.values()} == {(length, 6)}
    assert (video["what happened"] == batch.vector[:length, 0].numpy()).all()
    assert len(calls) == length - 3
    for t, call in enumerate(calls, 2):
        assert torch.equal(call.action, batch.action[t])


def test_a_video_of_images_shows_them_as_they_are(module):
    """And its dream begins at the last frame that was seen: the frames before are reconstructed."""
    torch.manual_seed(0)
    agent = tiny_agent(module, tiny_spec(module, image=True), batch_length=6, batch_size=2,
                       depth=8)
    batch = tiny_batch(module, agent)
    batch.is_first[1:] = False
    video = module.open_loop(agent, batch, 3)
    assert {frames.dtype.name for frames in video.values()} == {"uint8"}
    assert (video["what happened"] == batch.image[:, 0].numpy()).all()
    same = (video["reconstruction"] == video["imagination"]).all((1, 2, 3))
    assert same.tolist() == [True] * 3 + [False] * 3
