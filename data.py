"""Data sets as arrays: load, download, check.

What this file teaches: how little stands between the published bytes of a data set and four numpy
arrays, when every byte is accounted for: a file is what its format says, or an error that names it.

    name         what lies in the data folder                layout
    digits       digits.csv.gz (shipped)                     a row an image: 64 pixels 0..16, label
    mnist        mnist/*-ubyte.gz, four files                idx: magic, dimensions, bytes
    cifar10      cifar-10-batches-bin/*.bin                  label, then planes red, green, blue
    cifar100     cifar-100-binary/*.bin                      coarse label, fine label, planes
    imagenette   imagenette2-320/{train,val}/<class>/*.JPEG  (or imagenette2, imagenette2-160)
    shakespeare  tinyshakespeare/input.txt                   text: predict the next character
    pydocs       nothing: Python carries its documentation   text

What is missing is downloaded, checked, and only then given its name. Training calls `load`, and `owned` and `write`.
Copying: this file needs numpy, and Pillow for imagenette; the digits need their file beside it. A reader such as
`read_idx` (of a Path) needs `read` and `require`; a loader also what it calls. Read next: plots.py.
"""

import gzip
import hashlib
import os
import sys
import tarfile
import tempfile
import time
import zlib
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np


class Dataset(NamedTuple):
    """Samples and labels to train and to test on."""

    x: np.ndarray  # images (n, height, width, channels) float32 in [0, 1]; text (n, 64) int32
    y: np.ndarray  # labels (n,) int32; text: the next characters (n, 64) int32
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int  # number of classes, or of distinct characters


MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-"
CIFAR_2 = "https://cave.cs.toronto.edu/kriz/cifar-"  # the first is slow at times
FAST_AI = "https://s3.amazonaws.com/fast-ai-imageclas/"
KARPATHY = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"

# name in the data folder -> (checksum, url, other urls to try). The checksum is of the download, of
# its content where the name ends in .gz. A url that ends in / goes on with the file's name.
SOURCES = {
    "mnist/train-images-idx3-ubyte.gz": ("md5:6bbc9ace898e44ae57da46a324031adb", MNIST),
    "mnist/train-labels-idx1-ubyte.gz": ("md5:a25bea736e30d166cdddb491f175f624", MNIST),
    "mnist/t10k-images-idx3-ubyte.gz": ("md5:2646ac647ad5339dbf082846283269ea", MNIST),
    "mnist/t10k-labels-idx1-ubyte.gz": ("md5:27ae3e4e09519cfbb04c329615203637", MNIST),
    "cifar-10-batches-bin": ("md5:c32a1d4ab5d03f1284b67883e8d87530", CIFAR + "10-binary.tar.gz",
                             CIFAR_2 + "10-binary.tar.gz"),
    "cifar-100-binary": ("md5:03b5dce01913d631647c71ecec9e9cb8", CIFAR + "100-binary.tar.gz"),
    "imagenette2-320": ("md5:3df6f0d01a2c9592104656642f5e78a3", FAST_AI + "imagenette2-320.tgz"),
    "tinyshakespeare/input.txt": ("sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", KARPATHY),
}

LARGEST, SLOWEST = 4e8, 1e4  # bytes of a download, of which imagenette's is the largest, and bytes a second

# Imagenette's classes, 0 to 9: tench, English springer, cassette player, chain saw, church,
# French horn, garbage truck, gas pump, golf ball, parachute.
WNIDS = ("n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 "
         "n03888257").split()  # fmt: skip


def require(ok, message):
    """ValueError with this one-line message unless ok."""
    if not ok:
        raise ValueError(message)


def say(line, end="\n"):
    """Progress goes to stderr: stdout is for results."""
    print(line, end=end, file=sys.stderr, flush=True)


def read(path, checksum=None):
    """The bytes of a file, decompressed if a .gz; ValueError if broken or of another checksum."""
    require(path.is_file(), f"{path}: is not a file")  # a pipe would be waited for
    content = path.read_bytes()
    try:
        if path.suffix == ".gz" and content[:2] == b"\x1f\x8b":  # browsers unpack, and may leave the name
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: broken or cut short ({error})") from None
    if checksum:
        kind, wanted = checksum.split(":")
        found = hashlib.new(kind, content).hexdigest()
        require(found == wanted, f"{path}: wrong checksum, {kind} is {found}, must be {wanted}")
    return content


@contextmanager
def owned(folder):
    """A folder, made if need be, for this process alone, or ValueError: a lock that ends with it, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":  # Windows has no such lock
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is at work there") from None
        yield
    finally:
        os.close(handle)


def write(path, fill):
    """A file that is the new one or the old one, whole: fill(stream) writes a temporary one, which is then renamed."""
    temporary = path.with_name("." + path.name)
    try:
        with open(temporary, "wb") as stream:
            fill(stream)
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written, {error.strerror or error}; what was there is kept") from None
    finally:
        temporary.unlink(missing_ok=True)  # what is left where it was not renamed


def download(reply, file, timeout):
    """The body of a server's reply as a file. OSError where it is cut short, comes too slowly, or does not end."""
    total, have, began = int(reply.headers.get("Content-Length") or 0), 0, time.time()
    with open(file, "wb") as stream:
        while block := reply.read1(1 << 18):
            have += stream.write(block)
            seconds = time.time() - began
            if have > LARGEST or have < SLOWEST * (seconds - timeout):
                raise OSError(f"gave up after {have} bytes in {seconds:.0f} s")
            if sys.stderr.isatty():
                say(f"\r  {have / 1e6:.1f} of {total / 1e6:.1f} MB ", end="")
    if have < total:
        raise OSError(f"the connection ended after {have} of {total} bytes")
    say("  done")


def fetch(folder, name, sources=SOURCES, timeout=30.0):
    """The path folder/name; what is not there is downloaded, checked and only then named so.

    timeout: seconds without a byte after which a server counts as gone. OSError: what to fetch by hand, and where to.
    """
    path = folder / name
    for there in folder / name.removesuffix(".gz"), path:  # the first: a browser may have unpacked it
        if there.exists():
            return there
    checksum, *urls = sources[name]
    urls = [url + path.name if url.endswith("/") else url for url in urls]
    archive = urls[0].endswith((".tgz", ".tar.gz"))
    require(not archive or hasattr(tarfile, "data_filter"), f"{path}: needs Python 3.11.4")
    failures = []
    for url in urls:
        say(f"downloading {url}")
        try:
            with urlopen(url, timeout=timeout) as reply:
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as temporary:  # of this process alone
                    new = Path(temporary, f"download{path.suffix}")
                    download(reply, new, timeout)
                    read(new, checksum)
                    if archive:
                        with tarfile.open(new) as tar:
                            tar.extractall(temporary, filter="data")  # TarError for what would lie outside
                        new = Path(temporary, path.name)
                    if not path.exists():  # another process may have been faster
                        new.replace(path)
            return path
        except (ValueError, OSError, HTTPException, tarfile.TarError) as error:
            failures.append(" ".join(str(error).split()))  # one line, whatever the server said
            say(f"  {failures[-1]}")
            if isinstance(error, HTTPError):  # a reply as well, and open
                error.close()
    how = f"unpack it in {folder}" if archive else f"save it as {path}"
    why, where = "; ".join(failures), " or ".join(urls)
    raise OSError(f"{path}: missing and not downloaded ({why}): fetch {where} and {how}")


def read_digits(path):
    """Pixels (1797, 8, 8, 1) float32 in [0, 1] and labels (1797,) of the digits, or ValueError."""
    lines = read(path).split()
    try:
        table = np.array([line.split(b",") for line in lines], np.int32)
    except (ValueError, OverflowError):  # not numbers, or rows of different lengths
        table = np.empty(0)
    require(table.shape == (1797, 65), f"{path}: must be 1797 rows of 65 whole numbers")
    wrong = ((table < 0) | (table > [16] * 64 + [9])).any(axis=1)
    require(not wrong.any(), f"{path}: row {wrong.argmax() + 1} goes beyond pixel 16 or label 9")
    return np.float32(table[:, :64] / 16).reshape(-1, 8, 8, 1), table[:, 64]


def read_idx(path, *shape):
    """An idx file (LeCun et al. 1998) as uint8 (n, *shape): 0, 0, 8, ndim, each size as big-endian int32, bytes."""
    raw, ndim = read(path), 1 + len(shape)
    start, magic = 4 + 4 * ndim, bytes([0, 0, 8, ndim])
    require(len(raw) >= start and raw[:4] == magic, f"{path}: must be idx and start {magic.hex()}")
    dims = np.frombuffer(raw, ">u4", ndim, offset=4).tolist()
    require(dims[0] > 0 and (*dims[1:],) == shape, f"{path}: has dimensions {dims}, must have {['n', *shape]}, n > 0")
    size = start + int(np.prod(dims))
    require(len(raw) == size, f"{path}: has {len(raw)} bytes, by its header it must be {size}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(dims)


def read_cifar(path, limits):
    """A CIFAR batch as uint8 (n, 32, 32, 3) and the last of its labels (n,); limits: the classes of each label byte."""
    raw = np.frombuffer(read(path), np.uint8)
    size = len(limits) + 3 * 32 * 32
    whole = len(raw) > 0 and len(raw) % size == 0
    require(whole, f"{path}: has {len(raw)} bytes, must be one or more records of {size} bytes")
    labels, pixels = np.split(raw.reshape(-1, size), [len(limits)], axis=1)
    wrong = (labels >= limits).any(axis=1)
    i = wrong.argmax()
    require(not wrong.any(), f"{path}: record {i} has label {labels[i]}, must be below {limits}")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels[:, -1]


def read_image(path, size):
    """An image's centre square as uint8 (size, size, 3), scaled bilinearly, grey in all channels; or ValueError."""
    from PIL import Image, ImageOps  # here, so that the other data sets do without Pillow

    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.BILINEAR))
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise ValueError(f"{path}: not a whole image ({error})") from None


def read_images(paths, size, cache):
    """Image files as uint8 (n, size, size, 3), kept in the .npz file `cache` while none changes."""
    key = repr([(size, p.parts[-3:], p.stat().st_size, p.stat().st_mtime_ns) for p in paths])
    with suppress(Exception), open(cache, "rb") as file, np.load(file) as kept:  # broken: anew
        if str(kept["key"]) == key and len(kept["x"]) == len(paths):
            return kept["x"]
    say(f"decoding {len(paths)} images")
    x = np.stack([read_image(path, size) for path in paths])
    if cache.parent.stat().st_mode & 0o200:  # a folder marked read-only would not stop root
        try:
            write(cache, lambda stream: np.savez(stream, key=key, x=x))
        except OSError as error:
            say(f"not kept for the next time: {error}")
    return x


def balanced_order(y):
    """Indices that take the classes in turn: the first of each, the second of each, and so on.

    >>> balanced_order(np.array([0, 0, 0, 1, 1, 2])).tolist()
    [0, 3, 5, 1, 4, 2]
    """
    turn = np.empty(len(y), int)
    for label in np.unique(y):
        turn[y == label] = np.arange(np.sum(y == label))
    return np.lexsort((y, turn))


def text_blocks(codes, length=64):
    """A sequence cut into blocks x (n, length), and y, the same blocks one character further on.

    >>> x, y = text_blocks(np.arange(6), length=2)
    >>> x.tolist(), y.tolist()
    ([[0, 1], [2, 3]], [[1, 2], [3, 4]])
    """
    n = (len(codes) - 1) // length
    return codes[: n * length].reshape(n, length), codes[1 : n * length + 1].reshape(n, length)


def read_text(text):
    """A text as a Dataset: characters numbered in sorted order, the last tenth the test part."""
    characters, codes = np.unique(list(text), return_inverse=True)
    train, test = np.split(codes.astype(np.int32), [len(codes) * 9 // 10])
    return Dataset(*text_blocks(train), *text_blocks(test), len(characters))


def digits(folder):
    """Handwritten digits 8x8 (Alpaydin and Kaynak 1998, UCI, CC BY 4.0): 1437 train, 360 test."""
    path = folder / "digits.csv.gz"
    shipped = Path(__file__).resolve().parent / "datasets" / "digits.csv.gz"
    x, y = read_digits(path if path.exists() else shipped)
    train, test = np.split(np.random.RandomState(0).permutation(len(x)), [1437])  # numpy keeps this stream for good
    return Dataset(x[train], y[train], x[test], y[test], 10)


def mnist(folder):
    """MNIST digits 28x28 (LeCun, Cortes and Burges 1998): 60,000 train, 10,000 test."""

    def part(name):
        images = fetch(folder, f"mnist/{name}-images-idx3-ubyte.gz")
        labels = fetch(folder, f"mnist/{name}-labels-idx1-ubyte.gz")
        x, y = read_idx(images, 28, 28), read_idx(labels)
        wrong = f"{labels}: {len(y)} labels 0 to {y.max()}, must be {len(x)} labels 0 to 9"
        require(len(x) == len(y) and y.max() < 10, wrong)
        return x[..., None], y

    return Dataset(*part("train"), *part("t10k"), 10)


def cifar(folder, name, train, test, limits):
    """Both CIFARs: the training batches that are there, and the test batch."""
    root = fetch(folder, name)
    there = sorted(root.glob(train))
    require(there, f"{root}: must hold training images, {train}")
    x, y = map(np.concatenate, zip(*(read_cifar(path, limits) for path in there)))
    x_test, y_test = read_cifar(root / test, limits)
    if (len(y), len(y_test)) != (50_000, 10_000):
        say(f"{root}: {len(y)} of 50000 train and {len(y_test)} of 10000 test images are there")
    return Dataset(x, y, x_test, y_test, limits[-1])


def cifar10(folder):
    """CIFAR-10, 32x32 colour, 10 classes (Krizhevsky 2009): 50,000 train, 10,000 test."""
    return cifar(folder, "cifar-10-batches-bin", "data_batch_[1-5].bin", "test_batch.bin", (10,))


def cifar100(folder):
    """CIFAR-100, 32x32 colour, 100 classes (Krizhevsky 2009): 50,000 train, 10,000 test."""
    return cifar(folder, "cifar-100-binary", "train.bin", "test.bin", (20, 100))


def imagenette(folder, image_size=224):
    """Imagenette, photographs of 10 classes (Howard 2019, fast.ai): 9,469 train, 3,925 test.

    image_size: side of the square that is cropped
    """
    require(image_size > 0, f"image size {image_size}: must be 1 or more pixels a side")
    names = ("imagenette2", "imagenette2-160", "imagenette2-320")
    root = fetch(folder, next((name for name in names if (folder / name).exists()), names[-1]))

    def files(part):
        odd = ", ".join(sorted({path.name for path in part.glob("n*")} ^ set(WNIDS)))
        require(not odd, f"{part}: must hold the ten classes; missing or unknown: {odd}")
        groups = [sorted((part / wnid).glob("[!.]*.JPEG")) for wnid in WNIDS]
        require(all(groups), f"{part}: must hold .JPEG files in each of its class folders")
        return sum(groups, []), np.repeat(np.arange(10), [len(group) for group in groups])

    (train, y), (test, y_test) = files(root / "train"), files(root / "val")
    x = read_images(train + test, image_size, folder / f"{root.name}-{image_size}.npz")
    order = balanced_order(y_test)  # they are filed by class; the first few are to be of all classes
    return Dataset(x[: len(train)], y, x[len(train) :][order], y_test[order], 10)


def shakespeare(folder):
    """Tiny Shakespeare (Karpathy 2015): 1,115,394 characters, 65 different ones."""
    name = "tinyshakespeare/input.txt"
    text = read(fetch(folder, name), SOURCES[name][0])  # it has no other sign that it is whole
    return read_text(text.decode("ascii"))


def pydocs(folder):
    """Python's language reference as help() shows it, about 465,000 characters by version."""
    from pydoc_data.topics import topics

    return read_text("".join(topics[key] for key in sorted(topics)))


# name -> loader(folder, its own options) -> Dataset, whole and in the order of its files; pixels may be uint8
DATASETS = {f.__name__: f for f in (digits, mnist, cifar10, cifar100, imagenette, shakespeare, pydocs)}


def load(name, folder="datasets", samples=0, test_samples=0, standardize=False, **options):
    """A data set by its name in DATASETS, ready to train on. ValueError or OSError, in one line, for what is wrong.

    folder: where the files are or will be; it must exist, only the default is made when needed.
    samples: how many to train on, 0 for all. Classes take turns, so the first k are balanced for every k; text comes
    from its start. test_samples: how many to test on, the first of them; 0 for all.
    standardize: shift and scale each channel so that training pixels have mean 0, deviation 1.
    options: of the data set, such as image_size for imagenette. A file is read whole before samples are taken.

    >>> data = load("digits", samples=1024)
    >>> data.x.shape, data.y.shape, data.x_test.shape, data.classes
    ((1024, 8, 8, 1), (1024,), (360, 8, 8, 1), 10)
    """
    folder = Path(folder).expanduser()
    require(name in DATASETS, f"unknown data set {name!r}, must be one of {', '.join(DATASETS)}")
    require(folder.is_dir() or folder == Path("datasets"), f"{folder}: there is no such folder")
    x, y, x_test, y_test, classes = DATASETS[name](folder, **options)
    n, few, images = len(x), test_samples or len(x_test), x.ndim == 4
    for kind, asked, there in ("samples", samples, n), ("test samples", test_samples, len(x_test)):
        require(0 <= asked <= there, f"{name}: {asked} {kind}, must be 1 to {there} or 0 for all {there}")
    x_test, y_test = x_test[:few], y_test[:few]
    require(images or not standardize, f"{name}: text cannot be standardized (--standardize), images can")
    take = (balanced_order(y) if images else np.arange(n))[: samples or n]
    x, y, y_test = x[take], y[take].astype(np.int32), y_test.astype(np.int32)
    if x.dtype == np.uint8:
        x, x_test = (pixels.astype(np.float32) / 255 for pixels in (x, x_test))
    if standardize:
        mean, std = (f(x, axis=(0, 1, 2), dtype=np.float64) for f in (np.mean, np.std))
        mean, std = np.float32(mean), np.float32(np.where(std > 1e-6, std, 1))
        x, x_test = ((pixels - mean) / std for pixels in (x, x_test))
    return Dataset(x, y, x_test, y_test, classes)
