"""Submission files: template order, header, argmax, and every frame without an answer named."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vnaw_pipeline.errors import DataError
from vnaw_pipeline.prediction.submission import verify_submission, write_submission
from vnaw_pipeline.tasks import TASKS
from vnaw_pipeline.template import read_template, template_task

EXPR = TASKS["expr8"]
HEADER = "image_location,Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other"


def template_of(folder: Path, lines: list[str], header: str = HEADER, newline: str = "\n") -> Path:
    path = folder / "template.txt"
    path.write_bytes(newline.join([header, *lines, ""]).encode())
    return path


def predictions_of(answers: dict[tuple[str, int], int]) -> pd.DataFrame:
    table = pd.DataFrame(list(answers), columns=["video_id", "frame_index"])
    table["valid"] = True
    table[EXPR.prediction_columns] = np.eye(8)[list(answers.values())]
    return table


def test_every_line_is_answered_in_the_templates_order(tmp_path):
    template = template_of(tmp_path, ["b_left/00002.jpg,0", "b_left/00001.jpg,0"])
    predictions = predictions_of({("b_left", 0): 7, ("b_left", 1): 3, ("b_left", 2): 1, ("c", 0): 2})
    out = tmp_path / "new" / "submission.txt"
    assert write_submission(predictions.sample(frac=1, random_state=0), template, out, EXPR) == 2
    assert out.read_bytes() == (HEADER + "\nb_left/00002.jpg,3\nb_left/00001.jpg,7\n").encode()
    assert verify_submission(out, read_template(template, EXPR), EXPR) == 2


def test_windows_newlines_and_byte_order_mark_are_not_copied(tmp_path):
    template = template_of(tmp_path, ["a/00001.jpg,0", "a/100000.jpg,0"], header="\ufeff" + HEADER, newline="\r\n")
    out = tmp_path / "submission.txt"
    write_submission(predictions_of({("a", 0): 1, ("a", 99_999): 2}), template, out, EXPR)
    assert out.read_bytes() == (HEADER + "\na/00001.jpg,1\na/100000.jpg,2\n").encode()


def test_frames_without_prediction_are_counted_and_named(tmp_path):
    template = template_of(tmp_path, [f"a/{k:05d}.jpg,0" for k in range(1, 9)] + ["b/00001.jpg,0"])
    out = tmp_path / "submission.txt"
    out.write_text("an earlier submission\n")
    with pytest.raises(DataError) as caught:
        write_submission(predictions_of({("a", 0): 1, ("a", 4): 1}), template, out, EXPR)
    assert str(caught.value).splitlines() == [
        "7 lines of the template have no prediction:",
        "  a: 00002.jpg to 00004.jpg, 00006.jpg to 00008.jpg",
        "  b: 00001.jpg",
    ]
    assert out.read_text() == "an earlier submission\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["submission.txt", "template.txt"]


def test_a_long_list_of_unanswered_frames_is_cut(tmp_path):
    lines = [f"v{v}/{k:05d}.jpg,0" for v in range(40) for k in range(1, 40, 2)]
    with pytest.raises(DataError) as caught:
        write_submission(predictions_of({("other", 0): 0}), template_of(tmp_path, lines), tmp_path / "out.txt", EXPR)
    message = str(caught.value)
    assert message.startswith("800 lines of the template have no prediction")
    assert "and 12 more ranges" in message
    assert message.endswith("and 21 more")


def test_two_predictions_for_one_frame_and_undefined_ones_are_refused(tmp_path):
    template = template_of(tmp_path, ["a/00001.jpg,0"])
    once = predictions_of({("a", 0): 1})
    with pytest.raises(DataError, match="more than one prediction"):
        write_submission(pd.concat([once, once]), template, tmp_path / "out.txt", EXPR)
    with pytest.raises(DataError, match="not a number"):
        write_submission(once.assign(p_fear=np.nan), template, tmp_path / "out.txt", EXPR)
    with pytest.raises(DataError, match="lack the column"):
        write_submission(once.drop(columns="p_fear"), template, tmp_path / "out.txt", EXPR)
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ("image_location,valence,arousal", ["a/00001.jpg,0.5,0.5"], "template of task va"),
        (TASKS["au"].template_header, ["a/00001.jpg" + ",0" * 12], "template of task au"),
        ("image,Neutral", ["a/00001.jpg,0"], "the header is 'image,Neutral'"),
        (HEADER, [], "no line to answer"),
        (HEADER, ["a/00001.jpg,0", "a/2.jpg,0", "a/00000.jpg,0"], r"template\.txt:3: (.|\n)*template\.txt:4: "),
        (HEADER, ["a/00001.jpg"], "1 value"),
        (HEADER, ["a/00001.jpg,0,0"], "1 value"),
        (HEADER, ["a/00001.jpg,0", "", "a/00002.jpg,0"], r"template\.txt:3: ''"),
        (HEADER, ["a/00001.jpg,0", "a/00001.jpg,1"], r"template\.txt:3: .* repeats"),
    ],
)
def test_unusable_templates_are_named(tmp_path, header, lines, message):
    with pytest.raises(DataError, match=message):
        read_template(template_of(tmp_path, lines, header=header), EXPR)


def other_predictions(task, rows: list[list[float]]) -> pd.DataFrame:
    table = pd.DataFrame({"video_id": "2-30-640x360", "frame_index": range(len(rows))})
    table[task.prediction_columns] = np.array(rows, dtype=np.float32)
    return table


def test_valence_and_arousal_are_clipped_and_never_in_exponents(tmp_path):
    task = TASKS["va"]
    template = template_of(tmp_path, [f"2-30-640x360/{k:05d}.jpg,0,0" for k in (1, 2, 3)], task.template_header)
    table = other_predictions(task, [[0.5, -0.5], [1.2, -3], [1e-6, -0.12345]])
    assert write_submission(table, template, tmp_path / "s.txt", task) == 3
    assert (tmp_path / "s.txt").read_text().splitlines() == [
        "image_location,valence,arousal",
        "2-30-640x360/00001.jpg,0.5,-0.5",
        "2-30-640x360/00002.jpg,1.0,-1.0",
        "2-30-640x360/00003.jpg,0.0,-0.1235",
    ]
    for wrong in ("1.5,0.0", "0.5", "0.5,0.5,0.5", "nan,0.0", "1.1,0.0"):
        (tmp_path / "s.txt").write_text((tmp_path / "s.txt").read_text().replace(",0.5,-0.5", f",{wrong}"))
        with pytest.raises(DataError, match=r":2: .* two numbers from -1 to 1"):
            verify_submission(tmp_path / "s.txt", read_template(template, task), task)
        (tmp_path / "s.txt").write_text((tmp_path / "s.txt").read_text().replace(f",{wrong}\n", ",0.5,-0.5\n"))


def test_action_units_are_twelve_bits(tmp_path):
    task = TASKS["au"]
    template = template_of(tmp_path, ["2-30-640x360/00002.jpg" + ",0" * 12], task.template_header)
    table = other_predictions(task, [[0] * 12, [0.5, 0.4, *[0.9] * 10]])
    write_submission(table, template, tmp_path / "s.txt", task)
    assert (tmp_path / "s.txt").read_text().splitlines()[1] == "2-30-640x360/00002.jpg,1,0" + ",1" * 10
    (tmp_path / "s.txt").write_text(task.template_header + "\n2-30-640x360/00002.jpg" + ",2" * 12 + "\n")
    with pytest.raises(DataError, match="twelve 0 or 1"):
        verify_submission(tmp_path / "s.txt", read_template(template, task), task)


def test_the_template_says_its_task(tmp_path):
    template = template_of(tmp_path, ["a/00001.jpg,0.1,0.2"], TASKS["va"].template_header)
    assert template_task(template, [EXPR, TASKS["va"]]) is TASKS["va"]
    with pytest.raises(DataError, match="template of task va; expected that of expr8 or au"):
        template_task(template, [EXPR, TASKS["au"]])
    template.write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        template_task(template, [EXPR])


def test_templates_of_all_tasks_are_read(tmp_path):
    frames = read_template(
        template_of(tmp_path, ["a/00003.jpg,0.1,0.2"], header="image_location,valence,arousal"), TASKS["va"]
    )
    assert frames.frame_counts() == {"a": 3}


def test_other_label_spaces_cannot_be_submitted(tmp_path):
    template = template_of(tmp_path, ["a/00001.jpg,0"])
    for name in ("coarse5", "negative4"):
        with pytest.raises(DataError, match=f"task {name} cannot"):
            write_submission(predictions_of({("a", 0): 1}), template, tmp_path / "out.txt", TASKS[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("00002", "00003"), ":3: "),
        (lambda text: text.replace(",1\n", ",8\n"), ":2: "),
        (lambda text: text.removesuffix("a/00002.jpg,2\n"), "1 answers"),
        (lambda text: '"' + text, "header"),
    ],
)
def test_verifying_finds_any_difference(tmp_path, change, message):
    template = template_of(tmp_path, ["a/00001.jpg,0", "a/00002.jpg,0"])
    out = tmp_path / "submission.txt"
    write_submission(predictions_of({("a", 0): 1, ("a", 1): 2}), template, out, EXPR)
    out.write_text(change(out.read_text()))
    with pytest.raises(DataError, match=message):
        verify_submission(out, read_template(template, EXPR), EXPR)


def test_a_hundred_thousand_lines_take_seconds(tmp_path):
    videos, length = 20, 5_000
    template = template_of(tmp_path, [f"v{v}/{k:05d}.jpg,0" for v in range(videos) for k in range(1, length + 1)])
    table = pd.DataFrame(
        {
            "video_id": np.repeat([f"v{v}" for v in range(videos)], length),
            "frame_index": np.tile(np.arange(length), videos),
        }
    )
    table[EXPR.prediction_columns] = np.random.default_rng(0).random((len(table), 8), dtype=np.float32)
    started = time.perf_counter()
    assert write_submission(table, template, tmp_path / "out.txt", EXPR) == videos * length
    assert time.perf_counter() - started < 5
