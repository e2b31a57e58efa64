"""One of our scripts, of this version or of an older one, as a side of `speed.py`."""

import importlib
import sys
import time
from dataclasses import fields

import numpy as np
import torch
from side import Side, serve, synthetic_batch


class Ours(Side):
    """`Agent.train_step` and `Agent.act` of dreamer_v1.py, dreamer_v2.py or dreamer_v3.py."""

    def __init__(self, setting: dict):
        """`setting["root"]`: the folder of the script and its common/."""
        super().__init__(setting)
        sys.path[:0] = [setting["root"]]
        self.script = script = importlib.import_module(setting["script"])
        self.is_old = "horizon" in {field.name for field in fields(script.Args)}
        self.helpers = importlib.import_module("common.runs" if self.is_old else "common.devices")
        shape = (64, 64, setting["channels"])
        self.spec = script.EnvSpec(shape, 0, setting["actions"], setting["discrete"])
        self.agent = script.Agent(self.make_args(), self.spec, self.device)
        self.zero_state = self.agent.blank_state if self.is_old else self.agent.zero_state

    def make_args(self):
        """`Args` as a new run would fill them for this kind of actions."""
        setting, script = self.setting, self.script
        horizon = "horizon" if self.is_old else "imag_horizon"
        graph = {"cuda_graph": True} if setting.get("cuda_graph") else {}
        args = script.Args(**setting["sizes"], **{horizon: setting["horizon"]}, **graph,
                           compile=setting["compile"], amp="on" if setting["bf16"] else "off")
        if getattr(script, "TASKS", {}):
            kind = "discrete" if setting["discrete"] else "continuous"
            script.fill(args, script.TASKS[kind])
        return args

    def batch(self, length: int, rows: int) -> None:
        """Use a batch of this shape from here on."""
        arrays = synthetic_batch(length, rows, self.setting)
        tensors = {k: torch.from_numpy(v).to(self.device) for k, v in arrays.items()}
        self.data = self.script.Batch(vector=None, **tensors)
        self.carry = self.zero_state(rows)

    def agent_step(self) -> None:
        """One update."""
        self.agent.train_step(self.data, self.carry)
        self.helpers.keep_freed_memory()  # as `train` does after the first one

    def parameters(self) -> dict:
        """Trained parameters; the slow critic is a copy."""
        return {"parameters": sum(p.numel() for p in self.agent.parameters() if p.requires_grad)}

    def act_step(self, rows: int):
        """Observations in numpy on the way in, actions in numpy on the way out, as in the loop."""
        image = synthetic_batch(1, rows, self.setting)["image"][0]
        no, zero = np.zeros(rows, bool), np.zeros(rows, np.float32)
        step = self.script.EnvStep(image, None, zero, no, no, no, zero.astype(float),
                                   zero.astype(int))
        state = self.zero_state(rows)

        def act():
            nonlocal state
            state = self.agent.act(step, state)
            return state.action.cpu().numpy()
        return act

    def envs(self, env_id: str, num_envs: int, seconds: float, acting: bool) -> dict:
        """Timesteps per second of `num_envs` environments together, with the agent or at random."""
        repeat = self.script.default_action_repeat(env_id)
        config = self.script.EnvConfig(env_id, action_repeat=repeat,
                                       grayscale=self.setting["channels"] == 1)
        envs = self.script.Envs(config, num_envs, seed=0)
        obs, state = envs.reset(), self.zero_state(num_envs)
        rng, size = np.random.default_rng(0), (num_envs, envs.spec.action_dim)
        steps, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            if acting:
                state = self.agent.act(obs, state)
                obs = envs.step(state.action.cpu().numpy())
            else:
                obs = envs.step(rng.uniform(-1, 1, size).astype(np.float32))
            steps += num_envs
        envs.close()
        return {"per_second": steps / passed}


if __name__ == "__main__":
    serve(Ours)
