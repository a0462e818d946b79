"""Integer modules to kernels, one module per backend; every backend equals `reference` accumulator for accumulator."""
