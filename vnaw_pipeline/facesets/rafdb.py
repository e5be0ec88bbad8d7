"""RAF-DB (Li et al. 2017), basic expressions: one label a face, from 1 to 7."""

import re
from pathlib import Path

import numpy as np

from vnaw_pipeline.errors import DataError
from vnaw_pipeline.facesets.faces import FaceSet, codes_of, one_vote
from vnaw_pipeline.facesets.images import FolderListings, read_image
from vnaw_pipeline.facesets.tables import Names, Problems, whole_number
from vnaw_pipeline.tasks import Split
from vnaw_pipeline.textlines import shortened

_CODES = codes_of("Surprise", "Fear", "Disgust", "Happiness", "Sadness", "Anger", "Neutral")
"""Of the labels 1 to 7."""

_LIST_NAME = "list_patition_label.txt"
_NAME = re.compile(r"(train|test)_[^/]+\.jpg")


def find_rafdb(root: Path) -> Path | None:
    """The list of labels below a folder, if it is RAF-DB."""
    places = (root / part / _LIST_NAME for part in ("", "EmoLabel", "basic", "basic/EmoLabel"))
    return next((place for place in places if place.is_file()), None)


def read_rafdb(root: Path, split: Split) -> FaceSet:
    """RAF-DB has two parts: `train`, and `test`, which is both the validation and the test split here.

    Raises:
        DataError: problems of the list, images of the split that are missing, as `Problems` lists them.
    """
    path = find_rafdb(root) or root / _LIST_NAME
    part = "train" if split == "train" else "test"
    folder = next((place for place in (root, root / "basic") if (place / "Image" / "aligned").is_dir()), root)
    folder = folder / "Image" / "aligned"
    problems, listings = Problems(), FolderListings()
    seen = Names(path, problems)
    names, labels = [], []
    for line, text in enumerate(problems.read_lines(path), start=1):
        fields = text.split()
        if len(fields) != 2:
            problems.add(path, line, f"{len(fields)} columns in {shortened(text)}; expected an image and a label")
            continue
        name, label = fields[0], whole_number(fields[1], len(_CODES))
        named = _NAME.fullmatch(name)
        if named is None:
            problems.add(path, line, f"the image is {shortened(name)}; expected train_<id>.jpg or test_<id>.jpg")
        if not label:
            problems.add(path, line, f"the label is {shortened(fields[1])}; expected 1 to {len(_CODES)}")
        seen.add(name, line)
        if named is None or not label or named[1] != part:
            continue
        if not listings.has(folder / _aligned(name)):
            problems.add(path, line, f"there is no image {folder / _aligned(name)}")
        names.append(name)
        labels.append(label)
    problems.raise_any()
    if not names:
        raise DataError(f"{path}: no image is called {part}_<id>.jpg, so there is no {split} face.")
    single = _CODES[np.array(labels) - 1]
    return FaceSet(
        names=names,
        votes=one_vote(single),
        single=single,
        image=lambda index: read_image(folder / _aligned(names[index])),
    )


def _aligned(name: str) -> str:
    return f"{name.removesuffix('.jpg')}_aligned.jpg"
