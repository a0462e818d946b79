"""Float checkpoints: reading them without unpickling code, building architectures from a description.

May import ``common``.
"""

from harmoq_ao.zoo.architectures import architecture_spec, build_architecture
from harmoq_ao.zoo.checkpoints import LoadedModel, demo_checkpoint, image_traits_of, load_demo_model, load_model

__all__ = [
    "LoadedModel",
    "architecture_spec",
    "build_architecture",
    "demo_checkpoint",
    "image_traits_of",
    "load_demo_model",
    "load_model",
]
