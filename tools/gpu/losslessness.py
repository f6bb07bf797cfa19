"""Whether speculative tokens are those of plain decoding."""

from __future__ import annotations

import time
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from tools.gpu.decoding import STEPS
from tools.gpu.setting import MEASURING, Setting, model_of, open_on


def lossless(setting: Setting) -> dict[str, Any]:
    """Greedy tokens of chains and of trees that differ from plain decoding, on the built-in prompts."""
    from fastmtp.config import SamplingConfig
    from fastmtp.decode.drafting.adaptive import Adaptive
    from fastmtp.decode.drafting.drafter import chains
    from fastmtp.decode.drafting.learned import Learned
    from fastmtp.decode.plain import plain
    from fastmtp.decode.speculative import speculative
    from fastmtp.engines.protocol import Costs
    from fastmtp.evaluate.prompts import builtin_conversations
    from fastmtp.heads.shipped import shipped_head
    from fastmtp.vocabulary.draft import DraftLists
    from tools.gpu.checkpoint import write_random_head

    until, greedy = time.monotonic() + MEASURING * setting.seconds, SamplingConfig()
    answer = 512 if not setting.tiny else 4
    with model_of(setting) as (name, model):
        engine = open_on(name, setting)
        directory = shipped_head(name)
        if directory is None:
            directory = Path(name).parent / "head"
            write_random_head(directory, engine.target, Path(name))
        head = engine.load_head(directory)
        lists = DraftLists(head.lists, engine.target.vocabulary_size)
        # An interpreter would time for minutes, and has costs at which nobody drafts.
        costs = Costs({128: {1: 5.0, 16: 5.001}}, {1: 0.01}) if setting.interprets else engine.costs(head, lists)
        learned = Learned(costs)
        ways = {"chain": chains(STEPS), "tree": partial(Adaptive, learned)}
        counts = {way: {"tokens": 0, "rounds": 0, "differing": 0} for way in ways}
        found: dict[str, Any] = {"model": model, "engine": engine.name, "prompts": 0, **counts}
        for conversation in builtin_conversations():
            if time.monotonic() > until and found["prompts"]:
                break
            prompt = engine.target.encode_chat([{"role": "user", "content": conversation.turns[0]}])
            prompt = prompt[-(512 if not setting.tiny else 8) :]
            wanted = list(islice(plain(engine.new_sequence(), prompt, greedy), answer))
            for way, new_drafter in ways.items():
                rounds = speculative(engine.new_sequence(head, lists), prompt, new_drafter(prompt, greedy), greedy)
                tokens: list[int] = []
                for one in rounds:
                    tokens += one.tokens
                    counts[way]["rounds"] += 1
                    if len(tokens) >= len(wanted):
                        break
                # After the first difference the texts are different ones: the rest is not compared.
                pairs = zip_longest(tokens[: len(wanted)], wanted)
                first = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
                counts[way]["tokens"] += len(wanted) if first is None else first + 1
                counts[way]["differing"] += first is not None
            found["prompts"] += 1
            setting.report(found)
        return found
