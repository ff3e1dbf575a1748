"""Export to TensorRT and TensorRT-RTX engines."""
