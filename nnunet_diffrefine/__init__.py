"""nnunet_diffrefine: refine nnU-Net segmentations with diffusion models trained on out-of-fold predictions."""

__version__ = "0.1.0"
