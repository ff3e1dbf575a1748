"""Images made after training, for verification and INT8 calibration."""
