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
    """Extracts the features that the classifiers of a protocol see.

    Attributes:
        shapes: (channels, values per channel) of the features of each classifier.
        pooling: how feature maps are pooled: 'mmselfsup', as the protocol does for a ResNet at 224 px, or 'adaptive'
            for other networks and sizes; None for the network's own average pool.

    Raises:
        ValueError: the backbone does not take images of the protocol's size, or does not return a vector per image.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone, protocol: LinearProtocol, device: torch.device, amp: str = 'off') -> None:
        self.backbone, self.device, self.amp = backbone, device, amp
        self.model = backbone.model.eval().requires_grad_(False)
        self.pooling: str | None = None
        size = protocol.image_size
        x = torch.zeros(1, 3, size, size, device=device)
        try:
            if protocol.inputs == 'avgpool':
                maps = features = [self.model(x)]
            else:
                maps = compute_maps(backbone, x)
                self.pooling = 'mmselfsup' if has_protocol_sizes(maps) else 'adaptive'
                features = pool_stages(maps, self.pooling == 'adaptive')
        except (RuntimeError, AssertionError) as e:
            raise ValueError(
                f'--model {backbone.name} does not take images of {size} pixels ({one_line(e)}); give another '
                '--image-size') from None
        if features[0].ndim != 2:
            raise ValueError(f'--model {backbone.name} returns {tuple(features[0].shape)}, not (B, D)')
        self.shapes = [(m.shape[1], y.shape[1] // m.shape[1]) for m, y in zip(maps, features, strict=True)]

    @torch.no_grad()
    def extract(self, x: Tensor) -> list[Tensor]:
        """(B, 3, S, S) normalized pixels -> (B, D) float32 for each classifier."""
        with autocast(self.device, self.amp), full_precision():
            if self.pooling is None:
                return [self.model(x).float()]
            maps = compute_maps(self.backbone, x)
        return pool_stages(maps, self.pooling == 'adaptive')

    def check_unchanged(self, label: str) -> None:
        """Raises RuntimeError unless every tensor of the backbone is bit for bit what it was; `label`: the protocol."""
        if weights_digest(self.model) != self.backbone.digest:
            raise RuntimeError(
                f'protocol {label}: the backbone {self.backbone.name} changed while its classifier was trained, so '
                'this is not a linear evaluation; no number is given')


@contextmanager
def explain_out_of_memory(advice: str = 'in the backbone: lower --micro-batch') -> Iterator[None]:
    """Turns a CUDA out-of-memory error into a RuntimeError of one sentence that ends in `advice`."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise RuntimeError(f'out of memory ({str(e).split(". ")[0]}) {advice}') from None
