"""A small Hub on 127.0.0.1, with the part of the Hub's protocol that huggingface_hub needs here.

Repositories are dictionaries of bytes. :attr:`LoopbackHub.faults` says what goes wrong, for each repository.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = ('.safetensors', '.bin')


class LoopbackHub:
    """Serve ``repos`` and accept uploads to them.

    Attributes:
        repos: 'org/name' -> file name -> content.
        faults: 'org/name' -> one of 'gated', 'drop' (no answer at all), 'cut' (half of the file, then silence),
            'short' (half of the file, as if it were whole), 'flip' (a byte of the file inverted), 'deaf' (uploads are
            accepted but not stored).
        broken: Pattern of 'METHOD path' -> the status that such a request is answered with; 0 closes the connection
            in the middle of it; a negative number is that many seconds of silence.
        reason: What the Hub says with such a status, or ''.
        private: Names of the repositories that were made private.
        collections: 'org/name-number' -> names of repositories.
        requests: Method and path of every request.
        tokens: Authorization headers of all requests.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.faults: dict[str, str] = {}
        self.broken: dict[str, int] = {}
        self.reason = ''
        self.private: set[str] = set()
        self.collections: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.port}'

    def start(self) -> None:
        handler = type('BoundHandler', (Handler,), {'hub': self})
        self.server = ThreadingHTTPServer(('127.0.0.1', self.port), handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Stop the server for a while."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def commit(self, repo: str) -> str:
        """Return the commit hash of the present content of ``repo``."""
        digest = hashlib.sha1(repo.encode())
        for name, content in sorted(self.repos[repo].items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = 'HTTP/1.1'

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def parse_request(self) -> bool:
        return super().parse_request() and not self.is_broken()

    def is_broken(self) -> bool:
        found = (what for pattern, what in self.hub.broken.items() if re.search(pattern, f'{self.command} {self.path}'))
        status = next(found, None)
        if status is None:
            return False
        self.close_connection = True
        if status > 0:
            self.note()
            reason = {'errors': [{'message': self.hub.reason}]} if self.hub.reason else {}
            self.answer_json(reason, status)
        else:
            self.rfile.read(min(10, int(self.headers.get('Content-Length') or 0)))
            time.sleep(-status)
        return True

    def do_HEAD(self) -> None:
        self.serve()

    def do_GET(self) -> None:
        if match := re.match('/api/collections/(.+)', self.path):
            self.note()
            self.answer_collection(match[1])
        else:
            self.serve()

    def do_PUT(self) -> None:
        body = self.note()
        self.hub.blobs[hashlib.sha256(body).hexdigest()] = body
        self.answer(200)

    def do_POST(self) -> None:
        body = self.note()
        if self.path == '/api/repos/create':
            self.create(json.loads(body))
        elif self.path == '/api/validate-yaml':
            self.answer_json({'errors': [], 'warnings': []})
        elif self.path == '/api/collections':
            self.create_collection(json.loads(body))
        elif match := re.match('/api/collections/(.+)/items', self.path):
            self.add_item(match[1], json.loads(body)['item']['id'])
        elif '/preupload/' in self.path:
            files = [
                {
                    'path': file['path'],
                    'uploadMode': 'lfs' if file['path'].endswith(LARGE) else 'regular',
                    'shouldIgnore': False,
                }
                for file in json.loads(body)['files']
            ]
            self.answer_json({'files': files})
        elif self.path.endswith('/info/lfs/objects/batch'):
            self.batch(json.loads(body))
        elif match := re.match(r'/api/models/([^/]+/[^/]+)/commit/', self.path):
            self.take_commit(match[1], body)
        else:
            self.answer(404)

    def note(self) -> bytes:
        self.hub.requests.append(f'{self.command} {self.path}')
        if 'Authorization' in self.headers:
            self.hub.tokens.add(self.headers['Authorization'])
        if self.headers.get('Transfer-Encoding') == 'chunked':
            return b''.join(self.chunks())
        return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def answer(self, status: int, body: bytes = b'', **headers: str) -> None:
        self.send_response(status)
        # closed after each answer: an open connection would still answer after stop()
        for name, value in {'Connection': 'close', 'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def answer_json(self, content: object, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), Content_Type='application/json')

    def serve(self) -> None:
        """``/org/name/resolve/REVISION/FILE``; small files redirect to ``/api/resolve-cache``, as on the Hub."""
        self.note()
        match = re.match(r'(/api/resolve-cache/models)?/([^/]+/[^/]+)(?:/resolve)?/([^/]+)/(.+)', self.path)
        repo = match[2] if match else ''
        fault = self.hub.faults.get(repo, '')
        if fault == 'drop':
            self.close_connection = True
        elif match is None or repo not in self.hub.repos:
            self.answer(404, X_Error_Code='RepoNotFound')
        elif fault == 'gated':
            self.answer(403, X_Error_Code='GatedRepo')
        elif match[3] not in ('main', self.hub.commit(repo)):
            self.answer(404, X_Error_Code='RevisionNotFound')
        elif match[4] not in self.hub.repos[repo]:
            self.answer(404, X_Error_Code='EntryNotFound', X_Repo_Commit=self.hub.commit(repo))
        elif not match[1] and not match[4].endswith(LARGE):
            cached = f'/api/resolve-cache/models/{repo}/{self.hub.commit(repo)}/{match[4]}'
            self.answer(307, Location=cached, X_Repo_Commit=self.hub.commit(repo))
        else:
            self.send_file(repo, match[4], fault)

    def send_file(self, repo: str, name: str, fault: str) -> None:
        body = self.hub.repos[repo][name]
        is_large = name.endswith(LARGE)
        etag = hashlib.sha256(body).hexdigest() if is_large else hashlib.sha1(b'blob' + body).hexdigest()
        headers = {'X_Repo_Commit': self.hub.commit(repo), 'ETag': f'"{etag}"', 'Accept_Ranges': 'bytes'}
        if fault == 'flip' and is_large:
            body = body[:-5] + bytes([body[-5] ^ 0xFF]) + body[-4:]
        if fault == 'short' and is_large:
            body = body[: len(body) // 2]
        if fault == 'cut' and is_large and self.command == 'GET':
            self.send_response(200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        start = re.match(r'bytes=(\d+)-$', self.headers.get('Range', ''))
        if start and self.command == 'GET':
            headers['Content_Range'] = f'bytes {start[1]}-{len(body) - 1}/{len(body)}'
            self.answer(206, body[int(start[1]) :], **headers)
        else:
            self.answer(200, body, **headers)

    def create(self, asked: dict[str, Any]) -> None:
        repo = f'{asked["organization"]}/{asked["name"]}'
        self.hub.repos.setdefault(repo, {})
        if asked.get('private') or asked.get('visibility') == 'private':  # as older and newer clients say it
            self.hub.private.add(repo)
        self.answer_json({'url': f'{self.hub.url}/{repo}'})

    def create_collection(self, asked: dict[str, Any]) -> None:
        slug = f'{asked["namespace"]}/{asked["title"].lower().replace(" ", "-")}-0123456789abcdef01234567'
        if slug in self.hub.collections:
            self.answer_json({'slug': slug}, 409)
        else:
            self.hub.collections[slug] = []
            self.answer_collection(slug)

    def add_item(self, slug: str, repo: str) -> None:
        if slug not in self.hub.collections or repo not in self.hub.repos:
            self.answer(404)
        elif repo in self.hub.collections[slug]:
            self.answer(409)
        else:
            self.hub.collections[slug].append(repo)
            self.answer_collection(slug)

    def answer_collection(self, slug: str) -> None:
        items = [
            {'_id': f'{number}', 'id': repo, 'type': 'model', 'position': number}
            for number, repo in enumerate(self.hub.collections[slug])
        ]
        about = {'title': slug, 'owner': slug.partition('/')[0], 'lastUpdated': '2026-01-01T00:00:00.000Z'}
        self.answer_json(
            {'slug': slug, 'items': items, **about, 'position': 0, 'private': False, 'theme': 'green', 'upvotes': 0}
        )

    def batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**item, 'actions': {'upload': {'href': f'{self.hub.url}/upload/{item["oid"]}'}}}
            for item in asked['objects']
        ]
        self.answer_json({'transfer': 'basic', 'objects': objects})

    def take_commit(self, repo: str, body: bytes) -> None:
        lines = [] if self.hub.faults.get(repo) == 'deaf' else body.splitlines()
        for line in map(json.loads, lines):
            value = line['value']
            if line['key'] == 'file':
                self.hub.repos[repo][value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                self.hub.repos[repo][value['path']] = self.hub.blobs[value['oid']]
        commit = self.hub.commit(repo)
        self.answer_json({'success': True, 'commitOid': commit, 'commitUrl': f'{self.hub.url}/{repo}/commit/{commit}'})
