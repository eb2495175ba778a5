"""A catalogue under a filter: stock, age, region, what a user has already bought."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _trie_building as building
from .ops.filters import ItemFilter, filter_items
from .reference.filters import bits_at, num_words, pack_bits, unpack_bits
from .trie import Children, CompactTrie, Trie, pick, ragged

_IDS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class RestrictedTrie(Trie):
    """A view of a catalogue under which only some items can be found; :meth:`Trie.restrict` makes it.

    The arrays, the numbers of nodes, ``num_items``, ``max_children``, ``only_leaf`` and their like are those
    of the catalogue, and so are ``parent``, ``depth`` and ``sequences`` of any node. ``lookup``,
    ``children``, ``num_children`` and ``items`` leave out what is not allowed. Where there is a filter per
    request, the first dimension of what they take is the request: ``node[B, ...]``.

    :meth:`update` and :meth:`reset` change the filter in place: the next call of an op sees it, also in a
    CUDA graph that was captured before, and under ``torch.compile`` nothing is compiled again.
    A view of a view keeps to what the other allowed when it was made or reset; it allows no item that the
    other does not allow now.

    A filter takes a bit per node and one per item, 0.3 to 0.5 MB for a million items; so much for each
    request where they have filters of their own. The first filter of a catalogue finds out how to go up in
    it and where ids are, which takes 4 bytes per node and about 24 per item, once.

    Attributes:
        alive: int32 ``[R, words]``, ``R = 1`` for one filter of all requests, else ``R = B``: bit ``n & 31``
            of word ``n >> 5`` says that an allowed item lies at or below node ``n``.
        bits: :class:`vstar_ops.ItemFilter`, ``alive`` and the same of the items.

    Example:
        >>> trie = Trie.from_sequences([[0, 3], [0, 4], [2, 3]], item_ids=[70, 71, 72])
        >>> view = trie.restrict(ban=[71])
        >>> view.update(allow=[71], ban=[72])
        >>> view.allowed
        tensor([[ True,  True, False]])
        >>> view.lookup([[0, 4], [2, 3]])
        tensor([ 4, -1], dtype=torch.int32)
    """

    def __init__(self, catalogue: Trie, within: RestrictedTrie | None, bits: ItemFilter) -> None:
        """Take what belongs together; users call :meth:`Trie.restrict`."""
        c = catalogue
        arrays = c.offset, c.token, c.item_offset, c.item_ids
        super().__init__(*arrays, c.level_offset, c.max_children, c.max_token)
        self._catalogue, self._within, self.bits, self.alive = c, within, bits, bits.alive

    @property
    def unrestricted(self) -> Trie:
        """The whole catalogue."""
        return self._catalogue

    @property
    def num_requests(self) -> int:
        """Requests that have filters of their own; 1 if there is one for all."""
        return len(self.bits.alive)

    @property
    def allowed(self) -> Tensor:
        """Which items are allowed, bool ``[R, num_items]`` in the order of ``item_ids``; a copy."""
        return unpack_bits(self.bits.allowed, self.num_items)

    @property
    def _only_leaf(self) -> Tensor:
        return self._catalogue._only_leaf

    def __repr__(self) -> str:
        whom = f"for {self.num_requests} requests" if self.num_requests > 1 else "for all requests"
        return f"{super().__repr__()[:-1]}, restricted {whom})"

    # ---------------------------------------------------------------- changes

    def update(self, allow: Any = None, *, ban: Any = None) -> None:
        """Allow some items, then ban some; all others stay as they are.

        With ids this costs what the listed items cost, not what the catalogue does; a mask costs a pass over
        all of it. With ids on the trie's device the host waits for nothing, once the first ones were looked
        up.

        Args:
            allow, ban: as for :meth:`Trie.restrict`, of all requests or with a row for each; of a mask the
                items that are True. Unknown ids are skipped. What both name is banned.

        Raises:
            TypeError, ValueError: as :meth:`Trie.restrict`.
        """
        for selection in self._given(allow, ban):
            self._change(selection)

    def reset(self, allow: Any = None, *, ban: Any = None) -> None:
        """Begin again in the same memory: allowed is what :meth:`Trie.restrict` would allow now.

        Args:
            allow, ban: as for :meth:`Trie.restrict`; ``ban=[]`` lifts the filter.

        Raises:
            TypeError, ValueError: as :meth:`Trie.restrict`.
        """
        given = self._given(allow, ban, known=True)
        self._begin(from_nothing=allow is not None)
        for selection in given:
            self._change(selection)

    def _given(self, allow: Any, ban: Any, known: bool = False) -> list[_Selection]:
        given = _selections(self, allow, ban, known)
        for selection in given:
            selection.check(self.num_requests)
        return given

    def _begin(self, from_nothing: bool) -> None:
        if from_nothing or self.num_items == 0:
            self.bits.alive.zero_()
            self.bits.allowed.zero_()
        elif self._within is not None:
            self.bits.alive.copy_(self._within.bits.alive)
            self.bits.allowed.copy_(self._within.bits.allowed)
        else:
            for bits, number in ((self.bits.alive, self.num_nodes), (self.bits.allowed, self.num_items)):
                bits.fill_(-1)
                bits[:, number >> 5 :] = 0
                bits[:, number >> 5] = (1 << (number & 31)) - 1

    def _change(self, selection: _Selection) -> None:
        within = None if self._within is None else self._within.bits.allowed
        row = None
        if selection.is_mask:
            mask, allowed = pack_bits(selection.value), self.bits.allowed
            if selection.allow:
                allowed |= mask if within is None else mask & within
            else:
                allowed &= ~mask
        else:
            row = _rows(self._catalogue, selection.value).flatten(1).expand(self.num_requests, -1)
        filter_items(self.bits, self._catalogue, row, allow=selection.allow, within=within)

    # ---------------------------------------------------------------- walking

    def lookup(self, prefixes: Any) -> Tensor:
        """As :meth:`Trie.lookup`; -1 also for prefixes without an allowed item."""
        node = super().lookup(prefixes)
        return torch.where(self._is_alive("prefixes", node, node), node, -1)

    def num_children(self, node: Any) -> Tensor:
        """int32 ``[...]``: the number of children that have an allowed item."""
        return (self.children(node).node >= 0).sum(-1, dtype=torch.int32)

    def children(self, node: Any) -> Children:
        """As :meth:`Trie.children`, of those that have an allowed item."""
        node = self._indices("node", node)
        token, child = super().children(node)
        packed = _packed(self._is_alive("node", node, child))
        return Children(packed(token), packed(child))

    def items(self, node: Any) -> Tensor:
        """As :meth:`Trie.items`, of those that are allowed."""
        node = self._indices("node", node)
        begin, end = self._catalogue.item_range(node)
        position, present = ragged(begin, end)
        position = torch.where(present, position, -1)
        position = _packed(self._bits("node", node, self.bits.allowed, position))(position)
        return pick(self.item_ids, position, position >= 0)

    def item_range(self, node: Any) -> tuple[Tensor, Tensor]:
        """Refused: allowed items do not lie side by side."""
        raise NotImplementedError("a restricted trie has no item_range: use items")

    def _is_alive(self, name: str, node: Tensor, index: Tensor) -> Tensor:
        return self._bits(name, node, self.bits.alive, index)

    def _bits(self, name: str, node: Tensor, bits: Tensor, index: Tensor) -> Tensor:
        """The bits ``[R, words]`` at ``index``, whose first dimension is that of ``node``; none at -1."""
        requests = self.num_requests
        if requests == 1:
            request = torch.zeros((), dtype=torch.int64, device=self.device)
        elif node.ndim and len(node) == requests:
            request = torch.arange(requests, device=self.device).view(-1, *(1,) * (index.ndim - 1))
        else:
            raise ValueError(
                f"{name} must have one row for each of the {requests} requests of the trie's filter, got "
                f"{list(node.shape)} nodes"
            )
        return (index >= 0) & bits_at(bits, request, index.clamp(min=0).long())

    # ---------------------------------------------------------------- copies

    def to(self, device: torch.device | str | int) -> RestrictedTrie:
        """The same view on ``device``; where it is there already, with the same filter, else with a copy."""
        catalogue, bits = self._catalogue.to(device), self.bits
        within = None if self._within is None else self._within.to(device)
        return RestrictedTrie(catalogue, within, ItemFilter(bits.alive.to(device), bits.allowed.to(device)))

    def compact(self) -> CompactTrie:
        """As :meth:`Trie.compact`. Both views have the same filter: what changes one changes the other."""
        trie, columns = self._catalogue.compact()
        return CompactTrie(RestrictedTrie(trie, self._within, self.bits), columns)

    def with_items(self, sequences: Any, item_ids: Any = None) -> Trie:
        """Refused: nodes would be numbered anew, and new items be neither allowed nor banned."""
        raise NotImplementedError(_GROW.format("with_items"))

    def without_items(self, item_ids: Any) -> Trie:
        """Refused, as :meth:`with_items`; ``update(ban=item_ids)`` keeps the nodes."""
        raise NotImplementedError(_GROW.format("without_items"))

    def save(self, path: Any) -> None:
        """Refused: a file holds a catalogue, and no filter."""
        raise NotImplementedError("a restricted trie is not saved: use unrestricted.save, and restrict again")


_GROW = "a restricted trie has no {0}: use unrestricted.{0}, and restrict the result"


def restrict(trie: Trie, allow: Any, ban: Any) -> RestrictedTrie:
    """See :meth:`Trie.restrict`."""
    within = trie if isinstance(trie, RestrictedTrie) else None
    given = _selections(trie, allow, ban, known=True)
    requests = 1 if within is None else within.num_requests
    if requests == 1:
        requests = max((x.requests for x in given if x.requests is not None), default=1)
    for selection in given:
        selection.check(requests)
    words = num_words(trie.num_nodes), num_words(trie.num_items)
    bits = (torch.empty(requests, n, dtype=torch.int32, device=trie.device) for n in words)
    view = RestrictedTrie(trie.unrestricted, within, ItemFilter(*bits))
    view._begin(from_nothing=allow is not None)
    for selection in given:
        view._change(selection)
    return view


class _Selection(NamedTuple):
    """Ids int64 ``[r, M]``, or a mask bool ``[r, num_items]``; ``r`` is ``requests``, or 1 for None."""

    allow: bool
    value: Tensor
    requests: int | None

    @property
    def name(self) -> str:
        return "allow" if self.allow else "ban"

    @property
    def is_mask(self) -> bool:
        return self.value.dtype == torch.bool

    def check(self, requests: int) -> None:
        if self.requests not in (None, requests):
            whom = f"for each of the {requests} requests" if requests != 1 else "for all requests"
            raise ValueError(
                f"{self.name} must have one row {whom} of the trie's filter, got {self.requests}"
            )


def _selections(trie: Trie, allow: Any, ban: Any, known: bool) -> list[_Selection]:
    """What is given. Of ids to allow each must be ``known``."""
    if allow is None and ban is None:
        raise TypeError("allow or ban must be given, got neither; ban=[] bans nothing")
    given = []
    if allow is not None:
        given.append(_selection(True, allow, trie))
        ids = given[0].value
        if known and not given[0].is_mask:
            missing = ids[(_rows(trie, ids)[..., 0] < 0) & (ids != -1)]
            if len(missing):
                raise ValueError(
                    f"allow must hold ids of the trie's items, got {int(missing[0])}, which is none"
                )
    if ban is not None:
        given.append(_selection(False, ban, trie))
    return given


def _selection(allow: bool, value: Any, trie: Trie) -> _Selection:
    name = "allow" if allow else "ban"
    x = value if isinstance(value, Tensor) else torch.from_numpy(_array(name, value))
    if x.dtype != torch.bool and x.dtype not in _IDS:
        raise TypeError(f"{name} must be item ids (integers) or a mask (bools), got {x.dtype}")
    is_mask = x.dtype == torch.bool
    if x.ndim not in (1, 2) or (is_mask and x.shape[-1] != trie.num_items):
        shape = f"[{trie.num_items}] or [B, {trie.num_items}]" if is_mask else "[M] or [B, M]"
        raise ValueError(f"{name} must have the shape {shape}, got {list(x.shape)}")
    requests = None if x.ndim == 1 else len(x)
    x = x.to(trie.device, torch.bool if is_mask else torch.int64)
    return _Selection(allow, x[None] if requests is None else x, requests)


def _array(name: str, value: Any) -> np.ndarray:
    """Ids or a mask as an array; lists of several lengths are padded with -1."""
    if isinstance(value, (set, frozenset)):
        value = list(value)
    if isinstance(value, Tensor):
        value = value.cpu().numpy()
    if isinstance(value, (list, tuple)) and len(value):
        if isinstance(value[0], (list, tuple, set, frozenset)) or np.ndim(value[0]) > 0:
            return _padded(name, [_array(name, row) for row in value])
        if isinstance(value[0], (bool, np.bool_)):
            value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype == bool:
        return value
    ids = building.integers(name, value)
    if ids.size and int(ids.max()) >= 2**63:
        raise ValueError(f"{name} must fit in int64, got {int(ids.max())}")
    return ids.astype(np.int64, copy=False)


def _padded(name: str, rows: list[np.ndarray]) -> np.ndarray:
    lengths = {row.shape for row in rows}
    if len(lengths) == 1:
        return np.stack(rows)
    if any(row.ndim != 1 or row.dtype == bool for row in rows):
        raise ValueError(f"{name} must be rectangular, got rows of the shapes {sorted(lengths)}")
    padded = np.full((len(rows), max(map(len, rows))), -1)
    for to, row in zip(padded, rows):
        to[: len(row)] = row
    return padded


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # of Fibonacci hashing (Knuth, TAOCP 3, 6.4)


class _IdIndex(NamedTuple):
    """Where items of an id are: a hash table, whose buckets are short whatever the ids."""

    ids: Tensor  # int64 [N], bucket by bucket, rising within one
    row: Tensor  # int32 [N], the positions of these in item_ids
    first: Tensor  # int32 [buckets + 1], where buckets begin
    bits: int  # of a bucket's number
    steps: int  # that find an id in the largest bucket
    most: int  # items of one id

    @classmethod
    def of(cls, item_ids: Tensor) -> _IdIndex:
        bits = len(item_ids).bit_length()
        ids, row = torch.sort(item_ids, stable=True)
        bucket, order = torch.sort(_bucket(ids, bits), stable=True)
        number = torch.bincount(bucket, minlength=2**bits)
        first = torch.cat([number.new_zeros(1), number.cumsum(0)]).int()
        most = int(torch.unique_consecutive(ids, return_counts=True)[1].max())
        return cls(ids[order], row[order].int(), first, bits, (int(number.max()) - 1).bit_length(), most)

    def find(self, ids: Tensor) -> Tensor:
        """The first place of each id, or any place for one that is not there. The host waits for nothing."""
        bucket = _bucket(ids, self.bits)
        low, high = self.first[bucket], self.first[bucket + 1] - 1
        for _ in range(self.steps):
            middle = (low + high).clamp(min=0) // 2
            right = self.ids[middle] < ids
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
        return low.clamp(max=len(self.ids) - 1)


def _bucket(ids: Tensor, bits: int) -> Tensor:
    return (ids * _GOLDEN >> 64 - bits) & 2**bits - 1


def _rows(trie: Trie, ids: Tensor) -> Tensor:
    """Positions in ``item_ids`` of the items that have the ids ``[r, M]``: int32 ``[r, M, most]``.

    ``most`` is the number of items of the most frequent id; -1 stands behind the last one. The host waits
    only for the index.
    """
    trie, ids = trie.unrestricted, ids[..., None]
    if trie.num_items == 0:
        return torch.full_like(ids, -1, dtype=torch.int32)
    if trie._id_index is None:
        trie._id_index = _IdIndex.of(trie.item_ids)
    index: _IdIndex = trie._id_index
    place = index.find(ids)
    if index.most > 1:
        place = (place + torch.arange(index.most, device=ids.device)).clamp(max=trie.num_items - 1)
    return torch.where(index.ids[place] == ids, index.row[place], -1)


def _packed(keep: Tensor) -> Callable[[Tensor], Tensor]:
    """Moves what is kept of ``[..., C]`` to the front, in its order; behind it comes -1."""
    width = int(keep.sum(-1).max()) if keep.numel() else 0
    order = torch.sort((~keep).byte(), dim=-1, stable=True).indices[..., :width]
    there = keep.gather(-1, order)
    return lambda x: torch.where(there, x.gather(-1, order), -1)
