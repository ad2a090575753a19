"""Untrusted `.npz` files: hostile and damaged files are one-line errors, in bounded memory."""

import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from jaxcl.host.npz import npz_headers, read_npz

NUMBERS = np.arange(6).reshape(2, 3)


def header(shape, descr="<i8", version=(1, 0)):
    """The first bytes of a `.npy` file that claims this shape."""
    file = io.BytesIO()
    description = {"descr": descr, "fortran_order": False, "shape": shape}
    if version == (1, 0):
        np.lib.format.write_array_header_1_0(file, description)
    else:
        np.lib.format.write_array_header_2_0(file, description)
    return file.getvalue()


def written(path, compression=zipfile.ZIP_STORED, **parts):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(f"{name}.npy", content)
    return path


def array_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "array", [NUMBERS, NUMBERS.T, NUMBERS.astype(">f4"), np.array("text"), np.zeros((0, 3))]
)
def test_files_written_by_numpy_are_read(tmp_path, save, array):
    save(tmp_path / "file.npz", array=array, other=NUMBERS)
    read = read_npz(tmp_path / "file.npz", ["array"])
    assert list(read) == ["array"]
    np.testing.assert_array_equal(read["array"], array)
    headers = npz_headers(tmp_path / "file.npz", ["array"], optional=["other", "absent"])
    assert headers == {"array": (array.shape, array.dtype), "other": ((2, 3), NUMBERS.dtype)}


def test_large_arrays_that_compress_well_are_read(tmp_path):
    zeros = np.zeros(2**24)  # 128 MiB, for which any ratio is allowed
    np.savez_compressed(tmp_path / "file.npz", zeros=zeros)
    assert read_npz(tmp_path / "file.npz", ["zeros"])["zeros"].nbytes == zeros.nbytes


def refused(path, names=("a",)):
    """The message with which both functions refuse a file; checks their memory."""
    tracemalloc.start()
    try:
        for function in (npz_headers, read_npz):
            with pytest.raises(ValueError, match="cannot be read: ") as caught:
                function(path, list(names))
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read: ")
    assert "\n" not in message
    assert "allow_pickle" not in message
    return message


@pytest.mark.parametrize("shape", [(10**12, 8), (10**30,), (2**62, 2**62), (-1, 3), (3, 10**12, 0)])
def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path, shape):
    path = written(tmp_path / "file.npz", a=header(shape) + bytes(64))
    assert "a has" in refused(path)


@pytest.mark.parametrize("descr", ["|O", [("x", "|O")]])
def test_python_objects_are_refused(tmp_path, descr):
    path = written(tmp_path / "file.npz", a=header((1,), descr) + b"cos\nsystem\n")
    assert "Python objects" in refused(path)


def test_a_header_of_gigabytes_is_refused(tmp_path):
    claimed = header((1,), version=(2, 0))[:8] + (2**31).to_bytes(4, "little")
    path = written(tmp_path / "file.npz", a=claimed + bytes(1000))
    assert "not in version 1.0 of the .npy format" in refused(path)


@pytest.fixture(scope="module")
def bomb():
    """300 MiB of zeros after a valid header, in 300 kB."""
    file = io.BytesIO()
    count = 300 * 2**20
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w", force_zip64=True) as part,
    ):
        part.write(header((count,), "|u1"))
        for _ in range(300):
            part.write(bytes(2**20))
        part.close()
        archive.writestr("b.npy", array_bytes(NUMBERS))
    return file.getvalue()


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, bomb):
    (tmp_path / "file.npz").write_bytes(bomb)
    assert len(bomb) < 2**20
    assert "unpacks" in refused(tmp_path / "file.npz")


def test_an_array_that_is_not_requested_is_not_unpacked(tmp_path, bomb):
    (tmp_path / "file.npz").write_bytes(bomb)
    tracemalloc.start()
    np.testing.assert_array_equal(read_npz(tmp_path / "file.npz", ["b"])["b"], NUMBERS)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_a_part_that_claims_to_be_larger_than_the_file_is_refused(tmp_path):
    path = written(tmp_path / "file.npz", a=header((10**9,), "|u1"))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    size = (len(header((10**9,), "|u1")) + 10**9).to_bytes(4, "little")
    content[entry + 20 : entry + 28] = size + size  # compressed, unpacked
    path.write_bytes(content)
    assert "larger than the file" in refused(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_another_compression_is_refused(tmp_path, compression):
    path = written(tmp_path / "file.npz", compression, a=array_bytes(NUMBERS))
    assert "a compression that NumPy does not write" in refused(path)


@pytest.mark.parametrize(
    "content", [b"", b"no archive", array_bytes(NUMBERS), array_bytes(np.array([{}], object))]
)
def test_a_file_that_is_not_an_npz_is_an_error(tmp_path, content):
    (tmp_path / "file.npz").write_bytes(content)
    assert "not an .npz, or damaged" in refused(tmp_path / "file.npz")


def test_a_missing_array_is_named_with_the_existing_ones(tmp_path):
    np.savez(tmp_path / "file.npz", a=NUMBERS, b=NUMBERS)
    assert "it has no c; it has a, b" in refused(tmp_path / "file.npz", ("a", "c"))


def test_pipes_folders_and_missing_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing"):
        refused(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_flipped_byte_is_refused_or_changes_nothing(tmp_path, save):
    save(tmp_path / "file.npz", a=NUMBERS)
    content = (tmp_path / "file.npz").read_bytes()
    num_refused = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x55
        (tmp_path / "file.npz").write_bytes(changed)
        try:
            read = read_npz(tmp_path / "file.npz", ["a"])
        except ValueError:
            num_refused += 1
        else:
            np.testing.assert_array_equal(read["a"], NUMBERS)
    assert num_refused > len(content) // 2
