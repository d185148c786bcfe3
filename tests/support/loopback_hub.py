"""A Hugging Face hub on this machine: what huggingface_hub asks of one, for a few folders under ids, and nothing else."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from scripted_http import running

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class LoopbackHub(ThreadingHTTPServer):
    """A hub. A token is good when it is one of `tokens`.

    Attributes:
      folders: id -> folder that is served, at the revisions `main`, 'v1' and the commit.
      gated: ids -> tokens whose accounts have accepted the licence; private: ids -> tokens that see it.
      cut_after: bytes after which the next answer with a file breaks off, once.
      requests: (method, path, Range header) as they came.
    """

    daemon_threads = True

    def __init__(self, folders, tokens=(), gated=None, private=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders = {name: Path(folder) for name, folder in folders.items()}
        self.tokens, self.gated, self.private = set(tokens), gated or {}, private or {}
        self.cut_after, self.requests = None, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # clients hang up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)

    def answer(self, with_body):
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            return self.refuse(401, None, "Invalid credentials in Authorization header", with_body)
        if parts[:2] == ["api", "whoami-v2"]:
            if not token:
                return self.refuse(401, None, "Invalid username or password.", with_body)
            account = {"type": "user", "name": "us", "auth": {"accessToken": {"displayName": "ours", "role": "read"}}}
            return self.reply(json.dumps(account).encode(), with_body)
        is_api = parts[:2] == ["api", "models"]
        name, parts = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        if name not in self.server.folders or token not in self.server.private.get(name, {token}):
            code = 404 if token else 401
            return self.refuse(code, "RepoNotFound", "Repository not found", with_body)
        kind, revision, rest = parts[0], parts[1], "/".join(parts[2:])
        if revision not in ("main", "v1", COMMIT):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}", with_body)
        folder = self.server.folders[name]
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if kind == "revision":
            found = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
            return self.reply(json.dumps(found).encode(), with_body)
        if kind == "tree":
            rows = [{"type": "file", "path": p, "size": f.stat().st_size, "oid": _etag(f)} for p, f in files.items()]
            return self.reply(json.dumps(rows).encode(), with_body)
        if token not in self.server.gated.get(name, {token}):
            return self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted", with_body)
        if rest not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", with_body)
        return self.reply_file(files[rest], with_body)

    def refuse(self, status, code, message, with_body):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply(json.dumps({"error": message}).encode(), with_body, status, headers)

    def reply_file(self, file, with_body):
        content, start = file.read_bytes(), 0
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if (asked := self.headers.get("Range")) and asked.startswith("bytes="):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(content[start:], with_body, 206 if start else 200, headers, cuts=True)

    def reply(self, content, with_body, status=200, headers=(), cuts=False):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if not with_body:
            return
        after = self.server.cut_after
        if cuts and after is not None and len(content) > after:
            self.server.cut_after = None
            self.wfile.write(content[:after])
            self.close_connection = True
            return
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def _etag(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


def loopback_hub(folders, **options):
    """A hub that serves these folders under these ids."""
    return running(LoopbackHub(folders, **options))
