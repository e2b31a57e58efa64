"""Command lines of small runs, for every script, and what such a run leaves behind."""

import importlib
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.rundir import load_checkpoint
from tests.tiny import has_flag

MAIN = "dreamer_v3"  # what lives in `common/`, or is the same in all scripts, is tested with this one
TINY = {"size": "XXS", "deter": 8, "hidden": 8, "units": 8, "stoch": 2, "classes": 2, "layers": 1, "depth": 2,
        "mlp_units": 8, "mlp_layers": 1, "imag_horizon": 3, "batch_size": 3, "batch_length": 5,
        "learning_starts": 20, "pretrain": 1, "train_ratio": 15, "image_size": 8, "threads": 1, "log_every": 10,
        "video_every": 0, "actor_grad": "auto"}
TIMING = ("charts/SPS", "charts/updates_per_second")


def tiny_run(script: str, env: str, steps: int, *more, **changes) -> list[str]:
    """The flags of a run on an environment of tests/, such as fake_envs:Counting.

    It makes its first update at step 20, then one per step: 15 replayed timesteps, as many as a
    batch holds. `changes` are flags; those that a script does not have are left out.
    """
    module, flags = importlib.import_module(script), {}
    for name, value in (TINY | changes).items():
        if has_flag(module, name):
            flags[f"--{name.replace('_', '-')}"] = value
    pairs = [str(word) for pair in flags.items() for word in pair]
    return ["--env-id", f"tests.{env}-v0", "--total-timesteps", str(steps), "--no-cuda", *pairs,
            *map(str, more)]


def only(paths) -> Path:
    path, = paths
    return path


def run_dir_in(folder: Path) -> Path:
    return only((folder / "runs").iterdir())


def load(run_dir: Path, script: str = MAIN) -> dict:
    return load_checkpoint(run_dir / "checkpoint.pt", script)


def progress_of(run_dir: Path, script: str = MAIN) -> tuple[int, int]:
    state = load(run_dir, script)
    return state["step"], state["updates"]


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All curves, of all event files together, without those that depend on the clock."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]
            if tag not in TIMING}


def assert_identical(one, two, where="checkpoint") -> None:
    """Bit for bit, with the names of what differs."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            assert_identical(one[key], two[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for index, pair in enumerate(zip(one, two)):
            assert_identical(*pair, f"{where}[{index}]")
    else:
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, where


def assert_one_line(done, *words: str, ranks: int = 1) -> None:
    """Exit status 1, one line that says what is wrong (the same from several ranks), no traceback."""
    lines = [line for line in done.err.split("\n") if line.startswith("error: ")]
    assert done.code == 1 and 1 <= len(lines) <= ranks and len(set(lines)) == 1, str(done)
    assert "Traceback" not in done.err and "Warning" not in done.err, str(done)
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in {lines[0]}"
