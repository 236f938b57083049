"""Which page of memory holds which tokens' keys and values. Plain Python: no tensors, tested without any.

The cache's tensors are cut into pages of `page_size` tokens; position p of a sequence is row p % page_size of page
`sequence.pages[p // page_size]`. Sequences that begin alike share pages: a full page never changes again, so it may
have many holders, and stays findable after the last one has left, until its room is needed.

What is findable is a tree: a node is one page's token ids after its parent's, a root one adapter and salt.

        root (adapter, salt) -- [1 2 3 4] -- [5 6 7 8] -- [9 9 9 9]
                                         \\- [5 6 0 0]

The children of a node are a dict from token ids to nodes, so a hit has compared the ids and, by the path that led to
it, everything before: no two beginnings are ever taken for each other, whatever their hashes. (A chain of digests, the
usual way, must keep and compare the same ids; making one takes 0.96 us a page with blake2b, a tuple's lookup 0.20 us.)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from puna.engine.sequence import Sequence

NULL_PAGE = 0  # never given to a sequence: padded block tables and pages behind a window point here


class _Node:
    """A page's worth of token ids and all that came before. `page` is None while no memory holds its keys and values.

    `level`: the dict it is listed in, under `key`. `gone`: no longer; a sequence that stands here shares nothing more.
    """

    __slots__ = ("children", "depth", "gone", "key", "level", "page", "parent")

    def __init__(self, level: dict[Any, _Node], key: tuple[Any, ...], parent: _Node | None):
        self.level, self.key, self.parent = level, key, parent
        self.depth: int = parent.depth + 1 if parent else 0  # pages from the root
        self.page: int | None = None
        self.children: dict[Any, _Node] = {}
        self.gone = False
        level[key] = self


class KVCache:
    """The pages of one model's cache, and who holds them.

    num_pages: of the tensors, the scratch page `NULL_PAGE` included. window: the largest sliding window of all layers,
    so that pages wholly behind it are given back; None when any layer sees everything. Every page is in one state:
    free; held by `n` sequences; or idle: held by none but findable, to be taken again, the longest unused first.
    """

    def __init__(
        self, num_pages: int, page_size: int = 16, window: int | None = None, prefix_caching: bool = True
    ) -> None:
        assert min(num_pages - 1, page_size, window or 1) >= 1, (num_pages, page_size, window)
        self.num_pages, self.page_size, self.window, self.prefix_caching = num_pages, page_size, window, prefix_caching
        self.num_queried_tokens = 0  # of sequences admitted, and how many of these tokens were found
        self.num_hit_tokens = 0
        self._holders = [0] * num_pages
        self._node_of: list[_Node | None] = [None] * num_pages
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._roots: dict[Any, _Node] = {}  # by (adapter digest, cache salt)

    @property
    def num_free_pages(self) -> int:
        """Pages that `reserve` can give: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of the pages that sequences hold."""
        return 1 - self.num_free_pages / (self.num_pages - 1)

    def pages_for(self, num_tokens: int, chunk: int) -> int:
        """Pages that a sequence of this many tokens holds at most when it is computed `chunk` tokens at a time."""
        pages = -(-num_tokens // self.page_size)
        if self.window is None:
            return pages
        return min(pages, self._live_pages + -(-(chunk - 1) // self.page_size))

    @property
    def _live_pages(self) -> int:
        """Pages that the window of one token can touch: its own, and those of the window - 1 before it."""
        assert self.window is not None
        return -(-(self.window - 1) // self.page_size) + 1

    def missing_pages(self, sequence: Sequence, chunk: int) -> int:
        """Pages a sequence still has to get until all its tokens are computed, `chunk` at a time."""
        held = len(sequence.pages)
        if self.window is not None:
            held -= sequence.pages.count(NULL_PAGE)
        return max(0, self.pages_for(len(sequence.token_ids), chunk) - held)

    def match(self, sequence: Sequence) -> int:
        """Give a sequence the longest findable beginning of its tokens; returns how many, a multiple of the page size.

        Never all of them: the last one has to be computed to draw from. Behind a window pages may be missing; their
        entries are `NULL_PAGE`. Sets pages, num_computed_tokens and, on first admission, num_cached_tokens.
        """
        self._share_prefix(sequence)
        self._count(sequence)
        return sequence.num_computed_tokens

    def admit(self, sequence: Sequence, sibling: Sequence | None, chunk: int, spare: int) -> int:
        """`match` (or else `fork` from the sibling), if the pages it goes on to need are there, and `spare` more.

        chunk: tokens it computes per step. Returns how many pages are lacking; unless that is 0, nothing has changed.
        """
        self._share_prefix(sequence)
        if sibling is not None and not sequence.num_computed_tokens and sequence.use_prefix_cache:
            self.fork(sibling, sequence)
        lacking = self.missing_pages(sequence, chunk) + spare - self.num_free_pages
        if lacking > 0:
            self.release(sequence)
            return lacking
        self._count(sequence)
        return 0

    def fork(self, parent: Sequence, child: Sequence) -> int:
        """Share the full pages of the parent's prompt with another answer to the same request; returns their tokens.

        Nothing (0) where the parent has moved on and its window has left what the child would need behind.
        """
        assert parent.request is child.request
        shared = min(parent.num_computed_tokens, parent.num_prompt_tokens, len(child.token_ids) - 1) // self.page_size
        first = self._behind_window(shared * self.page_size)
        if not shared or NULL_PAGE in parent.pages[first:shared]:
            return 0
        node = parent.prefix
        while node is not None and node.depth > shared:
            node = node.parent
        self._hand_over(child, [NULL_PAGE] * first + parent.pages[first:shared], node)
        return child.num_computed_tokens

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for positions < num_tokens, taken from the free and then the longest idle ones; all of them or none."""
        missing = -(-num_tokens // self.page_size) - len(sequence.pages)
        if missing > len(self._free) + len(self._idle):
            return False
        for _ in range(missing):
            sequence.pages.append(self._take())
        return True

    def commit(self, sequence: Sequence) -> None:
        """Make the full pages that are computed findable, and give back those behind the window.

        Where another sequence has computed the same page, this one goes on with that and gives its own back: entries of
        `sequence.pages` may change here. Needed whenever a page has become full.
        """
        full = sequence.num_computed_tokens // self.page_size
        if self.prefix_caching and full:
            self._publish(sequence, full)
        pages = sequence.pages
        for index in range(self._behind_window(sequence.num_computed_tokens) - 1, -1, -1):
            if pages[index] == NULL_PAGE:
                break
            self._leave(pages[index])
            pages[index] = NULL_PAGE

    def trim(self, sequence: Sequence) -> None:
        """Give back pages beyond what `token_ids` needs (of drafts that were refused)."""
        needed = -(-len(sequence.token_ids) // self.page_size)
        while len(sequence.pages) > needed:
            self._leave(sequence.pages.pop())

    def release(self, sequence: Sequence) -> None:
        """Give back all pages, the last first: so a beginning, which more sequences share, outlives its ends."""
        for page in reversed(sequence.pages):
            if page != NULL_PAGE:
                self._leave(page)
        sequence.pages.clear()
        sequence.prefix, sequence.num_computed_tokens = None, 0

    def reset_prefix_cache(self) -> None:
        """Nothing is findable any more (the weights have changed, say). Running sequences keep what they hold."""
        self._drop(list(self._roots.values()))

    def drop_adapter(self, digest: bytes) -> None:
        """Nothing computed with this adapter is findable any more."""
        self._drop([root for key, root in self._roots.items() if key[0] == digest])

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Every page is in exactly one state, none lost, none held by other than `sequences`, the tree is sound.

        Errors: AssertionError with the numbers. Walks everything: for tests.
        """
        sequences = list(sequences)
        held = Counter(page for sequence in sequences for page in sequence.pages if page != NULL_PAGE)
        states = Counter([*self._free, *self._idle, *held])
        twice = [page for page, times in states.items() if times > 1]
        assert not twice, f"pages in two states: {twice}"
        lost = set(range(1, self.num_pages)) - set(states)
        assert not lost, f"pages lost: {sorted(lost)}"
        assert len(states) == self.num_pages - 1, f"{len(states)} pages in use, {self.num_pages - 1} exist"
        wrong = [(p, self._holders[p], held[p]) for p in range(self.num_pages) if self._holders[p] != held[p]]
        assert not wrong, f"(page, holders counted, holders found): {wrong}"
        for sequence in sequences:
            listed = [page for page in sequence.pages if page != NULL_PAGE]
            assert len(set(listed)) == len(listed), f"sequence {sequence.id} has a page twice: {sequence.pages}"
        self._check_tree()

    def _check_tree(self) -> None:
        in_tree = {}
        for node in self._walk(self._roots.values()):
            assert not node.gone, f"a node of the tree, depth {node.depth}, is marked as gone"
            assert node.level[node.key] is node, f"a node at depth {node.depth} is not listed"
            assert node.page is not None or node.children, f"a leaf without a page at depth {node.depth}"
            if node.page is not None:
                assert node.page not in in_tree, f"page {node.page} is at two places of the tree"
                in_tree[node.page] = node
        named = {page: node for page, node in enumerate(self._node_of) if node is not None}
        assert named == in_tree, f"pages in the tree {sorted(in_tree)}, pages that say so {sorted(named)}"
        assert all(page in in_tree for page in self._idle), "an idle page nobody can find"
        assert not any(page in in_tree for page in self._free), "a free page in the tree"

    def _behind_window(self, num_tokens: int) -> int:
        """How many leading pages the token at position num_tokens, and all after it, no longer see."""
        return 0 if self.window is None else max(0, num_tokens - self.window + 1) // self.page_size

    def _share_prefix(self, sequence: Sequence) -> None:
        assert not sequence.pages, sequence
        if not (self.prefix_caching and sequence.use_prefix_cache):
            return
        path = self._find(sequence)
        length = first = len(path)  # pages first .. length - 1 are there; it takes all that the next token can see
        while first > self._behind_window(length * self.page_size):
            first -= 1
            if path[first].page is None:
                length = first
        if length:
            pages = [node.page for node in path[first:length]]
            self._hand_over(sequence, [NULL_PAGE] * first + pages, path[length - 1])  # type: ignore[operator]

    def _find(self, sequence: Sequence) -> list[_Node]:
        """The path from the root along the sequence's full pages; its nodes may have no page."""
        node = self._roots.get((sequence.request.adapter_digest, sequence.request.cache_salt))
        path, size, token_ids = list[_Node](), self.page_size, sequence.token_ids
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            node = node and node.children.get(tuple(token_ids[start : start + size]))
            if node is None:
                break
            path.append(node)
        return path

    def _hand_over(self, sequence: Sequence, pages: list[int], node: _Node | None) -> None:
        for page in pages:
            if page != NULL_PAGE:
                self._join(page)
        sequence.pages.extend(pages)
        sequence.num_computed_tokens = len(pages) * self.page_size
        sequence.prefix = node

    def _count(self, sequence: Sequence) -> None:
        self.num_queried_tokens += len(sequence.token_ids)
        self.num_hit_tokens += sequence.num_computed_tokens
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)

    def _publish(self, sequence: Sequence, full: int) -> None:
        node, size = sequence.prefix or self._root(sequence), self.page_size
        for index in range(node.depth, full):
            if node.gone:
                break
            token_ids = tuple(sequence.token_ids[index * size : (index + 1) * size])
            node = node.children.get(token_ids) or _Node(node.children, token_ids, node)
            self._settle(sequence, index, node)
        sequence.prefix = node

    def _root(self, sequence: Sequence) -> _Node:
        key = (sequence.request.adapter_digest, sequence.request.cache_salt)
        return self._roots.get(key) or _Node(self._roots, key, None)

    def _settle(self, sequence: Sequence, index: int, node: _Node) -> None:
        """One page for one beginning: the node's, if it has one, else the sequence's."""
        own = sequence.pages[index]
        if node.page is None:
            node.page, self._node_of[own] = own, node
        elif node.page != own:
            self._join(node.page)
            sequence.pages[index] = node.page
            self._leave(own)

    def _join(self, page: int) -> None:
        if not self._holders[page]:
            del self._idle[page]
        self._holders[page] += 1

    def _leave(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            if self._node_of[page] is None:
                self._free.append(page)
            else:
                self._idle[page] = None

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = self._idle.popitem(last=False)[0]
            self._forget(page)
        self._holders[page] = 1
        return page

    def _forget(self, page: int) -> None:
        """Take a page out of the tree, and with it the nodes that lead to no page any more."""
        node = self._node_of[page]
        assert node is not None
        self._node_of[page] = node.page = None
        while node is not None and node.page is None and not node.children:
            node.gone = True
            del node.level[node.key]
            node = node.parent

    def _drop(self, roots: list[_Node]) -> None:
        for node in self._walk(roots):
            node.gone = True
            if node.page is not None:
                self._node_of[node.page] = None
                if not self._holders[node.page]:
                    del self._idle[node.page]
                    self._free.append(node.page)
        for root in roots:
            del self._roots[root.key]

    def _walk(self, roots: Iterable[_Node]) -> Iterator[_Node]:
        stack = list(roots)
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node
