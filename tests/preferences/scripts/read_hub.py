"""Serve the folder argv[1] as the hub's dataset org/pairs on loopback and read it; prints what came back as JSON."""

import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(sys.argv[1])
COMMIT = "c" * 40
FILES = {f"data/{path.name}": path.read_bytes() for path in sorted((FOLDER / "data").iterdir())}


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        file = "/".join(path.split("/")[6:])
        if path.startswith("/api/datasets/org/pairs/tree/"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "a" * 40} for name, data in FILES.items()]
            folder = [{"type": "directory", "path": "data", "size": 0, "oid": "b" * 40}]
            self.answer(json.dumps(tree if path.endswith("/data") else folder).encode())
        elif path == "/api/datasets/org/pairs" or path.startswith("/api/datasets/org/pairs/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(json.dumps({"id": "org/pairs", "sha": COMMIT, "siblings": siblings, "tags": []}).encode())
        elif path.startswith("/datasets/org/pairs/resolve/") and file in FILES:
            self.answer(FILES[file], ETag=f'"{hashlib.sha1(FILES[file]).hexdigest()}"')
        else:
            code = "EntryNotFound" if "/org/pairs/" in path else "RepoNotFound"
            self.answer(b"{}", 404, **{"X-Error-Code": code})

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        names = [name for name in FILES if name.replace("/", "%2F") in asked or name in asked]
        self.answer(
            json.dumps([{"type": "file", "path": n, "size": len(FILES[n]), "oid": "a" * 40} for n in names]).encode()
        )

    def answer(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        if os.environ.get("SHOW"):
            print(self.command, self.path, status, file=sys.stderr)

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

from prefvec_ray.common.errors import InputError  # noqa: E402
from prefvec_ray.preferences.sources import read_rows  # noqa: E402


def read(source: str, **options: str) -> object:
    try:
        return [at.row for at in read_rows(source, **options)]
    except InputError as error:
        return str(error)


print(
    json.dumps(
        {
            "train": read("org/pairs", split="train"),
            "test": read("org/pairs:default", split="test", revision="main"),
            "no split": read("org/pairs"),
            "wrong split": read("org/pairs", split="dev"),
            "absent": read("org/absent"),
        }
    )
)
