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
from common.cli import RunArgs
from tests import parity, parity_v1, parity_v2, parity_v3, parity_v3_2025, tiny
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
PROPRIO, CONT, PCONT = ("v2", "dmc_proprio"), ("v1", "cont"), ("v1", "cont_pcont")


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


# ---------------------------------------------------------------------------------------- it agrees
@pytest.mark.parametrize("version, name", FIXTURES)
def test_fixture_agrees(version, name):
    assert not failures(version, fixture(version, name))


def test_every_fixture_is_tested():
    paths = GOLDEN.glob("*/*.npz")
    assert {(path.parent.name, re.sub(parity.PARTS, "", path.stem))
            for path in paths} == set(FIXTURES)


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


# ------------------------------------------------------------------------- it notices wrong numbers
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
    ("v2", "dmc_proprio", "init/actor/dense9/bias", lambda _: np.zeros(3, np.float32),
     "dmc_proprio"),
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


# -------------------------------------------------------------- it reads every setting of a fixture
NO_MATTER = """action_repeat batch_size buffer_size env_id grayscale learning_starts num_envs pixels
    pretrain size sticky total_timesteps train_ratio""".split()
EQUAL = {  # settings whose value here is that of the fixtures, too
    "v1": ["expl_decay", "expl_min", "mlp_layers", "mlp_units"], "v2": ["actor_grad"],
    "v3": ["actor_grad", "clip_rewards", "cont_mean", "depth", "mlp_layers", "mlp_units"],
    "v3_2025": ["head_layers", "hidden", "replay_context"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_no_setting_is_left_at_the_value_of_tiny_agents(version):
    """It would have another value than the fixture, whose numbers would not be ours any more."""
    script, same = VERSIONS[version].Twin.script, None
    for name in [name for v, name in FIXTURES if v == version and "math" not in name]:
        ours, plain = VERSIONS[version].Twin(fixture(version, name)).args, tiny.plain_args(script)
        own = {field.name for field in dataclasses.fields(ours)} - {
            field.name for field in dataclasses.fields(RunArgs)}
        found = {key for key in own if getattr(ours, key) == getattr(plain, key)}
        same = found if same is None else same & found
    assert same <= {*NO_MATTER, *EQUAL[version]}


# ---------------------------------------------------------------------- it notices wrong algorithms
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
        return shipped(**arguments | {key: change(arguments[key])
                                      for key, change in changes.items()})
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
    return [(d1.Optimizer, "grads", apply_at_once), (d1.Optimizer, "apply", lambda self,
                                                     _: self.norm)]


WRONG = {  # what is wrong: patches, the fixture, one comparison that must fail, one that must not
    "v3 lambda": (lambda: [given_other(d3, "lambda_return", lambda_=lambda x: x - 0.01)],
                  VECTOR, "step1/imag/ret", "step1/imag/reward"),
    "v3 no unimix": (lambda: [changed_init(d3.OneHot, probs=lambda self: self.raw.softmax(-1))],
                     VECTOR, "step1/wm/post_logit", "step1/wm/embed"),
    "v3 no clipping": (lambda: [changed_init(d3.Optimizer, clip=lambda _: 1e9)],
                       VECTOR, "adam_mu_after3/", "step1/wm/grad/"),
    "v3 clipped actions": (lambda: [(d3, "within_unit", lambda action: action.clamp(-1, 1))],
                           VECTOR, "step1/actor/grad/", "step1/wm/model_loss"),
    "v3 no free bits": (lambda: [with_args(d3, "world_model_loss", free_bits=0.0)],
                        VECTOR, "step1/wm/loss_unscaled/dyn", "step1/wm/loss_unscaled/reward"),
    "v3 baseline": (lambda: [given_other(d3, "actor_loss", baseline=torch.Tensor.detach)],
                    VECTOR, "step1/actor/grad/", "step1/actor/loss"),
    "v3 no entropy": (lambda: [with_args(d3, "actor_loss", actor_entropy=0.0)],
                      IMAGE, "step1/actor/loss", "step1/actor/policy_entropy"),
    "v3 no weights": (lambda: [given_other(d3, "critic_loss", weight=torch.ones_like)],
                      VECTOR, "step1/critic/loss", "step1/actor/loss"),
    "v2 Adam's epsilon": (lambda: [changed_init(d2.Optimizer, eps=lambda self: 30 * self.eps)],
                          PROPRIO, "after1/", "grad/model/"),
    "v2 no weight decay": (lambda: [with_args(d2.Agent, "__init__", 1, weight_decay=0.0)],
                           PROPRIO, "after3/", "grad/model/"),
    "v2 no KL balance": (lambda: [with_args(d2, "world_model_loss", kl_balance=0.5)],
                         PROPRIO, "grad/model/", "step1/model_loss"),
    "v2 return of its own state": (
        lambda: [given_other(d2, "actor_loss", ret=lambda x: x.roll(1, 0))],
        PROPRIO, "step1/actor_loss", "step1/critic_loss"),
    "v2 entropy": (lambda: [(d2.TruncatedNormal, "entropy", d2.Gaussian.entropy)],
                   PROPRIO, "step1/imag/entropy", "step1/imag/target"),
    "v1 model first": (models_step_first, CONT, "step1/imag/reward", "step1/model_loss"),
    "v1 no free nats": (lambda: [with_args(d1, "world_model_loss", free_nats=0.0)],
                        PCONT, "step1/div", "step1/div_raw"),
    "v1 ends without gamma": (lambda: [with_args(d1, "world_model_loss", gamma=1.0)],
                              PCONT, "step1/pcont_logprob", "step1/kl"),
    "v1 detached value": (
        lambda: [given_other(d1, "lambda_return", next_value=torch.Tensor.detach)],
        CONT, "grad/actor/", "step1/actor_loss"),
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
    "2025 Adam": (lambda: [(d4.Optimizer, "apply", adams_order)],
                  VECTOR_2025, "params_after2/", "step1/grad/"),
    "2025 mixture in the actor": (lambda: [with_args(d4.Agent, "__init__", 1, actor_unimix=0.01)],
                                  IMAGE_2025, "step1/actor/logprob", "step1/imag/value"),
    "2025 time limits": (
        lambda: [given_other(d4, "replay_critic_loss", batch=ends_at_terminals_only)],
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


PARAMETERS = {  # size, observation, actions -> of the authors' agent without the slow critic
    ("12M", (64, 64, 3), 0, 18, True): 10_498_772, ("25M", (64, 64, 3), 0, 18, True): 23_496_244,
    ("50M", (64, 64, 3), 0, 18, True): 41_659_284, ("100M", (64, 64, 3), 0, 18, True): 93_482_068,
    ("200M", (64, 64, 3), 0, 18, True): 165_967_124,
    ("400M", (64, 64, 3), 0, 18, True): 372_924_052,
    ("12M", (96, 96, 1), 0, 18, True): 11_808_850, ("1M", None, 24, 6, False): 640_867}


@pytest.mark.parametrize("agent", PARAMETERS, ids=str)
def test_as_many_parameters_as_the_authors_have(agent):
    """Those of 2025 count them in their spec; on the meta device nothing is initialised."""
    size, image, vector, actions, discrete = agent
    args = d4.Args(size=size, image_size=image[0] if image else 64)
    with torch.device("meta"):
        made = d4.Agent(args, d4.EnvSpec(image, vector, actions, discrete), torch.device("meta"))
    learnt = sum(param.numel() for param in made.parameters() if param.requires_grad)
    assert learnt == PARAMETERS[agent]
