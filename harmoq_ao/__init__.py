"""Post-training quantization of image super-resolution transformers."""

__version__ = "0.1.0"
