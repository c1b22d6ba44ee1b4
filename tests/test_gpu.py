"""The CUDA paths of train.py: precisions and the prefetching copies. Skipped where there is no card."""
from pathlib import Path

import pytest
import torch
from conftest import TINY

import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]


@pytest.mark.parametrize('amp', ['bfloat16', 'float16', 'off'])
def test_ten_steps_on_the_card_lower_the_loss(few_digits: Path, tmp_path: Path, amp: str):
    figures = train.main([
        str(few_digits), *TINY, '--device', 'cuda', '--amp', amp, '--epochs', '10', '--batch-size', '64',
        '--workers', '2', '--output', str(tmp_path)])
    assert -1 <= figures['loss'] < 0 and not figures['collapsed']
