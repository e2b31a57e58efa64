"""The replay buffer: windows are whole, uniform and honest, also after any number of crashes.

A row holds its own number and the life (process) that wrote it, so that a sampled window shows
where it comes from.
"""

import shutil
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import runs
from common.envs import EnvSpec, EnvStep

SPECS = {"both": EnvSpec((2, 2, 1), 3, 2, True), "image": EnvSpec((2, 2, 1), 0, 2, True),
         "vector": EnvSpec(None, 3, 2, False)}
CPU = torch.device("cpu")
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # hundreds of small files: no disk for them


def examples(number: int):
    return settings(derandomize=True, deadline=None, max_examples=number, database=None,
                    suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=SCRIPTS)
def module(request):
    return __import__(request.param)


@contextmanager
def folder():
    """A new directory for each example; files, for the buffer is memory-mapped."""
    path = Path(tempfile.mkdtemp(dir=MEMORY))
    try:
        yield path / "replay"
    finally:
        shutil.rmtree(path)


def row(number: int, life: int, num_envs: int, spec: EnvSpec) -> tuple[EnvStep, np.ndarray]:
    """Row `number` of every environment, as written by the process `life`."""
    env = np.arange(num_envs)
    vector = np.stack([np.full(num_envs, number), env, np.full(num_envs, life)], 1).astype(np.float32)
    image = np.full((num_envs, 2, 2, 1), number % 256, np.uint8)
    action = np.stack([np.full(num_envs, number), 1000 * life + env], 1).astype(np.float32)
    step = EnvStep(image if spec.image_shape else None, vector if spec.vector_dim else None,
                   np.full(num_envs, number, np.float32), np.full(num_envs, number % 5 == 0),
                   np.full(num_envs, number % 5 == 4), np.full(num_envs, number % 10 == 9),
                   np.zeros(num_envs), np.zeros(num_envs, np.int64))
    return step, action


def fill(buffer, numbers, life: int, spec: EnvSpec) -> None:
    for number in numbers:
        buffer.add(*row(number, life, buffer.num_envs, spec))


def check(batch, spec: EnvSpec, num_envs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All fields of all rows belong together; returns (T, B) row numbers and lives, and (B,) envs."""
    numbers = batch.action[..., 0].numpy().astype(int)
    lives, envs = (batch.action[..., 1].numpy().astype(int) // 1000, batch.action[..., 1].numpy() % 1000)
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
def test_windows_are_contiguous_and_never_cross_the_write_position(module, capacity, rows, num_envs, length,
                                                                   parts):
    spec = SPECS[parts]
    with folder() as path:
        buffer = module.ReplayBuffer(path, spec, capacity, num_envs, 0)
        fill(buffer, range(rows), 0, spec)
        oldest = max(0, rows - capacity)
        assert buffer.windows(length) == max(0, rows - oldest - length + 1)
        if buffer.windows(length):
            batch = buffer.sample(40, length, buffer.rng)
            assert batch.reward.shape == (length, 40)
            numbers, _, _ = check(batch, spec, num_envs)
            assert numbers.min() >= oldest and numbers.max() < rows


@pytest.mark.parametrize("rows", [7, 10, 26])
def test_uniform_over_all_starts(module, tmp_path, rows):
    """Chi-square with 13 (or 7) degrees of freedom at p = 0.001, with a fixed seed."""
    buffer = module.ReplayBuffer(tmp_path / "replay", SPECS["vector"], 10, 2, 3)
    fill(buffer, range(rows), 0, SPECS["vector"])
    draws, starts = 14_000, buffer.windows(4)
    numbers, _, envs = check(buffer.sample(draws, 4, buffer.rng), SPECS["vector"], 2)
    oldest = max(0, rows - 10)
    counts = np.zeros((starts, 2))
    np.add.at(counts, (numbers[0] - oldest, envs.astype(int)), 1)
    assert counts.shape == (min(rows, 10) - 3, 2) and counts.all(), "a start is never drawn"
    expected = draws / counts.size
    critical = {8: 24.32, 14: 34.53}[counts.size]
    assert ((counts - expected) ** 2 / expected).sum() < critical


def test_the_running_episode_can_be_sampled(module, tmp_path):
    buffer = module.ReplayBuffer(tmp_path / "replay", SPECS["vector"], 10, 1, 0)
    fill(buffer, range(3), 0, SPECS["vector"])  # the first episode has five rows
    numbers, _, _ = check(buffer.sample(50, 3, buffer.rng), SPECS["vector"], 1)
    assert (numbers[0] == 0).all()
    fill(buffer, range(3, 4), 0, SPECS["vector"])
    numbers, _, _ = check(buffer.sample(50, 3, buffer.rng), SPECS["vector"], 1)
    assert set(numbers[-1]) == {2, 3}, "the newest row is left out"


def test_only_the_first_row_is_forced_to_be_first(module, tmp_path):
    buffer = module.ReplayBuffer(tmp_path / "replay", SPECS["vector"], 20, 1, 0)
    fill(buffer, range(20), 0, SPECS["vector"])
    before = np.array(buffer.rings["is_first"])
    for _ in range(20):
        check(buffer.sample(8, 7, buffer.rng), SPECS["vector"], 1)
    assert (buffer.rings["is_first"] == before).all(), "sampling changed what is stored"
    first = buffer.sample(1, 7, buffer.rng)
    first.reward.zero_()
    first.action.zero_()
    check(buffer.sample(100, 7, buffer.rng), SPECS["vector"], 1)


def test_rows_are_as_they_were_given(module, tmp_path):
    """Types and shapes in the files, one ring per environment."""
    spec = SPECS["both"]
    buffer = module.ReplayBuffer(tmp_path / "replay", spec, 6, 2, 0)
    fill(buffer, range(4), 0, spec)
    buffer.flush()
    shapes = {path.stem: (np.load(path).dtype.name, np.load(path).shape)
              for path in (tmp_path / "replay").glob("*.npy") if path.stem != "rows"}
    assert shapes == {"action": ("float32", (2, 6, 2)), "reward": ("float32", (2, 6)),
                      "is_first": ("bool", (2, 6)), "is_terminal": ("bool", (2, 6)),
                      "image": ("uint8", (2, 6, 2, 2, 1)), "vector": ("float32", (2, 6, 3))}
    check(buffer.sample(9, 3, buffer.rng), spec, 2)  # the pages come back after flush


def test_another_generator_leaves_the_own_one_alone(module, tmp_path):
    """A video must not change what the agent learns from."""
    buffer = module.ReplayBuffer(tmp_path / "replay", SPECS["vector"], 9, 1, 0)
    fill(buffer, range(9), 0, SPECS["vector"])
    state = buffer.rng.bit_generator.state
    one, two = (buffer.sample(5, 2, np.random.default_rng(7)) for _ in range(2))
    assert buffer.rng.bit_generator.state == state and torch.equal(one.reward, two.reward)


def test_other_settings_than_the_files_are_refused(module, tmp_path):
    module.ReplayBuffer(tmp_path / "replay", SPECS["both"], 9, 2, 0)
    for spec, capacity, num_envs in ((SPECS["both"], 8, 2), (SPECS["both"], 9, 1),
                                     (EnvSpec((2, 2, 3), 3, 2, True), 9, 2)):
        with pytest.raises(runs.UserError, match="other settings"):
            module.ReplayBuffer(tmp_path / "replay", spec, capacity, num_envs, 0)


# ---- Crash and resume ----------------------------------------------------------------------------

class Story:
    """A buffer through crashes, next to a record of what its rows ought to hold."""

    def __init__(self, module, path: Path, spec: EnvSpec, capacity: int, num_envs: int):
        self.make = lambda: module.ReplayBuffer(path, spec, capacity, num_envs, 0)
        self.spec, self.capacity, self.num_envs = spec, capacity, num_envs
        self.buffer, self.written, self.life, self.begun = self.make(), [], 0, 0  # written: life of each row
        self.saved = None
        self.checkpoint()

    def add(self, number: int) -> None:
        fill(self.buffer, range(self.buffer.count, self.buffer.count + number), self.life, self.spec)
        self.written += [self.life] * number
        self.begun = max(self.begun, self.buffer.count)

    def checkpoint(self) -> None:
        self.buffer.flush()
        self.saved = self.buffer.state_dict(), len(self.written)

    def crash(self, in_the_middle: bool) -> None:
        """Killed, maybe when only some of the fields of a row are written; then resumed."""
        if in_the_middle:
            names = sorted(self.buffer.rings)
            self.buffer.rings = {name: self.buffer.rings[name] for name in names[:2]} | {"gone": None}
            with pytest.raises(KeyError):
                self.buffer.add(*row(self.buffer.count, 99, self.num_envs, self.spec))
            self.begun = max(self.begun, self.buffer.count + 1)
        self.buffer = self.make()
        self.buffer.load_state_dict(self.saved[0])
        self.written, self.life = self.written[:self.saved[1]], self.life + 1

    def check(self, length: int) -> None:
        buffer, count = self.buffer, len(self.written)
        oldest = max(0, self.begun - self.capacity)
        assert buffer.count == count
        assert buffer.windows(length) == max(0, count - oldest - length + 1), "rows are lost for nothing"
        if not buffer.windows(length):
            return
        numbers, lives, _ = check(buffer.sample(30, length, buffer.rng), self.spec, self.num_envs)
        assert oldest <= numbers.min() and numbers.max() < count
        assert (lives == np.array(self.written)[numbers]).all(), "a row of a time that was undone"


EVENTS = st.one_of(st.tuples(st.just("add"), st.integers(1, 9)), st.tuples(st.just("checkpoint"), st.none()),
                   st.tuples(st.just("crash"), st.booleans()))


@examples(120)
@given(capacity=st.integers(1, 8), num_envs=st.integers(1, 2), length=st.integers(1, 4),
       events=st.lists(EVENTS, min_size=3, max_size=14), parts=st.sampled_from(list(SPECS)))
def test_any_sequence_of_crashes_and_resumes(module, capacity, num_envs, length, events, parts):
    with folder() as path:
        story = Story(module, path, SPECS[parts], capacity, num_envs)
        for name, argument in events:
            getattr(story, name)(*[] if argument is None else [argument])
            story.check(length)


def test_a_full_ring_gives_up_only_what_was_overwritten(module, tmp_path):
    """capacity 6: rows 4..9 at the checkpoint; rows 10, 11 of the killed process replaced 4, 5."""
    story = Story(module, tmp_path / "replay", SPECS["vector"], 6, 1)
    story.add(10)
    story.checkpoint()
    story.add(2)
    story.crash(in_the_middle=False)
    assert (story.buffer.oldest, story.buffer.count) == (6, 10)
    numbers, _, _ = check(story.buffer.sample(200, 2, story.buffer.rng), SPECS["vector"], 1)
    assert set(numbers[0]) == {6, 7, 8}
    story.add(2)
    assert (story.buffer.oldest, story.buffer.count) == (6, 12), "whole again"
    story.check(2)


def test_files_older_than_the_checkpoint_are_refused(module, tmp_path):
    buffer = module.ReplayBuffer(tmp_path / "replay", SPECS["vector"], 6, 1, 0)
    fill(buffer, range(3), 0, SPECS["vector"])
    state = buffer.state_dict() | {"count": 5}
    with pytest.raises(runs.UserError, match="older than the checkpoint"):
        buffer.load_state_dict(state)


def test_reopened_without_a_checkpoint(module, tmp_path):
    """--offline: all rows that were completed."""
    buffer = module.ReplayBuffer(tmp_path / "replay", SPECS["vector"], 6, 1, 0)
    fill(buffer, range(9), 0, SPECS["vector"])
    again = module.ReplayBuffer(tmp_path / "replay", SPECS["vector"], 6, 1, 0)
    assert (again.oldest, again.count) == (3, 9)
    check(again.sample(20, 4, again.rng), SPECS["vector"], 1)


# ---- Feeder --------------------------------------------------------------------------------------

def turns(feeder, spec: EnvSpec, schedule: list[int], life: int = 0) -> list[np.ndarray]:
    """The main loop: add a row, make some updates, each of which prepares the next; the batches."""
    drawn = []
    for updates in schedule:
        fill(feeder.replay, [feeder.replay.count], life, spec)
        for _ in range(updates):
            drawn.append(feeder.next().action.numpy().copy())
            feeder.prepare()
    return drawn


@examples(40)
@given(before=st.lists(st.integers(0, 2), min_size=1, max_size=6),
       after=st.lists(st.integers(0, 2), min_size=1, max_size=6), capacity=st.integers(4, 12))
def test_a_resume_draws_the_same_batches(module, before, after, capacity):
    """Stopped after a save and resumed, or not stopped: the same sequence of batches."""
    spec = SPECS["vector"]
    with folder() as path:
        def make(name):
            replay = module.ReplayBuffer(path.parent / name, spec, capacity, 1, 5)
            return module.Feeder(replay, CPU, 3, 2)

        feeder = make("one")
        fill(feeder.replay, range(4), 0, spec)
        turns(feeder, spec, before)
        feeder.replay.flush()
        state = feeder.replay.state_dict()
        shutil.copytree(path.parent / "one", path.parent / "two")
        on = turns(feeder, spec, after)
        resumed = make("two")
        resumed.replay.load_state_dict(state)
        again = turns(resumed, spec, after)
        assert len(on) == len(again) == sum(after)
        assert all((a == b).all() for a, b in zip(on, again))


def test_feeder_hands_out_what_it_prepared(module, tmp_path):
    """On a GPU the next batch waits; on a CPU nothing does, so that a resume is exact."""
    spec = SPECS["both"]
    feeder = module.Feeder(module.ReplayBuffer(tmp_path / "replay", spec, 9, 2, 5), CPU, 3, 2)
    fill(feeder.replay, range(9), 0, spec)
    first = feeder.next()
    feeder.prepare()
    assert feeder.waiting is None
    feeder.waiting = waiting = feeder.draw()
    assert feeder.next() is waiting and feeder.waiting is None
    assert not torch.equal(first.action, waiting.action)
    check(waiting, spec, 2)


def test_a_prepared_batch_is_used_after_its_copy(module, tmp_path, monkeypatch):
    """With the GPU's streams simulated: the update waits for the copy and claims every tensor."""
    spec, events = SPECS["vector"], []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(
        events.append(("copy in", stream))))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(
        name="update", wait_stream=lambda stream: events.append(("update waits for", stream))))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: events.append(
        (tensor.data_ptr(), stream.name)))
    feeder = module.Feeder(module.ReplayBuffer(tmp_path / "replay", spec, 9, 2, 5), CPU, 3, 2)
    fill(feeder.replay, range(9), 0, spec)
    feeder.stream = "side"
    feeder.prepare()
    assert feeder.waiting is not None and events == [("copy in", "side")]
    waiting = feeder.waiting
    assert feeder.next() is waiting and feeder.waiting is None
    assert events[1] == ("update waits for", "side")
    assert events[2:] == [(x.data_ptr(), "update") for x in waiting if x is not None]
