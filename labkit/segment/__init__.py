"""Segment in an image what a sentence names."""
