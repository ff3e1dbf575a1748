"""Export to ONNX in fp32, fp16 and INT8."""
