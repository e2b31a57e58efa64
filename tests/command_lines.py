"""Command lines of small runs, for every script, and what such a run leaves behind."""

import hashlib
import importlib
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.disk import load_checkpoint

MAIN = "dreamer_v3"  # what is the same for all scripts is tested with this one
ENV = "tests.fake_envs:Counting-v0"
TINY = {"size": "XXS", "deter": 8, "hidden": 8, "units": 8, "stoch": 2, "classes": 2,
        "layers": 1, "depth": 2, "mlp_units": 8, "mlp_layers": 1, "imag_horizon": 3,
        "head_layers": 1, "blocks": 2, "batch_size": 3, "batch_length": 5, "learning_starts": 16,
        "pretrain": 1, "train_ratio": 15.0, "image_size": 8, "threads": 1, "log_every": 10,
        "video_every": 0, "actor_grad": "auto", "cuda": False, "amp": "off"}
TIMING = ("charts/SPS", "charts/updates_per_second")


def settings(script: str, env: str = ENV, steps: int = 40, **changes) -> dict:
    """Fields of `Args` of a run that makes its first update at step 20, then one per step.

    Those of TINY that a script does not have are left out.
    """
    names = {field.name for field in fields(importlib.import_module(script).Args)}
    known = {name: value for name, value in TINY.items() if name in names}
    if "replay_context" in names:  # a window has one row more
        known |= {"learning_starts": 15, "image_size": 16}
    return {"env_id": env, "total_timesteps": steps} | known | changes


def flags(script: str, env: str = ENV, steps: int = 40, **changes) -> list[str]:
    """The same as words of a command line."""
    words = []
    for name, value in settings(script, env, steps, **changes).items():
        word = name.replace("_", "-")
        words += [f"--{word}" if value else f"--no-{word}"] if isinstance(value, bool) else [
            f"--{word}", str(value)]
    return words


def call(script: str, *argv) -> str | int | None:
    """Run a script's `main` in this process. What it hands to `sys.exit`: one line, if it fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
        try:
            importlib.import_module(script).main()
        except SystemExit as leaving:
            return leaving.code
    return 0


def assert_says(said, *words: str) -> None:
    """`call` gave one line, an error, that has these words."""
    assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said, said
    assert not [word for word in words if word not in said], said


def only(paths) -> Path:
    path, = paths
    return path


def run_dir_in(folder: Path) -> Path:
    return only((folder / "runs").iterdir())


def progress_of(run_dir: Path) -> tuple[int, int]:
    state = load_checkpoint(run_dir)
    return state["step"], state["updates"]


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def read_log(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All curves, of all event files together, without those that depend on the clock."""
    log = read_log(run_dir)
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)]
            for tag in log.Tags()["scalars"] if tag not in TIMING}


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


def assert_one_line(done, *words: str) -> None:
    """A process ended with exit status 1 and one line that says what is wrong, no traceback."""
    lines = [line for line in done.err.split("\n") if line.startswith("error: ")]
    assert done.code == 1 and len(lines) == 1 and "Traceback" not in done.err, str(done)
    assert_says(lines[0], *words)


@contextmanager
def file_size_limit(nbytes: int):
    """A full disk, nearly: a file that grows beyond it gets an OSError."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
