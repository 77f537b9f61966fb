# %% 1 · takes the keys' shift for a change
answer = (True, True, False, True)
# %% 1 · believes that softmax removes the values' shift too
answer = (False, False, False, True)
# %% 1 · counts the doubled keys twice
answer = (False, True, True, True)
# %% 1 · believes that softmax normalises a factor away
answer = (False, True, False, False)
# %% 1 · everything changes the output
answer = (True, True, True, True)
# %% 1 · one value for all
answer = True
# %% 1 · words
answer = ("no", "yes", "no", "yes")


# %% 2 · one head
def multi_head(q, k, v, num_heads):
    return attention(q, k, v)


# %% 2 · view only: heads are strips
def multi_head(q, k, v, num_heads):
    B, N, D = q.shape
    q, k, v = (t.view(B, num_heads, N, D // num_heads) for t in (q, k, v))
    return attention(q, k, v).view(B, N, D)


# %% 2 · cuts, and forgets to swap: heads look at heads
def multi_head(q, k, v, num_heads):
    q, k, v = (t.unflatten(-1, (num_heads, -1)) for t in (q, k, v))
    return attention(q, k, v).flatten(2)


# %% 2 · forgets to swap on the way back
def multi_head(q, k, v, num_heads):
    B, N, D = q.shape
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attention(q, k, v).reshape(B, N, D)


# %% 2 · cuts the channels the other way round
def multi_head(q, k, v, num_heads):
    q, k, v = (t.unflatten(-1, (-1, num_heads)).movedim(-1, 1) for t in (q, k, v))
    return attention(q, k, v).movedim(1, -1).flatten(2)


# %% 2 · softmax over the queries
def multi_head(q, k, v, num_heads):
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(dim=-2) @ v).transpose(1, 2).flatten(2)


# %% 2 · divides by the root of the whole width
def multi_head(q, k, v, num_heads):
    D = q.shape[-1]
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / D**0.5
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


# %% 2 · does not divide
def multi_head(q, k, v, num_heads):
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(-1, -2)).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


# %% 2 · no softmax
def multi_head(q, k, v, num_heads):
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 @ v).transpose(1, 2).flatten(2)


# %% 2 · swaps queries and keys
def multi_head(q, k, v, num_heads):
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attention(k, q, v).transpose(1, 2).flatten(2)


# %% 2 · all pictures in one sequence
def multi_head(q, k, v, num_heads):
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    return heads_by_loop(*flat, num_heads).view(q.shape)


# %% 2 · leaves the heads apart
def multi_head(q, k, v, num_heads):
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attention(q, k, v)


# %% 3 · does not subtract the largest score
def attend_stream(q, chunks):
    total, mixed = 0.0, torch.zeros_like(q)
    for k, v in chunks:
        shares = (k @ q / len(q) ** 0.5).exp()
        total, mixed = total + shares.sum(), mixed + shares @ v
    return mixed / total


# %% 3 · each chunk has its own largest score
def attend_stream(q, chunks):
    total, mixed = 0.0, torch.zeros_like(q)
    for k, v in chunks:
        scores = k @ q / len(q) ** 0.5
        shares = (scores - scores.max()).exp()
        total, mixed = total + shares.sum(), mixed + shares @ v
    return mixed / total


# %% 3 · shrinks only the sum of shares
def attend_stream(q, chunks):
    largest, total, mixed = torch.tensor(-torch.inf), 0.0, torch.zeros_like(q)
    for k, v in chunks:
        scores = k @ q / len(q) ** 0.5
        new = torch.maximum(largest, scores.max())
        shares = (scores - new).exp()
        total = total * (largest - new).exp() + shares.sum()
        mixed = mixed + shares @ v
        largest = new
    return mixed / total


# %% 3 · shrinks by the wrong sign
def attend_stream(q, chunks):
    largest, total, mixed = torch.tensor(-1e4), 0.0, torch.zeros_like(q)
    for k, v in chunks:
        scores = k @ q / len(q) ** 0.5
        new = torch.maximum(largest, scores.max())
        shares, shrink = (scores - new).exp(), (new - largest).clamp(max=50).exp()
        total, mixed, largest = total * shrink + shares.sum(), mixed * shrink + shares @ v, new
    return mixed / total


# %% 3 · collects the chunks first
def attend_stream(q, chunks):
    pairs = list(chunks)
    k, v = torch.cat([k for k, v in pairs]), torch.cat([v for k, v in pairs])
    return attention(q[None], k, v)[0]


# %% 3 · the mean of the chunks' results
def attend_stream(q, chunks):
    found = [attention(q[None], k, v)[0] for k, v in chunks]
    return torch.stack(found).mean(dim=0)


# %% 3 · only the last chunk
def attend_stream(q, chunks):
    for k, v in chunks:
        out = attention(q[None], k, v)[0]
    return out


# %% 3 · does not divide by the root of the width
def attend_stream(q, chunks):
    largest, total, mixed = torch.tensor(-torch.inf), 0.0, torch.zeros_like(q)
    for k, v in chunks:
        scores = k @ q
        new = torch.maximum(largest, scores.max())
        shares, shrink = (scores - new).exp(), (largest - new).exp()
        total, mixed, largest = total * shrink + shares.sum(), mixed * shrink + shares @ v, new
    return mixed / total


# %% 3 · forgets the last division
def attend_stream(q, chunks):
    largest, mixed = torch.tensor(-torch.inf), torch.zeros_like(q)
    for k, v in chunks:
        scores = k @ q / len(q) ** 0.5
        new = torch.maximum(largest, scores.max())
        mixed = mixed * (largest - new).exp() + (scores - new).exp() @ v
        largest = new
    return mixed


# %% 3 · measures all shares against the first chunk's largest score
def attend_stream(q, chunks):
    first, total, mixed = None, 0.0, 0.0
    for k, v in chunks:
        scores = k @ q / len(q) ** 0.5
        first = scores.max() if first is None else first
        shares = (scores - first).exp()
        total, mixed = total + shares.sum(), mixed + shares @ v
    return mixed / total


# %% 2 · the result of each head is added, not laid beside the others
def multi_head(q, k, v, num_heads):
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attention(q, k, v).sum(dim=1).repeat(1, 1, num_heads)
