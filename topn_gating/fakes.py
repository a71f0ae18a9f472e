"""The operators without data: the shapes and dtypes that they give, for compilers and the meta device."""

import functools

import torch
from torch import Tensor

from .dtypes import real_dtype


def _fake(function):
    """Registers the shapes and dtypes of the operator that ``function`` is named after, which take tensors of one device."""

    @functools.wraps(function)
    def checked(*args):
        devices = {str(t.device) for t in args if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{function.__name__} takes tensors of one device, got {', '.join(sorted(devices))}")
        return function(*args)

    torch.library.register_fake(f"topn_gating::{function.__name__}")(checked)


@_fake
def gate(logits, noise, token_mask, top_n, eps, noise_mult, soft, losses):
    *lead, n, e = logits.shape
    dtype = real_dtype(logits.dtype)
    return (
        logits.new_empty((*lead, n, top_n), dtype=dtype),
        logits.new_empty((*lead, n, top_n), dtype=torch.int32),
        logits.new_empty((*lead, e), dtype=dtype),
        logits.new_empty((*lead, e), dtype=torch.int32),
        logits.new_empty((), dtype=dtype),
        logits.new_empty((), dtype=dtype),
    )


@_fake
def gate_backward(gw, gi, gb, gz, logits, noise, token_mask, expert, top_count, eps, noise_mult, soft):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_fake
def assign(weight, expert, draws, threshold, token_mask, num_gates, capacity, policy, eps):
    lead = weight.shape[:-2]
    return (
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape, dtype=torch.int32),
        weight.new_empty((*lead, num_gates, capacity), dtype=torch.int32),
        weight.new_empty((*lead, num_gates), dtype=torch.int32),
    )


@_fake
def assign_backward(grad_kept, slot):
    return grad_kept.new_empty(grad_kept.shape)


@_fake
def dense(weight, expert, slot, num_gates, capacity, dtype, straight_through):
    shape = (*weight.shape[:-1], num_gates, capacity)
    return weight.new_empty(shape, dtype=dtype), weight.new_empty(shape, dtype=dtype)


@_fake
def dense_backward(grad_dispatch, grad_combine, expert, slot):
    grad = grad_combine if grad_dispatch is None else grad_dispatch
    return slot.new_empty(slot.shape, dtype=real_dtype(grad.dtype))


@_fake
def dispatch(x, weight, expert, slot, source, straight_through):
    return x.new_empty((*source.shape, x.shape[-1]))


@_fake
def dispatch_backward(grad_y, x, expert, slot, source):
    grad_x = grad_y.new_empty((*slot.shape[:-1], grad_y.shape[-1]))
    return grad_x, grad_y.new_empty((0,) if x is None else slot.shape, dtype=real_dtype(grad_y.dtype))


@_fake
def combine(y, weight, expert, slot, source):
    return y.new_empty((*slot.shape[:-1], y.shape[-1]))


@_fake
def combine_backward(grad_out, y, weight, expert, slot, source):
    return y.new_empty(y.shape), weight.new_empty(weight.shape)


@_fake
def linear(x, weight):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_fake
def linear_backward(grad_logits, x, weight, wants_x, wants_weight):
    return x.new_empty(x.shape if wants_x else (0,)), weight.new_empty(weight.shape if wants_weight else (0,))
