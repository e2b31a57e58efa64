"""Small agents and batches, made in the same way for every script, and two tools for tests."""

from dataclasses import fields

import torch
import torch.nn.functional as F

from common.spaces import EnvSpec

# A value for every setting of every algorithm, so that no test depends on the presets. They differ
# from those of the golden fixtures: parity fails if it forgets to pass one on.
PLAIN = dict(
    size="XXS", deter=12, hidden=10, units=9, layers=1, reward_layers=1, pcont_layers=1,
    actor_layers=1, critic_layers=1, depth=2, stoch=3, classes=4, bins=21, mlp_units=9,
    mlp_layers=1, image_size=16, blocks=2, head_layers=1, batch_size=3, batch_length=5, learning_starts=10, pretrain=1,
    train_ratio=15.0, total_timesteps=1000, buffer_size=1000, num_envs=1, action_repeat=1,
    grayscale=False, sticky=0.0, clip_rewards="none", pcont=True, pcont_scale=3.0, model_lr=5e-4,
    actor_lr=2e-4, critic_lr=4e-4, model_eps=2e-6, actor_eps=2e-6, critic_eps=2e-6,
    model_clip=50.0, actor_clip=50.0, critic_clip=50.0, kl_scale=0.3, kl_balance=0.75,
    free_nats=0.0, weight_decay=3e-6, unimix=0.02, beta_pred=0.9, beta_dyn=0.6, beta_rep=0.2,
    free_bits=0.9, imag_horizon=6, gamma=0.95, return_lambda=0.9, actor_min_std=0.12,
    actor_max_std=1.1, actor_init_std=4.0, actor_entropy=1e-3, actor_grad="auto",
    actor_grad_mix=0.2, slow_every=99, slow_fraction=0.9, cont_mean=False, critic_ema_decay=0.97,
    critic_ema_regularizer=0.9, beta_replay=0.4, lr=5e-4, warmup=0, agc=0.5, beta1=0.8, beta2=0.99,
    eps=1e-12, actor_unimix=0.03, return_norm_low=6.0, return_norm_high=94.0, return_norm_limit=0.9,
    return_norm_decay=0.98, expl_amount=0.2, expl_min=0.0, expl_decay=0.0, amp="off", cuda=False)


def has_flag(module, name: str) -> bool:
    return name in {field.name for field in fields(module.Args)}


def plain_args(module, **changes):
    """`Args` of a script: those of PLAIN that it has, and `changes`, which it must have."""
    plain = {name: value for name, value in PLAIN.items() if has_flag(module, name)}
    return module.Args(**plain | changes)


def tiny_args(module, discrete: bool = True, **changes):
    """V1 and V2 predict ends where actions are discrete, and do not where they are continuous."""
    task = {"pcont": discrete} if has_flag(module, "pcont") else {}
    return plain_args(module, **task | changes)


def tiny_spec(module, discrete: bool = True, image: bool = False, vector: int = 6) -> EnvSpec:
    """Two actions; the images are as small as the script allows."""
    pixels = PLAIN["image_size"] if has_flag(module, "image_size") else 64
    return EnvSpec((pixels, pixels, 3) if image else None, vector, 2, discrete)


def tiny_agent(module, spec: EnvSpec | None = None, **changes):
    """An agent none of whose output layers is zero."""
    spec = spec or tiny_spec(module)
    args = tiny_args(module, spec.discrete, **changes)
    agent = module.Agent(args, spec, torch.device("cpu"))
    for name, param in agent.named_parameters():
        if name.endswith("out.weight") and not param.any():
            torch.nn.init.normal_(param, std=0.3)
    return agent


def tiny_batch(module, agent, **changes):
    """Replayed sequences (T, B, ...) of the agent's shapes; some rows begin or end an episode."""
    spec, lead = agent.spec, (agent.args.batch_length, agent.args.batch_size)
    if spec.discrete:
        action = F.one_hot(torch.randint(spec.action_dim, lead), spec.action_dim).float()
    else:
        action = torch.rand(*lead, spec.action_dim) * 2 - 1
    image = vector = None
    if spec.image_shape:
        image = torch.randint(256, (*lead, *spec.image_shape), dtype=torch.uint8)
    if spec.vector_dim:
        vector = torch.randn(*lead, spec.vector_dim)
    is_first = torch.rand(lead) < 0.2
    is_first[0] = True
    return module.Batch(image, vector, action, torch.randn(lead), is_first,
                        torch.rand(lead) < 0.2)._replace(**changes)


def update(module, agent, batch) -> dict[str, torch.Tensor]:
    """Metrics of `Agent.train_step`. The revision of 2025 takes its carry out of the batch."""
    if has_flag(module, "replay_context"):
        return agent.train_step(batch)[0]
    return agent.train_step(batch, agent.zero_state(batch.reward.shape[1]))


def grad_of(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the sum of `output`, zeros where there is none."""
    return list(torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True,
                                    materialize_grads=True))


def as_torch(dist) -> torch.distributions.Distribution:
    """The same distribution by torch."""
    if hasattr(dist, "probs"):
        return torch.distributions.Independent(torch.distributions.Categorical(dist.probs), 1)
    return torch.distributions.Independent(torch.distributions.Normal(dist.mean, dist.std), 1)
