"""Q1: train, measure and inspect an image classifier."""
