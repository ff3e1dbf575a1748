"""INT8 ONNX: calibration, quantisation, and the layers that stay in fp32."""
