"""The frozen backbone of a linear protocol: its features, and the proof that training left it unchanged."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...runtime.messages import one_line
from ...runtime.precision import autocast, full_precision
from ..backbone import Backbone, compute_maps, has_protocol_sizes, pool_stages, weights_digest
from ..protocols import LinearProtocol


class FrozenBackbone:
    """Extracts the features that the classifiers of a protocol see; `shapes`: (channels, values per channel) of each.

    `pooling` of feature maps: 'mmselfsup', as the protocol does for a ResNet at 224 px, or 'adaptive' for other
    networks and sizes; None for the network's own average pool. Raises ValueError for images of an unsuitable size.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone, protocol: LinearProtocol, device: torch.device, amp: str = 'off') -> None:
        self.backbone, self.device, self.amp = backbone, device, amp
        self.model = backbone.model.eval().requires_grad_(False)
        x, five = torch.zeros(1, 3, protocol.image_size, protocol.image_size, device=device), protocol.inputs == 'five'
        try:
            maps = compute_maps(backbone, x) if five else [self.model(x)]
            self.pooling = ('mmselfsup' if has_protocol_sizes(maps) else 'adaptive') if five else None
            features = pool_stages(maps, self.pooling == 'adaptive') if five else maps
        except (RuntimeError, AssertionError) as e:
            raise ValueError(
                f'--model {backbone.name} does not take images of {protocol.image_size} pixels ({one_line(e)}); give '
                'another --image-size') from None
        if features[0].ndim != 2:
            raise ValueError(f'--model {backbone.name} returns {tuple(features[0].shape)}, not (B, D)')
        self.shapes = [(m.shape[1], y.shape[1] // m.shape[1]) for m, y in zip(maps, features, strict=True)]

    @torch.no_grad()
    def extract(self, x: Tensor) -> list[Tensor]:
        """Maps (B, 3, S, S) normalized pixels to (B, D) float32 for each classifier."""
        with autocast(self.device, self.amp), full_precision():
            maps = [self.model(x).float()] if self.pooling is None else compute_maps(self.backbone, x)
        return maps if self.pooling is None else pool_stages(maps, self.pooling == 'adaptive')

    def check_unchanged(self, label: str) -> None:
        """Raises RuntimeError if any bit of the backbone's tensors has changed; `label`: the protocol."""
        if weights_digest(self.model) != self.backbone.digest:
            raise RuntimeError(
                f'protocol {label}: the backbone {self.backbone.name} changed while its classifier was trained, so '
                'this is not a linear evaluation; no number is given')


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turns a CUDA out-of-memory error into a one-line RuntimeError that ends in `advice`."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise RuntimeError(f'out of memory ({str(e).split(". ")[0]}) {advice}') from None
