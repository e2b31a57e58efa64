"""What `tests.parity` compares for DreamerV1: fixtures of danijar/dreamer at 56d4d44.

Their batches hold the action that led to each observation, and their features are [stoch, deter].
"""

import re
from types import SimpleNamespace

import torch
from torch import Tensor

import dreamer_v1 as d1
from common.spaces import EnvSpec
from tests import parity
from tests.parity import Piece, batch_major, gradient, patched, recorder, shipped_losses
from tests.tiny import plain_args

IGNORED = {
    "step1/reward_preprocessed": "what is made of it is compared as reward_logprob",
    "kl/elementwise_free_NOT_USED": "not what the authors do",
    "official_quirk/*": "their noise is one vector for a whole batch; ours is drawn for each row",
    "lam/ret_axis1_*": "ours are time-major always",
    "actor/*/y": "no loss has a log-probability of actions", "actor/*/logprob": "the same",
    "tanhbij/*": "the same", "onehot/event": "the same", "onehot/*logprob": "the same",
    "onehot/entropy": "V1 has no entropy bonus",
}
RMS = True  # the scale of a gradient is its root mean square
TOLERANCE = {"forward": 1e-5, "gradient": 1e-4, "parameter": 2e-6}


# ----------------------------------------------------------------------------- an agent like theirs
class Twin(parity.Twin):
    script = d1
    swapped = r"^(decode/h1|(reward|pcont|value|actor)/h0)/kernel$"
    rename = [(r"^value/", "critic/head/"),
              (r"^actor/", "actor/head/"), (r"^reward/", "world_model/reward_head/"),
              (r"^pcont/", "world_model/discount_head/"), (r"(_head|/head)/h(\d+)/", r"\1/mlp/\2/"),
              (r"/hout/", "/out/"), (r"^decode/h1/", "world_model/decoder/cnn_in/"),
              (r"^decode/h(\d)/", lambda m: f"world_model/decoder/cnn/{2 * int(m[1]) - 4}/"),
              (r"^encode/h(\d)/", lambda m: f"world_model/encoder/cnn/{2 * int(m[1]) - 2}/"),
              (r"^dynamics/", "world_model/rssm/"),
              (r"/img1/", "/img_in/"), (r"/img2/", "/img_out/"), (r"/img3/", "/img_stats/"),
              (r"/obs1/", "/obs_out/"), (r"/obs2/", "/obs_stats/"), (r"/kernel$", "/weight"), (r"/", ".")]
    settings = """deter=deter_size hidden=deter_size stoch=stoch_size units=num_units depth=cnn_depth
        pcont pcont_scale kl_scale free_nats clip_rewards imag_horizon=horizon gamma=discount
        return_lambda=disclam actor_init_std=action_init_std expl_amount expl_decay expl_min
        model_lr actor_lr critic_lr=value_lr model_clip=grad_clip actor_clip=grad_clip critic_clip=grad_clip"""

    def make_args(self, given: dict) -> d1.Args:
        eps = {f"{name}_eps": 1e-7 for name in self.theirs}
        layers = {f"{ours}_layers": self.layers(theirs) for ours, theirs in (
            ("reward", "reward"), ("critic", "value"), ("pcont", "pcont"), ("actor", "actor"))}
        return plain_args(d1, **given | layers | eps, actor_min_std=1e-4)

    def layers(self, head: str) -> int:
        """Hidden layers of a head, which are no setting in theirs; 1 if they have no such head."""
        return max(1, sum(bool(re.fullmatch(head + r"/h\d+/bias", path)) for path in self.paths))

    theirs = {"model": "model", "actor": "actor", "critic": "value"}  # their names of the optimisers

    def places(self, path: str, numbers: dict[str, Tensor]) -> Tensor:
        """The GRU's gates are z, r, h in theirs, r, z, n in ours; its two biases are one array."""
        if not path.startswith("dynamics/cell/"):
            return super().places(path, numbers)

        def gates(name):
            reset, update, new = numbers["world_model.rssm.gru." + name].chunk(3)
            return torch.cat([update, reset, new])
        if path.endswith("/bias"):
            return torch.stack([gates("bias_ih"), gates("bias_hh")])
        return gates("weight_hh" if "recurrent" in path else "weight_ih").T

    def flags(self, get) -> tuple[Tensor, Tensor]:
        """Their windows never reset the state; an end has discount 0."""
        discount = get("discount")
        return torch.zeros_like(discount, dtype=torch.bool), discount == 0

    @torch.no_grad()
    def check_acting(self) -> None:
        """Acting on two observations of batch 1; discrete actions have no noise in the fixtures."""
        def explored(state, obs):
            return state if self.spec.discrete else d1.explore(self.args, 0, state, obs, False)

        for t, _, state, latent in self.acted(self.observed(), explored):
            self.compare(f"policy/obs{t + 1}_action", state.action)
            self.compare_all(f"policy/obs{t + 1}_latent/", {
                "deter": state.deter, "stoch": state.stoch, "mean": latent.mean, "std": latent.std})

    def carry(self, n: int) -> d1.State:
        """Every window starts from zeros, and from the action that led to its first observation."""
        state = self.agent.zero_state(self.rows)
        return state._replace(action=self.fixture.tensor(f"batch{n}/action")[:, 0])

    def check_update(self, n: int) -> None:
        batch, carry = self.batch(n), self.carry(n)
        with torch.no_grad():
            before = self.probe(batch, carry)
        call = self.recorded((batch, carry), {"world_model_loss": self.scaled_model,
                                            "imagine": self.probe_imagination})
        self.check_world_model(n, call, before)
        self.check_behaviour(n, call)
        for name, theirs in self.theirs.items():
            if n == 1:
                self.check_gradients(f"grad/{theirs}/", call, name)
            self.compare(f"step{n}/{theirs}_norm", getattr(call, name).norm, "gradient")
        self.check_parameters(f"after{n}/")

    def probe(self, batch: d1.Batch, carry: d1.State) -> dict[str, Tensor]:
        model = self.agent.world_model
        embed, deter, stoch, post, prior, feat = self.posterior(batch, carry)
        found = {"embed": embed, "feat": torch.cat([stoch, deter], -1),
                 "kl": post.kl(prior), "reward_mean": model.reward(feat).mean(), "post/mean": post.mean,
                 "post/std": post.std, "prior/mean": prior.mean, "prior/std": prior.std,
                 "prior/deter": deter, "prior/stoch": prior.sample(), "image_mean": model.decoder.image(feat)}
        if self.args.pcont:
            found["pcont_logit"] = model.discount(feat).logit
            found["pcont_target"] = self.args.gamma * (~batch.is_terminal).float()
        return {name: batch_major(x) for name, x in found.items()} | {
            "image_preprocessed_0_0": d1.centre(batch.image)[0, 0]}

    def check_world_model(self, n, call, before) -> None:
        prefix, args, call = f"step{n}/", self.args, call.world_model_loss
        image = before.pop("image_mean")
        losses, deter, stoch, _ = call.result
        self.compare_all(prefix, before)
        self.compare_all(prefix + "post/", {"deter": batch_major(deter), "stoch": batch_major(stoch)})
        self.compare_image(prefix, image)
        for name, theirs, scale in (("image", "image", 1.0), ("reward", "reward", 1.0),
                                    ("discount", "pcont", args.pcont_scale)):
            if name in losses:
                self.compare(f"{prefix}{theirs}_logprob", -batch_major(losses[name] / scale))
                self.compare(f"{prefix}like_{theirs}", -losses[name].mean())
        total = sum(loss.mean() for loss in call.scaled.values())
        self.compare_all(prefix, {"div": losses["kl"] / args.kl_scale,
                                  "div_raw": before["kl"].mean(), "model_loss": total})

    @torch.no_grad()
    def probe_imagination(self, feat: Tensor, call: SimpleNamespace) -> Tensor:
        """What actor and heads say of imagined states while their weights are the old ones."""
        agent, model = self.agent, self.agent.world_model
        policy, prior = agent.actor.policy(agent.actor(feat[:-1])), None
        deter, stoch = feat[1:].split([self.args.deter, self.args.stoch], -1)
        prior = model.rssm.prior(deter)
        call.found = {"deter": deter, "stoch": stoch, "feat": torch.cat([stoch, deter], -1),
                      "mean": prior.mean, "std": prior.std, "action": policy.sample(),
                      "reward": model.reward(feat[1:]).mean(), "value": agent.critic(feat[1:]).mean()}
        call.found["pcont"] = torch.full_like(call.found["value"], self.args.gamma)
        if self.args.pcont:
            call.found["pcont"] = model.discount(feat[1:]).mean()
        call.found |= {"actor_logits": policy.raw} if self.spec.discrete else {
            "actor_mean": policy.mean, "actor_std": policy.std}
        return feat

    @torch.no_grad()
    def check_behaviour(self, n, call) -> None:
        order, prefix = self.start_order, f"step{n}/imag/"
        returns, critic = call.lambda_return, call.critic_loss
        self.compare_all(prefix, {name: order(x) for name, x in (call.imagine.found | {
            "returns": returns.result, "discount": critic.weight, "target": critic.ret,
            "value_logprob": critic.value_dist.log_prob(critic.ret)}).items()})
        for name, x in (("reward", returns.reward), ("pcont", returns.discount)):
            self.compare(prefix + name, order(x), steps=slice(0, len(x)))
        self.compare(prefix + "value", order(returns.next_value), steps=slice(1, None))
        # It is a mean of numbers of both signs.
        size = float((call.actor_loss.weight * call.actor_loss.ret).abs().max())
        self.compare(f"step{n}/actor_loss", call.actor_loss.result, scale=size)
        self.compare(f"step{n}/value_loss", critic.result)


# ------------------------------------------------------------------------------------ single pieces
def flags(**given) -> d1.Args:
    return plain_args(d1, **{"pcont": False, "kl_scale": 1.0, "free_nats": 3.0,
                             "clip_rewards": "none", "return_lambda": 0.95, "actor_min_std": 1e-4} | given)


def latent(mean: Tensor, std: Tensor) -> d1.Latent:
    """A latent with this deviation; the class itself takes what comes before the softplus."""
    made = d1.Latent.__new__(d1.Latent)
    d1.Gaussian.__init__(made, mean, std)
    return made


class Math(Piece):
    def math_lam(self) -> None:
        """Lambda-return: what follows from state t stands at index t + 1 of value."""
        reward, value, cont, bootstrap = map(self, ("reward", "value", "pcont", "bootstrap"))
        for key in self.under("ret_"):
            given, _, lambda_ = key.rpartition("lambda")
            if not given.startswith("axis1"):
                last = torch.zeros_like(bootstrap) if given == "boot_none_" else bootstrap
                discount = torch.full_like(cont, 0.99) if given == "pcont0.99_" else cont
                next_value = torch.cat([value[1:], last[None]])
                self.check(f"ret_{key}", d1.lambda_return(reward, discount, next_value, float(lambda_)))

    def math_traj(self) -> None:
        """Returns, weights and losses of `Agent.learn`, with heads that say what lam/* says."""
        reward, value, cont = (self.fixture.tensor(f"lam/{key}") for key in ("reward", "value", "pcont"))
        (steps, rows), log = reward.shape, {}
        args = flags(pcont=True, imag_horizon=steps, batch_size=rows, batch_length=2)
        agent = d1.Agent(args, EnvSpec(None, 1, 1, False), torch.get_default_device())
        zeros = torch.zeros(2, rows)
        batch = d1.Batch(None, zeros[..., None], zeros[..., None], zeros, zeros > 1, zeros > 1)

        def head(owner, name, given, make):
            shipped = getattr(owner, name)
            return owner, name, lambda self, feat: (
                make(given[:len(feat)]) if feat.shape[0] >= steps - 1 else shipped(self, feat))

        grads = d1.Optimizer, "grads", lambda self, loss, **_: tuple(map(torch.zeros_like, self.params))
        with patched(head(d1.WorldModel, "reward", reward, d1.Normal),
                     head(d1.WorldModel, "discount", cont.logit(), d1.Bernoulli),
                     head(d1.Critic, "forward", value, d1.Normal), grads,
                     recorder(log, d1, "actor_loss"), recorder(log, d1, "critic_loss")):
            agent.learn(batch, agent.zero_state(rows))
        actor, critic = log["actor_loss"], log["critic_loss"]
        self.compare({"returns": actor.ret, "discount": actor.weight,
                      "actor_loss": actor.result, "value_loss": critic.result})

    def math_kl(self) -> None:
        """KL of normals, and its loss with free nats for the mean: the gradient stops below them."""
        leaves = {key: self.leaf(key) for key in ("post_mean", "post_std", "prior_mean", "prior_std")}
        post, prior = (latent(leaves[f"{side}_mean"], leaves[f"{side}_std"]) for side in ("post", "prior"))
        kl = post.kl(prior)
        self.compare({"value": kl, "mean": kl.mean(), "entropy_post": post.entropy()})
        for key in self.under("loss_free"):
            loss = shipped_losses(d1, flags(free_nats=float(key)), kl.shape, post, prior)["kl"]
            grads = zip(leaves, gradient(loss, *leaves.values()))
            self.compare({f"loss_free{key}": loss}, {f"grad_{name}_free{key}": grad for name, grad in grads})

    def math_like(self) -> None:
        """Log-probabilities of images, rewards and discounts.

        Their library read the discounts, a numpy array here, as integers: 0.99 became 0. In training
        they are tensors and stay what they are; pcont_logprob of an agent compares those.
        """
        image, flag = d1.Normal(self("image_mean")), d1.Bernoulli(self("pcont_logit"))
        self.compare({"image_logprob": image.log_prob(self("image_target")).sum((-3, -2, -1)),
                      "reward_logprob": d1.Normal(self("reward_mean")).log_prob(self("reward_target")),
                      "pcont_logprob": flag.log_prob(self("pcont_target").trunc()), "pcont_mean": flag.mean()})

    def math_actor(self) -> None:
        for name in {key.split("/")[0] for key in self.under("init")}:
            raw = self.leaf("raw")
            spec = EnvSpec(None, 1, raw.shape[-1] // 2, False)
            policy = d1.Actor(flags(actor_init_std=float(name)), spec, 1).policy(raw)
            sample = policy.sample()
            self.below(f"init{name}/").compare({"mean": policy.mean, "std": policy.std, "sample": sample},
                                               {"dsample_sum_draw": gradient(sample, raw)[0]})

    def math_onehot(self) -> None:
        raw = self.leaf("logits")
        policy = d1.Actor(flags(), EnvSpec(None, 1, raw.shape[-1], True), 1).policy(raw)
        sample = policy.sample()
        weighted = (sample * self("weights")).sum()
        self.compare({"sample_argmax": sample, "probs": policy.probs, "mode": policy.mode()},
                     {"grad_logits_of_sum_weights_sample": gradient(weighted, raw)[0]})

    def math_pre(self) -> None:
        self.inputs(d1, flags, {"none": "none", "tanh": "tanh"})

    def math_adam(self) -> None:
        self.steps(lambda params: d1.Optimizer(params, 6e-4, 1e-7, 100.0))
