"""Frames to files. `frames` is (T, H, W, C) uint8; C = 1 is drawn as grey, C = 3 as RGB."""

import io

import cv2
import numpy as np
from PIL import Image

SEEN, IMAGINED, OTHER, INK = (60, 190, 90), (255, 140, 0), (90, 90, 90), (235, 235, 235)
PAPER, GREY = (24, 24, 24), (130, 130, 130)
LINES = [(86, 180, 233), (230, 159, 0), (0, 190, 140), (240, 228, 66),
         (204, 121, 167), (213, 94, 0), (150, 150, 255), (190, 230, 120)]


def gif_bytes(frames: np.ndarray, fps: int = 15) -> bytes:
    """(T, H, W, 3) as an animated GIF that loops for ever."""
    first, *others = map(Image.fromarray, frames)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=1000 // fps, loop=0)
    return buffer.getvalue()


def panels(series: dict[str, np.ndarray], context: int) -> list[np.ndarray]:
    """Each of the titled videos (T, H, W, C), or vector series (T, V), enlarged and in a border.

    The last one is the open-loop one. Its border is green while the model is shown the frames. From
    t >= context, when the model imagines on its own, it is orange, and the title counts the steps.
    """
    videos, found = [np.asarray(one) for one in series.values()], []
    if videos[0].ndim == 2:
        videos = curves(videos)
    for title, video in zip(series, videos):
        video = video[..., :3] if video.shape[-1] >= 3 else video[..., :1].repeat(3, -1)
        scale, is_last, pages = max(1, round(200 / video.shape[2])), title == [*series][-1], []
        for t, frame in enumerate(video):
            label = f"{title} +{t - context + 1}" if is_last and t >= context else title
            colour = OTHER if not is_last else SEEN if t < context else IMAGINED
            page = frame.repeat(scale, 0).repeat(scale, 1)  # a smooth one would make things up
            page = cv2.copyMakeBorder(page, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=colour)
            page = cv2.copyMakeBorder(page, 22, 0, 0, 0, cv2.BORDER_CONSTANT, value=PAPER)
            cv2.putText(page, label, (6, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, INK, 1, cv2.LINE_AA)
            pages.append(page)
        found.append(np.stack(pages))
    return found


def side_by_side(series: dict[str, np.ndarray], context: int) -> np.ndarray:
    """(T, H', W', 3): the titled videos next to each other."""
    return np.concatenate(panels(series, context), axis=2)


def strip(series: dict[str, np.ndarray], context: int, every: int) -> np.ndarray:
    """(H', W', 3): each of the titled videos is a row of its every-th frames."""
    return np.concatenate([np.concatenate(video[::every], axis=1)
                           for video in panels(series, context)])


def curves(series: list[np.ndarray], size: int = 192) -> list[np.ndarray]:
    """Draw vector series (T, V) as videos (T, size, size, 3) that grow from left to right.

    Each of the first 8 dimensions has a lane and a colour of its own. The lane is as high as the
    values of the first series, the truth, which the others have in grey behind them.
    """
    stacked = np.stack(series)[..., :len(LINES)].astype(np.float64)  # (R, T, V)
    _, length, lanes = stacked.shape
    low, high = stacked[0].min(0), stacked[0].max(0)
    span = np.where(high - low > 1e-6, high - low, 1)  # else rounding errors would fill the lane
    height = np.clip(0.5 - (stacked - (low + high) / 2) / span * 0.8, 0.04, 0.96)  # 0: the top
    y = (np.arange(lanes) + np.nan_to_num(height, nan=0.96)) / lanes * size
    x = np.broadcast_to((np.arange(length)[:, None] + 0.5) / length * size, y.shape)
    points = np.stack([x, y], -1).round().astype(np.int32).swapaxes(1, 2).copy()  # (R, V, T, 2)
    videos = np.full((len(series), length, size, size, 3), PAPER, np.uint8)
    for r, t, d in np.ndindex(len(series), length, lanes):
        if r:
            cv2.polylines(videos[r, t], [points[0, d, :t + 1]], False, GREY, 1, cv2.LINE_AA)
        cv2.polylines(videos[r, t], [points[r, d, :t + 1]], False, LINES[d], 2, cv2.LINE_AA)
    return list(videos)
