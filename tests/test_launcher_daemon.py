"""What the launcher makes of answers that no real Docker daemon can be brought to give on demand."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from socketserver import UnixStreamServer

import docker
import pytest

from gateway.launcher.engines.daemon import Daemon
from gateway.launcher.errors import ContainerRefusedError, EngineDownError


@contextmanager
def daemon_that_says(words, path):
    """Tells its version; to everything else it answers 500 with these words."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            of_version = self.path.endswith("/version")
            content = json.dumps({"ApiVersion": "1.41"} if of_version else {"message": words}).encode()
            self.send_response(200 if of_version else 500)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with UnixStreamServer(str(path), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("transport is closing: unavailable", EngineDownError),
        ("OCI runtime create failed: exec format error: unknown", ContainerRefusedError),
    ],
)
async def test_a_daemon_whose_containerd_goes_away_is_down_and_has_not_refused_the_container(words, error, tmp_path):
    with daemon_that_says(words, tmp_path / "docker.sock"):
        daemon = Daemon(f"unix://{tmp_path}/docker.sock", threads=1, timeout_seconds=5)
        try:
            with pytest.raises(error, match=words):
                await daemon.call(docker.APIClient.info)
        finally:
            daemon.close()
