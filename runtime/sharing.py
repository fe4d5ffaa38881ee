"""One weights file for several artifacts, such as a decoder's for its prompt and for one token."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx

from .artifact import MODEL, ONNXRUNTIME, WEIGHTS, Artifact, WeightStore, file_specs, read_range, write_manifest


def share_weights(root: Path, names: Sequence[str]) -> None:
    """Bring the weights of the artifacts `names` in `root` into one file, in which equal ones are stored once.

    Each artifact's own file becomes another name of it: a hard link, since onnxruntime refuses weights that a symbolic
    link leads out of the model's folder to. Where there are no hard links, and after a copy that does not keep them,
    each has a file of its own with the weights of all. A process that loads several maps the one file once.
    """
    whole = root / f".{WEIGHTS}.part"
    whole.touch()
    store = WeightStore(whole)
    for name in names:
        _move(Artifact.load(root / name, verify=False), store)
    for name in names:
        folder = root / name
        (folder / WEIGHTS).unlink(missing_ok=True)
        try:
            os.link(whole, folder / WEIGHTS)
        except OSError:
            shutil.copyfile(whole, folder / WEIGHTS)
        manifest = Artifact.load(folder, verify=False).manifest
        write_manifest(manifest.model_copy(update={"files": file_specs(folder)}), folder)
    whole.unlink(missing_ok=True)


def _move(artifact: Artifact, store: WeightStore) -> None:
    """Add an artifact's weights to the store and let all that refers to them refer to their new places."""
    own = artifact.root / WEIGHTS

    def moved(offset: int, nbytes: int) -> int:
        return store.add(read_range(own, offset, nbytes), nbytes)

    regions = []
    for region in artifact.manifest.regions:
        parameters = [p.model_copy(update={"offset": moved(p.offset, p.nbytes)}) for p in region.parameters]
        regions.append(region.model_copy(update={"parameters": parameters}))
    for file in [MODEL, *(r.file for r in regions if r.runtime == ONNXRUNTIME)]:
        _redirect(artifact.root / file, moved)
    write_manifest(artifact.manifest.model_copy(update={"regions": regions}), artifact.root)


def _redirect(path: Path, moved: Callable[[int, int], int]) -> None:
    """Rewrite the places that a model's tensors have in the weights file."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry for entry in tensor.external_data}
            entries["offset"].value = str(moved(int(entries["offset"].value), int(entries["length"].value)))
    path.write_bytes(model.SerializeToString())
