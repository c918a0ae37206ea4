"Files that others made, and parameters that a hand typed: whatever is in them, the right thing is read or it is refused in words."

from __future__ import annotations

import errno
import gzip
import io
import os
import resource
import shutil
import struct
import tarfile
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dfcnn.core import BadInput, check_number, check_path
from dfcnn.data import images as images_module
from dfcnn.data.images import load_saved
from dfcnn.data.sources import (
    LAYOUTS,
    Layout,
    load_images,
    members,
    read_files,
    read_idx_file,
    read_parquet,
    source_key,
)

ONCE_AND_FOR_ALL = settings(max_examples=100, deadline=None, derandomize=True, database=None)
TINY = Layout("tiny", "Tiny", ("train", "test"), ("cat", "dog"), 2, False, (2, 1), ("tiny", ""), "Make it.")


def write_tiny(root: Path) -> Path:
    for p, part in enumerate(TINY.parts):
        for c, cls in enumerate(TINY.classes):
            for i in range(2):
                picture(root / part / cls / f"{i}.png", (2, 2), (100 * p, 100 * c, i))
    return root


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2, 2), (value, 0, 0)).save(out, "png")
    return out.getvalue()


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    "A folder with a data set of eight images in `tiny`."
    monkeypatch.setenv("DFCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(LAYOUTS, "tiny", TINY)
    write_tiny(tmp_path / "data/tiny")
    return tmp_path / "data"


def refused(*words: str, data_dir: Path | str, name: str = "tiny") -> str:
    with pytest.raises(BadInput) as e:
        load_images(name, data_dir)
    said = str(e.value)
    assert all(word in said for word in words), said
    said.encode()  # it can be shown
    return said


# The cache


@contextmanager
def a_file_as_folder(cache: Path):
    cache.write_text("a file")
    yield


@contextmanager
def a_file_above(cache: Path):
    cache.write_text("a file")
    os.environ["DFCNN_CACHE"] = str(cache / "below")  # the fixture's monkeypatch puts it back
    yield


@contextmanager
def read_only(cache: Path):
    "Root may write everywhere, so the system's answer is given for it."
    with pytest.MonkeyPatch.context() as patch:

        def no(*args, **kw):
            raise OSError(errno.EROFS, "Read-only file system")

        patch.setattr(tempfile, "mkstemp", no)
        yield


@contextmanager
def full(cache: Path):
    "No file may grow beyond 100 bytes."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("fault", [a_file_as_folder, a_file_above, read_only, full])
def test_a_cache_that_cannot_be_written_is_done_without(tiny, tmp_path, capsys, fault):
    with fault(tmp_path / "cache"):
        images = load_images("tiny", tiny)
    said = [line for line in capsys.readouterr().out.splitlines() if "cache" in line]
    assert len(images) == 8
    assert len(said) == 1 and "cannot be written" in said[0] and "DFCNN_CACHE" in said[0]
    assert not [*tmp_path.glob("cache/*")], "a part of it was left"


def test_a_pipe_in_place_of_a_kept_file_is_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(images_module, "load_tensors", lambda *args: pytest.fail("it would wait for ever"))
    assert load_saved(tmp_path / "pipe") is None


# What is not a file


@contextmanager
def not_waited_for(pipe: Path, seconds: float = 20):
    "Whoever opens `pipe` and waits is let go after a while, with nothing read."

    def let_go():
        try:
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            pass

    timer = threading.Timer(seconds, let_go)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.mark.parametrize("what", ["pipe", "folder", "link to nothing", "link to itself", "device"])
@pytest.mark.parametrize("where", ["tiny/train/cat/1.png", "tiny.tgz", "x.parquet", "t10k-labels-idx1-ubyte"])
def test_what_is_no_file_is_refused_by_name(tiny, monkeypatch, what, where):
    path = tiny / where
    if where.startswith("tiny/"):
        path.unlink()
    else:
        shutil.rmtree(tiny / "tiny")
    if where == "x.parquet":
        monkeypatch.setitem(LAYOUTS, "officehome", replace(TINY, name="officehome"))
    make = {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "link to nothing": lambda p: p.symlink_to("nowhere"),
        "link to itself": lambda p: p.symlink_to(p),
        "device": lambda p: p.symlink_to("/dev/null"),
    }
    make[what](path)
    name = {"x.parquet": "officehome", "t10k-labels-idx1-ubyte": "mnist"}.get(where, "tiny")
    if name == "mnist":
        for f in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3"):
            (tiny / f"{f}-ubyte").write_bytes(idx(np.zeros((1, 28, 28)[: int(f[-1])], "uint8")))
    with not_waited_for(path):
        refused(path.name, "where a file is expected", data_dir=tiny, name=name)


def test_names_that_are_no_text(tiny):
    before = load_images("tiny", tiny)
    odd = os.fsencode(tiny / "tiny/train/cat") + b"/2\xff.png"
    shutil.copy(os.fsencode(tiny / "tiny/train/cat/1.png"), odd)
    assert len(load_images("tiny", tiny)) == len(before) + 1
    Path(os.fsdecode(odd)).write_bytes(b"no image")
    refused(r"2\udcff.png' cannot be read", data_dir=tiny)
    os.unlink(odd)
    os.rename(tiny / "tiny/train/cat", os.fsencode(tiny / "tiny/train") + b"/c\xfft")
    refused(r"no class of it: c\udcfft", data_dir=tiny)
    with tarfile.open(tiny / "tiny.tgz", "w:gz") as tar:
        tar.add(tiny / "tiny", "tiny")
    shutil.rmtree(tiny / "tiny")
    refused(r"no class of it: c\udcfft", data_dir=tiny)


# Copies


def test_a_copy_beside_the_data_is_not_read(tiny):
    before = load_images("tiny", tiny).fingerprint
    key = source_key(TINY, "files", tiny / "tiny")
    for copy in (tiny / "backup/tiny", tiny / "tiny/backup", tiny / "tiny/train/backup/train"):
        shutil.copytree(write_tiny(tiny / "other"), copy)
    assert read_files(TINY, tiny / "tiny").fingerprint == before
    assert source_key(TINY, "files", tiny / "tiny") == key


def test_two_folders_of_one_class_are_refused(tiny):
    shutil.copytree(tiny / "tiny/train/cat", tiny / "tiny/train/Cat")
    refused("holds train/", "twice: in 'train/Cat' and in 'train/cat'", data_dir=tiny)


@pytest.mark.parametrize("order", [1, -1])
def test_an_archive_with_a_copy_is_refused(tiny, order):
    with tarfile.open(tiny / "both.tgz", "w:gz") as tar:
        for folder in ["tiny", "backup/tiny"][::order]:
            tar.add(tiny / "tiny", folder)
    refused("twice: in ", "'tiny/test/cat'", "'backup/tiny/test/cat'", data_dir=tiny / "both.tgz")


# Images


@pytest.mark.parametrize("kind, dtype", [("png", "uint16"), ("tiff", "uint16"), ("tiff", "int32"), ("tiff", "float32")])
def test_deep_images_are_refused(tiny, kind, dtype):
    Image.fromarray(np.array([[0, 300], [4000, 60000]], dtype)).save(tiny / "tiny/train/cat/1.png", kind)
    refused("train/cat/1.png' has more than 8 bits for each value", data_dir=tiny)


def test_too_much_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(images_module, "MOST_FILES", 7)
    refused("8 files or more", "At most 7 files", data_dir=tiny)
    with tarfile.open(tiny / "tiny.tgz", "w:gz") as tar:
        tar.add(tiny / "tiny", "tiny")
    refused("8 files or more", "At most 7 files", data_dir=tiny / "tiny.tgz")
    monkeypatch.undo()
    with tarfile.open(tiny / "sparse.tgz", "w:gz") as tar:  # 40 GB in a few bytes, in the words of GNU's tar
        info = tarfile.TarInfo("tiny/train/cat/0.png")
        info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(40 << 30)}
        tar.addfile(info)
    with pytest.raises(BadInput, match="unpacked 42,949,672,960 bytes or more. At most"):
        list(members(tiny / "sparse.tgz"))
    (tiny / "long.tgz").write_bytes(gzip.compress(b"\0" * (1 << 20)))
    monkeypatch.setattr(images_module, "MOST_BYTES", 1 << 19)
    with pytest.raises(BadInput, match="At most 100,000 files and 524,288 bytes"):
        list(members(tiny / "long.tgz"))


def test_an_archive_that_breaks_off_between_two_files_is_refused(tiny):
    with tarfile.open(tiny / "a.tar", "w") as tar:
        tar.add(tiny / "tiny", "tiny")
        end = tar.offset
    raw = (tiny / "a.tar").read_bytes()
    (tiny / "a.tar").write_bytes(raw[:end])
    refused("cannot be read", data_dir=tiny / "a.tar")
    (tiny / "a.tar").write_bytes(raw + raw)
    refused("something follows after its end", data_dir=tiny / "a.tar")


def test_a_damaged_mnist_of_torchvision_is_refused(tmp_path):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        picture(tmp_path / f"MNIST/raw/{name}-ubyte.png", (9, 9), (0, 0, 0))
        (tmp_path / f"MNIST/raw/{name}-ubyte.png").rename(tmp_path / f"MNIST/raw/{name}-ubyte")
    refused("holds a damaged MNIST", data_dir=tmp_path, name="mnist")


# Parsers on anything


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def flipped(data: bytes, where: float, bits: int) -> bytes:
    at = int(where * len(data))
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


PLACES, BITS = st.floats(0, 1, exclude_max=True), st.integers(1, 255)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parsers")


@ONCE_AND_FOR_ALL
@example(b"\0\0\x08\x00", "")
@example(b"\0\0\x08\xff" + b"\0\0\0\x01" * 255 + b"\0", "")
@example(b"\0\0\x08\x03" + b"\xff" * 12, "")
@example(b"\0\0\x08\x02" + b"\xff" * 4 + b"\0" * 4, "")
@given(st.one_of(st.binary(max_size=64), st.binary(max_size=24).map(lambda b: b"\0\0\x08" + b)), st.sampled_from(["", ".gz"]))
def test_an_idx_file_of_anything(folder, raw, suffix):
    path = folder / f"anything{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    try:
        assert idx(read_idx_file(path)) == raw
    except BadInput:
        pass


@ONCE_AND_FOR_ALL
@given(st.lists(st.integers(0, 4), max_size=3), PLACES, BITS, st.sampled_from(["", ".gz"]))
def test_an_idx_file_with_a_flip(folder, shape, where, bits, suffix):
    array = np.arange(np.prod(shape, dtype=int), dtype="uint8").reshape(shape)
    raw = gzip.compress(idx(array)) if suffix else idx(array)
    path = folder / f"flip{suffix}"
    path.write_bytes(raw)
    assert np.array_equal(read_idx_file(path), array)
    path.write_bytes(flipped(raw, where, bits))
    try:  # without a checksum a value that changed is not seen, but a length is
        assert idx(read_idx_file(path)) == (idx(array) if suffix else flipped(raw, where, bits))
    except BadInput:
        pass


def packed(files: list[tuple[str, bytes]], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def content(path: Path) -> list[tuple[str, bytes]]:
    return [(str(p), read()) for p, read in members(path)]


@ONCE_AND_FOR_ALL
@given(st.lists(st.binary(max_size=600), max_size=3), PLACES, BITS, st.sampled_from(["w:gz", "w:bz2", "w:xz"]), st.booleans())
def test_an_archive_with_a_flip(folder, data, where, bits, mode, cut):
    files = [(f"a/{'long' * 60 if i else ''}{i}.png", d) for i, d in enumerate(data)]
    raw, path = packed(files, mode), folder / "flip.tgz"
    path.write_bytes(raw)
    assert content(path) == files
    path.write_bytes(raw[: int(where * len(raw))] if cut else flipped(raw, where, bits))
    try:
        assert content(path) == files
    except BadInput:
        pass


@ONCE_AND_FOR_ALL
@given(PLACES, BITS, st.booleans())
def test_an_archive_without_checksum_with_a_flip(folder, where, bits, cut):
    "The headers of a tar have checksums, and so have PNGs."
    files = [(f"{p}/{c}/{i}.png", png(i)) for p in TINY.parts for c in TINY.classes for i in range(2)]
    raw, path = packed(files, "w"), folder / "flip.tar"
    raw = raw[: len(files) * 1024 + 1024]  # less of the zeros at its end
    path.write_bytes(raw)
    whole = read_files(TINY, path).fingerprint
    path.write_bytes(raw[: int(where * len(raw))] if cut else flipped(raw, where, bits))
    try:
        assert read_files(TINY, path).fingerprint == whole
    except BadInput:
        pass


TEXT = st.text(st.characters(exclude_characters="\0"), max_size=20)
NUMBERS = st.one_of(st.integers(-(2**40), 2**60).map(str), TEXT)
PAX = st.dictionaries(
    st.sampled_from("path size GNU.sparse.map GNU.sparse.size GNU.sparse.major GNU.sparse.minor hdrcharset".split()), NUMBERS
)


@ONCE_AND_FOR_ALL
@example("a.png", tarfile.REGTYPE, {"size": "-1024"}, b"1")
@example("a.png", tarfile.GNUTYPE_SPARSE, {}, b"1")
@given(TEXT.map(lambda t: t + ".png"), st.sampled_from(b"01234567LKSxgX\0V").map(lambda b: bytes([b])), PAX, st.binary(max_size=600))
def test_an_archive_of_odd_members(folder, name, kind, pax, data):
    path = folder / "odd.tgz"
    with tarfile.open(path, "w:gz", compresslevel=1, errors="surrogateescape") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.pax_headers, info.size = kind, pax, len(data)
        try:
            tar.addfile(info, io.BytesIO(data))
        except (UnicodeError, ValueError):  # Python does not write it
            return
    try:
        for read_name, read in content(path):
            assert isinstance(read, bytes) and ".." not in read_name.split("/")
    except BadInput as e:
        str(e).encode()


@ONCE_AND_FOR_ALL
@given(st.binary(max_size=1100), st.booleans())
def test_an_archive_of_anything(folder, raw, compressed):
    path = folder / "anything.tgz"
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    try:
        assert content(path) == [] and not any(raw)
    except BadInput:
        pass


def write_parquet(path: Path, **how) -> bytes:
    rows = [
        dict(image=png(i), domain=p, label=c) for p in TINY.parts for c, _ in enumerate(TINY.classes) for i in range(2)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, **how)
    return path.read_bytes()


@ONCE_AND_FOR_ALL
@given(st.integers(0, 7), PLACES, BITS)
def test_a_damaged_image_in_parquet_is_named_by_its_row(folder, row, where, bits):
    path = folder / "rows.parquet"
    raw = write_parquet(path, compression="none", use_dictionary=False, write_statistics=False)
    image = png(row % 2)
    at = -1
    for _ in range(row // 2 + 1):
        at = raw.index(image, at + 1)
    end = at + len(image) - 12  # the mark of its end, which holds nothing
    path.write_bytes(raw[:at] + flipped(raw[at:end], where, bits) + raw[end:])
    with pytest.raises(BadInput, match=f"Image 'rows.parquet/row {row}/{row}' (cannot be read|is )"):
        read_parquet(TINY, [path])


@ONCE_AND_FOR_ALL
@given(PLACES, BITS)
def test_a_damaged_page_of_parquet_is_refused(folder, where, bits):
    "Whatever is damaged in the values of a page that has a checksum, the file's name is said."
    path = folder / "pages.parquet"
    raw = write_parquet(path, compression="none", use_dictionary=False, write_page_checksum=True)
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)  # labels: eight int64 at the end of their page
    end = column.data_page_offset + column.total_compressed_size
    path.write_bytes(raw[: end - 64] + flipped(raw[end - 64 : end], where, bits) + raw[end:])
    with pytest.raises(BadInput, match="pages.parquet' cannot be read .*checksum|pages.parquet' cannot be read .*CRC"):
        read_parquet(TINY, [path])


# Parameters


class Awkward:
    def __repr__(self):
        raise RuntimeError("no")


ANYTHING = st.one_of(
    st.integers(),
    st.floats(),
    st.integers(3, 5000).map(lambda n: 10**n),
    st.none(),
    st.booleans(),
    st.complex_numbers(),
    st.decimals(),
    st.fractions(),
    st.text(st.characters()),
    st.binary(),
    st.dates(),
    st.lists(st.integers()),
    st.builds(Awkward),
)


@ONCE_AND_FOR_ALL
@example(10**400, True)
@example(10**5000, False)
@example(float("nan"), True)
@example(float("inf"), False)
@example(np.float64("nan"), True)
@given(ANYTHING, st.booleans())
def test_a_number_is_in_its_range_or_refused(value, whole):
    for low, high in ((0, None), (1, 10), (-5, 10**6)):
        try:
            number = check_number("size", value, low, whole=whole, **({} if high is None else dict(high=high)))
            assert type(number) is (int if whole else float) and number == value
            assert low <= number <= (2**63 - 1 if high is None else high)
        except BadInput as e:
            assert "'size' must be" in str(e) and len(str(e)) < 300
            str(e).encode()
            ok = isinstance(value, (int, float)) and low <= value <= (high or 2**63 - 1)
            assert not ok or isinstance(value, bool) or (whole and value % 1)


@ONCE_AND_FOR_ALL
@example("")
@example("~nosuch/x")
@example("a\0b")
@example("x" * 5000)
@given(ANYTHING)
def test_a_path_is_absolute_or_refused(value):
    try:
        assert check_path("data_dir", value).is_absolute()
    except BadInput as e:
        str(e).encode()


@pytest.mark.parametrize("data_dir", ["", "~nosuch/x", "a\0b", "x" * 5000, "\udcff"])
def test_a_data_dir_that_is_none(tiny, data_dir):
    refused("data_dir" if data_dir in ("", "~nosuch/x", "a\0b") else "does not exist", data_dir=data_dir)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("epochs", 10**12, "from 1 to 1,000,000"),
        ("trials", 10**7, "from 1 to 1,000"),
        ("workers", 10**7, "from 1 to 1,000"),
        ("threads", 10**7, "from 1 to 1,000"),
        ("seed", 10**400, "from 0 to 9,223,372,036,854,775,807"),
        ("seed", float("nan"), "nan (float), which is no number"),
    ],
    ids=["epochs", "trials", "workers", "threads", "400 digits", "nan"],
)
def test_sizes_that_only_a_typo_explains(tmp_path, name, value, said):
    from dfcnn.experiments.studies import lifelong_study

    with pytest.raises(BadInput) as e:
        lifelong_study(methods="HPS", output_dir=str(tmp_path), **{name: value})
    assert f"'{name}' must be a whole number" in str(e.value) and said in str(e.value)


@pytest.mark.parametrize(
    "study, name, value, said",
    [
        ("lifelong", "methods", " ", "Parameter 'methods' must name one or more of STL, "),
        ("lifelong", "methods", [], "Parameter 'methods' must name one or more of STL, "),
        ("lifelong", "methods", "STL ../../evil", "Unknown method '../../evil'"),
        ("lifelong", "dataset", "../shapes", "Unknown data set '../shapes'"),
        ("lifelong", "output_dir", "a\0b", "Parameter 'output_dir' must be a path"),
        ("lifelong", "output_dir", "~nosuch/x", "Parameter 'output_dir' must be a path"),
        ("multitask", "fractions", "-10%", "Unknown fraction of Handwritten digits of scikit-learn '-10%'"),
        ("multitask", "fractions", "1.0%", "Unknown fraction of Handwritten digits of scikit-learn '1.0%'"),
        ("multitask", "fractions", ", ", "Parameter 'fractions' must name one or more of 10%, 50%"),
    ],
)
def test_text_that_names_nothing(tmp_path, monkeypatch, study, name, value, said):
    from dfcnn.experiments.studies import lifelong_study, multitask_study

    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as e:
        {"lifelong": lifelong_study, "multitask": multitask_study}[study](**{name: value})
    assert said in str(e.value) and not list(tmp_path.iterdir())
