"""Where the gradients go, and what the golden fixtures of tests/parity.py do not show of learning.

Parity proves the values of losses, optimisers and returns; they are not written out here again.
"Fact" means one of the authors' code: the tables of what was read and run.
"""

import copy
import importlib
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import SCRIPTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dreamer_v1 as d1
import dreamer_v2 as d2
import dreamer_v3 as d3
import dreamer_v3_2025 as d4
from tests.tiny import (grad_of, has_flag, tiny_agent, tiny_args, tiny_batch, tiny_spec,
                        update)

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def seeded():
    """The same draws in every run."""
    torch.manual_seed(0)


@pytest.fixture(params=SCRIPTS)
def module(request):
    """Each script in turn."""
    return importlib.import_module(request.param)


def reaches(output: torch.Tensor, net: nn.Module) -> bool:
    """Whether a gradient of `output` reaches any parameter of `net`."""
    return output.requires_grad and any(g.any() for g in grad_of(output, *net.parameters()))


# ---------------------------------------------------------------------- world-model loss
PRIOR = {"rssm.img_out.weight", "rssm.img_stats.weight", "rssm.img_stats.bias"}
POSTERIOR = {"rssm.obs_out.weight_a", "rssm.obs_out.weight_b", "rssm.obs_stats.weight",
             "rssm.obs_stats.bias"}


def losses_of(agent, module, **changes):
    """The loss terms on a batch, and the raw statistics of posterior and prior (T, B, ...)."""
    kept, rssm = [], agent.world_model.rssm
    shipped = rssm.latent
    rssm.latent = lambda raw: (kept.append(raw), shipped(raw))[1]
    args = replace(agent.args, **changes)
    losses, *_ = module.world_model_loss(
        agent.world_model, tiny_batch(module, agent), agent.zero_state(args.batch_size), args)
    rssm.latent = shipped
    return losses, kept[-2:]


def reached(agent, loss: torch.Tensor) -> set[str]:
    """Parameters of the world model that a gradient reaches."""
    named = dict(agent.world_model.named_parameters())
    return {name for name, grad in zip(named, grad_of(loss.mean(), *named.values())) if grad.any()}


def test_each_kl_term_of_v3_trains_its_own_side():
    """[V3-2] Facts 9 and 16."""
    agent = tiny_agent(d3, tiny_spec(d3, image=True))
    losses, raws = losses_of(agent, d3, free_bits=0.0, beta_dyn=1.0, beta_rep=1.0)
    close(losses["rep"], losses["dyn"])
    for term, side in (("rep", 0), ("dyn", 1)):
        grads = grad_of(losses[term], *raws)
        assert grads[side].any() and not grads[1 - side].any()
    assert PRIOR <= reached(agent, losses["dyn"])
    for term in losses.keys() - {"dyn"}:
        names = reached(agent, losses[term])
        assert not PRIOR & names and POSTERIOR <= names, term


def test_below_the_free_bits_of_v3_the_gradient_is_exactly_zero():
    agent = tiny_agent(d3)
    losses, _ = losses_of(agent, d3, free_bits=1e3)
    for term, beta in (("dyn", 0.6), ("rep", 0.2)):
        assert (losses[term] == beta * 1e3).all() and not reached(agent, losses[term])
    losses, raws = losses_of(agent, d3, free_bits=0.5)
    post, prior = map(agent.world_model.rssm.latent, raws)  # each state for itself
    below = post.kl(prior) < 0.5
    grad, = grad_of(losses["rep"], raws[0])
    assert 0 < below.sum() < below.numel() and torch.equal(~grad.any(-1), below)


@pytest.mark.parametrize("script", [d1, d2])
def test_free_nats_of_v1_and_v2_are_those_of_the_mean(script):
    """V1's fact 15, V2's fact 14."""
    agent = tiny_agent(script)
    with torch.random.fork_rng():
        mean = float(losses_of(agent, script, free_nats=0.0, kl_scale=1.0)[0]["kl"].detach())
    for free, is_free in ((0.99 * mean, False), (1.01 * mean, True)):
        with torch.random.fork_rng():
            losses, _ = losses_of(agent, script, free_nats=free, kl_scale=1.0)
        assert float(losses["kl"].detach()) == pytest.approx(max(mean, free))
        assert bool(reached(agent, losses["kl"])) != is_free


@pytest.mark.parametrize("how, expected", [
    ("none", [-3.0, 0.5, 2.0]), ("tanh", np.tanh([-3.0, 0.5, 2.0])), ("clip", [-1.0, 0.5, 1.0])])
@pytest.mark.parametrize("module", [d1, d2, d3])  # the revision learns them as they are
def test_rewards_that_are_learnt(module, how, expected):
    """No fixture has `clip`, and none of V3 squashes rewards."""
    scale = {"beta_pred": 1.0} if has_flag(module, "beta_pred") else {}
    agent = tiny_agent(module, clip_rewards=how, **scale)
    agent.world_model.reward = lambda feat: SimpleNamespace(log_prob=lambda value: -value)
    rewards = torch.tensor([-3.0, 0.5, 2.0]).expand(5, 3)
    batch = tiny_batch(module, agent, reward=rewards)
    losses, *_ = module.world_model_loss(agent.world_model, batch, agent.zero_state(3), agent.args)
    close(losses["reward"], torch.tensor(np.array(expected), dtype=torch.float32).expand(5, 3))


def test_vector_term_of_v3_ignores_what_is_near_enough():
    """[V3-1] Fact 11: squared errors below 1e-8 count as 0, in symlog space."""
    agent = tiny_agent(d3)
    batch = tiny_batch(d3, agent)
    target, error = d3.symlog(batch.vector), torch.tensor([0.0, 9e-5, -9e-5, 2e-4, -1.0, 3.0])
    predicted = (target + error).requires_grad_()
    agent.world_model.decoder.vector = lambda feat: predicted
    losses, *_ = d3.world_model_loss(agent.world_model, batch, agent.zero_state(3), agent.args)
    grad, = grad_of(losses["vector"], predicted)
    assert torch.equal(grad.any((0, 1)), error.abs() > 1e-4)


# ----------------------------------------------------------------- imagination, actor, critic
def imagined(module, agent):
    """A short imagination from random states: features, actions, actor outputs."""
    zero = agent.zero_state(6)
    found = module.imagine(agent.world_model, agent.actor, torch.randn_like(zero.deter).tanh(),
                           torch.randn_like(zero.stoch), agent.args.imag_horizon)
    return found if isinstance(found, tuple) else (found,)  # V1: the features alone


@pytest.mark.parametrize("script, discrete", [(d2, True), (d3, True), (d4, True), (d4, False)])
def test_imagination_for_reinforce_carries_no_gradient(script, discrete):
    """[V2-4] [R-9]"""
    agent = tiny_agent(script, tiny_spec(script, discrete))
    feat, action, raw = imagined(script, agent)
    assert not feat.requires_grad and not action.requires_grad
    assert reaches(raw, agent.actor) and not reaches(raw, agent.world_model)


@pytest.mark.parametrize("module", [d1, d2, d3])  # not in the revision
def test_continuous_actor_learns_through_the_dynamics(module):
    """But sees detached states: it must not learn to bend them."""
    agent, seen = tiny_agent(module, tiny_spec(module, discrete=False)), []
    agent.actor.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    feat = imagined(module, agent)[0]
    reward = agent.world_model.reward(feat[-1]).mean()
    assert reaches(feat[1], agent.actor) and reaches(reward, agent.actor)
    assert not reaches(feat[0], agent.actor)
    assert len(seen) == len(feat) - 1 and not any(state.requires_grad for state in seen)


def test_actor_of_v1_learns_through_its_actions_alone():
    """[V1-2] Facts 25 and 31: of discrete actions, too, straight through the samples."""
    for discrete in (True, False):
        agent = tiny_agent(d1, tiny_spec(d1, discrete))
        assert reaches(agent.world_model.reward(imagined(d1, agent)[0][1]).mean(), agent.actor)
        nn.init.zeros_(agent.world_model.rssm.img_in.weight_b)
        assert not reaches(imagined(d1, agent)[0], agent.actor)


@pytest.mark.parametrize("module", [d1, d2, d3])  # the revision has one loss
@pytest.mark.parametrize("discrete", [True, False])
def test_losses_of_actor_and_critic_leave_the_world_model_alone(module, discrete):
    """And that of the actor leaves the critic alone."""
    agent = tiny_agent(module, tiny_spec(module, discrete))
    agent.model_opt.apply = agent.critic_opt.apply = lambda grads: torch.zeros(())
    frozen = [*agent.world_model.parameters(), *agent.critic.parameters()]
    before = [param.clone() for param in (*frozen, *agent.actor.parameters())]
    agent.learn(tiny_batch(module, agent), agent.zero_state(3))
    after = [*frozen, *agent.actor.parameters()]
    assert all(torch.equal(*pair) for pair in zip(before[:len(frozen)], frozen))
    assert any(not torch.equal(*pair) for pair in zip(before[len(frozen):], after[len(frozen):]))
    assert all(param.grad is None for param in frozen)


@pytest.mark.parametrize("script, mix", [(d2, 0.0), (d2, 0.1), (d2, 1.0), (d3, 0.0), (d3, 1.0)])
@pytest.mark.parametrize("discrete", [True, False])
def test_what_the_loss_of_the_actor_reaches(script, mix, discrete):
    """[V2-4] [V3-5] REINFORCE reaches the policy alone, the dynamics' gradient returns and, in V3,
    the baseline. For both kinds of actions: the laptop preset of V3 has REINFORCE everywhere."""
    agent = tiny_agent(script, tiny_spec(script, discrete))
    raw = imagined(script, agent)[2].detach().requires_grad_()
    policy = agent.actor.policy(raw)
    ret, baseline, weight = torch.rand(3, *raw.shape[:2]).requires_grad_()
    scale = [torch.tensor(2.0)] if script is d3 else []
    loss, entropy = script.actor_loss(policy, policy.sample().detach(), ret, baseline, *scale,
                                      weight.detach(), mix, agent.args)
    assert entropy.shape == ret.shape
    by_raw, by_ret, by_baseline = (grad.any() for grad in grad_of(loss, raw, ret, baseline))
    assert by_raw and by_ret == (mix > 0) and by_baseline == (script is d3 and mix > 0)


@pytest.mark.parametrize("discrete, choice, expected", [
    (True, "auto", 0.0), (False, "auto", 1.0), (True, "dynamics", 1.0), (False, "reinforce", 0.0)])
def test_which_gradient_the_actor_gets(discrete, choice, expected):
    for script in (d2, d3):
        agent = tiny_agent(script, tiny_spec(script, discrete), actor_grad=choice)
        assert agent.actor.dynamics == expected
        agent.train_step(tiny_batch(script, agent), agent.zero_state(3))
    agent = tiny_agent(d2, tiny_spec(d2, discrete), actor_grad="both", actor_grad_mix=0.3)
    assert agent.actor.dynamics == 0.3


def test_what_v3_makes_of_a_doubtful_end():
    """An episode that goes on with probability 0.6: --cont-mean counts it by 0.6, the mode as 1."""
    def update(doubt, **flags):
        torch.manual_seed(1)
        agent = tiny_agent(d3, critic_lr=1e-30, model_lr=1e-30, **flags)
        agent.world_model.cont_head.out.weight.data.zero_()
        agent.world_model.cont_head.out.bias.data.fill_(math.log(doubt / (1 - doubt)))
        return agent.learn(tiny_batch(d3, agent), agent.zero_state(3))

    def same(one, other):
        # Rounding gives 1e-6, another meaning of the flag more than 1e-3 in one of them.
        return all(torch.allclose(one[key], other[key], rtol=1e-4, atol=1e-5)
                   for key in ("imagined/return", "loss/critic", "loss/actor"))

    certain = 0.9999999
    assert same(update(0.6, gamma=0.5, cont_mean=True), update(certain, gamma=0.3, cont_mean=True))
    assert same(update(0.6, gamma=0.5), update(certain, gamma=0.5, cont_mean=True))
    assert not same(update(0.6, gamma=0.5), update(0.6, gamma=0.5, cont_mean=True))
    assert not same(update(0.4, gamma=0.5), update(0.6, gamma=0.5))


def test_optimizer_goes_on_from_its_state(module):
    def optimizer_of(param):
        params = nn.ParameterList([param])
        if module is d4:
            return module.Optimizer(params, tiny_args(d4, warmup=9))
        optimizer = module.Optimizer(params, 0.1, 1e-5, 1.0)
        if module is d2:
            optimizer.decay = 0.01
        return optimizer

    def steps(optimizer, param, number):
        for i in range(number):
            optimizer.apply(optimizer.grads((param * (i + 1)).square().sum()))

    ours = nn.Parameter(torch.arange(1.0, 4.0))
    optimizer = optimizer_of(ours)
    steps(optimizer, ours, 3)
    theirs = nn.Parameter(ours.detach().clone())
    twin = optimizer_of(theirs)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, ours, 2), steps(twin, theirs, 2)
    assert torch.equal(ours, theirs) and ours.grad is None


# -------------------------------------------------------------------------------- the agent
SMALL = st.integers(1, 3)


@settings(max_examples=12, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries({
    "deter": st.integers(1, 9), "hidden": SMALL, "units": SMALL, "layers": SMALL, "depth": SMALL,
    "stoch": SMALL, "classes": st.integers(2, 4), "bins": st.integers(2, 5), "mlp_units": SMALL,
    "mlp_layers": SMALL, "reward_layers": SMALL, "actor_layers": SMALL, "batch_size": SMALL,
    "batch_length": st.integers(2, 4), "imag_horizon": st.integers(2, 4)}),
    st.booleans(), st.sampled_from(["image", "vector", "both"]), SMALL)
def test_an_update_at_any_size(module, sizes, discrete, parts, actions):
    """Down to one of everything; with every loss finite, every part learns."""
    known = {name: value for name, value in sizes.items() if has_flag(module, name)}
    spec = tiny_spec(module, discrete, parts != "vector", 0 if parts == "image" else 2)
    if module is d4:
        known |= {"blocks": 1, "bins": known["bins"] // 2 * 2 + 1}
    agent = tiny_agent(module, replace(spec, action_dim=actions), **known)
    metrics = update(module, agent, tiny_batch(module, agent))
    assert all(value.isfinite() for value in metrics.values()), metrics
    parts = ["all"] if module is d4 else ["model", "critic"]
    assert all(metrics[f"grad_norm/{part}"] > 0 for part in parts)


def test_random_actions_are_uniform():
    draws = d3.random_actions(torch.zeros(20_000, 4), discrete=True)
    assert set(draws.unique().tolist()) == {0, 1} and (draws.sum(-1) == 1).all()
    np.testing.assert_allclose(draws.mean(0), 0.25, atol=0.02)
    draws = d3.random_actions(torch.zeros(20_000, 2), discrete=False)
    assert float(draws.abs().max()) <= 1 and float(draws.var()) == pytest.approx(1 / 3, abs=0.02)


def test_updates_due():
    """The first waits for --learning-starts windows, or there would be a burst of them."""
    args = tiny_args(d3, num_envs=8, batch_size=4, train_ratio=10.0, pretrain=7,
                     learning_starts=20)
    for world in (1, 2):
        start = 20 + 8 * world * 4
        due = [d3.updates_due(args, step, 0, world) for step in
               (start - 1, start, start + 2, start + 20)]
        assert due == [0, 7, 8, 17]
        assert d3.updates_due(args, start + 20, 16, world) == 1
    at_once = replace(args, learning_starts=0)  # one whole window it takes in any case
    assert [d3.updates_due(at_once, step, 0) for step in (32, 33)] == [0, 7]
    none_at_once = replace(args, pretrain=0)
    assert [d3.updates_due(none_at_once, step, 0) for step in (52, 54)] == [0, 1]


def test_agc_of_zero_clips_nothing():
    """As in the authors' code; 0 / 0 once made every weight without a gradient NaN."""
    param = torch.nn.Parameter(torch.ones(3))
    args = d4.Args(size="XXS", agc=0.0, warmup=0)
    optimizer = d4.Optimizer(torch.nn.ParameterList([param]), args)
    for size in (0.0, 1e12):
        optimizer.apply((torch.full((3,), size),))
    torch.testing.assert_close(optimizer.nu[0], torch.full((3,), (1 - args.beta2) * 1e24))
    assert (param < 1).all()
