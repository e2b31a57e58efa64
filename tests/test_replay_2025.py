"""The replay of the revision: newest windows first, latents beside the rows. [R-15] [R-16]"""

import numpy as np
import pytest
import torch

import dreamer_v3_2025 as d
from common.spaces import EnvSpec
from common.vector import EnvStep

SPEC, LATENTS, T, B = EnvSpec(None, 1, 2, True), (2, 4), 3, 2


def made(folder, capacity=20, num_envs=2):
    return d.ReplayBuffer(folder, SPEC, capacity, num_envs, 0, LATENTS)


def add(replay, number):
    """A row per environment that says which it is: 1000 * environment + number."""
    rows = replay.rings.num_envs
    names, no = 1000.0 * np.arange(rows) + number, np.zeros(rows, bool)
    obs = EnvStep(None, names[:, None].astype(np.float32), names.astype(np.float32), no, no, no,
                  names, names)
    deter = torch.full((rows, LATENTS[0]), -1.0)
    replay.add(obs, np.zeros((rows, 2), np.float32), d.State(deter, torch.zeros(rows, 4), None))


@pytest.mark.parametrize("capacity", [200, 12])
def test_new_windows_are_used_once_and_in_order(tmp_path, capacity):
    """Each window of T + 1 rows of each environment, unless its rows are gone already."""
    replay, starts = made(tmp_path, capacity), []
    for number in range(60):
        add(replay, number)
        if number >= 8:
            batch = replay.sample(B, T, replay.rng)
            env, start = batch.place.numpy()
            assert np.array_equal(batch.vector[0, :, 0], 1000 * env + start)  # the rows it names
            before = replay.online
            starts += [(e, s - 1) for e, s in zip(env, start)][:before - len(starts)]
    expected = [(env, window * (T + 1)) for window in range(15) for env in range(2)]
    assert starts == expected[:len(starts)] and len(starts) >= 28


def test_latents_are_the_last_ones_and_a_roll_back_undoes_later_ones(tmp_path):
    """Beside a model that keeps a copy of everything at the checkpoint."""
    rng, replay = np.random.default_rng(1), made(tmp_path)
    latest, saved, state = {}, None, None
    count, updates = 0, 0
    for turn in range(400):
        if turn == 0 or (count < 18 and rng.random() < 0.3):
            add(replay, count)
            latest |= {(env, count): -1.0 for env in range(2)}
            count += 1
        elif rng.random() < 0.1:
            state, saved = replay.state_dict(), dict(latest)
        elif state and rng.random() < 0.1:  # a KILL, and a resume from the files
            replay.rings.flush()
            replay = made(tmp_path)
            replay.load_state_dict(state)
            latest, count = dict(saved), state["count"]
        elif replay.windows(T):
            batch, updates = replay.sample(B, T, replay.rng), updates + 1
            context = [latest[env, start - 1] for env, start in batch.place.T.tolist()]
            assert batch.deter[0, :, 0].tolist() == context
            replay.refresh(batch, torch.full((T, B, LATENTS[0]), float(updates)),
                           torch.zeros(T, B, 4))
            latest |= {(env, start + t): float(updates)
                       for env, start in batch.place.T.tolist() for t in range(T)}
    assert updates > 100 and saved
