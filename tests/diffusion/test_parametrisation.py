"""x0, epsilon and v are three names for the same thing."""

import pytest
import torch

from nnunet_diffrefine.diffusion.parametrisation import epsilon_from, target_for, x0_from

ALPHA_BAR = torch.tensor([0.9999, 0.7, 0.3, 0.004], dtype=torch.float64)
KINDS = ["x0", "epsilon", "v"]


def mixed(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x0 = torch.rand(4, 2, 3, 4, 5, generator=g, dtype=dtype) * 2 - 1
    noise = torch.randn(x0.shape, generator=g, dtype=dtype)
    weight = ALPHA_BAR.view(4, 1, 1, 1, 1)
    return x0, noise, (weight.sqrt() * x0 + (1 - weight).sqrt() * noise).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_the_target_of_a_kind_leads_back_to_x0(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    x0, noise, x_t = mixed(dtype)
    back = x0_from(kind, target_for(kind, x0, noise, ALPHA_BAR), x_t, ALPHA_BAR)
    assert back.dtype == dtype
    torch.testing.assert_close(back, x0, atol=tolerance, rtol=0)


def test_epsilon_from_inverts_the_mixing() -> None:
    x0, noise, x_t = mixed(torch.float64)
    torch.testing.assert_close(epsilon_from(x0, x_t, ALPHA_BAR), noise, atol=1e-12, rtol=0)


def test_v_is_the_velocity_along_the_angle() -> None:
    """Salimans & Ho: with cos(phi) = sqrt(alpha_bar), v = d x_t / d phi."""
    x0, noise, _ = mixed(torch.float64)
    phi = torch.acos(ALPHA_BAR.sqrt()).view(4, 1, 1, 1, 1)
    h = 1e-6
    slope = [torch.cos(p) * x0 + torch.sin(p) * noise for p in (phi + h, phi - h)]
    torch.testing.assert_close(
        target_for("v", x0, noise, ALPHA_BAR), (slope[0] - slope[1]) / (2 * h), atol=1e-8, rtol=0
    )


def test_refuses_unknown_kinds() -> None:
    x0, noise, x_t = mixed(torch.float32)
    with pytest.raises(ValueError, match="kind is 'score'"):
        x0_from("score", noise, x_t, ALPHA_BAR)
    with pytest.raises(ValueError, match="kind is 'score'"):
        target_for("score", x0, noise, ALPHA_BAR)
