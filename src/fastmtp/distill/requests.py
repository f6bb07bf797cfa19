"""What the target is asked, to write a prompt or to answer one, and the exchange that comes of it."""

from __future__ import annotations

from collections import Counter

from fastmtp.config import DistillConfig, SamplingConfig
from fastmtp.decode.batch import Continuation, Request
from fastmtp.decode.sampling import derived_seed
from fastmtp.distill.dataset import Exchange
from fastmtp.distill.own_prompts import Opening, UserTurn
from fastmtp.distill.prompts import Prompt
from fastmtp.models.info import TargetInfo
from fastmtp.progress import Progress
from fastmtp.rows import RowError, in_one_line

# That none of so many prompts came to an end is said. The run stops when every place has had so many.
_DOZEN, _ROUNDS = 12, 5
# How often one prompt is begun.
_TRIES = 50


def prompt_ids(target: TargetInfo, prompt: Prompt) -> list[int]:
    """Token ids of a prompt.

    Raises:
        RowError: the chat template refuses it, it leaves no room for an answer, or its answer is not the target's.
    """
    (found,) = target.encode_chats([prompt.messages])
    return checked_ids(target, prompt, found)


def checked_ids(target: TargetInfo, prompt: Prompt, ids: list[int] | Exception) -> list[int]:
    """The token ids of a prompt, if it can be asked.

    Args:
        ids: or why there are none.
    Raises:
        RowError: see `prompt_ids`.
    """
    try:
        if isinstance(ids, Exception):
            raise ids
        target.room(len(ids), 1)
    except Exception as error:
        why = in_one_line(str(error)) or type(error).__name__
        raise RowError(f"{prompt.where}: cannot be asked: {why}") from error
    answer = prompt.answer_ids or []
    size, total = target.vocabulary_size, len(ids) + len(answer)
    unknown = next((token for token in answer if not 0 <= token < size), None)
    if unknown is not None:
        wrong = f"holds {unknown}, but the token ids of {target.source} go from 0 to {size - 1}"
    elif total > target.context_limit:
        wrong = f"makes {total} tokens with the prompt, and the context ends at {target.context_limit}"
    else:
        return ids
    raise RowError(f"{prompt.where}: `answer_ids` {wrong}")


def prompt_request(target: TargetInfo, config: DistillConfig, turn: UserTurn, task: Opening) -> Request:
    """Let the target write the prompt that opens so."""
    ids = turn.open(task)
    return Request(
        key=task,
        prompt=ids,
        max_new_tokens=target.room(len(ids), config.max_prompt_tokens),
        sampling=_seeded(config.prompt_sampling(), 2 * task.index),
        end_ids=turn.end_ids,
        # The answer is given without the system message.
        then=None if task.system else how_to_answer(target, config, task.index),
    )


def answer_request(target: TargetInfo, prompt: Prompt, ids: list[int], how: Continuation) -> Request:
    """Let the target answer a prompt of these token ids."""
    room = target.room(len(ids), how.max_new_tokens)
    return Request(key=prompt, prompt=ids, **{**vars(how), "max_new_tokens": room})


def how_to_answer(target: TargetInfo, config: DistillConfig, index: int) -> Continuation:
    """How prompt number `index` is answered."""
    return Continuation(
        max_new_tokens=config.max_new_tokens,
        sampling=_seeded(config.answer_sampling(index), 2 * index + 1),
        end_ids=target.end_ids,
    )


def exchange_of(prompt: Prompt, ids: list[int], answer: str, answer_ids: list[int], finished: bool) -> Exchange:
    """
    Args:
        ids: the prompt's.
    """
    return Exchange(
        index=prompt.index,
        kind=prompt.kind,
        prompt=prompt.messages[-1]["content"],
        answer=answer,
        finished=finished,
        ids=ids + answer_ids,
        answer_mask=[False] * len(ids) + [True] * len(answer_ids),
    )


class Endings:
    """Which of the target's own prompts come to an end; a run in which none does must not go on for ever."""

    def __init__(
        self, target: TargetInfo, config: DistillConfig, ended: int, places: int, progress: Progress
    ) -> None:
        """
        Args:
            ended: prompts of earlier runs.
            places: how many are written together.
            progress: told if none of the first dozen ends.
        """
        self.given_up = 0
        self._ended, self._cut = ended, 0
        self._most = max(_DOZEN, _ROUNDS * places)
        # Greedy draws are the same each time.
        self._tries = _TRIES if config.prompt_temperature else 1
        self._begun: Counter[int] = Counter()
        self._source, self._tokens, self._progress = target.source, config.max_prompt_tokens, progress

    def ended(self) -> None:
        """A prompt came to its end."""
        self._ended += 1

    def again(self, request: Request) -> Request | None:
        """A prompt that did not end, with other draws; None if it was begun often enough.

        Raises:
            ValueError: none ends.
        """
        index = request.key.index
        self._begun[index] += 1
        self._cut += 1
        if not self._ended:
            if self._cut >= self._most:
                raise self.error()
            if self._cut == _DOZEN:
                self._progress.say(f"fastmtp: {self.error()}; still trying")
        if self._begun[index] < self._tries:
            return request.again()
        self.given_up += 1
        return None

    def error(self) -> ValueError:
        return ValueError(
            f"{self._source} ended none of the first {self._cut} prompts that it began to write, each of up to "
            f"{self._tokens} tokens; give --prompts FILE, or raise --max-prompt-tokens"
        )


def _seeded(sampling: SamplingConfig, stream: int) -> SamplingConfig:
    """A seed for each request, so that a resumed run draws what an uninterrupted one would have drawn."""
    return sampling.seeded(derived_seed(sampling.seed, stream))
