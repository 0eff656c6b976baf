"""Found by nnU-Net through ``nnUNet_extTrainer``; the class lives in the installed package."""

from nnunet_diffrefine.demo.trainers import DiffRefineStageOneTrainer_demo  # noqa: F401
