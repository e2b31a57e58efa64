"""What `tests.parity` compares for DreamerV2: fixtures of danijar/dreamerv2 at 07d906e.

Their batches hold the action that led to each observation, and their features are [stoch, deter].
"""

from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import dreamer_v2 as d2
from common.spaces import EnvSpec
from tests import parity
from tests.parity import (Piece, batch_major, gradient, patched, per_step, recorder, shipped_losses)
from tests.tiny import plain_args

IGNORED = {
    "batch*/is_last": "the algorithm does not use it",
    "step1/data/*": "inputs; what is made of them is compared as like/*, loss/* and imag/discount",
    "step*/metric/actor_ent_scale": "a setting",
    "step*/metric/reward_normed_*": "switched off in every setting of theirs",
    "klgauss/*": "V2 has no Gaussian latents here", "stdact/*": "V2 has no Gaussian latents here",
    "kl/combo[13]/*": "free nats for each element (free_avg False), which they never use",
    "kl/combo1[89]/*": "the other direction of the KL (forward True), which no setting of theirs uses",
    "kl/combo2[01]/*": "the same",
    "kl/free_median": "stands in kl/combos, too",
    "pre/reward_sign": "no setting of theirs uses it",
    "weight/*_noterm": "training always knows the recorded flags",
    "trunc/mean": "the algorithm does not use it",
    "tanhnormal/*": "a policy that none of their settings uses",
    "streamnorm*": "switched off in every setting of theirs",
    "schedule/*": "every setting is constant",
    "noise/*": "their exploration noise is 0",
}
RMS = False  # the scale of a gradient is its maximum
TOLERANCE = {"forward": 1e-5, "gradient": 1e-4, "parameter": 2e-6}


# ----------------------------------------------------------------------------- an agent like theirs
class Twin(parity.Twin):
    script = d2
    swapped = (r"^(decoder/(convin|dense0)|(reward|discount|actor|critic|target_critic)/dense0"
               r"|rssm/gru/dense)/kernel$")
    vector_out = r"^decoder/dense_(.*)/out/"
    rename = [(r"^target_critic/", "slow_critic/head/"), (r"^critic/", "critic/head/"),
              (r"^actor/out/std/", "actor/std/"), (r"^actor/(?!std)", "actor/head/"),
              (r"^(encoder|decoder|rssm|reward|discount)/", r"world_model/\1/"),
              (r"/discount/", "/discount_head/"), (r"/reward/", "/reward_head/"),
              (r"/convin/", "/cnn_in/"), (r"/conv(\d+)/", lambda m: f"/cnn/{2 * int(m[1])}/"),
              (r"/convnorm(\d+)/", lambda m: f"/cnn/{2 * int(m[1]) + 1}/0/"),
              (r"/decoder/dense_.*/out/", "/decoder/vector_head/out/"),
              (r"/decoder/(dense|densenorm)(\d+)/", r"/decoder/vector_head/\1\2/"),
              (r"/gru/dense/", "/gru/linear/"),
              (r"/(img|obs)_dist(_0)?/", r"/\1_stats/"), (r"/(img_in|obs_out)_norm/", r"/\1/norm/"),
              (r"/img_out_norm_0/", "/img_out/norm/"), (r"/img_out_0/", "/img_out/"),
              (r"/(dense)?norm(\d+)/", r"/mlp/\2/norm/"), (r"/dense(\d+)/", r"/mlp/\1/"),
              (r"/out/out/", "/out/"), (r"/(kernel|gamma)$", "/weight"), (r"/beta$", "/bias"), (r"/", ".")]
    settings = """deter=rssm.deter hidden=rssm.hidden stoch=rssm.stoch classes=rssm.discrete
        units=actor.units layers=actor.layers depth=encoder.cnn_depth kl_scale=loss_scales.kl
        kl_balance=kl.balance free_nats=kl.free pcont=pred_discount pcont_scale=loss_scales.discount
        imag_horizon gamma=discount return_lambda=discount_lambda actor_grad
        actor_grad_mix actor_entropy=actor_ent actor_min_std=actor.min_std
        weight_decay=model_opt.wd slow_every=slow_target_update slow_fraction=slow_target_fraction"""

    def sized_networks(self) -> list[tuple[object, str, object]]:
        """With layer norms, if they have some, which is a setting that our script leaves out."""
        if self.config["rssm.norm"] != "layer":
            return []
        self.report.tolerance["parameter"] = 5e-6
        return layer_norms()

    def make_args(self, given: dict) -> d2.Args:
        mlp, clip = self.config["encoder.mlp_layers"], self.config["clip_rewards"]
        return plain_args(d2, **given, mlp_units=mlp[0], mlp_layers=len(mlp),
                          clip_rewards="none" if clip == "identity" else clip)

    def loss_scales(self) -> dict[str, float]:
        """What is left of the scales after our flags; theirs of a reconstruction go by its name."""
        keys = {"reward": ["reward"], "image": self.images, "vector": self.vectors}
        return {ours: self.config.get(f"loss_scales.{theirs[0]}", 1.0)
                for ours, theirs in keys.items() if theirs}

    def actions(self, n: int) -> Tensor:
        """Their actions (T, B, A), which led to the observations."""
        return batch_major(self.fixture.tensor(f"batch{n}/action"))

    @torch.no_grad()
    def check_acting(self) -> None:
        """Acting on two observations, a carried state, open-loop prediction: initial weights."""
        batch, rssm = self.batch(1), self.agent.world_model.rssm
        for t, before, state, latent in self.acted(self.observed()):
            self.compare(f"policy/obs{t + 1}_action", state.action)
            self.compare_all(f"policy/obs{t + 1}_latent/", {
                "deter": state.deter, "stoch": self.groups(state.stoch), "logit": latent.raw})
            greedy = self.agent.act(self.seen(batch, t), before, sample=False)
            self.compare(f"policy/obs{t + 1}_eval_action", greedy.action)

        embed, deter, stoch, *_ = self.posterior(batch, self.carry(1))
        first = torch.zeros_like(self.batch(1).is_first)
        found = rssm.observe(embed, self.actions(1), first, deter[-1], stoch[-1])
        self.compare_all("carry/post/", {key: batch_major(x) for key, x in zip(
            ("deter", "stoch", "logit"), (found[0], *map(self.groups, found[1:])))})
        deter, stoch, steps = deter[1], stoch[1], []
        for action in self.actions(1)[2:]:
            deter, stoch = rssm.img_step(deter, stoch, action)
            steps.append((deter, self.groups(stoch), rssm.prior(deter).raw))
        self.compare_all("openloop/prior/", {key: torch.stack(x, 1) for key, x in zip(
            ("deter", "stoch", "logit"), zip(*steps))})

    def carry(self, n: int) -> d2.State:
        """The last posterior of the update before, and the action that led to the window."""
        state = self.agent.zero_state(self.rows) if n == 1 else self.last
        return state._replace(action=self.actions(n)[0])

    def check_update(self, n: int) -> None:
        batch, carry = self.batch(n), self.carry(n)
        with torch.no_grad():
            before = self.probe(batch, carry)
        call = self.recorded((batch, carry), {"world_model_loss": self.scaled_model})
        _, deter, stoch, _ = call.world_model_loss.result
        self.last = d2.State(deter[-1], stoch[-1], carry.action)
        self.compare_all(f"step{n}/post/", {"deter": batch_major(deter),
                                            "stoch": batch_major(self.groups(stoch))})
        self.check_world_model(n, call, before)
        self.check_behaviour(n, call, before)
        for name in self.optimizers:
            if n == 1:
                self.check_gradients(f"grad/{name}/", call, name)
            norm = getattr(call, name).norm
            self.compare(f"step{n}/metric/{name}_grad_norm", norm, "gradient")
        self.check_parameters(f"after{n}/")

    def probe(self, batch: d2.Batch, carry: d2.State) -> dict[str, Tensor]:
        model = self.agent.world_model
        embed, deter, stoch, post, prior, feat = self.posterior(batch, carry)
        found = {"embed": embed, "feat": torch.cat([stoch, deter], -1), "post/logit": post.raw,
                 "prior/logit": prior.raw, "prior/deter": deter, "prior/stoch": self.groups(prior.sample()),
                 "kl_value": post.kl(prior), "reward_head_out": model.reward(feat).mean(),
                 "post_ent": post.entropy(), "prior_ent": prior.entropy()}
        if self.args.pcont:
            found["discount_head_out"] = model.discount(feat).logit
        if self.vectors:
            vector = model.decoder.vector(feat)
            found |= {f"decoded/{key}": vector[..., columns] for key, columns in self.columns.items()}
        if self.images:
            found["image"] = model.decoder.image(feat)
        return {name: batch_major(x) for name, x in found.items()}

    def check_world_model(self, n, call, before) -> None:
        prefix, args, call = f"step{n}/", self.args, call.world_model_loss
        image = before.pop("image", None)
        self.compare_all(prefix, before)
        if image is not None:
            self.compare_image(prefix, image)

        names = {"reward": ["reward"], "discount": ["discount"], "image": self.images, "vector": self.vectors}
        scales = {"discount": args.pcont_scale, "kl": args.kl_scale}
        for name, loss in call.result[0].items():
            unscaled = loss / scales.get(name, 1.0)
            if name == "kl":
                self.compare(prefix + "loss/kl", unscaled)
                self.compare(prefix + "metric/kl_loss", unscaled)
                continue
            for folder, ours in (("like/{}", -batch_major(unscaled)), ("loss/{}", unscaled.mean()),
                                 ("metric/{}_loss", unscaled.mean())):
                keys = [prefix + folder.format(key) for key in names[name]]
                if keys[0] in self.fixture:  # theirs has one term for each vector
                    self.report.check("+".join(keys), ours, sum(self.fixture[key] for key in keys))
        total = sum(loss.mean() for loss in call.scaled.values())
        self.compare_all(prefix, {
            "model_loss": total, "metric/model_loss": total, "metric/model_kl": before["kl_value"].mean(),
            "metric/post_ent": before["post_ent"].mean(), "metric/prior_ent": before["prior_ent"].mean()})

    @torch.no_grad()
    def check_behaviour(self, n, call, before) -> None:
        """Imagination, returns, both losses. Theirs has a discount, ... at state H as well."""
        model, order, prefix = self.agent.world_model, self.start_order, f"step{n}/imag/"
        feat, action, _ = call.imagine.result
        deter, stoch = feat.split([self.args.deter, feat.shape[-1] - self.args.deter], -1)
        returns, actor, critic = call.lambda_return, call.actor_loss, call.critic_loss
        value = torch.cat([actor.baseline[:1], returns.next_value])
        reward = model.reward(feat).mean()  # the world model is still the same
        log_prob = critic.value_dist.log_prob(critic.ret)
        elements = per_step(d2.actor_loss, actor)
        found = {"deter": deter, "stoch": self.groups(stoch),
                 "feat": torch.cat([stoch, deter], -1), "reward": reward, "reward_raw": reward,
                 "value_slow": value, "target": returns.result, "critic_mean": critic.value_dist.mean(),
                 "critic_logprob": log_prob, "baseline": actor.baseline, "entropy": actor.policy.entropy()}
        if self.spec.discrete:
            found |= {"policy_logits": actor.policy.raw, "logprob": actor.policy.log_prob(actor.action)}
        else:
            found |= {"policy_loc": actor.policy.mean, "policy_scale": actor.policy.std}
        self.compare_all(prefix, {name: order(x) for name, x in found.items()})
        self.compare(prefix + "action", order(action), steps=slice(1, None))
        self.compare(prefix + "action", torch.zeros_like(action[:1]), steps=slice(0, 1))
        shorter = {"discount": returns.discount, "weight": critic.weight, "reward": returns.reward}
        for name, x in shorter.items():
            self.compare(prefix + name, order(x), steps=slice(0, len(x)))
        self.compare(prefix + "logit", order(model.rssm.prior(deter[1:]).raw), steps=slice(1, None))
        self.compare(prefix + "logit", before["post/logit"].flatten(0, 1)[None], steps=slice(0, 1))
        size = float(torch.stack([actor.ret, actor.baseline]).abs().max())  # a difference of these
        self.compare(prefix + "advantage", order(actor.ret - actor.baseline), scale=size)
        self.compare(prefix + "objective_with_entropy", order(-elements), scale=float(elements.abs().max()))

        # A mean of numbers of both signs has the rounding errors of these numbers.
        size = float(elements.abs().max())
        loss = {"actor": (actor.result[0], size), "critic": (critic.result, None)}
        for name, (ours, scale) in loss.items():
            self.compare(f"step{n}/{name}_loss", ours, scale=scale)
            self.compare(f"step{n}/metric/{name}_loss", ours, scale=scale)
        means = {"critic": critic.value_dist.mean(), "critic_slow": value,
                 "critic_target": returns.result, "reward_mean": reward, "actor_ent": actor.policy.entropy()}
        for name, x in means.items():
            self.compare(f"step{n}/metric/{name}", x.mean(), scale=float(x.abs().max()))
        self.compare(f"step{n}/metric/reward_std", reward.std(unbiased=False))


class ChannelNorm(d2.Norm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def layer_norms() -> list[tuple[object, str, object]]:
    """Patches that put a layer norm before every activation while an agent is made."""
    dense, cnn = d2.Dense.__init__, nn.Sequential.extend

    def init(self, inputs, outputs):
        dense(self, inputs, outputs)
        self.norm = d2.Norm(outputs)
        self.activate = lambda x: F.elu(self.norm(x))

    def extend(self, layers):
        conv, activation = layers
        return cnn(self, [conv, nn.Sequential(ChannelNorm(conv.out_channels), activation)])

    return [(d2.Dense, "__init__", init), (nn.Sequential, "extend", extend)]


# ------------------------------------------------------------------------------------ single pieces
def flags(**given) -> d2.Args:
    return plain_args(d2, **{"return_lambda": 0.95, "actor_min_std": 0.1} | given)


def filled(net: nn.Module, weights: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    params = {}
    for key, array in weights.items():
        layer = net.std if "std" in key else net.head.out if "out" in key else (
            net.head.mlp[int(key.split("/")[0].removeprefix("dense"))])
        params[key] = getattr(layer, "weight" if "kernel" in key else "bias")
        params[key].data.copy_(array.T if "kernel" in key else array)
    return params


class Math(Piece):
    def math_kl(self) -> None:
        """KL balancing with free nats: the rows of `combos` that are as ours."""
        post, prior = self.leaf("post_logit"), self.leaf("prior_logit")
        p, q = (d2.Latent(raw.flatten(-2), raw.shape[2]) for raw in (post, prior))
        self.compare({"value_forward_False": p.kl(q), "entropy_post": p.entropy()})
        combos = enumerate(self.fixture[self.prefix + "combos"])
        for row, (forward, balance, free, average, loss, value, *norms) in combos:
            if forward or balance == 0.5 or (not average and free):
                continue
            args = flags(kl_scale=1.0, kl_balance=round(float(balance), 6), free_nats=float(free))
            ours = shipped_losses(d2, args, post.shape[:2], p, q)["kl"]
            name = f"kl/combos[{row}] (balance {balance:.1f}, free {free:.4g})"
            self.report.check(name, torch.stack([ours, p.kl(q).mean()]), [loss, value])
            for side, grad, norm in zip(("post", "prior"), gradient(ours, post, prior), norms):
                self.report.check(f"{name} gradient norm, {side}", grad.norm(), norm, "gradient")
                self.check(f"combo{row}/grad_{side}_logit", grad, "gradient")

    def math_onehot(self) -> None:
        raw = self.leaf("logits")
        groups = raw.shape[-2]
        latent = d2.Latent(raw.flatten(-2), groups)
        sample, mode = (x.unflatten(-1, (groups, -1)) for x in (latent.sample(), latent.mode()))
        weighted = (sample * self("weights")).sum()
        self.compare({"sample_argmax": sample, "mode": mode, "entropy": latent.entropy(),
                      "logprob": latent.log_prob(self("event")).sum(-1)},
                     {"grad_of_sum_weights_sample": gradient(weighted, raw)[0]})

    def math_lam(self) -> None:
        """Lambda-return: what follows from state t stands at index t + 1 of value."""
        next_value = torch.cat([self("value")[1:], self("bootstrap")[None]])
        for key in self.under("ret_lambda"):
            ours = d2.lambda_return(self("reward"), self("disc"), next_value, float(key))
            self.check(f"ret_lambda{key}", ours)

    def math_pre(self) -> None:
        """And discounts as the losses see them."""
        self.inputs(d2, flags, {"identity": "none", "tanh": "tanh"})
        terminal = self("is_terminal")
        for key in self.under("discount_out_gamma"):
            args = flags(gamma=float(key), pcont=True, pcont_scale=1.0)
            found = shipped_losses(d2, args, terminal.shape, terminal=terminal)
            self.check(f"discount_out_gamma{key}", -found["discount"])

    def math_obj(self) -> None:
        for kind in ("onehot", "trunc_normal"):
            Math(self.report, self.fixture, f"obj/{kind}/").objectives()

    def objectives(self) -> None:
        """Losses of actor and critic, for features, rewards, discounts and actions that are given."""
        feat, weight, reward, discount = (
            self.fixture.tensor(f"obj/{key}") for key in ("feat", "weight", "reward", "discount"))
        weights = {net: {key: self(f"param/{net}/{key}") for key in self.under(f"param/{net}/")}
                   for net in ("actor", "critic", "target_critic")}
        units, layers = weights["critic"]["out/out/kernel"].shape[0], len(weights["critic"]) // 2 - 1
        args = flags(units=units, layers=layers, actor_entropy=float(self("actor_ent_scale")),
                     actor_grad_mix=float(self("actor_grad_mix")))
        spec = EnvSpec(None, 1, self("action").shape[-1], "onehot" in self.prefix)
        width = feat.shape[-1]
        nets = {"actor": d2.Actor(args, spec, width), "critic": d2.Critic(args, width),
                "target_critic": d2.Critic(args, width)}
        params = {name: filled(net, weights[name]) for name, net in nets.items()}

        def check_gradients(key, loss, params):
            """In their layout; linear kernels are (in, out)."""
            found = {name: grad.t() for name, grad in zip(params, gradient(loss, *params.values()))}
            self.report.check_all(self.fixture, self.prefix + key, found, "gradient")

        value = nets["target_critic"](feat).mean()
        ret = d2.lambda_return(reward[:-1], discount[:-1], value[1:], args.return_lambda)
        self.compare({"value_slow": value, "target": ret})
        for kind in ("dynamics", "reinforce", "both"):
            mix = d2.Actor(replace(args, actor_grad=kind), spec, width).dynamics
            target, action = self.leaf("target"), self.leaf("action")
            policy, value_now = nets["actor"].policy(nets["actor"](feat[:-2])), value[:-2].detach()
            loss, entropy = d2.actor_loss(policy, action[1:-1], target[1:], value_now, weight[:-2], mix, args)
            self.below(f"{kind}/").compare(
                {"loss": loss, "actor_ent": entropy.mean()},
                dict(zip(("grad_target", "grad_action"), gradient(loss, target, action))))
            check_gradients(f"{kind}/grad/actor/", loss, params["actor"])
        loss = d2.critic_loss(nets["critic"](feat[:-1]), self("target"), weight[:-1])
        self.check("critic/loss", loss)
        check_gradients("critic/grad/critic/", loss, params["critic"])

    def math_slow(self) -> None:
        """When the slow critic moves, and how far: every second update, by 0.3 (their README)."""
        fast, slow = (nn.Linear(*self("0/critic").shape, bias=False) for _ in range(2))
        agent = SimpleNamespace(critic=fast, slow_critic=slow, updates=0,
                                args=flags(slow_every=2, slow_fraction=0.3))
        for agent.updates in range(self.fixture.numbered(self.prefix)):
            fast.weight.data.copy_(self(f"{agent.updates}/critic").T)
            d2.Agent.update_slow_critic(agent)
            self.check(f"{agent.updates}/target", slow.weight.T)

    def math_weight(self) -> None:
        """Discounts and weights of imagined steps: `Agent.learn` with a head that gives these means."""
        terminal, mean = self("is_terminal").T, self("head_mean")

        def reorder(x, shape):
            return x.unflatten(1, shape).transpose(1, 2).flatten(1, 2)

        ours = reorder(mean, terminal.T.shape)  # n = t * B + b
        args = flags(batch_size=terminal.shape[1], batch_length=len(terminal), imag_horizon=len(mean) - 1,
                     pcont=True, gamma=0.999, amp="off")
        agent, log = d2.Agent(args, EnvSpec(None, 1, 2, True), torch.get_default_device()), {}
        zeros = torch.zeros(*terminal.shape)
        batch = d2.Batch(None, zeros[..., None], torch.zeros(*terminal.shape, 2), zeros, zeros > 1, terminal)

        def head(self, feat, shipped=d2.WorldModel.discount):
            given = ours[1:-1] if len(feat) == len(ours) - 2 else ours[:-1]
            replayed = feat.shape[:2] == terminal.shape
            return shipped(self, feat) if replayed else d2.Bernoulli(given.logit())

        with patched((d2.WorldModel, "discount", head), recorder(log, d2, "lambda_return"),
                     recorder(log, d2, "critic_loss")):
            agent.learn(batch, agent.zero_state(terminal.shape[1]))
        for key, x in (("discount", log["lambda_return"].discount), ("weight", log["critic_loss"].weight)):
            expected = self(key)[:-1].cpu()
            self.report.check(f"weight/{key}[:-1]", reorder(x, terminal.shape), expected)

    def math_trunc(self) -> None:
        """Policy of continuous actions, and the gradient of a sample that their own sampler drew."""
        raw = torch.cat([self("raw_mean"), self("raw_std")], -1).requires_grad_()
        policy = d2.Actor(flags(), EnvSpec(None, 1, raw.shape[-1] // 2, False), 1).policy(raw)
        sample, entropy, log_prob = policy.sample(), policy.entropy(), policy.log_prob(self("y"))
        self.compare({"loc": policy.mean, "scale": policy.std, "sample_det": sample, "mode": policy.mode(),
                      "entropy": entropy, "logprob": log_prob},
                     {"grad_sum_sample": gradient(sample, raw)[0], "grad_entropy": gradient(entropy, raw)[0],
                      "grad_logprob": gradient(log_prob, raw)[0]})
        loc, scale = self.leaf("loc"), self.leaf("scale")
        noise = ((self("official_random/sample") - loc) / scale).detach()
        with patched((d2, "draw_truncated", lambda low, high: noise)):
            sample = d2.TruncatedNormal(loc, scale).sample()
        self.below("official_random/").compare(
            {"sample": sample}, dict(zip(("dloc", "dscale"), gradient(sample, loc, scale))))

    def math_head(self) -> None:
        """Distributions of numbers and of flags.

        Their library read the targets, a numpy array here, as integers: 0.999 became 0. In training
        they are tensors and stay what they are; like/discount of an agent compares those.
        """
        normal, flag = d2.Normal(self("out")), d2.Bernoulli(self("out"))
        self.compare({"mse_logprob": normal.log_prob(self("target")), "binary_mean": flag.mean(),
                      "binary_logprob": flag.log_prob(self("binary_target").trunc())})

    def math_gru(self) -> None:
        """One step of the GRU; theirs reads [x, h], ours [h, x]."""
        x, h = self("x"), self("h")
        gru = d2.NormGRUCell(x.shape[-1], h.shape[-1])
        gru.linear.weight.data = self("param/dense/kernel").roll(h.shape[-1], 0).T.contiguous()
        gru.linear.bias.data = self("param/dense/bias")
        gru.norm.weight.data, gru.norm.bias.data = self("param/norm/gamma"), self("param/norm/beta")
        self.check("out", gru(x, h))

    def math_ln(self) -> None:
        norm = d2.Norm(self("x").shape[-1])
        for ours, theirs in (("weight", "param/gamma"), ("bias", "param/beta")):
            if theirs in self:
                getattr(norm, ours).data = self(theirs)
        self.compare({"out": norm(self("x")), "eps": norm.eps})

    def math_adam(self) -> None:
        """With the settings of their world model for Atari."""
        def make(params):
            made = d2.Optimizer(params, 2e-4, 1e-5, 100.0)
            made.decay = 1e-6
            return made
        self.steps(make)
