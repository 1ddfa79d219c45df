"""Kernels of our own, where a device's libraries have none: custom operations of torch."""
