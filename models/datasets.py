"""The data sets of `assets` as arrays and text. Each raises AssetError if it is not in the cache."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from graphwright.passes.errors import UsageError, did_you_mean

from . import assets

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_PHOTOS = tuple(PurePath(member).stem for member in assets.ASSETS["photos"].members)
_TWO_PHOTOS = ("china", "flower")


def photo_names() -> list[str]:
    """The photos, those of the asset "photos" first, then those of "two-photos"."""
    return [*_PHOTOS, *_TWO_PHOTOS]


def photo(name: str) -> NDArray[np.uint8]:
    """One colour photo, (height, width, 3), red green blue."""
    if name not in photo_names():
        raise UsageError(f"no photo {name!r}: {did_you_mean(name, photo_names())}")
    folder = assets.find("photos" if name in _PHOTOS else "two-photos")
    return _image(next(folder.glob(f"{name}.*")))


def page() -> NDArray[np.uint8]:
    """A photographed page of printed text, (191, 384, 3), three equal channels."""
    return _image(assets.find("page"))


def moby_dick() -> str:
    """The text of Moby-Dick, chapter 1 onwards."""
    return assets.find("moby-dick").read_text(encoding="utf-8")


def state_of_the_union() -> dict[str, str]:
    """File name without the ending, such as "1790_george_washington_n", -> address."""
    return {p.stem: p.read_text(encoding="utf-8") for p in sorted(assets.find("sotu").iterdir())}


def movie_sentences() -> list[tuple[str, float]]:
    """Sentences of film reviews, each with its mean sentiment from -4 (worst) to 4 (best)."""
    with tarfile.open(assets.find("movie-sentences")) as archive:
        file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert file is not None  # the checksum says that it is there
        lines = file.read().decode("utf-8").splitlines()
    fields = (line.split("\t", 2) for line in lines)
    return [(text, float(score)) for _, score, text in fields]


def mnist() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """5,000 handwritten digits, sorted by class: images (5000, 28, 28) from 0 to 255, labels (5000,)."""
    import numpy as np

    table = _table(assets.find("mnist-5k"))
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """1,797 handwritten digits: images (1797, 8, 8) from 0 to 16, labels (1797,)."""
    import numpy as np

    table = _table(assets.find("digits"))
    return table[:, :-1].astype(np.uint8).reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def _image(path: Path) -> NDArray[np.uint8]:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _table(path: Path) -> NDArray[np.float64]:
    import numpy as np

    return np.loadtxt(io.StringIO(gzip.decompress(path.read_bytes()).decode()), delimiter=",")
