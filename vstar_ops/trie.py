"""The catalogue of legal semantic IDs as a level-ordered prefix trie."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _trie_building as building
from ._files import replacing

if TYPE_CHECKING:
    from .restricted_trie import RestrictedTrie

_FORMAT, _WITHOUT_CHECKSUM = "vstar_ops.trie.v2", "vstar_ops.trie.v1"


class Children(NamedTuple):
    """The legal children of nodes; both int32 ``[*node.shape, C]``, ``-1`` past the last child."""

    token: Tensor
    node: Tensor


class CompactTrie(NamedTuple):
    """A trie over the columns ``0 .. C - 1``, and the tokens that these stand for, int64 ``[C]``, rising."""

    trie: Trie
    columns: Tensor


class Trie:
    """All legal prefixes of a catalogue of items, each written as ``L`` tokens.

    Nodes are numbered level by level, and lexicographically within a level: the root is node 0, the
    nodes of depth ``d`` are ``level_offset[d] .. level_offset[d + 1] - 1``, and the children of a node
    are contiguous and sorted by token. Node ``n`` has the edges ``offset[n] .. offset[n + 1] - 1``; edge
    ``e`` carries ``token[e]`` and leads to node ``e + 1``. ``-1`` is the dead node: it has no children
    and no items, and stays dead in every method.

    Build one with :meth:`from_sequences` or :meth:`load`. A trie is immutable. :meth:`compact` numbers its
    tokens anew where they are few of many columns.

    Attributes:
        offset: int32 ``[T + 1]``, the first edge of each node.
        token: int32 ``[T - 1]``, the token of each edge (a column of the logits).
        item_offset: int32 ``[num_sequences + 1]``, the first item of each leaf.
        item_ids: int64 ``[num_items]``, item ids in the order of their sequences; items that share a
            sequence (an SID collision) keep the order in which they were given.
        level_offset: tuple of ``L + 2`` ints.
        length: ``L``, tokens per sequence.
        max_token: the largest token, ``-1`` in an empty trie; logits need more columns than that.
        max_children: the largest number of children of any node.
        only_leaf: int32 ``[T]``, the leaf that each node leads to without a choice (all nodes below it have
            one child), ``-1`` for nodes with a choice below them; a leaf leads to itself. It is computed at
            its first use, on the trie's device, and no file holds it.
        alive: None, or of a :class:`vstar_ops.RestrictedTrie` the nodes that have an allowed item, as bits.

    Example:
        >>> trie = Trie.from_sequences([[0, 3], [0, 4], [2, 3]], item_ids=[70, 71, 72])
        >>> trie.lookup(torch.tensor([[0], [1], [2]]))
        tensor([ 1, -1,  2], dtype=torch.int32)
        >>> trie.children(1).token
        tensor([3, 4], dtype=torch.int32)
        >>> trie.items(2)
        tensor([72])
    """

    def __init__(
        self,
        offset: Tensor,
        token: Tensor,
        item_offset: Tensor,
        item_ids: Tensor,
        level_offset: tuple[int, ...],
        max_children: int,
        max_token: int,
    ) -> None:
        """Take ready arrays without checking them; users call :meth:`from_sequences` or :meth:`load`."""
        self.offset = offset
        self.token = token
        self.item_offset = item_offset
        self.item_ids = item_ids
        self.level_offset = level_offset
        self.max_children = max_children
        self.max_token = max_token
        self.length = len(level_offset) - 2
        self.alive: Tensor | None = None
        self._leaf: Tensor | None = None
        self._links: Any = None  # of filters, made at the first one
        self._id_index: Any = None

    @property
    def num_nodes(self) -> int:
        """Legal prefixes, the empty one (the root) included."""
        return self.level_offset[-1]

    @property
    def num_sequences(self) -> int:
        """Distinct full sequences (leaves)."""
        return self.level_offset[-1] - self.level_offset[-2]

    @property
    def num_items(self) -> int:
        """Items; more than ``num_sequences`` where sequences collide."""
        return self.item_ids.numel()

    @property
    def device(self) -> torch.device:
        """Where the arrays live."""
        return self.offset.device

    @property
    def unrestricted(self) -> Trie:
        """This trie, or the whole catalogue that a restricted one is a view of."""
        return self

    @property
    def only_leaf(self) -> Tensor:
        """The leaf that each node leads to without a choice, else -1; see the class."""
        return self._only_leaf[:-1]

    @property
    def _only_leaf(self) -> Tensor:
        """:attr:`only_leaf`, and -1 behind it, which the dead node -1 finds as the last one; made once."""
        if self._leaf is None:  # no cached_property, which torch.compile does not read
            self._leaf = self._find_only_leaf()
        return self._leaf

    def _find_only_leaf(self) -> Tensor:
        leaf = torch.arange(self.num_nodes + 1, dtype=torch.int32, device=self.device)
        leaf[-1] = -1
        for first, end in zip(self.level_offset[-3::-1], self.level_offset[-2::-1]):  # bottom-up
            begin, last = self.offset[first:end].long(), self.offset[first + 1 : end + 1].long()
            child = (begin + 1).clamp(max=self.num_nodes - 1)
            leaf[first:end] = torch.where(last - begin == 1, leaf[child], -1)
        return leaf

    def __repr__(self) -> str:
        levels = " -> ".join(str(b - a) for a, b in zip(self.level_offset, self.level_offset[1:]))
        return f"Trie({self.num_items} items, nodes per level {levels}, device={self.device})"

    @classmethod
    def from_sequences(cls, sequences: Any, item_ids: Any = None) -> Trie:
        """Build the trie of a catalogue, by one sort.

        Args:
            sequences: ints ``[N, L]``, one row an item, as a tensor, array or nested list; values in
                ``[0, 2^31 - 1)``; ``N`` may be 0 and rows may repeat.
            item_ids: ints ``[N]``, by default the row numbers; any int64 but -1, which pads :meth:`items`.

        Raises:
            TypeError: values are not integers.
            ValueError: wrong shape, a negative or too large token, more than 2^31 - 2 prefixes, an item id
                that is -1 or does not fit in int64.
        """
        rows = building.catalogue(sequences)
        num, length = rows.shape
        building.check_size(num, length)
        order = building.lexicographic_order(rows)
        ids = order if item_ids is None else building.ids(item_ids, num)[order]
        return cls._of(building.build([rows[order, depth] for depth in range(length)], ids))

    def with_items(self, sequences: Any, item_ids: Any = None) -> Trie:
        """A trie that has more items, by a merge: a catalogue that grows is not sorted again.

        This trie stays as it is, and so does a search that runs on it; the next call takes the new one. Nodes
        are numbered anew.

        Args:
            sequences: ints ``[M, L]``, one row per item, as for :meth:`from_sequences`.
            item_ids: ints ``[M]``, by default the numbers after the largest id.

        Returns:
            What :meth:`from_sequences` makes of all items, those of this trie first; on its device.

        Raises:
            TypeError, ValueError: as :meth:`from_sequences`, or rows of another length.
        """
        rows, arrays = building.catalogue(sequences), self._arrays()
        if rows.shape[1] != self.length:
            raise ValueError(
                f"sequences must have the shape [M, L] with L = {self.length}, got {list(rows.shape)}"
            )
        building.check_size(self.num_items + len(rows), self.length)
        if item_ids is None:
            largest = max(int(arrays.item_ids.max()), -1) if self.num_items else -1
            if largest > 2**63 - 1 - len(rows):
                raise ValueError(f"item_ids must be given where the largest id is {largest}, got None")
            ids = largest + 1 + np.arange(len(rows))
        else:
            ids = building.ids(item_ids, len(rows))
        return self._of(building.merged(arrays, rows, ids)).to(self.device)

    def without_items(self, item_ids: Any) -> Trie:
        """A trie that has fewer items, as :meth:`with_items` makes one that has more.

        Args:
            item_ids: ints ``[M]``; all items of these ids are left out.

        Returns:
            What :meth:`from_sequences` makes of the other items; on the device of this trie.

        Raises:
            TypeError: they are not integers.
            ValueError: this trie has no item of some id.
        """
        gone = building.integers("item_ids", item_ids).reshape(-1)
        return self._of(building.without(self._arrays(), gone)).to(self.device)

    def restrict(self, allow: Any = None, *, ban: Any = None) -> RestrictedTrie:
        """A view under which only the items of ``allow`` that are not in ``ban`` can be found.

        Whatever takes a trie takes the view, and finds what it would find with a catalogue of these alone.

        Args:
            allow, ban: one of them, or both: item ids ``[M]``, or a mask ``[num_items]`` in the order of
                ``item_ids``. With a dimension more each request has a filter of its own: ids ``[B, M]``,
                padded with -1, or ``B`` lists of any lengths; or a mask ``[B, num_items]``. All items of an
                id are meant. An unknown id is skipped in ``ban``, as that of a sold out item in a user's
                history, and an error in ``allow``, for which the values are looked at.

        Returns:
            A :class:`vstar_ops.RestrictedTrie`, which can be changed in place, and restricted further.

        Raises:
            TypeError: neither is given, or one is neither integers nor bools.
            ValueError: a wrong shape, another number of requests, an unknown id in ``allow``.

        Example:
            >>> trie = Trie.from_sequences([[0, 3], [0, 4], [2, 3]], item_ids=[70, 71, 72])
            >>> in_stock = trie.restrict(ban=[71])
            >>> not_seen = in_stock.restrict(ban=[[70], []])  # of two users
            >>> not_seen.items([0, 0])
            tensor([[72, -1],
                    [70, 72]])
        """
        from .restricted_trie import restrict

        return restrict(self, allow, ban)

    @classmethod
    def _of(cls, arrays: building.Arrays) -> Trie:
        offset, token, item_offset, item_ids = map(torch.from_numpy, arrays[:4])
        widest, largest = int(np.diff(arrays.offset).max()), int(arrays.token.max(initial=-1))
        return Trie(offset, token, item_offset, item_ids, arrays.level_offset, widest, largest)

    def _arrays(self) -> building.Arrays:
        offset, token, item_offset, item_ids = (getattr(self, name).cpu().numpy() for name in _ARRAYS)
        return building.Arrays(offset, token, item_offset, item_ids, self.level_offset)

    def to(self, device: torch.device | str | int) -> Trie:
        """The same trie with its arrays on ``device``."""
        offset, token, item_offset, ids = (getattr(self, name).to(device) for name in _ARRAYS)
        return Trie(offset, token, item_offset, ids, self.level_offset, self.max_children, self.max_token)

    def compact(self) -> CompactTrie:
        """The same trie with the tokens that occur in it numbered ``0 .. C - 1``, in their order.

        SID tokens are few among the columns of a language model's vocabulary. Logits of these columns alone,
        ``logits[..., columns]``, are all that the compact trie needs under ``normalize="legal"``, and a head
        that computes no others saves most of a decode. Nodes keep their numbers, so ``trie.lookup``,
        ``trie.sequences`` and ``trie.items`` of the trie given here take and give what they always did. All
        arrays but ``token`` are shared.

        Returns:
            ``(trie, columns)``: ``columns[trie.token] == self.token``.

        Example:
            >>> catalogue = Trie.from_sequences([[900, 930], [900, 931], [902, 930]])
            >>> trie, columns = catalogue.compact()
            >>> columns
            tensor([900, 902, 930, 931])
            >>> trie.sequences(trie.lookup([[1, 2]]))
            tensor([[1, 2]], dtype=torch.int32)
            >>> catalogue.sequences(trie.lookup([[1, 2]]))
            tensor([[902, 930]], dtype=torch.int32)
        """
        columns, token = torch.unique(self.token, return_inverse=True)
        arrays = (self.offset, token.int(), self.item_offset, self.item_ids)
        trie = Trie(*arrays, self.level_offset, self.max_children, max_token=columns.numel() - 1)
        trie._leaf, trie._links, trie._id_index = self._leaf, self._links, self._id_index
        return CompactTrie(trie, columns.long())

    # ---------------------------------------------------------------- walking

    def lookup(self, prefixes: Any) -> Tensor:
        """The nodes of token prefixes.

        Args:
            prefixes: ints ``[..., l]`` with ``0 <= l <= L``.

        Returns:
            int32 ``[...]``: the node of each prefix, ``-1`` where it is not legal; 0 for ``l = 0``.
        """
        tokens = self._indices("prefixes", prefixes)
        if tokens.ndim == 0 or tokens.shape[-1] > self.length:
            raise ValueError(
                f"prefixes must have the shape [..., l] with l <= {self.length}, got {list(tokens.shape)}"
            )
        node = torch.zeros(tokens.shape[:-1], dtype=torch.int64, device=self.device)
        for wanted in tokens.unbind(-1):
            node = self._child(node, wanted)
        return node.to(torch.int32)

    def _child(self, node: Tensor, wanted: Tensor) -> Tensor:
        """The child of each node by one token: a binary search in all rows at once, no host sync."""
        low, end = self._edges(node)
        if self.token.numel() == 0:
            return torch.full_like(node, -1)
        high, last = end, self.token.numel() - 1
        # The bits of max_children: torch.compile keeps to their number, and not to max_children itself.
        for _ in range(next(bits for bits in range(32) if self.max_children < 2**bits)):
            middle = (low + high) // 2
            right = (low < high) & (self.token[middle.clamp(max=last)] < wanted)
            high = torch.where(right, high, torch.minimum(middle, high))
            low = torch.where(right, middle + 1, low)
        found = (low < end) & (self.token[low.clamp(max=last)] == wanted)
        return torch.where(found, low + 1, -1)

    def num_children(self, node: Any) -> Tensor:
        """int32 ``[...]``: the number of legal children of each node of ``node[...]``."""
        begin, end = self._edges(self._indices("node", node))
        return (end - begin).to(torch.int32)

    def children(self, node: Any) -> Children:
        """The legal children of nodes, sorted by token.

        Args:
            node: an int, or ints ``[...]``.

        Returns:
            ``(token, node)``, int32 ``[..., C]`` where ``C`` is the largest number of children among
            the nodes given, padded with ``-1``. For one int this is exactly its children, ``[C]``.
        """
        begin, end = self._edges(self._indices("node", node))
        edge, present = ragged(begin, end)
        return Children(pick(self.token, edge, present), torch.where(present, edge + 1, -1).to(torch.int32))

    def items(self, node: Any) -> Tensor:
        """The ids of all items at or below nodes.

        Args:
            node: an int, or ints ``[...]``.

        Returns:
            int64 ``[..., M]`` where ``M`` is the largest number of items among the nodes given, padded
            with ``-1``, in the order of their sequences. For one int exactly its items, ``[M]``.
        """
        begin, end = self.item_range(node)
        position, present = ragged(begin, end)
        return pick(self.item_ids, position, present)

    def item_range(self, node: Any) -> tuple[Tensor, Tensor]:
        """int64 ``begin[...]``, ``end[...]``: the items at or below a node are ``item_ids[begin:end]``."""
        first = last = self._indices("node", node)
        live = (first >= 0) & (first < self.num_nodes)
        for _ in range(self.length):  # walk to the first and the last leaf below
            begin, end = self._edges(first)
            first = torch.where(end > begin, begin + 1, first)
            begin, end = self._edges(last)
            last = torch.where(end > begin, end, last)
        live &= first >= self.level_offset[-2]  # only an empty trie's root has no leaf below
        first = torch.where(live, first - self.level_offset[-2], 0)
        last = torch.where(live, last - self.level_offset[-2] + 1, 0)
        return self.item_offset[first].to(torch.int64), self.item_offset[last].to(torch.int64)

    def parent(self, node: Any) -> Tensor:
        """int32 ``[...]``: the parent of each node; ``-1`` for the root and the dead node."""
        index = self._indices("node", node)
        above = torch.searchsorted(self.offset, (index - 1).to(torch.int32), right=True) - 1
        return torch.where((index > 0) & (index < self.num_nodes), above, -1).to(torch.int32)

    def depth(self, node: Any) -> Tensor:
        """int32 ``[...]``: the number of tokens of each node's prefix; ``-1`` for the dead node."""
        index = self._indices("node", node)
        level = torch.zeros_like(index)
        for first in self.level_offset[
            1:-1
        ]:  # few, and a tensor of them would have to be copied from the host
            level += index >= first
        return torch.where((index >= 0) & (index < self.num_nodes), level, -1).to(torch.int32)

    def sequences(self, node: Any) -> Tensor:
        """The prefixes of nodes, the inverse of :meth:`lookup`.

        Returns:
            int32 ``[..., L]``, ``-1`` past the end of prefixes shorter than ``L``.
        """
        index = self._indices("node", node)
        level = self.depth(index).to(torch.int64)
        out = torch.full((*index.shape, self.length), -1, dtype=torch.int32, device=self.device)
        for position in reversed(range(self.length)):
            here = level > position
            out[..., position] = pick(self.token, index - 1, here)
            index = torch.where(here, self.parent(index).to(torch.int64), index)
        return out

    def _edges(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """The int64 edge range of nodes; empty for whatever is not a node."""
        live = (node >= 0) & (node < self.num_nodes)
        index = torch.where(live, node, 0)
        begin = self.offset[index].to(torch.int64)
        return begin, torch.where(live, self.offset[index + 1].to(torch.int64), begin)

    def _indices(self, name: str, value: Any) -> Tensor:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(building.integers(name, value))
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {tensor.dtype}")
        return tensor.to(self.device, torch.int64)

    # ---------------------------------------------------------------- storage

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trie to one safetensors file, atomically: a reader sees the old or the new file."""
        from safetensors.torch import save_file

        meta = {"level_offset": self.level_offset, "max_children": self.max_children}
        arrays = {name: getattr(self, name).cpu().contiguous() for name in _ARRAYS}
        text = json.dumps(meta)
        metadata = {"format": _FORMAT, "trie": text, "checksum": _checksum(text, arrays)}
        with replacing(Path(path)) as temporary:
            save_file(arrays, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Trie:
        """Read a trie written by :meth:`save`. The file is memory-mapped, not copied.

        Args:
            path: the file.
            verify: compare the checksum in the file with that of its contents and check that the arrays
                form a trie, which reads all of them. Without it only sizes are checked and pages are read
                when they are first used.

        Raises:
            ValueError: the file is not a trie of this format, or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                info = file.metadata() or {}
                if info.get("format") not in (_FORMAT, _WITHOUT_CHECKSUM):
                    raise ValueError(f"{path}: expected the format {_FORMAT!r}, got {info.get('format')!r}")
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
                meta = json.loads(info["trie"])
                levels = tuple(int(x) for x in meta["level_offset"])
                widest = int(meta["max_children"])
        except (SafetensorError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a trie file, or damaged ({error!r})") from error
        except ValueError as error:
            raise ValueError(
                str(error) if str(path) in str(error) else f"{path}: damaged ({error})"
            ) from error
        offset, token, item_offset = arrays["offset"], arrays["token"], arrays["item_offset"]
        sound = (
            len(levels) >= 3
            and offset.numel() == levels[-1] + 1
            and token.numel() == levels[-1] - 1
            and item_offset.numel() == levels[-1] - levels[-2] + 1
            and all(a.dtype == torch.int32 for a in (offset, token, item_offset))
        )
        if sound and verify:
            known = info["format"] == _WITHOUT_CHECKSUM
            if not known and info.get("checksum") != _checksum(info["trie"], arrays):
                raise ValueError(f"{path}: damaged, its contents do not have the checksum that it names")
            sound = building.is_trie(arrays, levels, widest)
        if not sound:
            raise ValueError(f"{path}: damaged, its arrays do not form a trie")
        # Leaves are siblings in runs sorted by token, so the maximum needs every edge; it is one pass
        # over int32 and the only one that an unverified load makes.
        highest = int(token.max()) if token.numel() else -1
        return Trie(offset, token, item_offset, arrays["item_ids"], levels, widest, highest)


_ARRAYS = ("offset", "token", "item_offset", "item_ids")


def _checksum(meta: str, arrays: dict[str, Tensor]) -> str:
    """Of all that a file holds: any change of a bit gives another one."""
    digest = hashlib.blake2b(meta.encode(), digest_size=16)
    for name in _ARRAYS:
        digest.update(f"{name} {arrays[name].dtype} {list(arrays[name].shape)}".encode())
        digest.update(arrays[name].numpy().tobytes())
    return digest.hexdigest()


def ragged(begin: Tensor, end: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions ``[..., C]`` of the ranges ``begin[...] .. end[...] - 1``, and which of them exist.

    ``C`` is ``width``, or the longest of the ranges, which the host waits for.
    """
    if width is None:
        width = int((end - begin).max()) if begin.numel() else 0
    position = begin.unsqueeze(-1) + torch.arange(width, device=begin.device)
    return position, position < end.unsqueeze(-1)


def pick(source: Tensor, index: Tensor, present: Tensor) -> Tensor:
    """``source[index]`` where present, else -1."""
    if source.numel() == 0:
        return torch.full(index.shape, -1, dtype=source.dtype, device=source.device)
    return torch.where(present, source[torch.where(present, index, 0)], -1)
