"""Post-training quantization of image super-resolution transformers to 8, 4, 3 and 2 bits, run on integers.

::

    prepared = prepare_harmoq(model, HarmoqConfig(weight_bits=4, act_bits=4))
    calibrate(prepared, images)
    quantized = convert_harmoq(prepared)

Rooms, in the order in which data flows; each imports only from those above it (`make check` holds it to that):

=================  ===================================================================================================
``common``         errors, progress, output files, devices, ranks
``images``         image files, data sets, calibration crops, PSNR and SSIM
``quant``          the arithmetic: quantizers, bounds, observers, joint scales and shifts, the integer reference
``config``         what to quantize, and to how many bits
``graph``          FX islands: the author's forward as a graph, for every image size
``zoo``            float checkpoints
``kernels``        one operator on one device, and which kernel runs it
``sites``          the modules that stand at contractions, prepared and quantized; reports
``lowering``       passes that put one fused kernel in place of several sites
``preparation``    1. a float model becomes a prepared one
``calibration``    2. images are observed, bounds are solved
``harmonization``  3. Algorithm 1 of the paper, and refinement of the whole network
``conversion``     4. a prepared model becomes an integer one; saving and loading
``runtime``        5. tiles, upscaling, evaluation, OpenVINO, ``torch.compile``
``baselines``      published methods on the same sites, and mixed precision
``export``         ONNX, ``torch.export``, float checkpoints
``reporting``      the HTML report
``cli``            the command ``harmoq``
=================  ===================================================================================================

``triton_kernels`` and ``recipes`` lie at the top of the repository and are imported from here.

`__init__.pyi` lists the public names. A name is imported from its room when it is first used, so that
`import harmoq_ao` imports neither torch nor any room.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
