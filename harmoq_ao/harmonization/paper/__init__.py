"""Algorithm 1 of the paper, site by site.

Structural residual calibration (``src``), harmonized scales, adaptive boundary refinement (``abr``).
"""
