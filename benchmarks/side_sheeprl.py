"""sheeprl 0.8.4 as a side of `speed.py`, through its public functions; runs under its own Python.

    python -m venv /opt/sheeprl-venv && /opt/sheeprl-venv/bin/pip install torch==2.13.0
    /opt/sheeprl-venv/bin/pip install --no-deps sheeprl==0.8.4
    /opt/sheeprl-venv/bin/pip install hydra-core lightning torchmetrics tensorboard python-dotenv \\
        rich gymnasium==1.4.0 ale-py==0.12.1 opencv-python-headless

Where the two could be compared in two ways, the one that favours sheeprl is taken: its conversion
of the batch to float32 is not timed (ours, inside the update, is). Its process allocates memory as
the C library does by default, which is what its users get; ours as `train` does.
"""

import sys
from pathlib import Path

import gymnasium as gym
import hydra
import torch
from lightning.fabric import Fabric
from omegaconf import OmegaConf
from torch.distributions import Distribution

sys.path[:0] = [str(Path(__file__).parents[1])]
from benchmarks.side import Side, serve, synthetic_batch  # noqa: E402
from sheeprl.algos.dreamer_v3.agent import build_agent  # noqa: E402
from sheeprl.algos.dreamer_v3.dreamer_v3 import train  # noqa: E402
from sheeprl.algos.dreamer_v3.utils import AGGREGATOR_KEYS, Moments, prepare_obs  # noqa: E402
from sheeprl.utils.utils import dotdict  # noqa: E402


class Sheeprl(Side):
    """DreamerV3 at its configuration exp=dreamer_v3_100k_ms_pacman, with the sizes overridden."""

    def __init__(self, setting: dict):
        super().__init__(setting)
        precision = "bf16-mixed" if setting["bf16"] else "32-true"
        sizes = {"dense_units": "units", "mlp_layers": "layers",
                 "world_model.stochastic_size": "stoch",
                 "world_model.discrete_size": "classes",
                 "world_model.encoder.cnn_channels_multiplier": "depth",
                 "world_model.recurrent_model.recurrent_state_size": "deter",
                 "world_model.transition_model.hidden_size": "hidden",
                 "world_model.representation_model.hidden_size": "hidden"}
        overrides = [f"algo.{theirs}={setting['sizes'][ours]}" for theirs, ours in sizes.items()]
        with hydra.initialize_config_module("sheeprl.configs", version_base="1.3"):
            config = hydra.compose("config", [
                "exp=dreamer_v3_100k_ms_pacman", f"algo.horizon={setting['horizon']}",
                f"algo.compile.enabled={setting['compile']}", *overrides])
        self.cfg = dotdict(OmegaConf.to_container(config, resolve=True, throw_on_missing=False))
        torch.set_float32_matmul_precision(self.cfg.float32_matmul_precision)
        Distribution.set_default_validate_args(self.cfg.distribution.validate_args)
        self.fabric = Fabric(accelerator=self.device.type, devices=1, precision=precision)
        space = gym.spaces.Dict(rgb=gym.spaces.Box(0, 255, (3, 64, 64), "uint8"))
        self.actions_dim = (setting["actions"],)
        self.world_model, self.actor, self.critic, self.target_critic, self.player = build_agent(
            self.fabric, self.actions_dim, False, self.cfg, space)
        self.fabric_parts = (self.world_model, self.actor, self.critic)
        self.optimizers = self.fabric.setup_optimizers(*(
            hydra.utils.instantiate(part_cfg.optimizer, params=part.parameters(), _convert_="all")
            for part, part_cfg in zip(self.fabric_parts, (
                self.cfg.algo.world_model, self.cfg.algo.actor, self.cfg.algo.critic))))
        moments = self.cfg.algo.actor.moments
        self.moments = Moments(moments.decay, moments.max, moments.percentile.low,
                               moments.percentile.high)
        metrics = self.cfg.metric.aggregator.metrics
        for key in set(metrics) - AGGREGATOR_KEYS:
            metrics.pop(key)
        self.aggregator = hydra.utils.instantiate(self.cfg.metric.aggregator, _convert_="all")
        self.aggregator.to(self.device)

    def batch(self, length: int, rows: int) -> None:
        arrays = synthetic_batch(length, rows, self.setting["actions"])
        self.cfg.algo.per_rank_batch_size, self.cfg.algo.per_rank_sequence_length = rows, length
        data = {k: torch.from_numpy(v).float() for k, v in arrays.items()}
        data = {"rgb": data["image"].permute(0, 1, 4, 2, 3).contiguous(), "actions": data["action"],
                "rewards": data["reward"][..., None], "is_first": data["is_first"][..., None],
                "terminated": data["is_terminal"][..., None]}
        data["truncated"] = torch.zeros_like(data["terminated"])
        self.data = {k: v.to(self.device) for k, v in data.items()}

    def agent_step(self) -> None:
        """One update as in its main loop: the target critic first, then `train`."""
        tau = self.cfg.algo.critic.tau
        for fast, slow in zip(self.critic.module.parameters(), self.target_critic.parameters()):
            slow.data.copy_(tau * fast.data + (1 - tau) * slow.data)
        train(self.fabric, self.world_model, self.actor, self.critic, self.target_critic,
              *self.optimizers, dict(self.data), self.aggregator, self.cfg, False,
              self.actions_dim, self.moments)

    def parameters(self) -> dict:
        """Trained parameters."""
        return {"parameters": sum(p.numel() for part in self.fabric_parts for p in part.parameters()
                                  if p.requires_grad)}

    def act_step(self, rows: int):
        """As in its main loop: numpy in, `prepare_obs`, `get_actions`, numpy out."""
        self.player.num_envs = rows
        self.player.init_states()
        image = synthetic_batch(1, rows, self.setting["actions"])["image"][0].transpose(0, 3, 1, 2)

        @torch.inference_mode()
        def act():
            obs = prepare_obs(self.fabric, {"rgb": image}, cnn_keys=["rgb"], num_envs=rows)
            actions = self.player.get_actions(obs)
            torch.cat(actions, -1).cpu().numpy()
            return torch.stack([a.argmax(dim=-1) for a in actions], dim=-1).cpu().numpy()
        return act


if __name__ == "__main__":
    serve(Sheeprl)
