"""One file with the large weights of several ONNX models, such as a decoder's for its prompt and for one token."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from . import io, wire


class SharedWeights:
    """A weights file while it is written: tensors of equal bytes are stored once, whatever the graphs call them."""

    def __init__(self, path: Path) -> None:
        self.path, self._offsets, self._end = path, dict[bytes, int](), 0
        path.touch()

    def put(self, model: ir.Model) -> None:
        """Move the large tensors of the main graph into the file; smaller ones stay where they are."""
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < wire.LARGE or tensor.dtype == ir.DataType.STRING:
                continue
            value.const_value = ir.ExternalTensor(
                self.path.name, self._offset(tensor), tensor.nbytes, tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=self.path.parent,
            )  # fmt: skip

    def _offset(self, tensor: ir.TensorProtocol) -> int:
        from blake3 import blake3

        digest = blake3()
        for chunk in io.tensor_chunks(tensor):
            digest.update(chunk)
        key = digest.digest()
        if key not in self._offsets:
            self._offsets[key] = -(-self._end // io.ALIGNMENT) * io.ALIGNMENT
            self._end = self._offsets[key] + tensor.nbytes
            with self.path.open("r+b") as file:
                file.seek(self._offsets[key])
                file.writelines(io.tensor_chunks(tensor))
        return self._offsets[key]


def share_weights(models: list[Path], weights: Path) -> None:
    """Let saved models refer to one new file, in their folder, for what is large in them."""
    shared = SharedWeights(weights)
    for path in models:
        model = io.load(path)
        shared.put(model)
        content = ir.to_proto(model).SerializeToString()
        path.unlink()  # and not written over: small tensors may still be read from where it lies
        path.write_bytes(content)
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
