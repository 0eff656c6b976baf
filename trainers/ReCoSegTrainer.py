"""Found by nnU-Net through ``nnUNet_extTrainer``; the class lives in the installed package."""

from nnunet_diffrefine.training.trainer_recoseg import ReCoSegTrainer  # noqa: F401
