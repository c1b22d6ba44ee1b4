"""Diagnoses whether a run collapses and why, and names the cause and a remedy.

The symptom comes from the figures of a reading, the cause from evidence: the pictures, the batch, the learning rate.
Without evidence the doctor calls the cause unknown.
"""
import math
import sys
from dataclasses import dataclass
from typing import Any

from ..runtime.precision import suggest_off
from .monitor import MIN_SAMPLES, is_collapsed

# Chosen on runs of seeds 0 and 1. tests/perf/collapse.py then measured on seeds 2 and 3, runs of 120 steps: no alarm in
# 60 healthy runs (720 readings: std 0.747 or more, rank 11.7, std of p 0.317, pixels 0.32).
UNWELL_STD = 0.8  # counts only with evidence of a cause
UNWELL_P_STD, UNWELL_RANK = 0.15, 5.0  # at 10 to 100 times the demo's rate: down to 0.001 and 1.5, at any std
HIGH_LR = 2.5  # per 256 samples, 5 times the highest published; the demo learns at 2 and not at 4 (kNN, 1 seed)
BLANK_STD = 0.01  # output of `measure_pixel_std`; blank pictures are below 3e-7
CONFIRMATIONS = 3  # readings; a single one below 0.6 recovered at a learning rate that was almost too high


@dataclass(frozen=True)
class Diagnosis:
    name: str
    cause: str
    suggestion: str
    collapsed: bool = True  # False: the outputs still differ

    def __str__(self) -> str:
        return f'{"COLLAPSED" if self.collapsed else "AT RISK"} ({self.name}): {self.cause}; {self.suggestion}'


class Doctor:
    """Examines readings one by one; `lr`: per 256 samples, `batch`: what a batch norm sees, over all processes.

    `images`, of an epoch, and `amp` decide what it can suggest.
    """

    def __init__(self, lr: float, batch: int, images: int = sys.maxsize, amp: str = 'off') -> None:
        self.lr, self.batch, self.images, self.amp = lr, batch, images, amp
        self.in_a_row = 0  # collapsed readings

    @property
    def confirmed(self) -> bool:
        """Returns whether to act: CONFIRMATIONS readings in a row were collapsed, or one was not finite."""
        return self.in_a_row >= CONFIRMATIONS

    def state_dict(self) -> dict[str, Any]:
        return {'in_a_row': self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state['in_a_row']

    def examine(self, figures: dict[str, float]) -> Diagnosis | None:
        """Returns what is wrong at a reading (`Reading.read()`), or None; call it once for each reading."""
        diagnosis = self._diagnose(figures)
        if diagnosis is None or not diagnosis.collapsed:
            self.in_a_row = 0
        else:  # outputs that are not finite do not recover
            self.in_a_row += CONFIRMATIONS if diagnosis.name == 'not finite' else 1
        return diagnosis

    def _diagnose(self, f: dict[str, float]) -> Diagnosis | None:
        if not all(math.isfinite(f[k]) for k in ('loss', 'std', 'rank')):
            return Diagnosis(
                'not finite', 'the loss or the outputs are not finite numbers',
                f'lower --lr ({self.lr:g}){suggest_off(self.amp)}')
        collapsed = is_collapsed(f['std'], f['rank'], f['samples'])
        if f['pixels'] < BLANK_STD:
            return Diagnosis(
                'constant images', 'the pictures of the batch are blank, each of a single colour',
                'check the image files and how they are read', collapsed)
        if self.batch < MIN_SAMPLES:
            return Diagnosis(
                'batch too small', f'batch norm makes {self.batch} samples differ whatever the network does, so std '
                'and rank cannot show a collapse',
                'use --batch-size 64 or more' if self.images >= 64 else 'add images, for a batch of 64 or more',
                collapsed)
        unwell = collapsed or f['std'] < UNWELL_STD or f['p_std'] < UNWELL_P_STD
        unwell |= f['samples'] >= MIN_SAMPLES and f['rank'] < UNWELL_RANK
        if self.lr > HIGH_LR and unwell:
            return Diagnosis(
                'learning rate too high', f'--lr {self.lr:g} per 256 samples, and the outputs are one-sided; published '
                'rates are 0.03 to 0.5', 'use --lr 0.05', collapsed)
        if collapsed:
            share = f['constant_channels']
            more = f'; {100 * share:.0f} % of the batch norm channels are constant' if share >= 0.01 else ''
            return Diagnosis(
                'unknown cause', f'the outputs are nearly one point or one line{more}', f'halve --lr ({self.lr:g})')
        return None
