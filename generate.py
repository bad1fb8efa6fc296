"""Sampling from K25: batched prefill over unequal prompts, absorbed decode over the latent cache — K2.5 report 7.

Public names: Generation, generate.

Letters: B batch, T tokens, U vocabulary, L patches, I media items.     Tests: pytest tests/test_generate.py
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Generation:
    """What one prompt was answered with.

    ids: generated token ids, the stop token included; logprobs: of each of them, under the distribution it was
    drawn from before top-p (log softmax of logits/temperature; temperature 1 when greedy); finish: "stop" | "length".
    """

    ids: tuple
    logprobs: tuple
    finish: str


@torch.no_grad()
def generate(model, prompts, patches=None, grid_thw=None, *, max_new_tokens=64, temperature=0.0, top_p=1.0,
             stop_ids=(), seed=0, on_token=None):  # fmt: skip
    """Continue each prompt until a stop id or `max_new_tokens`.

    model: K25; prompts: list of B lists of token ids, of any lengths, media places already expanded;
    patches: (L,588) and grid_thw: (I,3) — the media of all prompts in order, encoded once, before the first token;
    temperature: 0 is greedy; top_p: keep the smallest set of tokens whose probability reaches it; stop_ids: any of
    them ends a row; seed: each row draws from its own generator (seed, row), so a row does not depend on its
    neighbours; on_token: called as on_token(row, id) for each token as it comes (streaming).
    Returns a list of B Generation. Raises ValueError on an empty prompt, an id outside the vocabulary
    or an impossible setting.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}, max_new_tokens {max_new_tokens}: "
                         "expected temperature ≥ 0, 0 < top_p ≤ 1, max_new_tokens ≥ 1")  # fmt: skip
    device, config = model.language_model.lm_head.weight.device, model.config
    for row, prompt in enumerate(prompts):
        if unknown := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise ValueError(f"prompt {row}: id {unknown[0]} lies outside the vocabulary of {config.vocab_size}")
    rows, longest = len(prompts), max(map(len, prompts))
    ids = torch.full((rows, longest), config.pad_token_id)
    segments = torch.full((rows, longest), -1)  # padding on the left is a segment of its own, seen by no prompt
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        segments[row, longest - len(prompt) :] = 0
    ids, segments = ids.to(device), segments.to(device)
    positions = (torch.cumsum(segments == 0, dim=1) - 1).clamp(min=0)  # (B,T)
    media = None if patches is None else model.encode_media(patches.to(device), grid_thw.to(device))
    draws = [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in range(rows)]
    stop = set(stop_ids)
    out, logprobs, finish = [[] for _ in prompts], [[] for _ in prompts], ["length"] * rows
    cache = model.new_cache(rows, longest + max_new_tokens)
    padded = min(map(len, prompts)) < longest  # else the layout is the default one, and attention needs no mask
    hidden, _ = model.hidden(model.embed(ids, media), *((positions, segments) if padded else (None, None)), cache)
    for step in range(max_new_tokens):
        logits = model.language_model.lm_head(hidden[:, -1]).float()  # (B,U)
        chosen, chosen_logprobs = _choose(logits, temperature, top_p, draws)
        for row, (token, logprob) in enumerate(zip(chosen.tolist(), chosen_logprobs.tolist())):
            if finish[row] == "stop":
                continue
            out[row].append(token)
            logprobs[row].append(logprob)
            if on_token:
                on_token(row, token)
            if token in stop:
                finish[row] = "stop"
        if step + 1 == max_new_tokens or all(reason == "stop" for reason in finish):
            break
        hidden, _ = model.hidden(model.language_model.model.embed_tokens(chosen[:, None].to(device)), cache=cache)
    return [Generation(tuple(o), tuple(p), f) for o, p, f in zip(out, logprobs, finish)]


def _choose(logits, temperature, top_p, draws):
    """One token per row and its log-probability: argmax, or inverse-CDF sampling with one uniform per row."""
    if temperature == 0:
        chosen = logits.argmax(dim=-1)  # (B,)
        return chosen, F.log_softmax(logits, dim=-1).gather(1, chosen[:, None])[:, 0]
    logprobs = F.log_softmax(logits / temperature, dim=-1)  # (B,U)
    ordered, order = logprobs.exp().sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # probability of the more likely tokens
    kept = ordered.masked_fill(before >= top_p, 0.0)
    uniform = torch.stack([torch.rand((), generator=g) for g in draws]).to(logits.device)[:, None]  # (B,1)
    cdf = kept.cumsum(dim=-1)
    last = (kept > 0).sum(dim=-1, keepdim=True) - 1  # a sum that runs in parallel may still grow after it
    place = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).minimum(last)  # (B,1)
    chosen = order.gather(1, place)[:, 0]
    return chosen, logprobs.gather(1, chosen[:, None])[:, 0]
