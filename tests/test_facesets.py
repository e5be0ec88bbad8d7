"""Sets of static faces: each layout gives its votes, labels and images; all that is wrong is listed with its line."""

import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vnaw_pipeline.errors import DataError
from vnaw_pipeline.facesets.faces import FaceSet, join_faces
from vnaw_pipeline.facesets.ferplus import ferplus_votes
from vnaw_pipeline.facesets.images import decode_image, read_image
from vnaw_pipeline.facesets.read import read_faces

NEUTRAL, ANGER, DISGUST, FEAR, HAPPINESS, SADNESS, SURPRISE, OTHER, UNKNOWN, NO_FACE = range(10)
"""Aff-Wild2's order, in which everything must arrive."""

FERPLUS = [NEUTRAL, HAPPINESS, SURPRISE, SADNESS, ANGER, DISGUST, FEAR, OTHER, UNKNOWN, NO_FACE]
FER2013 = [ANGER, DISGUST, FEAR, HAPPINESS, SADNESS, SURPRISE, NEUTRAL]
RAFDB = [SURPRISE, FEAR, DISGUST, HAPPINESS, SADNESS, ANGER, NEUTRAL]
AFFECTNET = [NEUTRAL, HAPPINESS, SADNESS, SURPRISE, FEAR, DISGUST, ANGER, OTHER]

VOTES_HEADER = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
LABELS_HEADER = "emotion,pixels,Usage"
OFFICIAL_HEADER = (
    "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
)
NO_VOTES = ",".join("0" * 10)
TEN_NEUTRAL = "10,0,0,0,0,0,0,0,0,0"

Pixels = np.ndarray


# --- tiny sets on disk ---


def grey(seed: int, side: int = 48) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)


def colour(seed: int) -> Pixels:
    """Smooth, so that JPEG changes it little; of another height than width."""
    across, down = np.meshgrid(np.arange(40), np.arange(24))
    return np.stack([across * 6, down * 10, np.full_like(across, 20 * seed)], axis=-1).astype(np.uint8)


def write_png(path: Path, image: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image if image.ndim == 2 else image[:, :, ::-1])


def write_jpeg(path: Path, image: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey_image = image.ndim == 2
    pixels = np.ascontiguousarray(image[:, :, None] if grey_image else image)
    path.write_bytes(simplejpeg.encode_jpeg(pixels, 95, "GRAY" if grey_image else "RGB", "444"))


def write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def text_of(image: Pixels) -> str:
    return " ".join(map(str, image.reshape(-1).tolist()))


def write_votes(root: Path, *rows: str) -> Path:
    return write_lines(root / "fer2013new.csv", VOTES_HEADER, *rows)


def write_labels(root: Path, *rows: str) -> Path:
    return write_lines(root / "fer2013.csv", LABELS_HEADER, *rows)


def one_hot(codes: Sequence[int]) -> Pixels:
    return np.eye(10, dtype=np.float32)[list(codes)]


def problems_of(path: Path, split: str = "train") -> list[str]:
    """The lines of the error, with file names instead of whole paths."""
    folder = path if path.is_dir() else path.parent
    with pytest.raises(DataError) as caught:
        read_faces(path, split)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def assert_grey(image: Pixels, expected: Pixels) -> None:
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.stack([expected] * 3, axis=-1))


# --- what people said of a face ---


def set_of(votes: Sequence[Sequence[float]], single: Sequence[int] | None = None, tag: int = 0) -> FaceSet:
    return FaceSet(
        names=[f"{tag}/{index}" for index in range(len(votes))],
        votes=np.array(votes, dtype=np.float32),
        single=np.array([-1] * len(votes) if single is None else single, dtype=np.int64),
        image=lambda index: np.full((2, 2, 3), 10 * tag + index, dtype=np.uint8),
    )


VOTED = [
    [6, 0, 0, 0, 2, 0, 0, 0, 2, 0],  # neutral
    [5, 5, 0, 0, 0, 0, 0, 0, 0, 0],  # a tie
    [0, 0, 0, 0, 3, 0, 0, 0, 7, 0],  # unknown
    [0, 0, 0, 0, 1, 0, 0, 0, 0, 9],  # no face
    [0, 0, 4, 0, 0, 0, 0, 0, 4, 2],  # a tie with unknown
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # nobody was asked
    [0, 0, 0, 0, 0, 0, 0, 2, 1, 1],  # other
]


def test_majority_is_no_tie_and_neither_unknown_nor_no_face() -> None:
    assert set_of(VOTED).majority().tolist() == [NEUTRAL, -1, -1, -1, -1, -1, OTHER]


def test_targets_of_the_three_sources() -> None:
    faces = set_of(VOTED, [ANGER, -1, FEAR, -1, -1, -1, SURPRISE])
    nothing = [0.0] * 8
    np.testing.assert_array_equal(
        faces.targets("single"),
        [
            one_hot([ANGER])[0, :8],
            nothing,
            one_hot([FEAR])[0, :8],
            nothing,
            nothing,
            nothing,
            one_hot([SURPRISE])[0, :8],
        ],
    )
    np.testing.assert_array_equal(
        faces.targets("majority"), [one_hot([NEUTRAL])[0, :8], *[nothing] * 5, one_hot([OTHER])[0, :8]]
    )
    of_votes = faces.targets("votes")
    assert of_votes.dtype == np.float32
    np.testing.assert_array_equal(of_votes[0], [0.75, 0, 0, 0, 0.25, 0, 0, 0])
    np.testing.assert_array_equal(of_votes[1:6], [nothing] * 5)
    np.testing.assert_array_equal(of_votes[6], [0, 0, 0, 0, 0, 0, 0, 1])


tables_of_votes = arrays(
    np.uint8,
    st.tuples(st.integers(1, 20), st.just(10)),
    elements=st.integers(0, 10),
    fill=st.nothing(),  # else most cells are alike, and hardly a face has a majority
)


@given(tables_of_votes)
def test_votes_arrive_as_a_permutation_of_the_columns(votes: Pixels) -> None:
    ordered = ferplus_votes(votes)
    for column, code in enumerate(FERPLUS):
        np.testing.assert_array_equal(ordered[:, code], votes[:, column])


@given(tables_of_votes, st.sampled_from([1, 0.1, 1 / 300]))
def test_targets_are_distributions_or_nothing(votes: Pixels, of_one_voter: float) -> None:
    """Also of shares of voters. float32 shares of up to eight terms: sums are 1 within a few of its steps of 6e-8."""
    faces = set_of(ferplus_votes(votes * of_one_voter).tolist())
    used = faces.majority() >= 0
    for source in ("votes", "majority"):
        sums = faces.targets(source).sum(axis=1)
        np.testing.assert_allclose(sums, used.astype(float), atol=1e-6)
        assert (faces.targets(source).argmax(axis=1) == faces.majority())[used].all()


def test_joined_sets_keep_their_order() -> None:
    joined = join_faces(
        [set_of(VOTED[:2], [1, 2], tag=1), set_of(VOTED[2:3], [3], tag=2), set_of(VOTED[3:6], [4, 5, 6], tag=3)]
    )
    assert joined.names == ["1/0", "1/1", "2/0", "3/0", "3/1", "3/2"]
    assert joined.single.tolist() == [1, 2, 3, 4, 5, 6]
    assert joined.votes.tolist() == VOTED[:6]
    assert [int(joined.image(index)[0, 0, 0]) for index in range(6)] == [10, 11, 20, 30, 31, 32]


def test_a_digest_is_of_names_and_labels_and_not_of_pictures() -> None:
    """Weights that ship record the digest of their faces, so it stays what it is."""
    faces, recorded = set_of(VOTED), "aba551eff9c59d83"
    assert faces.digest() == recorded
    assert replace(faces, image=lambda index: np.zeros((2, 2, 3), np.uint8)).digest() == recorded
    for other in (set_of(VOTED, tag=1), set_of(VOTED[::-1]), set_of(VOTED, [0] * len(VOTED))):
        assert other.digest() != recorded


# --- FERPlus ---


def write_ferplus(root: Path, *, votes: bool = True, labels: bool = True, png_of: Sequence[str] = ()) -> list[Pixels]:
    """Six faces; FERPlus dropped the second, and images are numbered without it."""
    images = [grey(seed) for seed in range(6)]
    usages = ["Training", "Training", "Training", "PublicTest", "PublicTest", "PrivateTest"]
    names = ["fer0000000.png", "", "fer0000001.png", "fer0000002.png", "fer0000003.png", "fer0000004.png"]
    said = [
        "1,2,3,4,0,0,0,0,0,0",
        "0,0,0,0,0,0,0,0,0,10",
        "0,0,0,0,4,3,2,1,0,0",
        "0,0,0,0,0,0,0,7,3,0",
        "0,0,0,0,0,9,0,0,0,1",
        TEN_NEUTRAL,
    ]
    root.mkdir(exist_ok=True)
    if votes:
        write_votes(root, *(f"{usage},{name},{row}" for usage, name, row in zip(usages, names, said, strict=True)))
    if labels:
        codes = [4, 6, 0, 5, 1, 3]
        write_labels(root, *(f"{c},{text_of(i)},{u}" for c, i, u in zip(codes, images, usages, strict=True)))
    folders = {"Training": "FER2013Train", "PublicTest": "FER2013Valid", "PrivateTest": "FER2013Test"}
    for image, usage, name in zip(images, usages, names, strict=True):
        if usage in png_of and name:
            write_png(root / folders[usage] / name, 255 - image)
    return images


TRAIN_VOTES = [[1, 0, 0, 0, 2, 4, 3, 0, 0, 0], [0, 4, 3, 2, 0, 0, 0, 1, 0, 0]]


def test_ferplus_with_pngs_and_labels_joins_by_row(tmp_path: Path) -> None:
    """The PNGs are negatives of the pixels here, so it shows which of the two was read."""
    images = write_ferplus(tmp_path, png_of=["Training"])
    train = read_faces(tmp_path, "train")
    assert train.names == ["fer0000000.png", "fer0000001.png"]
    assert train.votes.tolist() == TRAIN_VOTES
    assert train.votes.dtype == np.float32
    assert train.single.tolist() == [SADNESS, ANGER]
    assert_grey(train.image(0), 255 - images[0])
    assert_grey(train.image(1), 255 - images[2])
    validation = read_faces(tmp_path, "validation")
    assert validation.names == ["fer0000002.png", "fer0000003.png"]
    assert validation.single.tolist() == [SURPRISE, DISGUST]
    assert validation.majority().tolist() == [OTHER, DISGUST]
    assert_grey(validation.image(1), images[4])
    test = read_faces(tmp_path, "test")
    assert (test.names, test.single.tolist()) == (["fer0000004.png"], [HAPPINESS])
    assert_grey(test.image(0), images[5])


def test_ferplus_from_pixels_keeps_what_was_dropped(tmp_path: Path) -> None:
    images = write_ferplus(tmp_path)
    train = read_faces(tmp_path, "train")
    assert train.names == ["fer0000000.png", "fer2013.csv:3", "fer0000001.png"]
    assert train.votes.tolist() == [TRAIN_VOTES[0], [0] * 9 + [10], TRAIN_VOTES[1]]
    assert train.single.tolist() == [SADNESS, NEUTRAL, ANGER]
    assert train.majority().tolist() == [SADNESS, -1, ANGER]
    for index in range(3):
        assert_grey(train.image(index), images[index])


@pytest.mark.parametrize("part", ["", "data", "images"])
def test_ferplus_without_fer2013_has_no_single_label(tmp_path: Path, part: str) -> None:
    images = write_ferplus(tmp_path / part if part else tmp_path, votes=False, labels=False, png_of=["PublicTest"])
    write_ferplus(tmp_path, labels=False)
    faces = read_faces(tmp_path, "validation")
    assert faces.single.tolist() == [-1, -1]
    assert faces.majority().tolist() == [OTHER, DISGUST]
    assert_grey(faces.image(1), 255 - images[4])
    assert problems_of(tmp_path, "train") == [
        "fer2013new.csv: neither FER2013Train nor fer2013.csv with the pixels lies beside it"
    ]


def test_fer2013_alone_is_one_vote_a_face(tmp_path: Path) -> None:
    """Also where PNGs lie beside it: nothing says which row they belong to."""
    images = write_ferplus(tmp_path, votes=False, png_of=["Training"])
    for path in (tmp_path, tmp_path / "fer2013.csv"):
        faces = read_faces(path, "train")
        assert faces.names == ["fer2013.csv:2", "fer2013.csv:3", "fer2013.csv:4"]
        assert faces.single.tolist() == [SADNESS, NEUTRAL, ANGER]
        np.testing.assert_array_equal(faces.votes, one_hot([SADNESS, NEUTRAL, ANGER]))
        assert_grey(faces.image(2), images[2])


@pytest.mark.parametrize("name", ["fer2013.csv", "fer2013new.csv"])
def test_a_table_of_ferplus_is_read_with_what_lies_beside_it(tmp_path: Path, name: str) -> None:
    write_ferplus(tmp_path, png_of=["Training"])
    assert read_faces(tmp_path / name, "train").digest() == read_faces(tmp_path, "train").digest()


def test_all_codes_of_fer2013(tmp_path: Path) -> None:
    write_labels(tmp_path, *(f"{code},{text_of(grey(code))},Training" for code in range(7)))
    assert read_faces(tmp_path, "train").single.tolist() == FER2013


def test_bad_rows_of_votes_are_listed_with_their_line(tmp_path: Path) -> None:
    write_png(tmp_path / "FER2013Train" / "fer0000000.png", grey(0))
    write_votes(
        tmp_path,
        f"Training,fer0000000.png,{TEN_NEUTRAL}",
        "Training,fer0000001.png,1,2,3",
        "",
        "Training,,0,0,0,0,0,0,0,0,0,-1",
        "Training,,0,0,0,0,1.5,0,0,x,0,0",
        f"Train,,{NO_VOTES}",
        f"PublicTest,fer0000000.png,{NO_VOTES}",
        f"Training,fer0000009.png,{NO_VOTES}",
        "Training,,0,0,0,0,0,0,0,0,0,256",
    )
    assert problems_of(tmp_path) == [
        "fer2013new.csv:3: 5 columns in 'Training,fer0000001.png,1,2,3'; expected 12",
        "fer2013new.csv:4: 1 columns in ''; expected 12",
        "fer2013new.csv:5: bad votes '-1'; expected whole numbers from 0 to 255",
        "fer2013new.csv:6: bad votes '1.5', 'x'; expected whole numbers from 0 to 255",
        "fer2013new.csv:7: the Usage is 'Train'; expected Training, PublicTest, PrivateTest",
        "fer2013new.csv:8: 'fer0000000.png' is in line 2 already; one row an image",
        "fer2013new.csv:9: there is no image FER2013Train/fer0000009.png",
        "fer2013new.csv:10: bad votes '256'; expected whole numbers from 0 to 255",
    ]


def test_bad_rows_of_pixels_are_listed_with_their_line(tmp_path: Path) -> None:
    good = text_of(grey(0))
    last = good.rpartition(" ")[0]
    write_labels(
        tmp_path,
        f"7,{good},Training",
        f",{good},Training",
        f"0,{last},Training",
        f"0,{good} 1,Training",
        f"0,{last} 256,Training",
        f"0,{last} 1.5,Training",
        f"0,{last} -1,PublicTest",
        "0,,Training",
        f"0,{good},Nobody",
        f"0,{good}",
        f'"0","{good}",Training',
    )
    found = problems_of(tmp_path)
    assert [line.partition(": ")[0] for line in found] == [f"fer2013.csv:{line}" for line in range(2, 12)]
    assert found[0].endswith("the emotion is '7'; expected 0 to 6")
    assert found[1].endswith("the emotion is ''; expected 0 to 6")
    assert all(
        "bad pixels" in line and line.endswith("expected 2304 whole numbers from 0 to 255") for line in found[2:8]
    )
    assert found[8].endswith("the Usage is 'Nobody'; expected Training, PublicTest, PrivateTest")
    assert "2 columns" in found[9]


def test_both_tables_are_listed_in_one_error(tmp_path: Path) -> None:
    write_votes(tmp_path, "Training,a.png,1", f"Training,b.png,{NO_VOTES}")
    write_labels(tmp_path, f"9,{text_of(grey(0))},Training", "0,1 2,Training")
    found = problems_of(tmp_path)
    assert [line.partition(": ")[0] for line in found] == ["fer2013new.csv:2", "fer2013.csv:2", "fer2013.csv:3"]


def test_tables_of_other_lengths_name_each_other(tmp_path: Path) -> None:
    write_ferplus(tmp_path, png_of=["Training"])
    with (tmp_path / "fer2013.csv").open("a") as file:
        file.write(f"0,{text_of(grey(9))},PrivateTest\n")
    assert problems_of(tmp_path) == [
        "fer2013new.csv: 6 rows, but fer2013.csv has 7; the two are joined by the order of their rows"
    ]


def test_tables_of_another_order_name_each_row(tmp_path: Path) -> None:
    write_ferplus(tmp_path, png_of=["Training"])
    header, first, *middle, last = (tmp_path / "fer2013.csv").read_text().splitlines()
    write_lines(tmp_path / "fer2013.csv", header, last, *middle, first)
    assert problems_of(tmp_path) == [
        "fer2013new.csv:2: the Usage is 'Training', but 'PrivateTest' in fer2013.csv:2; "
        "the two are joined by the order of their rows",
        "fer2013new.csv:7: the Usage is 'PrivateTest', but 'Training' in fer2013.csv:7; "
        "the two are joined by the order of their rows",
    ]


@pytest.mark.parametrize("name", ["fer2013.csv", "fer2013new.csv"])
def test_tables_that_are_none(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / name, "emotion;pixels;Usage", "0;1;Training")
    (tmp_path / "FER2013Train").mkdir()
    header = LABELS_HEADER if name == "fer2013.csv" else VOTES_HEADER
    assert problems_of(tmp_path) == [f"{name}:1: the header is 'emotion;pixels;Usage'; expected '{header}'"]
    path.write_bytes(b"")
    assert problems_of(tmp_path) == [f"{name}: the file is empty"]
    path.write_text(header + "\n")
    assert problems_of(tmp_path) == [f"{name}: there is no row"]
    path.write_bytes(header.encode() + b"\r\nTraining\xff\r\n")
    assert problems_of(tmp_path) == [f"{name}:2: byte 0xff at column 9 is not UTF-8 text; save the file as UTF-8"]


def test_a_table_with_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    write_ferplus(tmp_path, png_of=["Training"])
    before = read_faces(tmp_path, "train").digest()
    for name in ("fer2013.csv", "fer2013new.csv"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert read_faces(tmp_path, "train").digest() == before


def test_a_split_without_a_face_is_an_error(tmp_path: Path) -> None:
    write_labels(tmp_path, f"0,{text_of(grey(0))},Training")
    assert len(read_faces(tmp_path, "train")) == 1
    assert (
        "no row has an image and Usage 'PublicTest', so there is no validation face"
        in problems_of(tmp_path, "validation")[0]
    )


def test_long_lists_are_shortened(tmp_path: Path) -> None:
    write_votes(tmp_path, *(f"Training,fer{number:07d}.png,{NO_VOTES}" for number in range(50)))
    (tmp_path / "FER2013Train").mkdir()
    found = problems_of(tmp_path)
    assert len(found) == 21
    assert found[0].startswith("fer2013new.csv:2: ")
    assert found[-1] == "... and 30 more"


# --- FERPlus as one .npz file ---


def npz_arrays(count: int = 3) -> dict[str, Pixels]:
    return {
        "image": np.stack([grey(seed, 5) for seed in range(count)]),
        "name": np.array([f"fer{index:07d}.png" for index in range(count)]),
        "votes": np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]] * count, dtype=np.uint8),
        "fer2013_label": np.array([4, -1, 0][:count], dtype=np.int8),
    }


def test_npz_is_taken_whole_for_any_split(tmp_path: Path) -> None:
    given_arrays = npz_arrays()
    np.savez(tmp_path / "faces.npz", **given_arrays)
    for split in ("train", "validation", "test"):
        faces = read_faces(tmp_path / "faces.npz", split)
        assert faces.names == given_arrays["name"].tolist()
        assert faces.single.tolist() == [SADNESS, -1, ANGER]
        assert faces.votes.tolist() == [[0, 4, 5, 6, 1, 3, 2, 7, 8, 9]] * 3
        for index in range(3):
            assert_grey(faces.image(index), given_arrays["image"][index])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"fer2013_label": np.array([7, 0, -2])},
            ["face 0 (fer0000000.png): fer2013_label is 7", "face 2 (fer0000002.png): fer2013_label is -2"],
        ),
        (
            {"votes": np.full((3, 10), [[1.0], [-1], [np.nan]])},
            ["face 1 (fer0000001.png): votes are", "face 2 (fer0000002.png): votes are"],
        ),
        ({"name": np.array(["a", "b", "a"])}, ["face 2 has the name of face 0, 'a'"]),
        ({"image": np.zeros((3, 5, 5), np.float32)}, ["image is float32 (3, 5, 5); expected uint8 (N, H, W)"]),
        (
            {"image": np.zeros((2, 5, 5), np.uint8)},
            [
                "name is <U14 (3,); expected text (2,)",
                "votes is uint8 (3, 10); expected numbers (2, 10)",
                "fer2013_label is int8 (3,); expected numbers (2,)",
            ],
        ),
        ({"fer2013_label": np.zeros(3, np.float32)}, ["fer2013_label is float32 (3,)"]),
        (
            {key: array[:0] for key, array in npz_arrays().items()},
            ["image is uint8 (0, 5, 5); expected uint8 (N, H, W), not empty"],
        ),
    ],
)
def test_bad_arrays_are_listed(tmp_path: Path, change: dict[str, Pixels], expected: list[str]) -> None:
    np.savez(tmp_path / "faces.npz", **npz_arrays() | change)
    found = problems_of(tmp_path / "faces.npz")
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(f"faces.npz: {start}")


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "faces.npz"
    assert "not a readable .npz file" in problems_of(path)[0]
    np.savez(path, image=np.zeros(1))
    whole = path.read_bytes()
    assert "has no array 'name'" in problems_of(path)[0]
    np.savez(path, **npz_arrays() | {"name": np.array(["a", None, "b"])})
    assert "allow_pickle=False" in problems_of(path)[0]
    for content in (b"", b"garbage", whole[: len(whole) // 2], pickle.dumps([1])):
        path.write_bytes(content)
        assert "not a readable .npz file" in problems_of(path)[0]
    one = io.BytesIO()
    np.save(one, np.zeros(3))
    path.write_bytes(one.getvalue())
    assert "has no array 'image'" in problems_of(path)[0]


# --- RAF-DB ---


def write_rafdb(root: Path, list_path: str, *rows: str, images: str = "Image/aligned") -> None:
    write_lines(root / list_path, *rows)
    for place, row in enumerate(rows):
        write_jpeg(root / images / row.split()[0].replace(".jpg", "_aligned.jpg"), colour(place))


@pytest.mark.parametrize(
    ("list_path", "images"),
    [
        ("list_patition_label.txt", "Image/aligned"),
        ("EmoLabel/list_patition_label.txt", "Image/aligned"),
        ("basic/EmoLabel/list_patition_label.txt", "basic/Image/aligned"),
        ("basic/list_patition_label.txt", "basic/Image/aligned"),
    ],
)
def test_rafdb_in_each_of_its_places(tmp_path: Path, list_path: str, images: str) -> None:
    train = [f"train_{number:05d}.jpg {number}" for number in range(1, 8)]
    write_rafdb(tmp_path, list_path, *train, "test_0001.jpg 4", "test_0002.jpg 1", images=images)
    faces = read_faces(tmp_path, "train")
    assert faces.names == [f"train_{number:05d}.jpg" for number in range(1, 8)]
    assert faces.single.tolist() == RAFDB
    np.testing.assert_array_equal(faces.votes, one_hot(RAFDB))
    assert faces.majority().tolist() == RAFDB
    assert faces.image(2).shape == (24, 40, 3)
    np.testing.assert_allclose(faces.image(2).astype(int), colour(2), atol=12)  # quality 95
    for split in ("validation", "test"):
        held_out = read_faces(tmp_path, split)
        assert (held_out.names, held_out.single.tolist()) == (["test_0001.jpg", "test_0002.jpg"], [HAPPINESS, SURPRISE])
        np.testing.assert_allclose(held_out.image(1).astype(int), colour(8), atol=12)


def test_bad_rows_of_rafdb_are_listed_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "list_patition_label.txt"
    write_rafdb(tmp_path, path.name, "train_00001.jpg 5")
    path.write_bytes(
        b"train_00001.jpg 5\ntrain_00002.jpg 5\ntrain_00001.jpg 5\ntrain_00003.jpg\ntrain_00004.jpg 0\n"
        b"train_00005.jpg 8\nvalid_00001.jpg 1\n\ntrain_00006.jpg x\ntrain_\xff.jpg 1\ntest_0001.jpg 1\n"
    )
    assert problems_of(tmp_path) == [
        "list_patition_label.txt:2: there is no image Image/aligned/train_00002_aligned.jpg",
        "list_patition_label.txt:3: 'train_00001.jpg' is in line 1 already; one row an image",
        "list_patition_label.txt:4: 1 columns in 'train_00003.jpg'; expected an image and a label",
        "list_patition_label.txt:5: the label is '0'; expected 1 to 7",
        "list_patition_label.txt:6: the label is '8'; expected 1 to 7",
        "list_patition_label.txt:7: the image is 'valid_00001.jpg'; expected train_<id>.jpg or test_<id>.jpg",
        "list_patition_label.txt:8: 0 columns in ''; expected an image and a label",
        "list_patition_label.txt:9: the label is 'x'; expected 1 to 7",
        "list_patition_label.txt:10: byte 0xff at column 7 is not UTF-8 text; save the file as UTF-8",
    ]


def test_rafdb_of_one_part_only(tmp_path: Path) -> None:
    write_rafdb(tmp_path, "list_patition_label.txt", "train_00001.jpg 5")
    assert len(read_faces(tmp_path, "train")) == 1
    assert "no image is called test_<id>.jpg, so there is no validation face" in problems_of(tmp_path, "validation")[0]
    (tmp_path / "list_patition_label.txt").write_text("")
    assert problems_of(tmp_path) == ["list_patition_label.txt: the file is empty"]


# --- AffectNet ---


def official(name: str, code: int | str, box: str = "1,2,30,40") -> str:
    return f"{name},{box},1.5;2.5,{code},-0.5,0.5"


def in_box(image: Pixels) -> Pixels:
    """The part that `official` has the box of; it reaches beyond the picture's 24 rows."""
    return image[2:24, 1:31]


def test_affectnet_table_of_every_code(tmp_path: Path) -> None:
    rows = [official(f"{code}/{code}.jpg", code) for code in range(11)]
    for code in range(8):
        write_jpeg(tmp_path / "Manually_Annotated_Images" / f"{code}/{code}.jpg", colour(code))
    path = write_lines(tmp_path / "mine.csv", OFFICIAL_HEADER, *reversed(rows))
    faces = read_faces(path, "test")
    assert faces.names == [f"{code}/{code}.jpg" for code in range(7, -1, -1)]
    assert faces.single.tolist() == AFFECTNET[::-1]
    np.testing.assert_array_equal(faces.votes, one_hot(AFFECTNET[::-1]))
    np.testing.assert_allclose(faces.image(0).astype(int), in_box(colour(7)), atol=12)  # quality 95


@pytest.mark.parametrize("header", ["path,expression", "image,label", ",image,valence,expression", "expression,path"])
def test_affectnet_table_with_plain_columns(tmp_path: Path, header: str) -> None:
    write_png(tmp_path / "faces" / "a, b.png", colour(3))
    columns = header.split(",")
    values = {"path": '"faces/a, b.png"', "image": '"faces/a, b.png"', "expression": "6", "label": "6"}
    path = write_lines(tmp_path / "mine.csv", header, ",".join(values.get(column, "0.5") for column in columns))
    faces = read_faces(path, "train")
    assert (faces.names, faces.single.tolist()) == (["faces/a, b.png"], [ANGER])
    np.testing.assert_array_equal(faces.image(0), colour(3))


@pytest.mark.parametrize("part", ["", "Manually_Annotated_file_lists"])
def test_affectnet_folder_with_the_two_official_tables(tmp_path: Path, part: str) -> None:
    """The official validation.csv begins with its first row."""
    write_jpeg(tmp_path / "Manually_Annotated_Images" / "1" / "a.jpg", colour(1))
    write_jpeg(tmp_path / "Manually_Annotated_Images" / "2" / "b.jpg", colour(9))
    write_lines(tmp_path / part / "training.csv", OFFICIAL_HEADER, official("1/a.jpg", 2))
    with pytest.raises(DataError, match=r"validation\.csv: cannot be read: No such file"):
        read_faces(tmp_path, "validation")
    write_lines(tmp_path / part / "validation.csv", official("2/b.jpg", 7), official("2/c.jpg", 8))
    assert read_faces(tmp_path, "train").single.tolist() == [SADNESS]
    for split in ("validation", "test"):
        faces = read_faces(tmp_path, split)
        assert (faces.names, faces.single.tolist()) == (["2/b.jpg"], [OTHER])
        np.testing.assert_allclose(faces.image(0).astype(int), in_box(colour(9)), atol=12)


@pytest.mark.parametrize(
    ("box", "wanted"),
    [
        ("3,4,10,8", np.s_[4:12, 3:13]),
        ("-2,-3.4,15.0,20", np.s_[0:17, 0:13]),
        ("30,20,15,4.8", np.s_[20:24, 30:40]),
        ("0,0,40,24", np.s_[:, :]),
        ("3,4,,", np.s_[:, :]),
        (",,,", np.s_[:, :]),
        ("NULL,NULL,NULL,NULL", np.s_[:, :]),
        ("3,4,0,8", np.s_[:, :]),
        ("-1,-1,-1,-1", np.s_[:, :]),
    ],
)
def test_affectnet_face_is_cut_out_by_its_box(tmp_path: Path, box: str, wanted: tuple[slice, slice]) -> None:
    write_png(tmp_path / "a.png", colour(3))
    path = write_lines(tmp_path / "mine.csv", OFFICIAL_HEADER, official("a.png", 2, box))
    np.testing.assert_array_equal(read_faces(path, "train").image(0), colour(3)[wanted])


def test_bad_boxes_of_affectnet_are_listed_with_their_line(tmp_path: Path) -> None:
    for name in "abc":
        write_png(tmp_path / f"{name}.png", colour(3))
    rows = [official("a.png", 2, "x,4,10,inf"), official("b.png", 2, "3,4,wide,8"), official("c.png", 9, "x,x,x,x")]
    expected = "expected a number of pixels, or nothing"
    assert problems_of(write_lines(tmp_path / "mine.csv", OFFICIAL_HEADER, *rows)) == [
        f"mine.csv:2: face_x is 'x'; {expected}",
        f"mine.csv:2: face_height is 'inf'; {expected}",
        f"mine.csv:3: face_width is 'wide'; {expected}",
    ]
    for box in ("40,4,10,8", "13,13,89,89", "3,4,0.2,8"):
        path = write_lines(tmp_path / "mine.csv", OFFICIAL_HEADER, official("a.png", 2, box))
        with pytest.raises(
            DataError, match=r"a\.png: the table's box .* lies mostly outside of the picture of 40 x 24"
        ):
            read_faces(path, "train").image(0)


def test_bad_rows_of_affectnet_are_listed_with_their_line(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "a.jpg", colour(1))
    path = write_lines(
        tmp_path / "mine.csv",
        "path,expression",
        "a.jpg,1",
        "a.jpg,2",
        "b.jpg,3",
        "b.jpg/a.jpg,3",
        "c.jpg,11",
        "d.jpg,-1",
        "e.jpg,1.0",
        ",1",
        "f.jpg",
        "g.jpg,9",
    )
    unknown = "expected 0 to 7, or up to 10 for a picture that is not used"
    assert problems_of(path) == [
        "mine.csv:3: 'a.jpg' is in line 2 already; one row an image",
        "mine.csv:4: there is no image b.jpg, nor in Manually_Annotated_Images",
        "mine.csv:5: there is no image b.jpg/a.jpg, nor in Manually_Annotated_Images",
        f"mine.csv:6: the expression is '11'; {unknown}",
        f"mine.csv:7: the expression is '-1'; {unknown}",
        f"mine.csv:8: the expression is '1.0'; {unknown}",
        "mine.csv:9: the image's path is empty",
        "mine.csv:10: 1 columns in 'f.jpg'; expected 2",
    ]


def test_headers_that_do_not_say_which_column(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.csv", "path,image,emotion", "a.jpg,a.jpg,1")
    images = "subDirectory_filePath or path or image"
    assert problems_of(path) == [
        f"mine.csv:1: 2 columns for the image's path in the header 'path,image,emotion'; expected one, called {images}",
        "mine.csv:1: 0 columns for the expression in the header 'path,image,emotion'; "
        "expected one, called expression or label",
    ]
    path.write_text("path,label\na.jpg,8\n")
    assert "no face has an expression" in problems_of(path)[0]
    path.write_text("")
    assert problems_of(path) == ["mine.csv: the file is empty"]


def write_code(folder: Path, name: str, value: object) -> None:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    np.save(folder / "annotations" / f"{name}_exp.npy", np.array(value))


def test_affectnet_as_arrays(tmp_path: Path) -> None:
    """The owners saved codes as text; others save them as numbers."""
    for part in ("train_set", "val_set"):
        for code in range(11):
            kinds: list[Callable[[int], object]] = [str, int, float, lambda value: [value]]
            write_code(tmp_path / part, f"{code:02d}", kinds[code % 4](code))
        np.save(tmp_path / part / "annotations" / "00_lnd.npy", np.zeros(136))
        (tmp_path / part / "annotations" / "._00_exp.npy").write_bytes(b"left by another system")
    for code in range(8):
        write_jpeg(tmp_path / "train_set" / "images" / f"{code:02d}.jpg", colour(code))
        write_jpeg(tmp_path / "val_set" / "images" / f"{code:02d}.jpg", colour(12 - code))
    for path, split in ((tmp_path, "train"), (tmp_path / "train_set", "validation")):
        faces = read_faces(path, split)
        assert faces.names == [f"{code:02d}.jpg" for code in range(8)]
        assert faces.single.tolist() == AFFECTNET
        np.testing.assert_array_equal(faces.votes, one_hot(AFFECTNET))
        np.testing.assert_allclose(faces.image(3).astype(int), colour(3), atol=12)
    for split in ("validation", "test"):
        np.testing.assert_allclose(read_faces(tmp_path, split).image(3).astype(int), colour(9), atol=12)


def test_bad_arrays_of_affectnet_are_listed(tmp_path: Path) -> None:
    values = {"0": "3", "1": "x", "2": [1, 2], "3": 2.5, "4": -1, "5": "11", "6": 1, "7": True, "9": np.nan}
    for name, value in values.items():
        write_code(tmp_path, name, value)
    (tmp_path / "annotations" / "8_exp.npy").write_bytes(pickle.dumps(3))
    write_jpeg(tmp_path / "images" / "0.jpg", colour(0))
    found = problems_of(tmp_path)
    assert [line.partition(": ")[0] for line in found] == [f"annotations/{number}_exp.npy" for number in range(1, 10)]
    for line, part in zip(
        found,
        [
            "is 'x'",
            "holds int64 (2,)",
            "is 2.5",
            "is -1",
            "is '11'",
            "no image images/6.jpg",
            "holds bool ()",
            "contains pickled (object) data",
            "is nan",
        ],
        strict=True,
    ):
        assert part in line
    for path in (tmp_path / "annotations").iterdir():
        path.unlink()
    assert "no face has an expression" in problems_of(tmp_path)[0]


# --- what lies at a path ---


def test_unknown_paths_say_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "face.jpg").touch()
    for path, seen in (
        (tmp_path, "holds no set of faces"),
        (tmp_path / "face.jpg", "is no set of faces"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "fer2013.npy", "does not exist"),
    ):
        with pytest.raises(DataError) as caught:
            read_faces(path, "train")
        message = str(caught.value)
        assert message.startswith(f"{path} {seen}")
        for layout in (
            ".npz",
            "fer2013new.csv or fer2013.csv",
            "list_patition_label.txt",
            "training.csv",
            "annotations",
        ):
            assert layout in message


def test_two_sets_in_one_folder_are_not_guessed_at(tmp_path: Path) -> None:
    write_ferplus(tmp_path)
    write_rafdb(tmp_path, "list_patition_label.txt", "train_00001.jpg 5")
    found = problems_of(tmp_path)
    assert "holds 2 sets of faces" in found[0]
    assert [line.strip().partition(":")[0] for line in found[1:]] == ["FERPlus", "RAF-DB"]
    assert len(read_faces(tmp_path / "fer2013.csv", "train")) == 3


# --- images ---


def test_images_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    write_rafdb(tmp_path, "list_patition_label.txt", "train_00001.jpg 5", "train_00002.jpg 5")
    damaged = tmp_path / "Image" / "aligned" / "train_00002_aligned.jpg"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    faces = read_faces(tmp_path, "train")
    assert faces.image(0).shape == (24, 40, 3)
    with pytest.raises(DataError, match=r"train_00002_aligned\.jpg: the JPEG is damaged"):
        faces.image(1)
    damaged.write_bytes(whole)
    assert faces.image(1).shape == (24, 40, 3)
    damaged.unlink()
    with pytest.raises(DataError, match=r"train_00002_aligned\.jpg: cannot be read"):
        faces.image(1)


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often folders were listed and files looked at."""
    counted: Counter[str] = Counter()
    for name in ("iterdir", "stat", "exists", "is_file", "open", "read_bytes"):
        kept = getattr(Path, name)

        def counting(self: Path, *args: object, _name: str = name, _kept: Callable = kept, **kwargs: object) -> object:
            counted[_name] += 1
            return _kept(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, counting)
    return counted


def test_opening_a_set_does_not_look_at_each_image(tmp_path: Path, touched: Counter[str]) -> None:
    def cost(number: int, layout: str) -> Counter[str]:
        root = tmp_path / f"{layout}{number}"
        names = [f"train_{index:05d}" for index in range(number)]
        if layout == "rafdb":
            write_rafdb(root, "list_patition_label.txt", *(f"{name}.jpg 5" for name in names))
        else:
            write_lines(root / "training.csv", "path,label", *(f"{name}.jpg,1" for name in names))
            for name in names:
                write_jpeg(root / "Manually_Annotated_Images" / f"{name}.jpg", colour(0))
        touched.clear()
        assert len(read_faces(root, "train")) == number
        return touched.copy()

    for layout in ("rafdb", "affectnet"):
        assert cost(2, layout) == cost(40, layout)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("is_grey", [True, False])
def test_grey_and_colour_become_rgb(tmp_path: Path, suffix: str, is_grey: bool) -> None:
    path = tmp_path / f"face{suffix}"
    image = colour(5)[:, :, 0] if is_grey else colour(5)
    (write_png if suffix == ".png" else write_jpeg)(path, image)
    expected = np.stack([image] * 3, axis=-1) if is_grey else image
    found = read_image(path)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.astype(int), expected, atol=0 if suffix == ".png" else 12)  # quality 95


def test_damaged_images_are_refused_at_every_length() -> None:
    """Half an image would otherwise be learnt as a face that is grey below."""
    png = cv2.imencode(".png", grey(1))[1].tobytes()
    jpeg = simplejpeg.encode_jpeg(colour(1), 95, "RGB")
    for content in (png, jpeg):
        decode_image(content)
        for length in (0, 1, 10, len(content) // 4, len(content) // 2, len(content) - 20, len(content) - 3):
            with pytest.raises(DataError):
                decode_image(content[:length])
    with pytest.raises(DataError, match="of no known kind: it begins with b'<htm'"):
        decode_image(b"<html>404</html>")
