"""DreamerV3's mathematics against closed forms, definitions and the facts of the authors' code."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dreamer_v3 as d3
from common.envs import EnvSpec

BUCKETS = torch.linspace(-20, 20, 255)
GAP = float(BUCKETS[1] - BUCKETS[0])
quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def seeded():
    """The same draws in every run; one thread, since everything here is tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


TINY = d3.Args(size="XXS", deter=12, hidden=10, units=9, layers=1, depth=2, stoch=3, classes=4,
               bins=21, image_size=8, batch_size=3, batch_length=5, horizon=4, amp="off",
               total_timesteps=1000)


def tiny_agent(discrete: bool = True, args: d3.Args = TINY, image: bool = False) -> d3.Agent:
    """A small agent whose reward head and critic do not start at zero."""
    spec = EnvSpec((8, 8, 3) if image else None, 6, 2, discrete)
    agent = d3.Agent(args, spec, torch.device("cpu"))
    for head in (agent.world_model.reward_head, agent.critic, agent.slow_critic):
        torch.nn.init.normal_(head.out.weight, std=0.3)
    return agent


def random_batch(agent: d3.Agent) -> d3.Batch:
    """Replayed sequences of the agent's shapes."""
    lead = (TINY.batch_length, TINY.batch_size)
    action = torch.randn(*lead, 2)
    if agent.spec.discrete:
        action = F.one_hot(torch.randint(2, lead), 2).float()
    image = None
    if agent.spec.image_shape:
        image = torch.randint(256, (*lead, *agent.spec.image_shape), dtype=torch.uint8)
    return d3.Batch(image, torch.randn(*lead, 6), action, torch.randn(lead),
                    torch.rand(lead) < 0.2, torch.rand(lead) < 0.2)


def term_gradients(agent: d3.Agent, term: str, args: d3.Args = TINY) -> dict[str, torch.Tensor]:
    """Gradient of one term of the world-model loss for each of its parameters."""
    torch.manual_seed(1)
    batch = random_batch(agent)
    losses, *_ = d3.world_model_loss(agent.world_model, batch, agent.blank_state(3), args)
    named = dict(agent.world_model.named_parameters())
    grads = torch.autograd.grad(losses[term].mean(), list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(param) if grad is None else grad
            for (name, param), grad in zip(named.items(), grads)}


# ------------------------------------------------------------------------------ lambda-return
def returns_by_definition(reward, value, discount, lambda_):
    """Eq. 7 unrolled: the lambda-weighted mean of all n-step returns, in O(n^2)."""
    horizon, found = len(reward), []
    for t in range(horizon):
        n_step = []
        for n in range(1, horizon - t + 1):
            total, factor = torch.zeros_like(value[0]), torch.ones_like(value[0])
            for k in range(t, t + n):
                total = total + factor * reward[k]
                # reward[k] is that of state k + 1 and is not discounted by its continue flag
                factor = factor * discount[k + 1]
            n_step.append(total + factor * value[t + n])
        weights = [(1 - lambda_) * lambda_**i for i in range(len(n_step) - 1)]
        weights.append(lambda_ ** (len(n_step) - 1))
        found.append(sum(w * g for w, g in zip(weights, n_step)))
    return torch.stack(found)


@quick
@given(st.integers(1, 12), st.integers(1, 4), st.floats(0, 1), st.integers(0, 2**31))
def test_lambda_return_is_the_mean_of_n_step_returns(horizon, rows, lambda_, seed):
    rng = torch.Generator().manual_seed(seed)
    reward = torch.randn(horizon, rows, generator=rng, dtype=torch.float64)
    value = torch.randn(horizon + 1, rows, generator=rng, dtype=torch.float64)
    discount = 0.99 * (torch.rand(horizon + 1, rows, generator=rng) < 0.8).double()
    ours = d3.lambda_return(reward, value, discount, lambda_)
    torch.testing.assert_close(ours, returns_by_definition(reward, value, discount, lambda_))


def test_lambda_return_at_its_ends():
    reward, value = torch.randn(5, 2), torch.randn(6, 2)
    discount = torch.full((6, 2), 0.9)
    one_step = reward + 0.9 * value[1:]
    torch.testing.assert_close(d3.lambda_return(reward, value, discount, 0.0), one_step)
    discount[3] = 0.0  # the episode ends at state 3: its reward counts, nothing after it does
    ours = d3.lambda_return(reward, value, discount, 1.0)
    torch.testing.assert_close(ours[2], reward[2])
    torch.testing.assert_close(ours[0], reward[0] + 0.9 * reward[1] + 0.81 * reward[2])


# ------------------------------------------------------------------------------------ two-hot
def two_hot_weights(value: torch.Tensor) -> torch.Tensor:
    """The weights that `TwoHot.log_prob` implies: d log_prob / d logits = weights - softmax."""
    logits = torch.randn(*value.shape, len(BUCKETS), dtype=torch.float64).requires_grad_()
    two_hot = d3.TwoHot(logits, BUCKETS.double())
    two_hot.logits = logits  # keep double precision
    grad, = torch.autograd.grad(two_hot.log_prob(value).sum(), logits)
    return grad + logits.softmax(-1).detach()


@quick
@given(st.floats(-4.8e8, 4.8e8, width=32))
def test_two_hot_weights_put_the_mean_back_at_the_value(value):
    value = torch.tensor([value, value / 1e4, value / 1e8])
    weights = two_hot_weights(value)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))
    assert (weights > -1e-6).all() and ((weights > 1e-6).sum(-1) <= 2).all()
    mean = weights.float() @ BUCKETS
    torch.testing.assert_close(mean, d3.symlog(value), atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("index", [0, 1, 100, 127, 253, 254])
def test_value_on_a_bucket_is_that_bucket(index):
    weights = two_hot_weights(d3.symexp(BUCKETS[index:index + 1]))[0]
    assert weights[index] > 1 - 1e-4


def test_halfway_between_two_buckets():
    weights = two_hot_weights(d3.symexp((BUCKETS[150:151] + BUCKETS[151:152]) / 2))[0]
    np.testing.assert_allclose(weights[150:152], 0.5, atol=1e-4)


@pytest.mark.parametrize("value, index", [(1e10, 254), (-1e10, 0), (math.inf, 254), (-math.inf, 0)])
def test_out_of_range_is_the_end_bucket(value, index):
    weights = two_hot_weights(torch.tensor([value]))[0]
    expected = torch.zeros(255, dtype=torch.float64)
    expected[index] = 1
    torch.testing.assert_close(weights, expected)


def test_mean_of_a_certain_bucket_is_its_symexp():
    logits = torch.full((255,), -1e4).index_fill(0, torch.tensor([200]), 1e4)
    torch.testing.assert_close(d3.TwoHot(logits, BUCKETS).mean(), d3.symexp(BUCKETS[200]))
    assert abs(float(d3.symexp(BUCKETS[254])) / 4.85165e8 - 1) < 1e-4  # fact 13
    assert abs(GAP - 0.157480) < 1e-6


# ----------------------------------------------------------------------------------------- KL
def parameters_reached(grads: dict[str, torch.Tensor]) -> set[str]:
    """Modules of the world model that a gradient reaches."""
    return {name for name, grad in grads.items() if grad.abs().max() > 0}


ABOVE = replace(TINY, free_bits=0.0)  # every KL counts
PRIOR = {"rssm.img_out.weight", "rssm.img_out.norm.weight", "rssm.img_out.norm.bias",
         "rssm.img_stats.weight", "rssm.img_stats.bias"}
POSTERIOR = {"rssm.obs_out.weight", "rssm.obs_stats.weight", "rssm.obs_stats.bias"}


def kl_on_logits(args: d3.Args, term: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a KL term that reach the posterior's and the prior's own raw logits."""
    agent = tiny_agent(args=args)
    model, kept = agent.world_model, []
    shipped = model.rssm.groups_of
    model.rssm.groups_of = lambda raw: (kept.append(raw), shipped(raw))[1]
    losses, *_ = d3.world_model_loss(model, random_batch(agent), agent.blank_state(3), args)
    post, prior = kept[-2:]  # the last two calls, over all T at once
    grads = torch.autograd.grad(losses[term].mean(), [post, prior], allow_unused=True)
    return tuple(0.0 if grad is None else float(grad.abs().max()) for grad in grads)


def test_dynamics_loss_reaches_the_prior_only():
    post, prior = kl_on_logits(ABOVE, "dyn")
    assert post == 0 and prior > 0


def test_representation_loss_reaches_the_posterior_only():
    post, prior = kl_on_logits(ABOVE, "rep")
    assert post > 0 and prior == 0


@pytest.mark.parametrize("term", ["dyn", "rep"])
def test_below_the_free_bits_the_gradient_is_exactly_zero(term):
    grads = term_gradients(tiny_agent(), term, replace(TINY, free_bits=1e3))
    assert not parameters_reached(grads)


def test_only_the_dynamics_loss_trains_the_prior():
    agent = tiny_agent(image=True)
    assert PRIOR <= parameters_reached(term_gradients(agent, "dyn", ABOVE))
    for term in ("rep", "reward", "continue", "vector", "image"):
        reached = parameters_reached(term_gradients(agent, term, ABOVE))
        assert not PRIOR & reached, term
        assert POSTERIOR <= reached, term


def test_kl_is_summed_over_latents_and_equal_on_both_sides():
    agent = tiny_agent()
    args = replace(TINY, free_bits=0.0, beta_dyn=1.0, beta_rep=1.0)
    batch, carry = random_batch(agent), agent.blank_state(3)
    torch.manual_seed(2)
    losses, deter, _, stats = d3.world_model_loss(agent.world_model, batch, carry, args)
    torch.manual_seed(2)
    embed = agent.world_model.encoder(d3.centre(batch.image), batch.vector)
    prev_action = torch.cat([carry.action[None], batch.action[:-1]])
    raw = agent.world_model.rssm.observe(embed, prev_action, batch.is_first, carry)[2]
    sides = [torch.distributions.Categorical(probs=groups.probs) for groups in (
        agent.world_model.rssm.groups_of(raw), agent.world_model.rssm.prior(deter))]
    expected = torch.distributions.kl_divergence(*sides).sum(-1)
    torch.testing.assert_close(losses["dyn"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["rep"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats["latent/kl"], expected.mean(), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------- categoricals
def test_straight_through_gradient_is_that_of_the_probabilities():
    raw, weight = torch.randn(7, 5).requires_grad_(), torch.randn(7, 5)
    one_hot = d3.OneHot(raw, 0.01)
    sample = one_hot.sample()
    assert sorted(set(sample.detach().flatten().tolist())) == [0, 1]
    assert (sample.sum(-1) == 1).all()
    ours, = torch.autograd.grad((sample * weight).sum(), raw, retain_graph=True)
    expected, = torch.autograd.grad((one_hot.probs * weight).sum(), raw)
    torch.testing.assert_close(ours, expected)


def test_unimix_bounds_every_probability_and_sums_to_one():
    one_hot = d3.OneHot(torch.tensor([[1e4, -1e4, 0.0, 3.0]]), 0.01)
    torch.testing.assert_close(one_hot.probs, torch.tensor([[0.9925, 0.0025, 0.0025, 0.0025]]))
    torch.testing.assert_close(one_hot.logits.exp().sum(-1), torch.ones(1))


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
    probs = d3.OneHot(torch.randn(500, classes) * 5, 0.01).probs
    draws = d3.draw_classes(probs)
    assert draws.min() >= 0 and draws.max() <= classes - 1


def test_a_class_without_probability_is_never_drawn():
    probs = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0]).expand(20_000, 5)
    assert set(d3.draw_classes(probs).tolist()) <= {1, 3}


# ------------------------------------------------------------------------------ clipped action
def test_within_unit_clips_and_still_pulls_back():
    action = torch.tensor([-3.0, -1.0, -0.3, 0.0, 0.9, 1.6], requires_grad=True)
    clipped = d3.within_unit(action)
    torch.testing.assert_close(clipped, action.detach().clamp(-1, 1))
    grad, = torch.autograd.grad(clipped.sum(), action)
    torch.testing.assert_close(grad, 1 / action.detach().abs().clamp(min=1))
    assert abs(float(grad[-1]) - 0.625) < 1e-6  # fact 7


# ------------------------------------------------------------------------------- initialisation
def meta_agent(size: str) -> d3.Agent:
    """An agent of one size for 64x64x3 and 17 actions that takes no memory."""
    with torch.device("meta"):
        return d3.Agent(d3.Args(size=size), EnvSpec((64, 64, 3), 0, 17, True), torch.device("meta"))


@pytest.mark.parametrize("size, millions",
                         [("S", 17.93), ("M", 36.91), ("L", 76.77), ("XL", 200.74)])
def test_parameter_totals(size, millions):
    """Fact 38: model, actor and critic, without the slow critic."""
    agent = meta_agent(size)
    total = sum(param.numel() for net in (agent.world_model, agent.actor, agent.critic)
                for param in net.parameters())
    assert round(total / 1e6, 2) == millions


def test_hidden_layers_are_truncated_normal():
    """Fact 34: standard deviation sqrt(1 / average fan) after a cut at two sigma."""
    for shape, fan in (((300, 500), 400), ((64, 32, 4, 4), 48 * 16)):
        weight = torch.empty(shape)
        d3.init_hidden(weight)
        std = math.sqrt(1 / fan)
        assert abs(float(weight.std()) / std - 1) < 0.02
        assert abs(float(weight.mean())) < std / 50
        assert float(weight.abs().max()) <= 2 * std / 0.87962566 + 1e-6
        assert float(weight.abs().max()) > 1.9 * std / 0.87962566


def is_uniform(weight: torch.Tensor) -> bool:
    """Fact 35: uniform with the limit sqrt(3 / average fan), which is almost reached."""
    limit = math.sqrt(3 / d3.average_fan(weight))
    return 0.95 * limit < float(weight.detach().abs().max()) <= limit


def test_which_layers_are_uniform_zero_or_normal():
    """Facts 34-36, layer by layer."""
    args = replace(TINY, deter=48, hidden=40, units=40, mlp_units=40, layers=2, mlp_layers=2,
                   depth=8, image_size=16)
    spec = EnvSpec((16, 16, 3), 6, 4, False)
    agent = d3.Agent(args, spec, torch.device("cpu"))
    model = agent.world_model
    zero = [model.reward_head.out, agent.critic.out, agent.slow_critic.out]
    assert all((layer.weight == 0).all() and (layer.bias == 0).all() for layer in zero)
    uniform = [model.rssm.img_stats, model.rssm.obs_stats, model.decoder.cnn_in,
               model.decoder.cnn[-1], model.decoder.vector_out, model.continue_head.out,
               agent.actor.out, agent.actor.std]
    for layer in uniform:
        assert is_uniform(layer.weight) and (layer.bias == 0).all()
    seen = {id(layer.weight) for layer in zero + uniform}
    for name, param in agent.named_parameters():
        if param.ndim > 1 and id(param) not in seen:
            sigma = math.sqrt(1 / d3.average_fan(param)) / 0.87962566
            assert sigma * 1.75 < float(param.detach().abs().max()) <= 2 * sigma + 1e-6, name


@pytest.mark.parametrize("channels", [2, 3, 7, 8, 32])
def test_channel_norm_is_a_layer_norm_over_the_channels(channels):
    """Below eight channels it is written out; values and gradients must stay those of torch's."""
    norm = d3.ChannelNorm(channels, eps=1e-3)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = 3 + torch.randn(5, channels, 4, 6).to(memory_format=torch.channels_last)
    x[0, :, 0, 0] = 1.5  # a pixel without variance
    inputs = [x.requires_grad_(), norm.weight, norm.bias]
    last = F.layer_norm(x.movedim(1, -1), (channels,), norm.weight, norm.bias, 1e-3)
    direction = torch.randn(last.shape)
    wanted = [last, *torch.autograd.grad(last, inputs, direction)]
    out = norm(x)
    got = [out.movedim(1, -1), *torch.autograd.grad(out, inputs, direction.movedim(-1, 1))]
    for mine, theirs in zip(got, wanted):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    coarse = x.detach().bfloat16()  # its statistics must not be as coarse as that
    last = F.layer_norm(coarse.float().movedim(1, -1), (channels,), norm.weight, norm.bias, 1e-3)
    error = (norm(coarse).float().movedim(1, -1) - last).detach().abs()
    assert float((error / (1 + last.detach().abs())).max()) < 2**-8


@pytest.mark.parametrize("first", [[False, False], [True, False], [True, True]])
def test_acting_without_a_first_step_needs_no_initial_state(first):
    agent = tiny_agent()
    agent.world_model.rssm.initial.data.normal_()
    none, rows = np.zeros(2, bool), np.zeros(2, np.float32)
    step = d3.EnvStep(None, np.ones((2, 6), np.float32), rows, np.array(first), none, none, rows,
                      rows)
    carry = d3.State(*(torch.randn_like(x) for x in agent.blank_state(2)))
    acted = agent.act(step, carry)
    embed = agent.world_model.encoder(None, torch.from_numpy(step.vector)[None])
    deter, _, _ = agent.world_model.rssm.observe(embed, carry.action[None],
                                                 torch.tensor(first)[None], carry)
    torch.testing.assert_close(acted.deter, deter[0])


def test_layers_before_a_norm_have_no_bias_and_initial_state_is_zero():
    """Facts 1, 30 and 31."""
    agent = tiny_agent(image=True)
    biases = {name for name, _ in agent.world_model.named_parameters()
              if name.endswith("bias") and "norm" not in name}
    norms = {name + ".bias" for name, module in agent.world_model.named_modules()
             if isinstance(module, torch.nn.LayerNorm)}
    assert biases - norms == {
        "rssm.img_stats.bias", "rssm.obs_stats.bias", "decoder.cnn_in.bias",
        "decoder.cnn.0.bias", "decoder.vector_out.bias", "reward_head.out.bias",
        "continue_head.out.bias"}
    assert all(module.eps == 1e-3 for module in agent.modules()
               if isinstance(module, torch.nn.LayerNorm))
    deter, _ = agent.world_model.rssm.initial_state()
    assert (deter == 0).all()


def test_fresh_reward_head_and_critic_predict_zero():
    """Fact 37."""
    head = d3.TwoHotHead(replace(TINY, bins=255), 8)
    dist = head(torch.randn(4, 8))
    assert float(dist.mean().detach().abs().max()) < 1e-6
    torch.testing.assert_close(dist.log_prob(torch.zeros(4)), torch.full((4,), -math.log(255)))
    assert abs(-math.log(255) + 5.541264) < 1e-6


# ------------------------------------------------------------------------------- actor, critic
def test_slow_critic_is_a_copy_at_first_and_an_average_afterwards():
    """Fact 29."""
    agent = tiny_agent()
    agent.critic_opt.adam.param_groups[0]["lr"] = 0.05
    for update in range(3):
        before = [param.clone() for param in agent.slow_critic.parameters()]
        agent.train_step(random_batch(agent), agent.blank_state(3))
        for old, slow, fast in zip(before, agent.slow_critic.parameters(),
                                   agent.critic.parameters()):
            expected = fast if update == 0 else 0.98 * old + 0.02 * fast
            torch.testing.assert_close(slow.detach(), expected.detach())
        assert update == 0 or any((slow != fast).any() for slow, fast in zip(
            agent.slow_critic.parameters(), agent.critic.parameters()))


def imagined(agent: d3.Agent):
    """A short imagination from random states: features, actions, actor outputs."""
    deter = torch.randn(6, TINY.deter).tanh()
    stoch = F.one_hot(torch.randint(4, (6, 3)), 4).float().flatten(-2)
    return d3.imagine(agent.world_model, agent.actor, deter, stoch, TINY.horizon)


def reached_by(output: torch.Tensor, net: torch.nn.Module) -> bool:
    """Whether a gradient of `output` reaches any parameter of `net`."""
    if not output.requires_grad:
        return False
    grads = torch.autograd.grad(output.sum(), list(net.parameters()), retain_graph=True,
                                allow_unused=True)
    return any(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_discrete_imagination_carries_no_gradient():
    agent = tiny_agent(discrete=True)
    feat, action, output = imagined(agent)
    assert not feat.requires_grad and not action.requires_grad
    assert not reached_by(output, agent.world_model)
    assert reached_by(output, agent.actor)


def test_continuous_actor_learns_through_the_dynamics():
    agent = tiny_agent(discrete=False)
    feat, _, output = imagined(agent)
    assert reached_by(feat[1], agent.actor)  # the state after the first action depends on it
    assert not reached_by(feat[0], agent.actor)
    reward = agent.world_model.reward_head(feat[1:]).mean()
    assert reached_by(reward, agent.actor)
    assert not reached_by(output, agent.world_model.rssm)  # the actor sees detached states


@pytest.mark.parametrize("discrete", [True, False])
def test_actor_and_critic_updates_leave_the_world_model_alone(discrete):
    agent = tiny_agent(discrete)
    before = [param.clone() for param in agent.world_model.parameters()]
    agent.train_actor_critic(torch.randn(6, 12), torch.randn(6, 12), torch.ones(6))
    for old, param in zip(before, agent.world_model.parameters()):
        assert torch.equal(old, param) and param.grad is None


def test_discrete_actor_gradient_is_reinforce():
    agent = tiny_agent(discrete=True)
    _, action, output = imagined(agent)
    output = output.detach().requires_grad_()
    policy = agent.actor.policy(output)
    ret = torch.randn(4, 6, requires_grad=True)
    value, weight, scale = torch.randn(4, 6), torch.rand(4, 6), torch.tensor(2.0)
    args = replace(TINY, actor_entropy=0.0)
    loss, _ = d3.actor_loss(policy, action, ret, value, weight, scale, args)
    through_ret, = torch.autograd.grad(loss, ret, retain_graph=True, allow_unused=True)
    assert through_ret is None
    ours, = torch.autograd.grad(loss, output)
    log_prob = agent.actor.policy(output).log_prob(action)
    expected = -(weight * (ret - value).detach() / 2 * log_prob).mean()
    torch.testing.assert_close(ours, torch.autograd.grad(expected, output)[0])


def test_entropy_of_a_continuous_policy_is_that_of_torch():
    mean, std = torch.randn(5, 3), torch.rand(5, 3) + 0.1
    ours = d3.Gaussian(mean, std)
    theirs = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    value = torch.randn(5, 3)
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())


def test_standard_deviation_of_an_undecided_actor():
    """Fact 27: 0.892717 where the network's output is 0."""
    agent = tiny_agent(discrete=False)
    policy = agent.actor.policy(torch.zeros(1, 4))
    torch.testing.assert_close(policy.std, torch.full((1, 2), 0.892717), atol=1e-6, rtol=0)
    assert (policy.mean == 0).all()


def test_return_scale_is_at_least_one():
    scale = d3.ReturnScale(replace(TINY, return_norm_decay=0.0))
    assert float(scale.update(torch.linspace(0, 0.5, 101))) == 1.0
    assert abs(float(scale.update(torch.linspace(0, 100, 101))) - 90) < 1e-4  # 95th - 5th


def test_return_scale_moves_slowly_from_zero():
    scale, ret = d3.ReturnScale(TINY), torch.linspace(-50, 50, 1001)
    for update in range(1, 5):
        divisor = scale.update(ret)
        expected = 90 * (1 - 0.99**update)
        assert abs(float(divisor) - max(1.0, expected)) < 1e-3
    assert not divisor.requires_grad


# --------------------------------------------------------------------------------- optimiser
def slope(param: torch.Tensor, size: float) -> torch.Tensor:
    """A loss whose gradient is `size` everywhere."""
    return (param * torch.full_like(param, size)).sum()


def test_gradients_are_clipped_by_their_global_norm_before_adam():
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    optimizer = d3.Optimizer(params, 0.1, 1e-8, 1.0)
    norm = optimizer.step(slope(params[0], 30) + slope(params[1], 40))
    assert abs(float(norm) - math.sqrt(3 * 900 + 4 * 1600)) < 1e-3
    for param, size in zip(params, (30, 40)):
        mean = optimizer.adam.state[param]["exp_avg"]
        torch.testing.assert_close(mean, torch.full_like(mean, 0.1 * size / float(norm)))


def test_small_gradients_are_not_scaled_up():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = d3.Optimizer([param], 0.1, 1e-8, 1.0)
    optimizer.step(slope(param, 1e-3))
    mean = optimizer.adam.state[param]["exp_avg"]
    torch.testing.assert_close(mean, torch.full((3,), 1e-4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(bad):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = d3.Optimizer([param], 0.1, 1e-8, 1.0)
    optimizer.step(slope(param, 1.0))
    before = param.detach().clone()
    optimizer.step(slope(param, bad))
    torch.testing.assert_close(param.detach(), before)
    optimizer.step(slope(param, 1.0))
    assert (param != before).all() and param.isfinite().all()


def test_vector_networks_have_the_size_that_is_asked_for():
    """--mlp-units and --mlp-layers follow --units and --layers unless they are given (fact 39)."""
    def widths(**flags):
        args, spec = d3.Args(env_id="CartPole-v1", size="S", **flags), EnvSpec(None, 3, 2, True)
        encoder, decoder = d3.Encoder(args, spec), d3.Decoder(args, spec, 7)
        assert encoder.embed_dim == decoder.vector_out.in_features == encoder.mlp[-1].weight.shape[0]
        return encoder.embed_dim, len(encoder.mlp), len(decoder.mlp)

    assert widths() == (512, 2, 2)
    assert widths(units=24, layers=3) == (24, 3, 3)
    assert widths(mlp_units=1024, mlp_layers=5) == (1024, 5, 5)


def test_the_first_update_waits_for_a_whole_window_in_every_ring():
    """Or many environments would owe a burst of updates by the time there is anything to replay."""
    args = replace(TINY, num_envs=8, batch_size=4, batch_length=5, learning_starts=10, train_ratio=10,
                   total_timesteps=1000)
    for world in (1, 2):
        start = 8 * world * 5
        due = [d3.updates_due(args, step, 0, world) for step in (start - 1, start, start + 2, start + 20)]
        assert due == [0, 1, 2, 11]
    args = replace(args, learning_starts=100)
    assert [d3.updates_due(args, step, 0) for step in (99, 100)] == [0, 1]
    offline = replace(args, offline="somewhere")  # nothing is collected, so nothing is waited for
    assert [d3.updates_due(offline, step, 0) for step in (0, 1, 21)] == [0, 1, 11]


def test_without_the_uniform_mixture_nothing_explodes():
    """--unimix 0: the probability of a class may round to 0, its logarithm must not be infinite."""
    raw = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    dist = d3.OneHot(raw, 0.0)
    total = dist.entropy().sum() + dist.log_prob(torch.eye(3)).sum()
    total.backward()
    assert total.isfinite() and raw.grad.isfinite().all()
    torch.testing.assert_close(dist.probs, dist.logits.exp())
