"""From floating-point weights to integer codes: calibration, folding, scaling, clipping, rounding."""
