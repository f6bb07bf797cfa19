"""How near a tie was where output differs from plain decoding's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastmtp.engines.protocol import Backend
from fastmtp.evaluate.competitors import PLAIN


def with_margins(
    differences: Sequence[dict[str, Any]], lines: Sequence[Mapping[str, Any]], backend: Backend
) -> list[dict[str, Any]]:
    """Differences with the target's own margin there: the logit of its first choice less that of its second.

    Where arithmetic depends on how many tokens are computed together only near-ties may flip.
    """
    by_key = {line["key"]: line for line in lines}
    found = []
    for difference in differences:
        line = by_key[difference["key"]]
        before = line["cells"][PLAIN]["tokens"][: difference["token"]]
        backend.reset()
        first, second = backend.prefill([*line["prompt"], *before]).float().topk(2).values.tolist()
        found.append({**difference, "margin": first - second})
    return found
