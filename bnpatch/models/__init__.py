"""Load models of torch and ONNX, patch them, run them, and export them."""
