"""ONNX graphs: read, find the sites, rewrite them, write; on onnx-ir, without torch."""
