"""ONNX graphs: find the norm layers and rewrite them; on onnx-ir, without torch."""
