"""As much of the Hub as an upload of a data set's folder needs, on the loopback."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer:
    """Takes repositories and files in; `files` holds what was committed."""

    def __init__(self):
        self.created, self.files, self.blobs, self.tokens = [], {}, {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def body(self):
                if self.headers.get("Transfer-Encoding") == "chunked":
                    data = b""
                    while size := int(self.rfile.readline(), 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return data
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def reply(self, value, status=200):
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_PUT(self):
                data = self.body()
                hub.blobs[hashlib.sha256(data).hexdigest()] = data
                self.reply({})

            def do_GET(self):
                info = {"id": "me/data", "sha": "0" * 40, "siblings": [], "private": True}
                self.reply(info)

            def do_POST(self):
                data = self.body()
                token = self.headers.get("Authorization")
                if token and token not in hub.tokens:
                    hub.tokens.append(token)
                if self.path == "/api/repos/create":
                    hub.created.append(json.loads(data))
                    self.reply({"url": f"{hub.url}/datasets/me/data"})
                elif "/preupload/" in self.path:
                    files = json.loads(data)["files"]
                    modes = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".parquet") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                    self.reply({"files": modes})
                elif self.path.endswith("/objects/batch"):
                    objects = [
                        {
                            **one,
                            "actions": {"upload": {"href": f"{hub.url}/put/{one['oid']}"}},
                        }
                        for one in json.loads(data)["objects"]
                    ]
                    self.reply({"objects": objects, "transfer": "basic"})
                elif "/commit/" in self.path:
                    for line in data.splitlines():
                        entry = json.loads(line)
                        value = entry["value"]
                        if entry["key"] == "file":
                            hub.files[value["path"]] = base64.b64decode(value["content"])
                        elif entry["key"] == "lfsFile":
                            hub.files[value["path"]] = hub.blobs[value["oid"]]
                    url = f"{hub.url}/datasets/me/data/commit/{'0' * 40}"
                    self.reply({"commitUrl": url, "commitOid": "0" * 40, "success": True})
                else:
                    self.reply({})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
