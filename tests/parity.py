"""Do our numbers equal those that the authors' own code gave? One line per quantity.

    python -m tests.parity v3 [FOLDER]          default folder: tests/golden/v3

FOLDER holds fixtures: arrays written by the authors' code, with random draws replaced by a rule
(tests/golden/*/README.md). The exit status is 0 if everything agrees, 1 if anything does not or was
not compared, 2 if there is nothing to compare.

Tolerances. An error is a largest absolute difference, divided by a scale:

    forward     2e-5    scale: the largest magnitude in the expected tensor. Exceptions, named where
                        they are made: a mean or difference of numbers that cancel has the scale
                        of those numbers; a tensor that spans many orders of magnitude is judged
                        row by row, or element by element with scale max(1, |expected|)
    gradient    1e-4    scale: the largest magnitude in the expected tensor (Adam's moments too);
                        where that is 0, ours must be exactly 0
    parameter   1e-5    absolute, after each of the three updates
    exact       0       counters, flags and one-hot vectors

A line that stands for several tensors shows the worst of them. Every array of a fixture must be
read by a comparison or stand in the version's IGNORED table with a reason; one that does neither
is a FAIL as well.
"""

import fnmatch
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VERSIONS = {"v3": "tests.parity_v3"}  # each has check_agent, check_math and IGNORED

TOLERANCE = {"forward": 2e-5, "gradient": 1e-4, "parameter": 1e-5, "exact": 0.0}
COMPANIONS = ("_steps", "_opt", "_gradparts")  # X_steps.npz belongs to X.npz


class Mismatch(Exception):
    """A fixture that ours cannot be set up for: an unknown setting, a weight without a place."""


class Fixture:
    """The arrays of one fixture and its companions; remembers which of them were read."""

    def __init__(self, path: Path):
        self.name, self.arrays, self.read = path.stem, {}, set()
        for file in [path, *(path.with_name(path.stem + suffix + ".npz") for suffix in COMPANIONS)]:
            if file.exists():
                with np.load(file, allow_pickle=False) as arrays:
                    self.arrays = dict(arrays) | self.arrays  # keep the first meta/json
        self.meta = json.loads(str(self["meta/json"]))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> np.ndarray:
        self.read.add(key)
        return self.arrays[key]

    def tensor(self, key: str) -> Tensor:
        """One array as a tensor of its own."""
        return torch.from_numpy(np.array(self[key]))

    def under(self, prefix: str) -> list[str]:
        """Every key below `prefix`, without it."""
        return [key[len(prefix):] for key in self.arrays if key.startswith(prefix)]


class Report:
    """Prints and counts comparisons."""

    def __init__(self, quiet: bool = False):
        self.quiet, self.lines, self.failed, self.worst = quiet, 0, [], {}
        self.where = ""  # name of the fixture

    def line(self, name: str, error: float, kind: str) -> None:
        """Print one comparison. A NaN is a failure."""
        good = error <= TOLERANCE[kind]
        self.lines += 1
        self.worst[kind] = max(self.worst.get(kind, (0.0, "")), (error, f"{self.where}: {name}"))
        self.say(f"{name:<76} {error:9.2e} {TOLERANCE[kind]:7.0e} {'ok' if good else 'FAIL'}")
        if not good:
            self.failed.append(f"{self.where}: {name}")

    def fail(self, name: str, why: str) -> None:
        """Print something that could not even be compared."""
        self.lines += 1
        self.failed.append(f"{self.where}: {name}")
        self.say(f"{name:<76} {why} FAIL")

    def check(self, name: str, ours, expected, kind: str = "forward", scale=None) -> None:
        """Compare one tensor."""
        try:
            self.line(name, largest_error(ours, expected, kind, scale), kind)
        except Mismatch as why:
            self.fail(name, str(why))

    def check_all(self, fixture: Fixture, prefix: str, ours: dict[str, Tensor], kind: str) -> None:
        """Compare every tensor below `prefix`: a line for the worst one and for each failure."""
        expected, errors = fixture.under(prefix), {}
        if set(expected) != set(ours):
            self.fail(prefix, f"other names: {sorted(set(expected) ^ set(ours))}")
        for path in set(expected) & set(ours):
            try:
                errors[path] = largest_error(ours[path], fixture[prefix + path], kind)
            except Mismatch as why:
                self.fail(prefix + path, str(why))
        if errors:
            worst = max(errors, key=lambda path: np.nan_to_num(errors[path], nan=np.inf))
            for path, error in errors.items():
                if path != worst and not error <= TOLERANCE[kind]:
                    self.line(prefix + path, error, kind)
            self.line(f"{prefix}* ({len(errors)} tensors, worst {worst})", errors[worst], kind)

    def say(self, text: str) -> None:
        """Print, unless told not to."""
        if not self.quiet:
            print(text)


def largest_error(ours, expected, kind: str, scale=None) -> float:
    """Largest difference in units of `scale`. Raises `Mismatch` if the shapes differ."""
    a = ours.detach().double().numpy() if isinstance(ours, Tensor) else np.asarray(ours, np.float64)
    b = np.asarray(expected, np.float64)
    if a.shape != b.shape:
        raise Mismatch(f"shape {a.shape}, expected {b.shape}")
    if not a.size:
        raise Mismatch("nothing to compare")
    difference = np.abs(a - b)
    if kind in ("parameter", "exact"):
        return float(difference.max())
    unit = np.abs(b).max() if scale is None else np.asarray(scale, np.float64)
    relative = np.divide(difference, unit, out=np.where(difference == 0, 0.0, np.inf),
                         where=np.broadcast_to(unit > 0, difference.shape))
    return float(relative.max())


@contextmanager
def patched(*patches: tuple[object, str, object]) -> Iterator[None]:
    """Put replacements (owner, name, new) in place for a while."""
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, new in patches:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old in saved:
            setattr(owner, name, old)


def gradient(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradient of the sum of `output`; zeros where it does not depend on an input."""
    grads = torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs))


def leaf(array: np.ndarray) -> Tensor:
    """A tensor to take gradients for."""
    return torch.from_numpy(np.array(array)).requires_grad_()


def check_coverage(report: Report, fixture: Fixture, ignored: dict[str, str]) -> None:
    """Every array must have been read, or be on the list of those that have a reason not to be."""
    left = set(fixture.arrays) - fixture.read
    for pattern, reason in ignored.items():
        keys = set(fnmatch.filter(left, pattern))
        left -= keys
        if keys:
            report.say(f"ignored: {len(keys)} arrays {pattern}: {reason}")
    for key in sorted(left):
        report.fail(key, "never compared")


def check_fixture(report: Report, path: Path, version) -> None:
    """Compare everything in one fixture."""
    fixture = Fixture(path)
    report.where = fixture.name
    report.say(f"\n{path.name}")
    is_agent = bool(fixture.under("params_init/"))
    try:
        (version.check_agent if is_agent else version.check_math)(report, fixture)
    except Mismatch as why:
        report.fail(path.name, str(why))
    check_coverage(report, fixture, version.IGNORED)


def fixture_paths(folder: Path) -> list[Path]:
    """The fixtures of a folder, without their companions."""
    every = {path.stem: path for path in sorted(folder.glob("*.npz"))}
    belongs = {stem + suffix for stem in every for suffix in COMPANIONS}
    return [path for stem, path in every.items() if stem not in belongs]


def main(argv: list[str], quiet: bool = False) -> int:
    """The command line; returns the exit status."""
    if not 1 <= len(argv) <= 2 or argv[0] not in VERSIONS:
        print(f"usage: python -m tests.parity {{{','.join(VERSIONS)}}} [FOLDER]", file=sys.stderr)
        return 2
    folder = Path(argv[1]) if len(argv) == 2 else Path(__file__).parent / "golden" / argv[0]
    paths = fixture_paths(folder)
    if not paths:
        print(f"no fixture (*.npz) in {folder}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # the networks are tiny, and sums come out the same everywhere
    report, version = Report(quiet), importlib.import_module(VERSIONS[argv[0]])
    for path in paths:
        check_fixture(report, path, version)
    report.say("")
    for kind, (error, name) in report.worst.items():
        report.say(f"largest {kind} error {error:.2e} (tolerance {TOLERANCE[kind]:.0e}): {name}")
    report.say(f"{len(paths)} fixtures, {report.lines} lines, {len(report.failed)} failed"
               + "".join(f"\n    {name}" for name in report.failed))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
