"""Brevitas' post-training quantization (``brevitas_examples.imagenet_classification.ptq``), calibrated without data."""
