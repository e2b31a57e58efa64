"""One of our scripts as a side of `speed.py`."""

import importlib
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1])]
from benchmarks.side import Side, serve, synthetic_batch  # noqa: E402
from common import runs  # noqa: E402
from common.envs import EnvConfig, Envs, EnvSpec, EnvStep, default_action_repeat  # noqa: E402


class Ours(Side):
    """`Agent.train_step` and `Agent.act` of dreamer_v1.py, dreamer_v2.py or dreamer_v3.py."""

    def __init__(self, setting: dict):
        super().__init__(setting)
        runs.keep_freed_memory()  # as `train` does
        self.script = importlib.import_module(setting["script"])
        args = self.script.Args(**setting["sizes"], horizon=setting["horizon"],
                                compile=setting["compile"], amp="on" if setting["bf16"] else "off")
        self.spec = EnvSpec((64, 64, 3), 0, setting["actions"], True)
        self.agent = self.script.Agent(args, self.spec, self.device)

    def batch(self, length: int, rows: int) -> None:
        arrays = synthetic_batch(length, rows, self.setting["actions"])
        tensors = {k: torch.from_numpy(v).to(self.device) for k, v in arrays.items()}
        self.data = self.script.Batch(vector=None, **tensors)
        self.carry = self.agent.blank_state(rows)

    def agent_step(self) -> None:
        self.agent.train_step(self.data, self.carry)

    def parameters(self) -> dict:
        """Trained parameters; the slow critic is a copy."""
        return {"parameters": sum(p.numel() for p in self.agent.parameters() if p.requires_grad)}

    def act_step(self, rows: int):
        """Observations in numpy on the way in, actions in numpy on the way out, as in the loop."""
        image = synthetic_batch(1, rows, self.setting["actions"])["image"][0]
        no, zero = np.zeros(rows, bool), np.zeros(rows, np.float32)
        step = EnvStep(image, None, zero, no, no, no, zero.astype(float), zero.astype(int))
        carry = self.agent.blank_state(rows)

        def act():
            nonlocal carry
            carry = self.agent.act(step, carry)
            return carry.action.cpu().numpy()
        return act

    def envs(self, env_id: str, num_envs: int, seconds: float, acting: bool) -> dict:
        """Timesteps per second of `num_envs` environments together, with the agent or at random."""
        config = EnvConfig(env_id, action_repeat=default_action_repeat(env_id))
        envs = Envs(config, num_envs, seed=0)
        obs, carry = envs.reset(), self.agent.blank_state(num_envs)
        steps, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            if acting:
                carry = self.agent.act(obs, carry)
                obs = envs.step(carry.action.cpu().numpy())
            else:
                obs = envs.step(self.script.random_action(envs.spec, num_envs))
            steps += num_envs
        envs.close()
        return {"per_second": steps / passed}


if __name__ == "__main__":
    serve(Ours)
