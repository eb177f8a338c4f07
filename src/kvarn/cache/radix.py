"""`RadixPrefixCache`: a tree of blocks by the tokens they hold, shared by all that begin the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Self

from kvarn.cache.offload import OffloadIndex
from kvarn.cache.pool import BlockPool
from kvarn.cache.prefix import PrefixHit
from kvarn.cache.salt import Salt
from kvarn.cache.table import BlockTable
from kvarn.cache.tree import Branch, CommonNode, Declared, Node, Tokens


class RadixPrefixCache:
    """RadixAttention (Zheng et al. 2024, section 3) over the blocks of PagedAttention (Kwon et al. 2023).

    A node is a block, so a path is a list of blocks, and matching compares a slice a block. Blocks enter as soon as
    they are filled, also those of generated tokens, and a partly filled one when its sequence ends. A match goes to
    the token: it may end inside a block, which is then copied before it is written.

    Every table that holds a node's block holds the blocks of all nodes above it: `insert` puts the tree's blocks into
    the table for its own. Hence the order in which blocks became idle (`BlockPool`) is least recently used first and
    leaves before what they continue, and evicting a block is O(1). There are no more nodes than blocks; one takes
    about 1 KB.

    **What is private.** Each salt has a tree of its own. A request finds only what requests of its own salt have
    computed, and computes the same tokens in the same steps as if no other salt had sent the same text; so neither
    `cached_tokens` nor its time to first token tells what others sent. Salts share the pool's memory: that others send
    much can be seen by one's own blocks being evicted, as by waiting longer; what they send cannot.

    **What is common.** The whole blocks of the declared prefixes (the last, partly filled one is private). They are
    computed once for all salts and never evicted, so a request that begins with one may learn by its time whether
    anybody has used that prefix since the start. Declare what everybody may know, such as a system prompt.
    """

    def __init__(
        self,
        pool: BlockPool,
        shared_prefixes: Sequence[Sequence[int]] = (),
        tier: OffloadIndex | None = None,
    ) -> None:
        """shared_prefixes: token ids that any salt's requests may begin with, and share. tier: for evicted blocks."""
        self.pool = pool
        self.tier = OffloadIndex() if tier is None else tier
        self.num_evicted_tokens = 0
        declared = Declared(shared_prefixes, pool.block_size)
        self.num_reserved = declared.num_blocks
        self.root: Node = CommonNode((), -1, declared)
        self.root.name = self.tier.root()
        self._nodes: dict[int, Node] = {}
        """By block; those of declared prefixes are not in it."""
        self._common: list[CommonNode] = []

    def path(self, salt: Salt) -> RadixPath:
        """The place of a new sequence."""
        return RadixPath(self, self.root, salt)

    def evict(self, count: int, *, spill: bool = True) -> int:
        """Lets go of the least recently used blocks that no table holds; whole ones go to the tier with `spill`."""
        evicted = 0
        while evicted < count and (block := self.pool.oldest_idle) is not None:
            node = self._nodes[block]
            self.num_evicted_tokens += len(node.tokens)
            if spill:
                self._spill(node)
            self._remove(node)
            evicted += 1
        return evicted

    def spill_all(self) -> None:
        """Copies all that it holds to the tier, as far as there is room: the beginnings of texts first."""
        nodes = list(self._walk())
        for node in reversed(nodes[: self.tier.num_slots]):
            self._spill(node)

    def _spill(self, node: Node) -> None:
        if self.tier.num_slots and len(node.tokens) == self.pool.block_size:
            self.tier.save(self.name(node), node.block)

    def name(self, node: Node) -> bytes:
        """What the node's block goes by in the tier."""
        unnamed: list[Node] = []
        while (name := node.name) is None:
            unnamed.append(node)
            assert node.parent is not None
            node = node.parent
        for below in reversed(unnamed):
            tier = self.tier
            name = tier.branch(name, below.salt) if isinstance(below, Branch) else tier.after(name, below.tokens)
            below.name = name
        return name

    def offloaded(self, node: Node, salt: Salt, blocks: Iterable[Tokens]) -> Iterator[tuple[int, bytes]]:
        """(slot, name) in the tier of the blocks that follow `node`, up to the first that is not there."""
        name = self.name(node)
        declared = node.declared if isinstance(node, CommonNode) else None
        for tokens in blocks:
            if declared is not None:
                declared = declared.following.get(tokens)
                if declared is None:
                    name = self.tier.branch(name, salt)
            name = self.tier.after(name, tokens)
            slot = self.tier.find(name)
            if slot is None:
                return
            yield slot, name

    def find(self, node: Node, salt: Salt, tokens: Tokens) -> Node | None:
        """The block of `tokens` after `node`, for a sequence of that salt."""
        child = node.find(tokens)
        if child is None and isinstance(node, CommonNode) and (branch := node.branches.get(salt)) is not None:
            child = branch.find(tokens)
        return child

    def nearest(self, node: Node, salt: Salt, tokens: Tokens) -> tuple[int, Node | None]:
        """The block after `node` that begins with the most of `tokens`: their number, and it."""
        best = node.nearest(tokens)
        if isinstance(node, CommonNode) and (branch := node.branches.get(salt)) is not None:
            best = max(best, branch.nearest(tokens), key=lambda found: found[0])
        return best

    def file(self, node: Node, salt: Salt, tokens: Tokens, block: int) -> Node:
        """The node after `node` of all of `tokens`: the one that is there, or a new one with `block`."""
        if isinstance(node, CommonNode) and tokens in node.declared.following:
            return self._file_declared(node, tokens, block)
        if isinstance(node, CommonNode):
            node = node.branches.get(salt) or Branch(node, salt)
        length, near = node.nearest(tokens)
        if near is not None and length == len(tokens):
            return near
        if near is not None and length == len(near.tokens):
            self._remove(near)  # what it holds is a beginning of the new one
        child = Node(tokens, block, node)
        node.add(child)
        if isinstance(node, Branch):
            node.home.branches[node.salt] = node
        self.pool.keep(block)
        self._nodes[block] = child
        return child

    def _file_declared(self, node: CommonNode, tokens: Tokens, block: int) -> Node:
        child = node.find(tokens)
        if child is None:
            child = CommonNode(tokens, block, node.declared.following[tokens])
            child.parent = node
            node.add(child)
            self._common.append(child)
            self.pool.share((block,))
        return child

    def _walk(self, *, inner: bool = False) -> Iterator[Node]:
        """All nodes that have a block, parents first; inner: the others, too."""
        level = [self.root]
        while level:
            for node in level:
                if inner or node.block >= 0:
                    yield node
            branches = [b for node in level if isinstance(node, CommonNode) for b in node.branches.values()]
            level = [*branches, *(child for node in level for child in node.children)]

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None and not node.children
        parent.remove(node)
        if isinstance(parent, Branch) and not parent.children:
            del parent.home.branches[parent.salt]
        del self._nodes[node.block]
        self.pool.drop(node.block)

    def check(self) -> Iterable[int]:
        """Walks the whole tree; returns the blocks that it holds. For tests."""
        size = self.pool.block_size
        self.tier.check()
        for node in self._walk(inner=True):
            assert node.keys == [child.tokens for child in node.children] == sorted(node.keys)
            for key, following in zip(node.keys, node.keys[1:], strict=False):
                assert following[: len(key)] != key, "one child's tokens begin with another's"
            assert all(child.parent is node for child in node.children)
            assert not node.children or len(node.tokens) == (0 if node.block < 0 else size)
            if isinstance(node, CommonNode):
                assert all(b.home is node and b.salt == salt and b.children for salt, b in node.branches.items())
        found = list(self._walk())
        private = [node for node in found if not isinstance(node, CommonNode)]
        assert {node.block: node for node in private} == self._nodes and len(private) == len(self._nodes)
        assert len(found) == len(private) + len(self._common)
        for node in private:
            parent = node.parent
            if self.pool.references(node.block) > 1 and parent is not None and parent.block in self._nodes:
                assert self.pool.references(parent.block) > 1, "a table holds a block, but not the one before it"
        return [node.block for node in found]


class RadixPath:
    """A sequence's place in the tree: the node of its last whole block there."""

    __slots__ = ("_cache", "_node", "_salt", "num_blocks")

    def __init__(self, cache: RadixPrefixCache, node: Node, salt: Salt, num_blocks: int = 0) -> None:
        """node: at depth num_blocks. The path must not outlive the table's hold on that node's block."""
        self._cache = cache
        self._node = node
        self._salt = salt
        self.num_blocks = num_blocks

    def adopt(self, token_ids: Sequence[int], table: BlockTable, known: int, *, whole_blocks: bool = False) -> int:
        """Walks on as far as the tree knows the tokens. See `PrefixPath.adopt`."""
        nodes, inside, part = self._following(token_ids, whole_blocks)
        found = (self.num_blocks + len(nodes)) * self._cache.pool.block_size + inside
        if found <= known:
            return known
        blocks = [node.block for node in nodes]
        table.truncate(self.num_blocks)
        table.adopt(blocks if part is None else [*blocks, part.block])
        self._node = nodes[-1] if nodes else self._node
        self.num_blocks += len(nodes)
        return found

    def peek(self, token_ids: Sequence[int]) -> PrefixHit:
        """See `PrefixPath.peek`."""
        nodes, inside, _ = self._following(token_ids, whole_blocks=False)
        pool = self._cache.pool
        held = sum(isinstance(node, CommonNode) or pool.references(node.block) > 1 for node in nodes)
        return PrefixHit(len(nodes) * pool.block_size + inside, held)

    def _following(self, token_ids: Sequence[int], whole_blocks: bool) -> tuple[list[Node], int, Node | None]:
        """The nodes of whole blocks that follow, and how much of the next block which node has, of all but the last."""
        cache, salt, size = self._cache, self._salt, self._cache.pool.block_size
        node, start, last = self._node, self.num_blocks * size, len(token_ids) - 1
        nodes: list[Node] = []
        for end in range(start + size, last + 1, size):
            child = cache.find(node, salt, tuple(token_ids[end - size : end]))
            if child is None:
                break
            node = child
            nodes.append(child)
        if whole_blocks:
            return nodes, 0, None
        whole = start + len(nodes) * size
        return nodes, *cache.nearest(node, salt, tuple(token_ids[whole : min(whole + size, last)]))

    def insert(self, token_ids: Sequence[int], known: int, table: BlockTable) -> None:
        """Files the whole blocks since the last call."""
        size = self._cache.pool.block_size
        for end in range((self.num_blocks + 1) * size, known + 1, size):
            index, tokens = self.num_blocks, tuple(token_ids[end - size : end])
            self._node = self._cache.file(self._node, self._salt, tokens, table[index])
            if self._node.block != table[index]:
                table.replace(index, self._node.block)
            self.num_blocks += 1

    def leave(self, token_ids: Sequence[int], known: int, table: BlockTable) -> None:
        """Files what is left.

        Not a partly filled block that somebody else holds: he may be about to write into it.
        """
        self.insert(token_ids, known, table)
        rest = tuple(token_ids[self.num_blocks * self._cache.pool.block_size : known])
        if rest and self._cache.pool.references(table[self.num_blocks]) == 1:
            self._cache.file(self._node, self._salt, rest, table[self.num_blocks])
        self._node, self.num_blocks = self._cache.root, 0

    def fork(self, num_tokens: int) -> Self:
        """The same place, or above it where that is beyond `num_tokens`."""
        node, num_blocks = self._node, num_tokens // self._cache.pool.block_size
        for _ in range(self.num_blocks - num_blocks):
            assert node.parent is not None
            node = node.parent.home if isinstance(node.parent, Branch) else node.parent
        return type(self)(self._cache, node, self._salt, min(num_blocks, self.num_blocks))

    def offloaded(self, token_ids: Sequence[int], most: int) -> list[tuple[int, bytes]]:
        """(slot, name) of what the tier has of the whole blocks after the place, at most `most` of them."""
        size, tier = self._cache.pool.block_size, self._cache.tier
        start, last = self.num_blocks * size, len(token_ids) - 1
        if not len(tier):
            return []
        ends = range(start + size, min(last, start + most * size) + 1, size)
        blocks = (tuple(token_ids[end - size : end]) for end in ends)
        return list(self._cache.offloaded(self._node, self._salt, blocks))

    def next_block(self, token_ids: Sequence[int]) -> Hashable:
        """The node, the tokens after it, and the salt, but for a declared prefix."""
        size = self._cache.pool.block_size
        start = self.num_blocks * size
        if start + size > len(token_ids):
            return None
        tokens = tuple(token_ids[start : start + size])
        declared = isinstance(self._node, CommonNode) and tokens in self._node.declared.following
        return self._node, tokens, None if declared else self._salt
