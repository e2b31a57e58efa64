"""Frames to files. `frames` is (T, H, W, C) uint8; C = 1 is drawn as grey, C = 3 as RGB."""

import io
import itertools
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SEEN, IMAGINED, OTHER, PAPER, INK = (60, 190, 90), (255, 140, 0), (90,) * 3, (24,) * 3, (235,) * 3
GREY, LANE = (130,) * 3, (44,) * 3
BORDER, TITLE = 4, 26  # pixels
LINES = [(86, 180, 233), (230, 159, 0), (0, 190, 140), (240, 228, 66),
         (204, 121, 167), (213, 94, 0), (150, 150, 255), (190, 230, 120)]


def to_rgb(frames: np.ndarray) -> np.ndarray:
    """(..., H, W, C) -> (..., H, W, 3). Of several images stacked on channels, the first."""
    return frames[..., :3] if frames.shape[-1] >= 3 else frames[..., :1].repeat(3, axis=-1)


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """Draw each pixel as a square of scale x scale: a smooth enlargement would make things up."""
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def gif_bytes(frames: np.ndarray, fps: float = 15) -> bytes:
    """An animated GIF that loops for ever. Pillow merges equal neighbours into one longer frame."""
    images = [Image.fromarray(frame) for frame in to_rgb(frames)]
    # GIF counts in hundredths of a second, and browsers slow a delay of 0 or 1 down to 10.
    delay = max(2, round(100 / fps)) * 10
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=delay, loop=0)
    return buffer.getvalue()


def panel(frame: np.ndarray, title: str, ink: tuple, border: tuple) -> np.ndarray:
    """One frame in a border, with its title above in the largest type up to 15 that fits."""
    width, height = frame.shape[1] + 2 * BORDER, frame.shape[0] + 2 * BORDER
    fonts = [ImageFont.load_default(size) for size in range(15, 6, -1)]
    font = next((font for font in fonts if font.getlength(title) <= width), fonts[-1])
    page = Image.new("RGB", (width, TITLE + height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((width / 2, TITLE / 2), title, fill=ink, font=font, anchor="mm")
    draw.rectangle((0, TITLE, width, TITLE + height), fill=border)
    page.paste(Image.fromarray(frame), (BORDER, TITLE + BORDER))
    return np.asarray(page)


def panels(videos: dict[str, np.ndarray], t: int, context: int, scale: int = 0) -> list[np.ndarray]:
    """Frame t of each of the titled videos, such as truth | model | imagination, as a `panel`.

    The last one is the open-loop one. Its border is green while the model is shown the frames, and
    from t >= context, when it imagines on its own, orange; the title then counts the steps.
    scale = 0 enlarges them to about 200 pixels.
    """
    *others, last = videos
    scale = scale or max(1, round(200 / videos[last].shape[2]))
    frames = {title: enlarge(to_rgb(video[t]), scale) for title, video in videos.items()}
    colour = IMAGINED if t >= context else SEEN
    label = f"{last} +{t - context + 1}" if t >= context else last
    return [*(panel(frames[title], title, INK, OTHER) for title in others),
            panel(frames[last], label, colour, colour)]


def side_by_side(videos: dict[str, np.ndarray], context: int, scale: int = 0) -> np.ndarray:
    """(T, H', W', 3): the titled videos next to each other."""
    length = len(next(iter(videos.values())))
    return np.stack([np.concatenate(panels(videos, t, context, scale), axis=1)
                     for t in range(length)])


def save_strip(path: Path | str, videos: dict[str, np.ndarray], context: int, every: int = 1,
               scale: int = 2) -> None:
    """Write a PNG: each of the titled videos (T, H, W, C) is a row of its every-th frames."""
    length = len(next(iter(videos.values())))
    columns = [np.concatenate(panels(videos, t, context, scale)) for t in range(0, length, every)]
    Image.fromarray(np.concatenate(columns, axis=1)).save(path)


def curves(vectors: np.ndarray, size: int = 192) -> np.ndarray:
    """Draw R vector series (R, T, V) as videos (R, T, size, size, 3) that grow from left to right.

    Each of the first 8 dimensions has a lane and a colour of its own; the rest is not drawn. The
    lane is as high as the values of series 0, the truth, which the others have in grey behind them;
    what leaves it, and NaN, is drawn at its edge.
    """
    series = vectors[..., :len(LINES)].astype(np.float64)
    R, T, V = series.shape
    low, high = series[0].min(0), series[0].max(0)  # (V,)
    middle = (low + high) / 2
    # Else the model's rounding errors about a constant would fill the lane.
    span = np.where(high - low > 1e-6 * np.maximum(1, np.abs(middle)), high - low, 1)
    # 0 is the top of the lane
    height = np.nan_to_num(np.clip(0.5 - (series - middle) / span * 0.8, 0, 1), nan=1)
    y = (np.arange(V) + 0.04 + 0.92 * height) / V * size  # (R, T, V)
    x = np.broadcast_to((np.arange(T)[:, None] + 0.5) / T * size, y.shape)
    points = (np.stack([x, y], -1) * 16).round().astype(int)  # cv2 wants fixed point: shift=4 below

    canvas = np.full((R, size, size, 3), PAPER, np.uint8)
    canvas[:, np.arange(1, V) * size // V] = LANE
    frames = np.empty((R, T, size, size, 3), np.uint8)
    for t, r in itertools.product(range(T), range(R)):
        for row, d in itertools.product(sorted({0, r}), range(V)):  # the truth first
            colour, width = (LINES[d], 2) if row == r else (GREY, 1)
            ends = points[row, [max(t - 1, 0), t], d].tolist()
            cv2.line(canvas[r], *ends, colour, width, cv2.LINE_AA, shift=4)
        frames[r, t] = canvas[r]
    return frames


def as_frames(series: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Videos as they are; vector series (T, V), the first of which is the truth, as curves."""
    if all(one.ndim == 4 for one in series.values()):
        return series
    return dict(zip(series, curves(np.stack(list(series.values())))))


class EpisodeVideos:
    """Records episodes 0, 1, 8, 27, ... (cubes) up to 1000, then every 1000th (as Gymnasium does).

    Counted from the start of this process. The file is `recording.mp4` until its episode is over,
    then `episode-000027.mp4`, or `episode-000027-1.mp4` if a run before this one made that already.
    """

    def __init__(self, folder: Path | str, fps: float = 30, name: str = "episode"):
        self.path, self.fps, self.name = Path(folder) / "recording.mp4", fps, name
        self.episode, self.writer = -1, None

    def wanted(self) -> bool:
        """Whether the episode under way is recorded."""
        if self.episode < 1000:
            return self.episode in [n**3 for n in range(10)]
        return self.episode % 1000 == 0

    def add(self, render: Callable[[], np.ndarray | None], is_first: bool) -> None:
        """Once per step. Calls `render`, for an (H, W, C) frame, only in an episode it records."""
        if is_first:
            self.close()
            self.episode += 1
        if not self.wanted() or (frame := render()) is None:
            return
        if self.writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            size, codec = frame.shape[1::-1], cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(self.path), codec, self.fps, size)
            if not writer.isOpened():
                raise OSError(f"cannot write {self.path}: OpenCV makes no video of {size} pixels")
            self.writer = writer
        self.writer.write(np.ascontiguousarray(to_rgb(frame)[..., ::-1]))  # blue first

    def close(self) -> None:
        """Finish the file. Raises OSError if it is broken: OpenCV does not say why."""
        if self.writer is None:
            return
        self.writer.release()
        self.writer = None
        if not cv2.VideoCapture(str(self.path)).isOpened():
            raise OSError(f"cannot write {self.path}; is the disk full?")
        for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(1))):
            path = self.path.with_name(f"{self.name}-{self.episode:06d}{suffix}.mp4")
            if not path.exists():
                self.path.rename(path)
                return
