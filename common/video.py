"""Frames to files. `frames` is (T, H, W, C) uint8; C = 1 is drawn as grey, C = 3 as RGB."""

import io

import cv2
import numpy as np
from PIL import Image

SEEN, IMAGINED, OTHER, INK = (60, 190, 90), (255, 140, 0), (90, 90, 90), (235, 235, 235)
PAPER, TRUTH = (24, 24, 24), (86, 180, 233)
LANES, LEFT, WIDE, HIGH = 8, 170, 900, 70  # of a plot: how many, and pixels


def gif_bytes(frames: np.ndarray, fps: int = 15) -> bytes:
    """(T, H, W, 3) as an animated GIF that loops for ever."""
    first, *others = map(Image.fromarray, frames)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=1000 // fps, loop=0)
    return buffer.getvalue()


def to_rgb(frames: np.ndarray) -> np.ndarray:
    """(..., H, W, C) -> (..., H, W, 3). Of several images stacked on channels, the first."""
    return frames[..., :3] if frames.shape[-1] >= 3 else frames[..., :1].repeat(3, -1)


def write(page: np.ndarray, text: str, x: int, y: int, colour: tuple = INK) -> None:
    """Put `text` on an image, its baseline beginning at pixel (x, y)."""
    cv2.putText(page, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)


def panels(videos: dict[str, np.ndarray], context: int) -> list[np.ndarray]:
    """Each of the titled videos (T, H, W, C), enlarged and in a border.

    The last one is the open-loop one. Its border is green while the model is shown the frames. From
    t >= context, when the model imagines on its own, it is orange, and the title counts the steps.
    """
    found = []
    for title, video in videos.items():
        video = to_rgb(video)
        scale, is_last, pages = max(1, round(200 / video.shape[2])), title == [*videos][-1], []
        for t, frame in enumerate(video):
            label = f"{title} +{t - context + 1}" if is_last and t >= context else title
            colour = OTHER if not is_last else SEEN if t < context else IMAGINED
            page = frame.repeat(scale, 0).repeat(scale, 1)  # a smooth one would make things up
            page = cv2.copyMakeBorder(page, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=colour)
            page = cv2.copyMakeBorder(page, 22, 0, 0, 0, cv2.BORDER_CONSTANT, value=PAPER)
            write(page, label, 6, 15)
            pages.append(page)
        found.append(np.stack(pages))
    return found


def side_by_side(series: dict[str, np.ndarray], context: int) -> np.ndarray:
    """(T, H', W', 3): the titled videos next to each other; of vectors their plot, with T = 1."""
    if all(one.ndim == 4 for one in series.values()):
        return np.concatenate(panels(series, context), axis=2)
    return plot(series, context)[None]


def strip(series: dict[str, np.ndarray], context: int, every: int) -> np.ndarray:
    """(H', W', 3): each of the titled videos is a row of its every-th frames; vectors: a plot."""
    if all(one.ndim == 4 for one in series.values()):
        return np.concatenate([np.concatenate(video[::every], axis=1)
                               for video in panels(series, context)])
    return plot(series, context)


def plot(series: dict[str, np.ndarray], context: int) -> np.ndarray:
    """Draw the first and the last of the titled vector series (T, V): (H', W', 3).

    Each of the first 8 numbers has a lane, which is as high as the values of the first series, the
    truth. The second one, the model's, is shown the observations up to the vertical line.
    """
    (title, truth), (other, model) = [*series.items()][0], [*series.items()][-1]
    length, lanes = len(truth), min(truth.shape[1], LANES)
    page = np.full((30 + lanes * HIGH + 30, LEFT + WIDE + 20, 3), PAPER, np.uint8)
    x = LEFT + np.arange(length) * WIDE // max(1, length - 1)
    write(page, title, LEFT, 20, TRUTH)
    write(page, other, LEFT + 150, 20, IMAGINED)
    begin = int(x[min(context, length - 1)])
    cv2.line(page, (begin, 30), (begin, 30 + lanes * HIGH), OTHER, 1)
    for t in range(0, length, 10):
        write(page, f"timestep {t}" if t == 0 else f"{t}", int(x[t]), 46 + lanes * HIGH)
    for lane in range(lanes):
        low, high = truth[:, lane].min(), truth[:, lane].max()
        span = high - low if high - low > 1e-6 else 1.0  # rounding errors must not fill the lane
        top = 30 + lane * HIGH
        cv2.line(page, (LEFT, top + HIGH), (LEFT + WIDE, top + HIGH), OTHER, 1)
        write(page, f"number {lane + 1}", 6, top + HIGH // 2)
        write(page, f"{high:.3g}", LEFT - 70, top + 14)
        write(page, f"{low:.3g}", LEFT - 70, top + HIGH - 6)
        for values, colour in ((truth, TRUTH), (model, IMAGINED)):
            height = np.nan_to_num((values[:, lane] - low) / span, nan=0).clip(-0.1, 1.1)
            y = top + HIGH - 10 - height * (HIGH - 20)
            points = np.stack([x, y], -1).round().astype(np.int32)
            cv2.polylines(page, [points], False, colour, 1, cv2.LINE_AA)
    return page
