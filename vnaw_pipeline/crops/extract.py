"""The stage `crop`: videos in, aligned face crops out.

Reads: video files. Writes: <out>/<video_id>/00001.jpg ... and <out>/detections/<video_id>.csv, or
<out>/<video_id>.h5; <out>/crops.json (how they were made) and <out>/status.csv (what failed).
Skips: videos that an earlier run finished with the same settings.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import simplejpeg

from vnaw_pipeline.config import CropConfig
from vnaw_pipeline.crops import RECORD_NAME
from vnaw_pipeline.crops.align import align_face
from vnaw_pipeline.crops.detect import Detector, Face, load_detector
from vnaw_pipeline.crops.sink import Crop, Written, find_pack, find_tree, write_pack, write_tree
from vnaw_pipeline.crops.track import follow_face
from vnaw_pipeline.crops.video import Frame, Rgb, expected_frames, open_video
from vnaw_pipeline.errors import DataError, listing
from vnaw_pipeline.provenance import differences, digest_bytes, write_json
from vnaw_pipeline.stages import Failure, StageReport, progress_bar

_FINDERS = {"tree": find_tree, "pack": find_pack}
_WRITERS = {"tree": write_tree, "pack": write_pack}


def extract_crops(videos: Sequence[Path], out_dir: Path, config: CropConfig, overwrite: bool = False) -> StageReport:
    """Find the main person's face in every frame of each video and write it aligned, as JPEG.

    A frame without a face has no image but keeps its row in the table. A video that breaks off is kept as far as
    it decodes and is a failure of the run that cropped it; later runs only mention it. A video without a face is
    no failure.

    Args:
        videos: video files; the stem is the video_id.
        out_dir: a new folder, or one that this stage wrote with the same settings.
        overwrite: redo videos that are done.

    Raises:
        DataError: two videos of the same stem, a folder that this stage did not write or wrote with other
            settings, an unusable detector. One bad video does not raise; it is in the report.
        OSError: the folder cannot be written to, or is full. Finished videos stay.
    """
    started = time.monotonic()
    _check_video_ids(videos)
    detector = load_detector(config)
    settings = crop_settings(detector, config)
    _claim(out_dir, settings)
    report = StageReport("crop")
    pending = []
    for path in videos:
        earlier = None if overwrite else _FINDERS[config.layout](out_dir, path.stem)
        if earlier is None:
            pending.append(path)
        else:
            report.skipped += 1
            report.notes.extend(_notes(path.stem, earlier, "done earlier, "))
    num_faces = 0
    try:
        with progress_bar("crop", sum(map(expected_frames, pending))) as bar:
            for path in pending:
                try:
                    written = _crop_video(path, out_dir, detector, config, settings, lambda: bar.advance(1))
                except DataError as error:
                    report.failures.append(Failure(path.stem, None, str(error)))
                    continue
                report.done += 1
                report.frames += written.num_frames
                num_faces += written.num_faces
                report.notes.extend(_notes(path.stem, written, ""))
                if written.loss is not None:
                    report.failures.append(Failure(path.stem, None, written.loss))
    finally:  # also when the disk is full or the run is stopped: what failed so far stays known
        report.write_status(out_dir / "status.csv")
    if report.frames:
        report.notes.append(f"a face in {num_faces} of {report.frames} frames")
    report.seconds = time.monotonic() - started
    return report


def crop_settings(detector: Detector, config: CropConfig) -> dict[str, Any]:
    """How crops are made; only crops with equal settings share a folder.

    `crop_set` names what decides the pixels, so a folder and a pack of the same crops have the same name.
    """
    pixels = {
        "detector": detector.name,
        "detector_weights": detector.weights_digest,
        "detect_px": config.detect_px,
        "score_threshold": config.score_threshold,
        "alignment": "arcface five landmarks",
        "crop_px": config.crop_px,
        "jpeg_quality": config.jpeg_quality,
    }
    digest = digest_bytes(json.dumps(pixels, sort_keys=True).encode())
    return {"crop_set": f"{detector.name}-{config.crop_px}-{digest[:8]}", "layout": config.layout, **pixels}


def crop_frames(
    frames: Iterable[Frame], find_faces: Callable[[Rgb], list[Face]], crop_px: int, jpeg_quality: int
) -> Iterator[Crop]:
    """Follow the main person through the frames and cut the face out of each; every frame gives one Crop."""
    followed = None
    for frame in frames:
        face = follow_face(find_faces(frame.rgb), followed)
        if face is None:
            yield Crop(frame.frame_index, frame.time_s, None, None)
            continue
        followed = face.box
        aligned = align_face(frame.rgb, face.landmarks, crop_px)
        yield Crop(frame.frame_index, frame.time_s, face, simplejpeg.encode_jpeg(aligned, jpeg_quality, "RGB"))


def _crop_video(
    path: Path,
    out_dir: Path,
    detector: Detector,
    config: CropConfig,
    settings: dict[str, Any],
    advance: Callable[[], None],
) -> Written:
    with open_video(path) as video:

        def crops() -> Iterator[Crop]:
            for crop in crop_frames(video, detector, config.crop_px, config.jpeg_quality):
                advance()
                yield crop

        return _WRITERS[config.layout](out_dir, path.stem, crops(), video, settings)


def _check_video_ids(videos: Sequence[Path]) -> None:
    counts = Counter(path.stem for path in videos)
    problems = [
        f"{count} videos are called '{stem}': {', '.join(str(path) for path in videos if path.stem == stem)}. "
        "The name without its ending is the video_id; rename all but one, or crop them into different folders."
        for stem, count in counts.items()
        if count > 1
    ]
    if "detections" in counts:
        problems.append("A video cannot be called 'detections': the tables lie in the folder of that name. Rename it.")
    if problems:
        raise DataError(listing(problems))


def _claim(out_dir: Path, settings: dict[str, Any]) -> None:
    """Make the folder and write its record, or check that the record there is the same."""
    record_path = out_dir / RECORD_NAME
    if record_path.is_file():
        try:
            found = json.loads(record_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{record_path} is not readable as JSON ({error}). Crop into another folder.") from error
        if not isinstance(found, dict):
            raise DataError(f"{record_path} is not a record of crops. Crop into another folder.")
        changed = [line for line in differences(found, settings) if not line.startswith("crop_set:")]
        if changed:
            raise DataError(
                f"The crops in {out_dir} were made with other settings. Crop into another folder, or remove this "
                f"one. What differs:\n{listing(changed)}"
            )
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    foreign = sorted(entry.name for entry in out_dir.iterdir() if entry.is_dir() or entry.suffix == ".h5")
    if foreign:
        raise DataError(
            f"{out_dir} holds '{foreign[0]}' but no {RECORD_NAME}: it was not written by `vnaw crop`, which would "
            "replace folders in it. Give a new folder."
        )
    write_json(record_path, settings)


def _notes(video_id: str, written: Written, prefix: str) -> list[str]:
    notes = []
    if not written.num_faces:
        notes.append(f"{video_id}: {prefix}no face in any of its {written.num_frames} frames")
    if written.loss is not None and prefix:
        notes.append(f"{video_id}: {prefix}{written.loss}")
    return notes
