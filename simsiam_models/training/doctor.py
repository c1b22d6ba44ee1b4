"""Is this run collapsing, and why: a named diagnosis with its cause and one suggestion.

The symptom comes from the figures of a reading; the cause from evidence: the model's modules, whether z carries a
gradient, the pictures, the batch, the learning rate. Without evidence the cause is called unknown.
"""
import math
from dataclasses import dataclass
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from ..simsiam import SimSiam
from .monitor import COLLAPSED_RANK, FEW, is_collapsed

# Chosen on runs of seeds 0 and 1. What tests/perf/collapse.py then measured on seeds 2 and 3, 128 runs of 120 steps: no
# alarm in 60 healthy runs (720 readings: std 0.747 or more, rank 11.7, std of p 0.317, pixels 0.32); of 64 others 60
# are named rightly, 4 are not noticed and none gets a wrong name.
UNWELL_STD = 0.8  # counts only with evidence of a cause; without stop-gradient each of 12 runs is below within 70 steps
UNWELL_P_STD, UNWELL_RANK = 0.15, 5.0  # at 10 to 100 times the demo's rate down to 0.001 and 1.5, at any std
HIGH_LR = 2.5  # per 256 samples, 5 times the highest published; at 2 the demo learns, at 4 it does not (kNN, 1 seed)
BLANK = 0.01  # of the pixels' spread; blank pictures: below 3e-7
CONFIRM = 3  # readings; at a rate that suits a network badly a single one was seen to fall below 0.6 and come back


@dataclass(frozen=True)
class Diagnosis:
    name: str
    cause: str
    suggestion: str
    collapsed: bool = True  # False: the figures are still those of outputs that differ

    def __str__(self) -> str:
        return f'{"COLLAPSED" if self.collapsed else "AT RISK"} ({self.name}): {self.cause}; {self.suggestion}'


class Doctor:
    """Examines reading after reading.

    Args:
        lr: the learning rate per 256 samples.
        batch_per_norm: samples that a batch norm sees, over all processes.
    """

    def __init__(self, model: SimSiam, lr: float, batch_per_norm: int) -> None:
        self.lr, self.batch = lr, batch_per_norm
        weights = [p for p in model.predictor.parameters() if p.ndim > 1]
        self.predictor = 'missing' if not weights else 'learning' if any(p.requires_grad for p in weights) else 'frozen'
        self.normed = any(isinstance(m, _BatchNorm) for m in model.projector.modules())
        self.in_a_row = 0  # readings that were collapsed

    @property
    def confirmed(self) -> bool:
        """Collapsed in CONFIRM readings in a row, or no numbers at all: worth acting upon."""
        return self.in_a_row >= CONFIRM

    def state_dict(self) -> dict[str, Any]:
        return {'in_a_row': self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state['in_a_row']

    def examine(self, figures: dict[str, float]) -> Diagnosis | None:
        """What is wrong at a reading (`Reading.read()`); None: nothing. Call it once for each."""
        diagnosis = self._diagnose(figures)
        if diagnosis is None or not diagnosis.collapsed:
            self.in_a_row = 0
        else:  # outputs that are no numbers do not come back
            self.in_a_row += CONFIRM if diagnosis.name == 'not finite' else 1
        return diagnosis

    def _diagnose(self, f: dict[str, float]) -> Diagnosis | None:
        if not all(math.isfinite(f[k]) for k in ('loss', 'std', 'rank')):
            return Diagnosis(
                'not finite', 'the loss or the outputs are no finite numbers',
                f'lower --lr ({self.lr:g}) or use --amp off')
        tells = f['samples'] >= FEW  # the rank
        collapsed = is_collapsed(f['std'], f['rank'], f['samples'])
        unwell = collapsed or f['std'] < UNWELL_STD
        # What never learns, whatever the figures are.
        if f['pixels'] < BLANK:
            return Diagnosis(
                'constant images', 'the pictures of the batch are blank, each of one colour',
                'look at the image files and at how they are read', collapsed)
        if self.predictor != 'learning':
            return Diagnosis(
                'no predictor', f'the predictor is {self.predictor}; with none the paper gets 0.1 %, with a frozen one '
                '1.5 % (table 1)', 'give the model a predictor that is trained', collapsed)
        # What may or may not hurt: named where the figures are bad.
        if unwell and f['z_has_gradient']:
            return Diagnosis(
                'no stop-gradient', 'z carries a gradient, so that all outputs can become one point (paper, figure 2)',
                'detach z1 and z2 in the model and in the loss', collapsed)
        if unwell and not self.normed:
            return Diagnosis(
                'no batch norm in the heads', 'the projector has none; the paper gets 34.6 %, with it 68.1 % (table 3)',
                'put a batch norm behind each layer of the projector', tells and f['rank'] <= COLLAPSED_RANK)
        if self.batch < FEW:
            return Diagnosis(
                'batch too small', f'batch norm makes {self.batch} samples differ whatever the network does, so std '
                'and rank cannot tell a collapse', 'use --batch-size 64 or more', collapsed)
        if self.lr > HIGH_LR and (unwell or f['p_std'] < UNWELL_P_STD or tells and f['rank'] < UNWELL_RANK):
            return Diagnosis(
                'learning rate too high', f'--lr {self.lr:g} per 256 samples, and the outputs are one-sided; published '
                'are 0.03 to 0.5', 'use --lr 0.05', collapsed)
        if collapsed:
            share = f['constant_channels']
            more = f'; {100 * share:.0f} % of the batch norm channels are constant' if share >= 0.01 else ''
            return Diagnosis(
                'unknown cause', f'the outputs are nearly one point or one line{more}', f'halve --lr ({self.lr:g})')
        return None
