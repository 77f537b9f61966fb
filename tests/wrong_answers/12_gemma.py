# %% 1 · thinks that the vocabulary is largest
order = "abcde"
# %% 1 · swaps GeGLU and embedding
order = "bacde"
# %% 1 · thinks that the GeGLU alone beats all blocks
order = "cbade"
# %% 1 · thinks that kv heads cost as much as query heads
order = "bcaed"
# %% 1 · the least first
order = "edacb"
# %% 1 · puts attention before the embedding
order = "bcdae"
# %% 1 · leaves one out
order = "bcad"
# %% 1 · gives names
order = ["num_hidden_layers", "intermediate_size"]


# %% 2 · leaves nothing out
def logits_without(model, skip, x, position_ids, mask):
    return model.logits(model(x, position_ids, mask))


# %% 2 · counts from 1
def logits_without(model, skip, x, position_ids, mask):
    cos, sin = model.rotary_emb(position_ids)
    for i, layer in enumerate(model.layers, start=1):
        if i != skip:
            x = layer(x, cos, sin, mask)
    return model.logits(model.norm(x))


# %% 2 · stops at the block instead
def logits_without(model, skip, x, position_ids, mask):
    cos, sin = model.rotary_emb(position_ids)
    for layer in model.layers[:skip]:
        x = layer(x, cos, sin, mask)
    return model.logits(model.norm(x))


# %% 2 · forgets the last norm
def logits_without(model, skip, x, position_ids, mask):
    cos, sin = model.rotary_emb(position_ids)
    for i, layer in enumerate(model.layers):
        if i != skip:
            x = layer(x, cos, sin, mask)
    return model.logits(x)


# %% 2 · forgets the mask
def logits_without(model, skip, x, position_ids, mask):
    cos, sin = model.rotary_emb(position_ids)
    for i, layer in enumerate(model.layers):
        if i != skip:
            x = layer(x, cos, sin)
    return model.logits(model.norm(x))


# %% 2 · makes its own positions
def logits_without(model, skip, x, position_ids, mask):
    cos, sin = model.rotary_emb(torch.arange(x.shape[1])[None])
    for i, layer in enumerate(model.layers):
        if i != skip:
            x = layer(x, cos, sin, mask)
    return model.logits(model.norm(x))


# %% 2 · returns the hidden states
def logits_without(model, skip, x, position_ids, mask):
    cos, sin = model.rotary_emb(position_ids)
    for i, layer in enumerate(model.layers):
        if i != skip:
            x = layer(x, cos, sin, mask)
    return model.norm(x)


# %% 2 · cuts the block out of the model itself
def logits_without(model, skip, x, position_ids, mask):
    del model.layers[skip]
    return model.logits(model(x, position_ids, mask))


# %% 2 · leaves out only the GeGLU
def logits_without(model, skip, x, position_ids, mask):
    cos, sin = model.rotary_emb(position_ids)
    for i, layer in enumerate(model.layers):
        x = x + layer.self_attn(layer.input_layernorm(x), cos, sin, mask)
        if i != skip:
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.logits(model.norm(x))


# %% 2 · starts from token numbers
def logits_without(model, skip, x, position_ids, mask):
    x = model.embed(x)
    cos, sin = model.rotary_emb(position_ids)
    for i, layer in enumerate(model.layers):
        if i != skip:
            x = layer(x, cos, sin, mask)
    return model.logits(model.norm(x))


# %% 2 · runs that block only
def logits_without(model, skip, x, position_ids, mask):
    cos, sin = model.rotary_emb(position_ids)
    x = model.layers[skip](x, cos, sin, mask)
    return model.logits(model.norm(x))


# %% 2 · hands every block the first stream
def logits_without(model, skip, x, position_ids, mask):
    cos, sin = model.rotary_emb(position_ids)
    for i, layer in enumerate(model.layers):
        if i != skip:
            h = layer(x, cos, sin, mask)
    return model.logits(model.norm(h))


# %% 3 · forgets the minus
def surprise(model, ids):
    return -F.cross_entropy(logits_after(model, ids[:-1]), torch.tensor(ids), reduction="none")


# %% 3 · takes the mean
def surprise(model, ids):
    return F.cross_entropy(logits_after(model, ids[:-1]), torch.tensor(ids))


# %% 3 · one row too many
def surprise(model, ids):
    logs = logits_after(model, ids).log_softmax(-1)
    return -logs[1:].gather(1, torch.tensor(ids)[:, None])[:, 0]


# %% 3 · gives probabilities
def surprise(model, ids):
    p = logits_after(model, ids[:-1]).softmax(-1)
    return p.gather(1, torch.tensor(ids)[:, None])[:, 0]


# %% 3 · gives bits
def surprise(model, ids):
    p = logits_after(model, ids[:-1]).softmax(-1)
    return -p.gather(1, torch.tensor(ids)[:, None])[:, 0].log2()


# %% 3 · forgets the softmax
def surprise(model, ids):
    return -logits_after(model, ids[:-1]).gather(1, torch.tensor(ids)[:, None])[:, 0]


# %% 3 · drops the first token
def surprise(model, ids):
    return F.cross_entropy(
        logits_after(model, ids[:-1])[1:], torch.tensor(ids[1:]), reduction="none"
    )


# %% 3 · surprise of the best token
def surprise(model, ids):
    return -logits_after(model, ids[:-1]).log_softmax(-1).amax(-1)


# %% 3 · passes all ids, the shapes differ
def surprise(model, ids):
    return F.cross_entropy(logits_after(model, ids), torch.tensor(ids), reduction="none")


# %% 3 · takes the row behind the token itself
def surprise(model, ids):
    logs = logits_after(model, ids).log_softmax(-1)
    return torch.stack([-logs[i + 1, token] for i, token in enumerate(ids)])


# %% 3 · logarithm with base ten
def surprise(model, ids):
    p = logits_after(model, ids[:-1]).softmax(-1)
    return -p[range(len(ids)), ids].log10()
