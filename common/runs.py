"""A run: when to log, save and stop, and what it says of itself."""

import math
import os
import shutil
import signal
import sys
import time
from collections import deque
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.devices import (keep_freed_memory, max_over_ranks, prepare_torch, rng_state,
                            seed_everything, set_rng_state, setup_distributed)
from common.env_errors import EnvError
from common.envs import EnvSpec
from common.files import UserError, read_array
from common.logger import Logger, to_numbers
from common.rundir import (create_run_dir, load_checkpoint, own_run_dir, save_args,
                           save_checkpoint)
from common.video import EpisodeVideos, as_frames, side_by_side

CHECKPOINT_SECONDS = 600  # the longest time between two checkpoints


class GracefulExit:
    """Within it, Ctrl-C and SIGTERM only set `requested`; a Ctrl-C after that stops at once."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        with suppress(OSError):  # print() may not be called in a handler
            os.write(2, b"\nStopping after this step; Ctrl-C stops at once and saves nothing.\n")


class Run:
    """What surrounds the main loop of a new run, or of the rest of the one in `run_dir`.

    With several processes only rank 0 makes files, except for the replay; all ranks begin, save and
    leave together. As a context manager it saves at the end, and also after an EnvError, which does
    no harm to the agent; after any other error the last checkpoint stays as it is.
    """

    def __init__(self, script: str, args, run_dir: Path | None):
        """Join the other processes, seed, and read the checkpoint of a resume."""
        self.script, self.args, self.dir, self.is_new = script, args, run_dir, run_dir is None
        accelerator = prepare_torch(args.cuda, args.threads)
        self.rank, self.ranks, local_rank = setup_distributed(accelerator)
        is_cuda = accelerator == "cuda"
        self.device = torch.device("cuda", local_rank) if is_cuda else torch.device("cpu")
        if args.batch_size % self.ranks:
            raise UserError(f"--batch-size {args.batch_size} does not divide among {self.ranks} "
                            "processes.")
        self.saved = load_checkpoint(run_dir / "checkpoint.pt", script) if run_dir else None
        if self.saved and len(self.saved["ranks"]) != self.ranks:
            raise UserError(f"the run was made by {len(self.saved['ranks'])} processes, not "
                            f"{self.ranks}; start as many.")
        self.lock = own_run_dir(run_dir) if run_dir and self.rank == 0 else None
        self.step = self.began = self.before = self.saved["step"] if self.saved else 0
        self.seed = args.seed + 1_000 * self.rank + 1_000_000 * self.step
        seed_everything(args.seed, args.torch_deterministic)
        self.stop, self.exit, self.error = GracefulExit(), ExitStack(), None
        self.metrics, self.filmed, self.started, self.is_warm = {}, 0, False, False
        self.parent = os.getppid()

    def __enter__(self):
        return self

    def open_replay(self, replay_type: type, spec, capacity: int):
        """The replay of this run, or with --offline that of another, whose files are only read.

        A new run gets its directory here, once environments and networks have been built.
        """
        args, self.dir = self.args, self.dir or self.make_dir()
        folder = Path(args.offline or self.dir) / "replay"
        if self.ranks > 1 and not (args.offline and (folder / "rows.npy").exists()):
            folder /= f"rank{self.rank}"  # a recording made by one process serves them all
        num_envs = args.num_envs
        capacity = self.asked = max(args.batch_length, math.ceil(capacity / self.ranks))
        if args.offline or not self.is_new:  # the rings keep their size
            read_array(folder / "rows.npy")  # which is made last
            shape = read_array(folder / "reward.npy").shape
            if len(shape) != 2:
                raise UserError(f"{folder}/reward.npy has shape {shape}, not (num_envs, capacity); "
                                "for one environment write array[None]")
            num_envs, capacity = shape
        replay = replay_type(folder, spec, capacity, num_envs, args.seed + self.rank,
                             not args.offline)
        if args.offline and not replay.windows(args.batch_length):
            raise UserError(f"{folder} holds {replay.rings.count} rows per environment, fewer than "
                            f"--batch-length {args.batch_length}.")
        return replay

    def make_dir(self) -> Path:
        """A new run directory, with its args.json; every rank gets the same one."""
        args, shared = self.args, [None]
        if self.rank == 0:
            self.dir = create_run_dir(args.runs_dir, args.env_id, args.exp_name or self.script,
                                      args.seed)
            self.lock = own_run_dir(self.dir)
            save_args(self.dir, self.script, asdict(args))
            shared = [self.dir]
        if dist.is_initialized():
            dist.broadcast_object_list(shared)
        return shared[0]

    def start(self, envs, agent, feeder, open_loop, planned: int) -> None:
        """Restore the checkpoint, or write the first one; greet, and open the log.

        `open_loop(agent, batch, context)` gives videos, or vector series, by name; `planned` counts
        the updates of the whole run.
        """
        args, is_first = self.args, self.rank == 0
        self.envs, self.agent, self.feeder, self.open_loop = envs, agent, feeder, open_loop
        self.exit.enter_context(self.lock or nullcontext())
        self.exit.enter_context(self.stop)
        self.exit.callback(envs.close)
        self.episodes, self.returns = 0, deque(maxlen=10)
        if self.rank:  # the same weights on every rank, but not the same draws
            seed_everything(self.seed, args.torch_deterministic)
        if self.saved:
            self.restore()
        if is_first:
            self.greet(planned)
        self.logger = Logger(self.dir, args, self.step, agent.updates, not self.is_new, is_first)
        self.exit.callback(self.logger.close)
        is_filmed = args.capture_video and is_first and not args.offline
        self.films = EpisodeVideos(self.dir / "videos") if is_filmed else None
        if self.films:
            self.exit.callback(self.films.close)
        if hasattr(agent.learn, "free"):  # nccl waits for ever for a CUDA graph of its collectives
            self.exit.callback(agent.learn.free)
        self.last_save = time.monotonic()
        if self.is_new:
            self.save()  # so that there is always something to resume
        elif is_first:
            save_args(self.dir, self.script, asdict(args))  # the next resume has these flags, too
        self.started, self.saved = True, None

    def greet(self, planned: int) -> None:
        """Say where the run is, what it will take, and how to make it comfortable."""
        agent, rings = self.agent, self.feeder.replay.rings
        millions = sum(p.numel() for p in agent.parameters() if p.requires_grad) / 1e6
        print(f"run directory: {self.dir}")
        print(f"environment: {self.envs.spec.summary}")
        print(*(f"note: {notice}\n" for notice in self.envs.spec.notices), sep="", end="")
        print(f"replay buffer: {rings.capacity * rings.num_envs:,} timesteps, "
              f"{rings.gibibytes:.2f} GiB of disk{' per rank' * (self.ranks > 1)}")
        if not self.args.offline and rings.capacity < self.asked:
            print(f"note: the replay keeps the size that it was made with, {rings.capacity:,} "
                  f"timesteps per environment; {self.asked:,} take a new run")
        print(f"agent: size {self.args.size}, {millions:.2f} million parameters, on {agent.device}"
              f"{' in bfloat16' if agent.bf16 else ''}")
        print(f"curves and dreams: tensorboard --logdir {self.dir.parent}")
        if not planned:
            print("no update will be made: raise --total-timesteps, or lower --learning-starts")
        elif agent.device.type == "cpu" and millions > 4:
            print(f"no GPU: {planned:,} updates of so large a network take long; comfortable on "
                  "a laptop: --size XXS, on an environment such as CartPole-v1")

    def stopping(self, metrics: dict | None = None) -> bool:
        """Whether to leave the main loop; also saves, on all ranks, if that is long ago.

        `metrics`: of the last update, which `save` looks at first; None: known already.
        """
        self.metrics = metrics or self.metrics
        is_orphan = self.ranks > 1 and os.getppid() != self.parent  # torchrun is gone
        stop = self.stop.requested or self.error or is_orphan
        is_late = time.monotonic() - self.last_save > CHECKPOINT_SECONDS
        agreed = max_over_ranks(2 if stop else int(is_late))
        if agreed == 1:
            self.save()
        return agreed == 2

    def due(self, every: int) -> bool:
        """Whether this turn crossed a multiple of `every`; never if that is 0."""
        return every > 0 and self.step // every > self.before // every

    def log_and_save(self, obs, metrics: dict) -> None:
        """What is due after the updates of a turn of the main loop; `obs` is what was acted on."""
        args, agent, self.metrics = self.args, self.agent, metrics
        if metrics and not self.is_warm:  # the first update of this process is done
            keep_freed_memory()
            self.is_warm = True
        for env in np.flatnonzero(obs.is_last):
            self.episodes += 1
            self.returns.append(float(obs.episode_return[env]))
            self.logger.scalars({"charts/episodic_return": self.returns[-1],
                                 "charts/episodic_length": obs.episode_length[env],
                                 "charts/updates": agent.updates}, self.step)
        if self.device.type == "cpu":  # on a GPU, to look would be to wait for the update
            to_numbers(metrics, agent.updates)
        if self.films:
            self.film(obs)
        if self.due(args.log_every):
            values = to_numbers(metrics, agent.updates)
            self.logger.scalars(values | self.logger.speeds(self.step, agent.updates), self.step)
        if self.due(args.video_every):
            self.log_video()
        if self.due(args.checkpoint_every):
            self.save()
        last = {"mean_return": np.mean(self.returns)} if self.returns else {}  # of up to 10
        self.logger.progress(self.step, **last, updates=agent.updates)
        self.before = self.step

    def film(self, obs) -> None:
        """Add a frame to the video of the episode; a video that fails ends the run, saved."""
        try:
            self.films.add(self.envs.render, obs.is_first[0])
        except (EnvError, OSError) as error:  # the ranks leave together, in `stopping`
            self.error, self.films = error, None

    def log_video(self) -> None:
        """What the agent imagines now; no random number that training uses is drawn for it."""
        replay, length = self.feeder.replay, self.args.batch_length
        if self.rank or not self.agent.updates or not replay.windows(length):
            return
        context = min(self.args.dream_context, length - 1)
        batch = replay.sample(1, length, np.random.default_rng(self.step))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            panels = as_frames(self.open_loop(self.agent, batch, context))
        self.logger.video("open_loop", side_by_side(panels, context), self.step)
        self.filmed = self.step

    def save(self) -> None:
        """Replay rows to disk first, then the checkpoint that refers to them."""
        agent, feeder = self.agent, self.feeder
        to_numbers(self.metrics, agent.updates)
        self.logger.flush()  # what is logged up to here is never logged again
        feeder.replay.rings.flush()
        mine = {"replay": feeder.replay.state_dict(), "feeder": feeder.state_dict(),
                "rng": rng_state(self.device)}
        ranks = [mine] * self.ranks
        if dist.is_initialized():
            dist.all_gather_object(ranks, mine)
        self.last_save = time.monotonic()
        if self.rank == 0:
            moments = {name: opt.state_dict() for name, opt in agent.optimizers().items()}
            save_checkpoint(self.dir / "checkpoint.pt", {
                "step": self.step, "updates": agent.updates, "agent": agent.state_dict(),
                "optimizers": moments, "spec": asdict(self.envs.spec), "ranks": ranks,
                "episodes": self.episodes, "returns": list(self.returns)}, self.script)

    def restore(self) -> None:
        """Undo `save`."""
        saved, agent, mine = self.saved, self.agent, self.saved["ranks"][self.rank]
        with explain_mismatch(self.dir):
            check_spec(self.envs.spec, EnvSpec(**saved["spec"]), self.dir)
            agent.load_state_dict(saved["agent"])
            for name, optimizer in agent.optimizers().items():
                optimizer.load_state_dict(saved["optimizers"][name])
            agent.updates, self.episodes = saved["updates"], saved["episodes"]
            self.returns.extend(saved["returns"])
            self.feeder.replay.load_state_dict(mine["replay"])
            self.feeder.load_state_dict(mine["feeder"])
            set_rng_state(mine["rng"], self.device)

    def __exit__(self, kind, error, trace) -> None:
        with self.exit:  # at its end the log, the environments and all the rest are closed
            has_begun = self.step > 0 or self.ranks > 1
            broken = isinstance(error, EnvError) and has_begun
            is_saved = self.started and (error is None or broken)
            if is_saved:
                if broken and self.step < self.args.total_timesteps:
                    max_over_ranks(2)  # the others learn of it in `stopping`
                self.save()
                is_done = self.began < self.args.total_timesteps <= self.step
                if is_done and self.args.video_every and self.filmed != self.step:
                    self.log_video()
        hint = f"go on with: python {sys.argv[0]} --resume {self.dir}"
        if not is_saved:
            self.remove_if_nothing(error)
        elif failed := error or self.error:
            raise UserError(f"{failed}; the state is saved; mend that, then {hint}") from failed
        elif self.rank == 0:
            self.take_leave(hint)

    def remove_if_nothing(self, error) -> None:
        """A new run that could not begin leaves nothing behind."""
        if self.is_new and self.dir and (not self.started or isinstance(error, EnvError)):
            shutil.rmtree(self.dir, ignore_errors=True)

    def take_leave(self, hint: str) -> None:
        """Say how the run ended and what can be done with it."""
        if self.step < self.args.total_timesteps:
            print(f"stopped and saved; {hint}")
            return
        if self.began >= self.args.total_timesteps:
            print(f"nothing left to do after {self.step:,} timesteps; raise --total-timesteps")
        if self.returns:
            print(f"{self.episodes} episodes; mean return of the last {len(self.returns)}: "
                  f"{np.mean(self.returns):g}")
        print(f"done; all of it is in {self.dir}\n"
              f"    python {sys.argv[0]} --evaluate {self.dir}\n"
              f"    python {sys.argv[0]} --dream {self.dir}")


@contextmanager
def explain_mismatch(run_dir: Path):
    """Turn what loading a foreign state raises into one line."""
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{run_dir / 'checkpoint.pt'} does not fit this code or these settings; "
                        "use those that wrote it") from error


def check_spec(spec: EnvSpec, saved: EnvSpec, run_dir: Path | str) -> None:
    """Raise UserError if the environment is not the one that the checkpoint was made with."""
    if spec != saved:
        now, before = asdict(spec), asdict(saved)
        changed = [f"{f.name} is {now[f.name]}, was {before[f.name]}"
                   for f in fields(spec) if f.compare and now[f.name] != before[f.name]]
        raise UserError(f"the environment is not the one that {run_dir} was made with: "
                        f"{'; '.join(changed)}")
