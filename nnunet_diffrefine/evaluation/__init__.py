"""Segmentations and references to one tidy table of named, documented metrics (docs/metrics.md)."""
