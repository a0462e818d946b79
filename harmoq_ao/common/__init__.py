"""What every room may use: typed errors, the version, progress bars, output files, devices, ranks of torchrun.

Imports nothing of the package.
"""
