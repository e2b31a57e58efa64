"""Animations, curves, videos of episodes, symlog."""

import os
import resource
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from common import video
from common.maths import symexp, symlog


@contextmanager
def file_size_limit(nbytes: int):
    """A full disk, nearly: a file that grows beyond it gets an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def moving_square(T=6, C=3) -> np.ndarray:
    frames = np.zeros((T, 16, 20, C), np.uint8)
    for t in range(T):
        frames[t, 4:8, 2 * t:2 * t + 4] = 200
    return frames


# ---- Animations ----------------------------------------------------------------------------------

@pytest.mark.parametrize("fps, delay", [(15, 70), (20, 50), (1000, 20)])
def test_gif(tmp_path, fps, delay):
    (tmp_path / "a.gif").write_bytes(video.gif_bytes(moving_square(), fps))
    image = Image.open(tmp_path / "a.gif")
    assert (image.n_frames, image.info["loop"], image.info["duration"]) == (6, 0, delay)
    image.seek(4)
    shown = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(shown - moving_square()[4]).max() <= 8


def test_strip(tmp_path):
    videos = {"truth": moving_square(), "dream": moving_square(C=1)}
    video.save_strip(tmp_path / "a.png", videos, context=3, every=2, scale=3)  # frames 0, 2, 4
    strip = np.asarray(Image.open(tmp_path / "a.png"))
    rows, columns = np.split(strip, 2), 3
    assert strip.shape == (2 * (26 + 48 + 8), columns * (60 + 8), 3)
    borders = [tile[-1, 0].tolist() for row in rows for tile in np.split(row, columns, axis=1)]
    assert borders == 3 * [[*video.OTHER]] + 2 * [[*video.SEEN]] + [[*video.IMAGINED]]
    assert (rows[0][26 + 4:-4, -64:-4] == video.enlarge(moving_square()[4], 3)).all()
    titles = [tile[:26] for tile in np.split(rows[1], columns, axis=1)]
    assert (titles[0] == titles[1]).all() and (titles[1] != titles[2]).any()  # "dream +2"


def test_side_by_side_marks_the_imagination():
    panels = {"truth": moving_square(), "dream": moving_square(C=1), "blind": moving_square(C=6)}
    pages = video.side_by_side(panels, context=4, scale=2)
    assert pages.shape == (6, 26 + 32 + 8, 3 * (40 + 8), 3) and pages.dtype == np.uint8
    corners = pages[:, -1, -1].tolist()
    assert corners == [list(video.SEEN)] * 4 + [list(video.IMAGINED)] * 2
    assert (pages[:, -1, 0] == video.OTHER).all()
    picture = pages[5, 26 + 4:-4, 4:44]
    assert (picture == video.enlarge(moving_square()[5], 2)).all()


def test_side_by_side_enlarges_to_about_200_pixels():
    for size, shown in [(64, 192), (96, 192), (128, 256), (192, 192), (512, 512)]:
        pages = video.side_by_side({"a": np.zeros((1, size, size, 3), np.uint8)}, context=1)
        assert pages.shape == (1, 26 + shown + 8, shown + 8, 3)


# ---- Curves --------------------------------------------------------------------------------------

def shows(picture, colour) -> bool:
    return (picture == colour).all(-1).any()


def waves(T=20, V=3) -> np.ndarray:
    return np.sin(np.arange(T)[:, None] * 0.3 + np.arange(V)) * 10.0**np.arange(V)


def test_curves_grow_and_stay():
    truth = waves()
    films = video.curves(np.stack([truth, truth + 0.1, -truth]).astype(np.float32), size=120)
    assert films.shape == (3, 20, 120, 120, 3) and films.dtype == np.uint8
    for t in range(20):
        now = round((t + 0.5) / 20 * 120)
        assert not shows(films[0, t, :, now + 3:], video.LINES[0])  # nothing of the future
        assert all(shows(films[r, t, :, now - 3:now + 3], video.LINES[0]) for r in range(3))
        past = films[:, t - 1:t + 1, :, :max(0, now - 10)]
        assert (past == past[:, :1]).all()


def test_curves_each_in_a_lane_of_the_truths_scale():
    films = video.curves(np.stack([waves(), waves() * 100]), size=120)
    for d in range(3):
        lane = films[:, -1, 40 * d:40 * (d + 1)]
        assert all(shows(picture, video.LINES[d]) for picture in lane)
        assert not any(shows(lane, colour) for colour in video.LINES if colour != video.LINES[d])
        rows = np.flatnonzero((lane[0] == video.LINES[d]).all(-1).any(-1))
        assert 2 <= rows.min() < 10 and 30 < rows.max() < 38  # most of the lane, but not its edge


def test_curves_have_the_truth_beneath():
    films = video.curves(np.stack([waves(V=1), waves(V=1), -waves(V=1)]), size=120)
    assert (films[1] == films[0]).mean() > 0.98  # where they agree, it is hidden
    assert shows(films[2, -1], video.GREY) and not shows(films[0, -1], video.GREY)


@pytest.mark.filterwarnings("error")
def test_curves_of_awkward_values():
    flat = video.curves(np.full((2, 4, 1), 5.0) + np.array([0, 1e-7]).reshape(2, 1, 1), size=40)
    assert (flat[0] == flat[1]).all() and shows(flat[0, 0], video.LINES[0])
    broken = np.tile(waves(V=1), (2, 1, 1))
    broken[1, 10:] = np.nan  # such as a model that has gone wrong imagines
    assert shows(video.curves(broken, size=120)[1, -1, -10:], video.LINES[0])
    huge = np.full((2, 5, 9), 3e38, np.float32)  # the ninth dimension is not drawn
    huge[:, 2], huge[1, 3], huge[1, 4] = -3e38, np.inf, -np.inf
    assert video.curves(huge, size=40).shape == (2, 5, 40, 40, 3)
    assert video.curves(np.zeros((1, 1, 1)), size=40).shape == (1, 1, 40, 40, 3)


# ---- Episode videos ------------------------------------------------------------------------------

def film(path) -> tuple[int, tuple]:
    opened = cv2.VideoCapture(str(path))
    return int(opened.get(cv2.CAP_PROP_FRAME_COUNT)), opened.read()[1].shape


def record(folder, lengths, shape=(16, 20, 3)) -> int:
    """Play episodes of these lengths; returns how often a frame was asked for."""
    videos, asked = video.EpisodeVideos(folder, fps=15), []

    def render():
        asked.append(1)
        return np.full(shape, 10 * len(asked) % 256, np.uint8)

    for length in lengths:
        for t in range(length):
            videos.add(render, is_first=np.bool_(t == 0))
    videos.close()
    videos.close()
    return len(asked)


def test_episodes_are_recorded_at_cubes_and_then_at_thousands(tmp_path):
    videos = video.EpisodeVideos(tmp_path)
    assert not videos.wanted()
    found = []
    for _ in range(3001):
        videos.add(lambda: None, is_first=True)  # None: the environment is being rebuilt
        found += [videos.episode] if videos.wanted() else []
    assert found == [0, 1, 8, 27, 64, 125, 216, 343, 512, 729, 1000, 2000, 3000]
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("C", [1, 3])
def test_episode_videos(tmp_path, C):
    folder = tmp_path / "run" / "videos"
    assert record(folder, [3, 4, 5, 5, 5, 5, 5, 5, 6, 5], shape=(16, 20, C)) == 3 + 4 + 6
    assert {path.name: film(path) for path in folder.iterdir()} == {
        "episode-000000.mp4": (3, (16, 20, 3)), "episode-000001.mp4": (4, (16, 20, 3)),
        "episode-000008.mp4": (6, (16, 20, 3))}


def test_episode_video_shows_the_frames_in_their_colours(tmp_path):
    videos = video.EpisodeVideos(tmp_path)
    for t in range(5):
        videos.add(lambda: np.tile(np.uint8([200, 100, 20]), (64, 64, 1)), is_first=t == 0)
    videos.close()
    shown = cv2.VideoCapture(str(tmp_path / "episode-000000.mp4")).read()[1][32, 32, ::-1]
    assert np.abs(shown.astype(int) - [200, 100, 20]).max() < 10


def test_resumed_run_keeps_the_videos_that_are_there(tmp_path):
    for length in (3, 4, 5):
        record(tmp_path, [length])
    (tmp_path / "recording.mp4").write_bytes(b"what a killed run left")
    record(tmp_path, [6])
    assert {path.name: film(path)[0] for path in tmp_path.iterdir()} == {
        "episode-000000.mp4": 3, "episode-000000-1.mp4": 4,
        "episode-000000-2.mp4": 5, "episode-000000-3.mp4": 6}


def test_episode_video_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="cannot write .*recording.mp4"):
        record(tmp_path, [2], shape=(1, 1, 3))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory|File exists"):
        record(tmp_path / "file", [2])


def test_full_disk_under_an_episode_video(tmp_path):
    videos, rng = video.EpisodeVideos(tmp_path), np.random.default_rng(0)
    with file_size_limit(5000), pytest.raises(OSError, match="is the disk full?"):
        for t in range(20):
            videos.add(lambda: rng.integers(256, size=(64, 64, 3), dtype=np.uint8), t == 0)
        videos.close()
    assert os.listdir(tmp_path) == ["recording.mp4"]


# ---- symlog --------------------------------------------------------------------------------------

def value_and_derivative(function, x):
    leaf = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    y = function(leaf)
    return y.detach().numpy(), torch.autograd.grad(y.sum(), leaf)[0].numpy()


def test_symlog_is_exact_and_symexp_its_inverse():
    x = np.array([-1e12, -100, -1, -1e-8, 1e-20, 1e-4, 0.5, 7, 1e9])
    y, slope = value_and_derivative(symlog, x)
    np.testing.assert_allclose(y, np.sign(x) * np.log1p(np.abs(x)), rtol=1e-6)
    np.testing.assert_allclose(slope, 1 / (1 + np.abs(x)), rtol=1e-6)
    np.testing.assert_allclose(value_and_derivative(symexp, y)[0], x, rtol=1e-5)
    assert symlog(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert symexp(torch.ones(2, dtype=torch.float16)).dtype == torch.float32


@pytest.mark.parametrize("name, function", [("symlog", symlog), ("symexp", symexp)])
def test_symlog_gives_the_authors_numbers(name, function):
    """Also at x = 0, where their derivative is 0. They use log(1 + x): 6e-8 off near 0."""
    files = sorted((ROOT / "tests" / "golden").glob("**/v3_math.npz"))
    files += sorted((ROOT.parent / "shared" / "golden").glob("**/v3_math.npz"))
    if not files:
        pytest.skip("v3_math.npz is not there")
    golden = np.load(files[0])
    y, slope = value_and_derivative(function, golden[f"{name}/x"])
    np.testing.assert_allclose(y, golden[f"{name}/y"], rtol=2e-5, atol=6e-8)
    np.testing.assert_allclose(slope, golden[f"{name}/dydx"], rtol=2e-5)
