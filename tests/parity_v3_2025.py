"""What `tests.parity` compares for the DreamerV3 of 2025: fixtures of danijar/dreamerv3 at e3f0224."""

import math
import re
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import dreamer_v3_2025 as d
from dreamer_v3_2025 import EnvSpec
from tests import parity, parity_v3
from tests.parity import batch_major, element, gradient, patched, per_step, recorder, shipped_losses
from tests.parity_v3 import elementwise, row

IGNORED = {
    "meta/*": "settings; those that matter are read",
    "batch*/consec": "zeros: the carry of the last call is not used",
    "batch*/is_last": "ours takes an end from the is_first behind it",
    "step*/metrics/*": "statistics of arrays that are compared element by element",
    "lambda_replay/value": "an input that the return does not use",
    "optim/pmin": "ours is always 1e-3",
    "optim/*_update": "the difference of two parameters that are compared",
}

RMS = False  # the scale of a gradient is its maximum
# `tie`: gradients of the first convolutions from the second update on, where two pixels of a 2x2 maximum
# may be so close that rounding decides. `momentum`: LaProp divides a gradient by its own size, so one
# that is all but 0 and consists of rounding counts as much as any other.
TOLERANCE = {"forward": 2e-5, "gradient": 1e-4, "tie": 1e-3, "momentum": 1e-2, "parameter": 1e-5}
ARGS = d.Args(size="1M")


# ---------------------------------------------------------------------------------- an agent like theirs
class Outputs(nn.ModuleList):
    """Shipped output layers side by side."""

    def __init__(self, inputs: int, widths: list[int]):
        super().__init__(d.Linear(inputs, width) for width in widths)
        self.out_features = sum(widths)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self], -1)


class Twin(parity_v3.Twin):
    script = d
    rename = [
        (r"^(pol|val|slowval|rew|con)/mlp/(linear|norm)(\d+)/", r"\1/head/mlp/\3/\2/"),
        (r"^(dec)/mlp/(linear|norm)(\d+)/", r"\1/vector_head/mlp/\3/\2/"),
        (r"^pol/head/action/stddev/", "pol/std/"), (r"^pol/head/action/(logits|mean)/", "pol/head/out/"),
        (r"^(val|slowval|rew|con)/head/(logits|logit)/", r"\1/head/out/"),
        (r"^enc/mlp(\d+)norm/", r"enc/mlp/\1/norm/"),
        (r"^enc/mlp(\d+)/", r"enc/mlp/\1/"), (r"^enc/cnn(\d+)norm/", lambda m: f"enc/cnn/{4 * int(m[1]) + 2}/"),
        (r"^enc/cnn(\d+)/", lambda m: f"enc/cnn/{4 * int(m[1])}/"),
        (r"^dec/conv(\d+)norm/", lambda m: f"dec/cnn/{3 * (2 - int(m[1])) + 1}/"),
        (r"^dec/conv(\d+)/", lambda m: f"dec/cnn/{3 * (2 - int(m[1]))}/"), (r"^dec/imgout/", "dec/cnn/9/"),
        (r"^dec/sp0/", "dec/deter_in/"), (r"^dec/sp1norm/", "dec/stoch_in/0/norm/"),
        (r"^dec/sp1/", "dec/stoch_in/0/"), (r"^dec/sp2/", "dec/stoch_in/1/"),
        (r"^dec/spnorm/", "dec/norm/"), (r"^dyn/dynin0", "dyn/deter_in"), (r"^dyn/dynin1", "dyn/stoch_in"),
        (r"^dyn/dynin2", "dyn/action_in"), (r"^dyn/dynhid0norm/", "dyn/gru/norm/"),
        (r"^dyn/dynhid0/", "dyn/gru/hidden/"), (r"^dyn/dyngru/", "dyn/gru/gates/"),
        (r"^dyn/obs0", "dyn/obs_out"), (r"^dyn/obslogit/", "dyn/obs_stats/"),
        (r"^dyn/prior(\d)norm/", r"dyn/img_out/\1/norm/"), (r"^dyn/prior(\d)/", r"dyn/img_out/\1/"),
        (r"^dyn/priorlogit/", "dyn/img_stats/"), (r"(_in|_out)norm/", r"\1/norm/"), (r"/linear/", "/"),
        (r"^pol/", "actor/"), (r"^val/", "critic/"), (r"^slowval/", "slow_critic/"), (r"^rew/head/", "rew/"),
        (r"^con/head/", "con/"), (r"^rew/", "world_model/reward_head/"), (r"^con/", "world_model/cont_head/"),
        (r"^enc/", "world_model/encoder/"), (r"^dec/", "world_model/decoder/"),
        (r"^dyn/", "world_model/rssm/"), (r"/(kernel|scale)$", "/weight"), (r"/", ".")]
    swapped, flipped, vector_out = r"dec/mlp/linear0/kernel$", "$^", "$^"
    optimizers = {"all": "all"}
    return_scale = ("params_init/retnorm/lo/value", "params_init/retnorm/hi/value")
    scale_names = {"actor": "policy", "critic": "value"}
    policy_logits, scaled_elements = "raw", False
    settings = """imag_horizon=imag_length deter=dyn.rssm.deter hidden=dyn.rssm.hidden stoch=dyn.rssm.stoch
        classes=dyn.rssm.classes unimix=dyn.rssm.unimix blocks=dyn.rssm.blocks bins=value.bins
        units=policy.units layers=policy.layers head_layers=rewhead.layers depth=enc.simple.depth
        beta_dyn=loss_scales.dyn beta_rep=loss_scales.rep beta_replay=loss_scales.repval
        free_bits=dyn.rssm.free_nats return_lambda=imag_loss.lam critic_ema_regularizer=imag_loss.slowreg
        return_norm_low=retnorm.perclo return_norm_high=retnorm.perchi return_norm_limit=retnorm.limit
        actor_entropy=imag_loss.actent actor_min_std=policy.minstd actor_max_std=policy.maxstd
        lr=opt.lr warmup=opt.warmup agc=opt.agc beta1=opt.beta1 beta2=opt.beta2 eps=opt.eps"""

    def observations(self) -> dict[str, tuple[int, ...]]:
        found = parity.Twin.observations(self)
        return {key: found[key] for key in sorted(found) if key != "consec" and not key.startswith("dyn/")}

    def env_spec(self, vector_dim: int) -> EnvSpec:
        actions = self.fixture.arrays["batch1/action"]
        self.fixture.meta |= {"action_dim": self.fixture.meta["case"]["A"], "discrete": actions.ndim == 2}
        return super().env_spec(vector_dim)

    def make_args(self, given: dict) -> d.Args:
        """Their windows have a row more, the context."""
        c, length = self.config, {"batch_length": self.length - 1}
        return d.Args(size="1M", amp="off", seed=0, **given | length, **self.shapes(), gamma=1 - 1 / c["horizon"],
                      critic_ema_decay=1 - c["slowvalue.rate"], return_norm_decay=1 - c["retnorm.rate"])

    def predictions(self) -> dict[str, float]:
        return {name: self.config[f"loss_scales.{name}"] for name in ("rec", "rew", "con")}

    def loss_scales(self) -> dict[str, float]:
        """What is left of each scale of theirs after our flags."""
        theirs = {name: scale / self.args.beta_pred for name, scale in self.predictions().items()}
        return {"image": theirs["rec"], "vector": theirs["rec"], "reward": theirs["rew"], "cont": theirs["con"]}

    def sized_networks(self) -> list[tuple[object, str, object]]:
        """Theirs has an output layer for each vector and clips each gradient by itself; ours sees one vector."""
        def decoder(args, spec, feat_dim, shipped=d.Decoder):
            made = shipped(args, spec, feat_dim)
            if len(self.vectors) > 1:
                made.vector_head.out = Outputs(args.units, [math.prod(self.obs[key]) for key in self.vectors])
            return made
        return [(d, "Decoder", decoder)]

    def places(self, path: str, numbers: dict[str, Tensor]) -> Tensor:
        """Their kernel of the hidden layer has [a part of deter, x, action] for each block; ours are apart."""
        if path == "dyn/dynhid0/kernel":
            weight = "world_model.rssm.gru.hidden.weight"
            shared = [numbers[weight + half].unflatten(0, (self.args.blocks, -1)).transpose(1, 2)
                      for half in ("_a", "_b")]
            return torch.cat([numbers[weight], *shared], 1)
        if path in ("dyn/dyngru/kernel", "dec/sp0/kernel"):
            name = "rssm.gru.gates" if "dyngru" in path else "decoder.deter_in"
            return numbers[f"world_model.{name}.weight"]
        if vector := re.match("dec/vec/(.*)/pred/", path):
            number = f"{self.vectors.index(vector[1])}/" if len(self.vectors) > 1 else ""
            path = path.replace(vector[0], f"dec/vector_head/out/{number}")
        return super().places(path, numbers)

    def load_weights(self) -> None:
        """The return scale and the counter are no parameters."""
        self.paths = [path for path in self.paths if not path.startswith(("retnorm/", "slowval_count/"))]
        super().load_weights()
        self.agent.updates = int(self.fixture[f"{self.init}slowval_count/value"])
        self.agent.all_opt = self.agent.optimizer  # a name that `parity` goes by

    def onehot(self, action: Tensor) -> Tensor:
        discrete = self.spec.discrete
        return torch.nn.functional.one_hot(action.long(), self.spec.action_dim).float() if discrete else action

    def batch(self, n: int) -> d.Batch:
        """Rows 1 ... T, and what row 0, the context row, is used for."""
        def get(key):
            return batch_major(self.fixture.tensor(f"batch{n}/{key}"))[1:].contiguous()
        image = torch.cat([get(key) for key in self.images], -1) if self.images else None
        vector = torch.cat([get(key).flatten(2).float() for key in self.vectors], -1) if self.vectors else None
        deter, stoch, action = (self.fixture.tensor(f"batch{n}/{key}")[:, 0]
                                for key in ("dyn/deter", "dyn/stoch", "action"))
        return d.Batch(image, vector, self.onehot(get("action")), get("reward"), get("is_first"), get("is_terminal"),
                       deter[None], stoch.flatten(-2)[None], self.onehot(action)[None])

    def seen(self, batch: d.Batch, t: int) -> d.EnvStep:
        """Acting sees the context row, too."""
        def get(key):
            return self.fixture[f"batch1/{key}"][:, t]
        image = np.concatenate([get(key) for key in self.images], -1) if self.images else None
        vector = (np.concatenate([get(key).reshape(self.rows, -1) for key in self.vectors], -1).astype(np.float32)
                  if self.vectors else None)
        zeros, no = np.zeros(self.rows, np.float32), np.zeros(self.rows, bool)
        return d.EnvStep(image, vector, zeros, get("is_first") | (t == 0), no, no, zeros, zeros)

    def carry(self, n: int, batch: d.Batch) -> d.State:
        return self.agent.carry(batch)

    def check_optimizers(self, after: str) -> None:
        optimizer, prefix = self.agent.optimizer, "opt" + after
        for key, ours, kind in (("state/1/1/", optimizer.nu, "tie"), ("state/2/1/", optimizer.mu, "momentum")):
            if self.fixture.under(prefix + key):
                found = self.in_their_layout(optimizer.params, ours)
                self.report.check_all(self.fixture, prefix + key, found, kind)
        for key in ("state/1/0", "state/2/0", "state/3/count", "step/value"):
            self.compare(prefix + key, optimizer.step, "exact")

    def check_acting(self) -> None:
        for t, _, state, _ in self.acted(self.fixture.numbered("policy/t")):
            expected = self.fixture.tensor(f"policy/t{t}/action")
            self.report.check(f"policy/t{t}/action", state.action, self.onehot(expected).cpu())
            self.compare_all(f"policy/t{t}/", {"deter": state.deter, "stoch": self.groups(state.stoch)})

    scaled_model = parity.Twin.scaled_model

    def scaled_critic(self, result, call):
        """Of imagined returns; that of replayed ones has its scale from `Agent.learn`."""
        if call.earlier is None:
            return super().scaled_critic(result, call)
        call.scaled = result
        return result

    def train(self, n: int, batch, carry) -> SimpleNamespace:
        """Both critic losses; while the weights are the old ones, priors and gradients of each loss."""
        def more(log):
            def last(result, call):
                deter = log["imagine"].result[0][1:, :, :self.args.deter]
                call.priors = self.agent.world_model.rssm.prior(deter).raw
                if n == 1:
                    critic = log["critic_loss"]
                    call.parts = self.term_gradients(log["world_model_loss"].scaled | {
                        "policy": log["actor_loss"].scaled, "value": critic.earlier.scaled,
                        "repval": self.args.beta_replay * critic.scaled})
                return result
            return [recorder(log, d.ReturnScale, "update"), recorder(log, d, "replay_critic_loss", last)]

        call = self.recorded((batch,), self.scaled(), more)
        call.replay, call.critic_loss = call.critic_loss, call.critic_loss.earlier
        return call

    def check_parts(self, parts: dict[str, dict[str, Tensor]]) -> None:
        """An absent key of theirs is a gradient that is all zero."""
        for term, grads in parts.items():
            keys = {"image": self.images, "vector": self.vectors, "reward": ["rew"], "cont": ["con"]}.get(term, [term])
            prefixes = [f"gradparts/{key}/" for key in keys]
            expected: dict[str, np.ndarray] = {}
            for prefix in prefixes:
                for path in self.fixture.under(prefix):
                    expected[path] = expected.get(path, 0) + self.fixture[prefix + path]
            if not expected:
                continue
            if missing := expected.keys() - grads.keys():
                self.report.fail(prefixes[0], f"no gradient for {sorted(missing)}")
            zeros = {path: np.zeros(grad.shape) for path, grad in grads.items()}
            self.report.check_worst("+".join(prefixes), grads, zeros | expected, "gradient")

    def check_world_model(self, n, call, before, batch) -> None:
        prefix, first = f"step{n}/wm/", batch.is_first[..., None]
        previous = batch_major(d.previous_actions(batch, self.agent.carry(batch).action) * ~first)
        expected = self.onehot(self.fixture.tensor(prefix + "prevact"))
        if self.spec.discrete:  # theirs has an index, of a zero vector where is_first
            expected *= ~batch_major(first)
        self.report.check(prefix + "prevact", previous, expected.cpu())
        losses, deter, stoch, _ = call.world_model_loss.result
        self.check_probed(prefix, before | {"post_deter": batch_major(deter),
                                            "post_stoch": batch_major(self.groups(stoch))})
        self.check_terms(f"step{n}/loss/", losses, {"reward": ["rew"], "cont": ["con"],
                                                    "image": self.images, "vector": self.vectors})
        _, deter, stoch = call.returned
        latents = {"deter": batch_major(deter), "stoch": batch_major(self.groups(stoch))}
        self.compare_all(f"step{n}/replay/", latents)
        self.compare_all(f"step{n}/carry_out/", {name: x[:, -1] for name, x in latents.items()})
        if n == 1:
            self.check_parts(call.replay_critic_loss.parts)

    @torch.no_grad()
    def check_imagination(self, n, call, before) -> None:
        """The imagined trajectory. Theirs has an action, and what follows, at state H as well."""
        order, prefix = self.start_order, f"step{n}/imag/"
        feat, action, _ = call.imagine.result
        deter, stoch = feat.split([self.args.deter, self.args.stoch_dim], -1)
        returns, steps = call.lambda_return.earlier, slice(0, self.args.imag_horizon)
        self.compare_all(prefix, {name: order(x) for name, x in {
            "deter": deter, "stoch": self.groups(stoch), "ret": returns.result,
            "value": torch.cat([call.actor_loss.baseline, returns.next_value[-1:]])}.items()})
        first = call.actor_loss.weight[:1]
        self.compare(prefix + "cont", order(torch.cat([first, returns.discount])))
        self.compare(prefix + "reward", order(returns.reward), steps=slice(1, None))
        self.compare(prefix + "weight", order(call.actor_loss.weight), steps=steps)
        self.compare(prefix + "slow_value", order(call.critic_loss.slow_value), steps=steps)
        expected = self.onehot(self.fixture.tensor(prefix + "action")).cpu().numpy()
        self.report.check(prefix + "action", order(action), expected[:-1])
        self.compare(prefix + "prior_logit_raw", order(call.replay_critic_loss.priors))

    def check_replay_critic(self, n, call) -> None:
        prefix, whole, args = f"step{n}/repval/", call.replay_critic_loss, call.replay
        weighted = args.weight * per_step(d.critic_loss, args)
        with torch.no_grad():
            self.compare_all(prefix, {name: batch_major(x) for name, x in {
                "boot": whole.imag_ret, "slow_value": whole.slow_value, "value": whole.value_dist.mean(),
                "ret": args.ret, "nll": -args.value_dist.log_prob(args.ret),
                "slowreg": -args.value_dist.log_prob(args.slow_value), "loss": weighted}.items()})
        self.compare(f"step{n}/loss/repval", batch_major(weighted))

    def check_step(self, n, call) -> None:
        """The critic's loss on replayed rewards; what the optimiser gets and does."""
        self.check_replay_critic(n, call)
        self.compare(f"step{n}/total_loss", call.all.loss)
        self.compare(f"step{n}/grad_norm", call.all.norm, "gradient")
        if paths := self.fixture.under(prefix := f"step{n}/grad/"):
            found = self.in_their_layout(self.agent.optimizer.params, call.all.grads)
            if set(paths) != set(found):
                self.report.fail(prefix, f"other names: {sorted(set(paths) ^ set(found))}")
            pooled = [path for path in paths if n > 1 and path.startswith("enc/cnn")]
            for kind, chosen in (("tie", pooled), ("gradient", sorted(set(paths) & set(found) - set(pooled)))):
                expected = {path: self.fixture[prefix + path] for path in chosen}
                self.report.check_worst(prefix, found, expected, kind)
        prefix = f"params_after{n}/"
        if self.fixture.under(prefix):
            params, scale = list(self.agent.parameters()), self.agent.return_scale.range
            found = self.in_their_layout(params, params)
            found |= {"retnorm/lo/value": scale[0], "retnorm/hi/value": scale[1],
                      "slowval_count/value": torch.tensor(self.agent.updates)}
            self.report.check_all(self.fixture, prefix, found, "parameter")


# ---------------------------------------------------------------------------------------- single pieces
def fill(layer: nn.Module, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> None:
    layer.weight.data, layer.bias.data = weight.contiguous(), bias
    if scale is not None:
        layer.norm.weight.data = scale


class Math(parity_v3.Math):
    def math_twohot(self) -> None:
        """Two-hot distribution; its numbers span nine orders of magnitude."""
        logits = self.leaf("logits")
        two_hot = d.TwoHot(logits)
        loss, mean = -two_hot.log_prob(self("target")), two_hot.mean()
        self.check("bins", two_hot.buckets, scale=element)
        self.check("loss", loss)
        # A mean is a sum of numbers that cancel: its scale is the sum of their magnitudes.
        size = (logits.softmax(-1) * two_hot.buckets.abs()).sum(-1).detach().cpu().numpy()
        self.check("mean", mean, scale=size)
        self.check("mean_naive_uniform", d.TwoHot(torch.zeros(two_hot.logits.shape[-1])).mean(), "exact")
        self.check("dloss_dlogits", gradient(loss, logits)[0], "gradient", row)
        self.check("dmean_dlogits", gradient(mean, logits)[0], "gradient", row)

    def math_lambda_imag(self) -> None:
        """Imagined return (batch first): what follows from state t stands at t + 1; gamma is in cont."""
        reward, value, cont = (self(key).T[1:] for key in ("reward", "value", "cont"))
        self.check("ret", d.lambda_return(reward, cont, value, 0.95).T)

    def math_lambda_replay(self) -> None:
        """The return that `replay_critic_loss` gives to `critic_loss`."""
        reward, boot, last, terminal = (self(key).T for key in ("reward", "boot", "last", "term"))
        is_first = torch.cat([torch.zeros_like(last[:1]), last[:-1]])
        batch, log = d.Batch(None, None, None, reward, is_first, terminal), {}
        with patched(recorder(log, d, "critic_loss")):
            d.replay_critic_loss(d.TwoHot(torch.zeros(*reward.shape, 5)), batch, boot, boot, ARGS)
        self.check("ret", log["critic_loss"].ret.T)

    def math_retnorm(self) -> None:
        scale = d.ReturnScale(ARGS)
        found = [(scale.update(ret), scale.range.clone()) for ret in self("x")]
        self.check("lo_hi_offset_scale", torch.stack([
            torch.stack([*bounds, bounds[0], divisor]) for divisor, bounds in found]))

    def math_binary(self) -> None:
        """Continue head: the target of `world_model_loss` is 0 or gamma."""
        flag = d.Bernoulli(self("logit"))
        self.check("prob1", flag.mean())
        for key, ended in (("loss_target_0", True), ("loss_target_gamma", False)):
            terminal = torch.full(flag.logit.shape, ended)
            self.check(key, shipped_losses(d, ARGS, terminal.shape, terminal=terminal, cont=flag)["cont"])

    def math_core(self) -> None:
        """One step of the recurrence, and its slope along the action."""
        get = self.below("dyn/")
        deter, stoch, action = self("deter"), self("stoch"), self.leaf("action")
        blocks, hidden = int(self("blocks")), len(get("dynin0/bias"))
        args = d.Args(size="1M", deter=deter.shape[-1], hidden=hidden, blocks=blocks, depth=3 * blocks,
                      stoch=stoch.shape[1], classes=stoch.shape[2])
        rssm = d.RSSM(args, action.shape[-1], 1)
        for number, layer in enumerate((rssm.deter_in, rssm.stoch_in, rssm.action_in)):
            fill(layer, get(f"dynin{number}/kernel").T, get(f"dynin{number}/bias"), get(f"dynin{number}norm/scale"))
        gru, parts = rssm.gru, get("dynhid0/kernel").split([deter.shape[-1] // blocks, 2 * hidden, hidden], 1)
        fill(gru.hidden, parts[0], get("dynhid0/bias"))
        gru.hidden.weight_a.data, gru.hidden.weight_b.data = (part.transpose(1, 2).flatten(0, 1) for part in parts[1:])
        gru.norm.weight.data = get("dynhid0norm/scale")
        fill(gru.gates, get("dyngru/kernel"), get("dyngru/bias"))
        after = rssm.recur(deter, stoch.flatten(-2), rssm.project_action(action))
        self.compare({"next": after}, {"dsum_daction": gradient(after, action)[0]})

    def math_layer_lin(self) -> None:
        dense = d.Dense(*self("linear/kernel").shape)
        fill(dense, self("linear/kernel").T, self("linear/bias"), self("norm/scale"))
        self.check("y", dense(self("x")))

    def math_layer_block(self) -> None:
        blocks, inputs, outputs = self("block/kernel").shape
        block = d.BlockLinear(blocks * inputs, blocks * outputs, blocks)
        fill(block, self("block/kernel"), self("block/bias"))
        self.check("y", block(self("x")))

    def math_layer_conv(self) -> None:
        """A convolution with pooling, or upsampling with a convolution."""
        args, spec = d.Args(size="1M", image_size=16, units=8), EnvSpec((16, 16, 3), 0, 1, True)
        pools = "conv" in self.prefix
        cnn = (d.Encoder(args, spec) if pools else d.Decoder(args, spec, args.deter + args.stoch_dim)).cnn
        kernel = self("conv/kernel")
        conv, norm = type(cnn[0])(*kernel.shape[2:]), d.ChannelNorm(kernel.shape[-1])
        fill(conv, kernel.permute(3, 2, 0, 1), self("conv/bias"))
        norm.weight.data = self("norm/scale")
        rest = [norm if isinstance(x, d.ChannelNorm) else x for x in [*cnn][1:3 + pools]]
        self.check("y", nn.Sequential(conv, *rest)(self("x").permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def math_agc(self) -> None:
        """A gradient clipped to 0.3 of its parameter's norm: what the first moment takes in, before LaProp's RMS."""
        param, grad = nn.Parameter(self("param")), self("grad")
        optimizer = d.Optimizer(nn.ParameterList([param]), d.Args(size="1M", agc=0.3))
        optimizer.apply((grad,))
        self.check("clipped", grad.sign() * (optimizer.nu[0] / (1 - optimizer.beta2)).sqrt())

    def math_optim(self) -> None:
        settings = {key: float(self(key)) for key in ("lr", "agc", "beta1", "beta2", "eps")}
        args = d.Args(size="1M", warmup=int(self("warmup")), **settings)
        self.steps(("w", "tiny", "zero"), lambda params: d.Optimizer(params, args))

    def math_policy_continuous(self) -> None:
        self.policy(d, ARGS)

    math_symlog, math_symexp = elementwise(d.symlog), elementwise(d.symexp)
    math_policy_discrete, math_layer_up = math_policy_continuous, math_layer_conv

    def math_onehot(self) -> None:
        self.latents(lambda raw, groups: d.Latent(raw, groups, 0.01))
