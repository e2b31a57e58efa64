"""Our numbers equal the authors' (`tests.parity`), and the comparison notices when they do not."""

import dataclasses
import functools
import inspect
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dreamer_v1 as d1
import dreamer_v2 as d2
import dreamer_v3 as d3
import dreamer_v3_2025 as d4
from tests import parity, parity_v1, parity_v2, parity_v3, parity_v3_2025
from tests.parity import Fixture, Report, check_fixture, patched

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
VERSIONS = {"v1": parity_v1, "v2": parity_v2, "v3": parity_v3, "v3_2025": parity_v3_2025}
FIXTURES = [(version, name) for version, names in {
    "v1": ["math", "cont", "cont_pcont", "disc_pcont"],
    "v2": ["math", "atari", "dmc_vision", "dmc_proprio", "crafter_layernorm"],
    "v3": ["v3_math", "v3_discrete_image", "v3_continuous_vector"],
    "v3_2025": ["math", "discrete_image", "continuous_vector"]}.items() for name in names]
VECTOR, IMAGE = ("v3", "v3_continuous_vector"), ("v3", "v3_discrete_image")
PROPRIO, ATARI, CONT, PCONT = ("v2", "dmc_proprio"), ("v2", "atari"), ("v1", "cont"), ("v1", "cont_pcont")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are faster on one thread, and sums come out the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fixture(version: str, name: str, updates: int = 3) -> Fixture:
    """A fixture, or the first updates of it."""
    found = Fixture(GOLDEN / version, name)
    for n in range(updates + 1, 4):
        for key in [*found.under("")]:
            if key.startswith((f"step{n}/", f"batch{n}/", f"after{n}/")) or f"_after{n}/" in key:
                del found.arrays[key]
    return found


def failures(version: str, given: Fixture) -> list[str]:
    """Names of the comparisons that fail."""
    report = Report(quiet=True)
    check_fixture(report, given, VERSIONS[version])
    return [name.split(": ", 1)[1] for name in report.failed]


# ------------------------------------------------------------------------------------------------ it agrees
@pytest.mark.parametrize("version, name", FIXTURES)
def test_fixture_agrees(version, name):
    assert not failures(version, fixture(version, name))


def test_every_fixture_is_tested():
    paths = GOLDEN.glob("*/*.npz")
    assert {(path.parent.name, re.sub(parity.PARTS, "", path.stem)) for path in paths} == set(FIXTURES)


def test_command_line(tmp_path):
    shutil.copy(GOLDEN / "v1" / "math.npz", tmp_path)
    done = subprocess.run([sys.executable, "-m", "tests.parity", "v1", tmp_path], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(" 0 failed")
    assert "ignored: " in done.stdout and "largest forward error" in done.stdout
    with patched((d1, "lambda_return", lambda reward, *_: reward)):
        assert parity.main(["v1", str(tmp_path)], quiet=True) == 1


@pytest.mark.parametrize("argv", [[], ["v9"], ["v3", "a", "b"], ["v3", "/nonexistent"]])
def test_nothing_to_compare_is_status_2(argv, capsys):
    try:
        status = parity.main(argv)
    except SystemExit as leaving:
        status = leaving.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and err


def test_slack_widens_every_tolerance(tmp_path, capsys):
    """As benchmarks/gpu.py asks for on a GPU; errors of the true fixtures are far from 0."""
    for path in (ROOT / "tests" / "golden" / "v1").glob("disc_pcont*"):
        shutil.copy(path, tmp_path)
    assert parity.main(["v1", str(tmp_path), "--slack", "10", "--device", "cpu"], quiet=True) == 0
    assert parity.main(["v1", str(tmp_path), "--slack", "1e-4"], quiet=True) == 1


# --------------------------------------------------------------------------------- it notices wrong numbers
def scaled(array):
    return array * np.where(np.arange(array.size) == 5, 1 + 1e-3, 1).reshape(array.shape)


GRADIENT = "grad/actor/actor/dense1/bias"
NOTICED = [  # what is done to an array of a fixture, and what fails then
    ("v3", "v3_math", "lambda/return", scaled, "lambda/return"),
    ("v2", "math", "lam/ret_lambda0.95", scaled, "lam/ret_lambda0.95"),
    ("v1", "math", "kl/value", lambda x: np.where(x == x.max(), np.nan, x), "kl/value"),
    ("v3", "v3_math", "onehot/entropy_p", lambda x: x[:, None], "onehot/entropy_p"),
    ("v3", "v3_math", "something/new", lambda _: np.zeros(3), "something/new"),
    ("v2", "dmc_proprio", GRADIENT, lambda x: x + np.nan,
     "grad/actor/* (12 tensors, worst actor/dense1/bias)"),
    ("v2", "dmc_proprio", GRADIENT, None, "grad/actor/"),
    ("v2", "dmc_proprio", "after1/actor/dense1/bias", lambda x: x + 3e-6,
     "after1/* (76 tensors, worst actor/dense1/bias)"),
    ("v2", "dmc_proprio", "init/actor/dense9/bias", lambda _: np.zeros(3, np.float32), "dmc_proprio"),
    ("v2", "dmc_proprio", "init/target_critic/dense0/bias", None, "dmc_proprio"),
    ("v2", "dmc_proprio", "init/critic/dense0/bias", lambda x: x[:-1], "dmc_proprio"),
]


@pytest.mark.parametrize("version, name, key, change, noticed", NOTICED)
def test_a_change_is_noticed(version, name, key, change, noticed):
    given = fixture(version, name, updates=1)
    array = given.arrays.pop(key, None)
    if change:
        given.arrays[key] = change(array)
    assert noticed in failures(version, given)


def test_scales_of_errors():
    report = Report()
    a, b = np.array([1.0, 1.0, 2.0]), np.array([1.0, 1.0, 4.0])
    for report.rms, relative in ((False, 0.5), (True, 2 / math.sqrt(6))):
        assert report.error(a + 99, b + 99, "parameter") == 2.0
        assert report.error(a, b, "forward") == 0.5
        assert report.error(a, b, "gradient") == pytest.approx(relative)
        assert report.error(np.array([1e-9]), np.array([0.0]), "gradient") == math.inf
        assert math.isnan(report.error(a * np.nan, b, "forward"))


# ------------------------------------------------------------------------ it reads every setting of a fixture
SETTINGS = {
    VECTOR: {
        "horizon": 100, "return_lambda": 0.9, "actent": 0.01, "rssm.unimix": 0.02, "retnorm.decay": 0.9,
        "retnorm.max": 0.2, "retnorm.perclo": 10.0, "retnorm.perchi": 90.0, "slow_critic_fraction": 0.1,
        "dyn_loss.free": 0.5, "rep_loss.free": 1.5, "actor.minstd": 0.2, "actor.maxstd": 2.0,
        "model_opt.lr": 2e-3, "actor_opt.lr": 2e-3, "critic_opt.lr": 2e-3, "model_opt.clip": 2.0,
        "actor_opt.clip": 0.02, "critic_opt.clip": 0.5, "actor_opt.eps": 1e-3, "critic_opt.eps": 1e-3,
        "model_opt.eps": 1e-3, "loss_scales.vector": 0.5, "loss_scales.reward": 0.5, "loss_scales.cont": 0.5,
        "loss_scales.dyn": 0.6, "loss_scales.rep": 0.2, "loss_scales.actor": 0.5, "loss_scales.critic": 0.5,
        "loss_scales.slowreg": 0.5, "imag_horizon": 3, "rssm.deter": 23, "encoder.mlp_units": 17,
        "decoder.mlp_layers": 3},
    PROPRIO: {
        "rssm.hidden": 17, "rssm.stoch": 5, "encoder.mlp_layers": [16, 16], "decoder.mlp_layers": [17] * 4,
        "actor.units": 9, "critic.layers": 3, "reward_head.units": 15, "rssm.norm": "layer",
        "loss_scales.kl": 0.5, "loss_scales.reward": 2.0, "kl.balance": 0.7, "kl.free": 4.0,
        "pred_discount": True, "clip_rewards": "tanh", "imag_horizon": 4, "discount": 0.98,
        "discount_lambda": 0.9, "actor_grad": "reinforce", "actor_ent": 1e-2, "actor.min_std": 0.2,
        "model_opt.wd": 1e-4, "actor_opt.wd": 1e-4, "model_opt.lr": 4e-4, "actor_opt.clip": 0.1,
        "critic_opt.eps": 1e-3},
    ATARI: {"loss_scales.discount": 1.0, "actor_grad": "both", "decoder.cnn_depth": 5},
    PCONT: {
        "deter_size": 23, "num_units": 15, "cnn_depth": 5, "pcont": False, "pcont_scale": 5.0,
        "kl_scale": 2.0, "free_nats": 1.0, "clip_rewards": "tanh", "horizon": 4, "discount": 0.98,
        "disclam": 0.9, "action_init_std": 4.0, "model_lr": 7e-4, "actor_lr": 9e-5, "value_lr": 9e-5,
        "grad_clip": 0.01},
}


@pytest.mark.parametrize("version, name", SETTINGS)
def test_every_setting_is_read(version, name):
    """A fixture that claims another setting than the one its numbers came from cannot agree."""
    def agrees(config):
        given = fixture(version, name, updates=2 if version == "v3" else 1)
        given.meta["config"] |= config
        return not failures(version, given)

    assert agrees({})
    assert [key for key, value in SETTINGS[version, name].items() if agrees({key: value})] == []


def test_settings_without_a_counterpart_are_announced(capsys):
    given = fixture(*VECTOR)
    given.meta["config"]["rssm.initial"] = "zeros"
    parity_v3.Twin(given, Report())
    note = "note: setting rssm.initial = zeros; ours is always learned"
    assert capsys.readouterr().out.splitlines() == [note]


# ------------------------------------------------------------------------------ it notices wrong algorithms
def with_args(owner, name, place=-1, **changes):
    """The shipped function, called with other `args`."""
    shipped = getattr(owner, name)

    def call(*given):
        given = list(given)
        given[place] = dataclasses.replace(given[place], **changes)
        return shipped(*given)
    return owner, name, call


def given_other(owner, name, **changes):
    """The shipped function, called with other arguments."""
    shipped = getattr(owner, name)
    signature = inspect.signature(shipped)

    def call(*given):
        arguments = signature.bind(*given).arguments
        return shipped(**arguments | {key: change(arguments[key]) for key, change in changes.items()})
    return owner, name, call


def changed_init(owner, **changes):
    """The shipped class, whose instances have other attributes from the start."""
    shipped = owner.__init__

    def init(self, *given, **named):
        shipped(self, *given, **named)
        vars(self).update({key: change(self) for key, change in changes.items()})
    return owner, "__init__", init


def models_step_first():
    """V1: the world model's step before the imagination."""
    grads, apply = d1.Optimizer.grads, d1.Optimizer.apply

    def apply_at_once(self, *given, **named):
        found = grads(self, *given, **named)
        self.norm = apply(self, found)
        return found
    return [(d1.Optimizer, "grads", apply_at_once), (d1.Optimizer, "apply", lambda self, _: self.norm)]


def gru_without_update_bias(d):
    def forward(self, x, deter):
        reset, cand, update = self.norm(self.linear(torch.cat([deter, x], -1))).chunk(3, -1)
        return deter.lerp(torch.tanh(reset.sigmoid() * cand), update.sigmoid())
    return [(d.NormGRUCell, "forward", forward)]


def clip_each_tensor_by_itself(d):
    shipped = d.Optimizer.apply

    def apply(self, grads):
        shipped(self, tuple(grad * (self.clip / grad.norm().clamp(min=self.clip)) for grad in grads))
        return torch.nn.utils.get_total_norm(grads)
    return [(d.Optimizer, "apply", apply)]


def slow_critic_not_copied_at_first(d):
    shipped = d.Agent.update_slow_critic

    def update(self):
        self.updates += 1
        shipped(self)
        self.updates -= 1
    return [(d.Agent, "update_slow_critic", update)]


def scale_of_the_update_before(self, ret, shipped=d3.ReturnScale.update):
    before = (self.range[1] - self.range[0]).clamp(min=self.limit)
    shipped(self, ret)
    return before


def clipped_sample(self):
    return d2.Gaussian.sample(self).clamp(-1 + 1e-6, 1 - 1e-6)


WRONG = {  # what is wrong: patches, the fixture, one comparison that must fail, one that must not
    "v3 lambda": (lambda: [given_other(d3, "lambda_return", lambda_=lambda x: x - 0.01)],
                  VECTOR, "step1/imag/ret", "step1/imag/reward"),
    "v3 no unimix": (lambda: [changed_init(d3.OneHot, probs=lambda self: self.raw.softmax(-1))],
                     VECTOR, "step1/wm/post_logit", "step1/wm/embed"),
    "v3 GRU": (lambda: gru_without_update_bias(d3), VECTOR, "step1/wm/post_deter", "step1/wm/embed"),
    "v3 clipping": (lambda: clip_each_tensor_by_itself(d3), VECTOR, "params_after1/", "step1/wm/grad/"),
    "v3 no clipping": (lambda: [changed_init(d3.Optimizer, clip=lambda _: 1e9)],
                       VECTOR, "adam_mu_after3/", "step1/wm/grad/"),
    "v3 clipped actions": (lambda: [(d3, "within_unit", lambda action: action.clamp(-1, 1))],
                           VECTOR, "step1/actor/grad/", "step1/wm/model_loss"),
    "v3 return scale": (lambda: [(d3.ReturnScale, "update", scale_of_the_update_before)],
                        VECTOR, "step1/actor/retnorm_invscale", "step1/imag/ret"),
    "v3 no free bits": (lambda: [with_args(d3, "world_model_loss", free_bits=0.0)],
                        VECTOR, "step1/wm/loss_unscaled/dyn", "step1/wm/loss_unscaled/reward"),
    "v3 baseline": (lambda: [given_other(d3, "actor_loss", baseline=torch.Tensor.detach)],
                    VECTOR, "step1/actor/grad/", "step1/actor/loss"),
    "v3 no entropy": (lambda: [with_args(d3, "actor_loss", actor_entropy=0.0)],
                      IMAGE, "step1/actor/loss", "step1/actor/policy_entropy"),
    "v3 no regulariser": (lambda: [with_args(d3, "critic_loss", critic_ema_regularizer=0.0)],
                          VECTOR, "step1/critic/loss", "step1/critic/nll"),
    "v3 no weights": (lambda: [given_other(d3, "critic_loss", weight=torch.ones_like)],
                      VECTOR, "step1/critic/loss", "step1/actor/loss"),
    "v3 slow critic": (lambda: slow_critic_not_copied_at_first(d3),
                       VECTOR, "params_after1/", "step1/critic/grad/"),
    "v3 no symlog": (lambda: [(d3, "symlog", lambda x: x)],
                     VECTOR, "step1/wm/embed", "step1/wm/initial_deter"),
    "v2 GRU": (lambda: gru_without_update_bias(d2), PROPRIO, "step1/post/deter", "step1/embed"),
    "v2 clipping": (lambda: clip_each_tensor_by_itself(d2), ("v2", "math"), "adam/2/", "adam/0/a"),
    "v2 Adam's epsilon": (lambda: [changed_init(d2.Optimizer, eps=lambda self: 30 * self.eps)],
                          PROPRIO, "after1/", "grad/model/"),
    "v2 no weight decay": (lambda: [with_args(d2.Agent, "__init__", 1, weight_decay=0.0)],
                           PROPRIO, "after3/", "grad/model/"),
    "v2 no KL balance": (lambda: [with_args(d2, "world_model_loss", kl_balance=0.5)],
                         PROPRIO, "grad/model/", "step1/model_loss"),
    "v2 return of its own state": (lambda: [given_other(d2, "actor_loss", ret=lambda x: x.roll(1, 0))],
                                   PROPRIO, "step1/actor_loss", "step1/critic_loss"),
    "v2 no baseline": (lambda: [given_other(d2, "actor_loss", baseline=torch.zeros_like)],
                       ATARI, "step1/actor_loss", "step1/critic_loss"),
    "v2 entropy": (lambda: [(d2.TruncatedNormal, "entropy", d2.Gaussian.entropy)],
                   PROPRIO, "step1/imag/entropy", "step1/imag/target"),
    "v2 sampler's gradient": (lambda: [(d2.TruncatedNormal, "sample", clipped_sample)],
                              ("v2", "math"), "trunc/grad_sum_sample", "trunc/sample_det"),
    "v2 slow critic": (lambda: slow_critic_not_copied_at_first(d2), PROPRIO, "after1/", "grad/critic/"),
    "v1 Adam's epsilon": (lambda: [changed_init(d1.Optimizer, eps=lambda self: 30 * self.eps)],
                          CONT, "after1/", "grad/model/"),
    "v1 model first": (models_step_first, CONT, "step1/imag/reward", "step1/model_loss"),
    "v1 no free nats": (lambda: [with_args(d1, "world_model_loss", free_nats=0.0)],
                        PCONT, "step1/div", "step1/div_raw"),
    "v1 ends without gamma": (lambda: [with_args(d1, "world_model_loss", gamma=1.0)],
                              PCONT, "step1/pcont_logprob", "step1/kl"),
    "v1 detached value": (lambda: [given_other(d1, "lambda_return", next_value=torch.Tensor.detach)],
                          CONT, "grad/actor/", "step1/actor_loss"),
    "v1 no exploration": (lambda: [with_args(d1, "explore", 0, expl_amount=0.0)],
                          CONT, "policy/obs1_action", "policy/obs1_latent/deter"),
}


VECTOR_2025, IMAGE_2025 = ("v3_2025", "continuous_vector"), ("v3_2025", "discrete_image")


def blind_to_the_context(self, batch):
    return self.zero_state(batch.reward.shape[1])


def adams_order(self, grads):
    """RMS of today for the mean of all gradients."""
    self.step += 1
    for param, mu, nu, grad in zip(self.params, self.mu, self.nu, grads):
        mu.lerp_(grad, 1 - self.beta1)
        nu.lerp_(grad.square(), 1 - self.beta2)
        root = (nu / (1 - self.beta2**self.step)).sqrt() + self.eps
        param.data -= self.lr * mu / (1 - self.beta1**self.step) / root
    return torch.nn.utils.get_total_norm(grads)


def ends_at_terminals_only(batch):
    """As if an episode that a time limit cuts off went on with the next one."""
    is_first = torch.zeros_like(batch.is_first)
    is_first[1:] = batch.is_terminal[:-1]
    return batch._replace(is_first=is_first)


WRONG |= {
    "2025 lambda": (lambda: [given_other(d4, "lambda_return", lambda_=lambda x: x - 0.01)],
                    VECTOR_2025, "step1/imag/ret", "step1/imag/reward[1:]"),
    "2025 context row": (lambda: [(d4.Agent, "carry", blind_to_the_context)],
                         VECTOR_2025, "step1/wm/post_deter", "step1/wm/embed"),
    "2025 warm-up": (lambda: [changed_init(d4.Optimizer, warmup=lambda self: self.warmup + 1)],
                     IMAGE_2025, "params_after2/", "step1/grad/"),
    "2025 no clipping": (lambda: [changed_init(d4.Optimizer, agc=lambda _: 1e9)],
                         VECTOR_2025, "opt_after3/state/1/1/", "step1/grad/"),
    "2025 Adam": (lambda: [(d4.Optimizer, "apply", adams_order)], VECTOR_2025, "params_after2/", "step1/grad/"),
    "2025 mixture in the actor": (lambda: [with_args(d4.Agent, "__init__", 1, actor_unimix=0.01)],
                                  IMAGE_2025, "step1/actor/logprob", "step1/imag/value"),
    "2025 time limits": (lambda: [given_other(d4, "replay_critic_loss", batch=ends_at_terminals_only)],
                         IMAGE_2025, "step1/repval/ret", "step1/loss/value"),
    "2025 no replayed value": (lambda: [with_args(d4.Agent, "__init__", 1, beta_replay=0.0)],
                               VECTOR_2025, "step1/total_loss", "step1/loss/repval"),
    "2025 continue without gamma": (lambda: [with_args(d4, "world_model_loss", gamma=1.0)],
                                    VECTOR_2025, "step1/loss/con", "step1/loss/rew"),
    "2025 actions not rescaled": (lambda: [(d4, "within_unit", lambda action: action)],
                                  VECTOR_2025, "step1/wm/post_deter", "step1/wm/embed"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_algorithm_is_noticed(wrong):
    patches, (version, name), noticed, unaffected = WRONG[wrong]
    # `wraps` lends the names of the shipped arguments, which the recorders go by.
    with patched(*((owner, attribute, functools.wraps(getattr(owner, attribute))(new))
                   for owner, attribute, new in patches())):
        failed = failures(version, fixture(version, name))
    assert any(line.startswith(noticed) for line in failed), failed[:5]
    assert not any(line == unaffected or line.startswith(f"{unaffected}*") for line in failed)


# ----------------------------------------------------------------- it can be set up for agents of other sizes
SHAPES = {  # kernels of agents whose sizes differ; ^: transposed, *: with a norm for the bias, !: no kernel
    "v3": """wm/enc/cnn/s0res* 4 4 1 4, wm/enc/mlp/h0* 5 6, wm/enc/mlp/h1* 6 6, wm/dec/cnn/in 23 80,
        wm/dec/cnn/s0res^ 4 4 1 5, wm/dec/mlp/h0* 23 5, wm/dec/mlp/dist_pose/out 5 3,
        wm/dec/mlp/dist_joints/out 5 2, wm/rssm/initial! 11, wm/rssm/img_in* 15 7, wm/rssm/gru* 18 33,
        wm/rssm/img_out* 11 7, wm/rssm/img_stats 7 12, wm/rssm/obs_out* 81 7, wm/rssm/obs_stats 7 12,
        wm/rew/h0* 23 9, wm/rew/h1* 9 9, wm/rew/dist_out/out 9 21, wm/cont/h0* 23 8, wm/cont/dist_out/out 8 1,
        task_behavior/ac/actor/h0* 23 10, task_behavior/ac/actor/dist_out/out 10 3,
        task_behavior/critic/net/h0* 23 14, task_behavior/critic/net/dist_out/out 14 31,
        task_behavior/critic/slow/h0* 23 14, task_behavior/critic/slow/dist_out/out 14 31""",
    "v2": """encoder/conv0 4 4 1 2, encoder/conv1 4 4 2 4, encoder/conv2 4 4 4 8, encoder/conv3 4 4 8 16,
        encoder/dense0 5 6, encoder/dense1 6 6, decoder/convin 23 96, decoder/conv0^ 5 5 12 96,
        decoder/conv1^ 5 5 6 12, decoder/conv2^ 6 6 3 6, decoder/conv3^ 6 6 1 3, decoder/dense0 23 5,
        decoder/dense_pose/out 5 3, decoder/dense_joints/out 5 2, rssm/img_in 15 7, rssm/gru/dense 18 33,
        rssm/gru/norm/gamma! 33, rssm/gru/norm/beta! 33, rssm/img_out_0 11 7, rssm/img_dist_0 7 12,
        rssm/obs_out 81 7, rssm/obs_dist 7 12, reward/dense0 23 9, reward/dense1 9 9, reward/out/out 9 1,
        discount/dense0 23 8, discount/out/out 8 1, actor/dense0 23 10, actor/out/out 10 3,
        actor/out/std 10 3, critic/dense0 23 14, critic/out/out 14 1, target_critic/dense0 23 14,
        target_critic/out/out 14 1""",
    "v1": """encode/h1 4 4 1 2, encode/h2 4 4 2 4, encode/h3 4 4 4 8, encode/h4 4 4 8 16, decode/h1 23 64,
        decode/h2^ 5 5 8 64, decode/h3^ 5 5 4 8, decode/h4^ 6 6 2 4, decode/h5^ 6 6 1 2, dynamics/img1 15 11,
        dynamics/img2 11 11, dynamics/img3 11 24, dynamics/obs1 75 11, dynamics/obs2 11 24,
        dynamics/cell/kernel! 11 33, dynamics/cell/recurrent_kernel! 11 33, dynamics/cell/bias! 2 33,
        reward/h0 23 9, reward/hout 9 1, pcont/h0 23 9, pcont/h1 9 9, pcont/hout 9 1, value/h0 23 9,
        value/hout 9 1, actor/h0 23 9, actor/h1 9 9, actor/hout 9 3""",
}
SIZES = {  # the settings that belong to them
    "v3": {"rssm.deter": 11, "rssm.units": 7, "rssm.stoch": 3, "rssm.classes": 4, "encoder.cnn_depth": 4,
           "encoder.mlp_units": 6, "encoder.mlp_layers": 2, "decoder.cnn_depth": 5, "decoder.mlp_units": 5,
           "decoder.mlp_layers": 1, "reward_head.units": 9, "reward_head.layers": 2, "reward_head.bins": 21,
           "cont_head.units": 8, "cont_head.layers": 1, "actor.units": 10, "actor.layers": 1,
           "critic.units": 14, "critic.layers": 1, "critic.bins": 31, "imag_horizon": 2, "actor.unimix": 0.1},
    "v2": {"rssm.deter": 11, "rssm.hidden": 7, "rssm.stoch": 3, "rssm.discrete": 4, "encoder.cnn_depth": 2,
           "encoder.mlp_layers": [6, 6], "decoder.cnn_depth": 3, "decoder.mlp_layers": [5],
           "reward_head.units": 9, "reward_head.layers": 2, "discount_head.units": 8,
           "discount_head.layers": 1, "actor.units": 10, "actor.layers": 1, "critic.units": 14,
           "critic.layers": 1, "imag_horizon": 2},
    "v1": {"deter_size": 11, "stoch_size": 12, "num_units": 9, "cnn_depth": 2, "horizon": 3},
}


def made_up(version: str) -> Fixture:
    """A fixture of those sizes with random weights and two random batches, but nothing to compare.

    Actions are discrete in V3 and V1; ends are predicted in all."""
    rng, (rows, length), size = np.random.default_rng(0), (2, 5), 8 if version == "v3" else 64
    given = fixture(*{"v3": VECTOR, "v2": ATARI, "v1": ("v1", "disc_pcont")}[version])
    obs = {"pose": (3,), "camera": (size, size, 1), "joints": (2,)}
    obs = {key: shape for key, shape in obs.items() if version != "v1" or key == "camera"}
    given.meta |= {"config": given.meta["config"] | SIZES[version], "action_dim": 3, "obs_order": list(obs),
                   "obs": {key: [shape] for key, shape in obs.items()},
                   "action_discrete" if version == "v3" else "discrete": version != "v2"}

    def normal(*shape):
        return np.float32(rng.normal(size=shape) * 0.3)
    given.arrays, init = {}, VERSIONS[version].Twin.init + "agent/" * (version == "v3")
    for path, *shape in (entry.split() for entry in SHAPES[version].split(",")):
        shape, name = [int(x) for x in shape], init + path.rstrip("*^!")
        kernel = {name: normal(*shape)} if path[-1] == "!" else {f"{name}/kernel": normal(*shape)}
        bias = {"*": ["norm/scale", "norm/bias"], "!": []}.get(path[-1], ["bias"])
        outputs = shape[-2 if path[-1] == "^" else -1]
        given.arrays |= kernel | {f"{name}/{part}": normal(outputs) + (part[-1] == "e") for part in bias}
    for n in (1, 2):
        batch = {key: normal(rows, length, *shape) if len(shape) == 1 else rng.integers(
            256, size=(rows, length, *shape), dtype=np.uint8) for key, shape in obs.items()}
        batch |= {key: rng.random((rows, length)) < 0.2 for key in ("is_first", "is_last", "is_terminal")}
        batch["is_first"][:, 0] = True
        onehot = np.eye(3, dtype=np.float32)[rng.integers(3, size=(rows, length))]
        batch |= {"action": onehot, "reward": normal(rows, length)}
        batch |= {"discount": 1 - np.float32(batch["is_last"])} if version == "v1" else {}
        carry = {"action": onehot[:, 0], "latent/deter": normal(rows, 11), "latent/stoch": normal(rows, 3, 4)}
        given.arrays |= {f"batch{n}/{key}": x for key, x in batch.items()} | {
            f"step{n}/carry_in/{key}": x for key, x in carry.items()}
    given.arrays |= {f"retnorm_init/{key}": np.float32(x) for key, x in (("low", 0), ("high", 3))}
    return given


@pytest.mark.parametrize("version", SHAPES)
def test_other_sizes(version):
    """The set-up finds a place for every weight, and recording leaves the updates as they are."""
    given, module = made_up(version), VERSIONS[version]
    twin, after = module.Twin(given), "params_after{}/" if version == "v3" else "after{}/"
    twin.last = twin.agent.zero_state(twin.rows)  # V2's carry: without effect where is_first
    with patched(*parity.rule(module.Twin.script)):
        for n in (1, 2):
            twin.agent.train_step(twin.batch(n), twin.carry(n))
            params = list(twin.agent.parameters())
            given.arrays |= {after.format(n) + name: x.numpy().copy()
                             for name, x in twin.in_their_layout(params, params).items()}
    failed = failures(version, given)
    assert not [name for name in failed if name == given.name or name.startswith(after.partition("{")[0])]
    assert {after.format(2) + name for name in twin.paths} <= given.read


PARAMETERS = {  # of the authors' agents without the slow critic: size, observation, actions -> their number
    ("12M", (64, 64, 3), 0, 18, True): 10_498_772, ("25M", (64, 64, 3), 0, 18, True): 23_496_244,
    ("50M", (64, 64, 3), 0, 18, True): 41_659_284, ("100M", (64, 64, 3), 0, 18, True): 93_482_068,
    ("200M", (64, 64, 3), 0, 18, True): 165_967_124, ("400M", (64, 64, 3), 0, 18, True): 372_924_052,
    ("12M", (96, 96, 1), 0, 18, True): 11_808_850, ("1M", None, 24, 6, False): 640_867}


@pytest.mark.parametrize("agent", PARAMETERS, ids=str)
def test_as_many_parameters_as_the_authors_have(agent):
    """Those of 2025 count them in their spec; on the meta device nothing is initialised."""
    size, image, vector, actions, discrete = agent
    args = d4.Args(size=size, image_size=image[0] if image else 64)
    with torch.device("meta"):
        made = d4.Agent(args, d4.EnvSpec(image, vector, actions, discrete), torch.device("meta"))
    assert sum(param.numel() for param in made.parameters() if param.requires_grad) == PARAMETERS[agent]
