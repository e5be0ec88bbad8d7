"""Images of faces on disk: which are there, and one of them decoded."""

from pathlib import Path

import cv2
import numpy as np

from vnaw_pipeline.crops.source import decode_crop
from vnaw_pipeline.crops.video import Rgb
from vnaw_pipeline.errors import DataError


class FolderListings:
    """Which files exist. A folder is listed once, however many of its files are asked for."""

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}

    def has(self, file: Path) -> bool:
        """Whether there is a file of this name, in this case."""
        return file.name in self.names(file.parent)

    def names(self, folder: Path) -> frozenset[str]:
        """What lies in a folder; nothing if there is no such folder."""
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(entry.name for entry in folder.iterdir())
            except OSError:
                self._names[folder] = frozenset()
        return self._names[folder]


def read_image(path: Path) -> Rgb:
    """Read a JPEG or PNG (or what else OpenCV reads), whole or not at all; a grey one becomes RGB.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: not there, not an image, or damaged; names the file.
    """
    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    except DataError as error:
        raise DataError(f"{path}: {error}.") from error


def decode_image(content: bytes) -> Rgb:
    """As `read_image`; the error says what is wrong, not where."""
    if not content or content.startswith(b"\xff\xd8"):
        return decode_crop(content)
    try:
        bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise DataError(f"the image cannot be decoded: {error}") from error
    if bgr is None:
        raise DataError(f"the image is damaged or of no known kind: it begins with {content[:4]!r}")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
