"""The replay buffer: windows are whole, uniform and honest, also after any number of crashes.

A row holds its own number and the life (process) that wrote it, so that a sampled window shows
where it comes from. The buffer is the same in every script (tests/sameness.py).
"""

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.devices import Feeder
from common.disk import UserError
from common.spaces import EnvSpec
from common.vector import EnvStep
from dreamer_v3 import ReplayBuffer

SPECS = {"both": EnvSpec((2, 2, 1), 3, 2, True), "image": EnvSpec((2, 2, 1), 0, 2, True),
         "vector": EnvSpec(None, 3, 2, False)}
VECTOR, CPU = SPECS["vector"], torch.device("cpu")
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # hundreds of files: no disk for them


def examples(number: int):
    return settings(derandomize=True, deadline=None, max_examples=number, database=None,
                    suppress_health_check=list(HealthCheck))


@contextmanager
def folder():
    """A new directory for each example; the buffer lives in files."""
    path = Path(tempfile.mkdtemp(dir=MEMORY))
    try:
        yield path / "replay"
    finally:
        shutil.rmtree(path)


def row(number: int, life: int, num_envs: int, spec: EnvSpec) -> tuple[EnvStep, np.ndarray]:
    """Row `number` of every environment, as written by the process `life`."""
    env = np.arange(num_envs)
    vector = np.stack([np.full(num_envs, number), env, np.full(num_envs, life)], 1)
    image = np.full((num_envs, 2, 2, 1), number % 256, np.uint8)
    action = np.stack([np.full(num_envs, number), 1000 * life + env], 1).astype(np.float32)
    step = EnvStep(image if spec.image_shape else None,
                   vector.astype(np.float32) if spec.vector_dim else None,
                   np.full(num_envs, number, np.float32), np.full(num_envs, number % 5 == 0),
                   np.full(num_envs, number % 5 == 4), np.full(num_envs, number % 10 == 9),
                   np.zeros(num_envs), np.zeros(num_envs, np.int64))
    return step, action


def fill(buffer, numbers, life: int, spec: EnvSpec) -> None:
    for number in numbers:
        buffer.add(*row(number, life, buffer.rings.num_envs, spec))


def check(batch, spec: EnvSpec, num_envs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All fields of all rows belong together; gives (T, B) row numbers and lives, and (B,) envs."""
    numbers = batch.action[..., 0].numpy().astype(int)
    lives, envs = np.divmod(batch.action[..., 1].numpy().astype(int), 1000)
    steps = numbers - numbers[0]
    assert (steps == np.arange(len(steps))[:, None]).all(), f"not contiguous: {numbers.T}"
    assert (envs == envs[0]).all() and set(envs[0]) <= set(range(num_envs))
    assert (batch.reward.numpy() == numbers).all()
    assert (batch.is_terminal.numpy() == (numbers % 10 == 9)).all()
    assert batch.is_first[0].all() and (batch.is_first[1:].numpy() == (numbers[1:] % 5 == 0)).all()
    assert (batch.image is None) == (spec.image_shape is None)
    assert (batch.vector is None) == (spec.vector_dim == 0)
    if batch.image is not None:
        assert batch.image.dtype == torch.uint8
        assert (batch.image.numpy() == (numbers % 256)[..., None, None, None]).all()
    if batch.vector is not None:
        assert (batch.vector.numpy() == np.stack([numbers, envs, lives], -1)).all()
    return numbers, lives, envs[0]


# ---- Sampling ------------------------------------------------------------------------------------

@examples(60)
@given(capacity=st.integers(1, 12), rows=st.integers(0, 40), num_envs=st.integers(1, 3),
       length=st.integers(1, 12), parts=st.sampled_from(list(SPECS)))
def test_windows_are_contiguous_and_never_cross_the_write_position(capacity, rows, num_envs, length,
                                                                   parts):
    spec = SPECS[parts]
    with folder() as path:
        buffer = ReplayBuffer(path, spec, capacity, num_envs, 0)
        fill(buffer, range(rows), 0, spec)
        oldest = max(0, rows - capacity)
        assert buffer.windows(length) == max(0, rows - oldest - length + 1)
        if buffer.windows(length):
            batch = buffer.sample(40, length, buffer.rng)
            assert batch.reward.shape == (length, 40)
            numbers, _, _ = check(batch, spec, num_envs)
            assert numbers.min() >= oldest and numbers.max() < rows


@pytest.mark.parametrize("rows", [7, 10, 26])
def test_uniform_over_all_starts(tmp_path, rows):
    """Chi-square with 13 (or 7) degrees of freedom at p = 0.001, with a fixed seed."""
    buffer = ReplayBuffer(tmp_path / "replay", VECTOR, 10, 2, 3)
    fill(buffer, range(rows), 0, VECTOR)
    draws, starts = 14_000, buffer.windows(4)
    numbers, _, envs = check(buffer.sample(draws, 4, buffer.rng), VECTOR, 2)
    oldest = max(0, rows - 10)
    counts = np.zeros((starts, 2))
    np.add.at(counts, (numbers[0] - oldest, envs), 1)
    assert counts.shape == (min(rows, 10) - 3, 2) and counts.all(), "a start is never drawn"
    expected = draws / counts.size
    critical = {8: 24.32, 14: 34.53}[counts.size]
    assert ((counts - expected) ** 2 / expected).sum() < critical


def test_the_running_episode_can_be_sampled(tmp_path):
    buffer = ReplayBuffer(tmp_path / "replay", VECTOR, 10, 1, 0)
    fill(buffer, range(3), 0, VECTOR)  # the first episode has five rows
    numbers, _, _ = check(buffer.sample(50, 3, buffer.rng), VECTOR, 1)
    assert (numbers[0] == 0).all()
    fill(buffer, range(3, 4), 0, VECTOR)
    numbers, _, _ = check(buffer.sample(50, 3, buffer.rng), VECTOR, 1)
    assert set(numbers[-1]) == {2, 3}, "the newest row is left out"


def test_sampling_changes_nothing_that_is_stored(tmp_path):
    """Only the first row of a window is forced to be first, and only in the copy."""
    buffer = ReplayBuffer(tmp_path / "replay", VECTOR, 20, 1, 0)
    fill(buffer, range(20), 0, VECTOR)
    for _ in range(20):
        batch = buffer.sample(8, 7, buffer.rng)
        check(batch, VECTOR, 1)
        for tensor in filter(torch.is_tensor, batch):
            tensor.zero_()
    stored = np.load(tmp_path / "replay" / "is_first.npy")
    assert (stored == (np.arange(20) % 5 == 0)).all()


def test_rows_are_as_they_were_given(tmp_path):
    """Types and shapes in the files, one ring per environment."""
    spec = SPECS["both"]
    buffer = ReplayBuffer(tmp_path / "replay", spec, 6, 2, 0)
    fill(buffer, range(4), 0, spec)
    buffer.rings.flush()
    shapes = {path.stem: (np.load(path).dtype.name, np.load(path).shape)
              for path in (tmp_path / "replay").glob("*.npy") if path.stem != "rows"}
    assert shapes == {"action": ("float32", (2, 6, 2)), "reward": ("float32", (2, 6)),
                      "is_first": ("bool", (2, 6)), "is_terminal": ("bool", (2, 6)),
                      "image": ("uint8", (2, 6, 2, 2, 1)), "vector": ("float32", (2, 6, 3))}
    check(buffer.sample(9, 3, buffer.rng), spec, 2)  # also after a flush


def test_another_generator_leaves_the_own_one_alone(tmp_path):
    """A video must not change what the agent learns from."""
    buffer = ReplayBuffer(tmp_path / "replay", VECTOR, 9, 1, 0)
    fill(buffer, range(9), 0, VECTOR)
    state = buffer.rng.bit_generator.state
    one, two = (buffer.sample(5, 2, np.random.default_rng(7)) for _ in range(2))
    assert buffer.rng.bit_generator.state == state and torch.equal(one.reward, two.reward)


@pytest.mark.parametrize("spec, num_envs", [
    (SPECS["both"], 1), (EnvSpec((2, 2, 3), 3, 2, True), 2)])
def test_other_settings_than_the_files_are_refused(tmp_path, spec, num_envs):
    ReplayBuffer(tmp_path / "replay", SPECS["both"], 9, 2, 0)
    with pytest.raises(UserError):
        ReplayBuffer(tmp_path / "replay", spec, 9, num_envs, 0)


# ---- Crash and resume ----------------------------------------------------------------------------

class Story:
    """A buffer through crashes, next to a record of what its rows ought to hold."""

    def __init__(self, path: Path, spec: EnvSpec, capacity: int, num_envs: int):
        self.make = lambda: ReplayBuffer(path, spec, capacity, num_envs, 0)
        self.spec, self.capacity, self.num_envs = spec, capacity, num_envs
        self.buffer, self.life, self.begun = self.make(), 0, 0
        self.written = []  # life of each row
        self.checkpoint()

    @property
    def count(self) -> int:
        return self.buffer.rings.count

    def add(self, number: int) -> None:
        fill(self.buffer, range(self.count, self.count + number), self.life, self.spec)
        self.written += [self.life] * number
        self.begun = max(self.begun, self.count)

    def checkpoint(self) -> None:
        self.buffer.rings.flush()
        self.saved = self.buffer.state_dict(), len(self.written)

    def crash(self, in_the_middle: bool) -> None:
        """Killed, maybe when only some of the fields of a row are written; then resumed."""
        if in_the_middle:
            files = self.buffer.rings.files
            self.buffer.rings.files = {name: files[name] for name in sorted(files)[:2]} | {"x": 0}
            with pytest.raises(KeyError):
                self.buffer.add(*row(self.count, 99, self.num_envs, self.spec))
            self.begun = max(self.begun, self.count + 1)
        self.buffer = self.make()
        self.buffer.load_state_dict(self.saved[0])
        self.written, self.life = self.written[:self.saved[1]], self.life + 1

    def check(self, length: int) -> None:
        buffer, count = self.buffer, len(self.written)
        oldest = max(0, self.begun - self.capacity)
        assert self.count == count
        assert buffer.windows(length) == max(0, count - oldest - length + 1), "rows are lost"
        if not buffer.windows(length):
            return
        sampled = buffer.sample(30, length, buffer.rng)
        numbers, lives, _ = check(sampled, self.spec, self.num_envs)
        assert oldest <= numbers.min() and numbers.max() < count
        assert (lives == np.array(self.written)[numbers]).all(), "a row of a time that was undone"


EVENTS = st.one_of(st.tuples(st.just("add"), st.integers(1, 9)), st.just(("checkpoint",)),
                   st.tuples(st.just("crash"), st.booleans()))


@examples(120)
@given(capacity=st.integers(1, 8), num_envs=st.integers(1, 2), length=st.integers(1, 4),
       events=st.lists(EVENTS, min_size=3, max_size=14), parts=st.sampled_from(list(SPECS)))
def test_any_sequence_of_crashes_and_resumes(capacity, num_envs, length, events, parts):
    with folder() as path:
        story = Story(path, SPECS[parts], capacity, num_envs)
        for name, *arguments in events:
            getattr(story, name)(*arguments)
            story.check(length)


def test_a_full_ring_gives_up_only_what_was_overwritten(tmp_path):
    """capacity 6: rows 4..9 at the checkpoint; rows 10, 11 of the killed process replaced 4, 5."""
    story = Story(tmp_path / "replay", VECTOR, 6, 1)
    story.add(10)
    story.checkpoint()
    story.add(2)
    story.crash(in_the_middle=False)
    assert (story.buffer.rings.oldest, story.count) == (6, 10)
    numbers, _, _ = check(story.buffer.sample(200, 2, story.buffer.rng), VECTOR, 1)
    assert set(numbers[0]) == {6, 7, 8}
    story.add(2)
    assert (story.buffer.rings.oldest, story.count) == (6, 12), "whole again"
    story.check(2)


def test_files_older_than_the_checkpoint_are_refused(tmp_path):
    buffer = ReplayBuffer(tmp_path / "replay", VECTOR, 6, 1, 0)
    fill(buffer, range(3), 0, VECTOR)
    state = buffer.state_dict() | {"count": 5}
    with pytest.raises(UserError, match="older than the checkpoint"):
        buffer.load_state_dict(state)


def test_reopened_without_a_checkpoint(tmp_path):
    """As --dream does: all rows that were completed."""
    fill(ReplayBuffer(tmp_path / "replay", VECTOR, 6, 1, 0), range(9), 0, VECTOR)
    again = ReplayBuffer(tmp_path / "replay", VECTOR, 6, 1, 0)
    assert (again.rings.oldest, again.rings.count) == (3, 9)
    check(again.sample(20, 4, again.rng), VECTOR, 1)


# ---- Feeder --------------------------------------------------------------------------------------

def turns(feeder: Feeder, schedule: list[int]) -> list[np.ndarray]:
    """The main loop: add a row, make some updates, each of which prepares the next; the batches."""
    drawn = []
    for updates in schedule:
        fill(feeder.replay, [feeder.replay.rings.count], 0, VECTOR)
        for _ in range(updates):
            drawn.append(feeder.next().action.numpy().copy())
            feeder.prepare()
    return drawn


@examples(40)
@given(before=st.lists(st.integers(0, 2), min_size=1, max_size=6),
       after=st.lists(st.integers(0, 2), min_size=1, max_size=6), capacity=st.integers(4, 12))
def test_a_resume_on_a_cpu_draws_the_same_batches(before, after, capacity):
    """Stopped after a save and resumed, or not stopped: the same sequence of batches."""
    with folder() as path:
        def make(name):
            return Feeder(ReplayBuffer(path.parent / name, VECTOR, capacity, 1, 5), CPU, 3, 2)

        feeder = make("one")
        fill(feeder.replay, range(4), 0, VECTOR)
        turns(feeder, before)
        feeder.replay.rings.flush()
        state = feeder.replay.state_dict()
        shutil.copytree(path.parent / "one", path.parent / "two")
        on = turns(feeder, after)
        resumed = make("two")
        resumed.replay.load_state_dict(state)
        again = turns(resumed, after)
        assert len(on) == len(again) == sum(after)
        assert all((a == b).all() for a, b in zip(on, again))
