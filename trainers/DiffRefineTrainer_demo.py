"""Found by nnU-Net through ``nnUNet_extTrainer``; the class lives in the installed package."""

from nnunet_diffrefine.demo.trainers import DiffRefineTrainer_demo  # noqa: F401
