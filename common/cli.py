"""From the command line to `Args`: new runs, and runs that a directory remembers."""

import argparse
import inspect
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch.distributed as dist
import tyro

from common.env_errors import EnvError
from common.envs import is_atari, probe
from common.files import UserError
from common.rundir import MODES, load_args

KEPT = "(a resume keeps these)"  # the mark of a group of `Args`
RENAMED = {"horizon": "imag-horizon", "eval-mode": "eval-greedy",  # old flag: new flag
           "discount-horizon": "gamma (1 - 1 / discount horizon)"}


@dataclass(frozen=True)
class RunArgs:
    """Settings of a run that have nothing to do with what is learnt. A script adds its own."""

    # The environment
    max_episode_steps: int = 0  # Time limit, not a terminal, in timesteps (0: environment's own)
    noop_max: int = 30  # Atari: up to this many no-ops at the start of an episode
    env_seed: int | None = None  # Seed of every episode of training (one level, one track)
    max_env_restarts: int = 10  # Restarts of broken environments before the run stops
    env_timeout: float = 60.0  # Seconds after which an environment counts as hung

    # The run
    exp_name: str | None = None  # Part of the run directory's name (None: the script's)
    seed: int = 1  # Seed of everything random
    torch_deterministic: bool = True  # Ask cuDNN for deterministic kernels
    cuda: bool = True  # Use the GPU if there is one
    threads: int = 0  # CPU threads of torch (0: its own choice); 1 is best for tiny networks
    amp: Literal["auto", "on", "off"] = "auto"  # bfloat16; auto: where native, from 256 units on
    compile: bool = False  # torch.compile the networks
    cuda_graph: bool = False  # On a GPU: launch each update as one CUDA graph
    track: bool = False  # Also log to Weights & Biases
    wandb_project_name: str = "dreamer"  # Project name there
    wandb_entity: str | None = None  # Team name there
    capture_video: bool = False  # Film episodes 0, 1, 8, 27, ... into RUN_DIR/videos
    runs_dir: str = "runs"  # Where run directories are made
    log_every: int = 250  # Timesteps between two points of the training curves
    video_every: int = 10_000  # Timesteps between two open-loop videos in TensorBoard (0: none)
    checkpoint_every: int = 5_000  # Timesteps between checkpoints, at most 10 minutes of time

    # The mode (a resume keeps --offline)
    resume: str = ""  # Run directory to go on with, exactly where it stopped
    evaluate: str = ""  # Run directory whose agent plays fresh episodes; prints every return
    dream: str = ""  # Run directory whose agent's dreams go to RUN_DIR/videos as GIF and PNG
    offline: str = ""  # Run directory whose replay is trained on; no environment step is taken
    eval_episodes: int = 10  # Episodes of --evaluate
    eval_greedy: bool | None = None  # Evaluate and dream with the most likely actions
    eval_env_seed: tuple[int, ...] = ()  # Seeds of the levels that --evaluate and --dream play
    dream_context: int = 5  # Frames that the agent sees before it dreams on alone
    dream_horizon: int = 45  # Frames of pure imagination


MAY_BE_ZERO = {"seed", "env_seed", "threads", "video_every", "max_episode_steps", "noop_max",
               "max_env_restarts"}


@contextmanager
def one_line_errors():
    """Mistakes of the user get one line and exit status 1, Ctrl-C one line and exit status 130."""
    try:
        yield
    except (UserError, EnvError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse(args_type: type, script: str, description: str, tasks: dict[str, dict]):
    """Arguments, and the run directory if one of MODES names one.

    Flags that are given win over what the run directory holds, except for the groups of `Args`
    that say "(a resume keeps these)". Raises UserError, one line.

    tasks: what a new run fills in where a field is still None, for "discrete" and for "continuous"
    actions; may be empty.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for mode in MODES:
        finder.add_argument(f"--{mode}")
    found, others = finder.parse_known_args()
    for flag in (word.partition("=")[0] for word in others):
        if new := RENAMED.get(flag.removeprefix("--").removeprefix("no-")):
            raise UserError(f"{flag} is now --{new}.")
    given = {mode: path for mode, path in vars(found).items() if path}
    if not given:
        defaults = {f.name: f.default for f in fields(args_type)}
        args = read_flags(args_type, description, defaults, tasks)
        return for_task(args, tasks) if tasks else args, None
    if len(given) > 1:
        raise UserError(f"{' and '.join(f'--{mode}' for mode in given)} exclude each other.")
    (mode, path), = given.items()
    run_dir = Path(path)
    original = stored_args(args_type, run_dir, script)
    defaults = asdict(original)
    if mode == "evaluate":  # is filmed if that is asked for now
        defaults["capture_video"] = False
    args = read_flags(args_type, description, defaults, tasks)
    fill(args, asdict(original))  # None is what a new run fills in; this one has been filled
    fixed = {name for title, group in help_groups(args_type).items() for name in group
             if title.endswith(KEPT)} | {"offline"}
    for name in sorted(fixed - ({"num_envs"} if mode != "resume" else set())):
        if getattr(args, name) != getattr(original, name):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(args, name)} does not fit {run_dir}, which was "
                            f"made with --{flag} {getattr(original, name)}; leave the flag out.")
    return args, run_dir


def fill(args, presets: dict[str, Any]) -> None:
    """Put presets in the place of fields that are None; `args` may be a frozen dataclass."""
    for name, value in presets.items():
        if getattr(args, name) is None:
            object.__setattr__(args, name, value)


def for_task(args, tasks: dict[str, dict]):
    """`args`, filled with the setting for the kind of actions that its environment has."""
    spec = probe(args.env_config)
    kind = "discrete" if spec.discrete else "continuous"
    presets = {name: value for name, value in tasks[kind].items() if getattr(args, name) is None}
    fill(args, presets)
    args.check()
    silent = {"grayscale": spec.image_shape is None, "sticky": not is_atari(args.env_id)}
    print(f"{kind} actions, so: " + ", ".join(
        f"{name.replace('_', '-')} {value}" for name, value in presets.items()
        if not silent.get(name)))
    return args


def read_flags(args_type: type, description: str, defaults: dict[str, Any],
               tasks: dict[str, dict]):
    """The command line as an `args_type`; `--help` shows its fields in titled groups."""
    groups, filled = [], args_type()
    for number, (title, helps) in enumerate(help_groups(args_type).items()):
        hints = {f.name: f.type for f in fields(args_type) if f.name in helps}
        group = make_dataclass(f"Group{number}", [
            (name, Annotated[hint, tyro.conf.OmitArgPrefixes, tyro.conf.arg(
                help=helps[name] + preset_note(filled, name, defaults[name], tasks))],
             field(default=defaults[name])) for name, hint in hints.items()])
        name, _, note = title.partition(" (")
        named = Annotated[group, tyro.conf.arg(name=name, help=note.removesuffix(")"))]
        groups.append((f"group{number}", named, field(default_factory=group)))
    integers = tyro.constructors.ConstructorRegistry()
    integers.primitive_rule(integer_rule)
    parsed = tyro.cli(make_dataclass("Flags", groups), description=description, registry=integers,
                      args=spell_out(args_type, sys.argv[1:]))
    values = asdict(parsed).values()
    return args_type(**{name: value for group in values for name, value in group.items()})


def spell_out(args_type: type, words: list[str]) -> list[str]:
    """`--flag` and `--no-flag` for fields of type bool | None, of which tyro wants a value."""
    optional = {f"--{f.name.replace('_', '-')}" for f in fields(args_type) if f.type == bool | None}
    spelled = []
    for index, word in enumerate(words):
        flag = word.replace("_", "-")
        if flag in optional and words[index + 1:index + 2] not in (["True"], ["False"], ["None"]):
            spelled += [flag, "True"]
        elif flag.replace("--no-", "--", 1) in optional and flag.startswith("--no-"):
            spelled += [flag.replace("--no-", "--", 1), "False"]
        else:
            spelled.append(word)
    return spelled


def preset_note(filled, name: str, default: Any, tasks: dict[str, dict]) -> str:
    """What --help says of a default that is None because --size or the kind of actions sets it."""
    if default is not None:
        return ""
    presets = {f"--size {filled.size}": getattr(filled, name)}
    if presets == {f"--size {filled.size}": None}:
        presets = {kind: task[name] for kind, task in tasks.items() if name in task}
    words = [f"{where}: {f'{value:.6g}' if isinstance(value, float) else value}"
             for where, value in presets.items()]
    return f" ({', '.join(words)})" if words else ""


def help_groups(args_type: type) -> dict[str, dict[str, str]]:
    """Title -> field -> help, from the comments in the source of a dataclass and of its bases.

    A comment line below an empty line is the title of the fields that follow, with a note in
    brackets if need be; the comment at the end of a field's line is its help.
    """
    names, groups, before = {f.name for f in fields(args_type)}, {}, ""
    title = "general"
    own = [base for base in args_type.__mro__ if "__dataclass_fields__" in vars(base)]
    for line in "\n\n".join(map(inspect.getsource, own)).splitlines():
        if (heading := re.fullmatch(r"    # (.+)", line)) and not before.strip():
            title = heading[1]
        declared = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
        if declared and declared[1] in names:
            groups.setdefault(title, {})[declared[1]] = declared[2] or ""
        before = line
    return groups


def integer_rule(info: tyro.constructors.PrimitiveTypeInfo):
    """How tyro reads an int: 1e5 is one, too."""
    def read(words: list[str]) -> int:
        try:
            return int(words[0])
        except ValueError:
            if float(words[0]).is_integer():
                return int(float(words[0]))
            raise

    return None if info.type is not int else tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="INT", instance_from_str=read, str_from_instance=lambda x: [str(x)],
        is_instance=lambda x: isinstance(x, int))


def stored_args(args_type: type, run_dir: Path, script: str):
    """The `Args` that a run directory remembers."""
    stored, known = load_args(run_dir, script), {f.name: f.type for f in fields(args_type)}
    if unknown := stored.keys() - known.keys():
        raise UserError(f"{run_dir}/args.json has settings that this version does not know: "
                        f"{', '.join(sorted(unknown))}; use the version that wrote it.")
    for name, value in stored.items():
        if not fits(value, known[name]):
            raise UserError(f"{run_dir}/args.json holds {value!r} for {name}; restore the file.")
    return args_type(**{name: tuple(value) if isinstance(value, list) else value
                        for name, value in stored.items()})


def fits(value: Any, hint: Any) -> bool:
    """Whether `value`, which JSON gave, is of the type of a field."""
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(fits(part, get_args(hint)[0]) for part in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint or (hint is type(None) and value is None)


def check_numbers(args, may_be_zero: set[str], shares: dict[str, float]) -> None:
    """Raise UserError, one line, for a number in `args` that is negative, not finite, or 0.

    `shares`: the largest value that a field may have, such as 1, or 100 for percent. The numbers of
    a tuple are seeds, which may be 0.
    """
    for name, value in vars(args).items():
        is_tuple, flag = isinstance(value, tuple), f"--{name.replace('_', '-')}"
        for number in value if is_tuple else (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            floor = is_tuple or name in may_be_zero | MAY_BE_ZERO
            if not math.isfinite(number) or number < 0 or (number == 0 and not floor):
                raise UserError(f"{flag} is {number}; it must be "
                                f"{'at least' if floor else 'above'} 0.")
            if number > shares.get(name, math.inf):
                raise UserError(f"{flag} is {number}; it must be at most {shares[name]}.")


def check_lengths(args) -> None:
    """Raise UserError unless a sequence is one, and fits into the replay of an environment."""
    if args.batch_length < 2:
        raise UserError("--batch-length is 1; a sequence has at least 2 timesteps.")
    training = not (args.evaluate or args.dream or args.offline)
    if training and args.batch_length > args.capacity:
        limit = "buffer-size" if args.buffer_size < args.total_timesteps else "total-timesteps"
        raise UserError(f"--batch-length {args.batch_length} is longer than the replay buffer of "
                        f"one environment ({args.capacity} timesteps): lower it, or raise "
                        f"--{limit}.")
