"""Fetching: what is taken from an archive, what is refused, and that the cache never holds anything else."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from graphwright.models import assets, datasets
from graphwright.models.assets import Asset, Package
from graphwright.passes.errors import AssetError

CONTENT = {"pack/data/b.txt": b"second", "pack/data/a.txt": b"first", "pack/other.txt": b"not wanted"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def folder_sha256(files: dict[str, bytes]) -> str:
    return sha256("".join(f"{sha256(files[n])}  {n}\n" for n in sorted(files)).encode())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from instead of any registry, with one wheel called parcel."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "parcel-1.0-py3-none-any.whl", "w") as wheel:
        for name, data in CONTENT.items():
            wheel.writestr(name, data)
        wheel.writestr("parcel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: parcel\nVersion: 1.0\n")
        wheel.writestr(
            "parcel-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("parcel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Asset]:
    parcel = Package("parcel", "1.0")
    entries = {
        "one-file": Asset(parcel, ("pack/data/a.txt",), sha256(b"first"), "CC0-1.0", "a file"),
        "folder": Asset(
            parcel,
            ("pack/data/*.txt",),
            folder_sha256({"a.txt": b"first", "b.txt": b"second"}),
            "CC0-1.0",
            "two",
        ),
    }
    monkeypatch.setattr(assets, "ASSETS", entries)
    return entries


def cached(cache: Path) -> list[str]:
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())


def test_one_download_brings_every_asset_of_the_archive(index: Path, table: dict[str, Asset], tmp_path: Path) -> None:
    path = assets.fetch("one-file", tmp_path / "cache")
    assert path.read_bytes() == b"first"
    assert assets.has("folder", tmp_path / "cache")
    files = [f"folder-{table['folder'].sha256[:8]}/{n}.txt" for n in "ab"]
    assert cached(tmp_path / "cache") == [*files, f"one-file-{table['one-file'].sha256[:8]}/a.txt"]


def test_a_cached_asset_needs_no_download(
    index: Path, table: dict[str, Asset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = assets.fetch("folder", tmp_path)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert assets.fetch("folder", tmp_path) == first == assets.find("folder", tmp_path)


def test_an_altered_copy_is_reported_by_find_and_replaced_by_fetch(
    index: Path, table: dict[str, Asset], tmp_path: Path
) -> None:
    path = assets.fetch("one-file", tmp_path)
    path.write_bytes(b"altered")
    with pytest.raises(AssetError, match=r"has sha256 .* expected .*`graphwright models fetch one-file`"):
        assets.find("one-file", tmp_path)
    assert assets.fetch("one-file", tmp_path).read_bytes() == b"first"


def test_a_wrong_checksum_leaves_the_cache_without_it(index: Path, table: dict[str, Asset], tmp_path: Path) -> None:
    table["one-file"] = Asset(Package("parcel", "1.0"), ("pack/data/a.txt",), "0" * 64, "CC0-1.0", "a file")
    with pytest.raises(AssetError, match=f"one-file from parcel 1.0 has sha256 {sha256(b'first')}, expected 0000"):
        assets.fetch("one-file", tmp_path)
    assert not assets.has("one-file", tmp_path)
    assert not list(tmp_path.glob(".fetch-*"))


def test_a_missing_member_is_one_line(index: Path, table: dict[str, Asset], tmp_path: Path) -> None:
    table["one-file"] = Asset(Package("parcel", "1.0"), ("pack/gone.txt",), "0" * 64, "CC0-1.0", "a file")
    with pytest.raises(AssetError, match=r"^parcel 1.0 does not contain pack/gone.txt: the package was changed$"):
        assets.fetch("one-file", tmp_path)


def test_a_failed_download_is_one_line_with_what_to_do(index: Path, table: dict[str, Asset], tmp_path: Path) -> None:
    table["one-file"] = Asset(Package("parcel", "2.0"), ("pack/data/a.txt",), "0" * 64, "CC0-1.0", "a file")
    with pytest.raises(AssetError, match=r"^cannot download parcel 2.0: .*; check the network") as caught:
        assets.fetch("one-file", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm_packages_say_when_npm_is_missing(
    table: dict[str, Asset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table["text"] = Asset(Package("@scope/text", "1.0.0", "npm"), ("package/a.txt",), "0" * 64, "CC0-1.0", "text")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match=r"@scope/text 1.0.0 comes from npm, which was not found: install Node"):
        assets.fetch("text", tmp_path)


def test_absent_and_unknown_assets_name_the_way_out(table: dict[str, Asset], tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"one-file \(parcel 1.0\) is not in .*: run `graphwright models fetch one-"):
        assets.find("one-file", tmp_path)
    with pytest.raises(AssetError, match="no asset 'one-flie': did you mean one-file"):
        assets.find("one-flie", tmp_path)


def test_members_of_an_archive_cannot_leave_the_cache(tmp_path: Path) -> None:
    """Members are written by base name only, whatever path the archive gives them."""
    archive = tmp_path / "evil.tgz"
    (tmp_path / "payload").write_bytes(b"payload")
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(tmp_path / "payload", "package/../../outside.txt")
    scratch = tmp_path / "a" / "b"
    scratch.mkdir(parents=True)
    asset = Asset(Package("evil", "1.0", "npm"), ("package/*.txt",), "0" * 64, "", "")
    folders = assets._extract(archive, {"evil": asset}, scratch)
    assert [p.name for p in folders["evil"].iterdir()] == ["outside.txt"]
    assert not (tmp_path / "outside.txt").exists() and not (tmp_path / "a" / "outside.txt").exists()


def test_the_cache_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "elsewhere"))
    assert assets.cache_folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("GRAPHWRIGHT_CACHE")
    assert assets.cache_folder() == Path.home() / ".cache" / "graphwright"


def test_importing_the_models_imports_nothing_heavy() -> None:
    """The table is read by commands that must start fast: torch and the rest come in with a build."""
    code = (
        "import sys; from graphwright.models import registry; registry.names(); "
        "print([m for m in ('torch', 'tvm', 'onnxruntime', 'onnx', 'gguf', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.assets
@pytest.mark.parametrize("name", list(assets.ASSETS))
def test_every_asset_is_as_the_table_says(name: str, fetched: Callable[[str], None]) -> None:
    fetched(name)
    path = assets.find(name)
    assert path.is_file() == assets.ASSETS[name].is_file


@pytest.mark.assets
def test_data_sets_have_the_counts_their_authors_give(fetched: Callable[[str], None]) -> None:
    for name in ("mnist-5k", "digits", "movie-sentences", "photos", "two-photos", "page"):
        fetched(name)
    images, labels = datasets.mnist()
    assert images.shape == (5000, 28, 28) and images.max() == 255
    assert np.bincount(labels).tolist() == [500] * 10
    images, labels = datasets.digits()
    assert images.shape == (1797, 8, 8) and images.max() == 16 and set(labels) == set(range(10))
    sentences = datasets.movie_sentences()
    assert len(sentences) == 10605
    assert all(-4 <= score <= 4 for _, score in sentences)
    assert [datasets.photo(n).shape[2] for n in datasets.photo_names()] == [3] * 11
    assert datasets.page().shape == (191, 384, 3)


@pytest.mark.assets
def test_texts_have_the_counts_their_authors_give(fetched: Callable[[str], None]) -> None:
    fetched("moby-dick")
    fetched("sotu")
    assert len(datasets.moby_dick().split()) == 208160
    addresses = datasets.state_of_the_union()
    assert len(addresses) == 233
    assert addresses["1790_george_washington_n"].startswith("Fellow-Citizens of the Senate")
