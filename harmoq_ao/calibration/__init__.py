"""Stage 2: a prepared model observes images; joint scales and quantization parameters are computed from them.

Imports ``sites``, and what that may import. ``calibrate`` runs the images, ``solve`` computes and switches.
"""
