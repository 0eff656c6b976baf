"""CorrDiff as DMCIE describes it: image, prior and state in, class tokens between encoder and decoder."""

import pytest
import torch

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import ConfigError
from nnunet_diffrefine.methods.corrdiff import CorrDiff
from nnunet_diffrefine.networks.class_tokens import ClassTokens
from nnunet_diffrefine.plans import merge, shipped_settings
from tests.builders import LABELS, REGIONS, TinyDenoiser, batch_of, generator, method_of
from tests.methods.learning import mean_loss, train
from tests.networks.planned_networks import WIDTHS, denoiser_of

FOREGROUNDS = {
    "labels": LABELS,
    "regions": REGIONS,
    "one region": Foreground(("whole",), exclusive=False),
}
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
FORMS = pytest.mark.parametrize("literal", [False, True], ids=["sound", "literal"])


def corrdiff(foreground: Foreground, literal: bool = False, **changes: dict) -> CorrDiff:
    shipped = shipped_settings("corrdiff", {"paper_literal": literal})
    values = merge(shipped, {"training": {"deep_supervision": False}, **changes})
    return method_of(foreground, **{k: v for k, v in values.items() if k != "method"}, name="corrdiff")


@pytest.mark.parametrize("foreground", FOREGROUNDS.values(), ids=list(FOREGROUNDS))
def test_one_token_a_class_and_one_for_none_reads_the_deepest_stage(foreground: Foreground) -> None:
    """DMCIE has one class, whole tumour; here as many as the dataset."""
    denoiser = denoiser_of(corrdiff(foreground))
    assert isinstance(denoiser.bottleneck, ClassTokens)
    assert denoiser.bottleneck.tokens.shape == (foreground.channels + 1, WIDTHS[-1])


@BOTH
@pytest.mark.parametrize("form", ["soft", "hard"])
def test_it_corrects_a_prior_that_it_sees(foreground: Foreground, form: str) -> None:
    method, batch, seen = corrdiff(foreground, condition={"prior": form}), batch_of(foreground, image_channels=4), []
    network = TinyDenoiser(*method.channels(4))
    method.refine(lambda x, t: seen.append(x) or network(x, t), batch.image, batch.prior, generator())
    shown = batch.prior if form == "soft" else foreground.decide(foreground.logits(batch.prior))
    assert len(seen) == 3
    for x in seen:
        assert torch.equal(x[:, :-2], torch.cat((batch.image, shown), 1))


@BOTH
@FORMS
def test_it_learns_and_so_do_its_tokens(foreground: Foreground, literal: bool) -> None:
    method, batch = corrdiff(foreground, literal), batch_of(foreground)
    denoiser = denoiser_of(method)
    tokens, before = denoiser.bottleneck.tokens.detach().clone(), mean_loss(method, denoiser, batch)
    train(method, denoiser, batch)
    assert mean_loss(method, denoiser, batch) < before - 0.3
    assert not torch.allclose(denoiser.bottleneck.tokens, tokens, atol=1e-3)


def test_the_printed_form_is_dmcies_common_set_up() -> None:
    """Linear schedule, 1000 time steps, DDPM; DMCIE's optimiser settings of the diffusion model."""
    config = corrdiff(LABELS, literal=True).config
    assert (config.process.schedule, config.process.timesteps, config.process.prediction) == ("linear", 1000, "epsilon")
    assert (config.training.learning_rate, config.training.weight_decay) == (3e-4, 1e-5)
    assert (config.sampling.steps, config.sampling.eta) == (1000, 1.0)
    assert (config.training.prior_end, config.training.recycling) == (0.0, 0.0)


def test_what_it_is_not_is_refused() -> None:
    for change in (
        {"condition": {"prior": "none"}},
        {"condition": {"bottleneck": "none"}},
        {"error": {"target": "absolute"}},
    ):
        with pytest.raises(ConfigError, match="method corrdiff needs"):
            corrdiff(LABELS, **change)
