"""What both sides of ``language_model.py`` share: sizes, and the text that every Python ships."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

RATE = 3e-3  # Adam's, with cosine decay


class Settings(NamedTuple):
    """Sizes of the model, of its training and of what it is calibrated and judged by."""

    blocks: int = 4
    width: int = 144
    heads: int = 4
    context: int = 128
    batch: int = 16
    steps: int = 900
    characters: int = 2_000_000
    calibration: int = 64  # contexts
    validation: int = 128
    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7)


class Text(NamedTuple):
    """Letters by number, to train on and to validate by, and how many letters there are."""

    train: np.ndarray
    valid: np.ndarray
    letters: int


def text(settings: Settings) -> Text:
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if path.is_file())
    whole = "".join(path.read_text("utf-8", "ignore") for path in files)
    codes = np.frombuffer(whole.encode("ascii", "ignore"), np.uint8)
    letters, numbers = np.unique(codes[: settings.characters], return_inverse=True)
    cut = int(0.9 * len(numbers))
    numbers = numbers.astype(np.int32)
    return Text(numbers[:cut], numbers[cut:], len(letters))


def contexts(numbers: np.ndarray, n: int, settings: Settings, seed: int = 0) -> np.ndarray:
    """Returns n pieces of text, ``(n, context + 1)``, the same ones for a seed."""
    length = settings.context + 1
    starts = np.random.default_rng(seed).integers(0, len(numbers) - length, n)
    return np.stack([numbers[s : s + length] for s in starts])
