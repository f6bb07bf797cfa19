"""Speculative decoding with an MTP head, for transformers' `generate(custom_generate=DIR, trust_remote_code=True)`.

The head drafts K tokens, the model verifies them in one forward, and the first rejected token is replaced (FastMTP,
arXiv 2509.18362; Leviathan et al., arXiv 2211.17192). Greedy answers are those of `generate`, sampled ones have its
distribution. One sequence at a time. Needs only torch, transformers and safetensors.

Shapes: T tokens, H hidden, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import os
import weakref
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

# The export's directory; `mtp_head=` gives another one.
DIRECTORY = ""
FILE = "mtp.safetensors"
_loaded: Any = weakref.WeakKeyDictionary()


def generate(
    model: Any,
    *,
    mtp_head: str | None = None,
    mtp_steps: int | None = None,
    mtp_rounds: list[int] | None = None,
    streamer: Any = None,
    **arguments: Any,
) -> Any:
    """`model.generate` with the head's drafts.

    Args:
        mtp_head: the export's directory, if it was moved.
        mtp_steps: K, the number of tokens drafted in each round; by default the K that the head was trained for.
        mtp_rounds: a list to which the number of accepted drafts of each round is appended.
    """
    path = os.path.abspath(os.path.join(mtp_head or DIRECTORY, FILE))
    if _loaded.get(model, ("", None))[0] != path:
        _loaded[model] = path, Head(model, path)
    head: Head = _loaded[model][1]
    steps, rounds = mtp_steps or head.draft_steps, [] if mtp_rounds is None else mtp_rounds

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Any:
        _check(input_ids, generation_config, inputs)
        decoding = Decoding(model, head, logits_processor, bool(generation_config.do_sample))
        for tokens in decoding.rounds(input_ids, steps):
            before = input_ids.shape[1]
            for token in tokens:
                input_ids = torch.cat([input_ids, token.view(1, 1)], dim=1)
                if streamer is not None:
                    streamer.put(token.view(1).cpu())
                if done := bool(stopping_criteria(input_ids, None).all()):
                    break
            if decoding.drafted:
                rounds.append(input_ids.shape[1] - before - 1)
            if done:
                break
        if streamer is not None:
            streamer.end()
        return (
            GenerateDecoderOnlyOutput(sequences=input_ids)
            if generation_config.return_dict_in_generate
            else input_ids
        )

    # transformers prepares processors, criteria and lengths, and then calls `decode`.
    return GenerationMixin.generate(model, custom_generate=decode, streamer=streamer, **arguments)


class Head(nn.Module):
    """s' = final_norm(layer(input_proj([hidden_norm(s), token_norm(e)]))).

    `s` is the model's state after its final norm at the first step, and the head's own output afterwards; `e` is
    the embedding of the token that follows. Embeddings and LM head are the model's.
    """

    def __init__(self, model: Any, path: str) -> None:
        super().__init__()
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such file; give the export's directory as mtp_head=")
        with safe_open(path, framework="pt") as file:
            facts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config, weight = model.config.get_text_config(), model.get_output_embeddings().weight.detach()
        for name in ("hidden_size", "vocab_size"):
            if int(facts[name]) != getattr(config, name):
                raise ValueError(f"{path}: a head for {name} {facts[name]}; the model has {getattr(config, name)}")
        self.draft_steps = int(facts["draft_steps"])
        ids_D = tensors.pop("draft_ids", None)
        self.ids_D = None if ids_D is None else ids_D.to(weight.device)
        self.rows_DH = weight if self.ids_D is None else weight[self.ids_D]
        base = model.base_model
        self.token_norm, self.hidden_norm, self.final_norm = (copy.deepcopy(base.norm) for _ in range(3))
        self.input_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        # A layer of the model's own kind; `forward` gives it a mask without a window.
        self.layer = copy.deepcopy(base.layers[-1])
        attention = self.layer.self_attn
        attention.layer_idx, attention.config = 0, copy.deepcopy(config)
        attention.config._attn_implementation = "sdpa"
        self.load_state_dict(tensors)
        self.to(weight.device, weight.dtype).eval().requires_grad_(False)
        self.cache_argument = _cache_argument(self.layer)

    def forward(self, states_1TH: Tensor, embeddings_1TH: Tensor, rotary: Any, cache: Any) -> Tensor:
        """The next states; the cache grows by T."""
        start, tokens = cache.get_seq_length(), states_1TH.shape[1]
        positions_T = torch.arange(start, start + tokens, device=states_1TH.device)
        mask_TL = torch.arange(start + tokens, device=states_1TH.device) <= positions_T[:, None]
        kind = ["full_attention"] if hasattr(rotary, "layer_types") else []
        joined = torch.cat([self.hidden_norm(states_1TH), self.token_norm(embeddings_1TH)], dim=-1)
        hidden_1TH = self.layer(
            self.input_proj(joined),
            position_embeddings=rotary(states_1TH, positions_T[None], *kind),
            attention_mask=mask_TL[None, None],
            **{self.cache_argument: cache},
        )
        final: Tensor = self.final_norm(hidden_1TH)
        return final

    def scores(self, state_1H: Tensor, vocabulary_size: int) -> Tensor:
        """Logits [1, V], minus infinity outside the draft vocabulary."""
        logits_1D = nn.functional.linear(state_1H, self.rows_DH).float()
        if self.ids_D is None:
            return logits_1D
        return logits_1D.new_full((1, vocabulary_size), -torch.inf).index_copy_(1, self.ids_D, logits_1D)


class Decoding:
    """The caches of the model and of the head for one sequence."""

    def __init__(self, model: Any, head: Head, processors: Any, sampling: bool) -> None:
        self.model, self.head, self.processors, self.sampling = model, head, processors, sampling
        self.cache, self.head_cache = DynamicCache(), DynamicCache()
        self.cache_argument = _cache_argument(model.base_model)
        self.drafted = 0

    def rounds(self, ids_1T: Tensor, steps: int) -> Any:
        """The tokens of each round, endlessly: the accepted drafts, and one token of the model."""
        states_1TH = self._forward(ids_1T)
        token = self._pick(self._distribution(ids_1T, self._logits(states_1TH[:, -1])))
        yield token
        waiting_1TH, context = states_1TH, ids_1T
        while True:
            context = torch.cat([context, token[None]], dim=1)
            drafts, q = self._draft(context, waiting_1TH, steps)
            self.drafted = len(drafts)
            chain_1T = torch.cat([token, *drafts])[None]
            waiting_1TH = self._forward(chain_1T)
            logits_TV = self._logits(waiting_1TH[0])
            kept = 0
            while True:
                p = self._distribution(context, logits_TV[kept : kept + 1])
                if kept == len(drafts):
                    token = self._pick(p)
                    break
                draft = drafts[kept]
                if not self._accepts(p, q[kept], draft):
                    # From the residual distribution (p - q)+, which is p for greedy decoding.
                    rest = (p - q[kept]).clamp(min=0)
                    token = self._pick(rest if rest.any() else p)
                    break
                context, kept = torch.cat([context, draft[None]], dim=1), kept + 1
            waiting_1TH = waiting_1TH[:, : kept + 1]
            _crop(self.cache, context.shape[1])
            yield torch.cat([*drafts[:kept], token])

    def _draft(self, context_1T: Tensor, waiting_1TH: Tensor, steps: int) -> tuple[list[Tensor], list[Tensor]]:
        """Drafts after the context, and the distribution that each was drawn from.

        The head first runs on the states of the last round. Between rounds its cache holds step-1 keys only.
        """
        rotary, embed = self.model.base_model.rotary_emb, self.model.get_input_embeddings()
        after_1T = context_1T[:, -waiting_1TH.shape[1] :]
        state_1H = self.head(waiting_1TH, embed(after_1T), rotary, self.head_cache)[:, -1]
        length, drafts, distributions = self.head_cache.get_seq_length(), [], []
        for step in range(steps):
            q = self._distribution(
                context_1T, self.head.scores(state_1H, self.model.config.get_text_config().vocab_size)
            )
            if not q.isfinite().all():  # a processor excluded the whole draft vocabulary
                break
            token = self._pick(q)
            drafts.append(token)
            distributions.append(q)
            context_1T = torch.cat([context_1T, token[None]], dim=1)
            if step + 1 < steps:
                state_1H = self.head(state_1H[:, None], embed(token[None]), rotary, self.head_cache)[:, -1]
        _crop(self.head_cache, length)
        return drafts, distributions

    def _forward(self, ids_1T: Tensor) -> Tensor:
        """States after the final norm; the cache grows by T."""
        outputs = self.model.base_model(input_ids=ids_1T, use_cache=True, **{self.cache_argument: self.cache})
        states: Tensor = outputs.last_hidden_state
        return states

    def _logits(self, states_TH: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(states_TH)
        return logits.float()

    def _distribution(self, context_1T: Tensor, logits_1V: Tensor) -> Tensor:
        """The distribution of the token after a context, [1, V]; one-hot for greedy decoding."""
        scores_1V: Tensor = self.processors(context_1T, logits_1V.clone())
        if self.sampling or not scores_1V.max().isfinite():
            return scores_1V.softmax(dim=-1)
        return nn.functional.one_hot(scores_1V.argmax(dim=-1), scores_1V.shape[-1]).float()

    def _pick(self, p_1V: Tensor) -> Tensor:
        return p_1V.argmax(dim=-1) if not self.sampling else torch.multinomial(p_1V, 1)[0]

    def _accepts(self, p_1V: Tensor, q_1V: Tensor, draft: Tensor) -> bool:
        """With probability min(1, p/q)."""
        if not self.sampling:
            return bool(p_1V[0, draft] > 0)
        return bool(torch.rand((), device=p_1V.device) * q_1V[0, draft] < p_1V[0, draft])


def _cache_argument(module: nn.Module) -> str:
    # transformers 5.24 gave the argument another name.
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def _crop(cache: Any, length: int) -> None:
    # Every version of transformers takes the number of tokens to remove, as a negative one.
    if (beyond := cache.get_seq_length() - length) > 0:
        cache.crop(-beyond)


def _check(input_ids: Tensor, config: Any, inputs: dict[str, Any]) -> None:
    mask, cache = inputs.get("attention_mask"), inputs.get("cache", inputs.get("past_key_values"))
    if input_ids.shape[0] != 1 or config.num_beams > 1:
        raise ValueError("the MTP head drafts for one sequence at a time: give a batch of 1, and no beams")
    if mask is not None and not bool(mask.all()):
        raise ValueError("the prompt is padded; a batch of 1 needs no padding")
    if inputs.get("inputs_embeds") is not None or (cache is not None and cache.get_seq_length() > 0):
        raise ValueError("inputs_embeds, and the cache of an earlier call, are not supported with the MTP head")
    if config.output_scores or config.output_logits or config.output_hidden_states or config.output_attentions:
        raise ValueError(
            "output_scores, output_logits, output_hidden_states and output_attentions are not supported"
        )
