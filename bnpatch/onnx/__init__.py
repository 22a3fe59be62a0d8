"""Find the norm layers of ONNX graphs and rewrite them."""
