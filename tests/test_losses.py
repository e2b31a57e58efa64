"""What the scripts learn from: losses and where their gradients go, optimisers, the schedule.

As in test_maths.py, "fact" means one of the authors' code: the tables of what was read and run.
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
import torch.nn.functional as F
from conftest import SCRIPTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dreamer_v1 as d1
import dreamer_v2 as d2
import dreamer_v3 as d3
from tests.tiny import (as_torch, grad_of, has_flag, tiny_agent, tiny_args, tiny_batch,
                        tiny_spec)

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
    losses, *rest = module.world_model_loss(
        agent.world_model, tiny_batch(module, agent), agent.zero_state(args.batch_size), args)
    rssm.latent = shipped
    return losses, kept[-2:], rest


def reached(agent, loss: torch.Tensor) -> set[str]:
    """Parameters of the world model that a gradient reaches."""
    named = dict(agent.world_model.named_parameters())
    return {name for name, grad in zip(named, grad_of(loss.mean(), *named.values())) if grad.any()}


def test_kl_terms_of_v3():
    """[V3-2] Facts 9 and 16: summed over latents, equal values, each trains its own side."""
    agent = tiny_agent(d3, tiny_spec(d3, image=True))
    losses, raws, _ = losses_of(agent, d3, free_bits=0.0, beta_dyn=1.0, beta_rep=1.0)
    post, prior = map(agent.world_model.rssm.latent, raws)
    expected = torch.distributions.kl_divergence(as_torch(post), as_torch(prior))
    for term, side in (("rep", 0), ("dyn", 1)):
        close(losses[term], expected, atol=1e-5, rtol=1e-5)
        grads = grad_of(losses[term], *raws)
        assert grads[side].any() and not grads[1 - side].any()
    assert PRIOR <= reached(agent, losses["dyn"])
    for term in losses.keys() - {"dyn"}:
        names = reached(agent, losses[term])
        assert not PRIOR & names and POSTERIOR <= names, term


def test_below_the_free_bits_of_v3_the_gradient_is_exactly_zero():
    agent = tiny_agent(d3)
    losses, *_ = losses_of(agent, d3, free_bits=1e3)
    for term, beta in (("dyn", 0.5), ("rep", 0.1)):
        assert (losses[term] == beta * 1e3).all() and not reached(agent, losses[term])
    losses, raws, _ = losses_of(agent, d3, free_bits=0.5)
    post, prior = map(agent.world_model.rssm.latent, raws)  # each state for itself
    below = post.kl(prior) < 0.5
    grad, = grad_of(losses["rep"], raws[0])
    assert 0 < below.sum() < below.numel() and torch.equal(~grad.any(-1), below)


@pytest.mark.parametrize("balance", [0.0, 0.5, 0.8, None])
def test_kl_of_v1_and_v2(balance):
    """[V2-2] Facts 13 to 15; V1 has no balance: each side gets the whole gradient."""
    script = d1 if balance is None else d2
    agent = tiny_agent(script)
    changes = {} if balance is None else {"kl_balance": balance}
    losses, raws, _ = losses_of(agent, script, free_nats=0.0, kl_scale=0.1, **changes)
    kl = agent.world_model.rssm.latent(raws[0]).kl(agent.world_model.rssm.latent(raws[1])).mean()
    close(losses["kl"], 0.1 * kl)
    by_post, by_prior = grad_of(kl, *raws)
    shares = (1, 1) if balance is None else (1 - balance, balance)
    close(grad_of(losses["kl"], *raws), [0.1 * shares[0] * by_post, 0.1 * shares[1] * by_prior])


@pytest.mark.parametrize("script", [d1, d2])
def test_free_nats_of_v1_and_v2_are_those_of_the_mean(script):
    """V1's fact 15, V2's fact 14."""
    agent = tiny_agent(script)
    with torch.random.fork_rng():
        mean = float(losses_of(agent, script, free_nats=0.0, kl_scale=1.0)[0]["kl"].detach())
    for free, is_free in ((0.99 * mean, False), (1.01 * mean, True)):
        with torch.random.fork_rng():
            losses, *_ = losses_of(agent, script, free_nats=free, kl_scale=1.0)
        assert float(losses["kl"].detach()) == pytest.approx(max(mean, free))
        assert bool(reached(agent, losses["kl"])) != is_free


@pytest.mark.parametrize("script", [d1, d2])
def test_other_loss_terms_of_v1_and_v2(script):
    """V1's facts 10, 16, 17; V2's 9, 16, 18: constants are kept, the flag's target is gamma."""
    agent = tiny_agent(script, tiny_spec(script, image=True), pcont=True, pcont_scale=5.0,
                       gamma=0.9, clip_rewards="tanh")
    model, constant = agent.world_model, 0.5 * math.log(2 * math.pi)
    for head, bias in ((model.cont_head, 0.3), (model.reward_head, 0.2)):
        nn.init.zeros_(head.out.weight), nn.init.constant_(head.out.bias, bias)
    batch = tiny_batch(script, agent)
    losses, deter, stoch, _ = script.world_model_loss(model, batch, agent.zero_state(3), agent.args)
    logit, target = torch.full((5, 3), 0.3), 0.9 * (~batch.is_terminal).float()
    cross_entropy = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
    close(losses["cont"], 5 * cross_entropy)
    close(losses["reward"], 0.5 * (0.2 - batch.reward.tanh()).square() + constant)
    feat = torch.cat([deter, stoch], -1)
    error = model.decoder.image(feat) - script.centre(batch.image)
    close(losses["image"], 0.5 * error.square().sum((-3, -2, -1)) + constant * 64 * 64 * 3)
    error = model.decoder.vector(feat) - batch.vector
    close(losses["vector"], 0.5 * error.square().sum(-1) + constant * 6)

    without = tiny_agent(script, pcont=False)
    assert "cont" not in losses_of(without, script)[0]
    assert not hasattr(without.world_model, "cont_head")


@pytest.mark.parametrize("how, expected", [
    ("none", [-3.0, 0.5, 2.0]), ("tanh", np.tanh([-3.0, 0.5, 2.0])), ("clip", [-1.0, 0.5, 1.0])])
def test_rewards_that_are_learnt(module, how, expected):
    agent = tiny_agent(module, clip_rewards=how)
    agent.world_model.reward = lambda feat: SimpleNamespace(log_prob=lambda value: -value)
    rewards = torch.tensor([-3.0, 0.5, 2.0]).expand(5, 3)
    batch = tiny_batch(module, agent, reward=rewards)
    losses, *_ = module.world_model_loss(agent.world_model, batch, agent.zero_state(3), agent.args)
    close(losses["reward"], torch.tensor(np.array(expected), dtype=torch.float32).expand(5, 3))


def test_vector_term_of_v3_ignores_what_is_near_enough():
    """[V3-1] Fact 11: squared errors below 1e-8 count as 0, in symlog space."""
    agent = tiny_agent(d3)
    batch = tiny_batch(d3, agent)
    target = d3.symlog(batch.vector)
    error = torch.tensor([0.0, 9e-5, -9e-5, 2e-4, -1.0, 3.0])
    agent.world_model.decoder.vector = lambda feat: target + error
    losses, *_ = d3.world_model_loss(agent.world_model, batch, agent.zero_state(3), agent.args)
    close(losses["vector"], torch.full((5, 3), 10.0))


# ----------------------------------------------------------------- imagination, actor, critic
def imagined(module, agent):
    """A short imagination from random states: features, actions, actor outputs."""
    zero = agent.zero_state(6)
    found = module.imagine(agent.world_model, agent.actor, torch.randn_like(zero.deter).tanh(),
                           torch.randn_like(zero.stoch), agent.args.imag_horizon)
    return found if isinstance(found, tuple) else (found,)  # V1: the features alone


@pytest.mark.parametrize("script", [d2, d3])
def test_discrete_imagination_carries_no_gradient(script):
    agent = tiny_agent(script)
    feat, action, raw = imagined(script, agent)
    assert not feat.requires_grad and not action.requires_grad
    assert reaches(raw, agent.actor) and not reaches(raw, agent.world_model)


def test_continuous_actor_learns_through_the_dynamics(module):
    """But sees detached states: it must not learn to bend them."""
    agent, seen = tiny_agent(module, tiny_spec(module, discrete=False)), []
    agent.actor.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    feat = imagined(module, agent)[0]
    reward = agent.world_model.reward(feat[-1]).mean()
    assert reaches(feat[1], agent.actor) and reaches(reward, agent.actor)
    assert not reaches(feat[0], agent.actor)
    assert len(seen) == len(feat) - 1 and not any(state.requires_grad for state in seen)


def test_discrete_actor_of_v1_learns_through_the_dynamics():
    """[V1-2] Fact 31: straight through its samples."""
    agent = tiny_agent(d1)
    feat, = imagined(d1, agent)
    assert reaches(agent.world_model.reward(feat[1]).mean(), agent.actor)


def test_gradient_reaches_the_actor_of_v1_through_actions_alone():
    """Fact 25: without a dependence of the state on the action there is none."""
    agent = tiny_agent(d1, tiny_spec(d1, discrete=False))
    nn.init.zeros_(agent.world_model.rssm.img_in.weight_b)
    feat, = imagined(d1, agent)
    assert not reaches(feat, agent.actor)


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


def terms_of_the_actor(module, agent):
    """Arguments of `actor_loss` that require gradients, random numbers but for the policy."""
    _, action, raw = imagined(module, agent)
    raw = raw.detach().requires_grad_()
    action = action.detach().clone()
    if not agent.spec.discrete:
        action = (0.9 * action).requires_grad_()
    lead = raw.shape[:2]
    ret, baseline = torch.randn(2, *lead, requires_grad=True)
    return raw, agent.actor.policy(raw), action, ret, baseline, torch.rand(lead)


def test_actor_loss_of_v3():
    """[V3-5] Facts 23 to 26, both kinds."""
    scale, args = torch.tensor(2.0), tiny_args(d3, actor_entropy=0.1)
    for discrete in (True, False):
        agent = tiny_agent(d3, tiny_spec(d3, discrete))
        raw, policy, action, ret, baseline, weight = terms_of_the_actor(d3, agent)
        loss, entropy = d3.actor_loss(policy, action, ret, baseline, scale, weight,
                                      float(not discrete), args)
        close(entropy, policy.entropy())
        advantage = (ret - baseline) / 2
        if discrete:
            advantage = policy.log_prob(action) * advantage.detach()
        expected = -(weight * (advantage + 0.1 * policy.entropy())).mean()
        close(loss, expected)
        inputs = (raw, ret, baseline)
        close(grad_of(loss, *inputs), grad_of(expected, *inputs))
        assert all(g.any() for g in grad_of(loss, *inputs)[1:]) != discrete


def test_what_v3_makes_of_a_doubtful_end():
    """An episode that goes on with probability 0.6: --cont-mean counts it by 0.6, the mode as 1."""
    def update(doubt, **flags):
        torch.manual_seed(1)
        agent = tiny_agent(d3, critic_lr=1e-30, model_lr=1e-30, **flags)
        agent.world_model.cont_head.out.weight.data.zero_()
        agent.world_model.cont_head.out.bias.data.fill_(math.log(doubt / (1 - doubt)))
        return agent.learn(tiny_batch(d3, agent), agent.zero_state(3))

    def same(one, other):
        return all(torch.allclose(one[key], other[key], rtol=1e-5)
                   for key in ("imagined/return", "loss/critic", "loss/actor"))

    assert same(update(0.6, gamma=0.5, cont_mean=True), update(0.9999999, gamma=0.3, cont_mean=True))
    assert same(update(0.6, gamma=0.5), update(0.9999999, gamma=0.5, cont_mean=True))
    assert same(update(0.6, gamma=0.5), update(0.6, gamma=0.5, cont_mean=False))
    assert not same(update(0.6, gamma=0.5), update(0.6, gamma=0.5, cont_mean=True))
    assert not same(update(0.4, gamma=0.5), update(0.6, gamma=0.5))


@pytest.mark.parametrize("mix", [0.0, 0.1, 1.0])
def test_actor_loss_of_v2(mix):
    """[V2-4] [V2-5] Facts 29 and 31."""
    agent, args = tiny_agent(d2, tiny_spec(d2, discrete=False)), tiny_args(d2, actor_entropy=0.1)
    raw, policy, action, ret, baseline, weight = terms_of_the_actor(d2, agent)
    loss, _ = d2.actor_loss(policy, action, ret, baseline, weight, mix, args)
    chosen = action if mix else action.detach()
    reinforce = policy.log_prob(chosen) * (ret - baseline).detach()
    objective = mix * ret + (1 - mix) * reinforce + 0.1 * policy.entropy()
    expected = -(weight * objective).mean()
    close(loss, expected)
    inputs = (raw, ret, baseline, action)
    close(grad_of(loss, *inputs), grad_of(expected, *inputs))
    _, by_ret, by_baseline, by_action = grad_of(loss, *inputs)
    assert by_ret.any() == (mix > 0) and not by_baseline.any()
    assert by_action.any() == (0 < mix < 1)


@pytest.mark.parametrize("discrete, choice, expected", [
    (True, "auto", 0.0), (False, "auto", 1.0), (True, "dynamics", 1.0), (False, "reinforce", 0.0)])
def test_which_gradient_the_actor_gets(discrete, choice, expected):
    for script in (d2, d3):
        agent = tiny_agent(script, tiny_spec(script, discrete), actor_grad=choice)
        assert agent.actor.dynamics == expected
        agent.train_step(tiny_batch(script, agent), agent.zero_state(3))
    assert tiny_agent(d2, tiny_spec(d2, discrete), actor_grad="both").actor.dynamics == 0.1


def test_actor_loss_of_v1():
    """Fact 24: no entropy, no baseline."""
    ret, weight = torch.randn(2, 4, 6).requires_grad_()
    close(d1.actor_loss(ret, weight), -(weight * ret).mean())


def test_critic_losses():
    """V3's facts 28 and 29, V2's fact 27, V1's fact 26."""
    ret, slow = torch.randn(2, 4, 6, requires_grad=True)
    weight, args = torch.rand(4, 6), tiny_args(d3, critic_ema_regularizer=0.5)
    two_hot = d3.TwoHot(torch.randn(4, 6, 21))
    expected = -(weight * (two_hot.log_prob(ret) + 0.5 * two_hot.log_prob(slow))).mean()
    close(d3.critic_loss(two_hot, ret, slow.detach(), weight, args), expected)
    value = torch.randn(4, 6, requires_grad=True)
    expected = (weight * (0.5 * (value - ret).square() + 0.5 * math.log(2 * math.pi))).mean()
    for script in (d1, d2):
        loss = script.critic_loss(script.Normal(value), ret, weight)
        close(loss, expected)
        assert not grad_of(loss, ret)[0].any() and grad_of(loss, value)[0].any()


def follow(module, updates: int, **flags):
    """Slow critic before and after an update, and the critic after it."""
    agent = tiny_agent(module, **flags, critic_lr=0.05)
    for _ in range(updates):
        before = [param.clone() for param in agent.slow_critic.parameters()]
        agent.train_step(tiny_batch(module, agent), agent.zero_state(3))
        yield before, [*agent.slow_critic.parameters()], [*agent.critic.parameters()]


def test_slow_critic_of_v3_is_a_copy_at_first_and_an_average_afterwards():
    """Fact 29."""
    for update, (before, slow, fast) in enumerate(follow(d3, 3)):
        rate = 0.02 if update else 1.0
        close([p.detach() for p in slow], [b.lerp(f, rate).detach() for b, f in zip(before, fast)])


def test_slow_critic_of_v2_is_renewed_every_so_often():
    """[V2-6] Fact 32, with 3 in place of 100: after the updates 1, 4, 7."""
    for update, (before, slow, fast) in enumerate(follow(d2, 5, slow_every=3)):
        expected = before if update % 3 else fast
        close([p.detach() for p in slow], [p.detach() for p in expected])
    for update, (before, slow, fast) in enumerate(follow(d2, 3, slow_every=2, slow_fraction=0.25)):
        rate = (1.0, 0.0, 0.25)[update]
        close([p.detach() for p in slow], [b.lerp(f, rate).detach() for b, f in zip(before, fast)])


def test_return_scale_of_v3():
    """[V3-5] Fact 23."""
    scale = d3.ReturnScale(tiny_args(d3, return_norm_decay=0.0))
    assert float(scale.update(torch.linspace(0, 0.5, 101))) == 1.0  # at least that
    assert float(scale.update(torch.linspace(0, 100, 101))) == pytest.approx(90, abs=1e-4)
    quartiles = tiny_args(d3, return_norm_decay=0.0, return_norm_low=25.0, return_norm_high=75.0)
    assert float(d3.ReturnScale(quartiles).update(torch.linspace(0, 100, 101))) == pytest.approx(50)
    slow, ret = d3.ReturnScale(tiny_args(d3)), torch.linspace(-50, 50, 1001)
    for update in range(1, 5):  # from 0, without bias correction
        divisor = slow.update(ret.requires_grad_())
        assert float(divisor) == pytest.approx(max(1.0, 90 * (1 - 0.99**update)), abs=1e-3)
    assert not divisor.requires_grad


# --------------------------------------------------------------------------------- optimiser
def optimizer_of(module, params: list, lr: float, eps: float, clip: float):
    """An optimiser; that of V2 decays weights by 1%."""
    optimizer = module.Optimizer(torch.nn.ParameterList(params), lr, eps, clip)
    if module is d2:
        optimizer.decay = 0.01
    return optimizer


def textbook(module, params, gradients, lr: float, eps: float, clip: float) -> list[np.ndarray]:
    """Adam in float64: V3 as in the paper; before, as TensorFlow has it, epsilon uncorrected."""
    params, decay = [p.astype(np.float64) for p in params], 0.01 if module is d2 else 0.0
    mean, square = ([np.zeros_like(p) for p in params] for _ in range(2))
    for step, grads in enumerate(gradients, 1):
        norm = math.sqrt(sum((g**2).sum() for g in grads))
        for i, grad in enumerate(g * min(1.0, clip / norm) for g in grads):
            mean[i] = 0.9 * mean[i] + 0.1 * grad
            square[i] = 0.999 * square[i] + 0.001 * grad**2
            if module is d3:
                corrected = np.sqrt(square[i] / (1 - 0.999**step)) + eps
                params[i] -= lr * mean[i] / (1 - 0.9**step) / corrected
            else:
                rate = lr * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
                params[i] = (1 - decay) * params[i] - rate * mean[i] / (np.sqrt(square[i]) + eps)
    return params


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_optimizer_is_adam_on_clipped_gradients(module, eps):
    rng = np.random.default_rng(0)
    shapes = [(3,), (2, 2), ()]
    start = [np.array(rng.normal(size=shape), np.float32) for shape in shapes]
    gradients = [[rng.normal(size=shape) * size for shape in shapes] for size in (0.1, 30, 1, 3)]
    params = [nn.Parameter(torch.tensor(x)) for x in start]
    optimizer = optimizer_of(module, params, 0.1, eps, 2.0)
    for grads in gradients:
        loss = sum((p * torch.tensor(g)).sum() for p, g in zip(params, grads))
        norm = optimizer.apply(optimizer.grads(loss.float()))
        assert float(norm) == pytest.approx(math.sqrt(sum((g**2).sum() for g in grads)), rel=1e-5)
    for param, expected in zip(params, textbook(module, start, gradients, 0.1, eps, 2.0)):
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert all(param.grad is None for param in params)


def test_every_weight_of_v2_decays():
    """[V2-9] Fact 41."""
    agent = tiny_agent(d2, weight_decay=0.25)
    assert [optimizer.decay for optimizer in agent.optimizers().values()] == [0.25] * 3


def test_optimizer_goes_on_from_its_state(module):
    def steps(optimizer, params, number):
        for i in range(number):
            optimizer.apply(optimizer.grads((params[0] * (i + 1)).square().sum()))

    ours = [nn.Parameter(torch.arange(1.0, 4.0))]
    optimizer = optimizer_of(module, ours, 0.1, 1e-5, 1.0)
    steps(optimizer, ours, 3)
    theirs = [nn.Parameter(ours[0].detach().clone())]
    twin = optimizer_of(module, theirs, 0.1, 1e-5, 1.0)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, ours, 2), steps(twin, theirs, 2)
    assert torch.equal(ours[0], theirs[0])


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
    agent = tiny_agent(module, replace(spec, action_dim=actions), **known)
    rows = agent.args.batch_size
    metrics = agent.train_step(tiny_batch(module, agent), agent.zero_state(rows))
    assert all(value.isfinite() for value in metrics.values()), metrics
    assert metrics["grad_norm/model"] > 0 < metrics["grad_norm/critic"]


@pytest.mark.parametrize("first", [[False, False], [True, False], [True, True]])
def test_acting_without_a_first_step_needs_no_initial_state(module, first):
    agent = tiny_agent(module)
    for name, param in agent.world_model.rssm.named_parameters():
        if name == "initial":
            param.data.normal_()
    none, rows = np.zeros(2, bool), np.zeros(2, np.float32)
    step = d3.EnvStep(None, np.ones((2, 6), np.float32), rows, np.array(first), none, none, rows,
                      rows)
    carry = module.State(*(torch.randn_like(x) for x in agent.zero_state(2)))
    acted = agent.act(step, carry)
    embed = agent.world_model.encoder(None, torch.from_numpy(step.vector)[None])
    deter, _, _ = agent.world_model.rssm.observe(
        embed, carry.action[None], torch.tensor(first)[None], carry.deter, carry.stoch)
    close(acted.deter, deter[0])


def test_random_actions_are_uniform():
    draws = d3.random_actions(torch.zeros(20_000, 4), discrete=True)
    assert set(draws.unique().tolist()) == {0, 1} and (draws.sum(-1) == 1).all()
    np.testing.assert_allclose(draws.mean(0), 0.25, atol=0.02)
    draws = d3.random_actions(torch.zeros(20_000, 2), discrete=False)
    assert float(draws.abs().max()) <= 1 and float(draws.var()) == pytest.approx(1 / 3, abs=0.02)


def test_updates_due():
    """The first waits for a whole window in every ring, or there would be a burst of them."""
    args = tiny_args(d3, num_envs=8, batch_size=4, train_ratio=10.0, pretrain=7)
    for world in (1, 2):
        start = 8 * world * 5
        due = [d3.updates_due(args, step, 0, world) for step in
               (start - 1, start, start + 2, start + 20)]
        assert due == [0, 7, 8, 17]
        assert d3.updates_due(args, start + 20, 16, world) == 1
    late = replace(args, learning_starts=100)
    assert [d3.updates_due(late, step, 0) for step in (99, 100)] == [0, 7]
    offline = replace(args, offline="somewhere")  # nothing is collected, so nothing is waited for
    assert [d3.updates_due(offline, step, 0) for step in (0, 1, 21)] == [0, 7, 17]
    none_at_once = replace(args, pretrain=0)
    assert [d3.updates_due(none_at_once, step, 0) for step in (40, 42)] == [0, 1]
