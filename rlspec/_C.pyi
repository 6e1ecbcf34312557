ERROR_KINDS: tuple[str, ...]

class HeaderError(ValueError):
    kind: str

def read_header(
    path: bytes,
) -> tuple[list[tuple[str, str, tuple[int, ...], int, int]], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Args:
        path: from ``os.fsencode``.

    Returns:
        ``(name, dtype, shape, begin, end)`` of each tensor in the order of their bytes, ``[begin, end)``
        being its byte range in the file; and the ``__metadata__`` strings.

    Raises:
        HeaderError: the file is unreadable or malformed; its ``kind`` is one of `ERROR_KINDS`.
    """
