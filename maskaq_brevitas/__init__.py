"""Data-free quantization of Vision Transformers on Brevitas."""
