"""What `tests.parity` compares for DreamerV3: fixtures of danijar/dreamerv3 at 8fa35f8.

The agent is ours, `dreamer_v3.Agent`, with the authors' weights, and what is compared comes out of
the real `Agent.train_step`: while it runs, recorders lie around the shipped functions. What they do
not show (logits, reconstructions, ...) is asked of the shipped modules with the same weights.
"""

import inspect
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import dreamer_v3 as d3
from common.envs import EnvSpec, EnvStep
from common.runs import UserError
from tests.parity import Fixture, Mismatch, Report, gradient, leaf, patched

IGNORED = {
    "meta/*": "settings; those that matter are read",
    "batch*/is_last": "the algorithm does not use it",
    "step1/carry_in/latent/logit": "an input that the model never looks at",
    "step*/metrics/*": "statistics of arrays that are compared element by element",
    "actor_*/minent": "used by a metric of the authors only",
    "actor_*/maxent": "used by a metric of the authors only",
    "discdist/mode": "the same as the mean, which is compared",
    "lambda/base": "a slice of lambda/value, an input",
    "bernoulli/mean": "the algorithm uses the loss and the mode only",
    "bernoulli/mode": "taken inside of train_step; compared as imag/cont",
}

# Settings that our code has no choice about. Another value is announced; the numbers then tell.
FIXED = {
    r".*\.act": "silu", r".*\.norm": "layer", r".*\.outnorm": False,
    r".*\.inputs": ["deter", "stoch"],
    r"encoder\.symlog_inputs": True, r"(actor|critic)\.symlog_inputs": False,
    r".*\.(cnn_blocks|warmup|wd|lateclip)": 0, r".*\.minres": 4, r".*\.resize": "stride",
    r".*\.cnn": "resnet", r".*\.cnn_sigmoid": False, r".*\.image_dist": "mse",
    r".*\.vector_dist": "symlog_mse", r"(reward_head|critic)\.dist": "symlog_disc",
    r"cont_head\.dist": "binary", r"actor_dist_cont": "normal", r"actor_dist_disc": "onehot",
    r"actor_grad_cont": "backprop", r"actor_grad_disc": "reinforce", r".*_opt\.opt": "adam",
    r"critic_slowreg": "logprob", r"slow_critic_update": 1, r"retnorm\.impl": "perc_ema",
    r"(dyn|rep)_loss\.impl": "kl", r"grad_heads": ["decoder", "reward", "cont"],
    r"rssm\.initial": "learned", r"rssm\.action_clip": 1.0,
}
# Read below, or without an effect once the weights are given.
USED = (r".*\.(layers|units|mlp_layers|mlp_units|cnn_depth|bins|unimix|deter|stoch|classes)"
        r"|.*_opt\.(lr|eps|clip)|loss_scales\..*|.*_loss\.free|retnorm\.(decay|max|perclo|perchi)"
        r"|actor\.(minstd|maxstd)|actent|horizon|imag_horizon|return_lambda|slow_critic_fraction"
        r"|batch_(size|length)|.*\.(fan|winit|outscale|cnn_keys|mlp_keys)|rssm\.unroll")

# Their name of a parameter -> ours.
RENAME = [
    (r"^agent/task_behavior/ac/actor/", "actor/"), (r"^agent/task_behavior/critic/net/", "critic/"),
    (r"^agent/task_behavior/critic/slow/", "slow_critic/"), (r"^agent/wm/", "world_model/"),
    (r"/enc/", "/encoder/"), (r"/dec/", "/decoder/"), (r"/rew/", "/reward_head/"),
    (r"/cont/", "/continue_head/"), (r"/cnn/in/", "/cnn_in/"),
    (r"/cnn/s(\d+)res/norm/", lambda m: f"/cnn/{3 * int(m[1]) + 1}/"),
    (r"/cnn/s(\d+)res/", lambda m: f"/cnn/{3 * int(m[1])}/"),
    (r"(encoder|decoder)/mlp/h(\d+)/", r"\1/mlp/\2/"), (r"/h(\d+)/", r"/mlp/\1/"),
    (r"/decoder/mlp/dist_.*/out/", "/decoder/vector_out/"), (r"/dist_out/", "/"),
    (r"/gru/norm/", "/gru_norm/"), (r"/(kernel|scale)$", "/weight"), (r"/", "."),
]


# ------------------------------------------------------------------------- an agent like theirs
class Twin:
    """Our agent with the sizes, settings and weights of a fixture."""

    def __init__(self, fixture: Fixture):
        self.fixture, self.config = fixture, fixture.meta["config"]
        self.obs = {key: tuple(fixture.meta["obs"][key][0]) for key in fixture.meta["obs_order"]}
        self.images = [key for key, shape in self.obs.items() if len(shape) == 3]
        self.vectors = [key for key, shape in self.obs.items() if len(shape) in (1, 2)]
        widths = [math.prod(self.obs[key]) for key in self.vectors]
        stops = np.cumsum([0, *widths]).tolist()
        self.columns = {key: slice(*stops[i:i + 2]) for i, key in enumerate(self.vectors)}
        self.spec = EnvSpec(self.image_shape(), sum(widths), fixture.meta["action_dim"],
                            fixture.meta["action_discrete"])
        try:
            self.args = self.make_args()
        except UserError as why:
            raise Mismatch(str(why)) from why
        self.agent = self.make_agent()
        self.paths = fixture.under("params_init/")
        self.load_weights()

    def image_shape(self) -> tuple[int, int, int] | None:
        """All images stacked on channels, as `common.envs` does."""
        if not self.images:
            return None
        height, width, _ = self.obs[self.images[0]]
        if height != width:
            raise Mismatch(f"images of {height} x {width}; ours are square")
        return height, width, sum(self.obs[key][-1] for key in self.images)

    def make_args(self) -> d3.Args:
        """Our flags; sizes that differ between networks follow in `make_agent`."""
        c, (length, batch) = self.config, self.fixture["batch1/reward"].T.shape
        scales = {key: c[f"loss_scales.{key}"] for key in self.predictions()}
        equal = len(set(scales.values())) == 1
        return d3.Args(
            size="XXS", amp="off", seed=0, image_size=(self.spec.image_shape or (64,))[0],
            batch_size=batch, batch_length=length, horizon=c["imag_horizon"],
            deter=c["rssm.deter"], hidden=c["rssm.units"], stoch=c["rssm.stoch"],
            classes=c["rssm.classes"], unimix=c["rssm.unimix"],
            beta_pred=scales["reward"] if equal else 1.0,
            beta_dyn=c["loss_scales.dyn"], beta_rep=c["loss_scales.rep"],
            free_bits=c["dyn_loss.free"], discount_horizon=c["horizon"],
            return_lambda=c["return_lambda"], critic_ema_decay=1 - c["slow_critic_fraction"],
            critic_ema_regularizer=c["loss_scales.slowreg"],
            return_norm_low=c["retnorm.perclo"] / 100, return_norm_high=c["retnorm.perchi"] / 100,
            return_norm_limit=1 / c["retnorm.max"], return_norm_decay=c["retnorm.decay"],
            actor_entropy=c["actent"], actor_min_std=c["actor.minstd"],
            actor_max_std=c["actor.maxstd"],
            **{f"{ours}_{key}": c[f"{ours}_opt.{key}"]
               for ours in ("model", "actor", "critic") for key in ("lr", "eps", "clip")})

    def predictions(self) -> list[str]:
        """Their names of the loss scales that are one `beta_pred` in ours."""
        return ["image"] * bool(self.images) + ["vector"] * bool(self.vectors) + ["reward", "cont"]

    def make_agent(self) -> d3.Agent:
        """Our agent, its networks rebuilt where the fixture's differ in size from each other."""
        agent = d3.Agent(self.args, self.spec, torch.device("cpu"))
        model, dim = agent.world_model, agent.world_model.feat_dim
        model.encoder = d3.Encoder(self.sized("encoder"), self.spec)
        model.rssm = d3.RSSM(self.args, self.spec.action_dim, model.encoder.embed_dim)
        model.decoder = d3.Decoder(self.sized("decoder"), self.spec, dim)
        model.reward_head = d3.TwoHotHead(self.sized("reward_head"), dim)
        model.continue_head = d3.ContinueHead(self.sized("cont_head"), dim)
        agent.actor = d3.Actor(self.sized("actor"), self.spec, dim)
        agent.critic = d3.TwoHotHead(self.sized("critic"), dim)
        agent.slow_critic = d3.TwoHotHead(self.sized("critic"), dim).requires_grad_(False)
        agent.to(memory_format=torch.channels_last)
        for name, net in (("model", model), ("actor", agent.actor), ("critic", agent.critic)):
            values = [getattr(self.args, f"{name}_{key}") for key in ("lr", "eps", "clip")]
            setattr(agent, f"{name}_opt", d3.Optimizer(net.parameters(), *values))
        return agent

    def sized(self, network: str) -> d3.Args:
        """Flags for one network."""
        own = ("units", "layers", "mlp_units", "mlp_layers", "cnn_depth", "bins", "unimix")
        changes = {name.removeprefix("cnn_"): self.config.get(f"{network}.{name}") for name in own}
        return replace(self.args, **{k: v for k, v in changes.items() if v is not None})

    def theirs(self, path: str, tensor: Tensor) -> Tensor:
        """A view of `tensor`, shaped like our parameter, in the layout of their parameter `path`.

        Linear (in, out); convolution (height, width, in, out); transposed convolution (height,
        width, out, in), and the kernel `flipped`.
        """
        key = re.search(r"/dec/mlp/dist_(.*)/out/", path)
        if key:
            tensor = tensor[self.columns[key[1]]]  # our decoder has one output layer for all keys
        if not path.endswith("kernel"):
            return tensor
        return tensor.T if tensor.ndim == 2 else tensor.permute(2, 3, 1, 0)

    def load_weights(self) -> None:
        """Copy every weight to its place. Raises `Mismatch` unless all fit, with none left over."""
        params = dict(self.agent.named_parameters())
        filled = {name: 0 for name in params}
        for path in self.paths:
            name, array = our_name(path), self.fixture.tensor("params_init/" + path)
            if name not in params:
                raise Mismatch(f"no place for {path} ({name})")
            view = self.theirs(path, params[name].data)
            if view.shape != array.shape:
                raise Mismatch(f"{path} is {tuple(array.shape)}, ours {tuple(view.shape)}")
            view.copy_(flipped(path, array))
            filled[name] += array.numel()
        empty = [name for name, count in filled.items() if count != params[name].numel()]
        if empty:
            raise Mismatch(f"no weights for {empty}")
        bounds = [self.fixture.tensor(f"retnorm_init/{key}") for key in ("low", "high")]
        self.agent.return_scale.range.copy_(torch.stack(bounds))

    def params(self, of: nn.Module | None = None) -> dict[str, nn.Parameter]:
        """Parameters by their name `path`; those of one module only, if given."""
        ours = dict(self.agent.named_parameters())
        chosen = None if of is None else {id(param) for param in of.parameters()}
        named = {path: ours[our_name(path)] for path in self.paths}
        return {path: p for path, p in named.items() if chosen is None or id(p) in chosen}

    def in_layout(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by `path`, shaped like our parameters -> in their layout."""
        return {path: flipped(path, self.theirs(path, tensor.detach()))
                for path, tensor in tensors.items()}

    def batch(self, n: int) -> d3.Batch:
        """Their batch `n`, time-major."""
        def get(key):
            return self.fixture.tensor(f"batch{n}/{key}").transpose(0, 1).contiguous()
        image = torch.cat([get(key) for key in self.images], -1) if self.images else None
        vector = None
        if self.vectors:
            vector = torch.cat([get(key).flatten(2).float() for key in self.vectors], -1)
        return d3.Batch(image, vector, get("action"), get("reward"), get("is_first"),
                        get("is_terminal"))

    def carry(self, n: int) -> d3.State:
        """The state that update `n` starts from."""
        prefix = f"step{n}/carry_in/"
        return d3.State(self.fixture.tensor(prefix + "latent/deter"),
                        self.fixture.tensor(prefix + "latent/stoch").flatten(-2),
                        self.fixture.tensor(prefix + "action"))


def our_name(path: str) -> str:
    """Their parameter name -> ours."""
    for pattern, new in RENAME:
        path = re.sub(pattern, new, path)
    return path


def flipped(path: str, kernel: Tensor) -> Tensor:
    """Transposed convolutions: theirs correlates with the kernel, torch's with the flipped one."""
    is_transposed = re.search(r"/dec/cnn/s\d+res/kernel$", path)
    return kernel.flip(0, 1) if is_transposed else kernel


def announce_settings(report: Report, config: dict) -> None:
    """Say which settings we do not know or cannot have: should the numbers differ, that is why."""
    for key, value in config.items():
        fixed = [want for pattern, want in FIXED.items() if re.fullmatch(pattern, key)]
        if fixed and value != fixed[0]:
            report.say(f"note: setting {key} = {value}; ours is always {fixed[0]}")
        if not fixed and not re.fullmatch(USED, key):
            report.say(f"note: unknown setting {key} = {value}")


# ------------------------------------------------------------------------------------ the rule
def rule() -> list[tuple[object, str, object]]:
    """Patches that put the fixtures' rule in place of random draws."""
    return [(d3, "draw_classes", lambda probs: probs.argmax(-1)),
            (d3, "draw_noise", lambda mean: torch.full_like(mean, 0.5))]


def recorder(log: dict, owner, name: str, after=None) -> tuple[object, str, object]:
    """A patch that keeps the named arguments and the result of a call; `after` may change it."""
    original = getattr(owner, name)
    signature = inspect.signature(original)

    def call(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        result = original(*args, **kwargs)
        log[name] = SimpleNamespace(**arguments, given=arguments, result=result)
        return after(result, log[name]) if after else result

    return owner, name, call


def gradient_recorder(log: dict) -> tuple[object, str, object]:
    """A patch that keeps the loss an optimiser gets, its gradient before clipping, and the norm."""
    original = d3.Optimizer.step

    def step(self, loss, *args, **kwargs):
        grads = torch.autograd.grad(loss, self.params, retain_graph=True)
        by_id = {id(param): grad.clone() for param, grad in zip(self.params, grads)}
        norm = original(self, loss, *args, **kwargs)
        log[id(self)] = SimpleNamespace(loss=loss.detach(), grads=by_id, norm=norm)
        return norm

    return d3.Optimizer, "step", step


class Rescaled:
    """Loss scales that differ in a fixture but are one flag in ours, put on the shipped losses."""

    def __init__(self, twin: Twin):
        config, self.args = twin.config, twin.args
        ours = {"image": "image", "vector": "vector", "reward": "reward", "cont": "continue"}
        self.world_model = {name: config[f"loss_scales.{key}"] / twin.args.beta_pred
                            for key, name in ours.items()}
        self.rep_free = config["rep_loss.free"]
        self.actor, self.critic = config["loss_scales.actor"], config["loss_scales.critic"]

    def model_losses(self, result, call):
        """World model: each prediction's scale, and the free bits of the representation loss."""
        losses, *rest = result
        if self.rep_free != self.args.free_bits:
            other = replace(self.args, free_bits=self.rep_free)
            losses["rep"] = call.shipped(call.model, call.batch, call.carry, other)[0]["rep"]
        call.scaled = {name: loss * self.world_model.get(name, 1.0)
                       for name, loss in losses.items()}
        return call.scaled, *rest

    def actor_loss(self, result, call):
        """Actor."""
        call.scaled = result[0] * self.actor
        return call.scaled, result[1]

    def critic_loss(self, result, call):
        """Critic."""
        call.scaled = result * self.critic
        return call.scaled


# ---------------------------------------------------------------------------------- an agent
def check_agent(report: Report, fixture: Fixture) -> None:
    """Acting, then one update for each batch of the fixture (three)."""
    announce_settings(report, fixture.meta["config"])
    twin = Twin(fixture)
    updates = len({key.split("/")[0] for key in fixture.under("batch")})
    with patched(*rule()):
        check_acting(report, twin)
        for n in range(1, updates + 1):
            check_update(report, twin, n)
    check_optimizers(report, twin, f"_after{updates}/")


def check_acting(report: Report, twin: Twin) -> None:
    """Online acting on the observations of batch 1, with the initial weights."""
    if not twin.fixture.under("policy/"):
        return
    batch, agent, log = twin.batch(1), twin.agent, {}
    rows, rssm = batch.reward.shape[1], twin.agent.world_model.rssm
    carry = agent.blank_state(rows)
    for t in range(len({key.split("/")[0] for key in twin.fixture.under("policy/")})):
        first = batch.is_first[t].numpy() | (t == 0)
        image, vector = (None if x is None else x[t].numpy() for x in (batch.image, batch.vector))
        zeros = np.zeros(rows, np.float32)
        step = EnvStep(image, vector, zeros, first, zeros > 0, zeros > 0, zeros, zeros)
        with patched(recorder(log, d3.RSSM, "observe")):
            carry = agent.act(step, carry)
        raw = log["observe"].result[2][0]
        policy = agent.actor.policy(agent.actor(torch.cat([carry.deter, carry.stoch], -1)))
        ours = {"action": carry.action, "deter": carry.deter, "stoch": latents(twin, carry.stoch),
                "logit": rssm.groups_of(raw).logits, "log_entropy": policy.entropy().reshape(rows)}
        for key, value in ours.items():
            compare(report, twin.fixture, f"policy/t{t}/{key}", value)


def check_update(report: Report, twin: Twin, n: int) -> None:
    """One call of `train_step`: everything in and after it."""
    agent, batch, carry, log = twin.agent, twin.batch(n), twin.carry(n), {}
    with torch.no_grad():
        before = probe_world_model(twin, batch, carry)
    scales, shipped = Rescaled(twin), d3.world_model_loss

    def with_shipped(result, call):
        call.shipped = shipped
        result = scales.model_losses(result, call)
        call.parts = term_gradients(twin, call.scaled) if n == 1 else {}
        return result

    with patched(recorder(log, d3, "world_model_loss", with_shipped), recorder(log, d3, "imagine"),
                 recorder(log, d3, "lambda_return"), recorder(log, d3.ReturnScale, "update"),
                 recorder(log, d3, "actor_loss", scales.actor_loss),
                 recorder(log, d3, "critic_loss", scales.critic_loss), gradient_recorder(log)):
        metrics = agent.train_step(batch, carry)
    call = SimpleNamespace(**{name: log[name] for name in log if isinstance(name, str)})
    opts = {"wm": (log[id(agent.model_opt)], agent.world_model),
            "actor": (log[id(agent.actor_opt)], agent.actor),
            "critic": (log[id(agent.critic_opt)], agent.critic)}

    check_world_model(report, twin, n, call.world_model_loss, before, batch)
    check_imagination(report, twin, n, call, before, batch)
    check_actor(report, twin, n, call, batch)
    check_critic(report, twin, n, call, batch)
    check_step(report, twin, n, opts, metrics)


def compare(report: Report, fixture: Fixture, key: str, ours, kind: str = "forward", scale=None):
    """Compare one array, if the fixture has it."""
    if key in fixture:
        report.check(key, ours, fixture[key], kind, scale)


def latents(twin: Twin, flat: Tensor) -> Tensor:
    """(..., Z) -> (..., S, K)."""
    return flat.unflatten(-1, (twin.args.stoch, twin.args.classes))


def batch_major(x: Tensor) -> Tensor:
    """(T, B, ...) -> (B, T, ...)."""
    return x.transpose(0, 1)


def probe_world_model(twin: Twin, batch: d3.Batch, carry: d3.State) -> dict[str, Tensor]:
    """What the world model computes on the way to its losses, asked of its modules: their names."""
    model, rssm = twin.agent.world_model, twin.agent.world_model.rssm
    prev_action = torch.cat([carry.action[None], batch.action[:-1]])
    embed = model.encoder(d3.centre(batch.image), batch.vector)
    deter, stoch, raw = rssm.observe(embed, prev_action, batch.is_first, carry)
    post, prior = rssm.groups_of(raw), rssm.prior(deter)
    feat = torch.cat([deter, stoch], -1)
    reward = model.reward_head(feat)
    plain = replace(twin.args, free_bits=0.0, beta_dyn=1.0)
    kl = d3.world_model_loss(model, batch, carry, plain)[0]["dyn"]
    found = {"embed": embed, "post_logit": post.logits, "prior_logit": prior.logits,
             "prior_deter": deter, "prior_stoch": prior.sample(), "kl_before_free": kl,
             "post_entropy": post.entropy().sum(-1), "prior_entropy": prior.entropy().sum(-1),
             "reward_logits": reward.logits, "reward_mean": reward.mean(),
             "cont_logit": model.continue_head(feat)}
    if twin.vectors:
        raw_vector = model.decoder.vector(feat)
        for key, columns in twin.columns.items():
            found[f"recon_raw_{key}"] = raw_vector[..., columns]
            found[f"recon_mode_{key}"] = d3.symexp(raw_vector[..., columns])
    found = {name: batch_major(x) for name, x in found.items()}
    if twin.images:
        channels = np.cumsum([twin.obs[key][-1] for key in twin.images])[:-1].tolist()
        images = (model.decoder.image(feat) + 0.5).tensor_split(channels, -1)
        for key, image in zip(twin.images, images):
            found[f"recon_{key}_b0_t0"] = image[0, 0]
            found[f"recon_{key}_lastb_lastt"] = image[-1, -1]
    first_deter, first_stoch = rssm.initial_state()
    return found | {"initial_deter": first_deter, "initial_stoch": latents(twin, first_stoch),
                    "initial_prior_logit": rssm.prior(first_deter).logits}


def check_world_model(report, twin, n, call, before, batch) -> None:
    """Posterior, prior, heads, and every loss term."""
    fixture, prefix = twin.fixture, f"step{n}/wm/"
    losses, deter, stoch, _ = call.result
    ours = before | {"post_deter": batch_major(deter),
                     "post_stoch": batch_major(latents(twin, stoch))}
    for name in ours:
        wide = name == "reward_mean" or name.startswith("recon_mode")  # outputs of symexp
        scale = ours[name].abs().clamp(min=1).numpy() if wide else None
        compare(report, fixture, prefix + name, ours[name], scale=scale)

    args, names = twin.args, {"reward": ["reward"], "continue": ["cont"], "dyn": ["dyn"],
                              "rep": ["rep"], "image": twin.images, "vector": twin.vectors}
    betas = {"dyn": args.beta_dyn, "rep": args.beta_rep}
    for name, loss in losses.items():
        keys = [f"{prefix}loss_unscaled/{key}" for key in names[name]]
        if keys[0] in fixture:  # ours has one term for all vectors, theirs one for each
            expected = sum(fixture[key] for key in keys)
            unscaled = loss / betas.get(name, args.beta_pred)
            report.check(keys[0] + "".join(f"+{key}" for key in names[name][1:]),
                         batch_major(unscaled), expected)
    compare(report, fixture, prefix + "model_loss_bt", batch_major(sum(call.scaled.values())))

    carry = {"latent/deter": deter[-1], "latent/stoch": latents(twin, stoch[-1]),
             "latent/logit": before["post_logit"][:, -1], "action": batch.action[-1]}
    for name, value in carry.items():
        compare(report, fixture, f"step{n}/carry_out/{name}", value)
        compare(report, fixture, f"step{n + 1}/carry_in/{name}", value)
    if n == 1:
        for term, grads in call.parts.items():
            report.check_all(fixture, f"grad_{term}/", twin.in_layout(grads), "gradient")


def term_gradients(twin: Twin, losses: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Gradients of the mean of each world-model loss term, for the parameters the fixture chose."""
    terms = {"dyn": ["dyn"], "rep": ["rep"], "reward": ["reward"], "cont": ["continue"],
             "recon": ["image", "vector"]}
    found = {}
    for term, names in terms.items():
        params = twin.params(twin.agent.world_model)
        params = {path: params[path] for path in twin.fixture.under(f"grad_{term}/")}
        if params:
            loss = sum(losses[name].mean() for name in names if name in losses)
            found[term] = dict(zip(params, gradient(loss, *params.values())))
    return found


def start_order(batch: d3.Batch):
    """A function that sorts our imagination columns n = t * B + b like theirs, n = b * T + t."""
    length, rows = batch.reward.shape
    return lambda x: x.unflatten(1, (length, rows)).transpose(1, 2).flatten(1, 2)


@torch.no_grad()
def check_imagination(report, twin, n, call, before, batch) -> None:
    """The imagined trajectory. Theirs has an action and a policy at state H as well."""
    fixture, agent, order = twin.fixture, twin.agent, start_order(batch)
    feat, action, _ = call.imagine.result
    deter, stoch = feat.split([twin.args.deter, feat.shape[-1] - twin.args.deter], -1)
    returns = call.lambda_return
    prior = agent.world_model.rssm.prior(deter[1:]).logits  # the world model is still the same
    ours = {"deter": deter, "stoch": latents(twin, stoch), "reward": returns.reward,
            "ret": returns.result, "base": returns.value[:-1], "value_all": returns.value,
            "cont": returns.discount / twin.args.gamma,
            "cont_logit": agent.world_model.continue_head(feat)}
    for name, value in ours.items():
        compare(report, fixture, f"step{n}/imag/{name}", order(value))
    for name, value in {"action": action, "weight": call.actor_loss.weight}.items():
        first_states(report, fixture, f"step{n}/imag/{name}", order(value))
    key = f"step{n}/imag/logit"
    if key in fixture:
        report.check(key + "[1:]", order(prior), fixture[key][1:])
        report.check(key + "[0]", before["post_logit"].flatten(0, 1), fixture[key][0])


def first_states(report: Report, fixture: Fixture, key: str, ours: Tensor) -> None:
    """Compare what ours has, states 0 to H - 1, with theirs, which has state H as well."""
    if key in fixture:
        report.check(f"{key}[:{len(ours)}]", ours, fixture[key][:len(ours)])


def per_element(loss: Tensor, weight: Tensor) -> Tensor:
    """weight * element, from a loss = mean(weight * element): no second copy of the loss needed."""
    return (weight * gradient(loss, weight)[0] * weight.numel()).detach()


def check_actor(report, twin, n, call, batch) -> None:
    """Return scale, advantages, policy and the actor's loss."""
    fixture, order, prefix = twin.fixture, start_order(batch), f"step{n}/actor/"
    args, low = call.actor_loss, call.update.self.range[0]
    compare(report, fixture, prefix + "retnorm_offset", low)
    compare(report, fixture, prefix + "retnorm_invscale", call.update.result)
    compare(report, fixture, f"retnorm_after{n}/low", low)
    compare(report, fixture, f"retnorm_after{n}/high", call.update.self.range[1])
    weight = args.weight.detach().requires_grad_()
    loss, _ = d3.actor_loss(*(args.given | {"weight": weight}).values())
    elements = per_element(loss * twin.config["loss_scales.actor"], weight)
    normed_return, normed_base = (args.ret - low) / args.scale, (args.value - low) / args.scale
    # The advantage is the difference of these two, so it has their rounding errors.
    size = float(torch.stack([normed_return, normed_base]).detach().abs().max())
    ours = {"normed_return": normed_return, "normed_base": normed_base,
            "policy_logprob": args.policy.log_prob(args.action),
            "policy_entropy": args.result[1], "loss_elem": elements}
    for name, value in ours.items():
        compare(report, fixture, prefix + name, order(value))
    advantage = (args.ret - args.value) / args.scale
    compare(report, fixture, prefix + "adv", order(advantage), scale=size)
    params = {"logits": "policy_logits", "mean": "policy_mean", "std": "policy_std"}
    for ours_name, theirs in params.items():
        if isinstance(getattr(args.policy, ours_name, None), Tensor):
            first_states(report, fixture, prefix + theirs, order(getattr(args.policy, ours_name)))
    compare(report, fixture, prefix + "loss", args.scaled, scale=float(elements.abs().max()))


def check_critic(report, twin, n, call, batch) -> None:
    """Targets, both parts of the critic's loss, and the loss."""
    fixture, order, prefix = twin.fixture, start_order(batch), f"step{n}/critic/"
    args = call.critic_loss
    weight = args.weight.detach().requires_grad_()
    loss = d3.critic_loss(*(args.given | {"weight": weight}).values())
    ours = {"target": args.ret, "slow_value": args.slow_value,
            "nll": -args.value_dist.log_prob(args.ret.detach()),
            "slowreg": -args.value_dist.log_prob(args.slow_value),
            "loss_elem": per_element(loss * twin.config["loss_scales.critic"], weight)}
    for name, value in ours.items():
        compare(report, fixture, prefix + name, order(value))
    compare(report, fixture, prefix + "loss", args.scaled)


def check_step(report, twin, n, opts, metrics) -> None:
    """What the optimisers get and do, and the metrics that `train_step` returns."""
    fixture = twin.fixture
    compare(report, fixture, f"step{n}/wm/model_loss", opts["wm"][0].loss)
    for name, (opt, net) in opts.items():
        if fixture.under(f"step{n}/{name}/grad/"):
            grads = {path: opt.grads[id(param)] for path, param in twin.params(net).items()}
            report.check_all(fixture, f"step{n}/{name}/grad/", twin.in_layout(grads), "gradient")
    theirs = {"grad_norm/model": "model_opt_grad_norm", "grad_norm/actor": "actor_opt_grad_norm",
              "grad_norm/critic": "extr_critic_critic_opt_grad_norm",
              "loss/model": "model_opt_loss",
              "loss/critic": "extr_critic_critic_opt_loss", "actor/entropy": "policy_entropy_mean",
              "imagined/return": "extr_return_raw_mean", "imagined/reward": "extr_reward_mean",
              "latent/post_entropy": "post_ent_mean", "latent/prior_entropy": "prior_ent_mean"}
    for ours, key in theirs.items():
        kind = "gradient" if ours.startswith("grad_norm") else "forward"
        compare(report, fixture, f"step{n}/metrics/{key}", metrics[ours], kind)
    if fixture.under(f"params_after{n}/"):
        report.check_all(fixture, f"params_after{n}/", twin.in_layout(twin.params()), "parameter")


def check_optimizers(report: Report, twin: Twin, after: str) -> None:
    """Adam's moments and the counters after the last update."""
    fixture, agent = twin.fixture, twin.agent
    opts = {"model_opt": agent.model_opt, "actor_opt": agent.actor_opt,
            "critic_opt": agent.critic_opt}
    state = {id(param): values for opt in opts.values() for param, values in opt.adam.state.items()}
    for start, name in (("adam_mu", "exp_avg"), ("adam_nu", "exp_avg_sq")):
        prefix = start + after
        if fixture.under(prefix):
            ours = {path: state[id(param)][name] for path, param in twin.params().items()
                    if id(param) in state}
            report.check_all(fixture, prefix, twin.in_layout(ours), "gradient")
    for prefix in ("adam_count" + after, "opt" + after):
        for key in fixture.under(prefix):
            opt = next(opt for name, opt in opts.items() if f"/{name}/" in key)
            steps = {float(values["step"]) for values in opt.adam.state.values()}
            report.check(prefix + key, np.max(list(steps)), fixture[prefix + key], "exact")
    for key in fixture.under("slow_updates" + after):
        key = "slow_updates" + after + key
        report.check(key, agent.updates, fixture[key], "exact")


# ------------------------------------------------------------------------------- single pieces
def check_math(report: Report, fixture: Fixture) -> None:
    """Every unit-level quantity of `v3_math.npz` that the fixture has."""
    checks = {"symlog": math_symlog, "discdist": math_two_hot, "onehot": math_one_hot,
              "klloss": math_kl, "lambda": math_returns, "moments": math_return_scale,
              "actor_normal": math_gaussian, "actor_onehot": math_actor_one_hot,
              "symlog_mse": math_predictions, "layer_linear": math_layers, "optim": math_optimizer}
    with patched(*rule()):
        for prefix, check in checks.items():
            if fixture.under(prefix + "/"):
                check(report, fixture)


def math_symlog(report: Report, fixture: Fixture) -> None:
    """symlog, symexp and their derivatives, element by element."""
    for name, function in (("symlog", d3.symlog), ("symexp", d3.symexp)):
        x = leaf(fixture[f"{name}/x"])
        y = function(x)
        for key, ours in (("y", y), ("dydx", gradient(y, x)[0])):
            expected = fixture[f"{name}/{key}"]
            report.check(f"{name}/{key}", ours, expected, scale=np.abs(expected).clip(1))


def math_two_hot(report: Report, fixture: Fixture) -> None:
    """Two-hot distribution; the targets of `_identity` are in symlog space: transform them back."""
    head = d3.TwoHotHead(d3.Args(size="XXS"), 1)
    logits, target = leaf(fixture["discdist/logits"]), fixture.tensor("discdist/target")
    two_hot = d3.TwoHot(logits, head.buckets)
    log_prob, mean = two_hot.log_prob(target), two_hot.mean()
    report.check("discdist/bins", head.buckets, fixture["discdist/bins"])
    report.check("discdist/log_prob", log_prob, fixture["discdist/log_prob"])
    size = np.abs(fixture["discdist/mean"]).clip(1)
    report.check("discdist/mean", mean, fixture["discdist/mean"], scale=size)
    for key, output in (("dlogprob_dlogits", log_prob), ("dmean_dlogits", mean)):
        expected = fixture[f"discdist/{key}"]
        report.check(f"discdist/{key}", gradient(output, logits)[0], expected, "gradient",
                     np.abs(expected).max(-1, keepdims=True))
    two_hot = d3.TwoHot(fixture.tensor("discdist_identity/logits"), head.buckets)
    target = d3.symexp(fixture.tensor("discdist_identity/target"))
    report.check("discdist_identity/log_prob", two_hot.log_prob(target),
                 fixture["discdist_identity/log_prob"])


def math_one_hot(report: Report, fixture: Fixture) -> None:
    """Latents: unimix, log-probability, entropy, KL, straight-through sample."""
    unimix = fixture.meta["unimix"]
    raw_p, raw_q = leaf(fixture["onehot/raw_p"]), fixture.tensor("onehot/raw_q")
    p, q = d3.OneHot(raw_p, unimix), d3.OneHot(raw_q, unimix)
    sample, entropy = p.sample(), p.entropy().sum(-1)
    weighted = (sample * fixture.tensor("onehot/st_weight")).sum()
    value = fixture.tensor("onehot/value")
    forward = {"unimix_logit_p": p.logits, "unimix_logit_q": q.logits, "entropy_p": entropy,
               "log_prob_p": p.log_prob(value).sum(-1), "mode_p": p.mode(), "sample_rule_p": sample,
               "kl_p_q": kl_terms(fixture, raw_p, raw_q, 0.0)["dyn"],
               "kl_q_p": kl_terms(fixture, raw_q, raw_p, 0.0)["dyn"]}
    for key, ours in forward.items():
        report.check(f"onehot/{key}", ours, fixture[f"onehot/{key}"])
    for key, output in (("st_grad_raw_p", weighted), ("entropy_grad_raw_p", entropy)):
        ours = gradient(output, raw_p)[0]
        report.check(f"onehot/{key}", ours, fixture[f"onehot/{key}"], "gradient")


def shipped_losses(args: d3.Args, raw_post: Tensor, raw_prior: Tensor, terminal: Tensor,
                   image=None, vector=None, predicted: Tensor | None = None,
                   cont_logit: Tensor | None = None) -> dict[str, Tensor]:
    """`world_model_loss` of a model whose networks return what they are told to."""
    shape = terminal.shape
    rssm = d3.RSSM(args, 1, 1)
    zeros = torch.zeros(*shape, args.bins)
    buckets = d3.TwoHotHead(args, 1).buckets
    state = torch.zeros(*shape, 1)
    logit = torch.zeros(shape) if cont_logit is None else cont_logit
    model = SimpleNamespace(
        encoder=lambda *_: state, reward_head=lambda _: d3.TwoHot(zeros, buckets),
        continue_head=lambda _: logit,
        decoder=SimpleNamespace(image=lambda _: predicted, vector=lambda _: predicted),
        rssm=SimpleNamespace(groups_of=rssm.groups_of, observe=lambda *_: (state, state, raw_post),
                             prior=lambda _: rssm.groups_of(raw_prior)))
    batch = d3.Batch(image, vector, state, torch.zeros(shape), terminal > 1, terminal)
    carry = d3.State(state[0], state[0], state[0])
    return d3.world_model_loss(model, batch, carry, args)[0]


def kl_terms(fixture: Fixture, raw_post: Tensor, raw_prior: Tensor,
             free: float) -> dict[str, Tensor]:
    """Unscaled dynamics and representation loss of raw logits (..., S, K)."""
    meta, steps = fixture.meta, raw_post.shape[:-2]
    args = d3.Args(size="XXS", stoch=meta["stoch"], classes=meta["classes"], unimix=meta["unimix"],
                   free_bits=free, beta_dyn=1.0, beta_rep=1.0)
    flat = (steps.numel(), 1, args.stoch * args.classes)
    losses = shipped_losses(args, raw_post.reshape(flat), raw_prior.reshape(flat),
                            torch.zeros(flat[:2], dtype=torch.bool))
    return {name: losses[name].reshape(steps) for name in ("dyn", "rep")}


def math_kl(report: Report, fixture: Fixture) -> None:
    """Both KL losses and where their gradients go."""
    meta = fixture.meta
    post, prior = leaf(fixture["klloss/raw_post"]), leaf(fixture["klloss/raw_prior"])
    losses = kl_terms(fixture, post, prior, meta["free_nats"])
    total = (meta["dyn_scale"] * losses["dyn"] + meta["rep_scale"] * losses["rep"]).mean()
    forward = {"dyn": losses["dyn"], "rep": losses["rep"], "total_mean": total,
               "kl_before_free": kl_terms(fixture, post, prior, 0.0)["dyn"]}
    for key, ours in forward.items():
        report.check(f"klloss/{key}", ours, fixture[f"klloss/{key}"])
    for key, ours in zip(("grad_raw_post", "grad_raw_prior"), gradient(total, post, prior)):
        report.check(f"klloss/{key}", ours, fixture[f"klloss/{key}"], "gradient")


def math_returns(report: Report, fixture: Fixture) -> None:
    """Lambda-return."""
    reward, value, cont = (fixture.tensor(f"lambda/{key}") for key in ("reward", "value", "cont"))
    gamma = d3.Args(size="XXS", discount_horizon=fixture.meta["lambda_horizon"]).gamma
    ours = d3.lambda_return(reward, value, gamma * cont, fixture.meta["return_lambda"])
    report.check("lambda/return", ours, fixture["lambda/return"])


def math_return_scale(report: Report, fixture: Fixture) -> None:
    """Successive updates of the return scale."""
    meta = fixture.meta["retnorm"]
    scale = d3.ReturnScale(d3.Args(
        size="XXS", return_norm_low=meta["perclo"] / 100, return_norm_high=meta["perchi"] / 100,
        return_norm_limit=1 / meta["max"], return_norm_decay=meta["decay"]))
    found = {"low_state": [], "high_state": [], "invscale": [], "offset": []}
    for ret in fixture.tensor("moments/x"):
        found["invscale"].append(scale.update(ret))
        for key, which in (("low_state", 0), ("high_state", 1), ("offset", 0)):
            found[key].append(scale.range[which].clone())
    for key, ours in found.items():
        report.check(f"moments/{key}", torch.stack(ours), fixture[f"moments/{key}"])


def actor(fixture: Fixture, actions: int, discrete: bool) -> d3.Actor:
    """An actor with the fixture's settings; its network is not used."""
    args = d3.Args(size="XXS", unimix=fixture.meta["unimix"],
                   actor_min_std=fixture.meta["actor_minstd"],
                   actor_max_std=fixture.meta["actor_maxstd"])
    return d3.Actor(args, EnvSpec(None, 1, actions, discrete), 1)


def math_gaussian(report: Report, fixture: Fixture) -> None:
    """Policy of continuous actions."""
    raw_mean, raw_std = (leaf(fixture[f"actor_normal/raw_{key}"]) for key in ("mean", "std"))
    policy = actor(fixture, raw_mean.shape[-1], False).policy(torch.cat([raw_mean, raw_std], -1))
    log_prob = policy.log_prob(fixture.tensor("actor_normal/action"))
    entropy = policy.entropy().reshape(log_prob.shape)
    forward = {"mean": policy.mean, "std": policy.std, "log_prob": log_prob, "entropy": entropy,
               "mode": policy.mode(), "sample_rule": policy.sample()}
    backward = {"dlogprob_draw_mean": gradient(log_prob, raw_mean)[0],
                "dlogprob_draw_std": gradient(log_prob, raw_std)[0],
                "dentropy_draw_std": gradient(entropy, raw_std)[0]}
    for kind, found in (("forward", forward), ("gradient", backward)):
        for key, ours in found.items():
            report.check(f"actor_normal/{key}", ours, fixture[f"actor_normal/{key}"], kind)


def math_actor_one_hot(report: Report, fixture: Fixture) -> None:
    """Policy of discrete actions."""
    raw = leaf(fixture["actor_onehot/raw"])
    policy = actor(fixture, raw.shape[-1], True).policy(raw)
    log_prob = policy.log_prob(fixture.tensor("actor_onehot/action"))
    entropy = policy.entropy()
    forward = {"logits": policy.logits, "probs": policy.probs, "log_prob": log_prob,
               "entropy": entropy, "mode": policy.mode(), "sample_rule": policy.sample()}
    backward = {"dlogprob_draw": gradient(log_prob, raw)[0],
                "dentropy_draw": gradient(entropy, raw)[0]}
    for kind, found in (("forward", forward), ("gradient", backward)):
        for key, ours in found.items():
            report.check(f"actor_onehot/{key}", ours, fixture[f"actor_onehot/{key}"], kind)


def math_predictions(report: Report, fixture: Fixture) -> None:
    """Vector, image and continue loss, as `world_model_loss` computes them."""
    args = d3.Args(size="XXS", stoch=1, classes=2)

    def losses(rows, **given):
        raw, alive = torch.zeros(*rows, 2), torch.zeros(rows, dtype=torch.bool)
        return shipped_losses(args, raw, raw, given.pop("terminal", alive), **given)

    pred, target = leaf(fixture["symlog_mse/pred"]), fixture.tensor("symlog_mse/target")
    found = losses((len(pred), 1), vector=target[:, None], predicted=pred[:, None])["vector"]
    log_prob = -found[:, 0]
    report.check("symlog_mse/log_prob", log_prob, fixture["symlog_mse/log_prob"])
    report.check("symlog_mse/mode", d3.symexp(pred), fixture["symlog_mse/mode"])
    report.check("symlog_mse/dlogprob_dpred", gradient(log_prob, pred)[0],
                 fixture["symlog_mse/dlogprob_dpred"], "gradient")

    pred, target = (fixture.tensor(f"mse_image/{key}") for key in ("pred", "target"))
    found = losses(pred.shape[:2], image=target * 255, predicted=pred - 0.5)["image"]
    report.check("mse_image/log_prob", -found, fixture["mse_image/log_prob"])

    logit, target = (fixture.tensor(f"bernoulli/{key}")[:, None] for key in ("logit", "target"))
    found = losses(logit.shape, terminal=target < 0.5, cont_logit=logit)["continue"]
    report.check("bernoulli/log_prob", -found[:, 0], fixture["bernoulli/log_prob"])


def math_layers(report: Report, fixture: Fixture) -> None:
    """One layer each: dense, convolution, transposed convolution, GRU."""
    def fill(layer, norm, prefix, order):
        layer.weight.data = fixture.tensor(f"{prefix}/kernel").permute(order).contiguous()
        if norm is not None:
            norm.weight.data = fixture.tensor(f"{prefix}/norm_scale")
            norm.bias.data = fixture.tensor(f"{prefix}/norm_bias")

    args = d3.Args(size="XXS", image_size=8, depth=5)
    dense = d3.Dense(6, 5)
    fill(dense, dense.norm, "layer_linear", (1, 0))
    y = dense(fixture.tensor("layer_linear/x"))
    report.check("layer_linear/y", y, fixture["layer_linear/y"])

    cnn = d3.Encoder(args, EnvSpec((8, 8, 3), 0, 1, True)).cnn
    fill(cnn[0], cnn[1], "layer_conv", (3, 2, 0, 1))
    x = fixture.tensor("layer_conv/x").permute(0, 3, 1, 2)
    for key, ours in (("y", cnn(x)), ("y_linear_only", cnn[0](x))):
        report.check(f"layer_conv/{key}", ours.permute(0, 2, 3, 1), fixture[f"layer_conv/{key}"])

    cnn = d3.Decoder(args, EnvSpec((8, 8, 2), 0, 1, True), 1).cnn
    kernel = fixture.tensor("layer_convtransp/kernel").flip(0, 1)
    cnn[0].weight.data = kernel.permute(3, 2, 0, 1).contiguous()
    cnn[0].bias.data = fixture.tensor("layer_convtransp/bias")
    y = cnn(fixture.tensor("layer_convtransp/x").permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    report.check("layer_convtransp/y", y, fixture["layer_convtransp/y"])

    h, x = fixture.tensor("layer_gru/h"), fixture.tensor("layer_gru/x")
    rssm = d3.RSSM(replace(args, deter=h.shape[-1], hidden=x.shape[-1]), 1, 1)
    fill(rssm.gru, rssm.gru_norm, "layer_gru", (1, 0))
    found = rssm.gate(h, rssm.gru(torch.cat([h, x], -1)))
    report.check("layer_gru/h_next", found, fixture["layer_gru/h_next"])


def math_optimizer(report: Report, fixture: Fixture) -> None:
    """Clipping and Adam, for gradients that are given: loss = <parameter, gradient>."""
    meta = fixture.meta["optim"]
    params = [nn.Parameter(fixture.tensor(f"optim/{name}0")) for name in "wv"]
    optimizer = d3.Optimizer(params, meta["lr"], meta["eps"], meta["clip"])
    found = {"w_after": [], "v_after": [], "grad_norm_metric": []}
    for grads in zip(fixture.tensor("optim/grad_w"), fixture.tensor("optim/grad_v")):
        norm = optimizer.step(sum((p * g).sum() for p, g in zip(params, grads)))
        found["grad_norm_metric"].append(norm)
        for key, param in zip(("w_after", "v_after"), params):
            found[key].append(param.detach().clone())
    for key, ours in found.items():
        kind = "forward" if key == "grad_norm_metric" else "parameter"
        report.check(f"optim/{key}", torch.stack(ours), fixture[f"optim/{key}"], kind)
