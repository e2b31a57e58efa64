"""The mathematics of the scripts against closed forms, definitions and facts of the authors' code.

What is the same in several scripts (tests/sameness.py sees to it) is tested in the newest one.
"""

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
from hypothesis import given, settings
from hypothesis import strategies as st

import dreamer_v1 as d1
import dreamer_v2 as d2
import dreamer_v3 as d3
from common.envs import EnvSpec
from tests.tiny import (as_torch, for_task, grad_of, tiny_agent, tiny_args, tiny_batch,
                        tiny_spec)

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def seeded():
    """The same draws in every run."""
    torch.manual_seed(0)


@pytest.fixture(params=SCRIPTS)
def module(request):
    """Each script in turn."""
    return importlib.import_module(request.param)


# ----------------------------------------------------------------------------- lambda-return
def returns_by_definition(reward, discount, next_value, lambda_):
    """The lambda-weighted mean of all n-step returns, in O(n^2)."""
    horizon, found = len(reward), []
    for t in range(horizon):
        n_step, total, factor = [], 0.0, 1.0
        for k in range(t, horizon):
            total, factor = total + factor * reward[k], factor * discount[k]
            n_step.append(total + factor * next_value[k])
        weights = [(1 - lambda_) * lambda_**i for i in range(len(n_step) - 1)]
        found.append(sum(w * g for w, g in zip([*weights, lambda_ ** len(weights)], n_step)))
    return torch.stack(found)


@quick
@given(st.integers(1, 12), st.integers(1, 4), st.floats(0, 1), st.integers(0, 2**31))
def test_lambda_return_is_the_mean_of_n_step_returns(horizon, rows, lambda_, seed):
    rng = torch.Generator().manual_seed(seed)
    reward, value, alive = torch.randn(3, horizon, rows, generator=rng, dtype=torch.float64)
    discount = 0.99 * (alive < 1).double()
    ours = d3.lambda_return(reward, discount, value, lambda_)
    close(ours, returns_by_definition(reward, discount, value, lambda_))


def test_lambda_return_at_its_ends():
    reward, value = torch.randn(2, 5, 2)
    discount = torch.full((5, 2), 0.9)
    close(d3.lambda_return(reward, discount, value, 0.0), reward + 0.9 * value)
    discount[2] = 0.0  # the episode ends there: its reward counts, nothing after it does
    ours = d3.lambda_return(reward, discount, value, 1.0)
    close(ours[2], reward[2])
    close(ours[0], reward[0] + 0.9 * reward[1] + 0.81 * reward[2])
    close(ours[4], reward[4] + 0.9 * value[4])


# ----------------------------------------------------------------------------------- two-hot
BUCKETS = torch.linspace(-20, 20, 255)


def two_hot_weights(value: torch.Tensor) -> torch.Tensor:
    """The weights that `TwoHot.log_prob` implies: d log_prob / d logits = weights - softmax."""
    logits = torch.randn(*value.shape, 255).requires_grad_()
    grad, = grad_of(d3.TwoHot(logits).log_prob(value), logits)
    return grad + logits.softmax(-1).detach()


@quick
@given(st.floats(-4.8e8, 4.8e8, width=32))
def test_two_hot_weights_put_the_mean_back_at_the_value(value):
    value = torch.tensor([value, value / 1e4, value / 1e8])
    weights = two_hot_weights(value)
    close(weights.sum(-1), torch.ones(3))
    assert (weights > -1e-6).all() and ((weights > 1e-6).sum(-1) <= 2).all()
    close(weights @ BUCKETS, d3.symlog(value), atol=5e-5, rtol=1e-6)


@pytest.mark.parametrize("place, expected", [
    (0, {0: 1}), (1, {1: 1}), (127, {127: 1}), (254, {254: 1}), (150.5, {150: 0.5, 151: 0.5}),
    (1e10, {254: 1}), (-1e10, {0: 1}), (math.inf, {254: 1}), (-math.inf, {0: 1})])
def test_two_hot_on_between_and_beyond_the_buckets(place, expected):
    symlog = torch.tensor([-20 + 40 * place / 254])
    weights = two_hot_weights(d3.symexp(symlog) if abs(place) < 1e9 else symlog)[0]
    for bucket in range(255):
        assert float(weights[bucket]) == pytest.approx(expected.get(bucket, 0), abs=1e-4)


def test_mean_of_two_hot():
    """Facts 13 and 37."""
    certain = torch.full((255,), -1e4).index_fill(0, torch.tensor([200]), 1e4)
    close(d3.TwoHot(certain).mean(), d3.symexp(BUCKETS[200]))
    fresh = d3.TwoHot(torch.zeros(4, 255))
    assert float(fresh.mean().abs().max()) < 1e-6
    close(fresh.log_prob(torch.zeros(4)), torch.full((4,), -5.541264))


def test_mean_of_two_hot_stays_in_float32_under_autocast():
    logits = 3 * torch.randn(7, 255)
    with torch.autocast("cpu", torch.bfloat16):
        inside = d3.TwoHot(logits).mean()
        assert (logits @ logits.T).dtype == torch.bfloat16, "autocast was not on"
    assert torch.equal(inside, d3.TwoHot(logits).mean())


def test_two_hot_of_some_steps():
    dist, value = d3.TwoHot(torch.randn(5, 3, 21)), torch.randn(4, 3)
    close(dist[1:].log_prob(value), d3.TwoHot(dist.logits[1:]).log_prob(value))
    close(dist[:-1].mean(), dist.mean()[:-1])


# ------------------------------------------------------------------------------ categoricals
def one_hot(module, raw: torch.Tensor):
    """V3 mixes in a uniform distribution."""
    return d3.OneHot(raw, 0.01) if module is d3 else module.OneHot(raw)


def test_one_hot_is_the_categorical_of_torch(module):
    ours = one_hot(module, torch.randn(7, 5))
    assert torch.equal(ours.mode(), F.one_hot(ours.probs.argmax(-1), 5).float())
    close(ours.sample().sort(-1).values, torch.eye(5)[[4]].expand(7, 5))
    if module is not d1:  # which needs no more
        theirs = torch.distributions.Categorical(probs=ours.probs)
        index = torch.randint(5, (7,))
        close(ours.log_prob(F.one_hot(index, 5)), theirs.log_prob(index))
        close(ours.entropy(), theirs.entropy())


def test_straight_through_gradient_is_that_of_the_probabilities(module):
    raw, weight = torch.randn(7, 5).requires_grad_(), torch.randn(7, 5)
    dist = one_hot(module, raw)
    sample = dist.sample()
    close(sample.detach().sort(-1).values, torch.eye(5)[[4]].expand(7, 5))
    close(grad_of(sample * weight, raw), grad_of(dist.probs * weight, raw))


def test_unimix_bounds_every_probability():
    dist = d3.OneHot(torch.tensor([[1e4, -1e4, 0.0, 3.0]]), 0.01)
    close(dist.probs, torch.tensor([[0.9925, 0.0025, 0.0025, 0.0025]]))
    close(dist.logits.exp().sum(-1), torch.ones(1))


@pytest.mark.parametrize("make", [lambda raw: d3.OneHot(raw, 0.0), d2.OneHot], ids=["V3", "V2"])
def test_without_the_uniform_mixture_nothing_explodes(make):
    """The probability of a class may round to 0, its logarithm must not be infinite."""
    raw = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    dist = make(raw)
    total = dist.entropy().sum() + dist.log_prob(torch.eye(3)).sum()
    assert total.isfinite() and grad_of(total, raw)[0].isfinite().all()
    close(dist.probs, dist.logits.exp())


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.5, 0.01, 0.2, 0.04, 0.25])
    draws, count = d3.draw_classes(probs.expand(50_000, 5)), 50_000
    observed = torch.bincount(draws, minlength=5)
    assert len(observed) == 5
    chi_square = float(((observed - count * probs).square() / (count * probs)).sum())
    assert chi_square < 18.5  # 99.9% of a chi-square with 4 degrees of freedom


def test_draws_are_independent_across_rows():
    draws = d3.draw_classes(torch.full((20_000, 2, 2), 0.5))
    joint = torch.bincount(draws[:, 0] * 2 + draws[:, 1], minlength=4) / 20_000
    np.testing.assert_allclose(joint, 0.25, atol=0.02)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1.0])
@pytest.mark.parametrize("classes", [2, 17, 32, 1000])
def test_draws_never_leave_the_classes(monkeypatch, uniform, classes):
    """Even at the ends of the uniform number, and though float32 sums end beside 1."""
    monkeypatch.setattr(torch, "rand_like", lambda x, **_: torch.full_like(x, uniform))
    draws = d3.draw_classes(d3.OneHot(torch.randn(500, classes) * 5, 0.01).probs)
    assert draws.min() >= 0 and draws.max() <= classes - 1


def test_a_class_without_probability_is_never_drawn():
    probs = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0]).expand(20_000, 5)
    assert set(d3.draw_classes(probs).tolist()) <= {1, 3}


# -------------------------------------------------------------------------- the latent state
def latents(module, number: int) -> tuple[list[torch.Tensor], list]:
    """Raw statistics (7, ...), and the distributions of z_t that a tiny world model makes."""
    rssm = tiny_agent(module).world_model.rssm
    raws = [2 * torch.randn(7, rssm.obs_stats.out_features).requires_grad_() for _ in range(number)]
    return raws, [rssm.latent(raw) for raw in raws]


def test_latent_agrees_with_torch(module):
    _, (post, prior) = latents(module, 2)
    close(post.kl(prior), torch.distributions.kl_divergence(as_torch(post), as_torch(prior)))
    close(post.entropy(), as_torch(post).entropy())
    assert (post.kl(prior) > 0).all() and not post.kl(post).abs().max() > 1e-6
    width = tiny_args(module).stoch_dim
    assert post.sample().shape == post.mode().shape == (7, width)


@pytest.mark.parametrize("script", [d2, d3])
def test_detach_stops_one_side_of_the_kl(script):
    raws, (post, prior) = latents(script, 2)
    close(post.detach().kl(prior), post.kl(prior))
    both = grad_of(post.kl(prior), *raws)
    assert all(grad.any() for grad in both)
    close(grad_of(post.detach().kl(prior), *raws), [torch.zeros_like(raws[0]), both[1]])
    close(grad_of(post.kl(prior.detach()), *raws), [both[0], torch.zeros_like(raws[1])])


@pytest.mark.parametrize("script", [d2, d3])
def test_groups_of_latents_are_independent(script):
    """Side by side, each with one class; a draw of a certain class is that class."""
    classes = torch.tensor([[2, 0, 3], [1, 1, 0]])
    wanted = F.one_hot(classes, 4).float().flatten(-2)
    dist = tiny_agent(script).world_model.rssm.latent(1e4 * wanted)
    assert torch.equal(dist.mode(), wanted)
    draws = torch.stack([dist.sample() for _ in range(100)])
    assert (draws == wanted).float().mean() > 0.98  # V3: 1% of the draws are uniform


def test_latent_of_v1():
    """Fact 3: a deviation of softplus(raw) + 0.1; its sample is reparameterised, row by row."""
    raw = torch.tensor([[3.0, -1.0, 0.0, -50.0]]).expand(50_000, 4).clone().requires_grad_()
    dist = d1.Latent(raw)
    close(dist.mean[0], torch.tensor([3.0, -1.0]))
    close(dist.std[0], torch.tensor([math.log(2) + 0.1, 0.1]))
    sample = dist.sample()
    close(sample.detach().mean(0), torch.tensor([3.0, -1.0]), atol=0.02, rtol=0)
    close(sample.detach().std(0), dist.std[0].detach(), atol=0.02, rtol=0)
    by_raw, = grad_of(sample, raw)
    noise = (sample - dist.mean) / dist.std
    close(by_raw, torch.cat([torch.ones_like(noise), noise * raw[:, 2:].sigmoid()], -1).detach())


# ------------------------------------------------------------------- actions, rewards, flags
def test_normal_policy_is_that_of_torch():
    """[V3-15] Fact 27: the deviation is 0.892717 where the network's output is 0."""
    mean, std, value = torch.randn(5, 3), torch.rand(5, 3) + 0.1, torch.randn(5, 3)
    ours = d3.Gaussian(mean, std)
    close(ours.log_prob(value), as_torch(ours).log_prob(value))
    close(ours.entropy(), as_torch(ours).entropy())
    close(ours.mode(), mean)
    undecided = tiny_agent(d3, tiny_spec(d3, discrete=False)).actor.policy(torch.zeros(1, 4))
    close(undecided.std, torch.full((1, 2), 0.892717), atol=1e-6, rtol=0)
    assert not undecided.mean.any()


def truncated(mean: float, std: float, size: int = 1):
    """Two action dimensions of one kind, differentiable."""
    values = [torch.full((size, 2), x).requires_grad_() for x in (mean, std)]
    return d2.TruncatedNormal(*values), *values


@pytest.mark.parametrize("mean, std", [(0.0, 1.1), (0.9, 0.3), (-0.99, 2.1), (0.4, 0.1)])
def test_truncated_normal_policy(mean, std):
    """[V2-11] Density and entropy by numerical integration; facts 33 and 34 of its samples."""
    grid = torch.linspace(-1, 1, 20_001)[:-1] + 5e-5
    dist, _, _ = truncated(mean, std)
    one = d2.TruncatedNormal(dist.mean[:, :1].detach(), dist.std[:, :1].detach())
    log_density = one.log_prob(grid[:, None])
    density = log_density.exp()
    assert float(density.mean() * 2) == pytest.approx(1, abs=1e-4)
    entropy = float(-(density * log_density).mean() * 2)
    assert float(one.entropy()) == pytest.approx(entropy, abs=1e-3)
    assert float(dist.entropy().detach()) == pytest.approx(2 * entropy, abs=2e-3)  # both dimensions

    many, loc, scale = truncated(mean, std, 20_000)
    sample = many.sample()
    assert float(sample.detach().abs().max()) <= 1 - 1e-6
    mean = float((grid * density).mean() * 2)
    assert float(sample.detach().mean()) == pytest.approx(mean, abs=0.02)
    by_loc, by_scale = grad_of(sample, loc, scale)
    assert (by_loc == 1).all()
    close(by_scale, (sample - loc).detach() / std, atol=1e-4, rtol=1e-3)


def test_standard_deviation_of_v2s_actor():
    policy = tiny_agent(d2, tiny_spec(d2, discrete=False)).actor.policy(
        torch.tensor([[0.0, 9.0, 0.0, 50.0], [0.0, -9.0, 0.0, -50.0]]))
    close(policy.std, torch.tensor([[1.1, 2.1], [1.1, 0.1]]))
    close(policy.mean, torch.tensor([[0.0, 1.0], [0.0, -1.0]]), atol=1e-6, rtol=0)


def test_policy_of_v1():
    """Fact 28: mean 5 tanh(m / 5), deviation 5 at first, then tanh."""
    agent = tiny_agent(d1, tiny_spec(d1, discrete=False))
    policy = agent.actor.policy(torch.tensor([[0.0, 100.0, 0.0, -50.0]]).expand(50_000, 4))
    close(policy.mean[0], torch.tensor([0.0, 5.0]))
    close(policy.std[0], torch.tensor([5.0, 0.0]) + 1e-4, atol=1e-5, rtol=0)
    close(policy.mode()[0], torch.tensor([0.0, 5.0]).tanh())
    before_tanh = policy.sample()[:, 0].double().atanh()
    inside = before_tanh[before_tanh.abs() < 2]  # float32 knows little of what is near 1
    assert len(inside) / 50_000 == pytest.approx(math.erf(2 / 5 / math.sqrt(2)), abs=0.01)


def explored(action: torch.Tensor, step: int = 0, **flags) -> torch.Tensor:
    """Actions with V1's noise; the last of them was chosen at the end of an episode."""
    zero, ends = torch.zeros(len(action), 1), np.arange(len(action)) == len(action) - 1
    args = tiny_args(d1, action_repeat=2, **flags)
    state = d1.explore(args, step, d1.State(zero, zero, action), SimpleNamespace(is_last=ends),
                       discrete=action.shape[1] == 4)
    assert state.deter is state.stoch is zero and not state.action[-1].any()
    return state.action[:-1]


@pytest.mark.parametrize("amount", [0.0, 0.3])
def test_exploration_noise_of_v1(amount):
    """[V1-6] Facts 32 and 33, a random action in each environment for itself."""
    noisy = explored(torch.tensor([[0.1, -0.9]]).expand(50_000, 2), expl_amount=amount)
    assert float((noisy[:, 0] - 0.1).std()) == pytest.approx(amount, abs=0.01)
    assert float(noisy.min()) == (-1 if amount else pytest.approx(-0.9))
    onehot = F.one_hot(torch.full((50_000,), 2), 4).float()
    other = explored(onehot, expl_amount=amount)
    assert (other.sum(-1) == 1).all() and set(other.unique().tolist()) == {0, 1}
    assert float(other[:, 2].mean()) == pytest.approx(1 - 0.75 * amount, abs=0.01)


@pytest.mark.parametrize("step, amount", [(0, 0.4), (50, 0.2), (100, 0.1), (500, 0.05)])
def test_exploration_decays_by_frames(step, amount):
    """Fact 32: 100 frames are 50 timesteps here."""
    flags = dict(expl_amount=0.4, expl_decay=100.0, expl_min=0.05)
    noise = explored(torch.zeros(20_000, 2), step, **flags)
    assert float(noise.std()) == pytest.approx(amount, rel=0.03)


def test_flags():
    logit, flag = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([0.3, 1.0, 0.0])
    theirs = torch.distributions.Bernoulli(logits=logit)
    for module in (d2, d3):  # also of soft flags, such as gamma
        yes, no = theirs.log_prob(torch.ones(3)), theirs.log_prob(torch.zeros(3))
        close(module.Bernoulli(logit).log_prob(flag), flag * yes + (1 - flag) * no)
    close(d3.Bernoulli(logit).mode(), torch.tensor([0.0, 0.0, 1.0]))  # fact 18: 0 at exactly 0
    close(d2.Bernoulli(logit).mean(), theirs.mean)


def test_unit_normal_keeps_its_constant():
    """V2's fact 9, V1's fact 10."""
    mean, value = torch.randn(2, 5)
    close(d2.Normal(mean).log_prob(value), torch.distributions.Normal(mean, 1).log_prob(value))
    assert torch.equal(d2.Normal(mean).mean(), mean)


def test_within_unit_clips_and_still_pulls_back():
    """[V3-15] Fact 7."""
    action = torch.tensor([-3.0, -1.0, -0.3, 0.0, 0.9, 1.6], requires_grad=True)
    clipped = d3.within_unit(action)
    close(clipped, action.detach().clamp(-1, 1))
    grad, = grad_of(clipped, action)
    close(grad, 1 / action.detach().abs().clamp(min=1))
    assert float(grad[-1]) == pytest.approx(0.625)


def test_previous_actions_are_one_step_later():
    agent = tiny_agent(d3)
    batch, before = tiny_batch(d3, agent), torch.rand(3, 2)
    previous = d3.previous_actions(batch, before)
    assert torch.equal(previous[0], before) and torch.equal(previous[1:], batch.action[:-1])


# ------------------------------------------------------------------------------------ layers
def test_split_dense_is_a_dense_layer_of_the_concatenation(module):
    split, whole = module.SplitDense(5, 3, 7), module.Dense(8, 7)
    for param in split.parameters():
        nn.init.normal_(param)
    weights = dict(split.named_parameters())
    weights["weight"] = torch.cat([weights.pop("weight_a"), weights.pop("weight_b")], -1)
    whole.load_state_dict(weights)
    a, b = torch.randn(4, 2, 5), torch.randn(4, 2, 3)
    close(split(a, split.project(b)), whole(torch.cat([a, b], -1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("script", [d2, d3])
def test_norm_gru_cell_is_its_equation(script):
    """Facts 2 (V2) and 4 (V3)."""
    cell = script.NormGRUCell(3, 5)
    for param in cell.parameters():
        nn.init.normal_(param)
    x, h = torch.randn(4, 3), torch.randn(4, 5)
    weight, bias = cell.linear.weight, cell.linear.bias
    product = torch.cat([h, x], -1) @ weight.T + (0 if bias is None else bias)
    mean, variance = product.mean(-1, keepdim=True), product.var(-1, keepdim=True, correction=0)
    normed = (product - mean) / (variance + 1e-3).sqrt() * cell.norm.weight + cell.norm.bias
    r, c, u = normed[:, :5], normed[:, 5:10], normed[:, 10:]
    c, u = torch.tanh(torch.sigmoid(r) * c), torch.sigmoid(u - 1)
    close(cell(x, h), u * c + (1 - u) * h)


@pytest.mark.parametrize("script", [d1, d2])
def test_single_numbers_are_not_rounded_to_bfloat16(script):
    """Rewards and values of V1 and V2, which are one output of a head."""
    one, many = script.Head(8, 8, 1, 1), script.Head(8, 8, 1, 2)
    feat = torch.randn(50, 8)
    with torch.autocast("cpu", torch.bfloat16):
        values, others = one(feat), many(feat)
    assert values.dtype == others.dtype == torch.float32
    assert torch.equal(others, others.bfloat16().float()), "autocast was not on"
    assert not torch.equal(values, values.bfloat16().float())
    close(values, one(feat), atol=0.02, rtol=0.02)


def test_gru_cell_of_v1_is_that_of_keras():
    """Fact 4: gate order z, r, h with reset_after; torch's order is r, z, h."""
    cell = d1.GRUCell(3, 5)
    close(cell.weight_hh @ cell.weight_hh.T @ cell.weight_hh, cell.weight_hh)  # orthogonal
    for param in cell.parameters():
        nn.init.normal_(param)
    x, h = torch.randn(4, 3), torch.randn(4, 5)
    from_x, from_h = x @ cell.weight_ih.T + cell.bias_ih, h @ cell.weight_hh.T + cell.bias_hh
    (r_x, z_x, c_x), (r_h, z_h, c_h) = from_x.chunk(3, -1), from_h.chunk(3, -1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    close(cell(x, h), z * h + (1 - z) * torch.tanh(c_x + r * c_h))


@pytest.mark.parametrize("channels", [2, 3, 7, 8, 32])
def test_channel_norm_is_a_layer_norm_over_the_channels(channels):
    """Below eight channels it is written out; values and gradients must stay those of torch's."""
    norm = d3.ChannelNorm(channels)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = 3 + torch.randn(5, channels, 4, 6).to(memory_format=torch.channels_last)
    x[0, :, 0, 0] = 1.5  # a pixel without variance
    inputs = [x.requires_grad_(), norm.weight, norm.bias]
    last = F.layer_norm(x.movedim(1, -1), (channels,), norm.weight, norm.bias, 1e-3)
    direction = torch.randn(last.shape)
    wanted = [last, *torch.autograd.grad(last, inputs, direction)]
    out = norm(x)
    got = [out.movedim(1, -1), *torch.autograd.grad(out, inputs, direction.movedim(-1, 1))]
    for mine, theirs in zip(got, wanted):
        close(mine, theirs, rtol=1e-4, atol=1e-4)
    coarse = x.detach().bfloat16()  # its statistics must not be as coarse as that
    last = F.layer_norm(coarse.float().movedim(1, -1), (channels,), norm.weight, norm.bias, 1e-3)
    error = (norm(coarse).float().movedim(1, -1) - last).detach().abs()
    assert float((error / (1 + last.detach().abs())).max()) < 2**-8


# --------------------------------------------------------------- sizes and initial weights
def on_paper(module, spec: EnvSpec, **flags):
    """An agent of the paper's size that takes no memory."""
    args = for_task(module, module.Args(**flags), spec.discrete)
    with torch.device("meta"):
        return module.Agent(args, spec, torch.device("meta"))


def count(*networks: nn.Module) -> int:
    """Number of parameters."""
    return sum(param.numel() for net in networks for param in net.parameters())


@pytest.mark.parametrize("size, millions",
                         [("S", 17.93), ("M", 36.91), ("L", 76.77), ("XL", 200.74)])
def test_parameter_totals_of_v3(size, millions):
    """Fact 38: model, actor and critic, without the slow critic."""
    agent = on_paper(d3, EnvSpec((64, 64, 3), 0, 17, True), size=size)
    assert round(count(agent.world_model, agent.actor, agent.critic) / 1e6, 2) == millions


@pytest.mark.parametrize("spec, model, actor, critic", [
    (EnvSpec((64, 64, 1), 0, 18, True), 19_975_379, 1_138_418, 1_131_601),
    (EnvSpec((64, 64, 3), 0, 6, False), 13_656_772, 976_012, 971_601)], ids=["atari", "control"])
def test_parameter_totals_of_v2(spec, model, actor, critic):
    """Fact 11."""
    agent = on_paper(d2, spec)
    assert [*map(count, (agent.world_model, agent.actor, agent.critic))] == [model, actor, critic]
    assert agent.world_model.encoder.embed_dim == 1536


def test_parameter_totals_of_v1():
    """Facts 8, 9 and 13."""
    agent = on_paper(d1, EnvSpec((64, 64, 3), 0, 6, False))
    model = agent.world_model
    parts = (model.encoder, model.rssm, model.decoder, model.reward_head, agent.actor, agent.critic)
    assert [*map(count, parts)] == [690_144, 557_920, 3_795_555, 253_201, 578_412, 413_601]
    assert count(model) == 5_296_820 and model.encoder.embed_dim == 1024


def test_vector_networks_of_v3_have_one_size():
    """Fact 39: 5 x 1024 whatever --size, unless asked otherwise; XXS is ours."""
    def widths(**flags):
        args, spec = d3.Args(env_id="CartPole-v1", **flags), EnvSpec(None, 3, 2, True)
        encoder, decoder = d3.Encoder(args, spec), d3.Decoder(args, spec, 7)
        assert encoder.embed_dim == decoder.vector_head.out.in_features
        return encoder.embed_dim, len(encoder.mlp), len(decoder.vector_head.mlp)

    assert widths(size="XS") == widths(size="M", units=24, layers=3) == (1024, 5, 5)
    assert widths(size="XXS") == (512, 2, 2)
    assert widths(mlp_units=30, mlp_layers=2) == (30, 2, 2)


def test_hidden_layers_of_v3_are_truncated_normal():
    """Fact 34: standard deviation sqrt(1 / average fan) after a cut at two sigma."""
    for layer, fan in ((nn.Linear(500, 300), 400), (nn.Conv2d(32, 64, 4), 48 * 16)):
        d3.init_hidden(layer)
        weight, std = layer.weight.detach(), math.sqrt(1 / fan)
        assert abs(float(weight.std()) / std - 1) < 0.02
        assert abs(float(weight.mean())) < std / 50
        assert 1.9 * std / 0.87962566 < float(weight.abs().max()) <= 2 * std / 0.87962566 + 1e-6


@pytest.mark.parametrize("layer, fan", [
    (nn.Linear(300, 500), 400), (nn.Conv2d(32, 64, 4), 48 * 16),
    (nn.ConvTranspose2d(32, 64, 5), 48 * 25)])
def test_other_layers_are_uniform(module, layer, fan):
    """V3's facts 35 and 36; V1 and V2: Glorot, as every layer of theirs."""
    module.init_output(layer)
    weight, limit = layer.weight.detach(), math.sqrt(3 / fan)
    assert 0.95 * limit < float(weight.abs().max()) <= limit
    assert float(weight.std()) == pytest.approx(math.sqrt(1 / fan), rel=0.02)
    assert not layer.bias.any()


def fresh_agent(module) -> nn.Module:
    """A fresh one, large enough to tell distributions apart: images, vectors, Box actions."""
    spec = replace(tiny_spec(module, discrete=False, image=True), action_dim=4)
    args = tiny_args(module, False, deter=48, hidden=40, units=40, mlp_units=40, depth=8)
    return module.Agent(args, spec, torch.device("cpu"))


def average_fan(agent, name: str, param: torch.Tensor) -> float:
    """(fan in + fan out) / 2; the two parts of a `SplitDense` were drawn as one."""
    inputs = param.shape[1]
    if name.endswith(("weight_a", "weight_b")):
        inputs = sum(agent.get_parameter(name[:-1] + part).shape[1] for part in "ab")
    return (param.shape[0] + inputs) / 2 * param[0, 0].numel()


def test_which_layers_of_v3_are_uniform_zero_or_normal():
    """Facts 34-36, layer by layer."""
    agent = fresh_agent(d3)
    model = agent.world_model
    zero = [model.reward_head.out, agent.critic.head.out, agent.slow_critic.head.out]
    assert not any(layer.weight.any() or layer.bias.any() for layer in zero)
    uniform = [model.rssm.img_stats, model.rssm.obs_stats, model.decoder.cnn_in,
               model.decoder.cnn[-1], model.decoder.vector_head.out, model.cont_head.out,
               agent.actor.head.out, agent.actor.std]
    kinds = {id(layer.weight): 1.0 for layer in uniform}
    kinds |= {id(layer.weight): 0.0 for layer in zero}
    for name, param in agent.named_parameters():
        if param.ndim > 1:
            size = float(param.detach().abs().max()) * math.sqrt(average_fan(agent, name, param))
            kind = kinds.get(id(param))
            low, high = (1.6 * kind, math.sqrt(3) * kind) if kind is not None else (1.7, 2 / 0.8796)
            assert low <= size <= high + 1e-5, name


@pytest.mark.parametrize("script", [d1, d2])
def test_layers_of_v1_and_v2_are_glorot_uniform_without_bias(script):
    """V1's fact 4, V2's facts 2 and 9: every one of them, the output layers too."""
    agent = fresh_agent(script)
    for name, param in agent.named_parameters():
        if param.ndim > 1 and "weight_hh" not in name:
            size = float(param.detach().abs().max()) * math.sqrt(average_fan(agent, name, param))
            assert 1.6 < size <= math.sqrt(3) + 1e-5, name
        elif param.ndim == 1:
            assert (param == ("norm.weight" in name)).all(), name


def test_layers_of_v3_before_a_norm_have_no_bias_and_initial_state_is_zero():
    """Facts 1, 30 and 31."""
    model = tiny_agent(d3, tiny_spec(d3, image=True)).world_model
    norms = {name for name, part in model.named_modules() if isinstance(part, nn.LayerNorm)}
    biases = {name for name, _ in model.named_parameters()
              if name.endswith(".bias") and name.rpartition(".")[0] not in norms}
    assert biases == {f"{name}.bias" for name in (
        "rssm.img_stats", "rssm.obs_stats", "decoder.cnn_in", "decoder.cnn.0",
        "decoder.vector_head.out", "reward_head.out", "cont_head.out")}
    assert all(model.get_submodule(name).eps == 1e-3 for name in norms)
    deter, stoch = model.rssm.initial_state()
    assert not deter.any() and torch.equal(stoch, model.rssm.prior(deter).mode())
    model.rssm.initial.data.fill_(0.5)
    close(model.rssm.initial_state()[0], torch.full((12,), math.tanh(0.5)))
