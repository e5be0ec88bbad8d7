"""Where Aff-Wild2's files lie: annotation trees, crop folders and packs, videos, and lists of video names.

Folders are searched to a bounded depth with scandir, and the millions of images in crop folders are only listed
where their numbers are needed.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vnaw_pipeline.annotations import frame_index_of
from vnaw_pipeline.crops import RECORD_NAME
from vnaw_pipeline.errors import DataError, listing
from vnaw_pipeline.tasks import SPLIT_DIRS, Task
from vnaw_pipeline.textlines import located, read_lines

PACK_SUFFIX = ".h5"
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mts", ".m2ts", ".mpg", ".mpeg", ".3gp", ".wmv")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
_SEARCH_DEPTH = 3  # crops_root/batch1/cropped_aligned/<video>
_BATCH = re.compile(r"batch\d+")


class AnnotationFile(NamedTuple):
    """One video's annotation: `path` is relative to the annotation root, with forward slashes."""

    split: str
    video_id: str
    path: str


class CropExtent(NamedTuple):
    """What a crop folder's file names say: the highest frame and those before, and names that are no frame's."""

    num_frames: int
    odd_names: list[str]


def source_video_of(video_id: str) -> str:
    """The video a person was cropped from: the name without `_left` or `_right`."""
    return re.sub(r"_(left|right)$", "", video_id)


def find_annotations(annotations_dir: Path, task: Task) -> list[AnnotationFile]:
    """All annotation files of a task, by split and then name.

    `annotations_dir` holds the task's folder (`EXPR_Recognition_Challenge` and its like) or is that folder.

    Raises:
        DataError: the root is no folder, or the task has no folder in it, or more than one.
    """
    if not annotations_dir.is_dir():
        raise DataError(f"The annotation root {annotations_dir} is not a folder.")
    names = [name for name in task.annotation_dirs if (annotations_dir / name).is_dir()]
    if not names and any((annotations_dir / folder).is_dir() for folder in SPLIT_DIRS.values()):
        names = ["."]
    if len(names) != 1:
        seen = f"has both {' and '.join(names)}" if names else "has none"
        wanted = " or ".join(task.annotation_dirs)
        raise DataError(f"{annotations_dir} {seen}; task {task.name} needs one folder {wanted} there.")
    found = []
    for split, folder in SPLIT_DIRS.items():
        split_dir = annotations_dir / names[0] / folder
        for path in sorted(split_dir.glob("*.txt")) if split_dir.is_dir() else []:
            if not path.name.startswith("."):
                found.append(AnnotationFile(split, path.stem, path.relative_to(annotations_dir).as_posix()))
    return found


def find_crops(crops_root: Path) -> dict[str, list[str]]:
    """Every crop folder and pack below `crops_root` by video: relative paths, sorted, with forward slashes.

    Raises:
        DataError: `crops_root` is not a folder, or a folder in it cannot be listed.
    """
    if not crops_root.is_dir():
        raise DataError(f"The crops root {crops_root} is not a folder.")
    found: dict[str, list[str]] = {}
    try:
        for path in _crop_paths(crops_root, "", _SEARCH_DEPTH):
            found.setdefault(video_of_crops(path), []).append(path)
    except OSError as error:
        raise DataError(f"The folder {error.filename} cannot be listed: {error.strerror}") from error
    return {video_id: sorted(found[video_id]) for video_id in sorted(found)}


def video_of_crops(path: str) -> str:
    """The video whose crops lie at a relative path: the folder's name, or the pack's without its suffix."""
    return path.rpartition("/")[2].removesuffix(PACK_SUFFIX)


def crop_set_of(path: str) -> str:
    """The set a crop folder belongs to. `batch1/cropped_aligned` and `cropped_aligned_new_50_vids` complete one
    another to the set `cropped_aligned`; '' for crops that lie in the root itself."""
    parents = path.split("/")[:-1]
    return "/".join(part.removesuffix("_new_50_vids") for part in parents if not _BATCH.fullmatch(part))


def crop_set_name(crops_root: Path, crops: Iterable[str]) -> str:
    """What tells these crops from others of the same videos: the name `vnaw crop` gave them, or their folders' names.

    `crops` are paths of folders or packs below the root; '' stands for a video without any.

    Raises:
        DataError: the folder's `crops.json` is not readable.
    """
    sets = {path: crop_set_of(path) for path in crops if path}
    folders = {crops_root} | {(crops_root / path).parent for path in sets}
    records = sorted(path for folder in folders if (path := folder / RECORD_NAME).is_file())
    if not records:
        return "+".join(sorted({name or "crops" for name in sets.values()}))
    return "+".join(sorted({_recorded_name(path) for path in records}))


def _recorded_name(record_path: Path) -> str:
    try:
        return str(json.loads(record_path.read_text(encoding="utf-8"))["crop_set"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record_path} is not a record of crops: no readable 'crop_set' in it ({error}).") from error


def choose_crops(found: dict[str, list[str]], video_ids: Iterable[str]) -> dict[str, str]:
    """One place per video. Where a video lies in several sets, the set that has most of the videos, so that a
    manifest mixes sets no more than it must; videos without crops are left out."""
    wanted = [video_id for video_id in video_ids if video_id in found]
    videos_in = Counter(name for video_id in wanted for name in {crop_set_of(path) for path in found[video_id]})
    return {
        video_id: min(found[video_id], key=lambda path: (-videos_in[crop_set_of(path)], path)) for video_id in wanted
    }


def crop_extent(folder: Path) -> CropExtent:
    """Read a crop folder's names, not its images. Hidden files are passed over.

    Raises:
        DataError: the folder cannot be listed.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208 - Path.iterdir makes an object per image, of which there are millions
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be listed: {error.strerror}") from error
    num_frames, odd_names = 0, []
    for name in names:
        if name.startswith("."):
            continue
        try:
            num_frames = max(num_frames, frame_index_of(name) + 1)
        except DataError:
            odd_names.append(name)
    return CropExtent(num_frames, sorted(odd_names))


def recorded_frame_count(folder: Path) -> int | None:
    """Frames of the video that a crop folder was made from, faces or not, by the table of detections that
    `vnaw crop` writes beside it (a header and a row a frame); None without one, as for Aff-Wild2's own crops."""
    lines, _ = read_lines(folder.parent / "detections" / f"{folder.name}.csv")
    return len(lines) - 1 if len(lines) > 1 else None


def find_videos(videos_dir: Path) -> dict[str, Path]:
    """Video files by stem, in `videos_dir` and its sub-folders.

    Raises:
        DataError: `videos_dir` is not a folder.
    """
    if not videos_dir.is_dir():
        raise DataError(f"The videos folder {videos_dir} is not a folder.")
    paths = (path for path in videos_dir.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    return {path.stem: path for path in sorted(paths, reverse=True)}


def video_frame_count(path: Path) -> int:
    """Frames in a video's container, not decoded: as its index says, else its packets counted, up to where it breaks.

    Raises:
        DataError: the file is no video that can be opened.
    """
    import av

    from vnaw_pipeline.crops.video import open_container, video_stream

    count = 0
    try:
        with open_container(path) as container:
            stream = video_stream(container, path)
            if stream.frames:
                return stream.frames
            for packet in container.demux(stream):
                count += packet.size > 0
    except av.FFmpegError as error:
        if count == 0:
            raise DataError(f"{path} cannot be opened as a video: {error.strerror}") from error
    return count


def pack_frame_count(path: Path) -> int:
    """Frames of the video that a crop pack was made from, faces or not.

    Raises:
        DataError: the file is no crop pack.
    """
    import h5py

    try:
        with h5py.File(path, "r") as pack:
            return int(pack.attrs["num_frames"])
    except (OSError, KeyError) as error:
        raise DataError(f"{path} is not a crop pack: {error}") from error


def read_video_list(path: Path) -> list[str]:
    """Names of videos, one a line, in the file's order; blank lines are passed over.

    Raises:
        DataError: the file is missing, empty or not UTF-8.
    """
    lines, problems = read_lines(path)
    if problems:
        raise DataError(listing([located(path, problem) for problem in problems]))
    return [line.strip() for line in lines if line.strip()]


def _crop_paths(folder: Path, relative: str, depth: int) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{relative}{entry.name}"
            if not entry.is_dir():
                if entry.name.endswith(PACK_SUFFIX):
                    yield path
            elif _is_crop_folder(entry.path):
                yield path
            elif depth > 1:
                yield from _crop_paths(Path(entry.path), f"{path}/", depth - 1)


def _is_crop_folder(path: str) -> bool:
    """Whether a folder holds images. Decided by the first entry that tells, since there may be tens of thousands."""
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir():
                return False
            if entry.name.lower().endswith(_IMAGE_SUFFIXES) and not entry.name.startswith("."):
                return True
    return False
