"""Downloads: checked, cached, complete or not there; clear words when offline."""

import gzip
import hashlib
import io
import struct
import sys
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pooch
import pytest
import torch

from cpnb._data.sources import SOURCES
from cpnb.data import load_data

MNIST = SOURCES["mnist"].files


def idx_file(values):
    sizes = b"".join(struct.pack(">I", size) for size in values.shape)
    return gzip.compress(bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes())


def mnist_files():
    """Official names with 60 training and 20 test images of random pixels."""
    draw, contents = np.random.default_rng(0), []
    for count in (60, 20):
        pixels = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        contents += [pixels, (np.arange(count) % 10).astype(np.uint8)]
    return dict(zip(MNIST, map(idx_file, contents), strict=True))


def cifar_archive():
    """An archive as the official one, 20 images in each of the six files."""
    draw, packed = np.random.default_rng(0), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name in ("cifar-10-batches-bin/readme.html", *SOURCES["cifar10"].files):
            records = draw.integers(0, 256, (20, 3073), dtype=np.uint8)
            records[:, 0] = np.arange(20) % 10
            member = tarfile.TarInfo(name)
            member.size = records.size
            tar.addfile(member, io.BytesIO(records.tobytes()))
    return packed.getvalue()


class Server(ThreadingHTTPServer):
    """Serves ``files``, in part where ``cut`` says how many bytes; notes requests."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.asked = files, {}, []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        self.server.asked.append(name)
        if name not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut.get(name, len(content))])

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no CPNB_DATA."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(pooch, "os_cache", lambda name: folder)
    monkeypatch.delenv("CPNB_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return folder


@pytest.fixture
def serve(monkeypatch):
    """Function that puts a data set's downloads on a server of this machine."""
    running = []

    def start(name, files):
        server = Server(files)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        running.append((server, thread))
        point_to(monkeypatch, name, server.server_address[1], files)
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join(10)
        server.server_close()


def point_to(monkeypatch, name, port, files):
    hashes = {
        file: f"md5:{hashlib.md5(content).hexdigest()}"
        for file, content in files.items()
    }
    url = f"http://127.0.0.1:{port}/"
    source = replace(SOURCES[name], url=url, downloads=hashes)
    monkeypatch.setitem(SOURCES, name, source)


def left_in(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix() for path in paths}


def test_load_data_downloads_once_and_shows_progress(cache, serve, capfd):
    server = serve("mnist", mnist_files())
    first = load_data("mnist")
    assert "100%" in capfd.readouterr().err
    assert [len(part.labels) for part in (first.train, first.test)] == [50, 20]
    again = load_data("mnist")
    assert torch.equal(first.train.images, again.train.images)
    assert server.asked == list(MNIST)
    assert left_in(cache) == {f"mnist/{name}" for name in MNIST}


def test_load_data_unpacks_the_downloaded_archive_and_removes_it(cache, serve):
    server = serve("cifar10", {"cifar-10-binary.tar.gz": cifar_archive()})
    data = load_data("cifar10")
    assert [len(part.labels) for part in (data.train, data.test)] == [90, 20]
    assert load_data("cifar10").mean == data.mean
    assert server.asked == ["cifar-10-binary.tar.gz"]
    assert left_in(cache) == {f"cifar10/{name}" for name in SOURCES["cifar10"].files}


def test_load_data_goes_on_after_an_interrupted_download(cache, serve, monkeypatch):
    server, download = serve("mnist", mnist_files()), pooch.HTTPDownloader.__call__

    def stops_in_the_third(self, url, output, *arguments):
        if not url.endswith(MNIST[2]):
            return download(self, url, output, *arguments)
        output = open(output, "wb") if isinstance(output, str) else output
        with output:
            output.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pooch.HTTPDownloader, "__call__", stops_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            load_data("mnist")
    assert left_in(cache) == {f"mnist/{name}" for name in MNIST[:2]}
    load_data("mnist")
    assert server.asked == list(MNIST)


def test_load_data_goes_on_after_an_interrupted_unpacking(cache, serve, monkeypatch):
    server = serve("cifar10", {"cifar-10-binary.tar.gz": cifar_archive()})
    files = SOURCES["cifar10"].files

    def stops_in_the_second(content, file):
        file.write(content.read(100))
        if "data_batch_2" in file.name:
            raise KeyboardInterrupt
        file.write(content.read())

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", stops_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            load_data("cifar10")
    assert left_in(cache) == {"cifar10/cifar-10-binary.tar.gz", f"cifar10/{files[0]}"}
    assert len(load_data("cifar10").test.labels) == 20
    assert server.asked == ["cifar-10-binary.tar.gz"]


def test_load_data_leaves_nothing_of_a_download_that_broke_off(cache, serve):
    server = serve("mnist", mnist_files())
    server.cut[MNIST[1]] = 20
    with pytest.raises(FileNotFoundError, match=rf"{MNIST[1]} cannot be downloaded"):
        load_data("mnist")
    assert left_in(cache) == {f"mnist/{MNIST[0]}"}
    server.cut.clear()
    assert len(load_data("mnist").test.labels) == 20
    assert server.asked == [*MNIST[:2], *MNIST[1:]]


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_load_data_refuses_and_leaves_nothing_of_a_wrong_hash(cache, serve, name):
    archive = {"cifar-10-binary.tar.gz": cifar_archive()}
    server = serve(name, mnist_files() if name == "mnist" else archive)
    file = next(iter(server.files))
    server.files[file] += b"\0"
    with pytest.raises(
        ValueError, match=rf"{file} came truncated or changed.*MD5"
    ) as e:
        load_data(name)
    assert "Set CPNB_DATA" in str(e.value)
    assert left_in(cache) == set()


def test_load_data_names_a_file_that_the_server_does_not_have(cache, serve):
    server = serve("mnist", mnist_files())
    del server.files[MNIST[0]]
    with pytest.raises(FileNotFoundError, match=r"downloaded \(HTTPError\)"):
        load_data("mnist")


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "digits"])
def test_load_data_says_offline_what_to_set_and_which_files(cache, monkeypatch, name):
    source = SOURCES[name]
    point_to(monkeypatch, name, 9, dict.fromkeys(source.downloads, b""))
    with pytest.raises(FileNotFoundError) as caught:
        load_data(name)
    text = str(caught.value)
    assert text.startswith(
        f"load_data({name!r}) finds no files: CPNB_DATA is not set, and http://127.0.0."
    )
    assert f"Set CPNB_DATA to a folder whose subfolder {source.folders[0]}/" in text
    assert all(file in text for file in source.files)
    assert left_in(cache) == set()


def test_cpnb_data_comes_first_and_is_never_written_to(
    cache, serve, tmp_path, monkeypatch
):
    server, root = serve("mnist", mnist_files()), tmp_path / "mine"
    (root / "mnist").mkdir(parents=True)
    monkeypatch.setenv("CPNB_DATA", str(root))
    with pytest.raises(FileNotFoundError, match=rf"{MNIST[0]} is missing"):
        load_data("mnist")
    assert server.asked == []
    (root / "mnist").rmdir()  # without the subfolder the set is downloaded
    load_data("mnist")
    assert server.asked == list(MNIST)
    assert left_in(root) == set()


def test_load_data_refuses_a_cpnb_data_that_does_not_exist(cache, monkeypatch):
    monkeypatch.setenv("CPNB_DATA", "/no/such/folder")
    with pytest.raises(FileNotFoundError, match="CPNB_DATA is '/no/such/folder', expe"):
        load_data("mnist")


def test_load_data_names_pooch_when_it_is_missing(monkeypatch):
    monkeypatch.delenv("CPNB_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install pooch.*Set CPNB_DATA"):
        load_data("mnist")
