"""The life of a run: when it logs, saves and stops, and what it says of itself."""

import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from common.devices import gather, join, keep_freed_memory, max_over_ranks, prepare_torch
from common.disk import (UserError, create_run_dir, load_checkpoint, lock_run_dir,
                         replace_when_done, save_args)
from common.log import Log, to_numbers
from common.spaces import EnvError
from common.video import draw

CHECKPOINT_SECONDS = 600  # the longest time between two checkpoints


class Run(AbstractContextManager):
    """What surrounds the main loop of a new run, or of the rest of the one in `run_dir`.

    Of several processes only rank 0 makes files, except for the replay; all ranks begin, save and
    leave together. It saves at the end and after an EnvError; other errors leave the last save.
    """

    def __init__(self, script: str, args, run_dir: Path | None):
        """Join the other processes, seed, and make the run directory or read its checkpoint."""
        self.args, self.script, (self.rank, self.ranks, self.device) = args, script, join(args.cuda)
        if args.batch_size % self.ranks:
            raise UserError(f"--batch-size {args.batch_size} is not for {self.ranks} processes")
        self.is_new, self.saved = run_dir is None, load_checkpoint(run_dir) if run_dir else None
        before = len(self.saved.get("ranks", "")) if self.saved else self.ranks
        if before != self.ranks:
            raise UserError(f"start {before} processes, as this run had before" if before else
                            f"{run_dir} is of recorded data: evaluate it, or run its program again")
        if self.rank == 0:
            run_dir = run_dir or create_run_dir(args.runs_dir, args.env_id,
                                                args.exp_name or script, args.seed)
            self.lock = lock_run_dir(run_dir)
            save_args(run_dir, script, asdict(args))  # a resume remembers its flags, too
        self.dir = gather(run_dir)[0]
        self.films = str(self.dir / "videos") if args.capture_video and not self.rank else None
        self.step = self.before = self.saved["step"] if self.saved else 0
        self.seed = args.seed + 1_000 * self.rank + 1_000_000 * self.step
        prepare_torch(args, args.seed)
        self.generator = torch.cuda if self.device.type == "cuda" else torch.random
        self.metrics, self.returns, self.parent = {}, deque(maxlen=10), os.getppid()
        self.envs, self.log, self.started, self.stop, self.handlers = None, None, False, False, {}

    def open_replay(self, replay_type: type, spec, capacity: int):
        folder = self.dir / "replay" / (f"rank{self.rank}" if self.ranks > 1 else "")
        capacity = max(self.args.batch_length, math.ceil(capacity / self.ranks))
        return replay_type(folder, spec, capacity, self.args.num_envs, self.args.seed + self.rank)

    def start(self, envs, agent, feeder, open_loop, first_update: int) -> None:
        """Restore the checkpoint, or write the first one; greet, and open the log."""
        self.envs, self.agent, self.feeder, self.open_loop = envs, agent, feeder, open_loop
        if self.rank:  # the same weights on every rank, but not the same draws
            torch.manual_seed(self.seed)
        if self.saved:
            self.restore()
        if self.rank == 0:
            self.greet(first_update)
        self.log = Log(self.dir, self.args, self.step, agent.updates, self.rank == 0)
        if threading.current_thread() is threading.main_thread():  # no other may do this
            self.handlers = {number: signal.signal(number, self.ask_to_stop)
                             for number in (signal.SIGINT, signal.SIGTERM)}
        self.save()  # so that there is always something to resume
        self.started = True

    def greet(self, first_update: int) -> None:
        rings = self.feeder.replay.rings
        millions = sum(p.numel() for p in self.agent.parameters() if p.requires_grad) / 1e6
        print(f"run directory: {self.dir}\nenvironment: {self.envs.spec}",
              *(f"note: {notice}" for notice in self.envs.notices),
              f"agent: {millions:.2f} million parameters, on {self.device}"
              + " in bfloat16" * self.agent.bf16,
              f"replay buffer: {rings.capacity * rings.num_envs:,} timesteps, "
              f"{rings.gibibytes:.2f} GiB of disk" + " per rank" * (self.ranks > 1),
              f"curves and dreams: tensorboard --logdir {shlex.quote(str(self.dir.parent))}",
              f"it learns from timestep {first_update:,} on"
              + ", after its end" * (first_update > self.args.total_timesteps), sep="\n")
        if self.device.type == "cpu" and millions > 4:
            print(f"no GPU: this takes days; made for a laptop: python {sys.argv[0]} --env-id "
                  "CartPole-v1 --action-repeat 2 --size XXS --total-timesteps 15000")

    def ask_to_stop(self, number, frame) -> None:
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = True  # print() may not be called in a handler
        os.write(2, b"\nStopping after this step; Ctrl-C stops at once and saves nothing.\n")

    def stopping(self, metrics: dict | None = None) -> bool:
        """Whether to leave the main loop; also saves, on all ranks, if that is long ago."""
        self.metrics = metrics or self.metrics
        is_orphan = self.ranks > 1 and os.getppid() != self.parent  # torchrun is gone
        is_late = time.monotonic() - self.last_save > CHECKPOINT_SECONDS
        agreed = max_over_ranks(2 if self.stop or is_orphan else int(is_late))
        if agreed == 1:
            self.save()
        return agreed == 2

    def log_and_save(self, obs, metrics: dict) -> None:
        """What is due after the updates of a turn of the main loop; `obs` is what was acted on."""
        args, agent, log = self.args, self.agent, self.log
        if metrics and not self.metrics:  # the first update of this process is done
            keep_freed_memory()
        self.metrics = metrics
        for env in np.flatnonzero(obs.is_last):
            self.returns.append(float(obs.episode_return[env]))
            log.scalars({"charts/episodic_return": self.returns[-1],
                         "charts/episodic_length": obs.episode_length[env],
                         "charts/updates": agent.updates}, self.step)
        to_log, to_film, to_save = (
            every and self.step // every > self.before // every  # a multiple was crossed
            for every in (args.log_every, args.video_every, args.checkpoint_every))
        if self.device.type == "cpu" or to_log:  # a GPU would be waited for
            values = to_numbers(metrics, agent.updates)
        if to_log:
            rings = self.feeder.replay.rings
            values["charts/frames"] = self.step * args.action_repeat
            values["charts/replay_size"] = (rings.count - rings.oldest) * rings.num_envs
            log.scalars(values | log.speeds(self.step, agent.updates), self.step)
        if to_film:
            self.log_video()
        if to_save:
            self.save()
        last = {"mean_return": np.mean(self.returns)} if self.returns else {}  # of up to 10
        log.progress(self.step, **last, updates=agent.updates)
        self.before = self.step

    def log_video(self) -> None:
        """What the agent imagines now; no random number that training uses is drawn for it."""
        args, replay = self.args, self.feeder.replay
        context = min(args.dream_context, args.batch_length - 1)
        length = context + args.dream_horizon
        length = length if replay.windows(length) else args.batch_length
        if self.rank or not self.agent.updates or not replay.windows(length):
            return
        batch = replay.sample(1, length, np.random.default_rng(self.step))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            series = self.open_loop(self.agent, batch, context)
        self.log.video("open_loop", draw(series, context, self.envs.spec.names)[0], self.step)

    def save(self) -> None:
        agent, replay = self.agent, self.feeder.replay
        to_numbers(self.metrics, agent.updates)  # nothing that is not finite is saved
        self.log.flush()  # what is logged up to here is never logged again
        replay.rings.flush()  # before the checkpoint, which refers to these rows
        mine = {"replay": replay.state_dict(), "rng": self.generator.get_rng_state()}
        everyone, self.last_save = gather(mine), time.monotonic()
        if self.rank == 0:
            moments = {name: opt.state_dict() for name, opt in agent.optimizers().items()}
            state = {"step": self.step, "updates": agent.updates, "agent": agent.state_dict(),
                     "optimizers": moments, "spec": asdict(self.envs.spec), "ranks": everyone}
            with replace_when_done(self.dir / "checkpoint.pt") as file:
                torch.save(state, file)

    def restore(self) -> None:
        saved, agent, mine = self.saved, self.agent, self.saved["ranks"][self.rank]
        load_weights(agent, saved, self.envs.spec, self.dir)
        for name, optimizer in agent.optimizers().items():
            optimizer.load_state_dict(saved["optimizers"][name])
        agent.updates = saved["updates"]
        self.feeder.replay.load_state_dict(mine["replay"])
        if len(mine["rng"]) == len(self.generator.get_rng_state()):  # else of another device
            self.generator.set_rng_state(mine["rng"])

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.leave(error)
        finally:  # in a notebook this process lives on
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            if self.rank == 0:
                self.lock.lock.release()

    def leave(self, error: BaseException | None) -> None:
        is_saved = self.started and (error is None or isinstance(error, EnvError))
        is_done = self.step >= self.args.total_timesteps
        if is_saved and error and not is_done:
            max_over_ranks(2)  # the others learn of it in `stopping`
        if is_saved:
            self.save()
        if is_saved and is_done and self.args.video_every:
            self.log_video()
        for part in filter(None, (self.log, self.envs)):
            part.close()
        if self.started and hasattr(self.agent.learn, "free"):
            self.agent.learn.free()
        if self.rank == 0 and not self.started and self.is_new:  # it leaves nothing behind
            shutil.rmtree(self.dir, ignore_errors=True)
        script = sys.argv[0] if Path(sys.argv[0]).stem == self.script else f"{self.script}.py"
        call = f"python {shlex.quote(script)} --%s {shlex.quote(str(self.dir))}"
        if is_saved and error:
            raise UserError(f"{error}; it is saved; go on with: {call % 'resume'}") from error
        if is_saved and self.rank == 0 and is_done:
            print(f"done; returns of the last episodes: {[round(x, 2) for x in self.returns]}",
                  call % "evaluate" + " --eval-greedy", call % "dream", sep="\n    ")
        elif is_saved and self.rank == 0:
            print(f"stopped and saved; go on with: {call % 'resume'}")


def load_weights(agent, saved: dict, spec, run_dir: Path | str) -> None:
    """Load a checkpoint into the agent of an environment; UserError if one of the two differs."""
    if spec != type(spec)(**saved["spec"]):
        raise UserError(f"the environment is {spec}, {run_dir} was made with {saved['spec']}")
    try:
        agent.load_state_dict(saved["agent"])
    except RuntimeError as error:
        raise UserError(f"{run_dir} does not fit this code or these flags; use its own") from error
