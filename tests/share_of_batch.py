"""Five updates on this process's share of fixed batches; see test_distributed.py.

    python tests/share_of_batch.py SCRIPT discrete|continuous FOLDER       one process or a rank
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from common.devices import join
from tests.tiny import has_flag, tiny_agent, tiny_batch, tiny_spec, update

script, kind, folder = sys.argv[1:]
module = __import__(script)
# Random draws would differ between one process and two.
module.draw_classes = lambda probs: probs.argmax(-1)
module.draw_noise = lambda mean: torch.full_like(mean, 0.5)
module.draw_truncated = lambda low, high: (low + high) / 2
rank, world, _ = join(cuda=False)
torch.manual_seed(0)
# The mean KL of one rank is above this limit, that of the other below.
limit = {"free_nats": 1.3 if script == "dreamer_v1" else 0.19} if has_flag(
    module, "free_nats") else {}
agent = tiny_agent(module, tiny_spec(module, kind == "discrete"), batch_size=4, **limit)
share, metrics = slice(rank, 4, world), []
for _ in range(5):
    batch = tiny_batch(module, agent)
    batch = module.Batch(*(x if x is None else x[:, share] for x in batch))
    found = update(module, agent, batch)
    metrics.append({name: float(value) for name, value in found.items()})
torch.save({"agent": agent.state_dict(), "metrics": metrics, "batch": batch.vector, "limit": limit},
           Path(folder) / f"{rank}of{world}.pt")
if dist.is_initialized():
    dist.destroy_process_group()
