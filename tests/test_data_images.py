import functools
import gzip
import hashlib
import http.server
import io
import pickle
import socket
import struct
import tarfile
import threading
import time
import tracemalloc

import numpy as np
import pytest

from train import data
from train.data import images, original
from train.data.spec import Spec

RNG = np.random.default_rng(0)
MNIST_COUNTS = {"train": 40, "t10k": 12}
CIFAR_COUNT = 8  # in each file
CIFAR_NAMES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def idx(array):
    """The bytes of an IDX file."""
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, packed=(), **replaced):
    """Four small files of the real format; returns {split: (images, labels)}."""
    made = {}
    for split, count in MNIST_COUNTS.items():
        pixels = RNG.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        made[split] = pixels, labels
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            name = f"{split}-{name}-ubyte"
            content = replaced.get(name.replace("-", "_"), idx(array))
            if name in packed:
                name, content = f"{name}.gz", gzip.compress(content)
            (folder / name).write_bytes(content)
    return made


def cifar_files():
    """name -> bytes, and name -> (images, labels)."""
    contents, made = {}, {}
    for name in CIFAR_NAMES:
        pixels = RNG.integers(256, size=(CIFAR_COUNT, 3, 32, 32), dtype=np.uint8)
        labels = RNG.integers(10, size=CIFAR_COUNT, dtype=np.uint8)
        records = np.concatenate([labels[:, None], pixels.reshape(len(pixels), -1)], 1)
        contents[name] = records.tobytes()
        made[name] = pixels.transpose(0, 2, 3, 1), labels
    return contents, made


def write_cifar(folder, contents, packed=False):
    if not packed:
        (folder / "cifar-10-batches-bin").mkdir()
        for name, content in contents.items():
            (folder / "cifar-10-batches-bin" / name).write_bytes(content)
        return
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, content in {"readme.html": b"x", **contents}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def everything(dataset, split):
    (batch,) = dataset.evaluation(split, dataset.num_examples(split))
    return batch


def load_mnist(folder, **arguments):
    return data.load(dict(name="mnist", folder=str(folder), **arguments))


def load_cifar(folder, **arguments):
    return data.load(dict(name="cifar", folder=str(folder), **arguments))


def test_mnist_from_plain_and_packed_files(tmp_path):
    made = write_mnist(tmp_path, packed=("train-images-idx3-ubyte",))
    dataset = load_mnist(tmp_path)
    sizes = {split: dataset.num_examples(split) for split in dataset.sources}
    assert sizes == {"train": 36, "validation": 4, "test": 12}
    assert dataset.spec == Spec("scalar", 784, 10, "classification")
    test, (pixels, labels) = everything(dataset, "test"), made["t10k"]
    np.testing.assert_array_equal(
        test["inputs"], pixels.reshape(12, 784).astype(np.float32) / 255
    )
    np.testing.assert_array_equal(test["targets"], labels)
    assert test["inputs"].dtype == np.float32 and test["targets"].dtype == np.int32
    batch = next(dataset.train(8, seed=0))
    assert batch["inputs"].shape == (8, 784) == batch["mask"].shape
    rows = {
        row.tobytes()
        for row in pickle.loads(pickle.dumps(dataset.sources))["train"]
        for row in [row["image"]]
    }
    assert rows < {image.tobytes() for image in made["train"][0]} and len(rows) == 36
    again = everything(load_mnist(tmp_path), "validation")
    np.testing.assert_array_equal(
        again["inputs"], everything(dataset, "validation")["inputs"]
    )


def test_a_digest_is_of_what_the_files_hold(tmp_path):
    write_mnist(tmp_path)
    first = load_mnist(tmp_path).digest
    path = tmp_path / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    path.unlink()
    assert load_mnist(tmp_path).digest == first and len(first) == 64
    path.write_bytes(content[:-1] + b"\x05")
    assert load_mnist(tmp_path).digest != first


def test_permutations_order_the_pixels_of_all_images_alike(tmp_path):
    write_mnist(tmp_path)
    plain = everything(load_mnist(tmp_path), "test")["inputs"]
    by_hand = [int(f"{i:010b}"[::-1], 2) for i in range(1024)]
    orders = {
        "bit_reversal": [i for i in by_hand if i < 784],
        "random": np.random.RandomState(92916).permutation(784),
    }
    assert orders["bit_reversal"][:4] == [0, 512, 256, 768]
    for name, order in orders.items():
        assert sorted(order) == list(range(784))
        moved = everything(load_mnist(tmp_path, permutation=name), "test")["inputs"]
        np.testing.assert_array_equal(moved, plain[:, order])
    with pytest.raises(ValueError, match=r"data\.permutation .*'random', got 'rows'"):
        load_mnist(tmp_path, permutation="rows")


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_in_colour(tmp_path, packed):
    contents, made = cifar_files()
    write_cifar(tmp_path, contents, packed)
    dataset = load_cifar(tmp_path)
    sizes = {split: dataset.num_examples(split) for split in dataset.sources}
    assert sizes == {"train": 36, "validation": 4, "test": 8}
    assert (dataset.spec.length, dataset.spec.channels) == (1024, 3)
    batch, (pixels, labels) = everything(dataset, "test"), made["test_batch.bin"]
    np.testing.assert_array_equal(batch["targets"], labels)
    assert batch["inputs"].dtype == np.float32
    back = batch["inputs"] * (0.247, 0.243, 0.261) + (0.4914, 0.4822, 0.4465)
    np.testing.assert_allclose(back * 255, pixels.reshape(8, 1024, 3), atol=1e-3)
    train = [everything(dataset, split)["targets"] for split in ("train", "validation")]
    expected = np.concatenate([made[name][1] for name in CIFAR_NAMES[:5]])
    np.testing.assert_array_equal(np.sort(np.concatenate(train)), np.sort(expected))


def test_gray_cifar_is_what_pillow_makes_of_it(tmp_path):
    contents, made = cifar_files()
    write_cifar(tmp_path, contents)
    dataset = load_cifar(tmp_path, color="gray")
    assert (dataset.spec.length, dataset.spec.channels) == (1024, 1)
    gray = everything(dataset, "test")["inputs"] * (61 / 255) + 122.6 / 255
    image = pytest.importorskip("PIL.Image")
    expected = [
        np.asarray(image.fromarray(pixels).convert("L")).reshape(-1)
        for pixels in made["test_batch.bin"][0]
    ]
    np.testing.assert_allclose(gray * 255, expected, atol=1e-3)
    with pytest.raises(ValueError, match=r"data\.color .*'rgb', 'gray', got 'blue'"):
        load_cifar(tmp_path, color="blue")


LABELS = idx(np.arange(40, dtype=np.uint8) % 10)
BAD_MNIST = {
    "magic": (
        dict(train_labels_idx1_ubyte=b"\x00\x00\x0d\x01" + LABELS[4:]),
        "train-labels-idx1-ubyte: .* begins with 00000801, this one with 00000d01",
    ),
    "rank": (
        dict(t10k_images_idx3_ubyte=LABELS),
        "t10k-images-idx3-ubyte: .* 3 axes begins with 00000803, this .* 00000801",
    ),
    "empty": (dict(train_labels_idx1_ubyte=b""), "this one with nothing"),
    "truncated": (
        dict(train_labels_idx1_ubyte=LABELS[:-3]),
        r"40 bytes must follow its header, which says \[40\]; there are 37",
    ),
    "too long": (dict(train_labels_idx1_ubyte=LABELS + b"\x00"), "there are 41"),
    "count": (
        dict(train_labels_idx1_ubyte=idx(np.zeros(39, np.uint8))),
        "train-images-idx3-ubyte has 40 images, but .*labels-idx1-ubyte has 39 labels",
    ),
    "no images": (
        dict(
            train_images_idx3_ubyte=idx(np.zeros((0, 28, 28), np.uint8)),
            train_labels_idx1_ubyte=idx(np.zeros(0, np.uint8)),
        ),
        r"train-images-idx3-ubyte: must have 1 or more along each axis, got \[0,",
    ),
    "size": (
        dict(t10k_images_idx3_ubyte=idx(np.zeros((12, 8, 9), np.uint8))),
        "28 x 28 pixels, these have 8 x 9",
    ),
    "label": (
        dict(train_labels_idx1_ubyte=idx(np.full(40, 10, np.uint8))),
        "labels must be 0 to 9, one is 10",
    ),
}


@pytest.mark.parametrize(("replaced", "message"), BAD_MNIST.values(), ids=BAD_MNIST)
def test_every_fault_of_an_idx_file_is_named(tmp_path, replaced, message):
    write_mnist(tmp_path, **replaced)
    with pytest.raises(ValueError, match=message):
        load_mnist(tmp_path)


@pytest.mark.parametrize("damage", [slice(0, 200), slice(2, None)], ids=str)
def test_damaged_gzip_is_named(tmp_path, damage):
    write_mnist(tmp_path, packed=("t10k-images-idx3-ubyte",))
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[damage])
    with pytest.raises(ValueError, match=r"ubyte\.gz: damaged or incomplete"):
        load_mnist(tmp_path)


BAD_CIFAR = {
    "size": (lambda c: c | {"data_batch_3.bin": c["data_batch_3.bin"][:-1]},
             "data_batch_3.bin has 24583 bytes; .* 3073 per image"),
    "empty": (lambda c: c | {"test_batch.bin": b""}, "test_batch.bin has 0 bytes"),
    "label": (lambda c: c | {"test_batch.bin": b"\x0a" + c["test_batch.bin"][1:]},
              "test_batch.bin has the label 10; CIFAR-10's are 0 to 9"),
    "missing": (lambda c: {k: v for k, v in c.items() if k != "data_batch_5.bin"},
                "data_batch_5.bin not found in it"),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("change", "message"), BAD_CIFAR.values(), ids=BAD_CIFAR)
def test_every_fault_of_cifar_is_named(tmp_path, change, message, packed):
    write_cifar(tmp_path, change(cifar_files()[0]), packed)
    with pytest.raises(ValueError, match=message):
        load_cifar(tmp_path)


def test_damaged_archive_is_named(tmp_path):
    write_cifar(tmp_path, cifar_files()[0], packed=True)
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"tar\.gz: damaged or incomplete"):
        load_cifar(tmp_path)


def test_a_gzip_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    write_mnist(tmp_path, packed=("t10k-images-idx3-ubyte",))
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(10**7)))
    monkeypatch.setattr(original, "MOST_BYTES", 10**6)
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"ubyte\.gz: must have 1000000 bytes or fewer"
    ):
        load_mnist(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 5 * 10**6
    tracemalloc.stop()


def test_a_folder_where_a_file_belongs_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    (tmp_path / "t10k-images-idx3-ubyte").mkdir()
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte: cannot be read"):
        load_mnist(tmp_path)


def archive(path, members):
    """A .tar.gz of (name, content or the target of a link)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_a_hostile_archive_writes_nothing_and_reads_nothing_else(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    path, folder = home / "cifar-10-binary.tar.gz", original.CIFAR_FOLDER
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(3073))
    archive(
        path,
        [
            ("../outside", b"x"),
            (str(tmp_path / "absolute"), b"x"),
            *((f"{folder}/data_batch_{i}.bin", str(secret)) for i in range(1, 6)),
        ],
    )
    with pytest.raises(ValueError, match=r"data_batch_1\.bin.* not found in it"):
        load_cifar(home)
    assert {entry.name for entry in tmp_path.iterdir()} == {"home", "secret"}
    monkeypatch.setattr(original, "MOST_BYTES", 10**6)
    archive(path, [("padding", bytes(2 * 10**6))])
    with pytest.raises(ValueError, match=r"1000000 bytes or fewer.*'padding' ends bey"):
        load_cifar(home)
    archive(path, [(f"{folder}/data_batch_1.bin", bytes(10**5))])
    monkeypatch.setattr(original, "LONGEST", 10**4)
    monkeypatch.setitem(images.CIFAR_FILES, "train", ("data_batch_1.bin",))
    with pytest.raises(ValueError, match=r"data_batch_1\.bin has more than 10000 imag"):
        load_cifar(home)


def test_without_a_network_it_is_said_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(original, "PATIENCE", 0.5)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        one = original.Original(f"{address}/file.gz", 1, "", "file")
        begun = time.monotonic()
        with pytest.raises(ValueError, match=r"fetching failed: .*refused"):
            original.locate("This", tmp_path, (one,), download=True)
        listening.listen()  # and never accepts
        with pytest.raises(ValueError, match=r"fetching failed: no answer from http"):
            original.locate("This", tmp_path, (one,), download=True)
        assert time.monotonic() - begun < 5
    assert not list(tmp_path.iterdir())


def test_missing_files_are_named_with_their_address_and_place(tmp_path):
    message = (
        r"MNIST: .*mnist lacks t10k-labels-idx1-ubyte \(or t10k-labels-idx1-ubyte\.gz\)"
        r"\. Put there what https://storage.*/mnist/t10k-labels-idx1-ubyte\.gz gives"
    )
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_mnist(folder)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=message):
        load_mnist(folder)
    with pytest.raises(ValueError, match=r"lacks cifar-10-batches-bin.*toronto\.edu"):
        load_cifar(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.fixture
def server(tmp_path):
    """Serves the files of a folder on this machine: (folder, address)."""
    folder = tmp_path / "published"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_missing_files_are_fetched_and_their_digests_checked(tmp_path, server):
    published, address = server
    home = tmp_path / "home"
    content = b"some bytes"
    (published / "file.gz").write_bytes(content)
    good = original.Original(
        f"{address}/file.gz", len(content), hashlib.sha256(content).hexdigest(), "file"
    )
    (path,) = original.locate("This", home, (good,), download=True)
    assert path == home / "file.gz" and path.read_bytes() == content
    assert [entry.name for entry in home.iterdir()] == ["file.gz"]
    (published / "file.gz").unlink()
    assert original.locate("This", home, (good,), download=True) == [path]

    other = home / "other"
    (published / "file.gz").write_bytes(b"other data")
    with pytest.raises(ValueError, match=r"fetching failed: .*checksum") as raised:
        original.locate("This", other, (good,), download=True)
    assert f"Put there what {good.url} gives" in str(raised.value)
    gone = good._replace(url=f"{address}/none.gz")
    with pytest.raises(ValueError, match=r"fetching failed: .*404"):
        original.locate("This", other, (gone,), download=True)
    assert not list(other.iterdir())


def test_the_published_digests_are_those_that_tensorflow_datasets_knows():
    from tensorflow_datasets.core.download import checksums

    known = checksums.get_all_url_infos()
    for one in (*images.MNIST.values(), images.CIFAR):
        assert (known[one.url].size, known[one.url].checksum) == (one.size, one.sha256)
