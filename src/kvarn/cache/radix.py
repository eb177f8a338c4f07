"""`RadixPrefixCache`: a tree of blocks by the tokens they hold, shared by all that begin the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Self

from kvarn.cache.offload import OffloadIndex
from kvarn.cache.pool import BlockPool
from kvarn.cache.prefix import PrefixHit
from kvarn.cache.salt import Salt
from kvarn.cache.table import HOLE, Column, Tables
from kvarn.cache.tree import Branch, CommonNode, Declared, Node, Tokens


class RadixPrefixCache:
    """RadixAttention (Zheng et al. 2024, section 3) over the blocks of PagedAttention (Kwon et al. 2023).

    A node is a block of each KV group, so a path is a list of blocks, and matching compares a slice a block. Blocks
    enter as soon as they are filled, also those of generated tokens, and a partly filled one when its sequence ends. A
    match goes to the token: it may end inside a block, which is then copied before it is written.

    Every table that holds a node's block holds the blocks of all nodes above it: `insert` puts the tree's blocks into
    the table for its own. Hence the order in which blocks became idle (`BlockPool`) is least recently used first and
    leaves before what they continue, and evicting a block is O(1). One node takes about 1 KB.

    **Windows.** A group with a window has blocks that its sequences let go of while they go on; they stay here until
    they are evicted, each by itself, before all others (`BlockPool`). So a match is the longest beginning of which the
    groups have what the next token sees: one that keeps all the whole of it, one with a window the end of it. A node
    goes with its block of a group that keeps all; where no group does, once its blocks are gone and nothing continues
    it. There are no more nodes than blocks in the former case; in the latter each block may have a text of nodes above.

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
        self.num_reserved = declared.num_blocks * len(pool.windows)
        self.root: Node = CommonNode((), (), declared)
        self.root.name = self.tier.root()
        self._nodes: dict[int, Node] = {}
        """By block; those of declared prefixes are not in it."""
        self._common: list[CommonNode] = []

    def path(self, salt: Salt) -> RadixPath:
        """The place of a new sequence."""
        return RadixPath(self, self.root, salt)

    def evict(self, count: int, *, spill: bool = True) -> int:
        """Lets go of the least recently used blocks that no table holds; whole ones go to the tier with `spill`."""
        free = self.pool.num_free
        while self.pool.num_free - free < count and (block := self.pool.oldest_idle) is not None:
            node = self._nodes[block]
            group = node.blocks.index(block)
            groups = range(len(node.blocks)) if self.pool.windows.sizes[group] is None else (group,)
            if spill:
                self._spill(node, groups)
            self._let_go(node, groups)
        return self.pool.num_free - free

    def spill_all(self) -> None:
        """Copies all that it holds to the tier, as far as there is room: the beginnings of texts first."""
        blocks = [(node, group) for node in self._walk() for group in range(len(node.blocks))]
        for node, group in reversed(blocks[: self.tier.num_slots]):
            self._spill(node, (group,))

    def _spill(self, node: Node, groups: Iterable[int]) -> None:
        if self.tier.num_slots and len(node.tokens) == self.pool.block_size:
            for group in groups:
                if node.blocks[group] != HOLE:
                    self.tier.save(self.tier.of_group(self.name(node), group), node.blocks[group])

    def name(self, node: Node) -> bytes:
        """What the names of the node's blocks in the tier are made from."""
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
        """(slot, name) in the tier of the blocks that follow `node`, those of all groups one after the other.

        Up to the first of which one is not there.
        """
        groups = range(len(self.pool.windows))
        name = self.name(node)
        declared = node.declared if isinstance(node, CommonNode) else None
        for tokens in blocks:
            if declared is not None:
                declared = declared.following.get(tokens)
                if declared is None:
                    name = self.tier.branch(name, salt)
            name = self.tier.after(name, tokens)
            names = [self.tier.of_group(name, group) for group in groups]
            slots = [self.tier.find(each) for each in names]
            found = [(slot, each) for slot, each in zip(slots, names, strict=True) if slot is not None]
            if len(found) < len(names):
                return
            yield from found

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

    def file(self, node: Node, salt: Salt, tokens: Tokens, blocks: Column) -> Node:
        """The node after `node` of all of `tokens`: the one that is there, or a new one with `blocks`.

        One that is there gets those that it has not any more.
        """
        if isinstance(node, CommonNode) and tokens in node.declared.following:
            return self._file_declared(node, tokens, blocks)
        if isinstance(node, CommonNode):
            node = node.branches.get(salt) or Branch(node, salt)
        length, near = node.nearest(tokens)
        if near is not None and length == len(tokens):
            if length == len(near.tokens):
                for group, block in enumerate(near.blocks):
                    if block == HOLE:
                        self._keep(near, group, blocks[group])
            return near
        if near is not None and length == len(near.tokens):
            self._let_go(near, range(len(blocks)))  # what it holds is a beginning of the new one
        child = Node(tokens, blocks, node)
        node.add(child)
        if isinstance(node, Branch):
            node.home.branches[node.salt] = node
        for group, block in enumerate(blocks):
            self._keep(child, group, block)
        return child

    def _file_declared(self, node: CommonNode, tokens: Tokens, blocks: Column) -> Node:
        child = node.find(tokens)
        if child is None:
            child = CommonNode(tokens, blocks, node.declared.following[tokens])
            child.parent = node
            node.add(child)
            self._common.append(child)
            self.pool.share(blocks)
        return child

    def _keep(self, node: Node, group: int, block: int) -> None:
        self.pool.keep(block)
        node.blocks[group] = block
        self._nodes[block] = node

    def _let_go(self, node: Node, groups: Iterable[int]) -> None:
        """Gives up the node's blocks of these groups, and what then leads nowhere."""
        for group in groups:
            block = node.blocks[group]
            if block != HOLE:
                node.blocks[group] = HOLE
                del self._nodes[block]
                self.pool.drop(block)
                if group == 0:
                    self.num_evicted_tokens += len(node.tokens)
        while not node.children and not node.present and (parent := node.parent) is not None:
            parent.remove(node)
            if isinstance(parent, Branch) and not parent.children:
                del parent.home.branches[parent.salt]
                return
            node = parent

    def disown(self, node: Node, salt: Salt, depth: int, token_ids: Sequence[int]) -> None:
        """Lets go, in the tier too, of what a sequence may have computed wrongly or taken from there.

        node: where it was, at that depth in blocks, its table released already. What begins with the next of its tokens
        behind the last node that a table holds goes, whoever computed it. Declared prefixes are computed again.
        """
        while node.tokens and not self._is_held(node):
            assert node.parent is not None
            node, depth = node.parent.home if isinstance(node.parent, Branch) else node.parent, depth - 1
        branch = node.branches.get(salt) if isinstance(node, CommonNode) else None
        next_token = tuple(token_ids[depth * self.pool.block_size :][:1])
        for child in [*node.children, *(branch.children if branch else ())]:
            if child.tokens[:1] == next_token and not self._is_held(child):
                for below in reversed([*self._walk(child)]):
                    self._disown(below)

    def _disown(self, node: Node) -> None:
        """A node whose children are gone but for those that are held."""
        if len(self.tier):
            for group in range(len(node.blocks)):
                self.tier.drop(self.tier.of_group(self.name(node), group))
        if isinstance(node, CommonNode):
            if not node.children and not node.branches and node.parent is not None:
                node.parent.remove(node)
                self._common.remove(node)
                self.pool.free(node.blocks)
        elif node.children or node.present:  # or it went with its last child
            idle = [group for group, block in enumerate(node.blocks) if self._is_idle(block)]
            self._let_go(node, idle)

    def _is_held(self, node: Node) -> bool:
        return not all(self._is_idle(block) for block in node.present)

    def _is_idle(self, block: int) -> bool:
        return block != HOLE and self.pool.references(block) == 1

    def _walk(self, start: Node | None = None, *, inner: bool = False) -> Iterator[Node]:
        """All nodes that have tokens, parents first, from the root or `start` on; inner: the others, too."""
        level = [start or self.root]
        while level:
            for node in level:
                if inner or node.tokens:
                    yield node
            branches = [b for node in level if isinstance(node, CommonNode) for b in node.branches.values()]
            level = [*branches, *(child for node in level for child in node.children)]

    def check(self) -> Iterable[int]:
        """Walks the whole tree; returns the blocks that it holds. For tests."""
        size, references = self.pool.block_size, self.pool.references
        self.tier.check()
        for node in self._walk(inner=True):
            assert node.keys == [child.tokens for child in node.children] == sorted(node.keys)
            for key, following in zip(node.keys, node.keys[1:], strict=False):
                assert following[: len(key)] != key, "one child's tokens begin with another's"
            assert all(child.parent is node for child in node.children)
            assert not node.children or len(node.tokens) in (0, size)
            if isinstance(node, CommonNode):
                assert all(b.home is node and b.salt == salt and b.children for salt, b in node.branches.items())
        found = list(self._walk())
        private = [node for node in found if not isinstance(node, CommonNode)]
        assert {block: node for node in private for block in node.present} == self._nodes
        assert sum(len(node.present) for node in private) == len(self._nodes)
        assert len(found) == len(private) + len(self._common)
        assert all(HOLE not in node.blocks for node in self._common)
        for node in private:
            assert node.present or node.children, "a node that leads nowhere"
            for block, window in zip(node.blocks, self.pool.windows.sizes, strict=True):
                if window is not None:
                    continue
                assert block != HOLE, "a group that keeps all has a hole"
                parent = node.parent
                if references(block) > 1 and parent is not None and parent.tokens:
                    above = parent.blocks[node.blocks.index(block)]
                    assert references(above) > 1, "a table holds a block, but not the one before it"
                if any(references(other) > 1 for other in node.present):
                    assert references(block) > 1, "a table holds a block, but not that of a group that keeps all"
        return [block for node in found for block in node.present]


class RadixPath:
    """A sequence's place in the tree: the node of its last whole block there."""

    __slots__ = ("_cache", "_node", "_salt", "num_blocks")

    def __init__(self, cache: RadixPrefixCache, node: Node, salt: Salt, num_blocks: int = 0) -> None:
        """node: at depth num_blocks. The path must not outlive the table's hold on that node's block."""
        self._cache = cache
        self._node = node
        self._salt = salt
        self.num_blocks = num_blocks

    def adopt(self, token_ids: Sequence[int], table: Tables, known: int, *, whole_blocks: bool = False) -> int:
        """Walks on as far as the tree knows the tokens. See `PrefixPath.adopt`."""
        nodes, found = self._following(token_ids, whole_blocks, [one.num_holes for one in table.by_group])
        if found <= known:
            return known
        table.truncate(self.num_blocks)
        table.adopt([node.blocks for node in nodes], found)
        whole = found // self._cache.pool.block_size - self.num_blocks
        self._node = nodes[whole - 1] if whole else self._node
        self.num_blocks += whole
        return found

    def peek(self, token_ids: Sequence[int]) -> PrefixHit:
        """See `PrefixPath.peek`."""
        pool = self._cache.pool
        nodes, found = self._following(token_ids, False, [0] * len(pool.windows))
        shared = (
            (node, block)
            for index, node in enumerate(nodes[: found // pool.block_size])
            for group, block in enumerate(node.blocks)
            if index >= pool.windows.first(group, found)
        )
        held = sum(isinstance(node, CommonNode) or pool.references(block) > 1 for node, block in shared)
        return PrefixHit(found, held)

    def _following(self, token_ids: Sequence[int], whole_blocks: bool, holes: list[int]) -> tuple[list[Node], int]:
        """The nodes that follow, the last of them perhaps for a part of its tokens only, and how many are known then.

        Of all but the last token. holes: of the table, by group.
        """
        cache, salt, size = self._cache, self._salt, self._cache.pool.block_size
        node, start, last = self._node, self.num_blocks * size, len(token_ids) - 1
        nodes: list[Node] = []
        for end in range(start + size, last + 1, size):
            child = cache.find(node, salt, tuple(token_ids[end - size : end]))
            if child is None:
                break
            node = child
            nodes.append(child)
        known = start + len(nodes) * size
        if not whole_blocks:
            inside, part = cache.nearest(node, salt, tuple(token_ids[known : min(known + size, last)]))
            if part is not None:
                known += inside
                nodes.append(part)
        if cache.pool.windows.endless:
            return nodes, known
        return self._visible(nodes, known, holes)

    def _visible(self, nodes: list[Node], most: int, holes: list[int]) -> tuple[list[Node], int]:
        """The longest beginning, of up to `most` tokens, of which every group has what the token after it sees."""
        windows, size = self._cache.pool.windows, self._cache.pool.block_size
        begins = list(holes)  # by group, the index after the last block that is gone
        best, count = 0, 0
        for index, node in enumerate(nodes, self.num_blocks):
            for group, block in enumerate(node.blocks):
                if block == HOLE:
                    begins[group] = index + 1
            known = min(most, (index + 1) * size)
            if all(begin <= windows.first(group, known) for group, begin in enumerate(begins)):
                best, count = known, index + 1 - self.num_blocks
        return nodes[:count], best

    def insert(self, token_ids: Sequence[int], known: int, table: Tables) -> None:
        """Files the whole blocks since the last call."""
        size = self._cache.pool.block_size
        for end in range((self.num_blocks + 1) * size, known + 1, size):
            index, tokens = self.num_blocks, tuple(token_ids[end - size : end])
            blocks = table.column(index)
            self._node = self._cache.file(self._node, self._salt, tokens, blocks)
            if self._node.blocks != blocks:
                table.replace(index, self._node.blocks)
            self.num_blocks += 1

    def leave(self, token_ids: Sequence[int], known: int, table: Tables) -> None:
        """Files what is left.

        Not a partly filled block that somebody else holds: he may be about to write into it.
        """
        self.insert(token_ids, known, table)
        rest = tuple(token_ids[self.num_blocks * self._cache.pool.block_size : known])
        blocks = table.column(self.num_blocks) if rest else []
        if rest and all(self._cache.pool.references(block) == 1 for block in blocks):
            self._cache.file(self._node, self._salt, rest, blocks)
        self._node, self.num_blocks = self._cache.root, 0

    def disown(self, token_ids: Sequence[int], table: Tables) -> None:
        """See `PrefixPath.disown`."""
        table.release()
        self._cache.disown(self._node, self._salt, self.num_blocks, token_ids)
        self._node, self.num_blocks = self._cache.root, 0

    def fork(self, num_tokens: int) -> Self:
        """The same place, or above it where that is beyond `num_tokens`."""
        node, num_blocks = self._node, num_tokens // self._cache.pool.block_size
        for _ in range(self.num_blocks - num_blocks):
            assert node.parent is not None
            node = node.parent.home if isinstance(node.parent, Branch) else node.parent
        return type(self)(self._cache, node, self._salt, min(num_blocks, self.num_blocks))

    def offloaded(self, token_ids: Sequence[int], most: int) -> list[tuple[int, bytes]]:
        """See `PrefixPath.offloaded`."""
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
