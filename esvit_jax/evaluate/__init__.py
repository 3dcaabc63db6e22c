"""Measuring a trained backbone: its features, k-nearest neighbours, linear classifiers."""
