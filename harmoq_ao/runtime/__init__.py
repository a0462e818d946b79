"""Stage 5, running a model: tiles, upscaling, evaluation, one program per image size, OpenVINO, Ray.

Imports ``conversion`` and what that may import.
"""
