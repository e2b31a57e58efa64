"""`python SCRIPT.py ARGS...` on resume_envs:Life-v0, with every batch checked as it is sampled.

    python tests/checked_run.py SCRIPT ARGS...
"""

import json
import sys
from pathlib import Path

from tests.resume_envs import check_rows

module = __import__(sys.argv.pop(1))
original = module.ReplayBuffer.sample


def sample(self, *args):
    batch, starts = original(self, *args), json.loads(Path("lives.json").read_text())
    rows = check_rows(batch.vector, batch.action, batch.reward, batch.is_first, batch.is_terminal,
                      starts)
    assert self.rings.oldest <= rows.min() and rows.max() < self.rings.count
    return batch


module.ReplayBuffer.sample = sample
module.main()
