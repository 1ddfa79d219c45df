"""What kernels cost and hold: prices, their calibration on a device, and the store on disk."""
