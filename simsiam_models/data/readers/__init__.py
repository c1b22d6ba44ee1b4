"""Readers of image data sets, one file per format."""
