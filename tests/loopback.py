"""A Hugging Face Hub and a plain file server on 127.0.0.1, with the faults that real ones have.

    with Server(hub=True) as hub:
        hub.put('name/repo', 'model.safetensors', data)
        hub.fault = status(500)          # until it is set to None again; a fault answers instead of the server
        hub.log                          # ['HEAD /name/repo/resolve/main/model.safetensors', ...]
"""
import hashlib
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = 'c0ffee' + '0' * 34
Fault = Callable[['Handler', bytes], object]  # answers a request for a body; its return value is ignored


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def flip(data: bytes) -> bytes:
    """Flips one bit in the middle."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


class Handler(BaseHTTPRequestHandler):
    """Answers HEAD and GET; `Range: bytes=N-` gets 206. HTTP/1.0: every answer ends its connection."""

    owner: 'Server'

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        wanted = self.headers.get('Range')
        self.owner.log.append(f'{self.command} {self.path}' + (f' {wanted}' if wanted else ''))
        body = self.owner.files.get(self.path)
        fault = self.owner.fault
        try:
            if self.path.startswith('/api/'):  # the client also asks for other things; no test needs them
                (silent if fault is silent else status(404))(self, b'')
            elif fault:
                fault(self, body or b'')
            elif body is None:
                status(404, 'EntryNotFound')(self, b'')
            else:
                self.send(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up

    @property
    def offset(self) -> int:
        """The first byte that Range asks for."""
        return int((self.headers.get('Range') or 'bytes=0-').removeprefix('bytes=').split('-')[0])

    def send(self, body: bytes, etag: str | None = None, upto: int | None = None) -> None:
        """Sends a file up to byte `upto`. The ETag is its sha256 unless given ('': none). Ignores If-Range."""
        headers = {'Content-Length': str(len(body) - self.offset), 'ETag': sha256(body) if etag is None else etag}
        if self.owner.hub:
            headers['X-Repo-Commit'] = COMMIT
        if self.offset:
            headers['Content-Range'] = f'bytes {self.offset}-{len(body) - 1}/{len(body)}'
        if self.offset >= len(body) > 0:
            return self.head(416, {'Content-Length': '0'})
        self.head(206 if self.offset else 200, headers)
        if self.command == 'GET':
            self.wfile.write(body[self.offset:upto])

    def head(self, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            if value:
                self.send_header(name, f'"{value}"' if name.endswith(('ETag', 'Etag')) else value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


class Server:
    def __init__(self, hub: bool = False) -> None:
        self.hub = hub
        self.files: dict[str, bytes] = {}
        self.log: list[str] = []
        self.fault: Fault | None = None
        self.port = 0
        self.closing = threading.Event()

    def __enter__(self) -> 'Server':
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listens; after a stop, on the same port."""
        handler = type('Bound', (Handler,), {'owner': self})
        self.closing.clear()
        self.server = ThreadingHTTPServer(('127.0.0.1', self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuses connections."""
        if not self.closing.is_set():
            self.closing.set()
            self.server.shutdown()
            self.server.server_close()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.port}'

    def put(self, repo: str, name: str, body: bytes, revision: str = 'main') -> None:
        """Serves a file of a Hub repository, at a branch and at its commit."""
        for at in (revision, COMMIT):
            self.files[f'/{repo}/resolve/{at}/{name}'] = body

    def list_requests(self, method: str, end: str = '') -> list[str]:
        """Returns the requests for files with this method whose path ends with `end`."""
        files = [line for line in self.log if ' /api/' not in line]
        return [line for line in files if line.startswith(method + ' ') and line.split(' ')[1].endswith(end)]


def status(code: int, error: str = '', message: str = '', retry_after: int | None = None) -> Fault:
    """Answers with an error, which the Hub names in X-Error-Code."""
    body = f'{code} from loopback\n'.encode()
    headers = {
        'X-Error-Code': error, 'X-Error-Message': message, 'Content-Length': str(len(body)),
        'Retry-After': '' if retry_after is None else str(retry_after)}

    def answer(handler: Handler, _: bytes) -> None:
        handler.head(code, headers)
        if handler.command == 'GET':
            handler.wfile.write(body)
    return answer


def redirect(to: Server) -> Fault:
    """Redirects as for LFS: the Hub names hash and size, another server has the bytes."""
    def answer(handler: Handler, body: bytes) -> None:
        path = f'/lfs/{sha256(body)}'
        to.files[path] = body
        handler.head(302, {
            'Location': to.url + path, 'X-Linked-Etag': sha256(body), 'X-Linked-Size': str(len(body)),
            'X-Repo-Commit': COMMIT, 'Content-Length': '0'})
    return answer


def silent(handler: Handler, _: bytes) -> None:
    """Accepts and never answers (30 s at most)."""
    handler.owner.closing.wait(30)


def dripping(handler: Handler, _: bytes) -> None:
    """Sends a header byte by byte and never ends (30 s at most)."""
    handler.wfile.write(b'HTTP/1.0 200 OK\r\nX-')
    for _ in range(300):
        if handler.owner.closing.wait(0.1):
            return
        handler.wfile.write(b'a')


def html(handler: Handler, _: bytes) -> None:
    """Answers like a captive portal: status 200 and a page for every request."""
    page = b'<!DOCTYPE html><html><title>Please log in</title></html>\n'
    handler.head(200, {'Content-Type': 'text/html', 'Content-Length': str(len(page))})
    if handler.command == 'GET':
        handler.wfile.write(page)


def no_etag(handler: Handler, body: bytes) -> None:
    handler.send(body, etag='')


def cut(handler: Handler, body: bytes) -> None:
    """Ends the connection at the same byte each time."""
    handler.send(body, upto=len(body) // 2)


def stutter(handler: Handler, body: bytes) -> None:
    """Ends the connection a third of the file after the start of Range."""
    handler.send(body, upto=handler.offset + len(body) // 3 + 1)


def cut_unsized(handler: Handler, body: bytes) -> None:
    """Sends half of the file without its length."""
    handler.head(200, {})
    handler.wfile.write(body[:len(body) // 2])


def stuck(handler: Handler, body: bytes) -> None:
    """Stops GET in the middle and keeps the connection (30 s at most)."""
    handler.send(body, upto=len(body) // 2)
    if handler.command == 'GET':
        handler.wfile.flush()
        handler.owner.closing.wait(30)


def short(handler: Handler, body: bytes) -> None:
    """Answers GET completely but without the file's last 1000 bytes; HEAD gives the true size."""
    handler.send(body if handler.command == 'HEAD' else body[:-1000], etag=sha256(body))


def flipped(handler: Handler, body: bytes) -> None:
    """Sends one wrong bit under the headers of the true file."""
    handler.send(flip(body), etag=sha256(body))


def times(n: int, fault: Fault) -> Fault:
    """Applies the fault to n requests."""
    left = [n]

    def answer(handler: Handler, body: bytes) -> None:
        left[0] -= 1
        fault(handler, body) if left[0] >= 0 else handler.send(body)
    return answer


def on(method: str, fault: Fault) -> Fault:
    """Applies the fault to GET or to HEAD only."""
    return lambda handler, body: fault(handler, body) if handler.command == method else handler.send(body)


def pause(seconds: float) -> Fault:
    """Sends the true file, for GET after a pause."""
    return lambda handler, body: (handler.command == 'GET' and time.sleep(seconds), handler.send(body))
