from collections.abc import Sequence

from typing_extensions import Buffer

ERROR_KINDS: tuple[str, ...]

class FileError(ValueError):
    kind: str

def read_header(
    path: bytes,
) -> tuple[list[tuple[str, str, tuple[int, ...], int, int]], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Args:
        path: from ``os.fsencode``, here and below.

    Returns:
        ``(name, dtype, shape, begin, end)`` of each tensor in the order of their bytes, ``[begin, end)``
        being its byte range in the file; and the ``__metadata__`` strings.

    Raises:
        FileError: the file is unreadable or malformed; its ``kind`` is one of `ERROR_KINDS`.
    """

def parse_file(
    content: bytes,
) -> tuple[list[tuple[str, str, tuple[int, ...], int, int]], dict[str, str]]:
    """The same of a safetensors file whose content is at hand."""

def refuse_lfs_pointer(content: bytes) -> None:
    """Raise `FileError` of kind ``lfs_pointer`` where a file with this content is one of Git LFS."""

def read_weight_map(path: bytes) -> dict[str, str]:
    """Tensor names and the files that hold them, from an index in JSON; raises `FileError`."""

class Pool:
    """Memory for tensors, at most ``bound`` bytes of it."""

    def __init__(self, bound: int, pin: int = 0, unpin: int = 0, choose: int = 0, device: int = 0) -> None:
        """``pin``, ``unpin``, ``choose``: addresses of cudaHostRegister, cudaHostUnregister and cudaSetDevice, or 0 for
        pageable memory."""
    @property
    def bound(self) -> int: ...
    @property
    def in_use(self) -> int:
        """Bytes of buffers that are being read into, or handed out and still referred to."""
    @property
    def high_water(self) -> int:
        """The most bytes, in use and kept for the next tensor, that there ever were."""

class Block(Buffer):
    """Bytes in a pool's buffer, 64-byte aligned and writable; it gives the buffer back when it goes."""

class Reader:
    """Byte ranges of files, read ahead by ``workers`` threads and handed out in the order of ``requests``."""

    def __init__(
        self,
        paths: Sequence[bytes],
        requests: Sequence[tuple[int, int, int]],
        pool: Pool,
        workers: int,
        io: str,
    ) -> None:
        """``requests``: index of the path, first byte, one past the last; ``io``: auto, direct or buffered."""
    def next(self) -> Block:
        """Wait for the next block; one more call than there are requests is an error.

        Raises:
            FileError: what went wrong with it (the reader is of no more use); or of kind ``buffers_held`` (the
                reader goes on once a block is dropped).
        """
    def done(self) -> bool: ...

def pool_bytes(begin: int, end: int) -> int:
    """What reading a range takes of a pool."""

class OutputFile:
    """A file to be written; every method raises `FileError`, of kind ``write_failed`` unless the source is at fault."""

    def __init__(self, path: bytes, fresh: bool = True) -> None:
        """``fresh``: a new file; otherwise one that was begun before is gone on with."""
    def clone(self, path: bytes) -> bool:
        """Share all the bytes of another file where the file system can; False: it cannot."""
    def reserve(self, size: int) -> None:
        """Give it its size and its space on the disk."""
    def write(self, offset: int, data: Buffer) -> None: ...
    def copy(self, path: bytes, from_offset: int, offset: int, count: int) -> None: ...
    def sync(self) -> None:
        """Everything so far is on the disk when this returns."""
    def finish(self) -> None:
        """Everything is on the disk when this returns."""

def rename_new(source: bytes, target: bytes) -> bool:
    """Rename unless ``target`` exists (`FileError`); False: the file system has no such operation."""

def exchange(a: bytes, b: bytes) -> bool:
    """Swap two names at one moment; False: the file system has no such operation."""
