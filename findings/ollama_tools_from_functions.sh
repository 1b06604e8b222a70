#!/bin/bash
# ollama 0.6.3 (Python), `chat(tools=[function])`, which makes a tool's schema of a function.
#
# Expected: a parameter with a default may be left out; the choices of a Literal, the kind of a
# list's items and the fields of a pydantic model are in the schema that a model gets to see.
# Seen: every parameter that is not Optional is required, defaults or not. A Literal is a bare
# "string", a list has no "items", and a pydantic model is a "string": its fields stand in "$defs",
# to which nothing refers. A model that keeps to that schema sends text where an object is meant.
#
#   required: ['unit', 'names', 'place', 'days']
#   unit: {'type': 'string', 'description': ''}
#   names: {'type': 'array', 'description': ''}
#   place: {'type': 'string', 'description': ''}
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check ollama==0.6.3
cat > finding.py <<'P'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Literal

import ollama
import pydantic

asked = []


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        answer = b'{"message": {"role": "assistant", "content": "x"}, "done": true}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


class Place(pydantic.BaseModel):
    city: str
    country: str = "France"


def forecast(
    unit: Literal["C", "F"] = "C", names: list[str] = [], place: Place = None, days: int = 1
):
    """Tell the weather."""


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = ollama.Client(host=f"http://127.0.0.1:{server.server_port}")
client.chat(model="m", messages=[{"role": "user", "content": "x"}], tools=[forecast])
schema = asked[0]["tools"][0]["function"]["parameters"]
print("required:", schema["required"])
for name in ("unit", "names", "place"):
    print(f"{name}: {schema['properties'][name]}")
bare = {kind: {"type": kind, "description": ""} for kind in ("string", "array")}
assert schema["required"] == ["unit", "names", "place", "days"], "the behaviour has changed"
found = [schema["properties"][name] for name in ("unit", "names", "place")]
assert found == [bare["string"], bare["array"], bare["string"]], "the behaviour has changed"
assert "#/$defs/Place" not in json.dumps(schema), "the behaviour has changed"
P
venv/bin/python finding.py
