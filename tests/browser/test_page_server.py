"""The live page's server, by raw connections: what no browser would do, and what every client relies on."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import crafted_bags
import drive_bags
import feed
import numpy as np
import pytest
import simplejpeg

from carla_digr.errors import UserError
from carla_digr.live.viewer import server as server_module
from carla_digr.live.viewer.client import WINDOW
from carla_digr.live.viewer.control import BURST, WRONG_TOKENS
from carla_digr.live.viewer.recorded import Recorded
from carla_digr.live.viewer.server import ASSETS, ViewerServer
from carla_digr.recordings import topics


class Client:
    """A WebSocket client of a few lines (RFC 6455), so that a test decides what is read and answered, and when."""

    def __init__(self, viewer: ViewerServer, **headers: str):
        self.socket = socket.create_connection(("127.0.0.1", viewer.port), timeout=20)
        key = base64.b64encode(os.urandom(16)).decode()
        fields = {
            "Host": f"127.0.0.1:{viewer.port}",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": key,
            "Sec-WebSocket-Version": "13",
            **headers,
        }
        lines = ["GET /ws HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
        self.file = self.socket.makefile("rb")
        self.status = int(self.file.readline().split()[1])
        while self.file.readline().strip():
            pass

    def read(self) -> tuple[int, bytes]:
        """Opcode and payload of the next message (the server sends none in fragments, and masks none)."""
        first, length = self.file.read(2)
        if length == 126:
            (length,) = struct.unpack("!H", self.file.read(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", self.file.read(8))
        return first & 0x0F, self.file.read(length)

    def frame(self) -> tuple[dict, bytes, bytes]:
        """Header, JPEG and map of the next frame."""
        while True:
            opcode, payload = self.read()
            if opcode == 2:
                start = 4 + int.from_bytes(payload[:4], "little")
                header = json.loads(payload[4:start])
                end = start + header["jpeg_bytes"]
                return header, payload[start:end], payload[end:]

    def send(self, text: str) -> None:
        self.socket.sendall(bytes([0x81, 0x80 | len(text)]) + bytes(4) + text.encode())  # masked with zeros

    def close(self) -> None:
        self.file.close()
        self.socket.close()


@pytest.fixture
def connect(viewer: ViewerServer) -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def connect(**headers: str) -> Client:
        clients.append(Client(viewer, **headers))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def get(viewer: ViewerServer, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", viewer.port, timeout=20)
    connection.request("GET", path, headers=headers)
    return connection.getresponse()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_message_holds_picture_map_and_decision(viewer: ViewerServer, connect: Callable[..., Client]):
    client = connect()
    saliency = feed.saliency(7)
    probabilities = np.array([0.25, np.nan], np.float32)
    decision = {"probabilities": probabilities, "action": np.int64(1), "fallback": np.bool_(True)}
    viewer.publish(1.5, 7, feed.picture(7), saliency, decision)
    header, jpeg, grey = client.frame()
    assert (header["frame"], header["stamp"], header["width"], header["height"]) == (7, 1.5, 128, 128)
    assert header["decision"] == {"probabilities": [0.25, None], "action": 1, "fallback": True}
    assert abs(simplejpeg.decode_jpeg(jpeg).astype(int) - feed.picture(7)).mean() < 2
    assert header["saliency"] == [128, 128]
    assert (np.frombuffer(grey, np.uint8).reshape(128, 128) == np.rint(saliency * 255)).all()
    viewer.publish(1.55, 8, feed.picture(8), None, {})
    header, _, grey = client.frame()
    assert header["saliency"] is None and grey == b""


def test_published_arrays_may_be_overwritten_at_once(viewer: ViewerServer, connect: Callable[..., Client]):
    client = connect()
    rgb, saliency = feed.picture(3), np.ones((128, 128), np.float32)
    viewer.publish(0.0, 3, rgb, saliency, {})
    rgb[:], saliency[:] = 0, 0
    _, jpeg, grey = client.frame()
    assert abs(simplejpeg.decode_jpeg(jpeg).astype(int) - feed.picture(3)).mean() < 2
    assert set(grey) == {255}


def test_publish_returns_while_the_server_is_stuck(
    viewer: ViewerServer, connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
):
    client = connect()
    stuck, go_on = threading.Event(), threading.Event()

    def encode(*arguments: object) -> bytes:
        stuck.set()
        go_on.wait()
        return b"jpeg"

    monkeypatch.setattr(simplejpeg, "encode_jpeg", encode)
    feed.publish(viewer, 1)
    assert stuck.wait(20)
    for frame in range(2, 1000):
        feed.publish(viewer, frame)  # would wait for ever if it waited for the server
    go_on.set()
    assert [client.frame()[0]["frame"] for _ in range(2)] == [1, 999]
    assert viewer.status()["clients"][0]["dropped"] == 997


def test_client_that_stops_reading_costs_nothing(viewer: ViewerServer, connect: Callable[..., Client]):
    deaf, lively = connect(), connect()
    picture, saliency = feed.picture(1), feed.saliency(1)
    last = 0

    def publish(count: int) -> None:
        nonlocal last
        for _ in range(count):
            last += 1
            viewer.publish(last * 0.05, last, picture, saliency, feed.decision(last))
            header, _, _ = lively.frame()
            assert header["frame"] == last  # every frame arrives, whatever the other client does
            lively.send(str(header["sequence"]))

    publish(300)
    before = resident_bytes()
    publish(1500)  # 100 MB of arrays, 35 MB of messages
    assert resident_bytes() - before < 8e6
    first, second = viewer.status()["clients"]
    assert (first["sent"], first["dropped"]) == (WINDOW, last - WINDOW - 1)
    assert (second["sent"], second["dropped"]) == (last, 0)
    # When it reads and answers again it gets what was under way, then the newest.
    sequences = [deaf.frame()[0]["sequence"] for _ in range(WINDOW)]
    assert sequences == list(range(1, WINDOW + 1))
    deaf.send(str(sequences[-1]))
    assert deaf.frame()[0]["frame"] == last


def test_client_that_vanishes_is_forgotten(viewer: ViewerServer, connect: Callable[..., Client]):
    client = connect()
    feed.publish(viewer, 1)
    client.frame()
    client.close()
    wait_until(lambda: viewer.status()["clients"] == [])


def test_idle_client_hears_that_the_connection_stands(connect: Callable[..., Client]):
    client = connect()
    kinds = [json.loads(client.read()[1])["type"] for _ in range(2)]
    assert kinds == ["hello", "beat"]


@pytest.mark.parametrize("nonsense", ["hello", "-1", "", '{"frame": 1}', "x" * 100])
def test_client_that_talks_nonsense_is_sent_away(viewer: ViewerServer, connect: Callable[..., Client], nonsense: str):
    client = connect()
    assert client.read()[0] == 1
    client.send(nonsense)
    opcode, payload = client.read()
    assert (opcode, payload[:2]) == (8, (1008).to_bytes(2, "big"))
    wait_until(lambda: viewer.status()["clients"] == [])


class Driven:
    """Controls that keep what they are told, and take as long as a test wants."""

    def __init__(self) -> None:
        self.done: list[tuple[str, ...]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def do(self, words) -> str:
        self.go_on.wait(20)
        self.done.append(words)
        if words[0] == "no":
            raise UserError("That cannot be.")
        return f"{words[0]}!"


@pytest.fixture
def driven() -> Iterator[tuple[ViewerServer, Driven]]:
    controls = Driven()
    with ViewerServer(port=0, controls=controls) as server:
        yield server, controls


def says(client: Client, message: dict) -> dict:
    """What a page is answered."""
    client.send(json.dumps(message))
    return next(
        told for told in iter(lambda: json.loads(client.read()[1]), None) if told["type"] in ("control", "answer")
    )


def test_only_who_has_the_token_controls(driven, connect):
    server, controls = driven
    assert server.url in server.address and server.address.partition("#token=")[2] not in server.url
    token = server.address.partition("#token=")[2]
    client = Client(server)
    with closing(client):
        answer = says(client, {"id": 1, "words": ["pause"]})
        assert not answer["ok"] and "address with the token" in answer["said"]
        assert says(client, {"token": "guessed"}) == {"type": "control", "granted": False}
        assert not says(client, {"id": 2, "words": ["pause"]})["ok"] and controls.done == []
        assert says(client, {"token": token})["granted"]
        assert says(client, {"id": 3, "words": ["pause"]}) == {"type": "answer", "id": 3, "ok": True, "said": "pause!"}
        refused = {"type": "answer", "id": 4, "ok": False, "said": "That cannot be."}
        assert says(client, {"id": 4, "words": ["no"]}) == refused
        assert controls.done == [("pause",), ("no",)]
    with closing(Client(server)) as another:  # a token holds for its connection
        assert not says(another, {"id": 1, "words": ["pause"]})["ok"]
        for _ in range(WRONG_TOKENS):
            another.send(json.dumps({"token": "guessed"}))
        while another.read()[0] != 8:
            pass
    assert Client(server, Origin="http://evil.example").status == 403


def test_a_page_that_asks_too_much_is_refused_and_the_frames_go_on(driven):
    server, controls = driven
    with closing(Client(server)) as client:
        says(client, {"token": server.address.partition("#token=")[2]})
        controls.go_on.clear()
        for number in range(BURST + 5):
            client.send(json.dumps({"id": number, "words": ["drive"]}))
        feed.publish(server, 1)
        assert client.frame()[0]["frame"] == 1
        controls.go_on.set()
        answers = {}
        client.send(json.dumps({"id": 99, "words": ["last"]}))
        while len(answers) < BURST + 6:
            opcode, payload = client.read()
            if opcode == 1 and (told := json.loads(payload))["type"] == "answer":
                answers[told["id"]] = told["ok"]
        assert 0 < len(controls.done) <= BURST and sum(answers.values()) == len(controls.done)


@pytest.mark.parametrize(
    "nonsense", [{"id": "1", "words": ["x"]}, {"id": 1, "words": []}, {"id": 1, "words": [1]}, {"id": 1}, [1], 1.5]
)
def test_malformed_requests_end_the_connection(driven, nonsense):
    server, controls = driven
    with closing(Client(server)) as client:
        client.send(json.dumps(nonsense))
        while (message := client.read())[0] != 8:
            pass
        assert message[1][:2] == (1008).to_bytes(2, "big") and controls.done == []


def test_pages_are_told_what_is_so_beside_the_frames(driven):
    server, _ = driven

    def state(client: Client) -> dict:
        return next(told for told in iter(lambda: json.loads(client.read()[1]), None) if told["type"] == "state")

    with closing(Client(server)) as client:
        assert json.loads(client.read()[1])["type"] == "hello"
        server.tell({"paused": True, "control": "policy"})
        assert state(client) == {"type": "state", "paused": True, "control": "policy"}
        server.tell({"paused": False})
        assert state(client) == {"type": "state", "paused": False, "control": "policy"}
    with closing(Client(server)) as late:
        assert state(late) == {"type": "state", "paused": False, "control": "policy"}


def test_several_threads_may_publish(viewer: ViewerServer, connect: Callable[..., Client]):
    client = connect()
    threads = [
        threading.Thread(target=lambda first=first: [feed.publish(viewer, first + i) for i in range(50)])
        for first in (0, 1000, 2000)
    ]
    for thread in threads:
        thread.start()
    sequence = 0
    while sequence < 150:
        header, _, _ = client.frame()
        assert header["sequence"] > sequence
        sequence = header["sequence"]
        client.send(str(sequence))
    for thread in threads:
        thread.join()
    assert viewer.status()["published"] == 150


def test_status_counts_frames_rate_and_clients(viewer: ViewerServer, connect: Callable[..., Client]):
    assert viewer.status() | {"uptime_s": 0} == {
        "version": server_module.__version__,
        "uptime_s": 0,
        "published": 0,
        "rate_hz": 0.0,
        "latest": None,
        "clients": [],
    }
    client = connect()
    for frame in range(1, 4):
        feed.publish(viewer, frame)
        client.frame()
    response = get(viewer, "/api/status")
    assert response.headers["Content-Type"].startswith("application/json")
    status = json.load(response)
    assert (status["published"], status["latest"]["frame"]) == (3, 3)
    assert status["rate_hz"] > 0
    (figures,) = status["clients"]
    assert (figures["sent"], figures["dropped"], figures["unanswered"]) == (3, 0, 3)


def test_every_file_has_the_security_headers_and_is_revalidated(viewer: ViewerServer):
    for path in ASSETS:
        response = get(viewer, path)
        assert response.status == 200 and response.read()
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        again = get(viewer, path, **{"If-None-Match": response.headers["ETag"]})
        assert (again.status, again.read()) == (304, b"")
    for path in ("/server.py", "/vendor/package.json", "/..%2fserver.py", "/vendor/../../server.py"):
        assert get(viewer, path).status == 404


def test_a_name_that_is_not_ours_is_refused(viewer: ViewerServer, connect: Callable[..., Client]):
    """DNS rebinding: a web site whose name resolves to this machine must not read the page or the stream."""
    for host in ("evil.example", f"evil.example:{viewer.port}", "127.0.0.1.evil.example", "[", ""):
        assert get(viewer, "/", Host=host).status in (400, 421), host
    assert connect(Host="evil.example").status == 421
    for host in (f"localhost:{viewer.port}", "127.0.0.1", "[::1]:80", "192.0.2.7:9999", socket.gethostname()):
        assert get(viewer, "/", Host=host).status == 200, host
    with ViewerServer(port=0, allowed_hosts=["Drive.example"]) as named:
        assert get(named, "/", Host="drive.example:443").status == 200


def test_stream_is_refused_to_other_sites_pages(viewer: ViewerServer, connect: Callable[..., Client]):
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{viewer.port + 1}", "http://["):
        assert connect(Origin=origin).status == 403, origin
    assert connect(Origin=f"http://127.0.0.1:{viewer.port}").status == 101


def test_address_that_cannot_be_had_is_one_sentence(viewer: ViewerServer):
    for host, port, sentence in [
        ("127.0.0.1", viewer.port, f"Port {viewer.port} on 127.0.0.1 is in use: .*choose another port"),
        ("192.0.2.1", 0, "Port 0 on 192.0.2.1 cannot serve the web page .*choose an address of this machine"),
        ("no such host", 0, "no such host .*choose an address of this machine"),
        ("127.0.0.1", 70000, "Port 70000 does not exist: choose one from 0 to 65535"),
    ]:
        threads = threading.active_count()
        with pytest.raises(UserError, match=sentence) as caught:
            ViewerServer(host, port)
        assert "\n" not in str(caught.value)
        assert threading.active_count() == threads


def test_unknown_colormap_is_one_sentence():
    with pytest.raises(UserError, match=r"no colormap 'jet'; choose one of .*turbo"):
        ViewerServer(port=0, colormap="jet")


@pytest.mark.parametrize(
    ("rgb", "saliency"),
    [
        (np.zeros((128, 128), np.uint8), None),
        (np.zeros((128, 128, 4), np.uint8), None),
        (np.zeros((0, 128, 3), np.uint8), None),
        (np.zeros((128, 128, 3), np.float32), None),
        (np.zeros((128, 128, 3), np.uint8), np.zeros((128, 128, 1), np.float32)),
        (np.zeros((128, 128, 3), np.uint8), np.zeros((128, 128), np.uint8)),
    ],
)
def test_arrays_of_another_kind_are_refused(viewer: ViewerServer, rgb: np.ndarray, saliency: np.ndarray | None):
    with pytest.raises(UserError, match="The viewer needs"):
        viewer.publish(0.0, 0, rgb, saliency, {})
    assert viewer.status()["published"] == 0


def test_close_says_goodbye_frees_the_port_and_may_be_repeated():
    viewer = ViewerServer(port=0)
    client, deaf = Client(viewer), Client(viewer)
    assert client.read()[0] == 1
    for frame in range(20):
        feed.publish(viewer, frame)
    viewer.close()
    viewer.close()
    opcodes = []
    while not opcodes or opcodes[-1] != 8:
        opcodes.append(client.read()[0])
    client.close()
    deaf.close()
    viewer.publish(0.0, 0, feed.picture(0), None, {})  # too late, and no error
    assert "viewer" not in [thread.name for thread in threading.enumerate()]
    ViewerServer(port=viewer.port).close()


def tasks(viewer: ViewerServer) -> int:
    return len(asyncio.all_tasks(viewer._loop))


def test_clients_that_close_while_they_are_deaf_leave_nothing(viewer: ViewerServer, connect: Callable[..., Client]):
    before = tasks(viewer)
    for turn in range(10):
        clients = [connect() for _ in range(20)]
        wait_until(lambda: len(viewer.status()["clients"]) == 20)
        for client in clients:  # none reads or answers; they close while something is sent to them
            viewer.publish(0.0, turn, feed.picture(turn), None, {})
            client.close()
        wait_until(lambda: not viewer.status()["clients"])
    wait_until(lambda: tasks(viewer) <= before)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "])
def test_requests_that_do_not_arrive_are_hung_up_on(monkeypatch, sent):
    monkeypatch.setattr(server_module, "REQUEST_SECONDS", 0.5)
    with ViewerServer(port=0) as viewer, socket.create_connection(("127.0.0.1", viewer.port), timeout=60) as half:
        half.sendall(sent)
        assert half.recv(1) == b""
        assert get(viewer, "/").status == 200


MALFORMED = [
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\nConnection: close\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: \xff\r\n\r\n",
    b"GET http://[ HTTP/1.1\r\nHost: [\r\n\r\n",
]


@pytest.mark.parametrize("request_bytes", MALFORMED)
def test_a_malformed_request_prints_nothing(viewer: ViewerServer, caplog, capfd, request_bytes):
    with socket.create_connection(("127.0.0.1", viewer.port), timeout=60) as client:
        client.sendall(request_bytes)
        if b"close" not in request_bytes:
            client.shutdown(socket.SHUT_WR)
        while client.recv(4096):
            pass
    assert get(viewer, "/").status == 200
    assert not [record for record in caplog.records if record.exc_info] and "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False)])
def test_a_page_for_everybody_is_warned_of(caplog, host, warned):
    with ViewerServer(host, 0):
        assert any("no login" in record.message for record in caplog.records) == warned


def test_a_recorded_picture_that_cannot_be_shown_is_told_and_no_fault(tmp_path, caplog):
    bag = crafted_bags.File()
    for number, (width, height) in enumerate([(8, 8), (0, 0), (1_000_000, 1), (1, 1_000_000)], 1):
        picture = drive_bags.image(number, np.zeros((1, 1, 3), np.uint8), "rgb8")
        picture.width, picture.height, picture.step = width, height, width * 3
        picture.data = np.zeros(width * height * 3, np.uint8)
        bag.add_messages([(1, number, drive_bags.serialized(topics.PICTURE_TYPE, picture))])
    with (
        closing(Recorded([bag.write(tmp_path / "bag.mcap")])) as recorded,
        ViewerServer(port=0, recorded=recorded) as page,
    ):
        replies = [get(page, f"/api/recording/0/{index}") for index in range(4)]
        assert [reply.status for reply in replies] == [200, 422, 422, 422]
        assert all("is damaged, or too large to be shown." in reply.read().decode() for reply in replies[1:])
    assert not caplog.records
