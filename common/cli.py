"""From the command line to `Args`: new runs, and runs that a directory remembers."""

import argparse
import math
from dataclasses import fields
from pathlib import Path

import tyro

from common.runs import UserError, load_args

MODES = ("resume", "evaluate", "dream")  # flags of `Args` that name a run directory


def parse(args_type: type, script: str, description: str, fixed: set[str]):
    """Arguments, and the run directory if one of MODES names one.

    Flags that are given win over what the run directory holds, except for the fields `fixed`, which
    its networks and its replay buffer depend on. Raises UserError, one line.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for mode in MODES:
        finder.add_argument(f"--{mode}")
    given = {mode: path for mode, path in vars(finder.parse_known_args()[0]).items() if path}
    if not given:
        return tyro.cli(args_type, description=description), None
    if len(given) > 1:
        raise UserError(f"{' and '.join(f'--{mode}' for mode in given)} exclude each other.")
    (mode, path), = given.items()
    run_dir = Path(path)
    stored = load_args(run_dir, script)
    if unknown := stored.keys() - {field.name for field in fields(args_type)}:
        raise UserError(f"{run_dir}/args.json has settings that this version does not know: "
                        f"{', '.join(sorted(unknown))}; use the version that wrote it.")
    original = args_type(**stored)
    args = tyro.cli(args_type, description=description, default=original)
    for name in sorted(fixed - ({"num_envs"} if mode != "resume" else set())):
        if getattr(args, name) != getattr(original, name):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(args, name)} does not fit {run_dir}, which was "
                            f"made with --{flag} {getattr(original, name)}; leave the flag out.")
    return args, run_dir


def check_numbers(args, may_be_zero: set[str]) -> None:
    """Raise UserError, one line, for a number in `args` that is negative, not finite, or 0."""
    for field in fields(args):
        value, floor = getattr(args, field.name), field.name in may_be_zero
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and not floor):
            raise UserError(f"--{field.name.strip('_').replace('_', '-')} is {value}; "
                            f"it must be {'at least' if floor else 'above'} 0.")
