"""SimSiam pretraining from a clone: `python train.py ...` is `simsiam pretrain ...`; --help is its manual.

The loop is in simsiam_models/training/pretrain.py; read it from top to bottom.
"""
import sys

from simsiam_models.runtime.terminal import plain_terminal
from simsiam_models.training.pretrain import build_parser, run

if __name__ == '__main__':
    with plain_terminal():
        sys.exit(run(build_parser('train.py').parse_args()))
