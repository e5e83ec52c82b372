"""What DeepSpeed, the data and the telemetry cost a training step, beside a plain PyTorch loop."""
