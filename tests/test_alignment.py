"""Which action belongs to which observation and reward, from the environment to the losses.

The real `main` runs, in this process, on an environment whose observations say which action led to
them and when (tests/alignment_envs.py). So every replayed row can be checked against the next one.
DreamerV1 and V2 store an action with the observation that it led to; V3, chosen at it. [V3-10]
"""

import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import SCRIPTS

from tests.alignment_envs import LENGTHS

TINY = """--size XXS --deter 8 --hidden 8 --units 8 --stoch 2 --classes 2 --layers 1 --depth 2 --horizon 3
    --batch-size 3 --batch-length 5 --bins 5 --total-timesteps 48 --learning-starts 24 --train-ratio 15
    --image-size 8 --threads 1 --checkpoint-every 1000 --video-every 0 --log-every 1000 --no-cuda""".split()
CHOSEN_AT = [script for script in SCRIPTS if script >= "dreamer_v3"]  # those with [V3-10]


class Calls(list):
    """Keyword names and values of every call of a function, and its results."""


@contextmanager
def recorded(owner, name: str):
    """Let a function or method do its work, and note the arguments of its calls."""
    original, calls = getattr(owner, name), Calls()

    def wrapper(*args, **kwargs):
        copies = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
        calls.append((copies, kwargs))
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


def run(module, tmp_path, monkeypatch, env: str, *flags) -> dict[str, np.ndarray]:
    """Train for a few steps; the rows of the replay buffer, (environments, rows, ...) each."""
    argv = [module.SCRIPT, "--env-id", f"tests.alignment_envs:{env}-v0", "--runs-dir", str(tmp_path), *TINY]
    monkeypatch.setattr(sys, "argv", [*argv, *map(str, flags)])
    numpy_state = np.random.get_state()
    module.main()
    np.random.set_state(numpy_state)
    replay, = tmp_path.glob("*/replay")
    rings = {path.stem: np.load(path) for path in replay.glob("*.npy")}
    complete = rings.pop("rows")[1]
    return {name: ring[:, :complete] for name, ring in rings.items()}


@pytest.fixture(scope="module", params=CHOSEN_AT)
def module(request):
    return __import__(request.param)


@pytest.mark.parametrize("env, num_envs", [("Recall", 1), ("RecallTruncated", 1), ("RecallBox", 1), ("Recall", 2)])
def test_rows_of_the_replay_buffer(module, tmp_path, monkeypatch, env, num_envs):
    rows = run(module, tmp_path, monkeypatch, env, "--num-envs", num_envs)
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


def test_a_limit_of_ours_is_not_a_terminal(module, tmp_path, monkeypatch):
    rows = run(module, tmp_path, monkeypatch, "Recall", "--max-episode-steps", 2)
    episode, step = rows["vector"][0, :, 0], rows["vector"][0, :, 1]
    lengths = np.minimum(LENGTHS, 2)[episode.astype(int) % len(LENGTHS)]
    own_end = step == np.array(LENGTHS)[episode.astype(int) % len(LENGTHS)]
    assert step.max() == 2 and (own_end & (step == 2)).any() and (~own_end & (step == 2)).any()
    assert (rows["is_terminal"][0] == own_end).all()
    assert not rows["action"][0, step == lengths].any()


@pytest.mark.parametrize("num_envs", [1, 2])
def test_the_agent_acts_on_the_action_that_led_here(module, tmp_path, monkeypatch, num_envs):
    """Also while actions are random: the recurrent state is kept up to date with what was done."""
    with recorded(module.Agent, "act") as calls:
        run(module, tmp_path, monkeypatch, "Recall", "--num-envs", num_envs)
    assert len(calls) == 48 // num_envs
    seen = 0
    for (_, step, carry, *_), _ in calls:
        middle = ~step.is_first
        assert (carry.action.numpy().argmax(-1)[middle] == step.vector[middle, 3]).all()
        assert (carry.action.numpy()[middle].sum(-1) == 1).all()
        seen += middle.sum()
    assert seen > 25


def test_the_model_gets_the_action_before_each_observation(module, tmp_path, monkeypatch):
    with (recorded(module.RSSM, "observe") as calls, recorded(module.Agent, "train_step") as steps):
        run(module, tmp_path, monkeypatch, "Recall", "--num-envs", 1)
    replayed = [args for args, _ in calls if len(args[1]) > 1]
    assert len(replayed) == len(steps) > 10
    for (_, embed, prev_action, is_first, carry), ((_, batch, _), _) in zip(replayed, steps):
        assert embed.shape[:2] == prev_action.shape[:2] == (5, 3)
        assert torch.equal(prev_action[1:], batch.action[:-1]) and torch.equal(prev_action[0], carry.action)
        assert torch.equal(is_first, batch.is_first) and is_first[0].all()
        middle = ~is_first
        assert torch.equal(prev_action.argmax(-1)[middle].float(), batch.vector[..., 3][middle])
        assert (batch.vector[..., 1][middle] > 0).all()


def tiny_agent(module, monkeypatch, **changes):
    spec = module.EnvSpec(None, 4, 3, True)
    args = module.Args(size="XXS", deter=8, hidden=8, units=8, stoch=2, classes=2, layers=1, depth=2, horizon=3,
                       batch_size=3, batch_length=5, bins=5, cuda=False, **changes)
    torch.manual_seed(0)
    return module.Agent(args, spec, torch.device("cpu"))


def tiny_batch(module, **changes):
    T, B, rng = 5, 3, np.random.default_rng(0)
    fields = dict(image=None, vector=torch.from_numpy(rng.normal(size=(T, B, 4)).astype(np.float32)),
                  action=torch.eye(3)[torch.from_numpy(rng.integers(3, size=(T, B)))],
                  reward=torch.zeros(T, B), is_first=torch.zeros(T, B, dtype=torch.bool),
                  is_terminal=torch.zeros(T, B, dtype=torch.bool))
    fields["is_first"][0] = True
    return module.Batch(**fields | changes)


def test_nothing_is_learnt_from_imagination_behind_an_end(module, monkeypatch):
    """[V3-11] A start at a recorded terminal has weight 0, and only such a start; row t B + b is (t, b)."""
    agent = tiny_agent(module, monkeypatch)
    is_terminal = torch.zeros(5, 3, dtype=torch.bool)
    is_terminal[1, 2] = is_terminal[4, 0] = True
    for forever in (True, False):  # whether the model believes that episodes go on
        torch.nn.init.constant_(agent.world_model.continue_head.out.bias, 100.0 if forever else -100.0)
        with recorded(module, "actor_loss") as actor, recorded(module, "critic_loss") as critic:
            agent.train_step(tiny_batch(module, is_terminal=is_terminal), agent.blank_state(3))
        weight, gamma = actor[0][0][4], agent.args.gamma
        assert torch.equal(weight, critic[0][0][3]) and weight.shape == (3, 15)
        alive = (~is_terminal).flatten().float()
        goes_on = torch.tensor([1.0, gamma, gamma**2]) if forever else torch.tensor([1.0, 0.0, 0.0])
        torch.testing.assert_close(weight, goes_on[:, None] * alive)


def test_a_terminal_start_is_worth_nothing_more(module, monkeypatch):
    """Its gradients do not depend on what lies behind: with all starts terminal, there are none."""
    agent = tiny_agent(module, monkeypatch)
    agent.train_step(tiny_batch(module), agent.blank_state(3))  # away from the zero initialisation
    before = [p.clone() for p in (*agent.actor.parameters(), *agent.critic.parameters())]
    everywhere = torch.ones(5, 3, dtype=torch.bool)
    metrics = agent.train_step(tiny_batch(module, is_terminal=everywhere), agent.blank_state(3))
    assert metrics["grad_norm/actor"] == 0 == metrics["grad_norm/critic"]
    assert len(before) > 6


def test_a_sequence_does_not_see_what_came_before_its_start(module, monkeypatch):
    """is_first in the middle: state and action of the steps before do not matter, those after do."""
    agent = tiny_agent(module, monkeypatch)
    rssm, generator = agent.world_model.rssm, torch.Generator().manual_seed(0)
    embed = torch.randn(5, 1, agent.world_model.encoder.embed_dim, generator=generator)
    action = torch.randn(5, 1, 3, generator=generator)
    is_first = torch.tensor([True, False, True, False, False])[:, None]

    def states(embed, action):
        torch.manual_seed(1)
        return rssm.observe(embed, action, is_first, agent.blank_state(1))[0]

    base, changed = states(embed, action), action.clone()
    changed[:3] += 1  # action[2] led to the first step of the second episode
    other = states(torch.cat([embed[:2] + 1, embed[2:]]), changed)
    assert not torch.allclose(base[1], other[1])
    torch.testing.assert_close(base[2:], other[2:])
    changed[3] += 1
    assert not torch.allclose(base[3], states(embed, changed)[3])
