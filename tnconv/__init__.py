"""tnconv."""
