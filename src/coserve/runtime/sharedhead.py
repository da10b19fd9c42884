"""The output head where ranks share the vocabulary: logits, and log-probabilities of labels with their gradient.

T rows, D hidden width, V the vocabulary, v this rank's tokens of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coserve.kernels import library
from coserve.model.linear import OutputHead
from coserve.model.rankcheckpoint import TokenRange
from coserve.parallel import Ranks


def shared_label_rows(
    logprob_T: Tensor, correct_T: Tensor, grad_TD: Tensor | None, hidden_TD: Tensor, labels_T: Tensor,
    norm: Tensor, eps: float, head: OutputHead, logits_Cv: Tensor, ranks: Ranks, tokens: TokenRange,
) -> None:
    """As `library.label_rows`, with the same result on every rank.

    logits_Cv: workspace of C rows, at least as wide as this rank's tokens. For every C rows the ranks send 3 C numbers, and C D
    for the gradient.
    """
    chunk, count = logits_Cv.shape[0], tokens.end - tokens.first
    for start in range(0, hidden_TD.shape[0], chunk):
        rows = slice(start, min(start + chunk, hidden_TD.shape[0]))
        hidden, labels = hidden_TD[rows], labels_T[rows]
        normed = torch.empty_like(hidden)
        library.rmsnorm(normed, hidden, norm, eps)
        logits = _own_logits(head, normed, logits_Cv, tokens)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        owned = (labels >= tokens.first) & (labels < tokens.end)
        ids = (labels - tokens.first).clamp_(0, max(count - 1, 0))
        best = wide.amax(dim=1) if count else wide.new_full((hidden.shape[0],), -torch.inf)
        label = wide.gather(1, ids[:, None])[:, 0] * owned if count else torch.zeros_like(best)
        ranks.largest(best)
        shares = wide.sub_(best[:, None]).exp_()
        total, label_logit = ranks.sum(torch.stack((shares.sum(dim=1), label)))
        logprob_T[rows] = label_logit - best - total.log()
        correct_T[rows] = label_logit == best
        if grad_TD is not None:
            d_normed = torch.zeros_like(hidden)
            if count:
                probabilities = shares.div_(total[:, None]).to(hidden.dtype)
                d_normed = (head.rows(ids) * owned[:, None]).sub_(head.input_grad(probabilities))
            library.rmsnorm_dgrad(grad_TD[rows], ranks.sum(d_normed), hidden, norm, eps, accumulate=False)


def shared_logits(normed_TD: Tensor, head: OutputHead, ranks: Ranks, tokens: TokenRange, vocab_size: int) -> Tensor:
    """Logits [T, V] on rank 0, of the rows behind the final norm. The others get those of their own tokens, with as many
    columns as the rank that has the most."""
    width = -(-vocab_size // ranks.size)
    own = normed_TD.new_empty(normed_TD.shape[0], width)
    count = tokens.end - tokens.first
    if count == width:
        head.logits(own, normed_TD)
    elif count:
        own[:, :count] = _own_logits(head, normed_TD, torch.empty_like(own), tokens)
    logits = ranks.collect(own)
    return own if logits is None else logits[:, :vocab_size].contiguous()


def _own_logits(head: OutputHead, normed_TD: Tensor, logits_Cv: Tensor, tokens: TokenRange) -> Tensor:
    """Logits [T, v] of this rank's tokens, in the workspace."""
    count, num_rows = tokens.end - tokens.first, normed_TD.shape[0]
    logits = logits_Cv.flatten()[: num_rows * count].view(num_rows, count)
    if count:
        head.logits(logits, normed_TD)
    return logits
