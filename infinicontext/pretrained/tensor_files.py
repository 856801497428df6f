"""Files of tensors as memory-mapped arrays: safetensors, and torch's zip format without torch and without running pickled code.

A `.pth` file is a zip archive with one pickle, which says where tensors lie, and one uncompressed member per storage, which is mapped. A
pickle can name any function of any module for the reader to call. Ours knows the names that tensors need and no other, and calling one does
no more than note where a tensor lies.
"""

import json
import math
import mmap
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from infinicontext.errors import UserError

_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
}
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
}


def open_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a .safetensors or .pth file by name: read-only arrays that are mapped, not read.

    Raises:
      UserError: the file is damaged, or its pickle holds anything but a dict of tensors.
    """
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pth(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    # A damaged file, or a pickle made to do harm, fails at whatever it breaks first.
    except Exception as error:
        raise UserError(f"{path} cannot be read; it is damaged or no file of tensors: {error}") from error


def _map(path: pathlib.Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _open_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    data = _map(path)
    begin = 8 + struct.unpack("<Q", data[:8].tobytes())[0]
    tensors = {}
    for name, entry in json.loads(data[8:begin].tobytes()).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            part = data[begin + first : begin + last]
            tensors[name] = part.view(_SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
    return tensors


# What a pickle gets hold of has no attributes, so that it cannot change anything that outlives it.


class _Storage(NamedTuple):
    kind: str
    key: str


class _Tensor(NamedTuple):
    """Where a tensor lies."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dict(dict):
    """In place of an OrderedDict; torch sets an attribute of a state dict to the versions of its modules, which nobody needs."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class _MakeDict:
    __slots__ = ()

    def __call__(self, items=()) -> _Dict:
        return _Dict(items)


class _MakeTensor:
    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> _Tensor:
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _MakeParameter:
    __slots__ = ()

    def __call__(self, tensor, requires_grad=True, hooks=None) -> _Tensor:
        return tensor


_NAMES = {
    "torch._utils._rebuild_tensor_v2": _MakeTensor(),
    "torch._utils._rebuild_parameter": _MakeParameter(),
    "collections.OrderedDict": _MakeDict(),
    **{f"torch.{kind}": kind for kind in _STORAGES},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _NAMES:
            raise UserError(f"names {module}.{name}, which is no part of a tensor")
        return _NAMES[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, *_ = pid
        return _Storage(kind, key)


def _open_pth(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not in torch's zip format (torch before 1.6, or damaged); save it again with a newer torch")
    data = _map(path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise UserError(f"{path} was written by a big-endian machine, which is not supported")
        with archive.open(members["data.pkl"]) as file:
            try:
                tensors = _Unpickler(file).load()
            except UserError as error:
                raise UserError(f"{path} is refused: its pickle {error}") from None

    def array(tensor: _Tensor) -> np.ndarray:
        member = members[f"data/{tensor.storage.key}"]
        if member.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path} holds a compressed storage, which torch does not write")
        # The local header repeats the name, with an extra field of its own for alignment.
        header = member.header_offset
        first = header + 30 + sum(struct.unpack("<HH", data[header + 26 : header + 30].tobytes()))
        flat = data[first : first + member.file_size].view(_STORAGES[tensor.storage.kind])
        offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
        reach = offset + sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1
        if len(shape) != len(strides) or min(offset, *shape, *strides, 0) < 0 or (math.prod(shape) and reach > flat.size):
            raise UserError(f"{path} has a tensor that does not lie within its storage")
        steps = [stride * flat.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)

    if not isinstance(tensors, dict) or not all(isinstance(name, str) and isinstance(tensors[name], _Tensor) for name in tensors):
        raise UserError(f"{path} is refused: its pickle is no flat dict of tensors")
    return {name: array(tensor) for name, tensor in tensors.items()}


def save_pth(tensors: Iterable[tuple[str, np.ndarray]], path: pathlib.Path) -> None:
    """Writes a file that torch.load reads as a dict of tensors, also with weights_only=True. Each tensor is written as it comes."""
    names = {np.dtype(dtype): name for name, dtype in _STORAGES.items()}
    pieces = [pickle.PROTO + b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def put(name: str, data: bytes | np.ndarray) -> None:
            # A ZipInfo of its own has no time of day in it: the same model gives the same file.
            member = zipfile.ZipInfo(f"{path.stem}/{name}")
            member.file_size = len(data)
            with archive.open(member, "w") as file:
                file.write(data)

        for number, (name, array) in enumerate(tensors):
            put(f"data/{number}", np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
            storage = [pickle.MARK, _pickled("storage"), _global("torch", names[array.dtype]), _pickled(str(number)), _pickled("cpu")]
            storage += [_pickled(array.size), pickle.TUPLE, pickle.BINPERSID]
            hooks = [_global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE]
            arguments = [*storage, _pickled(0), _pickled(array.shape), _pickled(strides), pickle.NEWFALSE, *hooks]
            pieces += [_pickled(name), _global("torch._utils", "_rebuild_tensor_v2"), pickle.MARK, *arguments, pickle.TUPLE, pickle.REDUCE]
        put("data.pkl", b"".join([*pieces, pickle.SETITEMS, pickle.STOP]))
        put("byteorder", b"little")
        put("version", b"3\n")


def _pickled(value) -> bytes:
    """The code of a value without the frame of a pickle."""
    return pickle.dumps(value, 2)[2:-1]


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
