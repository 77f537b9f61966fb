# %% 1 · takes the order of repeat
reads, times_smaller, times_fewer = [0, 1, 0, 1, 0, 1], 3, 1
# %% 1 · divides by K instead of G
reads, times_smaller, times_fewer = [0, 0, 1, 1, 2, 2], 3, 1
# %% 1 · groups of unequal size
reads, times_smaller, times_fewer = [0, 0, 0, 0, 1, 1], 3, 1
# %% 1 · counts from 1
reads, times_smaller, times_fewer = [1, 1, 1, 2, 2, 2], 3, 1
# %% 1 · gives one number for reads
reads, times_smaller, times_fewer = 0, 3, 1
# %% 1 · thinks that the cache shrinks by the number of kv heads
reads, times_smaller, times_fewer = [0, 0, 0, 1, 1, 1], 2, 1
# %% 1 · thinks that the cache shrinks by all heads
reads, times_smaller, times_fewer = [0, 0, 0, 1, 1, 1], 6, 1
# %% 1 · thinks that sharing saves arithmetic
reads, times_smaller, times_fewer = [0, 0, 0, 1, 1, 1], 3, 3
# %% 1 · leaves the last open
reads, times_smaller, times_fewer = [0, 0, 0, 1, 1, 1], 3, None


# %% 2 · groups by remainder
def attention_by_axis(q, k, v, mask):
    q = q.unflatten(1, (-1, k.shape[1])).transpose(1, 2)
    k, v = k[:, :, None], v[:, :, None]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(1, 2)


# %% 2 · forgets the scale
def attention_by_axis(q, k, v, mask):
    q, k, v = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]
    scores = (q @ k.transpose(-1, -2)).masked_fill(~mask[:, :, None], float("-inf"))
    return (scores.softmax(dim=-1) @ v).flatten(1, 2)


# %% 2 · forgets the mask
def attention_by_axis(q, k, v, mask):
    q, k, v = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(dim=-1) @ v).flatten(1, 2)


# %% 2 · turns the mask round
def attention_by_axis(q, k, v, mask):
    q, k, v = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(mask[:, :, None], -1e9)
    return (scores.softmax(dim=-1) @ v).flatten(1, 2)


# %% 2 · masks after the softmax
def attention_by_axis(q, k, v, mask):
    q, k, v = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights.masked_fill(~mask[:, :, None], 0) @ v).flatten(1, 2)


# %% 2 · fills with 0 instead of minus infinity
def attention_by_axis(q, k, v, mask):
    q, k, v = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~mask[:, :, None], 0).softmax(dim=-1) @ v).flatten(1, 2)


# %% 2 · forgets to join group and kv head
def attention_by_axis(q, k, v, mask):
    q, k, v = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    return scores.softmax(dim=-1) @ v


# %% 2 · softmax over the queries
def attention_by_axis(q, k, v, mask):
    q, k, v = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~mask[:, :, None], -1e9).softmax(dim=-2) @ v).flatten(1, 2)


# %% 2 · gives the keys no axis
def attention_by_axis(q, k, v, mask):
    q = q.unflatten(1, (k.shape[1], -1))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


# %% 2 · an axis of size 1, which @ copies in secret
def attention_by_axis(q, k, v, mask):
    q, k, v = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    return (scores.softmax(dim=-1) @ v).flatten(1, 2)


# %% 2 · copies the keys
def attention_by_axis(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v


# %% 2 · group and kv head change letters
def attention_by_axis(q, k, v, mask):
    q = q.unflatten(1, (-1, k.shape[1]))
    scores = torch.einsum("bgkld,bksd->bkgls", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    return torch.einsum("bkgls,bksd->bgkld", scores.softmax(dim=-1), v).flatten(1, 2)


# %% 2 · adds the group up
def attention_by_axis(q, k, v, mask):
    q = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bkgld,bksd->bkls", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bkls,bksd->bkld", scores.softmax(dim=-1), v)


# %% 3 · averages heads that are K apart
def pool_heads(weight, kv_heads, head_dim):
    return weight.unflatten(0, (-1, kv_heads, head_dim)).mean(dim=0).flatten(0, 1)


# %% 3 · adds instead of averaging
def pool_heads(weight, kv_heads, head_dim):
    return weight.unflatten(0, (kv_heads, -1, head_dim)).sum(dim=1).flatten(0, 1)


# %% 3 · keeps the first head of each group
def pool_heads(weight, kv_heads, head_dim):
    return weight.unflatten(0, (kv_heads, -1, head_dim))[:, 0].flatten(0, 1)


# %% 3 · keeps the first K heads
def pool_heads(weight, kv_heads, head_dim):
    return weight[: kv_heads * head_dim]


# %% 3 · averages the channels of a head
def pool_heads(weight, kv_heads, head_dim):
    return weight.unflatten(0, (kv_heads * head_dim, -1)).mean(dim=1)


# %% 3 · forgets to flatten
def pool_heads(weight, kv_heads, head_dim):
    return weight.unflatten(0, (kv_heads, -1, head_dim)).mean(dim=1)


# %% 3 · averages over all heads and repeats
def pool_heads(weight, kv_heads, head_dim):
    return weight.unflatten(0, (-1, head_dim)).mean(dim=0).repeat(kv_heads, 1)


# %% 3 · cuts the columns
def pool_heads(weight, kv_heads, head_dim):
    return weight.unflatten(1, (kv_heads, -1, head_dim)).mean(dim=2)


# %% 3 · takes the rows of a head for neighbours in a group
def pool_heads(weight, kv_heads, head_dim):
    return weight.unflatten(0, (kv_heads, head_dim, -1)).mean(dim=2).flatten(0, 1)
