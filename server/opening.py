"""Leading a masked sum over the sites: every stage asks those that are left, and again where that may help.

A site whose process died while it answered kept its secrets, so it is asked once more in the same stage. A sum that
fails before signatures is tried again with new keys; one that fails after, is asked for again as it is.
"""

from collections.abc import Callable, Collection, Mapping

from federation.masking import TooFewSites
from federation.messages import DeliveryError
from server.post import Post
from server.sums import MaskedSum
from server.unmask import Opening

_ATTEMPTS = 3
_ASKED = 2  # times in a stage, where Flower reports that a site's process broke down


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
    """Ask the open stage's question until all have answered, broken down twice, or missed the deadline."""
    names = {node: site for site, node in nodes.items()}
    deadline_s = post.stage_deadline()
    wanted = [site for site in masked.missing if site in nodes]
    for _ in range(_ASKED):
        requests = {nodes[site]: masked.request(site, deadline_s) for site in wanted}
        wanted = []
        for node, answer in post.ask_each(requests, masked.name):
            masked.receive(names[node], answer)
            if isinstance(answer, DeliveryError):
                wanted.append(names[node])
