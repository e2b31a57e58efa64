"""Frames to files. `frames` is (T, H, W, C) uint8; C = 1 is drawn as grey, C = 3 as RGB."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SEEN, IMAGINED, OTHER, PAPER, INK = (60, 190, 90), (255, 140, 0), (90,) * 3, (24,) * 3, (235,) * 3
BORDER, TITLE, GAP = 4, 26, 2                              # pixels


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


def save_gif(path: Path | str, frames: np.ndarray, fps: float = 15) -> None:
    Path(path).write_bytes(gif_bytes(frames, fps))


def save_strip(path: Path | str, rows: np.ndarray, every: int = 1, scale: int = 2) -> None:
    """Write a PNG: each of the (R, T, H, W, C) videos is a row of its every-th frames."""
    tiles = enlarge(to_rgb(rows[:, ::every]), scale)
    tiles = np.pad(tiles, [(0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)], constant_values=255)
    R, T, H, W, _ = tiles.shape
    Image.fromarray(tiles.transpose(0, 2, 1, 3, 4).reshape(R * H, T * W, 3)).save(path)


def _panel(frame: np.ndarray, title: str, ink: tuple, border: tuple) -> np.ndarray:
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


def side_by_side(videos: dict[str, np.ndarray], context: int, scale: int = 3) -> np.ndarray:
    """(T, H', W', 3): the titled videos next to each other, such as truth | model | imagination.

    The last one is the open-loop one. Its border is green while the model is shown the frames, and
    from t >= context, when it imagines on its own, orange; the title then counts the steps.
    """
    *others, last = videos
    pages = []
    for t in range(len(videos[last])):
        frames = {title: enlarge(to_rgb(video[t]), scale) for title, video in videos.items()}
        colour = IMAGINED if t >= context else SEEN
        label = f"{last} +{t - context + 1}" if t >= context else last
        panels = [_panel(frames[title], title, INK, OTHER) for title in others]
        pages.append(np.concatenate([*panels, _panel(frames[last], label, colour, colour)], axis=1))
    return np.stack(pages)


def save_mp4(path: Path | str, frames: Iterable[np.ndarray], fps: float = 15) -> None:
    """Write (H, W, C) frames, from an array or one by one from a generator, as MPEG-4."""
    import cv2                                             # only here: the rest works without it
    writer = None
    for frame in frames:
        if writer is None:
            codec, size = cv2.VideoWriter_fourcc(*"mp4v"), frame.shape[1::-1]
            writer = cv2.VideoWriter(str(path), codec, fps, size)
            if not writer.isOpened():
                raise OSError(f"OpenCV cannot write {path}")
        writer.write(np.ascontiguousarray(to_rgb(frame)[..., ::-1]))   # blue first
    if writer is not None:
        writer.release()
