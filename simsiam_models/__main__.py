"""`python -m simsiam_models` and `torchrun -m simsiam_models` are the command `simsiam`."""
import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
