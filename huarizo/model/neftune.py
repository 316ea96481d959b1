"""NEFTune (arXiv 2310.05914): noise on the embeddings in training, scaled by each example's length.

Like dropout's masks, the noise is a hash of seed, step, token and channel, so it depends neither on how a step is cut
into micro-batches nor on whether the run was resumed.
"""

import torch
from transformers import PreTrainedModel

from huarizo.model.dropout import hashed, indices

# Shapes: T tokens of a batch, K channels.

OTHER_THAN_DROPOUT = 0x5EED  # added to the run's seed


class EmbeddingNoise:
    """Uniform noise of at most alpha / sqrt(L K) on each of the K channels of a token whose example has L tokens.

    model: its input embeddings get the noise in training; alpha: `trainer.neftune_noise_alpha`; seed: of the run.
    """

    def __init__(self, model: PreTrainedModel, alpha: float, seed: int) -> None:
        embeddings = model.get_input_embeddings()
        on = next(embeddings.parameters()).device
        self._alpha, self._seed = alpha, torch.tensor([(seed + OTHER_THAN_DROPOUT) % 2**32], device=on).int()
        self._step_seed = self._places_T = self._lengths_T = torch.zeros(0, dtype=torch.int32, device=on)
        embeddings.register_forward_hook(self._add)

    def draw(self, step: int, places: torch.Tensor, lengths: torch.Tensor) -> None:
        """Draw the noise of a micro-batch.

        step: of the optimizer; places: of the tokens in the step; lengths: of each token's example. Integers [T].
        """
        on = self._seed.device
        self._step_seed = hashed(torch.full((1,), step, dtype=torch.int32, device=on), self._seed)
        self._places_T, self._lengths_T = places.int().to(on), lengths.to(on)

    def _add(
        self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """The embeddings, T of K channels in any shape, plus the noise."""
        if not module.training:
            return None
        channels = output.shape[-1]
        noise_TK = hashed(indices(self._places_T, channels), self._step_seed).float() * 2.0**-31
        size_T = self._alpha / (self._lengths_T.float() * channels).sqrt()
        return output + (noise_TK * size_T[:, None]).to(output.dtype).view(output.shape)
