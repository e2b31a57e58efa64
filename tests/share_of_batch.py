"""Five updates on this process's share of fixed batches; see test_distributed.py.

    python tests/share_of_batch.py SCRIPT discrete|continuous FOLDER       one process or a rank
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import runs
from common.envs import EnvSpec

script, kind, folder = sys.argv[1:]
module = __import__(script)
# Random draws would differ between one process and two.
module.draw_classes = lambda probs: probs.argmax(-1)
module.draw_noise = lambda mean: torch.full_like(mean, 0.5)
rank, world, _ = runs.setup_distributed("cpu")
args = module.Args(size="XXS", deter=12, hidden=10, units=9, layers=1, stoch=3, classes=4, bins=21,
                   batch_size=4, batch_length=5, horizon=4, amp="off", total_timesteps=1000)
torch.manual_seed(0)
agent = module.Agent(args, EnvSpec(None, 6, 2, kind == "discrete"), torch.device("cpu"))
for head in (agent.world_model.reward_head, agent.critic):  # at zero, the actor would learn nothing
    torch.nn.init.normal_(head.out.weight, std=0.3)
share, metrics = slice(rank, args.batch_size, world), []
for _ in range(5):
    lead = (args.batch_length, args.batch_size)
    action = F.one_hot(torch.randint(2, lead), 2).float() if kind == "discrete" else torch.randn(*lead, 2)
    batch = module.Batch(None, torch.randn(*lead, 6), action, 9 * torch.randn(lead), torch.rand(lead) < 0.2,
                         torch.rand(lead) < 0.2)
    batch = module.Batch(*(x if x is None else x[:, share] for x in batch))
    agent.train_step(batch, agent.blank_state(args.batch_size // world))
    metrics.append({name: float(value) for name, value in agent.metrics.items()})
torch.save({"agent": agent.state_dict(), "metrics": metrics, "batch": batch.vector},
           Path(folder) / f"{rank}of{world}.pt")
if dist.is_initialized():
    dist.destroy_process_group()
