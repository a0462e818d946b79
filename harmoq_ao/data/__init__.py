"""Images in and out: files, folders, data sets, pairs of a benchmark, and crops for calibration."""

from harmoq_ao.data.crops import (
    CALIBRATION_PHOTOGRAPHS,
    EVALUATION_PHOTOGRAPHS,
    CalibrationCrops,
    ImageColumn,
    as_record,
    from_hf_dataset,
    luma,
    skimage_photographs,
    split_photographs,
)
from harmoq_ao.data.folders import IMAGE_SUFFIXES, ImagePair, list_images, load_pairs
from harmoq_ao.data.images import (
    MAX_PIXELS,
    WRITABLE,
    EncodedImage,
    ImageRecord,
    atomic_write,
    check_image_tensor,
    image_from_array,
    image_from_pillow,
    image_size,
    load_image,
    save_image,
)
from harmoq_ao.data.sources import find_images, image_files

__all__ = [
    "CALIBRATION_PHOTOGRAPHS",
    "EVALUATION_PHOTOGRAPHS",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "WRITABLE",
    "CalibrationCrops",
    "EncodedImage",
    "ImageColumn",
    "ImagePair",
    "ImageRecord",
    "as_record",
    "atomic_write",
    "check_image_tensor",
    "find_images",
    "from_hf_dataset",
    "image_files",
    "image_from_array",
    "image_from_pillow",
    "image_size",
    "list_images",
    "load_image",
    "load_pairs",
    "luma",
    "save_image",
    "skimage_photographs",
    "split_photographs",
]
