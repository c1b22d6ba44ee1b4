"""A Python that has done its imports, for tests that start train.py, torchrun or a command in a process of its own.

`python()` is an executable that takes the place of sys.executable in front of `[-u] [-B] [-Wx] FILE`, `-m MODULE` or
`-c CODE` and their arguments. It asks a server, which has imported what these programs import, for a fork that becomes
the program. The fork has the executable's arguments, folder, variables, blocked signals and open files, and gets its
signals; the executable ends with the fork's exit code, or by the same signal. Killed, it takes the fork with it.
torchrun, started so, starts its processes so; within `spawned()`, multiprocessing's `spawn` does.

Not for tests of what an import does, or of variables that torch or the Hub client read once, when they are imported
(OMP_NUM_THREADS is 1, and CUDA_VISIBLE_DEVICES empty).
"""
import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PASSED_ON = signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2


class Server(NamedTuple):
    executable: str
    socket: str


@functools.cache
def server() -> Server:
    """Started on first use; it ends with this process."""
    folder = tempfile.mkdtemp(prefix='simsiam-warm-')
    made = Server(os.path.join(folder, 'python'), os.path.join(folder, 'socket'))
    with open(made.executable, 'w') as f:
        f.write(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{os.path.abspath(__file__)}" "{made.socket}" "$@"\n')
    os.chmod(made.executable, 0o700)
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONSTARTUP')}
    process = subprocess.Popen(
        [sys.executable, __file__, 'serve', *made], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
        env={**env, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(process.communicate)  # the end of its input ends it
    assert process.stdout.readline() == b'ready\n'
    return made


def python() -> str:
    return server().executable


@contextlib.contextmanager
def spawned() -> Iterator[None]:
    import multiprocessing.resource_tracker  # here, for the executable is to start at once
    import multiprocessing.spawn

    multiprocessing.resource_tracker.ensure_running()  # which outlives this
    before = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable(python())
    try:
        yield
    finally:
        multiprocessing.set_executable(before)


class Fork:
    """A program in a fork of the server that listens at `path`. `files` maps its file descriptors to ours."""

    def __init__(self, path: str, argv: list[str], env: dict[str, str], cwd: str, files: dict[int, int]) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(path)
        socket.send_fds(self.connection, [b'\n'], list(files.values()))
        blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
        request = dict(argv=argv, env=env, cwd=cwd, files=list(files), blocked=blocked)
        self.connection.sendall(json.dumps(request).encode() + b'\n')
        self.said: BinaryIO = self.connection.makefile('rb')
        self.pid = int(self.said.readline())

    def wait(self) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        return int(self.said.readline() or -signal.SIGKILL)  # nothing if the server is gone, and the fork with it

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def is_inherited(file: int) -> bool:
    try:
        return os.get_inheritable(file)
    except OSError:  # the listing's own
        return False


def stand_in(path: str, argv: list[str]) -> None:
    """What the executable does."""
    found = [int(name) for name in os.listdir('/dev/fd')]
    files = {file: file for file in found if is_inherited(file)}
    fork = Fork(path, argv, dict(os.environ), os.getcwd(), files)
    for file in files:
        if file > 2:
            os.close(file)
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: fork.send(number))
    code = fork.wait()
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(path: str) -> dict[str, Any]:
    """Forks a process for each request, in which it returns the request."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake)
    events, forks = selectors.DefaultSelector(), {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        for file in (0, woken, listener):
            events.register(file, selectors.EVENT_READ)
        print('ready', flush=True)
        while True:
            for event, _ in events.select():
                if event.fileobj == 0:
                    for pid in forks:
                        os.kill(pid, signal.SIGKILL)
                    sys.exit()
                if event.fileobj == woken:
                    os.read(woken, 4096)
                    report_ended(forks, events)
                elif event.fileobj is listener:
                    connection = listener.accept()[0]
                    if request := fork_for(connection, forks):
                        break
                    events.register(connection, selectors.EVENT_READ)
                else:  # whoever asked for it is gone
                    events.unregister(event.fileobj)
                    for pid in [p for p, asker in forks.items() if asker is event.fileobj]:
                        os.kill(pid, signal.SIGKILL)
            else:
                continue
            break
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for file in (woken, wake, *(c.detach() for c in forks.values())):
        os.close(file)
    events.close()
    return request


def report_ended(forks: dict[int, socket.socket], events: selectors.BaseSelector) -> None:
    for pid in list(forks):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            asker = forks.pop(pid)
            with contextlib.suppress(KeyError):
                events.unregister(asker)
            with asker, contextlib.suppress(BrokenPipeError):
                asker.sendall(b'%d\n' % os.waitstatus_to_exitcode(status))


def fork_for(connection: socket.socket, forks: dict[int, socket.socket]) -> dict[str, Any] | None:
    """None in the server, the request in the fork."""
    _, files, _, _ = socket.recv_fds(connection, 1, 250)
    with connection.makefile('rb') as f:
        line = f.readline()
    pid = os.fork() if line.endswith(b'\n') else None
    if pid == 0:
        connection.close()
        return {**json.loads(line), 'received': files}
    for file in files:
        os.close(file)
    if pid is not None:
        forks[pid] = connection
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(b'%d\n' % pid)
    return None


def take_files(numbers: list[int], received: list[int]) -> None:
    aside = [fcntl.fcntl(file, fcntl.F_DUPFD, max(numbers) + 1) for file in received]
    for file in received:
        os.close(file)
    for file, number in zip(aside, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)
    # New streams: the server's know whether its files could seek.
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, 'w', errors=sys.__stdout__.errors, closefd=False)
    sys.stderr = open(2, 'w', errors='backslashreplace', buffering=1, closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def become(argv: list[str]) -> None:
    """Runs the program as Python does, in this process."""
    warnings._processoptions(list(filter(None, os.environ.get('PYTHONWARNINGS', '').split(','))))
    while argv[0][:2] in ('-u', '-B', '-W'):
        if argv[0] == '-u':
            sys.stdout.reconfigure(line_buffering=True)
        elif argv[0] == '-B':
            sys.dont_write_bytecode = True
        else:
            warnings._processoptions([argv[0][2:]])
        argv = argv[1:]
    if argv[0] == '-m':
        sys.path.insert(0, os.getcwd())
        sys.argv[:] = argv[1:]
        if not hasattr(sys.modules.get(argv[1]), '__path__'):
            sys.modules.pop(argv[1], None)  # the server has imported it, and runpy would warn of that
        runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
    elif argv[0] == '-c':
        sys.path.insert(0, '')
        sys.argv[:] = ['-c', *argv[2:]]
        sys.modules['__main__'] = types.ModuleType('__main__')
        exec(compile(argv[1], '<string>', 'exec'), vars(sys.modules['__main__']))
    elif not argv[0].startswith('-'):
        sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
        sys.argv[:] = argv
        runpy.run_path(argv[0], run_name='__main__')
    else:
        sys.exit(f'{argv[0]}: not understood')


def main() -> None:
    if sys.argv[1] != 'serve':
        stand_in(sys.argv[1], sys.argv[2:])
    sys.path[0] = ROOT
    for module in ('torch.distributed.run', 'simsiam_models.cli', 'train'):
        importlib.import_module(module)
    del sys.path[0]
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page of the server
    executable, path = sys.argv[2:]
    request = serve(path)
    take_files(request['files'], request['received'])
    signal.pthread_sigmask(signal.SIG_SETMASK, request['blocked'])
    os.environ.clear()
    os.environ.update({'PYTHON_EXEC': executable, **request['env']})
    os.chdir(request['cwd'])
    sys.path[:0] = filter(None, request['env'].get('PYTHONPATH', '').split(os.pathsep))
    try:
        become(request['argv'])
        code = 0
    except SystemExit as e:
        if isinstance(e.code, str):
            raise
        code = int(e.code or 0)
    # What Python does at its end, except taking the modules apart, which would copy the server's pages.
    threading._shutdown()
    atexit._run_exitfuncs()
    if not sys.stdout.closed:  # multiprocessing's resource tracker closes it
        sys.stdout.flush()
    os._exit(code)


if __name__ == '__main__':
    main()
