"""Low-bit kernels, one operation per file, each with its reference in plain torch beside it."""
