#!/bin/bash
# openai 3.57.0 (Python), a refusal with status 429 and a header `Retry-After`.
#
# Expected: the client waits as long as it is told up to some bound, and beyond the bound that long,
# or by its own shorter waits; it asks again twice either way, which is its default.
# Seen: up to 120 s it sleeps for the whole time, each of the two times, without a word to its caller;
# from 121 s on it does not ask again at all. A server that says "in five minutes" turns retries off.
#
#   Retry-After: 5    asked 3 times, waits [5.0, 5.0]
#   Retry-After: 120  asked 3 times, waits [120.0, 120.0]
#   Retry-After: 121  asked 1 times, waits []
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check openai==3.57.0
cat > finding.py <<'P'
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        asked.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(429)
        self.send_header("Retry-After", wait)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}", api_key="x")
sleep, time.sleep = time.sleep, lambda seconds: waits.append(seconds)
for wait, wanted in (("5", [5.0, 5.0]), ("120", [120.0, 120.0]), ("121", [])):
    asked, waits = [], []
    try:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
    except openai.RateLimitError:
        print(f"Retry-After: {wait:4} asked {len(asked)} times, waits {waits}")
    assert waits == wanted and len(asked) == len(wanted) + 1, "the behaviour has changed"
P
venv/bin/python finding.py
