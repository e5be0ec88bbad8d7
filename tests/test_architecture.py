"""The import rule, cheap imports, and that what the README names exists."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vnaw_pipeline"

ORDER = [
    "errors",
    "tasks",
    "locations",
    "provenance",
    "textlines",
    "config",
    "stages",
    "checkpoints",
    "processes",
    "annotations",
    "template",
    "crops",
    "layouts",
    "folds",
    "manifests",
    "checks",
    "facesets",
    "features",
    "windows",
    "temporal",
    "losses",
    "metrics",
    "runs",
    "prediction",
    "training",
    "experiments",
    "report",
    "inference",
    "rendering",
    "demo",
    "bench",
    "cli",
]
"""From left to right. A room imports from itself and from what stands left of it."""

ONLY_IN = {
    "accelerate": {"processes.py", "training/loop.py"},
    "insightface": {"crops/detect.py"},
    "retinaface": {"crops/detect.py"},
    "timm": {"features/encoder.py", "features/hybrid.py"},
    "openvino": {"features/backends.py"},
    "zarr": {"features/store.py", "bench/training.py"},
    "obstore": {"locations.py"},
    "h5py": {"crops/source.py", "crops/sink.py", "layouts.py", "features/foreign.py"},
    "matplotlib": {"report/figures.py"},
}
"""Libraries that one room hides from the others."""

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data_manifests" / "README.md"]
PAGES += [PACKAGE / "weights" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_code_imports_from_its_left_only(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in ORDER, f"{room} has no place in the order; put it there"
    ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("vnaw_pipeline.")}
    right = {other for other in ours if ORDER.index(other) > ORDER.index(room)}
    assert not right, f"{path.relative_to(ROOT)} imports from its right: {sorted(right)}"


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_libraries_stay_in_their_room(library: str) -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if any(name.split(".")[0] == library for name in imports_of(path))
    }
    assert users == ONLY_IN[library]


def test_every_room_of_the_order_exists() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms == set(ORDER)


def test_importing_the_package_is_free() -> None:
    heavy = ("torch", "pandas", "zarr", "numpy")
    code = f"import vnaw_pipeline, vnaw_pipeline.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_python_names_of_the_stages_exist() -> None:
    import vnaw_pipeline

    for name in vnaw_pipeline.__all__:
        assert getattr(vnaw_pipeline, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'extract_feature'"):
        _ = vnaw_pipeline.extract_feature


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tops = ("vnaw_pipeline", "configs", "tests", "data_manifests", "docs", "benchmarks", ".ci")
    named = re.findall(rf"(?<![\w/.])((?:{'|'.join(map(re.escape, tops))})/[\w./-]*[\w/])", text)
    named += re.findall(r"\b(pyproject\.toml|requirements\.lock|Makefile|CONTRIBUTING\.md|LICENSE)\b", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_has_a_gap_to_fill(page: Path) -> None:
    assert re.findall(r"@[A-Z_]{3,}@|TODO|TBD", page.read_text(encoding="utf-8")) == []


def test_commands_that_pages_name_exist() -> None:
    from vnaw_pipeline.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    named = {page: set(re.findall(r"\bvnaw ([a-z]+)\b", page.read_text(encoding="utf-8"))) for page in PAGES}
    assert set().union(*named.values()) <= commands
    assert commands <= named[ROOT / "README.md"], "every command is in the README"
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)\b", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_no_pictures_or_data_are_tracked() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    forbidden = (".jpg", ".jpeg", ".mp4", ".h5", ".npz", ".npy", ".pt", ".pth", ".zarr", ".parquet")
    assert [name for name in listed.stdout.splitlines() if name.lower().endswith(forbidden)] == []
