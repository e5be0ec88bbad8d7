"""How large everything is measured."""

from dataclasses import dataclass, field, replace
from typing import Self

from vnaw_pipeline.config import EncoderConfig, TemporalConfig
from vnaw_pipeline.rendering.plan import DatasetPlan

SWIN_TINY = EncoderConfig(name="swin_tiny_patch4_window7_224", weights="untrained")
TINY_ENCODER = EncoderConfig(
    name="swin_tiny_patch4_window7_224",
    weights="untrained",
    model_args={
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    },
)
"""For figures in which the encoder must not be what takes the time or memory."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the synthetic data; `repeats` is how often the two sides of a ratio take turns.

    Attributes:
        disk_bytes: what the largest measurement writes at a time.
        encoder: of the figures on encoders, with frames of `encoder_px`.
        extraction_frames: of the end-to-end extraction.
        eager_frames: of the comparison with eager PyTorch, and of training through the encoder.
        drawn: the rendered data whose macro-F1 two backends are compared by; `drawn_epochs` of training on them.
        bank_videos: of the figures on bank, windows and training; `npy_frames` of the comparison with .npy files.
        batch_windows: of the window batch; `step_windows` of the training step; `steps` that an epoch is
            extrapolated from.
        prediction_videos: whose test videos the ratio of prediction is measured on.
        extraction_memory_frames, prediction_memory_frames: few and many.
        scale_videos: three sizes, of three videos at least; in full once, ten times, and all.
    """

    repeats: int
    disk_bytes: int
    encoder: EncoderConfig = SWIN_TINY
    encoder_px: int = 224
    extraction_frames: int
    eager_frames: int
    drawn: DatasetPlan = field(default_factory=DatasetPlan)
    drawn_epochs: int
    widths: tuple[int, ...] = (768, 1024)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    bank_videos: int
    npy_frames: int
    batch_windows: int = 256
    step_windows: int = 64
    steps: int
    prediction_videos: int
    extraction_memory_frames: tuple[int, int]
    prediction_memory_frames: tuple[int, int]
    scale_videos: tuple[int, int, int]

    def of_videos(self, count: int) -> Self:
        """With so many videos, 30 or more, in what grows with the data."""
        return replace(
            self,
            disk_bytes=FULL.disk_bytes * count // FULL.scale_videos[-1],
            bank_videos=count // 5,
            prediction_videos=count,
            scale_videos=(max(3, count // 100), count // 10 + 2, count),
        )


FULL = Size(
    repeats=5,
    disk_bytes=9_000_000_000,
    extraction_frames=2048,
    eager_frames=128,
    drawn_epochs=10,
    bank_videos=110,
    npy_frames=20_000,
    steps=6,
    prediction_videos=548,
    extraction_memory_frames=(10_000, 500_000),
    prediction_memory_frames=(250_000, 1_000_000),
    scale_videos=(5, 55, 548),
)
QUICK = Size(
    repeats=2,
    disk_bytes=2_000_000_000,
    extraction_frames=256,
    eager_frames=32,
    drawn=DatasetPlan(train_videos=6, validation_videos=4, test_videos=1, frames=(200, 300)),
    drawn_epochs=12,
    widths=(768,),
    bank_videos=20,
    npy_frames=2_000,
    step_windows=16,
    steps=2,
    prediction_videos=10,
    extraction_memory_frames=(2_000, 20_000),
    prediction_memory_frames=(110_000, 220_000),
    scale_videos=(3, 8, 24),
)
