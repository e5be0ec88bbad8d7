"""Annotation files: reading is the inverse of writing, and every problem is found with its line."""

import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vnaw_pipeline.annotations import (
    count_rows,
    frame_index_of,
    image_name,
    labelled,
    read_annotation,
    scan_annotation,
    write_annotation,
)
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.tasks import EXPRESSIONS, TASKS

EXPR_HEADER = ",".join(EXPRESSIONS)

classes = arrays.arrays(np.int64, st.integers(1, 50), elements=st.integers(-1, 7))
units = arrays.arrays(np.int8, st.tuples(st.integers(1, 20), st.just(12)), elements=st.integers(-1, 1))
affect = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 20), st.just(2)), elements=st.floats(-1, 1, width=32, allow_nan=False)
)


def file_of(folder: Path, content: bytes | str) -> Path:
    path = folder / "video1.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def problems_of(folder: Path, content: bytes | str, task: str = "expr8") -> list[tuple[int | None, str]]:
    labels, problems = scan_annotation(file_of(folder, content), TASKS[task])
    assert (labels is None) == bool(problems)
    return [tuple(problem) for problem in problems]


@given(st.one_of(classes.map(lambda x: ("expr8", x)), units.map(lambda x: ("au", x)), affect.map(lambda x: ("va", x))))
def test_reading_gives_what_was_written(case):
    name, labels = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "video1.txt"
        write_annotation(path, labels, TASKS[name])
        found = read_annotation(path, TASKS[name])
    assert found.dtype == labels.dtype
    np.testing.assert_array_equal(found, labels)


def test_valence_or_arousal_missing_means_neither(tmp_path):
    path = file_of(tmp_path, "valence,arousal\n0.5,-5\n-5,-5\n-1,1\n")
    labels = read_annotation(path, TASKS["va"])
    assert np.isnan(labels[:2]).all()
    assert labelled(labels).tolist() == [False, False, True]
    write_annotation(path, labels, TASKS["va"])
    np.testing.assert_array_equal(read_annotation(path, TASKS["va"]), labels)


def test_labelled_frames_have_an_action_unit_at_least():
    labels = np.zeros((3, 12), dtype=np.int8)
    labels[1, 4] = -1
    labels[2] = -1
    assert labelled(labels).tolist() == [True, True, False]
    assert labelled(np.array([-1, 0, 7])).tolist() == [False, True, True]


def test_derived_spaces_map_the_eight_expressions(tmp_path):
    path = file_of(tmp_path, EXPR_HEADER + "\n" + "\n".join(map(str, [-1, *range(8)])) + "\n")
    assert read_annotation(path, TASKS["coarse5"]).tolist() == [-1, 0, 4, 4, 4, 1, 4, 2, 3]
    assert read_annotation(path, TASKS["negative4"]).tolist() == [-1, -1, 0, 1, 2, -1, 3, -1, -1]
    with pytest.raises(DataError, match="derived from expr8"):
        write_annotation(path, np.array([0]), TASKS["coarse5"])


@pytest.mark.parametrize(
    "content",
    [
        EXPR_HEADER + "\r\n1\r\n-1\r\n",
        EXPR_HEADER + "\r1\r-1",
        "\ufeff" + EXPR_HEADER + "\n1\n-1\n\n  \n",
        EXPR_HEADER.replace(",", ", ") + "\n 1\n-1 \n",
    ],
)
def test_harmless_differences_are_read(tmp_path, content):
    path = file_of(tmp_path, content)
    assert read_annotation(path, TASKS["expr8"]).tolist() == [1, -1]
    assert count_rows(path) == 2


@pytest.mark.parametrize(
    ("task", "content", "lines", "message"),
    [
        ("expr8", b"", [None], "empty"),
        ("expr8", b" \n\n", [None], "empty"),
        ("expr8", EXPR_HEADER + "\n", [None], "no row"),
        ("expr8", EXPR_HEADER + "\n8\n0\n-2\nx\n1.5\n", [2, 4, 5, 6], "bad value"),
        ("expr8", EXPR_HEADER + "\n8" + "0" * 400 + "\n0\n", [2], "bad value"),
        ("expr8", EXPR_HEADER + "\n0,1\n0\n", [2], "2 columns"),
        ("expr8", EXPR_HEADER + "\n0\n\n0\n", [3], "blank"),
        ("expr8", "0\n1\n", [1], "header is missing"),
        ("expr8", "Neutral,Anger\n1\n", [1], "the header is 'Neutral,Anger'"),
        ("expr8", "valence,arousal\n0.1,0.2\n", [1], "annotation file of task va"),
        ("expr8", EXPR_HEADER.encode() + b"\n0\n\xff\n3\n", [3], "byte 0xff at column 1"),
        ("va", "valence,arousal\n0.1,1.2\n0.1\nnan,0\n-5,-5\n", [2, 3, 4], ""),
        ("au", ",".join(TASKS["au"].header) + "\n" + "0," * 11 + "2\n", [2], "bad value '2'"),
    ],
)
def test_problems_are_found_with_their_lines(tmp_path, task, content, lines, message):
    problems = problems_of(tmp_path, content, task)
    assert [line for line, _ in problems] == lines
    assert message in problems[0][1]


def test_all_kinds_of_problems_are_listed_at_once(tmp_path):
    content = b"Neutral\n0\n9\n\n1,2\n\xe9\n7\n"
    assert [line for line, _ in problems_of(tmp_path, content)] == [1, 3, 4, 5, 6]
    with pytest.raises(DataError) as caught:
        read_annotation(tmp_path / "video1.txt", TASKS["expr8"])
    assert [text.split(": ")[0] for text in str(caught.value).splitlines()] == [
        f"{tmp_path / 'video1.txt'}:{line}" for line in (1, 3, 4, 5, 6)
    ]


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt: cannot be read: No such file"):
        read_annotation(tmp_path / "none.txt", TASKS["expr8"])


@pytest.mark.parametrize("labels", [np.array([8]), np.zeros((3, 2), dtype=np.int64), np.array([], dtype=np.int64)])
def test_labels_that_could_not_be_read_back_are_not_written(tmp_path, labels):
    with pytest.raises(DataError, match="labels of shape"):
        write_annotation(tmp_path / "video1.txt", labels, TASKS["expr8"])
    assert not list(tmp_path.iterdir())


@given(st.integers(0, 10**7))
def test_image_names_count_from_one(frame_index):
    assert frame_index_of(image_name(frame_index)) == frame_index
    assert image_name(0) == "00001.jpg"
    assert image_name(99_999) == "100000.jpg"


@pytest.mark.parametrize("name", ["00000.jpg", "1.jpg", "000001.jpg", "00001.png", "00001.JPG", "00001", "a0001.jpg"])
def test_other_image_names_are_refused(name):
    with pytest.raises(DataError, match="not the name of a frame's image"):
        frame_index_of(name)


@pytest.mark.parametrize("name", ["expr8", "va", "au"])
def test_the_longest_video_is_read_quickly(tmp_path, name):
    row = {"expr8": "-1", "va": "0.123,-0.5", "au": ",".join("0" * 12)}[name]
    path = file_of(tmp_path, ",".join(TASKS[name].header) + "\n" + (row + "\n") * 47_435)
    started = time.perf_counter()
    assert len(read_annotation(path, TASKS[name])) == 47_435
    assert time.perf_counter() - started < 2
