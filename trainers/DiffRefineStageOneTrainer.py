"""nnU-Net's trainer that exports its fold's out-of-fold priors after validation; the class lives in the package."""

from nnunet_diffrefine.stage_one.trainer import DiffRefineStageOneTrainer  # noqa: F401
