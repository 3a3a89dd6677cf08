"""The forward pass of adapted Llama-like models, written for training: nothing is computed that no gradient needs.

transformers and peft define the model and its adapter; this computes the same function, and the same gradients, from
their weights. What it saves, against their own forward pass:

- a linear layer, its adapter and their gradients are one autograd step each, without intermediates;
- tokens that begin several samples of a pack alike (the system prompt) pass through the model once;
- attention runs sample by sample, so none of it is masked away;
- the output layer sees only positions that carry loss, in chunks, and its gradient is taken on the spot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from .collate import Batch

Tensor = torch.Tensor
Weight = Callable[[], Tensor]

# Rows of logits that exist at once: 512 of them are 100 MB for a vocabulary of 49,152.
LOSS_ROWS = 512
# Families whose layers are exactly what `_layer` computes.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class RmsNorm(Function):
    """x / rms(x) * weight, for a frozen weight; x has shape [..., width]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, scale, weight = ctx.saved_tensors
        g = (grads[0] * weight).to(scale.dtype)
        along = (g * x).sum(-1, keepdim=True).mul_(scale**3).div_(-x.shape[-1])
        return g.mul_(scale).addcmul_(x.to(g.dtype), along).to(x.dtype), None, None


class Rotate(Function):
    """Rotary position embedding of the first `heads` heads, in place; x has shape [tokens, heads and more, size]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        _rotate(x[:, :heads], cos, sin)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        dx = grads[0].clone(memory_format=torch.contiguous_format)
        _rotate(dx[:, : ctx.heads], cos, -sin)
        return dx, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    low, high = x.chunk(2, -1)
    turned = (low * cos).addcmul_(high, sin, value=-1)
    high.copy_((high * cos).addcmul_(low, sin))
    low.copy_(turned)


class SwiGlu(Function):
    """silu(gate) * up; gate and up come side by side, as [tokens, 2 * width]."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, 1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (both,), (dh,) = ctx.saved_tensors, grads
        gate, up = both.chunk(2, 1)
        result = torch.empty_like(both)
        dgate, dup = result.chunk(2, 1)
        torch.mul(F.silu(gate), dh, out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(dh * up, gate))
        return result


class AdaptedLinear(Function):
    """Linear layers that read the same x, with their adapters: x W_i' + b_i + scale * (x A_i') B_i', side by side.

    Frozen weights come as functions, so that a quantised one exists in full only while it is used. x has shape
    [tokens, inputs]; A_i [rank, inputs]; B_i [outputs_i, rank]; the result [tokens, sum of the outputs].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: float, weights: list[Weight], biases: list[Tensor | None], *lora: Tensor
    ) -> Tensor:
        kind, count = x.dtype, len(weights)
        a = torch.cat([part.to(kind) for part in lora[:count]])
        b = [part.to(kind) for part in lora[count:]]
        inner = x @ a.t()
        result = x.new_empty(len(x), sum(len(part) for part in b))
        rank = len(lora[0])
        for part, w, bias, up, u in zip(
            result.split([len(up) for up in b], 1), weights, biases, b, inner.split(rank, 1), strict=True
        ):
            torch.mm(x, w().t(), out=part)
            part.addmm_(u, up.t(), alpha=scale)
            if bias is not None:
                part += bias
        ctx.save_for_backward(x, inner, a, *b)
        ctx.weights, ctx.scale, ctx.rank = weights, scale, rank
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, inner, a, *b = ctx.saved_tensors
        back = torch.empty_like(inner)
        dx, db = None, []
        for dy, w, up, u, v in zip(
            grads[0].split([len(up) for up in b], 1), ctx.weights, b, inner.split(ctx.rank, 1),
            back.split(ctx.rank, 1), strict=True,
        ):  # fmt: skip
            torch.mm(dy, up, out=v)
            db.append((dy.t() @ u).float().mul_(ctx.scale))
            if ctx.needs_input_grad[0]:
                dx = dy @ w() if dx is None else dx.addmm_(dy, w())
        back.mul_(ctx.scale)
        if dx is not None:
            dx.addmm_(back, a)
        da = (back.t() @ x).float()
        return dx, None, None, None, *da.split(ctx.rank), *db


class OutputLoss(Function):
    """Summed cross-entropy of a frozen output layer; the gradient of its input is taken while the logits exist.

    hidden has shape [rows, width], weight [vocabulary, width], targets [rows].
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        dh = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for at in range(0, len(hidden), LOSS_ROWS):
            rows = slice(at, at + LOSS_ROWS)
            logits = (hidden[rows] @ weight.t()).float()
            wanted = targets[rows, None]
            chosen = logits.gather(1, wanted)
            top = torch.logsumexp(logits, 1, keepdim=True)
            total += (top - chosen).sum()
            if dh is not None:
                share = logits.sub_(top).exp_()
                share.scatter_add_(1, wanted, torch.full_like(chosen, -1.0))
                torch.mm(share.to(weight.dtype), weight, out=dh[rows])
        if dh is not None:
            ctx.save_for_backward(dh)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dh,) = ctx.saved_tensors
        return dh * grads[0].to(dh.dtype), None, None


@dataclass(frozen=True)
class _Linears:
    """Linear layers that read the same input, and their adapters."""

    weights: list[Weight]
    biases: list[Tensor | None]
    lora: list[Tensor]
    scale: float
    dropout: Any

    @property
    def drops_out(self) -> bool:
        """Whether the adapters' input is thinned out: with a dropout, and while training."""
        return bool(self.dropout.training and getattr(self.dropout, "p", 0.0))

    def __call__(self, x: Tensor) -> Tensor:
        if not self.drops_out:
            return AdaptedLinear.apply(x, self.scale, self.weights, self.biases, *self.lora)
        count, parts = len(self.weights), []
        for w, bias, a, b in zip(self.weights, self.biases, self.lora[:count], self.lora[count:], strict=True):
            inner = F.linear(self.dropout(x), a.to(x.dtype))
            parts.append(F.linear(x, w(), bias) + self.scale * F.linear(inner, b.to(x.dtype)))
        return torch.cat(parts, 1)


class Decoder:
    """The summed loss of a batch under a peft model, for training and for measuring.

    Models of `FAMILIES` are computed here; others by transformers itself, packed all the same.
    """

    def __init__(self, adapted: Any) -> None:
        """Args:
        adapted: A peft model of a causal language model, its adapter named `default`.
        """
        self.model = adapted.get_base_model()
        self.recompute = False
        config = self.model.config
        self.fast = config.model_type in FAMILIES and not _slides(config)
        if not self.fast:
            return
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layers = []
        for layer in self.model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            parts = (
                _linears(attention.q_proj, attention.k_proj, attention.v_proj),
                _linears(attention.o_proj),
                _linears(mlp.gate_proj, mlp.up_proj),
                _linears(mlp.down_proj),
            )
            norms = [layer.input_layernorm, layer.post_attention_layernorm]
            norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
            self.layers.append((parts, norms))

    def recompute_activations(self) -> None:
        """From here on forgets each layer's activations, and computes them again when its gradient is due."""
        self.recompute = True
        if not self.fast:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable()

    @property
    def shares_beginnings(self) -> bool:
        """Whether a token that several samples share may pass once: not where each would drop out other values."""
        return self.fast and not self.layers[0][0][0].drops_out

    def loss(self, batch: Batch) -> Tensor:
        """Summed cross-entropy of the batch's trained tokens, in nats; a scalar with a gradient."""
        if not self.fast:
            out = self.model(input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False)
            return F.cross_entropy(out.logits[0, batch.rows].float(), batch.targets, reduction="sum")
        hidden = self._hidden(batch)[batch.rows]
        return OutputLoss.apply(hidden, self.model.get_output_embeddings().weight, batch.targets)

    def _hidden(self, batch: Batch) -> Tensor:
        body = self.model.model
        x = F.embedding(batch.ids, body.embed_tokens.weight)
        cos, sin = (
            part[0, :, None, : self.size // 2].contiguous() for part in body.rotary_emb(x, batch.positions[None])
        )
        for number in range(len(self.layers)):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(self._layer, number, x, cos, sin, batch, use_reentrant=False)
            else:
                x = self._layer(number, x, cos, sin, batch)
        return _norm(x, body.norm)

    def _layer(self, number: int, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        (qkv, output, gate_up, down), (before, after, q_norm, k_norm) = self.layers[number]
        width, turned = self.heads + 2 * self.kv_heads, self.heads + self.kv_heads
        y = qkv(_norm(x, before)).view(len(x), width, self.size)
        if q_norm is not None:
            q, k, v = y.split([self.heads, self.kv_heads, self.kv_heads], 1)
            y = torch.cat([_norm(q, q_norm), _norm(k, k_norm), v], 1)
        x = x + output(self._attend(Rotate.apply(y, cos, sin, turned), batch))
        return x + down(SwiGlu.apply(gate_up(_norm(x, after))))

    def _attend(self, y: Tensor, batch: Batch) -> Tensor:
        """Causal attention within each sample; [tokens, q, k and v heads, size] to [tokens, heads * size]."""
        if batch.slots is not None:
            y = y.index_select(0, batch.slots)
        found = []
        for part, (samples, length) in zip(y.split([n * t for n, t in batch.blocks]), batch.blocks, strict=True):
            grouped = part.view(samples, length, -1, self.size).transpose(1, 2)
            q, k, v = grouped.split([self.heads, self.kv_heads, self.kv_heads], 1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
            found.append(out.transpose(1, 2).reshape(samples * length, -1))
        mixed = torch.cat(found)
        return mixed if batch.first is None else mixed.index_select(0, batch.first)


def _norm(x: Tensor, module: Any) -> Tensor:
    return RmsNorm.apply(x, module.weight, module.variance_epsilon)


def _linears(*modules: Any) -> _Linears:
    """The weights of peft's adapted layers; all have the same rank, scale and dropout."""
    lora = [m.lora_A["default"].weight for m in modules] + [m.lora_B["default"].weight for m in modules]
    dropout = modules[0].lora_dropout["default"]
    layers = [m.base_layer for m in modules]
    return _Linears(
        [_weight(layer) for layer in layers], [layer.bias for layer in layers], lora, modules[0].scaling["default"],
        dropout,
    )  # fmt: skip


def _weight(layer: Any) -> Weight:
    weight = layer.weight
    if getattr(weight, "quant_state", None) is None:
        return lambda: weight
    from bitsandbytes.functional import dequantize_4bit

    return lambda: dequantize_4bit(weight.data, weight.quant_state).to(layer.compute_dtype or torch.float32)


def _slides(config: Any) -> bool:
    """Whether some layers attend to a window only."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    # Without a list of kinds, mistral's window holds for every layer, qwen2's only where it is switched on.
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return kinds != {"full_attention"} or window is not None
