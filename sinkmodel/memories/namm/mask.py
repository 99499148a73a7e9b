"""The attention mask of a layer whose heads hold sets of different sizes."""

from __future__ import annotations

import torch
from torch import Tensor


class AdditiveMask:
    """The masks of one piece for all layers, in one piece of memory: [B, H, N, K] for the K slots of each layer.

    All masks end with the same triangle, so they are views of the last columns of a tensor; only the empty slots in
    front are written for each layer. A boolean mask would be converted to numbers in every layer.

    Args:
        shape: rows, query heads, queries, and the slots of the longest layer.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.lowest = torch.finfo(dtype).min
        self.mask_BHNK = torch.zeros(shape, dtype=dtype, device=device)
        later = torch.ones(shape[2], shape[2], dtype=torch.bool, device=device).triu(1)
        self.mask_BHNK[..., -shape[2] :].masked_fill_(later, self.lowest)
        self.written: Tensor | None = None  # the columns of the layer before

    def of(self, slots: int, empty_BG: Tensor) -> Tensor:
        """The mask of a layer with that many slots, of which the first `empty_BG` hold no token.

        It is valid until the next call.
        """
        if self.written is not None:
            self.written.zero_()
        mask = self.mask_BHNK[..., self.mask_BHNK.shape[-1] - slots :]
        empty_BH = empty_BG.repeat_interleave(mask.shape[1] // empty_BG.shape[1], dim=1)
        self.written = mask[..., : int(empty_BH.max())]
        hidden = torch.arange(self.written.shape[-1], device=mask.device) < empty_BH[..., None]
        self.written.masked_fill_(hidden[:, :, None], self.lowest)
        return mask
