"""From frames to sightings: who was seen where, and what the encoder made of each face.

Frames are looked at side by side, each on one core, and encoded in batches; a frame's pixels are let go as soon as
its faces are cut out. What stays is some forty bytes a face in memory, and the embeddings in a temporary file.
"""

import logging
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg

from vnaw_pipeline.config import EncoderConfig, PipelineConfig
from vnaw_pipeline.crops.align import align_face
from vnaw_pipeline.crops.detect import Detector, Face, load_detector
from vnaw_pipeline.crops.extract import crop_settings
from vnaw_pipeline.crops.source import decode_crop
from vnaw_pipeline.crops.video import Frame, Rgb
from vnaw_pipeline.errors import CheckpointError, ConfigError, DataError
from vnaw_pipeline.features.backends import Encode, make_encode, one_core_per_forward, resolve_arithmetic
from vnaw_pipeline.features.encoder import Encoder, encoder_of_weights, load_encoder
from vnaw_pipeline.features.fingerprints import feature_differences
from vnaw_pipeline.features.store import IMPORTED
from vnaw_pipeline.inference.people import Colours, PeopleTracker, colours_of, contrast_of_people, is_cut, thumbnail
from vnaw_pipeline.processes import process_state
from vnaw_pipeline.runs import Run
from vnaw_pipeline.stages import usable_cores

DEFAULT_ENCODER = "fer_lite0"
"""Of the weights that ship, those used where none are named. Their head gives the expressions."""

SIGHTING = np.dtype([("frame_index", "i4"), ("track", "i4"), ("box", "f4", 4), ("score", "f4")])
"""One face: in which frame, the tracker's number of its person, x0, y0, x1, y1 in pixels, and the detector's score."""

_LOG = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")


class Clock:
    """Seconds spent in each part of the work, summed over threads."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[part] += time.perf_counter() - started

    def each(self, part: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with the time that making each takes."""
        iterator = iter(items)
        while True:
            with self(part):
                item = next(iterator, None)
            if item is None:
                return
            yield item


@dataclass(frozen=True)
class Models:
    """What finds, encodes and names faces. With a `run` its temporal model names them, else the encoder's head."""

    config: PipelineConfig
    detector: Detector
    encoder: Encoder
    encode: Encode
    run: Run | None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The expressions, in the order of the logits (K)."""
        return self.encoder.outputs if self.run is None else self.run.task.outputs

    @property
    def probability_columns(self) -> list[str]:
        """Columns of their probabilities, `p_neutral` ..."""
        return [f"p_{name.lower()}" for name in self.outputs]


class Spool:
    """Embeddings of all faces in a temporary file, (N, D) float16 row after row."""

    def __init__(self, embedding_dim: int) -> None:
        self._file = tempfile.TemporaryFile(prefix="vnaw_infer_")  # noqa: SIM115 -- closed by the block around it
        self._dim = embedding_dim

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, embeddings: npt.NDArray[np.float16]) -> None:
        """Add rows (n, D)."""
        self._file.write(embeddings.tobytes())

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """Some rows, ascending; what lies between them is read too."""
        self._file.seek(int(rows[0]) * 2 * self._dim)
        content = self._file.read((int(rows[-1]) + 1 - int(rows[0])) * 2 * self._dim)
        between = np.frombuffer(content, np.float16).reshape(-1, self._dim)
        chosen: npt.NDArray[np.float16] = between[rows - rows[0]]
        return chosen


class Sightings(NamedTuple):
    """The faces (N,) of a video as SIGHTING, in the order of its frames, and the times of these, float64 (T,)."""

    faces: npt.NDArray[np.void]
    time_s: npt.NDArray[np.float64]


class _Look(NamedTuple):
    """One frame after detection: per face where it is, its colours, and what the encoder is to see (S, S, 3)."""

    time_s: float
    thumbnail: Rgb
    faces: list[Face]
    colours: list[Colours]
    pixels: list[Rgb]


@contextmanager
def open_models(
    config: PipelineConfig, encoder: str | None, run: Run | None, allow_pickle: bool = False
) -> Iterator[Models]:
    """Load detector and encoder, and check that they fit the run.

    The encoder is the one of that name or file, else the one in the config's section `encoder`, else DEFAULT_ENCODER.

    Raises:
        CheckpointError: the run was trained on the features of another encoder; weights that cannot be read.
        ConfigError: neither a run nor a head of the encoder names expressions; the backend is not installed.
    """
    if run is not None and run.task.kind != "classes":
        raise ConfigError(
            f"The main task of {run.folder.path} is '{run.task.name}'; give a run that names expressions."
        )
    wanted: EncoderConfig = config.encoder
    if encoder is not None or "encoder" not in config.model_fields_set:
        wanted = encoder_of_weights(encoder or DEFAULT_ENCODER)
    detector = load_detector(config.crop, threads=1)
    try:
        loaded = load_encoder(wanted, config.seed, allow_pickle)
    except (CheckpointError, ConfigError) as error:
        if run is None or encoder is not None:
            raise
        raise CheckpointError(
            f"The encoder in the config of {run.folder.path} cannot be had: {error} If the run's features were made "
            "with another one, name it with --encoder."
        ) from error
    backend, precision = config.extract.backend, config.extract.precision
    if run is not None:
        _check_features(run, loaded, crop_settings(detector, config.crop)["crop_set"])
        features = run.header["features"]  # the numbers that its model was trained on
        backend, precision = features.get("backend", "torch"), features["precision"]
    elif loaded.head is None:
        raise ConfigError(
            f"The encoder {wanted.weights} has no head that names expressions. Give a run of `vnaw train` on its "
            "features with --run-dir, or an encoder with a head (`vnaw finetune` writes one)."
        )
    arithmetic = resolve_arithmetic(backend, precision, process_state().device)
    with one_core_per_forward(arithmetic.device) as forwards:
        encode = make_encode(loaded, arithmetic, forwards, config.extract.batch_frames)
        yield Models(config, detector, loaded, encode, run)


def _check_features(run: Run, encoder: Encoder, crop_set: str) -> None:
    """Another encoder than in training is an error; other crops are said: a run on Aff-Wild2's is of use here."""
    trained = run.header["features"]
    if IMPORTED in trained:
        raise CheckpointError(
            f"{run.folder.path} was trained on features that `vnaw import` took over, and no encoder here makes them. "
            "Give a run that was trained on features of `vnaw extract`."
        )
    if unlike := feature_differences({**trained, **encoder.fingerprint()}, trained):
        raise CheckpointError(
            f"{run.folder.path} was trained on the features of another encoder (found here, wanted by the run): "
            f"{'; '.join(unlike)}. Name the run's encoder with --encoder."
        )
    if trained["crops"] != crop_set:
        _LOG.warning("The run was trained on crops '%s'; here they are '%s'.", trained["crops"], crop_set)


def analyse(
    frames: Iterable[Frame], models: Models, spool: Spool, clock: Clock, advance: Callable[[int], None]
) -> Sightings:
    """Find, cut out and encode every face of every frame, exactly as `vnaw crop` and `vnaw extract` do, and say who
    is who; embeddings go to the spool in the order of the sightings."""
    workers, batch_frames = usable_cores(), models.config.extract.batch_frames
    tracker = PeopleTracker(models.config.infer.return_s)
    times: list[float] = []
    parts: list[npt.NDArray[np.void]] = []
    before: Rgb | None = None
    with ThreadPoolExecutor(workers, thread_name_prefix="infer") as pool:
        looks = in_order(pool, lambda frame: _look(frame, models, clock), clock.each("decode", frames), 2 * workers)
        batches = _batches(looks, batch_frames)
        for batch, embeddings in in_order(pool, lambda batch: (batch, _encode(batch, models, clock)), batches, 1):
            spool.append(embeddings)
            rows: list[tuple[Any, ...]] = []
            for look in batch:
                boxes = [face.box for face in look.faces]
                cut = is_cut(before, look.thumbnail)
                share_of_contrast = contrast_of_people(look.thumbnail)
                tracks = tracker.update(boxes, look.colours, look.time_s, cut, share_of_contrast)
                rows += [
                    (len(times), track, face.box, face.score) for track, face in zip(tracks, look.faces, strict=True)
                ]
                before = look.thumbnail
                times.append(look.time_s)
            parts.append(np.array(rows, SIGHTING))
            advance(len(batch))
    if not times:
        raise DataError("stopped before the first frame")
    faces = np.concatenate(parts)
    faces["track"] = tracker.same_person()[faces["track"]]
    return Sightings(faces, np.array(times))


def _look(frame: Frame, models: Models, clock: Clock) -> _Look:
    crop = models.config.crop
    with clock("detect"):
        faces = models.detector(frame.rgb)
    with clock("encode"):
        pixels = []
        for face in faces:
            aligned = align_face(frame.rgb, face.landmarks, crop.crop_px)
            # Through JPEG, as the crops that encoders and runs were trained on.
            jpeg = simplejpeg.encode_jpeg(aligned, crop.jpeg_quality, "RGB")
            pixels.append(models.encoder.preprocessing.of_crop(decode_crop(jpeg)))
        colours = [colours_of(frame.rgb, face.landmarks) for face in faces]
    return _Look(frame.time_s, thumbnail(frame.rgb), faces, colours, pixels)


def _encode(batch: list[_Look], models: Models, clock: Clock) -> npt.NDArray[np.float16]:
    """Embeddings (n, D) of all faces of the frames."""
    size = models.config.extract.batch_frames
    pixels = [image for look in batch for image in look.pixels]
    embeddings = np.zeros((len(pixels), models.encoder.embedding_dim), np.float16)
    with clock("encode"):
        for start in range(0, len(pixels), size):
            embeddings[start : start + size] = models.encode(np.stack(pixels[start : start + size]))
    return embeddings


def _batches(looks: Iterable[_Look], size: int) -> Iterator[list[_Look]]:
    """Frames together as long as there are at most `size` of them and of their faces."""
    batch: list[_Look] = []
    faces = 0
    for look in looks:
        if batch and (len(batch) == size or faces + len(look.faces) > size):
            yield batch
            batch, faces = [], 0
        batch.append(look)
        faces += len(look.faces)
    if batch:
        yield batch


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """`map` in the pool with at most `ahead` items under way, so that memory is bounded."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
