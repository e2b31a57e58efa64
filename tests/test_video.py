"""Animations, strips and plots; symlog."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from common import video
from common.maths import symexp, symlog


def moving_square(T=6, C=3) -> np.ndarray:
    frames = np.zeros((T, 16, 20, C), np.uint8)
    for t in range(T):
        frames[t, 4:8, 2 * t:2 * t + 4] = 200
    return frames


# ---- Pictures ------------------------------------------------------------------------------------

def test_gif():
    image = Image.open(io.BytesIO(video.gif_bytes(moving_square())))
    assert (image.n_frames, image.info["loop"]) == (6, 0) and image.info["duration"] in (60, 70)
    image.seek(4)
    shown = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(shown - moving_square()[4]).max() <= 8


def test_side_by_side_marks_the_imagination():
    videos = {"truth": moving_square(), "dream": moving_square(C=1), "blind": moving_square(C=6)}
    pages = video.draw(videos, 4)[0]  # enlarged ten times
    assert pages.shape == (6, 22 + 160 + 8, 3 * (200 + 8), 3) and pages.dtype == np.uint8
    assert pages[:, -1, -1].tolist() == [[*video.SEEN]] * 4 + [[*video.IMAGINED]] * 2
    assert (pages[:, -1, 0] == video.OTHER).all()
    large = moving_square()[5].repeat(10, 0).repeat(10, 1)
    for panel in np.split(pages[5], 3, axis=1):
        assert (panel[26:-4, 4:-4] == large).all()


@pytest.mark.parametrize("size, shown", [(64, 192), (96, 192), (128, 256), (192, 192), (512, 512)])
def test_pictures_are_enlarged_to_about_200_pixels(size, shown):
    pages = video.draw({"a": np.zeros((1, size, size, 3), np.uint8)}, 1)[0]
    assert pages.shape == (1, 22 + shown + 8, shown + 8, 3)


def test_strip():
    picture = video.draw({"truth": moving_square(), "dream": moving_square(C=1)}, 3, every=2)[1]
    rows = np.split(picture, 2)  # frames 0, 2, 4 of each
    tiles = [np.split(row, 3, axis=1) for row in rows]
    assert [tile[-1, 0].tolist() for tile in tiles[0]] == 3 * [[*video.OTHER]]
    assert [tile[-1, 0].tolist() for tile in tiles[1]] == 2 * [[*video.SEEN]] + [[*video.IMAGINED]]
    assert (tiles[0][2][26:-4, 4:-4] == moving_square()[4].repeat(10, 0).repeat(10, 1)).all()
    titles = [tile[:22] for tile in tiles[1]]
    assert (titles[0] == titles[1]).all() and (titles[1] != titles[2]).any()  # "dream +2"


def waves(T=20, V=3) -> np.ndarray:
    t, v = np.arange(T)[:, None], np.arange(V)
    return (np.sin(t * 0.5 + v) * 10.0**v).astype(np.float32)


def drawn(picture: np.ndarray, colour, area=np.s_[30:-30]) -> np.ndarray:
    """Where a colour, smoothed at its edges, was drawn below the legend."""
    return (np.abs(picture[area].astype(int) - colour) < 30).all(-1)


def test_a_plot_of_vectors_shows_the_truth_and_the_dream():
    """Each number fills its lane; the dream lies on the truth where they agree."""
    same = video.draw({"truth": waves(), "dream": waves()}, 5)[0]
    other = video.draw({"truth": waves(), "dream": waves()[::-1]}, 5)[1]
    assert same.dtype == np.uint8 and same.shape == (1, *other.shape)
    assert (same[0] != video.draw({"truth": waves(), "dream": waves()}, 9)[1]).any()
    assert (same[0] != video.draw({"truth": waves(), "dream": waves()}, 5, ["x", "y", "z"])[1]).any()
    hidden, seen = drawn(same[0], video.TRUTH).sum(), drawn(other, video.TRUTH).sum()
    assert seen > 500 > 4 * hidden
    for lane in np.array_split(drawn(other, video.IMAGINED), 3):
        rows = np.flatnonzero(lane.any(-1))
        assert np.ptp(rows) > len(lane) / 2


@pytest.mark.filterwarnings("error")
def test_plots_of_awkward_values():
    flat = np.full((4, 1), 5.0)
    lane = drawn(video.draw({"a": flat, "b": flat + 1e-9}, 1)[1], video.IMAGINED)
    assert lane.any(1).sum() < 10, "rounding errors fill the lane"
    broken = waves(V=1)
    broken[10:] = np.nan  # such as a model that has gone wrong imagines
    assert drawn(video.draw({"a": waves(V=1), "b": broken}, 5)[1], video.TRUTH).any()
    huge = np.full((5, 12), 1e38, np.float32)  # twelve numbers: the last ones are not drawn
    video.draw({"a": huge, "b": -huge}, 2)[1]
    video.draw({"a": huge, "b": np.full_like(huge, np.inf)}, 2)[1]
    video.draw({"a": np.zeros((1, 1)), "b": np.zeros((1, 1))}, 1)[1]


# ---- Symlog --------------------------------------------------------------------------------------

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
