"""The bridge from the prior to the reference: the project's first method.

With the error E = x_0 - p of stage one's probabilities p against the reference x_0, the state is

    x_t = p + a_t E,    a_0 = 1, a_T = 0,

as it stands (deterministic) or as its Bernoulli / categorical draw (discrete). It ends at the prior, not at noise, so
sampling starts from stage one and the first step is an ordinary correction; later steps can only build on it. The
denoiser sees image, p and x_t and outputs the logits of the corrected mask, trained with nnU-Net's own loss.

Relatives: HiDiff (binary, https://arxiv.org/abs/2407.03548), SegRefiner (https://arxiv.org/abs/2312.12425), Cold
Diffusion (deterministic states, https://arxiv.org/abs/2208.09392).
"""

from __future__ import annotations

from nnunet_diffrefine.methods.composition import ComposedMethod


class Bridge(ComposedMethod):
    """Corrected-mask prediction along a bridge that ends at the prior."""

    name = "bridge"
    trainer = "DiffRefineTrainer_Bridge"
    needs = {"process.kind": ("bridge",), "error.target": ("mask",)}
