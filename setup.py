"""Builds simsiam_models/data/kernel.c once for each kind of processor; setup.cfg has everything else."""
import hashlib
import platform
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

SOURCE = 'simsiam_models/data/kernel.c'
# No contraction of a * b + c, so that every processor gives the same numbers. The others only drop errno, signals and
# -fwrapv, which Python's own flags bring and which costs an eighth of the speed, and debugging information, which names
# the folder of the build: without it, a wheel built from the sdist equals one from a clone.
FLAGS = ['-O3', '-std=gnu11', '-ffp-contract=off', '-fno-math-errno', '-fno-trapping-math', '-fno-wrapv', '-g0']
VECTORS = {'plain': []}  # data/kernel.py chooses at run time
if platform.machine().lower() in ('x86_64', 'amd64'):
    VECTORS['avx2'] = ['-mavx2']
    VECTORS['avx512'] = ['-mavx2', *(f'-mavx512{part}' for part in ('f', 'bw', 'dq', 'vl')),
                         '-mprefer-vector-width=512']
# One build serves every Python from 3.10 on, except for those without a global interpreter lock.
ANY_PYTHON = not sysconfig.get_config_var('Py_GIL_DISABLED')
DIGEST = hashlib.sha256((Path(__file__).parent / SOURCE).read_bytes()).hexdigest()

setup(options={'bdist_wheel': {'py_limited_api': 'cp310'}} if ANY_PYTHON else {}, ext_modules=[
    Extension(
        f'simsiam_models.data._kernel_{name}', [SOURCE], extra_compile_args=[*FLAGS, *flags], libraries=['m'],
        define_macros=[('SOURCE_DIGEST', f'"{DIGEST}"')], py_limited_api=ANY_PYTHON,
        optional=True)  # without a C compiler, or one that knows the flags, the package installs all the same
    for name, flags in VECTORS.items()])
