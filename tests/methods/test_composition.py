"""The engine behind every method: what it refuses, what it computes once, and what errors become of a mask."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch
from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.diffusion.process import per_sample
from nnunet_diffrefine.errors.maps import absolute_error, signed_error
from nnunet_diffrefine.methods.composition import ComposedMethod, known_condition
from nnunet_diffrefine.networks.condition_encoder import ConditionEncoder
from nnunet_diffrefine.networks.denoiser import TimeConditionedUNet
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from tests.builders import LABELS, REGIONS, TinyDenoiser, batch_of, generator, nnunet_loss, true_output, unet
from tests.networks.feature_modules import taught

T = 4
BOTH = pytest.mark.parametrize("foreground", [LABELS, REGIONS], ids=["labels", "regions"])
GAUSSIAN = {"kind": "gaussian", "timesteps": T, "schedule": "cosine", "input_scale": 0.5}
NOISE = {"deep_supervision": False, "recycling": 0.0}
PROCESSES = {
    "bridge": {"timesteps": T},
    "discrete bridge": {"timesteps": T, "state": "discrete"},
    "bernoulli": {"kind": "bernoulli", "timesteps": T},
    "gaussian": GAUSSIAN,
    "truncated": {**GAUSSIAN, "timesteps": 2 * T, "truncation": 0.5},
    "epsilon": {**GAUSSIAN, "prediction": "epsilon"},
    "v": {**GAUSSIAN, "prediction": "v"},
    "none": {"kind": "none"},
}


def composed(foreground: Foreground, method: type[ComposedMethod] = ComposedMethod, **settings: dict) -> ComposedMethod:
    if settings.get("process", {}).get("prediction", "x0") != "x0":
        settings["training"] = {**NOISE, **settings.get("training", {})}
    return method(RefineConfig.from_dict(settings), foreground)


class TestNeeds:
    class Picky(ComposedMethod):
        needs: ClassVar = {"process.kind": ("gaussian", "none"), "condition.encoder": (True,)}

    @pytest.mark.parametrize("kind", ["gaussian", "none"])
    def test_what_is_needed_is_taken(self, kind: str) -> None:
        assert composed(LABELS, self.Picky, process={"kind": kind}, condition={"encoder": True})

    def test_anything_else_is_refused_by_name(self) -> None:
        with pytest.raises(ConfigError, match=r"'process.kind' is 'bridge'; method bridge needs 'gaussian' or 'none'"):
            composed(LABELS, self.Picky, condition={"encoder": True})
        with pytest.raises(ConfigError, match=r"'condition.encoder' is False; .*needs True"):
            composed(LABELS, self.Picky, process={"kind": "none"})

    @pytest.mark.parametrize(("process", "key"), [("discrete bridge", "process.state"), ("bernoulli", "process.kind")])
    def test_signed_errors_have_no_hard_states(self, process: str, key: str) -> None:
        with pytest.raises(ConfigError, match=rf"'{key}' draws states in \{{0, 1\}}.*'absolute'"):
            composed(LABELS, process=PROCESSES[process], error={"target": "three_way"})


class TestKnownCondition:
    """The second encoder sees nothing that changes from step to step, so it runs once."""

    @staticmethod
    def network(foreground: Foreground, fusion: str, **sampling: int) -> tuple[RefinementNetwork, list[int], list[int]]:
        """A network of tiny U-Nets, and the lengths of the batches that condition encoder and denoiser get."""
        method = composed(
            foreground, process=GAUSSIAN, condition={"encoder": True, "fusion": fusion},
            sampling={"min_foreground": 0.0, **sampling},
        )  # fmt: skip
        shown, (inputs, outputs) = method.condition_channels(1), method.channels(1)
        encoder = ConditionEncoder(unet(inputs=shown, outputs=outputs, seed=1).encoder, shown, fusion)
        denoiser = taught(TimeConditionedUNet(unet(inputs=inputs, outputs=outputs), condition=encoder))
        encodings, passes = [], []
        encoder.register_forward_hook(lambda module, arguments, output: encodings.append(len(arguments[0])))
        denoiser.register_forward_hook(lambda module, arguments, output: passes.append(len(arguments[0])))
        stage_one = torch.nn.Conv3d(1, foreground.heads, 1)
        axes = (0, 1, 2)
        network = RefinementNetwork(stage_one, denoiser, method, foreground, method.config.sampling, (), axes)
        return network, encodings, passes

    @BOTH
    @pytest.mark.parametrize("fusion", ["add", "dynamic"])
    @pytest.mark.parametrize(("steps", "samples"), [(1, 1), (T, 1), (2, 3)])
    def test_once_however_many_steps_and_seeds(self, foreground, fusion, steps, samples) -> None:
        network, encodings, passes = self.network(foreground, fusion, steps=steps, samples=samples)
        batch = batch_of(foreground, size=1)
        with torch.no_grad():
            network.evidence(batch.image, batch.prior)
        assert encodings == [1]
        assert passes == [samples] * steps

    @pytest.mark.parametrize("copies", [1, 2])
    def test_once_a_window_and_mirrored_copy(self, copies: int) -> None:
        network, encodings, passes = self.network(LABELS, "add", steps=2, samples=2, mirrored_copies=copies)
        with torch.no_grad():
            network(batch_of(LABELS, size=3).image)
        assert encodings == [1] * (3 * copies)
        assert passes == [2] * (3 * copies * 2)

    @BOTH
    def test_the_result_is_that_of_computing_it_at_every_step(self, foreground: Foreground) -> None:
        network, encodings, _ = self.network(foreground, "dynamic", steps=3, samples=2)
        batch, denoiser = batch_of(foreground), network.denoiser
        with torch.no_grad():
            once = network.method.evidence(denoiser, batch.image, batch.prior, generator())
            encodings.clear()
            anew = network.method.evidence(lambda x, t: denoiser(x, t), batch.image, batch.prior, generator())
        assert len(encodings) == 3
        torch.testing.assert_close(once, anew, atol=1e-5, rtol=0)

    def test_without_an_encoder_the_denoiser_is_used_as_it_is(self) -> None:
        condition = batch_of(LABELS).image
        plain = TimeConditionedUNet(unet())
        assert known_condition(plain, condition) is plain
        tiny = TinyDenoiser(3, 3)
        assert known_condition(tiny, condition) is tiny


class TestSeedsAndSteps:
    class Recorder(ComposedMethod):
        """Remembers what it was asked to fuse."""

        asked: ClassVar[list[list[list[Tensor]]]] = []

        def fused(self, estimates: list[list[Tensor]]) -> Tensor:
            self.asked.append(estimates)
            return super().fused(estimates)

    class EveryStep(Recorder):
        fuses_steps = True

    @pytest.fixture(autouse=True)
    def _forget(self) -> None:
        self.Recorder.asked.clear()

    @BOTH
    def test_one_seed_gives_the_networks_own_logits_and_fuses_nothing(self, foreground: Foreground) -> None:
        method, batch = (
            composed(foreground, self.Recorder, process=GAUSSIAN, sampling={"steps": 3}),
            batch_of(foreground),
        )
        outputs: list[Tensor] = []
        network = TinyDenoiser(*method.channels(1))
        with torch.no_grad():
            evidence = method.evidence(lambda x, t: outputs.append(network(x, t)) or outputs[-1],
                                       batch.image, batch.prior, generator())  # fmt: skip
        assert self.Recorder.asked == []
        assert torch.equal(evidence, outputs[-1])
        assert len(outputs) == 3

    @BOTH
    def test_several_seeds_are_averaged_in_probability(self, foreground: Foreground) -> None:
        method = composed(foreground, self.Recorder, process=GAUSSIAN, sampling={"steps": 2, "samples": 3})
        batch, outputs, network = batch_of(foreground), [], TinyDenoiser(*method.channels(1))
        with torch.no_grad():
            evidence = method.evidence(lambda x, t: outputs.append(network(x, t)) or outputs[-1],
                                       batch.image, batch.prior, generator())  # fmt: skip
        (asked,) = self.Recorder.asked
        assert [len(steps) for steps in asked] == [1, 1, 1]
        first, second = outputs
        mean = torch.stack([foreground.probabilities(one) for one in second.chunk(3)]).mean(0)
        torch.testing.assert_close(foreground.probabilities(evidence), mean, atol=2e-4, rtol=0)
        assert not torch.equal(*first.chunk(3)[:2])

    @BOTH
    @pytest.mark.parametrize("samples", [1, 2])
    @pytest.mark.parametrize("prediction", ["x0", "v"])
    def test_a_method_that_asks_gets_every_step_first_the_noisiest(self, foreground, samples, prediction) -> None:
        sampling, process = {"steps": 3, "samples": samples}, {**GAUSSIAN, "prediction": prediction}
        method = composed(foreground, self.EveryStep, process=process, sampling=sampling)
        batch, wanted, network = batch_of(foreground), [], TinyDenoiser(*method.channels(1))

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            output, x_t = network(x, t), x[:, -2:]
            if prediction == "x0":
                wanted.append(foreground.probabilities(output))
            else:  # x_0 of v: sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v, of the scaled variable
                share = per_sample(method.process.alpha_bar(t), x_t)
                x0 = (share.sqrt() * x_t - (1 - share).sqrt() * output) / 0.5
                wanted.append((x0.clamp(-1, 1) + 1) / 2)
            return output

        with torch.no_grad():
            method.evidence(denoiser, batch.image, batch.prior, generator())
        (asked,) = self.Recorder.asked
        assert [len(steps) for steps in asked] == [3] * samples
        runs = zip(*(step.chunk(samples) for step in wanted), strict=True)
        for given, expected in zip([one for steps in asked for one in steps], sum(runs, ()), strict=True):
            torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
            assert 0 <= given.min() <= given.max() <= 1

    def test_a_state_without_randomness_is_sampled_once(self) -> None:
        assert composed(LABELS, sampling={"samples": 5}).seeds == 1
        assert composed(LABELS, process={"kind": "none"}, sampling={"samples": 5}).seeds == 1
        assert composed(LABELS, process=PROCESSES["discrete bridge"], sampling={"samples": 5}).seeds == 5

    def test_without_a_process_there_is_one_pass_without_state(self) -> None:
        method, batch, calls = composed(LABELS, process={"kind": "none"}), batch_of(LABELS), []
        assert method.channels(3) == (3 + 2, LABELS.heads)
        network = TinyDenoiser(*method.channels(1))

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            calls.append((x, t))
            return network(x, t)

        evidence = method.evidence(denoiser, batch.image, batch.prior, generator())
        method.loss(denoiser, batch, nnunet_loss(LABELS), generator())
        assert len(calls) == 2
        for x, t in calls:
            assert torch.equal(x, torch.cat((batch.image, batch.prior), 1))
            assert t.tolist() == [0, 0]
        assert torch.equal(evidence, network(*calls[0]))


def error_of(method: ComposedMethod, batch: RefineBatch) -> Tensor:
    hard = method.foreground.decide(method.foreground.logits(batch.prior))
    error = signed_error if method.config.error.target == "three_way" else absolute_error
    return error(batch.reference, hard, batch.valid)


ERRORS = [
    pytest.param(target, process, id=f"{target}-{process}")
    for target in ("absolute", "three_way")
    for process in PROCESSES
    if target == "absolute" or process not in ("discrete bridge", "bernoulli")
]


@BOTH
@pytest.mark.parametrize(("target", "process"), ERRORS)
@pytest.mark.parametrize("steps", [1, 2, T])
class TestErrorsThroughEveryProcess:
    @staticmethod
    def method(foreground: Foreground, target: str, process: str, steps: int, **settings: dict) -> ComposedMethod:
        sampling = {"steps": min(steps, 1) if process == "none" else steps, "samples": 2}
        return composed(foreground, process=PROCESSES[process], error={"target": target}, sampling=sampling, **settings)

    def test_the_true_error_gives_back_the_reference(self, foreground, target, process, steps) -> None:
        method, batch = self.method(foreground, target, process, steps), batch_of(foreground)
        error = error_of(method, batch)
        hard = foreground.decide(foreground.logits(batch.prior))
        assert (hard != batch.reference).any()
        if foreground.exclusive:  # one class in place of another: wrong in both channels
            assert (error.abs().sum(1) == 2).any()
        refined = method.refine(lambda x, t: true_output(method, error, x, t), batch.image, batch.prior, generator())
        assert torch.equal(foreground.decide(refined), batch.reference)

    def test_no_error_gives_back_stage_one(self, foreground, target, process, steps) -> None:
        method, batch = self.method(foreground, target, process, steps), batch_of(foreground)
        nothing = torch.zeros_like(batch.prior)
        refined = method.refine(lambda x, t: true_output(method, nothing, x, t), batch.image, batch.prior, generator())
        assert torch.equal(foreground.decide(refined), foreground.decide(foreground.logits(batch.prior)))

    def test_the_state_leads_from_the_error_to_the_end_of_the_process(self, foreground, target, process, steps) -> None:
        """At t = 0 the state is the error in the range of the process: both wrong channels of a voxel, all signs."""
        method, batch = self.method(foreground, target, process, steps), batch_of(foreground)
        if method.process is None:
            assert method.channels(1) == (3, method.target.outputs)
            return
        clean, zero = method.to_state(error_of(method, batch)), torch.zeros(2, dtype=torch.long)
        scale = method.config.process.input_scale
        state = method.process.marginal(clean, method.to_state(torch.zeros_like(clean)), zero, generator())
        torch.testing.assert_close(state, scale * clean, atol=1e-6, rtol=0)
        torch.testing.assert_close(method.from_state(clean), error_of(method, batch))
        low = -1 if method.process.signed or target == "three_way" else 0
        assert set(clean.unique().tolist()) == ({-1, 0, 1} if target == "three_way" else {low, 1})


@BOTH
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("prior_start", [True, False])
def test_noise_of_a_truncated_start_leads_to_the_reference(foreground, prediction, prior_start) -> None:
    """Sampling starts from the noised prior; the noise to be predicted there must not lead back to that prior."""
    training = {**NOISE, "prior_start": prior_start, "prior_end": 1.0}
    method = composed(foreground, process={**PROCESSES["truncated"], "prediction": prediction}, training=training)
    batch, states = batch_of(foreground), []

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        states.append((x[:, -2:], t))
        return true_output(method, batch.reference, x, t)

    assert method.loss(oracle, batch, nnunet_loss(foreground), generator()) < 1e-6
    x_t, t = states[0]
    assert t.tolist() == [T, T]
    start = batch.prior if prior_start else batch.reference
    share = per_sample(method.process.alpha_bar(t), x_t)
    noise = (x_t - share.sqrt() * 0.5 * (2 * start - 1)) / (1 - share).sqrt()
    assert abs(noise.mean()) < 4 * noise.numel() ** -0.5
    assert abs(noise.std() - 1) < 4 * noise.numel() ** -0.5
