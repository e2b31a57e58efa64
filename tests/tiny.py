"""Small agents and batches, made in the same way for every script, and two tools for tests."""

from dataclasses import fields

import torch
import torch.nn.functional as F

from common.envs import EnvSpec

SIZES = dict(deter=12, hidden=10, units=9, layers=1, reward_layers=1, pcont_layers=1,
             actor_layers=1, critic_layers=1, depth=2, stoch=3, classes=4, bins=21, mlp_units=9,
             mlp_layers=1, image_size=8, batch_size=3, batch_length=5, imag_horizon=4,
             learning_starts=10, total_timesteps=1000, amp="off", cuda=False)


def has_flag(module, name: str) -> bool:
    return name in {field.name for field in fields(module.Args)}


def tiny_args(module, discrete: bool = True, **changes):
    """`Args` of a script with those of SIZES that it has; `changes` are flags that it has."""
    sizes = {name: value for name, value in SIZES.items() if has_flag(module, name)}
    size = "XS" if has_flag(module, "cont_mean") else "XXS"  # V3's XXS departs from the paper
    return for_task(module, module.Args(size=size, **sizes | changes), discrete)


def for_task(module, args, discrete: bool):
    """Filled with the defaults for the kind of actions, in the scripts that have such."""
    if module.TASKS:
        module.fill(args, module.TASKS["discrete" if discrete else "continuous"])
    return args


def tiny_spec(module, discrete: bool = True, image: bool = False, vector: int = 6) -> EnvSpec:
    """Two actions; the images are as small as the script allows."""
    pixels = SIZES["image_size"] if has_flag(module, "image_size") else 64
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


def grad_of(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the sum of `output`, zeros where there is none."""
    return list(torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True,
                                    materialize_grads=True))


def as_torch(dist) -> torch.distributions.Distribution:
    """The same distribution by torch."""
    if hasattr(dist, "probs"):
        return torch.distributions.Independent(torch.distributions.Categorical(dist.probs), 1)
    return torch.distributions.Independent(torch.distributions.Normal(dist.mean, dist.std), 1)
