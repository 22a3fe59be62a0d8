"""Train a classifier further with Ghost Batch Norm, decay of scales and shifts, or Batch/Group Norm."""
