"""Algorithm 1 of the paper, site by site: structural residual calibration, harmonized scales, boundary refinement.

Imports what ``harmonization`` may import, and its ``teacher``, ``weights``, ``run_until`` and ``progress``.
"""
