"""Predicted against measured memory of training steps."""
