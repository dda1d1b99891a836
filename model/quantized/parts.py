"""The stored tensors that make up one quantized weight: looked up by the names of their format, checked, read.

Headers are checked before anything is read, so that what is wrong is said at once. Runs in the worker process.

Legend: N outputs, K inputs of a weight [N, K]; a grid [R, C] has one value for each of its blocks.
"""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from model.errors import CheckpointError
from model.quantized.config import Block
from model.quantized.grids import Shape, grid_shape
from model.stored_tensors import StoredTensor

FLOATS = ("F32", "BF16", "F16", "F8_E8M0")
"""What scales are stored as; the last has powers of two alone."""
INDICES = ("I32", "I64")


class Parts:
    """What is stored under a module's name, by what follows it. `read` takes a tensor from its file."""

    def __init__(
        self, module: str, headers: Mapping[str, StoredTensor], read: Callable[[StoredTensor], Tensor]
    ) -> None:
        self.module = module
        self.headers = headers
        self._read = read

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    @property
    def plain(self) -> bool:
        """Whether all there is is a weight in 16 or more bits."""
        dtype = self.headers["weight"].dtype if len(self.headers) == 1 and "weight" in self else None
        return dtype is not None and dtype.itemsize > 1

    def check(self, name: str, kinds: Iterable[str], *shapes: Shape) -> Shape:
        """The shape of a part that must be there, of one of these types and shapes (none given: any matrix).

        Raises: CheckpointError, naming the tensor.
        """
        self.check_kind(name, kinds)
        header = self._header(name)
        if shapes and header.shape not in shapes:
            raise header.refused(f"has shape {list(header.shape)}; its weight asks for {list(shapes[0])}")
        if not shapes and len(header.shape) != 2:
            raise header.refused(f"has shape {list(header.shape)}; a matrix has two dimensions")
        return header.shape

    def check_kind(self, name: str, kinds: Iterable[str]) -> str:
        """The type of a part that must be there, as files name it, and one of these."""
        header = self._header(name)
        if header.kind not in kinds:
            raise header.refused(f"is stored as {header.kind}; its format has {' or '.join(kinds)} there")
        return header.kind

    def check_grid(self, name: str, kinds: Iterable[str], shape: Shape, *blocks: Block) -> Block:
        """Which of these blocks a part has a value for each of, given the weight's shape; the first that fits."""
        forms = {form: block for block in reversed(blocks) for form in _forms(*grid_shape(shape, block))}
        expected = _forms(*grid_shape(shape, blocks[0]))
        return forms[self.check(name, kinds, *expected, *forms)]

    def tensor(self, name: str) -> Tensor:
        return self._read(self._header(name))

    def grid(self, name: str, shape: Shape, block: Block) -> Tensor:
        return self.tensor(name).reshape(grid_shape(shape, block))

    def groups(self, name: str, num_groups: int) -> Tensor | None:
        """The group of each input [K]; None where there is no such part, or it was never filled (-1): in order.

        Raises: CheckpointError if there is no such group.
        """
        if name not in self:
            return None
        groups = self.tensor(name).long()
        if bool((groups == -1).any()):
            return None
        if bool(((groups < 0) | (groups >= num_groups)).any()):
            raise self._header(name).refused(f"names groups beyond the {num_groups} that there are")
        return groups

    def refused(self, name: str, reason: str) -> CheckpointError:
        return self._header(name).refused(reason)

    def _header(self, name: str) -> StoredTensor:
        if name in self.headers:
            return self.headers[name]
        beside = next(iter(self.headers.values()))
        missing, file = f"{self.module}.{name}", beside.file.name
        message = f"{file}: tensor {missing!r} is missing; {beside.name!r} cannot be read without it"
        raise CheckpointError(message, file=file, tensor=missing)


def _forms(rows: int, columns: int) -> tuple[Shape, ...]:
    """How a grid may be stored: one of a single column without its second dimension, of a single value without any."""
    if columns > 1:
        return ((rows, columns),)
    return ((rows, 1), (rows,), ()) if rows == 1 else ((rows, 1), (rows,))
