"""Which videos a rendered data set has: names like Aff-Wild2's, splits, and lengths with their oddities."""

from dataclasses import dataclass

import numpy as np

from vnaw_pipeline.tasks import Split

CROP_FOLDERS = ("cropped_aligned", "cropped_aligned_new_50_vids")

_PAIR = "118-120-640x480"
_SIZES = ("1920x1080", "1280x720", "640x360", "640x480", "1080x1920", "480x360")
_NEW_VIDEO_SHARE = 0.12  # of the videos lie in the second folder


@dataclass(frozen=True, kw_only=True)
class DatasetPlan:
    """Size and difficulty of a rendered data set; the default is the demo's.

    Of the training videos one is short, and two are the two persons of one source video. A half of the annotated
    videos have a row more than the video has frames, and one of each split has a row less.

    Attributes:
        frames: least and greatest number of frames of a video.
        short_frames: frames of the short one, less than a window.
        wrong_share: of the labelled frames that do not have their true expression.
        unlabelled_share: of the annotated videos' frames without expression, valence and arousal, or action units.
        missing_share: of the frames in which no face was found.
        jpeg_quality: 1 to 100.
    """

    train_videos: int = 26
    validation_videos: int = 10
    test_videos: int = 5
    frames: tuple[int, int] = (260, 580)
    short_frames: int = 73
    wrong_share: float = 0.35
    unlabelled_share: float = 0.10
    missing_share: float = 0.02
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        if self.train_videos < 4 or self.validation_videos < 2 or self.test_videos < 1:
            raise ValueError(f"a plan needs at least 4 training, 2 validation videos and a test video, got {self}")
        if not 30 <= self.short_frames <= self.frames[0] <= self.frames[1]:
            raise ValueError(f"short_frames must be at least 30, and frames ascend from there, got {self}")
        if not (0 <= self.wrong_share < 0.5 and 0 <= self.unlabelled_share < 1 and 0 <= self.missing_share < 0.5):
            raise ValueError(f"wrong_share and missing_share must be under 0.5, unlabelled_share under 1, got {self}")


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """One video and person. `num_rows` of the annotation (or template), `num_images` of the video itself."""

    video_id: str
    split: Split
    crop_folder: str
    num_rows: int
    num_images: int

    @property
    def num_frames(self) -> int:
        """Frames that have to be known to serve both."""
        return max(self.num_rows, self.num_images)


def plan_videos(plan: DatasetPlan, generator: np.random.Generator) -> list[VideoPlan]:
    """Name and measure all videos, split after split; the same plan and generator state give the same videos."""
    counts: dict[Split, int] = {
        "train": plan.train_videos,
        "validation": plan.validation_videos,
        "test": plan.test_videos,
    }
    stems = iter(_video_names(sum(counts.values()), generator))
    videos = []
    for split, count in counts.items():
        names = [next(stems) for _ in range(count)]
        lengths = generator.integers(*plan.frames, count, endpoint=True).tolist()
        surplus = generator.permutation(np.arange(count) % 2).tolist()
        folders = (generator.random(count) < _NEW_VIDEO_SHARE).astype(int).tolist()
        if split == "train":
            names[:2], lengths[1], lengths[2], folders[3] = (
                [f"{_PAIR}_left", f"{_PAIR}_right"],
                lengths[0],
                plan.short_frames,
                1,
            )
        surplus[-1] = -1
        videos += [
            VideoPlan(
                video_id=name,
                split=split,
                crop_folder=CROP_FOLDERS[folder],
                num_rows=length if split == "test" else length + extra,
                num_images=length,
            )
            for name, length, extra, folder in zip(names, lengths, surplus, folders, strict=True)
        ]
    return videos


def _video_names(count: int, generator: np.random.Generator) -> list[str]:
    """Different names of the three kinds that Aff-Wild2 has."""
    numbers = generator.choice(np.arange(1, 140), size=count, replace=False).tolist()
    kinds = generator.choice(3, size=count, p=[0.5, 0.3, 0.2]).tolist()
    sizes = generator.choice(_SIZES, size=count).tolist()
    names = []
    for number, kind, size in zip(numbers, kinds, sizes, strict=True):
        parts = int(generator.integers(10, 40))
        names.append((f"video{number}", f"{number}-{parts}-{size}", f"{number}-{size}")[kind])
    return names
