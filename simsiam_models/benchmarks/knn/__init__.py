"""Weighted k-nearest-neighbour classification on frozen features."""
