"""Models to try graphwright on: real weights and data, small definitions, and their export to ONNX."""
