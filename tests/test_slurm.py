"""The SLURM script of docs/runs.md, run by bash with stand-ins for srun, scancel and scontrol on one machine."""
import os
import re
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import warm
from conftest import ROOT, TINY

from simsiam_models.runtime import checkpoint
from simsiam_models.training.setup import KEYS

STAND_INS = {
    'srun': 'echo $$ > "$STATE/step"\nexec "$@"\n',
    'scancel': '[ "$1" = --signal=TERM ] && [ "$2" = 7 ] || exit 9\nkill -TERM "$(cat "$STATE/step")"\n',
    'scontrol': 'case "$1" in show) echo 127.0.0.1;; requeue) echo "$2" >> "$STATE/requeued";; *) exit 9;; esac\n',
    'torchrun': 'exec "$PYTHON" -m torch.distributed.run "$@"\n'}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def write_script(folder: Path, data: Path) -> Path:
    text = re.search(r'<!-- slurm -->\n```bash\n(.*?)```', (ROOT / 'docs/runs.md').read_text(), re.S)[1]
    options = ' '.join(f"'{x}'" for x in [*TINY, '--epochs', '4000', '--batch-size', '16', '--workers', '0'])
    for old, new in (
            ('--nproc-per-node 8', '--nproc-per-node 2 --local-addr 127.0.0.1'), (':29500', f':{free_port()}'),
            ('pretrain IMAGENET --output OUTPUT', f'pretrain {data} --output {folder}/out {options}')):
        assert old in text
        text = text.replace(old, new)
    (folder / 'run.sh').write_text(text)
    (folder / 'bin').mkdir()
    for name, body in STAND_INS.items():
        (folder / 'bin' / name).write_text('#!/bin/bash\n' + body)
        (folder / 'bin' / name).chmod(stat.S_IRWXU)
    return folder / 'run.sh'


def test_the_script_of_the_docs_saves_and_queues_again_when_its_time_is_up(few_digits, tmp_path):
    script = write_script(tmp_path, few_digits)
    env = {
        **os.environ, 'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}', 'STATE': str(tmp_path), 'SLURM_JOB_ID': '7',
        'SLURM_NNODES': '1', 'SLURM_JOB_NODELIST': 'here', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
        'PYTHON': warm.python()}
    done = []
    for _ in range(2):
        with open(tmp_path / 'log', 'w') as log:
            job = subprocess.Popen(['bash', str(script)], stdout=log, stderr=log, env=env, cwd=ROOT)
        end = time.monotonic() + 120
        while ' loss ' not in (tmp_path / 'log').read_text():
            assert time.monotonic() < end and job.poll() is None, (tmp_path / 'log').read_text()
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(120) == 0
        state = checkpoint.read(tmp_path / 'out/checkpoint.pth', KEYS)
        done.append(4 * state['epoch'] + state['step'])
    assert 0 < done[0] < done[1]
    assert 'continuing after epoch' in (tmp_path / 'log').read_text()
    assert (tmp_path / 'requeued').read_text().split() == ['7', '7']
