"""Float checkpoints: reading them without unpickling code, building architectures from a description.

Imports ``common``.
"""
