"""Algorithm 1 of the paper, site by site: structural residual calibration, harmonized scales, adaptive boundary refinement."""
