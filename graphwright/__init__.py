"""graphwright: rewrite ONNX models with passes from research, compile them with TVM, prove the result."""

__version__ = "0.1.0"
