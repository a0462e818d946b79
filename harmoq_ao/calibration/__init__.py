"""Stage 2: images are observed, then the bounds, joint scales and shifts of every site are solved.

Imports ``preparation`` and what that may import.
"""
