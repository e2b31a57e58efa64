"""Our numbers equal the authors' (`tests.parity`), and the comparison notices when they do not."""

import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dreamer_v3 as d3
from common.envs import EnvSpec
from tests import parity, parity_v3
from tests.parity import Fixture, Mismatch, Report, check_fixture, patched

GOLDEN = Path(__file__).parent / "golden" / "v3"
VECTOR, IMAGE = "v3_continuous_vector", "v3_discrete_image"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are faster on one thread, and sums come out the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def failures(path: Path) -> list[str]:
    """Names of the comparisons that fail for one fixture."""
    report = Report(quiet=True)
    check_fixture(report, path, parity_v3)
    return [name.split(": ", 1)[1] for name in report.failed]


# --------------------------------------------------------------------------- it agrees
@pytest.mark.parametrize("name", ["v3_math", "v3_discrete_image", "v3_continuous_vector"])
def test_fixture_agrees(name):
    assert not failures(GOLDEN / f"{name}.npz")


def test_command_line_passes():
    done = subprocess.run([sys.executable, "-m", "tests.parity", "v3"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(" 0 failed")
    assert "ignored: " in done.stdout and "largest forward error" in done.stdout


@pytest.mark.parametrize("argv", [[], ["v9"], ["v3", "a", "b"], ["v3", "/nonexistent"]])
def test_nothing_to_compare_is_status_2(argv, capsys):
    assert parity.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1


def test_a_failure_is_status_1(tmp_path):
    shutil.copy(GOLDEN / "v3_math.npz", tmp_path)
    assert parity.main(["v3", str(tmp_path)], quiet=True) == 0
    with patched((d3, "symlog", lambda x: x)):
        assert parity.main(["v3", str(tmp_path)], quiet=True) == 1


# -------------------------------------------------------------- it notices wrong numbers
def changed(tmp_path: Path, name: str, change) -> Path:
    """A copy of a fixture whose arrays `change` has edited in place."""
    fixture = Fixture(GOLDEN / f"{name}.npz")
    change(fixture.arrays)
    np.savez(tmp_path / f"{name}.npz", **fixture.arrays)
    return tmp_path / f"{name}.npz"


def test_one_wrong_number_is_noticed(tmp_path):
    def change(arrays):
        arrays["lambda/return"].flat[5] *= 1 + 1e-3
    assert failures(changed(tmp_path, "v3_math", change)) == ["lambda/return"]


def test_nan_is_noticed(tmp_path):
    def change(arrays):
        arrays["onehot/entropy_p"].flat[0] = np.nan
    assert failures(changed(tmp_path, "v3_math", change)) == ["onehot/entropy_p"]


def test_other_shape_is_noticed(tmp_path):
    def change(arrays):
        arrays["onehot/entropy_p"] = arrays["onehot/entropy_p"][:, None]
    assert failures(changed(tmp_path, "v3_math", change)) == ["onehot/entropy_p"]


def test_array_without_a_comparison_is_noticed(tmp_path):
    def change(arrays):
        arrays["something/new"] = np.zeros(3)
    assert failures(changed(tmp_path, "v3_math", change)) == ["something/new"]


def test_weight_without_a_place_is_noticed(tmp_path):
    def change(arrays):
        arrays["params_init/agent/wm/rssm/img_out/bias"] = np.zeros(16, np.float32)
    assert "v3_continuous_vector.npz" in failures(changed(tmp_path, "v3_continuous_vector", change))


def test_place_without_a_weight_is_noticed(tmp_path):
    def change(arrays):
        del arrays["params_init/agent/wm/rssm/initial"]
    assert "v3_continuous_vector.npz" in failures(changed(tmp_path, "v3_continuous_vector", change))


def test_parameters_are_judged_absolutely_and_gradients_by_their_maximum():
    assert parity.largest_error(np.full(3, 100.5), np.full(3, 100.0), "parameter") == 0.5
    assert parity.largest_error(np.array([1.0, 2.0]), np.array([1.0, 4.0]), "gradient") == 0.5
    assert parity.largest_error(np.array([1e-9]), np.array([0.0]), "gradient") == math.inf


# ------------------------------------------------------- it reads every setting of a fixture
OTHER_SETTINGS = {
    "horizon": 100, "return_lambda": 0.9, "actent": 0.01, "rssm.unimix": 0.02, "retnorm.decay": 0.9,
    "retnorm.max": 0.2, "retnorm.perclo": 10.0, "retnorm.perchi": 90.0, "slow_critic_fraction": 0.1,
    "dyn_loss.free": 0.5, "rep_loss.free": 1.5, "actor.minstd": 0.2, "actor.maxstd": 2.0,
    "model_opt.lr": 2e-3, "actor_opt.lr": 2e-3, "critic_opt.lr": 2e-3, "model_opt.clip": 2.0,
    "actor_opt.clip": 0.02, "critic_opt.clip": 0.5, "actor_opt.eps": 1e-3, "critic_opt.eps": 1e-3,
    "model_opt.eps": 1e-3, "loss_scales.vector": 0.5, "loss_scales.reward": 0.5,
    "loss_scales.cont": 0.5, "loss_scales.dyn": 0.6, "loss_scales.rep": 0.2,
    "loss_scales.actor": 0.5, "loss_scales.critic": 0.5, "loss_scales.slowreg": 0.5,
    "imag_horizon": 3, "rssm.deter": 23, "encoder.mlp_units": 17, "decoder.mlp_layers": 3,
}


def test_every_setting_is_read():
    """A fixture that claims another setting than the one its numbers came from cannot agree."""
    def agrees(config):
        fixture = Fixture(GOLDEN / f"{VECTOR}.npz")
        fixture.meta["config"] |= config
        for key in fixture.under("step3/"):  # two updates will do
            del fixture.arrays["step3/" + key]
        for key in fixture.under("batch3/"):
            del fixture.arrays["batch3/" + key]
        report = Report(quiet=True)
        try:
            parity_v3.check_agent(report, fixture)
        except Mismatch:
            return False
        return not report.failed

    assert agrees({})
    assert [key for key, value in OTHER_SETTINGS.items() if agrees({key: value})] == []


def test_settings_without_a_counterpart_are_announced(capsys):
    config = Fixture(GOLDEN / f"{VECTOR}.npz").meta["config"]
    parity_v3.announce_settings(Report(), config)
    assert not capsys.readouterr().out
    parity_v3.announce_settings(Report(), config | {"rssm.initial": "zeros", "some.new": 1})
    assert capsys.readouterr().out.splitlines() == [
        "note: setting rssm.initial = zeros; ours is always learned",
        "note: unknown setting some.new = 1"]


# ----------------------------------------------------------------- it notices wrong algorithms
def with_args(function, **changes):
    """The shipped function, called with other `args`."""
    return lambda *given: function(*given[:-1], dataclasses.replace(given[-1], **changes))


def wrong_lambda():
    shipped = d3.lambda_return
    return [(d3, "lambda_return", lambda r, v, d, lam: shipped(r, v, d, lam - 0.01))]


def rewards_of_the_state_before():
    shipped = d3.lambda_return
    return [(d3, "lambda_return", lambda r, v, d, lam: shipped(r.roll(1, 0), v, d, lam))]


def slow_critic_as_target():
    shipped, imagine, train, kept = (d3.lambda_return, d3.imagine, d3.Agent.train_actor_critic, {})

    def keep_feat(*given):
        kept["feat"] = (result := imagine(*given))[0]
        return result

    def keep_agent(self, *given):
        kept["agent"] = self
        return train(self, *given)

    def slow(reward, value, discount, lambda_):
        return shipped(reward, kept["agent"].slow_critic(kept["feat"]).mean(), discount, lambda_)
    return [(d3, "imagine", keep_feat), (d3.Agent, "train_actor_critic", keep_agent),
            (d3, "lambda_return", slow)]


def no_unimix():
    shipped = d3.OneHot.__init__
    return [(d3.OneHot, "__init__", lambda self, raw, unimix: shipped(self, raw, 0.0))]


def gru_without_update_bias():
    def gate(self, deter, parts):
        reset, cand, update = self.gru_norm(parts).chunk(3, -1)
        return deter.lerp(torch.tanh(reset.sigmoid() * cand), update.sigmoid())
    return [(d3.RSSM, "gate", gate)]


def clip_each_tensor_by_itself():
    def step(self, loss, retain_graph=False):
        grads = torch.autograd.grad(loss, self.params, retain_graph=retain_graph)
        norm = torch.nn.utils.get_total_norm(grads)
        for param, grad in zip(self.params, grads):
            param.grad = grad * (self.clip / grad.norm().clamp(min=self.clip))
        self.adam.step()
        return norm
    return [(d3.Optimizer, "step", step)]


def no_clipping():
    shipped = d3.Optimizer.__init__
    return [(d3.Optimizer, "__init__", lambda self, params, lr, eps, clip, *rest:
             shipped(self, params, lr, eps, 1e9, *rest))]


def clipped_actions_without_gradient():
    return [(d3, "within_unit", lambda action: action.clamp(-1, 1))]


def unclipped_actions():
    return [(d3, "within_unit", lambda action: action)]


def return_scale_of_the_update_before():
    shipped = d3.ReturnScale.update

    def update(self, ret):
        before = (self.range[1] - self.range[0]).clamp(min=self.limit)
        shipped(self, ret)
        return before
    return [(d3.ReturnScale, "update", update)]


def return_scale_below_one():
    shipped = d3.ReturnScale.update

    def update(self, ret):
        shipped(self, ret)
        return self.range[1] - self.range[0]
    return [(d3.ReturnScale, "update", update)]


def no_free_bits():
    return [(d3, "world_model_loss", with_args(d3.world_model_loss, free_bits=0.0))]


def swapped_kl_scales():
    return [(d3, "world_model_loss", with_args(d3.world_model_loss, beta_dyn=0.1, beta_rep=0.5))]


def detached_baseline():
    shipped = d3.actor_loss
    return [(d3, "actor_loss", lambda policy, action, ret, value, weight, scale, args:
             shipped(policy, action, ret, value.detach(), weight, scale, args))]


def no_entropy_bonus():
    return [(d3, "actor_loss", with_args(d3.actor_loss, actor_entropy=0.0))]


def no_regulariser():
    return [(d3, "critic_loss", with_args(d3.critic_loss, critic_ema_regularizer=0.0))]


def no_weights():
    shipped = d3.critic_loss
    return [(d3, "critic_loss", lambda value_dist, slow_value, ret, weight, args:
             shipped(value_dist, slow_value, ret, torch.ones_like(weight), args))]


def initial_state_of_zeros():
    shipped = d3.RSSM.initial_state
    return [(d3.RSSM, "initial_state", lambda self: [0 * x for x in shipped(self)])]


def no_reset_of_the_action():
    shipped = d3.within_unit
    return [(d3, "within_unit", lambda action:
             shipped(action) + 0.1 * (action == 0).all(-1, keepdim=True))]


def slow_critic_not_copied_at_first():
    shipped = d3.Agent.update_slow_critic

    def update(self):
        self.updates += 1
        shipped(self)
        self.updates -= 1
    return [(d3.Agent, "update_slow_critic", update)]


def two_hot_mean_outside_symlog():
    return [(d3.TwoHot, "mean", lambda self: self.logits.softmax(-1) @ d3.symexp(self.buckets))]


def no_symlog():
    return [(d3, "symlog", lambda x: x)]


def usual_norm_epsilon():
    shipped = d3.Dense.__init__

    def init(self, inputs, outputs):
        shipped(self, inputs, outputs)
        self.norm.eps = 1e-5
    return [(d3.Dense, "__init__", init)]


def images_from_minus_a_half():
    shipped = d3.Decoder.image
    return [(d3.Decoder, "image", lambda self, feat: shipped(self, feat) - 0.5)]


WRONG = [  # what is wrong, the fixture, one comparison that must fail, one that must not
    (wrong_lambda, VECTOR, "step1/imag/ret", "step1/imag/reward"),
    (rewards_of_the_state_before, VECTOR, "step1/imag/ret", "step1/wm/model_loss"),
    (slow_critic_as_target, VECTOR, "step1/critic/target", "step1/critic/slow_value"),
    (no_unimix, VECTOR, "step1/wm/post_logit", "step1/wm/embed"),
    (gru_without_update_bias, VECTOR, "step1/wm/post_deter", "step1/wm/embed"),
    (clip_each_tensor_by_itself, VECTOR, "params_after1/", "step1/wm/grad/"),
    (no_clipping, VECTOR, "adam_mu_after3/", "step1/wm/grad/"),
    (clipped_actions_without_gradient, VECTOR, "step1/actor/grad/", "step1/wm/model_loss"),
    (unclipped_actions, VECTOR, "step1/wm/post_deter", "step1/wm/embed"),
    (return_scale_of_the_update_before, VECTOR, "step1/actor/retnorm_invscale", "step1/imag/ret"),
    (return_scale_below_one, IMAGE, "step1/actor/loss", "step1/imag/ret"),
    (no_free_bits, VECTOR, "step1/wm/loss_unscaled/dyn", "step1/wm/loss_unscaled/reward"),
    (swapped_kl_scales, VECTOR, "step1/wm/grad/", "step1/wm/model_loss"),  # equal values
    (detached_baseline, VECTOR, "step1/actor/grad/", "step1/actor/loss"),
    (no_entropy_bonus, IMAGE, "step1/actor/loss", "step1/actor/policy_entropy"),
    (no_regulariser, VECTOR, "step1/critic/loss", "step1/critic/nll"),
    (no_weights, VECTOR, "step1/critic/loss", "step1/actor/loss"),
    (initial_state_of_zeros, VECTOR, "step1/wm/initial_deter", "step1/wm/embed"),
    (no_reset_of_the_action, VECTOR, "step1/wm/post_deter", "step1/wm/embed"),
    (slow_critic_not_copied_at_first, VECTOR, "params_after1/", "step1/critic/grad/"),
    (two_hot_mean_outside_symlog, VECTOR, "step1/wm/reward_mean", "step1/wm/reward_logits"),
    (no_symlog, VECTOR, "step1/wm/embed", "step1/wm/initial_deter"),
    (usual_norm_epsilon, VECTOR, "step1/wm/embed", "step1/wm/initial_deter"),
    (images_from_minus_a_half, IMAGE, "step1/wm/recon_image_b0_t0", "step1/wm/reward_mean"),
]


@pytest.mark.parametrize("wrong, name, noticed, unaffected", WRONG,
                         ids=[case[0].__name__ for case in WRONG])
def test_wrong_algorithm_is_noticed(wrong, name, noticed, unaffected):
    # `wraps` lends the names of the shipped arguments, which the recorders go by.
    with patched(*((owner, attribute, functools.wraps(getattr(owner, attribute))(new))
                   for owner, attribute, new in wrong())):
        failed = failures(GOLDEN / f"{name}.npz")
    assert any(line.startswith(noticed) for line in failed), failed[:5]
    assert not any(line == unaffected or line.startswith(f"{unaffected}*") for line in failed)


# -------------------------------------------- it can be set up for agents of every other kind
def their_shapes(c: dict, obs: dict, actions: int, discrete: bool) -> dict[str, tuple]:
    """The parameters that the authors' agent would have: name -> shape."""
    images, vectors = ([s for s in obs.values() if len(s) == n] for n in (3, 1))
    found, dim = {}, c["rssm.deter"] + c["rssm.stoch"] * c["rssm.classes"]
    wm, behavior, hidden = "agent/wm", "agent/task_behavior", c["rssm.units"]

    def hidden_layer(path, shape, channels):
        found.update({f"{path}/kernel": shape, f"{path}/norm/scale": (channels,),
                      f"{path}/norm/bias": (channels,)})

    def output(path, inputs, outputs):
        found.update({f"{path}/kernel": (inputs, outputs), f"{path}/bias": (outputs,)})

    def mlp(path, inputs, units, layers):
        for i in range(layers):
            hidden_layer(f"{path}/h{i}", (units if i else inputs, units), units)

    def head(path, key, outputs):
        mlp(path, dim, c[f"{key}.units"], c[f"{key}.layers"])
        for name, size in outputs.items():
            output(f"{path}/{name}", c[f"{key}.units"], size)

    embed = 0
    if images:
        stages, channels = int(math.log2(images[0][0] // 4)), sum(s[-1] for s in images)
        for i in range(stages):
            wide = c["encoder.cnn_depth"] * 2**i
            hidden_layer(f"{wm}/enc/cnn/s{i}res", (4, 4, wide // 2 if i else channels, wide), wide)
        embed, wide = 16 * wide, c["decoder.cnn_depth"] * 2 ** (stages - 1)
        output(f"{wm}/dec/cnn/in", dim, 16 * wide)
        for i in range(stages - 1):
            hidden_layer(f"{wm}/dec/cnn/s{i}res", (4, 4, wide // 2, wide), wide // 2)
            wide //= 2
        found.update({f"{wm}/dec/cnn/s{stages - 1}res/kernel": (4, 4, channels, wide),
                      f"{wm}/dec/cnn/s{stages - 1}res/bias": (channels,)})
    if vectors:
        inputs = sum(s[0] for s in vectors)
        mlp(f"{wm}/enc/mlp", inputs, c["encoder.mlp_units"], c["encoder.mlp_layers"])
        mlp(f"{wm}/dec/mlp", dim, c["decoder.mlp_units"], c["decoder.mlp_layers"])
        embed += c["encoder.mlp_units"]
        for key, shape in obs.items():
            if len(shape) == 1:
                output(f"{wm}/dec/mlp/dist_{key}/out", c["decoder.mlp_units"], shape[0])
    deter, latent = c["rssm.deter"], dim - c["rssm.deter"]
    found[f"{wm}/rssm/initial"] = (deter,)
    hidden_layer(f"{wm}/rssm/img_in", (latent + actions, hidden), hidden)
    hidden_layer(f"{wm}/rssm/gru", (deter + hidden, 3 * deter), 3 * deter)
    hidden_layer(f"{wm}/rssm/img_out", (deter, hidden), hidden)
    hidden_layer(f"{wm}/rssm/obs_out", (deter + embed, hidden), hidden)
    output(f"{wm}/rssm/img_stats", hidden, latent)
    output(f"{wm}/rssm/obs_stats", hidden, latent)
    head(f"{wm}/rew", "reward_head", {"dist_out/out": c["reward_head.bins"]})
    head(f"{wm}/cont", "cont_head", {"dist_out/out": 1})
    both = {"dist_out/out": actions} | ({} if discrete else {"dist_out/std": actions})
    head(f"{behavior}/ac/actor", "actor", both)
    for net in ("net", "slow"):
        head(f"{behavior}/critic/{net}", "critic", {"dist_out/out": c["critic.bins"]})
    return found


def made_up(path: Path, obs: dict, actions: int, discrete: bool, config: dict,
            length: int = 5, rows: int = 2) -> Path:
    """A fixture with random weights and batches, but nothing to compare."""
    meta = json.loads(str(Fixture(GOLDEN / f"{VECTOR}.npz").arrays["meta/json"]))
    config = meta["config"] | config
    meta |= {"config": config, "obs_order": list(obs), "action_dim": actions,
             "action_discrete": discrete,
             "obs": {k: [list(s), "uint8" if len(s) == 3 else "float32"] for k, s in obs.items()}}
    rng, arrays = np.random.default_rng(0), {"meta/json": np.array(json.dumps(meta))}
    for name, shape in their_shapes(config, obs, actions, discrete).items():
        size = 0.5 / math.sqrt(math.prod(shape[:-1])) if len(shape) > 1 else 0.1
        arrays[f"params_init/{name}"] = np.float32(
            rng.normal(size=shape) * size + name.endswith("scale"))
    arrays |= {"retnorm_init/low": np.float32(0), "retnorm_init/high": np.float32(3)}
    lead = (rows, length)
    for n in (1, 2):
        for key, shape in obs.items():
            arrays[f"batch{n}/{key}"] = np.float32(rng.normal(size=lead + shape)) if (
                len(shape) == 1) else rng.integers(256, size=lead + shape, dtype=np.uint8)
        onehot = np.eye(actions, dtype=np.float32)[rng.integers(actions, size=lead)]
        arrays[f"batch{n}/action"] = onehot if discrete else np.float32(
            rng.normal(size=(*lead, actions)))
        arrays[f"batch{n}/reward"] = np.float32(rng.normal(size=lead))
        for key in ("is_first", "is_last", "is_terminal"):
            arrays[f"batch{n}/{key}"] = rng.random(lead) < 0.2
        groups, classes = config["rssm.stoch"], config["rssm.classes"]
        chosen = rng.integers(classes, size=(rows, groups))
        arrays |= {f"step{n}/carry_in/latent/deter":
                   np.float32(rng.normal(size=(rows, config["rssm.deter"]))),
                   f"step{n}/carry_in/latent/stoch": np.eye(classes, dtype=np.float32)[chosen],
                   f"step{n}/carry_in/action": arrays[f"batch{n}/action"][:, 0]}
    np.savez(path, **arrays)
    return path


KINDS = {  # observations, actions, discrete, settings
    "continuous image": ({"image": (16, 16, 3)}, 2, False, {"encoder.cnn_depth": 3,
                                                            "decoder.cnn_depth": 2}),
    "discrete vectors": ({"a": (3,), "zz": (1,), "b": (4,)}, 4, True, {"encoder.mlp_layers": 3,
                                                                       "critic.bins": 41}),
    "image and vector": ({"pose": (3,), "camera": (8, 8, 1)}, 3, True,
                         {"encoder.cnn_depth": 4, "decoder.cnn_depth": 5, "imag_horizon": 2,
                          "actor.layers": 1, "critic.units": 9, "reward_head.bins": 63,
                          "actor.unimix": 0.1, "rssm.unimix": 0.02}),
    "two images": ({"left": (8, 8, 3), "right": (8, 8, 1)}, 3, False, {"encoder.cnn_depth": 4,
                                                                       "decoder.cnn_depth": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_agents_of_other_kinds_and_sizes(tmp_path, kind):
    """The set-up finds a place for every weight, and recording leaves the updates as they are."""
    obs, actions, discrete, config = KINDS[kind]
    path = made_up(tmp_path / "made_up.npz", obs, actions, discrete, config)
    twin = parity_v3.Twin(Fixture(path))
    arrays = dict(np.load(path))
    with patched(*parity_v3.rule()):
        for n in (1, 2):
            twin.agent.train_step(twin.batch(n), twin.carry(n))
            arrays |= {f"params_after{n}/{name}": x.numpy().copy()
                       for name, x in twin.in_layout(twin.params()).items()}
    np.savez(path, **arrays)
    failed = failures(path)
    assert failed == ["step2/carry_in/" + k for k in ("latent/deter", "latent/stoch", "action")]
    assert twin.spec == EnvSpec(twin.image_shape(), sum(s[0] for s in obs.values() if len(s) == 1),
                                actions, discrete)


def test_loss_scales_that_differ_are_applied(tmp_path):
    """Scales that are one flag in ours: the model's loss must be the sum of theirs."""
    scales = {"vector": 0.7, "reward": 2.0, "cont": 3.0, "dyn": 0.4, "rep": 0.3}
    config = {f"loss_scales.{key}": scale for key, scale in scales.items()}
    path = made_up(tmp_path / "made_up.npz", {"a": (3,)}, 2, True,
                   config | {"rep_loss.free": 3.0, "dyn_loss.free": 0.01})
    twin, log = parity_v3.Twin(Fixture(path)), {}
    with patched(*parity_v3.rule(), parity_v3.recorder(log, parity_v3, "term_gradients")):
        losses, *_ = d3.world_model_loss(twin.agent.world_model, twin.batch(1), twin.carry(1),
                                         twin.args)
        parity_v3.check_update(Report(quiet=True), twin, 1)
    scaled = log["term_gradients"].losses
    kl = losses["dyn"].detach() / twin.args.beta_dyn
    expected = {"vector": 0.7 * losses["vector"], "reward": 2 * losses["reward"],
                "continue": 3 * losses["continue"], "dyn": 0.4 * kl, "rep": 0.3 * kl.clamp(min=3.0)}
    assert set(scaled) == set(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(scaled[name], loss, msg=name)
