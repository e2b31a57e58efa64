"""From the command line to `Args`: of a new run, or of one that a directory remembers."""

import argparse
import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
import tyro

from common.disk import MODES, UserError, load_args
from common.envs import benchmark
from common.spaces import EnvError

TASK = {"env_kwargs", "env_seed", "max_episode_steps", "noop_max"}  # a resume keeps it
MAY_BE_ZERO = {*TASK, "eval_env_seed", "seed", "threads", "video_every"}  # others: from 1


@dataclass(frozen=True)
class RunArgs:
    """Settings of a run that have nothing to do with what is learnt. A script adds its own."""

    max_episode_steps: int = 0  # Time limit, not a terminal, in timesteps (0: environment's own)
    noop_max: int = 30  # Atari: up to this many no-ops at the start of an episode
    env_seed: int | None = None  # Seed of every episode of training (one level, one track)
    env_kwargs: str = "{}"  # Arguments of the environment's constructor, '{"continuous": true}'

    exp_name: str | None = None  # Part of the run directory's name (None: the script's)
    seed: int = 1  # Seed of everything random
    torch_deterministic: bool = True  # Ask cuDNN for deterministic kernels
    cuda: bool = True  # Use the GPU if there is one
    threads: int = 1  # CPU threads (0: torch's choice); a quiet machine may have more
    amp: Literal["auto", "on", "off"] = "auto"  # bfloat16; auto: where native, from 256 units on
    compile: bool = False  # torch.compile the networks
    cuda_graph: bool = False  # On a GPU: launch each update as one CUDA graph
    track: bool = False  # Also log to Weights & Biases
    wandb_project_name: str = "dreamer"  # Project name there
    wandb_entity: str | None = None  # Team name there
    capture_video: bool = False  # Film episodes 0, 1, 8, ... (--evaluate: all) into videos/
    runs_dir: str = "runs"  # Where run directories are made
    log_every: int = 250  # Timesteps between two points of the training curves
    video_every: int = 10_000  # Timesteps between two open-loop videos in TensorBoard (0: none)
    checkpoint_every: int = 5_000  # Timesteps between checkpoints, at most 10 minutes of time

    resume: str = ""  # Run directory to go on with, exactly where it stopped
    evaluate: str = ""  # Run directory whose agent plays fresh episodes; prints every return
    dream: str = ""  # Run directory whose agent's dreams go to RUN_DIR/videos as GIF and PNG
    eval_episodes: int = 10  # Episodes of --evaluate
    eval_greedy: bool = False  # Evaluate and dream with the most likely actions
    eval_env_seed: int | None = None  # Seed of the level that --evaluate and --dream play
    dream_actions: Literal["recorded", "agent", "keyboard"] = "recorded"  # Who acts in the dream
    dream_context: int = 5  # Frames that the agent sees before it dreams on alone
    dream_horizon: int = 45  # Frames of pure imagination

    def fill(self, tasks: dict[str, dict], sizes: dict[str, dict], flags: dict[str, Any]) -> None:
        """Set every field: to `flags`, else to what the size has for it, or the task, or itself."""
        task, size = (flags.get(name, getattr(type(self), name)) for name in ("env_id", "size"))
        if size not in sizes:
            raise UserError(f"--size is {size}; use one of {', '.join(sizes)}")
        values = tasks.get(benchmark(task), {}) | sizes[size] | flags
        for field in fields(self):
            object.__setattr__(self, field.name, values.get(field.name, field.default))
        if unknown := values.keys() - vars(self).keys():
            raise UserError(f"there is no setting {', '.join(sorted(unknown))} (in this version)")

    def check(self, may_be_zero: set[str], shares: set[str]) -> None:
        """UserError for a number that is negative, infinite, 0 where it counts, or too large."""
        try:
            dict(json.loads(self.env_kwargs))
        except (ValueError, TypeError):
            raise UserError("""--env-kwargs is JSON, such as '{"continuous": true}'""") from None
        for name, value in vars(self).items():
            if type(value) in (int, float):
                is_whole = type(getattr(type(self), name)) is int  # the field, not the value
                least = int(is_whole and name not in may_be_zero | MAY_BE_ZERO)
                if not least <= value <= (most := 1 if name in shares else 2**53):
                    raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least "
                                    f"{least} and at most {most:,}")


@contextmanager
def one_line_errors():
    try:
        yield
    except (UserError, EnvError, OSError, ImportError) as error:
        sys.exit("error: " + " ".join(str(error).splitlines()))  # that of a space has several
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse(args_type: type, script: str, description: str):
    """Arguments, and the run directory if one of MODES names one.

    A resume keeps the task and what the script declares, but for learning rates and length.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (*MODES, "size", "env-id", "env_id"):
        finder.add_argument(f"--{name}")
    asked = {name: x for name, x in vars(finder.parse_known_args()[0]).items() if x is not None}
    mode, *others = [mode for mode in MODES if mode in asked] or [None]
    if others:
        raise UserError(f"--{mode} and --{others[0]} are two commands; give one after the other")
    if not mode:
        return tyro.cli(args_type, default=args_type(**asked), description=description), None
    run_dir = Path(asked[mode] or "''").absolute()
    made_by, stored = load_args(run_dir)
    if made_by != script:
        raise UserError(f"{run_dir} was made by {made_by}.py, this is {script}.py")
    if mode != "resume":
        stored["capture_video"] = False  # an evaluation is filmed if that is asked for now
    default = args_type(**stored)
    args = tyro.cli(args_type, default=default, description=description)
    names, shared = ({field.name for field in fields(of)} for of in (args_type, RunArgs))
    for name in sorted(names - shared | TASK) if mode == "resume" else ("size",):
        new, old = getattr(args, name), getattr(default, name)
        if new != old and not f"_{name}".endswith(("_lr", "_timesteps")):
            raise UserError(f"--{name.replace('_', '-')} {new} does not fit {run_dir}, which was "
                            f"made with {old}; leave the flag out")
    return args, run_dir
