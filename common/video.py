"""Frames to files. `frames` is (T, H, W, C) uint8; C = 1 is drawn as grey, C = 3 as RGB."""

import io

import cv2
import numpy as np
from PIL import Image

SEEN, IMAGINED, OTHER, INK = (60, 190, 90), (255, 140, 0), (90, 90, 90), (235, 235, 235)
PAPER, TRUTH = (24, 24, 24), (86, 180, 233)
LANES, LEFT, WIDE, HIGH = 8, 170, 900, 70  # of a plot: how many, and pixels


def gif_bytes(frames: np.ndarray, fps: int = 15) -> bytes:
    first, *others = map(Image.fromarray, frames)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=1000 // fps, loop=0)
    return buffer.getvalue()


def to_rgb(frames: np.ndarray) -> np.ndarray:
    """(..., H, W, C) -> (..., H, W, 3). Of several images stacked on channels, the first."""
    return frames[..., :3] if frames.shape[-1] >= 3 else frames[..., :1].repeat(3, -1)


def write(page: np.ndarray, text: str, x: int, y: int, colour: tuple = INK) -> None:
    cv2.putText(page, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)


def panels(videos: dict[str, np.ndarray], context: int) -> list[np.ndarray]:
    """Each of the titled videos (T, H, W, C), enlarged and in a border. That of the last one is
    green while the model is shown the frames; from t >= context, when it imagines, orange."""
    found = []
    for title, video in zip(videos, map(to_rgb, videos.values())):
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


def draw(series: dict[str, np.ndarray], context: int, names=(), every: int = 1) -> tuple:
    """Titled videos side by side (T, H', W', 3), and rows of every-th frames; vectors: a plot."""
    if any(one.ndim == 2 for one in series.values()):
        page = plot(series, context, names)
        return page[None], page
    videos = panels(series, context)
    rows = [np.concatenate(video[::every], axis=1) for video in videos]
    return np.concatenate(videos, axis=2), np.concatenate(rows)


def plot(series: dict[str, np.ndarray], context: int, names=()) -> np.ndarray:
    """The first, the truth, and the last of titled vector series (T, V) -> a picture. Each of the
    first 8 numbers, named by `names`, has a lane, which is as high as the truth."""
    (title, truth), *_, (other, model) = ((k, x.astype(np.float64)) for k, x in series.items())
    lanes = min(truth.shape[1], LANES)
    bottom, x = 30 + lanes * HIGH, LEFT + np.arange(len(truth)) * WIDE // max(1, len(truth) - 1)
    page = np.full((bottom + 30, LEFT + WIDE + 20, 3), PAPER, np.uint8)
    begin = int(x[min(context, len(x) - 1)])
    cv2.line(page, (begin, 24), (begin, bottom), SEEN, 1)
    for text, left, colour in ((title, 6, TRUTH), (other, LEFT - 50, IMAGINED),
                               ("the dream begins", begin, SEEN)):
        write(page, text, left, 18, colour)
    for t in range(0, len(truth), 10):
        write(page, f"timestep {t}" if t == 0 else f"{t}", int(x[t]), bottom + 16)
    for lane, top in enumerate(range(30, bottom, HIGH)):
        low, high = truth[:, lane].min(), truth[:, lane].max()
        cv2.line(page, (LEFT, top + HIGH), (LEFT + WIDE, top + HIGH), OTHER, 1)
        name = names[lane][-20:] if names else f"number {lane + 1}"
        for text, left, y in ((name, 6, HIGH // 2), (f"{high:.3g}", LEFT - 70, 14),
                              (f"{low:.3g}", LEFT - 70, HIGH - 6)):
            write(page, text, left, top + y)
        for values, colour in ((truth, TRUTH), (model, IMAGINED)):
            height = (values[:, lane] - low) / max(high - low, 1e-6)
            y = top + HIGH - 10 - np.nan_to_num(height).clip(-0.1, 1.1) * (HIGH - 20)
            points = np.stack([x, y], -1).round().astype(np.int32)
            cv2.polylines(page, [points], False, colour, 1, cv2.LINE_AA)
    return page
