"""Leading a masked sum over the sites: every stage asks those that are left, and again where that may help.

A site whose process died while it answered kept its secrets, and is asked once more in the same stage (`server.post`).
A sum that fails before signatures is tried again with new keys; one that fails after, is asked for again as it is.
"""

from collections.abc import Callable, Collection, Mapping

from federation.masking import TooFewSites
from server.post import Post
from server.sums import MaskedSum
from server.unmask import Opening

_ATTEMPTS = 3


def open_sum(
    masked: MaskedSum,
    nodes: Mapping[str, int],
    sites: Collection[str],
    post: Post,
    signing: Callable[[], None] = lambda: None,
) -> Opening:
    """Take a sum from where it is to its opening.

    Args:
        masked: the sum.
        nodes: the nodes of the sites that are there, by name.
        sites: who has something to add.
        post: how they are reached.
        signing: called before the first site is asked to sign: no other attempt can follow.

    Raises:
        TooFewSites: after the last attempt; with the stage, who is missing, and why.
        MaskingError: the sum can't be opened.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        if not masked.signing:
            masked.begin()
            masked.leave_out(sites)
        try:
            while not masked.done:
                if masked.signing:
                    signing()
                _ask(masked, nodes, post)
                masked.advance()
            break
        except TooFewSites:
            if attempt == _ATTEMPTS:
                raise
    return masked.open_()


def _ask(masked: MaskedSum, nodes: Mapping[str, int], post: Post) -> None:
    """Ask the open stage's question."""
    names = {node: site for site, node in nodes.items()}
    deadline_s = post.stage_deadline()
    requests = {nodes[site]: masked.request(site, deadline_s) for site in masked.missing if site in nodes}
    for node, answer in post.ask_each(requests, masked.name):
        masked.receive(names[node], answer)
