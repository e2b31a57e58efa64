"""sheeprl 0.8.4 as a side of `speed.py`, through its public functions. It has a Python of its own:

    python -m venv /opt/sheeprl-venv && /opt/sheeprl-venv/bin/pip install torch==2.13.0
    /opt/sheeprl-venv/bin/pip install --no-deps sheeprl==0.8.4
    /opt/sheeprl-venv/bin/pip install hydra-core lightning torchmetrics tensorboard python-dotenv \\
        rich gymnasium==1.4.0 ale-py==0.12.1 opencv-python-headless

Where the two can be compared in two ways, this file takes the one that favours sheeprl: its
conversion of the batch to float32 is not timed, ours is a part of the update and is. Its process
allocates memory as the C library does by default, because its users get that; ours allocates as a
run of ours does. On a GPU its float32 is TF32, because its configuration says so, and ours is not:
bfloat16 compares like with like there.
"""

import importlib
import json
import sys

import gymnasium as gym
import hydra
import torch
from lightning.fabric import Fabric
from omegaconf import OmegaConf
from sheeprl.utils.utils import dotdict
from side import Side, serve, synthetic_batch
from torch.distributions import Distribution


class Sheeprl(Side):
    """One of its Dreamers at its configuration `exp`, with the sizes overridden."""

    exp: str
    layers = {"mlp_layers": "layers"}  # their name: ours
    names = {"world_model.encoder.cnn_channels_multiplier": "depth",
             "world_model.transition_model.hidden_size": "hidden",
             "world_model.representation_model.hidden_size": "hidden"}
    overrides = ()

    def __init__(self, setting: dict):
        super().__init__(setting)
        name = setting["script"].replace("_2025", "_5")  # their name of the revision
        self.algorithm, self.agent, self.utils = (
            importlib.import_module(f"sheeprl.algos.{name}.{part}")
            for part in (name, "agent", "utils"))
        self.cfg = self.configuration()
        torch.set_float32_matmul_precision(self.cfg.float32_matmul_precision)
        Distribution.set_default_validate_args(self.cfg.distribution.validate_args)
        self.fabric = Fabric(accelerator=self.device.type, devices=1,
                             precision="bf16-mixed" if setting["bf16"] else "32-true")
        self.build()
        metrics = self.cfg.metric.aggregator.metrics
        for key in set(metrics) - self.utils.AGGREGATOR_KEYS:
            metrics.pop(key)
        self.aggregator = hydra.utils.instantiate(self.cfg.metric.aggregator, _convert_="all")
        self.aggregator.to(self.device)

    def configuration(self) -> dotdict:
        """What its command line would make of these sizes."""
        setting, sizes = self.setting, self.setting["sizes"]
        names = {"dense_units": "units", "world_model.stochastic_size": "stoch",
                 "world_model.discrete_size": "classes",
                 "world_model.recurrent_model.recurrent_state_size": "deter",
                 } | self.names | self.layers
        overrides = [f"algo.{theirs}={sizes[ours]}" for theirs, ours in names.items()
                     if ours in sizes]
        if setting["pcont"] is not None:
            overrides.append(f"algo.world_model.use_continues={setting['pcont']}")
        with hydra.initialize_config_module("sheeprl.configs", version_base="1.3"):
            config = hydra.compose("config", [
                f"exp={self.exp}", f"algo.horizon={setting['horizon']}",
                f"algo.compile.enabled={setting['compile']}", *overrides, *self.overrides])
        return dotdict(OmegaConf.to_container(config, resolve=True, throw_on_missing=False))

    def build(self) -> None:
        """Networks and optimisers."""
        setting = self.setting
        box = gym.spaces.Box(0, 255, (setting["channels"], 64, 64), "uint8")
        self.actions_dim = (setting["actions"],)  # of continuous actions, too
        self.world_model, self.actor, self.critic, *target, _ = self.agent.build_agent(
            self.fabric, self.actions_dim, not setting["discrete"], self.cfg,
            gym.spaces.Dict(rgb=box))
        self.target_critic = target[0] if target else None
        self.parts = (self.world_model, self.actor, self.critic)
        self.optimizers = self.make_optimizers()

    def make_optimizers(self) -> tuple:
        """One for each part."""
        algo = self.cfg.algo
        return self.fabric.setup_optimizers(*(
            self.build_optimizer(config.optimizer, part.parameters())
            for config, part in zip((algo.world_model, algo.actor, algo.critic), self.parts)))

    def build_optimizer(self, config: dict, params) -> torch.optim.Optimizer:
        """The optimiser as its main loop makes it."""
        return hydra.utils.instantiate(config, params=params, _convert_="all")

    def batch(self, length: int, rows: int) -> None:
        """Use a batch of this shape from here on."""
        arrays = synthetic_batch(length, rows, self.setting)
        self.cfg.algo.per_rank_batch_size, self.cfg.algo.per_rank_sequence_length = rows, length
        data = {k: torch.from_numpy(v).float() for k, v in arrays.items() if v is not None}
        data = {"rgb": data["image"].permute(0, 1, 4, 2, 3).contiguous(), "actions": data["action"],
                "rewards": data["reward"][..., None], "is_first": data["is_first"][..., None],
                "terminated": data["is_terminal"][..., None]}
        data["truncated"] = torch.zeros_like(data["terminated"])
        self.data = {k: v.to(self.device) for k, v in data.items()}

    def train(self, *target_critic, more=()) -> None:
        """Its `train`: one update."""
        self.algorithm.train(self.fabric, *self.parts, *target_critic, *self.optimizers,
                             dict(self.data), self.aggregator, self.cfg, *more)

    def parameters(self) -> dict:
        """Trained parameters."""
        return {"parameters": sum(p.numel() for part in self.parts for p in part.parameters()
                                  if p.requires_grad)}


class SheeprlV1(Sheeprl):
    """DreamerV1; it has no other configuration than its default."""

    exp = "dreamer_v1"
    layers = {"mlp_layers": "actor_layers", "critic.mlp_layers": "critic_layers",
              "world_model.reward_model.mlp_layers": "reward_layers",
              "world_model.discount_model.mlp_layers": "pcont_layers"}

    def agent_step(self) -> None:
        """One update."""
        self.train()


class SheeprlV2(Sheeprl):
    """DreamerV2 in the authors' setting for Atari."""

    exp, updates = "dreamer_v2_ms_pacman", 0

    def build_optimizer(self, config: dict, params) -> torch.optim.Optimizer:
        """With its weight decay."""
        return self.utils.build_optimizer(config, params)

    def agent_step(self) -> None:
        """One update as in its main loop: the target critic first, every 100 of them."""
        if self.updates % self.cfg.algo.critic.per_rank_target_network_update_freq == 0:
            slow = self.target_critic.module.parameters()
            for fast, copy in zip(self.critic.module.parameters(), slow):
                copy.data.copy_(fast.data)
        self.updates += 1
        self.train(self.target_critic, more=(self.actions_dim,))


class SheeprlV3(Sheeprl):
    """DreamerV3 in the setting for Atari 100k."""

    exp = "dreamer_v3_100k_ms_pacman"

    def build(self) -> None:
        """And what tracks the range of the returns."""
        super().build()
        moments = self.cfg.algo.actor.moments
        self.moments = self.utils.Moments(moments.decay, moments.max, moments.percentile.low,
                                          moments.percentile.high)

    def agent_step(self) -> None:
        """One update as in its main loop: the target critic first, then `train`."""
        tau = self.cfg.algo.critic.tau
        for fast, slow in zip(self.critic.module.parameters(), self.target_critic.parameters()):
            slow.data.copy_(tau * fast.data + (1 - tau) * slow.data)
        more = (not self.setting["discrete"], self.actions_dim, self.moments)
        self.train(self.target_critic, more=more)


class SheeprlRevision(SheeprlV3):
    """The revision of DreamerV3; a window starts from zeros, as ours does here."""

    exp, overrides = "dreamer_v3_5_100k_ms_pacman", ("algo.replay_context=0",)
    layers = {"actor.mlp_layers": "layers", "critic.mlp_layers": "layers"}
    names = {"cnn_channels_multiplier": "depth",
             "world_model.recurrent_model.hidden_size": "hidden"}

    def make_optimizers(self) -> tuple:
        """One for everything."""
        params = [param for part in self.parts for param in part.parameters()]
        return (self.fabric.setup_optimizers(self.build_optimizer(self.cfg.algo.optimizer, params)),)

    def agent_step(self) -> None:
        """One update as in its main loop: `train`, then the target critic."""
        self.algorithm.train(self.fabric, self.cfg, *self.parts, self.target_critic,
                             *self.optimizers, self.moments, dict(self.data), self.aggregator,
                             self.actions_dim)
        self.algorithm.update_target_critic(self.critic, self.target_critic,
                                            self.cfg.algo.critic.tau)


SIDES = {"dreamer_v1": SheeprlV1, "dreamer_v2": SheeprlV2, "dreamer_v3": SheeprlV3,
         "dreamer_v3_2025": SheeprlRevision}

if __name__ == "__main__":
    serve(SIDES[json.loads(sys.argv[1])["script"]])
