"""Found by nnU-Net through ``nnUNet_extTrainer``; the class lives in the installed package."""

from nnunet_diffrefine.training.variants import DiffRefineTrainer_MaskUNet  # noqa: F401
