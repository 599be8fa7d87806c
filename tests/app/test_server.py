"""The demo over HTTP: what it gives away, what it takes, and what it leaves behind."""

import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytest.importorskip("gradio")

from modeling_bpgcn.app.server import Guard, bind, upload_folder, url_of
from tests.training_factory import ROOT

from .conftest import CLASS_NAMES, start, stop

SESSION = "test-session"


@pytest.fixture(scope="module")
def client(app):
    with httpx.Client(base_url=app.url, trust_env=False, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def config(client):
    return client.get("/config").json()


def upload(client, content: bytes, name: str = "image.png") -> httpx.Response:
    return client.post("/gradio_api/upload", files={"files": (name, content)})


def sent(path: str) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def join(client, function: int, data: list) -> httpx.Response:
    body = {"fn_index": function, "data": data, "session_hash": SESSION, "event_data": None, "trigger_id": None}
    return client.post("/gradio_api/queue/join", json=body)


def result(client) -> dict:
    """The output of the event that was sent last."""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": SESSION}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:") and (message := json.loads(line[5:]))["msg"] == "process_completed":
                return message
    raise AssertionError("no answer")


def function(config: dict, name: str) -> int:
    """The number of a handler."""
    [number] = [dependency["id"] for dependency in config["dependencies"] if dependency["api_name"] == name]
    return number


def test_the_page_names_no_other_host_and_forbids_it(client):
    response = client.get("/")
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert "http" not in policy
    for directive in ("default-src 'self'", "frame-ancestors 'none'", "object-src 'none'", "form-action 'self'"):
        assert directive in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert "fonts.g" not in response.text + client.get("/theme.css").text
    assert "preconnect" not in response.text
    assert "cdn" not in response.text
    assert 'lang="en"' in response.text
    for address in ("/assets/none.js", "/gradio_api/nothing"):
        assert "content-security-policy" in client.get(address).headers


def test_the_page_is_not_told_to_report(config):
    assert config["analytics_enabled"] is False
    assert config["api_prefix"] == "/gradio_api"
    assert config["footer_links"] == []
    assert not config.get("run_history")
    assert all(dependency["api_visibility"] == "private" for dependency in config["dependencies"])


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "//etc/passwd",
        "../../../../etc/passwd",
        "%2Fetc%2Fpasswd",
        "%252Fetc%252Fpasswd",
        "/proc/self/environ",
    ],
)
def test_files_of_the_machine_are_not_given_away(client, path):
    response = client.get(f"/gradio_api/file={path}")
    assert response.status_code in (403, 404)
    assert "root:" not in response.text


def test_nor_are_the_model_the_code_and_neighbouring_folders(client, model_folder):
    folder = Path(upload(client, b"x").json()[0]).parents[1]
    for path in (
        model_folder / "model.safetensors",
        Path(__file__),
        folder.parent / "x",
        folder / ".." / "x",
        "modeling_bpgcn/__main__.py",
    ):
        assert client.get(f"/gradio_api/file={path}").status_code == 403
    for address in ("/static/../../../../../etc/passwd", "/assets/..%2f..%2f..%2f..%2fetc/passwd"):
        response = client.get(address)
        assert response.status_code in (403, 404)
        assert "root:" not in response.text


def test_an_upload_is_kept_in_a_folder_of_the_process_alone(client, app):
    [path] = upload(client, b"some bytes", "../../na me<b>.png").json()
    folder = Path(path).parents[1]
    assert folder.name.startswith("bpgcn-app-")
    assert folder.stat().st_mode & 0o777 == 0o700
    response = client.get(f"/gradio_api/file={path}")
    assert (response.status_code, response.content) == (200, b"some bytes")
    [page] = upload(client, b"<script>alert(1)</script>", "page.html").json()
    response = client.get(f"/gradio_api/file={page}")
    assert response.status_code != 200 or "attachment" in response.headers["content-disposition"]


def test_bodies_are_bounded(client):
    assert upload(client, bytes(2**20)).status_code == 200
    response = upload(client, bytes(2**20 + 1))
    assert response.status_code == 413
    files = [("files", (f"{number}.png", bytes(2**20))) for number in range(3)]
    response = client.post("/gradio_api/upload", files=files)
    assert response.status_code == 413
    assert response.json()["detail"] == "More than 1 MB are not taken."

    def chunks():
        yield b"x"

    assert client.post("/gradio_api/upload", content=chunks()).status_code == 411
    assert client.post("/gradio_api/queue/join", content=bytes(2**16 + 1)).status_code == 413
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 60_000, b'{"data": "\xff"}'])
def test_what_is_no_json_is_refused(client, body):
    assert client.post("/gradio_api/queue/join", content=body).status_code == 400


@pytest.mark.parametrize(
    "path", ["http://127.0.0.1:9/x.png", "https://example.org/x.png", "/etc/passwd", "image.png", 7, ["/etc/passwd"]]
)
def test_a_path_that_was_not_sent_is_refused(client, config, path):
    choose = function(config, "choose")
    for data in ([sent(path), None, 16, 3], [None, None, 16, sent(path)], [{"url": "x", "deep": [sent(path)]}]):
        assert join(client, choose, data).status_code == 400


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=http://127.0.0.1:9/x"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:9/x"),
        ("POST", "/gradio_api/run/choose"),
        ("POST", "/gradio_api/call/choose"),
        ("POST", "/gradio_api/api/predict"),
        ("POST", "/gradio_api/component_server"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/gradio_api/run-history/records"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/monitoring"),
        ("GET", "/docs"),
        ("GET", "/svelte/x"),
        ("GET", "/custom_component/x"),
        ("PUT", "/gradio_api/upload"),
        ("OPTIONS", "/"),
    ],
)
def test_what_the_page_does_not_need_is_closed(client, method, path):
    assert client.request(method, path, json={} if method == "POST" else None).status_code in (403, 404)


def test_the_page_answers_over_http(client, config, pictures):
    choose, add = function(config, "choose"), function(config, "add")
    [path] = upload(client, (pictures / "class 1" / "15.png").read_bytes()).json()
    assert join(client, choose, [sent(path), None, 16, 3]).status_code == 200
    message = result(client)
    assert message["success"]
    assert '<data class="share"' in message["output"]["data"][3]
    assert join(client, add, [None, None, 1, 16, 3]).status_code == 200  # the image is in the session
    assert "rose &amp; thorn" in result(client)["output"]["data"][6]
    assert join(client, add, [None, None, 99, 16, 3]).status_code == 200
    message = result(client)
    assert "out of range" in message["output"]["data"][1]
    [path] = upload(client, b"broken", "broken.png").json()
    assert join(client, choose, [sent(path), None, 16, 3]).status_code == 200
    assert "no image of a format" in result(client)["output"]["data"][1]


def test_no_traceback_reaches_a_visitor(client, config):
    assert join(client, function(config, "choose"), ["no file data", None, 16, 3]).status_code == 200
    message = result(client)
    assert message["success"] is False
    assert "Traceback" not in json.dumps(message)
    assert "Error" not in json.dumps(message["output"].get("error") or "")


def test_old_uploads_are_deleted(tmp_path):
    from gradio.route_utils import delete_files_created_by_app

    from modeling_bpgcn.app.interface import UPLOAD_SECONDS

    assert UPLOAD_SECONDS <= 3600
    file = tmp_path / "upload"

    class Blocks:
        blocks, temp_file_sets = {}, [{str(file)}]

    file.touch()
    delete_files_created_by_app(Blocks, UPLOAD_SECONDS)
    assert file.exists()
    delete_files_created_by_app(Blocks, 0)
    assert not file.exists()


# --- the address, the folder, the end -------------------------------------------------------------------------------


def test_it_listens_to_this_machine_alone_unless_told_otherwise():
    with bind("127.0.0.1", 0) as listener:
        url, is_loopback = url_of(listener)
        assert url == f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert is_loopback
        with pytest.raises(OSError, match="in use"):
            bind("127.0.0.1", listener.getsockname()[1])
    with bind("0.0.0.0", 0) as listener:
        assert not url_of(listener)[1]
    if socket.has_ipv6:
        with bind("::1", 0) as listener:
            url, is_loopback = url_of(listener)
            assert url.startswith("http://[::1]:")
            assert is_loopback


def test_the_upload_folder_is_removed_and_forgotten(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "former")
    with upload_folder() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        (folder / "x").touch()
    assert not folder.exists()
    assert os.environ["GRADIO_TEMP_DIR"] == "former"
    monkeypatch.delenv("GRADIO_TEMP_DIR")
    with upload_folder():
        pass
    assert "GRADIO_TEMP_DIR" not in os.environ


COUNT_HEAPS = """
import ctypes, sys, threading
from modeling_bpgcn.app.server import share_heaps

if sys.argv[1] == "shared":
    share_heaps()
c = ctypes.CDLL(None)
c.malloc.restype = c.fopen.restype = ctypes.c_void_p
c.malloc_info.argtypes, c.fclose.argtypes = (ctypes.c_int, ctypes.c_void_p), (ctypes.c_void_p,)
together = threading.Barrier(8)

def allocate():
    c.malloc(10_000)
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = c.fopen(sys.argv[2].encode(), b"w")
c.malloc_info(0, file)
c.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives each thread a heap of its own")
def test_threads_share_heaps(tmp_path):
    found = {}
    for kind in ("own", "shared"):
        arguments = [sys.executable, "-c", COUNT_HEAPS, kind, str(tmp_path / kind)]
        subprocess.run(arguments, check=True, timeout=100, cwd=ROOT)
        found[kind] = (tmp_path / kind).read_text().count("<heap ")
    assert found["own"] > 2
    assert found["shared"] <= 2


def test_web_sockets_are_closed(tmp_path):
    messages = []

    async def send(message):
        messages.append(message)

    asyncio.run(Guard(None, tmp_path, 1, "")({"type": "websocket", "path": "/"}, None, send))
    assert messages == [{"type": "websocket.close", "code": 1008}]


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    folder = tmp_path / "sent"
    folder.mkdir()
    (tmp_path / "secret").touch()
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "file").touch()
    guard = Guard(None, folder, 1, "")
    assert guard._is_sent_file(str(folder / "file"))
    assert not guard._is_sent_file(str(folder / "link"))
    assert not guard._is_sent_file(str(tmp_path / "sent-too"))
    assert not guard._is_sent_file(f"{folder}/\0")


SPACE = Path(__file__).parents[2] / "space"


def test_the_space_serves_the_model_of_its_environment_and_cleans_up(model_folder, tmp_path):
    environment = {"BPGCN_MODEL": str(model_folder), "PORT": "0", "HOST": "127.0.0.1", "TMPDIR": str(tmp_path)}
    running = start([str(SPACE / "app.py")], **environment)
    try:
        response = httpx.get(running.url, trust_env=False, timeout=30)
        assert response.status_code == 200
        assert "frame-ancestors https://huggingface.co" in response.headers["content-security-policy"]
        assert CLASS_NAMES[0] in response.text
        with httpx.Client(base_url=running.url, trust_env=False) as client:
            assert upload(client, b"x").status_code == 200
        assert len(list(tmp_path.glob("bpgcn-app-*"))) == 1
    finally:
        status = stop(running)
    assert status == 0, "".join(running.errors)
    assert not list(tmp_path.glob("bpgcn-app-*"))
    assert "Traceback" not in "".join(running.errors)


def test_the_space_says_what_it_lacks():
    with pytest.raises(AssertionError, match="BPGCN_MODEL"):
        start([str(SPACE / "app.py")], BPGCN_MODEL="")


def test_the_front_matter_of_the_space_is_complete():
    from huggingface_hub import RepoCard

    data = RepoCard.load(SPACE / "README.md", ignore_metadata_errors=False).data.to_dict()
    assert data["sdk"] == "gradio"
    assert data["app_file"] == "app.py"
    assert data["license"] == "apache-2.0"
    assert len(data["short_description"]) <= 60  # what the Hub takes
    import gradio

    assert data["sdk_version"].split(".")[0] == gradio.__version__.split(".")[0]
    assert (SPACE / "requirements.txt").read_text().split() == ["bpgcn[app]"]
