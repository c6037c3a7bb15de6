"""The joint training objective: predict the noise of all modalities, each at a timestep of its own.

arXiv 2303.06555 equation 5: E || eps_theta(x_s, y_t, s, t) - [eps_x, eps_y] ||^2 with s and t independent and uniform over
1 .. N. Written for any number of modalities.

**Weights.** The loss is the weighted mean over parts of each part's mean squared error,

    loss = sum_p w_p mse_p / sum_p w_p,

so an untrained network, which predicts about zero, starts at 1 whatever the parts are (with min-SNR weights at their mean over
the timesteps, which is less). The paper's norm, read literally, is the mean over all elements, which weighs each part by its
number of elements, and so changes with the resolution:

    512 px: latent 4*64*64 = 16384 (75.1%), clip 512 (2.3%), text 77*64 = 4928 (22.6%)
    256 px: latent 4*32*32 =  4096 (43.0%), clip 512 (5.4%), text 77*64 = 4928 (51.7%)

The weights that were trained with are not published. Here they are explicit, belong to the part, and do not move
when the resolution does; ``paper_modalities`` takes the 512 px figures, 0.75, 0.02 and 0.23, at every size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from unidiffuser.modalities import Modality, all_parts, check_modalities
from unidiffuser.schedule import NoiseSchedule


class JointObjective:
    """Noise prediction loss over all modalities.

    Args:
        modalities: what is modelled; the parts carry the loss weights.
        schedule: how data is noised.
        min_snr_gamma: weighs a sample of a modality at timestep t by min(snr(t), gamma) / snr(t), which takes weight off the
            nearly clean timesteps (arXiv 2303.09556, section 3.4, for noise prediction); None weighs all alike.
    """

    def __init__(
        self,
        modalities: Sequence[Modality],
        schedule: NoiseSchedule,
        min_snr_gamma: float | None = None,
    ) -> None:
        check_modalities(modalities)
        self.modalities, self.schedule, self.min_snr_gamma = (
            tuple(modalities),
            schedule,
            min_snr_gamma,
        )
        self.total_weight = sum(part.weight for part in all_parts(modalities))
        if self.total_weight <= 0:
            raise ValueError("all loss weights are 0: give at least one part a weight")

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
        data_type: Tensor | int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw timesteps and noise, and compare the prediction with the noise.

        Args:
            model: called as ``model(x, t)``, or ``model(x, t, data_type)``, like ``UViT``.
            batch: clean parts by name, (B, *shape); grids of any size.
            generator: the randomness, on the batch's device; torch's own if None.

        Returns:
            The loss, and by name of the part its mean squared error, detached: without the part's weight, but with the min-SNR
            weights if there are any, so that the loss is their weighted mean. Without these an untrained network's are 1.

        Raises:
            KeyError: a part is missing from the batch.
        """
        return self.loss(model, batch, *self.draw(batch, generator), data_type)

    def draw(
        self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Independent timesteps 1 .. N by modality, (B,), and standard normal noise by part, fp32."""
        timesteps, noise = {}, {}
        for modality in self.modalities:
            first = batch[modality.parts[0].name]
            timesteps[modality.name] = torch.randint(
                1, self.schedule.steps + 1, first.shape[:1], generator=generator, device=first.device
            )
            for part in modality.parts:
                clean = batch[part.name]
                noise[part.name] = torch.randn(clean.shape, generator=generator, device=clean.device)
        return timesteps, noise

    def loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        timesteps: Mapping[str, Tensor],
        noise: Mapping[str, Tensor],
        data_type: Tensor | int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As calling the objective, with timesteps by modality, (B,), and noise by part that the caller drew."""
        return self.mean(self.errors(model, batch, timesteps, noise, data_type))

    def errors(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        timesteps: Mapping[str, Tensor],
        noise: Mapping[str, Tensor],
        data_type: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The mean squared error of each sample, (B,), by name of the part, with the min-SNR weights if there are any."""
        noised = {
            part.name: self.schedule.add_noise(batch[part.name].float(), noise[part.name], timesteps[modality.name])
            for modality in self.modalities
            for part in modality.parts
        }
        predicted = model(noised, timesteps) if data_type is None else model(noised, timesteps, data_type)
        weights = {modality.name: self._sample_weight(timesteps[modality.name]) for modality in self.modalities}
        return {
            part.name: weights[modality.name] * (predicted[part.name].float() - noise[part.name]).square().flatten(1).mean(1)
            for modality in self.modalities
            for part in modality.parts
        }

    def mean(self, errors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of samples, and by name of the part their mean, detached, from their `errors`."""
        parts = {name: error.mean() for name, error in errors.items()}
        loss = torch.zeros((), device=next(iter(parts.values())).device)
        for part in all_parts(self.modalities):
            loss = loss + part.weight / self.total_weight * parts[part.name]
        return loss, {name: mse.detach() for name, mse in parts.items()}

    def of_samples(self, errors: Mapping[str, Tensor]) -> Tensor:
        """The loss of each sample, (B,), from the parts' `errors`; their mean is the loss."""
        return torch.stack([part.weight / self.total_weight * errors[part.name] for part in all_parts(self.modalities)]).sum(0)

    def _sample_weight(self, t: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return torch.ones_like(t, dtype=torch.float32)
        snr = self.schedule.snr(t)
        return snr.clamp(max=self.min_snr_gamma) / snr
