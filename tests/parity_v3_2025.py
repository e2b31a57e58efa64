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
from tests import parity
from tests.parity import (Fixture, Mismatch, Report, batch_major, compare, gradient, optimizer_recorders, patched,
                          per_step, recorder, shipped_losses)

IGNORED = {
    "meta/*": "settings; those that matter are read",
    "batch*/consec": "zeros: the carry of the last call is not used",
    "step*/metrics/*": "statistics of arrays that are compared element by element",
    "lambda_replay/value": "an input that the return does not use",
    "optim/*_update": "the difference of two parameters that are compared",
}

RMS = False  # the scale of a gradient is its maximum


def tolerance(fixture: Fixture) -> dict[str, float]:
    """`tie`: gradients of the first convolutions from the second update on, where two pixels of a 2x2 maximum may
    be so close that rounding decides. `momentum`: LaProp divides a gradient by its own size, so one that is
    all but 0 and consists of rounding counts as much as any other."""
    return {"forward": 2e-5, "gradient": 1e-4, "tie": 1e-3, "momentum": 1e-2, "parameter": 1e-5, "exact": 0.0}


# ---------------------------------------------------------------------------------- an agent like theirs
class Outputs(nn.ModuleList):
    """Shipped output layers side by side."""

    def __init__(self, inputs: int, widths: list[int]):
        super().__init__(d.Linear(inputs, width) for width in widths)
        self.out_features = sum(widths)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self], -1)


class Twin(parity.Twin):
    """Our agent with the sizes, settings and weights of a fixture."""

    script, init, aligned = d, "params_init/", True
    fixed = {
        r".*\.act": "silu", r".*\.norm": "rms", r".*\.winit": "trunc_normal_in", r".*\.strided": False,
        r".*\.outer": False, r".*\.kernel": 5, r".*\.mults": [2, 3, 4, 4], r"enc\.simple\.symlog": True,
        r"opt\.(wd|anneal)": 0, r"opt\.schedule": "const", r"opt\.momentum": True, r"ac_grads": False,
        r"dyn\.rssm\.imglayers": 2, r"dyn\.rssm\.(obs|dyn)layers": 1, r"dyn\.rssm\.absolute": False,
        r"(rewhead|value)\.output": "symexp_twohot", r"conhead\.output": "binary", r"conhead\.outscale": 1.0,
        r"(rewhead|value)\.outscale": 0.0, r"policy\.outscale": 0.01, r"policy_dist_disc": "categorical",
        r"policy_dist_cont": "bounded_normal", r"imag_last": 0, r"contdisc": True, r".*\.slowtar": False,
        r"slowvalue\.every": 1, r"retnorm\.impl": "perc", r"retnorm\.debias": False,
        r"(val|adv)norm\.impl": "none", r"reward_grad": True, r"repval_(loss|grad)": True, r"replay_context": 1,
    }
    rename = [
        (r"^(pol|val|slowval|rew|con)/mlp/(linear|norm)(\d+)/", r"\1/head/mlp/\3/\2/"),
        (r"^(dec)/mlp/(linear|norm)(\d+)/", r"\1/vector_head/mlp/\3/\2/"),
        (r"^pol/head/action/stddev/", "pol/std/"), (r"^pol/head/action/(logits|mean)/", "pol/head/out/"),
        (r"^(val|slowval|rew|con)/head/(logits|logit)/", r"\1/head/out/"),
        (r"^enc/mlp(\d+)norm/", r"enc/mlp/\1/norm/"), (r"^enc/mlp(\d+)/", r"enc/mlp/\1/"),
        (r"^enc/cnn(\d+)norm/", lambda m: f"enc/cnn/{4 * int(m[1]) + 2}/"),
        (r"^enc/cnn(\d+)/", lambda m: f"enc/cnn/{4 * int(m[1])}/"),
        (r"^dec/conv(\d+)norm/", lambda m: f"dec/cnn/{3 * (2 - int(m[1])) + 1}/"),
        (r"^dec/conv(\d+)/", lambda m: f"dec/cnn/{3 * (2 - int(m[1]))}/"),
        (r"^dec/imgout/", "dec/cnn/9/"), (r"^dec/sp0/", "dec/deter_in/"), (r"^dec/sp1norm/", "dec/stoch_in/0/norm/"),
        (r"^dec/sp1/", "dec/stoch_in/0/"), (r"^dec/sp2/", "dec/stoch_in/1/"), (r"^dec/spnorm/", "dec/norm/"),
        (r"^dyn/dynin0", "dyn/deter_in"), (r"^dyn/dynin1", "dyn/stoch_in"), (r"^dyn/dynin2", "dyn/action_in"),
        (r"^dyn/dynhid0norm/", "dyn/gru/norm/"), (r"^dyn/dynhid0/", "dyn/gru/hidden/"),
        (r"^dyn/dyngru/", "dyn/gru/gates/"), (r"^dyn/obs0", "dyn/obs_out"), (r"^dyn/obslogit/", "dyn/obs_stats/"),
        (r"^dyn/prior(\d)norm/", r"dyn/img_out/\1/norm/"), (r"^dyn/prior(\d)/", r"dyn/img_out/\1/"),
        (r"^dyn/priorlogit/", "dyn/img_stats/"),
        (r"(_in|_out)norm/", r"\1/norm/"), (r"/linear/", "/"),
        (r"^pol/", "actor/"), (r"^val/", "critic/"), (r"^slowval/", "slow_critic/"),
        (r"^rew/head/", "rew/"), (r"^con/head/", "con/"), (r"^rew/", "world_model/reward_head/"),
        (r"^con/", "world_model/cont_head/"), (r"^enc/", "world_model/encoder/"), (r"^dec/", "world_model/decoder/"),
        (r"^dyn/", "world_model/rssm/"), (r"/(kernel|scale)$", "/weight"), (r"/", "."),
    ]
    swapped = r"dec/mlp/linear0/kernel$"
    optimizers = {"all": "all"}
    no_parameters = ("retnorm/", "slowval_count/")

    def __init__(self, fixture: Fixture, report: Report | None = None):
        super().__init__(fixture, report)
        self.length -= 1  # without the context row

    def observations(self) -> dict[str, tuple[int, ...]]:
        """In the order of their names."""
        found = super().observations()
        return {key: found[key] for key in sorted(found) if key != "consec" and not key.startswith("dyn/")}

    def env_spec(self, vector_dim: int) -> EnvSpec:
        actions = self.fixture.arrays["batch1/action"]
        self.fixture.meta |= {"action_dim": self.fixture.meta["case"]["A"], "discrete": actions.ndim == 2}
        return super().env_spec(vector_dim)

    def make_args(self) -> d.Args:
        c, scales = self.config, self.predictions()
        for name in ("lam", "slowreg"):
            if c[f"imag_loss.{name}"] != c[f"repl_loss.{name}"]:
                raise Mismatch(f"imag_loss.{name} and repl_loss.{name} differ; ours has one for both")
        units = {c[f"{name}.units"] for name in ("enc.simple", "dec.simple", "policy", "value", "rewhead", "conhead")}
        layers = {c[f"{name}.layers"] for name in ("enc.simple", "dec.simple", "policy", "value")}
        heads, depths = ({c[f"{name}.{key}"] for name in names} for names, key in (
            (("rewhead", "conhead"), "layers"), (("enc.simple", "dec.simple"), "depth")))
        blocks, bins = {c["dyn.rssm.blocks"], c["dec.simple.bspace"]}, {c["rewhead.bins"], c["value.bins"]}
        if any(len(sizes) > 1 for sizes in (units, layers, heads, depths, blocks, bins)):
            raise Mismatch("networks differ in their sizes; ours have one for all")
        return d.Args(size="1M", amp="off", seed=0, image_size=(self.spec.image_shape or (64,))[0],
                      batch_size=self.rows, batch_length=self.length - 1, imag_horizon=c["imag_length"],
                      deter=c["dyn.rssm.deter"], hidden=c["dyn.rssm.hidden"], stoch=c["dyn.rssm.stoch"],
                      classes=c["dyn.rssm.classes"], unimix=c["dyn.rssm.unimix"], blocks=blocks.pop(),
                      bins=bins.pop(), units=units.pop(), layers=layers.pop(), head_layers=heads.pop(),
                      depth=depths.pop(), beta_pred=scales["rew"] if len(set(scales.values())) == 1 else 1.0,
                      beta_dyn=c["loss_scales.dyn"], beta_rep=c["loss_scales.rep"],
                      beta_replay=c["loss_scales.repval"], free_bits=c["dyn.rssm.free_nats"],
                      gamma=1 - 1 / c["horizon"], return_lambda=c["imag_loss.lam"],
                      critic_ema_decay=1 - c["slowvalue.rate"], critic_ema_regularizer=c["imag_loss.slowreg"],
                      return_norm_low=c["retnorm.perclo"], return_norm_high=c["retnorm.perchi"],
                      return_norm_limit=c["retnorm.limit"], return_norm_decay=1 - c["retnorm.rate"],
                      actor_entropy=c["imag_loss.actent"], actor_min_std=c["policy.minstd"],
                      actor_max_std=c["policy.maxstd"], lr=c["opt.lr"], warmup=c["opt.warmup"],
                      agc=c["opt.agc"], beta1=c["opt.beta1"], beta2=c["opt.beta2"], eps=c["opt.eps"])

    def predictions(self) -> dict[str, float]:
        """Their loss scales that are one `beta_pred` in ours."""
        return {name: self.config[f"loss_scales.{name}"] for name in ("rec", "rew", "con")}

    def loss_scales(self) -> dict[str, float]:
        """What is left of each scale of theirs after our flags."""
        theirs = {name: scale / self.args.beta_pred for name, scale in self.predictions().items()}
        return {"image": theirs["rec"], "vector": theirs["rec"], "reward": theirs["rew"], "cont": theirs["con"]}

    # ------------------------------------------------------------------------------------------- weights
    def sized_networks(self) -> list[tuple[object, str, object]]:
        """Theirs has an output layer for each vector and clips each gradient by itself; ours sees one vector."""
        def decoder(args, spec, feat_dim, shipped=d.Decoder):
            made = shipped(args, spec, feat_dim)
            if len(self.vectors) > 1:
                made.vector_head.out = Outputs(args.units, [math.prod(self.obs[key]) for key in self.vectors])
            return made
        return [*super().sized_networks(), (d, "Decoder", decoder)]

    def places(self, path: str, numbers: dict[str, Tensor]) -> Tensor:
        """Their kernel of the hidden layer has [a part of deter, x, action] for each block; ours are apart."""
        if path == "dyn/dynhid0/kernel":
            weight = "world_model.rssm.gru.hidden.weight"
            shared = [numbers[weight + half].unflatten(0, (self.args.blocks, -1)).transpose(1, 2)
                      for half in ("_a", "_b")]
            return torch.cat([numbers[weight], *shared], 1)
        if path in ("dyn/dyngru/kernel", "dec/sp0/kernel"):
            return numbers[self.ours(path)]
        if vector := re.match("dec/vec/(.*)/pred/", path):
            number = f"{self.vectors.index(vector[1])}/" if len(self.vectors) > 1 else ""
            path = path.replace(vector[0], f"dec/vector_head/out/{number}")
        return super().places(path, numbers)

    def ours(self, path: str) -> str:
        for pattern, new in self.rename:
            path = re.sub(pattern, new, path)
        return path

    def load_weights(self) -> None:
        """The return scale and the counter are no parameters."""
        self.paths = [path for path in self.paths if not path.startswith(self.no_parameters)]
        super().load_weights()
        bounds = [self.fixture.tensor(f"{self.init}retnorm/{key}/value") for key in ("lo", "hi")]
        self.agent.return_scale.range.copy_(torch.stack(bounds))
        self.agent.updates = int(self.fixture[f"{self.init}slowval_count/value"])
        self.agent.all_opt, self.agent.all = self.agent.optimizer, self.agent  # names that `parity` goes by

    def onehot(self, action: Tensor) -> Tensor:
        discrete = self.spec.discrete
        return torch.nn.functional.one_hot(action.long(), self.spec.action_dim).float() if discrete else action

    # -------------------------------------------------------------------------------------------- inputs
    def batch(self, n: int) -> d.Batch:
        """Rows 1 ... T, and what row 0, the context row, is used for."""
        def get(key):
            return batch_major(self.fixture.tensor(f"batch{n}/{key}"))[1:].contiguous()
        image = torch.cat([get(key) for key in self.images], -1) if self.images else None
        vector = torch.cat([get(key).flatten(2).float() for key in self.vectors], -1) if self.vectors else None
        is_first, is_last = get("is_first"), self.fixture[f"batch{n}/is_last"]
        if (batch_major(torch.from_numpy(is_last))[1:-1] != is_first[1:].cpu()).any():
            raise Mismatch("an end without a beginning behind it; ours takes one from the other")
        deter, stoch, action = (self.fixture.tensor(f"batch{n}/{key}")[:, 0]
                                for key in ("dyn/deter", "dyn/stoch", "action"))
        return d.Batch(image, vector, self.onehot(get("action")), get("reward"), is_first, get("is_terminal"),
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

    # --------------------------------------------------------------------------------------- comparisons
    def check(self) -> None:
        """And what the optimiser holds at the end."""
        super().check()
        self.check_optimizer(f"opt_after{self.fixture.numbered('batch')}/")

    def check_acting(self) -> None:
        for t, _, state, _ in self.acted(self.fixture.numbered("policy/t")):
            expected = self.fixture.tensor(f"policy/t{t}/action")
            self.report.check(f"policy/t{t}/action", state.action, self.onehot(expected).cpu())
            self.compare_all(f"policy/t{t}/", {"deter": state.deter, "stoch": self.groups(state.stoch)})

    def check_update(self, n: int) -> None:
        batch = self.batch(n)
        with torch.no_grad():
            before = self.probe(batch)
        call = self.recorded(batch, n)
        self.check_world_model(n, call, before, batch)
        self.check_imagination(n, call)
        self.check_actor(n, call)
        self.check_critic(n, call)
        self.check_replay_critic(n, call)
        self.check_step(n, call)

    def recorded(self, batch: d.Batch, n: int) -> SimpleNamespace:
        """Run `train_step`; the calls of the shipped functions, and what the optimiser gets."""
        log, critics = {}, []
        critic_loss = d.critic_loss

        def scaled_model(result, call):
            call.unscaled = result[0]
            call.scaled, *rest = self.scaled_model(result, call)
            return call.scaled, *rest

        def scaled_by(name):
            def after(result, call):
                call.scaled = self.config[f"loss_scales.{name}"] * (result[0] if name == "policy" else result)
                return (call.scaled, result[1]) if name == "policy" else call.scaled
            return after

        def every_critic_loss(*given):
            critics.append(SimpleNamespace(**dict(zip(("value_dist", "ret", "slow_value", "weight", "args"), given))))
            critics[-1].given, critics[-1].result = dict(vars(critics[-1])), critic_loss(*given)
            scale = self.config["loss_scales.value"] if len(critics) == 1 else 1.0
            critics[-1].scaled = scale * critics[-1].result
            return critics[-1].scaled

        patches = [recorder(log, d, "world_model_loss", scaled_model), recorder(log, d, "imagine"),
                   recorder(log, d, "actor_loss", scaled_by("policy")), (d, "critic_loss", every_critic_loss),
                   recorder(log, d, "replay_critic_loss"), recorder(log, d.ReturnScale, "update")]
        calls, lambda_return = [], d.lambda_return

        def every_return(*given):
            calls.append(SimpleNamespace(given=given, result=lambda_return(*given)))
            return calls[-1].result

        def parts(loss):
            """While the weights are the old ones: the priors, and the gradients of each loss alone."""
            deter = log["imagine"].result[0][1:, :, :self.args.deter]
            log["priors"] = self.agent.world_model.rssm.prior(deter).raw
            if n == 1:
                terms = dict(log["world_model_loss"].scaled) | {
                    "policy": log["actor_loss"].scaled, "value": critics[0].scaled,
                    "repval": self.args.beta_replay * critics[1].scaled}
                log["parts"] = self.term_gradients({name: term.mean() for name, term in terms.items()})

        with patched(*patches, (d, "lambda_return", every_return), *self.before_grads(log, parts)):
            metrics, deter, stoch = self.agent.train_step(batch)
        done = log.pop(id(self.agent.optimizer))
        return SimpleNamespace(**log, all=done, metrics=metrics, deter=deter, stoch=stoch, critic=critics[0],
                               replay=critics[1], returns=calls[0])

    def before_grads(self, log: dict, parts) -> list:
        """The recorders of the optimiser; before its gradients, those of each term."""
        (owner, name, grads), apply = optimizer_recorders(log, d.Optimizer)

        def with_parts(optimizer, loss):
            parts(loss)
            return grads(optimizer, loss)
        return [(owner, name, with_parts), apply]

    def term_gradients(self, terms: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Gradients of each loss term alone, for the parameters that it reaches: by their names."""
        names = {"reward": "rew", "cont": "con"}
        found, params = {}, self.agent.optimizer.params
        for term, loss in terms.items():
            grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
            reached = [(param, grad) for param, grad in zip(params, grads) if grad is not None]
            found[names.get(term, term)] = self.in_their_layout(*zip(*reached))
        return found

    def check_parts(self, parts: dict[str, dict[str, Tensor]]) -> None:
        """An absent key of theirs is a gradient that is all zero."""
        vectors = self.vectors if len(self.vectors) > 1 else []
        for term, grads in parts.items():
            keys = {"image": self.images, "vector": vectors or self.vectors}.get(term, [term])
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
            self.check_worst("+".join(prefixes), grads, zeros | expected, "gradient")

    def check_worst(self, name: str, found: dict, expected: dict, kind: str) -> None:
        """A line for the worst of several tensors."""
        errors = {path: self.report.error(value, expected[path], kind) for path, value in found.items()}
        worst = max(errors, key=lambda path: np.nan_to_num(errors[path], nan=np.inf))
        self.report.line(f"{name}* ({len(errors)} tensors, worst {worst})", errors[worst], kind)

    def probe(self, batch: d.Batch) -> dict[str, Tensor]:
        """What the world model computes on the way to its losses, asked of its modules: their names."""
        model, carry = self.agent.world_model, self.agent.carry(batch)
        embed, deter, stoch, post, prior, feat = self.posterior(batch, carry)
        reward = model.reward(feat)
        prev_action = d.previous_actions(batch, carry.action) * ~batch.is_first[..., None]
        found = {"embed": embed, "post_deter": deter, "post_stoch": self.groups(stoch),
                 "post_logprob": post.logits, "prior_logprob": prior.logits, "post_logit_raw": post.raw,
                 "prior_logit_raw": prior.raw, "kl_before_free": post.kl(prior), "post_entropy": post.entropy(),
                 "prior_entropy": prior.entropy(), "reward_logits": reward.logits, "reward_mean": reward.mean(),
                 "cont_logit": model.cont(feat).logit, "prevact": prev_action}
        if self.vectors:
            vector = model.decoder.vector(feat)
            found |= {f"recon_{key}": vector[..., columns] for key, columns in self.columns.items()}
        found = {name: batch_major(x) for name, x in found.items()}
        if self.images:
            channels = np.cumsum([self.obs[key][-1] for key in self.images])[:-1].tolist()
            images = (model.decoder.image(feat) + 0.5).tensor_split(channels, -1)
            for key, image in zip(self.images, images):
                found[f"recon_{key}_b0_t0"] = image[0, 0]
                found[f"recon_{key}_lastb_lastt"] = image[-1, -1]
        return found

    def check_world_model(self, n, call, before, batch) -> None:
        """Posterior, prior, heads, every loss term, and what goes back into the replay."""
        fixture, prefix, args = self.fixture, f"step{n}/wm/", self.args
        losses, deter, stoch, _ = call.world_model_loss.result
        for name, value in before.items():
            if name == "prevact" and self.spec.discrete:  # theirs has an index, of a zero vector where is_first
                first = fixture[f"batch{n}/is_first"][:, 1:, None]
                expected = self.onehot(fixture.tensor(prefix + name)).cpu().numpy() * ~first
                self.report.check(prefix + name, value, expected, "exact")
            else:
                wide = name == "reward_mean"  # may span many orders of magnitude
                self.compare(prefix + name, value, scale=value.abs().clamp(min=1).cpu().numpy() if wide else None)
        names = {"reward": ["rew"], "cont": ["con"], "image": self.images, "vector": self.vectors}
        betas = {"dyn": args.beta_dyn, "rep": args.beta_rep}
        for name, loss in call.world_model_loss.unscaled.items():
            keys = [f"step{n}/loss/{key}" for key in names.get(name, [name])]
            expected = sum(fixture[key] for key in keys)
            self.report.check(" + ".join(keys), batch_major(loss / betas.get(name, args.beta_pred)), expected)
        latents = {"deter": batch_major(call.deter), "stoch": batch_major(self.groups(call.stoch))}
        self.compare_all(f"step{n}/replay/", latents)
        self.compare_all(f"step{n}/carry_out/", {name: x[:, -1] for name, x in latents.items()})
        if n == 1:
            self.check_parts(call.parts)

    @torch.no_grad()
    def check_imagination(self, n, call) -> None:
        """The imagined trajectory. Theirs has an action, and what follows, at state H as well."""
        order, prefix = self.start_order, f"step{n}/imag/"
        feat, action, _ = call.imagine.result
        deter, stoch = feat.split([self.args.deter, self.args.stoch_dim], -1)
        reward, cont, next_value, _ = call.returns.given
        steps = slice(0, self.args.imag_horizon)
        self.compare_all(prefix, {name: order(x) for name, x in {
            "deter": deter, "stoch": self.groups(stoch), "ret": call.returns.result,
            "value": torch.cat([call.actor_loss.baseline, next_value[-1:]])}.items()})
        first = call.actor_loss.weight[:1]
        self.compare(prefix + "cont", order(torch.cat([first, cont])))
        self.compare(prefix + "reward", order(reward), steps=slice(1, None))
        self.compare(prefix + "weight", order(call.actor_loss.weight), steps=steps)
        self.compare(prefix + "slow_value", order(call.critic.slow_value), steps=steps)
        expected = self.onehot(self.fixture.tensor(prefix + "action")).cpu().numpy()
        self.report.check(prefix + "action", order(action), expected[:-1])
        self.compare(prefix + "prior_logit_raw", order(call.priors))

    def check_actor(self, n, call) -> None:
        """Return scale, advantages, policy and the actor's loss."""
        order, prefix, args = self.start_order, f"step{n}/actor/", call.actor_loss
        self.compare(prefix + "retnorm_offset", call.update.self.range[0])
        self.compare(prefix + "retnorm_scale", call.update.result)
        elements = per_step(d.actor_loss, args)
        weighted = args.weight * elements
        self.compare_all(prefix, {name: order(x) for name, x in {
            "logprob": args.policy.log_prob(args.action), "entropy": args.result[1], "loss_elem": weighted}.items()})
        size = float(torch.stack([args.ret, args.baseline]).abs().max() / args.scale)  # a difference of these
        self.compare(prefix + "adv", order((args.ret - args.baseline) / args.scale), scale=size)
        for name, theirs in (("raw", "logits"), ("mean", "mean"), ("std", "std")):
            if isinstance(value := getattr(args.policy, name, None), Tensor):
                self.compare(f"{prefix}policy_{theirs}", order(value), steps=slice(0, len(value)))
        self.compare(f"step{n}/loss/policy", order(weighted.mean(0)[None])[0].unflatten(0, (self.rows, -1)))

    def check_critic(self, n, call) -> None:
        """Both parts of the critic's loss, and the loss."""
        order, prefix, args = self.start_order, f"step{n}/critic/", call.critic
        weighted = args.weight * per_step(d.critic_loss, args)
        self.compare_all(prefix, {name: order(x) for name, x in {"nll": -args.value_dist.log_prob(
            args.ret), "slowreg": -args.value_dist.log_prob(args.slow_value), "loss_elem": weighted}.items()})
        self.compare(prefix + "logits_first", order(args.value_dist.logits[:1])[0])
        self.compare(f"step{n}/loss/value", order(weighted.mean(0)[None])[0].unflatten(0, (self.rows, -1)))

    def check_replay_critic(self, n, call) -> None:
        """The critic's loss on replayed rewards."""
        prefix, whole, args = f"step{n}/repval/", call.replay_critic_loss, call.replay
        weighted = args.weight * per_step(d.critic_loss, args)
        with torch.no_grad():
            self.compare_all(prefix, {name: batch_major(x) for name, x in {
                "boot": whole.imag_ret, "slow_value": whole.slow_value, "value": whole.value_dist.mean(),
                "ret": args.ret, "nll": -args.value_dist.log_prob(args.ret),
                "slowreg": -args.value_dist.log_prob(args.slow_value), "loss": weighted}.items()})
        self.compare(f"step{n}/loss/repval", batch_major(weighted))

    def check_step(self, n, call) -> None:
        """What the optimiser gets and does."""
        self.compare(f"step{n}/total_loss", call.all.loss)
        self.compare(f"step{n}/grad_norm", call.all.norm, "gradient")
        if paths := self.fixture.under(prefix := f"step{n}/grad/"):
            found = self.in_their_layout(self.agent.optimizer.params, call.all.grads)
            if set(paths) != set(found):
                self.report.fail(prefix, f"other names: {sorted(set(paths) ^ set(found))}")
            expected = {path: self.fixture[prefix + path] for path in paths if path in found}
            pooled = [path for path in expected if n > 1 and path.startswith("enc/cnn")]
            rest = expected.keys() - pooled
            for kind, chosen in (("tie", pooled), ("gradient", sorted(rest))):
                if chosen:
                    self.check_worst(prefix, {path: found[path] for path in chosen}, expected, kind)
        prefix = f"params_after{n}/"
        if self.fixture.under(prefix):
            params, scale = list(self.agent.parameters()), self.agent.return_scale.range
            found = self.in_their_layout(params, params)
            found |= {"retnorm/lo/value": scale[0], "retnorm/hi/value": scale[1],
                      "slowval_count/value": torch.tensor(self.agent.updates)}
            self.report.check_all(self.fixture, prefix, found, "parameter")

    def check_optimizer(self, prefix: str) -> None:
        """LaProp's moments and counters after the last update."""
        optimizer = self.agent.optimizer
        for key, ours, kind in (("state/1/1/", optimizer.nu, "tie"), ("state/2/1/", optimizer.mu, "momentum")):
            if self.fixture.under(prefix + key):
                found = self.in_their_layout(optimizer.params, ours)
                self.report.check_all(self.fixture, prefix + key, found, kind)
        for key in ("state/1/0", "state/2/0", "state/3/count", "step/value"):
            self.compare(prefix + key, optimizer.step, "exact")


# ---------------------------------------------------------------------------------------- single pieces
def check_math(report: Report, fixture: Fixture) -> None:
    """Every unit-level quantity of `math.npz` that the fixture has."""
    checks = {"symlog": math_symlog, "twohot": math_two_hot, "onehot": math_one_hot, "lambda_imag": math_returns,
              "lambda_replay": math_replay_returns, "retnorm": math_return_scale, "binary": math_binary,
              "policy_continuous": math_gaussian, "policy_discrete": math_actor_one_hot, "core": math_core,
              "layer_lin": math_layers, "agc": math_clipping, "optim": math_optimizer}
    for prefix, check in checks.items():
        if fixture.under(prefix + "/"):
            check(report, fixture)


def math_symlog(report: Report, fixture: Fixture) -> None:
    """symlog and symexp, element by element."""
    for name, function in (("symlog", d.symlog), ("symexp", d.symexp)):
        expected = fixture[f"{name}/y"]
        report.check(f"{name}/y", function(fixture.tensor(f"{name}/x")), expected, scale=np.abs(expected).clip(1))


def math_two_hot(report: Report, fixture: Fixture) -> None:
    """Two-hot distribution; its numbers span nine orders of magnitude."""
    logits, target = fixture.leaf("twohot/logits"), fixture.tensor("twohot/target")
    two_hot = d.TwoHot(logits)
    loss, mean = -two_hot.log_prob(target), two_hot.mean()
    report.check("twohot/bins", two_hot.buckets, fixture["twohot/bins"], scale=np.abs(fixture["twohot/bins"]).clip(1))
    compare(report, fixture, "twohot/", {"loss": loss})
    # A mean is a sum of numbers that cancel: its scale is the sum of their magnitudes.
    size = (logits.softmax(-1) * two_hot.buckets.abs()).sum(-1).detach().cpu().numpy()
    report.check("twohot/mean", mean, fixture["twohot/mean"], scale=size)
    report.check("twohot/mean_naive_uniform", d.TwoHot(torch.zeros(two_hot.logits.shape[-1])).mean(),
                 fixture["twohot/mean_naive_uniform"], "exact")
    for key, output in (("dloss_dlogits", loss), ("dmean_dlogits", mean)):
        expected = fixture[f"twohot/{key}"]
        report.check(f"twohot/{key}", gradient(output, logits)[0], expected, "gradient",
                     np.abs(expected).max(-1, keepdims=True))


def math_one_hot(report: Report, fixture: Fixture) -> None:
    """Latents: unimix, entropy, KL, straight-through sample."""
    raw = [fixture.leaf(f"onehot/raw_{side}") for side in "pq"]
    groups = raw[0].shape[-2]
    p, q = (d.Latent(x.flatten(-2), groups, 0.01) for x in raw)
    sample, kl = p.sample().unflatten(-1, (groups, -1)), p.kl(q)
    weighted = (sample * fixture.tensor("onehot/st_weight")).sum()
    slopes = [gradient(kl, x)[0] for x in raw]
    compare(report, fixture, "onehot/", {"logprob_p": p.logits, "logprob_q": q.logits, "entropy_p": p.entropy(),
                                         "sample_rule_p": sample, "kl_p_q": kl},
            {"st_grad_raw_p": gradient(weighted, raw[0])[0], "dkl_draw_p": slopes[0], "dkl_draw_q": slopes[1]})


def math_returns(report: Report, fixture: Fixture) -> None:
    """Imagined return (batch first): what follows from state t stands at t + 1; gamma is in cont."""
    reward, value, cont = (fixture.tensor(f"lambda_imag/{key}").T[1:] for key in ("reward", "value", "cont"))
    compare(report, fixture, "lambda_imag/", {"ret": d.lambda_return(reward, cont, value, 0.95).T})


def math_replay_returns(report: Report, fixture: Fixture) -> None:
    """The return that `replay_critic_loss` gives to `critic_loss`."""
    reward, boot, last, terminal = (fixture.tensor(f"lambda_replay/{key}").T
                                    for key in ("reward", "boot", "last", "term"))
    is_first = torch.cat([torch.zeros_like(last[:1]), last[:-1]])
    batch, log = d.Batch(None, None, None, reward, is_first, terminal), {}
    with patched(recorder(log, d, "critic_loss")):
        d.replay_critic_loss(d.TwoHot(torch.zeros(*reward.shape, 5)), batch, boot, boot, d.Args(size="1M"))
    compare(report, fixture, "lambda_replay/", {"ret": log["critic_loss"].ret.T})


def math_return_scale(report: Report, fixture: Fixture) -> None:
    """Successive updates of the return scale."""
    scale, found = d.ReturnScale(d.Args(size="1M")), []
    for ret in fixture.tensor("retnorm/x"):
        divisor = scale.update(ret)
        found.append(torch.stack([*scale.range, scale.range[0], divisor]))
    compare(report, fixture, "retnorm/", {"lo_hi_offset_scale": torch.stack(found)})


def math_binary(report: Report, fixture: Fixture) -> None:
    """Continue head: the target of `world_model_loss` is 0 or gamma."""
    flag = d.Bernoulli(fixture.tensor("binary/logit"))
    report.check("binary/prob1", flag.mean(), fixture["binary/prob1"])
    for key, ended in (("loss_target_0", True), ("loss_target_gamma", False)):
        terminal = torch.full(flag.logit.shape, ended)
        losses = shipped_losses(d, d.Args(size="1M"), flag.logit.shape, terminal=terminal, cont=flag)
        report.check(f"binary/{key}", losses["cont"], fixture[f"binary/{key}"])


def actor(actions: int, discrete: bool) -> d.Actor:
    """An actor of the default settings; its network is not used."""
    return d.Actor(d.Args(size="1M"), EnvSpec(None, 1, actions, discrete), 1)


def math_gaussian(report: Report, fixture: Fixture) -> None:
    """Policy of continuous actions."""
    mean, std = (fixture.leaf(f"policy_continuous/raw_{key}") for key in ("mean", "std"))
    policy = actor(mean.shape[-1], False).policy(torch.cat([mean, std], -1))
    log_prob = policy.log_prob(fixture.tensor("policy_continuous/action"))
    compare(report, fixture, "policy_continuous/", {
        "mean": policy.mean, "std": policy.std, "logprob": log_prob, "entropy": policy.entropy(),
        "sample_rule": policy.sample()},
        {"dlogprob_draw_mean": gradient(log_prob, mean)[0], "dlogprob_draw_std": gradient(log_prob, std)[0]})


def math_actor_one_hot(report: Report, fixture: Fixture) -> None:
    """Policy of discrete actions, without a uniform share."""
    raw, action = fixture.leaf("policy_discrete/raw"), fixture.tensor("policy_discrete/action").long()
    policy = actor(raw.shape[-1], True).policy(raw)
    log_prob, entropy = policy.log_prob(nn.functional.one_hot(action, raw.shape[-1]).float()), policy.entropy()
    compare(report, fixture, "policy_discrete/", {"logprob": log_prob, "entropy": entropy},
            {"dlogprob_draw": gradient(log_prob, raw)[0], "dentropy_draw": gradient(entropy, raw)[0]})


def math_core(report: Report, fixture: Fixture) -> None:
    """One step of the recurrence, and its slope along the action."""
    def get(name):
        return fixture.tensor(f"core/dyn/{name}")
    deter, stoch, action = (fixture.tensor("core/deter"), fixture.tensor("core/stoch"), fixture.leaf("core/action"))
    blocks, hidden = int(fixture["core/blocks"]), len(get("dynin0/bias"))
    args = d.Args(size="1M", deter=deter.shape[-1], hidden=hidden, blocks=blocks, depth=3 * blocks,
                  stoch=stoch.shape[1], classes=stoch.shape[2])
    rssm = d.RSSM(args, action.shape[-1], 1)
    for number, name in enumerate(("deter_in", "stoch_in", "action_in")):
        fill(getattr(rssm, name), get(f"dynin{number}/kernel").T, get(f"dynin{number}/bias"),
             get(f"dynin{number}norm/scale"))
    gru, parts = rssm.gru, get("dynhid0/kernel").split([deter.shape[-1] // blocks, 2 * hidden, hidden], 1)
    fill(gru.hidden, parts[0], get("dynhid0/bias"))
    gru.hidden.weight_a.data, gru.hidden.weight_b.data = (part.transpose(1, 2).flatten(0, 1) for part in parts[1:])
    gru.norm.weight.data = get("dynhid0norm/scale")
    fill(gru.gates, get("dyngru/kernel"), get("dyngru/bias"))
    after = rssm.recur(deter, stoch.flatten(-2), rssm.project_action(action))
    compare(report, fixture, "core/", {"next": after}, {"dsum_daction": gradient(after, action)[0]})


def fill(layer: nn.Module, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> None:
    layer.weight.data, layer.bias.data = weight.contiguous(), bias
    if scale is not None:
        layer.norm.weight.data = scale


def math_layers(report: Report, fixture: Fixture) -> None:
    """One layer each: dense, block-linear, convolution with pooling, upsampling with convolution."""
    def get(name):
        return fixture.tensor(name)
    dense = d.Dense(*get("layer_lin/linear/kernel").shape)
    fill(dense, get("layer_lin/linear/kernel").T, get("layer_lin/linear/bias"), get("layer_lin/norm/scale"))
    compare(report, fixture, "layer_lin/", {"y": dense(get("layer_lin/x"))})

    blocks, inputs, outputs = get("layer_block/block/kernel").shape
    block = d.BlockLinear(blocks * inputs, blocks * outputs, blocks)
    fill(block, get("layer_block/block/kernel"), get("layer_block/block/bias"))
    compare(report, fixture, "layer_block/", {"y": block(get("layer_block/x"))})

    args, spec = d.Args(size="1M", image_size=16, units=8), EnvSpec((16, 16, 3), 0, 1, True)
    shipped_encoder, shipped_decoder = d.Encoder(args, spec).cnn, d.Decoder(args, spec, args.deter + args.stoch_dim).cnn
    for name, shipped in (("layer_conv", shipped_encoder), ("layer_up", shipped_decoder)):
        kernel = get(f"{name}/conv/kernel")
        conv, norm = type(shipped[0])(*kernel.shape[2:]), d.ChannelNorm(kernel.shape[-1])
        fill(conv, kernel.permute(3, 2, 0, 1), get(f"{name}/conv/bias"))
        norm.weight.data = get(f"{name}/norm/scale")
        layers = [conv, *(norm if isinstance(x, d.ChannelNorm) else x for x in [*shipped][1:3 + (name == "layer_conv")])]
        y = nn.Sequential(*layers)(get(f"{name}/x").permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        compare(report, fixture, f"{name}/", {"y": y})


def math_clipping(report: Report, fixture: Fixture) -> None:
    """A gradient clipped to 0.3 of its parameter's norm: what the first moment takes in, before LaProp's RMS."""
    param, grad = nn.Parameter(fixture.tensor("agc/param")), fixture.tensor("agc/grad")
    optimizer = d.Optimizer(nn.ParameterList([param]), d.Args(size="1M", agc=0.3))
    optimizer.apply((grad,))
    clipped = grad.sign() * (optimizer.nu[0] / (1 - optimizer.beta2)).sqrt()
    compare(report, fixture, "agc/", {"clipped": clipped})


def math_optimizer(report: Report, fixture: Fixture) -> None:
    """LaProp with clipping and warm-up, for gradients that are given: loss = <parameter, gradient>."""
    names = "w", "tiny", "zero"
    settings = {key: float(fixture[f"optim/{key}"]) for key in ("lr", "agc", "beta1", "beta2", "eps", "pmin")}
    if not math.isclose(settings.pop("pmin"), 1e-3, rel_tol=1e-6):
        raise Mismatch("optim/pmin; ours is always 1e-3")
    params = {name: nn.Parameter(fixture.tensor(f"optim/{name}0")) for name in names}
    args = d.Args(size="1M", warmup=int(fixture["optim/warmup"]), **settings)
    optimizer, found = d.Optimizer(nn.ParameterList(params.values()), args), {name: [] for name in names}
    for grads in zip(*(fixture.tensor(f"optim/grad_{name}") for name in names)):
        loss = sum((param * grad).sum() for param, grad in zip(params.values(), grads))
        optimizer.apply(optimizer.grads(loss))
        for name, param in params.items():
            found[name].append(param.detach().clone())
    for name, steps in found.items():
        report.check(f"optim/{name}_after", torch.stack(steps), fixture[f"optim/{name}_after"], "parameter")
