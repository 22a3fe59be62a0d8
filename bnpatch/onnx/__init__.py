"""Find the norm layers of ONNX graphs and rewrite them."""

import logging

# These libraries log what is wrong with a damaged graph, with tracebacks, and Python prints that where nobody
# has set up logging. bnpatch says in one line what it can't use; who sets up logging still sees all.
for _library in ("onnx_ir", "onnxscript"):
    logging.getLogger(_library).addHandler(logging.NullHandler())
