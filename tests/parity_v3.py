"""What `tests.parity` compares for DreamerV3: fixtures of danijar/dreamerv3 at 8fa35f8."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import dreamer_v3 as d3
from common.spaces import EnvSpec
from tests import parity
from tests.parity import Piece, batch_major, element, gradient, per_step, recorder, shipped_losses
from tests.tiny import plain_args

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
}

RMS = False  # the scale of a gradient is its maximum
TOLERANCE = {"forward": 2e-5, "gradient": 1e-4, "parameter": 1e-5}


# ----------------------------------------------------------------------------- an agent like theirs
class Twin(parity.Twin):
    script, init, aligned = d3, "params_init/", True
    rename = [(r"^agent/task_behavior/ac/actor/(dist_out/out|h\d+)/", r"actor/head/\1/"),
              (r"^agent/task_behavior/ac/actor/dist_out/std/", "actor/std/"),
              (r"^agent/task_behavior/critic/net/", "critic/head/"),
              (r"^agent/task_behavior/critic/slow/", "slow_critic/head/"),
              (r"^agent/wm/", "world_model/"), (r"/enc/", "/encoder/"),
              (r"/dec/", "/decoder/"), (r"/rew/", "/reward_head/"), (r"/cont/", "/cont_head/"),
              (r"/cnn/in/", "/cnn_in/"), (r"/cnn/s(\d+)res/norm/", lambda m: f"/cnn/{3 * int(m[1]) + 1}/"),
              (r"/cnn/s(\d+)res/", lambda m: f"/cnn/{3 * int(m[1])}/"),
              (r"/decoder/mlp/dist_.*/out/", "/decoder/vector_head/out/"),
              (r"/decoder/mlp/h", "/decoder/vector_head/h"),
              (r"/encoder/mlp/h", "/encoder/h"), (r"/dist_out/", "/"), (r"/h(\d+)/", r"/mlp/\1/"),
              (r"/gru/kernel", "/gru/linear/kernel"), (r"/(kernel|scale)$", "/weight"), (r"/", ".")]
    flipped, vector_out = r"/dec/cnn/s\d+res/kernel$", r"/dec/mlp/dist_(.*)/out/"
    settings = """imag_horizon units=actor.units layers=actor.layers bins=critic.bins
        deter=rssm.deter hidden=rssm.units stoch=rssm.stoch classes=rssm.classes unimix=rssm.unimix
        beta_dyn=loss_scales.dyn beta_rep=loss_scales.rep free_bits=dyn_loss.free
        return_lambda critic_ema_regularizer=loss_scales.slowreg
        return_norm_low=retnorm.perclo return_norm_high=retnorm.perchi
        return_norm_decay=retnorm.decay actor_entropy=actent actor_min_std=actor.minstd
        actor_max_std=actor.maxstd"""
    return_scale = ("retnorm_init/low", "retnorm_init/high")
    scale_names = {"actor": "actor", "critic": "critic"}  # theirs of loss scales
    policy_logits = "logits"  # our name of the logits of a policy that theirs has
    scaled_elements = True  # whether what they call loss_elem has the scale of its loss

    def observations(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(self.fixture.meta["obs"][key][0]) for key in self.fixture.meta["obs_order"]}

    def make_args(self, given: dict) -> d3.Args:
        c = self.config
        return plain_args(d3, **given, **self.shapes(), gamma=1 - 1 / c["horizon"],
                          critic_ema_decay=1 - c["slow_critic_fraction"], return_norm_limit=1 / c["retnorm.max"])

    def shapes(self) -> dict:
        scales = set(self.predictions().values())
        return {"image_size": (self.spec.image_shape or (64,))[0],
                "beta_pred": scales.pop() if len(scales) == 1 else 1.0}

    def predictions(self) -> dict[str, float]:
        names = ["image"] * bool(self.images) + ["vector"] * bool(self.vectors) + ["reward", "cont"]
        return {name: self.config[f"loss_scales.{name}"] for name in names}

    def loss_scales(self) -> dict[str, float]:
        return {name: scale / self.args.beta_pred for name, scale in self.predictions().items()}

    def sized_networks(self) -> list[tuple[object, str, object]]:
        """Encoder and decoder have sizes of their own."""
        def sized(shipped, key):
            own = {name.removeprefix("cnn_"): self.config[f"{key}.{name}"]
                   for name in ("mlp_units", "mlp_layers", "cnn_depth")}
            return lambda args, *rest: shipped(replace(args, **own), *rest)
        return [(d3, name, sized(getattr(d3, name), name.lower())) for name in ("Encoder", "Decoder")]

    def load_weights(self) -> None:
        """The return scale is no parameter."""
        super().load_weights()
        self.agent.return_scale.range.copy_(torch.stack([*map(self.fixture.tensor, self.return_scale)]))

    def carry(self, n: int, batch: d3.Batch) -> d3.State:
        deter, stoch, action = (self.fixture.tensor(f"step{n}/carry_in/{key}")
                                for key in ("latent/deter", "latent/stoch", "action"))
        return d3.State(deter, stoch.flatten(-2), action)

    def scaled_model(self, result, call):
        """World model, and the free bits of the representation loss."""
        if self.config["rep_loss.free"] != self.args.free_bits:
            other = replace(self.args, free_bits=self.config["rep_loss.free"])
            result[0]["rep"] = self.shipped_loss(call.model, call.batch, call.carry, other)[0]["rep"]
        result = super().scaled_model(result, call)
        recon = sum(call.scaled[name] for name in ("image", "vector") if name in call.scaled)
        call.parts = self.term_gradients(call.scaled | {"recon": recon})
        return result

    def scaled(self) -> dict:
        return {"world_model_loss": self.scaled_model, "actor_loss": self.scaled_actor,
                "critic_loss": self.scaled_critic}

    def scaled_actor(self, result, call):
        call.scaled = result[0] * self.config[f"loss_scales.{self.scale_names['actor']}"]
        return call.scaled, result[1]

    def scaled_critic(self, result, call):
        call.scaled = result * self.config[f"loss_scales.{self.scale_names['critic']}"]
        return call.scaled

    def term_gradients(self, losses: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Gradients of each loss alone, for the parameters that it reaches: by their names."""
        found, params = {}, list(self.agent.parameters())
        params = [param for param in params if param.requires_grad]
        for term, loss in losses.items():
            grads = torch.autograd.grad(loss.mean(), params, retain_graph=True, allow_unused=True)
            reached = [(param, grad) for param, grad in zip(params, grads) if grad is not None]
            found[term] = self.in_their_layout(*zip(*reached))
        return found

    def check(self) -> None:
        """And what the optimisers hold at the end."""
        super().check()
        self.check_optimizers(f"_after{self.fixture.numbered('batch')}/")

    def check_acting(self) -> None:
        for t, _, state, latent in self.acted(self.fixture.numbered("policy/t")):
            policy = self.agent.actor.policy(self.agent.actor(torch.cat([state.deter, state.stoch], -1)))
            self.compare_all(f"policy/t{t}/", {
                "action": state.action, "deter": state.deter, "stoch": self.groups(state.stoch),
                "logit": latent.logits, "log_entropy": policy.entropy()})

    def check_update(self, n: int) -> None:
        batch = self.batch(n)
        carry = self.carry(n, batch)
        with torch.no_grad():
            before = self.probe(batch, carry)
        call = self.train(n, batch, carry)
        self.check_world_model(n, call, before, batch)
        self.check_imagination(n, call, before)
        self.check_actor(n, call)
        self.check_critic(n, call)
        self.check_step(n, call)

    def train(self, n: int, batch, carry) -> SimpleNamespace:
        self.shipped_loss = d3.world_model_loss
        return self.recorded((batch, carry), self.scaled(), lambda log: [recorder(log, d3.ReturnScale, "update")])

    def probe(self, batch, carry) -> dict[str, Tensor]:
        """What the world model computes on the way to its losses, by the names of any fixture."""
        model = self.agent.world_model
        embed, deter, _, post, prior, feat = self.posterior(batch, carry)
        reward = model.reward(feat)
        found = {"embed": embed, "prior_deter": deter, "prior_stoch": self.groups(prior.sample()),
                 "kl_before_free": post.kl(prior), "reward_logits": reward.logits,
                 "reward_mean": reward.mean(), "cont_logit": model.cont(feat).logit}
        for side, latent in (("post", post), ("prior", prior)):
            found |= {f"{side}_logit": latent.logits, f"{side}_logprob": latent.logits,
                      f"{side}_logit_raw": latent.raw, f"{side}_entropy": latent.entropy()}
        if self.vectors:
            vector = model.decoder.vector(feat)
            for key, columns in self.columns.items():
                found[f"recon_raw_{key}"] = found[f"recon_{key}"] = vector[..., columns]
                found[f"recon_mode_{key}"] = d3.symexp(vector[..., columns])
        found = {name: batch_major(x) for name, x in found.items()}
        if self.images:
            channels = np.cumsum([self.obs[key][-1] for key in self.images])[:-1].tolist()
            images = (model.decoder.image(feat) + 0.5).tensor_split(channels, -1)
            for key, image in zip(self.images, images):
                found |= {f"recon_{key}_b0_t0": image[0, 0], f"recon_{key}_lastb_lastt": image[-1, -1]}
        if initial := getattr(model.rssm, "initial_state", None):
            deter, stoch = initial()
            found |= {"initial_deter": deter, "initial_stoch": self.groups(stoch),
                      "initial_prior_logit": model.rssm.prior(deter).logits}
        return found

    def check_terms(self, folder: str, losses: dict[str, Tensor], names: dict[str, list[str]]) -> None:
        betas = {"dyn": self.args.beta_dyn, "rep": self.args.beta_rep}
        for name, loss in losses.items():
            keys = [folder + key for key in names.get(name, [name])]
            if keys[0] in self.fixture:  # ours has one term for all vectors, theirs one for each
                unscaled = batch_major(loss / betas.get(name, self.args.beta_pred))
                self.report.check(" + ".join(keys), unscaled, sum(self.fixture[key] for key in keys))

    def check_probed(self, prefix: str, before: dict[str, Tensor]) -> None:
        for name, value in before.items():
            wide = name == "reward_mean" or name.startswith("recon_mode")  # outputs of symexp
            self.compare(prefix + name, value, scale=element if wide else None)

    def check_world_model(self, n, call, before, batch) -> None:
        prefix = f"step{n}/wm/"
        losses, deter, stoch, _ = call.world_model_loss.result
        self.check_probed(prefix, before | {"post_deter": batch_major(deter),
                                            "post_stoch": batch_major(self.groups(stoch))})
        self.check_terms(prefix + "loss_unscaled/", losses, {"image": self.images, "vector": self.vectors})
        self.compare(prefix + "model_loss_bt", batch_major(sum(call.world_model_loss.scaled.values())))

        carry = {"latent/deter": deter[-1], "latent/stoch": self.groups(stoch[-1]),
                 "latent/logit": before["post_logit"][:, -1], "action": batch.action[-1]}
        self.compare_all(f"step{n}/carry_out/", carry)
        self.compare_all(f"step{n + 1}/carry_in/", carry)
        if n == 1:
            for term, grads in call.world_model_loss.parts.items():
                prefix = f"grad_{term}/"
                expected = {path: self.fixture[prefix + path] for path in self.fixture.under(prefix)}
                zeros = {path: torch.zeros(array.shape) for path, array in expected.items()}
                self.report.check_worst(prefix, zeros | grads, expected, "gradient")

    @torch.no_grad()
    def check_imagination(self, n, call, before) -> None:
        """The imagined trajectory. Theirs has an action and a weight at state H as well."""
        model, order, prefix = self.agent.world_model, self.start_order, f"step{n}/imag/"
        feat, action, _ = call.imagine.result
        deter, stoch = feat.split([self.args.deter, feat.shape[-1] - self.args.deter], -1)
        returns = call.lambda_return
        value = torch.cat([call.actor_loss.baseline, returns.next_value[-1:]])
        steps = slice(0, self.args.imag_horizon)
        self.compare_all(prefix, {name: order(x) for name, x in {
            "deter": deter, "stoch": self.groups(stoch), "reward": returns.reward, "ret": returns.result,
            "base": value[:-1], "value_all": value, "cont_logit": model.cont(feat).logit}.items()})
        # Theirs has the recorded flag of the start and the head's of the others.
        alive = (~call.world_model_loss.batch.is_terminal).float().flatten()[None]
        self.compare(prefix + "cont", order(torch.cat([alive, returns.discount / self.args.gamma])))
        for name, x in {"action": action, "weight": call.actor_loss.weight}.items():
            self.compare(prefix + name, order(x), steps=steps)
        prior = model.rssm.prior(deter[1:]).logits  # the world model is still the same
        self.compare(prefix + "logit", order(prior), steps=slice(1, None))
        self.compare(prefix + "logit", before["post_logit"].flatten(0, 1)[None], steps=slice(0, 1))

    def check_actor(self, n, call) -> None:
        order, prefix = self.start_order, f"step{n}/actor/"
        args, low, high = call.actor_loss, *call.update.self.range
        self.compare_all(prefix, {"retnorm_offset": low, "retnorm_invscale": call.update.result,
                                  "retnorm_scale": call.update.result})
        self.compare_all(f"retnorm_after{n}/", {"low": low, "high": high})
        elements = args.weight * per_step(self.script.actor_loss, args)
        if self.scaled_elements:
            elements *= self.config["loss_scales.actor"]
        log_prob, entropy = args.policy.log_prob(args.action.detach()), args.result[1]
        self.compare_all(prefix, {name: order(x.detach()) for name, x in {
            "normed_return": (args.ret - low) / args.scale, "normed_base": (args.baseline - low) / args.scale,
            "policy_logprob": log_prob, "logprob": log_prob, "policy_entropy": entropy, "entropy": entropy,
            "loss_elem": elements}.items()})
        size = float(torch.stack([args.ret, args.baseline]).abs().max() / args.scale)  # a difference of these
        self.compare(prefix + "adv", order((args.ret - args.baseline) / args.scale), scale=size)
        for name, ours in (("logits", self.policy_logits), ("mean", "mean"), ("std", "std")):
            if isinstance(value := getattr(args.policy, ours, None), Tensor):
                self.compare(f"{prefix}policy_{name}", order(value), steps=slice(0, len(value)))
        self.compare(prefix + "loss", args.scaled, scale=float(elements.abs().max()))
        self.compare(f"step{n}/loss/policy", self.by_start(elements))

    def by_start(self, elements: Tensor) -> Tensor:
        return self.start_order(elements.mean(0)[None])[0].unflatten(0, (self.rows, -1))

    def check_critic(self, n, call) -> None:
        order, prefix, args = self.start_order, f"step{n}/critic/", call.critic_loss
        elements = args.weight * per_step(self.script.critic_loss, args)
        if self.scaled_elements:
            elements *= self.config["loss_scales.critic"]
        self.compare_all(prefix, {name: order(x) for name, x in {
            "target": args.ret, "slow_value": args.slow_value,
            "nll": -args.value_dist.log_prob(args.ret.detach()),
            "slowreg": -args.value_dist.log_prob(args.slow_value), "loss_elem": elements}.items()})
        self.compare(prefix + "loss", args.scaled)
        self.compare(prefix + "logits_first", order(args.value_dist.logits[:1])[0])
        self.compare(f"step{n}/loss/value", self.by_start(elements))

    def check_step(self, n, call) -> None:
        self.compare(f"step{n}/wm/model_loss", call.model.loss)
        for name in self.optimizers:
            self.check_gradients(f"step{n}/{'wm' if name == 'model' else name}/grad/", call, name)
        theirs = {"grad_norm/model": "model_opt_grad_norm", "grad_norm/actor": "actor_opt_grad_norm",
                  "grad_norm/critic": "extr_critic_critic_opt_grad_norm", "loss/model": "model_opt_loss",
                  "loss/critic": "extr_critic_critic_opt_loss", "actor/entropy": "policy_entropy_mean",
                  "imagined/return": "extr_return_raw_mean", "imagined/reward": "extr_reward_mean",
                  "latent/post_entropy": "post_ent_mean", "latent/prior_entropy": "prior_ent_mean"}
        for ours, key in theirs.items():
            kind = "gradient" if ours.startswith("grad_norm") else "forward"
            self.compare(f"step{n}/metrics/{key}", call.returned[ours], kind)
        self.check_parameters(f"params_after{n}/")

    def check_optimizers(self, after: str) -> None:
        opts = {name: getattr(self.agent, f"{name}_opt") for name in self.optimizers}
        state = {param: values for opt in opts.values() for param, values in opt.adam.state.items()}
        for start, name in (("adam_mu", "exp_avg"), ("adam_nu", "exp_avg_sq")):
            if self.fixture.under(start + after):
                ours = self.in_their_layout(state, [values[name] for values in state.values()])
                self.report.check_all(self.fixture, start + after, ours, "gradient")
        for prefix in ("adam_count" + after, "opt" + after):
            for key in self.fixture.under(prefix):
                opt = next(opt for name, opt in opts.items() if f"/{name}_opt/" in prefix + key)
                steps = max(float(values["step"]) for values in opt.adam.state.values())
                self.compare(prefix + key, np.float64(steps), "exact")
        for key in self.fixture.under("slow_updates" + after):
            self.compare("slow_updates" + after + key, self.agent.updates, "exact")


# ------------------------------------------------------------------------------------ single pieces
def elementwise(function):
    """The check of a function of numbers, and of its derivative."""
    def check(case: Piece) -> None:
        x = case.leaf("x")
        y = function(x)
        case.check("y", y, scale=element)
        case.check("dydx", gradient(y, x)[0], scale=element)
    return check


def row(expected: np.ndarray) -> np.ndarray:
    return np.abs(expected).max(-1, keepdims=True)


class Math(Piece):
    def math_discdist(self) -> None:
        """Two-hot distribution; the numbers of its mean span nine orders of magnitude."""
        logits = self.leaf("logits")
        two_hot = d3.TwoHot(logits)
        log_prob, mean = two_hot.log_prob(self("target")), two_hot.mean()
        self.compare({"bins": two_hot.buckets, "log_prob": log_prob})
        self.check("mean", mean, scale=element)
        self.check("dlogprob_dlogits", gradient(log_prob, logits)[0], "gradient", row)
        self.check("dmean_dlogits", gradient(mean, logits)[0], "gradient", row)

    def math_discdist_identity(self) -> None:
        """The targets are in symlog space: transform them back."""
        self.check("log_prob", d3.TwoHot(self("logits")).log_prob(d3.symexp(self("target"))))

    def latents(self, latent) -> None:
        raw = raw_p, raw_q = self.leaf("raw_p"), self.leaf("raw_q")
        groups = raw_p.shape[-2]
        p, q = (latent(x.flatten(-2), groups) for x in raw)
        sample, entropy, kl = p.sample().unflatten(-1, (groups, -1)), p.entropy(), p.kl(q)
        self.compare({"unimix_logit_p": p.logits, "logprob_p": p.logits, "unimix_logit_q": q.logits,
                      "logprob_q": q.logits, "entropy_p": entropy, "sample_rule_p": sample,
                      "mode_p": p.mode().unflatten(-1, (groups, -1)), "kl_p_q": kl, "kl_q_p": q.kl(p)},
                     {"st_grad_raw_p": gradient((sample * self("st_weight")).sum(), raw_p)[0],
                      "entropy_grad_raw_p": gradient(entropy, raw_p)[0],
                      "dkl_draw_p": gradient(kl, raw_p)[0], "dkl_draw_q": gradient(kl, raw_q)[0]})
        if "value" in self:
            self.check("log_prob_p", p.log_prob(self("value")).sum(-1))

    def math_klloss(self) -> None:
        meta, raw = self.fixture.meta, [self.leaf("raw_post"), self.leaf("raw_prior")]
        post, prior = (d3.Latent(x.flatten(-2), meta["stoch"], meta["unimix"]) for x in raw)
        args = plain_args(d3, free_bits=meta["free_nats"], beta_dyn=1.0, beta_rep=1.0)
        losses = shipped_losses(d3, args, raw[0].shape[:-2], post, prior)
        total = (meta["dyn_scale"] * losses["dyn"] + meta["rep_scale"] * losses["rep"]).mean()
        self.compare({"dyn": losses["dyn"], "rep": losses["rep"], "total_mean": total,
                      "kl_before_free": post.kl(prior)},
                     dict(zip(("grad_raw_post", "grad_raw_prior"), gradient(total, *raw))))

    def math_lambda(self) -> None:
        """Lambda-return: what follows from state t stands at index t + 1 of value and cont."""
        gamma, lambda_ = 1 - 1 / self.fixture.meta["lambda_horizon"], self.fixture.meta["return_lambda"]
        discount = gamma * self("cont")[1:]
        self.check("return", d3.lambda_return(self("reward"), discount, self("value")[1:], lambda_))

    def math_moments(self) -> None:
        meta = self.fixture.meta["retnorm"]
        scale = d3.ReturnScale(plain_args(d3, return_norm_low=meta["perclo"], return_norm_high=meta["perchi"],
                                          return_norm_limit=1 / meta["max"], return_norm_decay=meta["decay"]))
        found = torch.stack([torch.stack([scale.update(ret), *scale.range]) for ret in self("x")])
        self.compare({"invscale": found[:, 0], "low_state": found[:, 1], "high_state": found[:, 2],
                      "offset": found[:, 1]})

    def policy(self, script, args) -> None:
        """Policy of continuous (raw_mean, raw_std) or discrete (raw) actions; the network is not used."""
        leaves = {key: self.leaf(key) for key in ("raw", "raw_mean", "raw_std") if key in self}
        raw, discrete, action = torch.cat([*leaves.values()], -1), len(leaves) == 1, self("action")
        actions = raw.shape[-1] // len(leaves)
        policy = script.Actor(args, EnvSpec(None, 1, actions, discrete), 1).policy(raw)
        if action.ndim < raw.ndim:  # an index
            action = nn.functional.one_hot(action.long(), actions).float()
        log_prob, entropy = policy.log_prob(action), policy.entropy()
        found = {name: getattr(policy, name, None) for name in ("mean", "std", "logits", "probs")}
        self.compare({name: x for name, x in found.items() if isinstance(x, Tensor)} | {
            "log_prob": log_prob, "logprob": log_prob, "entropy": entropy, "mode": policy.mode(),
            "sample_rule": policy.sample()},
            {f"d{name}_d{key}": gradient(x, leaf)[0] for key, leaf in leaves.items()
             for name, x in (("logprob", log_prob), ("entropy", entropy))})

    def math_actor_normal(self) -> None:
        meta = self.fixture.meta
        self.policy(d3, plain_args(d3, unimix=meta["unimix"], actor_min_std=meta["actor_minstd"],
                                          actor_max_std=meta["actor_maxstd"]))

    def math_symlog_mse(self) -> None:
        """Loss of vectors, as `world_model_loss` computes it."""
        pred = self.leaf("pred")
        found = shipped_losses(d3, plain_args(d3, beta_pred=1.0), pred.shape[:1], vector=self("target"), predicted=pred)
        self.compare({"log_prob": -found["vector"], "mode": d3.symexp(pred)},
                     {"dlogprob_dpred": gradient(-found["vector"], pred)[0]})

    def math_mse_image(self) -> None:
        pred, image = self("pred") - 0.5, self("target") * 255
        found = shipped_losses(d3, plain_args(d3, beta_pred=1.0), pred.shape[:2], image=image, predicted=pred)
        self.check("log_prob", -found["image"])

    def math_bernoulli(self) -> None:
        flag, terminal = d3.Bernoulli(self("logit")), self("target") < 0.5
        found = shipped_losses(d3, plain_args(d3, beta_pred=1.0), terminal.shape, terminal=terminal, cont=flag)
        self.compare({"log_prob": -found["cont"], "mode": flag.mode()})

    def fill(self, layer, norm, order) -> None:
        layer.weight.data = self("kernel").permute(order).contiguous()
        norm.weight.data, norm.bias.data = self("norm_scale"), self("norm_bias")

    def math_layer_linear(self) -> None:
        dense = d3.Dense(6, 5)
        self.fill(dense, dense.norm, (1, 0))
        self.check("y", dense(self("x")))

    def math_layer_conv(self) -> None:
        cnn, x = d3.Encoder(plain_args(d3, image_size=8, depth=5), EnvSpec((8, 8, 3), 0, 1, True)).cnn, self("x")
        self.fill(cnn[0], cnn[1], (3, 2, 0, 1))
        for key, layer in (("y", cnn), ("y_linear_only", cnn[0])):
            self.check(key, layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def math_layer_convtransp(self) -> None:
        cnn = d3.Decoder(plain_args(d3, image_size=8, depth=5), EnvSpec((8, 8, 2), 0, 1, True), 1).cnn
        cnn[0].weight.data = self("kernel").flip(0, 1).permute(3, 2, 0, 1).contiguous()
        cnn[0].bias.data = self("bias")
        self.check("y", cnn(self("x").permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def math_layer_gru(self) -> None:
        h, x = self("h"), self("x")
        gru = d3.NormGRUCell(x.shape[-1], h.shape[-1])
        self.fill(gru.linear, gru.norm, (1, 0))
        self.check("h_next", gru(x, h))

    def steps(self, names, make_optimizer) -> None:
        """Clipping and steps, for gradients that are given: loss = <parameter, gradient>."""
        params = {name: nn.Parameter(self(f"{name}0")) for name in names}
        optimizer, norms, found = make_optimizer(nn.ParameterList(params.values())), [], {name: [] for name in names}
        for grads in zip(*(self(f"grad_{name}") for name in names)):
            loss = sum((param * grad).sum() for param, grad in zip(params.values(), grads))
            norms.append(optimizer.apply(optimizer.grads(loss)))
            for name, param in params.items():
                found[name].append(param.detach().clone())
        self.check("grad_norm_metric", torch.stack(norms))
        for name, steps in found.items():
            self.check(f"{name}_after", torch.stack(steps), "parameter")

    def math_optim(self) -> None:
        meta = self.fixture.meta["optim"]
        self.steps("wv", lambda params: d3.Optimizer(params, meta["lr"], meta["eps"], meta["clip"]))

    math_symlog, math_symexp = elementwise(d3.symlog), elementwise(d3.symexp)
    math_actor_onehot = math_actor_normal

    def math_onehot(self) -> None:
        self.latents(lambda raw, groups: d3.Latent(raw, groups, self.fixture.meta["unimix"]))
