#!/bin/bash
# anthropic 2.14.0 (Python), `messages.stream(...)` and its `get_final_message()`.
#
# Expected: a stream whose connection ends before `message_stop`, as when a server is stopped, raises,
# at the latest when the final message is asked for; and the arguments of a call that was cut in the
# middle cannot be read as a whole one's.
# Seen: nothing raises. The final message is what came so far, `stop_reason` is None, and the input of
# a call is what a parser of partial JSON makes of it: a list's last word, still open, is gone, and the
# rest is a valid object. A program that runs tools without a look at `stop_reason` runs that call.
#
#   text: 'The answer is ' stop_reason: None
#   input: {'command': 'remove', 'files': ['a.txt']} stop_reason: None
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check anthropic==2.14.0
cat > finding.py <<'P'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import anthropic

USAGE = {"input_tokens": 1, "output_tokens": 0}
MESSAGE = {
    "id": "m", "type": "message", "role": "assistant", "content": [], "model": "m",
    "stop_reason": None, "usage": USAGE,
}
TEXT = {"type": "text", "text": ""}
CALL = {"type": "tool_use", "id": "t", "name": "files", "input": {}}
SAID = {"type": "text_delta", "text": "The answer is "}
CUT = '{"command": "remove", "files": ["a.txt", "b.t'
ARGUMENTS = {"type": "input_json_delta", "partial_json": CUT}


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        block, delta = blocks.pop(0)
        self.tell("message_start", message=MESSAGE)
        self.tell("content_block_start", index=0, content_block=block)
        self.tell("content_block_delta", index=0, delta=delta)

    def tell(self, kind, **fields):
        self.wfile.write(f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode())

    def log_message(self, *_):
        pass


blocks = [(TEXT, SAID), (CALL, ARGUMENTS)]
server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.server_port}", api_key="x")


def final():
    messages = [{"role": "user", "content": "x"}]
    with client.messages.stream(model="m", max_tokens=99, messages=messages) as stream:
        return stream.get_final_message()


text, call = final(), final()
print("text:", repr(text.content[0].text), "stop_reason:", text.stop_reason)
print("input:", call.content[0].input, "stop_reason:", call.stop_reason)
assert (text.content[0].text, text.stop_reason) == (SAID["text"], None), "it has changed"
wanted = {"command": "remove", "files": ["a.txt"]}
assert (call.content[0].input, call.stop_reason) == (wanted, None), "the behaviour has changed"
P
venv/bin/python finding.py
