"""A compact Qwen3-Next network for training on CPU.

Its parameters have the names and shapes of `transformers.Qwen3NextForCausalLM`, so `state_dict()` loads into that class
unchanged. It differs in how it computes: the gated delta rule shares key-head products among value heads and solves one
triangular system per chunk, and all experts of a layer run as one matrix product (with eight small experts that is
cheaper than gathering tokens).

Shapes: B sequences, T tokens (a multiple of `CHUNK`), D hidden size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3NextConfig

CHUNK = 64


class Norm(nn.Module):
    """Zero-centred RMSNorm: the learned scale is 1 + weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)


class GatedNorm(nn.Module):
    """RMSNorm of x times silu(z), per value head."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) * F.silu(z)


def chunked_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Outputs of the gated delta rule from an empty state.

    q, k [B, HK, T, K] with q scaled, v [B, HV, T, V], log decay g <= 0 and beta [B, HV, T]; returns [B, HV, T, V].
    """
    batch, key_heads, length, key_dim = k.shape
    value_heads, value_dim = v.shape[1], v.shape[3]
    ratio, chunks = value_heads // key_heads, length // CHUNK
    q, k = (x.view(batch, key_heads, 1, chunks, CHUNK, key_dim) for x in (q, k))
    v = v.view(batch, key_heads, ratio, chunks, CHUNK, value_dim)
    beta = beta.view(batch, key_heads, ratio, chunks, CHUNK, 1)
    log_decay = g.view(batch, key_heads, ratio, chunks, CHUNK, 1).cumsum(-2)

    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    decay = (log_decay - log_decay.transpose(-1, -2)).masked_fill(~causal, -math.inf).exp()
    from_start = log_decay.exp()
    # u = v_rhs - k_rhs @ state, where both solve the same unit-triangular system of the chunk.
    system = (k @ k.transpose(-1, -2)) * (decay * beta)
    rhs = torch.cat((v * beta, k * (beta * from_start)), -1)
    v_rhs, k_rhs = torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True).split(
        (value_dim, key_dim), -1
    )
    scores = (q @ k.transpose(-1, -2)) * decay
    q_start = q * from_start
    k_end = (k * (log_decay[..., -1:, :] - log_decay).exp()).transpose(-1, -2)
    chunk_decay = from_start[..., -1:, :]

    state = v.new_zeros(batch, key_heads, ratio, key_dim, value_dim)
    outputs = []
    for i in range(chunks):
        u = v_rhs[:, :, :, i] - k_rhs[:, :, :, i] @ state
        outputs.append(q_start[:, :, :, i] @ state + scores[:, :, :, i] @ u)
        state = state * chunk_decay[:, :, :, i] + k_end[:, :, :, i] @ u
    return torch.stack(outputs, 3).reshape(batch, value_heads, length, value_dim)


class GatedDeltaNet(nn.Module):
    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.in_proj_qkvz = nn.Linear(config.hidden_size, 2 * keys + 2 * values, bias=False)
        self.in_proj_ba = nn.Linear(config.hidden_size, 2 * self.value_heads, bias=False)
        channels, width = 2 * keys + values, config.linear_conv_kernel_dim
        self.conv1d = nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=False)
        # Time steps from 0.001 to 0.1 with A from 1 to 16 give heads from slow to fast decay.
        step = torch.exp(torch.linspace(math.log(0.001), math.log(0.1), self.value_heads))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_log = nn.Parameter(torch.empty(self.value_heads).uniform_(1, 16).log())
        self.norm = GatedNorm(self.value_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(values, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        ratio = self.value_heads // self.key_heads
        group = ratio * self.value_dim
        # The checkpoint layout interleaves q, k, v, z (and b, a) by key head.
        q, k, v, z = (
            self.in_proj_qkvz(x)
            .view(batch, length, self.key_heads, -1)
            .split((self.key_dim, self.key_dim, group, group), -1)
        )
        b, a = self.in_proj_ba(x).view(batch, length, self.key_heads, 2, ratio).unbind(3)
        mixed = torch.cat([part.flatten(2) for part in (q, k, v)], -1).transpose(1, 2)
        mixed = F.silu(self.conv1d(mixed)[..., :length])
        keys = self.key_heads * self.key_dim
        q, k, v = mixed.split((keys, keys, self.value_heads * self.value_dim), 1)
        q, k = (part.reshape(batch, self.key_heads, self.key_dim, length).transpose(2, 3) for part in (q, k))
        q, k = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (q, k))
        v = v.reshape(batch, self.value_heads, self.value_dim, length).transpose(2, 3)
        g = -self.A_log.exp() * F.softplus(a.flatten(2) + self.dt_bias)
        out = chunked_gated_delta_rule(
            (q * self.key_dim**-0.5).contiguous(),
            k.contiguous(),
            v.contiguous(),
            g.transpose(1, 2).contiguous(),
            b.flatten(2).sigmoid().transpose(1, 2).contiguous(),
        ).transpose(1, 2)
        return self.out_proj(self.norm(out, z.reshape(out.shape)).flatten(2))


class GatedAttention(nn.Module):
    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, 2 * heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)
        self.q_norm = Norm(self.head_dim, config.rms_norm_eps)
        self.k_norm = Norm(self.head_dim, config.rms_norm_eps)
        self.rope = config.rope_parameters

    def rotate(self, x: Tensor) -> Tensor:
        """Partial rotary embedding of the first dimensions of x [B, H, T, head_dim]."""
        size = int(self.head_dim * self.rope["partial_rotary_factor"])
        frequencies = self.rope["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(x.shape[2])[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        first, second, rest = x.split((size // 2, size // 2, self.head_dim - size), -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [B, H, T, head_dim], keys and values [B, HKV, T, head_dim], output gate [B, T, H * head_dim]."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, gate = self.q_proj(x).view(*x.shape[:2], -1, 2 * self.head_dim).chunk(2, -1)
        q = self.rotate(self.q_norm(q).transpose(1, 2))
        k = self.rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2))
        v = self.v_proj(x).view(heads).transpose(1, 2)
        return q, k, v, gate.flatten(2).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = self.project(x)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2) * gate)


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        experts, size, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * size, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [N, D] through every expert, mixed by weights [N, experts] (zero where not routed)."""
        gate, up = F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(1, (weights.shape[1], -1)).chunk(2, -1)
        hidden = F.silu(gate) * (up * weights[..., None])
        return hidden.flatten(1) @ self.down_proj.transpose(1, 2).flatten(0, 1)


class MoE(nn.Module):
    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
        self.balance_loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        probabilities = self.gate(tokens).softmax(-1)
        top, chosen = probabilities.topk(self.top_k, -1)
        weights = torch.zeros_like(probabilities).scatter(1, chosen, top / top.sum(-1, keepdim=True))
        share = (weights > 0).float().mean(0) / self.top_k
        self.balance_loss = share.numel() * (share * probabilities.mean(0)).sum()
        out = self.experts(tokens, weights)
        out = out + self.shared_expert_gate(tokens).sigmoid() * self.shared_expert(tokens)
        return out.view(x.shape)


class Layer(nn.Module):
    def __init__(self, config: Qwen3NextConfig, index: int) -> None:
        super().__init__()
        if config.layer_types[index] == "linear_attention":
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config)
        dense = index in config.mlp_only_layers
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        mixer = self.linear_attn if hasattr(self, "linear_attn") else self.self_attn
        x = x + mixer(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Network(nn.Module):
    """Token ids [B, T] to final hidden states [B, T, D]; logits are `F.linear(hidden, embed_tokens.weight)`."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        residual_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2 and "conv1d" not in name:
                last = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj"))
                nn.init.normal_(parameter, std=residual_std if last else config.initializer_range)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def balance_loss(self) -> Tensor:
        """The mean over the mixture-of-experts layers of the last forward pass; 1 when experts are used evenly."""
        return torch.stack([layer.mlp.balance_loss for layer in self.layers if isinstance(layer.mlp, MoE)]).mean()


class MtpLayer(nn.Module):
    """A decoder layer with full attention and a dense MLP."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.self_attn = GatedAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Map x [B, T, D] of one pass to [B, T, D]; the pass's keys and values are appended to `past`.

        The n-th of several passes over the same places is what serving computes as the n-th draft: a place sees the
        keys and values of the last pass at itself, of the pass before one place earlier, and so on to the first pass.
        """
        q, k, v, gate = self.self_attn.project(self.input_layernorm(x))
        past.append((k, v))
        groups, length = q.shape[1] // k.shape[1], q.shape[2]
        passes = [[part.repeat_interleave(groups, 1) for part in pair] for pair in past]
        first_k, first_v = passes[0]
        chained = [(k.roll(back, 2), v.roll(back, 2)) for back, (k, v) in enumerate(reversed(passes[1:]))]
        mask = torch.ones(length, length, dtype=torch.bool).tril(-len(chained))
        scores = (q @ first_k.mT).masked_fill(~mask, -math.inf)
        own = [(q * k).sum(-1, keepdim=True) for k, _ in chained]
        weights = (torch.cat([scores, *own], -1) * q.shape[-1] ** -0.5).softmax(-1)
        out = weights[..., :length] @ first_v
        for i, (_, v) in enumerate(chained):
            out = out + weights[..., length + i, None] * v
        x = x + self.self_attn.o_proj(out.transpose(1, 2).flatten(2) * gate)
        return x + self.mlp(self.post_attention_layernorm(x))


class MtpHead(nn.Module):
    """The multi-token-prediction head: from a hidden state and the next token, the hidden state after that token.

    Its parameters have the names and shapes of the `mtp.*` tensors of Qwen3-Next checkpoints.
    """

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.pre_fc_norm_embedding = Norm(config.hidden_size, config.rms_norm_eps)
        self.pre_fc_norm_hidden = Norm(config.hidden_size, config.rms_norm_eps)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([MtpLayer(config)])
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, embedded: Tensor, hidden: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Map the next tokens' embeddings and the hidden states, both [B, T, D], to [B, T, D]; see `MtpLayer`."""
        x = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], -1)
        return self.norm(self.layers[0](self.fc(x), past))
