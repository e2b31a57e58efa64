"""What `tests.parity` compares for DreamerV3: fixtures of danijar/dreamerv3 at 8fa35f8."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import dreamer_v3 as d3
from common.spaces import EnvSpec
from tests import parity
from tests.parity import (Fixture, Report, batch_major, compare, gradient, per_step, recorder, shipped_losses)
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


def tolerance(fixture: Fixture) -> dict[str, float]:
    return {"forward": 2e-5, "gradient": 1e-4, "parameter": 1e-5, "exact": 0.0}


# ----------------------------------------------------------------------------- an agent like theirs
class Twin(parity.Twin):
    """Our agent with the sizes, settings and weights of a fixture."""

    script, init, aligned = d3, "params_init/", True
    rename = [
        (r"^agent/task_behavior/ac/actor/(dist_out/out|h\d+)/", r"actor/head/\1/"),
        (r"^agent/task_behavior/ac/actor/dist_out/std/", "actor/std/"),
        (r"^agent/task_behavior/critic/net/", "critic/head/"),
        (r"^agent/task_behavior/critic/slow/", "slow_critic/head/"),
        (r"^agent/wm/", "world_model/"),
        (r"/enc/", "/encoder/"), (r"/dec/", "/decoder/"), (r"/rew/", "/reward_head/"),
        (r"/cont/", "/cont_head/"), (r"/cnn/in/", "/cnn_in/"),
        (r"/cnn/s(\d+)res/norm/", lambda m: f"/cnn/{3 * int(m[1]) + 1}/"),
        (r"/cnn/s(\d+)res/", lambda m: f"/cnn/{3 * int(m[1])}/"),
        (r"/decoder/mlp/dist_.*/out/", "/decoder/vector_head/out/"),
        (r"/decoder/mlp/h", "/decoder/vector_head/h"), (r"/encoder/mlp/h", "/encoder/h"),
        (r"/dist_out/", "/"), (r"/h(\d+)/", r"/mlp/\1/"),
        (r"/gru/kernel", "/gru/linear/kernel"),
        (r"/(kernel|scale)$", "/weight"), (r"/", "."),
    ]
    flipped, vector_out = r"/dec/cnn/s\d+res/kernel$", r"/dec/mlp/dist_(.*)/out/"
    sized_classes = {"Encoder": "encoder", "Decoder": "decoder"}

    def observations(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(self.fixture.meta["obs"][key][0]) for key in self.fixture.meta["obs_order"]}

    def make_args(self) -> d3.Args:
        c, scales = self.config, self.predictions()
        return plain_args(
            d3, image_size=(self.spec.image_shape or (64,))[0], batch_size=self.rows,
            batch_length=self.length, imag_horizon=c["imag_horizon"], units=c["actor.units"],
            layers=c["actor.layers"], bins=c["critic.bins"], deter=c["rssm.deter"], hidden=c["rssm.units"],
            stoch=c["rssm.stoch"], classes=c["rssm.classes"], unimix=c["rssm.unimix"], beta_pred=scales[
                "reward"] if len(set(scales.values())) == 1 else 1.0, beta_dyn=c["loss_scales.dyn"],
            beta_rep=c["loss_scales.rep"], free_bits=c["dyn_loss.free"], gamma=1 - 1 / c["horizon"],
            return_lambda=c["return_lambda"], critic_ema_decay=1 - c["slow_critic_fraction"],
            critic_ema_regularizer=c["loss_scales.slowreg"], return_norm_low=c["retnorm.perclo"],
            return_norm_high=c["retnorm.perchi"], return_norm_limit=1 / c["retnorm.max"],
            return_norm_decay=c["retnorm.decay"], actor_entropy=c["actent"], actor_min_std=c["actor.minstd"],
            actor_max_std=c["actor.maxstd"], **{f"{ours}_{key}": c[f"{ours}_opt.{key}"] for ours in (
                "model", "actor", "critic") for key in ("lr", "eps", "clip")})

    def predictions(self) -> dict[str, float]:
        """Their loss scales that are one `beta_pred` in ours."""
        names = ["image"] * bool(self.images) + ["vector"] * bool(self.vectors) + ["reward", "cont"]
        return {name: self.config[f"loss_scales.{name}"] for name in names}

    def loss_scales(self) -> dict[str, float]:
        """World model: each prediction's scale."""
        return {name: scale / self.args.beta_pred for name, scale in self.predictions().items()}

    def sized(self, network: str) -> d3.Args:
        own = ("mlp_units", "mlp_layers", "cnn_depth")
        return replace(self.args, **{name.removeprefix("cnn_"): self.config[f"{network}.{name}"]
                                     for name in own})

    def load_weights(self) -> None:
        """The return scale is no parameter."""
        super().load_weights()
        bounds = [self.fixture.tensor(f"retnorm_init/{key}") for key in ("low", "high")]
        self.agent.return_scale.range.copy_(torch.stack(bounds))

    def carry(self, n: int) -> d3.State:
        """The state that update `n` starts from."""
        prefix = f"step{n}/carry_in/"
        return d3.State(self.fixture.tensor(prefix + "latent/deter"), self.fixture.tensor(
            prefix + "latent/stoch").flatten(-2), self.fixture.tensor(prefix + "action"))

    # -------------------------------------------------------- loss scales that are one flag in ours
    def scaled_model(self, result, call):
        """World model, and the free bits of the representation loss."""
        if self.config["rep_loss.free"] != self.args.free_bits:
            other = replace(self.args, free_bits=self.config["rep_loss.free"])
            result[0]["rep"] = self.shipped_loss(call.model, call.batch, call.carry, other)[0]["rep"]
        result = super().scaled_model(result, call)
        call.parts = self.term_gradients(call.scaled)
        return result

    def scaled_actor(self, result, call):
        call.scaled = result[0] * self.config["loss_scales.actor"]
        return call.scaled, result[1]

    def scaled_critic(self, result, call):
        call.scaled = result * self.config["loss_scales.critic"]
        return call.scaled

    def term_gradients(self, losses: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Gradients of the mean of each world-model loss term, as far as the fixture has them."""
        terms = {"dyn": ["dyn"], "rep": ["rep"], "reward": ["reward"], "cont": ["cont"],
                 "recon": ["image", "vector"]}
        found, params = {}, list(self.agent.world_model.parameters())
        for term, names in terms.items():
            if chosen := self.fixture.under(f"grad_{term}/"):
                loss = sum(losses[name].mean() for name in names if name in losses)
                every = self.in_their_layout(params, gradient(loss, *params))
                found[term] = {path: every[path] for path in chosen}
        return found

    # ---------------------------------------------------------------------------------- comparisons
    def check(self) -> None:
        """And what the optimisers hold at the end."""
        super().check()
        self.check_optimizers(f"_after{self.fixture.numbered('batch')}/")

    def check_acting(self) -> None:
        """Online acting on the observations of batch 1, with the initial weights."""
        for t, _, state, latent in self.acted(self.fixture.numbered("policy/t")):
            policy = self.agent.actor.policy(self.agent.actor(torch.cat([state.deter, state.stoch], -1)))
            self.compare_all(f"policy/t{t}/", {
                "action": state.action, "deter": state.deter, "stoch": self.groups(state.stoch),
                "logit": latent.logits, "log_entropy": policy.entropy()})

    def check_update(self, n: int) -> None:
        batch, carry, self.shipped_loss = self.batch(n), self.carry(n), d3.world_model_loss
        with torch.no_grad():
            before = self.probe(batch, carry)
        after = {"world_model_loss": self.scaled_model, "actor_loss": self.scaled_actor,
                 "critic_loss": self.scaled_critic}
        call = self.recorded(batch, carry, after, lambda log: [recorder(log, d3.ReturnScale, "update")])
        self.check_world_model(n, call, before, batch)
        self.check_imagination(n, call, before)
        self.check_actor(n, call)
        self.check_critic(n, call)
        self.check_step(n, call)

    def probe(self, batch: d3.Batch, carry: d3.State) -> dict[str, Tensor]:
        """What the world model computes on the way to its losses, by their names."""
        model, rssm = self.agent.world_model, self.agent.world_model.rssm
        embed, deter, _, post, prior, feat = self.posterior(batch, carry)
        reward = model.reward(feat)
        found = {"embed": embed, "post_logit": post.logits, "prior_logit": prior.logits,
                 "prior_deter": deter, "prior_stoch": self.groups(prior.sample()),
                 "kl_before_free": post.kl(prior), "post_entropy": post.entropy(),
                 "prior_entropy": prior.entropy(), "reward_logits": reward.logits,
                 "reward_mean": reward.mean(), "cont_logit": model.cont(feat).logit}
        if self.vectors:
            raw_vector = model.decoder.vector(feat)
            for key, columns in self.columns.items():
                found[f"recon_raw_{key}"] = raw_vector[..., columns]
                found[f"recon_mode_{key}"] = d3.symexp(raw_vector[..., columns])
        found = {name: batch_major(x) for name, x in found.items()}
        if self.images:
            channels = np.cumsum([self.obs[key][-1] for key in self.images])[:-1].tolist()
            images = (model.decoder.image(feat) + 0.5).tensor_split(channels, -1)
            for key, image in zip(self.images, images):
                found[f"recon_{key}_b0_t0"] = image[0, 0]
                found[f"recon_{key}_lastb_lastt"] = image[-1, -1]
        first_deter, first_stoch = rssm.initial_state()
        return found | {"initial_deter": first_deter, "initial_stoch": self.groups(first_stoch),
                        "initial_prior_logit": rssm.prior(first_deter).logits}

    def check_world_model(self, n, call, before, batch) -> None:
        """Posterior, prior, heads, and every loss term."""
        fixture, prefix, args = self.fixture, f"step{n}/wm/", self.args
        losses, deter, stoch, _ = call.world_model_loss.result
        ours = before | {"post_deter": batch_major(deter), "post_stoch": batch_major(self.groups(stoch))}
        for name, value in ours.items():
            wide = name == "reward_mean" or name.startswith("recon_mode")  # outputs of symexp
            self.compare(prefix + name, value, scale=value.abs().clamp(min=1).cpu().numpy() if wide else None)

        names = {"reward": ["reward"], "cont": ["cont"], "dyn": ["dyn"], "rep": ["rep"],
                 "image": self.images, "vector": self.vectors}
        betas = {"dyn": args.beta_dyn, "rep": args.beta_rep}
        for name, loss in losses.items():
            keys = [f"{prefix}loss_unscaled/{key}" for key in names[name]]
            if keys[0] in fixture:  # ours has one term for all vectors, theirs one for each
                expected = sum(fixture[key] for key in keys)
                self.report.check(keys[0] + "".join(f"+{key}" for key in names[name][1:]),
                                  batch_major(loss / betas.get(name, args.beta_pred)), expected)
        scaled = call.world_model_loss.scaled
        self.compare(prefix + "model_loss_bt", batch_major(sum(scaled.values())))

        carry = {"latent/deter": deter[-1], "latent/stoch": self.groups(stoch[-1]),
                 "latent/logit": before["post_logit"][:, -1], "action": batch.action[-1]}
        self.compare_all(f"step{n}/carry_out/", carry)
        self.compare_all(f"step{n + 1}/carry_in/", carry)
        if n == 1:
            for term, grads in call.world_model_loss.parts.items():
                self.report.check_all(fixture, f"grad_{term}/", grads, "gradient")

    @torch.no_grad()
    def check_imagination(self, n, call, before) -> None:
        """The imagined trajectory. Theirs has an action and a weight at state H as well."""
        model, order, prefix = self.agent.world_model, self.start_order, f"step{n}/imag/"
        feat, action, _ = call.imagine.result
        deter, stoch = feat.split([self.args.deter, feat.shape[-1] - self.args.deter], -1)
        returns, value = call.lambda_return, self.value_all(call)
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

    def value_all(self, call) -> Tensor:
        """Values of the states 0 to H, from the two places that they go to."""
        return torch.cat([call.actor_loss.baseline, call.lambda_return.next_value[-1:]]).detach()

    def check_actor(self, n, call) -> None:
        """Return scale, advantages, policy and the actor's loss."""
        order, prefix = self.start_order, f"step{n}/actor/"
        args, low, high = call.actor_loss, *call.update.self.range
        self.compare(prefix + "retnorm_offset", low)
        self.compare(prefix + "retnorm_invscale", call.update.result)
        self.compare_all(f"retnorm_after{n}/", {"low": low, "high": high})
        scaled = args.weight * self.config["loss_scales.actor"]
        elements = scaled * per_step(d3.actor_loss, args)
        normed_return, normed_base = ((x - low).detach() / args.scale for x in (args.ret, args.baseline))
        self.compare_all(prefix, {name: order(x) for name, x in {
            "normed_return": normed_return, "normed_base": normed_base,
            "policy_logprob": args.policy.log_prob(args.action.detach()),
            "policy_entropy": args.result[1], "loss_elem": elements}.items()})
        # The advantage is the difference of these two, so it has their rounding errors.
        size = float(torch.stack([normed_return, normed_base]).abs().max())
        self.compare(prefix + "adv", order((args.ret - args.baseline) / args.scale), scale=size)
        for name in ("logits", "mean", "std"):
            if isinstance(value := getattr(args.policy, name, None), Tensor):
                self.compare(f"{prefix}policy_{name}", order(value), steps=slice(0, len(value)))
        self.compare(prefix + "loss", args.scaled, scale=float(elements.abs().max()))

    def check_critic(self, n, call) -> None:
        """Targets, both parts of the critic's loss, and the loss."""
        order, prefix, args = self.start_order, f"step{n}/critic/", call.critic_loss
        scaled = args.weight * self.config["loss_scales.critic"]
        self.compare_all(prefix, {name: order(x) for name, x in {
            "target": args.ret, "slow_value": args.slow_value,
            "nll": -args.value_dist.log_prob(args.ret.detach()), "slowreg": -args.value_dist.log_prob(
                args.slow_value), "loss_elem": scaled * per_step(d3.critic_loss, args)}.items()})
        self.compare(prefix + "loss", args.scaled)

    def check_step(self, n, call) -> None:
        """What the optimisers get and do, and the metrics that `train_step` returns."""
        self.compare(f"step{n}/wm/model_loss", call.model.loss)
        for name, theirs in (("model", "wm"), ("actor", "actor"), ("critic", "critic")):
            self.check_gradients(f"step{n}/{theirs}/grad/", call, name)
        theirs = {"grad_norm/model": "model_opt_grad_norm", "grad_norm/actor": "actor_opt_grad_norm",
                  "grad_norm/critic": "extr_critic_critic_opt_grad_norm", "loss/model": "model_opt_loss",
                  "loss/critic": "extr_critic_critic_opt_loss", "actor/entropy": "policy_entropy_mean",
                  "imagined/return": "extr_return_raw_mean", "imagined/reward": "extr_reward_mean",
                  "latent/post_entropy": "post_ent_mean", "latent/prior_entropy": "prior_ent_mean"}
        for ours, key in theirs.items():
            kind = "gradient" if ours.startswith("grad_norm") else "forward"
            self.compare(f"step{n}/metrics/{key}", call.metrics[ours], kind)
        self.check_parameters(f"params_after{n}/")

    def check_optimizers(self, after: str) -> None:
        """Adam's moments and the counters after the last update."""
        fixture, agent = self.fixture, self.agent
        opts = {"model_opt": agent.model_opt, "actor_opt": agent.actor_opt, "critic_opt": agent.critic_opt}
        state = {param: values for opt in opts.values() for param, values in opt.adam.state.items()}
        for start, name in (("adam_mu", "exp_avg"), ("adam_nu", "exp_avg_sq")):
            if fixture.under(start + after):
                ours = self.in_their_layout(state, [values[name] for values in state.values()])
                self.report.check_all(fixture, start + after, ours, "gradient")
        for key in (prefix + key for prefix in ("adam_count" + after, "opt" + after)
                    for key in fixture.under(prefix)):
            opt = next(opt for name, opt in opts.items() if f"/{name}/" in key)
            self.compare(key, np.max([float(values["step"]) for values in opt.adam.state.values()]), "exact")
        for key in fixture.under("slow_updates" + after):
            self.compare("slow_updates" + after + key, agent.updates, "exact")


# ------------------------------------------------------------------------------------ single pieces
def check_math(report: Report, fixture: Fixture) -> None:
    """Every unit-level quantity of `v3_math.npz` that the fixture has."""
    checks = {"symlog": math_symlog, "discdist": math_two_hot, "onehot": math_one_hot,
              "klloss": math_kl, "lambda": math_returns, "moments": math_return_scale,
              "actor_normal": math_gaussian, "actor_onehot": math_actor_one_hot,
              "symlog_mse": math_predictions, "layer_linear": math_layers, "optim": math_optimizer}
    for prefix, check in checks.items():
        if fixture.under(prefix + "/"):
            check(report, fixture)


def math_symlog(report: Report, fixture: Fixture) -> None:
    """symlog, symexp and their derivatives, element by element."""
    for name, function in (("symlog", d3.symlog), ("symexp", d3.symexp)):
        x = fixture.leaf(f"{name}/x")
        y = function(x)
        for key, ours in (("y", y), ("dydx", gradient(y, x)[0])):
            expected = fixture[f"{name}/{key}"]
            report.check(f"{name}/{key}", ours, expected, scale=np.abs(expected).clip(1))


def math_two_hot(report: Report, fixture: Fixture) -> None:
    """Two-hot distribution; the targets of `_identity` are in symlog space: transform them back."""
    logits, target = fixture.leaf("discdist/logits"), fixture.tensor("discdist/target")
    two_hot = d3.TwoHot(logits)
    log_prob, mean = two_hot.log_prob(target), two_hot.mean()
    compare(report, fixture, "discdist/", {"bins": two_hot.buckets, "log_prob": log_prob})
    size = np.abs(fixture["discdist/mean"]).clip(1)
    report.check("discdist/mean", mean, fixture["discdist/mean"], scale=size)
    for key, output in (("dlogprob_dlogits", log_prob), ("dmean_dlogits", mean)):
        expected = fixture[f"discdist/{key}"]
        report.check(f"discdist/{key}", gradient(output, logits)[0], expected, "gradient",
                     np.abs(expected).max(-1, keepdims=True))
    two_hot = d3.TwoHot(fixture.tensor("discdist_identity/logits"))
    target = d3.symexp(fixture.tensor("discdist_identity/target"))
    compare(report, fixture, "discdist_identity/", {"log_prob": two_hot.log_prob(target)})


def math_one_hot(report: Report, fixture: Fixture) -> None:
    """Latents: unimix, log-probability, entropy, KL, straight-through sample."""
    raw_p, raw_q = fixture.leaf("onehot/raw_p"), fixture.tensor("onehot/raw_q")
    groups, unimix = raw_p.shape[-2], fixture.meta["unimix"]
    p, q = (d3.Latent(raw.flatten(-2), groups, unimix) for raw in (raw_p, raw_q))
    sample, entropy = p.sample().unflatten(-1, (groups, -1)), p.entropy()
    weighted = (sample * fixture.tensor("onehot/st_weight")).sum()
    compare(report, fixture, "onehot/", {
        "unimix_logit_p": p.logits, "unimix_logit_q": q.logits, "entropy_p": entropy,
        "log_prob_p": p.log_prob(fixture.tensor("onehot/value")).sum(-1), "sample_rule_p": sample,
        "mode_p": p.mode().unflatten(-1, (groups, -1)), "kl_p_q": p.kl(q), "kl_q_p": q.kl(p)}, {
            "st_grad_raw_p": gradient(weighted, raw_p)[0], "entropy_grad_raw_p": gradient(entropy, raw_p)[0]})


def math_kl(report: Report, fixture: Fixture) -> None:
    """Both KL losses and where their gradients go."""
    meta, raw = fixture.meta, [fixture.leaf(f"klloss/raw_{side}") for side in ("post", "prior")]
    post, prior = (d3.Latent(x.flatten(-2), meta["stoch"], meta["unimix"]) for x in raw)
    args = plain_args(d3, free_bits=meta["free_nats"], beta_dyn=1.0, beta_rep=1.0)
    losses = shipped_losses(d3, args, raw[0].shape[:-2], post, prior)
    total = (meta["dyn_scale"] * losses["dyn"] + meta["rep_scale"] * losses["rep"]).mean()
    compare(report, fixture, "klloss/", {"dyn": losses["dyn"], "rep": losses["rep"],
                                         "total_mean": total, "kl_before_free": post.kl(prior)},
            dict(zip(("grad_raw_post", "grad_raw_prior"), gradient(total, *raw))))


def math_returns(report: Report, fixture: Fixture) -> None:
    """Lambda-return: what follows from state t stands at index t + 1 of value and cont."""
    reward, value, cont = (fixture.tensor(f"lambda/{key}") for key in ("reward", "value", "cont"))
    gamma = 1 - 1 / fixture.meta["lambda_horizon"]
    ours = d3.lambda_return(reward, gamma * cont[1:], value[1:], fixture.meta["return_lambda"])
    compare(report, fixture, "lambda/", {"return": ours})


def math_return_scale(report: Report, fixture: Fixture) -> None:
    """Successive updates of the return scale."""
    meta = fixture.meta["retnorm"]
    scale = d3.ReturnScale(plain_args(d3, return_norm_low=meta["perclo"], return_norm_high=meta["perchi"],
                                      return_norm_limit=1 / meta["max"], return_norm_decay=meta["decay"]))
    found = {"low_state": [], "high_state": [], "invscale": [], "offset": []}
    for ret in fixture.tensor("moments/x"):
        found["invscale"].append(scale.update(ret))
        for key, which in (("low_state", 0), ("high_state", 1), ("offset", 0)):
            found[key].append(scale.range[which].clone())
    compare(report, fixture, "moments/", {key: torch.stack(ours) for key, ours in found.items()})


def actor(fixture: Fixture, actions: int, discrete: bool) -> d3.Actor:
    """An actor with the fixture's settings; its network is not used."""
    meta = fixture.meta
    args = plain_args(d3, unimix=meta["unimix"], actor_min_std=meta["actor_minstd"],
                      actor_max_std=meta["actor_maxstd"])
    return d3.Actor(args, EnvSpec(None, 1, actions, discrete), 1)


def math_gaussian(report: Report, fixture: Fixture) -> None:
    """Policy of continuous actions."""
    mean, std = (fixture.leaf(f"actor_normal/raw_{key}") for key in ("mean", "std"))
    policy = actor(fixture, mean.shape[-1], False).policy(torch.cat([mean, std], -1))
    log_prob, entropy = policy.log_prob(fixture.tensor("actor_normal/action")), policy.entropy()
    compare(report, fixture,
            "actor_normal/", {"mean": policy.mean, "std": policy.std, "log_prob": log_prob,
                              "entropy": entropy, "mode": policy.mode(), "sample_rule": policy.sample()},
            {"dlogprob_draw_mean": gradient(log_prob, mean)[0],
             "dlogprob_draw_std": gradient(log_prob, std)[0], "dentropy_draw_std": gradient(entropy, std)[0]})


def math_actor_one_hot(report: Report, fixture: Fixture) -> None:
    """Policy of discrete actions."""
    raw = fixture.leaf("actor_onehot/raw")
    policy = actor(fixture, raw.shape[-1], True).policy(raw)
    log_prob, entropy = policy.log_prob(fixture.tensor("actor_onehot/action")), policy.entropy()
    compare(report, fixture, "actor_onehot/", {
        "logits": policy.logits, "probs": policy.probs, "log_prob": log_prob,
        "entropy": entropy, "mode": policy.mode(), "sample_rule": policy.sample()},
        {"dlogprob_draw": gradient(log_prob, raw)[0], "dentropy_draw": gradient(entropy, raw)[0]})


def math_predictions(report: Report, fixture: Fixture) -> None:
    """Vector, image and continue loss, as `world_model_loss` computes them."""
    args = plain_args(d3, beta_pred=1.0)
    pred, target = fixture.leaf("symlog_mse/pred"), fixture.tensor("symlog_mse/target")
    log_prob = -shipped_losses(d3, args, pred.shape[:1], vector=target, predicted=pred)["vector"]
    compare(report, fixture, "symlog_mse/", {"log_prob": log_prob, "mode": d3.symexp(pred)},
            {"dlogprob_dpred": gradient(log_prob, pred)[0]})

    pred, target = (fixture.tensor(f"mse_image/{key}") for key in ("pred", "target"))
    found = shipped_losses(d3, args, pred.shape[:2], image=target * 255, predicted=pred - 0.5)["image"]
    compare(report, fixture, "mse_image/", {"log_prob": -found})

    flag = d3.Bernoulli(fixture.tensor("bernoulli/logit"))
    target = fixture.tensor("bernoulli/target")
    found = shipped_losses(d3, args, target.shape, terminal=target < 0.5, cont=flag)["cont"]
    compare(report, fixture, "bernoulli/", {"log_prob": -found, "mode": flag.mode()})


def math_layers(report: Report, fixture: Fixture) -> None:
    """One layer each: dense, convolution, transposed convolution, GRU."""
    def fill(layer, norm, prefix, order):
        layer.weight.data = fixture.tensor(f"{prefix}kernel").permute(order).contiguous()
        norm.weight.data = fixture.tensor(f"{prefix}norm_scale")
        norm.bias.data = fixture.tensor(f"{prefix}norm_bias")

    args = plain_args(d3, image_size=8, depth=5)
    dense = d3.Dense(6, 5)
    fill(dense, dense.norm, "layer_linear/", (1, 0))
    compare(report, fixture, "layer_linear/", {"y": dense(fixture.tensor("layer_linear/x"))})

    cnn = d3.Encoder(args, EnvSpec((8, 8, 3), 0, 1, True)).cnn
    fill(cnn[0], cnn[1], "layer_conv/", (3, 2, 0, 1))
    x = fixture.tensor("layer_conv/x").permute(0, 3, 1, 2)
    compare(report, fixture, "layer_conv/", {
        key: y.permute(0, 2, 3, 1) for key, y in (("y", cnn(x)), ("y_linear_only", cnn[0](x)))})

    cnn = d3.Decoder(args, EnvSpec((8, 8, 2), 0, 1, True), 1).cnn
    kernel = fixture.tensor("layer_convtransp/kernel").flip(0, 1)
    cnn[0].weight.data = kernel.permute(3, 2, 0, 1).contiguous()
    cnn[0].bias.data = fixture.tensor("layer_convtransp/bias")
    y = cnn(fixture.tensor("layer_convtransp/x").permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    compare(report, fixture, "layer_convtransp/", {"y": y})

    h, x = fixture.tensor("layer_gru/h"), fixture.tensor("layer_gru/x")
    gru = d3.NormGRUCell(x.shape[-1], h.shape[-1])
    fill(gru.linear, gru.norm, "layer_gru/", (1, 0))
    compare(report, fixture, "layer_gru/", {"h_next": gru(x, h)})


def math_optimizer(report: Report, fixture: Fixture) -> None:
    """Clipping and Adam, for gradients that are given: loss = <parameter, gradient>."""
    meta = fixture.meta["optim"]
    params = [nn.Parameter(fixture.tensor(f"optim/{name}0")) for name in "wv"]
    optimizer = d3.Optimizer(torch.nn.ParameterList(params), meta["lr"], meta["eps"], meta["clip"])
    found = {"w_after": [], "v_after": [], "grad_norm_metric": []}
    for given in zip(fixture.tensor("optim/grad_w"), fixture.tensor("optim/grad_v")):
        loss = sum((p * g).sum() for p, g in zip(params, given))
        found["grad_norm_metric"].append(optimizer.apply(optimizer.grads(loss)))
        for key, param in zip(("w_after", "v_after"), params):
            found[key].append(param.detach().clone())
    for key, ours in found.items():
        kind = "forward" if key == "grad_norm_metric" else "parameter"
        report.check(f"optim/{key}", torch.stack(ours), fixture[f"optim/{key}"], kind)
