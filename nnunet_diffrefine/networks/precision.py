"""The precision that networks run in, in trainings and in ``apply`` and ``calibrate``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """Autocast as nnU-Net's on CUDA; bf16 on CPUs that have it in hardware; nothing elsewhere."""
    if device.type == "cuda":
        return torch.autocast("cuda")
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()
