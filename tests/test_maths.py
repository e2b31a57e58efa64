"""The mathematics of the scripts against definitions, inverses and statistics.

What the golden fixtures of tests/parity.py prove is not written out here again; they replace random
draws by a rule, so the draws are tested here. What is the same in several scripts
(tests/sameness.py sees to it) is tested in the newest one.
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
from common.spaces import EnvSpec
from tests.tiny import PLAIN, grad_of, has_flag, tiny_agent, tiny_args, tiny_spec

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


def test_mean_of_two_hot_stays_in_float32_under_autocast():
    logits = 3 * torch.randn(7, 255)
    with torch.autocast("cpu", torch.bfloat16):
        inside = d3.TwoHot(logits).mean()
        assert (logits @ logits.T).dtype == torch.bfloat16, "autocast was not on"
    assert torch.equal(inside, d3.TwoHot(logits).mean())


# ------------------------------------------------------------------------------ categoricals
@pytest.mark.parametrize("make", [lambda raw: d3.OneHot(raw, 0.0), d2.OneHot], ids=["V3", "V2"])
def test_without_the_uniform_mixture_nothing_explodes(make):
    """The probability of a class may round to 0, its logarithm must not be infinite."""
    raw = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    dist = make(raw)
    total = dist.entropy().sum() + dist.log_prob(torch.eye(3)).sum()
    assert total.isfinite() and grad_of(total, raw)[0].isfinite().all()
    close(dist.probs, dist.logits.exp())


def test_draws_follow_the_probabilities():
    probs, count = torch.tensor([0.5, 0.0, 0.2, 0.05, 0.25, 0.0]), 50_000
    observed = torch.bincount(d3.draw_classes(probs.expand(count, 6)), minlength=6)
    assert len(observed) == 6 and not observed[probs == 0].any()
    expected = (count * probs)[probs > 0]
    chi_square = float(((observed[probs > 0] - expected).square() / expected).sum())
    assert chi_square < 16.3  # 99.9% of a chi-square with 3 degrees of freedom
    draws = d3.draw_classes(torch.full((20_000, 2, 2), 0.5))  # of several rows at once
    joint = torch.bincount(draws[:, 0] * 2 + draws[:, 1], minlength=4) / 20_000
    np.testing.assert_allclose(joint, 0.25, atol=0.02)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1.0])
@pytest.mark.parametrize("classes", [2, 17, 32, 1000])
def test_draws_never_leave_the_classes(monkeypatch, uniform, classes):
    """Even at the ends of the uniform number, and though float32 sums end beside 1."""
    monkeypatch.setattr(torch, "rand_like", lambda x, **_: torch.full_like(x, uniform))
    draws = d3.draw_classes(d3.OneHot(torch.randn(500, classes) * 5, 0.01).probs)
    assert draws.min() >= 0 and draws.max() <= classes - 1


# -------------------------------------------------------------------- noise and exploration
def test_noise_of_a_gaussian_is_normal_and_drawn_for_each_row():
    """V1's fact 3: theirs is one vector for a whole batch. [V3-15] the same class."""
    sample = d1.Latent(torch.tensor([[3.0, -1.0, 0.0, -50.0]]).expand(50_000, 4)).sample()
    std = torch.tensor([math.log(2) + 0.1, 0.1])
    noise = (sample - torch.tensor([3.0, -1.0])) / std
    close(noise.mean(0), torch.zeros(2), atol=0.02, rtol=0)
    close(noise.std(0), torch.ones(2), atol=0.02, rtol=0)
    inside = (noise.abs() < 1).float().mean(0)
    close(inside, torch.full((2,), math.erf(1 / math.sqrt(2))), atol=0.01, rtol=0)


@pytest.mark.parametrize("mean, std", [(0.0, 1.1), (0.9, 0.3), (-0.99, 2.1), (0.4, 0.1)])
def test_draws_of_the_truncated_normal(mean, std):
    """[V2-11] Fact 33; mean and entropy by integrating the density numerically."""
    grid = torch.linspace(-1, 1, 20_001)[:-1] + 5e-5
    one = d2.TruncatedNormal(torch.tensor([[mean]]), torch.tensor([[std]]))
    log_density = one.log_prob(grid[:, None])
    density = log_density.exp()
    assert float(density.mean() * 2) == pytest.approx(1, abs=1e-4)
    entropy = float(-(density * log_density).mean() * 2)
    assert float(one.entropy()) == pytest.approx(entropy, abs=1e-3)
    many = d2.TruncatedNormal(*(torch.full((20_000, 2), x) for x in (mean, std))).sample()
    assert float(many.abs().max()) <= 1 - 1e-6
    for power in (1, 2):
        moment = float((grid**power * density).mean() * 2)
        assert float((many**power).mean()) == pytest.approx(moment, abs=0.02)


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


# ------------------------------------------------------------------------------------ layers
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


# --------------------------------------------------------------- sizes and initial weights
def on_paper(module, spec: EnvSpec, **flags):
    """An agent of the paper's size that takes no memory."""
    rates = {name: PLAIN[name] for name in ("model_lr", "actor_lr", "critic_lr")}
    args = module.Args(**{name: x for name, x in (rates | flags).items() if has_flag(module, name)})
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


@pytest.mark.parametrize("spec, task, model, actor, critic", [
    (EnvSpec((64, 64, 1), 0, 18, True), dict(deter=600, hidden=600, pcont=True),
     19_975_379, 1_138_418, 1_131_601),
    (EnvSpec((64, 64, 3), 0, 6, False), dict(deter=200, hidden=200, pcont=False),
     13_656_772, 976_012, 971_601)], ids=["atari", "control"])
def test_parameter_totals_of_v2(spec, task, model, actor, critic):
    """Fact 11."""
    agent = on_paper(d2, spec, **task)
    assert [*map(count, (agent.world_model, agent.actor, agent.critic))] == [model, actor, critic]
    assert agent.world_model.encoder.embed_dim == 1536


def test_parameter_totals_of_v1():
    """Facts 8, 9 and 13."""
    agent = on_paper(d1, EnvSpec((64, 64, 3), 0, 6, False), pcont=False)
    model = agent.world_model
    parts = (model.encoder, model.rssm, model.decoder, model.reward_head, agent.actor, agent.critic)
    assert [*map(count, parts)] == [690_144, 557_920, 3_795_555, 253_201, 578_412, 413_601]
    assert count(model) == 5_296_820 and model.encoder.embed_dim == 1024


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
    """Facts 34-36, layer by layer, by their largest weight times the root of the average fan: 0;
    sqrt(3) of a uniform one; 2 / 0.8796 of a normal one of variance 1 that is cut at two sigma."""
    agent = fresh_agent(d3)
    model = agent.world_model
    zero = [model.reward_head.out, agent.critic.head.out, agent.slow_critic.head.out]
    uniform = [model.rssm.img_stats, model.rssm.obs_stats, model.decoder.cnn_in,
               model.decoder.cnn[-1], model.decoder.vector_head.out, model.cont_head.out,
               agent.actor.head.out, agent.actor.std]
    assert not any(layer.bias.any() for layer in zero + uniform)
    kinds = {id(layer.weight): kind for kind, layers in ((1.0, uniform), (0.0, zero))
             for layer in layers}
    for name, param in agent.named_parameters():
        if param.ndim > 1:
            unit = param.detach() * math.sqrt(average_fan(agent, name, param))
            kind = kinds.get(id(param))
            low, high = (1.6 * kind, math.sqrt(3) * kind) if kind is not None else (1.7, 2 / 0.8796)
            assert low <= float(unit.abs().max()) <= high + 1e-5, name
            if unit.numel() > 2000:  # enough to tell: the cut leaves a deviation of 1 as well
                assert float(unit.std()) == pytest.approx(float(kind != 0.0), abs=0.05)


@pytest.mark.parametrize("script", [d1, d2])
def test_layers_of_v1_and_v2_are_glorot_uniform_and_biases_zero(script):
    """V1's fact 4, V2's facts 2 and 9: all of them, the output layers too."""
    agent = fresh_agent(script)
    for name, param in agent.named_parameters():
        if "weight_hh" in name:  # V1's recurrent matrix, orthogonal as in Keras
            close(param @ param.T @ param, param)
        elif param.ndim > 1:
            size = float(param.detach().abs().max()) * math.sqrt(average_fan(agent, name, param))
            assert 1.6 < size <= math.sqrt(3) + 1e-5, name
        elif param.ndim == 1:
            assert (param == ("norm.weight" in name)).all(), name


def test_layers_of_v3_before_a_norm_have_no_bias_and_initial_state_is_zero():
    """Facts 1, 30 and 31."""
    model = tiny_agent(d3, tiny_spec(d3, image=True)).world_model
    last = len(model.decoder.cnn) - 1
    norms = {name for name, part in model.named_modules() if isinstance(part, nn.LayerNorm)}
    biases = {name for name, _ in model.named_parameters()
              if name.endswith(".bias") and name.rpartition(".")[0] not in norms}
    assert biases == {f"{name}.bias" for name in (
        "rssm.img_stats", "rssm.obs_stats", "decoder.cnn_in", f"decoder.cnn.{last}",
        "decoder.vector_head.out", "reward_head.out", "cont_head.out")}
    assert all(model.get_submodule(name).eps == 1e-3 for name in norms)
    deter, stoch = model.rssm.initial_state()
    assert not deter.any() and torch.equal(stoch, model.rssm.prior(deter).mode())
    model.rssm.initial.data.fill_(0.5)
    close(model.rssm.initial_state()[0], torch.full((12,), math.tanh(0.5)))
