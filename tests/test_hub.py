"Office-Home from the hub: a small stand-in of it on this machine serves pictures, and everything that can go wrong on the way."

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath

import huggingface_hub.constants as hub_constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import close_session
from PIL import Image
from test_notebooks import papermill

from dfcnn.core import BadInput
from dfcnn.data.sources import LAYOUTS, OFFICEHOME_CLASSES, download_parquet, load_images

REPO, COMMIT = "flwrlabs/office-home", "0123456789abcdef0123456789abcdef01234567"
FIRST, SECOND = FILES = [f"data/train-{k:05}-of-00002.parquet" for k in range(2)]
HOW = LAYOUTS["officehome"].how_to_get


def pictures() -> dict[str, bytes]:
    "Parquet files: the red of an image is its class, the green its domain, the blue its number."
    names = sorted(OFFICEHOME_CLASSES)  # the labels of the public files, where TV comes before Table
    rows = []
    for d, domain in enumerate(("Art", "Product", "Real World")):
        for c, name in enumerate(OFFICEHOME_CLASSES):
            for i in range(10):
                out = io.BytesIO()
                Image.new("RGB", (8, 8), (c, 100 * d, i)).save(out, "png")
                image = {"bytes": out.getvalue(), "path": f"{i:05}.png"}
                rows.append(dict(image=image, domain=domain, label=names.index(name)))
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    content = {}
    for k, path in enumerate(FILES):
        table = pa.Table.from_pylist(rows[k::2]).replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, out := io.BytesIO(), compression="none")
        content[path] = out.getvalue()
    return content


@pytest.fixture(scope="module")
def content() -> dict[str, bytes]:
    return pictures()


class Hub(ThreadingHTTPServer):
    "What huggingface_hub asks for, and the faults of a network: `faults` holds what the next requests of a file meet."

    daemon_threads = True

    def __init__(self, content: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Requests)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.content = dict(content)  # what is sent; the listing below tells what should be
        self.listed = {f: (len(b), hashlib.sha256(b).hexdigest()) for f, b in content.items()}
        self.faults, self.asked, self.sent = {}, [], 0  # asked: (file, Range) in order; sent: bytes of files
        self.listings, self.ended = 0, threading.Event()
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()

    def close(self):
        self.ended.set()
        self.shutdown()
        self.server_close()


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        hub, (path, _, query) = self.server, self.path.partition("?")
        resolve, cdn = f"/datasets/{REPO}/resolve/{COMMIT}/", "/cdn/"
        if path == f"/api/datasets/{REPO}":
            hub.listings += 1
            if fault := hub.faults.get("listing"):
                return hub.ended.wait(20) if fault == "stall" else self.answer(fault, b"{}")
            lfs = {f: dict(sha256=sha, size=n, pointerSize=130) for f, (n, sha) in hub.listed.items()}
            files = [dict(rfilename=f, **(dict(lfs=lfs[f]) if "blobs" in query else {})) for f in lfs]
            info = dict(id=REPO, sha=COMMIT, siblings=[dict(rfilename="README.md"), *files])
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        elif path.startswith(resolve):  # as the hub does it: the content lies elsewhere
            self.answer(302, b"", Location=cdn + path.removeprefix(resolve))
        elif path.startswith(cdn):
            self.send_file(hub, path.removeprefix(cdn))
        else:
            self.answer(404, b"{}")

    def send_file(self, hub: Hub, name: str):
        wanted, faults = self.headers.get("Range"), hub.faults.get(name, [])
        hub.asked.append((name, wanted))
        fault = faults.pop(0) if len(faults) > 1 else faults[0] if faults else None  # the last one stays
        if isinstance(fault, int):
            return self.answer(fault, b"{}", X_Error_Code="EntryNotFound" if fault == 404 else "")
        body = hub.content[name]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        left = body[start:]
        if fault == "refuse":
            self.close_connection = True
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(left)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if fault == "stall":
            hub.ended.wait(20)
        left = left[: len(left) // 2] if fault == "cut" else left
        hub.sent += len(left)
        self.wfile.write(left)
        self.close_connection = fault is not None


@pytest.fixture
def here(tmp_path, monkeypatch):
    "No proxy, no long waits, and a cache of its own, in which the data would lie."
    monkeypatch.setenv("DFCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # else 10 MiB: files here are shorter
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    yield tmp_path / "cache/office-home-parquet"
    close_session()


def point_to(monkeypatch, url: str):
    "Make `url` the hub of this process; huggingface_hub read HF_ENDPOINT when it was imported."
    close_session()
    monkeypatch.setattr(hub_constants, "ENDPOINT", url)
    monkeypatch.setattr(
        hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.fixture
def hub(content, here, monkeypatch):
    server = Hub(content)
    point_to(monkeypatch, server.url)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


def refusal() -> str:
    with pytest.raises(BadInput) as e:
        load_images("officehome")
    said = str(e.value)
    assert said.startswith("Office-Home could not be downloaded (") and said.endswith(HOW)
    return said


def complete(images) -> bool:
    return len(images) == 2 * 65 * 10 and images.parts == ["Product", "Real World"]


def test_images_are_fetched_once_and_right(hub, here):
    images = load_images("officehome")
    assert complete(images) and images.x.shape[1:] == (3, 128, 128) and images.classes == OFFICEHOME_CLASSES
    for name in ("Alarm_Clock", "TV", "Table", "Webcam"):
        found = images.of("Real World", c := OFFICEHOME_CLASSES.index(name))
        assert images.x[found, 0].unique().tolist() == [c] and images.x[found, 1].unique().tolist() == [200]
        assert images.x[found, 2].unique().tolist() == list(range(10))
    assert hub.asked == [(f, None) for f in FILES] and hub.listings == 1
    for kept in here.parent.glob("officehome-*"):
        kept.unlink()  # not the decoded images, but the downloaded files
    assert load_images("officehome").fingerprint == images.fingerprint
    assert len(hub.asked) == 2 and hub.listings == 1, "the hub was asked again"
    (here / SECOND).write_bytes(b"cut short")
    assert load_images("officehome").fingerprint == images.fingerprint
    assert hub.asked[2:] == [(SECOND, None)], "only what is wrong is fetched again"


def test_a_broken_connection_goes_on_from_where_it_broke(hub, content):
    hub.faults[SECOND] = ["cut", None]
    assert complete(load_images("officehome"))
    (_, whole), (_, rest) = [a for a in hub.asked if a[0] == SECOND]
    assert whole is None and 0 < int(rest.removeprefix("bytes=").rstrip("-")) <= len(content[SECOND]) // 2
    assert hub.sent < sum(map(len, content.values())) + 2048, "more than the missing bytes were sent"


def test_a_connection_that_stays_broken_keeps_what_came(hub, here, content):
    hub.faults[SECOND] = ["cut", "refuse"]
    assert f"What came so far is kept in '{here}': the same command goes on from there." in refusal()
    (part,) = (here / "data").glob("*.part")
    there = part.stat().st_size
    assert 0 < there <= len(content[SECOND]) // 2 and (here / FIRST).exists() and not (here / SECOND).exists()
    hub.faults.clear()
    hub.asked.clear()
    assert complete(load_images("officehome"))
    assert hub.asked == [(SECOND, f"bytes={there}-")]
    assert not list((here / "data").glob("*.part"))


def test_two_that_want_them_at_once_download_them_once(hub, here):
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: download_parquet(LAYOUTS["officehome"], here), range(2)))
    assert found == [[here / f for f in FILES]] * 2 and hub.asked == [(f, None) for f in FILES]


@pytest.mark.parametrize("where", ["listing", FIRST])
def test_a_silent_hub_is_not_waited_for(hub, monkeypatch, where):
    monkeypatch.setattr(hub_constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.faults[where] = "stall" if where == "listing" else ["stall"]
    assert "ReadTimeout" in refusal()
    assert len(hub.asked) <= 10


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda b: b + b"x", "bytes instead of"),
        (lambda b: b[:-1], "bytes instead of"),
        (lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:], "came with another SHA-256 than"),
    ],
    ids=["too long", "too short", "another byte"],
)
def test_a_file_that_is_not_as_listed_is_removed(hub, here, content, spoil, said):
    hub.content[SECOND] = spoil(content[SECOND])
    message = refusal()
    assert said in message and PurePosixPath(SECOND).name in message
    assert "was removed: the same command fetches it again" in message
    assert [f.name for f in (here / "data").iterdir()] == [PurePosixPath(FIRST).name]
    hub.content[SECOND] = content[SECOND]
    assert complete(load_images("officehome"))
    assert hub.asked == [(FIRST, None), (SECOND, None), (SECOND, None)]


@pytest.mark.parametrize("status", [403, 404, 429, 503])
@pytest.mark.parametrize("where", ["listing", FIRST, SECOND])
def test_what_the_hub_refuses_is_said(hub, where, status):
    hub.faults[where] = status if where == "listing" else [status]
    message = refusal()
    assert str(status) in message.partition(HOW)[0]
    assert ("is kept" in message) == (where == SECOND)


def test_a_listing_without_checksums_is_refused(hub):
    hub.listed.clear()
    assert f"the hub lists no parquet files of {REPO}" in refusal()


def test_nobody_listens_and_nothing_came(here, monkeypatch, content):
    server = Hub(content)
    server.close()
    point_to(monkeypatch, server.url)
    assert re.fullmatch(r"Office-Home could not be downloaded \(\w+: [^()]+\)\. ", refusal().removesuffix(HOW))


def test_the_users_sentence(hub, tmp_path):
    "The paper's data set by its name alone, as in the README."
    out = tmp_path / "out.ipynb"
    papermill(out, "dataset", "officehome", "epochs", 1, "tasks", 1, "methods", "STL")
    (record,) = (tmp_path / "reports/lifelong/officehome").glob("*/summary.json")
    assert json.loads(record.read_text())["parameters"] == 2_679_437
    assert "paper: peak accuracy" in (record.parent.parent / "table.csv").read_text()
    assert [f for f, _ in hub.asked] == FILES
    assert "MiB of Office-Home downloaded" in out.read_text() and "IProgress" not in out.read_text()
