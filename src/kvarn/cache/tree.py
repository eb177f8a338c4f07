"""The nodes of the radix tree: children in sorted order, and where the trees of the salts begin."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from kvarn.cache.salt import Salt
from kvarn.cache.table import HOLE, Column

Tokens = tuple[int, ...]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first items are equal."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((index for index, (x, y) in pairs if x != y), min(len(a), len(b)))


class Node:
    """A block of each KV group and what is known to continue it. `tokens`: whose KV it holds, full but in leaves.

    A group that keeps all has its block; of one with a window it may be gone, and then the node still says the way.

    Children are sorted by their tokens, and none's begin with another's. So the child with the longest common
    beginning with some tokens is next to where these would sort in: O(log n) comparisons of tuples.
    """

    __slots__ = ("blocks", "children", "keys", "name", "parent", "tokens")

    def __init__(self, tokens: Tokens, blocks: Column, parent: Node | None) -> None:
        """A leaf. blocks: by group; `HOLE` where it is gone. parent: knows of it only after `add`."""
        self.tokens = tokens
        self.blocks = list(blocks)
        self.parent = parent
        self.name: bytes | None = None
        """Of its KV in the second tier, once it was asked for: what the blocks' names are made from."""
        self.keys: list[Tokens] = []
        """Tokens of the children, sorted; the children in the same order."""
        self.children: list[Node] = []

    @property
    def present(self) -> list[int]:
        """Its blocks that are not gone."""
        return [block for block in self.blocks if block != HOLE]

    def find(self, tokens: Tokens) -> Node | None:
        """The child of exactly these tokens."""
        index = bisect_left(self.keys, tokens)
        return self.children[index] if index < len(self.keys) and self.keys[index] == tokens else None

    def nearest(self, tokens: Tokens) -> tuple[int, Node | None]:
        """How many of the first of `tokens` some child begins with at most, and that child."""
        index = bisect_left(self.keys, tokens)
        best: tuple[int, Node | None] = (0, None)
        for child in self.children[max(index - 1, 0) : index + 1]:
            length = common_length(child.tokens, tokens)
            if length > best[0]:
                best = length, child
        return best

    def add(self, child: Node) -> None:
        """Takes a child that no other begins with, and that begins with no other."""
        index = bisect_left(self.keys, child.tokens)
        self.keys.insert(index, child.tokens)
        self.children.insert(index, child)

    def remove(self, child: Node) -> None:
        """Lets go of a child."""
        index = bisect_left(self.keys, child.tokens)
        del self.keys[index], self.children[index]


class CommonNode(Node):
    """The root, or a block of a declared prefix. Behind it each salt has a tree of its own."""

    __slots__ = ("branches", "declared")

    def __init__(self, tokens: Tokens, blocks: Column, declared: Declared) -> None:
        """declared: what was declared to follow, block by block, whether or not it has been computed."""
        super().__init__(tokens, blocks, None)
        self.declared = declared
        self.branches: dict[Salt, Branch] = {}


class Branch(Node):
    """Where the tree of one salt begins. It has no blocks, and goes with its last child."""

    __slots__ = ("home", "salt")

    def __init__(self, home: CommonNode, salt: Salt) -> None:
        super().__init__((), (), home)
        self.home = home
        self.salt = salt


class Declared:
    """Declared prefixes as a tree of whole blocks."""

    __slots__ = ("following",)

    def __init__(self, prefixes: Sequence[Sequence[int]], block_size: int) -> None:
        """The rest of a prefix that fills no block counts as not declared."""
        by_block: dict[Tokens, list[Sequence[int]]] = {}
        for prefix in prefixes:
            if len(prefix) >= block_size:
                by_block.setdefault(tuple(prefix[:block_size]), []).append(prefix[block_size:])
        self.following: Mapping[Tokens, Declared] = {
            tokens: Declared(rests, block_size) for tokens, rests in by_block.items()
        }

    @property
    def num_blocks(self) -> int:
        """Blocks of all of them, those that several begin with counted once."""
        return sum(1 + rest.num_blocks for rest in self.following.values())
