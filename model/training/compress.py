"""A student in closed form: fewer layers and narrower feed-forward parts, refitted to the teacher layer by layer.

Every student layer starts as one of the teacher's. Its two output projections are then solved by ridge regression
(towards their old weights) so that, from the student's own inputs, the sums before both layer norms come as near to the
teacher's as a linear map can bring them. That is a start worth hundreds of gradient steps.
Runs in the training process.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.training.networks import Bert, BertLayer, BertResidual
from model.training.tables import Ids, TokenTable


@torch.inference_mode()
def _trace(layer: BertLayer, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum before the first norm, sum before the second norm, output) of one layer, each [B, L, E]."""
    projection, feed_forward = layer.attention["output"], layer.output
    assert isinstance(projection, BertResidual)
    first = projection.dense(layer.attention["self"](x, mask)) + x
    middle = projection.LayerNorm(first)
    second = feed_forward.dense(F.gelu(layer.intermediate["dense"](middle))) + middle
    return first, second, feed_forward.LayerNorm(second)


@torch.inference_mode()
def _refit(dense: nn.Linear, inputs: Tensor, wanted: Tensor, strength: float) -> None:
    """Set `dense` to the ridge solution of inputs [N, I] -> wanted [N, O], pulled towards its present weights."""
    ones = torch.ones(len(inputs), 1)
    a = torch.cat([inputs, ones], dim=1).double()
    old = torch.cat([dense.weight.T, dense.bias[None]]).double()  # [I + 1, O]
    gram = a.T @ a
    ridge = strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solved = torch.linalg.solve(gram + ridge, a.T @ wanted.double() + ridge @ old)
    dense.weight.copy_(solved[:-1].T)
    dense.bias.copy_(solved[-1])


@torch.inference_mode()
def _narrow(layer: BertLayer, source: BertLayer, inputs: Tensor) -> None:
    """Copy into `layer` the feed-forward neurons of `source` that vary most, weighed by what they write."""
    wide, narrow = source.intermediate["dense"], layer.intermediate["dense"]
    assert isinstance(wide, nn.Linear)
    assert isinstance(narrow, nn.Linear)
    activations = F.gelu(wide(inputs))
    importance = activations.var(0) * source.output.dense.weight.pow(2).sum(0)
    kept = importance.topk(narrow.out_features).indices.sort().values
    narrow.weight.copy_(wide.weight[kept])
    narrow.bias.copy_(wide.bias[kept])
    layer.output.dense.weight.copy_(source.output.dense.weight[:, kept])
    removed = torch.ones(wide.out_features, dtype=torch.bool)
    removed[kept] = False
    constant = source.output.dense.weight[:, removed] @ activations[:, removed].mean(0)
    layer.output.dense.bias.copy_(source.output.dense.bias + constant)


def restrict_vocabulary(teacher: Bert, kept: Sequence[int]) -> Bert:
    """The teacher with the embedding rows of the kept word pieces alone."""
    shape = teacher.shape
    small = Bert(replace(shape, vocab_size=len(kept), dropout=0.0))
    weights = dict(teacher.state_dict())
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][list(kept)]
    small.load_state_dict(weights)
    return small.eval()


@torch.inference_mode()
def start_student(
    teacher: Bert,
    layers: Sequence[int],
    *,
    intermediate_size: int,
    texts: Sequence[Ids],
    strength: float = 0.01,
) -> Bert:
    """A student of the given teacher layers, fitted on `texts` (ids of the student's own vocabulary).

    A student with all of the teacher's layers, none narrowed, is the teacher."""
    shape = replace(teacher.shape, num_layers=len(layers), intermediate_size=intermediate_size, dropout=0.0)
    if shape == teacher.shape:
        return teacher
    student = Bert(shape).eval()
    student.embeddings.load_state_dict(teacher.embeddings.state_dict())
    table = TokenTable(texts, "cpu")
    batches = [table.batch(range(start, min(start + 32, len(texts)))) for start in range(0, len(texts), 32)]
    ours = [teacher.embeddings(ids, torch.zeros_like(ids)) for ids, _ in batches]
    theirs = list(ours)
    masks = [mask for _, mask in batches]
    position = 0
    for layer, number in zip(student.layers, layers, strict=True):
        source = teacher.layers[number]
        while position <= number:
            traces = [_trace(teacher.layers[position], x, mask) for x, mask in zip(theirs, masks, strict=True)]
            theirs = [output for _, _, output in traces]
            position += 1
        first_wanted = _flat([first for first, _, _ in traces], masks)
        second_wanted = _flat([second for _, second, _ in traces], masks)
        layer.attention.load_state_dict(source.attention.state_dict())
        layer.output.LayerNorm.load_state_dict(source.output.LayerNorm.state_dict())
        x = _flat(ours, masks)
        mixed = _flat([layer.attention["self"](h, mask) for h, mask in zip(ours, masks, strict=True)], masks)
        projection = layer.attention["output"]
        assert isinstance(projection, BertResidual)
        _refit(projection.dense, mixed, first_wanted - x, strength)
        middle = projection.LayerNorm(projection.dense(mixed) + x)
        _narrow(layer, source, middle)
        _refit(layer.output.dense, F.gelu(layer.intermediate["dense"](middle)), second_wanted - middle, strength)
        ours = [layer(h, mask) for h, mask in zip(ours, masks, strict=True)]
    return student


def _flat(batches: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """The states of real tokens of all batches, [N, E]."""
    return torch.cat([states[mask] for states, mask in zip(batches, masks, strict=True)])
