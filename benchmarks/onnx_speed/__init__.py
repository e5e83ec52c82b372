"""The ONNX file of a masked model in onnxruntime, against PyTorch."""
