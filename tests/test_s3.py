"""Stores and predictions on S3: the same bytes as in a folder, through a server that fails too; errors are one line."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from vnaw_pipeline import locations
from vnaw_pipeline.cli import app, main
from vnaw_pipeline.config import PipelineConfig, dump_config
from vnaw_pipeline.errors import ConfigError, PipelineError, StoreError
from vnaw_pipeline.features import store as store_module
from vnaw_pipeline.features.exchange import import_features
from vnaw_pipeline.features.extract import extract_features
from vnaw_pipeline.features.store import open_store
from vnaw_pipeline.locations import Location, S3Path, files_below, location, reach
from vnaw_pipeline.manifests import COLUMNS, write_manifest
from vnaw_pipeline.provenance import atomic_path, write_text

from .buckets import Fault, FlakyProxy
from .conftest import DrawnData

LENGTHS = {"a": 40, "b": 9}
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="-_. "), min_size=1)


def contents(folder: Location) -> dict[str, bytes]:
    """Every file below a folder by name, but for those that hold a time."""
    names = files_below(folder).keys() - {"record.json"}
    return {name: (folder / name).read_bytes() for name in sorted(names)}


@given(parts=st.lists(NAMES.map(str.strip).filter(lambda part: part.strip(".") != ""), min_size=1))
def test_what_names_a_place_on_s3_is_read_as_it(parts: list[str]) -> None:
    """Also as a Path, which leaves one of the two slashes."""
    place = S3Path("bucket", "/".join(parts))
    assert location(str(place)) == location(Path(str(place))) == location(f"{place}/") == location(place) == place
    assert location("S3" + str(place).removeprefix("s3").replace("/", "//")) == place


def test_what_names_no_place_is_refused() -> None:
    for where in ("s3://", "gs://bucket/x", "https://host/x", "HTTPS://host/x", Path("gs://bucket/x")):
        with pytest.raises(ConfigError, match=r"expected a path, or s3://bucket/folder"):
            location(where)
    for where in ("s3://bucket/a/../b", "s3://bucket/./a", "s3://bucket/..", "s3://.."):
        with pytest.raises(
            ConfigError, match=r"cannot be used: '\.' and '\.\.' name no folder on S3\. Write the whole"
        ):
            location(where)
    for where in ("runs/x", "/runs/x", "C:/runs", "s3", "."):
        assert location(where) == Path(where)
    with pytest.raises(ConfigError, match=r"'s3://bucket/a.{2}b' cannot be used: it has control characters"):
        location("s3://bucket/a\nb")


def test_files_are_written_read_listed_and_removed(place: Location) -> None:
    assert files_below(place / "nowhere") == {}
    with pytest.raises(FileNotFoundError):
        (place / "a.txt").read_bytes()
    write_text(place / "a.txt", "old")
    write_text(place / "a.txt", "ä")
    write_text(place / "deep" / "v #1%.x~ +.json", "null")
    assert files_below(place) == {"a.txt": 2, "deep/v #1%.x~ +.json": 4}
    assert files_below(place / "deep") == {"v #1%.x~ +.json": 4}
    assert (place / "a.txt").read_bytes() == "ä".encode()
    assert (place / "a.txt").is_file()
    assert not (place / "deep").is_file()
    for _ in range(2):
        (place / "a.txt").unlink(missing_ok=True)
    assert list(files_below(place)) == ["deep/v #1%.x~ +.json"]


def test_a_folder_made_in_a_console_is_empty(s3: S3Path, s3_port: int) -> None:
    marker = urllib.request.Request(f"http://127.0.0.1:{s3_port}/{s3.bucket}/{s3.key}/", b"", method="PUT")
    urllib.request.urlopen(marker).close()
    assert files_below(s3) == {}
    store_module.create_store(s3, {"encoder": "e"}, 3)
    assert files_below(s3).keys() == {"zarr.json"}


def test_a_block_that_fails_writes_nothing(place: Location, tmp_path: Path) -> None:
    write_text(place / "a.txt", "whole")
    with pytest.raises(OSError, match="No such file"), atomic_path(place / "a.txt") as partial:
        shutil.copy(tmp_path / "nowhere", partial)
    assert contents(place) == {"a.txt": b"whole"}


def test_a_run_is_the_same_on_s3(
    drawn: DrawnData, tiny_config: PipelineConfig, drawn_store: Path, s3: S3Path, tmp_path: Path
) -> None:
    """Extracted, trained, predicted, tuned, scored and submitted there and in folders: the same bytes and scores."""
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config))
    tree = ("--manifest", drawn.manifest_path, "--annotations", drawn.annotations)

    def vnaw(*arguments: object) -> str:
        done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    extract = ("extract", *tree[:2], "--crops", drawn.crops, "--store", s3 / "s", "--config", tmp_path / "config.yaml")
    assert "7 chunks done, 0 skipped" in vnaw(*extract)
    assert contents(s3 / "s") == contents(drawn_store)
    assert "0 chunks done, 7 skipped" in vnaw(*extract)

    said = []
    for store, run, tables in ((drawn_store, "local", None), (s3 / "s", "remote", s3 / "tables")):
        run_dir = ("--run-dir", tmp_path / run)
        where = () if tables is None else ("--predictions", tables)
        vnaw("train", *tree, "--store", store, *run_dir, "--config", tmp_path / "config.yaml")
        vnaw("predict", *tree[:2], "--store", store, *run_dir, *where)
        vnaw("tune", *tree, *run_dir, *where)
        vnaw("predict", *tree[:2], "--store", store, *run_dir, "--split", "test", "--tuned", *where)
        vnaw("submit", *run_dir, "--template", drawn.template, "--out", tmp_path / f"{run}.txt", *where)
        said.append(vnaw("evaluate", *tree, *run_dir, *where))
    assert said[0] == said[1]
    assert contents(s3 / "tables") == contents(tmp_path / "local" / "predictions")
    assert not (tmp_path / "remote" / "predictions").exists()
    assert (tmp_path / "local.txt").read_bytes() == (tmp_path / "remote.txt").read_bytes()


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[pd.DataFrame, Path]:
    """Two videos as .npy files, and their manifest; a chunk is 8 frames."""
    monkeypatch.setattr(store_module, "CHUNK_FRAMES", 8)
    generator = np.random.default_rng(0)
    for video_id, num_frames in LENGTHS.items():
        (tmp_path / "features" / video_id).mkdir(parents=True)
        for number in range(1, num_frames + 1):
            np.save(tmp_path / "features" / video_id / f"{number:05d}.npy", generator.standard_normal(5))
    rows = [(video_id, "test", count, "", "", "", video_id) for video_id, count in LENGTHS.items()]
    return pd.DataFrame(rows, columns=list(COLUMNS)), tmp_path / "features"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "RETRY_SECONDS", 5)
    monkeypatch.setattr(locations, "REQUEST_SECONDS", 1)


@pytest.fixture
def proxy(
    s3_port: int, use_s3: Callable[[int], None], impatient: None
) -> Iterator[Callable[[Callable[[int, str, str], Fault | None]], FlakyProxy]]:
    """Puts a proxy before the server."""
    proxies = []

    def before_server(fault: Callable[[int, str, str], Fault | None]) -> FlakyProxy:
        proxies.append(FlakyProxy(s3_port, fault, slow_seconds=1.5))
        use_s3(proxies[-1].port)
        return proxies[-1]

    yield before_server
    for each in proxies:
        each.close()


def test_a_flaky_server_is_asked_again(
    features: tuple[pd.DataFrame, Path],
    proxy: Callable[[Callable[[int, str, str], Fault | None]], FlakyProxy],
    s3: S3Path,
    tmp_path: Path,
) -> None:
    """Every third request fails, each way in turn; the first chunk and the first listing take too long."""
    kinds: Iterator[Fault] = cycle(("503", "cut off", "500", "hung up"))
    too_long = {("PUT", "/c/"), ("GET", "list-type")}

    def fault(number: int, method: str, path: str) -> Fault | None:
        for kind in [kind for kind in too_long if kind[0] == method and kind[1] in path]:
            too_long.remove(kind)
            return "slow"
        return next(kinds) if number % 3 == 2 else None

    before = proxy(fault)
    assert import_features(*features, tmp_path / "s").done == 7
    assert import_features(*features, s3 / "s").done == 7
    assert contents(s3 / "s") == contents(tmp_path / "s")
    store, wanted = open_store(s3 / "s"), open_store(tmp_path / "s")
    for video_id in LENGTHS:
        assert (store.embeddings(video_id) == wanted.embeddings(video_id)).all()
    assert before.served.keys() == {None, "503", "500", "cut off", "hung up", "slow"}
    assert not too_long


def test_what_is_there_is_listed_once(
    features: tuple[pd.DataFrame, Path],
    proxy: Callable[[Callable[[int, str, str], Fault | None]], FlakyProxy],
    s3: S3Path,
) -> None:
    """Once for each of its two folders, and not once more for files that only a kill on a disk leaves."""
    import_features(*features, s3 / "s")
    listed = []

    def no_fault(_: int, method: str, path: str) -> None:
        query = parse_qs(urlsplit(path).query)
        if "list-type" in query and "delimiter" not in query:  # else it lists names of videos alone
            listed.append(query["prefix"][0].removeprefix(f"{s3.key}/"))

    proxy(no_fault)
    assert import_features(*features, s3 / "s").skipped == 7
    assert listed == ["s/plain/", "s/valid/"]


def test_a_server_that_dies_loses_nothing_that_is_written(
    features: tuple[pd.DataFrame, Path],
    proxy: Callable[[Callable[[int, str, str], Fault | None]], FlakyProxy],
    use_s3: Callable[[int], None],
    s3: S3Path,
    s3_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(locations, "RETRY_SECONDS", 1)
    chunks: list[str] = []

    def dies_after_three_chunks(_: int, method: str, path: str) -> Fault | None:
        if method == "PUT" and "/plain/" in path and "/c/" in path:
            chunks.append(path)
        return "hung up" if len(chunks) > 3 else None

    proxy(dies_after_three_chunks)
    with pytest.raises(StoreError) as caught:
        import_features(*features, s3 / "s")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{s3 / 's'}: ")
    assert "run the same command again" in str(caught.value)

    use_s3(s3_port)
    store = open_store(s3 / "s")
    assert len(store.missing_units(list(LENGTHS))) == 4
    with pytest.raises(StoreError, match="lacks 2 of 2 videos"):
        store.require(list(LENGTHS))
    report = import_features(*features, s3 / "s")
    assert (report.done, report.skipped) == (4, 3)
    import_features(*features, tmp_path / "s")
    assert contents(s3 / "s") == contents(tmp_path / "s")


def test_extraction_needs_no_right_to_delete(
    proxy: Callable[[Callable[[int, str, str], Fault | None]], FlakyProxy],
    s3: S3Path,
    drawn: DrawnData,
    tiny_config: PipelineConfig,
) -> None:
    """Where nothing failed before, there is nothing to delete either."""
    before = proxy(lambda _, method, path: "403" if method == "DELETE" or "?delete" in path else None)
    assert extract_features(drawn.manifest, drawn.crops, s3 / "s", tiny_config).ok
    assert "403" not in before.served


def test_a_server_that_is_gone_is_one_line_in_bounded_time(
    use_s3: Callable[[int], None], impatient: None, drawn: DrawnData, tiny_config: PipelineConfig
) -> None:
    pytest.importorskip("obstore", reason="the extra [s3] is not installed")
    use_s3(9)  # nobody listens there
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"s3://bucket/s.*: .*after \d+ retries") as caught:
        extract_features(drawn.manifest, drawn.crops, "s3://bucket/s", tiny_config)
    assert time.monotonic() - started > 3, "it was asked once only"
    assert "\n" not in str(caught.value)


def test_a_server_that_takes_its_time_is_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locations, "_said", set())
    monkeypatch.setattr(locations, "_NOTICE_SECONDS", 0.05)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://slow:9000")
    slow = S3Path("bucket", "s")
    assert reach(slow, lambda: 1) == 1
    assert capsys.readouterr().err == ""
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: reach(slow, lambda: time.sleep(0.3) or number), range(16))) == [*range(16)]
    said = capsys.readouterr().err
    assert said.startswith("s3://bucket at http://slow:9000: something takes more than 0.05 s.")
    assert said.count("\n") == 1


def test_access_denied_missing_buckets_and_credentials_are_named(
    proxy: Callable[[Callable[[int, str, str], Fault | None]], FlakyProxy],
    s3: S3Path,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(words: str, where: str | Location) -> None:
        for attempt in (open_store, lambda path: store_module.create_store(path, {"encoder": "e"}, 3)):
            with pytest.raises(PipelineError, match=words) as caught:
                attempt(where)
            assert str(where).split("/")[2] in str(caught.value)
            assert "\n" not in str(caught.value)

    with pytest.raises(StoreError, match=rf"There is no feature store at {s3}/s"):
        open_store(s3 / "s")
    refused(r"there is no such bucket\. Check its name and AWS_REGION", "s3://no-such-bucket/s")
    proxy(lambda *_: "403")
    refused(r"access is denied \(AccessDenied\)\. Check AWS_ACCESS_KEY_ID", s3 / "s")
    proxy(lambda *_: "400")
    refused(r"400 Bad Request.*Check AWS_REGION", s3 / "s")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    locations._client.cache_clear()
    refused(r"no credentials\. Set AWS_ACCESS_KEY_ID", s3 / "s")
    assert locations._lasting_reason(f"503 Slow Down: {s3}/latest/features.zarr") is None, "a folder may be called so"
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    locations._client.cache_clear()
    refused(r"pip install 'vnaw-pipeline\[s3\]'", s3 / "s")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"])
def test_an_endpoint_that_is_no_server_is_refused(
    name: str, use_s3: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client would crash on each of these, with a stack of its own."""
    pytest.importorskip("obstore", reason="the extra [s3] is not installed")
    use_s3(9)
    for url in ("localhost:9000", "localhost", "ftp://host", "http://", "http://:9", "http://host:9x", "http://[::1"):
        monkeypatch.setenv(name, url)
        with pytest.raises(ConfigError, match=rf"{name}='{re.escape(url)}' is not the address of a server: expected"):
            open_store("s3://bucket/s")
    for url in ("http://a b", " http://host", "http://host:99999"):
        assert not locations._is_server(url)
    for url in ("http://host", "https://a-b.c:443/base", "HTTP://127.0.0.1:9/", "http://[::1]:9"):
        assert locations._is_server(url)


def test_a_setting_that_is_empty_is_none(s3: S3Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_SKIP_SIGNATURE", "AWS_REGION"):
        monkeypatch.setenv(name, "")
    locations._client.cache_clear()
    write_text(s3 / "a.txt", "there")
    assert (s3 / "a.txt").read_bytes() == b"there"


def test_credentials_that_are_set_by_half_are_named_at_once(
    use_s3: Callable[[int], None], impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore", reason="the extra [s3] is not installed")
    for setting, value, words in (
        ("AWS_SECRET_ACCESS_KEY", "", "Missing SecretAccessKey"),
        ("AWS_ACCESS_KEY_ID", "", "Missing AccessKeyId"),
        ("AWS_SKIP_SIGNATURE", "maybe", '"maybe" as boolean'),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/nowhere", "Failed to read token file '/nowhere'"),
    ):
        use_s3(9)
        with monkeypatch.context() as of_this:
            of_this.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/any")
            if "TOKEN" in setting:
                of_this.delenv("AWS_ACCESS_KEY_ID")
                of_this.delenv("AWS_SECRET_ACCESS_KEY")
            of_this.setenv(setting, value)
            started = time.monotonic()
            with pytest.raises(StoreError, match=rf"s3://bucket/s.*{words}.*which go together") as caught:
                open_store("s3://bucket/s")
            assert time.monotonic() - started < 3, "it was tried again"
            assert "\n" not in str(caught.value)


def test_the_command_line_says_it_in_one_line(
    s3: S3Path,
    features: tuple[pd.DataFrame, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_manifest(features[0], tmp_path / "m.csv")
    for store, code in (("s3://no-such-bucket/s", 1), ("gs://bucket/s", 2)):
        line = ["vnaw", "import", "--manifest", tmp_path / "m.csv", "--features", features[1], "--store", store]
        monkeypatch.setattr(sys, "argv", list(map(str, line)))
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == code
        said = capsys.readouterr().err
        assert store in said
        assert said.count("\n") == 1


def test_a_full_disk_names_the_store_and_the_rerun_goes_on(
    features: tuple[pd.DataFrame, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a file system of 64 kB: each array, each chunk and each folder takes a page of 4."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("a file system of its own cannot be mounted here")
    try:
        write_manifest(features[0], tmp_path / "m.csv")
        line = ["vnaw", "import", "--manifest", tmp_path / "m.csv", "--features", features[1], "--store", disk / "s"]
        monkeypatch.setattr(sys, "argv", list(map(str, line)))
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 1
        said = capsys.readouterr().err
        assert f"Cannot read or write {disk / 's'}" in said
        assert "No space left on device" in said
        assert said.count("\n") == 1
        assert not list(disk.rglob("*.partial*")), "half of a file"
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 0
        assert "3 chunks done, 4 skipped" in capsys.readouterr().out
        import_features(*features, tmp_path / "s")
        assert contents(disk / "s") == contents(tmp_path / "s")
    finally:
        subprocess.run(["umount", disk], check=True)
