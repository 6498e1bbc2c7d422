"""The server against strangers: its own machine and files only, small uploads, odd requests."""

import gc
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from explorers import small_explorer

from vitreg import OutputError
from vitreg.app import serve
from vitreg.app.explorer import Explorer
from vitreg.data.images import demo_photos

pytest.importorskip("gradio", reason="needs gradio. Install it with: pip install -e '.[app]'")
import httpx

# Closed, gradio leaves sockets and an event loop to the garbage collector, and its thread may fail.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]
API = "/gradio_api"


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    return small_explorer(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def address(explorer: Explorer) -> Iterator[str]:
    page = serve(explorer)
    yield page.local_url.rstrip("/")
    page.close()
    gc.collect()


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as found:
        yield found


def event(client: httpx.Client, name: str) -> int:
    """The number of the event that a component with this label or id leads to."""
    config = client.get("/config").json()
    (found,) = [
        dependency["id"]
        for dependency in config["dependencies"]
        for target, trigger in dependency["targets"]
        for component in config["components"]
        if component["id"] == target and f"{component['props'].get('elem_id')}.{trigger}" == name
    ]
    return int(found)


def call(client: httpx.Client, number: int, data: list[object]) -> dict[str, object]:
    """What the server answers to an event: the message that ends it."""
    session = f"{random.getrandbits(64):x}"
    joined = client.post(
        f"{API}/queue/join", json={"data": data, "fn_index": number, "session_hash": session}
    )
    if joined.status_code != 200:
        return {"refused": joined.status_code, "text": joined.text}
    with client.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if message.get("msg") in ("process_completed", "unexpected_error"):
                return dict(message)
    return {}


def upload(client: httpx.Client, name: str, content: bytes) -> httpx.Response:
    return client.post(f"{API}/upload", files={"files": (name, content)})


def resident() -> int:
    """MiB of this process, which the server runs in."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) // 1024


def test_only_this_machine_is_served(address: str) -> None:
    port = int(address.rsplit(":", 1)[1])
    assert address == f"http://127.0.0.1:{port}"
    socket.create_connection(("127.0.0.1", port), 5).close()
    for other in ("127.0.0.2", "::1"):  # what 0.0.0.0 and :: would listen at, too
        with pytest.raises(OSError, match=r"refused|unreachable|Cannot assign|not supported"):
            socket.create_connection((other, port), 5).close()


def test_a_port_that_is_taken_is_an_error_of_ours(explorer: Explorer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OutputError, match=r"the page cannot be served: .*port"):
            serve(explorer, port=taken.getsockname()[1])
    gc.collect()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        str(Path(__file__).resolve()),
        str(Path.cwd() / "pyproject.toml"),
        "pyproject.toml",
        "../../../../../../../etc/passwd",
        "..%2f..%2f..%2f..%2fetc%2fpasswd",
        "file:///etc/passwd",
        "/proc/self/environ",
        "http://127.0.0.1:1/x",
    ],
)
def test_no_other_file_is_served(client: httpx.Client, path: str) -> None:
    for route in (f"{API}/file=", "/file=", f"{API}/file/", "/static/", "/assets/", "/"):
        found = client.get(f"{route}{path}")
        assert found.status_code in (400, 403, 404, 405, 422, 307), (route, found.text[:200])
        assert "root:" not in found.text
        assert "hatchling" not in found.text


def test_a_file_of_the_server_is_no_upload(client: httpx.Client) -> None:
    number = event(client, "upload.upload")
    secret = {"path": "/etc/passwd", "orig_name": "a.jpg", "meta": {"_type": "gradio.FileData"}}
    found = json.dumps(call(client, number, [secret]))
    assert "root:" not in found
    assert '"success": false' in found or "refused" in found
    assert Path("/etc/passwd").exists()  # what is read is deleted: not this


def test_a_large_upload_is_refused(client: httpx.Client) -> None:
    found = upload(client, "large.jpg", b"\0" * (21 * 1024 * 1024))
    assert found.status_code == 413
    assert upload(client, "small.jpg", b"\0" * 1024).status_code == 200


def test_200_malformed_uploads_and_requests(client: httpx.Client, explorer: Explorer, tmp_path: Path) -> None:
    number, chance = event(client, "upload.upload"), random.Random(0)
    good = demo_photos()[0].read_bytes()
    junk = [
        lambda: b"",
        lambda: chance.randbytes(2000),
        lambda: good[: chance.randrange(20, len(good))],
        lambda: b"\x89PNG\r\n\x1a\n" + chance.randbytes(500),
        lambda: b"GIF89a" + b"\xff" * 100,
        lambda: b"<svg onload=alert(1) xmlns='http://www.w3.org/2000/svg'/>",
    ]
    odd = [None, "x", -1, 10**12, [], {}, {"path": 3}, "../../etc", [[[]]], 1e308]

    def one(i: int) -> None:
        # A connection for each request: one that the server is about to close cannot be used again.
        once = {"Connection": "close"}
        with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False, headers=once) as stranger:
            send(stranger, i)

    def send(client: httpx.Client, i: int) -> None:
        content, name = junk[i % len(junk)](), f"{'é' * (i % 5)}../{i}<b>.jpg"
        sent = upload(client, name, content)
        assert sent.status_code in (200, 400, 413, 422)
        if sent.status_code == 200:
            file = {"path": sent.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}
            answer = call(client, number, [file])
            assert answer.get("msg") == "process_completed", answer
        if i % 4 == 0:
            call(client, chance.randrange(-1, 30), [chance.choice(odd) for _ in range(chance.randrange(20))])
            client.post(f"{API}/queue/join", content=chance.randbytes(100))

    for i in range(40):  # what is allocated once is allocated now
        one(i)
    before, known = resident(), len(explorer._uploads)
    for i in range(200):
        one(i)
    assert resident() - before < 60
    assert len(explorer._uploads) <= known + 1  # a truncated JPEG may still be a photo; not 200 of them
    assert client.get("/").status_code == 200
    assert explorer.look(explorer.gallery[0]).norms.shape == (3, 4, 5)
