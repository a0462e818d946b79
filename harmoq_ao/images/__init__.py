"""Images in and out: files, folders, data sets, benchmark pairs, calibration crops, PSNR and SSIM.

May import ``common``.
"""

from harmoq_ao.common.output import atomic_write
from harmoq_ao.images.columns import ImageColumn, as_record, from_hf_dataset
from harmoq_ao.images.crops import CalibrationCrops
from harmoq_ao.images.folders import IMAGE_SUFFIXES, PICTURE_SUFFIXES, Found, Listing, list_images
from harmoq_ao.images.pairs import ImagePair, load_pairs
from harmoq_ao.images.photographs import (
    CALIBRATION_PHOTOGRAPHS,
    EVALUATION_PHOTOGRAPHS,
    skimage_photographs,
    split_photographs,
)
from harmoq_ao.images.reading import MAX_PIXELS, EncodedImage, image_from_pillow, image_size, load_image
from harmoq_ao.images.records import ImageRecord, image_from_array
from harmoq_ao.images.sources import find_images, image_files, list_sources
from harmoq_ao.images.tensors import check_image_tensor, luma
from harmoq_ao.images.writing import WRITABLE, save_image, save_rows

__all__ = [
    "CALIBRATION_PHOTOGRAPHS",
    "EVALUATION_PHOTOGRAPHS",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "PICTURE_SUFFIXES",
    "WRITABLE",
    "CalibrationCrops",
    "EncodedImage",
    "Found",
    "ImageColumn",
    "ImagePair",
    "ImageRecord",
    "Listing",
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
    "list_sources",
    "load_image",
    "load_pairs",
    "luma",
    "save_image",
    "save_rows",
    "skimage_photographs",
    "split_photographs",
]
