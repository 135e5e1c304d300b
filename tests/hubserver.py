"""As much of the Hub as uploads and downloads need, on the loopback, over real HTTP."""

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+)(?:/(.*))?)?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Repository:
    """Files by name, who may see them, and a number of commits."""

    def __init__(self, private):
        self.private, self.files, self.commits = private, {}, 0

    @property
    def sha(self):
        return f"{self.commits:040x}"

    def entry(self, name):
        content = self.files[name]
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": name, "rfilename": name, "size": len(content)}
        return entry | {"oid": oid, "blobId": oid}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    hub = property(lambda self: self.server.hub)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, self.path, dict(self.headers), data))
        return data

    def reply(self, value, status=200, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, what="RepoNotFound"):
        self.reply({"error": what}, 404, X_Error_Code=what)

    def repository(self, kind, identity):
        """Return a repository, if there is one and the caller may see it."""
        found = self.hub.repositories.get((kind, identity))
        token = self.headers.get("Authorization")
        return found if found and (token == self.hub.token or not found.private) else None

    def fails(self):
        """Fail where a test has asked for it: with a status, or with a dropped connection."""
        for fault in self.hub.faults:
            method, pattern, what, times = fault
            if times and method == self.command and re.search(pattern, unquote(self.path)):
                fault[3] -= 1
                self.body()
                if what == "drop":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                else:
                    self.reply({"error": f"status {what}, as asked for"}, what)
                return True
        return False

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.fails():
            return
        self.body()
        path = unquote(urlsplit(self.path).path)
        if match := FILE.fullmatch(path):
            self.send_file(*match.groups())
        elif match := API.fullmatch(path):
            kind, identity, verb, _, rest = match.groups()
            repository = self.repository(kind, identity)
            if repository is None:
                self.missing()
            elif verb == "tree":
                folder = f"{rest}/" if rest else ""
                names = [name for name in repository.files if name.startswith(folder)]
                self.reply([repository.entry(name) for name in names])
            else:
                self.reply(
                    {"id": identity, "sha": repository.sha, "private": repository.private, "tags": [],
                     "siblings": [repository.entry(name) for name in repository.files]}
                )  # fmt: skip
        else:
            self.missing("EntryNotFound")

    def send_file(self, datasets, identity, revision, name):
        repository = self.repository("datasets" if datasets else "models", identity)
        if repository is None:
            self.missing()
        elif name not in repository.files:
            self.missing("EntryNotFound")
        else:
            etag = repository.entry(name)["oid"]
            headers = {"ETag": f'"{etag}"', "X_Repo_Commit": repository.sha}
            self.reply(repository.files[name], **headers, Accept_Ranges="none")

    def do_POST(self):
        if self.fails():
            return
        data = self.body()
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != self.hub.token:
            self.reply({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(data))
        elif match := API.fullmatch(path):
            kind, identity, verb, _, _ = match.groups()
            repository = self.repository(kind, identity)
            if repository is None:
                self.missing()
            elif verb == "preupload":
                asked = [file["path"] for file in json.loads(data)["files"]]
                how = {"shouldIgnore": False, "uploadMode": "regular"}
                self.reply({"files": [{"path": path} | how for path in asked]})
            else:
                self.commit(repository, identity, data)
        else:
            self.missing()

    def create(self, asked):
        identity = f"{asked['organization']}/{asked['name']}"
        kind = "datasets" if asked.get("type") == "dataset" else "models"
        if (kind, identity) in self.hub.repositories:
            self.reply({"error": "You already created this repo"}, 409)
            return
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories[kind, identity] = Repository(private)
        prefix = "datasets/" if kind == "datasets" else ""
        self.reply({"url": f"{self.hub.url}/{prefix}{identity}"})

    def commit(self, repository, identity, data):
        for entry in map(json.loads, data.splitlines()):
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                repository.files[entry["value"]["path"]] = content
            elif entry["key"] == "deletedFile":
                del repository.files[entry["value"]["path"]]
        repository.commits += 1
        url = f"{self.hub.url}/{identity}/commit/{repository.sha}"
        self.reply({"commitUrl": url, "commitOid": repository.sha, "success": True})


class HubServer:
    """A Hub of one user; `requests` records method, path, headers and body.

    `faults` are method, pattern of the path, status or "drop", and how often.
    """

    def __init__(self, token="hf_loopback-token"):
        self.secret, self.token = token, f"Bearer {token}"
        self.repositories, self.requests, self.faults = {}, [], []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def files(self, identity, kind="models"):
        return self.repositories[kind, identity].files

    def environment(self, home):
        """Return the variables that make a process use this Hub; they are read once, on import."""
        return {
            "HF_ENDPOINT": self.url, "HF_TOKEN": self.secret, "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip

    def carried(self, text):
        """Return the requests that held a text, apart from the Authorization header."""
        found = []
        for method, path, headers, body in self.requests:
            others = [v for name, v in headers.items() if name.lower() != "authorization"]
            if text.encode() in body or any(text in value for value in (path, *others)):
                found.append(f"{method} {path}")
        return found

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
