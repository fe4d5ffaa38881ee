"""The table of models: what each needs, its inputs, how it becomes an ONNX file, and real inputs for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.passes.errors import AssetError, OutputError, UsageError, did_you_mean

from . import assets

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch

    Feeds = dict[str, np.ndarray]
    Sample = Callable[[np.random.Generator, Mapping[str, int]], Feeds]
    Build = Callable[..., "ir.Model | Path"]
    Module = Callable[..., "torch.nn.Module"]

_MODELS: dict[str, ModelEntry] = {}


@dataclass(frozen=True)
class ModelEntry:
    """One model of the table.

    `inputs` gives each input's shape, a word standing for a size; `sizes` gives every such word its usual
    value. A word that is also a parameter of `build` is fixed at the export; the others stay dynamic.
    `module` makes the torch module that is exported; None for a model that is an ONNX file already.
    """

    name: str
    description: str
    source: str
    licence: str
    inputs: Mapping[str, tuple[int | str, ...]]
    sizes: Mapping[str, int]
    needs_assets: tuple[str, ...]
    sample_assets: tuple[str, ...]
    sample: Sample
    build: Build
    module: Module | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of `export` and their defaults."""
        return {p.name: p.default for p in inspect.signature(self.build).parameters.values()}

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input name -> axis -> word, for the axes that the exported model leaves open."""
        open_words = set(self.sizes) - set(self.options)
        axes = {
            name: {i: word for i, word in enumerate(shape) if isinstance(word, str) and word in open_words}
            for name, shape in self.inputs.items()
        }
        return {name: found for name, found in axes.items() if found}

    def shapes(self, sizes: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
        """Each input's shape with the words replaced by `sizes`, or by their usual values."""
        known = {**self.sizes, **self._checked(sizes or {})}
        return {
            name: tuple(known[d] if isinstance(d, str) else d for d in shape) for name, shape in self.inputs.items()
        }

    def _checked(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        for word, size in sizes.items():
            if word not in self.sizes:
                raise UsageError(f"{self.name} has no size {word!r}: {did_you_mean(word, self.sizes)}")
            if size < 1:
                raise UsageError(f"{self.name}: {word} is {size}, expected at least 1")
        return sizes


def register_model(
    name: str,
    *,
    description: str,
    source: str,
    licence: str,
    inputs: Mapping[str, tuple[int | str, ...]],
    sizes: Mapping[str, int],
    sample: Sample,
    needs_assets: tuple[str, ...] = (),
    sample_assets: tuple[str, ...] = (),
    module: Module | None = None,
) -> Callable[[Build], Build]:
    """Enters the decorated function under `name`.

    The function's keyword parameters are the export options. It returns the model, or the path of a file
    that is to be copied as it is. `needs_assets` are read by it, `sample_assets` by `sample`. `module` takes the same
    parameters and returns the torch module.
    """

    def enter(build: Build) -> Build:
        if name in _MODELS:
            raise ValueError(f"two models are called {name!r}")
        _MODELS[name] = ModelEntry(
            name, description, source, licence, inputs, sizes, needs_assets, sample_assets, sample, build, module
        )
        return build

    return enter


def names() -> list[str]:
    """All models, in the order of the table."""
    return list(_models())


def describe(name: str) -> ModelEntry:
    """The model's entry. Raises UsageError for a name that is not in the table."""
    models = _models()
    if name not in models:
        raise UsageError(f"no model {name!r}: {did_you_mean(name, models)}")
    return models[name]


def pins(name: str, sizes: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
    """Input name -> recommended shape, to pin the dynamic axes; `sizes` replaces usual values by word."""
    return describe(name).shapes(sizes)


def sample_inputs(name: str, seed: int | np.random.Generator = 0, dims: Mapping[str, int] | None = None) -> Feeds:
    """Inputs for the model, of the shapes `pins(name, dims)`: real data where there are real data for it.

    The same seed gives the same inputs. Raises AssetError if the data are not in the cache.
    """
    import numpy as np

    entry = describe(name)
    _require(entry, entry.sample_assets)
    rng = np.random.default_rng(seed)
    shapes = entry.shapes(dims)
    with extra(name):
        feeds = entry.sample(rng, {**entry.sizes, **(dims or {})})
    for key, shape in shapes.items():
        if feeds[key].shape != shape:
            raise AssertionError(f"the sample of {name} has {key} {feeds[key].shape}, not {shape}")
    return feeds


def export(name: str, path: str | Path, *, overwrite: bool = False, **options: Any) -> Path:
    """Writes the model as an ONNX file, whole or not at all, and returns its path.

    `options` are those of `describe(name).options`. Weights above 1 GiB go into a data file beside it.
    Raises AssetError if its weights are not in the cache or torch is not installed, UsageError for an unknown
    model or option.
    """
    from graphwright.passes import io

    entry = describe(name)
    for option in options:
        if option not in entry.options:
            raise UsageError(f"{name} has no option {option!r}: {did_you_mean(option, entry.options)}")
    path = Path(path)
    io.check_output(path, overwrite)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; expected a file name")
    _require(entry, entry.needs_assets)
    with extra(name):
        built = entry.build(**options)
    if isinstance(built, Path):
        with io.replacing(path) as temporary:
            temporary.write_bytes(built.read_bytes())
    else:
        io.save(built, path, overwrite=overwrite)
    return path


def torch_module(name: str, **options: Any) -> torch.nn.Module:
    """The module that `export` exports, in evaluation mode.

    Raises UsageError for a model that torch does not define, AssetError if its weights or torch are absent.
    """
    entry = describe(name)
    if entry.module is None:
        raise UsageError(f"{name} is an ONNX file, not a torch module; see `graphwright models list`")
    _require(entry, entry.needs_assets)
    with extra(name):
        return entry.module(**options).eval()


def fetch(name: str) -> list[Path]:
    """Puts all that a model and its sample inputs need into the cache; `name` may also be a single asset."""
    if name in assets.ASSETS:
        return [assets.fetch(name)]
    models = _models()
    if name not in models:
        raise AssetError(f"no model or asset {name!r}: {did_you_mean(name, [*models, *assets.ASSETS])}")
    wanted = dict.fromkeys(models[name].needs_assets + models[name].sample_assets)
    return [assets.fetch(asset) for asset in wanted]


def _require(entry: ModelEntry, wanted: tuple[str, ...]) -> None:
    missing = [asset for asset in wanted if not assets.has(asset)]
    if missing:
        raise AssetError(
            f"{entry.name} needs {', '.join(missing)}, which {assets.cache_folder()} does not hold: "
            f"run `graphwright models fetch {entry.name}`"
        )


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns a missing package of the extra "models" into an error that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("gguf", "PIL", "safetensors", "tokenizers", "torch"):
            raise
        raise AssetError(
            f"{name} needs {package}, which is not installed: run `pip install 'graphwright[models]'`"
        ) from error


@functools.cache
def _models() -> dict[str, ModelEntry]:
    from . import zoo  # noqa: F401 -- importing it enters the models

    return _MODELS
