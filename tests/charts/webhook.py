"""Runs the webhook as the chart's Deployment does, and asks it as an API server does.

Reads {"program", "args", "files": {path: text}, "secret": {path: base64}, "host", "caBundle": base64, "review"} as JSON; paths are those of the
container and come to stand in a temporary directory. Writes {"health": status, "answer": AdmissionReview}.
"""

import base64
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading

SECONDS = 60


def addresses(log):
    """Where it listens, from the log; everything else is remembered for the case that it never says."""
    seen = []
    for line in log:
        seen.append(line)
        event = json.loads(line)
        if "address" in event:
            return event["address"]
    raise SystemExit("the webhook does not serve: " + "".join(seen))


class Connection(http.client.HTTPSConnection):
    """To an address, under the name that the API server expects in the certificate."""

    def __init__(self, address, host, context):
        super().__init__(host, context=context, timeout=SECONDS)
        self.address, self.tls = address, context

    def connect(self):
        ip, port = self.address.rsplit(":", 1)
        plain = socket.create_connection((ip, int(port)), timeout=SECONDS)
        self.sock = self.tls.wrap_socket(plain, server_hostname=self.host)


def main():
    task = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as root:
        contents = {path: text.encode() for path, text in task["files"].items()}
        contents |= {path: base64.b64decode(data, validate=True) for path, data in task["secret"].items()}
        for path, content in contents.items():
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            with open(root + path, "wb") as file:
                file.write(content)
        # `--key=/tls/tls.key`; a path that is not given would stay as it is, and not be found.
        directories = {os.path.dirname(path) for path in contents}
        args = []
        for argument in task["args"]:
            option, _, value = argument.partition("=")
            if os.path.dirname(value) in directories:
                argument = f"{option}={root}{value}"
            elif value.startswith("0.0.0.0:"):
                argument = f"{option}=127.0.0.1:0"
            args.append(argument)
        process = subprocess.Popen([task["program"], *args], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        watchdog = threading.Timer(SECONDS, process.kill)
        watchdog.start()
        try:
            address = addresses(process.stderr)
            context = ssl.create_default_context(cadata=base64.b64decode(task["caBundle"]).decode())
            connection = Connection(address, task["host"], context)
            connection.request("GET", "/healthz")
            response = connection.getresponse()
            health = response.status
            response.read()
            body = json.dumps(task["review"])
            connection.request("POST", task["path"], body, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
        finally:
            process.kill()
            process.wait()
            watchdog.cancel()
        json.dump({"health": health, "answer": answer}, sys.stdout)


main()
