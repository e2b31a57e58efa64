"""Does a trained world model foresee rewards? It compares the replay with the reward head.

    python benchmarks/foresight.py RUN_DIR

The table has a row for each state that the head can be asked about: with the observation; one step
ahead of it, without; `--horizon` steps ahead, with the recorded actions alone. It gives the sums of
positive, of negative and of no rewards, each with what the head says in these rows. A model that
sees its own points better than its opponent's imagines too bright a future, and the actor believes
it: the last line compares the reward that the actor imagines with the real one.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
cli, play = map(importlib.import_module, ("common.cli", "common.play"))


@dataclass(frozen=True)
class Options:
    """What to look at."""

    run_dir: tyro.conf.Positional[Path]
    """A run directory with its replay."""
    rows: int = 4000  # The latest rows of the first environment
    length: int = 48
    """Rows of a window. The model sees all of it up to the state that it is asked about."""
    warmup: int = 10
    """Rows at the start of a window that are not asked about: the state is still vague."""
    horizon: int = 15  # Steps ahead
    threads: int = 1  # CPU threads


@torch.no_grad()
def foresight(agent, options: Options) -> dict[str, dict[str, float]]:
    """Sums of rewards and of predictions by the state that is asked; means of the policy."""
    model, actor = agent.world_model, agent.actor
    module = importlib.import_module(type(agent).__module__)
    files = options.run_dir / "replay"
    num_envs, capacity = np.load(files / "reward.npy", mmap_mode="r").shape
    rings = module.ReplayBuffer(files, agent.spec, capacity, num_envs, 0).rings
    starts = np.arange(max(rings.oldest, rings.count - options.rows), rings.count - options.length,
                       options.length)
    if not len(starts):
        sys.exit(f"{files} holds {rings.count} rows, not one window of {options.length}")
    rows = rings.read(np.zeros(len(starts), int), starts + np.arange(options.length)[:, None])
    rows["is_first"][0] = True
    batch = module.to_batch(rows)
    batch = type(batch)(*(part if part is None else part.to(agent.device) for part in batch))
    real = {"none": batch.reward, "tanh": batch.reward.tanh(),
            "clip": batch.reward.clamp(-1, 1)}[agent.args.clip_rewards]  # what the model learnt

    carry = agent.zero_state(len(starts))
    deter, stoch, _ = model.rssm.observe(
        model.encoder(module.centre(batch.image), batch.vector),
        module.previous_actions(batch, carry.action), batch.is_first, carry.deter, carry.stoch)

    def predicted(deter, stoch):
        return model.reward(torch.cat([deter, stoch], -1)).mean()

    first = options.warmup
    found = {"with the observation": sums(real[first:], predicted(deter, stoch)[first:])}
    ahead, states = {}, (deter[first:], stoch[first:])  # of every state at once
    for step in range(1, options.horizon + 1):
        actions = batch.action[first + step - 1:-1]
        states = model.rssm.img_step(*(part[:len(actions)] for part in states), actions)
        ahead[step] = sums(real[first + step:], predicted(*states))
    for step in sorted({1, options.horizon}):
        found[f"{step} ahead"] = ahead[step]

    states, imagined = (deter[first:].flatten(0, 1), stoch[first:].flatten(0, 1)), []
    for _ in range(options.horizon):
        action = actor.policy(actor(torch.cat(states, -1))).sample()
        states = model.rssm.img_step(*states, action)
        imagined.append(predicted(*states).mean().item())
    found["policy"] = {"imagined": float(np.mean(imagined)), "real": real.mean().item()}
    return found


def sums(real: torch.Tensor, predicted: torch.Tensor) -> dict[str, float]:
    """Real and predicted, over the rows with a positive, with a negative, and without a reward."""
    parts = {"positive": real > 0, "negative": real < 0, "zero": real == 0}
    return {f"{name} {what}": values[rows].sum().item() for name, rows in parts.items()
            for what, values in (("real", real), ("seen", predicted))}


def main() -> None:
    """Print the table."""
    options = tyro.cli(Options, description=__doc__)
    found = foresight(play.load(options.run_dir, threads=options.threads).agent, options)
    policy = found.pop("policy")
    print("| the state | positive | seen as | negative | seen as | none | seen as |")
    print("|---" * 7 + "|")
    for name, row in found.items():
        print(f"| {name} | " + " | ".join(f"{value:.0f}" for value in row.values()) + " |")
    print(f"a step of the policy: {policy['imagined']:.4f} imagined, {policy['real']:.4f} real")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
