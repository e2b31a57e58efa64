"""Do our numbers equal those that the authors' own code gave? One line per quantity.

    python -m tests.parity v3 [FOLDER]          also v2, v1; default folder: tests/golden/v3
    python -m tests.parity v3 --device cuda --slack 10      on a GPU; tolerances ten times as wide

FOLDER holds fixtures: arrays written by the authors' code, with random draws replaced by a rule
(tests/golden/*/README.md). The exit status is 0 if everything agrees, 1 if anything does not or was
not compared, 2 if there is nothing to compare.

The agent is ours, the script's `Agent`, with the authors' weights. What is compared comes out of
the real `Agent.train_step`: recorders lie around the shipped functions. What they do not show
(logits, reconstructions, ...) is asked of the shipped modules with the same weights. This file holds
what the versions share; `parity_v3.py` and its siblings say which array is which number of ours.

Tolerances (TOLERANCE of each version). An error is a largest absolute difference, divided by a scale:

    forward      the largest magnitude in the expected tensor. Exceptions are named where they are
                 made: a mean or difference of numbers that cancel has the scale of those numbers;
                 a tensor of many orders of magnitude is judged by element (max(1, |expected|)) or row
    gradient     the same, for V1 the root mean square (Adam's moments too); ours is 0 where that is 0
    parameter    absolute, after updates;   exact: counters, flags and one-hot vectors

A line that stands for several tensors shows the worst of them. Every array of a fixture must be
read by a comparison or stand in the version's IGNORED table with a reason; otherwise it is a FAIL.
"""

import argparse
import fnmatch
import importlib
import inspect
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from common.spaces import EnvSpec

# tests.parity_v3 and its siblings have IGNORED, TOLERANCE, RMS, a Twin and Math.
VERSIONS = ("v3_2025", "v3", "v2", "v1")
PARTS = r"_(steps|opt|gradparts|step|params)$"  # X_steps.npz and the like belong to fixture X


# ----------------------------------------------------------------------------- fixtures and reports
class Mismatch(Exception):
    """A fixture that ours cannot be set up for: an unknown setting, a weight without a place."""


class Fixture:
    """The arrays of one fixture, from one file or several; remembers which were read."""

    def __init__(self, folder: Path, name: str):
        self.name, self.arrays, self.read = name, {}, set()
        for path in sorted(folder.glob("*.npz")):
            if re.sub(PARTS, "", path.stem) == name:
                with np.load(path, allow_pickle=False) as arrays:
                    self.arrays = dict(arrays) | self.arrays
        self.meta = json.loads(str(self["meta/json" if "meta/json" in self else "meta"]))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> np.ndarray:
        self.read.add(key)
        return self.arrays[key]

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(np.array(self[key])).to(torch.get_default_device())

    def under(self, prefix: str) -> list[str]:
        """Every key below `prefix`, without it."""
        return [key[len(prefix):] for key in self.arrays if key.startswith(prefix)]

    def numbered(self, prefix: str) -> int:
        """How many there are of batch1/..., batch2/..., or of 0/..., 1/..., and so on."""
        return len({key.split("/")[0] for key in self.under(prefix) if key[0].isdigit()})


class Report:
    """Prints and counts comparisons."""

    def __init__(self, quiet: bool = False, slack: float = 1.0):
        self.quiet, self.slack = quiet, slack  # of every tolerance
        self.lines, self.failed, self.worst, self.tolerance = 0, [], {}, {}

    def begin(self, fixture: "Fixture", version: ModuleType) -> None:
        self.where, self.rms = fixture.name, version.RMS
        self.tolerance = {"exact": 0.0} | version.TOLERANCE
        self.say(f"\n{fixture.name}")

    def line(self, name: str, error: float, kind: str) -> None:
        limit = self.tolerance[kind] * self.slack
        self.lines += 1
        self.worst[self.where, kind] = max(self.worst.get((self.where, kind), (0.0, "")), (error, name))
        self.say(f"{name:<76} {error:9.2e} {limit:7.0e} {'ok' if error <= limit else 'FAIL'}")
        if not error <= limit:
            self.failed.append(f"{self.where}: {name}")

    def fail(self, name: str, why: str) -> None:
        """Print something that could not even be compared."""
        self.lines += 1
        self.failed.append(f"{self.where}: {name}")
        self.say(f"{name:<76} {why} FAIL")

    def check(self, name: str, ours, expected, kind: str = "forward", scale=None) -> None:
        try:
            self.line(name, self.error(ours, expected, kind, scale), kind)
        except Mismatch as why:
            self.fail(name, str(why))

    def check_all(self, fixture: Fixture, prefix: str, ours: dict[str, Tensor], kind: str) -> None:
        expected = fixture.under(prefix)
        if set(expected) != set(ours):
            self.fail(prefix, f"other names: {sorted(set(expected) ^ set(ours))}")
        common = [path for path in expected if path in ours]
        self.check_worst(prefix, ours, {path: fixture[prefix + path] for path in common}, kind)

    def check_worst(self, prefix: str, ours: dict, expected: dict, kind: str) -> None:
        """Compare tensors by their names: a line for the worst one and for each failure."""
        errors = {}
        for path in [path for path in expected if path in ours]:
            try:
                errors[path] = self.error(ours[path], expected[path], kind)
            except Mismatch as why:
                self.fail(prefix + path, str(why))
        if errors:
            worst = max(errors, key=lambda path: np.nan_to_num(errors[path], nan=np.inf))
            for path, error in errors.items():
                if path != worst and not error <= self.tolerance[kind] * self.slack:
                    self.line(prefix + path, error, kind)
            self.line(f"{prefix}* ({len(errors)} tensors, worst {worst})", errors[worst], kind)

    def error(self, ours, expected, kind: str, scale=None) -> float:
        """Largest difference in units of `scale`. Raises `Mismatch` if the shapes differ."""
        a = ours.detach().cpu() if isinstance(ours, Tensor) else ours
        a = np.asarray(a, np.float64)
        b = np.asarray(expected, np.float64)
        if a.shape != b.shape:
            raise Mismatch(f"shape {a.shape}, expected {b.shape}")
        if not a.size:
            raise Mismatch("nothing to compare")
        difference = np.abs(a - b)
        if kind in ("parameter", "exact"):
            return float(difference.max())
        if callable(scale):
            scale = scale(b)
        elif scale is None:
            scale = np.sqrt((b * b).mean()) if self.rms and kind == "gradient" else np.abs(b).max()
        unit = np.broadcast_to(np.asarray(scale, np.float64), a.shape)
        relative = np.divide(difference, unit, out=np.where(difference == 0, 0.0, np.inf), where=unit > 0)
        return float(relative.max())

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text)


# ---------------------------------------------------------------------------------------- recording
@contextmanager
def patched(*patches: tuple[object, str, object]) -> Iterator[None]:
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, new in patches:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old in saved:
            setattr(owner, name, old)


def rule(script: ModuleType) -> list[tuple[object, str, object]]:
    """Patches that put the fixtures' rule in place of random draws."""
    half = [name for name in ("draw_noise", "draw_truncated") if hasattr(script, name)]
    return [(script, "draw_classes", lambda probs: probs.argmax(-1)),
            *((script, name, lambda like, *_: torch.full_like(like, 0.5)) for name in half)]


def recorder(log: dict, owner, name: str, after=None) -> tuple[object, str, object]:
    """A patch that keeps the named arguments and the result of a call; `after` may change it."""
    original = getattr(owner, name)
    signature = inspect.signature(original)

    def call(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        result = original(*args, **kwargs)
        log[name] = SimpleNamespace(**arguments, given=arguments, result=result, earlier=log.get(name))
        return after(result, log[name]) if after else result

    return owner, name, call


def optimizer_recorders(log: dict, optimizer: type) -> list[tuple[object, str, object]]:
    """Patches that keep, for each optimiser, its loss, its gradients and norm before clipping."""
    grads, apply = optimizer.grads, optimizer.apply

    def recording_grads(self, loss, *args, **kwargs):
        result = grads(self, loss, *args, **kwargs)
        log[id(self)] = SimpleNamespace(loss=loss.detach(), grads=[grad.clone() for grad in result])
        return result

    def recording_apply(self, given):
        log[id(self)].norm = apply(self, given)
        return log[id(self)].norm

    return [(optimizer, "grads", recording_grads), (optimizer, "apply", recording_apply)]


def gradient(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradient of the sum of `output`; zeros where it does not depend on an input."""
    if not output.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    grads = torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs))


@torch.enable_grad()
def per_step(function, call: SimpleNamespace) -> Tensor:
    """element (H, N) of a loss = mean(weight * element), from a call of that loss."""
    weight = call.weight.detach().requires_grad_()
    result = function(*(call.given | {"weight": weight}).values())
    loss = result[0] if isinstance(result, tuple) else result
    return (gradient(loss, weight)[0] * weight.numel()).detach()


def shipped_losses(script: ModuleType, args, shape: tuple, post=None, prior=None, reward=None,
                   terminal=None, image=None, vector=None, predicted=None, cont=None) -> dict[str, Tensor]:
    """`world_model_loss` of a model whose networks say what they are told to.

    What is not given does not matter. The reward and discount heads, and the continue head unless
    `cont` is given, answer with the target in the place of its log-probability.
    """
    state, zeros = torch.zeros(*shape, 1), torch.zeros(shape)
    still = SimpleNamespace(kl=lambda _: zeros, entropy=lambda: zeros)
    still.detach = lambda: still
    echo = SimpleNamespace(log_prob=lambda target: target)
    model = SimpleNamespace(
        encoder=lambda *_: state, reward=lambda _: echo, cont=lambda _: cont or echo, discount=lambda _: echo,
        decoder=SimpleNamespace(image=lambda _: predicted, vector=lambda _: predicted),
        rssm=SimpleNamespace(observe=lambda *_: (state, state, state),
                             latent=lambda _: post or still, prior=lambda _: prior or still))
    batch = script.Batch(image, vector, state, zeros if reward is None else reward, None,
                         zeros > 1 if terminal is None else terminal)
    return script.world_model_loss(model, batch, script.State(state[0], state[0], state[0]), args)[0]


class Piece:
    """A single piece of the algorithm: the arrays of a fixture below a prefix."""

    def __init__(self, report: Report, fixture: Fixture, prefix: str):
        self.report, self.fixture, self.prefix = report, fixture, prefix

    def __call__(self, key: str) -> Tensor:
        return self.fixture.tensor(self.prefix + key)

    def leaf(self, key: str) -> Tensor:
        return self(key).requires_grad_()

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.fixture

    def under(self, prefix: str = "") -> list[str]:
        return self.fixture.under(self.prefix + prefix)

    def below(self, prefix: str) -> "Piece":
        return Piece(self.report, self.fixture, self.prefix + prefix)

    def check(self, key: str, ours, kind: str = "forward", scale=None) -> None:
        """Compare one array, if the fixture has it; if it has more, `check_coverage` says so."""
        if key in self:
            self.report.check(self.prefix + key, ours, self.fixture[self.prefix + key], kind, scale)

    def compare(self, forward: dict, backward: dict | None = None) -> None:
        for kind, found in (("forward", forward), ("gradient", backward or {})):
            for key, ours in found.items():
                self.check(key, ours, kind)

    def steps(self, make_optimizer) -> None:
        """Steps of an optimiser for gradients that are given: loss = <parameter, gradient>."""
        params = {key: nn.Parameter(self(f"init/{key}")) for key in "ab"}
        optimizer = make_optimizer(nn.ParameterList(params.values()))
        for i in range(self.fixture.numbered(self.prefix)):
            loss = sum((p * self(f"{i}/grad_{key}")).sum() for key, p in params.items())
            self.check(f"{i}/norm", optimizer.apply(optimizer.grads(loss)))
            for key, param in params.items():
                self.check(f"{i}/{key}", param, "parameter")

    def inputs(self, script: ModuleType, flags, rewards: dict[str, str]) -> None:
        """Images; rewards as the losses see them: their name of a `clip_rewards` -> ours."""
        self.check("image_out", script.centre(self("image")))
        reward = self("reward")
        for theirs, ours in rewards.items():
            found = shipped_losses(script, flags(clip_rewards=ours), reward.shape, reward=reward)
            self.check(f"reward_{theirs}", -found["reward"])


def element(expected: np.ndarray) -> np.ndarray:
    """Scale of a tensor that spans many orders of magnitude."""
    return np.abs(expected).clip(1)


def batch_major(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


# ----------------------------------------------------------------------------- an agent like theirs
class Twin:
    """Our agent with the sizes, settings and weights of a fixture. Each version completes it."""

    script: ModuleType
    init = "init/"  # where the weights stand
    aligned = False  # whether their action is the one chosen AT an observation, as in ours
    rename: list[tuple[str, str]] = []  # their name of a parameter -> ours
    swapped = flipped = "$^"  # kernels that read [stoch, deter], ours [deter, stoch]; see `places`
    vector_out = "$^"  # the decoder's output layer of one vector
    settings = ""  # our flags and their settings: "flag=setting ...", or "flag" alone; optimisers by rule
    optimizers = {"model": "world_model", "actor": "actor", "critic": "critic"}

    def __init__(self, fixture: Fixture, report: Report | None = None):
        self.fixture, self.config = fixture, fixture.meta["config"]
        self.report = report or Report(quiet=True)
        self.paths = fixture.under(self.init)
        self.obs = self.observations()
        self.images = [key for key, shape in self.obs.items() if len(shape) == 3]
        self.vectors = [key for key, shape in self.obs.items() if len(shape) in (1, 2)]
        stops = np.cumsum([0, *(math.prod(self.obs[key]) for key in self.vectors)]).tolist()
        self.columns = {key: slice(*stops[i:i + 2]) for i, key in enumerate(self.vectors)}
        self.rows, self.length = fixture["batch1/reward"].shape
        self.spec = self.env_spec(stops[-1])
        given = {"batch_size": self.rows, "batch_length": self.length}
        for row in self.settings.split():
            name, _, theirs = row.partition("=")
            given[name] = self.config[theirs or name]
        for name in (f"{net}_opt.{key}" for net in self.optimizers for key in ("lr", "eps", "clip")):
            if name in self.config:
                given[name.replace("_opt.", "_")] = self.config[name]
        self.args = self.make_args(given)
        with patched(*self.sized_networks()):
            self.agent = self.script.Agent(self.args, self.spec, torch.get_default_device())
        self.index = {}
        self.load_weights()

    def make_args(self, given: dict):
        """Our arguments: `given`, which are those of the table `settings`, and others."""
        raise NotImplementedError

    def observations(self) -> dict[str, tuple[int, ...]]:
        others = ("action", "reward", "discount", "is_first", "is_last", "is_terminal")
        return {key: self.fixture.arrays["batch1/" + key].shape[2:]
                for key in self.fixture.under("batch1/") if key not in others}

    def env_spec(self, vector_dim: int) -> EnvSpec:
        """All images stacked on channels, as `common.envs` does; vectors side by side."""
        image, shapes = None, [self.obs[key] for key in self.images]
        if shapes:
            image = *shapes[0][:2], sum(shape[-1] for shape in shapes)
        meta = self.fixture.meta
        discrete = meta["action_discrete" if "action_discrete" in meta else "discrete"]
        return EnvSpec(image, vector_dim, meta["action_dim"], discrete)

    def sized_networks(self) -> list[tuple[object, str, object]]:
        """Patches while the shipped `Agent` builds itself: for networks of other sizes or layers."""
        return []

    def places(self, path: str, numbers: dict[str, Tensor]) -> Tensor:
        """Their parameter `path`, in its own layout, as places in the flat vector of all of ours.

        `numbers`: those places by our names, shaped like our parameters. Linear kernels are (in,
        out) in theirs; convolutions (height, width, in, out); transposed ones (height, width, out,
        in), in JAX also `flipped`: theirs correlates with the kernel, torch with the flipped one.
        """
        name = path
        for pattern, new in self.rename:
            name = re.sub(pattern, new, name)
        parts = [numbers.get(f"{name}_{half}") for half in "ab"]  # of a SplitDense
        place = numbers.get(name) if None in parts else torch.cat(parts, 1)
        if place is None:
            raise Mismatch(f"no place for {path} ({name})")
        if key := re.search(self.vector_out, path):  # ours has one output layer for all vectors
            place = place[self.columns[key[1]]]
        if path.endswith("kernel"):
            place = place.T if place.ndim == 2 else place.permute(2, 3, 1, 0)
        if re.search(self.flipped, path):
            place = place.flip(0, 1)
        if re.search(self.swapped, path):
            place = place.roll(-self.args.deter, 0)
        return place

    def load_weights(self) -> None:
        """Copy every weight to its place. Raises `Mismatch` unless all fit, with none left over."""
        params = dict(self.agent.named_parameters())
        sizes = [param.numel() for param in params.values()]
        blocks = torch.arange(sum(sizes)).split(sizes)
        self.numbers = {name: block.view(params[name].shape) for name, block in zip(params, blocks)}
        flat = torch.zeros(sum(sizes))
        for path in self.paths:
            array = self.fixture.tensor(self.init + path)
            self.index[path] = self.places(path, self.numbers)
            if self.index[path].shape != array.shape:
                ours = tuple(self.index[path].shape)
                raise Mismatch(f"{path} is {tuple(array.shape)}, ours {ours}")
            flat[self.index[path]] = array
        filled = torch.bincount(torch.cat([index.flatten() for index in self.index.values()]),
                                minlength=len(flat))
        wrong = [name for name, place in self.numbers.items() if (filled[place] != 1).any()]
        if wrong:
            raise Mismatch(f"not exactly one weight for {wrong}")
        for name, param in params.items():
            param.data.copy_(flat[self.numbers[name]])

    def in_their_layout(self, params, values) -> dict[str, Tensor]:
        """`values`, shaped like those of our parameters -> by their names, in their layout."""
        names = {id(param): name for name, param in self.agent.named_parameters()}
        flat = torch.zeros(sum(place.numel() for place in self.numbers.values()))
        known = torch.zeros_like(flat, dtype=torch.bool)
        for param, value in zip(params, values):
            place = self.numbers[names[id(param)]]
            flat[place], known[place] = value.detach(), True
        return {path: flat[index] for path, index in self.index.items() if known[index].all()}

    def batch(self, n: int):
        """Their batch `n`, time-major, each row with the action chosen there."""
        def get(key):
            return batch_major(self.fixture.tensor(f"batch{n}/{key}")).contiguous()
        image = torch.cat([get(key) for key in self.images], -1) if self.images else None
        vector = None
        if self.vectors:
            vector = torch.cat([get(key).flatten(2).float() for key in self.vectors], -1)
        action = get("action")
        if not self.aligned:
            action = torch.cat([action[1:], torch.zeros_like(action[:1])])
        return self.script.Batch(image, vector, action, get("reward"), *self.flags(get))

    def flags(self, get) -> tuple[Tensor, Tensor]:
        return get("is_first"), get("is_terminal")

    def seen(self, batch, t: int):
        """What the environments would show at time `t` of a batch; time 0 begins an episode."""
        zeros, first = np.zeros(self.rows, np.float32), batch.is_first[t].cpu().numpy() | (t == 0)
        image, vector = (None if x is None else x[t].cpu().numpy() for x in (batch.image, batch.vector))
        return self.script.EnvStep(image, vector, zeros, first, zeros > 0, zeros > 0, zeros, zeros)

    def acted(self, steps: int, then=lambda state, obs: state) -> Iterator[tuple]:
        """Act on batch 1, `then` explore: time, state before and after, posterior."""
        batch, state, log = self.batch(1), self.agent.zero_state(self.rows), {}
        for t in range(steps):
            with patched(recorder(log, self.script.RSSM, "observe")):
                after = then(self.agent.act(self.seen(batch, t), state), self.seen(batch, t))
            yield t, state, after, self.agent.world_model.rssm.latent(log["observe"].result[2][0])
            state = after

    def observed(self) -> int:
        """How many observations the fixture acts on, as policy/obs1_..., policy/obs2_..."""
        return len({key.split("_")[0] for key in self.fixture.under("policy/obs")})

    def posterior(self, batch, carry) -> tuple:
        """Embedding, deter, stoch, posterior, prior and feature of every replayed step."""
        d, model = self.script, self.agent.world_model
        embed = model.encoder(d.centre(batch.image), batch.vector)
        deter, stoch, raw = model.rssm.observe(embed, d.previous_actions(batch, carry.action),
                                               batch.is_first, carry.deter, carry.stoch)
        feat = torch.cat([deter, stoch], -1)
        return embed, deter, stoch, model.rssm.latent(raw), model.rssm.prior(deter), feat

    def recorded(self, given: tuple, after: dict, *more) -> SimpleNamespace:
        """Run `train_step`: what it returns, calls of shipped functions, each optimiser's part.

        `after`: function -> what is done to its result. `more`: further recorders, from a log."""
        log, d = {}, self.script
        names = ("world_model_loss", "imagine", "lambda_return", "actor_loss", "critic_loss")
        patches = [recorder(log, d, name, after.get(name)) for name in names]
        with patched(*patches, *sum((make(log) for make in more), []), *optimizer_recorders(log, d.Optimizer)):
            returned = self.agent.train_step(*given)
        opts = {name: log.pop(id(getattr(self.agent, f"{name}_opt"))) for name in self.optimizers}
        return SimpleNamespace(**log, **opts, returned=returned)

    def scaled_model(self, result, call):
        """Loss scales that are no flag of ours, put on the shipped losses."""
        losses, *rest = result
        scales = self.loss_scales()
        call.scaled = {name: loss * scales.get(name, 1.0) for name, loss in losses.items()}
        return call.scaled, *rest

    def loss_scales(self) -> dict[str, float]:
        """Our name of a loss term -> what is left of its scale after our flags."""
        return {}

    def check(self) -> None:
        """Acting, then one update for each batch of the fixture (three)."""
        with patched(*rule(self.script)):
            self.check_acting()
            for n in range(1, self.fixture.numbered("batch") + 1):
                self.check_update(n)

    def compare(self, key: str, ours, kind: str = "forward", scale=None, steps: slice | None = None) -> None:
        """Compare one array, or some of its steps, if the fixture has it."""
        if key in self.fixture:
            expected = self.fixture[key] if steps is None else self.fixture[key][steps]
            name = key if steps is None else f"{key}[{steps.start or 0}:{steps.stop or ''}]"
            self.report.check(name, ours, expected, kind, scale)

    def compare_all(self, prefix: str, ours: dict[str, Tensor], kind: str = "forward") -> None:
        for name, value in ours.items():
            self.compare(prefix + name, value, kind)

    def compare_image(self, prefix: str, image: Tensor) -> None:
        """Means of the decoder (B, T, I, I, C): one picture, and the sum of each."""
        self.compare(prefix + "image_mean_0_0", image[0, 0])
        size = float(image.abs().sum((-3, -2, -1)).max())  # pixels of both signs
        self.compare(prefix + "image_mean_sum", image.sum((-3, -2, -1)), scale=size)

    def check_gradients(self, prefix: str, call: SimpleNamespace, name: str) -> None:
        if self.fixture.under(prefix):
            params = getattr(self.agent, self.optimizers[name]).parameters()
            found = self.in_their_layout(params, getattr(call, name).grads)
            self.report.check_all(self.fixture, prefix, found, "gradient")

    def check_parameters(self, prefix: str) -> None:
        if self.fixture.under(prefix):
            params = list(self.agent.parameters())
            self.report.check_all(self.fixture, prefix, self.in_their_layout(params, params), "parameter")

    def start_order(self, x: Tensor) -> Tensor:
        """Sort our imagination columns n = t * B + b like theirs, n = b * T + t."""
        return x.unflatten(1, (-1, self.rows)).transpose(1, 2).flatten(1, 2)

    def groups(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (self.args.stoch, -1))


# ---------------------------------------------------------------------------------- the whole of it
def check_coverage(report: Report, fixture: Fixture, ignored: dict[str, str]) -> None:
    """Every array must have been read, or be on the list of those that have a reason not to be."""
    left = set(fixture.arrays) - fixture.read
    for pattern, reason in ignored.items():
        keys = set(fnmatch.filter(left, pattern))
        left -= keys
        if keys:
            report.say(f"ignored: {len(keys)} arrays {pattern}: {reason}")
    for key in sorted(left):
        report.fail(key, "never compared")


def check_fixture(report: Report, fixture: Fixture, version: ModuleType) -> None:
    report.begin(fixture, version)
    try:
        if fixture.under(version.Twin.init):
            version.Twin(fixture, report).check()
        else:
            with patched(*rule(version.Twin.script)):
                for name in dir(version.Math):
                    prefix = name.removeprefix("math_") + "/"
                    if name.startswith("math_") and fixture.under(prefix):
                        getattr(version.Math(report, fixture, prefix), name)()
        check_coverage(report, fixture, version.IGNORED)
    except (Mismatch, version.Twin.script.UserError) as why:
        report.fail(fixture.name, str(why))


def main(argv: list[str], quiet: bool = False) -> int:
    parser = argparse.ArgumentParser("python -m tests.parity")
    parser.add_argument("version", choices=VERSIONS)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--slack", type=float, default=1.0)
    options = parser.parse_args(argv)
    folder = options.folder or Path(__file__).parent / "golden" / options.version
    names = sorted({re.sub(PARTS, "", path.stem) for path in folder.glob("*.npz")})
    if not names:
        print(f"no fixture (*.npz) in {folder}", file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = False  # for products that is the default
    torch.set_num_threads(1)  # the networks are tiny, and sums come out the same everywhere
    version = importlib.import_module(f"tests.parity_{options.version}")
    report = Report(quiet, options.slack)
    with torch.device(options.device):  # where tensors are made from here on
        for name in names:
            check_fixture(report, Fixture(folder, name), version)
    report.say("")
    for (where, kind), (error, name) in report.worst.items():
        report.say(f"largest {kind} error {error:.2e}: {where}: {name}")
    report.say(f"{len(names)} fixtures, {report.lines} lines, {len(report.failed)} failed"
               + "".join(f"\n    {name}" for name in report.failed))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
